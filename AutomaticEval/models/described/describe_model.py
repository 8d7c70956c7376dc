"""`describe_model`: the parts of a decoder of an unknown family, named by a person and checked by the identities of all families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from AutomaticEval.errors import ModelError, unknown_option
from AutomaticEval.models.architecture.description import KEYS, KNOWN, Description, description_text
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.described.remembered import description_of, remember
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.layout import Layout, layers_text
from AutomaticEval.sites import KINDS

Names = str | Sequence[str] | None


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
            if lacking and KINDS[kind].not_stored is None:
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


def describe_model(
    model: Any,
    description: str | Path | None = None,
    *,
    blocks: Names = None,
    embedding: Names = None,
    final_norm: Names = None,
    lm_head: Names = None,
    attention: Names = None,
    out_projection: Names = None,
    mlp: Names = None,
    down_projection: Names = None,
    q: Names = None,
    k: Names = None,
    v: Names = None,
    qkv: Names = None,
    post_attention_norm: Names = None,
    post_mlp_norm: Names = None,
    n_heads: int | str | None = None,
    n_kv_heads: int | str | None = None,
    d_head: int | str | None = None,
    n_layers: int | str | None = None,
    residual_multiplier: float | str | None = None,
    **others: Any,
) -> Described:
    """Say what the parts of a loaded decoder are called, and verify it. All functions then know the model, as long as it lives.

    model: a transformers model, a LoadedModel, or a plain module whose forward takes token ids [batch, pos] first and gives logits: a tensor, the first of
    a tuple, or an object or dict with logits. description: a TOML file of the same names, in the place of keywords.
    blocks, embedding, final_norm and lm_head are paths from the model; blocks may also be a list of the paths of all blocks. All other names are those
    within a block ("mix", "mix.inner.proj"). A name that is given takes the place of all known names of that part; several are tried in their order. Numbers
    take the place of the config's; a text is the name that the config has for one.
    Returns the sites that were found, and why others were not. A wrong name is never believed: the identities that are checked for every model decide.
    Raises UnsupportedModel for parts that are not there, or are something else; ModelError for what is no description; TypeError for an unknown keyword.
    """
    given = {name: value for name, value in locals().items() if name not in ("model", "description", "others")} | others
    own = _described(given, description)
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


def _described(given: dict[str, Any], description: str | Path | None) -> Description:
    for name in given:
        if name not in KEYS:
            raise unknown_option(name, KEYS)
    said = {name: value for name, value in given.items() if value is not None}
    if description is None:
        return Description.of(said)
    if said:
        raise ModelError(f"a description was given, and {', '.join(said)} beside it; write them into it.")
    return Description.read(description_text(description))
