"""Samples on their way out to other tools: plain columns, and activations in another dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from AutomaticEval.public_names import without_folders
from AutomaticEval.store.contents.changed import narrowed
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.reader import Run

Advance = Callable[[int], None]
"""Told how many samples were just done."""


def column_names(held: Contents) -> list[str]:
    return [name for name in held.columns.names if name not in ("shard", "index")]


def records(run: Run) -> Iterator[dict[str, Any]]:
    """Every sample's columns and token ids."""
    held = run.contents
    whole = {name: held.columns.whole(name) for name in held.columns.names}  # all: `run[i]` then opens no file for them
    for number in range(held.n_samples):
        yield {
            **{name: whole[name][number] for name in column_names(held)},
            "input_ids": held.input_ids.item(number).tolist(),
            "generated_ids": held.generated_ids.item(number).tolist(),
        }


def places_of(run: Run) -> list[str]:
    """The absolute paths in what a run says of itself, beside its samples."""
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
    """One sample with its activations in their new dtypes."""
    data = run[number]
    changed = {key: narrowed(key, tensor, dtypes[key]) for key, tensor in data["activations"].items()}
    return {**data, "activations": changed}
