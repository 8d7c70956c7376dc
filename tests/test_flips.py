"""A bit that flips anywhere in a run: every door says so, or gives the very same numbers."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xxhash
from helpers.samples import SETTINGS, make_sample, same

from AutomaticEval import load_activations, open_run
from AutomaticEval.errors import AutomaticEvalError, DamagedFile, StoreError
from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.store.export.formats import export
from AutomaticEval.store.hdf5 import open as opened
from AutomaticEval.store.run import Run
from AutomaticEval.store.upkeep.merge import merge
from AutomaticEval.store.upkeep.rebuild import rebuild_index
from AutomaticEval.store.upkeep.verify import verify
from AutomaticEval.store.writer import RunWriter

DATA = Path(__file__).parent / "data"
KEYS = ("layer_0", "layer_1")
N_ROWS = 150
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (SETTINGS, {}),
    "int8": ({**SETTINGS, "store_dtype": "int8"}, {}),
    "gzip": (SETTINGS, {"compression": "gzip"}),
}


def sample_of(number: int) -> Sample:
    """Of N_ROWS rows of 1 KiB, so that a block has 64 of them; what a benchmark says of it as numbers."""
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(1, 300, (N_ROWS + 1,), generator=draw).tolist()
    rows = Rows(
        ids[:-1],
        [f"t{token}" for token in ids[:-1]],
        list(range(N_ROWS)),
        {key: torch.randn(N_ROWS, 256, generator=draw) for key in KEYS},
    )
    told = {"task": "t", "doc_id": number, "choice": 0, "repeat": 0, "logprob": -0.5 * number, "is_greedy": True}
    fields = {**make_sample(**told).fields, "n_prompt_tokens": N_ROWS}
    return Sample(fields, ids[:-1], ids[-1:], [Part(rows, range(N_ROWS))])


def write(folder: Path, kind: str, numbers: range = range(4), *, finish: bool = True, resume: bool = False) -> Path:
    """Two samples a shard."""
    settings, options = KINDS[kind]
    with RunWriter(folder, "m", settings, shard_bytes=2**20, resume=resume, **options) as made:
        there = {record["doc_id"] for record in made.records()} if resume else set()
        for number in numbers:
            if number not in there:
                made.add([sample_of(number)])
            if number % 2:
                made.flush()
        if finish:
            made.finish()
    return folder


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def loaded(folder: Path) -> Any:
    return [load_activations(folder, number) for number in range(4)]


def samples(run: Run) -> Any:
    """What `load_activations` gives."""
    return list(run)


def rows(run: Run) -> Any:
    picked = [300, 3, 550, 4, 5, 3, 63, 64]
    return [[run.rows(key)[at] for at in (slice(None), slice(50, 350), picked, 7)] for key in KEYS]


def batches(run: Run) -> Any:
    mixed = [
        torch.cat(list(run.batches("layer_0", 64, buffer_rows=100))),
        *run.dataset("layer_0", shuffle=True, buffer_rows=100),
    ]
    last = run.dataset("layer_1", position="last", label="logprob")
    return [mixed, run.dataset("layer_1").__getitems__([450, 2, 225]), [last[number] for number in range(4)]]


def tables(run: Run) -> Any:
    numbers = [run.rows("layer_0").token_ids.tolist(), run.rows("layer_0").positions.tolist()]
    return [run.records(), run.activations("layer_0", "prompt[3]"), run.read(2, "layer_1"), numbers]


def exported(folder: Path) -> Any:
    """Every file's bytes."""
    try:
        made = export(folder, folder.parent / "exported", "safetensors")
        return {path.name: path.read_bytes() for path in made.iterdir()}
    finally:
        shutil.rmtree(folder.parent / "exported", ignore_errors=True)


def merged(folder: Path) -> Any:
    try:
        return loaded(merge([folder], folder.parent / "merged.h5"))
    finally:
        (folder.parent / "merged.h5").unlink(missing_ok=True)


