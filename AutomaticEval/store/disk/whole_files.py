"""Writes files that appear whole or not at all, prepares folders, and turns the operating system's refusals into our errors.

Knows nothing of what is in a file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from AutomaticEval.errors import DiskFull, FolderNotWritable, PathExists, StoreError
from AutomaticEval.store.disk.partial_folders import DONE, SET, clear_leftovers, hidden_name, partial_folder
from AutomaticEval.store.disk.read_back import read_back
from AutomaticEval.store.disk.system import DENIED, FULL, LOST, code_of

OVERWRITING = " or pass overwrite=True (--overwrite)"
"""What `prepare_file` offers a person whose file is there."""
_made: list[Path] = []
"""The folders that this process made, in their order."""


def prepare_file(path: Path, *, overwrite: bool = False, offer: str = OVERWRITING) -> None:
    """Make the folder of a file that will be written, and refuse now, before any work, a file that cannot be written.

    offer: what else than another name the message offers. Raises PathExists, FolderNotWritable.
    """
    with named_failures(path):
        is_folder, is_there = path.is_dir(), path.exists()
    if is_folder:
        raise PathExists(f"{path} is a folder; give the name of a file in it.")
    if is_there and not overwrite:
        raise PathExists(f"{path} exists and is not overwritten; choose another name{offer}.")
    prepare_folder(path.parent)


def prepare_folder(folder: Path) -> None:
    """Make a folder, check that it can be written, and remove what killed processes left in it. Raises FolderNotWritable, DiskFull."""
    with named_failures(folder):
        _made.extend(each for each in (*reversed(folder.parents), folder) if not each.exists())
        folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)
        trial = folder / hidden_name()
        trial.touch()
        trial.unlink(missing_ok=True)  # another process may remove leftovers here just now


def stamped_folder(save_dir: Path, name: str) -> Path:
    """Make a new folder `<name>_<timestamp>`, and return it. Raises FolderNotWritable, DiskFull."""
    prepare_folder(save_dir)
    stem = f"{name}_{datetime.now():%Y%m%d_%H%M%S}"
    number = 1
    while True:
        folder = save_dir / (stem if number == 1 else f"{stem}_{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            _made.append(folder)
            return folder


@contextmanager
def leaving_no_empty_folder() -> Iterator[None]:
    """When the with fails, remove the folders that `prepare_folder` and `stamped_folder` made in it, and that are empty."""
    n_before = len(_made)
    try:
        yield
    except BaseException:
        for folder in reversed(_made[n_before:]):
            with suppress(OSError):
                folder.rmdir()
        raise
    finally:
        del _made[n_before:]


def ensure_space(folder: Path, size_bytes: int) -> None:
    """Raises DiskFull when the disk that holds folder has less than size_bytes free."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size_bytes:
        raise DiskFull(
            f"{folder}: {size_text(size_bytes)} are needed and {size_text(free)} are free; choose another folder, fewer "
            "--layers or --sites, or --positions scored."
        )


def size_text(size_bytes: float) -> str:
    """1536 -> '1.5 KB', in powers of 1024."""
    for unit in ("B", "KB", "MB", "GB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TB"


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path to write to. When the with ends, the file there is synced and read back, and gets its name.

    Raises PathExists, FolderNotWritable, DiskFull, and StoreError for a file that is not whole; then nothing is left behind.
    """
    with named_failures(path), partial_folder(path.parent, path.name) as hidden:
        partial = hidden / path.name
        yield partial
        _settle(partial)
        replaces = overwrite and path.exists()
        _publish(partial, path, overwrite=overwrite)
        try:
            _sync_folder(path.parent)
        except BaseException as failure:
            if not replaces:
                path.unlink(missing_ok=True)
            elif isinstance(failure, OSError):  # the file before is gone, and this one is whole
                raise _refusal(
                    failure, f"{path} took the place of the one before and is whole, but may not outlast a power cut"
                ) from failure
            raise


@contextmanager
def new_files(folder: Path, what: str) -> Iterator[Path]:
    """A temporary folder to fill, also with folders. When the with ends, its files get their names in a folder, all of them or none.

    what: what the files are; it becomes part of the temporary name. Raises what `new_file` raises.
    """
    prepare_folder(folder)
    with named_failures(folder), partial_folder(folder, what) as hidden:
        filled = hidden / SET
        filled.mkdir()
        yield filled
        files = sorted(file for file in filled.rglob("*") if file.is_file())
        for file in files:
            _settle(file)
        named: list[Path] = []
        try:
            for file in files:
                path = folder / file.relative_to(filled)
                path.parent.mkdir(parents=True, exist_ok=True)
                with named_failures(path):
                    _publish(file, path, overwrite=False)
                named.append(path)
                _sync_folder(path.parent)
            filled.rename(hidden / DONE)
        except BaseException:
            for path in named:
                path.unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill. It gets its name when the with ends, and is removed when the with fails.

    Raises PathExists, FolderNotWritable, DiskFull.
    """
    with named_failures(path):
        is_there = path.exists()
    if is_there:
        raise PathExists(f"{path} exists and is not overwritten; choose another name.")
    prepare_folder(path.parent)
    with named_failures(path), partial_folder(path.parent, path.name) as hidden:
        partial = hidden / path.name
        partial.mkdir()
        yield partial
        for each in sorted(partial.rglob("*")):
            _settle(each)
        _sync_folder(partial)
        if path.exists():  # taken by another process just now; renaming would replace an empty folder
            raise PathExists(f"{path} exists and is not overwritten; choose another name.")
        partial.rename(path)
        try:
            _sync_folder(path.parent)
        except BaseException:
            try:
                path.rename(partial)
            except OSError:  # it needs room, which deleting does not
                shutil.rmtree(path, ignore_errors=True)
            raise


def _settle(path: Path) -> None:
    """Have a file or folder on the disk, and read a file back. Raises StoreError for a file that is not whole."""
    if path.is_dir():
        _sync_folder(path)
        return
    _sync(path)
    read_back(path)


def _sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk. Raises OSError when they may be lost, but not on a file system that cannot sync folders."""
    try:
        _sync(path)
    except OSError as failure:
        if code_of(failure) in LOST:
            raise


def _publish(partial: Path, path: Path, *, overwrite: bool) -> None:
    """Give a finished file its name. This is a hard link, which fails when the name is taken, also when another process took it just now."""
    if overwrite:
        partial.replace(path)
        return
    try:
        os.link(partial, path)
    except FileExistsError:
        raise PathExists(f"{path} exists and is not overwritten; choose another name.") from None
    except OSError:  # file systems without hard links
        if path.exists():
            raise PathExists(f"{path} exists and is not overwritten; choose another name.") from None
        partial.rename(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def named_failures(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals, also those that HDF5 wraps, into our errors about a path.

    Raises FolderNotWritable, DiskFull, StoreError.
    """
    try:
        yield
    except (OSError, RuntimeError) as failure:  # HDF5 raises RuntimeError when it cannot close a file on a full disk
        code = code_of(failure)
        if code is None:
            raise
        if code in DENIED:
            raise FolderNotWritable(f"{path} cannot be written ({os.strerror(code)}); choose another.") from failure
        left = "" if os.path.lexists(path) else ", and nothing of it was left behind"
        raise _refusal(failure, f"{path} was not written{left}") from failure


def _refusal(failure: BaseException, message: str) -> StoreError:
    """The error for a refusal of the operating system. message: which file it was, and what is there now."""
    code = code_of(failure)
    if code in FULL:
        return DiskFull(f"the disk is full: {message}.")
    return StoreError(f"{message} ({os.strerror(code or 0)}); look at the disk, or choose another.")
