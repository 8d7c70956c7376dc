"""Options that people give, on the command line and as keywords: annotated fields of the dataclasses that use them.

    max_new_tokens: Annotated[int, Option("The most tokens to generate.")] = 256

This one line gives the commands `--max_new_tokens` with its help. A field without an `Option` is for code alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, NamedTuple, get_args, get_type_hints

_NOT_GIVEN: Any = object()


@dataclass(frozen=True)
class Option:
    """What a person needs to know of a field."""

    help: str
    name: str | None = None
    """What people call it, where that is not the field's name; then the dataclass has a method `parse` that takes this name."""

    reads: Any = None
    """The type that the command line reads, where that is not the field's own."""

    default: Any = _NOT_GIVEN
    """What the command line takes when nothing is given, where that is not the field's own default."""

    minimum: int | None = None
    metavar: str | None = None
    """How the help shows a value; None shows its type."""


class NamedOption(NamedTuple):
    """An option with all that its field says of it."""

    name: str
    type: Any
    default: Any
    """What is taken when nothing is given; `...` when it must be given."""

    option: Option


@cache
def options_in(kind: type) -> Mapping[str, NamedOption]:
    """The options of a dataclass by their names, in the order of its fields."""
    hints = get_type_hints(kind, include_extras=True)
    options = {}
    for field in fields(kind):
        own_type, *extras = get_args(hints[field.name]) if hasattr(hints[field.name], "__metadata__") else (None,)
        for option in extras:
            if isinstance(option, Option):
                default = field.default if option.default is _NOT_GIVEN else option.default
                name = option.name or field.name
                options[name] = NamedOption(
                    name, option.reads or own_type, ... if default is MISSING else default, option
                )
    return options


def take_options(given: dict[str, Any], kind: type) -> dict[str, Any]:
    """Remove from `given`, and return, the options of a dataclass, by the names that people call them."""
    return {name: given.pop(name) for name in options_in(kind) if name in given}


def take_fields(given: dict[str, Any], kind: type) -> dict[str, Any]:
    """Remove from `given`, and return, the fields of a dataclass, also those that are for code alone."""
    return {field.name: given.pop(field.name) for field in fields(kind) if field.name in given}
