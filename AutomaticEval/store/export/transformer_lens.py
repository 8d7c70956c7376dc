"""The names and shapes of TransformerLens' ActivationCache for what is captured here. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from AutomaticEval.errors import CaptureError, SelectionError, StoreError
from AutomaticEval.store.bits import bits

_IN_BLOCK = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "mlp_post": "mlp.hook_post",
}
_ONCE = {"embeddings": "blocks.0.hook_resid_pre", "final_norm": "ln_final.hook_out", "logits": "logits"}
_HEADS = {"q": "n_heads", "z": "n_heads", "k": "n_kv_heads", "v": "n_kv_heads"}


def transformer_lens_name(key: str) -> str:
    """The name of an activation in TransformerLens: `layer_3.mlp_out` -> `blocks.3.hook_mlp_out`.

    `final_norm` is `ln_final.hook_out`, as TransformerBridge has it: `hook_normalized` is taken before the norm's weights
    in some versions and norms and after them in others. `logits`, which TransformerLens returns beside its cache, keep
    their name.
    Raises SelectionError for what has no name there.
    """
    if key in _ONCE:
        return _ONCE[key]
    head, _, kind = key.partition(".")
    layer = head.removeprefix("layer_")
    if not layer.isdecimal() or (kind or "resid_post") not in _IN_BLOCK:
        raise SelectionError(f"TransformerLens has no name for {key!r}; export to safetensors, which keeps every site.")
    return f"blocks.{layer}.{_IN_BLOCK[kind or 'resid_post']}"


def as_activation_cache(sample: Mapping[str, Any]) -> dict[str, Tensor]:
    """One sample's activations as TransformerLens names and shapes them: `ActivationCache(as_activation_cache(run[0]), model)`.

    sample: of `run[i]` or `load_activations`. Returns name -> [1, pos, ...], with q and z [1, pos, n_heads, d_head], k and
    v [1, pos, n_kv_heads, d_head]. pos counts the rows that were kept, in their order; `sample["positions"]` says where
    they are in the sequence. With positions="all" they are the sequence, as TransformerLens has it.
    The numbers are those of the Hugging Face model. TransformerLens has the same ones only where it does not fold norms or
    centre weights: `HookedTransformer.from_pretrained_no_processing`, or TransformerBridge without compatibility mode.
    Raises SelectionError, and StoreError when the file does not say how many heads there are.
    """
    activations = sample["activations"]
    widths = {key: tensor.shape[1] for key, tensor in activations.items()}
    found: dict[str, Tensor] = {}
    for key, (name, shape) in places(widths, sample["settings"]).items():
        tensor = activations[key].reshape(1, len(activations[key]), *shape)
        if name in found and not np.array_equal(bits(found[name]), bits(tensor)):
            raise CaptureError(f"{key} and another site are both {name}, but hold different numbers; capture again.")
        found.setdefault(name, tensor)
    return found


def places(widths: Mapping[str, int], settings: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key -> its name in TransformerLens, and the shape of one position."""
    return {
        key: (transformer_lens_name(key), _shape(key, width, settings.get("shape"))) for key, width in widths.items()
    }


def _shape(key: str, width: int, shape: Mapping[str, int] | None) -> tuple[int, ...]:
    kind = key.partition(".")[2]
    if kind not in _HEADS:
        return (width,)
    if not shape or not shape.get(_HEADS[kind]) or not shape.get("d_head"):
        raise StoreError(
            f"{key} cannot be split into heads: the file does not say how many there are (no 'shape' in its settings). "
            "Capture again, or export to safetensors, which keeps it as [n_rows, width]."
        )
    heads = (shape[_HEADS[kind]], shape["d_head"])
    if heads[0] * heads[1] != width:
        raise StoreError(
            f"{key} is {width} wide, not {heads[0]} heads of {heads[1]}; export to safetensors, which keeps it as it is."
        )
    return heads
