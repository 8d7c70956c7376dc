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

    out_projection: tuple[str, ...] = ("o_proj", "out_proj", "c_proj", "dense", "wo")
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

    q: tuple[str, ...] = ("q_proj",)
    """The projection of queries, within attention."""

    k: tuple[str, ...] = ("k_proj",)
    """The projection of keys, within attention."""

    v: tuple[str, ...] = ("v_proj",)
    """The projection of values, within attention."""

    qkv: tuple[str, ...] = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")
    """One projection of queries, keys and values, within attention."""

    router: tuple[str, ...] = ("gate", "router")
    """What chooses the experts of each token, anywhere within a block but not within attention."""

    experts: tuple[str, ...] = ("experts",)
    """All experts of a layer in one module, beside the router."""

    n_layers: tuple[str, ...] = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    """The number of blocks, in the config."""

    n_heads: tuple[str, ...] = ("num_attention_heads", "n_head", "n_heads")
    """The number of attention heads, in the config."""


KNOWN = Description()
"""The names that the families of transformers have."""
