"""JSON that others wrote: parsed, or refused. Knows nothing of what it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_DECODER = json.JSONDecoder()
_SPACE = " \t\n\r"
DEPTH = 100
"""Lists and objects in one another. What walks through a value calls itself as often, and Python allows it a thousand times."""


def parse_json(text: str) -> Any:
    """Raises ValueError for what is no JSON, and for what is nested deeper than DEPTH."""
    try:
        stripped = text.strip(_SPACE)
        value, end = _DECODER.raw_decode(stripped)  # a third of the time of json.loads, for the short texts of a column
        if end < len(stripped):
            raise ValueError(f"{text[:40]!r} is JSON with {len(stripped) - end} characters after it")
    except RecursionError:
        value = None
    else:
        if not (_may_be_deep(text) and _is_deep(value, DEPTH)):
            return value
    raise ValueError(f"JSON is nested deeper than {DEPTH}")


def is_too_deep(text: str) -> bool:
    """Whether `parse_json` refuses JSON for that."""
    return _may_be_deep(text) and _is_deep(json.loads(text), DEPTH)


def _may_be_deep(text: str) -> bool:
    return len(text) > 2 * DEPTH and text.count("[") + text.count("{") > DEPTH


def _is_deep(value: Any, left: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    return not left or any(_is_deep(each, left - 1) for each in (value.values() if isinstance(value, dict) else value))


def as_json(value: Any) -> str:
    """Any value as JSON. Keys that JSON does not have are text, and so is what holds itself or is nested too deep to be read."""
    try:
        text = json.dumps(value, default=_plain)
    except (TypeError, ValueError, RecursionError):
        try:
            text = json.dumps(_with_text_keys(value), default=_plain)
        except RecursionError:
            return json.dumps(str(value))
    return json.dumps(str(value)) if is_too_deep(text) else text


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _with_text_keys(each) for key, each in value.items()}
    return [_with_text_keys(each) for each in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """For JSON: numbers of numpy or torch as Python's, anything else that it has no type for as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
