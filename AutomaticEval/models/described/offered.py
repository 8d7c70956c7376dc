"""What a module tree offers where parts were not found, and the description to complete, with what can be guessed filled in.

A guess is never believed by itself: it becomes a part of a description only when a person gives it, and then the identities decide.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from AutomaticEval.errors import UnsupportedModel, did_you_mean
from AutomaticEval.models.architecture.description import KEYS, KNOWN, NUMBERS, Description
from AutomaticEval.models.described.guesses import ENDINGS, Blocks, config_numbers, guesses_of, lists_of

FIRST = (
    "blocks",
    "embedding",
    "final_norm",
    "attention",
    "out_projection",
    "mlp",
    "down_projection",
    "q",
    "k",
    "v",
    "n_heads",
)
"""The parts that a description shows even when nothing could be guessed."""
MOST_SHOWN = 4
"""Lists of blocks, and lines of a block's tree, that a message names. A description to complete shows four times as many."""


def not_found(model: nn.Module, names: Description, what: str, path: str = "") -> UnsupportedModel:
    """The error for a part that was not found. what: a sentence without its full stop. path: the described path that is not there.

    Its note is the description to complete.
    """
    near = did_you_mean(path, [name for name, _ in model.named_modules() if name]) if path else ""
    lists = lists_of(model)
    offers = "; ".join(map(str, lists[:MOST_SHOWN])) + (" …" if len(lists) > MOST_SHOWN else "")
    error = UnsupportedModel(
        f"{what}.{near} Lists of blocks in it: {offers or 'none'}. Describe its parts: describe_model(model, blocks=…), or --model_description FILE "
        "with what follows."
    )
    error.add_note(to_complete(model, names))
    return error


def to_complete(model: nn.Module, names: Description = KNOWN) -> str:
    """A TOML description of a model: what a person has said, what can be guessed, and comments that say what to choose from."""
    lists = lists_of(model)
    said = guesses_of(model, lists) | dict(names.said())
    lines = [*_comments(model, lists)]
    for key in dict.fromkeys([*FIRST, *KEYS]):
        if key in said:
            lines.append(f"{key} = {json.dumps(said[key], ensure_ascii=False)}")
        elif key in FIRST and not (key in ENDINGS and "qkv" in said):
            lines.append(f"# {key} = " + ("0" if key in NUMBERS else '""'))
    return "\n".join(lines)


def _comments(model: nn.Module, lists: Sequence[Blocks]) -> Iterator[str]:
    """What there is to choose from, as comments of TOML."""
    yield f"# {type(model).__name__}: complete these lines, save them as model.toml, and give --model_description model.toml."
    yield "# Paths from the model: blocks, embedding, final_norm, lm_head. All other names are those within a block."
    if lists:
        yield "# Lists of blocks:"
        yield from (f"#   {each}" for each in lists[: 2 * MOST_SHOWN])
        yield "# A block:"
        yield from (f"#   {line}" for line in _tree(lists[0].modules[0]))
    if numbers := config_numbers(model):
        yield f"# Numbers in its config: {numbers}"


def _tree(block: nn.Module) -> Iterator[str]:
    """The modules in a block, a line each, with the shapes of their weights."""
    lines = [
        f"{name} ({type(module).__name__}{''.join(f' {list(each.shape)}' for _, each in _own_weight(module))})"
        for name, module in block.named_modules()
        if name
    ]
    yield from lines[: 6 * MOST_SHOWN]
    if len(lines) > 6 * MOST_SHOWN:
        yield f"… and {len(lines) - 6 * MOST_SHOWN} more"


def _own_weight(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, each) for name, each in module.named_parameters(recurse=False) if name == "weight"]
