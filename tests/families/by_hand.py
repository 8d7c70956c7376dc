"""Where each site of each family is: written by hand from the source of transformers' models, and read with plain hooks of torch.

Nothing here uses the package. `configs.py` gives the models. A place is written as a path below the block: `mlp` is what the module gives, `<mlp` what it is
given, `mlp.gate[2]` the element 2 of a tuple that it gives, `a + b` a sum, `a | b` both side by side; "" is the block itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class At:
    """A place, and what is made of what is read there."""

    place: str
    scale: float = 1.0
    cut: Callable[[Tensor], Tensor] | None = None
    """[pos, width of the module] -> [pos, width of the site]."""
    experts: str | None = None
    """The module of all experts, which is run with one of a token's experts at a time. The place gives what it is given: rows, weights, ids."""


Places = Mapping[str, str | At]
"""Kind of site -> where a block has it."""


@dataclass(frozen=True)
class ByHand:
    """The places of one family."""

    layers: Places | Sequence[Places]
    """Of each block, or of all."""
    blocks: str = "model.layers"
    norm: str | None = "model.norm"
    """The last norm; None when there is none behind the blocks."""
    heads: int = 4
    """The number of query heads, each with its part of z."""
    stream: int | None = None
    """Which of several residual streams is meant, where what blocks are given and give is [streams, batch, pos, d_model]."""
    noise: float = 1e-5
    """How far two ways of computing the same may differ, as a part of the largest number."""
    like_transformers: str = ""
    """Why the passes of answers differ from one whole forward in transformers itself. Then transformers' own pass is the truth."""

    def of(self, layer: int) -> Places:
        """The places of one block, with its ends."""
        own = self.layers if isinstance(self.layers, Mapping) else self.layers[layer]
        return {"resid_pre": "<", "resid_post": "", **own} if own is not NOTHING else {}


NOTHING: Places = {}
"""A block that does not run over text."""


def thirds(part: int, width: int = 32) -> Callable[[Tensor], Tensor]:
    """All queries, then all keys, then all values."""
    return lambda rows: rows[:, part * width : (part + 1) * width]


def in_turn(part: int, n_heads: int = 4, d_head: int = 8) -> Callable[[Tensor], Tensor]:
    """Head after head, each with its query, its key and its value."""
    return lambda rows: rows.view(len(rows), n_heads, 3, d_head)[:, :, part].flatten(1)


def between(first: int, last: int) -> Callable[[Tensor], Tensor]:
    """Some columns."""
    return lambda rows: rows[:, first:last]


def grouped(first: int, last: int) -> Callable[[Tensor], Tensor]:
    """Falcon 40B: group after group, each with two queries, a key and a value."""
    return lambda rows: rows.view(len(rows), 2, 4, 8)[:, :, first:last].flatten(1)


def in_parts(part: int) -> Callable[[Tensor], Tensor]:
    """CodeGen: four parts for four devices, each with a query, a value and a key, in this order."""
    return lambda rows: rows.view(len(rows), 4, 3, 8)[:, :, part].flatten(1)


def half_of_heads(part: int, n_heads: int, *widths: int) -> Callable[[Tensor], Tensor]:
    """Head after head, each with several parts of these widths."""
    return lambda rows: rows.view(len(rows), n_heads, -1).split(widths, -1)[part].flatten(1)


def latent_keys(rows: Tensor) -> Tensor:
    """Latent attention: each head's own 8 numbers of the key, then the 4 that all heads share. rows: [pos, 4 * (8 + 6 or 8) + 16 + 4]."""
    own, shared = rows[:, :-20].view(len(rows), 4, -1)[:, :, :8], rows[:, -4:]
    return torch.cat([own, shared[:, None].expand(-1, 4, -1)], -1).flatten(1)


def top(n: int, then: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    """The experts with the highest logits; with `then`, their weights."""
    return lambda logits: logits.topk(n).indices if then is None else then(logits.topk(n).values)


# attention

SEPARATE: Places = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "z": "<self_attn.o_proj"}
PHI3: Places = {
    "q": At("self_attn.qkv_proj", cut=between(0, 32)),
    "k": At("self_attn.qkv_proj", cut=between(32, 48)),
    "v": At("self_attn.qkv_proj", cut=between(48, 64)),
    "z": "<self_attn.o_proj",
}
GATED: Places = {**SEPARATE, "q": At("self_attn.q_proj", cut=half_of_heads(0, 4, 16, 16))}
"""The query projection gives each head's query, and then its gate."""
OLMO_CLIPPED: dict[float, Places] = {
    limit: {
        **{
            kind: At(f"self_attn.{kind}_proj", cut=lambda rows, limit=limit: rows.clamp(-limit, limit))
            for kind in "qkv"
        },
        "z": "<self_attn.o_proj",
    }
    for limit in (0.4, 1.26)
}


