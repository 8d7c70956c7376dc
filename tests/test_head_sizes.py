"""Heads whose queries, keys and values have widths or numbers of their own: every site is what attention itself is given, and gives."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from helpers.models import build
from torch import Tensor

from AutomaticEval import generate_inference_with_activations, open_run, score_continuations
from AutomaticEval.analysis.heads.ablate import Ablation, reference_z
from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.recompute.recomputed_run import recompute
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.capture.texts.forward import padded, read
from AutomaticEval.cli.sites import _other_heads
from AutomaticEval.errors import EditError, SiteUnavailable
from AutomaticEval.models.architecture.heads.evidence import is_read
from AutomaticEval.models.attention import check_patterns
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.edit import Edit
from AutomaticEval.models.editing import editing
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.layout import Layout
from AutomaticEval.selection import Selection
from AutomaticEval.sites import Site
from AutomaticEval.store.export.transformer_lens import as_activation_cache

IDS = [5, 17, 99, 3, 250, 41]
BASE: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA: dict[str, Any] = {**BASE, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
NARROW = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
LATENT: dict[str, Any] = {**LLAMA, "num_key_value_heads": 4, **NARROW}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
ROUTED |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
WINDOWS = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA_4: dict[str, Any] = {**LLAMA, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8}
GEMMA_4 |= {"vocab_size_per_layer_input": 400, "sliding_window": 64}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}


class Family(NamedTuple):
    """A tiny model, and what is by hand known of its heads."""

    config: str
    sizes: dict[str, Any]
    attention: str = "model.layers.{}.self_attn"
    widths: dict[int, tuple[int, int, int, int]] | None = None
    """Layer -> (heads of keys and values, width of a query, width of a value, width of z); None: of all layers `of_all`."""
    of_all: tuple[int, int] = (2, 8)
    """Heads of keys and values, and the width of all heads."""
    plain: int | None = None
    """How many numbers of a head's query and key rotary leaves alone. None: rotary turns all or an unknown part."""
    attends: str = "sdpa"
    positions: str = "all"


