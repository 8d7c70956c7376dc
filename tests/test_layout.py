"""Sites mean what their names say, on every family, by identities; what does not hold is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from helpers.models import build
from torch import Tensor

from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.errors import SiteUnavailable, UnsupportedModel
from AutomaticEval.models.architecture.forward_call import cache_in
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.selection import Selection
from AutomaticEval.sites import Site

BASE = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {**BASE, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
OPT = {**BASE, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    # name: (config class, config, kinds that the family lacks)
    "llama": ("LlamaConfig", LLAMA_LIKE, set()),
    "gpt2": ("GPT2Config", {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4}, set()),
    "gpt_neox": ("GPTNeoXConfig", {**BASE, "intermediate_size": 64}, {"resid_mid"}),
    "gpt_neox_sequential": ("GPTNeoXConfig", {**BASE, "intermediate_size": 64, "use_parallel_residual": False}, set()),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": 400,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 64,
            "attention_types": [[["global", "local"], 1]],
        },
        set(),
    ),
    "gptj": (
        "GPTJConfig",
        {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        {"resid_mid"},
    ),
    "opt": ("OPTConfig", OPT, set()),
    "bloom": ("BloomConfig", {"vocab_size": 400, "hidden_size": 32, "n_layer": 2, "n_head": 4}, set()),
    "falcon": ("FalconConfig", BASE, {"resid_mid"}),
    "phi": ("PhiConfig", {**BASE, "intermediate_size": 64}, {"resid_mid"}),
    "phi3": ("Phi3Config", {**LLAMA_LIKE, "pad_token_id": 0}, set()),
    "qwen2": ("Qwen2Config", LLAMA_LIKE, set()),
    "qwen3": ("Qwen3Config", {**LLAMA_LIKE, "head_dim": 16}, set()),
    "gemma2": ("Gemma2Config", {**LLAMA_LIKE, "head_dim": 16}, set()),
    "gemma3": ("Gemma3TextConfig", {**LLAMA_LIKE, "head_dim": 16}, set()),
    "olmo2": ("Olmo2Config", LLAMA_LIKE, set()),
    "granite": ("GraniteConfig", {**LLAMA_LIKE, "residual_multiplier": 0.3}, set()),
    "mistral": ("MistralConfig", LLAMA_LIKE, set()),
    "mixtral": ("MixtralConfig", {**LLAMA_LIKE, "num_local_experts": 4}, {"mlp_post"}),
    "gpt_bigcode": ("GPTBigCodeConfig", {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4}, set()),
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def any_family(request: pytest.FixtureRequest, tokenizer: Any) -> tuple[str, LoadedModel]:
    config_class, config, _ = FAMILIES[request.param]
    return request.param, LoadedModel(build(getattr(transformers, config_class)(**config)), tokenizer, request.param)


def capture(loaded: LoadedModel, sites: str) -> dict[str, Tensor]:
    (response,) = respond(loaded, [[5, 17, 99, 3, 250, 41]], Sampling(max_new_tokens=3), Selection.parse(sites))
    assert response.sample is not None
    return dict(response.sample.activation_data("m", {})["activations"])


def test_lacks_what_the_family_lacks_and_nothing_else(any_family: tuple[str, LoadedModel]) -> None:
    name, loaded = any_family
    assert {site.kind for site in find_layout(loaded.model).missing} == set(FAMILIES[name][2])


def test_stream_plus_branches_is_the_next_stream(any_family: tuple[str, LoadedModel]) -> None:
    _, loaded = any_family
    kept = capture(loaded, "resid_pre,attn_out,mlp_out,resid_post")
    for layer in range(loaded.layout.n_layers):
        total = kept[f"layer_{layer}.resid_pre"] + kept[f"layer_{layer}.attn_out"] + kept[f"layer_{layer}.mlp_out"]
        torch.testing.assert_close(total, kept[f"layer_{layer}"], atol=1e-5, rtol=1e-5)
        if layer:
            assert torch.equal(kept[f"layer_{layer}.resid_pre"], kept[f"layer_{layer - 1}"])


def test_resid_mid_is_the_stream_plus_attention(any_family: tuple[str, LoadedModel]) -> None:
    name, loaded = any_family
    if "resid_mid" in FAMILIES[name][2]:
        with pytest.raises(SiteUnavailable, match="parallel"):
            capture(loaded, "resid_mid")
        return
    kept = capture(loaded, "resid_pre,attn_out,resid_mid")
    for layer in range(loaded.layout.n_layers):
        expected = kept[f"layer_{layer}.resid_pre"] + kept[f"layer_{layer}.attn_out"]
        torch.testing.assert_close(kept[f"layer_{layer}.resid_mid"], expected, atol=1e-5, rtol=1e-5)


OUT_PROJECTION = {
    "llama": lambda m, layer: m.model.layers[layer].self_attn.o_proj,
    "gpt2": lambda m, layer: m.transformer.h[layer].attn.c_proj,
    "gpt_neox": lambda m, layer: m.gpt_neox.layers[layer].attention.dense,
    "gpt_neo": lambda m, layer: m.transformer.h[layer].attn.attention.out_proj,
    "qwen3": lambda m, layer: m.model.layers[layer].self_attn.o_proj,
}


@pytest.mark.parametrize("any_family", list(OUT_PROJECTION), indirect=True)
def test_heads_of_z_add_up_to_attention(any_family: tuple[str, LoadedModel]) -> None:
    """Each head's slice through its own part of the output projection; their sum and the bias is attn_out."""
    name, loaded = any_family
    kept, layout = capture(loaded, "z,attn_out"), loaded.layout
    for layer in range(layout.n_layers):
        projection = OUT_PROJECTION[name](loaded.model, layer)
        weight = projection.weight if name == "gpt2" else projection.weight.T  # [n_heads * d_head, d_model]
        z = kept[f"layer_{layer}.z"].view(-1, layout.n_heads, layout.d_head)
        heads = torch.einsum("phd,hdm->pm", z, weight.view(layout.n_heads, layout.d_head, -1))
        bias = 0 if projection.bias is None else projection.bias
        torch.testing.assert_close((heads + bias).detach(), kept[f"layer_{layer}.attn_out"], atol=1e-5, rtol=1e-5)


