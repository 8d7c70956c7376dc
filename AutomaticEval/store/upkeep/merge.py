"""Several runs of the same model and selection, joined into one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from AutomaticEval.errors import OtherSettings, StoreError
from AutomaticEval.public_names import is_same
from AutomaticEval.settings import IDENTITY, Difference, RunSettings
from AutomaticEval.store.contents.joined import joined
from AutomaticEval.store.hdf5.damage import Advance, ignore
from AutomaticEval.store.reader import open_run
from AutomaticEval.store.run import Run
from AutomaticEval.store.upkeep.copies import without_shards, write_copy
from AutomaticEval.store.upkeep.verify import check

SELECTED = ("store_dtype", "reduce", "project", "sites", "layers", "positions")
SAME = ("dtype", *SELECTED, "quantization", "revision", "shape", "heads", "edits", *IDENTITY)
"""The settings that runs must share to be joined: the model, what was changed in it, and the selection."""


def merge(
    paths: Sequence[Path], destination: Path, *, compression: str | None = None, advance: Advance = ignore
) -> Path:
    """One file that holds all samples of one or more runs of the same model and selection. Returns its path.

    advance: is told how many bytes of activations were written.
    Raises OtherSettings for runs of another model or selection, StoreError when two hold the same request, PathExists, DamagedFile.
    """
    for path in paths:
        check(path)
    runs = [open_run(path) for path in paths]
    _check_joinable(runs)
    contents = joined([run.contents for run in runs], _joined_settings(runs))
    return write_copy(destination, without_shards(contents), compression, advance)


def _check_joinable(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        apart = first.made_with.differences(run.made_with, f"{first.path} and {run.path}", SAME)
        apart += _described_apart(first, run)
        if not (is_same(run.model, first.model) or is_same(first.model, run.model)) or apart:
            named = ", ".join(f"{name} {one!r} and {other!r}" for name, one, other in apart)
            raise OtherSettings(
                f"{first.path} and {run.path} are not of the same model and selection: "
                f"{named or f'{first.model} and {run.model}'}."
            )
    if len(runs) > 1:
        _check_distinct(runs)


def _described_apart(first: Run, run: Run) -> list[Difference]:
    """How two runs of a described model differ, when other descriptions found their sites. One without any was made by the names that are known."""
    name = "model_description"
    before, now = ((each.made_with.loaded_with or {}).get(name) for each in (first, run))
    return [Difference(name, before, now)] if before and now and before != now else []


def _check_distinct(runs: Sequence[Run]) -> None:
    """Raises StoreError when two runs hold the same request of the same document."""
    seen: dict[tuple[Any, ...], int] = {}
    for number, run in enumerate(runs):
        for record in run.records():
            request = tuple(record.get(name) for name in ("task", "doc_id", "choice", "repeat"))
            if None not in request[:2] and seen.setdefault(request, number) != number:
                other = runs[seen[request]].path
                raise StoreError(f"{other} and {run.path} both hold {request[0]} document {request[1]}; leave one out.")


def _joined_settings(runs: Sequence[Run]) -> dict[str, Any]:
    """The settings that all runs share; where they differ, under `merged` those of each run."""
    every = [run.settings for run in runs]
    same = {name: value for name, value in every[0].items() if all(one.get(name) == value for one in every)}
    if len(runs) == 1:
        return same
    parts = [{name: one[name] for name in one if name not in same} for one in every]
    return RunSettings.from_dict(same).changed(merged=parts).as_dict()
