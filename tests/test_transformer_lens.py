"""Sites and heads as TransformerLens has them: another implementation of the same models (extra `bench`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families.configs import FAMILIES
from families.configs import build as build_family
from helpers.models import CONFIGS, build
from torch import Tensor

from AutomaticEval.analysis.heads.ablate import Ablation
from AutomaticEval.analysis.parts.direct_effect import DirectEffects
from AutomaticEval.analysis.words.targets import Target
from AutomaticEval.models.attention import reading_patterns
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.head_weights import head_results
from AutomaticEval.models.recording import Kept, capturing
from AutomaticEval.sites import TABLE, Site

lens = pytest.importorskip("transformer_lens", reason="pip install '.[bench]' to compare with TransformerLens")
if not hasattr(lens, "HookedTransformer"):
    pytest.skip("this TransformerLens has no models of its own; 3.x has", allow_module_level=True)
from transformer_lens import model_bridge as bridges  # noqa: E402

IDS = torch.tensor([[5, 9, 33, 7, 120, 41, 8, 77, 250]])
TARGET = Target([11], [250])
ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary", "rotary_adjacent_pairs": False}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"act_fn": "gelu_new", "normalization_type": "LN"},
    "llama": {
        "act_fn": "silu",
        "normalization_type": "RMS",
        "gated_mlp": True,
        "final_rms": True,
        "n_key_value_heads": 2,
        "rotary_dim": 8,
        "eps": 1e-6,
        **ROTARY,
    },
    "gpt_neox": {
        "act_fn": "gelu",
        "normalization_type": "LN",
        "parallel_attn_mlp": True,
        "rotary_dim": 2,
        **ROTARY,
    },
}
"""What TransformerLens must be told of the models of CONFIGS."""


def converted(kind: str, model: Any) -> Any:
    """The same weights in TransformerLens' own model, its weights left as they are."""
    from transformer_lens.pretrained import weight_conversions as conversions

    config = lens.HookedTransformerConfig(
        n_layers=3,
        d_model=32,
        n_ctx=128,
        d_head=8,
        n_heads=4,
        d_mlp=128 if kind == "gpt2" else 64,
        d_vocab=400,
        **{"eps": 1e-5, **KINDS[kind]},
    )
    name = {"gpt_neox": "neox"}.get(kind, kind)
    theirs = lens.HookedTransformer(config)
    theirs.load_and_process_state_dict(
        getattr(conversions, f"convert_{name}_weights")(model, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    theirs.set_use_attn_result(True)
    return theirs.eval()


@pytest.fixture(scope="module", params=list(KINDS))
def both(request: pytest.FixtureRequest, tokenizer: Any) -> tuple[LoadedModel, Any]:
    model = build(CONFIGS[request.param]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and gains that are not 0 and 1
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return LoadedModel(model, tokenizer, request.param), converted(request.param, model)


def ours(loaded: LoadedModel, kinds: tuple[str, ...], more: Any = ()) -> Any:
    layout = loaded.layout
    keep = Kept(torch.zeros(IDS.shape[1], dtype=torch.long), torch.arange(IDS.shape[1]))
    taps = {**layout.pick(Site(kind, layer) for kind in kinds for layer in range(layout.n_layers)), **dict(more)}
    with capturing(loaded.model, taps, layout.embedding, lambda *_: keep, 1) as found, torch.no_grad():
        loaded.model(IDS, use_cache=False)
    return found.rows


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_every_site_is_the_hook_that_the_table_names(both: tuple[LoadedModel, Any]) -> None:
    """`docs/sites.md` names TransformerLens' hooks from the same table."""
    loaded, theirs = both
    sites = [site for site in loaded.layout.taps if TABLE[site.kind].transformer_lens is not None]
    rows = ours(loaded, (), loaded.layout.pick(sites))
    with torch.no_grad():
        logits, cache = theirs.run_with_cache(IDS)
    for site in sites:
        name = str(TABLE[site.kind].transformer_lens).format(layer=site.layer)
        # ln_final.hook_out is its name in their bridge around transformers' models
        expected = logits if name == "logits" else cache[name.replace("ln_final.hook_out", "unembed.hook_in")]
        found = rows[site.key]
        close(found, expected[0].reshape(len(found), -1))


def test_z_results_and_patterns(both: tuple[LoadedModel, Any]) -> None:
    loaded, theirs = both
    rows = ours(loaded, ("z", "head_result_norm"))
    with torch.no_grad():
        _, cache = theirs.run_with_cache(IDS)
    with torch.no_grad(), reading_patterns(loaded.model, loaded.layout) as patterns:
        loaded.model(IDS, use_cache=False)
    for layer in range(3):
        z = rows[f"layer_{layer}.z"]
        close(z.view(-1, 4, 8), cache["z", layer][0])
        projection = loaded.model.get_submodule(loaded.layout.taps[Site("z", layer)].module)
        close(head_results(z, projection, 4), cache["result", layer][0])
        close(rows[f"layer_{layer}.head_result_norm"], cache["result", layer][0].norm(dim=-1))
        close(patterns.of(layer), cache["pattern", layer])


@pytest.mark.parametrize("heads", [{0: [1]}, {1: [0, 3], 2: [2]}])
def test_logits_without_heads(heads: dict[int, list[int]], both: tuple[LoadedModel, Any]) -> None:
    loaded, theirs = both

    def without(z: Tensor, hook: Any) -> Tensor:
        z[:, :, heads[hook.layer()]] = 0
        return z

    with torch.no_grad():
        expected = theirs.run_with_hooks(IDS, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", without) for layer in heads])
        with Ablation(loaded, heads).applied():
            close(loaded.model(IDS, use_cache=False).logits, expected)


def test_direct_effects(both: tuple[LoadedModel, Any]) -> None:
    """Their results through their final norm's scale and their unembedding."""
    loaded, theirs = both
    effects = DirectEffects(loaded, [TARGET])
    found = effects.of({key: rows[-1:] for key, rows in ours(loaded, ("z",), effects.taps).items()})[0, 0]
    with torch.no_grad():
        _, cache = theirs.run_with_cache(IDS)
        direction = theirs.W_U[:, TARGET.answer[0]] - theirs.W_U[:, TARGET.against[0]]
        for layer in range(3):
            results = cache["result", layer][0, -1]  # [n_heads, d_model]
            if theirs.cfg.normalization_type == "LN":
                results = results - results.mean(-1, keepdim=True)
            close(found[layer], (results / cache["ln_final.hook_scale"][0, -1] * theirs.ln_final.w) @ direction)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-seq", "qwen3", "gemma2", "olmo2", "mixtral", "mamba"])
def test_every_site_is_a_hook_of_their_bridge(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """Their bridge puts hooks around transformers' own modules, under the names of the table."""
    model = build_family(FAMILIES[name])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    bridge = bridges.TransformerBridge.boot_transformers(str(tmp_path), tokenizer=tokenizer, device="cpu")
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(IDS)
    loaded = LoadedModel(model, tokenizer, name)
    sites = [site for site in loaded.layout.taps if TABLE[site.kind].transformer_lens is not None]
    rows = ours(loaded, (), loaded.layout.pick(sites))
    for site in sites:
        hook = str(TABLE[site.kind].transformer_lens).format(layer=site.layer)
        expected, found = logits if hook == "logits" else cache[hook], rows[site.key]
        close(found, expected[0].reshape(len(found), -1))
