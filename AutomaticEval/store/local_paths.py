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
    _write_once(folder / LOCAL_PATHS, paths)


def read_local_paths(path: Path) -> dict[str, str]:
    """The paths in a run folder; {} for a folder without the file, such as a copy, and for a single file. Raises StoreError for a damaged one."""
    paths = _read(path / LOCAL_PATHS, "name the model yourself")
    return {str(name): str(value) for name, value in paths.items()}


def write_asked(folder: Path, asked: Mapping[str, Any]) -> None:
    """Write what a run is asked for, unless the file is there. Without any option, nothing is written."""
    _write_once(folder / ASKED, asked)


def read_asked(folder: Path) -> dict[str, Any]:
    """What an unfinished run was asked for; {} when that is not there. Raises StoreError for a damaged file."""
    return _read(folder / ASKED, "give all options of the run")


def forget_asked(folder: Path) -> None:
    """Delete the file: the run is finished."""
    with suppress(OSError):
        (folder / ASKED).unlink(missing_ok=True)


def _write_once(file: Path, values: Mapping[str, Any]) -> None:
    if not values or file.exists():
        return
    with new_file(file) as partial:
        partial.write_text(json.dumps(dict(values), indent=1) + "\n", encoding="utf-8")


def _read(file: Path, instead: str) -> dict[str, Any]:
    """instead: what to do without the file, for the message."""
    if not file.is_file():
        return {}
    try:
        return dict(parse_json(file.read_text(encoding="utf-8")).items())
    except (ValueError, AttributeError, OSError):
        raise StoreError(f"{file} is damaged; delete it, and {instead}.") from None
