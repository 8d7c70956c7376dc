"""The tokenizer of a model, or another one that was asked for by its name."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from AutomaticEval.errors import ModelError
from AutomaticEval.models.checkpoint.hub_failures import read_or_explain
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.model_sources import ModelSources, base_arguments, source_of


def own_tokenizer(sources: ModelSources, options: LoadOptions) -> Any:
    """The tokenizer that belongs to a model.

    Raises ModelUnavailable; ModelError when one that is written in Python was asked for and there is none.
    """
    arguments: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if sources.tokenizer == sources.base:
        arguments = base_arguments(sources, options)
    if sources.alone is not None and sources.tokenizer == sources.adapter:
        arguments["revision"] = options.revision
    if options.add_bos_token is not None:
        arguments["add_bos_token"] = options.add_bos_token
    tokenizer = read_or_explain(
        sources.name,
        lambda: AutoTokenizer.from_pretrained(sources.tokenizer, use_fast=options.use_fast_tokenizer, **arguments),
    )
    if not options.use_fast_tokenizer and getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"use_fast_tokenizer=False: transformers has no tokenizer in Python for {sources.name}; leave it out."
        )
    return tokenizer


def tokenizer_named(name: str, sources: ModelSources, options: LoadOptions) -> Any:
    """The tokenizer of another name than the model's. Raises what `own_tokenizer` raises."""
    source = source_of(name)
    if source == sources.tokenizer:
        return own_tokenizer(sources, options)
    other = sources._replace(name=name, base="", tokenizer=source, revision=None, alone=None)
    return own_tokenizer(other, options)
