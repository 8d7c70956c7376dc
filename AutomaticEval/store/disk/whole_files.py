"""Files that appear whole or not at all, folders that can be written, and the operating system's refusals by name.

Knows nothing of what is in a file.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import h5py
import xxhash

from AutomaticEval.errors import DiskFull, FolderNotWritable, PathExists, StoreError
from AutomaticEval.store.disk.partial_folders import DONE, SET, clear_leftovers, hidden_name, workplace
from AutomaticEval.store.disk.read_back import read_back
from AutomaticEval.store.disk.system import DENIED, FULL, LOST, code_of
from AutomaticEval.store.hdf5.room import EXPANSION, held_bytes
from AutomaticEval.store.hdf5.trailer import arrays_of, write_trailer

PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt")
_KEEP_SIZE = 1
"""FALLOC_FL_KEEP_SIZE of Linux."""


def hdf5_path(path: str | Path) -> Path:
    """Where a save path is written: itself, or `.h5` beside a pickle's name, with a warning that says so."""
    given = Path(path).expanduser()
    if given.suffix.lower() not in PICKLE_SUFFIXES:
        return given
    written = given.with_suffix(".h5")
    warnings.warn(f"files are HDF5: {given} is written as {written}", UserWarning, stacklevel=3)
    return written


def prepare_file(path: Path, *, overwrite: bool = False, offer_overwrite: bool = True) -> None:
    """Refuse, before any work, a file that could not be written afterwards; make its folder.

    Raises PathExists, FolderNotWritable.
    """
    with named_failures(path):
        is_folder, is_there = path.is_dir(), path.exists()
    if is_folder:
        raise PathExists(f"{path} is a folder; give the name of a file in it.")
    if is_there and not overwrite:
        offered = " or pass overwrite=True (--overwrite)" if offer_overwrite else ""
        raise PathExists(f"{path} exists and is not overwritten; choose another name{offered}.")
    prepare_folder(path.parent)


def prepare_folder(folder: Path) -> None:
    """Make a folder, check that it can be written, and clear up what killed processes left there. Raises FolderNotWritable, DiskFull."""
    with named_failures(folder):
        folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)
        trial = folder / hidden_name()
        trial.touch()
        trial.unlink(missing_ok=True)  # another process may clear up here just now


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


def plain_name(text: str) -> str:
    """The text as a name that every file system accepts, of one file or folder: not hidden, and neither `.` nor `..`."""
    return re.sub(r"[^\w.-]+", "-", text).lstrip(".") or "-"


def own_name(text: str, most_bytes: int) -> str:
    """A plain name of at most so many bytes, by which no other text goes: file systems take 255, and a Chinese character is three.

    A text that is one already; of another a plain name, or its beginning, and a hash of it all.
    """
    name, raw = plain_name(text), text.encode("utf-8", "surrogatepass")
    if name == text and len(raw) <= most_bytes:
        return name
    mark = f"-{xxhash.xxh3_64_hexdigest(raw)[:8]}"
    return name.encode()[: most_bytes - len(mark)].decode("utf-8", "ignore") + mark


