"""What `overwrite` means, wherever something is written that may be there already: refuse it, replace it, or write beside it."""

from __future__ import annotations

from typing import Any, Literal

from AutomaticEval.errors import SelectionError

VERSION: Literal["version"] = "version"
Overwrite = bool | Literal["version"]
"""False refuses what is there, True replaces it, "version" writes beside it: france-2.h5."""


def parse_overwrite(given: Any) -> Overwrite:
    """What people pass in code, and type behind --overwrite. Raises SelectionError."""
    if given in (None, False, "false"):
        return False
    if given in (True, "true"):
        return True
    if given == VERSION:
        return VERSION
    raise SelectionError(f'overwrite is {given!r}; write True, False or "version" (--overwrite, --overwrite version).')


def overwriting(beside: str) -> str:
    """What a refusal offers in place of another name. beside: the name that "version" writes."""
    return (
        f', or pass overwrite=True (--overwrite), or overwrite="version", which writes {beside} (--overwrite version)'
    )
