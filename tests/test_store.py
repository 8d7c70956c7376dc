"""Files: bit for bit, readable by plain h5py, whole or absent, and refused by name when they are not ours."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers.places import ROOT
from helpers.samples import SETTINGS, assert_same_data, make_sample, same, with_right_checksums, write_run

from AutomaticEval import load_activations, open_run
from AutomaticEval.errors import (
    CaptureError,
    DiskFull,
    FolderNotWritable,
    ManySamples,
    NewerFormat,
    NotActivations,
    PathExists,
    RefusedPickle,
    StoreError,
    TruncatedFile,
)
from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.store import writer
from AutomaticEval.store.disk import whole_files as files
from AutomaticEval.store.disk.file_names import file_stem, hdf5_path
from AutomaticEval.store.disk.whole_files import ensure_space
from AutomaticEval.store.hdf5 import write as sealing
from AutomaticEval.store.hdf5.write import write_named, write_shard
from AutomaticEval.store.writer import RunWriter


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_file_gives_the_same_dict_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    sample, file = make_sample(dtype), tmp_path / "one.h5"
    write_shard(file, [sample], "m", SETTINGS)
    expected = {**sample.activation_data("m", SETTINGS), "path": str(file.resolve())}
    assert_same_data(load_activations(file), expected)


def test_every_bfloat16_pattern_survives_and_plain_h5py_reads_its_value(tmp_path: Path) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(-1, 8)
    n_rows = len(every)
    rows = Rows([1] * n_rows, ["x"] * n_rows, list(range(n_rows)), {"layer_0": every})
    fields = make_sample().fields
    write_shard(tmp_path / "all.h5", [Sample(fields, [1] * n_rows, [1], [Part(rows, range(n_rows))])], "m", SETTINGS)
    assert same(load_activations(tmp_path / "all.h5")["activations"]["layer_0"], every)
    with h5py.File(tmp_path / "all.h5") as file:
        assert file["activations/layer_0"].dtype == np.float32  # h5py's nearest type for HDF5's bfloat16
        assert file["activations/layer_0"].attrs["dtype"] == "bfloat16"
        np.testing.assert_array_equal(file["activations/layer_0"][()], every.float().numpy())


@pytest.mark.parametrize(
    "text", ["plain", "zażółć 你好 🙂", "a\0b", "\ud800 alone", "line\nbreak\ttab", "", '"quoted"', "\x7f\x1b[0m"]
)
def test_text_survives(tmp_path: Path, text: str) -> None:
    write_shard(tmp_path / "t.h5", [make_sample(prompt=text, response=text)], "m", SETTINGS)
    loaded = load_activations(tmp_path / "t.h5")
    assert (loaded["prompt"], loaded["response"]) == (text, text)


def test_plain_h5py_finds_what_the_format_says(tmp_path: Path) -> None:
    sample = make_sample()
    write_shard(tmp_path / "one.h5", [sample], "my/model", SETTINGS)
    with h5py.File(tmp_path / "one.h5") as file:
        assert file.attrs["format"] == "automatic-eval/activations"
        assert file.attrs["format_version"] == "1.6"
        assert file.attrs["model"] == "my/model"
        assert json.loads(file.attrs["settings"]) == SETTINGS
        assert file["samples/prompt"].asstr()[0] == "What?"
        np.testing.assert_array_equal(file["input_ids/values"][()], sample.input_ids)
        np.testing.assert_array_equal(file["rows/token_id"][()], sample.parts[0].rows.token_ids)
        np.testing.assert_array_equal(file["rows/position"][()], sample.parts[0].rows.positions)
        start, stop = file["segments/start"][0], file["segments/stop"][0]
        np.testing.assert_array_equal(
            file["activations/layer_0"][start:stop], sample.parts[0].rows.activations["layer_0"].numpy()
        )
        assert file["activations/layer_0"].chunks is None


def test_samples_that_share_rows_store_them_once(tmp_path: Path) -> None:
    first = make_sample()
    other = Sample(
        {**first.fields, "response": "This."},
        first.input_ids,
        [*first.generated_ids[:-1], 9],
        [Part(first.parts[0].rows, [0, 2, 3, 5])],
    )
    with RunWriter(tmp_path / "run", "m", SETTINGS) as made:
        made.add([first, other])
        made.finish()
    with h5py.File(tmp_path / "run" / "shard-00000.h5") as file:
        assert file["activations/layer_0"].shape[0] == len(first.parts[0].rows.positions)
    run = open_run(tmp_path / "run")
    assert len(run) == 2
    assert same(run[1]["activations"]["layer_0"], first.parts[0].rows.activations["layer_0"][[0, 2, 3, 5]])
    assert run[1]["positions"].tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize("shard_bytes", [1, 3_000, 10**6])
def test_prefix_that_many_samples_share_is_stored_once_a_shard(tmp_path: Path, shard_bytes: int) -> None:
    """Few-shot examples: one prefix for all questions, and each question's rows for its two choices."""
    prefix = make_sample(n_prompt=20, n_response=1).parts[0].rows
    samples: list[Sample] = []
    for number in range(8):
        own = make_sample(seed=100 + number, n_prompt=3, n_response=1)
        rows = own.parts[0].rows
        later = Rows(rows.token_ids, rows.tokens, [20 + place for place in rows.positions], rows.activations)
        ids = [*prefix.token_ids, *own.input_ids]
        for choice in range(2):
            fields = {**own.fields, "doc_id": number, "choice": choice, "n_prompt_tokens": len(ids)}
            samples.append(Sample(fields, ids, [7 + choice], [Part(prefix, range(20)), Part(later, range(3))]))
    with RunWriter(tmp_path / "run", "m", SETTINGS, shard_bytes=shard_bytes) as made:
        for number in range(0, len(samples), 2):
            made.add(samples[number : number + 2])
        made.finish()
    run = open_run(tmp_path / "run")
    assert len(run.rows("layer_0")) == len(run.shards) * 20 + 8 * 3
    for found, sample in zip(run, samples, strict=True):
        assert same(found["activations"], sample.activation_data("m", SETTINGS)["activations"])
        assert found["positions"].tolist() == list(range(23))
    for shard in run.shards:  # each can be read alone
        assert all(len(found["positions"]) == 23 for found in open_run(shard.path))


