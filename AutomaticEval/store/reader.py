"""Reads files and runs back: `load_activations` for one sample, `open_run` for many, lazily.

Every file is checked before it is believed; errors carry the path in the file. Never unpickles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import h5py
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from AutomaticEval.errors import ManySamples, NewerFormat, NotActivations, RefusedPickle, StoreError, TruncatedFile
from AutomaticEval.sites import key_order
from AutomaticEval.store import format as contract
from AutomaticEval.store.writer import PICKLE_SUFFIXES

_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def load_activations(path: str | Path) -> dict[str, Any]:
    """The sample in a file, as the drop-in functions returned it, bit for bit.

    path: a file with one sample, a run folder with one, or the old pickle name of a file written as `.h5`.
    Returns prompt, response, model, timestamp, input_ids [1, P], generated_ids [R], token_ids, positions and
    tokens (aligned with the rows), n_prompt_tokens, settings, and activations: key -> [n_positions, width].
    Raises UnreadableFile (NotActivations, TruncatedFile, NewerFormat), RefusedPickle, ManySamples.
    """
    given = Path(path).expanduser()
    if given.suffix.lower() in PICKLE_SUFFIXES:
        if not given.with_suffix(".h5").exists():
            return _load_torch(given)
        given = given.with_suffix(".h5")
    if given.is_dir():
        run = open_run(given)
        return run[_only(given, len(run))]
    shard = Shard(given)
    return {**shard.sample(_only(given, shard.n_samples)), "path": str(given.resolve())}


def open_run(path: str | Path) -> Run:
    """The samples of a run folder (or of one file) as a lazy sequence. Raises UnreadableFile, StoreError."""
    return Run(Path(path).expanduser())


def _only(path: Path, n_samples: int) -> int:
    if n_samples != 1:
        raise ManySamples(f"{path} holds {n_samples} samples, not one; read it with open_run({str(path)!r})[i].")
    return 0


def _load_torch(path: Path) -> dict[str, Any]:
    """An older script's file: tensors and plain values only. What would need unpickling is refused."""
    if not path.exists():
        raise StoreError(f"no file {path}, nor {path.with_suffix('.h5')} beside it.")
    try:
        found = torch.load(path, weights_only=True)
    except Exception as failure:  # torch raises many kinds; each means that it is not plain tensors
        raise RefusedPickle(
            f"{path} is a pickle of more than tensors and plain values; unpickling it could run any code, so it is "
            "refused. Save it again with torch.save(dict_of_tensors), or capture again."
        ) from failure
    if not isinstance(found, dict):
        raise RefusedPickle(f"{path} holds a {type(found).__name__}, not a dict of activations.")
    return found


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Failures inside carry the file."""
    try:
        yield
    except (OSError, LookupError, ValueError, RuntimeError, AttributeError, TypeError, MemoryError) as failure:
        raise TruncatedFile(
            f"{path} cannot be read ({failure}): it is damaged; capture it again or restore a copy."
        ) from failure


def _open(path: Path, kind: str) -> h5py.File:
    """Open a file of ours, or say what it is instead."""
    if not path.exists():
        raise StoreError(f"no file {path}.")
    with path.open("rb") as raw:
        head = raw.read(len(_SIGNATURE))
    if head != _SIGNATURE:
        empty = "it is empty" if not head else f"it begins with {head[:8]!r}"
        raise NotActivations(f"{path} is not an HDF5 file ({empty}); activations are saved as .h5.")
    try:
        file = h5py.File(path, "r")
    except OSError as failure:
        raise TruncatedFile(
            f"{path} was cut short or damaged ({failure}); capture it again or restore a copy."
        ) from failure
    try:
        _check_version(path, file, kind)
    except BaseException:
        file.close()
        raise
    return file


def _check_version(path: Path, file: h5py.File, kind: str) -> None:
    found = file.attrs.get("format")
    if found != kind:
        raise NotActivations(f"{path} is HDF5, but not ours: its format attribute is {found!r}, expected {kind!r}.")
    version = str(file.attrs.get("format_version"))
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) > contract.VERSION[0]:
        ours = ".".join(map(str, contract.VERSION))
        raise NewerFormat(
            f"{path} has format version {version}; this version reads up to {ours}. Upgrade AutomaticEval."
        )


class Shard:
    """One file. It is opened for each read, and never held open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._reading() as file:
            self.model = str(file.attrs["model"])
            self.settings: dict[str, Any] = json.loads(file.attrs["settings"])
            known = list(contract.COLUMNS)  # a newer minor version may have more
            self.columns = sorted(file["samples"], key=lambda name: known.index(name) if name in known else len(known))
            self.n_samples = len(file["segments/offset"]) - 1
            self.keys = sorted(file["activations"], key=key_order)
            self._check_shapes(file)

    @contextmanager
    def _reading(self) -> Iterator[h5py.File]:
        with _open(self.path, contract.SHARD_FORMAT) as file, _naming(self.path):
            yield file

    def _check_shapes(self, file: h5py.File) -> None:
        n_rows = len(file["rows/token_id"])
        for key in self.keys:
            if file["activations"][key].ndim != 2 or len(file["activations"][key]) != n_rows:
                shape = file["activations"][key].shape
                raise ValueError(f"/activations/{key} has shape {shape}, expected [{n_rows}, width]")
        start, stop = file["segments/start"][()], file["segments/stop"][()]
        if len(stop) and (stop.max() > n_rows or start.min() < 0 or (start > stop).any()):
            raise ValueError(f"/segments point outside the {n_rows} rows")

    def records(self) -> list[dict[str, Any]]:
        """The columns of every sample."""
        with self._reading() as file:
            return _records(file, self.columns)

    def sample(self, index: int) -> dict[str, Any]:
        """One sample, as `load_activations` gives it."""
        with self._reading() as file:
            fields = {
                name: contract.decode_column(file["samples"][name], slice(index, index + 1))[0] for name in self.columns
            }
            rows = _Segments(file).rows(index)
            token_ids, positions = (_read_ints(file[f"rows/{name}"], rows) for name in ("token_id", "position"))
            prompt, response = (_ragged(file, name, index) for name in ("input_ids", "generated_ids"))
            fed = dict(enumerate((prompt + response)[:-1]))
            if [fed.get(position) for position in positions] != token_ids:
                raise ValueError(f"the rows of sample {index} are not its tokens")
            activations = {key: _read_rows(file["activations"][key], rows) for key in self.keys}
            tokens = _strings(file, token_ids)
        return contract.assemble(
            self.model, self.settings, fields, prompt, response, token_ids, positions, tokens, activations
        )

    def rows_at(self, key: str, indices: Sequence[int], place: int) -> Tensor:
        """Row number `place` (negative from the end) of each sample: [n, width]."""
        with self._reading() as file:
            segments = _Segments(file)
            chosen = []
            for index in indices:
                rows = segments.rows(index)
                if not -len(rows) <= place < len(rows):
                    raise StoreError(f"{self.path}: sample {index} has {len(rows)} rows, no row {place}.")
                chosen.append(int(rows[place]))
            return _read_rows(file["activations"][key], np.array(chosen))


