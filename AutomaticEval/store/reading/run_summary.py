"""What a run is, in a few lines of text: for people, who look at it in a notebook or on a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from AutomaticEval.samples import RowFormat
from AutomaticEval.settings import RunSettings
from AutomaticEval.store.contents.columns import Columns
from AutomaticEval.store.reading.reduced_runs import how_reduced


class TaskSummary(NamedTuple):
    """The samples of one task."""

    task: str
    n_samples: int
    n_docs: int
    correct: float | None
    """The share of the documents that were answered correctly, of those with a verdict; None when none has one."""


def task_summaries(table: Columns, n_samples: int) -> list[TaskSummary]:
    """The tasks of samples, by name. A document counts once: as its first sample says."""
    absent: dict[str, Sequence[Any]] = {
        "task": [""] * n_samples,
        "doc_id": range(n_samples),
        "correct": [None] * n_samples,
    }
    columns = [table.whole(name) if name in table.names else values for name, values in absent.items()]
    rows: dict[str, list[tuple[int | None, bool | None]]] = {}
    for task, doc_id, correct in zip(*columns, strict=True):
        rows.setdefault(task or "", []).append((doc_id, correct))
    found = []
    for task, part in sorted(rows.items()):
        docs = dict(reversed(part))  # of each, what its first row says
        known = [correct for correct in docs.values() if correct is not None]
        found.append(TaskSummary(task, len(part), len(docs), sum(known) / len(known) if known else None))
    return found


def run_lines(
    made_with: RunSettings, tasks: Sequence[TaskSummary], formats: Mapping[str, RowFormat]
) -> list[tuple[str, str]]:
    """(name, text): the tasks with their scores, what was selected, the sites with their shapes, and the edits."""
    lines = []
    for each in tasks:
        score = "" if each.correct is None else f", {each.correct:.4f} correct"
        lines.append((each.task or "samples", f"{each.n_samples} samples of {each.n_docs} documents{score}"))
    kept = {name: getattr(made_with, name) for name in ("sites", "layers", "positions", "store_dtype")}
    selection = ", ".join(f"{name}={value}" for name, value in kept.items() if value is not None)
    lines.append(("selection", selection or "unknown"))
    by_format: dict[str, list[str]] = {}
    for key, row_format in formats.items():
        by_format.setdefault(f"{str(row_format.dtype).removeprefix('torch.')}, width {row_format.width}", []).append(
            key
        )
    lines += [("sites", f"{', '.join(keys)}: {kind}") for kind, keys in by_format.items()]
    if made_with.reduce is not None or made_with.project is not None:
        lines.append(("reduced", how_reduced(made_with.as_dict())))
    return [*lines, ("edits", "; ".join(map(str, made_with.edits)) if made_with.edits else "none")]
