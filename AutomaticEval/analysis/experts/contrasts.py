"""Groups of questions against others, layer by layer: differences with intervals, and p values by permutation over all layers together.

Questions are the unit: what is permuted are labels of questions, whatever number of tokens they have. Memory holds one layer, and a few
numbers for each group and column of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from AutomaticEval.analysis.numbers.two_groups import mean_differences
from AutomaticEval.analysis.result import Effect

Array = np.ndarray[Any, Any]
FEWEST = 2
"""The fewest questions in a group, and outside of it."""
_AS_LARGE = 1 - 1e-9
"""A permutation can be the true labels: rounding must not make its square the smaller one."""


@dataclass(frozen=True)
class Group:
    """Some questions against some others."""

    name: str
    is_in: Array
    """[n_questions], bool"""

    is_known: Array
    """[n_questions], bool: the questions that are in or outside. The others do not count."""

    @property
    def n_in(self) -> int:
        return int((self.is_in & self.is_known).sum())

    @property
    def n_out(self) -> int:
        return int((~self.is_in & self.is_known).sum())

    @property
    def is_large_enough(self) -> bool:
        return min(self.n_in, self.n_out) >= FEWEST


@dataclass
class Contrasts:
    """Compares groups in the columns of one layer after the other.

    strata: [n_questions], int: labels are permuted among questions of the same number. Values are measured from the mean of their stratum.
    """

    groups: list[Group]
    strata: Array
    n_permutations: int
    seed: int
    _largest: Array = field(init=False, repr=False)
    """[n_permutations]: the largest square over all groups and columns so far."""
    _own: list[Array] = field(default_factory=list, init=False, repr=False)
    """Of each layer: [n_groups, width]."""
    _differences: list[list[list[Any]]] = field(default_factory=list, init=False, repr=False)
    """Of each layer, group by group: an Estimate for each column."""

    def __post_init__(self) -> None:
        self.groups = [group for group in self.groups if group.is_large_enough]
        self._largest = np.zeros(self.n_permutations)

    @property
    def n_comparisons(self) -> int:
        """Groups times columns, over all layers so far."""
        return sum(own.size for own in self._own)

    def add(self, values: Array) -> None:
        """Compare the columns of one more layer. values: [n_questions, width]."""
        if not self.groups:
            return
        labels = csr_matrix(np.stack([group.is_in & group.is_known for group in self.groups]).astype(np.float64))
        centred, variance = self._measured(values)
        self._own.append(_squares(labels, centred, variance))
        for number, order in enumerate(self._orders()):
            permuted = csr_matrix((labels.data, order[labels.indices], labels.indptr), labels.shape)
            largest = _squares(permuted, centred, variance).max()
            self._largest[number] = max(self._largest[number], largest)
        of_layer = []
        for group in self.groups:
            inside, outside = group.is_in & group.is_known, ~group.is_in & group.is_known
            of_layer.append(mean_differences(centred[inside], centred[outside]))
        self._differences.append(of_layer)

    def _measured(self, values: Array) -> tuple[Array, Array]:
        """The values from the mean of their stratum; and [n_groups, width], the variance of a group's sum of them when labels are permuted.

        A question that counts for no group has zeros.
        """
        centred = np.zeros_like(values)
        variance = np.zeros((len(self.groups), values.shape[1]))
        known = np.logical_or.reduce([group.is_known for group in self.groups])
        for stratum in np.unique(self.strata[known]):
            here = (self.strata == stratum) & known
            centred[here] = values[here] - values[here].mean(0)
            centred[here] *= np.abs(centred[here]).max(0) > 1e-12  # rounding of columns of one number
            squares = (centred[here] ** 2).mean(0)
            for number, group in enumerate(self.groups):
                n, n_in = int(here.sum()), int((group.is_in & here & group.is_known).sum())
                if (group.is_known & here).any():
                    variance[number] += n_in * (n - n_in) / max(1, n - 1) * squares
        return centred, variance

    def _orders(self) -> Iterator[Array]:
        """The same permutations for each layer: [n_questions], each among the questions of a stratum."""
        source = np.random.default_rng(self.seed)
        known = np.logical_or.reduce([group.is_known for group in self.groups])
        members = [np.flatnonzero((self.strata == stratum) & known) for stratum in np.unique(self.strata[known])]
        for _ in range(self.n_permutations):
            order = np.arange(len(self.strata))
            for own in members:
                order[own] = source.permutation(own)
            yield order

    def effects(self) -> list[list[list[Effect]]]:
        """Group by group, layer by layer: an Effect for each column, whose mean is that of the group minus that of the others."""
        found: list[list[list[Effect]]] = [[] for _ in self.groups]
        ordered = np.sort(self._largest)
        for own, of_layer in zip(self._own, self._differences, strict=True):
            n_as_large = len(ordered) - np.searchsorted(ordered, own * _AS_LARGE - 1e-12)
            p = (1 + n_as_large) / (1 + len(ordered))
            for number, estimates in enumerate(of_layer):
                effects = [
                    Effect(each.mean, each.interval, each.n, reason=each.reason, p=float(chance))
                    for each, chance in zip(estimates, p[number], strict=True)
                ]
                found[number].append(effects)
        return found


def _squares(labels: Any, centred: Array, variance: Array) -> Array:
    """[n_groups, width]: the squares of the groups' sums, in units of their variance under permutation. labels: [n_groups, n_questions], sparse."""
    sums = labels @ centred
    squares: Array = np.divide(sums**2, variance, out=np.zeros_like(sums), where=variance > 0)
    return squares
