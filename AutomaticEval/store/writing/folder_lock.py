"""The lock of a run folder: one process at a time writes into it, or one process of each rank of a run that several share."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from AutomaticEval.errors import FolderInUse
from AutomaticEval.store.disk.whole_files import named_failures
from AutomaticEval.store.run_folder import LOCK


def locked(folder: Path, rank: int = 0) -> FileLock:
    """The lock of a folder, held. rank: of this process among those that share the folder. Raises FolderInUse."""
    lock = FileLock(folder / (f"{LOCK}-{rank}" if rank else LOCK), timeout=0, thread_local=False)
    try:
        with named_failures(folder):
            lock.acquire()
    except Timeout:
        raise FolderInUse(f"another process is writing into {folder}; wait for it, or choose another folder.") from None
    return lock


def clear_other_ranks(folder: Path) -> None:
    """Delete the locks of other ranks. Raises FolderInUse when a process of another rank still writes, as when it has outlived the first."""
    for path in list(folder.glob(f"{LOCK}-*")):
        rank = path.name.removeprefix(f"{LOCK}-")
        if rank.isdecimal():
            lock = locked(folder, int(rank))
            path.unlink(missing_ok=True)
            lock.release()
