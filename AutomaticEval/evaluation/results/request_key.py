"""`RequestKey`: what tells one request of lm-eval from every other, in the run's files too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class RequestKey(NamedTuple):
    """Which request a sample answers. No two samples of a run have the same key."""

    task: str
    doc_id: int
    """The document's own index in the task, also when only some documents are asked."""

    choice: int
    repeat: int
    window: int = 0
    """Which window of a text that is scored in several; 0 for all other requests."""


def key_of(record: Mapping[str, Any]) -> RequestKey:
    """The key of a sample's record."""
    return RequestKey(*(record[name] for name in RequestKey._fields))