MLA = {"widths": dict.fromkeys(range(2), (4, 12, 6, 6)), "plain": 8}
FAMILIES: dict[str, Family] = {
    "deepseek v2": Family("DeepseekV2Config", {**LATENT, **ROUTED}, **MLA),
    "deepseek v2 lite": Family("DeepseekV2Config", {**LATENT, **ROUTED, "q_lora_rank": None}, **MLA),
    "deepseek v3": Family("DeepseekV3Config", {**LATENT, **ROUTED}, **MLA),
    "deepseek v3.2": Family(
        "DeepseekV32Config", {**LATENT, **ROUTED, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64}, **MLA
    ),
    "glm 4 lite": Family("Glm4MoeLiteConfig", {**LATENT, **ROUTED}, **MLA),
    "minicpm 3": Family("MiniCPM3Config", LATENT, **MLA),
    "youtu": Family("YoutuConfig", LATENT, **MLA),
    "mimo": Family(
        "MiMoV2FlashConfig",
        {**LLAMA, "head_dim": 16, "v_head_dim": 8, **ROUTED, **WINDOWS},
        widths={0: (4, 16, 8, 8), 1: (2, 16, 8, 8)},
        attends="eager",
    ),
    "falcon 40b": Family(
        "FalconConfig",
        {**BASE, "num_kv_heads": 2, "new_decoder_architecture": True},
        attention="transformer.h.{}.self_attention",
    ),
    "olmo that clips": Family("OlmoConfig", {**LLAMA, "clip_qkv": 0.4}),
    "recurrent gemma": Family(
        "RecurrentGemmaConfig",
        {**LLAMA, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64},
        attention="model.layers.{}.temporal_block",
        widths={2: (2, 8, 8, 8)},
    ),
    "modernbert": Family(
        "ModernBertDecoderConfig", {**BASE, "intermediate_size": 64}, "model.layers.{}.attn", of_all=(4, 8)
    ),
    "qwen 3 next": Family(
        "Qwen3NextConfig",
        {**LLAMA, "num_hidden_layers": 4, "head_dim": 8, **LINEAR, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        widths={3: (2, 8, 8, 8)},
    ),
    "gemma 4": Family(
        "Gemma4TextConfig",
        {**GEMMA_4, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        widths={0: (2, 8, 8, 8), 1: (2, 16, 16, 16), 2: (0, 8, 0, 8), 3: (0, 16, 0, 16)},
        positions="scored",
    ),
    "gemma 4 whose keys are its values": Family(
        "Gemma4TextConfig",
        {**GEMMA_4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        widths={0: (2, 8, 8, 8), 1: (1, 16, 16, 16)},
    ),
}


class Attended(NamedTuple):
    """What one call of attention was given, and gave: each [n_heads, pos, width of a head], of one row."""

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor


@contextmanager
def attended(family: Family, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Attended]]:
    """What attention is given and gives in the forwards inside the with, call after call: a second way, which knows no projection."""
    calls: list[Attended] = []

    def noted(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> None:
        n = q.shape[1]
        k, v = (each.repeat_interleave(n // each.shape[1], 1) for each in (k, v))
        calls.append(Attended(*(each[0].clone() for each in (q, k, v, z))))

    with monkeypatch.context() as patch:
        if family.attends == "sdpa":
            own = torch.nn.functional.scaled_dot_product_attention

            def sdpa(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                z: Tensor = own(q, k, v, *args, **kwargs)
                noted(q, k, v, z)
                return z

            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
        else:
            code = hf.models.mimo_v2_flash.modeling_mimo_v2_flash
            eager = code.eager_attention_forward

            def eagerly(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
                out = eager(module, q, k, v, *args, **kwargs)
                noted(q, k, v, out[0].transpose(1, 2))
                return out

            patch.setattr(code, "eager_attention_forward", eagerly)
        yield calls


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tokenizer: Any) -> tuple[Family, LoadedModel]:
    family = FAMILIES[request.param]
    config = getattr(hf, family.config)(**family.sizes)
    if family.attends != "sdpa":
        config._attn_implementation = family.attends
    return family, LoadedModel(build(config), tokenizer, request.param)


def widths_of(family: Family) -> dict[int, tuple[int, int, int, int]]:
    n, width = family.of_all
    return family.widths or dict.fromkeys(range(2), (n, width, width, width))


def test_layout_says_how_many_heads_a_row_holds_and_how_wide_they_are(case: tuple[Family, LoadedModel]) -> None:
    family, loaded = case
    layout = loaded.layout
    for layer, (n_kv, query, value, of_z) in widths_of(family).items():
        expected = {"q": (4, query), "z": (4, of_z), "head_result_norm": (4, 1)}
        expected |= {"k": (n_kv, query), "v": (n_kv, value)} if n_kv else {}
        for kind, (n, width) in expected.items():
            site = Site(kind, layer)
            assert layout.heads_at(site) == n, site
            assert layout.widths[site] == n * width, site
            plain = {"n_heads": 4, "n_kv_heads": layout.n_kv_heads, "d_head": layout.d_head}
            is_cut_by_shape = n == plain["n_kv_heads" if kind in "kv" else "n_heads"] and width in (1, plain["d_head"])
            assert (site.key in layout.unlike_most()) != is_cut_by_shape, site
    assert layout.unlike_most().keys() <= {site.key for site in layout.taps}


def heads(rows: Tensor, n: int) -> Tensor:
    """[pos, n * width] -> [n, pos, width]"""
    return rows.view(len(rows), n, -1).transpose(0, 1)


def normed(attention: Any, name: str, value: Tensor) -> Tensor:
    """A head's query or key as attention gets it but for rotary: some families norm it first."""
    norm = getattr(attention, f"{name}_norm", None)
    return value if norm is None else norm(value)


def close(found: Tensor, right: Tensor) -> bool:
    """Within 1e-5 of the largest number, as a padded batch rounds otherwise than one row."""
    assert found.shape == right.shape
    size = float(right.abs().max()) if right.numel() else 0
    torch.testing.assert_close(found, right, atol=1e-5 * max(1.0, size), rtol=0)
    return True


def check(
    family: Family, loaded: LoadedModel, kept: dict[str, Tensor], calls: list[Attended], places: list[int]
) -> None:
    """All head sites that were kept, against what attention was given and gave. places: the positions that were kept."""
    for (layer, (n_kv, _, _, _)), call in zip(sorted(widths_of(family).items()), calls, strict=True):
        attention = loaded.model.get_submodule(family.attention.format(layer))
        projection = loaded.model.get_submodule(loaded.layout.taps[Site("z", layer)].module)
        for kind in "zqkv" if n_kv else "zq":
            found = heads(kept[f"layer_{layer}.{kind}"], n_kv if kind in "kv" else 4)
            found = found.repeat_interleave(4 // len(found), 0)
            right = getattr(call, kind)[:, places]
            if kind in "vz":
                is_gated = kind == "z" and hasattr(
                    attention.config, "linear_num_key_heads"
                )  # Qwen3-Next, behind attention
                assert is_gated or close(found, right)
            else:
                found = normed(attention, kind, found)
                close(found.norm(dim=-1), right.norm(dim=-1))  # rotary keeps lengths
                plain = right.shape[-1] if 0 in places and family.plain is None else family.plain or 0
                at = places.index(0) if 0 in places else 0
                close(found[:, at, :plain], right[:, at, :plain])
                if family.plain is not None:  # and some families put the pairs that are turned in another order
                    close(found[..., :plain], right[..., :plain])
                    if 0 in places:
                        close(found[:, at, plain:].sort().values, right[:, at, plain:].sort().values)
        z = kept[f"layer_{layer}.z"]
        weight = projection.weight.T.view(4, z.shape[1] // 4, -1)
        results = torch.einsum("hpd,hdm->phm", heads(z, 4), weight)
        close(kept[f"layer_{layer}.head_result_norm"], results.norm(dim=-1))


def kinds_of(layout: Layout) -> str:
    return ",".join(site.key for site in layout.taps if site.kind in ("q", "k", "v", "z", "head_result_norm"))


@torch.no_grad()
def test_answers_of_a_padded_batch_hold_what_attention_is_given(
    case: tuple[Family, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, loaded = case
    selection = Selection.parse(kinds_of(loaded.layout), positions=family.positions)
    prompts = [IDS, IDS[:2]] if "Recurrent" not in family.config else [IDS]  # its state takes padding in
    for prompt, response in zip(prompts, respond(loaded, prompts, Sampling(max_new_tokens=3), selection), strict=True):
        assert response.sample is not None
        written = response.sample.activation_data("m", {})
        fed = torch.tensor([[*prompt, *response.generated_ids[:-1]]])
        with attended(family, monkeypatch) as calls:
            loaded.model(fed, use_cache=False)
        check(family, loaded, dict(written["activations"]), calls, written["positions"].tolist())


@torch.no_grad()
def test_scored_rows_hold_what_attention_is_given_and_scores_are_those_of_one_forward(
    case: tuple[Family, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, loaded = case
    pairs = [(IDS[:4], [41, 7]), (IDS[:4], [250, 12, 9]), (IDS[:2], [8])]
    found = score_continuations(
        pairs,
        loaded.model,
        tokenizer=loaded.tokenizer,
        capture_activations=True,
        sites=kinds_of(loaded.layout),
        positions="all",
    )
    for (context, continuation), each in zip(pairs, found, strict=True):
        with attended(family, monkeypatch) as calls:
            logits = loaded.model(torch.tensor([[*context, *continuation[:-1]]]), use_cache=False).logits[0]
        likely = logits[-len(continuation) :].log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
        assert each.logprob == pytest.approx(float(likely.sum()), abs=1e-4)
        assert each.activation_data is not None
        places = each.activation_data["positions"].tolist()
        check(family, loaded, dict(each.activation_data["activations"]), calls, places)


def without_columns(module: Any, end: str, columns: slice, run: Callable[[], Tensor]) -> Tensor:
    """What run gives when some columns of what a module is given, or gives, are zero: by a plain hook."""

    def changed(value: Tensor) -> Tensor:
        value = value.clone()
        value[..., columns] = 0
        return value

    if end == "input":
        handle = module.register_forward_pre_hook(lambda module, args: (changed(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda module, args, out: changed(out))
    try:
        return run()
    finally:
        handle.remove()


@torch.no_grad()
def test_head_is_taken_away_as_by_a_plain_hook(case: tuple[Family, LoadedModel]) -> None:
    family, loaded = case
    layer, (_, _, _, width) = max(widths_of(family).items())
    module = loaded.model.get_submodule(loaded.layout.taps[Site("z", layer)].module)
    ids, columns = torch.tensor([IDS, IDS[::-1]]), slice(2 * width, 3 * width)

    def run() -> Tensor:
        return loaded.model(ids, use_cache=False).logits  # type: ignore[no-any-return]

    expected = without_columns(module, "input", columns, run)
    with editing(loaded.model, Edit.scale(Site("z", layer), 0.0, heads=[2])):
        torch.testing.assert_close(run(), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, run(), atol=1e-4)
    vector = torch.randn(1, width)
    with editing(loaded.model, Edit.replace(Site("z", layer), vector, heads=[2])):
        run()
    with (
        pytest.raises(EditError, match=rf"expected \[{width}\] of 1 heads"),
        editing(loaded.model, Edit.replace(Site("z", layer), torch.randn(1, width + 1), heads=[2])),
    ):
        run()
    text = "The capital of France"
    reference = reference_z(loaded, [layer], [text])
    assert reference[layer].shape[1:] == (4, width)
    with Ablation(loaded, {layer: [2]}, "mean", reference).applied():
        run()


def built(name: str, tokenizer: Any) -> LoadedModel:
    family = FAMILIES[name]
    return LoadedModel(build(getattr(hf, family.config)(**family.sizes)), tokenizer, name)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "site", "path", "columns", "head"),
    [
        ("falcon 40b", "layer_1.k", "transformer.h.1.self_attention.query_key_value", slice(32 + 16, 32 + 24), 1),
        ("falcon 40b", "layer_1.q", "transformer.h.1.self_attention.query_key_value", slice(32 + 8, 32 + 16), 3),
        ("deepseek v3", "layer_0.q", "model.layers.0.self_attn.q_b_proj", slice(12, 24), 1),
        ("qwen 3 next", "layer_3.q", "model.layers.3.self_attn.q_proj", slice(16, 24), 1),
        ("olmo that clips", "layer_0.v", "model.layers.0.self_attn.v_proj", slice(8, 16), 1),
        (
            "gemma 4 whose keys are its values",
            "layer_0.v",
            "model.layers.0.self_attn.v_norm",
            (slice(1, 2), slice(None)),
            1,
        ),
    ],
)
def test_queries_keys_and_values_are_edited_where_attention_reads_them(
    name: str, site: str, path: str, columns: Any, head: int, tokenizer: Any
) -> None:
    loaded = built(name, tokenizer)
    columns = columns if isinstance(columns, tuple) else (columns,)
    module = loaded.model.get_submodule(path)

    def run() -> Tensor:
        return loaded.model(torch.tensor([IDS]), use_cache=False).logits  # type: ignore[no-any-return]

    def emptied(module: Any, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[(..., *columns)] = 0
        return out

    handle = module.register_forward_hook(emptied)
    expected = run()
    handle.remove()
    with editing(loaded.model, Edit.scale(site, 0.0, heads=[head])):
        torch.testing.assert_close(run(), expected, atol=1e-5, rtol=1e-5)
    if "qwen" not in name:  # whose state does not say how many tokens came before
        with editing(loaded.model, Edit.scale(site, 0.0, heads=[head], positions="prompt")):
            torch.testing.assert_close(run(), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, run(), atol=1e-4)


def test_keys_and_values_of_latents_are_not_edited(tokenizer: Any) -> None:
    loaded = built("deepseek v3", tokenizer)
    for kind in "kv":
        with (
            pytest.raises(EditError, match=rf"layer_1.{kind} cannot be edited .* latents, in every forward; edit z"),
            editing(loaded.model, Edit.scale(Site(kind, 1), 0.0)),
        ):
            pass


@torch.no_grad()
def test_values_that_are_weighed_by_the_pattern_are_z(case: tuple[Family, LoadedModel]) -> None:
    """At all tokens, by eager attention, which is another code than that of the other tests."""
    family, loaded = case
    if re.search("Falcon|MiMo|Recurrent|Qwen3Next", family.config):
        pytest.skip("its attention gives no weights, has a sink, or has layers without attention")
    before = loaded.model.config._attn_implementation
    check_patterns(loaded.model, loaded.layout)
    assert loaded.model.config._attn_implementation == before


@torch.no_grad()
def test_adapter_of_an_up_projection_is_in_keys_and_values(tokenizer: Any) -> None:
    """Also when it comes after the layout was found."""
    peft = pytest.importorskip("peft", reason="pip install 'AutomaticEval[peft]'")
    loaded = built("deepseek v2", tokenizer)
    model, layout = loaded.model, loaded.layout
    plain = read(model, layout, layout.pick([Site("v", 1)]), padded([IDS]))["layer_1.v"]
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["kv_b_proj"], init_lora_weights=False)).eval()
    seen: list[Tensor] = []
    up = model.model.layers[1].self_attn.kv_b_proj
    handle = up.register_forward_hook(lambda module, args, out: seen.append(out[0, 0]))
    adapted(torch.tensor([IDS]), use_cache=False)
    handle.remove()
    layout = find_layout(adapted)
    found = read(adapted, layout, layout.pick([Site("v", 1)]), padded([IDS]))["layer_1.v"]
    close(found, seen[0].view(6, 4, 14)[:, :, 8:].flatten(1))
    assert not torch.allclose(found, plain, atol=1e-3)


# Families that do not attend by one of torch's functions.

GPT_1 = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BY_HAND: dict[str, tuple[str, dict[str, Any], str, Callable[[Tensor], dict[str, Tensor]]]] = {
    # name: (config class, config, the module that is read, [pos, width] -> kind -> [pos, width])
    "codegen": (
        "CodeGenConfig",
        {**GPT_1, "n_head": 8, "rotary_dim": 4},
        "transformer.h.{}.attn.qkv_proj",
        lambda rows: {  # for each of four devices the queries, the values and the keys of two heads
            kind: rows.view(len(rows), 4, 3, 8)[:, :, number].flatten(1) for number, kind in enumerate("qvk")
        },
    ),
    "openai gpt": (
        "OpenAIGPTConfig",
        GPT_1,
        "transformer.h.{}.attn.c_attn",
        lambda rows: dict(zip("qkv", rows.split(32, 1), strict=True)),
    ),
    "jetmoe": (
        "JetMoeConfig",
        {**LLAMA, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        "model.layers.{}.self_attention.kv_proj",
        lambda rows: dict(zip("kv", rows.split(16, 1), strict=True)),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", list(BY_HAND))
def test_parts_of_one_projection_are_those_cut_by_hand(name: str, tokenizer: Any) -> None:
    config, sizes, path, cut = BY_HAND[name]
    loaded = LoadedModel(build(getattr(hf, config)(**sizes)), tokenizer, name)
    found: dict[int, Tensor] = {}
    prompts = [IDS, IDS[:2]]
    selection = Selection.parse(kinds_of(loaded.layout))
    for prompt, response in zip(prompts, respond(loaded, prompts, Sampling(max_new_tokens=3), selection), strict=True):
        handles = [
            loaded.model.get_submodule(path.format(layer)).register_forward_hook(
                lambda module, args, out, layer=layer: found.update({layer: out[0].clone()})
            )
            for layer in range(2)
        ]
        loaded.model(torch.tensor([[*prompt, *response.generated_ids[:-1]]]))
        for handle in handles:
            handle.remove()
        assert response.sample is not None
        kept = response.sample.activation_data("m", {})["activations"]
        for layer in range(2):
            for kind, right in cut(found[layer]).items():
                torch.testing.assert_close(kept[f"layer_{layer}.{kind}"], right, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_keys_and_values_of_codegen_are_in_the_cache(tokenizer: Any) -> None:
    """By-hand columns could be wrong twice. The cache holds the values, and the keys of the first token, which rotary leaves as they are."""
    config, sizes, _, _ = BY_HAND["codegen"]
    loaded = LoadedModel(build(getattr(hf, config)(**sizes)), tokenizer, "codegen")
    (response,) = respond(loaded, [IDS], Sampling(max_new_tokens=2), Selection.parse("k,v"))
    assert response.sample is not None
    kept = response.sample.activation_data("m", {})["activations"]
    cache = loaded.model(torch.tensor([IDS]), use_cache=True).past_key_values
    for layer in range(2):
        values, keys = (
            each[0].transpose(0, 1).flatten(1) for each in (cache.layers[layer].values, cache.layers[layer].keys)
        )
        torch.testing.assert_close(kept[f"layer_{layer}.v"][:6], values, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(kept[f"layer_{layer}.k"][0], keys[0], atol=1e-5, rtol=1e-5)


def test_values_are_told_by_what_the_first_two_tokens_read() -> None:
    """Planted: 4 heads, of which each two read one head of values."""
    torch.manual_seed(0)
    v = torch.randn(1, 6, 2, 8)
    pattern = torch.randn(4, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
    of_heads = v.repeat_interleave(2, 2)

    def z(weights: Tensor, values: Tensor = of_heads) -> Tensor:
        return torch.einsum("hqk,bkhd->bqhd", weights, values).flatten(2)

    flat, later = v.flatten(2), of_heads.clone()
    later[:, 1:] *= 2
    assert is_read(flat, z(pattern), 4)
    assert is_read(of_heads.flatten(2), z(pattern), 4)
    assert not is_read(flat, z(pattern, of_heads[:, :, [0, 2, 1, 3]]), 4)  # another order of heads
    assert not is_read(flat.flip(-1), z(pattern), 4)
    assert not is_read(flat, z(pattern * 0.9), 4)  # a sink
    assert not is_read(flat, z(pattern, later), 4)  # changed at all positions but the first
    assert not is_read(flat, z(pattern.roll(1, 1)), 4)  # a first token that reads others


# Why a site is missing.


def test_missing_heads_have_reasons_that_name_them(tokenizer: Any) -> None:
    layout = built("gemma 4", tokenizer).layout
    for kind in "kv":
        for layer, other in ((2, 0), (3, 1)):
            reason = f"its layer has no keys and values of its own, and uses those of layer {other}"
            assert layout.missing[Site(kind, layer)] == reason
    config, sizes, _, _ = BY_HAND["jetmoe"]
    layout = find_layout(build(getattr(hf, config)(**sizes)))
    for kind in ("q", "z", "head_result_norm"):
        (reason,) = layout.lacking(kind)
        assert reason.startswith("self_attention is a mixture of experts (experts, JetMoeMoA)")
    sizes = {**LLAMA, "num_local_experts": 4, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    layout = find_layout(build(hf.MiniMaxConfig(**sizes)))
    assert {site.layer for site in layout.missing if site.kind in "qkv"} == {0}
    assert re.search(
        r"^self_attn \(MiniMaxLightningAttention\) keeps no values in the cache", layout.missing[Site("v", 0)]
    )


def test_layer_with_another_number_of_heads_lacks_its_heads() -> None:
    """A head is named by one number in all layers."""
    model = build(hf.LlamaConfig(**{**LLAMA, "num_hidden_layers": 3}))
    model.config.per_layer_config = {1: {"num_attention_heads": 8}}
    layout = find_layout(model)
    assert layout.missing[Site("z", 1)] == layout.missing[Site("q", 1)] == "its layer has 8 heads, and most have 4"
    assert Site("z", 2) in layout.taps


def test_values_that_something_changes_are_refused() -> None:
    """Of latents, too: when what leads from the latent to the heads is not what the names say."""
    model = build(hf.DeepseekV3Config(**LATENT, **ROUTED))
    norm = model.model.layers[1].self_attn.kv_a_layernorm
    forward = norm.forward
    model.model.layers[1].self_attn.kv_a_layernorm.register_forward_hook(lambda module, args, out: out * 2)
    norm.forward = forward
    layout = find_layout(model)
    assert {site.layer for site in layout.missing if site.kind in "kv"} == {1}
    assert Site("v", 0) in layout.taps
    with pytest.raises(SiteUnavailable, match=r"layer_1\.v: "):
        layout.pick([Site("v", 1)])


# What files say.


@pytest.mark.parametrize("name", ["deepseek v3", "gemma 4 whose keys are its values", "mimo"])
def test_files_say_how_rows_are_cut_into_heads(name: str, tokenizer: Any, tmp_path: Path) -> None:
    loaded = built(name, tokenizer)
    file, kinds = tmp_path / "one.h5", kinds_of(loaded.layout)
    _, found = generate_inference_with_activations(
        "The capital of France", loaded.model, file, sites=kinds, tokenizer=tokenizer
    )
    settings = open_run(file).settings
    assert settings["shape"] == loaded.shape
    assert settings["heads"] == loaded.layout.unlike_most()
    del found["activations"]  # a name of TransformerLens is none for the norms of results
    whole = open_run(file)[0]
    whole["activations"] = {key: rows for key, rows in whole["activations"].items() if "norm" not in key}
    cache = as_activation_cache(whole)
    for layer, (n_kv, query, value, of_z) in widths_of(FAMILIES[name]).items():
        expected = {"q": (4, query), "k": (n_kv, query), "v": (n_kv, value), "z": (4, of_z)}
        for kind, shape in expected.items():
            rows = cache[f"blocks.{layer}.attn.hook_{kind}"]
            assert rows.shape[2:] == shape
            assert torch.equal(rows.flatten(2)[0], whole["activations"][f"layer_{layer}.{kind}"])
    again = recompute(file, loaded.model, tokenizer=tokenizer)
    assert not again.different, str(again)


def test_command_says_which_heads_are_unlike_the_others(tokenizer: Any) -> None:
    latent, mixed = (built(name, tokenizer).layout for name in ("deepseek v3", "gemma 4 whose keys are its values"))
    assert _other_heads(latent) == "v 4 of 6 in layers 0-1; z 4 of 6 in layers 0-1"
    assert set(_other_heads(mixed).split("; ")) == {
        f"{kind} {n} of 16 in layer 1" for kind, n in zip("qkvz", (4, 1, 1, 4), strict=True)
    }


def test_ordinary_files_say_nothing_more(tokenizer: Any) -> None:
    """Their settings are those of earlier versions, with which they are compared."""
    loaded = LoadedModel(build(hf.LlamaConfig(**LLAMA)), tokenizer, "llama")
    assert "heads" not in json.loads(json.dumps(dict(loaded.made_with().as_dict())))
