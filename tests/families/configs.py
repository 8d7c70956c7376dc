"""A tiny configuration of each decoder family: a line here is a row of `docs/families.md`.

Each has 2 to 4 layers, one at least of every kind that the family has, and weights that are drawn at random.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import transformers
from helpers.models import LONG_ROPE
from transformers import AutoConfig, GenerationConfig

BASE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GQA = {**BASE, "num_key_value_heads": 2}
WIDE = {**GQA, "head_dim": 16}
"""Heads that are wider than d_model / n_heads."""
FOUR = {**GQA, "num_hidden_layers": 4}
THREE = {**GQA, "num_hidden_layers": 3}
OLD: dict[str, Any] = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
NARROW_V = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
LATENT = {**BASE, "num_key_value_heads": 4, **NARROW_V}
"""Latent attention, whose heads have values of another width than their queries and keys."""
WINDOWS = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
QWEN3_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 8,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
LONGROPE = {**LONG_ROPE, "original_max_position_embeddings": 64}
INDEX = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 6}
"""Attention to the tokens that an indexer chooses, fewer than the tests feed."""
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}


class Family(NamedTuple):
    """One row of the table."""

    model_type: str
    """As transformers names it."""
    settings: Mapping[str, Any]
    """Of its config."""
    model_class: str = "AutoModelForCausalLM"
    """The class of transformers that makes the model of a config."""


def vlm(model_type: str, text: Mapping[str, Any], vision: Mapping[str, Any], **more: Any) -> Family:
    """A family of images and text."""
    return Family(
        model_type, {"text_config": dict(text), "vision_config": dict(vision), **more}, "AutoModelForImageTextToText"
    )


def llava(n_layers: int) -> Family:
    """Llava around Llama. n_layers: of the vision part."""
    vision = {**VISION, "model_type": "clip_vision_model", "num_hidden_layers": n_layers, "projection_dim": 16}
    return vlm("llava", {"model_type": "llama", **GQA}, vision, image_token_index=399)


def qwen2_vl(n_layers: int) -> Family:
    """Qwen2-VL. n_layers: of the vision part."""
    return vlm("qwen2_vl", {**GQA, "rope_parameters": MROPE}, {**QWEN_VISION, "depth": n_layers})


def gemma3(n_layers: int) -> Family:
    """Gemma 3 with images. n_layers: of the vision part."""
    return vlm("gemma3", {**WIDE, **WINDOWS}, {**VISION, "num_hidden_layers": n_layers}, mm_tokens_per_image=4)


FAMILIES: dict[str, Family] = {
    "gpt2": Family("gpt2", OLD),
    "gpt2-scale_by_layer": Family(
        "gpt2", {**OLD, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}
    ),
    "gpt-neo": Family(
        "gpt_neo", {**BASE, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 64}
    ),
    "gpt-neo-window": Family(
        "gpt_neo", {**BASE, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8}
    ),
    "gpt-neox": Family("gpt_neox", BASE),
    "gpt-neox-seq": Family("gpt_neox", {**BASE, "use_parallel_residual": False}),
    "gpt-j": Family("gptj", {**OLD, "rotary_dim": 4}),
    "opt": Family("opt", {**BASE, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "opt-350m": Family("opt", {**BASE, "ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": Family("bloom", {"vocab_size": 400, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "bloom-postln": Family(
        "bloom",
        {
            "vocab_size": 400,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "apply_residual_connection_post_layernorm": True,
        },
    ),
    "falcon-7b": Family("falcon", {**BASE, "multi_query": True, "parallel_attn": True}),
    "falcon-40b": Family("falcon", {**BASE, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": Family(
        "falcon", {**BASE, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}
    ),
    "falcon-rw": Family("falcon", {**BASE, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "mpt": Family(
        "mpt", {"vocab_size": 400, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "expansion_ratio": 2}
    ),
    "llama": Family("llama", GQA),
    "llama-bias": Family("llama", {**GQA, "attention_bias": True, "mlp_bias": True}),
    "llama-yarn": Family("llama", {**GQA, "rope_parameters": YARN}),
    "mistral": Family("mistral", {**GQA, "sliding_window": None}),
    "mistral-window": Family("mistral", {**GQA, "sliding_window": 8}),
    "mixtral": Family("mixtral", {**GQA, **LOCAL}),
    "qwen2": Family("qwen2", GQA),
    "qwen2-window": Family("qwen2", {**GQA, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen2-moe": Family("qwen2_moe", {**GQA, **EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]}),
    "qwen3": Family("qwen3", WIDE),
    "qwen3-moe": Family("qwen3_moe", {**WIDE, **EXPERTS}),
    "qwen3-next": Family(
        "qwen3_next", {**WIDE, "num_hidden_layers": 4, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 24}
    ),
    "qwen3.5-text": Family("qwen3_5_text", {**WIDE, "num_hidden_layers": 4, **LINEAR}),
    "qwen3.5-moe-text": Family(
        "qwen3_5_moe_text", {**WIDE, "num_hidden_layers": 4, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 24}
    ),
    "gemma": Family("gemma", WIDE),
    "gemma2": Family("gemma2", {**WIDE, **WINDOWS}),
    "gemma3-text": Family("gemma3_text", {**WIDE, **WINDOWS}),
    "gemma3-multimodal": gemma3(1),
    "gemma3-multimodal-equal-depth": gemma3(2),
    "gemma3n-text": Family(
        "gemma3n_text",
        {
            **WIDE,
            "num_hidden_layers": 4,
            "intermediate_size": [64] * 4,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "sliding_window": 64,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 400,
            "laurel_rank": 4,
        },
    ),
    "gemma4-text": Family(
        "gemma4_text",
        {
            **WIDE,
            "num_hidden_layers": 4,
            "global_head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "sliding_window": 64,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 400,
        },
    ),
    "phi": Family("phi", BASE),
    "phi3": Family("phi3", GQA),
    "phi3-longrope": Family("phi3", {**GQA, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    "phimoe": Family("phimoe", {**GQA, **LOCAL}),
    "olmo": Family("olmo", {**GQA, "clip_qkv": 0.4}),
    "olmo-clip-rare": Family("olmo", {**THREE, "clip_qkv": 1.26}),
    "olmo2": Family("olmo2", GQA),
    "olmo3": Family("olmo3", {**GQA, **WINDOWS}),
    "olmoe": Family("olmoe", {**GQA, **EXPERTS}),
    "granite": Family(
        "granite", {**GQA, "residual_multiplier": 0.3, "attention_multiplier": 0.2, "logits_scaling": 2.0}
    ),
    "granitemoe": Family("granitemoe", {**GQA, **LOCAL, "residual_multiplier": 0.3}),
    "granitemoeshared": Family(
        "granitemoeshared", {**GQA, **LOCAL, "shared_intermediate_size": 24, "residual_multiplier": 0.3}
    ),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        {
            **GQA,
            **LOCAL,
            "shared_intermediate_size": 24,
            "residual_multiplier": 0.3,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
    ),
    "stablelm": Family("stablelm", GQA),
    "stablelm-parallel": Family("stablelm", {**GQA, "use_parallel_residual": True, "qk_layernorm": True}),
    "cohere": Family("cohere", GQA),
    "cohere2": Family("cohere2", {**GQA, **WINDOWS}),
    "starcoder2": Family("starcoder2", {**GQA, "use_bias": True}),
    "gptbigcode": Family("gpt_bigcode", {**OLD, "multi_query": True}),
    "gptbigcode-mha": Family("gpt_bigcode", {**OLD, "multi_query": False}),
    "codegen": Family("codegen", {**OLD, "rotary_dim": 4}),
    "smollm3": Family("smollm3", {**GQA, "no_rope_layers": [1, 0]}),
    "deepseek-v2": Family("deepseek_v2", {**LATENT, **ROUTED, "topk_method": "group_limited_greedy"}),
    "deepseek-v2-lite": Family("deepseek_v2", {**LATENT, **ROUTED, "q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek-v3": Family("deepseek_v3", {**LATENT, **ROUTED}),
    "deepseek-v3-v8": Family("deepseek_v3", {**LATENT, **ROUTED, "v_head_dim": 8}),
    "deepseek-v32": Family("deepseek_v32", {**LATENT, **ROUTED, **INDEX}),
    "deepseek-v4": Family(
        "deepseek_v4", {**THREE, "head_dim": 16, **ROUTED, "q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2}
    ),
    "gpt-oss": Family("gpt_oss", {**WIDE, **LOCAL, **WINDOWS}),
    "llama4-text": Family(
        "llama4_text",
        {
            **FOUR,
            **LOCAL,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 64,
            "head_dim": 8,
        },
    ),
    "llama4-multimodal": vlm(
        "llama4",
        {
            **FOUR,
            **LOCAL,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 64,
            "head_dim": 8,
        },
        {**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    ),
    "glm": Family("glm", WIDE),
    "glm4": Family("glm4", WIDE),
    "glm4-moe": Family("glm4_moe", {**WIDE, **ROUTED}),
    "glm4-moe-lite": Family("glm4_moe_lite", {**LATENT, **ROUTED}),
    "nemotron": Family("nemotron", GQA),
    "minicpm3": Family("minicpm3", {**LATENT, "scale_depth": 1.4, "scale_emb": 2, "dim_model_base": 16}),
    "mamba": Family("mamba", {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": Family(
        "mamba2",
        {
            "vocab_size": 400,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
        },
    ),
    "falcon-mamba": Family(
        "falcon_mamba", {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    ),
    "jamba": Family(
        "jamba",
        {
            **FOUR,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 4,
            "expert_layer_offset": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "zamba": Family(
        "zamba",
        {
            **FOUR,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "n_mamba_heads": 2,
            "num_key_value_heads": 4,
            "attention_head_dim": 16,
        },
    ),
    "zamba2": Family(
        "zamba2",
        {
            **FOUR,
            "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"],
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "num_key_value_heads": 4,
            "attention_head_dim": 16,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
        },
    ),
    "bamba": Family(
        "bamba",
        {
            **GQA,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
    ),
    "falcon-h1": Family(
        "falcon_h1",
        {
            **GQA,
            "head_dim": 8,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "attention_out_multiplier": 0.7,
            "ssm_out_multiplier": 0.6,
            "mlp_multipliers": [0.9, 0.8],
            "key_multiplier": 0.5,
        },
    ),
    "nemotron-h": Family(
        "nemotron_h",
        {
            **WIDE,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "attention", "mlp", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
            "num_experts_per_tok": 2,
        },
    ),
    "lfm2": Family("lfm2", {**GQA, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "lfm2-moe": Family(
        "lfm2_moe",
        {
            **GQA,
            **EXPERTS,
            "layer_types": ["conv", "full_attention", "conv"],
            "num_hidden_layers": 3,
            "num_dense_layers": 2,
        },
    ),
    "recurrent-gemma": Family(
        "recurrent_gemma",
        {**THREE, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 64, "head_dim": 8},
    ),
    "rwkv": Family("rwkv", {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 128}),
    "t5": Family(
        "t5",
        {"vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        "AutoModelForSeq2SeqLM",
    ),
    "bart": Family(
        "bart",
        {"vocab_size": 400, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 128},
        "AutoModelForSeq2SeqLM",
    ),
    "llava-llama": llava(1),
    "llava-equal-depth": llava(2),
    "mistral3-vlm": vlm(
        "mistral3", {"model_type": "mistral", **GQA}, {**VISION, "model_type": "pixtral", "head_dim": 8}
    ),
    "qwen2-vl": qwen2_vl(1),
    "qwen2-vl-equal-depth": qwen2_vl(2),
    "qwen2.5-vl": vlm(
        "qwen2_5_vl",
        {**GQA, "rope_parameters": MROPE},
        {
            **QWEN_VISION,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 32,
            "fullatt_block_indexes": [0],
        },
    ),
    "qwen3-vl": vlm("qwen3_vl", {**GQA, "head_dim": 8, "rope_parameters": MROPE}, QWEN3_VISION),
    "paligemma": vlm(
        "paligemma", {"model_type": "gemma", **WIDE}, {**VISION, "model_type": "siglip_vision_model"}, projection_dim=32
    ),
    "smolvlm": vlm("smolvlm", {"model_type": "llama", **GQA}, VISION),
    "internvl": vlm(
        "internvl", {"model_type": "qwen2", **GQA}, {**VISION, "image_size": [16, 16], "patch_size": [8, 8]}
    ),
    "openai-gpt": Family("openai-gpt", {**OLD}),
    "ctrl": Family("ctrl", {**OLD, "dff": 64}),
    "xglm": Family(
        "xglm",
        {
            "vocab_size": 400,
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "biogpt": Family("biogpt", BASE),
    "persimmon": Family("persimmon", BASE),
    "exaone4": Family("exaone4", {**GQA, **WINDOWS}),
    "helium": Family("helium", {**GQA, "head_dim": 8}),
    "ernie4_5": Family("ernie4_5", {**GQA, "head_dim": 8}),
    "ernie4_5-moe": Family(
        "ernie4_5_moe",
        {**GQA, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    ),
    "seed-oss": Family("seed_oss", WIDE),
    "hunyuan": Family("hunyuan_v1_dense", WIDE),
    "hunyuan-moe": Family("hunyuan_v1_moe", {**WIDE, "num_experts": 4, "moe_topk": 2}),
    "apertus": Family("apertus", GQA),
    "arcee": Family("arcee", GQA),
    "bitnet": Family("bitnet", GQA),
    "diffllama": Family("diffllama", GQA),
    "jetmoe": Family("jetmoe", {**GQA, "kv_channels": 8, **LOCAL, "num_key_value_heads": 2}),
    "minimax": Family(
        "minimax", {**FOUR, **LOCAL, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2}
    ),
    "minimax-m2": Family("minimax_m2", {**WIDE, **LOCAL}),
    "modernbert-decoder": Family(
        "modernbert-decoder",
        {**THREE, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "local_attention": 64},
    ),
    "nanochat": Family("nanochat", GQA),
    "vaultgemma": Family("vaultgemma", {**WIDE, **WINDOWS}),
    "doge": Family("doge", GQA),
    "internlm3": Family("internlm3", {**GQA, "head_dim": 8}),
    "ministral3": Family("ministral3", {**GQA, "head_dim": 8}),
    "olmo-hybrid": Family("olmo_hybrid", {**FOUR, **LINEAR}),
    "dots1": Family("dots1", {**WIDE, **ROUTED}),
    "flex-olmo": Family("flex_olmo", {**GQA, **EXPERTS}),
    "cwm": Family("cwm", {**GQA, "head_dim": 8, **WINDOWS}),
    "afmoe": Family(
        "afmoe", {**WIDE, **EXPERTS, "num_dense_layers": 1, "global_attn_every_n_layers": 2, "sliding_window": 64}
    ),
    "xlnet": Family("xlnet", {"vocab_size": 400, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    "bert-decoder": Family("bert", {**BASE, "is_decoder": True}),
    "mllama-text": Family("mllama_text_model", {**THREE, "cross_attention_layers": [1]}, "MllamaForCausalLM"),
    "youtu": Family("youtu", LATENT),
    "mimo-v2-flash": Family(
        "mimo_v2_flash",
        {**WIDE, **ROUTED, "v_head_dim": 8, "hybrid_layer_pattern": [0, 1], "attention_value_scale": 0.6, **WINDOWS},
    ),
    "axk1": Family("axk1", {**LATENT, **ROUTED}),
    "glm-moe-dsa": Family("glm_moe_dsa", {**LATENT, **ROUTED, **INDEX}),
    "bailing-hybrid": Family(
        "bailing_hybrid",
        {**LATENT, **ROUTED, **LOCAL, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "kimi-linear": Family(
        "kimi_linear",
        {
            **LATENT,
            **ROUTED,
            **LOCAL,
            "q_lora_rank": None,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "cohere2-moe": Family("cohere2_moe", {**WIDE, **WINDOWS, **EXPERTS}),
    "exaone-moe": Family("exaone_moe", {**WIDE, **WINDOWS, **EXPERTS}),
    "gpt-neox-japanese": Family("gpt_neox_japanese", {**BASE, "intermediate_multiple_size": 2}),
    "granite-swa": Family("granite_swa", {**GQA, **WINDOWS, "residual_multiplier": 0.3}),
    "granitemoe-swa": Family("granitemoe_swa", {**GQA, **LOCAL, **WINDOWS, "residual_multiplier": 0.3}),
    "hy-v3": Family("hy_v3", {**WIDE, **EXPERTS}),
    "hyperclovax": Family("hyperclovax", {**GQA, "residual_multiplier": 0.3}),
    "iquestcoder": Family("iquestcoder", GQA),
    "jais2": Family("jais2", GQA),
    "laguna": Family(
        "laguna",
        {**WIDE, **EXPERTS, "shared_expert_intermediate_size": 24, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "lfm3": Family("lfm3", {**GQA, "head_dim": 8, "layer_types": ["conv", "full_attention"]}),
    "mellum": Family("mellum", {**WIDE, **EXPERTS}),
    "minimax-m3-text": Family(
        "minimax_m3_vl_text", {**WIDE, **LOCAL, "shared_intermediate_size": 24, "dense_intermediate_size": 48}
    ),
    "ministral": Family("ministral", {**GQA, **WINDOWS, "head_dim": 8}),
    "solar-open": Family("solar_open", {**WIDE, **ROUTED}),
    "aria-text": Family("aria_text", {**GQA, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "flint": Family("flint", {**WIDE, **WINDOWS}),
    "beam": Family("beam", {**WIDE, **WINDOWS}),
    "roberta-decoder": Family("roberta", {**BASE, "is_decoder": True}),
    "qwen4-exp-text": Family(
        "qwen4_exp_text",
        {
            **WIDE,
            **EXPERTS,
            **LINEAR,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 24,
            "hc_count": 2,
            "hc_lowrank": 8,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        },
    ),
}


def build(family: Family) -> Any:
    """A random model. Its weights are scaled up so that layers differ, and its norms and biases are not 1 and 0."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.model_type, **family.settings)
    for each in (config, config.get_text_config()):
        each.bos_token_id = each.eos_token_id = each.pad_token_id = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_class = getattr(transformers, family.model_class)
        model = (of_class.from_config if hasattr(of_class, "from_config") else of_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("layer_scalar", "bias")) and buffer.is_floating_point():  # learned, though no parameters
                buffer.add_(torch.randn_like(buffer) * 0.1)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model
