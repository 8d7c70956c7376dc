"""Which refusal of the operating system an exception is, also where HDF5 tells it in words of its own."""

from __future__ import annotations

import errno
import re

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A disk without room."""
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG)
"""A place that is not to be written."""
UNREAD = (
    *FULL,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EIO,
    errno.ESTALE,
)
"""What says nothing of a file's bytes: they may be sound."""
LOST = (*FULL, errno.EIO)
"""After an fsync: what was written may never be on the disk, whatever the next fsync says."""


def code_of(failure: BaseException) -> int | None:
    """errno; None where the operating system refused nothing."""
    code = getattr(failure, "errno", None)
    told = re.search(r"errno = (\d+),", str(failure))
    return int(told[1]) if code is None and told else code
