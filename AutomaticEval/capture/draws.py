"""Random numbers that a seed and what they are for decide, and nothing else; and answers that are sampled by such numbers.

transformers samples all rows of a batch from one stream of random numbers, so an answer depends on what else is in its batch. With `drawing`,
each row has a stream of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from AutomaticEval.capture.answers.processors import processing
from AutomaticEval.errors import CaptureError

BLOCK = 64
"""For how many steps random numbers are brought to the device at once."""

Purpose = str | int | Sequence[int]


def random_numbers(seed: int, *purpose: Purpose) -> np.random.Generator:
    """A source of random numbers. Another seed, or another purpose, draws other numbers, also when the two would have the same sum.

    purpose: what the numbers are for, such as ("resample", layer). Each part counts, with its place.
    """
    return np.random.default_rng(np.random.SeedSequence(_entropy(seed, *purpose)))


def derived_seed(seed: int, *purpose: Purpose) -> int:
    """A seed below 2 ** 32 for what takes no generator, made of a seed and a purpose in the same way."""
    return _entropy(seed, *purpose) % 2**32


def _entropy(seed: int, *purpose: Purpose) -> int:
    parts = [int(seed), *map(_plain, purpose)]
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:16])


def _plain(part: Purpose) -> str | int | list[int]:
    if isinstance(part, str):
        return part
    return [int(each) for each in part] if isinstance(part, Sequence) else int(part)


def repeats_of(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each prompt how many equal ones stand before it, so that equal prompts are answered by other draws."""
    seen: Counter[tuple[int, ...]] = Counter()
    repeats = []
    for prompt in map(tuple, prompts):
        repeats.append(seen[prompt])
        seen[prompt] += 1
    return repeats


@contextmanager
def drawing(model: Any, sources: Sequence[np.random.Generator] | None) -> Iterator[None]:
    """Inside, the model's `generate` samples each row by the draws of its own source. None: as transformers samples.

    sources: one for each row of the batch. Raises CaptureError when `generate` sampled other rows, or did not sample.
    """
    if sources is None:
        yield
        return
    chosen = _ChosenByDraws(sources)
    with processing(model, last=chosen):  # after temperature, top_p and all others
        yield
    if not chosen.n_steps:
        raise CaptureError("transformers' generate did not ask for logits processors; this version of it is not known.")


class _ChosenByDraws:
    """A logits processor that leaves one token to each row: the one at a draw from 0 to 1 in the row's cumulated probabilities.

    This is exact: each token is left with its own probability. Source: inversion sampling, Devroye 1986.
    """

    def __init__(self, sources: Sequence[np.random.Generator]) -> None:
        self._sources, self.n_steps = sources, 0
        self._block = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [batch, d_vocab], after all other processors; also what is given back."""
        if len(scores) != len(self._sources):
            raise CaptureError(f"generate samples {len(scores)} rows, and {len(self._sources)} were asked for.")
        exact = torch.float32 if scores.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
        at = self.n_steps % BLOCK
        if at == 0:
            drawn = torch.from_numpy(np.stack([source.random(BLOCK) for source in self._sources]))
            below_1 = (
                1 - torch.finfo(exact).eps / 2
            )  # to which float32 could round a draw up, past the last token that has a probability
            self._block = drawn.to(scores.device, exact).clamp(max=below_1)
        self.n_steps += 1
        cumulated = scores.to(exact).softmax(-1).cumsum(-1)
        whole = cumulated[:, -1:]
        token = (cumulated <= self._block[:, at, None] * whole).sum(-1, keepdim=True)
        left = torch.full_like(scores, -torch.inf).scatter_(1, token.clamp(max=scores.shape[1] - 1), 0.0)
        return torch.where(whole.isnan(), scores, left)  # which transformers refuses
