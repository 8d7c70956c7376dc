"""Measures what checking costs: reads with and without checks, and `verify` compared with the disk."""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable
from pathlib import Path

from gauges import seconds
from store_made import FULL, MB, SMALL, alternating, fresh, write

from AutomaticEval import open_run
from AutomaticEval.store.upkeep.verify import verify

_STEP_BYTES = 2**20


def checking(rounds: int, folder: Path) -> None:
    """Checked reads compared with unchecked reads of the same run. Targets: a layer 1.05, a random row 20 us more."""
    for name, workload in (("full", FULL), ("small", SMALL)):
        with fresh(folder) as there:
            write(there / "run", workload.samples())
            checked, plain = (open_run(there / "run", check=check) for check in (True, False))
            key = workload.keys[workload.n_layers // 2]
            ours, theirs = checked.rows(key), plain.rows(key)
            draw = random.Random(0)
            picks = [draw.randrange(len(ours)) for _ in range(256)]
            numbers = [draw.randrange(len(checked)) for _ in range(100)]
            ways: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {
                "a layer": (lambda: ours[:], lambda: theirs[:], 1),  # noqa: B023
                "a row": (lambda: [ours[i] for i in picks], lambda: [theirs[i] for i in picks], 256),  # noqa: B023
                "a row of a batch of 256": (lambda: ours[picks], lambda: theirs[picks], 256),  # noqa: B023
                "a sample's layer": (
                    lambda: [checked.read(i, key) for i in numbers],  # noqa: B023
                    lambda: [plain.read(i, key) for i in numbers],  # noqa: B023
                    100,
                ),
                "open the run": (
                    lambda: open_run(there / "run"),
                    lambda: open_run(there / "run", check=False),
                    1,
                ),
            }
            for way, (one, other, n) in ways.items():
                show_more(f"{name}: {way}", alternating(clock(one), clock(other), 4 * rounds), n)
            files = sorted((there / "run").glob("*.h5"))
            pairs = alternating(
                lambda: cold(files, lambda: ours[:]),  # noqa: B023
                lambda: cold(files, lambda: theirs[:]),  # noqa: B023
                rounds,
            )
            show_more(f"{name}: a layer from the disk", pairs, 1)


def clock(work: Callable[[], object]) -> Callable[[], float]:
    return lambda: seconds(work)


def show_more(name: str, pairs: list[tuple[float, float]], n: int) -> None:
    """Print checked / unchecked time, and how much longer one of n reads takes."""
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    more = statistics.median(ours - theirs for ours, theirs in pairs) / n * 1e6
    each = statistics.median(theirs for _, theirs in pairs) / n * 1e6
    print(
        f"{name:34} {statistics.median(ratios):5.2f} of unchecked ({ratios[0]:.2f}..{ratios[-1]:.2f})   "
        f"{more:+.1f} us to {each:.1f} us"
    )


def cold(files: list[Path], work: Callable[[], object]) -> float:
    """Seconds of work when the system holds no page of these files."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return seconds(work)


def read_all(files: list[Path]) -> None:
    """Read every byte into one buffer."""
    buffer = bytearray(_STEP_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def verifying(rounds: int, folder: Path) -> None:
    """`verify` of a run, compared with reading the same files from the disk. Target: 0.8."""
    for name, workload in (("full", FULL), ("small", SMALL)):
        with fresh(folder) as there:
            write(there / "run", workload.samples())
            files = sorted((there / "run").glob("*.h5"))
            size = sum(path.stat().st_size for path in files)
            for where, timed in (("disk", cold), ("memory", lambda _, work: seconds(work))):
                pairs = alternating(
                    lambda: timed(files, lambda: verify(there / "run")),  # noqa: B023
                    lambda: timed(files, lambda: read_all(files)),  # noqa: B023
                    rounds,
                )
                ratio = statistics.median(raw / ours for ours, raw in pairs)
                rate = statistics.median(size / MB / ours for ours, _ in pairs)
                print(f"{name + ': from the ' + where:34} {ratio:5.2f} of reading, {rate:5.0f} MB/s")
