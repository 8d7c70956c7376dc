"""What runs were made with: written as it always was, read whatever version wrote it, and compared by one rule."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from helpers.places import ROOT
from lm_eval.models.huggingface import HFLM

from AutomaticEval import __version__, evaluate_with_activations, load_activations, load_model, open_run
from AutomaticEval.errors import OtherSettings
from AutomaticEval.models.weights.provenance import provenance
from AutomaticEval.settings import IDENTITY, KNOWN, LATER, RunSettings
from AutomaticEval.store.hdf5.read import Shard
from AutomaticEval.store.hdf5.write import write_file
from AutomaticEval.store.upkeep.merge import SAME, merge
from AutomaticEval.store.upkeep.prune import prune

CUT_SHORT = ROOT / "tests" / "data" / "cut-short"
"""A run of 15 requests, 14 of which were answered when it was killed. Version 0.1.0 wrote it, before `RunSettings` was there."""
AS_IT_WAS: dict[str, Any] = {
    "limit": 3,
    "num_fewshot": 1,
    "batch_size": 2,
    "scoring": "stock",
    "seed": 1,
    "layers_to_capture": [0],
    "store_dtype": "float16",
}
"""How it was asked."""


def installed() -> dict[str, str]:
    return {
        "AutomaticEval": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "lm_eval": version("lm_eval"),
    }


@pytest.fixture
def cut_short(tmp_path: Path) -> Path:
    """A copy of the kept run, with the versions of the libraries that are installed, and what transformers writes of the model."""
    folder = shutil.copytree(CUT_SHORT, tmp_path / "cut short")
    held = Shard(folder / "shard-00000.h5").contents()
    demo = load_model("demo")
    now = {"versions": installed(), **provenance(demo.model, demo.tokenizer)}
    assert now.keys() <= held.settings.keys()
    write_file(tmp_path / "now.h5", replace(held, settings={**held.settings, **now}))
    (tmp_path / "now.h5").replace(folder / "shard-00000.h5")
    return folder


def test_a_run_of_an_earlier_version_goes_on_and_ends_as_a_whole_one(
    cut_short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate_with_activations("demo", "demo", activation_save_dir=tmp_path / "whole", **AS_IT_WAS)
    n_generated = []

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def generate(*args: Any, **kwargs: Any) -> Any:
            n_generated.append(len(args[1]))
            return real(*args, **kwargs)

        return generate

    monkeypatch.setattr(HFLM, "_model_generate", counted(HFLM._model_generate))
    monkeypatch.setattr(HFLM, "_model_call", None)  # every choice is scored already
    before = [open_run(cut_short)[number] for number in range(14)]
    outcome = evaluate_with_activations("demo", "demo", resume=cut_short, **AS_IT_WAS)
    assert outcome.folder == cut_short
    assert n_generated == [1]
    assert [score[:3] for score in outcome.scores] == [score[:3] for score in whole.scores]
    one, other = open_run(cut_short), open_run(whole.folder or "")
    assert one.finished
    assert len(one) == len(other) == 15
    for first, second in zip(one, other, strict=True):
        assert [first[name] for name in ("task", "doc_id", "choice", "response", "correct", "metrics")] == [
            second[name] for name in ("task", "doc_id", "choice", "response", "correct", "metrics")
        ]
        if second["logprob"] is not None:  # another machine may have computed it
            assert first["logprob"] == pytest.approx(second["logprob"], abs=1e-3)
        for key, rows in second["activations"].items():
            torch.testing.assert_close(first["activations"][key], rows)
    kept = {(each["task"], each["doc_id"], each["choice"]): each for each in one}
    for each in before:  # nothing of what was there was computed again
        after = kept[each["task"], each["doc_id"], each["choice"]]
        assert after["logprob"] == each["logprob"]
        assert all(torch.equal(rows, after["activations"][key]) for key, rows in each["activations"].items())


@pytest.mark.parametrize(("changed", "says"), [("seed", "benchmark.seed"), ("num_fewshot", "benchmark.num_fewshot")])
def test_a_run_of_an_earlier_version_is_not_gone_on_with_otherwise(cut_short: Path, changed: str, says: str) -> None:
    with pytest.raises(OtherSettings, match=f"{says} was 1 and is 2"):
        evaluate_with_activations("demo", "demo", resume=cut_short, **{**AS_IT_WAS, changed: 2})


def written(path: Path) -> str:
    with h5py.File(path) as file:
        return str(file.attrs["settings"])


def test_settings_are_written_as_they_always_were(tmp_path: Path) -> None:
    """The text of the settings, in a run's shards and in its run.h5, against one that is written out here."""
    folder = evaluate_with_activations("demo", "demo", activation_save_dir=tmp_path, **AS_IT_WAS).folder
    assert folder is not None
    demo = load_model("demo")
    of_transformers = provenance(demo.model, demo.tokenizer)
    expected = {
        "run_id": open_run(folder).settings["run_id"],
        "dtype": "float32",
        "attention": "sdpa",
        "device": "cpu",
        "quantization": None,
        "revision": None,
        "versions": installed(),
        "model_hash": "81d0c2189296edb218f5456b7d409bf3",
        "fingerprint": "8fd47da08e418308",
        "shape": {"n_layers": 4, "d_model": 128, "n_heads": 4, "n_kv_heads": 2, "d_head": 32},
        "config": of_transformers["config"],
        "generation_config": of_transformers["generation_config"],
        "tokenizer": of_transformers["tokenizer"],
        "arithmetic": of_transformers["arithmetic"],
        "sites": "embed,resid_post",
        "layers": "0",
        "positions": "scored",
        "store_dtype": "float16",
        "benchmark": {
            "names": ["demo"],
            "num_trials": None,
            "limit": 3,
            "num_fewshot": 1,
            "seed": 1,
            "batch_size": 2,
            "scoring": "stock",
            "include_path": [],
            "local_files": None,
            "apply_chat_template": False,
            "system_instruction": None,
            "gen_kwargs": None,
            "repeats": None,
            "predict_only": False,
            "confirm_run_unsafe_code": False,
        },
    }
    assert written(folder / "run.h5") == json.dumps(expected)
    assert written(folder / "shard-00000.h5") == json.dumps(expected)
    assert open_run(folder).settings == expected
    pruned = prune(folder, tmp_path / "pruned.h5", sites="resid_post", positions="last")
    expected |= {"sites": "resid_post", "positions": "last of scored"}
    assert written(pruned) == json.dumps(
        {**expected, "pruned_from": [{"sites": "embed,resid_post", "positions": "scored"}]}
    )


