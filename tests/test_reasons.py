"""A site that a layer lacks is refused by that layer's own reason, and the reason is true."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.models import CONFIGS, build
from torch import Tensor, nn

from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.capture.texts.forward import padded, read
from AutomaticEval.cli import sites as sites_command
from AutomaticEval.errors import CaptureError, SelectionError, SiteUnavailable, UnsupportedModel
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.layout import layers_text
from AutomaticEval.models.recording import Kept, capturing
from AutomaticEval.selection import Selection
from AutomaticEval.sites import KINDS, ONCE, PER_LAYER, Site, parse_heads, site_of

IDS = [5, 17, 99, 3, 250, 41]
BASE: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA: dict[str, Any] = {**BASE, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2: dict[str, Any] = {"vocab_size": 400, "n_embd": 32, "n_layer": 3, "n_head": 4}
MIXER = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 3}
LATENT: dict[str, Any] = {
    **LLAMA,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}
NOT_HELD = r"resid_pre \+ attn_out \+ mlp_out = resid_post does not hold in its block"
MANY = "is a mixture of experts"
REASONS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    # name: (config class, config, {site: what its reason says, or "" where the model has it})
    "opt with norms behind": (
        "OPTConfig",
        {**BASE, "ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        {
            "final_norm": r"no norm .* beside the blocks, only .*project_out \(Linear\)",
            "layer_1.attn_out": "final_layer_norm stands behind the last addition: resid_post is what it gives",
            "layer_1.mlp_post": "",
            "layer_1.z": "",
        },
    ),
    "bloom with norms in the stream": (
        "BloomConfig",
        {"vocab_size": 400, "hidden_size": 32, "n_layer": 3, "n_head": 4}
        | {"apply_residual_connection_post_layernorm": True},
        {
            "layer_0.z": "what self_attention.dense gives is not what self_attention gives",
            "layer_0.mlp_post": "",
            "layer_2.mlp_out": "post_attention_layernorm stands in the stream: what is added is added to what it gives",
            "layer_2.v": "",
        },
    ),
    "falcon with groups": (
        "FalconConfig",
        {**BASE, "num_kv_heads": 2, "new_decoder_architecture": True},
        {
            "layer_1.q": "",
            "layer_2.resid_mid": "parallel",
        },
    ),
    "codegen": ("CodeGenConfig", {**GPT2, "rotary_dim": 4}, {"layer_0.v": "", "layer_1.resid_mid": "parallel"}),
    "mamba": (
        "MambaConfig",
        MIXER,
        {
            "layer_0.z": r"is mixer \(MambaMixer\), no softmax attention",
            "layer_1.mlp_out": "its block holds no MLP, only what mixes tokens: see mixer_out",
            "layer_1.attn_out": r"is mixer \(MambaMixer\), no softmax attention: see mixer_out",
            "layer_1.resid_mid": "its block adds one thing alone",
            "layer_1.mixer_out": "",
            "layer_2.mlp_post": "its block holds no MLP, only what mixes tokens: see mixer_out",
            "final_norm": "",
        },
    ),
    "mamba2": (
        "Mamba2Config",
        {**MIXER, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
        {"layer_0.q": r"is mixer \(Mamba2Mixer\), no softmax attention"},
    ),
    "jamba": (
        "JambaConfig",
        {**LLAMA, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "expert_layer_offset": 0, "num_experts": 4, "use_mamba_kernels": False},
        {
            "layer_0.z": r"is mamba \(JambaMambaMixer\), no softmax",
            "layer_1.z": "",
            "layer_2.mlp_post": MANY,
            "layer_3.mlp_post": "",
        },
    ),
    "lfm2": (
        "Lfm2Config",
        {**LLAMA, "layer_types": ["conv", "full_attention", "conv"], "full_attn_idxs": [1]},
        {
            "layer_0.attn_out": r"is conv \(Lfm2ShortConv\), no softmax attention: see mixer_out",
            "layer_1.attn_out": "",
            "layer_0.mixer_out": "",
            "final_norm": "",
        },
    ),
    "rwkv": (
        "RwkvConfig",
        {**MIXER, "attention_hidden_size": 32, "intermediate_size": 64},
        {
            "layer_0.z": "its config says no number of attention heads",
            "layer_0.mixer_out": "pre_ln stands in the stream",
            "layer_1.mixer_out": "",
            "layer_1.mlp_post": r"no down projection .* in feed_forward, .* value \(Linear\)$",
            "final_norm": "",
        },
    ),
    "recurrent gemma": (
        "RecurrentGemmaConfig",
        {**LLAMA, "num_key_value_heads": 1, "lru_width": 32, "block_types": ["recurrent", "recurrent", "attention"]},
        {
            "layer_0.z": r"no output projection .* in temporal_block, .*rg_lru",
            "layer_2.z": "",
            "layer_2.v": "",
            "layer_1.v": "keeps no values in the cache",
            "final_norm": "",
        },
    ),
    "deepseek v2": (
        "DeepseekV2Config",
        {**LATENT, **EXPERTS},
        {"layer_0.z": "", "layer_0.mlp_post": "", "layer_1.mlp_post": MANY, "layer_2.k": ""},
    ),
    "deepseek v3": ("DeepseekV3Config", {**LATENT, **EXPERTS}, {"layer_2.z": "", "layer_0.v": ""}),
    "minicpm3": ("MiniCPM3Config", LATENT, {"layer_1.z": "", "layer_1.q": "", "layer_1.mlp_post": ""}),
    "jetmoe": (
        "JetMoeConfig",
        {**LLAMA, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"layer_0.z": MANY, "layer_1.q": MANY, "layer_2.k": ""},
    ),
    "falcon h1": (
        "FalconH1Config",
        {**LLAMA, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
        {"layer_0.attn_out": "", "layer_0.mixer_out": "", "layer_0.z": "", "layer_0.resid_mid": ""},
    ),
    "qwen3 next": (
        "Qwen3NextConfig",
        {**LLAMA, "num_hidden_layers": 4, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        {
            "layer_2.z": r"is linear_attn \(Qwen3NextGatedDeltaNet\), no softmax attention",
            "layer_3.z": "",
            "layer_0.mlp_post": MANY,
            "layer_3.mlp_post": MANY,
        },
    ),
    "openai gpt": (
        "OpenAIGPTConfig",
        {**GPT2, "n_positions": 64},
        {
            "layer_1.q": "",
            "layer_1.attn_out": "ln_2 stands behind the last addition",
            "final_norm": "only tokens_embed",
        },
    ),
    "ctrl": (
        "CTRLConfig",
        {**GPT2, "dff": 64, "n_positions": 64},
        {"layer_0.z": "", "layer_0.attn_out": "", "layer_2.mlp_post": "no down projection .* in ffn", "final_norm": ""},
    ),
    "bert": (
        "BertConfig",
        {**BASE, "intermediate_size": 64, "is_decoder": True},
        {
            "layer_0.attn_out": r"no MLP .*intermediate \(BertIntermediate\)",
            "layer_1.z": "what attention.output.dense gives is not what attention gives",
            "layer_1.q": r"in attention, whose parts are self \(",
        },
    ),
    "modernbert": (
        "ModernBertDecoderConfig",
        {**BASE, "intermediate_size": 64},
        {"layer_0.z": "", "layer_0.mlp_post": "", "final_norm": ""},
    ),
    "nanochat": ("NanoChatConfig", LLAMA, {"final_norm": ""}),
    "nemotron h": (
        "NemotronHConfig",
        {**LLAMA, "hybrid_override_pattern": "M-*", "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8}
        | {"n_groups": 1, "head_dim": 8},
        {
            "layer_0.z": r"is mixer \(NemotronHMamba2Mixer\), no softmax attention",
            "layer_2.z": "",
            "layer_2.attn_out": "",
            "layer_1.mlp_post": "",
            "layer_1.attn_out": "its block mixes no tokens, it holds an MLP alone: see mlp_out",
            "layer_2.mlp_out": "its block holds no MLP, only what mixes tokens: see attn_out",
        },
    ),
    "mixtral": ("MixtralConfig", {**LLAMA, "num_local_experts": 4}, {"layer_0.mlp_post": MANY, "layer_0.mlp_out": ""}),
    "gemma 4": (
        "Gemma4TextConfig",
        {**LLAMA, "num_hidden_layers": 6, "head_dim": 8, "global_head_dim": 16, "vocab_size_per_layer_input": 400}
        | {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 3, "sliding_window": 64}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
        {
            "layer_2.z": "",
            "layer_0.v": "",
            "layer_4.k": "uses those of layer 1",
            "layer_5.v": "uses those of layer 2",
            "layer_3.z": "",
            "layer_5.resid_pre": "",
            "final_norm": "",
        },
    ),
}


def built(name: str) -> Any:
    config_class, config, _ = REASONS[name]
    return build(getattr(hf, config_class)(**config))


@pytest.mark.parametrize("name", list(REASONS))
def test_reasons_are_the_layers_own(name: str) -> None:
    model = built(name)
    layout = find_layout(model)
    for key, says in REASONS[name][2].items():
        site = site_of(key)
        if not says:
            assert site in layout.taps, key
            continue
        with pytest.raises(SiteUnavailable) as refused:
            layout.pick([site])
        assert str(refused.value).startswith(f"this model has no {site.kind!r} at {key}: ")
        assert re.search(says, layout.missing[site]), layout.missing[site]
    check_truth(model, name)


def check_truth(model: Any, name: str) -> None:
    """Of every layer: all sites are there or have a reason, and what a reason names is in that layer's block."""
    layout = find_layout(model)
    everything = {site for kind in KINDS for site in layout.sites(kind)}
    known = layout.taps.keys() | layout.missing.keys()
    assert known <= everything
    assert all(KINDS[site.kind].absent for site in everything - known)  # a block without a router lacks no experts
    assert not layout.taps.keys() & layout.missing.keys()
    for site, reason in layout.missing.items():
        if site.layer is None:
            continue
        block = model.get_submodule(layout.taps[Site("resid_pre", site.layer)].module)
        inside = {f"{path.rpartition('.')[2]} ({type(module).__name__})" for path, module in block.named_modules()}
        named = reason.split("whose parts are ")[-1] if "whose parts are" in reason else ""
        assert set(re.findall(r"\w+ \([A-Z]\w*\)", named)) <= inside, f"{name} {site.key}: {reason}"
        if MANY in reason:
            assert any("xperts" in path or "xperts" in type(part).__name__ for path, part in block.named_modules())


