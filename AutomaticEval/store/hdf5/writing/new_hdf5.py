"""A new HDF5 file, filled and with its trailer.

Knows nothing of what is written into it, nor of when it gets its name.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import h5py

from AutomaticEval.store.disk.system import FULL
from AutomaticEval.store.hdf5.room import EXPANSION, held_bytes
from AutomaticEval.store.hdf5.trailer import arrays_of, write_trailer

_KEEP_SIZE = 1
"""FALLOC_FL_KEEP_SIZE of Linux."""


@contextmanager
def new_hdf5(path: Path, size_bytes: int) -> Iterator[h5py.File]:
    """A new HDF5 file, which has its trailer when the with ends. Then call `release_reserved`.

    size_bytes: at least as many as the file will hold. They are reserved first, because HDF5 crashes the process at its exit when the
    disk fills up while it writes.
    Raises OSError.
    """
    path.write_bytes(_empty_hdf5())
    _reserve(path, size_bytes)
    with _hdf5_to_write(path) as file:
        yield file
        arrays, held = arrays_of(file), held_bytes(file)
    write_trailer(path, arrays, -(-held // EXPANSION))


def release_reserved(path: Path) -> None:
    """Give back the bytes that were reserved for a file and not used. The system makes this wait while the file is being flushed."""
    os.truncate(path, path.stat().st_size)


@contextmanager
def _hdf5_to_write(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file, each of whose failures to write is raised where it happens.

    HDF5 writes its buffers when a dataset or the file is closed. h5py does not tell when a dataset could not be closed, and a file that
    could not be closed crashes the process at its exit. So numbers have no buffer, the rest is flushed, and after a failure the
    file is closed onto an empty temporary file.
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
    name = uuid4().hex  # HDF5 refuses a name that is open, also when it is another thread's, and no file has it
    with h5py.File(name, "w", driver="core", backing_store=False, libver=("earliest", "v110")) as file:
        file.flush()
        return bytes(file.id.get_file_image())


def _reserve(path: Path, size_bytes: int) -> None:
    """Have the disk set bytes aside for a file, without changing the file's size. Raises OSError when there is no room.

    Where the system or the file system cannot do this, nothing is reserved.
    """
    allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if allocate is None:
        return
    with path.open("r+b") as file:
        failed = allocate(file.fileno(), _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size_bytes))
    if failed and ctypes.get_errno() in FULL:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
