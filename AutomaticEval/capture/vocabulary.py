"""Token ids as strings and as text, whatever a model writes.

A model's embedding may be padded beyond its tokenizer, so that it may write an id that the tokenizer has no token for. What was
captured is never lost to that: every id has a string, and every sequence a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_FAILURES = (IndexError, KeyError, OverflowError, TypeError, ValueError)
"""What tokenizers raise for an id that they do not have; most give None."""


def token_strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The string of each token id, as the tokenizer names it: `Ġcapital`, `▁capital`.

    An id that the tokenizer has no token for is `<|id:563|>`. A token that is bytes is read as UTF-8, with `\\xe2` for a byte
    that is none.
    """
    try:
        found: list[Any] = tokenizer.convert_ids_to_tokens(list(ids))
    except _FAILURES:  # of one of them
        found = [_token(tokenizer, each) for each in ids]
    return [token if type(token) is str else _string(token, each) for token, each in zip(found, ids, strict=True)]


def text_of(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of token ids, as the tokenizer gives it; ids that it has no token for give none."""
    try:
        return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))
    except _FAILURES:
        known = [each for each in ids if 0 <= each < len(tokenizer) and _token(tokenizer, each) is not None]
        if len(known) == len(ids):  # it is about something else
            raise
        return str(tokenizer.decode(known, skip_special_tokens=skip_special_tokens))


def _token(tokenizer: Any, token_id: int) -> Any:
    try:
        return tokenizer.convert_ids_to_tokens(token_id)
    except _FAILURES:
        return None


def _string(token: Any, token_id: int) -> str:
    if token is None:
        return f"<|id:{token_id}|>"
    return token.decode("utf-8", "backslashreplace") if isinstance(token, bytes) else str(token)
