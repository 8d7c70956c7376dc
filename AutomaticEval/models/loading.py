"""A model's name, path or instance -> model and tokenizer, ready to run.

A few models stay loaded between calls. Two names never share an entry, nor do two states of one folder.
Quantisation lives here and nowhere else.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from AutomaticEval import __version__
from AutomaticEval.errors import DeviceUnavailable, ModelError, ModelUnavailable, UnsupportedModel, first_line
from AutomaticEval.models.architecture.module_names import n_layers_in
from AutomaticEval.models.edited_models import names_of
from AutomaticEval.models.find_layout import find_layout, refuse_untrue
from AutomaticEval.models.layout import Layout
from AutomaticEval.models.load_options import LoadOptions
from AutomaticEval.models.weights.adapters import Alone, adapter_alone, add_delta, resize, with_adapter
from AutomaticEval.models.weights.fingerprint import fingerprint, sampled_fingerprint
from AutomaticEval.models.weights.provenance import adapters_of, library_versions, provenance
from AutomaticEval.public_names import absolute, public_name
from AutomaticEval.settings import RunSettings
from AutomaticEval.tested_versions import tell_newer

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "model"
MAX_LOADED = 2
SHAPE = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head")
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its tokenizer and the name it goes by in files, which is no path."""

    model: Any
    tokenizer: Any
    name: str
    loaded_with: Mapping[str, Any] = field(default_factory=dict)
    """The options that say which numbers it was made of, besides its name: peft, delta, subfolder, …"""

    paths: Mapping[str, str] = field(default_factory=dict)
    """model, peft and delta -> where it is on this machine, of those that are folders."""

    @property
    def layout(self) -> Layout:
        """Where its sites are, verified. Raises UnsupportedModel."""
        return find_layout(self.model)

    @property
    def context(self) -> int | None:
        """The most tokens it can be fed, or None when its config does not say."""
        config = self.model.config.get_text_config()
        found = (getattr(config, name, None) for name in _CONTEXT_FIELDS)
        return next((int(number) for number in found if number), None)

    @property
    def shape(self) -> dict[str, int]:
        """n_layers, d_model and the heads, for files: q, k, v and z are split into heads by them."""
        return {name: getattr(self.layout, name) for name in SHAPE}

    def fingerprint(self) -> str:
        """A hash of every number of the model as it is now. Raises ModelError."""
        return fingerprint(self.model)

    def identity(self) -> RunSettings:
        """Which weights, for settings: by the hash of every number, and by the older one that is held by older runs."""
        return RunSettings().changed(model_hash=self.fingerprint(), fingerprint=sampled_fingerprint(self.model))

    def made_with(self) -> RunSettings:
        """`numbers`, and which model it is and how it computes, for the settings of runs. Computed anew each time."""
        identity = self.identity().as_dict()
        return self.numbers().changed(**identity, shape=self.shape, **provenance(self.model, self.tokenizer))

    def numbers(self) -> RunSettings:
        """The settings of the model that decide its numbers, for files."""
        model = self.model
        method = getattr(model, "quantization_method", None)
        some = {"edits": names_of(model), "loaded_with": dict(self.loaded_with), "adapters": adapters_of(model)}
        return RunSettings().changed(
            **{name: value for name, value in some.items() if value},
            dtype=str(model.dtype).removeprefix("torch."),
            attention=getattr(model.config, "_attn_implementation", None),
            device=str(model.device),
            quantization=None
            if method is None
            else "8bit"
            if getattr(model, "is_loaded_in_8bit", False)
            else "4bit"
            if getattr(model, "is_loaded_in_4bit", False)
            else str(method),
            revision=getattr(model.config, "_commit_hash", None),
            versions={
                "AutomaticEval": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                **library_versions(model),
            },
        )


@dataclass
class _Entry:
    """What stays loaded: a model and, once a call needed it, its own tokenizer."""

    model: Any
    tokenizer: Any = None