def test_sample_without_rows_is_stored_and_read(tmp_path: Path) -> None:
    full = make_sample()
    rows = Rows([], [], [], {key: tensor[:0] for key, tensor in full.parts[0].rows.activations.items()})
    write_shard(
        tmp_path / "none.h5", [Sample(full.fields, full.input_ids, full.generated_ids, [Part(rows, [])])], "m", SETTINGS
    )
    assert load_activations(tmp_path / "none.h5")["activations"]["layer_0"].shape == (0, 8)


def test_rows_that_are_not_the_samples_tokens_are_refused() -> None:
    sample = make_sample()
    with pytest.raises(CaptureError, match="do not belong"):
        Sample(sample.fields, [1, 1, 1, 1], sample.generated_ids, sample.parts)
    with pytest.raises(CaptureError, match="do not belong"):  # the last token is never fed
        Sample(sample.fields, sample.input_ids, sample.generated_ids[:-1], sample.parts)


def test_rows_that_were_changed_in_the_file_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "one.h5", [make_sample()], "m", SETTINGS)
    with h5py.File(tmp_path / "one.h5", "r+") as file:
        file["rows/position"][0] = 1
        with_right_checksums(file, "rows/position")
    with pytest.raises(TruncatedFile, match="not its tokens"):
        load_activations(tmp_path / "one.h5")


def test_existing_file_is_never_replaced_unasked(tmp_path: Path) -> None:
    file = tmp_path / "kept.h5"
    file.write_text("precious")
    with pytest.raises(PathExists, match="overwrit"):
        write_shard(file, [make_sample()], "m", SETTINGS)
    assert file.read_text() == "precious"
    assert os.listdir(tmp_path) == ["kept.h5"]
    write_shard(file, [make_sample()], "m", SETTINGS, overwrite=True)
    assert load_activations(file)["prompt"] == "What?"


def test_name_taken_between_check_and_naming_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = files._sync

    def another_process_is_quicker(path: Path) -> None:
        (tmp_path / "a.h5").write_text("theirs")
        sync(path)

    monkeypatch.setattr(files, "_sync", another_process_is_quicker)
    with pytest.raises(PathExists):
        write_shard(tmp_path / "a.h5", [make_sample()], "m", SETTINGS)
    assert (tmp_path / "a.h5").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["a.h5"]


def test_file_system_without_hard_links_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    write_shard(tmp_path / "a.h5", [make_sample()], "m", SETTINGS)
    with pytest.raises(PathExists):
        write_shard(tmp_path / "a.h5", [make_sample()], "m", SETTINGS)
    assert os.listdir(tmp_path) == ["a.h5"]


