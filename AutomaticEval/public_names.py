"""The names that files give to models, adapters and folders. They do not tell where these are on somebody's machine."""

from __future__ import annotations

import os
from pathlib import Path

BUNDLED_MODELS = {"demo": "model", "demo_capitals": "capitals"}
"""Name of a model that comes with the package -> its folder in `demo`."""


def public_name(given: str | Path) -> str:
    """The name for files: a hub name as it is; the last name of a folder or path, which tells neither home nor user."""
    text = os.fspath(given)
    is_path = text.startswith((".", "~")) or os.path.isdir(text)  # noqa: PTH112 - no error for a long name
    return without_folders(str(absolute(text)) if is_path else text)


def without_folders(text: str) -> str:
    """The last name of an absolute path; anything else as it is."""
    return os.path.basename(text.rstrip("/")) or "-" if text.startswith(("/", "~")) else text  # noqa: PTH119 - of text


def absolute(given: str | Path) -> Path:
    """A path that holds in every current folder. Links are not followed: a model keeps the name that it was given."""
    return Path(os.path.abspath(os.path.expanduser(given)))  # noqa: PTH100, PTH111 - "~nobody" is no error


def is_same(before: str, now: str) -> bool:
    """Whether two names mean the same thing. before: may be a path, which the first versions wrote down."""
    return public_name(before) == public_name(now) or before.rstrip("/").endswith(f"/{now}")
