"""The contents of a folder for `nth_failures.py` to compare: without times, and whichever shards hold the samples."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from AutomaticEval.store.hdf5.read import Shard
from AutomaticEval.store.reader import open_run
from AutomaticEval.store.upkeep.verify import verify

TIMES = re.compile(r"\d{8}_\d{6}(_\d+)?|\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d+")
VOLATILE = (
    "date",
    "start_time",
    "end_time",
    "total_evaluation_time_seconds",
    "_fingerprint",
    "run_id",
    "timestamp",
    "created",
)
"""Fields that hold a time, or something drawn at random."""
_known: dict[Any, Any] = {}
"""Contents that were read before, by the checksums of their files."""


def contents_of(folder: Path) -> dict[str, Any]:
    """Name without times -> contents. Runs and HDF5 files are given as their samples, whichever shards hold them."""
    contents: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = TIMES.sub("T", str(path.relative_to(folder)))
        if (path / "run.h5").exists() or (path.is_dir() and list(path.glob("shard-*.h5"))):
            contents[name] = samples_of(path)
        elif path.is_dir():
            contents[name] = "folder"
        elif path.name == "run.h5" or re.fullmatch(r"shard-\d+\.h5", path.name):
            continue
        else:
            contents[name] = file_of(path)
    return contents


def samples_of(path: Path) -> list[str]:
    """All numbers and texts of every sample, sorted."""
    key = "samples", _digest(path)
    if key not in _known:
        _known[key] = _samples_of(path)
    known: list[str] = _known[key]
    return known


def _samples_of(path: Path) -> list[str]:
    run = open_run(path)
    samples = [f"finished: {run.finished}"]
    for sample in run:
        kept = {
            name: value
            for name, value in sample.items()
            if name not in ("settings", "path", "shard", "index", "random_state", *VOLATILE)
        }
        samples.append(repr(_plain(kept)))
    return sorted(samples)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in sorted(value.items())}
    return value


def file_of(path: Path) -> Any:
    if path.suffix == ".h5":
        return samples_of(path)
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: (each.dtype.str, each.tolist()) for name, each in arrays.items()}
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [_without_times(json.loads(line)) for line in lines]
    return sha256_of(path)


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_times(each) for name, each in value.items() if name not in VOLATILE}
    if isinstance(value, list):
        return [_without_times(each) for each in value]
    return value


def problems_of(path: Path) -> list[str]:
    """The problems that `verify` reports for one file."""
    key = "problems", _digest(path)
    if key not in _known:
        _known[key] = verify(path)
    known: list[str] = _known[key]
    return known


def _digest(path: Path) -> tuple[tuple[str, str], ...]:
    files: Iterable[Path] = sorted(path.glob("*.h5")) if path.is_dir() else [path]
    return tuple((file.name, sha256_of(file)) for file in files)


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def rows_there(folder: Path) -> set[str]:
    """Rows and keys of every sample, without the verdicts, which are written when a run is finished."""
    run = open_run(folder)
    return {
        repr(_plain({name: sample[name] for name in ("doc_id", "choice", "activations", "token_ids")}))
        for sample in run
    }


def bytes_of(folder: Path) -> dict[str, str]:
    """Checksums of all files except locks and `run.h5`, which a run may write again."""
    return {
        str(path.relative_to(folder)): sha256_of(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", "run.h5")
    }


def state_of(folder: Path) -> tuple[Any, ...]:
    """Everything that a repeated command could see: all names, and all contents except of `.partial` files, which no command reads."""
    state: list[Any] = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        plain = re.sub(r"[0-9a-f]{32}", "U", TIMES.sub("T", name))
        if path.is_dir() or ".partial" in name:
            state.append((plain, path.is_dir()))
        elif re.fullmatch(r"shard-\d+\.h5", path.name):
            state.append((plain, *problems_of(path), *Shard(path).replaces, *samples_of(path)))
        else:
            state.append((plain, sha256_of(path)))
    return tuple(state)


def difference(contents: dict[str, Any], clean: dict[str, Any]) -> str:
    more, fewer = sorted(contents.keys() - clean.keys()), sorted(clean.keys() - contents.keys())
    other = [name for name in contents.keys() & clean.keys() if contents[name] != clean[name]]
    return f"too much: {more}, missing: {fewer}, other than in a clean run: {other}"
