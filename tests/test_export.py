"""Exports: every format read back with the other tool's own reader, and compared bit for bit with the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
import typer
from helpers.forked import Forked
from helpers.places import ROOT
from helpers.samples import SETTINGS, make_sample, same, write_run
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from AutomaticEval import generate_inference_with_activations, load_activations, open_run
from AutomaticEval.cli.export import export as command
from AutomaticEval.cli.options import SPELLINGS
from AutomaticEval.errors import CaptureError, PathExists, SelectionError, StoreError
from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.store.export import arrow, formats
from AutomaticEval.store.export.formats import FORMATS, export
from AutomaticEval.store.export.hub import push_to_hub
from AutomaticEval.store.export.shard_files import ranges_in_shards
from AutomaticEval.store.export.transformer_lens import as_activation_cache, transformer_lens_name
from AutomaticEval.store.hdf5.write import write_shard
from AutomaticEval.store.writer import RunWriter

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SITES = "embed,resid_pre,resid_mid,resid_post,attn_out,mlp_out,q,k,v,z,mlp_post,final_norm"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bfloat16, several shards, and a table that is in another order than the rows."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, 23, shard_bytes=600)
    assert len(list(folder.glob("shard-*.h5"))) > 3
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """As it is where there is no bfloat16; each bfloat16 is a float32."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def read_arrow(folder: Path, number: int, key: str) -> torch.Tensor:
    """One site of one sample in its own dtype; unasked, datasets gives every float as float32."""
    rows = datasets.load_from_disk(str(folder))
    row = rows.with_format("numpy", dtype=np.dtype(rows.features[key].dtype))[number]
    return torch.from_numpy(row[key].copy())


