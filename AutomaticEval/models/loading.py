"""A model's name, path or instance -> model and tokenizer, ready to run. A few models stay loaded between calls.

Two names never share a model that stays loaded, nor do two states of one folder. A name gives the plain model, and never one that is being edited.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Unpack

import torch

from AutomaticEval.errors import ModelError, ModelUnavailable, UnsupportedModel, unknown_option
from AutomaticEval.models.architecture.description import KNOWN
from AutomaticEval.models.architecture.module_names import n_layers_in
from AutomaticEval.models.checkpoint.load_options import LoadKeywords as LoadKeywords
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel as LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER as DEMO_FOLDER
from AutomaticEval.models.checkpoint.model_sources import ModelSources, folder_states, sources_of
from AutomaticEval.models.checkpoint.model_weights import config_of, load_weights
from AutomaticEval.models.checkpoint.quantised import settle_weights
from AutomaticEval.models.checkpoint.tokenizers import own_tokenizer, tokenizer_named
from AutomaticEval.models.checkpoint.unloaded_model import n_described_blocks
from AutomaticEval.models.described.given_config import GivenConfig, text_config
from AutomaticEval.models.described.plain_module import callable_as_ours, is_plain, lacking
from AutomaticEval.models.described.remembered import description_of, remember
from AutomaticEval.models.edited_models import active_edits
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.refused.unsuited import refuse_untrue
from AutomaticEval.models.weights.active_adapters import using_adapter
from AutomaticEval.public_names import absolute, public_name
from AutomaticEval.tested_versions import tell_newer

MAX_LOADED = 2


@dataclass
class _Entry:
    """What stays loaded: a model and, once a call needed it, the model's own tokenizer."""

    model: Any
    tokenizer: Any = None


_loaded: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
"""The models that stay loaded, the least recently used first."""
_loading = threading.Lock()


def load_model(
    model: Any, *, tokenizer: Any = None, options: LoadOptions | None = None, **load: Unpack[LoadKeywords]
) -> LoadedModel:
    """The model of a hub name, a folder, "demo", or a loaded instance (then with its tokenizer).

    tokenizer: with a name, another tokenizer or the name of one. load: dtype="float32", device="cuda:1", and the other fields of
    `LoadOptions`; options: all of them in one object, in place of keywords. A name that holds nothing but an adapter of peft gives the adapter's
    base with the adapter. At most MAX_LOADED models stay in memory; the least recently used one goes first.
    Raises ModelUnavailable, DeviceUnavailable, UnsupportedModel; ModelError for options that would be ignored, and for a name whose loaded
    model is being edited; TypeError for an unknown option.
    """
    options = _options_of(options, load)
    tell_newer()
    if not isinstance(model, str | Path):
        if options.adapter:
            raise ModelError(
                "adapter= of a model that is loaded already: write `with using_adapter(model, name) as model:`."
            )
        _refuse_ignored(options, [each.name for each in fields(options)], "a model")
        loaded = model if isinstance(model, LoadedModel) else _from_instance(model, tokenizer)
        refuse_untrue(loaded.model)
        return loaded
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        _refuse_ignored(options, ["use_fast_tokenizer", "add_bos_token"], "a tokenizer")
    sources = sources_of(str(model), options)
    if isinstance(tokenizer, str | Path):
        tokenizer = tokenizer_named(str(tokenizer), sources, options)
    entry = _entry_of(sources, options, tokenizer)
    _refuse_edited(entry.model, model)
    refuse_untrue(entry.model)
    return LoadedModel(
        entry.model,
        entry.tokenizer if tokenizer is None else tokenizer,
        public_name(model),
        _loaded_with(sources, options),
        _paths(sources.name, options),
    )


@contextmanager
def adapter_chosen(model: Any, options: LoadOptions) -> Iterator[LoadOptions]:
    """Inside the with, the adapter that options name is active in a model that is loaded already. Gives the options that are left for `load_model`.

    A model that is given by its name is loaded with that adapter. Raises ModelError, as `using_adapter`.
    """
    if isinstance(model, str | Path) or options.adapter is None:
        yield options
        return
    with using_adapter(model, options.adapter):
        yield replace(options, adapter=None)


def refuse_unknown(load: LoadKeywords) -> None:
    """Raises TypeError for a keyword that is no option of loading."""
    for name in load:
        if name not in LoadKeywords.__annotations__:
            raise unknown_option(name, LoadKeywords.__annotations__)


def _options_of(options: LoadOptions | None, load: LoadKeywords) -> LoadOptions:
    """How a model is loaded, from an object or from keywords. Raises TypeError for an unknown keyword, ModelError for both."""
    refuse_unknown(load)
    if options is not None and load:
        raise ModelError(
            f"{', '.join(load)} were given beside options=; write them into options, or leave options out."
        )
    return LoadOptions(**load) if options is None else options


