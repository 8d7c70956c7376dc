"""How far stored rows may differ from rows that were computed again, and whether they differ more than rounding explains.

Knows nothing of models, of runs, or of where the rows come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Limits(NamedTuple):
    """The differences that rounding explains."""

    largest: float
    """The largest difference of a number, as a part of the largest number in its row."""

    mean: float
    """The largest mean difference of a row, as a part of the mean size of its numbers. Here a few huge numbers in a row hide nothing."""

    median: float
    """The largest median, over the rows of a key, of their mean differences. A wrong layer changes it; a single chaotic row does not."""

    score: float
    """How far apart two logits may be to count as a tie, as a part of 1 + the largest logit. For the log-probability l of a token, |l| is added."""


LIMITS = {
    torch.float64: Limits(5e-5, 5e-5, 1e-5, 1e-5),
    torch.float32: Limits(5e-5, 5e-5, 1e-5, 1e-5),
    torch.float16: Limits(4e-2, 2e-2, 5e-3, 5e-3),
    torch.bfloat16: Limits(2e-1, 1.3e-1, 3e-2, 2e-2),
}
"""By the dtype of the model. `docs/verify.md` has the differences that were measured in honest runs."""
IN_8_BITS = Limits(2e-1, 1.3e-1, 6e-2, 2e-2)
"""For LLM.int8, which rounds the inputs of projections depending on what else is in the batch."""
FEWEST_ROWS = 8
"""The fewest rows of a key whose median is judged."""
NEARER = 4
"""A row is taken for another one when it is so many times nearer to that one."""
NARROWER = {
    torch.float64: (torch.bfloat16, torch.float16, torch.float32),
    torch.float32: (torch.bfloat16, torch.float16),
    torch.float16: (torch.bfloat16,),
}
"""The dtypes with fewer bits than each, the fewest bits first."""


class Measured(NamedTuple):
    """How some rows of one key differ from what they should be."""

    is_equal: bool
    """Whether every bit is equal. For int8: whether storing the right rows in the same steps gives the same numbers."""

    off: Tensor
    """[n], the largest difference in each row, beyond what narrowing the numbers for storage explains."""

    size: Tensor
    """[n], the largest number in each row."""

    mean_off: Tensor
    mean_size: Tensor
    """[n], the mean difference in each row, and the mean size of its numbers."""

    nearer: Mapping[str, Tensor]
    """Name of another row -> [n], bool: whether each stored row is much nearer to that row than to its own."""

    @property
    def parts(self) -> Tensor:
        """[n], the largest difference of each row, as a part of its largest number."""
        return _parts(self.off, self.size)


class Judged(NamedTuple):
    """The verdict on all rows of one key."""

    measured: Measured
    wrong: Tensor
    """[n], bool: the rows whose differences rounding does not explain."""
    median: float
    """The median over the rows of their mean differences, as parts of their mean sizes. 0 for fewer than FEWEST_ROWS rows."""


def measured(
    stored: Tensor,
    right: Tensor,
    *,
    steps: Tensor | None = None,
    through: torch.dtype | None = None,
    others: Mapping[str, Tensor] = {},
    sizes: Tensor | None = None,
) -> Measured:
    """How stored rows [n, width] differ from the right rows [n, width], which have the dtype in which they were computed.

    steps: [n, width], the size of one step of each int8 number; None for stored floats. through: a dtype in which the rows were stored
    before. others: name -> other rows [n, width] that may have been stored by mistake, such as those of the neighbours.
    sizes: [n, width], what counts as the size of each number; None takes the right numbers themselves.
    """
    wanted, slack = _as_stored(stored, right, steps, through)
    is_same = (stored == wanted) | (stored.isnan() & wanted.isnan())
    actual, expected = stored.double(), wanted.double()
    beyond_slack = ((actual - expected).abs() - slack).clamp(min=0)
    off = torch.where(is_same, 0, beyond_slack).nan_to_num(nan=torch.inf)  # [n, width]
    size = torch.where(expected.isfinite(), expected.abs() if sizes is None else sizes, 0)
    nearer = {name: _is_nearer(actual, expected, other.double()) for name, other in others.items()}
    is_equal = bool(is_same.all()) if steps is None else bool((stored / steps).round().equal(_in_steps(right, steps)))
    return Measured(is_equal, off.amax(1), size.amax(1), off.mean(1), size.mean(1), nearer)


def judged(blocks: Sequence[Measured], limits: Limits) -> Judged:
    """The verdict on all rows of a key, which were measured in blocks."""
    whole = Measured(
        all(each.is_equal for each in blocks),
        torch.cat([each.off for each in blocks]),
        torch.cat([each.size for each in blocks]),
        torch.cat([each.mean_off for each in blocks]),
        torch.cat([each.mean_size for each in blocks]),
        {name: torch.cat([each.nearer[name] for each in blocks]) for name in blocks[0].nearer},
    )
    means = _parts(whole.mean_off, whole.mean_size)
    median = float(means.median()) if len(means) >= FEWEST_ROWS else 0.0
    wrong = (whole.off > limits.largest * whole.size) | (whole.mean_off > limits.mean * whole.mean_size)
    for is_nearer in whole.nearer.values():
        wrong = wrong | is_nearer
    if median > limits.median:
        wrong = wrong | (means > limits.median)
    return Judged(whole, wrong, median)


def ids_judged(stored: Tensor, right: Tensor, limits: Limits) -> Judged:
    """The verdict on rows of ids [n, n_active]. An id has no size: a row is the same or another one.

    Where two experts are nearly equal, rounding decides which is chosen. So rows may be others as often as a number may be off on average.
    """
    other = (stored != right).any(1)
    none = torch.zeros(len(stored), dtype=torch.float64)
    measured = Measured(not bool(other.any()), none, none, none, none, {})
    too_many = bool(other.any()) and float(other.double().mean()) > limits.mean
    return Judged(measured, other & too_many, 0.0)


def _parts(off: Tensor, size: Tensor) -> Tensor:
    return torch.where(off == 0, 0, off / size.clamp(min=torch.finfo(size.dtype).tiny))


def _as_stored(
    stored: Tensor, right: Tensor, steps: Tensor | None, through: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The right rows as they would be stored, and how far from that a stored number may be because it was rounded the other way."""
    if steps is not None:
        return right.float(), steps.double() / 2 * (1 + 1e-5)
    wanted, slack = right, torch.zeros(right.shape, dtype=torch.float64)
    for dtype in (through or stored.dtype, stored.dtype):
        if torch.promote_types(dtype, wanted.dtype) != dtype:  # the dtype cannot hold all of these numbers
            grain = torch.finfo(dtype)
            slack += grain.eps * (wanted.double().abs().nan_to_num(posinf=0) + grain.smallest_normal)
        wanted = wanted.to(dtype)
    return wanted, slack