def test_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(sealing, "_write_table", fail)
    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "a.h5", [make_sample()], "m", SETTINGS)
    assert os.listdir(tmp_path) == []


FILLS_THE_DISK = """
import resource, signal, sys
from pathlib import Path
sys.path[:0] = ["tests"]
from helpers.samples import SETTINGS, make_sample
from AutomaticEval.errors import DiskFull
from AutomaticEval.store.hdf5.write import write_shard
sample = make_sample(n_prompt=200, width=512)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    write_shard(Path(sys.argv[1]) / "big.h5", [sample], "m", SETTINGS)
except DiskFull as error:
    print("DiskFull:", error)
"""


@pytest.mark.parametrize("limit", [0, 1_000, 100_000, 800_000])
def test_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """A file-size limit stops the writing at different points; the process ends cleanly (HDF5 can crash at exit)."""
    done = subprocess.run(
        [sys.executable, "-c", FILLS_THE_DISK, str(tmp_path), str(limit)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "DiskFull: the disk is full" in done.stdout
    assert os.listdir(tmp_path) == []


def test_too_little_room_is_refused_before(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="needed"):
        ensure_space(tmp_path / "not" / "yet", 2**60)
    ensure_space(tmp_path / "not" / "yet", 1)


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderNotWritable, match="file"):
        files.prepare_folder(tmp_path / "file" / "folder")
    with pytest.raises(FolderNotWritable):
        files.prepare_folder(Path("/proc/nowhere"))


def test_pickle_names_are_written_as_hdf5_with_a_warning(tmp_path: Path) -> None:
    for suffix in (".pkl", ".pickle", ".pt", ".PT"):
        with pytest.warns(UserWarning, match=r"old\.h5"):
            assert hdf5_path(tmp_path / f"old{suffix}") == tmp_path / "old.h5"
    assert hdf5_path(tmp_path / "new.h5") == tmp_path / "new.h5"
    write_shard(tmp_path / "old.h5", [make_sample()], "m", SETTINGS)
    assert load_activations(tmp_path / "old.pkl")["prompt"] == "What?"


class Bomb:
    def __reduce__(self) -> Any:
        return (os.system, (f"touch {BOMBED}",))


BOMBED = Path(f"/tmp/unpickled-{os.getpid()}")


@pytest.mark.parametrize("save", [lambda x, f: f.write_bytes(pickle.dumps(x)), lambda x, f: torch.save(x, f)])
def test_pickle_that_runs_code_is_refused(tmp_path: Path, save: Any) -> None:
    save(Bomb(), tmp_path / "bomb.pkl")
    with pytest.raises(RefusedPickle, match="refused"):
        load_activations(tmp_path / "bomb.pkl")
    assert not BOMBED.exists()


def test_tensors_of_an_older_script_are_read_without_unpickling(tmp_path: Path) -> None:
    torch.save({"activations": {"layer_0": torch.ones(2, 3)}, "prompt": "x"}, tmp_path / "old.pt")
    assert load_activations(tmp_path / "old.pt")["activations"]["layer_0"].shape == (2, 3)


def test_files_that_are_not_ours_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(NotActivations, match="not an HDF5 file"):
        load_activations(tmp_path / "text.h5")
    (tmp_path / "empty.h5").touch()
    with pytest.raises(NotActivations, match="empty"):
        load_activations(tmp_path / "empty.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [1]
    with pytest.raises(NotActivations, match="not ours"):
        load_activations(tmp_path / "other.h5")
    with pytest.raises(StoreError, match="no file"):
        load_activations(tmp_path / "absent.h5")
    with pytest.raises(StoreError, match="no file or run"):
        open_run(tmp_path / "absent")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotActivations, match="not a run"):
        open_run(tmp_path / "folder")


def test_newer_major_version_is_refused_and_newer_minor_is_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "one.h5", [make_sample()], "m", SETTINGS)
    for version, accepted in (("1.7", True), ("2.0", False), ("nonsense", False)):
        with h5py.File(tmp_path / "one.h5", "r+") as file:
            file.attrs["format_version"] = version
        if accepted:
            assert load_activations(tmp_path / "one.h5")["prompt"] == "What?"
        else:
            with pytest.raises(NewerFormat, match="pgrade"):
                load_activations(tmp_path / "one.h5")


