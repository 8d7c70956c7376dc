"""Writes a run as a Hugging Face dataset, one row a sample, for `datasets.load_from_disk`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from AutomaticEval.errors import StoreError
from AutomaticEval.samples import COLUMNS
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.export.outgoing import Advance, column_names, records, sample
from AutomaticEval.store.hdf5.contract import LISTS
from AutomaticEval.store.reading.reduced_runs import how_reduced
from AutomaticEval.store.run import Run

_BATCH_BYTES = 64 * 2**20
_BATCH_SAMPLES = 1000
_ARROW_FILE_BYTES = 512 * 2**20
_MAX_NUMBERS = 2**31 - _BATCH_BYTES
"""Arrow counts the numbers of all lists of a batch together, in 32 bits."""


def check(run: Run) -> None:
    """Raises StoreError for text that is not Unicode, which Arrow cannot hold, and for a run with lines, which have no list of rows."""
    contents = run.contents
    if contents.is_by_sample:
        raise StoreError(
            f"{run.path} holds {how_reduced(run.settings)}, and arrow is written with a list of rows a sample; export to safetensors or npz."
        )
    for name in column_names(contents):
        for number, value in enumerate(contents.columns.whole(name) if COLUMNS.get(name) == "text" else ()):
            try:
                (value or "").encode("utf-8")
            except UnicodeEncodeError:
                raise StoreError(
                    f"{name} of sample {number} has a lone surrogate, which Arrow cannot hold; export to safetensors."
                ) from None


def write(run: Run, folder: Path, dtypes: Mapping[str, torch.dtype], advance: Advance) -> None:
    """Write the folder. This is done here, because `save_to_disk` of datasets writes everything twice."""
    import datasets
    import pyarrow as pa

    features, written = _features(run.contents, dtypes), 0
    names: list[str] = []
    with ExitStack() as opened:
        for batch in _batches(run, dtypes):
            if not names or written >= _ARROW_FILE_BYTES:
                opened.close()
                names.append(f"data-{len(names):05d}.arrow")
                file = opened.enter_context((folder / names[-1]).open("wb"))
                writer, written = opened.enter_context(pa.ipc.new_stream(file, features.arrow_schema)), 0
            table = _arrow_table(batch, features)
            writer.write_table(table)
            written += table.nbytes
            advance(len(batch))
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": uuid4().hex[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))


def _features(contents: Contents, dtypes: Mapping[str, torch.dtype]) -> Any:
    """The type of each column. Arrow is not left to guess it, because columns hold None and JSON of many shapes."""
    from datasets import Array2D, Features, Sequence, Value

    arrow_types = {"text": "string", "json": "string", "int": "int64", "float": "float64", "bool": "bool"}
    ids, names = ("input_ids", "generated_ids", "token_ids", "positions"), column_names(contents)
    return Features(
        {
            **{name: Value(arrow_types[COLUMNS.get(name, "json")]) for name in names if name not in LISTS},
            **{name: Sequence(Value("float32")) for name in names if name in LISTS},
            **{name: Sequence(Value("int32")) for name in ids},
            "tokens": Sequence(Value("string")),
            **{
                key: Array2D((None, each.width), str(dtypes[key]).removeprefix("torch."))
                for key, each in contents.activations.items()
            },
        }
    )


def _batches(run: Run, dtypes: Mapping[str, torch.dtype]) -> Iterator[list[dict[str, Any]]]:
    """Samples as rows of the dataset, some megabytes at a time."""
    batch: list[dict[str, Any]] = []
    size_bytes = 0
    for number, record in enumerate(records(run)):
        data = sample(run, number, dtypes)
        for key, tensor in data["activations"].items():
            if tensor.numel() > _MAX_NUMBERS:
                raise StoreError(
                    f"{key} of sample {number} has {tensor.numel()} numbers; Arrow holds at most {_MAX_NUMBERS} in a list. "
                    "Export to safetensors."
                )
            size_bytes += tensor.numel() * tensor.element_size()
        picked = {name: data[name].tolist() for name in ("token_ids", "positions")}
        batch.append({**_plain(record), **picked, "tokens": data["tokens"], **data["activations"]})
        if size_bytes >= _BATCH_BYTES or len(batch) == _BATCH_SAMPLES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """A sample's columns, with those of type json as JSON text. Arrow has a type for each of the others."""
    types = {**dict.fromkeys(("input_ids", "generated_ids"), "int"), **COLUMNS}
    return {
        name: json.dumps(value) if value is not None and types.get(name, "json") == "json" else value
        for name, value in record.items()
    }


def _arrow_table(batch: Sequence[Mapping[str, Any]], features: Any) -> Any:
    import pyarrow as pa

    schema, arrays = features.arrow_schema, []
    for name in features:
        values, arrow_type = [row[name] for row in batch], schema.field(name).type
        if not isinstance(values[0], Tensor):
            arrays.append(pa.array(values, arrow_type))
            continue
        width = values[0].shape[1]
        n_rows = np.cumsum([0, *map(len, values)])
        rows = pa.array(np.arange(n_rows[-1] + 1, dtype=np.int32) * np.int32(width))
        numbers = pa.array(torch.cat(values).reshape(-1).numpy())
        lists = pa.ListArray.from_arrays(pa.array(n_rows, pa.int32()), pa.ListArray.from_arrays(rows, numbers))
        arrays.append(pa.ExtensionArray.from_storage(arrow_type, lists))
    return pa.Table.from_arrays(arrays, schema=schema)
