"""What is in a folder, as `nth_failures.py` compares it: without times, and whatever shards samples are in."""

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
"""What tells the time, or is drawn by chance."""
_known: dict[Any, Any] = {}
"""What was read before, by the bytes it was read from."""


def contents_of(folder: Path) -> dict[str, Any]:
    """All that is in a folder, by names without times: of runs and HDF5 files the samples, whatever shards they are in."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = TIMES.sub("T", str(path.relative_to(folder)))
        if (path / "run.h5").exists() or (path.is_dir() and list(path.glob("shard-*.h5"))):
            found[name] = samples_of(path)
        elif path.is_dir():
            found[name] = "folder"
        elif path.name == "run.h5" or re.fullmatch(r"shard-\d+\.h5", path.name):
            continue
        else:
            found[name] = file_of(path)
    return found


def samples_of(path: Path) -> list[str]:
    """Of every sample, all numbers and texts."""
    key = "samples", _digest(path)
    if key not in _known:
        _known[key] = _samples_of(path)
    found: list[str] = _known[key]
    return found


def _samples_of(path: Path) -> list[str]:
    run = open_run(path)
    found = [f"finished: {run.finished}"]
    for sample in run:
        kept = {
            name: value
            for name, value in sample.items()
            if name not in ("settings", "path", "shard", "index", "random_state", *VOLATILE)
        }
        found.append(repr(_plain(kept)))
    return sorted(found)


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
    """What `verify` finds in one file."""
    key = "problems", _digest(path)
    if key not in _known:
        _known[key] = verify(path)
    found: list[str] = _known[key]
    return found


def _digest(path: Path) -> tuple[tuple[str, str], ...]:
    files: Iterable[Path] = sorted(path.glob("*.h5")) if path.is_dir() else [path]
    return tuple((file.name, sha256_of(file)) for file in files)


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def rows_there(folder: Path) -> set[str]:
    """Without the verdicts, which come when a run is finished."""
    run = open_run(folder)
    return {
        repr(_plain({name: sample[name] for name in ("doc_id", "choice", "activations", "token_ids")}))
        for sample in run
    }


def bytes_of(folder: Path) -> dict[str, str]:
    """Of every file but a lock and `run.h5`, which a run may write again."""
    return {
        str(path.relative_to(folder)): sha256_of(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", "run.h5")
    }


def state_of(folder: Path) -> tuple[Any, ...]:
    """All that a command given again could see: names, and bytes but of files in hidden workplaces, which none reads."""
    found: list[Any] = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        plain = re.sub(r"[0-9a-f]{32}", "U", TIMES.sub("T", name))
        if path.is_dir() or ".partial" in name:
            found.append((plain, path.is_dir()))
        elif re.fullmatch(r"shard-\d+\.h5", path.name):
            found.append((plain, *problems_of(path), *Shard(path).replaces, *samples_of(path)))
        else:
            found.append((plain, sha256_of(path)))
    return tuple(found)


def difference(found: dict[str, Any], clean: dict[str, Any]) -> str:
    more, fewer = sorted(found.keys() - clean.keys()), sorted(clean.keys() - found.keys())
    other = [name for name in found.keys() & clean.keys() if found[name] != clean[name]]
    return f"too much: {more}, missing: {fewer}, other than in a clean run: {other}"