def test_values_equal_the_cache(any_family: tuple[str, LoadedModel]) -> None:
    """q, k and v are cut out of the projections by one rule; v is what the KV cache holds."""
    _, loaded = any_family
    kept, layout = capture(loaded, "q,k,v"), loaded.layout
    with torch.no_grad():
        cache = cache_in(loaded.model(torch.tensor([[5, 17, 99, 3, 250, 41]]), use_cache=True))
    for layer in range(layout.n_layers):
        cached = cache.layers[layer].values[0].transpose(0, 1).flatten(1)  # [pos, n_kv_heads * d_head]
        torch.testing.assert_close(kept[f"layer_{layer}.v"][:6], cached, atol=1e-5, rtol=1e-5)
        assert kept[f"layer_{layer}.q"].shape[1] == layout.n_heads * layout.d_head
        assert kept[f"layer_{layer}.k"].shape[1] == layout.n_kv_heads * layout.d_head


def test_widths_are_those_of_the_rows(any_family: tuple[str, LoadedModel]) -> None:
    _, loaded = any_family
    layout = loaded.layout
    kinds = ",".join(
        kind for kind in ("embed", "q", "k", "v", "z", "mlp_post", "final_norm") if not layout.lacking(kind)
    )
    kept = capture(loaded, kinds)
    assert {site.key: width for site, width in layout.widths.items() if site.key in kept} == {
        key: rows.shape[1] for key, rows in kept.items()
    }


def test_branch_that_is_changed_after_the_module_is_refused(tokenizer: Any) -> None:
    """A block that doubles its MLP's output: the module's output is not what is added, and is not stored as that."""
    model = build(transformers.LlamaConfig(**LLAMA_LIKE))
    block = type(model.model.layers[0])

    class Doubling(block):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(hidden_states, *args, **kwargs)
            return out + 2 * (out - hidden_states)

    for layer in model.model.layers:
        layer.__class__ = Doubling
    loaded = LoadedModel(model, tokenizer, "doubling")
    for site in ("mlp_out", "attn_out", "resid_mid"):
        with pytest.raises(SiteUnavailable, match="does not hold"):
            capture(loaded, site)
    assert set(capture(loaded, "resid_post")) == {"layer_0", "layer_1"}