def test_refusal_says_which_layers_have_it() -> None:
    layout = find_layout(built("jamba"))
    with pytest.raises(
        SiteUnavailable, match=r"at layer_2.z: .*It has 'z' in layers 1, 3\. It has everywhere: .*embed"
    ):
        layout.pick([Site("z", 1), Site("z", 2)])
    with pytest.raises(SiteUnavailable, match=r"at layer_4.z: it has 4 layers, 0 to 3"):
        layout.pick([Site("z", 4)])


def test_command_says_which_layers_have_a_site_and_why_others_have_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: Any
) -> None:
    loaded = LoadedModel(built("jamba"), tokenizer, "jamba")
    monkeypatch.setattr("AutomaticEval.models.loading.load_model", lambda *given, **options: loaded)
    monkeypatch.setattr("AutomaticEval.cli.options.quiet_libraries", lambda: None)
    monkeypatch.setenv("COLUMNS", "400")
    sites_command.sites(**{**_load_options(), "model": "jamba", "verify": True})
    rows = {row.split("│")[1].strip(): row for row in capsys.readouterr().out.splitlines() if row.startswith("│")}
    assert "layer_1.z, layer_3.z" in rows["z"]
    assert "layer_0.resid_pre … layer_3.resid_pre" in rows["resid_pre"]
    (line,) = (row for row in sites_command._missing(loaded.layout) if "z" in row[0].split(", "))
    assert line[:2] == ("attn_out, q, k, v, z, head_result_norm", "layers 0, 2"), "one row for one reason"
    assert re.search(r"^what mixes tokens .* mamba \(JambaMambaMixer\)", line[2])
    assert not any("resid_post" in row[0] for row in sites_command._missing(loaded.layout))
    mamba = LoadedModel(built("mamba"), tokenizer, "mamba").layout
    (line,) = (row for row in sites_command._missing(mamba) if "z" in row[0].split(", "))
    assert line[1] == "any layer"
    assert line[2].startswith("what mixes tokens in its block is mixer")