def read_shards(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Each sample's record and its rows, by safetensors' or numpy's own reader."""
    for record in records(folder):
        parts = []
        for name, start, stop in record["rows"]:
            if name.endswith(".npz"):
                whole = {key: torch.from_numpy(array) for key, array in np.load(folder / name).items()}
            else:
                whole = load_file(folder / name)
            parts.append({key: tensor[start:stop] for key, tensor in whole.items()})
        yield record, {key: torch.cat([part[key] for part in parts]) for key in (parts[0] if parts else {})}


@pytest.mark.parametrize("to", ["safetensors", "npz"])
def test_shards_hold_every_sample_bit_for_bit_in_the_runs_order(tmp_path: Path, run_folder: Path, to: str) -> None:
    run, done = open_run(run_folder), []
    assert export(run_folder, tmp_path / "out", to, advance=done.append) == tmp_path / "out"
    assert sum(done) == len(run)
    found = list(read_shards(tmp_path / "out"))
    assert len(found) == len(run)
    for sample, (record, rows) in zip(run, found, strict=True):
        for key in run.keys:
            expected = sample["activations"][key]
            assert same(rows[key], wide(expected) if to == "npz" else expected)
        assert rows["token_id"].dtype == rows["position"].dtype == torch.int32
        assert rows["token_id"].tolist() == sample["token_ids"].tolist()
        assert rows["position"].tolist() == sample["positions"].tolist()
        assert record["input_ids"] == sample["input_ids"][0].tolist()
        assert record["generated_ids"] == sample["generated_ids"].tolist()
        for name in run.table().columns:
            assert record[name] == sample[name]
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert about == {"model": "m", "settings": run.settings}


def test_arrow_is_read_by_datasets_bit_for_bit(tmp_path: Path, run_folder: Path) -> None:
    run = open_run(run_folder)
    export(run_folder, tmp_path / "out", "arrow")
    read = datasets.load_from_disk(str(tmp_path / "out"))
    rows = read.with_format("numpy")
    assert len(rows) == len(run)
    for number, sample in enumerate(run):
        row = rows[number]
        for key in run.keys:
            assert same(torch.from_numpy(row[key].copy()), wide(sample["activations"][key]))
        for name in ("token_ids", "positions", "generated_ids"):
            assert row[name].tolist() == sample[name].tolist()
        assert row["input_ids"].tolist() == sample["input_ids"][0].tolist()
        plain = read.select_columns(["tokens", *run.table().columns])[number]
        assert plain == {name: sample[name] for name in plain}
    batch = read.with_format("torch")[2:6]["layer_0"]
    assert [tensor.shape for tensor in batch] == [sample["activations"]["layer_0"].shape for sample in run[2:6]]


def test_arrow_rolls_over_to_another_file(tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow, "_ARROW_FILE_BYTES", 2000)
    monkeypatch.setattr(arrow, "_BATCH_BYTES", 500)
    export(run_folder, tmp_path / "out", "arrow")
    assert len(list((tmp_path / "out").glob("*.arrow"))) > 2
    read = datasets.load_from_disk(str(tmp_path / "out"))
    assert read["doc_id"][:] == [sample["doc_id"] for sample in open_run(run_folder)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("to", FORMATS)
def test_single_file_of_every_dtype_is_exported_bit_for_bit(tmp_path: Path, to: str, dtype: torch.dtype) -> None:
    write_shard(tmp_path / "one.h5", [make_sample(dtype)], "m", SETTINGS)
    export(tmp_path / "one.h5", tmp_path / "out", to)
    expected = load_activations(tmp_path / "one.h5")["activations"]
    if to == "arrow":
        found = {key: read_arrow(tmp_path / "out", 0, key) for key in expected}
    elif to == "npz":
        found = {key: torch.from_numpy(np.load(tmp_path / "out" / "shard-00000.npz")[key]) for key in expected}
    elif to == "safetensors":
        with safe_open(tmp_path / "out" / "shard-00000.safetensors", "pt") as file:
            assert set(file.keys()) == {*expected, "token_id", "position"}
            found = {key: file.get_tensor(key) for key in expected}
    else:
        cache = load_file(tmp_path / "out" / "sample-00000.safetensors")
        found = {key: cache[transformer_lens_name(key)][0] for key in expected}
    for key, tensor in expected.items():
        assert same(found[key], wide(tensor) if to in ("arrow", "npz") else tensor)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_converts_every_number(tmp_path: Path, to: str, dtype: str) -> None:
    write_shard(tmp_path / "one.h5", [make_sample()], "m", SETTINGS)
    expected = load_activations(tmp_path / "one.h5")["activations"]["layer_0"].to(getattr(torch, dtype))
    if dtype == "bfloat16" and to in ("npz", "arrow"):
        with pytest.raises(SelectionError, match="no bfloat16"):
            export(tmp_path / "one.h5", tmp_path / "out", to, dtype=dtype)
        return
    out = export(tmp_path / "one.h5", tmp_path / "out", to, dtype=dtype)
    found = {
        "safetensors": lambda: load_file(out / "shard-00000.safetensors")["layer_0"],
        "npz": lambda: torch.from_numpy(np.load(out / "shard-00000.npz")["layer_0"]),
        "arrow": lambda: read_arrow(out, 0, "layer_0"),
        "transformer_lens": lambda: load_file(out / "sample-00000.safetensors")["blocks.0.hook_resid_post"][0],
    }[to]()
    assert same(found, expected)


@pytest.mark.parametrize("to", FORMATS)
def test_number_too_large_for_the_dtype_is_refused_and_leaves_nothing(tmp_path: Path, to: str) -> None:
    sample = make_sample()
    sample.parts[0].rows.activations["layer_0"][2, 3] = 1e6
    write_shard(tmp_path / "one.h5", [sample], "m", SETTINGS)
    with pytest.raises(CaptureError, match=r"layer_0 holds 1e\+06"):
        export(tmp_path / "one.h5", tmp_path / "out", to, dtype="float16")
    assert os.listdir(tmp_path) == ["one.h5"]


@pytest.mark.parametrize("to", FORMATS)
def test_numbers_in_8_bits_come_as_float32(tmp_path: Path, to: str) -> None:
    with RunWriter(tmp_path / "run", "m", {**SETTINGS, "store_dtype": "int8"}) as made:
        made.add([make_sample(seed=seed) for seed in range(3)])
        made.finish()
    expected = open_run(tmp_path / "run")[2]["activations"]["layer_0"]
    out = export(tmp_path / "run", tmp_path / "out", to)
    if to == "arrow":
        assert same(read_arrow(out, 2, "layer_0"), expected)
    elif to == "transformer_lens":
        assert same(load_file(out / "sample-00002.safetensors")["blocks.0.hook_resid_post"][0], expected)
    else:
        assert same(list(read_shards(out))[2][1]["layer_0"], expected)


@pytest.mark.parametrize("to", FORMATS)
def test_shared_rows_and_samples_without_rows_are_whole(tmp_path: Path, to: str) -> None:
    first = make_sample(task="t", doc_id=0, choice=0)
    shared = [Part(first.parts[0].rows, [0, 2, 3, 5])]
    other = Sample({**first.fields, "choice": 1}, first.input_ids, [*first.generated_ids[:-1], 9], shared)
    none = Sample({**first.fields, "choice": 2}, first.input_ids, first.generated_ids, [Part(first.parts[0].rows, [])])
    with RunWriter(tmp_path / "run", "m", SETTINGS) as made:
        made.add([first, other, none])
        made.finish()
    run, out = open_run(tmp_path / "run"), export(tmp_path / "run", tmp_path / "out", to)
    assert [len(sample["positions"]) for sample in run] == [6, 4, 0]
    for number, sample in enumerate(run):
        expected = sample["activations"]["layer_0"]
        if to == "arrow":
            row = datasets.load_from_disk(str(out)).with_format("numpy")[number]
            assert same(read_arrow(out, number, "layer_0"), expected)
            assert row["positions"].tolist() == sample["positions"].tolist()
        elif to == "transformer_lens":
            cache = load_file(out / f"sample-{number:05d}.safetensors")
            assert same(cache["blocks.0.hook_resid_post"], expected[None])
            assert records(out)[number]["positions"] == sample["positions"].tolist()
        elif len(expected):
            assert same(list(read_shards(out))[number][1]["layer_0"], expected)
        else:
            assert records(out)[number]["rows"] == []
    if to == "safetensors":
        assert len(load_file(out / "shard-00000.safetensors")["layer_0"]) == 6  # shared, not copied


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("text", ["a\0b", "\ud800 alone", "zażółć 🙂\n\u2028"])
def test_text_survives_or_is_refused_by_name(tmp_path: Path, to: str, text: str) -> None:
    write_shard(tmp_path / "one.h5", [make_sample(), make_sample(prompt=text, response=text)], "m", SETTINGS)
    if to == "arrow" and "\ud800" in text:
        with pytest.raises(StoreError, match="prompt of sample 1 has a lone surrogate"):
            export(tmp_path / "one.h5", tmp_path / "out", to)
        assert os.listdir(tmp_path) == ["one.h5"]
        return
    out = export(tmp_path / "one.h5", tmp_path / "out", to)
    found = datasets.load_from_disk(str(out))[1] if to == "arrow" else records(out)[1]
    assert (found["prompt"], found["response"]) == (text, text)


@pytest.mark.parametrize("to", FORMATS)
def test_columns_of_json_and_missing_values_survive(tmp_path: Path, to: str) -> None:
    mixed: list[dict[str, Any]] = [
        {"target": 1, "prediction": "A", "metrics": {"none": {"acc": 1.0}}, "logprob": -0.1, "correct": True},
        {"target": "Paris", "prediction": [1, 2], "metrics": None, "choices": ["a", "b"], "task": "t"},
        {"target": ["x", None], "doc_id": 3},
    ]
    samples = [make_sample(seed=seed, **fields) for seed, fields in enumerate(mixed)]
    write_shard(tmp_path / "one.h5", samples, "m", SETTINGS)
    out = export(tmp_path / "one.h5", tmp_path / "out", to)
    names = ("target", "prediction", "metrics", "choices", "logprob", "correct", "doc_id")
    if to == "arrow":
        rows = datasets.load_from_disk(str(out)).select_columns(list(names))
        found = [{name: row[name] for name in names} for row in rows]
        for row in found:
            for name in ("target", "prediction", "metrics", "choices"):
                row[name] = None if row[name] is None else json.loads(row[name])
    else:
        found = [{name: record[name] for name in names} for record in records(out)]
    assert found == [{name: fields.get(name) for name in names} for fields in mixed]


@pytest.mark.parametrize("to", FORMATS)
def test_existing_destination_is_refused(tmp_path: Path, run_folder: Path, to: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    with pytest.raises(PathExists, match="not overwritten"):
        export(run_folder, tmp_path / "out", to)
    assert os.listdir(tmp_path / "out") == ["precious"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("to", FORMATS)
def test_failure_in_the_middle_leaves_nothing(tmp_path: Path, run_folder: Path, to: str) -> None:
    def stop(n_samples: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(run_folder, tmp_path / "out", to, advance=stop)
    assert os.listdir(tmp_path) == []


FILLS_THE_DISK = """
import resource, sys
from pathlib import Path
from AutomaticEval.errors import DiskFull
from AutomaticEval.store.export.formats import export
import datasets, pyarrow
limit = int(sys.argv[4])
least, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
try:
    export(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
except DiskFull as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))  # the output is a file, too
    print("DiskFull:", error)
"""


@pytest.mark.parametrize("limit", [10, 50_000])
@pytest.mark.parametrize("to", FORMATS)
def test_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path, to: str, limit: int) -> None:
    """A file-size limit stops the writing in the first file, and in the middle of the activations."""
    write_shard(tmp_path / "one.h5", [make_sample(n_prompt=100, width=512)], "m", SETTINGS)
    done = Forked(["-c", FILLS_THE_DISK, str(tmp_path / "one.h5"), str(tmp_path / "out"), to, str(limit)]).wait()
    assert done.returncode == 0, done.stderr
    assert "DiskFull: the disk is full" in done.stdout
    assert os.listdir(tmp_path) == ["one.h5"]


def test_too_little_room_is_refused_before_anything_is_written(
    tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(formats, "ensure_space", lambda folder, size_bytes: asked.append(size_bytes))
    run = open_run(run_folder)
    export(run_folder, tmp_path / "a", "safetensors")
    export(run_folder, tmp_path / "b", "arrow")
    n_numbers = sum(tensor.numel() for sample in run for tensor in sample["activations"].values())
    assert asked == [2 * n_numbers, 4 * n_numbers]


def test_memory_stays_far_below_the_size_of_a_file(tmp_path: Path) -> None:
    """One tensor of 98 MB in pieces of 16 MB: safetensors' and numpy's own writers would hold all of it."""
    width, n_rows = 16384, 3000
    ids = [1 + number % 300 for number in range(n_rows + 1)]
    tensors = {"layer_0": torch.full((n_rows, width), 0.5).half()}
    rows = Rows(ids[:-1], [str(one) for one in ids[:-1]], list(range(n_rows)), tensors)
    fields = {**make_sample().fields, "n_prompt_tokens": n_rows}
    write_shard(tmp_path / "big.h5", [Sample(fields, ids[:-1], ids[-1:], [Part(rows, range(n_rows))])], "m", SETTINGS)
    for to in ("safetensors", "npz"):
        tracemalloc.start()
        export(tmp_path / "big.h5", tmp_path / to, to)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 48 * 2**20  # the piece that is written and the one that is read


def test_segment_over_two_shards_is_a_range_in_each() -> None:
    ranges, first = np.array([[2, 7], [9, 9], [8, 9]]), np.array([0, 4, 4, 10])
    assert list(ranges_in_shards(ranges, first)) == [(0, 2, 4), (2, 0, 3), (2, 4, 5)]


@pytest.fixture
def captured(tiny: Any, tmp_path: Path) -> dict[str, Any]:
    """All sites of a tiny model of each family, with what the model's shape is."""
    sites = ",".join(kind for kind in SITES.split(",") if not tiny.layout.lacking(kind))
    _, found = generate_inference_with_activations(
        "The capital of France", tiny.model, tmp_path / "one.h5", sites=sites, tokenizer=tiny.tokenizer
    )
    found["settings"] = {**found["settings"], "shape": {**tiny.shape}}
    return dict(found)


def test_activation_cache_has_transformer_lens_names_and_shapes(captured: dict[str, Any], tiny: Any) -> None:
    cache, kept, shape = as_activation_cache(captured), captured["activations"], tiny.shape
    n_pos, n_heads, n_kv_heads, d_head = (
        len(captured["positions"]),
        *(shape[name] for name in ("n_heads", "n_kv_heads", "d_head")),
    )
    assert same(cache["blocks.0.hook_resid_pre"], kept["embeddings"][None])
    assert same(cache["ln_final.hook_out"], kept["final_norm"][None])
    for layer in range(shape["n_layers"]):
        block, key = f"blocks.{layer}", f"layer_{layer}"
        assert same(cache[f"{block}.hook_resid_post"], kept[key][None])
        assert same(cache[f"{block}.mlp.hook_post"], kept[f"{key}.mlp_post"][None])
        for kind in ("resid_pre", "resid_mid", "attn_out", "mlp_out"):
            if f"{key}.{kind}" in kept:
                assert same(cache[f"{block}.hook_{kind}"], kept[f"{key}.{kind}"][None])
        for kind, heads in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads), ("z", n_heads)):
            found = cache[f"{block}.attn.hook_{kind}"]
            assert found.shape == (1, n_pos, heads, d_head)
            assert same(found.flatten(2)[0], kept[f"{key}.{kind}"])
    assert len(cache) == len(kept) - 1  # embeddings and layer_0.resid_pre are one


def test_transformer_lens_files_are_the_activation_cache(tmp_path: Path, captured: dict[str, Any]) -> None:
    file = tmp_path / "again.h5"
    fields = {**make_sample().fields, "n_prompt_tokens": captured["n_prompt_tokens"]}
    numbers = {name: captured[name].tolist() for name in ("token_ids", "positions", "generated_ids")}
    rows = Rows(numbers["token_ids"], captured["tokens"], numbers["positions"], captured["activations"])
    part = Part(rows, range(len(captured["tokens"])))
    sample = Sample(fields, captured["input_ids"][0].tolist(), numbers["generated_ids"], [part])
    write_shard(file, [sample], "m", captured["settings"])
    export(file, tmp_path / "out", "transformer_lens")
    found, expected = load_file(tmp_path / "out" / "sample-00000.safetensors"), as_activation_cache(captured)
    assert found.keys() == expected.keys()
    assert all(same(found[name], tensor) for name, tensor in expected.items())
    (record,) = records(tmp_path / "out")
    assert record["file"] == "sample-00000.safetensors"
    assert record["tokens"] == captured["tokens"]


def test_heads_without_a_shape_are_refused_before_any_work(tmp_path: Path) -> None:
    sample = make_sample()
    sample.parts[0].rows.activations["layer_0.q"] = torch.zeros(6, 8)  # type: ignore[index]
    write_shard(tmp_path / "one.h5", [sample], "m", SETTINGS)
    with pytest.raises(StoreError, match=r"layer_0\.q cannot be split into heads.*export to safetensors"):
        export(tmp_path / "one.h5", tmp_path / "out", "transformer_lens")
    settings = {**SETTINGS, "shape": {"n_heads": 3, "n_kv_heads": 1, "d_head": 2}}
    write_shard(tmp_path / "two.h5", [sample], "m", settings)
    with pytest.raises(StoreError, match=r"layer_0\.q is 8 wide, not 3 heads of 2"):
        export(tmp_path / "two.h5", tmp_path / "out", "transformer_lens")
    assert not (tmp_path / "out").exists()


def test_logits_keep_their_name_beside_the_cache() -> None:
    logits = torch.zeros(2, 4)
    assert same(as_activation_cache({"activations": {"logits": logits}, "settings": {}}), {"logits": logits[None]})


def test_two_sites_of_one_name_that_differ_are_refused() -> None:
    sample = {"activations": {"embeddings": torch.zeros(2, 4), "layer_0.resid_pre": torch.ones(2, 4)}, "settings": {}}
    with pytest.raises(CaptureError, match=r"blocks\.0\.hook_resid_pre"):
        as_activation_cache(sample)


def test_wrong_choices_name_the_right_ones(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(SelectionError, match=r"Did you mean 'safetensors'.*npz, arrow, transformer_lens"):
        export(run_folder, tmp_path / "out", "safetensor")
    with pytest.raises(SelectionError, match="Did you mean 'float16'"):
        export(run_folder, tmp_path / "out", "npz", dtype="floatt16")
    with pytest.raises(SelectionError, match=r"no name for 'layer_0\.colour'"):
        transformer_lens_name("layer_0.colour")
    with pytest.raises(StoreError, match="no file or run"):
        export(tmp_path / "nothing", tmp_path / "new" / "out", "npz")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the Hub is asked, with nothing sent."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def create(self: Any, repo_id: str, **asked: Any) -> str:
        calls.append(("create_repo", {"repo_id": repo_id, **asked}))
        return f"https://huggingface.co/datasets/{repo_id}"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    for name in ("upload_folder", "upload_file"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda self, name=name, **asked: calls.append((name, asked)))
    return calls


def test_push_makes_a_private_data_set_and_uploads_the_folder(tmp_path: Path, hub: list[Any]) -> None:
    assert push_to_hub(tmp_path, "me/activations") == "https://huggingface.co/datasets/me/activations"
    (made, creation), (sent, upload) = hub
    assert (made, sent) == ("create_repo", "upload_folder")
    assert creation == {"repo_id": "me/activations", "repo_type": "dataset", "private": True, "exist_ok": True}
    assert (upload["repo_id"], upload["folder_path"], upload["repo_type"]) == ("me/activations", tmp_path, "dataset")


def test_push_of_a_file_uploads_the_file(tmp_path: Path, hub: list[Any]) -> None:
    (tmp_path / "one.h5").write_text("x")
    push_to_hub(tmp_path / "one.h5", "me/one", private=False)
    assert hub[0][1]["private"] is False
    assert hub[1] == (
        "upload_file",
        {
            "repo_id": "me/one",
            "path_or_fileobj": tmp_path / "one.h5",
            "path_in_repo": "one.h5",
            "repo_type": "dataset",
        },
    )


PUSHES = """
import sys
from pathlib import Path
from AutomaticEval.errors import StoreError
from AutomaticEval.store.export.hub import push_to_hub
try:
    push_to_hub(Path(sys.argv[1]), sys.argv[2])
except StoreError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("variables", "repo_id", "advice"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "me/x", "unset it"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}, "me/x", "check the connection"),
        ({"HF_HUB_OFFLINE": "1"}, "me/x y", "write it as user/name"),
    ],
)
def test_hub_out_of_reach_is_one_line_that_says_what_to_do(
    tmp_path: Path, variables: dict[str, str], repo_id: str, advice: str
) -> None:
    command = [sys.executable, "-c", PUSHES, str(tmp_path), repo_id]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **variables, "PYTHONPATH": str(ROOT)}, timeout=100
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{repo_id} cannot be written on the hub")
    assert advice in line


def test_refused_login_says_how_to_log_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(OSError):
        class response:
            status_code = 401

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise Refused("401 Client Error\nInvalid username or password.")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(StoreError, match=r"401 Client Error\): log in with `hf auth login`"):
        push_to_hub(tmp_path, "me/x")


def invoke(*arguments: str, typed: str = "") -> Any:
    app = typer.Typer(context_settings=SPELLINGS, pretty_exceptions_enable=False)
    app.command()(command)
    return CliRunner().invoke(app, list(arguments), input=typed)


@pytest.mark.parametrize("to", FORMATS)
def test_command_says_how_to_read_what_it_wrote(tmp_path: Path, run_folder: Path, to: str) -> None:
    done = invoke(str(run_folder), "--to", to, "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    said, reading = done.stdout.splitlines()
    assert said.startswith(f"23 samples of {run_folder} are in {tmp_path / 'out'} (")
    names: dict[str, Any] = {}
    exec(reading.removeprefix("Read it: "), names)
    assert len(names[{"npz": "arrays", "arrow": "rows", "transformer_lens": "cache"}.get(to, "tensors")]) > 1


def test_command_uploads_only_when_asked_and_after_the_export(tmp_path: Path, run_folder: Path, hub: list[Any]) -> None:
    assert invoke(str(run_folder), "-o", str(tmp_path / "quiet")).exit_code == 0
    assert hub == []
    done = invoke(str(run_folder), "-o", str(tmp_path / "out"), "--push-to-hub", "me/x", "--public", typed="y\n")
    assert "Uploaded: https://huggingface.co/datasets/me/x" in done.stdout
    assert [name for name, _ in hub] == ["create_repo", "create_repo", "upload_folder"]
    assert all(asked["private"] is False for name, asked in hub if name == "create_repo")


@pytest.mark.parametrize("typed", ["", "n\n", "\n", "perhaps\n"])
def test_command_shows_what_will_be_uploaded_and_asks(
    tmp_path: Path, run_folder: Path, hub: list[Any], typed: str
) -> None:
    done = invoke(str(run_folder), "-o", str(tmp_path / "out"), "--push-to-hub", "me/x", "--public", typed=typed)
    assert done.exit_code == 1
    for word in ("PUBLIC", "me/x", "23 samples", "prompt, response", "layer_0", "dtype: "):
        assert word in done.stdout, word
    assert hub == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "hdf4"], "Did you mean 'hdf5'?"),
        (["--to", "npz", "--compression", "gzip"], "--compression"),
        (["--public"], "--push_to_hub"),
        (["--dtype", "float8"], "Dtypes: float32, float16, bfloat16"),
    ],
)
def test_command_refuses_what_it_would_ignore(
    tmp_path: Path, run_folder: Path, arguments: list[str], message: str
) -> None:
    done = invoke(str(run_folder), "-o", str(tmp_path / "out"), *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert os.listdir(tmp_path) == []
