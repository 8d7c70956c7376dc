"""What position alone explains, taken off: attention to marked tokens, and norms, beside those of other prompts at the same positions.

A head that looks only at positions (the token before, itself, the last few, the first) has no attention to keywords that is left, and prompts
of other lengths have no other strength for their length alone. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Marks = Sequence[bool]
"""For each token of a prompt whether it is marked, as keywords are."""


class Compared(NamedTuple):
    """Attention to marked tokens beside what is expected at the same positions."""

    own: Numbers
    """[n_own, n_layers, n_heads]: of each prompt with marked tokens, the attention paid to them minus what is expected."""
    pool: Numbers
    """[n_pool, n_layers, n_heads]: by how much each prompt that tells what is expected raises what is expected. The mean is 0. The difference
    of `own` and `pool` so varies as the mean of `own` does when other prompts had been drawn for both."""
    paid: Numbers
    """[n_layers, n_heads]: the mean attention paid to marked tokens. What is expected is this minus the mean of `own`."""


class SamePositions:
    """Attention to the marked tokens of prompts, compared with a pool of prompts from the same position to the same position.

    Compared are pairs (query, key) of positions whose key is marked in a prompt, and is another word in at least one prompt of the pool that
    reaches the query. Only queries that see both marked and other tokens count. The mean is over the queries of a prompt, then over prompts.

    marks: of each prompt. pool: of each prompt of the pool; None: the pool are the prompts themselves, those that have such pairs.
    """

    def __init__(self, marks: Sequence[Marks], pool: Sequence[Marks] | None, n_layers: int, n_heads: int) -> None:
        width = max(map(len, marks))
        self._marks = [np.asarray(each, bool) for each in marks]
        others = None if pool is None else [np.asarray(each, bool) for each in pool]
        self.own = [number for number, each in enumerate(self._marks) if each.any()]
        """Which prompts have marked tokens that can be compared."""
        while True:  # a prompt that is left out no longer tells what is expected of the others
            self._pool = [self._marks[number] for number in self.own] if others is None else others
            self._counts = sum((_free(each, width) for each in self._pool), np.zeros((width, width)))
            before, self.own = self.own, [number for number in self.own if self._pairs(number).any()]
            if others is not None or self.own == before:
                break
        self._weights = sum((self._share(number) for number in self.own), np.zeros((width, width)))
        self._weights /= np.maximum(self._counts, 1) * max(1, len(self.own))
        shape = (n_layers, n_heads)
        self._table = np.zeros((*shape, width, width))  # sums over the pool
        self._paid, self._gave = np.zeros((len(self.own), *shape)), np.zeros((len(self._pool), *shape))
        self._place = {number: place for place, number in enumerate(self.own)}
        self._is_own_pool = pool is None

    def add(self, number: int, layer: int, pattern: Any) -> None:
        """A prompt's pattern of one layer: [n_heads, query_pos, key_pos]. number: which of the prompts it is."""
        if number not in self._place:
            return
        place = self._place[number]
        share = self._share(number)[: pattern.shape[1], : pattern.shape[2]]
        self._paid[place, layer] = np.einsum("hqk,qk->h", pattern, share)
        if self._is_own_pool:
            self.add_pool(place, layer, pattern)

    def add_pool(self, number: int, layer: int, pattern: Any) -> None:
        """The same, of a prompt of the pool."""
        n_queries, n_keys = min(pattern.shape[1], len(self._counts)), min(pattern.shape[2], len(self._counts))
        free = _free(self._pool[number], len(self._counts))[:n_queries, :n_keys]
        free_pattern = np.asarray(pattern, np.float64)[:, :n_queries, :n_keys] * free
        self._table[layer, :, :n_queries, :n_keys] += free_pattern
        self._gave[number, layer] = np.einsum("hqk,qk->h", free_pattern, self._weights[:n_queries, :n_keys])

    def result(self) -> Compared:
        """What was compared, when all patterns were added."""
        width, n = len(self._counts), len(self._pool)
        expected = self._table / np.maximum(self._counts, 1)
        shares = np.array([self._share(number) for number in self.own]).reshape(-1, width, width)
        raised = np.array([_free(each, width) * self._weights for each in self._pool]).reshape(-1, width, width)
        own = self._paid - np.einsum("nqk,lhqk->nlh", shares, expected, optimize=True)
        pool = n * (self._gave - np.einsum("nqk,lhqk->nlh", raised, expected, optimize=True))
        paid = self._paid.mean(0) if self.own else np.full(self._paid.shape[1:], np.nan)
        return Compared(own, pool, paid)

    def _pairs(self, number: int) -> NDArray[np.bool_]:
        """[query, key]: the pairs of one prompt that are compared."""
        marks, width = self._marks[number], len(self._counts)
        n_marked = marks.cumsum()
        sees_both = (n_marked > 0) & (n_marked < np.arange(1, len(marks) + 1))
        pairs = np.zeros((width, width), bool)
        pairs[: len(marks), : len(marks)] = np.tril(sees_both[:, None] & marks[None, :])
        return pairs & (self._counts > 0)

    def _share(self, number: int) -> Numbers:
        """[query, key]: the weight of each pair in the prompt's mean over queries."""
        pairs = self._pairs(number)
        share: Numbers = pairs / max(1, pairs.any(1).sum())
        return share


def _free(marks: NDArray[np.bool_], width: int) -> Numbers:
    """[query, key], width each: 1 where the key is seen and not marked."""
    free = np.zeros((width, width))
    n = min(width, len(marks))
    free[:n, :n] = np.tril(np.broadcast_to(~marks[:n], (n, n)))
    return free


def at_same_positions(one: Sequence[Any], other: Sequence[Any]) -> tuple[Numbers, Numbers, int]:
    """Each prompt's mean over the positions that prompts of both groups have, as if all had the same positions: [n, width] for each group.

    one, other: [pos, width] of each prompt. Of each value, the mean over all prompts at its position is taken off, and the mean over these
    positions is put in its place. The third result is how many positions both groups have.
    """
    groups = [[np.asarray(each, np.float64) for each in group] for group in (one, other)]
    n_positions = min(max(map(len, group)) for group in groups)
    every = [each[:n_positions] for group in groups for each in group]
    sums, counts = np.zeros((n_positions, every[0].shape[1])), np.zeros((n_positions, 1))
    for each in every:
        sums[: len(each)] += each
        counts[: len(each)] += 1
    usual = sums / counts
    adjusted = [
        np.stack([(each[:n_positions] - usual[: len(each[:n_positions])]).mean(0) for each in group])
        for group in groups
    ]
    return adjusted[0] + usual.mean(0), adjusted[1] + usual.mean(0), n_positions
