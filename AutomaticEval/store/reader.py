"""Reads files and runs back: `load_activations` for one sample, `open_run` for many, lazily. Never unpickles."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from AutomaticEval.errors import ManySamples, NotActivations, RefusedPickle, StoreError, TruncatedFile, did_you_mean
from AutomaticEval.samples import Rows, fed_of, sample_data
from AutomaticEval.selection import Positions
from AutomaticEval.store.contents.changed import reordered
from AutomaticEval.store.contents.columns import Columns, listed
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.contents.joined import joined
from AutomaticEval.store.disk.file_names import PICKLE_SUFFIXES
from AutomaticEval.store.hdf5 import contract
from AutomaticEval.store.hdf5.checksums import OF_ATTRIBUTES
from AutomaticEval.store.hdf5.extents import naming
from AutomaticEval.store.hdf5.open import OneSite, OpenedFile
from AutomaticEval.store.hdf5.read import FileColumns, Shard
from AutomaticEval.store.hdf5.room import EXPANSION
from AutomaticEval.store.ragged import Array, indices_of
from AutomaticEval.store.row_array import Kind, RowArray, RowsDataset, ShardedRows
from AutomaticEval.store.run_folder import INDEX, living, shard_names, tell_set_aside
from AutomaticEval.store.shuffled import BUFFER_ROWS, ShuffledRows
from AutomaticEval.store.writer import Placed, order_of

Open = Callable[..., Shard]
_BOOKKEEPING = ("shard", "index", "batch_rows", "batch_columns")


def load_activations(path: str | Path, sample: int | None = None, *, check: bool = True) -> dict[str, Any]:
    """One sample of a file or run folder; of a file with one sample, as the drop-in functions returned it, bit for bit.

    path: a file, a run folder, or the old pickle name of a file written as `.h5`. sample: which one, from 0; needed
    where there are several. check: hold the numbers against their checksums; False for those who measure.
    Returns prompt, response, model, timestamp, input_ids [1, P], generated_ids [R], token_ids, positions and
    tokens (aligned with the rows), n_prompt_tokens, settings, and activations: key -> [n_positions, width].
    Raises UnreadableFile (NotActivations, TruncatedFile, DamagedFile, NewerFormat), RefusedPickle, ManySamples, StoreError.
    """
    given = Path(path).expanduser()
    if given.suffix.lower() in PICKLE_SUFFIXES:
        if not given.with_suffix(".h5").exists():
            return _load_torch(given)
        given = given.with_suffix(".h5")
    run = open_run(given, check=check)
    if sample is None and len(run) != 1:
        raise ManySamples(
            f"{given} holds {len(run)} samples, not one; say which (sample=0), or read it with open_run({str(given)!r})."
        )
    number = sample or 0
    if not -len(run) <= number < len(run):
        raise StoreError(f"{given} has no sample {number}; it holds {len(run)}, from 0.")
    found = run[number]
    return found if given.is_dir() else {**found, "path": str(given.resolve())}


def open_run(path: str | Path, *, check: bool = True) -> Run:
    """The samples of a run folder (or of one file) as a lazy sequence.

    check: hold every number that is read, now and later, against its checksum; False for those who measure.
    Raises UnreadableFile, StoreError; every read DamagedFile, with the shard, the dataset and the rows.
    """
    given = Path(path).expanduser().absolute()
    return Run(given.parent if given.name == INDEX and given.is_file() else given, check=check)


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


class Run(Sequence[dict[str, Any]]):
    """A run as a sequence of samples; each is read when it is asked for. `where` gives some of them."""

    def __init__(self, path: Path, *, check: bool = True) -> None:
        if not path.exists():
            raise StoreError(f"no file or run folder {path}.")
        self.path = path
        tell_set_aside(path)
        opened = partial(Shard, check=check)
        index = opened(path / INDEX, contract.RUN_FORMAT) if path.is_dir() and (path / INDEX).exists() else None
        self.finished = index is not None and index.attributes.get("state", "finished") == "finished"
        """Whether the run was evaluated to its end; without that, samples have no scores."""
        if path.is_file():
            alone = opened(path)
            self._store, self._contents = _stored([alone]), alone.contents()
        elif index is not None and index.has_rows:
            self._store = _listed(path, index, opened, check=check)
            self._contents = index.contents()
        else:
            self._store, self._contents = _gathered(path, index, opened)
        self._index = index if index is not None and index.has_rows else None
        self._order = np.arange(self._contents.n_samples)

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """Sample number index, with its activations, task, doc and correctness; or a list for a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = int(self._order[index])
        ranges, held = self._contents.segments.item(number), self._contents
        token_ids, positions = (
            [int(v) for a, b in ranges for v in ints[a:b]] for ints in (held.token_ids, held.positions)
        )
        prompt, response = held.input_ids.item(number).tolist(), held.generated_ids.item(number).tolist()
        fed = dict(enumerate(fed_of(prompt, response)))
        with naming(self.path):
            if [fed.get(position) for position in positions] != token_ids:
                raise ValueError(f"the rows of sample {number} are not its tokens")
            strings = held.strings()
            tokens = [strings[token] for token in token_ids]
        rows = Rows(token_ids, tokens, positions, {key: self._store.read(key, ranges) for key in self.keys})
        return sample_data(held.model, held.settings, held.columns.record(number), prompt, response, rows)

    def read(self, index: int, key: str) -> Tensor:
        """One site of one sample: [n_positions, width]. Reads no more than those bytes."""
        self._check_key(key)
        return self._store.read(key, self._contents.segments.item(int(self._order[index])))

    def steps(self, index: int, key: str) -> Tensor | None:
        """What one step of each number of a sample's rows stands for: [n_positions, width]. None unless they are stored as int8."""
        self._check_key(key)
        ranges = self._contents.segments.item(int(self._order[index]))
        return self._store.scales(key, ranges) if self._store.kinds[key].dtype == torch.int8 else None

    def layers(self, kind: str = "resid_post") -> dict[int, LayerSamples]:
        """One kind of site of every layer that has it: `run.layers("mlp_out")[layer][sample]` is [n_positions, width].

        Nothing is read before it is asked for. Raises StoreError for a kind that no layer has.
        """
        ending = "" if kind == "resid_post" else f".{kind}"
        found = {key: re.fullmatch(rf"layer_(\d+){re.escape(ending)}", key) for key in self.keys}
        layers = {int(match[1]): LayerSamples(self, key) for key, match in found.items() if match}
        if not layers:
            raise StoreError(f"{self.path} holds no {kind!r}. It has {', '.join(self.keys)}.")
        return layers

    def pattern(self, index: int, layer: int) -> Tensor:
        """What one sample's positions attend to: [n_heads, n_positions, key_pos], key_pos up to the sample's length.

        Raises StoreError for a run that kept no pattern of the layer.
        """
        shape = self.settings.get("shape", {})
        n_layers, n_heads = (shape.get(name) or 0 for name in ("n_layers", "n_heads"))
        rows = self.read(index, f"layer_{layer + n_layers if layer < 0 else layer}.pattern")
        if n_heads < 1 or rows.shape[1] % n_heads:
            raise StoreError(
                f"{self.path} does not say into how many heads its {rows.shape[1]} numbers are to be split."
            )
        n_ids = len(self._contents.input_ids.item(int(self._order[index])))
        return rows.view(len(rows), n_heads, -1).transpose(0, 1)[:, :, :n_ids]

    @property
    def keys(self) -> list[str]:
        """The activations that every sample has: embeddings, layer_0, …"""
        return self._store.keys

    @property
    def model(self) -> str:
        """The model's name, as it was given."""
        return self._contents.model

    @property
    def settings(self) -> dict[str, Any]:
        """What decided the numbers: dtype, attention kernel, library versions, selection."""
        return dict(self._contents.settings)

    @property
    def contents(self) -> Contents:
        """All that it holds, for what is made of it: merge, prune, export."""
        stored = {key: self._store.activation(key) for key in self.keys}
        whole = replace(self._contents, activations=stored)
        return whole if len(self) == whole.n_samples else reordered(whole, self._order)

    @property
    def non_finite(self) -> dict[str, int]:
        """Site or column -> how many of the run's numbers are infinite or NaN, of all samples. Older files do not say it."""
        return _summed([shard.non_finite for shard in ([self._index] if self._index else self.shards)])

    def finite(self) -> Array:
        """[n_samples], bool: whether no row of a sample, and not its logprob, is infinite or NaN: `run.where(run.finite())`.

        Reads the sites that have such numbers, and of older files all.
        """
        wrong, counts = np.zeros(len(self._contents.token_ids), dtype=bool), self.non_finite
        for key in self.keys:
            if counts.get(key, 1):
                wrong |= self._store.non_finite_rows(key)
        sums, held = np.concatenate([[0], np.cumsum(wrong)]), self._contents.segments
        ranges = held.values[:]
        by_range = np.concatenate([[0], np.cumsum(sums[ranges[:, 1]] - sums[ranges[:, 0]])])
        found = by_range[held.offset[1:]] == by_range[held.offset[:-1]]
        if counts.get("logprob", 1) and "logprob" in self._contents.columns.names:
            values = self._contents.columns.whole("logprob")
            found &= np.array([value is None or math.isfinite(value) for value in values], dtype=bool)
        whole: Array = found[self._order]
        return whole

    @property
    def shards(self) -> list[Shard]:
        """The files that hold the rows, each checked when it is first used."""
        return self._store.shards

    def records(self) -> list[dict[str, Any]]:
        """The columns of every sample, with batch shapes and places in the shards."""
        columns = self._contents.columns
        whole = {name: columns.whole(name) for name in columns.names}
        return [{name: values[number] for name, values in whole.items()} for number in self._order.tolist()]

    def table(self) -> pd.DataFrame:
        """One row a sample: task, doc_id, choice, prompt, response, logprob, correct, metrics, …"""
        names = [name for name in self._contents.columns.names if name not in _BOOKKEEPING]
        return pd.DataFrame({name: _series(self.column(name)) for name in names})

    def column(self, name: str) -> list[Any]:
        """One column of the table. Raises StoreError for one that there is not."""
        names = self._contents.columns.names
        if name not in names:
            raise StoreError(
                f"{self.path} has no column {name!r}.{did_you_mean(name, names)} It has {', '.join(names)}."
            )
        whole = self._contents.columns.whole(name)
        return [whole[number] for number in self._order.tolist()]

    def where(self, mask: Any = None, **wanted: Any) -> Run:
        """The samples whose columns have these values: `run.where(correct=True, task="mmlu_anatomy")`.

        A list, tuple or set gives several values; a function is asked for each value. mask: a truth value for each
        sample, for what one column does not say: `run.where(table.choice == table.prediction)`.
        Raises StoreError for a column that there is not, or a mask of another length.
        """
        kept = np.ones(len(self), dtype=bool) if mask is None else np.array(mask, dtype=bool)
        if kept.shape != (len(self),):
            raise StoreError(
                f"the mask has shape {kept.shape}; expected one truth value for each of {len(self)} samples."
            )
        for name, value in wanted.items():
            if isinstance(value, Iterator):
                value = list(value)
            kept &= np.array([_matches(found, value) for found in self.column(name)], dtype=bool)
        return self._some(self._order[kept])

    def _some(self, order: Array) -> Run:
        some = copy.copy(self)
        some._order = order
        return some

    def activations(self, key: str, position: str | int = "last") -> Tensor:
        """One row of every sample: [n_samples, width], in the order of `table`.

        key: one of `keys`. position: "last" or "first" of the sample's stored rows, a number among them, or one
        position of the sequence: "prompt[-1]", "response[0]".
        Raises StoreError for an unknown key or a sample without that row.
        """
        self._check_key(key)
        return self._store.take(key, self._rows_at(position))

    def rows(self, key: str, *, by_sample: bool = False) -> RowArray:
        """All rows of these samples, each once, in the files' order, as an array-like [n_rows, width] on the disk.

        by_sample: sample after sample, with the rows that samples share in each.
        """
        self._check_key(key)
        numbers = indices_of(self._contents.segments.take(self._order).values)
        if by_sample:
            return self._rows(key, numbers)
        return self._rows(key, numbers if np.all(numbers[1:] > numbers[:-1]) else np.unique(numbers))

    def _rows(self, key: str, numbers: Array) -> RowArray:
        return RowArray(self._store, key, numbers, self._contents.token_ids, self._contents.positions)

    @overload
    def dataset(self, key: str, position: str | int | None = None, label: str | None = None) -> RowsDataset: ...
    @overload
    def dataset(
        self, key: str, *, shuffle: Literal[True], seed: int = 0, buffer_rows: int = BUFFER_ROWS
    ) -> ShuffledRows: ...
    def dataset(
        self,
        key: str,
        position: str | int | None = None,
        label: str | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
        buffer_rows: int = BUFFER_ROWS,
    ) -> RowsDataset | ShuffledRows:
        """A torch Dataset for a DataLoader, also with workers.

        Without position: each item is one row [width], each row once. With a position, as for `activations`: one item
        a sample. label: a column; items are then (row, the sample's value).
        shuffle: all rows as a stream in an order drawn by seed, anew each time, through a buffer of buffer_rows. Raises StoreError.
        """
        if shuffle:
            if position is not None or label is not None:
                raise StoreError(
                    "shuffle streams all rows; leave position and label out, or have a DataLoader shuffle."
                )
            return ShuffledRows(self.rows(key), seed, buffer_rows)
        if label is not None and position is None:
            raise StoreError(f'rows are shared by samples and have no {label!r}; choose one a sample: position="last".')
        if position is None:
            return RowsDataset(self.rows(key), None)
        self._check_key(key)
        labels = None if label is None else self.column(label)
        if labels is not None and None in labels:
            raise StoreError(f"sample {labels.index(None)} has no {label!r}; leave it out with where.")
        return RowsDataset(self._rows(key, self._rows_at(position)), labels)

    def _rows_at(self, position: str | int) -> Array:
        if not isinstance(position, str | int):
            raise StoreError(f'position is {position!r}; write one: "last", "first", a number, "prompt[-1]".')
        places: dict[str | int, int] = {"last": -1, "first": 0}
        place = places.get(position, position)
        if isinstance(place, int):
            return np.array([self._stored_row(number, place) for number in self._order.tolist()], dtype=np.int64)
        parsed = Positions.parse(place)
        return np.array([self._row_of(number, parsed) for number in self._order.tolist()], dtype=np.int64)

    def _stored_row(self, number: int, place: int) -> int:
        rows = indices_of(self._contents.segments.item(number))
        if not -len(rows) <= place < len(rows):
            raise StoreError(f"{self.path}: sample {number} has {len(rows)} rows, no row {place}.")
        return int(rows[place])

    def _row_of(self, number: int, positions: Positions) -> int:
        """The row of the one position of a sample's sequence that is asked for."""
        held = self._contents
        wanted = positions.resolve(len(held.input_ids.item(number)), len(held.generated_ids.item(number)))
        if not wanted:
            raise StoreError(
                f"sample {number} has no position {positions}: the last token of a response is never fed. Leave such "
                'samples out with where, or ask for one that each has: "prompt[-1]".'
            )
        if len(wanted) != 1:
            raise StoreError(f'{positions} are {len(wanted)} positions of sample {number}; ask for one: "prompt[-1]".')
        rows = indices_of(held.segments.item(number))
        found = rows[held.positions[rows] == wanted[0]]
        if len(found) != 1:
            raise StoreError(f"{self.path}: position {wanted[0]} ({positions}) of sample {number} was not stored.")
        return int(found[0])

    def _check_key(self, key: str) -> None:
        if key not in self.keys:
            raise StoreError(
                f"{self.path} holds no {key!r}.{did_you_mean(key, self.keys)} It has {', '.join(self.keys)}."
            )

    def __repr__(self) -> str:
        ending = "" if self.finished or self.path.is_file() else ", not finished"
        return f"<Run {self.path}: {len(self)} samples, {len(self.keys)} sites{ending}>"