def resumed(folder: Path) -> Any:
    """The run as it was when it was cut short, which goes on, and computes what was set aside again."""
    again = folder.parent / "again"
    try:
        shutil.copytree(folder, again, ignore=shutil.ignore_patterns("run.h5"))
        write(again, kind=folder.name, resume=True)
        assert verify(again) == []
        return sorted(loaded(again), key=lambda sample: sample["doc_id"])
    finally:
        shutil.rmtree(again, ignore_errors=True)


READING: list[Callable[[Run], Any]] = [samples, rows, batches, tables]
COPYING: list[Callable[[Path], Any]] = [exported, merged, resumed]


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in one.keys() - {"path"})
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return same(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def drawn(draw: random.Random, files: list[Path]) -> tuple[Path, int]:
    """A file and a bit in it: every second one outside the activations, which are most of a file."""
    path = (
        draw.choices(files, [file.stat().st_size for file in files])[0] if draw.random() < 0.5 else draw.choice(files)
    )
    size = path.stat().st_size
    with h5py.File(path) as file:
        places = [file[f"activations/{key}"] for key in KEYS if not file[f"activations/{key}"].is_virtual]
        taken = [(each.id.get_offset() or 0, each.id.get_storage_size()) for each in places if not each.chunks]
    outside = draw.random() < 0.5
    while True:
        at = draw.randrange(size)
        if not outside or not any(offset <= at < offset + n_bytes for offset, n_bytes in taken):
            return path, 8 * at + draw.randrange(8)


def flip(path: Path, bit: int) -> None:
    """In place; the file's times stay, as on a disk that loses a bit."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0] ^ 1 << bit % 8
        file.seek(bit // 8)
        file.write(bytes([byte]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def attempts(folder: Path, number: int, copying_every: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The doors that are tried after a flip. Every second time the run, and its first shard, were open before it."""
    early = open_run(folder)
    if number % 2:
        early.rows("layer_0")[0]
        yield "before", lambda: None
        yield "rows", lambda: rows(early)
    else:
        yield "before", lambda: None
        with suppress(AutomaticEvalError):
            run = open_run(folder)
            for door in READING:
                yield door.__name__, lambda door=door: door(run)  # type: ignore[misc]
    if number % copying_every == 0:
        door = COPYING[number // copying_every % len(COPYING)]
        yield door.__name__, lambda: door(folder)


def silent(folder: Path, n_flips: int, seed: int, copying_every: int) -> tuple[int, list[str]]:
    """How many flips some door refused, and those that one read as something else."""
    whole = open_run(folder)
    truth = {door.__name__: door(whole) for door in READING} | {door.__name__: door(folder) for door in COPYING}
    draw, wrong = random.Random(seed), []
    n_refused, files = 0, sorted(folder.glob("*.h5"))
    for number in range(n_flips):
        path, bit = drawn(draw, files)
        doors = attempts(folder, number, copying_every)
        next(doors)  # what is opened before is open
        flip(path, bit)
        n_through = 0
        for name, door in doors:
            try:
                found = door()
            except AutomaticEvalError:
                continue
            n_through += 1
            if not alike(found, truth[name]):
                wrong.append(f"bit {bit} of {path.name} by {name}")
        n_refused += n_through < len(READING) if number % 2 == 0 else not n_through
        flip(path, bit)
    return n_refused, wrong


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_told_or_changes_no_number(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / kind, kind)
    n_refused, wrong = silent(folder, 24, seed=1, copying_every=8)
    assert wrong == []
    assert n_refused > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_none_of_5000_flipped_bits_is_read_as_another_number(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / kind, kind)
    n_flips = {"plain": 3000, "int8": 1000, "gzip": 1000}[kind]
    n_refused, wrong = silent(folder, n_flips, seed=2, copying_every=50)
    print(f"{kind}: {n_refused} of {n_flips} flips refused, {len(wrong)} wrong")
    assert wrong == []


def first_of(path: Path, name: str) -> int:
    """The bit where a dataset's numbers begin."""
    with h5py.File(path) as file:
        return 8 * int(file[name].id.get_offset())


def test_damaged_shard_is_set_aside_by_a_resume_and_computed_again(tmp_path: Path) -> None:
    write(tmp_path / "whole", "plain")
    folder = write(tmp_path / "run", "plain", range(4), finish=False)
    flip(folder / "shard-00000.h5", first_of(folder / "shard-00000.h5", "samples/logprob"))
    with pytest.raises(
        DamagedFile, match=r"shard-00000\.h5: /samples/logprob is not what its checksum says in the rows 0"
    ):
        open_run(folder).records()
    with pytest.raises(DamagedFile, match=r"shard-00000\.h5: /samples/logprob"):
        rebuild_index(folder)
    assert sorted(path.name for path in folder.glob("shard*")) == ["shard-00000.h5", "shard-00001.h5"]
    with (
        pytest.warns(UserWarning, match=r"shard-00000\.h5: /samples/logprob .* set aside as shard-00000\.h5\.damaged"),
        RunWriter(folder, "m", SETTINGS, resume=True) as made,
    ):
        assert [record["doc_id"] for record in made.records()] == [2, 3]
    write(folder, "plain", resume=True)
    assert (folder / "shard-00000.h5.damaged").exists()
    with pytest.warns(UserWarning, match=r"shard-00000\.h5\.damaged was damaged and set aside"):
        assert verify(folder) == []
    again = {sample["doc_id"]: sample for sample in open_run(folder)}
    for sample in open_run(tmp_path / "whole"):
        assert alike({**again.pop(sample["doc_id"]), "settings": None}, {**sample, "settings": None})
    assert not again


def test_a_second_damaged_shard_of_a_number_keeps_the_first(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", "plain", finish=False)
    for name in ("shard-00001.h5.damaged", "shard-00001.h5"):
        shutil.copy(folder / "shard-00001.h5", folder / name) if not (folder / name).exists() else None
    (folder / "shard-00001.h5").write_bytes(b"nothing of HDF5")
    RunWriter(folder, "m", SETTINGS, resume=True).close()
    assert (folder / "shard-00001.h5.damaged-2").read_bytes() == b"nothing of HDF5"
    with RunWriter(folder, "m", SETTINGS, resume=True) as made:
        made.add([sample_of(2)])
    assert (folder / "shard-00002.h5").exists()


def test_merged_shard_that_is_damaged_gives_its_place_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunWriter(folder, "m", SETTINGS) as made:
        for number in range(3):
            made.add([make_sample(seed=number, task="t", doc_id=number)])
            made.flush()
        made.records()  # merges; the shards that it replaces stay until the end
    assert len(list(folder.glob("shard*"))) == 4
    flip(folder / "shard-00003.h5", first_of(folder / "shard-00003.h5", "activations/layer_0") + 5)
    with RunWriter(folder, "m", SETTINGS, resume=True) as made:
        assert [record["doc_id"] for record in made.records()] == [0, 1, 2]
        made.finish()
    assert [sample["doc_id"] for sample in open_run(folder)] == [0, 1, 2]
    assert verify(folder) == []


def test_refused_resume_sets_nothing_aside(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", "plain", finish=False)
    flip(folder / "shard-00000.h5", first_of(folder / "shard-00000.h5", "activations/layer_0"))
    with pytest.raises(StoreError, match="cannot be resumed"):
        RunWriter(folder, "other", SETTINGS, resume=True)
    assert sorted(path.name for path in folder.glob("shard*")) == ["shard-00000.h5", "shard-00001.h5"]
    with pytest.raises(DamagedFile, match=r"shard-00000\.h5: /activations/layer_0 .* rows 0 to 63"):
        open_run(folder).rows("layer_0")[5]
    assert open_run(folder).rows("layer_0")[350].shape == (256,)  # of the other shard


def test_verify_names_all_that_is_damaged(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", "plain")
    path = folder / "shard-00001.h5"
    with h5py.File(path) as file:
        starts = {
            name: 8 * file[name].id.get_offset() for name in ("activations/layer_0", "rows/position", "segments/stop")
        }
    flip(path, starts["activations/layer_0"] + 8 * 1024 * 130)
    flip(path, starts["activations/layer_0"] + 8 * 1024 * 299)
    flip(path, starts["rows/position"] + 8 * 40)
    problems = verify(folder)
    assert len(problems) == 3  # and the samples whose position that is
    assert "/activations/layer_0 is not what its checksum says (rows 128 to 191, 256 to 299)" in "".join(problems)
    assert "/rows/position is not what its checksum says" in problems[0]


@pytest.mark.parametrize("kind", [*KINDS, "chunks"])
def test_checksums_are_those_that_the_format_says(kind: str, tmp_path: Path) -> None:
    """Computed again with h5py and XXH3 alone."""
    folder = DATA / "format-1.2" / "gzip" if kind == "chunks" else write(tmp_path / kind, kind)
    several = []
    for path in folder.glob("shard-*.h5"):
        with h5py.File(path) as file:
            for key, dataset in file["activations"].items():
                told, row_bytes = file.get(f"checksums/activations/{key}"), dataset[:1].nbytes
                rows = dataset.chunks[0] if dataset.chunks else max(1, 65536 // row_bytes)
                blocks = [dataset[at : at + rows].tobytes() for at in range(0, len(dataset), rows)]
                assert dataset.attrs["xxh3_64"] == xxhash.xxh3_64_hexdigest(b"".join(blocks))
                assert (told is None) == (len(blocks) == 1)
                if told is not None:
                    assert told.dtype == np.dtype("<u8")
                    assert told.attrs["rows"] == rows
                    assert told[()].tolist() == [xxhash.xxh3_64_intdigest(block) for block in blocks]
                    assert told.attrs["xxh3_64"] == xxhash.xxh3_64_hexdigest(told[()].tobytes())
                several.append(told is not None)
    assert any(several) == (kind != "gzip")  # there a shard is one chunk


def test_unchecked_reads_are_for_those_who_ask(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", "plain")
    flip(folder / "shard-00000.h5", first_of(folder / "shard-00000.h5", "activations/layer_0") + 7)
    whole, key = sample_of(0).parts[0].rows.activations["layer_0"], "layer_0"
    assert not same(open_run(folder, check=False).read(0, key), whole)
    assert not same(load_activations(folder, 0, check=False)["activations"][key], whole)
    with pytest.raises(DamagedFile):
        load_activations(folder, 0)


def said(monkeypatch: pytest.MonkeyPatch, path: Path) -> list[str]:
    """What is said when a file or run is opened and read twice."""
    monkeypatch.setattr(opened, "_said", set())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            list(open_run(path))
    return [str(each.message) for each in found]


def test_what_is_not_checked_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (old,) = said(monkeypatch, DATA / "format-1.0" / "run")
    assert "format 1.0 have no checksums" in old
    (older,) = said(monkeypatch, DATA / "format-1.1" / "run")
    assert "format 1.1 have one checksum a dataset" in older
    assert said(monkeypatch, DATA / "format-1.2" / "run") == []
    folder = write(tmp_path / "run", "plain")
    with h5py.File(folder / "shard-00000.h5", "r+") as file:
        file.attrs["note"] = "mine"
    shard = folder / "shard-00000.h5"
    (changed,) = said(monkeypatch, shard)
    assert "shard-00000.h5: its trailer is missing" in changed


def test_whole_read_of_a_file_of_1_1_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "old.h5"
    shutil.copy(DATA / "format-1.1" / "one_bfloat16.h5", path)
    flip(path, first_of(path, "activations/layer_0") + 8 * 17)
    with pytest.raises(DamagedFile, match="/activations/layer_0"):
        open_run(path).rows("layer_0")[:]
