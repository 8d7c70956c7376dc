"""Two files in a run folder that are of this machine: `local_paths.json`, where the model was; `asked.json`, what an unfinished run was asked for.

Exports and uploads leave them out, because they tell the names of folders, homes and users.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from AutomaticEval.errors import StoreError
from AutomaticEval.store.disk.json_text import parse_json
from AutomaticEval.store.disk.whole_files import new_file

LOCAL_PATHS = "local_paths.json"
ASKED = "asked.json"


def write_local_paths(folder: Path, paths: Mapping[str, str]) -> None:
    """Write the file unless it is there. paths: "model", "peft" or "delta" -> its folder; without any, nothing is written."""
    if not paths or (folder / LOCAL_PATHS).exists():
        return
    with new_file(folder / LOCAL_PATHS) as partial:
        partial.write_text(json.dumps(dict(paths), indent=1) + "\n", encoding="utf-8")


def read_local_paths(path: Path) -> dict[str, str]:
    """The paths in a run folder; {} for a folder without the file, such as a copy, and for a single file. Raises StoreError for a damaged one."""
    file = path / LOCAL_PATHS
    if not file.is_file():
        return {}
    try:
        paths = parse_json(file.read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in paths.items()}
    except (ValueError, AttributeError, OSError):
        raise StoreError(f"{file} is damaged; delete it, and name the model yourself.") from None


def write_asked(folder: Path, asked: Mapping[str, Any]) -> None:
    """Write what a run is asked for, unless the file is there. Without any option, nothing is written."""
    if not asked or (folder / ASKED).exists():
        return
    with new_file(folder / ASKED) as partial:
        partial.write_text(json.dumps(dict(asked), indent=1) + "\n", encoding="utf-8")


def read_asked(folder: Path) -> dict[str, Any]:
    """What an unfinished run was asked for; {} when that is not there. Raises StoreError for a damaged file."""
    file = folder / ASKED
    if not file.is_file():
        return {}
    try:
        return dict(parse_json(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError):
        raise StoreError(f"{file} is damaged; delete it, and give all options of the run.") from None


def forget_asked(folder: Path) -> None:
    """Delete the file: the run is finished."""
    with suppress(OSError):
        (folder / ASKED).unlink(missing_ok=True)