def fused(path: str, out: str, rule: Callable[[int], Callable[[Tensor], Tensor]]) -> Places:
    """One projection of queries, keys and values."""
    return {**{kind: At(path, cut=rule(part)) for part, kind in enumerate("qkv")}, "z": f"<{out}"}


def latent(q: str, v: int = 6) -> Places:
    """Latent attention. q: the last projection of queries. v: the width of a head's values."""
    return {
        "q": f"self_attn.{q}",
        "k": At("self_attn.kv_b_proj | self_attn.kv_a_proj_with_mqa", cut=latent_keys),
        "v": At("self_attn.kv_b_proj", cut=half_of_heads(1, 4, 8, v)),
        "z": "<self_attn.o_proj",
    }


# what follows attention

ADDED: Places = {"attn_out": "self_attn", "mlp_out": "mlp"}
MID: Places = {"resid_mid": "<post_attention_layernorm"}
DOWN: Places = {"mlp_post": "<mlp.down_proj"}
GPT: Places = {"attn_out": "attn", "mlp_out": "mlp", "resid_mid": "<ln_2", "mlp_post": "<mlp.c_proj"}
NEOX: Places = {"attn_out": "attention", "mlp_out": "mlp", "mlp_post": "<mlp.dense_4h_to_h"}
BLOOM: Places = {
    **fused("self_attention.query_key_value", "self_attention.dense", in_turn),
    "mlp_post": "<mlp.dense_4h_to_h",
}
FALCON: Places = {"attn_out": "self_attention", "mlp_out": "mlp", "mlp_post": "<mlp.dense_4h_to_h"}
OPT: Places = {
    **SEPARATE,
    "z": "<self_attn.out_proj",
    "attn_out": "self_attn",
    "mlp_out": "fc2",
    "mlp_post": "<fc2",
}
LLAMA: Places = {**SEPARATE, **ADDED, **MID, **DOWN}
NORMED: Places = {
    **SEPARATE,
    **DOWN,
    "attn_out": "post_attention_layernorm",
    "mlp_out": "post_feedforward_layernorm",
    "resid_mid": "<mlp",
}
"""Norms behind each branch and none before (OLMo 2)."""
GEMMA2: Places = {**NORMED, "resid_mid": "<pre_feedforward_layernorm"}
PARALLEL: Places = {**SEPARATE, **ADDED, **DOWN}


def heaviest_first(part: int) -> Callable[[Tensor], Tensor]:
    """Two weights and the ids of the two experts, sorted. part: 0 for the weights, 1 for the ids."""

    def sorted_part(rows: Tensor) -> Tensor:
        weights, ids = rows[:, -4:-2], rows[:, -2:]
        order = weights.argsort(dim=-1, descending=True, stable=True)
        return (ids if part else weights).gather(1, order)

    return sorted_part


def experts(router: str = "mlp.gate", places: Places = LLAMA, all_experts: str | None = None) -> Places:
    """A block with a mixture of experts, whose router gives logits, weights and ids. all_experts: the module of the experts, beside the router by default."""
    beside = all_experts or f"{router.rpartition('.')[0]}.experts"
    chosen = f"{router}[1] | {router}[2]"
    own: Places = {
        "router_logits": f"{router}[0]",
        "expert_weights": At(chosen, cut=heaviest_first(0)),
        "expert_ids": At(chosen, cut=heaviest_first(1)),
        "expert_out": At(f"<{beside} | {chosen}", experts=beside),
    }
    return {**{kind: place for kind, place in places.items() if kind != "mlp_post"}, **own}


