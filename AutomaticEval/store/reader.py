"""Reads files and runs back: `load_activations` for one sample, `open_run` for many, lazily. Never unpickles."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from AutomaticEval.errors import ManySamples, RefusedPickle, StoreError, did_you_mean
from AutomaticEval.reducing.projection import EVERY_SITE
from AutomaticEval.samples import Line, Rows, fed_of, sample_data
from AutomaticEval.settings import RunSettings
from AutomaticEval.sites import key_among, kind_and_layer
from AutomaticEval.store.contents.changed import reordered
from AutomaticEval.store.contents.columns import Ordered
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.disk.file_names import PICKLE_SUFFIXES
from AutomaticEval.store.hdf5.extents import naming
from AutomaticEval.store.hdf5.read import Shard
from AutomaticEval.store.ragged import Array, indices_of
from AutomaticEval.store.reading.finite_samples import finite_samples
from AutomaticEval.store.reading.layer_samples import LayerSamples
from AutomaticEval.store.reading.reduced_runs import how_reduced
from AutomaticEval.store.reading.row_numbers import row_numbers
from AutomaticEval.store.reading.run_files import open_files
from AutomaticEval.store.reading.shuffled import BUFFER_ROWS, ShuffledRows
from AutomaticEval.store.reading.table_queries import has_value, pandas_table
from AutomaticEval.store.row_array import RowArray, RowsDataset
from AutomaticEval.store.run_folder import INDEX, warn_of_set_aside

_UNJOINED = (
    " lm-eval's verdicts (correct, target, prediction, metrics) are joined by lm.finish(results), with the HFActivations that captured it and what "
    "simple_evaluate returned."
)
"""Said of a run of `HFActivations` that was not finished."""


def load_activations(path: str | Path, sample: int | None = None, *, check: bool = True) -> dict[str, Any]:
    """One sample of a file or run folder. For a file that a drop-in function wrote, it is bit for bit what the function returned.

    path: a file, a run folder, or the old pickle name of a file written as `.h5`. sample: which one, from 0; needed
    where there are several. check: check the numbers against their checksums; False is for measuring what checking costs.
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
    data = run[number]
    return data if given.is_dir() else {**data, "path": str(given.resolve())}


def open_run(path: str | Path, *, check: bool = True) -> Run:
    """The samples of a run folder (or of one file) as a lazy sequence.

    check: check every number that is read, now and later, against its checksum; False is for measuring what checking costs.
    Raises UnreadableFile, StoreError. Every read may raise DamagedFile, with the shard, the dataset and the rows.
    """
    given = Path(path).expanduser().absolute()
    return Run(given.parent if given.name == INDEX and given.is_file() else given, check=check)


def _load_torch(path: Path) -> dict[str, Any]:
    """The file of an older script: tensors and plain values only. A file that would need unpickling is refused."""
    if not path.exists():
        raise StoreError(f"no file {path}, nor {path.with_suffix('.h5')} beside it.")
    try:
        stored = torch.load(path, weights_only=True)
    except Exception as failure:  # torch raises many kinds; each means that it is not plain tensors
        raise RefusedPickle(
            f"{path} is a pickle of more than tensors and plain values; unpickling it could run any code, so it is "
            "refused. Save it again with torch.save(dict_of_tensors), or capture again."
        ) from failure
    if not isinstance(stored, dict):
        raise RefusedPickle(f"{path} holds a {type(stored).__name__}, not a dict of activations.")
    return stored


