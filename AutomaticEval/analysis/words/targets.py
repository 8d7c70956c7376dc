"""Words and their tokens: which tokens stand for a word, and which tokens of a text belong to given words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from AutomaticEval.analysis.words.keywords import Words, plain
from AutomaticEval.errors import PromptError

BEFORE = "I am"
"""Text that is put before a word, because a word's tokens differ between the beginning of a text and later."""


class Target(NamedTuple):
    """Tokens whose logits are compared: the mean logit of answer minus the mean logit of against."""

    answer: list[int]
    against: list[int]


def one_token(tokenizer: Any, text: str) -> int:
    """The id of a text's only token. Raises PromptError for a text of several tokens, or of none."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise PromptError(
            f"{text!r} is {len(ids)} tokens; a logit difference needs one. It may lack a space before it, or have one too many."
        )
    return int(ids[0])


def first_tokens(tokenizer: Any, words: Iterable[str]) -> list[int]:
    """The tokens of those words that are one token, in the middle of a text; when no word is, the first token of each word.

    White space alone, and the token for unknown words, are passed over, because many words begin with them.
    """
    before = tokenizer(BEFORE, add_special_tokens=False)["input_ids"]
    encoded = [tokenizer(f"{BEFORE} {plain(word).strip()}", add_special_tokens=False)["input_ids"] for word in words]
    after = [ids[len(before) :] for ids in encoded if ids[: len(before)] == before]
    single = [ids for ids in after if len(ids) == 1 and _tells_a_word(tokenizer, ids[0])]
    telling = [[token for token in ids if _tells_a_word(tokenizer, token)] for ids in after]
    return sorted({int(ids[0]) for ids in single or telling if ids})


def _tells_a_word(tokenizer: Any, token: int) -> bool:
    """Whether a token is neither white space nor the token for unknown words."""
    return token != tokenizer.unk_token_id and bool(tokenizer.decode([token]).strip())


def targets_of(tokenizer: Any, keywords: Mapping[str, Sequence[str]]) -> dict[str, Target]:
    """For each category with keywords: the tokens of its keywords against those of all other categories, without tokens that both have.

    Raises PromptError when no token is left on one of the sides.
    """
    own = {category: set(first_tokens(tokenizer, words)) for category, words in keywords.items() if words}
    targets = {}
    for category, answer in own.items():
        others: set[int] = set().union(*(tokens for name, tokens in own.items() if name != category))
        target = targets[category] = Target(sorted(answer - others), sorted(others - answer))
        for what, tokens in (("keywords of", target.answer), ("keywords other than of", target.against)):
            if not tokens:
                raise PromptError(
                    f"no token tells the {what} {category!r} from the rest, so that there is no logit difference; name two tokens "
                    "(--target, --against), or another category with keywords."
                )
    return targets


def check_target(target: Target, n_tokens: int) -> None:
    """Raises PromptError for a target that is no difference of logits. n_tokens: the size of the vocabulary."""
    if not target.answer or not target.against or set(target.answer) == set(target.against):
        raise PromptError(f"{target} is no difference of logits: it needs tokens on both sides, and not the same.")
    if not all(0 <= token < n_tokens for token in (*target.answer, *target.against)):
        raise PromptError(f"{target} names tokens that there are not; there are {n_tokens}.")


def tokens_within(tokenizer: Any, text: str, words: Words) -> tuple[list[int], list[bool]]:
    """The token ids of a text, and for each token whether it overlaps with one of the words.

    Raises PromptError for a tokenizer that does not know where its tokens are in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise PromptError(
            f"{type(tokenizer).__name__} does not tell which characters its tokens stand for; a fast tokenizer does."
        )
    encoded = tokenizer(text, return_offsets_mapping=True)
    spans = words.found(text)
    return encoded["input_ids"], [_overlaps(characters, spans) for characters in encoded["offset_mapping"]]


def _overlaps(characters: Sequence[int], spans: Sequence[tuple[int, int]]) -> bool:
    """characters: first and end, as spans are."""
    return any(characters[0] < end and characters[1] > start for start, end in spans)
