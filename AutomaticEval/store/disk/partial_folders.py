"""Hidden folders in which files are written before they get their names, and leftovers of such folders after a process was killed.

A partial folder is called `.<name>.<32 hexadecimal digits>.partial`. Its process holds a lock (flock) on the file `owner` in it. The
system releases the lock when the process ends, however it ends: a partial folder whose lock is free is a leftover.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

OWNER = "owner"
SET, DONE = "set", "done"
"""Folders in a partial folder: SET holds files that appear together; it is renamed to DONE when all of them have their names."""
_NAMES = re.compile(r"\.(.*\.)?[0-9a-f]{32}\.partial", re.DOTALL)


def is_leftover(name: str) -> bool:
    """Whether a name is one of those that `hidden_name` gives."""
    return _NAMES.fullmatch(name) is not None


def hidden_name(name: str = "") -> str:
    """A name that no other file has, and that `clear_leftovers` knows. name: what it is for, of which the beginning is kept."""
    short = name.encode("utf-8", "replace")[:80].decode("utf-8", "ignore")
    return f".{short}{'.' if short else ''}{uuid4().hex}.partial"


@contextmanager
def partial_folder(folder: Path, name: str) -> Iterator[Path]:
    """A new hidden folder in a folder. It is removed, with everything that is still in it, when the with ends. Raises OSError."""
    partial, lock = _new_and_locked(folder, name)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _new_and_locked(folder: Path, name: str) -> tuple[Path, int]:
    """A new partial folder, and its lock."""
    while True:
        partial = folder / hidden_name(name)
        partial.mkdir()
        with suppress(FileNotFoundError):  # another process took it for a leftover just now
            lock = os.open(partial / OWNER, os.O_RDWR | os.O_CREAT, 0o666)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_SH)
            if os.fstat(lock).st_nlink:
                return partial, lock
            os.close(lock)


def clear_leftovers(folder: Path) -> None:
    """Remove the leftovers of killed processes from a folder. The partial folders of running processes stay, and so do leftovers that cannot be removed."""
    with suppress(OSError):
        for leftover in [Path(each.path) for each in os.scandir(folder) if _NAMES.fullmatch(each.name)]:
            with suppress(OSError):
                if leftover.is_dir() and not leftover.is_symlink():
                    _clear(leftover, folder)
                else:  # the first versions wrote single files
                    leftover.unlink()


def _clear(leftover: Path, folder: Path) -> None:
    """Remove a partial folder unless its process runs, and with it those of its files that had got their names already."""
    lock = os.open(leftover / OWNER, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for file in sorted((leftover / SET).rglob("*")):
            named = folder / file.relative_to(leftover / SET)
            if file.is_file() and named.exists() and named.samefile(file):
                named.unlink()
        shutil.rmtree(leftover)
    finally:
        os.close(lock)
