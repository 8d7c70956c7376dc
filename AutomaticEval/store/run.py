"""`Run`: a run, or one file, as a lazy sequence of samples, and its rows, columns, questions and batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from AutomaticEval.errors import StoreError, did_you_mean
from AutomaticEval.reducing.projection import EVERY_SITE
from AutomaticEval.safe_text import html_table
from AutomaticEval.samples import Line, Rows, fed_of, sample_data
from AutomaticEval.settings import RunSettings
from AutomaticEval.sites import is_site, key_among, kind_and_layer
from AutomaticEval.store.contents.changed import reordered
from AutomaticEval.store.contents.columns import Ordered
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.hdf5.extents import naming
from AutomaticEval.store.hdf5.read import Shard
from AutomaticEval.store.questions.questions import Questions
from AutomaticEval.store.questions.source import Source
from AutomaticEval.store.ragged import Array, indices_of
from AutomaticEval.store.reading.finite_samples import finite_samples
from AutomaticEval.store.reading.layer_samples import LayerSamples
from AutomaticEval.store.reading.overview import KeptEdit, TaskLine, facts_of, tasks_of
from AutomaticEval.store.reading.reduced_runs import how_reduced
from AutomaticEval.store.reading.row_batches import RowBatches
from AutomaticEval.store.reading.row_numbers import row_numbers
from AutomaticEval.store.reading.row_origins import RowOrigins
from AutomaticEval.store.reading.run_files import open_files
from AutomaticEval.store.reading.shuffled import BUFFER_ROWS, ShuffledRows
from AutomaticEval.store.reading.table_queries import column_of, pandas_table, selected, whole_number
from AutomaticEval.store.row_array import RowArray, RowsDataset
from AutomaticEval.store.run_folder import warn_of_set_aside, way_on

_UNJOINED = (
    " lm-eval's verdicts (correct, target, prediction, metrics) are joined by lm.finish(results), with the HFActivations that captured it and what "
    "simple_evaluate returned."
)
"""Said of a run of `HFActivations` that was not finished."""


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
    def __getitem__(self, index: slice) -> Run: ...
    def __getitem__(self, index: int | slice) -> Any:
        """One sample as a dict, with its activations, task, doc and correctness; for a slice a run of those samples."""
        if isinstance(index, slice):
            return self._some(self._order[index])
        number = self._number(index)
        contents = self._contents
        ranges = contents.segments.item(number)
        token_ids, positions = contents.fed(number)
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

    def _number(self, index: int) -> int:
        """The number of a sample in the whole run."""
        is_column = index in self._contents.columns.names if isinstance(index, str) else False
        wanted = f"a column is run.column({index!r})" if is_column else f"the rows of a site are run.rows({index!r})"
        return int(self._order[whole_number(index, "samples", wanted)])

    def questions(self) -> Questions:
        """The questions that these samples belong to, as a lazy sequence with one row a question: choices, verdict, probabilities, activations.

        Each has all its choices, also when only some of them are among these samples. A sample is one *request*: one of a question's choices.
        Raises StoreError for a run of texts, for one that is not finished, and for a part of a run that lacks choices.
        """
        if self.path.is_dir() and not self.finished:
            raise StoreError(
                f"{self.path} is not finished: a question may lack choices that were not asked yet, and none has a verdict. Its "
                f"samples can be read as they are: run.table(), run.activations(key).{way_on(self.path)}"
            )
        return Questions(self.source, self._order)

    @property
    def source(self) -> Source:
        """The whole run that these samples are of, with rows of a site by their numbers."""
        return Source(self.path, self._contents, self.keys, self._key, self._row_array)

    def read(self, index: int, key: str) -> Tensor:
        """One site of one sample: [n_positions, width]. Reads no more than those bytes."""
        key = self._key(key)
        return self._rows.read(key, self._contents.segments.item(self._number(index)))

    def steps(self, index: int, key: str) -> Tensor | None:
        """For a site that is stored as int8: by how much each number grows when its stored integer grows by one, [n_positions, width].

        None for other sites.
        """
        key = self._key(key)
        ranges = self._contents.segments.item(self._number(index))
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
        n_ids = len(self._contents.input_ids.item(self._number(index)))
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
    def created(self) -> str:
        """When the run was finished, or its first file was written: the time with its offset from UTC, in ISO 8601."""
        return (self._index or self.shards[0]).attributes["created"]

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
        """[n_samples], bool: whether no row of a sample, and no log-probability of it, is infinite or NaN: `run.where(run.finite())`.

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
        unjoined = "" if self.finished or "lm_eval" not in self.settings else _UNJOINED
        return column_of(self._columns, name, self.path, unjoined)

    def tasks(self) -> list[TaskLine]:
        """The tasks of these samples by name: how many questions each has, the share that is answered rightly, and the mean of each metric."""
        return tasks_of(self)

    @property
    def _columns(self) -> Ordered:
        return Ordered(self._contents.columns, self._order)

    def where(self, mask: Any = None, **wanted: Any) -> Run:
        """The samples whose columns have these values: `run.where(correct=True, task="mmlu_anatomy")`.

        A list, tuple or set stands for any of its values; a function is called with each value. mask: a truth value for each
        sample, for conditions on several columns: `run.where(table.choice == table.prediction)`.
        Raises StoreError for a column or a task that the run does not have, or for a mask of another length.
        """
        for name in wanted:
            if name not in self._contents.columns.names:
                self.column(name)  # which says why
        return self._some(self._order[selected(self._columns, self._contents.columns, self.path, mask, wanted)])

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

    def edits(self) -> list[KeptEdit]:
        """What the model was edited with: (text, value) of each edit, the outermost first: in words, and its value [n, width], float64.

        The value is None for an edit that was made with a number, with a function, or with values that differ by position, and in files of before
        format 1.4.
        """
        matrices = self._contents.matrices
        by_name = {name.removeprefix("edits/"): name for name in matrices if name.startswith("edits/")}
        found: list[KeptEdit] = []
        for text in self.settings.get("edits") or []:
            name = next((by_name[word] for word in text.split() if word in by_name), None)
            found.append(KeptEdit(text, None if name is None else torch.from_numpy(matrices[name][:])))
        return found

    def rows(self, key: str, *, by_sample: bool = False) -> RowArray:
        """All rows of these samples as an array-like [n_rows, width] on the disk: each row once, in the order of the files.

        by_sample: one sample after the other instead, so that rows which samples share are there once for each of them.
        `where_from[i]` of the result says which of these samples have a row, and at which position of their sequence it is.
        Raises StoreError for an unknown key.
        """
        key, segments = self._key(key), self._contents.segments.take(self._order)
        numbers = indices_of(segments.values)
        if by_sample:
            n_before = np.concatenate([[0], np.cumsum(segments.values[:, 1] - segments.values[:, 0])])
            n_rows = np.diff(n_before[segments.offset])
            return self._row_array(key, numbers, np.repeat(np.arange(len(self)), n_rows))
        if not np.all(numbers[1:] > numbers[:-1]):
            is_there = np.zeros(self._contents.n_rows, dtype=bool)  # numpy's unique takes a hundred times as long
            is_there[numbers] = True
            numbers = np.flatnonzero(is_there)
        return self._row_array(key, numbers)

    def _row_array(self, key: str, numbers: Array, owners: Array | None = None) -> RowArray:
        contents = self._contents
        origins = RowOrigins(numbers, contents.segments.take(self._order), contents.positions, owners)
        return RowArray(self._rows, key, numbers, contents.token_ids, contents.positions, origins)

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
        numbers = self._row_numbers(position)
        return RowsDataset.labelled(self._row_array(key, numbers, np.arange(len(self))), labels, label, "sample")

    def batches(
        self,
        key: str | None = None,
        batch_size: int = 4096,
        *,
        keys: Sequence[str] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        start: int = 0,
        device: str | torch.device | None = None,
        buffer_rows: int = BUFFER_ROWS,
    ) -> RowBatches:
        """All rows in batches [batch_size, width], read from the shards in large pieces, for training.

        keys: several sites in place of one; a batch is then a dict, site -> [batch_size, width], of the same tokens at each site.
        Each `for` goes through one epoch, in which each row is given once. shuffle: blocks of neighbouring rows are put in random order, and
        the rows of 64 blocks, buffer_rows together, are mixed; seed and the number of the epoch decide it. shuffle=False: the order of the
        files. start: go on after so many batches, as if they had just been given (`batches.step` of the run that was cut short). device: where
        the batches are put.
        Raises StoreError for an unknown key, and for numbers that make no sense.
        """
        are_several = isinstance(key, list | tuple | set)
        if are_several or (key is None) == (keys is None) or isinstance(keys, str) or (key is None and not keys):
            several = list(key) if are_several and key else self.keys[-2:]
            raise StoreError(
                f"which site? Give one key, run.batches({self.keys[-1]!r}, 4096), or several with keys=: run.batches(keys={several})."
            )
        sites = {each: self.rows(each) for each in (keys or [str(key)])}
        return RowBatches(sites, batch_size, key is not None, shuffle, seed, start, device, buffer_rows)

    def _row_numbers(self, position: str | int) -> Array:
        return row_numbers(self.path, self._contents, self._order, position)

    def _key(self, given: str) -> str:
        """The stored key that a spelling of a site names. Raises StoreError, also for a run that holds no rows."""
        if self._contents.is_by_sample:
            raise StoreError(
                f"{self.path} holds no rows but {how_reduced(self.settings)}; read it with reduced({given!r})."
            )
        return self._stored_key(given)

    def _stored_key(self, given: str) -> str:
        if not isinstance(given, str):
            wanted = (
                f" Layer {given} is 'layer_{given}', and sample {given} is run[{given}]."
                if isinstance(given, int)
                else ""
            )
            raise StoreError(f"{given!r} is no site; this run has {', '.join(self.keys)}.{wanted}")
        key = key_among(self.keys, given)
        if key is None:
            near = (
                "" if is_site(given) else did_you_mean(given, self.keys)
            )  # a site that is not here is no slip of the pen
            raise StoreError(f"{self.path} holds no {given!r}.{near} It has {', '.join(self.keys)}.")
        return key

    def __repr__(self) -> str:
        ending = "" if self.finished or self.path.is_file() else ", not finished"
        return f"<Run {self.path}: {len(self)} samples, {len(self.keys)} sites{ending}>"

    def _repr_html_(self) -> str:
        """For notebooks: what the run is, and its tasks with their scores."""
        tasks = [(each.task or "samples", each.in_words) for each in self.tasks()]
        return html_table(f"Run of {len(self)} samples", [*facts_of(self).items(), *tasks, ("path", str(self.path))])
