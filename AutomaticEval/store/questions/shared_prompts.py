"""How much of its prompt a question's choices share, and which questions have equal prompts: by their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.ragged import Array, Ragged

_SLAB_TOKENS = 2**20
"""So many token ids are in memory together, or those of one question."""
_BEGINS_WORD = "Ġ▁ĊĉČ"
"""Tokens that begin with one of these letters, or with none that a word has, begin a word."""


class SharedPrompts(NamedTuple):
    """The prompts of questions: of each the tokens that all its choices share."""

    n_tokens: Array
    """[n_questions]. Without choices, and with equal prompts, it is the length of the first choice's prompt."""

    groups: Array
    """[n_questions]: equal prompts have the same number, counted from 0 in the order of the questions."""


def shared_prompts(contents: Contents, samples: Ragged) -> SharedPrompts:
    """samples: [n_choices] for each question. The ids are read in one pass, some at a time."""
    n_cut = np.array([each or 0 for each in _column(contents, "n_truncated")], dtype=np.int64)
    strings: dict[int, str] = {}
    lengths: list[int] = []
    known: dict[bytes, int] = {}
    groups: list[int] = []
    for numbers, prompts in _prompts(contents, samples):
        shared = _n_equal(prompts, n_cut[numbers])
        if shared is None:
            strings = strings or dict(contents.strings())
            shared = _n_beginning(prompts, strings)
        lengths.append(shared)
        digest = blake2b(prompts[0][:shared].astype("<i8").tobytes(), digest_size=16).digest()
        groups.append(known.setdefault(digest, len(known)))
    return SharedPrompts(np.array(lengths, dtype=np.int64), np.array(groups, dtype=np.int64))


def _column(contents: Contents, name: str) -> list[int | None]:
    columns = contents.columns
    return columns.whole(name) if name in columns.names else [None] * contents.n_samples


def _prompts(contents: Contents, samples: Ragged) -> Iterator[tuple[Array, list[Array]]]:
    """The samples of each question, and the token ids of their prompts."""
    ids, offset = contents.input_ids.take(samples.values), samples.offset
    ends = ids.offset[offset]  # of the questions, in tokens
    start = 0
    while start < len(offset) - 1:
        stop = max(start + 1, int(np.searchsorted(ends, ends[start] + _SLAB_TOKENS, "right")) - 1)
        slab = ids.values[int(ends[start]) : int(ends[stop])]
        for one in range(start, stop):
            cuts = ids.offset[offset[one] : offset[one + 1] + 1] - ends[start]
            yield (
                samples.values[offset[one] : offset[one + 1]],
                [slab[a:b] for a, b in pairwise(cuts.tolist())],
            )
        start = stop


def _n_equal(prompts: Sequence[Array], n_cut: Array) -> int | None:
    """The length of the first prompt, if all are the same prompt, of which each choice may have lost another part of the beginning; else None."""
    if len({prompt.tobytes() for prompt in prompts}) == 1:
        return len(prompts[0])
    if len({len(prompt) + cut for prompt, cut in zip(prompts, n_cut.tolist(), strict=True)}) > 1:
        return None
    n = min(map(len, prompts))
    tail = prompts[0][len(prompts[0]) - n :]
    return len(prompts[0]) if all(np.array_equal(prompt[len(prompt) - n :], tail) for prompt in prompts[1:]) else None


def _n_beginning(prompts: Sequence[Array], strings: Mapping[int, str]) -> int:
    """With how many tokens all prompts begin, without the beginning of a word that differs."""
    n = min(map(len, prompts))
    together = np.stack([prompt[:n] for prompt in prompts])
    n = int(np.argmin([*(together == together[0]).all(axis=0), False]))
    while n and not all(_begins_word(strings.get(int(prompt[n]), "a")) for prompt in prompts if n < len(prompt)):
        n -= 1
    return n


def _begins_word(token: str) -> bool:
    return not token[:1].isalnum() or token[:1] in _BEGINS_WORD