def n_layers_of(model: Any, options: LoadOptions = LoadOptions()) -> int:
    """The number of layers, from the config alone, so that a wrong layer is refused before the weights load."""
    if isinstance(model, str | Path):
        if options.description is not None and options.description.blocks:
            return n_described_blocks(str(model), options)
        config = config_of(sources_of(str(model), options), options).get_text_config()
        try:
            return n_layers_in(GivenConfig(config, options.description or KNOWN), str(model))
        except UnsupportedModel as failure:
            code = " --trust_remote_code" if options.trust_remote_code else ""
            raise UnsupportedModel(
                f"{failure} Its parts can be described: `python main.py sites --model {model}{code}` prints what to complete (docs/describe.md)."
            ) from None
    instance = model.model if isinstance(model, LoadedModel) else model
    if description_of(instance).given:
        return find_layout(instance).n_layers
    return n_layers_in(text_config(instance), type(instance).__name__)


def revision_of(model: str | Path, options: LoadOptions = LoadOptions()) -> str | None:
    """The commit that loading a hub name would give now; None for a folder, and when the hub does not tell."""
    sources = sources_of(str(model), options)
    if Path(sources.base).is_dir():
        return None
    try:
        return getattr(config_of(sources, options), "_commit_hash", None)
    except ModelUnavailable:
        return None


def state_of(model: str | Path, options: LoadOptions = LoadOptions()) -> str | None:
    """A hash of the names, sizes and times of a folder's files; None for a hub name, whose revision tells its state."""
    states = folder_states(sources_of(str(model), options, ask_hub=False), options)
    return hashlib.blake2b(repr(states).encode(), digest_size=8).hexdigest() if states else None


def _refuse_ignored(options: LoadOptions, names: list[str], what: str) -> None:
    """Raises ModelError for options that say how to load something that is loaded already."""
    ignored = options.given(names)
    if ignored:
        raise ModelError(
            f"{', '.join(ignored)} were given with {what} that is loaded already; load it that way, or pass its name."
        )


def _refuse_edited(loaded: Any, name: str | Path) -> None:
    """Raises ModelError for a name whose model, which stays loaded, is being edited: it would not give the plain model."""
    if active_edits(loaded):
        raise ModelError(
            f"{str(name)!r} names the plain model, and `editing` is changing it just now. Pass on the model that editing gives (`with "
            f"editing(…) as model`), or run the plain model before the with, or after it."
        )


def _from_instance(model: Any, tokenizer: Any) -> LoadedModel:
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedModel(
            f"a model is a name, a folder, or a loaded transformers model; found {type(model).__name__}."
        )
    if is_plain(model) and not description_of(model).given:
        raise UnsupportedModel(
            f"{type(model).__name__} is no transformers model (it has no {' and no '.join(lacking(model))}); say what its parts are called first: "
            "describe_model(model, blocks=…)."
        )
    if tokenizer is None:
        raise ModelError("a loaded model was passed without its tokenizer; pass tokenizer= too.")
    settle_weights(model)
    name = public_name(getattr(model, "name_or_path", "")) or type(model).__name__
    return LoadedModel(callable_as_ours(model), tokenizer, name)


def _entry_of(sources: ModelSources, options: LoadOptions, tokenizer: Any) -> _Entry:
    """The model that stays loaded, loaded first when it is not there. tokenizer: the one that was asked for; None for the model's own."""
    # a model with an adapter has a row for each token of its tokenizer
    n_tokens = len(tokenizer) if tokenizer is not None and sources.adapter else None
    key = (sources._replace(name=""), folder_states(sources, options), repr(options), n_tokens)
    with _loading:
        if key not in _loaded:
            while len(_loaded) >= MAX_LOADED:
                _loaded.popitem(last=False)
            own = own_tokenizer(sources, options) if sources.adapter and tokenizer is None else None
            whole = load_weights(sources, options, own if tokenizer is None else tokenizer)
            remember(whole, options.description)
            _loaded[key] = _Entry(whole, own)
        _loaded.move_to_end(key)
        entry = _loaded[key]
        if tokenizer is None and entry.tokenizer is None:
            entry.tokenizer = own_tokenizer(sources, options)
        return entry


def _loaded_with(sources: ModelSources, options: LoadOptions) -> dict[str, Any]:
    """The options that decide which weights the model has, for files: names in place of paths."""
    named = {name: public_name(getattr(options, name)) for name in options.given(("peft", "delta"))}
    inside = {name: getattr(options, name) for name in options.given(("adapter", "subfolder"))}
    base = {} if sources.alone is None else {"base": public_name(sources.base)}
    return {**named, **inside, **base}


def _paths(name: str, options: LoadOptions) -> dict[str, str]:
    """model, peft and delta -> the absolute path, of those that were given by a path."""
    given = {"model": name, "peft": options.peft, "delta": options.delta}
    return {part: str(absolute(each)) for part, each in given.items() if each and public_name(each) != each}
