"""Which refusal of the operating system an exception stands for, also where HDF5 reports it in its own words."""

from __future__ import annotations

import errno
import re

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk has no room."""
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG)
"""The path cannot be written."""
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
"""The file could not be read for a reason that has nothing to do with its bytes: they may be sound."""
LOST = (*FULL, errno.EIO)
"""An fsync failed like this: what was written may never reach the disk, even when the next fsync succeeds."""


def code_of(failure: BaseException) -> int | None:
    """The errno of an exception; None when the operating system refused nothing."""
    code = getattr(failure, "errno", None)
    match = re.search(r"errno = (\d+),", str(failure))
    return int(match[1]) if code is None and match else code
