"""The kept rows of a walk over a prefix tree, cut where sequences part, so that rows of a shared path are stored once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from AutomaticEval.capture.tree.prefix_tree import Array, PrefixTree
from AutomaticEval.capture.tree.walk import Stretch
from AutomaticEval.capture.vocabulary import token_strings
from AutomaticEval.errors import CaptureError
from AutomaticEval.samples import Part, Rows


class WalkRows:
    """The kept rows of a walk, in blocks, as far as a sequence may still ask for them.

    A block ends where a path parts from another one or a forward ends, so that a sequence has all rows of a block or the first ones.
    """

    def __init__(self, tree: PrefixTree, bounds: Array, kept: Array, tokenizer: Any) -> None:
        """bounds: [n_stretches + 1], the nodes at which forwards begin. kept: [n_nodes], bool."""
        begins = tree.forks.copy()
        begins[bounds[:-1]] = True
        self._tree, self._kept, self._tokenizer = tree, kept, tokenizer
        self._begins = np.flatnonzero(begins)
        self._n_kept_before = np.cumsum(kept) - kept  # [n_nodes]
        self._blocks: dict[int, Rows] = {}
        """First node of a block -> its rows, ascending."""
        self._starts = np.empty(0, np.int64)
        """[n_blocks], the keys of the blocks."""
        self._none: Rows | None = None

    def take(self, stretch: Stretch) -> None:
        """Take the rows of one forward, which have arrived or are waited for. Raises CaptureError when it was fed other tokens than the tree's."""
        assert stretch.recording is not None
        assert stretch.was_fed is not None
        start, stop, tree = stretch.start, stretch.stop, self._tree
        if not bool(stretch.was_fed):
            raise CaptureError(
                f"the model was fed other tokens than the {stop - start} of the tree. Nothing was stored."
            )
        self._none = self._none or Rows([], [], [], stretch.recording.take(0, []))
        nodes = start + np.flatnonzero(self._kept[start:stop])
        ids, positions = tree.token_ids[nodes].tolist(), tree.depths[nodes].tolist()
        strings = token_strings(self._tokenizer, ids)
        begins = self._begins[slice(*np.searchsorted(self._begins, (start + 1, stop)))]
        begins = np.insert(begins, 0, start)
        cuts = np.append(np.searchsorted(nodes, begins), len(nodes)).tolist()
        sizes = np.diff(cuts).tolist()
        rows = {
            key: each.split_with_sizes(sizes)
            for key, each in stretch.recording.take(0, (nodes - start).tolist()).items()
        }
        for number, (first, last) in enumerate(pairwise(cuts)):
            if first < last:
                own = {key: each[number] for key, each in rows.items()}
                block = Rows(ids[first:last], strings[first:last], positions[first:last], own)
                self._blocks[int(begins[number])] = block
        self._starts = np.array(list(self._blocks), np.int64)

    def parts(self, nodes: Array) -> list[Part]:
        """Where the rows of these nodes are. nodes: kept nodes of one path, ascending."""
        assert self._none is not None
        if not len(nodes):
            return [Part(self._none, [])]
        owner = np.searchsorted(self._starts, nodes, side="right") - 1
        cuts = [0, *(np.flatnonzero(owner[1:] != owner[:-1]) + 1).tolist(), len(nodes)]
        parts = []
        for first, last in pairwise(cuts):
            start = int(self._starts[owner[first]])
            where = self._n_kept_before[nodes[first:last]] - self._n_kept_before[start]
            parts.append(Part(self._blocks[start], _numbers(where)))
        return parts

    def forget(self, stop: int) -> None:
        """Drop the blocks that are not on the path to the stretch that begins at node `stop`."""
        ends = self._tree.ends
        self._blocks = {start: rows for start, rows in self._blocks.items() if ends[start] > stop}
        self._starts = np.array(list(self._blocks), np.int64)


def _numbers(where: Array) -> Sequence[int]:
    """Ascending numbers, as a range where they follow each other."""
    first, last = int(where[0]), int(where[-1])
    return range(first, last + 1) if last - first == len(where) - 1 else where.tolist()