def _load_options() -> dict[str, Any]:
    """The command's own defaults."""
    own = inspect.signature(sites_command.sites).parameters
    return {name: each.default for name, each in own.items() if name != "model"}


def test_layers_as_text() -> None:
    assert layers_text([3]) == "layer 3"
    assert layers_text([0, 1, 2, 5, 7, 8]) == "layers 0-2, 5, 7-8"


# Layers whose heads, or whose running, differ.


def rows_of(
    model: Any, tokenizer: Any, kinds: str, layers: Any = None, positions: str = "all"
) -> tuple[dict[str, Tensor], list[int]]:
    """Rows of a generation, and what was fed."""
    selection = Selection.parse(kinds, layers, positions)
    (response,) = respond(LoadedModel(model, tokenizer, "m"), [IDS], Sampling(max_new_tokens=3), selection)
    assert response.sample is not None
    return dict(response.sample.activation_data("m", {})["activations"]), [*IDS, *response.generated_ids][:-1]


def raw(model: Any, ids: list[int], places: dict[str, tuple[str, str]]) -> dict[str, Tensor]:
    """Key -> what a module was given or gave in one forward without a cache, by hooks of the test's own."""
    found: dict[str, Tensor] = {}
    handles = []
    for key, (path, end) in places.items():

        def before(module: Any, args: Any, kwargs: Any, key: str = key) -> None:
            found[key] = (args[0] if args else kwargs["hidden_states"])[0].clone()

        def after(module: Any, args: Any, out: Any, key: str = key) -> None:
            found[key] = (out[0] if isinstance(out, tuple) else out)[0].clone()

        module = model.get_submodule(path)
        if end == "input":
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(after))
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_gemma_4_gives_its_stream_and_its_heads(tokenizer: Any) -> None:
    """In one forward over a text, and while it generates, when its upper layers compute no more of the prompt than its last token."""
    model = built("gemma 4")
    layout = find_layout(model)
    assert (layout.n_heads, layout.d_head, layout.d_model) == (4, 8, 32)
    places = {f"layer_{n}.resid_pre": (f"model.layers.{n}", "input") for n in range(6)}
    places |= {f"layer_{n}": (f"model.layers.{n}", "output") for n in range(6)}
    places |= {f"layer_{n}.mlp_post": (f"model.layers.{n}.mlp.down_proj", "input") for n in range(6)}
    places |= {f"layer_{n}.z": (f"model.layers.{n}.self_attn.o_proj", "input") for n in range(6)}
    expected = raw(model, IDS, places)
    found = read(model, layout, layout.pick(map(site_of, places)), padded([IDS, IDS[:3]], "left"))
    for key, value in expected.items():
        torch.testing.assert_close(found[key][: len(IDS)], value, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[key][len(IDS) :], value[:3], atol=1e-5, rtol=1e-5)
    kinds = "resid_pre,resid_post,mlp_post,z"
    written, fed = rows_of(model, tokenizer, kinds, None, "scored")
    expected = raw(model, fed, places)
    assert len(written) == 24
    for key, rows in written.items():
        torch.testing.assert_close(rows, expected[key][len(IDS) - 1 :], atol=1e-5, rtol=1e-5)
    assert [layout.widths[Site("z", n)] for n in range(6)] == [32, 32, 64] * 2
    with pytest.raises(CaptureError, match=r"layer_2 was not computed at 5 .*share their keys and values"):
        rows_of(model, tokenizer, "resid_post")


