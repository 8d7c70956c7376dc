"""Counts numbers that are infinite or not a number (NaN) while they are written, and warns of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from AutomaticEval.errors import NotFinite, warn
from AutomaticEval.safe_text import shown
from AutomaticEval.store.hdf5.attributes import attribute_of
from AutomaticEval.store.hdf5.contract import place_of_column

NON_FINITE = "non_finite"
"""The attribute of a dataset that says how many of its numbers are infinite or NaN."""

_EXPONENTS = {torch.float64: 0x7FF0 << 48, torch.float32: 0x7F80 << 16, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""The bits of the exponent. They are all set in infinite numbers and NaN, and in no other number."""
_STEP_NUMBERS = 2**18
"""So many numbers are looked at together, so that they stay in the processor's cache."""


def n_non_finite(raw: np.ndarray[Any, Any], dtype: torch.dtype) -> int:
    """How many numbers are infinite or NaN. raw: their bits, as unsigned integers."""
    if dtype not in _EXPONENTS:  # int8 holds neither
        return 0
    flat, exponent, n_wrong = raw.reshape(-1), raw.dtype.type(_EXPONENTS[dtype]), 0
    for at in range(0, len(flat), _STEP_NUMBERS):
        exponents = flat[at : at + _STEP_NUMBERS] & exponent
        if exponents.max() == exponent:
            n_wrong += int(np.count_nonzero(exponents == exponent))
    return n_wrong


def counts_in(file: Any, group: str, keys: Iterable[str], columns: Iterable[str]) -> dict[str, int]:
    """Site or column of an open file -> how many of its numbers are infinite or NaN, where the file says it.

    group: the group of the sites. keys: the sites to look at. columns: the columns. Raises ValueError for an attribute that is no whole number.
    """
    places = {key: f"{group}/{key}" for key in keys} | {name: place_of_column(name) for name in columns}
    datasets = {name: file[place] for name, place in places.items() if place in file}
    return {name: int(attribute_of(each, NON_FINITE)) for name, each in datasets.items() if NON_FINITE in each.attrs}


def report_non_finite(path: Path, counts: Mapping[str, int], *, strict: bool = False) -> None:
    """Warn when a file or a run holds numbers that are infinite or NaN. strict: raise NotFinite instead.

    counts: site or column -> how many.
    """
    some = {key: count for key, count in counts.items() if count}
    if not some:
        return
    listed = ", ".join(f"{shown(key)}: {count}" for key, count in some.items())
    message = f"{path}: {sum(some.values())} of the stored numbers are infinite or NaN ({listed})."
    which = f"`run = open_run({str(path)!r}); run.finite()` says which samples have none."
    if strict:
        raise NotFinite(
            f"{message} They are stored as the model computed them. {which} Without strict the run goes on."
        )
    warn(f"{message} {which}")
