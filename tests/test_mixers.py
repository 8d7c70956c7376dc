"""What blocks add to the residual stream: attention, other mixers of tokens and MLPs, side by side or alone, with multipliers.

Truth: hooks by hand on the modules that each family's own code adds up, in one forward over one unpadded sequence without a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from helpers.models import build
from helpers.tasks import loglikelihoods
from torch import Tensor

from AutomaticEval import Edit, editing
from AutomaticEval.analysis.heads.strength import ActivationExtractor
from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.recompute.plain_forward import plain_forward
from AutomaticEval.capture.reduced_rows import sites_of
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.errors import SiteUnavailable
from AutomaticEval.evaluation.harness.model import CapturingHFLM
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.recording import Kept
from AutomaticEval.samples import Sample
from AutomaticEval.selection import Selection
from AutomaticEval.sites import Site, site_of

IDS = [5, 17, 99, 3, 250, 41]
SHORT = [7, 301, 8]
KINDS = ("attn_out", "mixer_out", "mlp_out")
BASE: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 3}
LLAMA: dict[str, Any] = {**BASE, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
LLAMA |= {"max_position_embeddings": 64}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
MIXED = ["linear_attention", "full_attention", "linear_attention"]
GRANITE = {**LLAMA, "shared_intermediate_size": 16, "residual_multiplier": 0.3}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 12, "num_key_value_heads": 4}
ZAMBA = {**LLAMA, "num_key_value_heads": 4, "attention_head_dim": 16, "mamba_d_state": 8}
ZAMBA |= {"num_hidden_layers": 3, "layers_block_type": ["hybrid", "mamba", "hybrid"]}


class Family(NamedTuple):
    config_class: str
    config: dict[str, Any]
    adds: list[str]
    """For each layer what its block adds, by the family's own code: `kind=path below the block`, divided by spaces."""
    blocks: str = "model.layers"
    scales: Mapping[str, float] = MappingProxyType({})
    """What the family's code multiplies by that is added."""
    norm: str = "model.norm"
    steps_differ: bool = False
    """Whether transformers' own decode steps, with a cache, give other numbers than one forward."""
    pads: bool = True
    """Whether transformers' own batches with padding give each row the numbers that it has alone."""


def hybrid(other: str, mlp: str, *layers: bool, attention: str = "self_attn") -> list[str]:
    """What blocks add of which some attend. layers: whether each attends."""
    return [f"{f'attn_out={attention}' if attends else f'mixer_out={other}'} mlp_out={mlp}" for attends in layers]


