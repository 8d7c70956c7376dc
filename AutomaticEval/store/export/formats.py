"""Copies a run out to other tools: safetensors, npz, Hugging Face datasets, TransformerLens.

Owns what those folders hold; knows nothing of how a run is written. Activations pass through slab by slab, or sample by
sample; the sample table is in memory, as in `Run.table`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from AutomaticEval.errors import SelectionError, did_you_mean
from AutomaticEval.public_names import without_folders
from AutomaticEval.store.bits import bits, raw_bytes
from AutomaticEval.store.contents.changed import converted
from AutomaticEval.store.contents.file_contents import Contents
from AutomaticEval.store.disk.whole_files import ensure_space, new_folder
from AutomaticEval.store.export import arrow
from AutomaticEval.store.export import transformer_lens as lens
from AutomaticEval.store.export.outgoing import Advance, records, sample
from AutomaticEval.store.hdf5.read import Shard
from AutomaticEval.store.ragged import Array
from AutomaticEval.store.reader import Run, open_run
from AutomaticEval.store.upkeep.verify import check

FORMATS = {
    "safetensors": "a file a shard, key -> [n_rows, width], and samples.jsonl",
    "npz": "the same for numpy; bfloat16 becomes float32",
    "arrow": "a Hugging Face dataset, one row a sample; bfloat16 becomes float32",
    "transformer_lens": "a safetensors file a sample, with the names of TransformerLens' ActivationCache",
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_WITHOUT_BFLOAT16 = ("npz", "arrow")
_A_SAMPLE_AT_A_TIME = ("arrow", "transformer_lens")
_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_NUMPY = {torch.float64: "<f8", torch.float32: "<f4", torch.int32: "<i4", torch.float16: "<f2"}


def _silent(n_samples: int) -> None:
    """No progress is shown."""


def export(path: Path, destination: Path, to: str, *, dtype: str | None = None, advance: Advance = _silent) -> Path:
    """A file or run as a new folder for other tools, which appears whole or not at all. Returns the folder.

    to: one of FORMATS. dtype: of DTYPES; None keeps each site's own, but float32 for int8, and for bfloat16 where the
    format has none. advance: is told how many samples were just done.
    `run.json` holds the model and settings. The formats with a file a shard have `samples.jsonl`, a line a sample in the
    run's order, with its columns, token ids, and `rows`: [[file, start, stop], ...]. The others write rows that samples
    share once for each of them. The tensors of TransformerLens are as `lens.as_activation_cache` says.
    Raises SelectionError, PathExists, DiskFull, UnreadableFile, StoreError, and CaptureError for a number that is too
    large for dtype.
    """
    check_format(to, dtype)
    check(path)
    run, destination = open_run(path), destination.expanduser()
    held = run.contents
    if to == "transformer_lens":
        lens.places({key: each.width for key, each in held.activations.items()}, run.settings)
    if to == "arrow":
        arrow.check_unicode(held)
    dtypes = {key: _target(each.dtype, to, dtype) for key, each in held.activations.items()}
    with new_folder(destination) as folder:
        ensure_space(destination, _size_bytes(held, dtypes, each_sample=to in _A_SAMPLE_AT_A_TIME))
        (folder / "run.json").write_text(
            json.dumps({"model": without_folders(run.model), "settings": run.settings}, indent=2)
        )
        _WRITERS[to](run, folder, dtypes, advance)
    return destination


def check_format(to: str, dtype: str | None, formats: Iterable[str] = FORMATS) -> None:
    """Raises SelectionError for a format or dtype that there is not, or that do not go together."""
    known = list(formats)
    if to not in known:
        raise SelectionError(f"no format {to!r}.{did_you_mean(to, known)} Formats: {', '.join(known)}.")
    if dtype is not None and dtype not in DTYPES:
        raise SelectionError(f"no dtype {dtype!r}.{did_you_mean(dtype, DTYPES)} Dtypes: {', '.join(DTYPES)}.")
    if dtype == "bfloat16" and to in _WITHOUT_BFLOAT16:
        raise SelectionError(f"{to} has no bfloat16; write float32, which holds the same numbers, or use safetensors.")


def _target(stored: torch.dtype, to: str, dtype: str | None) -> torch.dtype:
    if dtype is not None:
        return DTYPES[dtype]
    widened = stored == torch.int8 or (stored == torch.bfloat16 and to in _WITHOUT_BFLOAT16)
    return torch.float32 if widened else stored


def _size_bytes(held: Contents, dtypes: Mapping[str, torch.dtype], *, each_sample: bool) -> int:
    start, stop = held.segments.values[:].T
    n_rows = int((stop - start).sum()) if each_sample else held.n_rows
    return n_rows * sum(each.width * dtypes[key].itemsize for key, each in held.activations.items())


class Stored(NamedTuple):
    """One tensor on its way into a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    slabs: Callable[[], Iterable[Array]]
    """Its raw bits in order, some rows at a time."""

    @property
    def size_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


