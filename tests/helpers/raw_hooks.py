"""Residual streams as plain hooks of the tests read them: a second way, which uses nothing of the package; and the number of hooks on a model."""

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
    """embeddings and layer_i of one unpadded row in one forward without a cache, by hooks of the test's own."""
    found: dict[str, Tensor] = {}
    blocks = model.get_submodule(BLOCKS[family])
    handles = []

    def output(key: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            found[key] = (out[0] if isinstance(out, tuple) else out)[0].clone()

        return hook

    def entering(module: Any, args: Any, kwargs: Any) -> None:
        found["embeddings"] = (args[0] if args else kwargs["hidden_states"])[0].clone()

    handles.append(blocks[0].register_forward_pre_hook(entering, with_kwargs=True))
    handles += [block.register_forward_hook(output(f"layer_{i}")) for i, block in enumerate(blocks)]
    try:
        with torch.no_grad():
            model(torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def n_hooks(model: Any) -> int:
    """All hooks on all modules but those that transformers leaves there once it was asked for `output_hidden_states`."""
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return sum(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)
