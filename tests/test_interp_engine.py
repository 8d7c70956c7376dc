"""Sites as interp-engine has them: another library that names places of transformers' models (extra `oracles`)."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families.configs import FAMILIES, build

from AutomaticEval import score_continuations
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

engine = pytest.importorskip("interp_engine", reason="pip install '.[oracles]' to compare with interp-engine")
from interp_engine.model import EagerModel  # noqa: E402

IDS = [5, 17, 99, 3, 250, 41, 7, 8]
NAMES: dict[str, tuple[str, ...]] = {
    "embed": ("resid_pre.0",),
    "resid_pre": ("resid_pre",),
    "resid_mid": ("resid_mid",),
    "resid_post": ("resid_post",),
    "attn_out": ("attn_out_post", "attn_out"),
    "mlp_out": ("mlp_out_post", "mlp_out"),
    "q": ("q_norm_in",),
    "k": ("k_norm_in",),
    "v": ("value",),
    "z": ("z",),
    "mlp_post": ("mlp_act",),
    "router_logits": ("router_logits",),
    "expert_ids": ("expert_indices",),
    "expert_weights": ("expert_weights",),
    "final_norm": ("final_norm",),
    "logits": ("lm_head",),
}
"""Kind -> interp-engine's points that hold the same; the first that a model serves. docs/sites.md shows them."""
CHOSEN = (
    *(
        "gpt2",
        "gpt-neox",
        "gpt-neox-seq",
        "gpt-j",
        "bloom",
        "falcon-rw",
        "mpt",
        "llama",
        "qwen3",
        "gemma3-text",
        "olmo2",
    ),
    *(
        "phi3",
        "stablelm-parallel",
        "mixtral",
        "olmoe",
        "deepseek-v3",
        "glm4",
        "jamba",
        "llama4-text",
        "qwen3-vl",
        "afmoe",
    ),
)
"""Families of which interp-engine serves much, and whose logits are what their last matrix gives, without a cap or a scale."""


ELSEWHERE = {("llama4-text", "expert_ids"), ("llama4-text", "router_logits")}
"""What interp-engine takes from other places: Llama 4's router gives its scores first and its logits second, and no ids."""


def heaviest_first(found: dict[str, Any], point: str) -> Any:
    """What a point holds; ids and weights of experts by their weights, since interp-engine has them in the router's order."""
    kind, _, layer = point.partition(".")
    if not kind.startswith("expert_"):
        return found[point]
    order = found[f"expert_weights.{layer}"].reshape(len(IDS), -1).argsort(dim=-1, descending=True, stable=True)
    return found[point].reshape(len(IDS), -1).gather(-1, order)


@pytest.mark.parametrize("name", CHOSEN)
def test_shared_points_are_equal(name: str, tokenizer: Any) -> None:
    loaded = LoadedModel(build(FAMILIES[name]), tokenizer, name)
    theirs = EagerModel(name, hf_model=loaded.model, tokenizer=tokenizer)
    points = {}
    for site in loaded.layout.taps:
        named = NAMES.get(site.kind, ())
        layered = [each if site.layer is None else f"{each}.{site.layer}" for each in named]
        point = next((each for each in layered if theirs.serves(each)), None)
        if point is not None and (name, site.kind) not in ELSEWHERE:
            points[site.key] = point
    assert {"layer_0", "layer_1.resid_pre", "layer_1.mlp_out", "logits"} <= points.keys()
    found = engine.capture(theirs, torch.tensor([IDS]), list(dict.fromkeys(points.values())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model that is scored request by request says so
        (scored,) = score_continuations(
            [(IDS[:-1], [IDS[-1], 9])],
            loaded.model,
            tokenizer=tokenizer,
            capture_activations=True,
            positions="all",
            sites=list(points),
        )
    assert scored.activation_data is not None
    for key, point in points.items():
        expected = heaviest_first(found, point).reshape(len(IDS), -1)
        kept = scored.activation_data["activations"][key]
        torch.testing.assert_close(
            kept.float(),
            expected.float(),
            atol=1e-5 * max(1, float(expected.abs().max())),
            rtol=0,
            msg=lambda text, key=key: f"{key}: {text}",
        )


def test_the_page_names_these_points() -> None:
    page = (Path(__file__).parents[1] / "docs" / "sites.md").read_text()
    rows = dict(
        re.findall(r"^\| `(\w+)` \| ((?:`[\w.]+`(?:, )?)+) \|", page.partition("in interp-engine")[2], re.MULTILINE)
    )
    assert rows == {kind: ", ".join(f"`{name}`" for name in NAMES[kind]) for kind in rows}
    assert set(NAMES) - set(rows) <= {"router_logits", "expert_ids", "expert_weights"}
