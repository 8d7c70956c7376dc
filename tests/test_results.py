"""Result files keep their form: what the first commands wrote is what they write now, and more. Their files are still drawn.

The files in data/results were written by the commands in COMMANDS, before there were `Result` and `Estimate`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import within

from AutomaticEval import ActivationComparator, ActivationExtractor
from AutomaticEval.analysis.heads.screen import AttentionEstimate, DirectEstimate, HeadScore, StrengthChange
from AutomaticEval.analysis.result import Estimate, Result
from AutomaticEval.capture.texts.sources import read_texts
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.store.disk.json_files import write_json

OLD = Path(__file__).parent / "data" / "results"
COMMANDS = {
    "screening": ("scores.json", "screen --profile own.toml --target a --against b --permutations 50"),
    "ablation": (
        "ablation.json",
        "ablate --head-spec 0:0,3:1-2 --mode mean --profile own.toml --emotion joy --max-tokens 4 --benchmark demo --limit 4",
    ),
    "patching": (
        "patching.json",
        "patch --head-spec 1:1 --profile own.toml --emotion joy --max-tokens 4 --positions aligned",
    ),
    "pairs": ("patching.json", "patch --head-spec 0:*,2:1 --pairs pairs.jsonl --positions all"),
    "sweep": ("sweep.json", "sweep --profile own.toml --emotion joy --mode mean --max-tokens 3"),
    "sweep_of_positions": ("sweep.json", "sweep --pairs one_pair.jsonl --site resid_post"),
    "strength": ("head_strength.json", "strength --data_path texts.jsonl"),
    "comparison": (
        "comparison.json",
        "compare --pre_tuned_model demo --fine_tuned_model demo --data_path texts.jsonl --answers_of pre --max_new_tokens 3",
    ),
}
"""Name of the old file -> the name that its command gives it, and the command."""
OF_THE_LIBRARIES = {"versions", "config", "generation_config", "tokenizer", "arithmetic"}
"""Settings that are as the installed versions are."""


MADE_OTHERWISE = {
    "interval",
    "rank_correlation",
    "strength",
    "attention",
    "direct",
    ".summary.denoising.mean",
    ".summary.noising.mean",
}
"""Names, and places in a file, of what is computed in another way now (docs/numbers.md)."""


def assert_same(now: Any, before: Any, where: str = "") -> None:
    """The same names (there may be more now), texts, whole numbers and absent numbers; other numbers to 1e-3, which rounding
    on other machines needs. Numbers in MADE_OTHERWISE are not compared."""
    assert type(now) is type(before), where
    if isinstance(before, dict):
        assert set(before) <= set(now), where
        for name, value in before.items():
            if name not in OF_THE_LIBRARIES and f"{where}.{name}" not in MADE_OTHERWISE and name not in MADE_OTHERWISE:
                assert_same(now[name], value, f"{where}.{name}")
    elif isinstance(before, list):
        assert len(now) == len(before), where
        for number, (one, other) in enumerate(zip(now, before, strict=True)):
            assert_same(one, other, f"{where}[{number}]")
    elif isinstance(before, float):
        assert now == pytest.approx(before, rel=1e-3, abs=1e-3), where
    else:
        assert now == before, where


@pytest.mark.parametrize("name", list(COMMANDS))
def test_commands_write_the_files_that_they_wrote_before(name: str, tmp_path: Path) -> None:
    for file in ("own.toml", "texts.jsonl", "pairs.jsonl", "one_pair.jsonl"):
        shutil.copy(OLD / file, tmp_path)
    written, command = COMMANDS[name]
    folder = "--output_dir" if name in ("strength", "comparison") else "--output"
    done = within("heads", *command.split(), folder, "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(*(json.loads(file.read_text()) for file in (tmp_path / "out" / written, OLD / f"{name}.json")))


def test_what_is_computed_in_another_way_is_so_from_the_same_numbers(tmp_path: Path) -> None:
    """Parts of pairs: a ratio of sums, where it was a mean of ratios."""
    old = json.loads((OLD / "pairs.json").read_text())
    (tmp_path / "pairs.jsonl").write_bytes((OLD / "pairs.jsonl").read_bytes())
    done = within("heads", *COMMANDS["pairs"][1].split(), "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    now = json.loads((tmp_path / "out" / "patching.json").read_text())
    kept = [each for each, sample in zip(old["samples"], now["samples"], strict=True) if not sample["left_out"]]
    weights = [abs(each["clean"] - each["corrupted"]) for each in kept]
    for name in ("denoising", "noising"):
        mean = sum(weight * each[name] for weight, each in zip(weights, kept, strict=True)) / sum(weights)
        assert now["summary"][name]["mean"] == pytest.approx(mean, rel=1e-3)
        assert now["summary"][name]["interval"] is None
    assert "pairs below 0.1 of the median difference are left out" in now["methods"]["part"]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_old_files_are_drawn(name: str, tmp_path: Path) -> None:
    done = within("heads", "plot", str(OLD / f"{name}.json"), "--output", "figures", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = list((tmp_path / "figures").iterdir())
    assert len(figures) == done.stdout.count("Written:") > 0
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)


def test_an_old_strength_is_compared_with_a_new_one(demo: LoadedModel) -> None:
    extractor = ActivationExtractor(demo)
    extractor.extract_activations(read_texts(OLD / "texts.jsonl"))
    changes = ActivationComparator(OLD / "strength.json", extractor).compare()["differences"]
    assert len(changes) == 16
    assert list(changes.values()) == pytest.approx([0.0] * 16, abs=1e-4)


def test_the_text_of_a_file(tmp_path: Path) -> None:
    """To the last character: the order of names, NaN as null, and an interval as a list."""
    effect = DirectEstimate(2.0, (1.5, 2.5), 3, own=1.0, neutral=-1.0, p=0.25)
    attention = AttentionEstimate(None, None, 0, paid=None, beside_neutral=Estimate(None, None, 0))
    score = HeadScore(0, 1, "joy", StrengthChange(0.5, float("nan"), 1.0), attention, effect)
    result = Result("screening", {"scores": [score]}, {"model": "demo", "sizes": (1, 2)})
    write_json(tmp_path / "scores.json", result.as_json())
    assert (tmp_path / "scores.json").read_text() == (
        '{\n "kind": "screening",\n "settings": {\n  "model": "demo",\n  "sizes": [\n   1,\n   2\n  ]\n },\n'
        ' "scores": [\n  {\n   "layer": 0,\n   "head": 1,\n   "category": "joy",\n'
        '   "strength": {\n    "change": 0.5,\n    "d": null,\n    "p": 1.0\n   },\n'
        '   "attention": {\n    "mean": null,\n    "interval": null,\n    "n": 0,\n    "simultaneous": null,\n    "reason": null,\n'
        '    "paid": null,\n    "beside_neutral": {\n     "mean": null,\n     "interval": null,\n     "n": 0,\n     "simultaneous": null,\n'
        '     "reason": null\n    }\n   },\n'
        '   "direct": {\n    "mean": 2.0,\n    "interval": [\n     1.5,\n     2.5\n    ],\n    "n": 3,\n    "simultaneous": null,\n'
        '    "reason": null,\n    "own": 1.0,\n    "neutral": -1.0,\n    "p": 0.25\n   }\n'
        "  }\n ]\n}\n"
    )


def test_a_result_without_settings_has_no_place_for_them() -> None:
    assert Result("strength", {"model": "m", "heads": []}).as_json() == {"kind": "strength", "model": "m", "heads": []}
    assert list(Result("ablation", {"units": {}}, {}).as_json()) == ["kind", "settings", "units"]