def test_newer_minor_version_with_more_columns_is_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "one.h5", [make_sample()], "m", SETTINGS)
    with h5py.File(tmp_path / "one.h5", "r+") as file:
        file.attrs["format_version"] = "1.9"
        file["samples/colour"] = ["red"]
        file["samples/colour"].attrs["encoding"] = "utf-8"
        file["rows/weight"] = [1.0]
        file["samples/shape"] = [[1, 2]]
        file["samples/kind"] = ["x"]
        file["samples/kind"].attrs["encoding"] = "runes"
    assert load_activations(tmp_path / "one.h5")["colour"] == "red"


def test_truncated_file_is_named_at_every_length(tmp_path: Path) -> None:
    write_shard(tmp_path / "one.h5", [make_sample()], "m", SETTINGS)
    whole = (tmp_path / "one.h5").read_bytes()
    cut = tmp_path / "cut.h5"
    n_trailer = 16 + int.from_bytes(whole[-16:-8], "little")
    for length in [*range(8, len(whole) - n_trailer, len(whole) // 37), len(whole) - n_trailer - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(TruncatedFile, match="cut short"):
            load_activations(cut)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    for part in ("segments", "rows/token_id", "samples", "vocabulary", "input_ids"):
        write_shard(tmp_path / "one.h5", [make_sample()], "m", SETTINGS, overwrite=True)
        with h5py.File(tmp_path / "one.h5", "r+") as file:
            del file[part]
        with pytest.raises(TruncatedFile, match=r"one\.h5"):
            load_activations(tmp_path / "one.h5")


def test_segments_outside_the_rows_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "one.h5", [make_sample()], "m", SETTINGS)
    with h5py.File(tmp_path / "one.h5", "r+") as file:
        file["segments/stop"][0] = 10**12
        with_right_checksums(file, "segments/stop")
    with pytest.raises(TruncatedFile, match="outside"):
        load_activations(tmp_path / "one.h5")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows/position", 10**6),
        ("rows/position", -1),
        ("segments/start", 5),
        ("segments/stop", 0),
        ("rows/token_id", -7),
    ],
)
def test_numbers_that_make_no_sense_are_refused(tmp_path: Path, name: str, value: int) -> None:
    write_shard(tmp_path / "one.h5", [make_sample()], "m", SETTINGS)
    with h5py.File(tmp_path / "one.h5", "r+") as file:
        file[name][0] = value
        file["segments/start"][0] = file["segments/start"][0]
        if name == "segments/stop":
            file["segments/start"][0] = 3
        with_right_checksums(file, name, "segments/start")
    if name == "segments/start":  # fewer rows than were written, each still its token's
        assert load_activations(tmp_path / "one.h5")["positions"].tolist() == [5]
        return
    with pytest.raises(TruncatedFile):
        load_activations(tmp_path / "one.h5")


def test_dtype_that_is_none_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "one.h5", [make_sample()], "m", SETTINGS)
    with h5py.File(tmp_path / "one.h5", "r+") as file:
        file["activations/layer_0"].attrs["dtype"] = "float33"
    with pytest.raises(TruncatedFile, match="float33"):
        load_activations(tmp_path / "one.h5")


def test_rows_of_different_kinds_are_not_written_into_one_file(tmp_path: Path) -> None:
    for other in (make_sample(torch.bfloat16), make_sample(width=4)):
        with pytest.raises(CaptureError, match="one file"):
            write_shard(tmp_path / "x.h5", [make_sample(), other], "m", SETTINGS)
    assert os.listdir(tmp_path) == []


def test_file_system_that_cannot_sync_folders_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def no_folders(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):  # noqa: PTH112
            raise OSError(22, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", no_folders)
    write_shard(tmp_path / "x.h5", [make_sample()], "m", SETTINGS)
    assert load_activations(tmp_path / "x.h5")["prompt"] == "What?"


def test_shard_of_another_run_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "one", 9, shard_bytes=600)
    write_run(tmp_path / "two", 9, shard_bytes=600)
    (tmp_path / "two" / "shard-00001.h5").replace(tmp_path / "one" / "shard-00001.h5")
    with pytest.raises(StoreError, match="another run"):
        list(open_run(tmp_path / "one"))


def test_old_shard_is_sealed_whatever_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = RunWriter(tmp_path / "run", "m", SETTINGS)
    made.add([make_sample()])
    assert not list((tmp_path / "run").glob("*.h5"))
    monkeypatch.setattr(writer, "SHARD_SECONDS", 0)
    made.add([make_sample(seed=1)])
    made.close()
    assert len(open_run(tmp_path / "run")) == 2