class _Index(NamedTuple):
    """What `run.h5` says."""

    run_id: str | None
    shards: list[str]
    records: list[dict[str, Any]]


class Run(Sequence[dict[str, Any]]):
    """A run as a sequence of samples; each is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise StoreError(f"no file or run folder {path}.")
        self.path = path
        self.finished = (path / "run.h5").exists()
        """Whether the run was evaluated to its end; without that, samples have no scores."""
        index = self._read_index() if self.finished else None
        folder = path if path.is_dir() else path.parent
        names = index.shards if index else self._found_shards()
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise StoreError(f"{path}: the shard {missing[0]} is missing; restore it from a copy, or run again.")
        self._shards = [Shard(folder / name) for name in names]
        for shard in self._shards:
            if index is not None and shard.settings.get("run_id") != index.run_id:
                raise StoreError(f"{shard.path} is of another run; restore this run's own shard from a copy.")
        self._records = index.records if index else self._shards_records()

    def _read_index(self) -> _Index:
        with _open(self.path / "run.h5", contract.RUN_FORMAT) as file, _naming(self.path / "run.h5"):
            run_id = json.loads(file.attrs["settings"]).get("run_id")
            return _Index(run_id, contract.decode_column(file["shards/name"]), _records(file, list(file["samples"])))

    def _found_shards(self) -> list[str]:
        """The shards of a run without an index, or the one file."""
        if not self.path.is_dir():
            return [self.path.name]
        names = sorted(path.name for path in self.path.glob("shard-*.h5"))
        if not names:
            raise NotActivations(f"{self.path} is not a run: it holds neither run.h5 nor shard-*.h5.")
        return names

    def _shards_records(self) -> list[dict[str, Any]]:
        return [
            {**record, "shard": number, "index": index}
            for number, shard in enumerate(self._shards)
            for index, record in enumerate(shard.records())
        ]

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """Sample number index, with its activations, task, doc and correctness; or a list for a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        record = self._records[index]
        sample = self._shards[record["shard"]].sample(record["index"])
        return {**sample, **{name: value for name, value in record.items() if name not in _BOOKKEEPING}}

    @cached_property
    def keys(self) -> list[str]:
        """The activations that every sample has: embeddings, layer_0, …"""
        return self._shards[0].keys if self._shards else []

    @property
    def settings(self) -> dict[str, Any]:
        """What decided the numbers: dtype, attention kernel, library versions, selection."""
        return self._shards[0].settings if self._shards else {}

    def table(self) -> pd.DataFrame:
        """One row a sample: task, doc_id, choice, prompt, response, logprob, correct, metrics, …"""
        kept = [{name: value for name, value in record.items() if name not in _BOOKKEEPING} for record in self._records]
        return pd.DataFrame(kept)

    def activations(self, key: str, position: str | int = "last") -> Tensor:
        """One row of every sample: [n_samples, width], in the order of `table`.

        key: one of `keys`. position: "last", "first", or a number among the sample's stored rows.
        Raises StoreError for an unknown key or a sample without that row.
        """
        if key not in self.keys:
            raise StoreError(f"{self.path} holds no {key!r}; it has {', '.join(self.keys)}.")
        places: dict[str | int, int] = {"last": -1, "first": 0}
        place = places.get(position, position)
        if not isinstance(place, int):
            raise StoreError(f'no position {position!r}; write "last", "first" or a number.')
        parts: list[Tensor | None] = [None] * len(self)
        for number, shard in enumerate(self._shards):
            mine = [i for i, record in enumerate(self._records) if record["shard"] == number]
            rows = shard.rows_at(key, [self._records[i]["index"] for i in mine], place)
            for i, row in zip(mine, rows, strict=True):
                parts[i] = row
        return torch.stack([part for part in parts if part is not None])

    def __repr__(self) -> str:
        ending = "" if self.finished else ", not finished"
        return f"<Run {self.path}: {len(self)} samples, {len(self.keys)} sites{ending}>"


