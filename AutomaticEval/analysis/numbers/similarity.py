"""How alike two sets of rows are: cosines of their pairs, and linear CKA."""

from __future__ import annotations

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
    kernels = [_kernel(rows - rows.mean(axis=0)) for rows in (one, other)]
    between, within, across = (_hsic(kernels[a], kernels[b]) for a, b in ((0, 1), (0, 0), (1, 1)))
    return between / (within * across) ** 0.5 if within > 0 and across > 0 else None


def _kernel(rows: Rows) -> Rows:
    """[n, n]: the products of all pairs of rows, without those of a row with itself."""
    kernel: Rows = rows @ rows.T
    np.fill_diagonal(kernel, 0.0)
    return kernel


def _hsic(one: Rows, other: Rows) -> float:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion. one, other: [n, n], with zeros on the diagonal."""
    n = len(one)
    together = (one * other).sum()
    apart = one.sum() * other.sum() / ((n - 1) * (n - 2))
    mixed = 2 * (one.sum(axis=0) @ other.sum(axis=0)) / (n - 2)
    return float((together + apart - mixed) / (n * (n - 3)))
