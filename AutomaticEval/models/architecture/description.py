"""`Description`: what the parts of a model are called. Its defaults are all that is known of families."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Description:
    """Names of modules and of fields of configs, the likeliest first. Rules check what the names point at, so that a wrong name is never believed."""

    attention: tuple[str, ...] = ("self_attn", "attn", "attention", "self_attention", "temporal_block")
    """Attention, among the children of a block."""

    mlp: tuple[str, ...] = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
    """The MLP or the mixture of experts, among the children of a block."""

    out_projection: tuple[str, ...] = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo")
    """Attention's output projection, anywhere within attention."""

    down_projection: tuple[str, ...] = ("down_proj", "c_proj", "dense_4h_to_h", "fc_out", "fc2", "w2")
    """The MLP's last projection, anywhere within the MLP."""

    post_attention_norm: tuple[str, ...] = (
        "post_attention_layernorm",
        "post_self_attn_layernorm",
        "post_attention_norm",
    )
    """The norm of what attention adds, among the children of a block."""

    post_mlp_norm: tuple[str, ...] = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_feedforward_norm")
    """The norm of what the MLP adds, among the children of a block."""

    final_norm: tuple[str, ...] = (
        "norm",
        "ln_f",
        "final_layer_norm",
        "final_layernorm",
        "norm_f",
        "layer_norm",
        "final_norm",
        "ln_out",
    )
    """The norm behind the last block, beside the list of blocks."""

    q: tuple[str, ...] = ("q_proj", "q_b_proj")
    """The projection of queries, within attention."""

    k: tuple[str, ...] = ("k_proj",)
    """The projection of keys, within attention."""

    v: tuple[str, ...] = ("v_proj",)
    """The projection of values, within attention."""

    qkv: tuple[str, ...] = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")
    """One projection of queries, keys and values, within attention."""

    kv: tuple[str, ...] = ("kv_proj",)
    """One projection of keys and values, within attention."""

    q_norm: tuple[str, ...] = ("q_norm", "q_layernorm")
    """The norm of each head's query, within attention."""

    v_norm: tuple[str, ...] = ("v_norm",)
    """The norm of each head's value, within attention."""

    latent: tuple[str, ...] = ("kv_a_proj_with_mqa",)
    """The projection to what keys and values are computed of, and to the rotated part of keys, within attention."""

    latent_norm: tuple[str, ...] = ("kv_a_layernorm",)
    """The norm of that latent, within attention."""

    up_projection: tuple[str, ...] = ("kv_b_proj",)
    """The projection of that latent to keys and values of heads, within attention."""

    d_head: tuple[str, ...] = ("head_dim",)
    """The width of a head, in the config."""

    d_value: tuple[str, ...] = ("v_head_dim",)
    """The width of a head's value, in the config, where it is another one."""

    value_scale: tuple[str, ...] = ("attention_value_scale",)
    """What values are multiplied by, in the config."""

    clip: tuple[str, ...] = ("clip_qkv", "attn_config.clip_qkv")
    """The size to which queries, keys and values are clipped, in the config."""

    n_layers: tuple[str, ...] = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    """The number of blocks, in the config."""

    n_heads: tuple[str, ...] = ("num_attention_heads", "n_head", "n_heads")
    """The number of attention heads, in the config."""


KNOWN = Description()
"""The names that the families of transformers have."""
