"""Samples for other tools: their columns as plain values, and their activations in another dtype."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from AutomaticEval.public_names import without_folders
from AutomaticEval.store.contents.changed import narrowed
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.run import Run

Advance = Callable[[int], None]
"""Called again and again while work goes on, with the number of samples that were done since the last call."""


def column_names(contents: Contents) -> list[str]:
    """The columns that are exported: all but those that say in which shard of the run a sample is."""
    return [name for name in contents.columns.names if name not in ("shard", "index")]


def records(run: Run) -> Iterator[dict[str, Any]]:
    """Every sample's columns and token ids, one dict a sample."""
    contents = run.contents
    whole = {
        name: contents.columns.whole(name) for name in contents.columns.names
    }  # read at once, so that `run[i]` opens no file for them
    for number in range(contents.n_samples):
        yield {
            **{name: _plain(whole[name][number]) for name in column_names(contents)},
            "input_ids": contents.input_ids.item(number).tolist(),
            "generated_ids": contents.generated_ids.item(number).tolist(),
        }


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, array) else value


def absolute_paths(run: Run) -> list[str]:
    """The absolute paths in a run's settings, each once."""
    paths: dict[str, None] = {}

    def look(value: Any) -> None:
        if isinstance(value, Mapping):
            for each in value.values():
                look(each)
        elif isinstance(value, list):
            for each in value:
                look(each)
        elif isinstance(value, str) and without_folders(value) != value:
            paths[value] = None

    look({"settings": run.settings})
    return list(paths)


def sample(run: Run, number: int, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """One sample as a dict, with its activations in other dtypes. dtypes: key -> the new dtype. Raises CaptureError for a number that is too large."""
    data = run[number]
    changed = {key: narrowed(key, tensor, dtypes[key]) for key, tensor in data["activations"].items()}
    return {**data, "activations": changed}
