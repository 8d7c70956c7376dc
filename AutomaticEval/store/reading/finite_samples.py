"""Which samples of a run hold no number that is infinite or NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.ragged import Array
from AutomaticEval.store.reading.sharded_rows import ShardedRows


def finite_samples(rows: ShardedRows, contents: Contents, counts: Mapping[str, int]) -> Array:
    """[n_samples], bool: whether no row of a sample, and no log-probability of it, is infinite or NaN.

    counts: site or column -> how many such numbers it has in all. Only sites that have some, or that are not in counts, are read.
    """
    wrong = np.zeros(len(contents.token_ids), dtype=bool)
    for key in rows.keys:
        if counts.get(key, 1):
            wrong |= rows.non_finite_rows(key)
    n_wrong_before, segments = np.concatenate([[0], np.cumsum(wrong)]), contents.segments
    ranges = segments.values[:]
    n_wrong = n_wrong_before[ranges[:, 1]] - n_wrong_before[ranges[:, 0]]
    by_range = np.concatenate([[0], np.cumsum(n_wrong)])
    finite: Array = by_range[segments.offset[1:]] == by_range[segments.offset[:-1]]
    if counts.get("logprob", 1) and "logprob" in contents.columns.names:
        values = contents.columns.whole("logprob")
        finite &= np.array([value is None or math.isfinite(value) for value in values], dtype=bool)
    if counts.get("token_logprobs", 1) and "token_logprobs" in contents.columns.names:
        lists = contents.columns.whole("token_logprobs")
        finite &= np.array([each is None or all(map(math.isfinite, each)) for each in lists], dtype=bool)
    return finite
