"""A file keeps the vectors that its model was edited with: in runs, single files, copies, and files of this format's first day."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers.places import ROOT

from AutomaticEval import Edit, editing, evaluate_with_activations, generate_inference_with_activations, open_run
from AutomaticEval.evaluation.benchmark import load_tasks
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.forecast import forecast
from AutomaticEval.evaluation.run import run_benchmark
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.selection import Selection
from AutomaticEval.store.upkeep.prune import prune
from AutomaticEval.store.upkeep.verify import verify

VECTOR = torch.randn(128, generator=torch.Generator().manual_seed(3))
HEADS = torch.randn(2, 32, generator=torch.Generator().manual_seed(4)).bfloat16()


def edits() -> list[Edit]:
    return [
        Edit.add("resid_post", VECTOR, layers=[1, 2], positions="scored"),
        Edit.replace("layer_0.z", HEADS, heads=[0, 2]),
        Edit.scale("layer_3.mlp_out", 0.5),
    ]


def check(path: Path) -> None:
    run = open_run(path)
    (first, kept), (_, again), (heads, own), (scaled, none) = run.edits()
    assert [first.split(" ")[-4:], heads.split(" ")[-5:]] == [
        ["at", "layer_1", "positions", "scored"],
        ["at", "layer_0.z", "heads", "[0,", "2]"],
    ]
    assert scaled == "scale 0.5 at layer_3.mlp_out"
    assert none is None
    for value, expected in ((kept, VECTOR[None]), (again, VECTOR[None]), (own, HEADS)):
        assert value is not None
        assert torch.equal(value, expected.double())
    assert verify(path) == []


def test_runs_and_their_copies_keep_the_vectors(demo: LoadedModel, tmp_path: Path) -> None:
    how: dict[str, Any] = {"layers_to_capture": -1, "sites": "resid_post", "limit": 1}
    with editing(demo, edits()):
        outcome = evaluate_with_activations(demo, "demo_facts", activation_save_dir=tmp_path, **how)
    assert outcome.folder is not None
    check(outcome.folder)
    check(prune(outcome.folder, tmp_path / "copy.h5", positions="all"))
    with h5py.File(next(outcome.folder.glob("shard-*.h5"))) as file:  # as other programs see it
        (name,) = (name for name in file["edits"] if file["edits"][name].shape == (1, 128))
        assert np.array_equal(file["edits"][name][0], VECTOR.double().numpy())


def test_a_single_file_keeps_them_and_a_run_without_edits_has_none(demo: LoadedModel, tmp_path: Path) -> None:
    how: dict[str, Any] = {"tokenizer": demo.tokenizer, "max_new_tokens": 2, "layers_to_capture": -1}
    with editing(demo, edits()):
        generate_inference_with_activations("Tell me.", demo.model, tmp_path / "edited.h5", **how)
    check(tmp_path / "edited.h5")
    generate_inference_with_activations("Tell me.", demo.model, tmp_path / "plain.h5", **how)
    assert open_run(tmp_path / "plain.h5").edits() == []
    with h5py.File(tmp_path / "plain.h5") as file:
        assert "edits" not in file


def test_values_that_differ_by_position_are_named_only(demo: LoadedModel, tmp_path: Path) -> None:
    with editing(demo, Edit.add("layer_1", torch.ones(1, 1, 128))):
        generate_inference_with_activations("Tell me.", demo, tmp_path / "x.h5", max_new_tokens=1)
    ((text, value),) = open_run(tmp_path / "x.h5").edits()
    assert text.startswith("add [1, 1, 128] ")
    assert value is None


def test_a_file_of_the_formats_first_day() -> None:
    check(ROOT / "tests" / "data" / "format-1.4" / "run")


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_older_files_hold_no_vector(version: str) -> None:
    folder = next(path for path in sorted((ROOT / "tests" / "data" / f"format-{version}").iterdir()) if path.is_dir())
    assert open_run(folder).edits() == []


def test_the_forecast_counts_the_vectors(demo: LoadedModel, tmp_path: Path) -> None:
    asked = Benchmark(("demo_facts",), limit=1)
    selection = Selection.parse("resid_post", -1, "scored")
    many = [Edit.add("layer_3.mlp_post", torch.full((384,), 1e-3 * n)) for n in range(200)]
    plain = forecast(demo, asked, load_tasks(asked), selection)
    with editing(demo, many):
        foreseen = forecast(demo, asked, load_tasks(asked), selection)
        outcome = run_benchmark(demo, asked, selection, output=RunOutput(output=tmp_path / "run"))
    assert plain.size_bytes < outcome.size_bytes <= foreseen.size_bytes
    assert outcome.size_bytes > 200 * 384 * 8