_loaded: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
_loading = threading.Lock()


def load_model(model: Any, *, tokenizer: Any = None, options: LoadOptions = LoadOptions()) -> LoadedModel:
    """The model of a hub name, a folder, "demo", or a loaded instance (then with its tokenizer).

    tokenizer: with a name, another one or the name of one. A name that holds an adapter of peft alone is its base with the adapter.
    At most MAX_LOADED stay in memory, the least recently used goes first.
    Raises ModelUnavailable, DeviceUnavailable, UnsupportedModel; ModelError for options that would be ignored.
    """
    tell_newer()
    if not isinstance(model, str | Path):
        ignored = options.given(each.name for each in fields(options))
        if ignored:
            raise ModelError(
                f"{', '.join(ignored)} were given with a model that is loaded already; load it that way, or pass its name."
            )
        loaded = model if isinstance(model, LoadedModel) else _from_instance(model, tokenizer)
        refuse_untrue(loaded.model)
        return loaded
    ignored = options.given(("use_fast_tokenizer", "add_bos_token"))
    if ignored and tokenizer is not None and not isinstance(tokenizer, str | Path):
        raise ModelError(
            f"{', '.join(ignored)} were given with a tokenizer that is loaded already; load it that way, or pass its name."
        )
    parts = _parts(str(model), options)
    if isinstance(tokenizer, str | Path):
        tokenizer = _other_tokenizer(str(tokenizer), parts, options)
    n_tokens = (
        len(tokenizer) if tokenizer is not None and parts.adapter else None
    )  # an adapter's model has a row for each
    key = (parts._replace(name=""), _states(parts, options), repr(options), n_tokens)
    with _loading:
        if key not in _loaded:
            while len(_loaded) >= MAX_LOADED:
                _loaded.popitem(last=False)
            own = _tokenizer(parts.tokenizer, parts, options) if parts.adapter and tokenizer is None else None
            _loaded[key] = _Entry(_load(str(model), parts, options, own if tokenizer is None else tokenizer), own)
        _loaded.move_to_end(key)
        entry = _loaded[key]
        if tokenizer is None and entry.tokenizer is None:
            entry.tokenizer = _tokenizer(parts.tokenizer, parts, options)
    made_of = {name: getattr(options, name) for name in options.given(("peft", "delta", "subfolder"))}
    made_of |= {} if parts.alone is None else {"base": parts.base}
    given = {"model": str(model), "peft": options.peft, "delta": options.delta}
    paths = {name: str(absolute(each)) for name, each in given.items() if each and public_name(each) != each}
    made_of = {name: each if name == "subfolder" else public_name(each) for name, each in made_of.items()}
    found = entry.tokenizer if tokenizer is None else tokenizer
    return LoadedModel(entry.model, found, public_name(model), made_of, paths)


class _Parts(NamedTuple):
    """What a model is put together from, each as from_pretrained is given it."""

    name: str
    """As it was asked for."""
    base: str
    revision: str | None
    """The revision of the base model."""
    adapter: str | None
    delta: str | None
    alone: Alone | None
    """Set when the name that was given holds an adapter and no model."""
    tokenizer: str


def _parts(name: str, options: LoadOptions, *, ask_hub: bool = True) -> _Parts:
    """ask_hub: whether a name on the hub may be an adapter's. Raises ModelError for an adapter that is to be put on another."""
    source, delta = _source(name), options.delta and _source(options.delta)
    is_asked = ask_hub or Path(source).is_dir()
    alone = adapter_alone(source, options.revision, options.subfolder or "") if is_asked else None
    if alone is None:
        adapter = options.peft and _source(options.peft)
        return _Parts(name, source, options.revision, adapter, delta, None, source)
    if options.peft or options.delta or options.subfolder:
        raise ModelError(f"{name} is an adapter for {alone.base}; name that, and give peft={name!r}.")
    return _Parts(name, alone.base, alone.revision, source, None, alone, source if alone.has_tokenizer else alone.base)


