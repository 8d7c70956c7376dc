"""What a notebook shows of a run and of a sample: short, escaped, and still a dict."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.places import ROOT
from helpers.samples import SETTINGS, make_sample, same

from AutomaticEval import generate_inference_with_activations, load_activations, open_run
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.store.writer import RunWriter

EVIL = "<script>alert('x')</script> & \x1b[31m"


@pytest.fixture(scope="module")
def captured(demo: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    file = tmp_path_factory.mktemp("looks") / "one.h5"
    _, data = generate_inference_with_activations(f"{EVIL} What is 3 + 4?", demo, file, max_new_tokens=4)
    return data, file


def test_a_sample_prints_shapes_and_not_its_numbers(captured: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    data, file = captured
    for each in (data, load_activations(file)):
        text = repr(each)
        n_rows = len(each["positions"])
        assert len(text) < 3000
        assert f"float32 [{n_rows}, 128] at 5 sites: embeddings, layer_0, layer_1, layer_2, layer_3" in text
        assert f"int64 [{n_rows}]" in text
        assert "tensor(" not in text
        assert "\x1b" not in text
        html = each._repr_html_()  # type: ignore[attr-defined]
        assert "<script" not in html
        assert "&lt;script&gt;" in html
        assert "\x1b" not in html


def test_a_sample_is_still_a_dict(captured: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    data, file = captured
    assert isinstance(data, dict)
    assert same(load_activations(file), data)
    plain = dict(data)
    assert type(plain) is dict
    assert list(plain) == list(data)
    assert same({**data}, plain)
    for copied in (data.copy(), copy.copy(data), copy.deepcopy(data)):
        assert type(copied) is type(data)
        assert copied is not data
        assert same(copied, data)
    assert copy.deepcopy(data)["activations"]["layer_0"].data_ptr() != data["activations"]["layer_0"].data_ptr()
    words = {name: value for name, value in data.items() if isinstance(value, str | int)}
    few = type(data)(words)
    assert few == words
    assert json.loads(json.dumps(few)) == words
    assert pickle.loads(pickle.dumps(few)) == few
    torch.save(data, tmp_path / "data.pt")
    script = "import sys, torch; print(sorted(torch.load(sys.argv[1])), 'AutomaticEval' in sys.modules)"
    asked = [sys.executable, "-c", script, str(tmp_path / "data.pt")]  # weights_only=True is torch's default
    found = subprocess.run(asked, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout.strip() == f"{sorted(data)} False"
    assert same(load_activations(tmp_path / "data.pt"), data)


def test_odd_values_print_too(captured: tuple[dict[str, Any], Path]) -> None:
    kind = type(captured[0])
    assert repr(kind()) == "<activation data: 0 entries\n>"
    odd = kind({"a": None, "b": [1], "c": {}, "d": "x" * 1000, "e": [[0] * 50] * 50, "f": {"g": 1}})
    lines = repr(odd).splitlines()
    assert len(lines) == 8
    assert max(map(len, lines)) < 110
    assert "50 items" in repr(odd)


def test_a_run_shows_what_it_is(tmp_path: Path) -> None:
    settings = {**SETTINGS, "sites": "resid_post", "layers": "all", "positions": "last", "edits": [EVIL]}
    with RunWriter(tmp_path / "run", EVIL, settings) as made:
        made.add([make_sample(seed=number, task=EVIL, doc_id=number, correct=number > 0) for number in range(4)])
        made.finish()
    run = open_run(tmp_path / "run")
    html = run._repr_html_()
    for said in (
        "4 samples of 4 questions, 0.7500 correct",
        "positions</th><td style='text-align:left'>last<",
        "float32 8 wide",
    ):
        assert said in html
    assert "in 1 file" in html
    assert html.count("&lt;script&gt;") == 3  # model, task, edits
    assert "<script" not in html
    assert "\x1b" not in html
    assert "1 samples of 1 questions, 0.0000 correct" in run.where(doc_id=0)._repr_html_()
    (shard,) = [path for path in (tmp_path / "run").glob("*.h5") if path.name != "run.h5"]
    assert "one file" in open_run(shard)._repr_html_()


def test_both_notebooks_show_a_run_and_one_shows_samples_and_questions() -> None:
    cells = {}
    for name in ("run_and_probe", "steer"):
        notebook = json.loads((ROOT / "docs" / "notebooks" / f"{name}.ipynb").read_text("utf-8"))
        cells[name] = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert any(cell.endswith("\nrun") or cell == "run" for cell in cells["run_and_probe"])
    assert {"run[0]", "questions[0]"} <= set(cells["run_and_probe"])
    assert "questions = run.questions()\nquestions" in cells["run_and_probe"]
    assert any(cell == "open_run(after.folder)" for cell in cells["steer"])