def mllama(crossing: list[int]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {**BASE, "num_hidden_layers": 5, "num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 0}
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2}
    vision |= {"intermediate_size": 32, "vision_output_dim": 32, "image_size": 28, "patch_size": 14}
    vision |= {"max_num_tiles": 1, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    torch.manual_seed(0)
    config = hf.MllamaConfig(
        vision_config=vision, text_config={**text, "cross_attention_layers": crossing, "rope_parameters": rope}
    )
    return hf.MllamaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("crossing", [[3], [1, 2], [0], [4], [0, 4]])
def test_blocks_that_do_not_run_over_text_are_refused_and_the_others_true(crossing: list[int], tokenizer: Any) -> None:
    model = mllama(crossing)
    layout = find_layout(model)
    running = [layer for layer in range(5) if layer not in crossing]
    assert {site.layer for site in layout.missing} == set(crossing)
    for layer in crossing:
        for kind in PER_LAYER:
            with pytest.raises(
                SiteUnavailable, match=rf"at {Site(kind, layer).key}: its block does not run .*over text"
            ):
                layout.pick([Site(kind, layer)])
    blocks = "model.language_model.layers"
    found, fed = rows_of(model, tokenizer, "embed,resid_pre,resid_post,z,final_norm", running)
    places = {"embeddings": (f"{blocks}.{running[0]}", "input"), "final_norm": ("model.language_model.norm", "output")}
    places |= {f"layer_{n}.resid_pre": (f"{blocks}.{n}", "input") for n in running}
    places |= {f"layer_{n}": (f"{blocks}.{n}", "output") for n in running}
    places |= {f"layer_{n}.z": (f"{blocks}.{n}.self_attn.o_proj", "input") for n in running}
    expected = raw(model, fed, places)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="resid_post is kept in layers? .*does not run"):
        assert len(rows_of(model, tokenizer, "resid_post")[0]) == len(running)


def test_blocks_that_run_twice_are_refused_by_name() -> None:
    model = build(CONFIGS["llama"]())
    model.model.layers.__class__ = Twice
    with pytest.raises(UnsupportedModel, match=r"model.layers run \[2, 2, 2\] times"):
        find_layout(model)


class Twice(nn.ModuleList):
    """A model goes over a slice of its blocks."""

    def __getitem__(self, index: Any) -> Any:
        return [*self, *self] if isinstance(index, slice) else super().__getitem__(index)


# Configs with their own names.


class OwnNames(hf.PreTrainedConfig):
    """As remote code has it: none of transformers' names, and no map to them."""

    model_type = "own_names"

    def __init__(self, n_layers: int = 3, **own: Any) -> None:
        self.n_layers, self.n_head, self.dim = n_layers, 4, 32
        super().__init__(**own)


def renamed(config: Any, **lacks: Any) -> Any:
    """A tiny Llama, whose config says what another does."""
    model = build(CONFIGS["llama"]())
    model.config = config
    return model


def test_config_with_its_own_names_has_a_layout() -> None:
    model = renamed(OwnNames(is_decoder=True))
    model.model.config.use_cache = True
    layout = find_layout(model)
    assert (layout.n_layers, layout.d_model, layout.n_heads, layout.n_kv_heads, layout.d_head) == (3, 32, 4, 2, 8)
    assert not layout.missing


def test_config_that_says_no_number_of_layers_is_refused_by_name() -> None:
    config = OwnNames()
    config.n_layers = None
    with pytest.raises(UnsupportedModel, match=r"no number of layers \(num_hidden_layers, n_layer"):
        find_layout(renamed(config))


# Parts that are compiled.


def compiled(model: Any, which: str, how: str) -> None:
    for layer, block in enumerate(model.model.layers):
        place = {"block": (model.model.layers, str(layer)), "mlp": (block, "mlp"), "attention": (block, "self_attn")}
        parent, name = place[which]
        if how == "in place":
            getattr(parent, name).compile(backend="eager")
        else:
            setattr(parent, name, torch.compile(getattr(parent, name), backend="eager"))


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("how", ["in place", "replaced"])
@pytest.mark.parametrize("which", ["block", "mlp", "attention"])
def test_what_is_within_compiled_parts_is_refused_and_what_is_around_them_true(
    which: str, how: str, warm: bool
) -> None:
    torch._dynamo.reset()  # after some compilations torch gives up, and hooks within fire again
    plain, model = build(CONFIGS["llama"]()), build(CONFIGS["llama"]())
    compiled(model, which, how)
    ids = torch.tensor([IDS])
    with torch.no_grad():
        for _ in range(2 if warm else 0):
            model(ids)
        layout = find_layout(model)
        inside = {
            "block": {kind for kind in PER_LAYER if "router" not in kind and "expert" not in kind}
            - {"resid_pre", "resid_post"},
            "mlp": {"mlp_post"},
            "attention": set("zqkv") | {"head_result_norm"},
        }
        assert {site.kind for site in layout.missing} == inside[which]
        part = {"block": "its block", "mlp": "mlp", "attention": "self_attn"}[which]
        for reason in layout.missing.values():
            assert reason.startswith(f"{part} is compiled")
        kept = Kept(torch.zeros(6, dtype=torch.long), torch.arange(6))
        rows = []
        for each in (plain, model, plain, model):
            own = find_layout(each)
            taps = own.pick(layout.taps)
            with capturing(each, taps, own.embedding, lambda *_: kept, 1) as found:
                each(ids)
            rows.append(found.rows)
    for key, value in rows[0].items():
        torch.testing.assert_close(rows[1][key], value, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rows[3][key], value, atol=1e-5, rtol=1e-5)


def test_layout_is_looked_for_again_when_a_part_was_compiled() -> None:
    model = build(CONFIGS["llama"]())
    assert not find_layout(model).missing
    model.model.layers[1].compile(backend="eager")
    layout = find_layout(model)
    assert {site.layer for site in layout.missing} == {1}
    assert Site("z", 0) in layout.taps


def test_model_whose_body_is_compiled_is_refused() -> None:
    for compile_body in (
        lambda model: model.model.compile(backend="eager"),
        lambda model: setattr(model, "model", torch.compile(model.model, backend="eager")),
    ):
        model = build(CONFIGS["llama"]())
        compile_body(model)
        with pytest.raises(UnsupportedModel, match=r"model of LlamaForCausalLM is compiled"):
            find_layout(model)


def test_embedding_that_is_given_something_else_is_refused() -> None:
    config = hf.XLNetConfig(vocab_size=400, d_model=32, n_layer=3, n_head=4, d_inner=64)
    with pytest.raises(UnsupportedModel, match=r"word_embedding is given \[6, 1\], not the ids \[1, 6\]"):
        find_layout(build(config))


@pytest.mark.parametrize(("name", "norm"), [("rwkv", "rwkv.ln_out"), ("recurrent gemma", "model.final_norm")])
def test_final_norms_of_other_names(name: str, norm: str) -> None:
    layout = find_layout(built(name))
    assert layout.taps[Site("final_norm")].module == norm
    assert set(ONCE) <= {site.kind for site in layout.taps}


def test_heads_of_a_model_without_any_are_refused_by_that() -> None:
    for heads in (None, 1, "0-2"):
        with pytest.raises(SelectionError, match="no number of attention heads"):
            parse_heads(heads, 0)
