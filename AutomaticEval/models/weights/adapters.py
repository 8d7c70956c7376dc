"""Weights that stand for a change of others: adapters of peft, and deltas that are added. Where an adapter's base is."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import cached_file

from AutomaticEval.errors import ModelError, ModelUnavailable, first_line

CONFIG = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


class Alone(NamedTuple):
    """An adapter that lies by itself, and what it belongs to."""

    base: str
    """A hub name, or a folder's path."""
    revision: str | None
    """The revision of the base model."""
    has_tokenizer: bool


def adapter_alone(source: str, revision: str | None, subfolder: str) -> Alone | None:
    """What a folder or hub name that holds an adapter, but no model, belongs to; None for others. Raises ModelUnavailable."""

    def path_of(name: str) -> str | None:
        """None for what is not there, or out of reach: then transformers says so."""
        quiet = ("gated_repo", "missing_entries", "connection_errors")
        how: dict[str, Any] = {f"_raise_exceptions_for_{what}": False for what in quiet}
        try:
            found: str | None = cached_file(source, name, revision=revision, subfolder=subfolder, **how)
        except (OSError, ValueError):
            return None
        return found

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
    beside = Path(file).parent / base  # a relative path is meant from the adapter, or from where it was trained
    where = next((each for each in (beside, Path(base).expanduser()) if each.is_dir()), None)
    has_tokenizer = any(path_of(name) is not None for name in TOKENIZER_FILES)
    return Alone(str(base if where is None else where.resolve()), about.get("revision"), has_tokenizer)


def _lacks_weights(folder: Path) -> bool:
    """Whether a folder that is there holds an adapter's weights at most."""
    if not folder.is_dir():
        return False
    return not any(file.suffix in (".safetensors", ".bin") and "adapter" not in file.name for file in folder.iterdir())


def with_adapter(model: Any, adapter: str, revision: str | None) -> Any:
    """The model with an adapter of peft. Raises ModelError without peft and for weights that are offloaded, ModelUnavailable."""
    try:
        from peft import PeftModel
    except ImportError:
        raise ModelError(
            f"the adapter {adapter!r} needs peft, which is not installed: pip install 'AutomaticEval[peft]'."
        ) from None
    if any(weight.is_meta for weight in model.parameters()):  # peft (0.21) would leave the adapter's weights out
        raise ModelError(
            f"peft: {adapter!r} cannot be put on weights that are offloaded; choose a device for the whole model, or merge the "
            "adapter into its base and save that."
        )
    if len(set(getattr(model, "hf_device_map", {}).values())) == 1:
        del model.hf_device_map  # or peft would place a model that is on the CPU anew, on a GPU when there is one
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # they would be random numbers
        try:
            return PeftModel.from_pretrained(model, adapter, revision=revision)
        except (UserWarning, RuntimeError) as failure:
            raise ModelUnavailable(
                f"the adapter {adapter!r} does not fit the model: {first_line(failure)[:300]}"
            ) from failure


def resize(model: Any, n_tokens: int, *, only_grow: bool) -> None:
    """Give the embeddings a row a token, for adapters of which the tokenizer has more; the new rows are the same each time."""
    n_rows = model.config.get_text_config().vocab_size
    if n_rows == n_tokens or (only_grow and n_rows > n_tokens):
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(n_tokens)


def add_delta(model: Any, delta: Any, name: str) -> None:
    """Add a model's weights to another's of the same shape, in place, as lm-eval does: to tied weights once for each of their names.

    Raises ModelError for weights that are offloaded, ModelUnavailable for others than the model's.
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
            warnings.warn(
                f"{key} is tied to {seen[weight.data_ptr()]}: the delta {name!r} is added to it twice, as by lm-eval.",
                stacklevel=2,
            )
