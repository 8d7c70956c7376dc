"""The state of the files of a folder: whoever changes a file changes its size or its time."""

from __future__ import annotations

from pathlib import Path


def file_states(folder: Path, *, with_subfolders: bool = False) -> tuple[tuple[str, int, int], ...]:
    """(name, size in bytes, time of the last change in nanoseconds) of each file, by name; () when there is no such folder.

    Names of files in subfolders are their paths from the folder.
    """
    if not folder.is_dir():
        return ()
    paths = folder.rglob("*") if with_subfolders else folder.iterdir()
    files = [(str(path.relative_to(folder)), path.stat()) for path in sorted(paths) if path.is_file()]
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in files)