def test_settings_that_are_not_known_are_written_as_they_were_read(tmp_path: Path) -> None:
    """Those of other versions, in the places where they were, through what rewrites a file."""
    held = Shard(CUT_SHORT / "shard-00000.h5").contents()
    settings = {"of_the_future": {"b": 1, "a": None}, **held.settings, "names": ["x"], "others": 0, "seed": None}
    path = tmp_path / "strange.h5"
    write_file(path, replace(held, settings=settings))
    assert written(path) == json.dumps(settings)
    assert open_run(path).settings == settings
    merged = merge([path], tmp_path / "merged.h5")
    assert written(merged) == json.dumps(settings)
    pruned = prune(path, tmp_path / "pruned.h5", sites="embed")
    assert list(json.loads(written(pruned))) == [*settings, "pruned_from"]


def test_single_files_give_a_dict(tmp_path: Path) -> None:
    settings = load_activations(ROOT / "tests" / "data" / "format-1.0" / "one_bfloat16.h5")["settings"]
    assert type(settings) is dict
    assert RunSettings.from_dict(settings).as_dict() == settings


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"seed": None},
        {"versions": {"torch": "1"}, "dtype": "float32", "unknown": 1},
        {"others": 1, "names": 2, "as_dict": 3},
        {"shape": "of another type", "merged": 7},
    ],
)
def test_settings_come_back_as_they_were(written: dict[str, Any]) -> None:
    back = RunSettings.from_dict(written).as_dict()
    assert json.dumps(back) == json.dumps(written)


def test_changed_settings_stay_in_their_place_and_new_ones_come_last() -> None:
    made = RunSettings.from_dict({"dtype": "float32", "unknown": 1, "revision": None})
    assert list(made.changed(seed=None, dtype="bfloat16").as_dict().items()) == [
        ("dtype", "bfloat16"),
        ("unknown", 1),
        ("revision", None),
        ("seed", None),
    ]
    assert made.dtype == "float32"
    with pytest.raises(TypeError, match="no field 'sede'"):
        made.changed(sede=1)


def test_what_is_compared_has_a_field() -> None:
    assert {name.split(".")[0] for name in (*IDENTITY, *LATER, *SAME)} <= KNOWN
