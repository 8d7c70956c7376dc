"""`Description`: what the parts of a model are called. Its defaults are all that is known of families. Imports no heavy library.

People describe a family that is not known here: as keywords, or as a TOML file of the same names. What they give takes the place of what is known.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from AutomaticEval.errors import ModelError, did_you_mean


@dataclass(frozen=True)
class Description:
    """Names of modules and of fields of configs, the likeliest first. Rules check what the names point at, so that a wrong name is never believed.

    Names of modules are relative to the block, and may be dotted paths; those in `PATHS` are paths from the model.
    """

    blocks: tuple[str, ...] = ()
    """The list of blocks, from the model, or the paths of all blocks. Without a path it is the list that is as long as the config has layers."""

    embedding: tuple[str, ...] = ()
    """The token embedding, from the model. Without a path it is what get_input_embeddings gives."""

    lm_head: tuple[str, ...] = ()
    """The module that gives the logits, from the model. Without a path the logits are what the model returns."""

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

    down_scale: tuple[str, ...] = ("down_multiplier",)
    """What an MLP multiplies by what its last projection gives, as a number of the MLP."""

    rescaling: tuple[str, ...] = ("rescale_every",)
    """Behind how many blocks the stream is multiplied by a number, in the config."""

    active_stream: tuple[str, ...] = ("altup_active_idx",)
    """Which of several residual streams the blocks work on, in the config."""

    out_projection: tuple[str, ...] = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo")
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
        "post_norm1",
    )
    """The norm of what attention adds, among the children of a block."""

    post_mlp_norm: tuple[str, ...] = (
        "post_feedforward_layernorm",
        "post_mlp_layernorm",
        "post_feedforward_norm",
        "post_ffn_norm",
        "post_norm2",
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

    q: tuple[str, ...] = ("q_proj", "q_b_proj", "Wq")
    """The projection of queries, within attention."""

    k: tuple[str, ...] = ("k_proj", "Wk")
    """The projection of keys, within attention."""

    v: tuple[str, ...] = ("v_proj", "Wv")
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

    router: tuple[str, ...] = ("gate", "router")
    """What chooses the experts of each token, anywhere within a block but not within attention."""

    experts: tuple[str, ...] = ("experts",)
    """All experts of a layer in one module, beside the router."""

    n_layers: tuple[str, ...] = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    """The number of blocks, in the config."""

    n_heads: tuple[str, ...] = ("num_attention_heads", "n_head", "n_heads")
    """The number of attention heads, in the config."""

    numbers: tuple[tuple[str, float | str], ...] = ()
    """Name -> number, of `NUMBERS`: what is said in place of the config. A text is the name that the config has for it."""

    given: tuple[str, ...] = ()
    """What a person has said, by its name; () for what is known of families."""

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str = "describe_model") -> Description:
        """A description of what a person gives: a name or several names for a part, a number for one of `NUMBERS`.

        where: what the error begins with. Raises ModelError for an unknown key, for a value of another type, and for no key at all.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            raise ModelError(f"{where}: nothing is described; name at least one part, such as blocks.")
        names: dict[str, tuple[str, ...]] = {}
        numbers: dict[str, float | str] = {}
        for key, value in given.items():
            if key not in KEYS:
                raise ModelError(f"{where}: no part {key!r}.{did_you_mean(key, KEYS)} Parts: {', '.join(KEYS)}.")
            if key in NUMBERS:
                numbers[key] = _number(key, value, where)
            else:
                names[key] = _names(key, value, where)
        return replace(cls(), **names, numbers=tuple(numbers.items()), given=tuple(given))

    @classmethod
    def read(cls, text: str, where: str = "the description") -> Description:
        """The description in a TOML text. Raises ModelError, with the line, for what is no TOML."""
        try:
            return cls.of(tomllib.loads(text), where)
        except tomllib.TOMLDecodeError as error:
            raise ModelError(f"{where} is no TOML: {error}.") from None

    def as_toml(self) -> str:
        """What a person has said, as TOML. `read` gives an equal description."""
        return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in self.said())

    def said(self) -> Iterable[tuple[str, Any]]:
        numbers = dict(self.numbers)
        for name in self.given:
            if name in numbers:
                yield name, numbers[name]
            else:
                names = list(getattr(self, name))
                yield name, names[0] if len(names) == 1 else names


PATHS = ("blocks", "embedding", "final_norm", "lm_head")
"""Parts whose names are paths from the model when a person gives them."""
NUMBERS = {
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_head": "head_dim",
    "residual_multiplier": "residual_multiplier",
}
"""What may be given as a number, or as the name that a config has for it -> the name under which the rules read it."""
NAMES = (
    *("blocks", "embedding", "lm_head", "attention", "mixer", "mlp", "out_projection", "down_projection"),
    *("post_attention_norm", "post_mlp_norm", "final_norm", "q", "k", "v", "qkv"),
)
"""The parts that people name. The other fields are of families that are known."""
KEYS = (*NAMES, *NUMBERS)
"""Everything that can be described."""
KNOWN = Description()
"""The names that the families of transformers have."""


def description_text(given: str | Path | Mapping[str, Any] | Description) -> str:
    """What is given as a description, as TOML without comments: the content of a file, a TOML text, or names as a dict.

    Raises ModelError for a file that is not there, and for what describes nothing.
    """
    if isinstance(given, Description):
        return given.as_toml().strip()
    if isinstance(given, Mapping):
        return Description.of(given, "model_description").as_toml().strip()
    where = "model_description"
    text = str(given)
    if isinstance(given, Path) or "=" not in text or _is_file(text):
        where, text = Path(text).name, _content(text)
    return Description.read(text, where).as_toml().strip()


def _is_file(text: str) -> bool:
    try:
        return Path(text).expanduser().is_file()
    except OSError:  # too long for a name
        return False


def _content(path: str) -> str:
    """The text of a file. Raises ModelError."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(
            f"model_description: {path} cannot be read ({error.strerror}); give a TOML file, such as one with the line blocks = "
            '"decoder.layers".'
        ) from None
    except UnicodeDecodeError:
        raise ModelError(f"model_description: {Path(path).name} is no text; give a TOML file.") from None


def _number(key: str, value: Any, where: str) -> float | str:
    if isinstance(value, str) and value.isidentifier():
        return value
    whole = "" if key == "residual_multiplier" else "whole "
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value > 0:
        raise ModelError(
            f"{where}: {key} is {value!r}; expected a {whole}number above 0, or the name that the config has for it."
        )
    return float(value) if not whole else int(value)


def _names(key: str, value: Any, where: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else ()
    if not names or not all(isinstance(each, str) and each.strip(". ") == each and each for each in names):
        raise ModelError(f"{where}: {key} is {value!r}; expected the name of a module, or a list of names.")
    return names