class LayerSamples(Sequence[Tensor]):
    """One site of every sample of a run, each read when it is asked for."""

    def __init__(self, run: Run, key: str) -> None:
        self._run, self._key = run, key

    def __len__(self) -> int:
        return len(self._run)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._run.read(index, self._key)


def _series(values: list[Any]) -> Any:
    """For a table; text with lone surrogates, which Arrow does not hold, and numbers beyond 64 bits as Python's own."""
    try:
        return pd.Series(values)
    except (UnicodeEncodeError, OverflowError):
        return pd.Series(values, dtype=object)


def _matches(found: Any, wanted: Any) -> bool:
    if callable(wanted):
        return bool(wanted(found))
    if hasattr(wanted, "tolist"):  # numpy, torch and pandas
        wanted = wanted.tolist()
    several = isinstance(wanted, Iterable) and not isinstance(wanted, str | dict)
    return found in wanted if several else bool(found == wanted)


def _summed(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """What all of them say, added up."""
    return {key: sum(each[key] for each in counts) for key in counts[0] if all(key in each for each in counts)}


def _stored(shards: Sequence[Shard]) -> ShardedRows:
    """The rows of shards that are open already."""
    first = np.cumsum([0, *(shard.n_rows for shard in shards)])
    kinds = {key: Kind(shards[0].dtypes[key], shards[0].extents[key].shape[1]) for key in shards[0].keys}
    return ShardedRows(kinds, first, list(shards).__getitem__)


def _listed(folder: Path, index: Shard, opened: Open, *, check: bool) -> ShardedRows:
    """The rows of the shards that `run.h5` lists, each of which must be there, as large as it was."""
    with index.reading() as file:
        names = contract.decode_texts(file["shards/name"])
        stamps = contract.decode_texts(file[f"shards/{OF_ATTRIBUTES}"])
        sizes, n_rows = (index.ints(f"shards/{name}")[:].tolist() for name in ("size_bytes", "n_rows"))
        if (
            not len(names) == len(stamps) == len(sizes) == len(n_rows)
            or sum(n_rows) != index.n_rows
            or min(n_rows, default=0) < 0
        ):
            raise ValueError("/shards does not add up to the rows")
        row_bytes = sum(extent.row_bytes for extent in index.extents.values())
        if row_bytes * index.n_rows > EXPANSION * sum(sizes):
            raise ValueError(f"its {index.n_rows} rows of {row_bytes} bytes are more than its shards can hold")
    _check_there(folder, names)
    for name, size in zip(names, sizes, strict=True):
        found = (folder / name).stat().st_size
        if found != size:
            raise TruncatedFile(
                f"{folder / name} has {found} bytes, not {size}: it is damaged; restore it from a copy."
            )
    kinds = {key: Kind(index.dtypes[key], index.extents[key].shape[1]) for key in index.keys}
    return ShardedRows(
        kinds,
        np.cumsum([0, *n_rows]),
        partial(_numbered, folder, names, stamps, opened),
        partial(_site_of, folder, names, stamps, check),
    )


def _numbered(folder: Path, names: Sequence[str], stamps: Sequence[str], opened: Open, number: int) -> Shard:
    """One of the shards that `run.h5` lists, which must be the very one that it was made of."""
    shard = opened(folder / names[number])
    _check_stamp(shard, stamps[number])
    return shard


def _site_of(folder: Path, names: Sequence[str], stamps: Sequence[str], check: bool, number: int, key: str) -> OneSite:
    """One site of one of them."""
    site = OneSite(folder / names[number], key, check=check)
    _check_stamp(site, stamps[number])
    return site


def _check_stamp(opened: OpenedFile, stamp: str) -> None:
    if opened.attributes.get(OF_ATTRIBUTES) != stamp:
        raise StoreError(f"{opened.path} is of another run, or another shard; restore this run's own from a copy.")


def _gathered(folder: Path, index: Shard | None, opened: Open) -> tuple[ShardedRows, Contents]:
    """A run without `run.h5`, or with one of version 1.0, which has the sample table alone."""
    names = living(folder, shard_names(folder))
    if index is not None:
        with index.reading() as file:
            names = contract.decode_texts(file["shards/name"])
    if not names:
        raise NotActivations(f"{folder} is not a run: it holds neither {INDEX} nor shard-*.h5.")
    _check_there(folder, names)
    run_id = (index or opened(folder / names[0])).settings.get("run_id")
    shards = [_of_run(opened(folder / name), run_id) for name in names]
    parts = [shard.contents() for shard in shards]
    columns: Columns = listed(Placed(shards)) if index is None else FileColumns(index)
    with naming(folder / INDEX):
        order = order_of(parts, columns)
    held = reordered(joined(parts), order, columns)
    return _stored(shards), held


def _check_there(folder: Path, names: Sequence[str]) -> None:
    with naming(folder / INDEX):
        if len(set(names)) < len(names):
            raise ValueError("it names a shard twice")
        for name in names:
            contract.shard_number(name)
    for name in names:
        if not (folder / name).exists():
            raise StoreError(f"{folder}: the shard {name} is missing; restore it from a copy, or run again.")


def _of_run(shard: Shard, run_id: Any) -> Shard:
    if shard.settings.get("run_id") != run_id:
        raise StoreError(f"{shard.path} is of another run; restore this run's own shard from a copy.")
    return shard