def n_layers_of(model: Any, options: LoadOptions = LoadOptions()) -> int:
    """The number of layers, from the config alone, so that a wrong layer is refused before the weights load."""
    if isinstance(model, LoadedModel):
        model = model.model
    is_name = isinstance(model, str | Path)
    config = _config(_parts(str(model), options), options) if is_name else model.config
    return n_layers_in(config.get_text_config(), str(model) if is_name else type(model).__name__)


def revision_of(model: str | Path, options: LoadOptions = LoadOptions()) -> str | None:
    """The commit that loading a hub name would give now; None of a folder, or when the hub does not tell."""
    parts = _parts(str(model), options)
    if Path(parts.base).is_dir():
        return None
    try:
        return getattr(_config(parts, options), "_commit_hash", None)
    except ModelUnavailable:
        return None


def _config(parts: _Parts, options: LoadOptions) -> Any:
    return _reading(parts.name, lambda: AutoConfig.from_pretrained(parts.base, **_where(parts, options)))


def _where(parts: _Parts, options: LoadOptions) -> dict[str, Any]:
    """How the base's files are found and read."""
    inside = {"subfolder": options.subfolder} if options.subfolder else {}
    return {"revision": parts.revision, "trust_remote_code": options.trust_remote_code, **inside}


def pick_device(device: str) -> str:
    """The torch device that `device` means here. Raises DeviceUnavailable."""
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise DeviceUnavailable(f"no device {device!r}; write auto, cpu, mps, cuda or cuda:1.") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, True):
        raise DeviceUnavailable(
            f"the device {device!r} was asked for, but torch sees no {kind} here; use --device auto."
        )
    return device


def _source(model: str | Path) -> str:
    """What from_pretrained is given: a folder's absolute path, or a hub name."""
    if str(model) == DEMO:
        return str(DEMO_FOLDER)
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else str(model)


def state_of(model: str | Path, options: LoadOptions = LoadOptions()) -> str | None:
    """A hash of names, sizes and times of a folder's files; None of a hub name, whose revision tells its state."""
    found = _states(_parts(str(model), options, ask_hub=False), options)
    return hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest() if found else None


def _states(parts: _Parts, options: LoadOptions) -> tuple[Any, ...]:
    """Sizes and times of the files of the base model and of what is put on it. A checkpoint that was trained further is another model."""
    base = _state(str(Path(parts.base, options.subfolder)) if options.subfolder else parts.base)
    others = [_state(source) for source in (parts.adapter, parts.delta) if source is not None]
    return (base, *others) if any(others) else base


def _state(source: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a folder's files."""
    if not Path(source).is_dir():
        return ()
    found = sorted(path for path in Path(source).iterdir() if path.is_file())
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found)


def _from_instance(model: Any, tokenizer: Any) -> LoadedModel:
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "generate"):
        raise UnsupportedModel(
            f"a model is a name, a folder, or a loaded transformers model; found {type(model).__name__}."
        )
    if tokenizer is None:
        raise ModelError("a loaded model was passed without its tokenizer; pass tokenizer= too.")
    return LoadedModel(model, tokenizer, public_name(getattr(model, "name_or_path", "")) or type(model).__name__)


def _other_tokenizer(name: str, parts: _Parts, options: LoadOptions) -> Any:
    """The tokenizer that was asked for under another name than the model's."""
    source = _source(name)
    if source == parts.tokenizer:
        return _tokenizer(source, parts, options)
    return _tokenizer(source, parts._replace(name=name, base="", tokenizer=source, revision=None, alone=None), options)