class Run(Sequence[dict[str, Any]]):
    """A run as a sequence of samples. Each is read when it is asked for. `where` selects some of them."""

    def __init__(self, path: Path, *, check: bool = True) -> None:
        if not path.exists():
            raise StoreError(f"no file or run folder {path}.")
        self.path = path
        warn_of_set_aside(path)
        files = open_files(path, check=check)
        self.finished = files.finished
        """Whether the run was evaluated to its end; without that, samples have no scores."""
        self._rows, self._contents, self._index = files.rows, files.contents, files.index
        self._order = np.arange(self._contents.n_samples)

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """One sample as a dict, with its activations, task, doc and correctness; for a slice a list of them."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = int(self._order[index])
        contents = self._contents
        ranges = contents.segments.item(number)
        token_ids, positions = (
            [int(v) for a, b in ranges for v in ints[a:b]] for ints in (contents.token_ids, contents.positions)
        )
        prompt, response = contents.input_ids.item(number).tolist(), contents.generated_ids.item(number).tolist()
        columns = contents.columns.record(number)
        if contents.is_by_sample:
            line = Line.of({key: self._rows.read(key, ranges) for key in self.keys})
            return sample_data(contents.model, contents.settings, columns, prompt, response, line)
        fed = dict(enumerate(fed_of(prompt, response)))
        with naming(self.path):
            if [fed.get(position) for position in positions] != token_ids:
                raise ValueError(f"the rows of sample {number} are not its tokens")
            strings = contents.strings()
            tokens = [strings[token] for token in token_ids]
        rows = Rows(token_ids, tokens, positions, {key: self._rows.read(key, ranges) for key in self.keys})
        return sample_data(contents.model, contents.settings, columns, prompt, response, rows)

    def read(self, index: int, key: str) -> Tensor:
        """One site of one sample: [n_positions, width]. Reads no more than those bytes."""
        key = self._key(key)
        return self._rows.read(key, self._contents.segments.item(int(self._order[index])))

    def steps(self, index: int, key: str) -> Tensor | None:
        """For a site that is stored as int8: by how much each number grows when its stored integer grows by one, [n_positions, width].

        None for other sites.
        """
        key = self._key(key)
        ranges = self._contents.segments.item(int(self._order[index]))
        return self._rows.scales(key, ranges) if self._rows.formats[key].dtype == torch.int8 else None

    def layers(self, kind: str = "resid_post") -> dict[int, LayerSamples]:
        """One kind of site of every layer that has it: `run.layers("mlp_out")[layer][sample]` is [n_positions, width].

        Nothing is read before it is asked for. Raises StoreError for a kind that no layer has.
        """
        sites = {key: kind_and_layer(key) for key in self.keys}
        layers = {
            site.layer: LayerSamples(len(self), partial(self.read, key=key))
            for key, site in sites.items()
            if site.kind == kind and site.layer is not None
        }
        if not layers:
            known = {site.kind: None for site in sites.values() if site.layer is not None}
            raise StoreError(f"{self.path} holds no {kind!r} of its layers; it has {', '.join(known) or 'none'}.")
        return layers

    def pattern(self, index: int, layer: int) -> Tensor:
        """How much each position of one sample attends to each position before it: [n_heads, n_positions, key_pos].

        layer: from 0, or from the end when negative. key_pos goes up to the sample's length.
        Raises StoreError for a run that did not keep the layer's pattern.
        """
        shape = self.made_with.shape or {}
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
        """The keys of the activations that every sample has: embeddings, layer_0, …"""
        return self._rows.keys

    @property
    def model(self) -> str:
        """The model's name, as it was given."""
        return self._contents.model

    @property
    def settings(self) -> dict[str, Any]:
        """What decided the numbers: dtype, attention kernel, library versions, selection."""
        return dict(self._contents.settings)

    @property
    def made_with(self) -> RunSettings:
        """`settings`, as fields."""
        return RunSettings.from_dict(self._contents.settings)

    @property
    def contents(self) -> Contents:
        """Everything that these samples hold, for merging, pruning and exporting."""
        stored = {key: self._rows.activation(key) for key in self.keys}
        whole = replace(self._contents, activations=stored)
        return whole if len(self) == whole.n_samples else reordered(whole, self._order)

    @property
    def non_finite(self) -> dict[str, int]:
        """Site or column -> how many of its numbers are infinite or NaN, over all samples of the run.

        Older files do not say it: theirs are missing.
        """
        counts = [shard.non_finite for shard in ([self._index] if self._index else self.shards)]
        return {key: sum(each[key] for each in counts) for key in counts[0] if all(key in each for each in counts)}

    def finite(self) -> Array:
        """[n_samples], bool: whether no row of a sample, and not its logprob, is infinite or NaN: `run.where(run.finite())`.

        Reads the sites that have such numbers; of older files, which do not say it, all sites.
        """
        finite: Array = finite_samples(self._rows, self._contents, self.non_finite)[self._order]
        return finite

    @property
    def shards(self) -> list[Shard]:
        """The files that hold the rows. Each is checked when it is first used."""
        return self._rows.shards

    def records(self) -> list[dict[str, Any]]:
        """All columns of every sample, one dict each, also those of bookkeeping: the batch's shape, the shard and the index in it."""
        columns = self._contents.columns
        whole = {name: columns.whole(name) for name in columns.names}
        return [{name: values[number] for name, values in whole.items()} for number in self._order.tolist()]

    def table(self) -> pd.DataFrame:
        """One row a sample: task, doc_id, choice, prompt, response, logprob, correct, metrics, …"""
        return pandas_table(self._columns)

    def column(self, name: str) -> list[Any]:
        """One column of the table: a list of n_samples values. Raises StoreError for a column that the run does not have."""
        names = self._contents.columns.names
        if name not in names:
            unjoined = "" if self.finished or "lm_eval" not in self.settings else _UNJOINED
            raise StoreError(
                f"{self.path} has no column {name!r}.{unjoined or did_you_mean(name, names)} It has {', '.join(names)}."
            )
        return self._columns.whole(name)

    @property
    def _columns(self) -> Ordered:
        return Ordered(self._contents.columns, self._order)

    def where(self, mask: Any = None, **wanted: Any) -> Run:
        """The samples whose columns have these values: `run.where(correct=True, task="mmlu_anatomy")`.

        A list, tuple or set stands for any of its values; a function is called with each value. mask: a truth value for each
        sample, for conditions on several columns: `run.where(table.choice == table.prediction)`.
        Raises StoreError for a column that the run does not have, or for a mask of another length.
        """
        kept = np.ones(len(self), dtype=bool) if mask is None else np.array(mask, dtype=bool)
        if kept.shape != (len(self),):
            raise StoreError(
                f"the mask has shape {kept.shape}; expected one truth value for each of {len(self)} samples."
            )
        for name, value in wanted.items():
            if isinstance(value, Iterator):
                value = list(value)
            kept &= np.array([has_value(each, value) for each in self.column(name)], dtype=bool)
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
        key = self._key(key)
        return self._rows.take(key, self._row_numbers(position))

    def reduced(self, key: str) -> Tensor:
        """The mean or the largest numbers over each sample's kept positions: [n_samples, width], in the order of `table`.

        Of a run that was made with reduce="mean" or "max". A sample without kept positions has NaN; `run.where(run.finite())` leaves it out.
        Raises StoreError for an unknown key, and for a run with rows.
        """
        if not self._contents.is_by_sample:
            raise StoreError(
                f"{self.path} holds rows, which were not reduced to one line a sample; read them with activations, read or rows."
            )
        return self._rows.take(self._stored_key(key), self._contents.segments.take(self._order).values[:, 0])

    def projection(self, key: str) -> Tensor:
        """The matrix [width, k], float32, by which the rows of a site were multiplied. Raises StoreError for a run without one."""
        key, matrices = self._stored_key(key), self._contents.matrices
        name = key if key in matrices else EVERY_SITE
        if name not in matrices:
            raise StoreError(f"{self.path} holds no projection of {key}: its rows are {how_reduced(self.settings)}.")
        return torch.from_numpy(matrices[name][:])

    def edits(self) -> list[tuple[str, Tensor | None]]:
        """What the model was edited with: each edit in words, the outermost first, and its value [n, width], float64.

        The value is None for an edit that was made with a number, with a function, or with values that differ by position, and in files of before
        format 1.4.
        """
        matrices = self._contents.matrices
        by_name = {name.removeprefix("edits/"): name for name in matrices if name.startswith("edits/")}
        found: list[tuple[str, Tensor | None]] = []
        for text in self.settings.get("edits") or []:
            name = next((by_name[word] for word in text.split() if word in by_name), None)
            found.append((text, None if name is None else torch.from_numpy(matrices[name][:])))
        return found

    def rows(self, key: str, *, by_sample: bool = False) -> RowArray:
        """All rows of these samples as an array-like [n_rows, width] on the disk: each row once, in the order of the files.

        by_sample: one sample after the other instead, so that rows which samples share are there once for each of them.
        Raises StoreError for an unknown key.
        """
        key = self._key(key)
        numbers = indices_of(self._contents.segments.take(self._order).values)
        if by_sample:
            return self._row_array(key, numbers)
        return self._row_array(key, numbers if np.all(numbers[1:] > numbers[:-1]) else np.unique(numbers))

    def _row_array(self, key: str, numbers: Array) -> RowArray:
        return RowArray(self._rows, key, numbers, self._contents.token_ids, self._contents.positions)

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

        Without position, each item is one row [width], and each row is there once. With a position, as for `activations`, each item is one
        row of one sample. label: a column; each item is then (row, the sample's value).
        shuffle: all rows as a stream, in an order that seed decides and that is new in each pass, through a buffer of buffer_rows rows.
        Raises StoreError for an unknown key, a sample without that row or label, and options that do not go together.
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
        key = self._key(key)
        labels = None if label is None else self.column(label)
        if labels is not None and None in labels:
            raise StoreError(f"sample {labels.index(None)} has no {label!r}; leave it out with where.")
        return RowsDataset(self._row_array(key, self._row_numbers(position)), labels)

    def _row_numbers(self, position: str | int) -> Array:
        return row_numbers(self.path, self._contents, self._order.tolist(), position)

    def _key(self, given: str) -> str:
        """The stored key that a spelling of a site names. Raises StoreError, also for a run that holds no rows."""
        if self._contents.is_by_sample:
            raise StoreError(
                f"{self.path} holds no rows but {how_reduced(self.settings)}; read it with reduced({given!r})."
            )
        return self._stored_key(given)

    def _stored_key(self, given: str) -> str:
        key = key_among(self.keys, given)
        if key is None:
            raise StoreError(
                f"{self.path} holds no {given!r}.{did_you_mean(given, self.keys)} It has {', '.join(self.keys)}."
            )
        return key

    def __repr__(self) -> str:
        ending = "" if self.finished or self.path.is_file() else ", not finished"
        return f"<Run {self.path}: {len(self)} samples, {len(self.keys)} sites{ending}>"
