"""Activations under the names and in the shapes of TransformerLens' ActivationCache. It reads and writes no files."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from AutomaticEval.errors import CaptureError, SelectionError, StoreError, UnknownSite
from AutomaticEval.settings import RunSettings
from AutomaticEval.sites import TABLE, site_of
from AutomaticEval.store.bits import bits
from AutomaticEval.store.reading.reduced_runs import refuse_reduced


def transformer_lens_name(key: str) -> str:
    """The name that an activation has in TransformerLens: `layer_3.mlp_out` -> `blocks.3.hook_mlp_out`.

    key: any spelling of a site. `final_norm` is `ln_final.hook_out`, as in TransformerBridge, since `hook_normalized` is taken before the
    norm's weights in some versions and norms, and after them in others. `logits` keep their name: TransformerLens returns them beside its
    cache. Raises SelectionError for what has no name there.
    """
    try:
        site = site_of(key)
    except UnknownSite:
        site = None
    name = None if site is None else TABLE[site.kind].transformer_lens
    if site is None or name is None:
        raise SelectionError(f"TransformerLens has no name for {key!r}; export to safetensors, which keeps every site.")
    return name.format(layer=site.layer)


def as_activation_cache(sample: Mapping[str, Any]) -> dict[str, Tensor]:
    """One sample's activations for TransformerLens: `ActivationCache(as_activation_cache(run[0]), model)`.

    sample: what `run[i]` or `load_activations` gives. Returns name -> [1, pos, ...], with q and z [1, pos, n_heads, d_head], and k and v
    [1, pos, n_kv_heads, d_head], with the d_head and n_kv_heads of their layer. pos counts the rows that were kept, in their order. With positions="all" they are the whole sequence, as in
    TransformerLens; otherwise `sample["positions"]` says where they are in it.
    The numbers are those of the Hugging Face model. TransformerLens has the same numbers only when it neither folds norms nor centres weights:
    `HookedTransformer.from_pretrained_no_processing`, or TransformerBridge without compatibility mode.
    Raises SelectionError for a site without a name there and for reduced rows, and StoreError when the file does not say how many heads there are.
    """
    refuse_reduced(sample["settings"], "TransformerLens' ActivationCache")
    activations = sample["activations"]
    widths = {key: tensor.shape[1] for key, tensor in activations.items()}
    cache: dict[str, Tensor] = {}
    for key, (name, shape) in places(widths, sample["settings"]).items():
        tensor = activations[key].reshape(1, len(activations[key]), *shape)
        if name in cache and not np.array_equal(bits(cache[name]), bits(tensor)):
            raise CaptureError(f"{key} and another site are both {name}, but hold different numbers; capture again.")
        cache.setdefault(name, tensor)
    return cache


def places(widths: Mapping[str, int], settings: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key -> its name in TransformerLens, and the shape of one position.

    widths: key -> width. settings: the run's, whose `shape` and `heads` say how many heads there are. Raises SelectionError, StoreError.
    """
    made = RunSettings.from_dict(settings)
    return {
        key: (transformer_lens_name(key), _shape(key, width, made.shape, (made.heads or {}).get(key)))
        for key, width in widths.items()
    }


def _shape(key: str, width: int, shape: Mapping[str, int] | None, own_heads: int | None) -> tuple[int, ...]:
    """own_heads: how many heads this key has, where the shape does not say it."""
    sizes = TABLE[site_of(key).kind].width
    if len(sizes) == 1:
        return (width,)
    if own_heads is not None:
        if width % own_heads:
            raise StoreError(
                f"{key} is {width} wide, which is not {own_heads} heads of one width; export to safetensors."
            )
        return own_heads, width // own_heads
    heads = tuple((shape or {}).get(size) or 0 for size in sizes)
    if not all(heads):
        raise StoreError(
            f"{key} cannot be split into heads: the file does not say how many there are (no 'shape' in its settings). "
            "Capture again, or export to safetensors, which keeps it as [n_rows, width]."
        )
    if prod(heads) != width:
        raise StoreError(
            f"{key} is {width} wide, not {heads[0]} heads of {heads[1]}; export to safetensors, which keeps it as it is."
        )
    return heads
