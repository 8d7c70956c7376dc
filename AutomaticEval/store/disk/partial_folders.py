"""Hidden folders in which files are written before they get their names, and what a killed process left of them.

A workplace is `.<name>.<32 hexadecimal digits>.partial`. Its process holds a lock (flock) on the file `owner` in it, which the system takes
back when the process ends, however it ends: a workplace whose lock is free is a leftover.
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
"""Folders in a workplace: of files that appear together; and when all of them have."""
_NAMES = re.compile(r"\.(.*\.)?[0-9a-f]{32}\.partial", re.DOTALL)


def hidden_name(name: str = "") -> str:
    """A name that none has, by which a leftover is known. Names are limited in bytes."""
    short = name.encode("utf-8", "replace")[:80].decode("utf-8", "ignore")
    return f".{short}{'.' if short else ''}{uuid4().hex}.partial"


@contextmanager
def workplace(folder: Path, name: str) -> Iterator[Path]:
    """An empty hidden folder in a folder, which goes with all that is still in it when the with ends. Raises OSError."""
    place, lock = _held(folder, name)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(lock)


def _held(folder: Path, name: str) -> tuple[Path, int]:
    """A new workplace, and its lock."""
    while True:
        place = folder / hidden_name(name)
        place.mkdir()
        with suppress(FileNotFoundError):  # another process took it for a leftover just now
            lock = os.open(place / OWNER, os.O_RDWR | os.O_CREAT, 0o666)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_SH)
            if os.fstat(lock).st_nlink:
                return place, lock
            os.close(lock)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder; what a process is writing just now stays, and so does what cannot be removed."""
    with suppress(OSError):
        for leftover in [Path(each.path) for each in os.scandir(folder) if _NAMES.fullmatch(each.name)]:
            with suppress(OSError):
                if leftover.is_dir() and not leftover.is_symlink():
                    _clear(leftover, folder)
                else:  # as the first versions wrote them
                    leftover.unlink()


def _clear(place: Path, folder: Path) -> None:
    lock = os.open(place / OWNER, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for file in sorted((place / SET).rglob("*")):  # some of them may have their names already
            named = folder / file.relative_to(place / SET)
            if file.is_file() and named.exists() and named.samefile(file):
                named.unlink()
        shutil.rmtree(place)
    finally:
        os.close(lock)
