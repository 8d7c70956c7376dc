"""The marks between which a model thinks: which tokens they are, told by its tokenizer, and where they stand in a response.

A mark is looked for by its token ids where the tokenizer has a token for it, or for what it begins with: then it is no other text, and it is found
although decoding drops it, as it drops special tokens. Other marks are looked for in the text, and their tokens by decoding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

from AutomaticEval.capture.vocabulary import text_of
from AutomaticEval.thinking.text import Said
from AutomaticEval.thinking.where import Span, Thinking, between_marks

TAIL = 64
"""So many tokens at a prompt's end are looked at for a mark that opens."""


class Tags(NamedTuple):
    """The texts of marks, as one family of models writes them. Of several that open or close, the longer one comes first."""

    opens: tuple[str, ...]
    closes: tuple[str, ...]


PLAIN = Tags(("<think>", "<thinking>"), ("</think>", "</thinking>"))
"""Looked for in the text where a tokenizer has no tokens of its own for thinking."""
HARMONY = Tags(
    ("<|channel|>analysis<|message|>",),
    ("<|end|><|start|>assistant<|channel|>final<|message|>", "<|channel|>final<|message|>"),
)
KNOWN = (
    Tags(("<think>",), ("</think>",)),  # Qwen, DeepSeek R1, SmolLM 3, GLM, Nemotron, …
    Tags(("<thinking>",), ("</thinking>",)),
    HARMONY,  # GPT-OSS
    Tags(("[THINK]",), ("[/THINK]",)),  # Mistral
    Tags(("<|START_THINKING|>",), ("<|END_THINKING|><|START_RESPONSE|>", "<|END_THINKING|>")),  # Cohere
    Tags(("<|channel>thought\n", "<|channel>thought"), ("<channel|>",)),  # Gemma 4
    Tags(("<seed:think>",), ("</seed:think>",)),  # Seed-OSS
    Tags(("◁think▷",), ("◁/think▷",)),  # Kimi
    Tags(("<thought>",), ("</thought>",)),  # EXAONE
    Tags(
        ("Here is my thought process:", "Here's my thought process:"),
        ("Here is my response:", "Here's my response:"),
    ),  # Granite
)
"""The marks of models that think, by which a tokenizer or its chat template is known."""


@dataclass(frozen=True)
class Mark:
    """What opens thinking, or closes it: one of several sequences of token ids, or a text."""

    ids: tuple[tuple[int, ...], ...] = ()
    text: re.Pattern[str] | None = None

    def places(self, ids: Sequence[int], text_of_first: Callable[[int], str]) -> list[Span]:
        """Where the mark stands among tokens: half-open, ascending. A token that spells a part of a mark and something else counts as the mark's.

        text_of_first: gives the text of the first so many of these tokens.
        """
        if self.text is None:
            return self._by_ids(ids)
        matches = [match.span() for match in self.text.finditer(text_of_first(len(ids)))]
        return [_tokens_of(match, len(ids), text_of_first) for match in matches]

    def _by_ids(self, ids: Sequence[int]) -> list[Span]:
        found: list[Span] = []
        firsts, end = {each[0] for each in self.ids}, 0
        for at, token in enumerate(ids):
            if token in firsts and at >= end:
                own = next((each for each in self.ids if tuple(ids[at : at + len(each)]) == each), ())
                end = at + len(own)
                found += [(at, end)] if own else []
        return found


def _tokens_of(match: Span, most: int, text_of_first: Callable[[int], str]) -> Span:
    """The tokens that spell a part of the text of the first `most` tokens."""
    start = _fewest(most, lambda n: len(text_of_first(n)) > match[0]) - 1
    return start, _fewest(most, lambda n: len(text_of_first(n)) >= match[1])


def _fewest(most: int, is_enough: Callable[[int], bool]) -> int:
    """The smallest number from 1 to most that is enough."""
    low = 0
    while most - low > 1:
        middle = (low + most) // 2
        low, most = (low, middle) if is_enough(middle) else (middle, most)
    return most


