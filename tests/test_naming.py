"""What files tell of the person who made them: a model's name and hash, and no folder, home or user."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest
from helpers.commands import within
from helpers.samples import SETTINGS, make_sample

from AutomaticEval import generate_inference_with_activations, load_activations
from AutomaticEval.capture.recompute.recomputed_run import recompute
from AutomaticEval.errors import OtherSettings
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.models.loading import load_model
from AutomaticEval.public_names import is_same, public_name
from AutomaticEval.settings import Difference, RunSettings
from AutomaticEval.store.export.formats import export
from AutomaticEval.store.export.hub import PRIVATE
from AutomaticEval.store.hdf5 import checksums
from AutomaticEval.store.hdf5.trailer import arrays_of, write_trailer
from AutomaticEval.store.local_paths import LOCAL_PATHS
from AutomaticEval.store.reader import open_run
from AutomaticEval.store.upkeep.merge import merge
from AutomaticEval.store.writer import RunWriter

SECRET = "maria_home"


@pytest.fixture
def model(tmp_path: Path) -> str:
    shutil.copytree(DEMO_FOLDER, tmp_path / SECRET / "models" / "tiny")
    return str(tmp_path / SECRET / "models" / "tiny")


def telling(folder: Path) -> Iterator[str]:
    """The files in which a folder's name stands, as text or in HDF5's attributes and strings."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and SECRET.encode() in path.read_bytes():
            yield path.name


def test_a_name_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "x").mkdir(parents=True)
    for given in (tmp_path / "org" / "x", "org/x", "./org/x", "org/x/", "../" + tmp_path.name + "/org/x"):
        assert public_name(given) == "x", given
    assert public_name("~/models/y") == public_name("/gone/models/y") == "y"
    assert public_name(".") == tmp_path.name
    assert public_name("meta-llama/Llama-3") == "meta-llama/Llama-3"
    assert public_name("demo") == "demo"


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    return RunSettings.from_dict(before).differences(RunSettings.from_dict(now), "x")


def test_one_that_knows_a_path_and_one_that_knows_the_name_are_one_run() -> None:
    assert is_same("/home/a/models/x", "x")
    assert is_same("models/x", "x")
    assert not is_same("org/x", "other/x")
    assert not is_same("/home/a/y", "x")
    before: dict[str, Any] = {"model": "/a/m", "benchmark": {"include_path": ["/a/tasks"], "local_files": "/a/d"}}
    now: dict[str, Any] = {"model": "m", "benchmark": {"include_path": ["tasks"], "local_files": "d"}}
    assert differences(before, now) == []
    now["benchmark"]["include_path"] = ["others"]
    (apart,) = differences(before, now)
    assert apart.name == "benchmark.include_path"
    assert differences({"attention": "/a/m"}, {"attention": "m"})  # of other settings nothing is guessed


def test_runs_tell_no_folder_and_are_recomputed_all_the_same(model: str, tmp_path: Path) -> None:
    shutil.copytree(DEMO_FOLDER, tmp_path / SECRET / "tasks")
    (tmp_path / SECRET / "tasks" / "t.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / SECRET}/d.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\n"
        "doc_to_target: '{{a}}'\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / SECRET / "d.jsonl").write_text('{"q": "Q", "c": ["a", "b"], "a": 0}\n')
    done = within(
        *("--capture_activations", "--benchmark", "own", "--include_path", str(tmp_path / SECRET / "tasks")),
        *("--model", model, "--layers", "0", "--head_strength"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "activations").iterdir()
    assert list(telling(folder)) == [LOCAL_PATHS]
    assert json.loads((folder / LOCAL_PATHS).read_text()) == {"model": model}
    run = open_run(folder)
    assert run.model == "tiny"
    assert len(run.settings["model_hash"]) == 32
    assert run.settings["benchmark"]["include_path"] == ["tasks"]
    assert json.loads((folder / "head_strength.json").read_text())["model_hash"] == run.settings["model_hash"]
    assert not recompute(folder, n=2, seed=0).different  # by its path
    export(folder, tmp_path / "out", "npz")
    merge([folder], tmp_path / "merged.h5")
    assert not list(telling(tmp_path / "out"))
    assert SECRET.encode() not in (tmp_path / "merged.h5").read_bytes()
    assert LOCAL_PATHS in PRIVATE
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name == LOCAL_PATHS]


def test_other_commands_tell_no_folder(model: str, tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text('["What is red?", "The bus"]')
    (tmp_path / "texts.txt").write_text("What is red?")
    for command in (
        ("heads", "strength", "--data_path", "texts.json", "--output_dir", "files/strength"),
        ("heads", "ablate", "--head-spec", "0:0", "--profile", "baseline", "--emotion", "anger", "--sample_num", "1"),
        ("extract", "--texts", "texts.txt", "--layers", "0", "--output", "files/extracted"),
        ("generate", "Hi", "--max_new_tokens", "2", "--save_path", "files/x.h5"),
    ):
        more = ("--output", "files/ablated", "--max-tokens", "2") if "ablate" in command else ()
        done = within(*command, *more, "--model", model, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
    assert list(telling(tmp_path / "files")) == [LOCAL_PATHS]
    assert open_run(tmp_path / "files" / "extracted").model == "tiny"
    again = within(
        "extract",
        "--texts",
        "texts.txt",
        "--layers",
        "0",
        "--output",
        "files/extracted",
        "--model",
        model,
        cwd=tmp_path,
    )
    assert "is there already" in again.stderr


def test_what_is_returned_is_what_is_in_the_file(model: str, tmp_path: Path) -> None:
    _, returned = generate_inference_with_activations("Hi", model, tmp_path / "x.h5", [0], max_new_tokens=2)
    assert returned["model"] == load_activations(tmp_path / "x.h5")["model"] == "tiny"


def test_adapters_and_options_are_named() -> None:
    options = LoadOptions(peft=f"/home/{SECRET}/adapter", device_map="auto", offload_folder=f"/tmp/{SECRET}/off")
    assert SECRET not in json.dumps(options.as_dict())
    assert options.as_dict()["peft"] == "adapter"


def test_a_model_knows_its_paths(model: str) -> None:
    loaded = load_model(model)
    assert (loaded.name, loaded.paths) == ("tiny", {"model": model})
    assert load_model("demo").paths == {}


def test_a_run_of_the_first_versions_goes_on(tmp_path: Path) -> None:
    """Its shards hold the path."""
    with RunWriter(tmp_path / "run", "tiny", SETTINGS) as writer:
        writer.add([make_sample()])
    shard = tmp_path / "run" / "shard-00000.h5"
    with h5py.File(shard, "r+") as file:
        file.attrs["model"] = "/home/a/models/tiny"
        attributes = {name: str(value) for name, value in file.attrs.items()}
        file.attrs[checksums.OF_ATTRIBUTES] = checksums.of_attributes(attributes)
        size, arrays = file.id.get_filesize(), arrays_of(file)
    shard.write_bytes(shard.read_bytes()[:size])  # without the trailer of before
    write_trailer(shard, arrays)
    assert open_run(tmp_path / "run").model == "/home/a/models/tiny"
    with pytest.raises(OtherSettings, match="model was"):
        RunWriter(tmp_path / "run", "other", SETTINGS, resume=True)
    with RunWriter(tmp_path / "run", "tiny", SETTINGS, resume=True) as writer:
        assert writer.n_samples == 1
        writer.finish()
    assert open_run(tmp_path / "run").model == "tiny"