_BOOKKEEPING = ("shard", "index", "batch_rows", "batch_columns")


def _records(file: h5py.File, columns: Sequence[str]) -> list[dict[str, Any]]:
    decoded = {name: contract.decode_column(file["samples"][name]) for name in columns}
    return [dict(zip(decoded, values, strict=True)) for values in zip(*decoded.values(), strict=True)]


class _Segments:
    """Which rows each sample of a file has."""

    def __init__(self, file: h5py.File) -> None:
        self._offset, self._start, self._stop = (file[f"segments/{name}"][()] for name in ("offset", "start", "stop"))

    def rows(self, index: int) -> np.ndarray[Any, Any]:
        mine = range(self._offset[index], self._offset[index + 1])
        ranges = [np.arange(self._start[segment], self._stop[segment]) for segment in mine]
        return np.concatenate(ranges) if ranges else np.arange(0)


def _ragged(file: h5py.File, name: str, index: int) -> list[int]:
    first, last = file[f"{name}/offset"][index : index + 2]
    values: list[int] = file[f"{name}/values"][first:last].tolist()
    return values


def _runs_of(rows: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """Row indices, in any order, as the half-open ranges in which they follow one another."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for part in np.split(rows, breaks):
        if len(part):
            yield int(part[0]), int(part[-1]) + 1


def _read_ints(dataset: h5py.Dataset, rows: np.ndarray[Any, Any]) -> list[int]:
    return [value for start, stop in _runs_of(rows) for value in dataset[start:stop].tolist()]


def _read_rows(dataset: h5py.Dataset, rows: np.ndarray[Any, Any]) -> Tensor:
    """Rows of an activation dataset, as raw bits: HDF5's conversion of bfloat16 is 200 times slower."""
    dtype = getattr(torch, str(dataset.attrs["dtype"]))
    width = dataset.shape[1]
    raw = np.empty((len(rows), width), dtype=contract.bits_type(dtype))
    space, stored = dataset.id.get_space(), dataset.id.get_type()
    if stored != contract.hdf5_type(dtype):
        raise ValueError(f"{dataset.name} is not of the type that its dtype attribute {dtype} says")
    at = 0
    for start, stop in _runs_of(rows):
        space.select_hyperslab((start, 0), (stop - start, width))
        part = raw[at : at + stop - start]
        dataset.id.read(h5py.h5s.create_simple(part.shape), space, part, mtype=stored)
        at += stop - start
    return contract.from_bits(raw, dtype)


def _strings(file: h5py.File, token_ids: Sequence[int]) -> list[str]:
    known = dict(
        zip(file["vocabulary/token_id"][()].tolist(), contract.decode_column(file["vocabulary/token"]), strict=True)
    )
    return [known[token] for token in token_ids]
