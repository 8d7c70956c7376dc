"""`describe_model`: the parts of a decoder of an unknown family, named by a person and checked by the identities of all families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import nn

from AutomaticEval.errors import ModelError, unknown_option
from AutomaticEval.models.architecture.description import KEYS, KNOWN, Description, description_text
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.described.remembered import description_of, remember
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.layout import Layout, layers_text
from AutomaticEval.sites import KINDS

Names = str | Sequence[str]


@dataclass(frozen=True)
class Described:
    """A described model: which sites were found, and why others were not. Its text says so in a few lines."""

    description: Description
    layout: Layout

    @property
    def missing(self) -> dict[str, dict[str, str]]:
        """Kind -> reason -> the layers for which it is one."""
        missing = {}
        for kind in KINDS:
            lacking = self.layout.lacking(kind)
            if any(site in self.layout.missing for sites in lacking.values() for site in sites):
                missing[kind] = {
                    reason: layers_text([site.layer for site in sites if site.layer is not None])
                    if sites[0].layer is not None
                    else "the model"
                    for reason, sites in lacking.items()
                }
        return missing

    def as_toml(self) -> str:
        """The description as a file for --model_description."""
        return self.description.as_toml()

    def __str__(self) -> str:
        layout = self.layout
        found = [kind for kind in KINDS if not layout.lacking(kind)]
        lines = [
            f"{layout.n_layers} layers, {layout.n_heads} heads of {layout.d_head}, d_model {layout.d_model}",
            f"Verified in all layers: {', '.join(found)}",
        ]
        for kind, reasons in self.missing.items():
            lines += [f"{kind}, not in {where}: {reason}" for reason, where in reasons.items()]
        return "\n".join(lines)


class DescriptionKeywords(TypedDict, total=False):
    """What can be said of a model's parts: a name each, or several that are tried in their order; of numbers a number, or the name that the config has for it."""

    blocks: Names
    """The list of blocks, as a path from the model; or the paths of all blocks. So are the next three."""

    embedding: Names
    final_norm: Names
    lm_head: Names
    """The module that gives the logits, where they are not what the model returns (first)."""

    attention: Names
    """Attention in a block: "mix", or a path such as "inner.mix". So are all that follow."""

    out_projection: Names
    mixer: Names
    """What mixes tokens and is no attention."""

    mlp: Names
    down_projection: Names
    q: Names
    k: Names
    v: Names
    qkv: Names
    """One projection of queries, keys and values."""

    post_attention_norm: Names
    """The norm of what attention adds, before it is added."""

    post_mlp_norm: Names
    n_layers: int | str
    n_heads: int | str
    n_kv_heads: int | str
    d_head: int | str
    residual_multiplier: float | str


def describe_model(
    model: Any, description: str | Path | None = None, **parts: Unpack[DescriptionKeywords]
) -> Described:
    """Say what the parts of a loaded decoder are called, and verify it. All functions then know the model, as long as it lives.

    model: a transformers model, a LoadedModel, or a plain module whose forward takes token ids [batch, pos] first and gives logits: a tensor, the first of
    a tuple, or an object or dict with logits. description: a TOML file of the same names, in the place of keywords. parts: `DescriptionKeywords`. A name that
    is given takes the place of all known names of that part.
    Returns the sites that were found, and why others were not. A wrong name is never believed: the identities that are checked for every model decide.
    Raises UnsupportedModel for parts that are not there, or are something else; ModelError for what is no description; TypeError for an unknown keyword.
    """
    own = _described(dict(parts), description)
    whole = model.model if isinstance(model, LoadedModel) else model
    if not isinstance(whole, nn.Module):
        raise ModelError(
            f"describe_model takes a loaded model; found {type(model).__name__}. For a name, give model_description= to the function that loads it."
        )
    before = description_of(whole)
    remember(whole, own)
    try:
        return Described(own, find_layout(whole))
    except BaseException:
        remember(whole, None if before is KNOWN else before)
        raise


def _described(parts: dict[str, Any], description: str | Path | None) -> Description:
    for name in parts:
        if name not in KEYS:
            raise unknown_option(name, KEYS)
    if description is None:
        return Description.of(parts)
    if parts:
        raise ModelError(f"a description was given, and {', '.join(parts)} beside it; write them into it.")
    return Description.read(description_text(description))
