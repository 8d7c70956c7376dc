"""What the benchmarks measure with: seconds, and peak memory."""

from __future__ import annotations

import contextlib
import gc
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def seconds(work: Callable[[], object]) -> float:
    """That quiet work takes; what work before it left behind is collected first."""
    gc.collect()
    with quiet():
        started = time.perf_counter()
        work()
        return time.perf_counter() - started


def peak_memory() -> int:
    """The highest resident memory of this process so far, in bytes: not ru_maxrss, which a child has from its parent."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