def _tokenizer(source: str, parts: _Parts, options: LoadOptions) -> Any:
    """Raises ModelUnavailable, and ModelError for one in Python where there is none."""
    where: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if source == parts.base:
        where = _where(parts, options)
    if parts.alone is not None and source == parts.adapter:
        where["revision"] = options.revision
    if options.add_bos_token is not None:
        where["add_bos_token"] = options.add_bos_token
    found = _reading(
        parts.name, lambda: AutoTokenizer.from_pretrained(source, use_fast=options.use_fast_tokenizer, **where)
    )
    if not options.use_fast_tokenizer and getattr(found, "is_fast", False):
        raise ModelError(
            f"use_fast_tokenizer=False: transformers has no tokenizer in Python for {parts.name}; leave it out."
        )
    return found


def _load(name: str, parts: _Parts, options: LoadOptions, tokenizer: Any) -> Any:
    """tokenizer: of a model with an adapter."""
    device = None if options.device_map else pick_device(options.device)
    kwargs: dict[str, Any] = {"device_map": options.device_map or {"": device}}
    kwargs |= {name: getattr(options, name) for name in ("max_memory", "offload_folder") if getattr(options, name)}
    kwargs["dtype"] = options.dtype
    if options.load_in_8bit or options.load_in_4bit:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # fp32 inputs log a line a matrix product
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=options.load_in_8bit, load_in_4bit=options.load_in_4bit, bnb_4bit_quant_type="nf4"
        )
    if getattr(_config(parts, options), "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder; only decoders are asked and captured.")
    loaded = _reading(name, lambda: _whole(name, parts.base, {**kwargs, **_where(parts, options)}))
    if parts.delta is not None:
        added = {**kwargs, "revision": options.revision, "trust_remote_code": options.trust_remote_code}
        delta = _reading(parts.delta, lambda: _whole(str(options.delta), str(parts.delta), added))
        add_delta(loaded, delta, str(options.delta))
    if parts.adapter is not None:
        adapter = parts.adapter
        resize(loaded, len(tokenizer), only_grow=parts.alone is not None)  # as lm-eval; as peft, of an adapter alone
        loaded = _reading(adapter, lambda: with_adapter(loaded, adapter, options.revision))
    return loaded.eval()


def _whole(name: str, source: str, kwargs: dict[str, Any]) -> Any:
    """A checkpoint's model. Raises ModelUnavailable when it lacks weights, which transformers would fill with random numbers."""
    loaded, found = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **kwargs)
    lacking = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if lacking:
        raise ModelUnavailable(
            f"the checkpoint of {name!r} lacks {len(lacking)} of the model's weights (first {lacking[0]}): its config and "
            "its weights do not belong together."
        )
    return loaded


def _reading(name: str, load: Any) -> Any:
    """Run what reads from the hub or a folder; its failures become one line each that says what to do."""
    try:
        return load()
    except (OSError, ValueError) as failure:
        raise ModelUnavailable(_why(name, failure)) from failure


def _why(name: str, failure: BaseException) -> str:
    causes, cause = [], failure
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    kinds = {kind.__name__ for one in causes for kind in type(one).__mro__}
    text = " ".join(str(one) for one in causes)
    if "GatedRepoError" in kinds or "gated repo" in text:
        return (
            f"the model {name!r} is gated: accept its licence on its page on the hub, log in with `hf auth login`, "
            "and run again."
        )
    if "trust_remote_code" in text:
        return f"{name!r} comes with code of its own, which runs only when it is trusted: pass trust_remote_code=True."
    if Path(name).is_dir():
        return f"the folder {name!r} holds no model that transformers can load: {first_line(failure)}"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"no folder {name!r}; give a folder with config.json and weights, or a hub name such as gpt2."
    if kinds & {"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"}:
        return f"the hub has no model {name!r} (or it is private: `hf auth login`); check the name and revision."
    if (
        kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError"}
        or "couldn't connect" in text
    ):
        return (
            f"the model {name!r} is not in the local cache and the hub cannot be reached; connect once to download it, "
            "or give a local folder. The bundled model is called demo."
        )
    return f"the model {name!r} cannot be loaded: {first_line(failure)}"
