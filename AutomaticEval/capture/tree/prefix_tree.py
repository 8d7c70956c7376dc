"""The prefix tree of many token sequences, laid out as one walk: every token once, depth first.

Sequences in sorted order make such a walk: each adds the tokens that it does not share with the one before it. The ancestors of the nodes
of any stretch of the walk are in the stretch itself, or on the one path that leads to its first node. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class Branch(NamedTuple):
    """One distinct sequence."""

    members: list[int]
    """The numbers of the given sequences that it stands for: equal sequences are one branch."""

    shared: int
    """How many tokens it shares with the branch before it. Its other tokens are new."""

    path: Array
    """[length], the node of each of its tokens. The next branch overwrites it."""


class PrefixTree:
    """The prefix tree of sequences of token ids, of at least one token each. A node is the number of a token in the walk."""

    token_ids: Array
    """[n_nodes]"""
    depths: Array
    """[n_nodes], the position of each token in its sequence."""
    parents: Array
    """[n_nodes], the node before each on its path; -1 for the first token of a sequence."""
    ends: Array
    """[n_nodes], the first node after each that is no descendant of it: node a is an ancestor of node b when a < b < ends[a]."""
    forks: Array
    """[n_nodes], bool: True where a node is not the child of the node before it, and where two paths part before it."""
    branch_of: Array
    """[n_sequences], the number of each sequence's branch."""
    lengths: Array
    """[n_branches], the tokens of each branch."""
    last: Array
    """[n_branches], the last node of each branch: ascending."""

    def __init__(self, sequences: Iterable[Sequence[int] | Array]) -> None:
        members: dict[bytes, list[int]] = {}  # bytes of big-endian numbers sort as the numbers do
        for index, sequence in enumerate(sequences):
            members.setdefault(np.asarray(sequence, ">u4").tobytes(), []).append(index)
        keys = sorted(members)
        self._members = [members[key] for key in keys]
        self.branch_of = np.empty(sum(map(len, self._members)), np.int64)
        for number, each in enumerate(self._members):
            self.branch_of[each] = number
        tokens = [np.frombuffer(key, ">u4") for key in keys]
        self.lengths = np.array([len(each) for each in tokens], np.int64)
        self._shared = np.array([0, *(n_shared(*pair) for pair in pairwise(tokens))][: len(tokens)], np.int64)
        own = [each[shared:] for each, shared in zip(tokens, self._shared, strict=True)]
        self.token_ids = np.concatenate([np.empty(0, np.int64), *own], dtype=np.int64)
        n_own = self.lengths - self._shared
        self.last = np.cumsum(n_own) - 1
        self._first = self.last + 1 - n_own
        self.depths = np.arange(self.n_nodes) + np.repeat(self._shared - self._first, n_own)
        self._join()

    def _join(self) -> None:
        """Find the parents, the ends and the forks of the nodes."""
        self.parents = np.arange(-1, self.n_nodes - 1)
        self.ends = np.empty(self.n_nodes, np.int64)
        self.forks = np.zeros(self.n_nodes, dtype=bool)
        path = np.empty(self.lengths.max(initial=0), np.int64)
        n_before = 0
        for first, shared, length in self._spans():
            if shared < n_before:
                self.forks[path[shared]] = True
            self.ends[path[shared:n_before]] = first
            self.parents[first] = path[shared - 1] if shared else -1
            path[shared:length] = np.arange(first, first + length - shared)
            n_before = length
        self.ends[path[:n_before]] = self.n_nodes
        self.forks[self._first] = True

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        """For each branch: its first own node, how many tokens it shares, and how many it has."""
        return zip(self._first.tolist(), self._shared.tolist(), self.lengths.tolist(), strict=True)

    @property
    def n_nodes(self) -> int:
        """The number of tokens of the walk."""
        return len(self.token_ids)

    def branches(self) -> Iterator[Branch]:
        """The distinct sequences, in the order of the walk."""
        path = np.empty(self.lengths.max(initial=0), np.int64)
        for members, (first, shared, length) in zip(self._members, self._spans(), strict=True):
            path[shared:length] = np.arange(first, first + length - shared)
            yield Branch(members, shared, path[:length])

    def marked(self, positions: Callable[[int], Sequence[int]]) -> Array:
        """[n_nodes], bool: True for the chosen tokens of each sequence. positions: the number of a sequence -> the positions to choose."""
        marked = np.zeros(self.n_nodes, dtype=bool)
        for branch in self.branches():
            for index in branch.members:
                marked[chosen(branch.path, positions(index))] = True
        return marked

    def leading_to(self, nodes: Array) -> Array:
        """[n_nodes], bool: True for these nodes and their ancestors."""
        is_one = np.zeros(self.n_nodes + 1, np.int64)
        is_one[nodes] = 1
        before = np.cumsum(is_one) - is_one  # how many of the nodes come before each
        leads: Array = before[self.ends] > before[:-1]
        return leads

    def path_to(self, node: int) -> Array:
        """[depth], the nodes before a node on its path, the first token of the sequence first."""
        path = np.empty(self.depths[node], np.int64)
        left = len(path)
        while left:
            node = int(self.parents[node])
            first = int(self._first[np.searchsorted(self._first, node, side="right") - 1])
            n_run = node - first + 1
            path[left - n_run : left] = np.arange(first, node + 1)
            node, left = first, left - n_run
        return path


def chosen(path: Array, positions: Sequence[int]) -> Array:
    """Some elements of a path."""
    if isinstance(positions, range):
        return path[positions.start : positions.stop : positions.step]
    return path[list(positions)]


def n_shared(first: Sequence[int] | Array, second: Sequence[int] | Array) -> int:
    """The number of tokens with which both sequences begin."""
    length = min(len(first), len(second))
    differ = np.asarray(first[:length]) != np.asarray(second[:length])
    return int(differ.argmax()) if differ.any() else length
