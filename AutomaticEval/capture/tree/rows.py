"""The kept rows of a walk over a prefix tree, cut where sequences part, so that rows of a shared path are stored once."""

from __future__ import annotations

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
        self._starts = np.append(np.flatnonzero(begins), tree.n_nodes)
        self._n_kept_before = np.cumsum(kept) - kept  # [n_nodes]
        self._blocks: dict[int, Rows] = {}
        self._none: Rows | None = None

    def take(self, stretch: Stretch) -> None:
        """Take the rows of one forward. Raises CaptureError when it was fed other tokens than the tree's."""
        assert stretch.recording is not None
        fed = self._tree.token_ids[stretch.start : stretch.stop].tolist()
        if stretch.recording.fed(0) != fed:
            raise CaptureError(f"the model was fed other tokens than the {len(fed)} of the tree. Nothing was stored.")
        first = int(np.searchsorted(self._starts, stretch.start, side="right")) - 1
        self._none = self._none or Rows([], [], [], stretch.recording.take(0, []))
        for number in range(first, len(self._starts) - 1):
            start = max(int(self._starts[number]), stretch.start)
            stop = min(int(self._starts[number + 1]), stretch.stop)
            if start >= stretch.stop:
                break
            nodes = np.arange(start, stop)[self._kept[start:stop]]
            if not len(nodes):
                continue
            ids = self._tree.token_ids[nodes].tolist()
            rows = stretch.recording.take(0, (nodes - stretch.start).tolist())
            positions = self._tree.depths[nodes].tolist()
            self._blocks[start] = Rows(ids, token_strings(self._tokenizer, ids), positions, rows)

    def parts(self, nodes: Array) -> list[Part]:
        """Where the rows of these nodes are. nodes: kept nodes of one path, ascending."""
        assert self._none is not None
        parts: list[Part] = []
        starts = np.array(sorted(self._blocks), np.int64)
        owner = np.searchsorted(starts, nodes, side="right") - 1
        for number in np.unique(owner).tolist():
            start = int(starts[number])
            where = self._n_kept_before[nodes[owner == number]] - self._n_kept_before[start]
            parts.append(Part(self._blocks[start], where.tolist()))
        return parts or [Part(self._none, [])]

    def forget(self, stop: int) -> None:
        """Drop the blocks that are not on the path to the stretch that begins at node `stop`."""
        path = set(self._tree.path_to(stop).tolist()) if stop < self._tree.n_nodes else set()
        self._blocks = {start: rows for start, rows in self._blocks.items() if start in path}
