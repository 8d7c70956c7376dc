"""Which questions are near duplicates: by MinHash of three words in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

Array = np.ndarray[Any, Any]
N_WORDS = 3
N_PERMUTATIONS, N_BANDS = 64, 16
ALIKE = 0.8
"""Two questions whose parts are the same to this share (Jaccard) are near duplicates."""
MOST_IN_BUCKET = 50
"""Of more questions with an equal band, each is compared with so many that follow it."""
METHOD = (
    f"MinHash, {N_PERMUTATIONS} permutations over {N_WORDS} words in a row, {N_BANDS} bands; near duplicates share {ALIKE:.0%}, without the words with "
    "which all questions of a task begin and end"
)


def near_duplicates(texts: Sequence[str], tasks: Sequence[Any], groups: Array) -> list[tuple[int, int]]:
    """Pairs of questions that are near duplicates, and in different groups.

    texts, tasks, groups: [n_questions]. Words with which all questions of a task begin and end (examples, "Answer:") do not count.
    Source: Broder 1997.
    """
    signatures = _signatures(_own_words(texts, tasks))
    rows = N_PERMUTATIONS // N_BANDS
    pairs: set[tuple[int, int]] = set()
    for band in range(N_BANDS):
        buckets: dict[bytes, list[int]] = {}
        for number, part in enumerate(signatures[:, band * rows : (band + 1) * rows]):
            buckets.setdefault(part.tobytes(), []).append(number)
        for bucket in buckets.values():
            for at, one in enumerate(bucket):
                pairs |= {
                    (one, other) for other in bucket[at + 1 : at + 1 + MOST_IN_BUCKET] if groups[one] != groups[other]
                }
    return sorted((one, other) for one, other in pairs if (signatures[one] == signatures[other]).mean() >= ALIKE)


def _own_words(texts: Sequence[str], tasks: Sequence[Any]) -> list[list[str]]:
    """The words of each text in small letters, without those with which all different texts of its task begin and end."""
    words = [text.lower().split() for text in texts]
    for task in set(tasks):
        members = [number for number, each in enumerate(tasks) if each == task]
        if len({tuple(words[number]) for number in members}) < 2:
            continue
        for _ in range(2):
            n_shared = _n_shared([words[number] for number in members])
            for number in members:
                words[number] = words[number][n_shared:][::-1]
    return words


def _n_shared(texts: Sequence[list[str]]) -> int:
    """With how many words all of them begin."""
    first, last = min(texts), max(texts)
    return next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))


def _signatures(words: Sequence[Sequence[str]]) -> Array:
    """[n, N_PERMUTATIONS]."""
    draw = np.random.default_rng(0)
    factor, shift = draw.integers(1, 2**63, (2, N_PERMUTATIONS), dtype=np.uint64)
    factor |= np.uint64(1)
    found = np.empty((len(words), N_PERMUTATIONS), np.uint64)
    for number, own in enumerate(words):
        each = own or [f"nothing of its own {number}"]
        parts = {" ".join(each[at : at + N_WORDS]) for at in range(max(1, len(each) - N_WORDS + 1))}
        hashes = np.array([xxhash.xxh3_64_intdigest(part.encode()) & 0xFFFFFFFF for part in parts], np.uint64)
        found[number] = ((hashes[:, None] * factor + shift) >> np.uint64(16)).min(0)
    return found