PROJECTIONS: dict[str, Any] = {  # what each family computes q and k with, by its own names
    "llama": lambda m, layer, x: (m.model.layers[layer].self_attn.q_proj(x), m.model.layers[layer].self_attn.k_proj(x)),
    "gpt2": lambda m, layer, x: m.transformer.h[layer].attn.c_attn(x).split(32, -1)[:2],
    "gpt_neox": lambda m, layer, x: tuple(
        m.gpt_neox.layers[layer].attention.query_key_value(x).view(-1, 4, 3, 8)[:, :, i].flatten(1) for i in range(2)
    ),
}
NORMS = {
    "llama": lambda m, layer: m.model.layers[layer].input_layernorm,
    "gpt2": lambda m, layer: m.transformer.h[layer].ln_1,
    "gpt_neox": lambda m, layer: m.gpt_neox.layers[layer].input_layernorm,
}
DOWN = {
    "llama": lambda m, layer: m.model.layers[layer].mlp.down_proj,
    "gpt2": lambda m, layer: m.transformer.h[layer].mlp.c_proj,
    "gpt_neox": lambda m, layer: m.gpt_neox.layers[layer].mlp.dense_4h_to_h,
    "gpt_neo": lambda m, layer: m.transformer.h[layer].mlp.c_proj,
    "opt": lambda m, layer: m.model.decoder.layers[layer].fc2,
}


@pytest.mark.parametrize("any_family", list(PROJECTIONS), indirect=True)
def test_q_and_k_are_recomputed_from_the_stream(any_family: tuple[str, LoadedModel]) -> None:
    name, loaded = any_family
    kept = capture(loaded, "resid_pre,q,k")
    for layer in range(loaded.layout.n_layers):
        with torch.no_grad():
            normed = NORMS[name](loaded.model, layer)(kept[f"layer_{layer}.resid_pre"])
            q, k = PROJECTIONS[name](loaded.model, layer, normed)
        torch.testing.assert_close(kept[f"layer_{layer}.q"], q, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(kept[f"layer_{layer}.k"], k, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("any_family", list(DOWN), indirect=True)
def test_mlp_post_through_the_down_projection_is_mlp_out(any_family: tuple[str, LoadedModel]) -> None:
    name, loaded = any_family
    kept = capture(loaded, "mlp_post,mlp_out")
    for layer in range(loaded.layout.n_layers):
        with torch.no_grad():
            out = DOWN[name](loaded.model, layer)(kept[f"layer_{layer}.mlp_post"])
        torch.testing.assert_close(kept[f"layer_{layer}.mlp_out"], out, atol=1e-5, rtol=1e-5)
        assert kept[f"layer_{layer}.mlp_post"].shape[1] in (64, 128)


@pytest.mark.parametrize("factor", [1, 30, 300, 1000, 3000])
@pytest.mark.parametrize("name", ["granite", "gemma2"])
def test_branches_lost_in_rounding_are_refused_and_never_mistaken(name: str, factor: float) -> None:
    """bfloat16, and a stream far larger than what is added: the raw and the true branch look alike by the sum alone."""
    config_class, config, _ = FAMILIES[name]
    model = build(getattr(transformers, config_class)(**config), torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(factor)
    layout = find_layout(model)
    for layer in range(layout.n_layers):
        for kind, right in (("attn_out", "post_attention_layernorm"), ("mlp_out", "post_feedforward_layernorm")):
            tap = layout.taps.get(Site(kind, layer))
            if tap is not None and name == "granite":
                assert tap.scale == 0.3
            elif tap is not None:
                assert tap.module.endswith(right)
    if factor == 1:
        assert not layout.missing
    if factor == 3000:
        assert all("rounding" in reason for reason in layout.lacking("attn_out"))
        assert layout.lacking("attn_out")


def test_edit_between_blocks_is_seen_as_the_next_block_sees_it(tokenizer: Any) -> None:
    loaded = LoadedModel(build(transformers.LlamaConfig(**LLAMA_LIKE)), tokenizer, "llama")
    plain = capture(loaded, "resid_post")
    handle = loaded.model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 5, *args[1:]))
    try:
        edited = capture(loaded, "resid_post")
    finally:
        handle.remove()
    torch.testing.assert_close(edited["layer_0"][:6], plain["layer_0"][:6] + 5)  # the prompt; the response changes


def test_layout_found_under_somebodys_hook_is_not_remembered(tokenizer: Any) -> None:
    model = build(transformers.LlamaConfig(**LLAMA_LIKE))
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, out: out * 3)
    handle_two = model.model.layers[1].register_forward_hook(lambda module, args, out: out + 7)
    assert find_layout(model).lacking("attn_out")
    handle.remove()
    handle_two.remove()
    assert not find_layout(model).missing


