"""Residual streams read by the tests' own hooks, which use no code of the package; and the number of hooks on a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "gpt_neo": "transformer.h"}
FINAL_NORM = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "gpt_neo": "transformer.ln_f",
}


def raw_residuals(model: Any, family: str, ids: Sequence[int]) -> dict[str, Tensor]:
    """`embeddings` and each `layer_i`, [pos, d_model], from one forward over one unpadded row, without a cache."""
    residuals: dict[str, Tensor] = {}
    blocks = model.get_submodule(BLOCKS[family])
    handles = []

    def output(key: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            residuals[key] = (out[0] if isinstance(out, tuple) else out)[0].clone()

        return hook

    def entering(module: Any, args: Any, kwargs: Any) -> None:
        residuals["embeddings"] = (args[0] if args else kwargs["hidden_states"])[0].clone()

    handles.append(blocks[0].register_forward_pre_hook(entering, with_kwargs=True))
    handles += [block.register_forward_hook(output(f"layer_{i}")) for i, block in enumerate(blocks)]
    try:
        with torch.no_grad():
            model(torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return residuals


def n_hooks(model: Any) -> int:
    """The number of hooks on all modules, without those that transformers leaves after `output_hidden_states=True`."""
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return sum(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)