def _in_steps(right: Tensor, steps: Tensor) -> Tensor:
    return (right.float() / steps).round().clamp(-127, 127)


def _is_nearer(stored: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """[n], bool: whether each stored row is much nearer to another row than to its own."""
    return (stored - other).abs().mean(1) * NEARER < (stored - own).abs().mean(1)


def head_elsewhere(stored: Tensor, right: Tensor, n_heads: int) -> tuple[int, int] | None:
    """The first head whose stored values are, over all rows, much nearer to those of another head; and that other head.

    stored, right: [n, n_heads * d_head]. None when there is no such head, or fewer than FEWEST_ROWS rows.
    """
    if len(stored) < FEWEST_ROWS:
        return None
    actual, expected = (each.double().unflatten(1, (n_heads, -1)) for each in (stored, right))  # type: ignore[no-untyped-call]
    own = (actual - expected).abs().sum((0, 2))  # [n_heads]
    for step in range(1, n_heads):
        other = (actual - expected.roll(step, 1)).abs().sum((0, 2))
        for head in (other * NEARER < own).nonzero()[:, 0].tolist():
            return head, (head - step) % n_heads
    return None


def narrowed_to(stored: Tensor, right: Tensor) -> torch.dtype | None:
    """A narrower dtype that holds every stored number but not the right ones: the stored numbers once passed through it. None without one."""
    for dtype in NARROWER.get(stored.dtype, ()):
        if _is_held(stored, dtype) and not _is_held(right, dtype):
            return dtype
    return None


def _is_held(numbers: Tensor, dtype: torch.dtype) -> bool:
    return bool((numbers.to(dtype).to(numbers.dtype) == numbers).all())


class RecomputedScore(NamedTuple):
    """A score that was computed again from logits, and how far rounding may move the stored one from it."""

    logprob: float
    """The log-likelihood that the logits give, in nats."""
    slack: float
    """How far the stored score may be from it."""
    is_surely_greedy: bool
    """Whether each token is the likeliest by more than rounding explains."""
    not_likeliest: Sequence[int]
    """The numbers of the tokens that are behind the likeliest by more than rounding explains."""
    of_tokens: Tensor
    """[n], float64: the log-probability of each token; of_tokens.sum() is `logprob`."""
    slack_of_tokens: Tensor
    """[n], float64: how far each stored one may be from it."""


def score_of(logits: Tensor, tokens: Sequence[int], limits: Limits) -> RecomputedScore:
    """The score of n tokens. logits: [n, d_vocab], float32; each row is that before its token."""
    at = torch.arange(len(tokens)), torch.tensor(list(tokens), dtype=torch.long)
    slack = limits.score * (1 + logits.abs().amax(1)).double()  # [n]
    others = logits.clone()
    others[at] = -torch.inf
    ahead = (
        logits[at] - others.amax(1)
    ).double()  # [n], how far each token is ahead of the likeliest other one; below 0: behind it
    logprobs = torch.log_softmax(logits.double(), -1)[at]
    behind = (ahead < -slack).nonzero()[:, 0].tolist()
    slacks = slack + limits.score * logprobs.abs()
    return RecomputedScore(
        float(logprobs.sum()), float(slacks.sum()), bool((ahead > slack).all()), behind, logprobs, slacks
    )
