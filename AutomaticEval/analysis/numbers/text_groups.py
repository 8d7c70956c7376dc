"""Means of groups of texts, which say how much a mean over all texts would change with other texts; and a fingerprint of the texts.

Neither depends on the order of the texts, on batches or on padding. Memory does not grow with the number of texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from AutomaticEval.analysis.numbers.skewed_t import Array

N_GROUPS = 20


class TextGroups:
    """The sum of each column over the tokens of each group of texts. A text's group is drawn by a hash of its tokens.

    width: the number of columns of each layer. n_texts: the texts added so far.
    """

    def __init__(self, width: int, layers: Sequence[int]) -> None:
        self._sums: dict[int, Array] = {layer: np.zeros((N_GROUPS, width)) for layer in layers}
        self._n_tokens: Array = np.zeros(N_GROUPS)
        self._hashes = 0
        self.n_texts = 0

    def add_texts(self, texts: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """Count texts, given as token ids. Returns the group of each token, text after text."""
        groups = []
        for ids in texts:
            number = xxhash.xxh3_64_intdigest(np.asarray(ids, np.int64).tobytes())
            self._hashes = (self._hashes + number) % 2**64
            self.n_texts += 1
            groups += [number % N_GROUPS] * len(ids)
        of_tokens: NDArray[np.int64] = np.asarray(groups, np.int64)
        self._n_tokens += np.bincount(of_tokens, minlength=N_GROUPS)
        return of_tokens

    def add(self, layer: int, of_tokens: Any, rows: Any) -> None:
        """Add rows [n, width] of a layer. of_tokens: the group of each, as `add_texts` gives it."""
        is_in = np.arange(N_GROUPS)[:, None] == of_tokens  # [groups, n]
        self._sums[layer] += is_in.astype(np.float64) @ np.asarray(rows, np.float64)

    @property
    def fingerprint(self) -> str:
        """The same for the same texts in any order, 16 hex digits."""
        return f"{self._hashes:016x}"

    @property
    def n_tokens(self) -> list[int]:
        """The tokens of each group that has any."""
        return [int(n) for n in self._n_tokens if n]

    def means(self, layer: int) -> Array:
        """[groups that have any token, width]"""
        has_tokens = self._n_tokens > 0
        means: Array = self._sums[layer][has_tokens] / self._n_tokens[has_tokens, None]
        return means
