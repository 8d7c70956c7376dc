"""Words and their tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from AutomaticEval.errors import PromptError

BEFORE = "I am"
"""What stands before a word, to see which tokens it has after others."""


class Target(NamedTuple):
    """Tokens whose logits are told apart: the mean logit of answer less that of against."""

    answer: list[int]
    against: list[int]


def one_token(tokenizer: Any, text: str) -> int:
    """Raises PromptError for a text of several tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise PromptError(f"{text!r} is {len(ids)} tokens; a logit difference needs one. A space may belong before it.")
    return int(ids[0])


def first_tokens(tokenizer: Any, words: Iterable[str]) -> list[int]:
    """Of words that follow others: those that are one token; when none is, the first tokens of all."""
    before = tokenizer(BEFORE, add_special_tokens=False)["input_ids"]
    found = [tokenizer(f"{BEFORE} {word}", add_special_tokens=False)["input_ids"] for word in words]
    after = [ids[len(before) :] for ids in found if ids[: len(before)] == before and len(ids) > len(before)]
    whole = [ids for ids in after if len(ids) == 1]
    return sorted({int(ids[0]) for ids in whole or after})


def target_of(tokenizer: Any, words: Iterable[str], others: Iterable[str]) -> Target:
    """Words against others, but for tokens that both have. Raises PromptError when nothing is left of either."""
    answer, against = first_tokens(tokenizer, words), first_tokens(tokenizer, others)
    target = Target([token for token in answer if token not in against], [t for t in against if t not in answer])
    if not target.answer or not target.against:
        raise PromptError("the categories' keywords have the same first tokens; name two tokens that tell them apart.")
    return target


def tokens_within(tokenizer: Any, text: str, pattern: re.Pattern[str]) -> tuple[list[int], list[bool]]:
    """The token ids of a text, and of each whether a part of it is in what the pattern finds."""
    if not getattr(tokenizer, "is_fast", False):
        raise PromptError(
            f"{type(tokenizer).__name__} does not tell which characters its tokens stand for; a fast tokenizer does."
        )
    encoded = tokenizer(text, return_offsets_mapping=True)
    spans = [match.span() for match in pattern.finditer(text)]
    return encoded["input_ids"], [_is_within(place, spans) for place in encoded["offset_mapping"]]


def _is_within(place: Sequence[int], spans: Sequence[tuple[int, int]]) -> bool:
    return any(place[0] < end and place[1] > start for start, end in spans)