@dataclass(frozen=True)
class ThinkMarks:
    """The marks of one model."""

    tokenizer: Any
    opens: Mark
    closes: Mark
    name_of_end: str
    """What lm-eval's think_end_token would be: a text, or a token's id."""
    end: Mark | None = None
    """lm-eval's think_end_token, which closes the thinking of a response that has no mark that closes."""

    def thinking(self, prompt: Sequence[int], response: Sequence[int]) -> Thinking:
        """Where a response thinks and answers, in the sequence of prompt and response."""
        text_of_first = cache(lambda n: self._decode(response[:n]))
        opens, closes = (each.places(response, text_of_first) for each in (self.opens, self.closes))
        if not closes and self.end is not None:
            ends = self.end.places(response, text_of_first)
            closes = [each for each in ends if not any(start < each[1] <= stop for start, stop in opens)]
        span, answer = between_marks(opens, closes, len(response), is_open=self.is_open(prompt))
        before = len(prompt)
        return Thinking(span and (before + span[0], before + span[1]), None if answer is None else before + answer)

    def is_open(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends with a mark that opens, and blanks at most."""
        tail = list(prompt[-TAIL:])
        places = self.opens.places(tail, lambda n: self._decode(tail[:n]))
        last = max((stop for _, stop in places), default=None)
        return last is not None and not text_of(self.tokenizer, tail[last:]).strip()

    def texts(self, thinking: Thinking, n_prompt: int, response: Sequence[int], text: str) -> Said:
        """What a response thinks and answers. text: of the whole response, of which a stop string may have cut the end."""
        if thinking.span is None:
            return Said(None, text)
        n_cut = len(self._decode(response)) - len(text)
        thought = self._decode(response[thinking.span[0] - n_prompt : thinking.span[1] - n_prompt])
        if thinking.answer_start is None:
            return Said(thought[: max(0, len(thought) - n_cut)], None)
        answer = self._decode(response[thinking.answer_start - n_prompt :])
        return Said(thought, answer[: max(0, len(answer) - n_cut)])

    def _decode(self, ids: Sequence[int]) -> str:
        return text_of(self.tokenizer, ids, skip_special_tokens=True)


def think_marks(tokenizer: Any, given: tuple[str, str] | None = None, end: str | int | None = None) -> ThinkMarks:
    """The marks of a model, by its tokenizer.

    given: the texts that open and close, given by hand. end: lm-eval's think_end_token, a text or a token id.
    """
    tags = Tags((given[0],), (given[1],)) if given is not None else _tags_of(tokenizer)
    opens, closes = (_mark(tokenizer, each) for each in tags)
    marks = ThinkMarks(tokenizer, opens, closes, _end_of(tokenizer, closes, tags))
    if end is None:
        return marks
    return replace(marks, end=Mark(((end,),)) if isinstance(end, int) else Mark(text=re.compile(re.escape(end))))


def _end_of(tokenizer: Any, closes: Mark, tags: Tags) -> str:
    """What closes thinking, as lm-eval can find it: in the text, or as one token, which may be dropped from the text."""
    if not closes.ids:
        return tags.closes[0]
    last = closes.ids[-1][-1]
    return str(tokenizer.decode([last], skip_special_tokens=True) or last)


def _tags_of(tokenizer: Any) -> Tags:
    """The tags that the tokenizer has tokens for, or that its chat template writes; those of its template come first."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    as_tokens = [each for each in KNOWN if _ids(tokenizer, each.opens) and _ids(tokenizer, each.closes)]
    as_texts = [each for each in KNOWN if all(any(tag in template for tag in tags) for tags in each)]
    of_template = [each for each in as_tokens if any(_first_word(tag) in template for tag in each.closes)]
    return next(chain(of_template, as_tokens, as_texts), PLAIN)


def _first_word(tag: str) -> str:
    """What a tag begins with that has a token of its own: `<|channel|>` of `<|channel|>final<|message|>`."""
    match = re.match(r"<[^<>]+>|\[[^\[\]]+\]|◁[^◁▷]+▷", tag)
    return match[0] if match else tag


def _mark(tokenizer: Any, tags: Sequence[str]) -> Mark:
    ids = _ids(tokenizer, tags)
    return Mark(ids) if ids else Mark(text=re.compile("|".join(map(re.escape, tags))))


def _ids(tokenizer: Any, tags: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The token ids of tags, longest first; none unless each tag begins with a token of the tokenizer's own, which text next to it cannot change."""
    found = [_ids_of(tokenizer, tag) for tag in tags]
    return tuple(sorted((each for each in found if each), key=len, reverse=True)) if all(found) else ()


def _ids_of(tokenizer: Any, tag: str) -> tuple[int, ...]:
    first = _token(tokenizer, _first_word(tag))
    if first is None:
        return ()
    if _first_word(tag) == tag:
        return (first,)
    ids = tuple(tokenizer(tag, add_special_tokens=False)["input_ids"])
    return ids if ids and ids[0] == first else ()


def _token(tokenizer: Any, text: str) -> int | None:
    """The id of the token with this very text; None when there is none."""
    found = tokenizer.convert_tokens_to_ids(text)
    if not isinstance(found, int) or found < 0 or found == getattr(tokenizer, "unk_token_id", None):
        return None
    return found if tokenizer.convert_ids_to_tokens(found) == text else None
