"""Files that were damaged or made to harm: each is refused by name, without a crash and without allocating what it says."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers.forked import MAIN, Forked
from helpers.places import ROOT
from helpers.samples import SETTINGS, make_sample, with_right_checksums, write_run

from AutomaticEval import load_activations, open_run
from AutomaticEval.errors import AutomaticEvalError, DamagedFile, StoreError, TruncatedFile, UnreadableFile
from AutomaticEval.samples import Part, Sample
from AutomaticEval.store.contents.from_samples import of_samples
from AutomaticEval.store.hdf5.read import Shard
from AutomaticEval.store.hdf5.room import EXPANSION
from AutomaticEval.store.hdf5.write import write_file, write_shard
from AutomaticEval.store.upkeep.convert import convert
from AutomaticEval.store.upkeep.verify import verify


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_shard(tmp_path / "one.h5", [make_sample(), make_sample(seed=1)], "m", SETTINGS)
    return tmp_path / "one.h5"


def replaced(file: h5py.File, name: str, **made: Any) -> None:
    """A dataset with the same attributes, made otherwise."""
    attributes = dict(file[name].attrs)
    del file[name]
    file.create_dataset(name, **made).attrs.update(attributes)


def elsewhere(file: h5py.File) -> None:
    del file["activations/layer_0"]
    file["activations/layer_0"] = h5py.ExternalLink("/etc/passwd", "/x")


def soft(file: h5py.File) -> None:
    del file["activations/layer_0"]
    file["activations/layer_0"] = h5py.SoftLink("/activations/embeddings")


def soft_group(file: h5py.File) -> None:
    file.move("samples", "other")
    file["samples"] = h5py.SoftLink("/other")


def external_storage(file: h5py.File) -> None:
    shape = file["activations/layer_0"].shape
    replaced(file, "activations/layer_0", shape=shape, dtype="<f4", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def virtual(file: h5py.File) -> None:
    shape = file["activations/layer_0"].shape
    layout = h5py.VirtualLayout(shape, "<f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape)
    del file["activations/layer_0"]
    file.create_virtual_dataset("activations/layer_0", layout)
    file["activations/layer_0"].attrs["dtype"] = "float32"


HUGE = 2**40
HARMS: dict[str, Callable[[h5py.File], Any]] = {
    "external link": elsewhere,
    "soft link": soft,
    "soft group": soft_group,
    "external storage": external_storage,
    "virtual": virtual,
    "huge rows": lambda f: [replaced(f, "rows/token_id", shape=(HUGE,), dtype="<i4")],
    "huge activations": lambda f: [replaced(f, "activations/layer_0", shape=(12, HUGE), dtype="<f4")],
    "huge and chunked": lambda f: replaced(f, "activations/layer_0", shape=(12, HUGE), dtype="<f4", chunks=(1, 1024)),
    "huge chunks": lambda f: replaced(f, "activations/layer_0", shape=(12, 2**26), dtype="<f4", chunks=(1, 2**26)),
    "huge column": lambda f: replaced(f, "samples/prompt", shape=(HUGE,), dtype=h5py.string_dtype(), chunks=(2**20,)),
    "huge vocabulary": lambda f: replaced(f, "vocabulary/token", shape=(HUGE,), dtype=h5py.string_dtype()),
    "wrong shape": lambda f: replaced(f, "activations/layer_0", data=np.zeros((3, 8), "<f4")),
    "three dimensions": lambda f: replaced(f, "activations/layer_0", data=np.zeros((12, 8, 1), "<f4")),
    "wrong type": lambda f: replaced(f, "activations/layer_0", data=np.zeros((12, 8), "<f8")),
    "text for numbers": lambda f: replaced(f, "rows/token_id", data=["x"] * 12),
    "dangling segment": lambda f: f["segments/stop"].__setitem__(0, 10**6),
    "negative segment": lambda f: f["segments/start"].__setitem__(0, -5),
    "offsets that fall": lambda f: f["segments/offset"].__setitem__(1, 9),
    "offsets that overflow": lambda f: f["input_ids/offset"].__setitem__(2, 2**62),
    "short column": lambda f: replaced(f, "samples/n_prompt_tokens", data=np.zeros(1, "<i8")),
    "group for a dataset": lambda f: [f.__delitem__("rows/position"), f.create_group("rows/position")],
    "settings that are not JSON": lambda f: f.attrs.__setitem__("settings", "{"),
    "dtype that is a function": lambda f: f["activations/layer_0"].attrs.__setitem__("dtype", "load"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_harmful_file_is_refused_by_name(file: Path, harm: str) -> None:
    with h5py.File(file, "r+") as opened:
        HARMS[harm](opened)
        with_right_checksums(opened, "segments/start", "segments/stop", "segments/offset", "input_ids/offset")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TruncatedFile, match=r"one\.h5"):
        load_activations(file, sample=0)
    assert verify(file), "verify found nothing wrong"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def index_names(name: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        with h5py.File(folder / "run.h5", "r+") as file:
            file["shards/name"][1] = name

    return harm


def moved_rows(folder: Path) -> None:
    with h5py.File(folder / "run.h5", "r+") as file:
        file["segments/start"][0], file["segments/stop"][0] = 0, 1


def more_rows(folder: Path) -> None:
    with h5py.File(folder / "run.h5", "r+") as file:
        file["shards/n_rows"][0] += 1


@pytest.mark.parametrize(
    "harm",
    [
        index_names("../other/shard-00001.h5"),
        index_names("/etc/passwd"),
        index_names("absent.h5"),
        moved_rows,
        more_rows,
    ],
)
def test_harmful_index_is_refused_by_name(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    for name in ("run", "other"):
        write_run(tmp_path / name, 9, shard_bytes=600)
    harm(tmp_path / "run")
    assert verify(tmp_path / "run")
    with pytest.raises(AutomaticEvalError, match=r"run|shard"):
        list(open_run(tmp_path / "run"))


def test_truncated_shard_of_a_run_is_named_at_once(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    shard = tmp_path / "run" / "shard-00001.h5"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(TruncatedFile, match=r"shard-00001\.h5"):
        open_run(tmp_path / "run")
    assert any("shard-00001.h5" in problem for problem in verify(tmp_path / "run"))


def test_any_flipped_bit_in_a_data_block_is_found_and_named(tmp_path: Path) -> None:
    """Every byte of every dataset is flipped in turn; one bit each."""
    write_shard(tmp_path / "one.h5", [make_sample(width=4)], "m", SETTINGS)
    whole = (tmp_path / "one.h5").read_bytes()
    blocks: list[tuple[str, int, int]] = []
    with h5py.File(tmp_path / "one.h5") as opened:

        def note(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                blocks.append((name, item.id.get_offset(), item.id.get_storage_size()))

        opened.visititems(note)
    assert len(blocks) > 15
    flipped = tmp_path / "flipped.h5"
    for name, offset, size in blocks:
        for at in range(offset, offset + size, max(1, size // 16)):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << (at % 8)
            flipped.write_bytes(damaged)
            problems = verify(flipped)
            assert problems, f"byte {at - offset} of {name}"
            assert str(flipped) in problems[0]
            if name.startswith("activations/"):
                assert any(f"/{name} is not what its checksum says" in problem for problem in problems)


FLIPS = """
import random, sys
from pathlib import Path
import h5py
from AutomaticEval.store.upkeep.verify import verify
from AutomaticEval import open_run
from AutomaticEval.errors import AutomaticEvalError