def file_stem(prefix: str, text: str, now: datetime | None = None) -> str:
    """`<prefix>_20240915_143022_123456_What_is_the_capital_of`: time to the microsecond, first words of the text."""
    name = "_".join(re.findall(r"\w+", text)[:5])
    while len(name.encode("utf-8", "replace")) > 60:  # names are limited in bytes; a Chinese character is three
        name = name[:-1]
    return f"{prefix}_{now or datetime.now():%Y%m%d_%H%M%S_%f}_{name.strip('_') or 'question'}"


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path to write to; what is there when the with ends is synced, read back, and gets its name.

    Raises PathExists, FolderNotWritable, DiskFull, and StoreError for what is not whole; then nothing is left behind.
    """
    with named_failures(path), workplace(path.parent, path.name) as place:
        partial = place / path.name
        yield partial
        _settle(partial)
        replaces = overwrite and path.exists()
        _publish(partial, path, overwrite=overwrite)
        try:
            _sync_folder(path.parent)
        except BaseException as failure:
            if not replaces:
                path.unlink(missing_ok=True)
            elif isinstance(failure, OSError):  # what was there before is gone, and this is whole
                raise _refusal(
                    failure, f"{path} took the place of the one before and is whole, but may not outlast a power cut"
                ) from failure
            raise


@contextmanager
def new_files(folder: Path, what: str) -> Iterator[Path]:
    """A temporary folder to fill, also with folders; when the with ends its files get their names in a folder, all of them or none.

    what: they are, for the temporary name. Raises what `new_file` raises.
    """
    prepare_folder(folder)
    with named_failures(folder), workplace(folder, what) as place:
        made = place / SET
        made.mkdir()
        yield made
        files = sorted(file for file in made.rglob("*") if file.is_file())
        for file in files:
            _settle(file)
        named: list[Path] = []
        try:
            for file in files:
                path = folder / file.relative_to(made)
                path.parent.mkdir(parents=True, exist_ok=True)
                with named_failures(path):
                    _publish(file, path, overwrite=False)
                named.append(path)
                _sync_folder(path.parent)
            made.rename(place / DONE)
        except BaseException:
            for path in named:
                path.unlink(missing_ok=True)
            raise


@contextmanager
def new_hdf5(path: Path, size_bytes: int, *, overwrite: bool = False) -> Iterator[h5py.File]:
    """An HDF5 file that gets its name only when it is complete and on the disk.

    size_bytes: at least what it will hold, which is reserved first: HDF5 crashes the process at its exit when the disk
    fills up while it writes.
    """
    with new_file(path, overwrite=overwrite) as partial:
        partial.write_bytes(_empty_hdf5())
        _reserve(partial, size_bytes)
        with _hdf5_to_write(partial) as file:
            yield file
            arrays, held = arrays_of(file), held_bytes(file)
        write_trailer(partial, arrays, -(-held // EXPANSION))
        os.truncate(partial, partial.stat().st_size)  # gives back what was reserved beyond


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; it gets its name when the with ends, and is removed when it fails.

    Raises PathExists, FolderNotWritable, DiskFull.
    """
    with named_failures(path):
        is_there = path.exists()
    if is_there:
        raise PathExists(f"{path} exists and is not overwritten; choose another name.")
    prepare_folder(path.parent)
    with named_failures(path), workplace(path.parent, path.name) as place:
        partial = place / path.name
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


@contextmanager
def _hdf5_to_write(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file, each of whose failures to write is raised where it happens.

    What HDF5 keeps in buffers it writes when a dataset or the file is closed; h5py does not tell of a dataset that could not be
    closed, and a file that could not be closed crashes the process at its exit. So numbers have no buffer, the rest is
    flushed, and after a failure the file is closed onto nothing.
    """
    settings = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    settings.set_libver_bounds(h5py.h5f.LIBVER_EARLIEST, h5py.h5f.LIBVER_V110)
    settings.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    settings.set_sieve_buf_size(0)
    settings.set_cache(0, 0, 0, 0.0)
    file = h5py.File(h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDWR, fapl=settings))
    try:
        yield file
        file.flush()
    except BaseException:
        with tempfile.TemporaryFile() as nothing:
            os.dup2(nothing.fileno(), file.id.get_vfd_handle())
        # after a failed flush HDF5 refuses the first close; the failure that counts is the one above
        with suppress(OSError, RuntimeError):
            file.close()
        raise
    file.close()


def _empty_hdf5() -> bytes:
    with h5py.File("empty", "w", driver="core", backing_store=False, libver=("earliest", "v110")) as file:
        file.flush()
        return bytes(file.id.get_file_image())


def _reserve(path: Path, size_bytes: int) -> None:
    """Have the disk set bytes aside for a file, whose size stays. Raises OSError when there is no room.

    Where the system or the file system cannot, nothing is reserved.
    """
    allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if allocate is None:
        return
    with path.open("r+b") as file:
        failed = allocate(file.fileno(), _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size_bytes))
    if failed and ctypes.get_errno() in FULL:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _settle(path: Path) -> None:
    """Have a file or folder on the disk, and a file read back. Raises StoreError for one that is not whole."""
    if path.is_dir():
        _sync_folder(path)
        return
    _sync(path)
    read_back(path)


def _sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk. Raises OSError when they may be lost; some file systems cannot do it at all."""
    try:
        _sync(path)
    except OSError as failure:
        if code_of(failure) in LOST:
            raise


def _publish(partial: Path, path: Path, *, overwrite: bool) -> None:
    """Name a finished file. A hard link fails when the name is taken, also by another process just now."""
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
    """Turn the operating system's refusals, also those that HDF5 wraps, into ours."""
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


def _refusal(failure: BaseException, told: str) -> StoreError:
    """What is raised where the operating system refused something. told: which file, and what is there now."""
    code = code_of(failure)
    if code in FULL:
        return DiskFull(f"the disk is full: {told}.")
    return StoreError(f"{told} ({os.strerror(code or 0)}); look at the disk, or choose another.")