Save = Callable[[Path, Sequence[Stored]], None]


def _write_shards(
    suffix: str, save: Save, run: Run, folder: Path, dtypes: Mapping[str, torch.dtype], advance: Advance
) -> None:
    """A file for each shard, and samples.jsonl."""
    names = [f"shard-{number:05d}.{suffix}" for number in range(len(run.shards))]
    first = np.cumsum([0, *(shard.n_rows for shard in run.shards)])
    segments = run.contents.segments
    with (folder / "samples.jsonl").open("w", encoding="ascii") as lines:
        for number, record in enumerate(records(run)):
            places = _places(segments.item(number), first)
            rows = [[names[shard], start, stop] for shard, start, stop in places]
            lines.write(json.dumps({**record, "rows": rows}) + "\n")
    for name, shard in zip(names, run.shards, strict=True):
        save(folder / name, _tensors(shard, dtypes))
        advance(shard.n_samples)


def _places(ranges: Array, first: Array) -> Iterator[tuple[int, int, int]]:
    """(shard, start, stop), counted in the shard, of half-open ranges that are counted over the run."""
    for start, stop in ranges.tolist():
        while start < stop:
            shard = int(np.searchsorted(first, start, side="right")) - 1
            end = min(stop, int(first[shard + 1]))
            yield shard, start - int(first[shard]), end - int(first[shard])
            start = end


def _tensors(shard: Shard, dtypes: Mapping[str, torch.dtype]) -> list[Stored]:
    held, tensors = shard.contents(), []
    for key, each in held.activations.items():
        changed = converted(replace(held, activations={key: each}), dtypes[key]).activations[key]
        tensors.append(Stored(key, changed.dtype, (held.n_rows, each.width), changed.slabs))
    numbers = {"token_id": held.token_ids[:], "position": held.positions[:]}
    return tensors + [Stored(name, torch.int32, (held.n_rows,), partial(iter, [v])) for name, v in numbers.items()]


def _save_safetensors(path: Path, tensors: Sequence[Stored]) -> None:
    """The file that safetensors reads; its own writer wants all tensors in memory at once."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # each begins at a multiple of its item
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in ordered:
        offsets = [at, at := at + tensor.size_bytes]
        header[tensor.name] = {"dtype": _SAFETENSORS[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            for slab in tensor.slabs():
                file.write(raw_bytes(np.ascontiguousarray(slab)))


def _save_npz(path: Path, tensors: Sequence[Stored]) -> None:
    """The file that np.load reads; np.savez wants all arrays in memory at once."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for tensor in tensors:
            header = {"descr": _NUMPY[tensor.dtype], "fortran_order": False, "shape": tensor.shape}
            with archive.open(f"{tensor.name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for slab in tensor.slabs():
                    file.write(raw_bytes(np.ascontiguousarray(slab)))


def _write_lens(run: Run, folder: Path, dtypes: Mapping[str, torch.dtype], advance: Advance) -> None:
    """A file for each sample, and samples.jsonl with its name, token_ids and positions."""
    with (folder / "samples.jsonl").open("w", encoding="ascii") as lines:
        for number, record in enumerate(records(run)):
            data, name = sample(run, number, dtypes), f"sample-{number:05d}.safetensors"
            _save_safetensors(
                folder / name,
                [
                    Stored(each, tensor.dtype, tuple(tensor.shape), partial(iter, [bits(tensor)]))
                    for each, tensor in lens.as_activation_cache(data).items()
                ],
            )
            rows = {each: data[each].tolist() for each in ("token_ids", "positions")}
            lines.write(json.dumps({**record, **rows, "tokens": data["tokens"], "file": name}) + "\n")
            advance(1)


_WRITERS: dict[str, Callable[[Run, Path, Mapping[str, torch.dtype], Advance], None]] = {
    "safetensors": partial(_write_shards, "safetensors", _save_safetensors),
    "npz": partial(_write_shards, "npz", _save_npz),
    "arrow": arrow.write_arrow,
    "transformer_lens": _write_lens,
}
