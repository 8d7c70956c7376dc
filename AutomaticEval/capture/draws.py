"""Random numbers that a seed and what they are for decide, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

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
    parts = [int(seed), *(each if isinstance(each, str | int) else list(map(int, each)) for each in purpose)]
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:16])
