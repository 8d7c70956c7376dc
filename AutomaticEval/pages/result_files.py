"""Result files that were written before: which of them are of a run, and why the others are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from AutomaticEval.errors import AutomaticEvalError, StoreError
from AutomaticEval.safe_text import shown
from AutomaticEval.store.disk.json_files import read_json
from AutomaticEval.store.run import Run

RESULTS = Path("results")
"""The folder where `probe` and `lens` write, unless they are told another."""
KINDS = ("probe", "lens")
"""The kinds of results that a page draws."""
OF = {"probe": "target and position", "lens": "run"}
TELLING = (("classes", "target"), ("classes", "positive"), ("settings", "position"))
"""Where a probe's result says what was probed."""


class Drawn(NamedTuple):
    """A result that is drawn."""

    result: Mapping[str, Any]
    file: Path
    name: str
    """Of its file, as the page says it."""


@dataclass
class Found:
    """The results of a run, and what was left out."""

    probes: list[Drawn] = field(default_factory=list)
    """Those of the target `correct` first, and then the newest first."""

    lens: Drawn | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Kind -> why each file of it that is not drawn is left out, in a sentence."""

    def leave(self, kind: str, reason: str) -> None:
        self.left_out.setdefault(kind, []).append(shown(reason))


def results_of(run: Run, paths: Sequence[Path]) -> Found:
    """The newest lens result of a run in files and folders, and the newest probe of each target and position. Raises StoreError for a path that was given and is not there."""
    found = Found()
    files = list(dict.fromkeys(file for path in paths for file in _files(path)))
    names = _names(files)
    newest: dict[tuple[str, ...], Drawn] = {}
    for file in sorted(files, key=lambda each: each.stat().st_mtime):
        try:
            result = read_json(file)
        except AutomaticEvalError as broken:
            if file.stem in KINDS:
                found.leave(file.stem, f"{names[file]} cannot be read: {str(broken).replace(str(file), names[file])}")
            continue
        kind = str(result.get("kind"))
        if kind not in KINDS:
            continue
        reason = _foreign(run, result, file)
        if reason is not None:
            found.leave(kind, f"{names[file]} {reason}")
            continue
        what = _measured(kind, result)
        if what in newest:
            found.leave(kind, f"{newest[what].name} is older than {names[file]}, and of the same {OF[kind]}.")
        newest.pop(what, None)
        newest[what] = Drawn(result, file, names[file])
    found.lens = newest.get(_measured("lens", {}))
    probes = [(what, each) for what, each in reversed(newest.items()) if what[0] == "probe"]
    found.probes = [each for _, each in sorted(probes, key=lambda pair: pair[0][1] != "correct")]
    return found


def _names(files: Sequence[Path]) -> dict[Path, str]:
    """File -> its name, with its folder's where several have that name."""
    counts = Counter(file.name for file in files)
    return {file: file.name if counts[file.name] == 1 else f"{file.parent.name}/{file.name}" for file in files}


def _measured(kind: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells results of a kind apart: for probes the target, the class, the position, and whether other runs are judged."""
    if kind != "probe":
        return (kind,)
    asked = [(each, result.get(part)) for part, each in TELLING]
    told = [str(part.get(name)) if isinstance(part, Mapping) else "" for name, part in asked]
    return (kind, *told, str("transfer" in result))


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
        return "does not say of which run it is."
    if about.get("path") != run.path.name or about.get("model") != run.model:
        return f"is of the run {about.get('path')} of {about.get('model')}, not of {run.path.name} of {run.model}."
    written = datetime.fromtimestamp(file.stat().st_mtime).astimezone()
    created = _moment(run.created)
    if created is not None and written < created:
        return f"was written {written:%Y-%m-%d %H:%M}, before this run began ({created:%Y-%m-%d %H:%M})."
    return None


def _moment(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone()
    except (TypeError, ValueError):
        return None