def normed(n_heads: int) -> Callable[[Tensor], Tensor]:
    """Head after head, each divided by its root mean square."""

    def divided(rows: Tensor) -> Tensor:
        heads = rows.view(len(rows), n_heads, -1)
        return (heads * (heads.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).flatten(1)

    return divided


def scaled(places: Places, **scales: float) -> Places:
    """Places whose values the block multiplies before it adds them."""
    return {kind: At(str(place), scales[kind]) if kind in scales else place for kind, place in places.items()}


def without(places: Places, *kinds: str) -> Places:
    """Places without some kinds of sites."""
    return {kind: place for kind, place in places.items() if kind not in kinds}


def mixer(path: str, places: Places = LLAMA) -> Places:
    """A block whose tokens are mixed by something other than attention."""
    return {**without(places, "attn_out", "q", "k", "v", "z"), "mixer_out": path}


def latent_moe(q: str = "q_b_proj", v: int = 6) -> list[Places]:
    """A dense block, and one with experts, both with latent attention."""
    dense = {**LLAMA, **latent(q, v)}
    return [dense, experts(places=dense)]


ROUTER = experts(places={})
DENSE_THEN_EXPERTS = [LLAMA, experts()]
GRANITE = {**experts("block_sparse_moe.router"), "mlp_out": "block_sparse_moe"}
SHARED = {**GRANITE, "mlp_out": "block_sparse_moe + shared_mlp"}
GATED_EXPERTS = experts(places={**LLAMA, **GATED})
LLAMA4_DENSE = {**LLAMA, "mlp_out": "feed_forward", "mlp_post": "<feed_forward.down_proj"}
LLAMA4_EXPERTS = {
    **without(LLAMA4_DENSE, "mlp_post"),
    "router_logits": "feed_forward.router[1]",
    "expert_ids": At("feed_forward.router[1]", cut=top(2, None)),
    "expert_weights": At("feed_forward.router[1]", cut=top(2, torch.sigmoid)),
}
LLAMA4 = [LLAMA4_DENSE, LLAMA4_EXPERTS] * 2
GEMMA3N = without(GEMMA2, "resid_mid")
MAMBA: Places = {"mixer_out": "mixer"}
ZAMBA_HYBRID = "shared_transf.self_attn"
JAMBA = {**LLAMA, "mlp_out": "feed_forward", "resid_mid": "<pre_ff_layernorm", "mlp_post": "<feed_forward.down_proj"}
LFM2 = {
    **SEPARATE,
    "z": "<self_attn.out_proj",
    "attn_out": "self_attn",
    "mlp_out": "feed_forward",
    "resid_mid": "<ffn_norm",
    "mlp_post": "<feed_forward.w2",
}
RECURRENT_GEMMA: Places = {
    **{kind: f"temporal_block.{kind}_proj" for kind in "qkv"},
    "z": "<temporal_block.o_proj",
    "attn_out": "temporal_block",
    "mlp_out": "mlp_block",
    "resid_mid": "<channel_pre_norm",
    "mlp_post": "<mlp_block.down_proj",
}
NEMOTRON_ATTENTION: Places = {
    **{kind: f"mixer.{kind}_proj" for kind in "qkv"},
    "z": "<mixer.o_proj",
    "attn_out": "mixer",
}
MINIMAX = without(experts(), "attn_out", "mlp_out", "resid_mid")
"""Blocks that go on with the normed stream: neither branch is added to what entered."""
GPT_NEO: Places = {
    **{kind: f"attn.attention.{kind}_proj" for kind in "qkv"},
    "z": "<attn.attention.out_proj",
    **GPT,
}
GPT_J: Places = {
    **{kind: f"attn.{kind}_proj" for kind in "qkv"},
    "z": "<attn.out_proj",
    "attn_out": "attn",
    "mlp_out": "mlp",
    "mlp_post": "<mlp.fc_out",
}
BERT: Places = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "z": "<attention.output.dense",
    "attn_out": "attention.output.dense",
    "mlp_out": "output.dense",
    "mlp_post": "<output.dense",
}
PADDING_ENTERS = "padding enters the state of transformers' model, so that each answer is computed without"
COUNTS_FROM_0 = "transformers' `generate` counts positions from 0, and a plain forward from 1"
CACHED_DIFFERS = "the steps with a cache differ from one whole forward in transformers"
GPT2 = ByHand({**fused("attn.c_attn", "attn.c_proj", thirds), **GPT}, "transformer.h", "transformer.ln_f")
GPT_NEO_PLACES = ByHand(GPT_NEO, "transformer.h", "transformer.ln_f")
TEXT = {"blocks": "model.language_model.layers", "norm": "model.language_model.norm"}


def same(names: str, places: ByHand) -> dict[str, ByHand]:
    """Families whose places are the same."""
    return dict.fromkeys(names.split(), places)


