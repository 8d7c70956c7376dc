"""Result files that were written before: which of them are of a run, and why the others are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from AutomaticEval.errors import AutomaticEvalError, StoreError
from AutomaticEval.store.disk.json_files import read_json
from AutomaticEval.store.run import Run

RESULTS = Path("results")
"""The folder where `probe` and `lens` write, unless they are told another."""
KINDS = ("probe", "lens")
"""The kinds of results that a page draws."""


@dataclass
class Found:
    """The results of a run, and what was left out."""

    by_kind: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Kind -> why each file of it that is not drawn is left out, in a sentence."""


def results_of(run: Run, paths: Sequence[Path]) -> Found:
    """The newest probe and lens result of a run in files and folders. Raises StoreError for a path that was given and is not there."""
    found = Found()
    files = [file for path in paths for file in _files(path)]
    for file in sorted(files, key=lambda each: each.stat().st_mtime):
        try:
            result = read_json(file)
        except AutomaticEvalError as broken:
            if file.stem in KINDS:
                found.left_out.setdefault(file.stem, []).append(f"{file} cannot be read: {broken}")
            continue
        kind = str(result.get("kind"))
        if kind not in KINDS:
            continue
        reason = _foreign(run, result, file)
        if reason is not None:
            found.left_out.setdefault(kind, []).append(reason)
            continue
        if kind in found.files:
            found.left_out.setdefault(kind, []).append(f"{found.files[kind]} is older than {file}.")
        found.by_kind[kind], found.files[kind] = result, file
    return found


def usual_results() -> list[Path]:
    """Where results are looked for that nobody named: RESULTS, if it is there."""
    return [RESULTS] if RESULTS.is_dir() else []


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.json"))
    if not path.exists():
        raise StoreError(
            f"no result file or folder {path}; --results names those that `main.py probe` and `lens` wrote."
        )
    return [path]


def _foreign(run: Run, result: Mapping[str, Any], file: Path) -> str | None:
    """Why a result is not of this run; None when it is."""
    about = result.get("run")
    if not isinstance(about, Mapping):
        return f"{file} does not say of which run it is."
    if about.get("path") != run.path.name or about.get("model") != run.model:
        return (
            f"{file} is of the run {about.get('path')} of {about.get('model')}, not of {run.path.name} of {run.model}."
        )
    written = datetime.fromtimestamp(file.stat().st_mtime).astimezone()
    created = _moment(run.created)
    if created is not None and written < created:
        return f"{file} was written {written:%Y-%m-%d %H:%M}, before this run began ({created:%Y-%m-%d %H:%M})."
    return None


def _moment(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone()
    except (TypeError, ValueError):
        return None
