"""How far rows may be from the same rows computed again, and whether they are: what rounding explains, and what it does not.

Knows nothing of models, of runs, or of where rows come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Limits(NamedTuple):
    """What rounding explains."""

    largest: float
    """The largest difference of one number, as a part of the largest number in its row."""

    mean: float
    """The largest mean difference of a row, as a part of the mean size of its numbers. A few huge numbers in a row hide nothing here."""

    median: float
    """The largest median, over a key's rows, of their mean differences. A wrong layer moves it, a single chaotic row does not."""

    score: float
    """How far apart two logits may be to count as a tie, as a part of 1 + the largest logit. For a token's log-likelihood l, |l| is added to that."""


LIMITS = {
    torch.float64: Limits(5e-5, 5e-5, 1e-5, 1e-5),
    torch.float32: Limits(5e-5, 5e-5, 1e-5, 1e-5),
    torch.float16: Limits(4e-2, 2e-2, 5e-3, 5e-3),
    torch.bfloat16: Limits(2e-1, 1.3e-1, 3e-2, 2e-2),
}
"""By the model's dtype. `docs/verify.md` has what honest runs were measured to give."""
IN_8_BITS = Limits(2e-1, 1.3e-1, 6e-2, 2e-2)
"""LLM.int8 rounds what a projection is given, by what else is in the batch."""
FEWEST_ROWS = 8
"""Rows that a key must have for its median to be judged."""
NEARER = 4
"""A row is another's when it is so many times nearer to that one."""
NARROWER = {
    torch.float64: (torch.bfloat16, torch.float16, torch.float32),
    torch.float32: (torch.bfloat16, torch.float16),
    torch.float16: (torch.bfloat16,),
}
"""The dtypes with fewer bits, the fewest first."""


class Measured(NamedTuple):
    """Some rows of one key, beside what they should be."""

    is_equal: bool
    """Bit for bit; of int8, whether storing the right rows in the same steps gives the same numbers."""

    off: Tensor
    """[n], the largest difference in each row, beyond what the narrower numbers that were stored explain."""

    size: Tensor
    """[n], the largest number in each row."""

    mean_off: Tensor
    mean_size: Tensor
    """[n], the same on average over each row."""

    nearer: Mapping[str, Tensor]
    """Name of another row -> [n], bool: which rows are much nearer to that than to their own."""

    @property
    def parts(self) -> Tensor:
        """[n], each row's largest difference as a part of its largest number."""
        return _parts(self.off, self.size)


class Judged(NamedTuple):
    """All rows of one key."""

    measured: Measured
    wrong: Tensor
    """[n], bool: the rows that rounding does not explain."""
    median: float
    """The median of the rows' mean differences, as parts of their mean sizes. 0 when there are fewer than FEWEST_ROWS rows."""


def measured(
    stored: Tensor,
    right: Tensor,
    *,
    steps: Tensor | None = None,
    through: torch.dtype | None = None,
    others: Mapping[str, Tensor] = {},
) -> Measured:
    """Stored rows [n, width] beside the right ones [n, width], which are in the dtype in which they were computed.

    steps: [n, width], what one step of an int8 number stands for; None for stored floats. through: a dtype that they were stored in
    before. others: name -> other right rows [n, width] that each row might be in place of its own, such as its neighbours'.
    """
    wanted, slack = _as_stored(stored, right, steps, through)
    same = (stored == wanted) | (stored.isnan() & wanted.isnan())
    found, expected = stored.double(), wanted.double()
    off = torch.where(same, 0, ((found - expected).abs() - slack).clamp(min=0)).nan_to_num(nan=torch.inf)  # [n, width]
    size = torch.where(expected.isfinite(), expected.abs(), 0)
    nearer = {name: _is_nearer(found, expected, other.double()) for name, other in others.items()}
    is_equal = bool(same.all()) if steps is None else bool((stored / steps).round().equal(_in_steps(right, steps)))
    return Measured(is_equal, off.amax(1), size.amax(1), off.mean(1), size.mean(1), nearer)


