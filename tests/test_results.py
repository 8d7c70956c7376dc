"""Result files keep their form: what commands wrote before results were classes is in what they write now.

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
from AutomaticEval.analysis.numbers.estimate import mean_interval
from AutomaticEval.analysis.result import Estimate, Result
from AutomaticEval.capture.texts.sources import read_texts
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.store.disk.json_files import read_json, write_json

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

OTHER_NUMBERS = {"strength", "attention", "direct"}
"""Scores that are compared with something else than in the first versions; test_screening.py and test_controls.py have them by hand."""


def assert_same(now: Any, before: Any, where: str = "") -> None:
    """The names of before in their order, texts, whole numbers and absent numbers; other numbers to 1e-3, which rounding on other machines needs."""
    assert type(now) is type(before), where
    if isinstance(before, dict):
        assert [name for name in now if name in before] == list(before), where
        for name, value in before.items():
            if name not in OF_THE_LIBRARIES | OTHER_NUMBERS:
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
        '   "attention": {\n    "mean": null,\n    "interval": null,\n    "n": 0,\n    "paid": null,\n'
        '    "beside_neutral": {\n     "mean": null,\n     "interval": null,\n     "n": 0\n    }\n   },\n'
        '   "direct": {\n    "mean": 2.0,\n    "interval": [\n     1.5,\n     2.5\n    ],\n    "n": 3,\n    "own": 1.0,\n'
        '    "neutral": -1.0,\n    "p": 0.25\n   }\n'
        "  }\n ]\n}\n"
    )


def test_a_result_without_settings_has_no_place_for_them() -> None:
    assert Result("strength", {"model": "m", "heads": []}).as_json() == {"kind": "strength", "model": "m", "heads": []}
    assert list(Result("ablation", {"units": {}}, {}).as_json()) == ["kind", "settings", "units"]


def test_estimates_of_few_values(tmp_path: Path) -> None:
    assert mean_interval([]) == Estimate(None, None, 0)
    assert mean_interval([3.0]) == Estimate(3.0, None, 1)
    same = mean_interval([2.0, 2.0, 2.0])
    assert same == Estimate(2.0, (2.0, 2.0), 3)
    write_json(tmp_path / "a.json", Result("pairs", {"summary": {"noising": same}}).as_json())
    assert read_json(tmp_path / "a.json")["summary"]["noising"] == {"mean": 2.0, "interval": [2.0, 2.0], "n": 3}
