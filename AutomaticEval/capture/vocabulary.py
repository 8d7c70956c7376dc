"""Token ids as strings and as text, whatever a model writes.

A model's embedding may have more rows than its tokenizer has tokens, so that the model may write an id without a token. That must not
cost a capture: here every id has a string, and every sequence a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_FAILURES = (IndexError, KeyError, OverflowError, TypeError, ValueError)
"""What some tokenizers raise for an id without a token; most return None."""


def token_strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The string of each token id, as the tokenizer names it: `Ġcapital`, `▁capital`.

    An id without a token becomes `<|id:563|>`. A token of bytes is decoded as UTF-8, and a byte that is not UTF-8 becomes `\\xe2`.
    """
    try:
        tokens: list[Any] = tokenizer.convert_ids_to_tokens(list(ids))
    except _FAILURES:  # one of the ids has no token
        tokens = [_token(tokenizer, each) for each in ids]
    return [token if type(token) is str else _string(token, each) for token, each in zip(tokens, ids, strict=True)]


def text_of(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of token ids, as the tokenizer decodes them. Ids without a token are left out."""
    try:
        return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))
    except _FAILURES:
        known = [each for each in ids if 0 <= each < len(tokenizer) and _token(tokenizer, each) is not None]
        if len(known) == len(ids):  # the failure has another reason
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
