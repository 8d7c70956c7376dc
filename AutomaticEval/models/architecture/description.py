"""`Description`: what the parts of a model are called. Its defaults are all that is known of families."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Description:
    """Names of modules and of fields of configs, the likeliest first. Rules check what the names point at, so that a wrong name is never believed."""

    attention: tuple[str, ...] = (
        "self_attn",
        "attn",
        "attention",
        "self_attention",
        "temporal_block",
        "multi_head_attention",
    )
    """Attention, among the children of a block."""

    mixer: tuple[str, ...] = ("mamba", "linear_attn", "conv", "short_conv", "mamba_decoder.mamba", "mlstm_layer")
    """What mixes tokens and is no attention, below a block."""

    beside: tuple[str, ...] = ("shared_transf", "shared_transformer")
    """Attention and MLP of a block which change what its mixer is given, and not the stream."""

    any_mixer: tuple[str, ...] = ("mixer",)
    """The one part of a block that may be attention, another mixer or an MLP, as the config's types of layers say."""

    mixer_classes: tuple[str, ...] = ("mamba", "rwkv", "deltanet", "deltaattention", "recurrentblock", "shortconv")
    """Parts of the names of classes that are no attention, whatever they are called in the block. In lower case."""

    layer_types: tuple[str, ...] = ("layer_types", "layers_block_type")
    """The type of each layer, in the config."""

    mixer_types: tuple[str, ...] = ("linear_attention", "mamba", "mamba2", "conv", "recurrent")
    """Types of layers whose tokens are not mixed by attention."""

    mlp_types: tuple[str, ...] = ("mlp", "moe")
    """Types of layers whose tokens are not mixed."""

    mlp: tuple[str, ...] = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "mlp_block", "shared_mlp")
    """The MLP or the mixture of experts, among the children of a block."""

    scale: tuple[str, ...] = ("residual_multiplier", "residual_scale")
    """What a block multiplies everything by that it adds, as a number of the block or of the config."""

    depth_scale: tuple[str, ...] = ("scale_depth",)
    """The same in the config, before it is divided by the square root of the number of layers."""

    attention_scale: tuple[str, ...] = ("attn_out_multiplier", "attention_out_multiplier")
    """What a block multiplies by that attention adds, as a number of the block or of the config."""

    mixer_scale: tuple[str, ...] = ("ssm_out_multiplier",)
    """The same for what mixes tokens and is no attention."""

    rescaling: tuple[str, ...] = ("rescale_every",)
    """Behind how many blocks the stream is multiplied by a number, in the config."""

    active_stream: tuple[str, ...] = ("altup_active_idx",)
    """Which of several residual streams the blocks work on, in the config."""

    out_projection: tuple[str, ...] = ("o_proj", "out_proj", "c_proj", "dense", "wo")
    """Attention's output projection, anywhere within attention."""

    down_projection: tuple[str, ...] = (
        "down_proj",
        "c_proj",
        "dense_4h_to_h",
        "fc_out",
        "fc2",
        "w2",
        "Wo",
        "output_linear",
        "proj_down",
    )
    """The MLP's last projection, anywhere within the MLP."""

    post_attention_norm: tuple[str, ...] = (
        "post_attention_layernorm",
        "post_self_attn_layernorm",
        "post_attention_norm",
        "post_operator_norm",
    )
    """The norm of what attention adds, among the children of a block."""

    post_mlp_norm: tuple[str, ...] = (
        "post_feedforward_layernorm",
        "post_mlp_layernorm",
        "post_feedforward_norm",
        "post_ffn_norm",
    )
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
        "embedding_norm",
        "layernorm",
        "out_norm",
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

    n_layers: tuple[str, ...] = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    """The number of blocks, in the config."""

    n_heads: tuple[str, ...] = ("num_attention_heads", "n_head", "n_heads")
    """The number of attention heads, in the config."""


KNOWN = Description()
"""The names that the families of transformers have."""
