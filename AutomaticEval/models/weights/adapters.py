"""Weights that change those of a base model: adapters of peft, and deltas that are added. And where the base of an adapter is."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import cached_file

from AutomaticEval.errors import ModelError, ModelUnavailable, first_line, warn
from AutomaticEval.models.weights.active_adapters import BASE

CONFIG = "adapter_config.json"
DEFAULT = "default"
"""The name that peft gives to an adapter without another one."""
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


class Alone(NamedTuple):
    """What an adapter says that lies in a folder or on the hub without a model."""

    base: str
    """The hub name or the folder of the base model."""
    revision: str | None
    """The revision of the base model."""
    has_tokenizer: bool
    """Whether a tokenizer lies beside the adapter."""


def adapter_alone(source: str, revision: str | None, subfolder: str) -> Alone | None:
    """What a folder or hub name says that holds an adapter but no model; None for any other. Raises ModelUnavailable when it names no base."""

    def path_of(name: str) -> str | None:
        """The path of a file; None for one that is not there or out of reach, which transformers will say when it loads the model."""
        failures = ("gated_repo", "missing_entries", "connection_errors")
        quiet: dict[str, Any] = {f"_raise_exceptions_for_{kind}": False for kind in failures}
        try:
            path: str | None = cached_file(source, name, revision=revision, subfolder=subfolder, **quiet)
        except (OSError, ValueError):
            return None
        return path

    if path_of("config.json") is not None and not _lacks_weights(Path(source, subfolder)):
        return None
    file = path_of(CONFIG)
    if file is None:
        return None
    about = json.loads(Path(file).read_text(encoding="utf-8"))
    base = about.get("base_model_name_or_path")
    if not base:
        raise ModelUnavailable(
            f"the adapter {source!r} does not say what it was made for; name that, and give peft={source!r}."
        )
    beside = (
        Path(file).parent / base
    )  # a relative path counts from the adapter, or from the folder in which it was trained
    where = next((each for each in (beside, Path(base).expanduser()) if each.is_dir()), None)
    has_tokenizer = any(path_of(name) is not None for name in TOKENIZER_FILES)
    return Alone(str(base if where is None else where.resolve()), about.get("revision"), has_tokenizer)


def _lacks_weights(folder: Path) -> bool:
    """Whether this is an existing folder that holds no weights but those of an adapter."""
    if not folder.is_dir():
        return False
    return not any(file.suffix in (".safetensors", ".bin") and "adapter" not in file.name for file in folder.iterdir())


def subfolder_of(source: str, name: str | None) -> str:
    """Where in a folder or on the hub an adapter of this name is. peft saves the one that is called default in the folder itself."""
    if name in (None, DEFAULT, BASE):
        return ""
    folder = Path(source)
    is_alone = folder.is_dir() and not (folder / CONFIG).is_file() and not (folder / name / CONFIG).is_file()
    return "" if is_alone else name


def names_in(folder: Path) -> list[str]:
    """The names of the adapters in a folder: default for that of the folder itself, and its subfolders with one."""
    own = [DEFAULT] if (folder / CONFIG).is_file() else []
    return own + sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))


def with_adapter(model: Any, adapter: str, revision: str | None, name: str | None = None) -> Any:
    """The model with an adapter of peft.

    name: which one, when there are several: a subfolder, "default" for that of the folder itself, or "base" for the model as it is.
    Raises ModelError when peft is not installed or weights are offloaded, ModelUnavailable for an adapter that is not there or does not fit.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise ModelError(
            f"the adapter {adapter!r} needs peft, which is not installed: pip install 'AutomaticEval[peft]'."
        ) from None
    _refuse_unnamed(adapter, name)
    if name == BASE:
        return model
    if any(weight.is_meta for weight in model.parameters()):  # peft (0.21) would leave the adapter's weights out
        raise ModelError(
            f"peft: {adapter!r} cannot be put on weights that are offloaded; choose a device for the whole model, or merge the "
            "adapter into its base and save that."
        )
    if len(set(getattr(model, "hf_device_map", {}).values())) == 1:
        del model.hf_device_map  # with it, peft would move a model from the CPU to a GPU when there is one
    where: dict[str, Any] = {"revision": revision, "adapter_name": name or DEFAULT}
    if name not in (None, DEFAULT):
        where["subfolder"] = name
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "error", message="Found missing adapter keys"
        )  # the missing weights would be random numbers
        try:
            return PeftModel.from_pretrained(model, adapter, **where)
        except (UserWarning, RuntimeError) as failure:
            raise ModelUnavailable(
                f"the adapter {adapter!r} does not fit the model: {first_line(failure)[:300]}"
            ) from failure


def _refuse_unnamed(source: str, name: str | None) -> None:
    """Raises ModelUnavailable for an adapter that a folder does not have, and for a folder with several of which none was named."""
    names = names_in(Path(source)) if Path(source).is_dir() else []
    if names and (name or DEFAULT) not in (*names, BASE):
        which = (
            "holds several adapters; name one by --adapter (in code adapter=):"
            if name is None
            else f"has no adapter {name!r}; it has"
        )
        raise ModelUnavailable(
            f"the folder {source!r} {which} {', '.join(names)}{', or base for none of them' * (name is None)}."
        )


def resize(model: Any, n_tokens: int, *, only_grow: bool) -> None:
    """Give the embeddings a row for each token, for an adapter whose tokenizer has other tokens. The new rows are the same each time."""
    n_rows = model.config.get_text_config().vocab_size
    if n_rows == n_tokens or (only_grow and n_rows > n_tokens):
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(n_tokens)


def add_delta(model: Any, delta: Any, name: str) -> None:
    """Add the weights of `delta` to those of `model`, in place, as lm-eval does it: tied weights are added to once for each of their names.

    Raises ModelError for offloaded weights, ModelUnavailable when the weights have other names or shapes.
    """
    weights, added = model.state_dict(), delta.state_dict()
    if any(weight.is_meta for weight in [*weights.values(), *added.values()]):
        raise ModelError(
            f"delta: {name!r} cannot be added to weights that are offloaded; choose a device for the whole model."
        )
    apart = sorted(weights.keys() ^ added.keys())
    if apart:
        raise ModelUnavailable(
            f"the delta {name!r} does not fit the model: {len(apart)} weights are in one alone, first {apart[0]}."
        )
    seen: dict[int, str] = {}
    for key, weight in weights.items():
        if weight.shape != added[key].shape:
            shapes = f"{list(added[key].shape)}, the model's {list(weight.shape)}"
            raise ModelUnavailable(f"the delta {name!r} does not fit the model: its {key} is {shapes}.")
        weight.data += added[key].to(weight.device)
        if seen.setdefault(weight.data_ptr(), key) != key and weight.numel():
            warn(f"{key} is tied to {seen[weight.data_ptr()]}: the delta {name!r} is added to it twice, as by lm-eval.")
