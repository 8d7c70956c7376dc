"""Words and their tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
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
        raise PromptError(
            f"{text!r} is {len(ids)} tokens; a logit difference needs one. It may lack a space before it, or have one too many."
        )
    return int(ids[0])


def first_tokens(tokenizer: Any, words: Iterable[str]) -> list[int]:
    """Of words that follow others: those that are one token; when none is, the first tokens of all.

    Tokens that many words begin with are passed over: white space alone, and what stands for unknown words.
    """
    before = tokenizer(BEFORE, add_special_tokens=False)["input_ids"]
    found = [tokenizer(f"{BEFORE} {word}", add_special_tokens=False)["input_ids"] for word in words]
    after = [ids[len(before) :] for ids in found if ids[: len(before)] == before]
    whole = [ids for ids in after if len(ids) == 1 and _is_told(tokenizer, ids[0])]
    told = [[token for token in ids if _is_told(tokenizer, token)] for ids in after]
    return sorted({int(ids[0]) for ids in whole or told if ids})


def _is_told(tokenizer: Any, token: int) -> bool:
    return token != tokenizer.unk_token_id and bool(tokenizer.decode([token]).strip())


def targets_of(tokenizer: Any, keywords: Mapping[str, Sequence[str]]) -> dict[str, Target]:
    """Of each category with keywords, its own against all others', but for tokens that both have.

    Raises PromptError when nothing is left of either.
    """
    own = {category: set(first_tokens(tokenizer, words)) for category, words in keywords.items() if words}
    found = {}
    for category, answer in own.items():
        others: set[int] = set().union(*(tokens for name, tokens in own.items() if name != category))
        found[category] = Target(sorted(answer - others), sorted(others - answer))
        for what, tokens in (
            ("keywords of", found[category].answer),
            ("keywords other than of", found[category].against),
        ):
            if not tokens:
                raise PromptError(
                    f"no token tells the {what} {category!r} from the rest, so that there is no logit difference; name two tokens "
                    "(--target, --against), or another category with keywords."
                )
    return found


def check_target(target: Target, n_tokens: int) -> None:
    """Raises PromptError for one that is no difference."""
    if not target.answer or not target.against or set(target.answer) == set(target.against):
        raise PromptError(f"{target} is no difference of logits: it needs tokens on both sides, and not the same.")
    if not all(0 <= token < n_tokens for token in (*target.answer, *target.against)):
        raise PromptError(f"{target} names tokens that there are not; there are {n_tokens}.")


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
