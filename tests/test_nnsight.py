"""Sites, and an ablated head, as nnsight sees them in the same models (extra `oracles`)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from families.configs import FAMILIES, build
from torch import Tensor

from AutomaticEval import Edit, editing, score_continuations
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

nnsight = pytest.importorskip("nnsight", reason="pip install '.[oracles]' to compare with nnsight")

IDS = [5, 17, 99, 3, 250, 41, 7, 8]
GPT2, LLAMA, NEOX = "transformer.h.{}", "model.layers.{}", "gpt_neox.layers.{}"
PLACES: dict[str, dict[str, str]] = {
    # in the order of a forward, as nnsight asks for; "<" is the input of a module
    "gpt2": {
        "layer_{}.resid_pre": f"<{GPT2}",
        "layer_{}.z": f"<{GPT2}.attn.c_proj",
        "layer_{}.attn_out": f"{GPT2}.attn",
        "layer_{}.resid_mid": f"<{GPT2}.ln_2",
        "layer_{}.mlp_post": f"<{GPT2}.mlp.c_proj",
        "layer_{}.mlp_out": f"{GPT2}.mlp",
        "layer_{}": GPT2,
        "final_norm": "transformer.ln_f",
    },
    "llama": {
        "layer_{}.q": f"{LLAMA}.self_attn.q_proj",
        "layer_{}.k": f"{LLAMA}.self_attn.k_proj",
        "layer_{}.v": f"{LLAMA}.self_attn.v_proj",
        "layer_{}.z": f"<{LLAMA}.self_attn.o_proj",
        "layer_{}.attn_out": f"{LLAMA}.self_attn",
        "layer_{}.resid_mid": f"<{LLAMA}.post_attention_layernorm",
        "layer_{}.mlp_post": f"<{LLAMA}.mlp.down_proj",
        "layer_{}.mlp_out": f"{LLAMA}.mlp",
        "layer_{}": LLAMA,
        "final_norm": "model.norm",
    },
    "gpt-neox": {
        "layer_{}.resid_pre": f"<{NEOX}",
        "layer_{}.z": f"<{NEOX}.attention.dense",
        "layer_{}.attn_out": f"{NEOX}.attention",
        "layer_{}.mlp_post": f"<{NEOX}.mlp.dense_4h_to_h",
        "layer_{}.mlp_out": f"{NEOX}.mlp",
        "layer_{}": NEOX,
        "final_norm": "gpt_neox.final_layer_norm",
    },
    "mamba": {
        "layer_{}.resid_pre": "<backbone.layers.{}",
        "layer_{}": "backbone.layers.{}",
        "final_norm": "backbone.norm_f",
    },
}


def traced(model: Any, places: dict[str, str]) -> dict[str, Tensor]:
    """Key -> what nnsight sees at a place, and the logits. places: in the order of a forward."""
    envoy, ids = nnsight.NNsight(model), torch.tensor([IDS])
    with torch.no_grad(), envoy.trace(input_ids=ids, use_cache=False):
        found = nnsight.save({})
        for key, path in places.items():
            module = envoy.get(path.lstrip("<"))
            found[key] = module.input if path.startswith("<") else module.output
        found["logits"] = envoy.output.logits
    return {key: (value[0] if isinstance(value, tuple) else value)[0] for key, value in found.items()}


@pytest.mark.parametrize("name", list(PLACES))
def test_sites_are_what_nnsight_sees(name: str, tokenizer: Any) -> None:
    model, once = build(FAMILIES[name]), PLACES[name]
    layered = {key.format(layer): path.format(layer) for layer in range(2) for key, path in once.items() if "{}" in key}
    expected = traced(model, layered | {key: path for key, path in once.items() if "{}" not in key})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Mamba is scored request by request, and says so
        (scored,) = score_continuations(
            [(IDS[:-1], [IDS[-1], 9])],
            model,
            tokenizer=tokenizer,
            capture_activations=True,
            positions="all",
            sites=list(expected),
        )
    assert scored.activation_data is not None
    kept = scored.activation_data["activations"]
    assert kept.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(kept[key], value, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_an_ablated_head_is_one_in_nnsight(tokenizer: Any) -> None:
    model, ids = build(FAMILIES["llama"]), torch.tensor([IDS])
    envoy = nnsight.NNsight(model)
    with torch.no_grad(), envoy.trace(input_ids=ids, use_cache=False):
        z = envoy.model.layers[1].self_attn.o_proj.input.clone()
        z[..., 8:16] = 0  # head 1
        envoy.model.layers[1].self_attn.o_proj.input = z
        expected = nnsight.save(envoy.output.logits)
    loaded = LoadedModel(model, tokenizer, "llama")
    with torch.no_grad(), editing(loaded, Edit.scale("layer_1.z", 0.0, heads=[1])):
        logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(expected, model(ids, use_cache=False).logits)