def everything(path):
    found = {}
    with h5py.File(path) as file:
        found.update({("/", name): str(value) for name, value in file.attrs.items()})
        def note(name, item):
            if isinstance(item, h5py.Dataset):
                found[name] = (item.shape, str(item.dtype), item[()].tobytes() if item.dtype != object else item[()].tolist())
        file.visititems(note)
    return found

folder, seed, n = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
whole, moments = (folder / "one.h5").read_bytes(), random.Random(seed)
same, refused, silent = everything(folder / "one.h5"), 0, []
for number in range(n):
    at = moments.randrange(8 * len(whole))
    damaged = bytearray(whole)
    damaged[at // 8] ^= 1 << at % 8
    flipped = folder / "flipped.h5"
    flipped.write_bytes(damaged)
    print(at, end=" ", flush=True, file=sys.stderr)
    if verify(flipped):
        refused += 1
        continue
    try:
        list(open_run(flipped))
    except AutomaticEvalError:
        silent.append(at)
        continue
    if everything(flipped) != same:
        silent.append(at)
print(refused, len(silent), silent[:10])
"""


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """Anywhere in the file, HDF5's own structures included, in a process of its own: none crashes it."""
    write_shard(tmp_path / "one.h5", [make_sample(width=4)], "m", SETTINGS)
    done = subprocess.run(
        [sys.executable, "-c", FLIPS, str(tmp_path), "1", "400"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    refused, silent, where = done.stdout.split(maxsplit=2)
    assert int(refused) > 50
    assert int(silent) == 0, where


def test_missing_checksum_is_found(file: Path) -> None:
    with h5py.File(file, "r+") as opened:
        del opened["activations/layer_0"].attrs["xxh3_64"]
    assert "/activations/layer_0 has no checksum" in verify(file)[0]
    with pytest.raises(TruncatedFile, match="/activations/layer_0 has no checksum"):
        load_activations(file, sample=0)


def test_changed_settings_are_found(file: Path) -> None:
    with h5py.File(file, "r+") as opened:
        opened.attrs["settings"] = json.dumps({**SETTINGS, "dtype": "float16"})
    assert "root attributes" in verify(file)[0]


def test_folder_that_can_only_be_read_is_read(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    for path in (tmp_path / "run").iterdir():
        path.chmod(0o444)
    (tmp_path / "run").chmod(0o555)
    try:
        assert len(list(open_run(tmp_path / "run"))) == 9
        assert verify(tmp_path / "run") == []
    finally:
        (tmp_path / "run").chmod(0o755)


def test_shards_that_swapped_their_names_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    one, other = (tmp_path / "run" / f"shard-0000{number}.h5" for number in (0, 4))
    one.rename(tmp_path / "x")
    other.rename(one)
    (tmp_path / "x").rename(other)
    assert any("another shard" in problem or "bytes, not" in problem for problem in verify(tmp_path / "run"))
    with pytest.raises(StoreError, match=r"another shard|bytes, not"):
        list(open_run(tmp_path / "run"))


def test_file_that_was_replaced_while_it_was_open_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "one.h5", [make_sample()], "m", SETTINGS)
    run = open_run(tmp_path / "one.h5")
    dataset = run.dataset("layer_0")
    assert len(dataset[0]) == 8
    write_shard(tmp_path / "one.h5", [make_sample(seed=1)], "m", SETTINGS, overwrite=True)
    for read in (lambda: dataset[0], lambda: run.rows("layer_0")[:], lambda: run.read(0, "layer_0")):
        with pytest.raises(StoreError, match="open it again"):
            read()


def test_shard_of_another_unfinished_run_is_refused(tmp_path: Path) -> None:
    for name in ("run", "other"):
        write_run(tmp_path / name, 9, shard_bytes=600)
        (tmp_path / name / "run.h5").unlink()
    (tmp_path / "other" / "shard-00001.h5").rename(tmp_path / "run" / "shard-00077.h5")
    with pytest.raises(StoreError, match="another run"):
        open_run(tmp_path / "run")


def test_verify_on_the_command_line_says_what_is_wrong_and_ends(tmp_path: Path) -> None:
    """One bit in HDF5's own structures, over which HDF5 itself may loop for ever."""
    write_shard(tmp_path / "one.h5", [make_sample(width=4)], "m", SETTINGS)
    whole = (tmp_path / "one.h5").read_bytes()
    for at in (24393, 26122, 24585):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        (tmp_path / "bad.h5").write_bytes(damaged)
        for command in ("verify", "show"):
            done = Forked([MAIN, command, str(tmp_path / "bad.h5")]).wait(timeout=60)
            assert done.returncode == 1, done.stderr
            assert "bad.h5" in done.stderr
            assert "Traceback" not in done.stderr
    whole_again = Forked([MAIN, "verify", str(tmp_path / "one.h5")]).wait(timeout=60)
    assert whole_again.returncode == 0


def test_verify_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no file"):
        Shard(tmp_path / "absent.h5")
    with pytest.raises(StoreError):
        verify(tmp_path / "absent")


def attribute(name: str, value: Any, dataset: str = "/") -> Callable[[h5py.File], Any]:
    return lambda file: file[dataset].attrs.__setitem__(name, value)


DEEP = "[" * 5000 + "]" * 5000
SAID: dict[str, Callable[[h5py.File], Any]] = {
    "settings that are a list": attribute("settings", "[]"),
    "settings that are nested too deep": attribute("settings", f'{{"a": {DEEP}}}'),
    "settings whose names take too much": attribute(
        "settings", json.dumps({"x" * 9000: dict.fromkeys(map(str, range(999)))})
    ),
    "settings of many layers": attribute("settings", '{"shape": {"n_layers": 1000000000000}}'),
    "settings that are an array": attribute("settings", ["{}", "{}"]),
    "version that is no number": attribute("format_version", "²"),
    "version of half a number": attribute("format_version", "1.x"),
    "version that is an array": attribute("format_version", [1, 2]),
    "replaces that is no list": attribute("replaces", '"shard-00000.h5"'),
    "replaces of another folder": attribute("replaces", '["../shard-00000.h5"]'),
    "replaces of numbers": attribute("replaces", "[1]"),
    "dtype that is an array": attribute("dtype", ["float32"], "activations/layer_0"),
    "encoding that is an array": attribute("encoding", ["utf-8"], "samples/prompt"),
    "checksum that is a number": attribute("xxh3_64", 5, "activations/layer_0"),
    "rows without end": lambda f: replaced(f, "rows/token_id", shape=(HUGE, 0), dtype="<i4"),
    "activations without width": lambda f: replaced(f, "activations/layer_0", shape=(HUGE, 0), dtype="<f4"),
    "JSON that is too deep": lambda f: [
        replaced(f, "samples/prompt", data=[DEEP] * 2, dtype=h5py.string_dtype()),
        f["samples/prompt"].attrs.__setitem__("encoding", "json"),
    ],
    "a column of another type": lambda f: [
        replaced(f, "samples/prompt", data=np.zeros(2, "<i8")),
        f["samples/prompt"].attrs.__setitem__("encoding", "int"),
    ],
    "offsets without numbers": lambda f: [
        replaced(f, f"{name}/offset", shape=(0,), dtype="<i8") for name in ("segments", "input_ids", "generated_ids")
    ],
}


@pytest.mark.parametrize("harm", SAID)
def test_what_a_file_says_of_itself_is_refused_by_name(file: Path, harm: str) -> None:
    with h5py.File(file, "r+") as opened:
        SAID[harm](opened)
    with pytest.raises(UnreadableFile, match=r"one\.h5"):
        open_run(file).table()


@pytest.mark.parametrize("name", ["..", ".", "", "/etc/passwd", "a/shard-00000.h5", "run.h5", "shard-².h5", "x\0y"])
def test_shard_of_another_name_is_refused(tmp_path: Path, name: str) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    with h5py.File(tmp_path / "run" / "run.h5", "r+") as opened:
        texts = [name if number == 1 else each for number, each in enumerate(opened["shards/name"].asstr()[()])]
        replaced(opened, "shards/name", data=[json.dumps(each) for each in texts], dtype=h5py.string_dtype())
        opened["shards/name"].attrs["encoding"] = "json"
    with pytest.raises(TruncatedFile, match=r"run\.h5"):
        open_run(tmp_path / "run")


def test_file_whose_name_is_nearly_that_of_a_shard_is_no_shard(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 3, shard_bytes=600)
    (tmp_path / "run" / "run.h5").unlink()
    (tmp_path / "run" / "shard-².h5").write_bytes(b"mine")
    assert len(open_run(tmp_path / "run")) == 3


def test_shards_that_replace_one_another_are_kept(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    (tmp_path / "run" / "run.h5").unlink()
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    with h5py.File(tmp_path / "run" / "shard-00000.h5", "r+") as opened:
        opened.attrs["replaces"] = '["shard-00000.h5", "shard-00001.h5"]'
    with pytest.raises(DamagedFile, match="replaces"):
        open_run(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names


def test_absent_columns_are_read(file: Path) -> None:
    with h5py.File(file, "r+") as opened:
        for name in list(opened["samples"]):
            del opened[f"samples/{name}"]
    run = open_run(file)
    assert run[0]["positions"].tolist() == list(range(6))
    assert "batch_shape" not in load_activations(file, 1)["settings"]
    assert run.table().empty
    assert run.records() == [{}, {}]


def test_texts_that_are_all_the_same_bytes_are_refused(tmp_path: Path) -> None:
    """2,000 references to one text of 1 MiB, in a file of 1.5 MiB: 2 GB of text."""
    sample = make_sample()
    many = [
        Sample(
            {**sample.fields, "prompt": "x" * 2**20 if not number else "y"},
            sample.input_ids,
            sample.generated_ids,
            sample.parts,
        )
        for number in range(2000)
    ]
    path = tmp_path / "bomb.h5"
    write_shard(path, many, "m", SETTINGS)
    with h5py.File(path) as opened:
        at = opened["samples/prompt"].id.get_offset()
    raw = bytearray(path.read_bytes())
    raw[at : at + 16 * len(many)] = raw[at : at + 16] * len(many)
    path.write_bytes(raw[: -16 - int.from_bytes(raw[-16:-8], "little")])  # without its trailer
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TruncatedFile, match="/samples/prompt says 2097184000 bytes"):
        open_run(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_equal_texts_and_equal_rows_are_read(tmp_path: Path) -> None:
    """A prompt that 500 samples have, and 72 MB of zeros, of which zstd makes less than a thousandth."""
    pytest.importorskip("hdf5plugin")
    sample = make_sample()
    rows = sample.parts[0].rows
    zeros = replace(rows, activations={f"layer_{layer}": torch.zeros(6, 2**18) for layer in range(12)})
    fields = {**sample.fields, "prompt": "five shots " * 50}
    every = [Sample(fields, sample.input_ids, sample.generated_ids, [Part(zeros, range(6))])] * 500
    write_file(tmp_path / "one.h5", of_samples(every, "m", SETTINGS), compression="zstd")
    assert verify(tmp_path / "one.h5") == []
    assert open_run(tmp_path / "one.h5").table()["prompt"].nunique() == 1
    assert not open_run(tmp_path / "one.h5").read(0, "layer_1").any()


def test_index_that_says_its_rows_are_wide_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    with h5py.File(tmp_path / "run" / "run.h5", "r+") as opened:
        n_rows = len(opened["rows/token_id"])
        for key in list(opened["activations"]):
            attributes = dict(opened[f"activations/{key}"].attrs)
            made = opened[f"activations/{key}"].id.get_type()
            del opened[f"activations/{key}"]
            space = h5py.h5s.create_simple((n_rows, 2**30))
            settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            settings.set_chunk((1, 1024))
            h5py.h5d.create(opened["activations"].id, key.encode(), made, space, dcpl=settings)
            opened[f"activations/{key}"].attrs.update(attributes)
    with pytest.raises(TruncatedFile, match=r"run\.h5 .* more than its shards can hold"):
        open_run(tmp_path / "run")


def test_sample_that_has_one_row_many_times_is_refused(file: Path) -> None:
    with h5py.File(file, "r+") as opened:
        replaced(opened, "segments/start", data=np.zeros(10**4, "<i8"))
        replaced(opened, "segments/stop", data=np.full(10**4, 12, "<i8"))
        opened["segments/offset"][:] = [0, 5000, 10**4]
        with_right_checksums(opened, "segments/offset")
        for name in ("segments/start", "segments/stop"):
            opened.create_dataset(f"checksums/{name}", data=np.zeros(2, "<u8")).attrs["rows"] = 8192
    with pytest.raises(UnreadableFile, match=r"one\.h5 .*/segments give sample 0 more rows than it has tokens"):
        open_run(file, check=False)


MADE_OTHERWISE: dict[str, Callable[[h5py.File], Any]] = {
    "an array": lambda f: f["rows/position"].attrs.__setitem__("xxh3_64", ["0" * 16] * 2),
    "a number": lambda f: f["samples/prompt"].attrs.__setitem__("xxh3_64", 5),
    "of a column of numbers": lambda f: f["samples/n_prompt_tokens"].attrs.__setitem__("xxh3_64", np.zeros(3)),
}


@pytest.mark.parametrize("made", MADE_OTHERWISE)
def test_verify_names_a_checksum_that_is_no_text(file: Path, made: str) -> None:
    with h5py.File(file, "r+") as opened:
        MADE_OTHERWISE[made](opened)
    assert any("the attribute xxh3_64 of /" in problem for problem in verify(file))


def test_verify_reads_no_attribute_of_many_texts_that_are_one(file: Path) -> None:
    """3,000 references to one text of 1 MiB: 3 GB, which another program's attribute may say."""
    with h5py.File(file, "r+") as opened:
        opened["samples"].attrs["of another"] = ["x" * 2**20, *(["y"] * 2999)]
    raw = file.read_bytes()
    at = next(
        at
        for at in range(len(raw))
        if raw[at : at + 4] == (2**20).to_bytes(4, "little") and raw[at + 16 : at + 20] == b"\1\0\0\0"
    )
    file.write_bytes(raw[:at] + raw[at : at + 16] * 3000 + raw[at + 16 * 3000 :])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "trailer" in verify(file)[0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    """A file with datasets of several blocks."""
    write_shard(tmp_path / "one.h5", [make_sample(n_prompt=40, width=1024)], "m", SETTINGS)
    return tmp_path / "one.h5"


def checksums_elsewhere(file: h5py.File) -> None:
    with h5py.File(Path(file.filename).with_name("other.h5"), "w") as other:
        file.copy("checksums", other)
    del file["checksums"]
    file["checksums"] = h5py.ExternalLink("other.h5", "/checksums")


def checksums_linked(file: h5py.File) -> None:
    file.move("checksums/activations/layer_0", "checksums/x")
    file["checksums/activations/layer_0"] = h5py.SoftLink("/checksums/x")


@pytest.mark.parametrize(
    "harm",
    [
        checksums_elsewhere,
        checksums_linked,
        lambda file: file.move("checksums", "x") or file.__setitem__("checksums", h5py.SoftLink("/x")),
        lambda file: replaced(file, "checksums/activations/layer_0", data=np.zeros(3, "<f8")),
        lambda file: file["checksums/activations/layer_0"].attrs.__setitem__("rows", [16]),
    ],
)
def test_checksums_of_blocks_that_are_not_in_the_file_are_refused(
    blocks: Path, harm: Callable[[h5py.File], Any]
) -> None:
    with h5py.File(blocks, "r+") as opened:
        assert len(opened["checksums/activations/layer_0"]) == 3
        harm(opened)
    with pytest.raises(TruncatedFile, match=r"one\.h5 .*checksums"):
        open_run(blocks)
    assert "checksums" in verify(blocks)[0]


INDEX_OF_1_0: dict[str, Callable[[h5py.File], Any]] = {
    "names that are numbers": lambda f: replaced(f, "shards/name", data=np.zeros(2, "<i8")),
    "names without end": lambda f: replaced(f, "shards/name", shape=(HUGE,), dtype=h5py.string_dtype()),
    "names that are one": lambda f: replaced(f, "shards/name", data="shard-00000.h5", dtype=h5py.string_dtype()),
    "a shard that is not there": lambda f: f["samples/shard"].__setitem__(0, 7),
    "no shard": lambda f: f["samples/shard"].__setitem__(0, -1),
    "a shard before the first": lambda f: f["samples/shard"].__setitem__(0, -2),
    "a sample that is not there": lambda f: f["samples/index"].__setitem__(0, 10**6),
    "no sample": lambda f: f["samples/index"].__setitem__(0, -1),
    "no column of samples": lambda f: f.__delitem__("samples/index"),
}


@pytest.mark.parametrize("harm", INDEX_OF_1_0)
def test_harmful_index_of_1_0_is_refused_by_name(tmp_path: Path, harm: str) -> None:
    run = shutil.copytree(ROOT / "tests" / "data" / "format-1.0" / "run", tmp_path / "run")
    with h5py.File(run / "run.h5", "r+") as opened:
        INDEX_OF_1_0[harm](opened)
    with pytest.raises(TruncatedFile, match=r"run\.h5"):
        open_run(run)
    assert verify(run)


def test_shard_without_rows_is_refused_by_name(file: Path) -> None:
    with h5py.File(file, "r+") as opened:
        del opened["rows"]
    with pytest.raises(TruncatedFile, match=r"one\.h5"):
        open_run(file)


@pytest.mark.parametrize("value", ["many", [1, 2], 1.5])
def test_count_of_infinite_numbers_that_is_none_is_refused(file: Path, value: Any) -> None:
    with h5py.File(file, "r+") as opened:
        opened["activations/layer_0"].attrs["non_finite"] = value
    with pytest.raises(TruncatedFile, match=r"one\.h5"):
        open_run(file).finite()


def test_count_of_infinite_numbers_looks_at_no_column_that_leads_elsewhere(file: Path) -> None:
    with h5py.File(file, "r+") as opened:
        opened["samples/of another"] = h5py.SoftLink("/nothing")
        opened["samples/of a third"] = h5py.ExternalLink("/etc/passwd", "/x")
    assert open_run(file).non_finite == {"embeddings": 0, "layer_0": 0}
    assert open_run(file).finite().all()


def test_int8_without_rows_is_converted(tmp_path: Path) -> None:
    whole = make_sample()
    none = replace(
        whole,
        parts=[
            Part(
                replace(
                    whole.parts[0].rows,
                    token_ids=[],
                    tokens=[],
                    positions=[],
                    activations={"layer_0": torch.empty(0, 8)},
                ),
                [],
            )
        ],
    )
    write_file(tmp_path / "int8.h5", of_samples([none], "m", SETTINGS, in_8_bits=True))
    convert(tmp_path / "int8.h5", tmp_path / "one.h5", dtype="float32")
    assert open_run(tmp_path / "one.h5").read(0, "layer_0").shape == (0, 8)


def test_writer_fills_up_a_file_of_rows_that_zstd_makes_too_small(tmp_path: Path) -> None:
    """Equal rows of 96 MB, which zstd writes into fewer bytes than a reader allows for so many."""
    pytest.importorskip("hdf5plugin")
    sample, path = make_sample(), tmp_path / "one.h5"
    equal = replace(sample.parts[0].rows, activations={"layer_0": torch.full((6, 2**22), 1.5)})
    write_file(path, of_samples([replace(sample, parts=[Part(equal, range(6))])], "m", SETTINGS), compression="zstd")
    raw = path.read_bytes()
    n_trailer = int.from_bytes(raw[-16:-8], "little")
    n_least = 6 * 2**22 * 4 / EXPANSION
    assert len(raw) - n_trailer < n_least <= len(raw), "what HDF5 wrote would be enough: the test tests nothing"
    assert raw[-17:-16] == b" "
    assert torch.equal(open_run(path).read(0, "layer_0"), equal.activations["layer_0"])
    assert verify(path) == []
    path.write_bytes(raw[: -16 - n_trailer])
    with pytest.raises(TruncatedFile, match="uncompressed"):
        open_run(path)