def test_layout_is_found_again_when_a_number_that_it_depends_on_changes() -> None:
    """A multiplier that a module holds, the size that a config clips to, and the dtype."""
    model = build(transformers.GraniteConfig(**LLAMA_LIKE, residual_multiplier=0.3))
    before = find_layout(model)
    assert find_layout(model) is before
    for block in model.model.layers:
        block.residual_multiplier = 0.6
    assert (before.taps[Site("attn_out", 0)].scale, find_layout(model).taps[Site("attn_out", 0)].scale) == (0.3, 0.6)
    clipping = build(transformers.OlmoConfig(**LLAMA_LIKE, clip_qkv=0.4))
    assert find_layout(clipping).taps[Site("v", 1)].clip == 0.4
    clipping.config.clip_qkv = 0.1
    assert find_layout(clipping).taps[Site("v", 1)].clip == 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resid_mid_is_not_what_a_norm_makes_of_it_in_few_bits(dtype: torch.dtype) -> None:
    """NanoChat's stream has the size 1 where its MLP's norm reads it, so that the norm hardly changes it."""
    torch.manual_seed(0)
    config = transformers.NanoChatConfig(**LLAMA_LIKE, initializer_range=0.08)
    layout = find_layout(transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype))
    places = {layout.taps[site].module for site in layout.sites("resid_mid") if site in layout.taps}
    assert "model.layers.0.post_attention_layernorm" in places
    assert not [place for place in places if place.endswith("mlp")]


def test_block_that_runs_twice_in_a_forward_is_refused(tokenizer: Any) -> None:
    from AutomaticEval.errors import CaptureError

    model = build(transformers.LlamaConfig(**LLAMA_LIKE))
    loaded = LoadedModel(model, tokenizer, "twice")
    assert loaded.layout.n_layers == 2
    forward = model.model.layers[1].self_attn.o_proj.forward
    model.model.layers[0].self_attn.o_proj.forward = lambda x: (
        model.model.layers[1].self_attn.o_proj(x) * 0 + forward(x)
    )
    with pytest.raises(CaptureError, match="fired"):
        capture(loaded, "z")


def test_norm_that_is_used_twice_is_not_taken_for_the_final_one(tokenizer: Any) -> None:
    model = build(transformers.NanoChatConfig(**LLAMA_LIKE))
    loaded = LoadedModel(model, tokenizer, "nanochat")
    assert set(capture(loaded, "embed,resid_post")) == {"embeddings", "layer_0", "layer_1"}


def test_list_of_other_blocks_of_the_same_length_is_passed_over(tokenizer: Any) -> None:
    model = build(transformers.LlamaConfig(**LLAMA_LIKE))
    tower = torch.nn.Module()
    tower.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
    model.visual = tower.eval()
    assert find_layout(model).taps[Site("resid_pre", 0)].module == "model.layers.0"


def test_training_mode_and_encoder_decoders_are_refused() -> None:
    model = build(transformers.LlamaConfig(**LLAMA_LIKE))
    with pytest.raises(UnsupportedModel, match="eval"):
        find_layout(model.train())
    model.eval().model.layers[1].train()
    with pytest.raises(UnsupportedModel, match="eval"):
        find_layout(model)
    t5 = transformers.T5Config(vocab_size=100, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16)
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        find_layout(transformers.AutoModelForSeq2SeqLM.from_config(t5).eval())


def test_compiled_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="compiled"):
        find_layout(torch.compile(build(transformers.LlamaConfig(**LLAMA_LIKE))))


def test_state_space_model_gives_its_residual_stream(tokenizer: Any) -> None:
    model = build(transformers.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2))
    loaded = LoadedModel(model, tokenizer, "mamba")
    assert set(capture(loaded, "embed,resid_post")) == {"embeddings", "layer_0", "layer_1"}
    with pytest.raises(SiteUnavailable, match="no softmax attention"):
        capture(loaded, "z")


def test_finding_the_layout_leaves_no_hook_and_no_change(
    any_family: tuple[str, LoadedModel], same_hooks_after: Callable[[Any], None]
) -> None:
    name, _ = any_family
    config_class, config, _ = FAMILIES[name]
    model = build(getattr(transformers, config_class)(**config))
    same_hooks_after(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    find_layout(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