def test_many_samples_name_open_run(tmp_path: Path) -> None:
    write_shard(tmp_path / "two.h5", [make_sample(), make_sample(seed=1)], "m", SETTINGS)
    with pytest.raises(ManySamples, match="open_run"):
        load_activations(tmp_path / "two.h5")
    run = open_run(tmp_path / "two.h5")
    assert len(run) == 2
    assert not run.finished


def test_run_over_many_shards_reads_every_sample_in_the_order_of_its_table(tmp_path: Path) -> None:
    samples = write_run(tmp_path / "run", 23, shard_bytes=600)
    assert len(list((tmp_path / "run").glob("shard-*.h5"))) > 3
    run = open_run(tmp_path / "run")
    assert run.finished
    assert run.table()["doc_id"].tolist() == list(range(22, -1, -1))
    for record, sample in zip(run, reversed(samples), strict=True):
        assert same(record["activations"], dict(sample.parts[0].rows.activations))
        assert record["correct"] == (record["doc_id"] % 2 == 0)
    last = run.activations("layer_0")
    assert same(last, torch.stack([sample.parts[0].rows.activations["layer_0"][-1] for sample in reversed(samples)]))
    second = run.activations("layer_0", position=1)
    assert same(second, torch.stack([sample.parts[0].rows.activations["layer_0"][1] for sample in reversed(samples)]))
    assert [one["doc_id"] for one in run[2:5]] == [20, 19, 18]
    assert run[-1]["doc_id"] == 0
    with pytest.raises(IndexError):
        run[23]
    with pytest.raises(StoreError, match="layer_9"):
        run.activations("layer_9")
    with pytest.raises(StoreError, match="no row 7"):
        run.activations("layer_0", position=7)


def test_run_cut_short_is_read_without_scores(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    (tmp_path / "run" / "run.h5").unlink()
    run = open_run(tmp_path / "run")
    assert not run.finished
    assert run.table()["doc_id"].tolist() == list(range(9))
    assert "correct" not in run.table()


def test_missing_shard_is_an_error(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    (tmp_path / "run" / "shard-00001.h5").unlink()
    with pytest.raises(StoreError, match=r"shard-00001\.h5 is missing"):
        open_run(tmp_path / "run")


def test_names_are_good_and_distinct(tmp_path: Path) -> None:
    from datetime import datetime

    now = datetime(2024, 9, 15, 14, 30, 22, 123456)
    stem = file_stem("benchmark_activations", "What is the capital of France?", now)
    assert stem == "benchmark_activations_20240915_143022_123456_What_is_the_capital_of"
    for question in (
        "法国的首都是哪里?" * 20,
        'a/b\\c:d*?"<>|../../etc/passwd',
        "???",
        "\ud800",
        "word" * 100,
        ".",
        "\0",
    ):
        name = file_stem("q", question, now)
        assert len(f"{name}_999.h5".encode()) < 200
        assert not set(name) & set('/\\:*?"<>|\0. \n')
        assert not name.endswith("_")
        written = {write_named(tmp_path / f"{name}.h5", make_sample(), "m", SETTINGS) for _ in range(3)}
        assert len(written) == 3
        assert all(load_activations(path)["prompt"] == "What?" for path in written)


def test_values_that_a_column_cannot_hold_are_refused_not_changed(tmp_path: Path) -> None:
    good = make_sample()
    for changed in ({"correct": 0.7}, {"is_greedy": "yes"}):
        with pytest.raises(CaptureError, match="neither true nor false"):
            write_shard(tmp_path / "x.h5", [make_sample(**changed)], "m", SETTINGS)
    with pytest.raises(CaptureError, match="cannot hold"):
        write_shard(
            tmp_path / "x.h5",
            [Sample(good.fields, good.input_ids, [*good.generated_ids[:-1], 2**32 + 5], good.parts)],
            "m",
            SETTINGS,
        )
    for where in ([-1], [10**6]):
        with pytest.raises((CaptureError, IndexError)):
            Sample(good.fields, good.input_ids, good.generated_ids, [Part(good.parts[0].rows, where)])
    with pytest.raises(CaptureError, match="needs the rows"):
        Sample(good.fields, good.input_ids, good.generated_ids, [])
    assert os.listdir(tmp_path) == []
    numbers = make_sample(prediction=np.int64(2), metrics={"a": np.float32(0.5)})
    write_shard(tmp_path / "x.h5", [numbers], "m", SETTINGS)
    assert load_activations(tmp_path / "x.h5")["prediction"] == 2
    assert load_activations(tmp_path / "x.h5")["metrics"] == {"a": 0.5}
