"""How alike two sets of rows are: cosines of their pairs, and linear CKA."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]


def cosines(one: Rows, other: Rows) -> Rows:
    """[n]: the cosine between each two rows; 0 where one of them is zero. one, other: [n, width]."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    products = (one * other).sum(axis=1)
    cosine: Rows = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    return cosine


def linear_cka(one: Rows, other: Rows) -> float | None:
    """Linear centred kernel alignment of two sets of at least four rows, with the unbiased estimate of HSIC. one: [n, width], other: [n, width_2].

    1 for rows that differ by a rotation, a scale and a shift; about 0 for unrelated rows, also for few of them, where it may be below 0.
    None when the rows of one set are all the same.
    Source: Kornblith et al. 2019; the estimate is that of Song et al. 2012, as in Nguyen et al. 2021.
    """
    kernels = [_kernel(centred(rows)) for rows in (one, other)]
    between, within, across = (_hsic(kernels[a], kernels[b]) for a, b in ((0, 1), (0, 0), (1, 1)))
    return between / (within * across) ** 0.5 if within > 0 and across > 0 else None


def centred(rows: Rows) -> Rows:
    """Rows [n, width] minus their mean. A column of one number becomes exactly 0, which rounding would not make it."""
    away: Rows = rows - rows.mean(axis=0)
    away[:, (rows == rows[:1]).all(axis=0)] = 0.0
    return away


def kernels_of(several: Iterator[Rows], n: int) -> Rows:
    """[n_sets, n * n]: the kernel of each set of n rows, for `cka_between`. The sets are read one after the other.

    n: the number of rows of each set.
    """
    kernels = [_kernel(centred(rows)).ravel() for rows in several]
    return np.stack(kernels) if kernels else np.empty((0, n * n))


def cka_between(one: Rows, other: Rows) -> Rows:
    """[n_one, n_other]: `linear_cka` of each set of one list with each of the other. NaN where the rows of a set are all the same.

    one, other: the kernels of the sets, of the same questions, as `kernels_of` gives them.
    """
    n = math.isqrt(one.shape[1])
    sums = [each.reshape(-1, n, n).sum(axis=1) for each in (one, other)]  # [n_sets, n]
    wholes = [each.sum(axis=1) for each in sums]
    across = _unbiased(one @ other.T, np.outer(*wholes), sums[0] @ sums[1].T, n)
    own = [
        _unbiased((kernel * kernel).sum(axis=1), whole * whole, (each * each).sum(axis=1), n)
        for kernel, whole, each in zip((one, other), wholes, sums, strict=True)
    ]
    sizes = np.sqrt(np.outer(*(np.where(each > 0, each, np.nan) for each in own)))
    found: Rows = across / sizes
    return found


def _unbiased(together: Any, wholes: Any, mixed: Any, n: int) -> Any:
    """`_hsic` from its three sums."""
    return (together + wholes / ((n - 1) * (n - 2)) - 2 * mixed / (n - 2)) / (n * (n - 3))


def _kernel(rows: Rows) -> Rows:
    """[n, n]: the products of all pairs of rows, without those of a row with itself."""
    kernel: Rows = rows @ rows.T
    np.fill_diagonal(kernel, 0.0)
    return kernel


def _hsic(one: Rows, other: Rows) -> float:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion. one, other: [n, n], with zeros on the diagonal."""
    n = len(one)
    return float(_unbiased((one * other).sum(), one.sum() * other.sum(), one.sum(axis=0) @ other.sum(axis=0), n))