def judged(pieces: Sequence[Measured], limits: Limits) -> Judged:
    """All rows of a key, measured piece by piece."""
    whole = Measured(
        all(each.is_equal for each in pieces),
        torch.cat([each.off for each in pieces]),
        torch.cat([each.size for each in pieces]),
        torch.cat([each.mean_off for each in pieces]),
        torch.cat([each.mean_size for each in pieces]),
        {name: torch.cat([each.nearer[name] for each in pieces]) for name in pieces[0].nearer},
    )
    means = _parts(whole.mean_off, whole.mean_size)
    median = float(means.median()) if len(means) >= FEWEST_ROWS else 0.0
    wrong = (whole.off > limits.largest * whole.size) | (whole.mean_off > limits.mean * whole.mean_size)
    for is_nearer in whole.nearer.values():
        wrong = wrong | is_nearer
    if median > limits.median:
        wrong = wrong | (means > limits.median)
    return Judged(whole, wrong, median)


def _parts(off: Tensor, size: Tensor) -> Tensor:
    return torch.where(off == 0, 0, off / size.clamp(min=torch.finfo(size.dtype).tiny))


def _as_stored(
    stored: Tensor, right: Tensor, steps: Tensor | None, through: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """What storing the right rows gives, and how far from it the rounding of what is stored may bring a number near a border."""
    if steps is not None:
        return right.float(), steps.double() / 2 * (1 + 1e-5)
    wanted, slack = right, torch.zeros(right.shape, dtype=torch.float64)
    for dtype in (through or stored.dtype, stored.dtype):
        if torch.promote_types(dtype, wanted.dtype) != dtype:  # it does not hold them all
            grain = torch.finfo(dtype)
            slack += grain.eps * (wanted.double().abs().nan_to_num(posinf=0) + grain.smallest_normal)
        wanted = wanted.to(dtype)
    return wanted, slack


def _in_steps(right: Tensor, steps: Tensor) -> Tensor:
    return (right.float() / steps).round().clamp(-127, 127)


def _is_nearer(found: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """[n], bool: rows that are much nearer to another row than to their own."""
    return (found - other).abs().mean(1) * NEARER < (found - own).abs().mean(1)


def head_elsewhere(stored: Tensor, right: Tensor, n_heads: int) -> tuple[int, int] | None:
    """The first head whose stored values [n, n_heads * width] are, over all rows, much nearer to another's than to its own; and that other.

    None when there is none, or fewer rows than tell.
    """
    if len(stored) < FEWEST_ROWS:
        return None
    found, expected = (each.double().unflatten(1, (n_heads, -1)) for each in (stored, right))  # type: ignore[no-untyped-call]
    own = (found - expected).abs().sum((0, 2))  # [n_heads]
    for step in range(1, n_heads):
        other = (found - expected.roll(step, 1)).abs().sum((0, 2))
        for head in (other * NEARER < own).nonzero()[:, 0].tolist():
            return head, (head - step) % n_heads
    return None


def narrowed_to(stored: Tensor, right: Tensor) -> torch.dtype | None:
    """A narrower dtype that holds every stored number, though not the right ones: the numbers once passed through it."""
    for dtype in NARROWER.get(stored.dtype, ()):
        if _is_held(stored, dtype) and not _is_held(right, dtype):
            return dtype
    return None


def _is_held(numbers: Tensor, dtype: torch.dtype) -> bool:
    return bool((numbers.to(dtype).to(numbers.dtype) == numbers).all())


class ScoreOff(NamedTuple):
    """How far a stored score is from the one that logits give."""

    logprob: float
    """The log-likelihood that the logits give."""
    slack: float
    """How far rounding may bring the stored one from it."""
    is_surely_greedy: bool
    """Whether each token is the likeliest, by more than rounding."""
    not_likeliest: Sequence[int]
    """The tokens that are not the likeliest, by more than rounding."""


def score_of(logits: Tensor, tokens: Sequence[int], limits: Limits) -> ScoreOff:
    """logits: [n, d_vocab], float32, each row before one of the n tokens."""
    at = torch.arange(len(tokens)), torch.tensor(list(tokens), dtype=torch.long)
    slack = limits.score * (1 + logits.abs().amax(1)).double()  # [n]
    others = logits.clone()
    others[at] = -torch.inf
    ahead = (logits[at] - others.amax(1)).double()  # [n], of the likeliest other token; below 0: behind it
    logprobs = torch.log_softmax(logits.double(), -1)[at]
    behind = (ahead < -slack).nonzero()[:, 0].tolist()
    return ScoreOff(
        float(logprobs.sum()), float((slack + limits.score * logprobs.abs()).sum()), bool((ahead > slack).all()), behind
    )
