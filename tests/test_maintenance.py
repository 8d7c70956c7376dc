"""Merge, prune, convert, index and old versions: the same samples, bit for bit, in files that read like any other."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers.commands import within
from helpers.places import ROOT
from helpers.samples import SETTINGS, make_sample, same, write_run

from AutomaticEval import load_activations, open_run
from AutomaticEval.errors import (
    CaptureError,
    DamagedFile,
    OtherSettings,
    PathExists,
    SelectionError,
    StoreError,
    TruncatedFile,
)
from AutomaticEval.samples import Part
from AutomaticEval.store.contents.columns import Listed, listed
from AutomaticEval.store.export.formats import export
from AutomaticEval.store.hdf5.extents import naming
from AutomaticEval.store.hdf5.write import write_file, write_shard
from AutomaticEval.store.run_folder import shard_names
from AutomaticEval.store.upkeep.convert import convert
from AutomaticEval.store.upkeep.merge import merge
from AutomaticEval.store.upkeep.prune import prune
from AutomaticEval.store.upkeep.rebuild import rebuild_index
from AutomaticEval.store.upkeep.verify import verify
from AutomaticEval.store.writer import RunWriter

DATA = ROOT / "tests" / "data"


def assert_same_samples(one: Path, other: Path) -> None:
    first, second = open_run(one), open_run(other)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        for name in {*a, *b} - {"settings"}:
            assert same(a[name], b[name]), name


def test_merged_run_holds_the_same_samples_in_one_file(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 23, shard_bytes=600)
    seen: list[int] = []
    merged = merge([tmp_path / "run"], tmp_path / "merged.h5", advance=seen.append)
    assert_same_samples(tmp_path / "run", merged)
    assert verify(merged) == []
    assert sum(seen) == sum(2 * 8 * 2 * len(sample["positions"]) for sample in open_run(merged))
    with h5py.File(merged) as file:
        assert not file["activations/layer_0"].is_virtual
        assert "shard" not in file["samples"]
    with pytest.raises(PathExists):
        merge([tmp_path / "run"], tmp_path / "merged.h5")


def run_of(folder: Path, numbers: range, settings: dict[str, Any] = SETTINGS) -> Path:
    with RunWriter(folder, "m", settings) as made:
        for number in numbers:
            made.add([make_sample(seed=number, task="t", doc_id=number, choice=0, repeat=0)])
        made.finish()
    return folder


def test_runs_of_the_same_model_and_selection_are_joined(tmp_path: Path) -> None:
    parts = [run_of(tmp_path / "a", range(5), {**SETTINGS, "seed": 1}), run_of(tmp_path / "b", range(5, 8))]
    run = open_run(merge(parts, tmp_path / "all.h5"))
    assert [sample["doc_id"] for sample in run] == list(range(8))
    for number, sample in enumerate(run):
        assert same(sample["activations"], dict(make_sample(seed=number).parts[0].rows.activations))
    assert run.settings["dtype"] == "float32"
    assert [each.get("seed") for each in run.settings["merged"]] == [1, None]


def test_runs_that_differ_or_overlap_are_not_joined(tmp_path: Path) -> None:
    one = run_of(tmp_path / "a", range(3))
    with pytest.raises(OtherSettings, match="layers"):
        merge([one, run_of(tmp_path / "b", range(3, 5), {**SETTINGS, "layers": "0"})], tmp_path / "x.h5")
    with pytest.raises(StoreError, match="both hold t document 2"):
        merge([one, run_of(tmp_path / "c", range(2, 5))], tmp_path / "x.h5")
    assert not (tmp_path / "x.h5").exists()


def test_pruned_copy_keeps_what_was_asked_and_is_smaller(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 23, shard_bytes=600)
    pruned = prune(tmp_path / "run", tmp_path / "small.h5", sites="resid_post", positions="last")
    assert verify(pruned) == []
    run = open_run(pruned)
    assert run.keys == ["layer_0"]
    assert run.settings["positions"] == "last"
    for sample, whole in zip(run, open_run(tmp_path / "run"), strict=True):
        assert same(sample["activations"], {"layer_0": whole["activations"]["layer_0"][-1:]})
        assert sample["tokens"] == whole["tokens"][-1:]
        assert sample["correct"] == whole["correct"]
    assert len(run.rows("layer_0")) == 23


def test_pruning_to_what_is_not_there_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 3, shard_bytes=600)
    with pytest.raises(SelectionError, match="none of these"):
        prune(tmp_path / "run", tmp_path / "x.h5", sites="mlp_out")
    with pytest.raises(SelectionError, match="no layer 7"):
        prune(tmp_path / "run", tmp_path / "x.h5", layers="7")
    assert not (tmp_path / "x.h5").exists()


def test_rows_shared_by_samples_stay_shared_when_pruned(tmp_path: Path) -> None:
    pruned = prune(DATA / "format-1.0" / "run", tmp_path / "x.h5", positions="all")
    with h5py.File(pruned) as file:
        assert file["activations/layer_0"].shape[0] == 18  # three questions of six rows, each with two samples
        assert file["segments/start"].shape[0] == 3 + 3 * 2  # the second has rows 1, 2 and 5


def test_float32_copy_shows_bfloat16_to_any_viewer(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 5, shard_bytes=600)
    wide = convert(tmp_path / "run", tmp_path / "wide.h5", dtype="float32")
    with h5py.File(wide) as file:
        assert file["activations/layer_0"].id.get_type().equal(h5py.h5t.IEEE_F32LE)
    for sample, whole in zip(open_run(wide), open_run(tmp_path / "run"), strict=True):
        assert same(sample["activations"]["layer_0"], whole["activations"]["layer_0"].float())


def test_index_is_rebuilt_on_demand(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    before = [sample["correct"] for sample in open_run(tmp_path / "run")]
    rebuild_index(tmp_path / "run")  # what the evaluation said stays
    assert [sample["correct"] for sample in open_run(tmp_path / "run")] == before
    assert open_run(tmp_path / "run").finished
    (tmp_path / "run" / "run.h5").unlink()
    rebuild_index(tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert not run.finished
    assert [sample["doc_id"] for sample in run] == list(range(9))
    with h5py.File(tmp_path / "run" / "run.h5") as file:
        assert file.attrs["state"] == "unfinished"
        assert file["activations/layer_0"].shape[0] == len(run.rows("layer_0"))
    assert verify(tmp_path / "run") == []


def plain(value: Any) -> Any:
    """As tests/data/*/expected.json has it."""
    if isinstance(value, torch.Tensor):
        whole = {torch.bfloat16: torch.int16, torch.float32: torch.int32}.get(value.dtype, value.dtype)
        return {"dtype": str(value.dtype), "values": value.view(whole).tolist()}
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items() if name != "path"}
    return value


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_files_of_every_version_are_read_for_ever(version: str) -> None:
    folder = DATA / f"format-{version}"
    expected = json.loads((folder / "expected.json").read_text())
    assert len(expected) >= 2
    for name, samples in expected.items():
        run = open_run(folder / name)
        assert [plain(sample) for sample in run] == samples
        assert verify(folder / name) == []
        table = run.table()
        assert table["response"].tolist() == [sample["response"] for sample in samples]
        stacked = run.activations(run.keys[-1])
        assert same(stacked, torch.stack([sample["activations"][run.keys[-1]][-1] for sample in run]))


def test_the_version_that_is_written_has_its_file_among_them() -> None:
    from AutomaticEval.store.hdf5.contract import VERSION

    newest = sorted(tuple(map(int, path.name[7:].split("."))) for path in DATA.glob("format-*"))[-1]
    assert newest == VERSION


def test_sample_is_chosen_by_number(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    assert load_activations(tmp_path / "run", sample=2)["doc_id"] == 6
    assert load_activations(tmp_path / "run", -1)["doc_id"] == 0
    with pytest.raises(StoreError, match="no sample 9; it holds 9"):
        load_activations(tmp_path / "run", sample=9)


def test_where_gives_the_samples_that_match(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 23, shard_bytes=600)
    run = open_run(tmp_path / "run")
    right = run.where(correct=True, task="t")
    assert [sample["doc_id"] for sample in right] == list(range(22, -1, -2))
    assert right.table()["doc_id"].tolist() == right.column("doc_id")
    assert [sample["doc_id"] for sample in right.where(doc_id=[4, 6, 7])] == [6, 4]
    assert len(right.where(doc_id=lambda number: number > 18)) == 2
    assert same(right.activations("layer_0"), run.activations("layer_0")[::2])
    assert len(right.rows("layer_0")) == sum(len(sample["positions"]) for sample in right)
    assert len(run.where(doc_id=99)) == 0
    table = run.table()
    assert run.where(table.doc_id > 20, correct=True).column("doc_id") == [22]
    with pytest.raises(StoreError, match="one truth value for each of 23"):
        run.where([True])
    with pytest.raises(StoreError, match="Did you mean 'correct'"):
        run.where(corect=True)


def test_rows_are_an_array_on_the_disk(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 23, shard_bytes=600)
    run = open_run(tmp_path / "run")
    rows = run.rows("layer_0")
    whole = torch.cat([sample["activations"]["layer_0"] for sample in reversed(list(run))])
    assert rows.shape == tuple(whole.shape)
    assert len(shard_names(tmp_path / "run")) > 3
    assert same(rows[:], whole)
    for at in ([5, 2, 90, 5], slice(3, 60), slice(50, 2, -7), torch.tensor([7]), np.arange(40) % 3 == 0, []):
        if isinstance(at, np.ndarray):
            at = np.flatnonzero(at)
        assert same(
            rows[at],
            whole[list(range(len(whole))[at]) if isinstance(at, slice) else torch.as_tensor(at, dtype=torch.long)],
        )
    assert same(rows[-1], whole[-1])
    np.testing.assert_array_equal(np.asarray(rows), whole.float().numpy())
    tokens = [token for sample in reversed(list(run)) for token in sample["token_ids"].tolist()]
    assert rows.token_ids.tolist() == tokens
    with pytest.raises(IndexError):
        rows[len(whole)]


def test_one_position_of_the_sequence_is_found_by_name(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    run = open_run(tmp_path / "run")
    for position, place in (
        ("prompt[-1]", lambda s: s["n_prompt_tokens"] - 1),
        ("response[0]", lambda s: s["n_prompt_tokens"]),
    ):
        expected = torch.stack([s["activations"]["layer_0"][s["positions"].tolist().index(place(s))] for s in run])
        assert same(run.activations("layer_0", position), expected)
    with pytest.raises(StoreError, match="ask for one"):
        run.activations("layer_0", "prompt")
    pruned = open_run(prune(tmp_path / "run", tmp_path / "last.h5", positions="last"))
    with pytest.raises(StoreError, match="was not stored"):
        pruned.activations("layer_0", "prompt[0]")


def test_where_takes_what_people_have(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    run = open_run(tmp_path / "run")
    for wanted in ([0, 1], (0, 1), {0, 1}, range(2), np.array([0, 1]), torch.tensor([0, 1]), iter([0, 1])):
        assert run.where(doc_id=wanted).column("doc_id") == [1, 0]


def test_rows_are_numbered_by_one_list(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    rows = open_run(tmp_path / "run").rows("layer_0")
    assert same(rows[torch.tensor(3)], rows[3])
    assert same(rows[np.int64(3)], rows[3])
    with pytest.raises(IndexError, match=r"shape \(3, 1\)"):
        rows[torch.tensor([[5], [3], [7]])]


def test_run_is_not_merged_with_itself_or_into_its_own_folder(tmp_path: Path) -> None:
    one = run_of(tmp_path / "a", range(3))
    with pytest.raises(StoreError, match="both hold"):
        merge([one, one], tmp_path / "x.h5")
    with pytest.raises(StoreError, match="inside a run folder"):
        merge([one], one / "shard-00009.h5")


def test_dataset_goes_to_workers_that_are_not_forked(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    run = open_run(tmp_path / "run")
    again = pickle.loads(pickle.dumps(run))
    assert same(again.activations("layer_0"), run.activations("layer_0"))
    loader = torch.utils.data.DataLoader(
        run.dataset("layer_0"), batch_size=16, num_workers=1, multiprocessing_context="spawn"
    )
    assert same(torch.cat(list(loader)), run.rows("layer_0")[:])


@pytest.mark.parametrize("n_workers", [0, 2])
def test_dataset_feeds_a_data_loader(tmp_path: Path, n_workers: int) -> None:
    write_run(tmp_path / "run", 23, shard_bytes=600)
    run = open_run(tmp_path / "run")
    rows = run.rows("layer_0")[:]
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(run.dataset("layer_0"), batch_size=16, shuffle=True, num_workers=n_workers)
    seen = torch.cat(list(loader))
    assert len(seen) == len(rows)
    assert sorted(seen.float().sum(1).tolist()) == sorted(rows.float().sum(1).tolist())
    labelled = torch.utils.data.DataLoader(
        run.dataset("layer_0", position="last", label="correct"), batch_size=5, num_workers=n_workers
    )
    x, y = zip(*labelled, strict=True)
    assert same(torch.cat(x), run.activations("layer_0"))
    assert torch.cat(y).tolist() == run.column("correct")
    with pytest.raises(StoreError, match="choose one a sample"):
        run.dataset("layer_0", label="correct")


def test_one_site_of_one_sample_reads_only_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    write_run(tmp_path / "run", 9, shard_bytes=600)
    run = open_run(tmp_path / "run")
    run.read(0, "layer_0")  # its shard is open now
    real, read = os.preadv, []

    def counted(handle: int, buffers: Any, offset: int) -> int:
        read.append(sum(len(each) for each in buffers))
        return real(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    rows = run.read(0, "layer_0")
    assert sum(read) == rows.numel() * rows.element_size()


def test_damage_is_not_copied_and_given_new_checksums(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    shard = tmp_path / "run" / "shard-00001.h5"
    with h5py.File(shard) as file:
        offset = file["activations/layer_0"].id.get_offset()
    damaged = bytearray(shard.read_bytes())
    damaged[offset + 3] ^= 16
    shard.write_bytes(damaged)
    for copy in (
        lambda to: merge([tmp_path / "run"], to),
        lambda to: prune(tmp_path / "run", to, layers="0"),
        lambda to: convert(tmp_path / "run", to, dtype="float32"),
        lambda to: export(tmp_path / "run", to, "safetensors"),
        lambda to: rebuild_index(tmp_path / "run"),
    ):
        with pytest.raises(DamagedFile, match=r"shard-00001\.h5: /activations/layer_0"):
            copy(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_flipped_verdict_in_the_index_is_not_made_valid(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    index = tmp_path / "run" / "run.h5"
    with h5py.File(index) as file:
        offset = file["samples/correct"].id.get_offset()
    damaged = bytearray(index.read_bytes())
    damaged[offset] ^= 1
    index.write_bytes(damaged)
    with pytest.raises(DamagedFile, match=r"/samples/correct .* delete that"):
        rebuild_index(tmp_path / "run")


def test_shard_that_is_no_part_of_the_run_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    shutil.copy(tmp_path / "run" / "shard-00001.h5", tmp_path / "run" / "shard-00077.h5")
    assert verify(tmp_path / "run") == [f"{tmp_path / 'run' / 'shard-00077.h5'}: it is there and no part of the run"]


def test_index_of_a_run_opens_the_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9, shard_bytes=600)
    assert len(open_run(tmp_path / "run" / "run.h5")) == 9
    assert verify(tmp_path / "run" / "run.h5") == []


def test_copies_say_what_they_were_made_of(tmp_path: Path) -> None:
    settings = {**SETTINGS, "positions": "scored", "layers": "all"}
    one = run_of(tmp_path / "run", range(3), settings)
    assert open_run(prune(one, tmp_path / "all.h5", positions="all")).settings["positions"] == "scored"
    last = prune(one, tmp_path / "last.h5", positions="last")
    assert open_run(last).settings["positions"] == "last of scored"
    again = open_run(prune(last, tmp_path / "again.h5", layers="0")).settings
    assert again["pruned_from"] == [{"positions": "scored"}, {"layers": "all"}]
    assert open_run(convert(one, tmp_path / "half.h5", dtype="bfloat16")).settings["converted_from"] == "float32"


def patterned(folder: Path) -> Path:
    """Three layers' streams, and the patterns of two of them."""
    rows = {f"layer_{n}": torch.full((2, 4), float(n)) for n in range(3)}
    rows |= {f"layer_{n}.pattern": torch.full((2, 6), n + 0.5) for n in (0, 2)}
    sample = make_sample()
    whole = replace(sample.parts[0].rows, token_ids=[1, 2], tokens=["a", "b"], positions=[0, 1], activations=rows)
    kept = replace(sample, input_ids=[1, 2], generated_ids=[3], parts=[Part(whole, [0, 1])])
    write_shard(folder / "patterns.h5", [kept], "m", {**SETTINGS, "shape": {"n_layers": 3}})
    return folder / "patterns.h5"


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"positions": "last"}, ["layer_0", "layer_0.pattern", "layer_1", "layer_2", "layer_2.pattern"]),
        ({"layers": "0-1"}, ["layer_0", "layer_0.pattern", "layer_1"]),
        ({"sites": "pattern"}, ["layer_0.pattern", "layer_2.pattern"]),
        ({"sites": "pattern,resid_post", "layers": "-1"}, ["layer_2", "layer_2.pattern"]),
        ({"sites": "resid_post", "layers": [1]}, ["layer_1"]),
    ],
)
def test_pruned_copy_keeps_stored_patterns(asked: dict[str, Any], kept: list[str], tmp_path: Path) -> None:
    pruned = prune(patterned(tmp_path), tmp_path / "small.h5", **asked)
    assert open_run(pruned).keys == kept
    whole = open_run(tmp_path / "patterns.h5")
    for key in kept:
        assert torch.equal(open_run(pruned).read(0, key), whole.read(0, key)[-1 if "positions" in asked else 0 :])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"sites": "pattern", "layers": "1"}, "layer 1"),
        ({"sites": "resid_post,mlp_out"}, "mlp_out"),
        ({"layers": "5"}, "no layer 5"),
    ],
)
def test_pruning_names_what_is_not_there(asked: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match=says):
        prune(patterned(tmp_path), tmp_path / "small.h5", **asked)


def test_command_names_what_it_left_out(tmp_path: Path) -> None:
    patterned(tmp_path)
    done = within("prune", "patterns.h5", "-o", "small.h5", "--sites", "resid_post", "--layers", "0,2", cwd=tmp_path)
    assert "Left out: layer_0.pattern, layer_1, layer_2.pattern" in done.stdout


def test_column_that_the_format_lacks_is_refused_and_named() -> None:
    sample = make_sample()
    with pytest.raises(CaptureError, match=r"'logprobs'.*Did you mean 'logprob'"):
        replace(sample, fields={**sample.fields, "logprobs": 1.0})


def test_column_of_a_newer_version_is_not_dropped_from_a_copy(tmp_path: Path) -> None:
    write_shard(tmp_path / "one.h5", [make_sample()], "m", SETTINGS)
    held = open_run(tmp_path / "one.h5").contents
    newer = replace(held, columns=Listed({**listed(held.columns).columns, "mood": ["calm"]}))
    with pytest.raises(CaptureError, match="'mood'"):
        write_file(tmp_path / "two.h5", newer)
    assert not (tmp_path / "two.h5").exists()


@pytest.mark.parametrize("mistake", [lambda: len(3), lambda: [].shape, lambda: [][0]])  # type: ignore[arg-type, attr-defined]
def test_mistake_of_our_own_is_not_called_damage(mistake: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises((TypeError, AttributeError, IndexError)), naming(tmp_path):
        mistake()


def test_what_hdf5_says_of_unknown_types_is_damage(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        h5py.h5d.create(file.id, b"odd", h5py.h5t.UNIX_D32LE, h5py.h5s.create_simple((2,)))
        with pytest.raises(TruncatedFile, match=r"x\.h5 cannot be read .*damaged"), naming(tmp_path / "x.h5"):
            file["odd"][()]


def test_runs_whose_models_were_described_differently_are_not_joined(tmp_path: Path) -> None:
    """The same weights, and sites of the same names that may be other places."""
    for number, norm in enumerate(("model.norm", "model.other")):
        settings = {**SETTINGS, "loaded_with": {"model_description": f'final_norm = "{norm}"'}}
        write_shard(tmp_path / f"{number}.h5", [make_sample()], "m", settings)
    with pytest.raises(OtherSettings, match="model_description"):
        merge([tmp_path / "0.h5", tmp_path / "1.h5"], tmp_path / "merged.h5")
