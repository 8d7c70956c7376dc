"""What files call a model, an adapter or a folder: its name, and not where it is on the machine of the person who ran it."""

from __future__ import annotations

import os
from pathlib import Path


def public_name(given: str | Path) -> str:
    """A hub name as it is; of a folder or path its last name, which tells neither home nor user."""
    text = os.fspath(given)
    is_path = text.startswith((".", "~")) or os.path.isdir(text)  # noqa: PTH112 - no error for a long name
    return without_folders(str(absolute(text)) if is_path else text)


def without_folders(text: str) -> str:
    """The last name of an absolute path; anything else as it is."""
    return os.path.basename(text.rstrip("/")) or "-" if text.startswith(("/", "~")) else text  # noqa: PTH119 - of text


def absolute(given: str | Path) -> Path:
    """Where a path is, wherever the next command is run. Links are not followed: a model goes by the name it was given."""
    return Path(os.path.abspath(os.path.expanduser(given)))  # noqa: PTH100, PTH111 - "~nobody" is no error


def is_same(before: str, now: str) -> bool:
    """Whether two names are of one thing, of which the first versions wrote down the path."""
    return public_name(before) == public_name(now) or before.rstrip("/").endswith(f"/{now}")
