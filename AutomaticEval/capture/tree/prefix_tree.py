"""The prefix tree of many token sequences, laid out as one walk: every token once, depth first.

Sequences in sorted order make such a walk: each adds the tokens that it does not share with the one before it. The ancestors of the nodes
of any stretch of the walk are in the stretch itself, or on the one path that leads to its first node. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
    forks: Array
    """[n_nodes], bool: True where a node is not the child of the node before it, and where two paths part before it."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        members: dict[bytes, list[int]] = {}  # bytes of big-endian numbers sort as the numbers do
        for index, sequence in enumerate(sequences):
            members.setdefault(np.asarray(sequence, ">u4").tobytes(), []).append(index)
        self._branches: list[tuple[list[int], int, int]] = []
        own: list[Array] = []
        before, first = np.empty(0, np.int64), 0
        for key in sorted(members):
            tokens = np.frombuffer(key, ">u4").astype(np.int64)
            shared = n_shared(before, tokens)
            self._branches.append((members[key], shared, len(tokens)))
            own.append(tokens[shared:])
            before = tokens
        self.token_ids = np.concatenate(own) if own else before
        self.depths = np.concatenate([np.arange(shared, length) for _, shared, length in self._branches] or [before])
        self.parents = np.arange(-1, len(self.token_ids) - 1)
        self.forks = np.zeros(len(self.token_ids), dtype=bool)
        path = np.empty(max((length for *_, length in self._branches), default=0), np.int64)
        n_before = 0
        for _, shared, length in self._branches:
            if shared < n_before:
                self.forks[path[shared]] = True
            self.forks[first] = True
            self.parents[first] = path[shared - 1] if shared else -1
            path[shared:length] = np.arange(first, first + length - shared)
            first, n_before = first + length - shared, length

    @property
    def n_nodes(self) -> int:
        """The number of tokens of the walk."""
        return len(self.token_ids)

    def branches(self) -> Iterator[Branch]:
        """The distinct sequences, in the order of the walk."""
        path = np.empty(max((length for *_, length in self._branches), default=0), np.int64)
        first = 0
        for members, shared, length in self._branches:
            path[shared:length] = np.arange(first, first + length - shared)
            first += length - shared
            yield Branch(members, shared, path[:length])

    def marked(self, positions: Callable[[int], Sequence[int]]) -> Array:
        """[n_nodes], bool: True for the chosen tokens of each sequence. positions: the number of a sequence -> the positions to choose."""
        marked = np.zeros(self.n_nodes, dtype=bool)
        for branch in self.branches():
            for index in branch.members:
                marked[branch.path[list(positions(index))]] = True
        return marked

    def path_to(self, node: int) -> Array:
        """[depth], the nodes before a node on its path, the first token of the sequence first."""
        path = np.empty(self.depths[node], np.int64)
        for depth in range(len(path) - 1, -1, -1):
            node = int(self.parents[node])
            path[depth] = node
        return path

    def attended(self, start: int, stop: int) -> Array:
        """Which tokens each token of a stretch attends to: itself and its ancestors.

        Returns [stop - start, depth of start + stop - start], bool. The columns are the path to `start`, and then the stretch.
        """
        n_past, width = int(self.depths[start]), stop - start
        mask = np.zeros((width, n_past + width), dtype=bool)
        breaks = np.flatnonzero(self.parents[start + 1 : stop] != np.arange(start, stop - 1)) + 1
        for first, end in zip([0, *breaks], [*breaks, width], strict=True):
            parent = int(self.parents[start + first]) - start
            if parent >= 0:
                mask[first:end] = mask[parent]
            else:
                mask[first:end, : self.depths[start + first]] = True
            mask[first:end, n_past + first : n_past + end] = np.tri(end - first, dtype=bool)
        return mask


def n_shared(first: Sequence[int] | Array, second: Sequence[int] | Array) -> int:
    """The number of tokens with which both sequences begin."""
    length = min(len(first), len(second))
    differ = np.asarray(first[:length]) != np.asarray(second[:length])
    return int(differ.argmax()) if differ.any() else length