FAMILIES: dict[str, Family] = {
    "mamba": Family(
        "MambaConfig", {**BASE, "state_size": 8}, ["mixer_out=mixer"] * 3, "backbone.layers", norm="backbone.norm_f"
    ),
    "mamba 2": Family(
        "Mamba2Config",
        {**BASE, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
        ["mixer_out=mixer"] * 3,
        "backbone.layers",
        norm="backbone.norm_f",
    ),
    "falcon mamba": Family(
        "FalconMambaConfig",
        {**BASE, "state_size": 8},
        ["mixer_out=mixer"] * 3,
        "backbone.layers",
        norm="backbone.norm_f",
    ),
    "jamba": Family(
        "JambaConfig",
        {**LLAMA, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0}
        | {"num_experts": 4, "use_mamba_kernels": False},
        hybrid("mamba", "feed_forward", False, True, False),
        norm="model.final_layernorm",
    ),
    "bamba": Family(
        "BambaConfig",
        {**LLAMA, **MAMBA, "attn_layer_indices": [1]},
        hybrid("mamba", "feed_forward", False, True, False),
        norm="model.final_layernorm",
    ),
    "qwen3 next": Family(
        "Qwen3NextConfig",
        {**LLAMA, **LINEAR, **EXPERTS, "num_hidden_layers": 4, "head_dim": 8, "shared_expert_intermediate_size": 16},
        hybrid("linear_attn", "mlp", False, False, False, True),
    ),
    "qwen3.5": Family(
        "Qwen3_5TextConfig",
        {**LLAMA, **LINEAR, "head_dim": 8, "layer_types": MIXED},
        hybrid("linear_attn", "mlp", False, True, False),
    ),
    "qwen3.5 moe": Family(
        "Qwen3_5MoeTextConfig",
        {**LLAMA, **LINEAR, **EXPERTS, "head_dim": 8, "layer_types": MIXED, "shared_expert_intermediate_size": 16},
        hybrid("linear_attn", "mlp", False, True, False),
    ),
    "olmo hybrid": Family(
        "OlmoHybridConfig",
        {**LLAMA, **LINEAR, "layer_types": MIXED},
        [
            "mixer_out=linear_attn mlp_out=mlp",
            "attn_out=post_attention_layernorm mlp_out=post_feedforward_layernorm",
            "mixer_out=linear_attn mlp_out=mlp",
        ],
    ),
    "granite 4": Family(
        "GraniteMoeHybridConfig",
        {**GRANITE, **MAMBA, "layer_types": MIXED, "num_local_experts": 0},
        hybrid("mamba", "shared_mlp", False, True, False),
        scales=dict.fromkeys(KINDS, 0.3),
    ),
    "granite 4 moe": Family(
        "GraniteMoeHybridConfig",
        {**GRANITE, **MAMBA, "layer_types": MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
        hybrid("mamba", "block_sparse_moe+shared_mlp", False, True, False),
        scales=dict.fromkeys(KINDS, 0.3),
    ),
    "granite moe shared": Family(
        "GraniteMoeSharedConfig",
        {**GRANITE, "num_local_experts": 4},
        hybrid("", "block_sparse_moe+shared_mlp", True, True, True),
        scales=dict.fromkeys(KINDS, 0.3),
    ),
    "lfm2": Family(
        "Lfm2Config",
        {**LLAMA, "layer_types": ["conv", "full_attention", "conv"]},
        hybrid("conv", "feed_forward", False, True, False),
        norm="model.embedding_norm",
    ),
    "lfm2 moe": Family(
        "Lfm2MoeConfig",
        {**LLAMA, **EXPERTS, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
        hybrid("conv", "feed_forward", False, True, False),
        norm="model.embedding_norm",
    ),
    "lfm3": Family(
        "Lfm3Config",
        {**LLAMA, "layer_types": ["conv", "full_attention", "conv"], "use_sandwich_norm": True},
        [f"{kind}=post_operator_norm mlp_out=post_ffn_norm" for kind in ("mixer_out", "attn_out", "mixer_out")],
        norm="model.embedding_norm",
    ),
    "falcon h1": Family(
        "FalconH1Config",
        {**LLAMA, **MAMBA, "mamba_d_ssm": 64, "attention_out_multiplier": 0.7, "ssm_out_multiplier": 0.4}
        | {"attention_in_multiplier": 0.9},
        ["attn_out=self_attn mixer_out=mamba mlp_out=feed_forward"] * 3,
        scales={"attn_out": 0.7, "mixer_out": 0.4},
        norm="model.final_layernorm",
    ),
    "nemotron h": Family(
        "NemotronHConfig",
        {**LLAMA, "hybrid_override_pattern": "M-*E", "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8}
        | {"num_hidden_layers": 4, "n_groups": 1, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1},
        ["mixer_out=mixer", "mlp_out=mixer", "attn_out=mixer", "mlp_out=mixer"],
        norm="model.norm_f",
        steps_differ=True,
    ),
    "zamba": Family(
        "ZambaConfig",
        {**ZAMBA, "attention_hidden_size": 64, "n_mamba_heads": 2, "use_mamba_kernels": False},
        ["mixer_out=mamba_decoder.mamba", "mixer_out=mamba", "mixer_out=mamba_decoder.mamba"],
        norm="model.final_layernorm",
    ),
    "zamba 2": Family(
        "Zamba2Config",
        {**ZAMBA, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "num_mem_blocks": 1},
        ["mixer_out=mamba_decoder.mamba", "mixer_out=mamba", "mixer_out=mamba_decoder.mamba"],
        norm="model.final_layernorm",
        steps_differ=True,
    ),
    "recurrent gemma": Family(
        "RecurrentGemmaConfig",
        {**LLAMA, "num_key_value_heads": 1, "lru_width": 32, "block_types": ["recurrent", "attention"]},
        hybrid("temporal_block", "mlp_block", False, True, False, attention="temporal_block"),
        norm="model.final_norm",
        pads=False,
    ),
    "rwkv": Family(
        "RwkvConfig",
        {**BASE, "attention_hidden_size": 32, "intermediate_size": 64, "rescale_every": 2},
        ["", *["mixer_out=attention mlp_out=feed_forward"] * 2],
        "rwkv.blocks",
        norm="rwkv.ln_out",
        pads=False,
    ),
    "kimi linear": Family(
        "KimiLinearConfig",
        {**LLAMA, **LATENT, **EXPERTS, "layer_types": MIXED, "linear_head_dim": 8, "linear_num_heads": 4}
        | {"q_lora_rank": None, "first_k_dense_replace": 1, "num_experts_per_token": 2},
        ["mixer_out=self_attn mlp_out=mlp", "attn_out=self_attn mlp_out=mlp", "mixer_out=self_attn mlp_out=mlp"],
    ),
    "xlstm": Family(
        "xLSTMConfig",
        {**BASE, "num_blocks": 3, "num_heads": 4, "hidden_size": 64, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
        ["mixer_out=mlstm_layer mlp_out=ffn"] * 3,
        "backbone.blocks",
        norm="backbone.out_norm",
        pads=False,
    ),
    "minicpm3": Family(
        "MiniCPM3Config",
        {**LLAMA, **LATENT, "q_lora_rank": 16, "scale_depth": 1.4},
        hybrid("", "mlp", True, True, True),
        scales=dict.fromkeys(KINDS, 1.4 / 3**0.5),
    ),
    "ctrl": Family(
        "CTRLConfig",
        {"vocab_size": 400, "n_embd": 32, "n_layer": 3, "n_head": 4, "dff": 64, "n_positions": 64},
        hybrid("", "ffn", True, True, True, attention="multi_head_attention"),
        "transformer.h",
        norm="transformer.layernorm",
    ),
    "nanochat": Family("NanoChatConfig", LLAMA, hybrid("", "mlp", True, True, True)),
}


@cache
def model_of(name: str) -> Any:
    model = build(getattr(hf, FAMILIES[name].config_class)(**FAMILIES[name].config))
    for weight in model.parameters():
        if weight.dim() > 1 and not weight.any():  # xLSTM begins with MLPs that add nothing
            torch.nn.init.normal_(weight)
    return model


def raw(model: Any, ids: list[int], places: dict[str, tuple[str, str]]) -> dict[str, Tensor]:
    """Key -> what a module was given or gave last, [pos, width], in one forward without a cache."""
    found: dict[str, Tensor] = {}
    handles = []
    for key, (path, end) in places.items():

        def before(module: Any, args: Any, kwargs: Any, key: str = key) -> None:
            found[key] = (args[0] if args else kwargs["hidden_states"]).clone()

        def after(module: Any, args: Any, out: Any, key: str = key) -> None:
            found[key] = (out[0] if isinstance(out, tuple | list) else out).clone()

        module = model.get_submodule(path)
        handles.append(
            module.register_forward_pre_hook(before, with_kwargs=True)
            if end == "input"
            else module.register_forward_hook(after)
        )
    with torch.no_grad():
        found["logits"] = model(torch.tensor([ids]), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return {key: value.reshape(len(ids), -1) if value.dim() < 4 else value for key, value in found.items()}


def added(name: str) -> dict[Site, list[str]]:
    """What blocks add: site -> the paths of the modules that the family's code adds up."""
    family = FAMILIES[name]
    return {
        Site(kind, layer): [f"{family.blocks}.{layer}.{path}" for path in paths.split("+")]
        for layer, of_layer in enumerate(family.adds)
        for kind, _, paths in (each.partition("=") for each in of_layer.split())
    }


@cache
def truth(name: str, ids: tuple[int, ...]) -> dict[str, Tensor]:
    """Key -> the true rows of one sequence, with those that several modules add up."""
    family, model = FAMILIES[name], model_of(name)
    places = {f"{path}": (path, "output") for paths in added(name).values() for path in paths}
    for layer in range(len(family.adds)):
        block = f"{family.blocks}.{layer}"
        places |= {f"layer_{layer}.resid_pre": (block, "input"), f"layer_{layer}": (block, "output")}
    places["final_norm"] = (family.norm, "output")
    rows = raw(model, list(ids), places)
    for site, paths in added(name).items():
        scale = family.scales.get(site.kind, 1.0)
        rows[site.key] = sum((rows[path] for path in paths), torch.zeros(())) * scale
    return {**rows, "embeddings": rows["layer_0.resid_pre"]}


def assert_rows(found: Tensor, expected: Tensor, key: str, within: float = 1e-5) -> None:
    assert found.shape == expected.shape, key
    assert float((found - expected).abs().max()) <= within * max(1.0, float(expected.abs().max())), key


def kept(name: str) -> list[str]:
    """The sites that are asked for, one by one: what is added, and the stream."""
    layers = range(len(FAMILIES[name].adds))
    stream = [key for layer in layers for key in (f"layer_{layer}.resid_pre", f"layer_{layer}")]
    return ["embeddings", "final_norm", *stream, *(site.key for site in added(name))]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_what_blocks_add_gives_the_next_stream_and_nothing_else_is_offered(name: str) -> None:
    layout, rows, sites = find_layout(model_of(name)), truth(name, tuple(IDS)), added(name)
    for layer, of_layer in enumerate(FAMILIES[name].adds):
        for site in (Site(kind, layer) for kind in KINDS):
            if site not in sites:
                with pytest.raises(SiteUnavailable, match=f"no '{site.kind}' at {site.key}: .*(its|stands)"):
                    layout.pick([site])
                continue
            tap = layout.taps[site]
            assert ([*tap.earlier, tap.module], tap.end) == (sites[site], "output")
            assert tap.scale == pytest.approx(FAMILIES[name].scales.get(site.kind, 1.0))
        if of_layer:
            total = rows[f"layer_{layer}.resid_pre"] + sum(rows[site.key] for site in sites if site.layer == layer)
            assert_rows(total, rows[f"layer_{layer}"], f"{name} {layer}")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_rows_of_generated_text_alone_and_in_a_padded_batch(name: str, tokenizer: Any) -> None:
    family, loaded = FAMILIES[name], LoadedModel(model_of(name), tokenizer, name)
    selection = Selection.parse(kept(name), None, "prompt" if family.steps_differ else "all")
    for prompts in ([IDS], [IDS, SHORT]) if family.pads else ([IDS],):
        for prompt, response in zip(
            prompts, respond(loaded, prompts, Sampling(max_new_tokens=3), selection), strict=True
        ):
            assert response.sample is not None
            fed = tuple([*prompt, *response.generated_ids][:-1])
            found = response.sample.activation_data("m", {})["activations"]
            assert set(found) == set(kept(name))
            for key, value in found.items():
                assert_rows(value, truth(name, fed)[key][: len(value)], f"{name} {key} {len(prompts)}", 3e-5)


@pytest.mark.parametrize("name", ["granite 4", "falcon h1", "nanochat", "nemotron h", "kimi linear", "rwkv"])
def test_rows_of_scored_questions(name: str, tokenizer: Any) -> None:
    """Over the tree, or in lm-eval's own batches where a model's state cannot be shared."""
    loaded, found = LoadedModel(model_of(name), tokenizer, name), list[Sample]()
    model = CapturingHFLM(loaded, Selection.parse(kept(name)), found.extend, batch_size=2)
    pairs = [("Who is it", " one"), ("Who is it", " two or three"), ("Why", " so")]
    scores = model.loglikelihood(loglikelihoods(pairs), disable_tqdm=True)
    assert len(found) == len(scores) == 3
    for sample, (score, _) in zip(
        sorted(found, key=lambda each: pairs.index((each.fields["prompt"], each.fields["response"]))),
        scores,
        strict=True,
    ):
        fed = tuple([*sample.input_ids, *sample.generated_ids][:-1])
        rows = truth(name, fed)
        for key, value in sample.activation_data("m", {})["activations"].items():
            assert_rows(value, rows[key], f"{name} {key}", 3e-5)
        logprobs = rows["logits"].log_softmax(-1)[len(sample.input_ids) - 1 :]
        expected = sum(float(row[token]) for row, token in zip(logprobs, sample.generated_ids, strict=True))
        assert score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_ablated_branches_are_those_that_a_hook_by_hand_takes_out(name: str) -> None:
    model, ids = model_of(name), torch.tensor([IDS])
    for kind in KINDS:
        site = next((site for site in added(name) if site.kind == kind), None)
        if site is None:
            continue

        def nothing(module: Any, args: Any, out: Any) -> Any:
            return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

        handles = [model.get_submodule(path).register_forward_hook(nothing) for path in added(name)[site]]
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
            for handle in handles:
                handle.remove()
            plain = model(ids, use_cache=False).logits
            with editing(model, Edit.scale(site, 0.0)):
                found = model(ids, use_cache=False).logits
        assert torch.equal(found, expected)
        assert not torch.allclose(found, plain, atol=1e-4)


# A sum of two modules.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["granite 4 moe", "granite moe shared"])
def test_the_stream_receives_an_edited_sum_to_the_last_bit(name: str, dtype: torch.dtype, tokenizer: Any) -> None:
    """The numbers are far smaller than those of each part: a difference of the edited sum and the other part would be rounded."""
    loaded = LoadedModel(deepcopy(model_of(name)).to(dtype), tokenizer, name)
    site, key = Site("mlp_out", 1), "layer_1.mlp_out"
    scale, given = loaded.layout.taps[site].scale, 1e-6 * torch.randn(32, generator=torch.manual_seed(0)).to(dtype)
    keys = [key, "layer_1.resid_mid", "layer_1"]
    before = plain_forward(loaded, IDS, keys, range(6)).rows
    parts = raw(loaded.model, IDS, {path: (path, "output") for path in added(name)[site]})
    assert torch.equal(before[key], sum(parts[path] for path in added(name)[site]) * scale)
    replaced, halved = Edit.replace(site, given), Edit.scale(site, 0.5)
    for edits, expected in (
        ([replaced], (given / scale) * scale),
        ([halved, replaced, halved], ((given / scale * scale * 0.5) / scale) * scale),
    ):
        with editing(loaded.model, edits):
            rows = plain_forward(loaded, IDS, keys, range(6)).rows
            (seen,) = respond(loaded, [IDS], Sampling(max_new_tokens=1), Selection.parse(key, None, "prompt"))
        assert torch.equal(rows[key], expected.expand(6, -1))
        assert torch.equal(rows["layer_1"], rows["layer_1.resid_mid"] + rows[key])
        assert seen.sample is not None
        assert torch.equal(seen.sample.activation_data("m", {})["activations"][key], rows[key].float())
    with editing(loaded.model, Edit.scale(site, 1.0)):
        assert torch.equal(plain_forward(loaded, IDS, ["layer_2"], range(6)).rows["layer_2"], unedited(loaded))
    with editing(loaded.model, Edit("layer_1.mlp_out", torch.zeros_like, where=last_column)):
        rows = plain_forward(loaded, IDS, keys, range(6)).rows
    assert torch.equal(rows[key][:5], before[key][:5])
    assert not rows[key][5].any()
    assert torch.equal(rows["layer_1"][5], rows["layer_1.resid_mid"][5])


def unedited(loaded: LoadedModel) -> Tensor:
    return plain_forward(loaded, IDS, ["layer_2"], range(6)).rows["layer_2"]


def last_column(first: int, n_columns: int) -> Kept:
    return Kept(torch.tensor([0]), torch.tensor([5]))


# A kind that some layers have.


def test_a_kind_is_kept_in_the_layers_that_have_it_and_a_warning_says_which(tokenizer: Any) -> None:
    loaded = LoadedModel(model_of("qwen3 next"), tokenizer, "qwen3 next")
    with pytest.warns(
        UserWarning, match=r"z is kept in layer 3: the other layers have none \(what mixes .* linear_attn"
    ):
        kept = sites_of(loaded.layout, Selection.parse("z,mlp_out"))
    assert [site.key for site in kept] == [*(f"layer_{layer}.mlp_out" for layer in range(4)), "layer_3.z"]
    with pytest.warns(UserWarning, match=r"mixer_out is kept in layers 0-2: .*attention: see attn_out\)\.$"):
        (response,) = respond(loaded, [IDS], Sampling(max_new_tokens=2), Selection.parse("mixer_out,attn_out.3"))
    assert response.sample is not None
    found = response.sample.activation_data("m", {})["activations"]
    assert list(found) == ["layer_0.mixer_out", "layer_1.mixer_out", "layer_2.mixer_out", "layer_3.attn_out"]


@pytest.mark.parametrize(("sites", "layers"), [("z.0", None), ("z,z.0", None), ("z", "0"), ("z", "2-3"), ("z", "all")])
def test_a_layer_that_is_named_and_lacks_the_kind_is_refused(sites: str, layers: str | None, tokenizer: Any) -> None:
    loaded = LoadedModel(model_of("qwen3 next"), tokenizer, "qwen3 next")
    selection = Selection.parse(sites, layers)
    if layers == "all":  # as when it is left out
        assert [site.key for site in sites_of(loaded.layout, selection)] == ["layer_3.z"]
        return
    with pytest.raises(SiteUnavailable, match=r"no 'z' at layer_[02]\.z: .*It has 'z' in layer 3\."):
        respond(loaded, [IDS], Sampling(max_new_tokens=2), selection)


def test_a_kind_that_no_layer_has_is_refused(tokenizer: Any) -> None:
    loaded = LoadedModel(model_of("mamba"), tokenizer, "mamba")
    with pytest.raises(SiteUnavailable, match=r"no 'z' at layer_0\.z"):
        respond(loaded, [IDS], Sampling(max_new_tokens=2), Selection.parse("z"))


def test_strength_of_heads_is_measured_in_the_layers_that_have_heads(tokenizer: Any) -> None:
    extractor = ActivationExtractor(model_of("qwen3 next"), tokenizer)
    with pytest.warns(UserWarning, match="head_result_norm is kept in layer 3"):
        extractor.register_hooks()
    extractor.extract_activations(["one two", "three"], tokenizer)
    assert {layer for layer, _ in extractor.compute_R_h()} == {3}
    with pytest.raises(SiteUnavailable, match=r"layer_0\.head_result_norm"):
        extractor.register_hooks(0)


# Norms that stand in the stream, learned factors, and several streams.

REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    # name: (config class, config, {site: what its reason says, or "module end" where the model has it})
    "opt 350m": (
        "OPTConfig",
        {**BASE, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        {
            "layer_1.attn_out": "final_layer_norm stands behind the last addition: resid_post is what it gives",
            "layer_1.resid_mid": "final_layer_norm stands behind the last addition",
            "layer_1.mlp_post": "model.decoder.layers.1.fc2 input",
            "layer_1": "model.decoder.layers.2 input",
            "layer_2": "model.decoder.layers.2 output",
            "final_norm": "no norm of a known name stands beside the blocks",
        },
    ),
    "gpt 1": (
        "OpenAIGPTConfig",
        {"vocab_size": 400, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
        {
            "layer_0.mlp_out": "ln_2 stands behind the last addition",
            "layer_0.mlp_post": "transformer.h.0.mlp.c_proj input",
            "final_norm": "what the last block gives goes to the unembedding as it is",
        },
    ),
    "bloom with norms in the stream": (
        "BloomConfig",
        {"vocab_size": 400, "hidden_size": 32, "n_layer": 3, "n_head": 4}
        | {"apply_residual_connection_post_layernorm": True},
        {
            "layer_2.attn_out": "post_attention_layernorm stands in the stream",
            "layer_2.mlp_post": "transformer.h.2.mlp.dense_4h_to_h input",
            "final_norm": "transformer.ln_f output",
        },
    ),
    "minimax": (
        "MiniMaxConfig",
        {**LLAMA, "num_local_experts": 4, "head_dim": 8, "layer_types": MIXED, "mlp_alpha_factor": 1.7}
        | {"full_attn_alpha_factor": 2.0, "linear_attn_alpha_factor": 2.0},
        {
            "layer_0.mixer_out": "post_attention_layernorm stands in the stream",
            "layer_1.attn_out": "post_attention_layernorm stands in the stream",
            "layer_1.mixer_out": "its block mixes tokens with attention: see attn_out",
            "layer_1.mlp_out": "post_attention_layernorm stands in the stream",
            "layer_0": "model.layers.1 input",
        },
    ),
    "doge": (
        "DogeConfig",
        LLAMA,
        {
            "layer_0.attn_out": r"numbers of its own \(input_residual, post_attention_residual\) that may scale the stream",
            "layer_0.mlp_post": "model.layers.0.mlp.down_proj input",
        },
    ),
    "gemma 3n": (
        "Gemma3nTextConfig",
        {**LLAMA, "num_hidden_layers": 4, "head_dim": 8, "vocab_size_per_layer_input": 400, "laurel_rank": 8}
        | {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1, "altup_num_inputs": 3, "altup_active_idx": 0}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4},
        {
            "layer_0.attn_out": "its block makes 3 residual streams anew out of all of them",
            "layer_0.resid_mid": "its block makes 3 residual streams anew",
            "layer_3": "model.layers.3 output",
            "layer_2": "model.layers.3 input",
            "layer_2.mlp_post": "model.layers.2.mlp.down_proj input",
            "final_norm": "model.norm output",
        },
    ),
    "deepseek v4": (
        "DeepseekV4Config",
        {**LLAMA, "head_dim": 8},
        {
            "embeddings": r"its blocks hand on 4 residual streams side by side \[1, 6, 4, 32\], and none of them is the",
            "layer_1.resid_pre": "its blocks hand on 4 residual streams",
            "layer_1.mlp_out": "its block makes 4 residual streams anew out of all of them",
            "final_norm": "model.norm output",
        },
    ),
}


@cache
def other_model(name: str) -> Any:
    config_class, config, _ = REFUSED[name]
    model = build(getattr(hf, config_class)(**config))
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if path.endswith("_residual"):
                weight.add_(0.3 * torch.randn_like(weight))
    return model


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_had_is_refused_by_its_reason_and_the_rest_is_true(name: str, tokenizer: Any) -> None:
    model, places = other_model(name), REFUSED[name][2]
    layout, held = find_layout(model), {}
    for key, says in places.items():
        if says.endswith((" input", " output")):
            held[key] = (says.split()[0], says.split()[1])
            assert (layout.taps[site_of(key)].module, layout.taps[site_of(key)].end) == held[key]
            continue
        with pytest.raises(SiteUnavailable, match=f"at {key}: .*{says}"):
            layout.pick([site_of(key)])
    loaded = LoadedModel(model, tokenizer, name)
    prompts = [IDS] if name == "minimax" else [IDS, SHORT]  # transformers' own padding enters MiniMax's state
    found = respond(loaded, prompts, Sampling(max_new_tokens=3), Selection.parse(list(held)))
    for prompt, response in zip(prompts, found, strict=True):
        assert response.sample is not None
        fed = [*prompt, *response.generated_ids][:-1]
        rows = raw(model, fed, held)
        for key, value in response.sample.activation_data("m", {})["activations"].items():
            expected = rows[key][0].reshape(len(fed), -1) if rows[key].dim() == 4 else rows[key]
            assert_rows(value, expected, f"{name} {key}", 3e-5)


def test_edits_of_a_stream_among_several_change_it_alone() -> None:
    """And the plain forward that verifies runs reads the same rows."""
    model, ids = other_model("gemma 3n"), torch.tensor([IDS])
    change = torch.linspace(-1, 1, 32)

    def by_hand(module: Any, args: Any, kwargs: Any) -> Any:
        streams = args[0].clone()
        streams[0] += change
        return (streams, *args[1:]), kwargs

    handle = model.model.layers[1].register_forward_pre_hook(by_hand, with_kwargs=True)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        handle.remove()
        with editing(model, Edit.add("resid_post.0", change)):
            found = model(ids, use_cache=False).logits
        plain = model(ids, use_cache=False).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, plain, atol=1e-3)
    places = {f"layer_{layer}": (f"model.layers.{layer}", "output") for layer in range(4)}
    loaded = LoadedModel(model, None, "gemma 3n")
    rows = plain_forward(loaded, IDS, list(places), range(len(IDS))).rows
    for key, value in raw(model, IDS, places).items():
        if key != "logits":
            assert_rows(rows[key], value[0, 0], key)
    assert loaded.layout.notes["resid_post"] == "of 3 residual streams the active one, number 0"


def test_a_stream_that_is_halved_between_blocks_is_read_on_both_sides() -> None:
    """RWKV halves its stream behind every second block here, and its outputs have weights to match."""
    layout, rows = find_layout(model_of("rwkv")), truth("rwkv", tuple(IDS))
    assert torch.equal(rows["layer_1"] / 2, rows["layer_2.resid_pre"])
    assert layout.taps[Site("resid_post", 1)].module == "rwkv.blocks.1"
    assert layout.taps[Site("resid_post", 0)].module == "rwkv.blocks.1"
    assert "rescaled behind layer 1," in layout.notes["resid_post"]


def test_final_norm_that_is_used_twice_is_edited_where_the_body_gives_it() -> None:
    model, ids = model_of("nanochat"), torch.tensor([IDS])
    with torch.no_grad():
        expected = model.lm_head(torch.zeros(1, len(IDS), 32))
        with editing(model, Edit.scale("final_norm", 0.0)):
            found = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, 15 * torch.tanh(expected / 15))