BY_HAND: dict[str, ByHand] = {
    "gpt2": GPT2,
    "gpt2-scale_by_layer": GPT2,
    "gpt-neo": GPT_NEO_PLACES,
    "gpt-neo-window": GPT_NEO_PLACES,
    "gpt-neox": ByHand(
        {**fused("attention.query_key_value", "attention.dense", in_turn), **NEOX},
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
    ),
    "gpt-neox-seq": ByHand(
        {**fused("attention.query_key_value", "attention.dense", in_turn), **NEOX, **MID},
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
    ),
    "gpt-j": ByHand(GPT_J, "transformer.h", "transformer.ln_f"),
    "opt": ByHand({**OPT, "resid_mid": "<final_layer_norm"}, "model.decoder.layers", "model.decoder.final_layer_norm"),
    "opt-350m": ByHand(OPT, "model.decoder.layers", None),
    "bloom": ByHand(
        # both modules are given the stream, and add it themselves, so that what they add is what their last projections give
        {**BLOOM, "attn_out": "self_attention.dense", "mlp_out": "mlp.dense_4h_to_h", **MID},
        "transformer.h",
        "transformer.ln_f",
    ),
    "bloom-postln": ByHand(BLOOM, "transformer.h", "transformer.ln_f"),
    "falcon-7b": ByHand(
        {
            **FALCON,
            "q": At("self_attention.query_key_value", cut=between(0, 32)),
            "k": At("self_attention.query_key_value", cut=between(32, 40)),
            "v": At("self_attention.query_key_value", cut=between(40, 48)),
            "z": "<self_attention.dense",
        },
        "transformer.h",
        "transformer.ln_f",
    ),
    **{
        name: ByHand(
            {
                **FALCON,
                "q": At("self_attention.query_key_value", cut=grouped(0, 2)),
                "k": At("self_attention.query_key_value", cut=grouped(2, 3)),
                "v": At("self_attention.query_key_value", cut=grouped(3, 4)),
                "z": "<self_attention.dense",
            },
            "transformer.h",
            "transformer.ln_f",
        )
        for name in ("falcon-40b", "falcon-11b")
    },
    "falcon-rw": ByHand(
        {**FALCON, **fused("self_attention.query_key_value", "self_attention.dense", in_turn), **MID},
        "transformer.h",
        "transformer.ln_f",
    ),
    "mpt": ByHand(
        {
            **fused("attn.Wqkv", "attn.out_proj", thirds),
            "attn_out": "attn",
            "mlp_out": "ffn.down_proj",
            "resid_mid": "<norm_2",
            "mlp_post": "<ffn.down_proj",
        },
        "transformer.blocks",
        "transformer.norm_f",
    ),
    **same(
        "llama llama-bias llama-yarn mistral mistral-window qwen2 qwen2-window qwen3 gemma smollm3 glm nemotron stablelm helium ernie4_5 "
        "seed-oss hunyuan arcee bitnet diffllama internlm3 ministral3 cwm doge",
        ByHand(LLAMA),
    ),
    "starcoder2": ByHand({**LLAMA, "mlp_post": "<mlp.c_proj"}),
    **same("qwen3-moe olmoe mixtral minimax-m2", ByHand(experts())),
    **same("qwen2-moe glm4-moe ernie4_5-moe dots1", ByHand(DENSE_THEN_EXPERTS)),
    **same(
        "llava-llama llava-equal-depth mistral3-vlm qwen2-vl qwen2-vl-equal-depth qwen2.5-vl qwen3-vl internvl",
        ByHand(LLAMA, **TEXT),
    ),
    **same("olmo2 olmo3 exaone4", ByHand(NORMED)),
    **same("gemma2 gemma3-text", ByHand(GEMMA2)),
    **same("gemma3-multimodal gemma3-multimodal-equal-depth", ByHand(GEMMA2, **TEXT)),
    **same("stablelm-parallel cohere cohere2", ByHand(PARALLEL)),
    **same("deepseek-v2 deepseek-v3 glm4-moe-lite", ByHand(latent_moe())),
    "deepseek-v32": ByHand(latent_moe(), like_transformers=CACHED_DIFFERS),
    "deepseek-v2-lite": ByHand(latent_moe("q_proj")),
    "deepseek-v3-v8": ByHand(latent_moe(v=8)),
    "deepseek-v4": ByHand({"q": "self_attn.q_b_proj", "router_logits": "mlp.gate[0]"}),
    "youtu": ByHand({**LLAMA, **latent("q_b_proj")}),
    "minicpm3": ByHand(scaled({**LLAMA, **latent("q_b_proj")}, attn_out=1.4 / sqrt(2), mlp_out=1.4 / sqrt(2))),
    "smolvlm": ByHand(LLAMA, "model.text_model.layers", "model.text_model.norm"),
    "paligemma": ByHand(
        LLAMA,
        **TEXT,
        like_transformers="the tokens of a prompt attend both ways in transformers, and those of an answer do not",
    ),
    "qwen3-next": ByHand([mixer("linear_attn", experts())] * 3 + [GATED_EXPERTS], noise=1e-4),
    "qwen3.5-text": ByHand([mixer("linear_attn")] * 3 + [{**LLAMA, **GATED}], noise=1e-4),
    "qwen3.5-moe-text": ByHand([mixer("linear_attn", experts())] * 3 + [GATED_EXPERTS], noise=1e-4),
    "gemma3n-text": ByHand(
        [{**GEMMA3N, "v": At("self_attn.v_proj", cut=normed(2))}] * 2 + [without(GEMMA3N, "k", "v")] * 2, stream=0
    ),
    "gemma4-text": ByHand(
        [{**GEMMA2, "v": At("self_attn.v_proj", cut=normed(2))}] * 2 + [without(GEMMA2, "k", "v")] * 2
    ),
    "phi": ByHand({**PARALLEL, "z": "<self_attn.dense", "mlp_post": "<mlp.fc2"}, norm="model.final_layernorm"),
    "phi3": ByHand({**LLAMA, **PHI3}),
    "phi3-longrope": ByHand({**LLAMA, **PHI3}),
    "phimoe": ByHand(experts("mlp.router")),
    "gpt-oss": ByHand(experts("mlp.router")),
    "mimo-v2-flash": ByHand([scaled(each, v=0.6) for each in DENSE_THEN_EXPERTS]),
    "olmo": ByHand({**LLAMA, **OLMO_CLIPPED[0.4]}),
    "olmo-clip-rare": ByHand({**LLAMA, **OLMO_CLIPPED[1.26]}),
    "granite": ByHand(scaled(LLAMA, attn_out=0.3, mlp_out=0.3)),
    "granitemoe": ByHand(scaled(GRANITE, attn_out=0.3, mlp_out=0.3)),
    "granitemoeshared": ByHand(scaled(SHARED, attn_out=0.3, mlp_out=0.3)),
    "granitemoehybrid": ByHand(
        [
            scaled(mixer("mamba", SHARED), mixer_out=0.3, mlp_out=0.3),
            scaled(SHARED, attn_out=0.3, mlp_out=0.3),
        ]
    ),
    "gptbigcode": ByHand(
        {
            **GPT,
            "q": At("attn.c_attn", cut=between(0, 32)),
            "k": At("attn.c_attn", cut=between(32, 40)),
            "v": At("attn.c_attn", cut=between(40, 48)),
            "z": "<attn.c_proj",
        },
        "transformer.h",
        "transformer.ln_f",
    ),
    "gptbigcode-mha": ByHand(
        {**fused("attn.c_attn", "attn.c_proj", in_turn), **GPT}, "transformer.h", "transformer.ln_f"
    ),
    "codegen": ByHand(
        {
            **without(GPT_J, "q", "k", "v"),
            "q": At("attn.qkv_proj", cut=in_parts(0)),
            "v": At("attn.qkv_proj", cut=in_parts(1)),
            "k": At("attn.qkv_proj", cut=in_parts(2)),
        },
        "transformer.h",
        "transformer.ln_f",
    ),
    "llama4-text": ByHand(LLAMA4),
    "llama4-multimodal": ByHand(LLAMA4, "language_model.model.layers", "language_model.model.norm"),
    "glm4": ByHand({**LLAMA, "attn_out": "post_self_attn_layernorm", "mlp_out": "post_mlp_layernorm"}),
    "mamba": ByHand(MAMBA, "backbone.layers", "backbone.norm_f"),
    "mamba2": ByHand(MAMBA, "backbone.layers", "backbone.norm_f"),
    "falcon-mamba": ByHand(MAMBA, "backbone.layers", "backbone.norm_f"),
    "jamba": ByHand(
        [mixer("mamba", JAMBA), JAMBA, mixer("mamba", experts("feed_forward.router", JAMBA)), JAMBA],
        norm="model.final_layernorm",
    ),
    "zamba": ByHand(
        [
            {"mixer_out": "mamba"},
            {
                **{kind: f"{ZAMBA_HYBRID}.{kind}_proj" for kind in "qkv"},
                "z": f"<{ZAMBA_HYBRID}.o_proj",
                "mixer_out": "mamba_decoder.mamba",
            },
        ]
        * 2,
        norm="model.final_layernorm",
    ),
    "zamba2": ByHand(
        [{"mixer_out": "mamba"}] * 2
        + [
            {
                **{kind: f"shared_transformer.self_attn.{kind}_proj" for kind in "qkv"},
                "z": "<shared_transformer.self_attn.o_proj",
                "mixer_out": "mamba_decoder.mamba",
            }
        ]
        + [{"mixer_out": "mamba"}],
        norm="model.final_layernorm",
        like_transformers=CACHED_DIFFERS,
    ),
    "bamba": ByHand([mixer("mamba", JAMBA), JAMBA], norm="model.final_layernorm"),
    "falcon-h1": ByHand(
        scaled({**JAMBA, "mixer_out": "mamba"}, attn_out=0.7, mixer_out=0.6), norm="model.final_layernorm"
    ),
    "nemotron-h": ByHand(
        [
            MAMBA,
            NEMOTRON_ATTENTION,
            {"mlp_out": "mixer", "mlp_post": "<mixer.down_proj"},
            experts("mixer.gate", {"mlp_out": "mixer"}),
        ],
        "model.layers",
        "model.norm_f",
        like_transformers=CACHED_DIFFERS,
    ),
    "lfm2": ByHand([mixer("conv", LFM2), LFM2], norm="model.embedding_norm"),
    "lfm2-moe": ByHand(
        [mixer("conv", LFM2), LFM2, mixer("conv", experts("feed_forward.gate", LFM2))], norm="model.embedding_norm"
    ),
    "recurrent-gemma": ByHand(
        [mixer("temporal_block", RECURRENT_GEMMA)] * 2 + [RECURRENT_GEMMA],
        norm="model.final_norm",
        like_transformers=PADDING_ENTERS,
    ),
    "rwkv": ByHand(
        {
            "mixer_out": "attention",
            "mlp_out": "feed_forward",
            "resid_mid": "<ln2",
            "mlp_post": "<feed_forward.value",
        },
        "rwkv.blocks",
        "rwkv.ln_out",
        like_transformers=PADDING_ENTERS,
    ),
    "openai-gpt": ByHand(
        {**without(GPT2.of(0), "resid_mid")},
        "transformer.h",
        None,
    ),
    "ctrl": ByHand(
        {
            **{kind: f"multi_head_attention.W{kind}" for kind in "qkv"},
            "z": "<multi_head_attention.dense",
            "attn_out": "multi_head_attention",
            "mlp_out": "ffn",
            "resid_mid": "<layernorm2",
            "mlp_post": "<ffn.2",
        },
        "transformer.h",
        "transformer.layernorm",
    ),
    "xglm": ByHand({**OPT, "resid_mid": "<final_layer_norm"}, "model.layers", "model.layer_norm"),
    "biogpt": ByHand({**OPT, "resid_mid": "<final_layer_norm"}, "biogpt.layers", "biogpt.layer_norm"),
    "persimmon": ByHand(
        {
            **fused("self_attn.query_key_value", "self_attn.dense", in_turn),
            **ADDED,
            **MID,
            "mlp_post": "<mlp.dense_4h_to_h",
        },
        norm="model.final_layernorm",
    ),
    "hunyuan-moe": ByHand(experts()),
    "apertus": ByHand({**LLAMA, "resid_mid": "<feedforward_layernorm"}),
    "jetmoe": ByHand(
        {
            "k": At("self_attention.kv_proj", cut=between(0, 16)),
            "v": At("self_attention.kv_proj", cut=between(16, 32)),
            "attn_out": "self_attention",
            "mlp_out": "mlp",
            **MID,
            "router_logits": "mlp.router[4]",
            "expert_ids": At("mlp.router[4]", cut=top(2, None)),
            "expert_weights": At("mlp.router[4]", cut=top(2, lambda values: values.softmax(-1))),
        }
    ),
    "minimax": ByHand(
        [{**without(MINIMAX, "q", "k", "v"), "z": "<self_attn.out_proj"}, MINIMAX] * 2,
        noise=1e-4,
        like_transformers=PADDING_ENTERS,
    ),
    "modernbert-decoder": ByHand(
        {
            **{kind: f"attn.{kind}_proj" for kind in "qkv"},
            "z": "<attn.Wo",
            "attn_out": "attn",
            "mlp_out": "mlp",
            "resid_mid": "<mlp_norm",
            "mlp_post": "<mlp.Wo",
        },
        norm="model.final_norm",
    ),
    "nanochat": ByHand({**LLAMA, "mlp_post": "<mlp.fc2"}),
    "vaultgemma": ByHand({**LLAMA, "resid_mid": "<pre_feedforward_layernorm"}),
    "olmo-hybrid": ByHand([mixer("linear_attn")] * 3 + [NORMED], noise=1e-4),
    "flex-olmo": ByHand(experts(places=NORMED)),
    "afmoe": ByHand(
        [
            {**GEMMA2, "resid_mid": "<pre_mlp_layernorm", "mlp_out": "post_mlp_layernorm"},
            experts("mlp.router", {**GEMMA2, "resid_mid": "<pre_mlp_layernorm", "mlp_out": "post_mlp_layernorm"}),
        ]
    ),
    "xlnet": ByHand({}, "transformer.layer", None),
    "bert-decoder": ByHand(BERT, "bert.encoder.layer", None),
    **same("axk1", ByHand(latent_moe())),
    "glm-moe-dsa": ByHand(latent_moe(), like_transformers=CACHED_DIFFERS),
    "bailing-hybrid": ByHand([mixer("self_attn"), experts(places={**LLAMA, **latent("q_proj")})], noise=1e-4),
    "kimi-linear": ByHand([mixer("self_attn"), experts(places={**LLAMA, **latent("q_proj")})], noise=1e-4),
    "cohere2-moe": ByHand(experts(places=PARALLEL)),
    **same("exaone-moe hy-v3 laguna", ByHand(DENSE_THEN_EXPERTS)),
    "gpt-neox-japanese": ByHand(
        # the last block adds a bias that attention gives beside its output
        [
            {**fused("attention.query_key_value", "attention.dense", in_turn), **NEOX, **MID},
            {**fused("attention.query_key_value", "attention.dense", in_turn), **without(NEOX, "attn_out"), **MID},
        ],
        "gpt_neox_japanese.layers",
        "gpt_neox_japanese.final_layer_norm",
    ),
    "granite-swa": ByHand(scaled(LLAMA, attn_out=0.3, mlp_out=0.3)),
    "granitemoe-swa": ByHand(scaled(GRANITE, attn_out=0.3, mlp_out=0.3)),
    "hyperclovax": ByHand(
        scaled({**LLAMA, "attn_out": "post_norm1", "mlp_out": "post_norm2"}, attn_out=0.3, mlp_out=0.3)
    ),
    "lfm3": ByHand(
        [
            mixer("post_operator_norm", {**LFM2, "mlp_out": "post_ffn_norm"}),
            {**LFM2, **SEPARATE, "attn_out": "post_operator_norm", "mlp_out": "post_ffn_norm"},
        ],
        norm="model.embedding_norm",
    ),
    **same("mellum minimax-m3-text solar-open", ByHand(experts())),
    **same("iquestcoder jais2 ministral flint", ByHand(LLAMA)),
    "aria-text": ByHand(experts("mlp.router")),
    "beam": ByHand(
        without(GEMMA2, "attn_out", "mlp_out", "resid_mid")
    ),  # the stream is scaled down before each addition
    # several streams side by side, to which weighted copies of what each part gives are added: no part's output is what is added
    "qwen4-exp-text": ByHand([ROUTER, {**GATED, **ROUTER}], norm=None, noise=1e-4),
    "roberta-decoder": ByHand(BERT, "roberta.encoder.layer", None, like_transformers=COUNTS_FROM_0),
    "mllama-text": ByHand([LLAMA, NOTHING, LLAMA]),
}


