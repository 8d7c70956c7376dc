"""`local_paths.json` in a run folder: where the model was on this machine, for those who go on with the run here.

Exports and uploads leave it out: it tells the names of folders, homes and users.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from AutomaticEval.errors import StoreError
from AutomaticEval.store.disk.json_text import parse_json
from AutomaticEval.store.disk.whole_files import new_file

LOCAL_PATHS = "local_paths.json"


def write_local_paths(folder: Path, paths: Mapping[str, str]) -> None:
    """paths: model, peft and delta -> where it is, of those that are folders; nothing is written of none."""
    if not paths or (folder / LOCAL_PATHS).exists():
        return
    with new_file(folder / LOCAL_PATHS) as partial:
        partial.write_text(json.dumps(dict(paths), indent=1) + "\n", encoding="utf-8")


def read_local_paths(path: Path) -> dict[str, str]:
    """{} of a file, or of a folder without it, as when it was copied. Raises StoreError for one that is damaged."""
    file = path / LOCAL_PATHS
    if not file.is_file():
        return {}
    try:
        paths = parse_json(file.read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in paths.items()}
    except (ValueError, AttributeError, OSError):
        raise StoreError(f"{file} is damaged; delete it, and name the model yourself.") from None
