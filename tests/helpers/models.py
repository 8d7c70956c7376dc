"""Small random models of many families, built from their configs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MiniMaxConfig,
    MixtralConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
    RobertaConfig,
    RwkvConfig,
)

VOCABULARY = 400
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Sizes for configs that use the field names of Llama's config."""
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    ),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128),
    "gpt_neox": lambda: GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        intermediate_size=64,
        attention_types=[[["global", "local"], 2]],
        window_size=128,
        max_position_embeddings=128,
    ),
}
FAMILIES: dict[str, Callable[[], Any]] = {
    **CONFIGS,
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=16),  # norms after each branch; d_head is not d_model / n_heads
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "granite": lambda: GraniteConfig(**SIZES, residual_multiplier=0.3, attention_multiplier=0.2),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "phi": lambda: PhiConfig(**SIZES),
    "opt": lambda: OPTConfig(
        vocab_size=400, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4
    ),
}
"""CONFIGS, and families with other norms, multipliers, experts and kinds of attention."""
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 24,
}
LONG = {"max_position_embeddings": 256, "rope_parameters": LONG_ROPE}
OTHERS: dict[str, Callable[[], Any]] = {
    "phi3-longrope": lambda: Phi3Config(**SIZES, original_max_position_embeddings=24, **LONG),
    "llama-longrope": lambda: LlamaConfig(**SIZES, **LONG),
    "rwkv": lambda: RwkvConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, context_length=128),
    "recurrent-gemma": lambda: RecurrentGemmaConfig(
        **{**SIZES, "num_hidden_layers": 3}, lru_width=32, attention_window_size=128, head_dim=8
    ),
    "minimax": lambda: MiniMaxConfig(
        **SIZES, num_local_experts=4, head_dim=8, layer_types=["linear_attention", "full_attention"]
    ),
    "mamba": lambda: MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=8),
    "gpt-1": lambda: OpenAIGPTConfig(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=200),
    "roberta": lambda: RobertaConfig(
        **{**SIZES, "num_key_value_heads": None}, is_decoder=True, max_position_embeddings=200
    ),
}
"""Models whose numbers change with padding, longer rows or given positions, unless they are handled apart."""
ALL = {**FAMILIES, **OTHERS}


def build(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A random model. Its weights are scaled up, so that layers differ and greedy text does not repeat one token."""
    torch.manual_seed(0)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.to(dtype)


def save_with_code(folder: Path, tokenizer: Any, factor: float = 1.0) -> None:
    """Write a model folder with its own code: a Llama whose class multiplies the logits by `factor`."""
    build(CONFIGS["llama"]()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n"
        "    config_class = OwnConfig\n"
        "    def forward(self, *args, **kwargs):\n"
        "        out = super().forward(*args, **kwargs)\n"
        f"        out.logits = out.logits * {factor}\n"
        "        return out\n"
    )
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": names}))