@dataclass
class Reading:
    """What hooks saw: each place's values, forward after forward."""

    values: dict[tuple[str, int], list[Tensor | None]] = field(default_factory=dict)
    """(place below the model, element) -> what was seen there in each forward; of several calls in a forward, the last."""
    n_forwards: int = 0
    n_fed: list[int] = field(default_factory=list)
    """The tokens that each forward is fed."""

    def rows(self, key: tuple[str, int], stream: int | None = None) -> Tensor:
        """[pos, width], of all forwards."""
        seen = zip(self.values[key], self.n_fed, strict=False)
        return torch.cat([_rows(value, n, stream) for value, n in seen if value is not None])

    def see(self, key: tuple[str, int], value: Any) -> None:
        """Keep what a hook is given."""
        element = key[1]
        if isinstance(value, tuple | list):
            value = value[max(element, 0)]
        seen = self.values.setdefault(key, [])
        seen += [None] * (self.n_forwards - len(seen))
        seen[-1] = value.detach().clone()


def placed(text: str, block: str) -> list[tuple[str, int]]:
    """The single places of a text: "<" and a path for an input, or a path for an output, with the number of an element or -1."""
    found = []
    for term in re.split(r"[+|]", text):
        match = re.fullmatch(r"(<?)([\w.]*)(?:\[(\d+)\])?", term.strip())
        assert match is not None, term
        end, path, element = match.groups()
        found.append((f"{end}{'.'.join(filter(None, (block, path)))}", int(element or -1)))
    return found


