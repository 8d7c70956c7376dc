"""Measures seconds and peak memory for the benchmarks."""

from __future__ import annotations

import contextlib
import gc
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Print nothing while the work runs."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def seconds(work: Callable[[], object]) -> float:
    """Seconds that quiet work takes. Garbage of earlier work is collected first."""
    gc.collect()
    with quiet():
        started = time.perf_counter()
        work()
        return time.perf_counter() - started


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes. Not ru_maxrss, which a child inherits from its parent."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