def sites_of(by_hand: ByHand, n_layers: int) -> dict[tuple[str, int | None], tuple[At, str]]:
    """(kind, layer) -> where the site is, and the path below which. Once-a-model kinds have no layer."""
    first = next((layer for layer in range(n_layers) if by_hand.of(layer)), 0)
    found: dict[tuple[str, int | None], tuple[At, str]] = {("embed", None): (At("<"), f"{by_hand.blocks}.{first}")}
    for layer in range(n_layers):
        for kind, at in by_hand.of(layer).items():
            found[kind, layer] = (at if isinstance(at, At) else At(at), f"{by_hand.blocks}.{layer}")
    if by_hand.norm is not None:
        found["final_norm", None] = (At(by_hand.norm), "")
    return found


def read(model: Any, by_hand: ByHand, n_layers: int, run: Callable[[], Any]) -> dict[tuple[str, int | None], Tensor]:
    """(kind, layer) -> [pos, width], of one row that `run` computes, in one forward or in several. Also the input of each output projection's module."""
    reading, sites = Reading(), sites_of(by_hand, n_layers)
    wanted = {each for at, block in sites.values() for each in placed(at.place, block)}
    # what the module behind z gives, for the sum of heads
    wanted |= {
        (place[1:], -1)
        for (kind, _), (at, block) in sites.items()
        if kind == "z"
        for place, _ in placed(at.place, block)
    }

    def before(key: tuple[str, int]) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            reading.see(key, args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None)))

        return hook

    def after(key: tuple[str, int]) -> Callable[..., None]:
        return lambda module, args, output: reading.see(key, output)

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        reading.n_forwards += 1
        reading.n_fed.append((args[0] if args else kwargs["input_ids"]).shape[1])

    logits: list[Tensor] = []
    with ExitStack() as stack, torch.no_grad():
        stack.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(lambda module, args, out: logits.append(out.logits[0])).remove)
        for key in wanted:
            module = model.get_submodule(key[0].lstrip("<"))
            if key[0].startswith("<"):
                stack.callback(module.register_forward_pre_hook(before(key), with_kwargs=True).remove)
            else:
                stack.callback(module.register_forward_hook(after(key)).remove)
        run()
    found = {}
    for site, (at, block) in sites.items():
        keys = placed(at.place, block)
        if any(key not in reading.values for key in keys):
            continue  # it does not run over text
        stream = by_hand.stream if site[0] in ("embed", "resid_pre", "resid_post") else None
        parts = [reading.rows(key, stream) for key in keys]
        value = torch.cat(parts, -1) if "|" in at.place else torch.stack(parts).sum(0)
        value = value if at.cut is None else at.cut(value)
        if at.experts is not None:
            value = one_by_one(model.get_submodule(f"{block}.{at.experts}"), value)
        found[site] = value * at.scale if at.scale != 1 else value
        if site[0] == "z":
            found["behind z", site[1]] = reading.rows((keys[0][0][1:], -1))
    found["logits", None] = torch.cat(logits)
    return found


def one_by_one(all_experts: Any, rows: Tensor) -> Tensor:
    """What each of a token's two experts adds, the heavier first. rows: what enters, their weights, their ids."""
    weights, ids = heaviest_first(0)(rows), heaviest_first(1)(rows).long()
    added = [all_experts(rows[:, :-4], ids[:, [place]], weights[:, [place]]) for place in range(2)]
    return torch.cat([each[0] if isinstance(each, tuple) else each for each in added], -1)


def _rows(value: Tensor, n: int, stream: int | None) -> Tensor:
    """[pos, width], of what a module was given or gave for one row of n tokens."""
    value = value if stream is None else value[stream]
    return value.reshape(-1, value.shape[-1])[-n:]  # a module that is given the whole cache gives the newest rows last


def zeroed(model: Any, place: At, block: str, columns: slice | None, run: Callable[[], Any]) -> Any:
    """What `run` gives while the values of a place, or some columns of them, are zero."""

    def without(value: Any) -> Any:
        if isinstance(value, tuple):
            return (without(value[0]), *value[1:])
        changed = value.clone()
        changed[..., slice(None) if columns is None else columns] = 0
        return changed

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (without(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": without(kwargs["hidden_states"])}

    with ExitStack() as stack, torch.no_grad():
        for path, _ in placed(place.place, block):
            module = model.get_submodule(path.lstrip("<"))
            if path.startswith("<"):
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            else:
                stack.callback(module.register_forward_hook(lambda module, args, output: without(output)).remove)
        return run()
