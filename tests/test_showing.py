"""Text of files, models and tasks is text: no markup, no commands to a terminal, no HTML, no path out of a folder."""

from __future__ import annotations

import os
import pty
import select
import shutil
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import within
from helpers.forked import MAIN, Forked, forked
from helpers.samples import SETTINGS, make_sample

from AutomaticEval.capture.texts.many_runs import Unit, folder_names
from AutomaticEval.cli.printing import print_table, say
from AutomaticEval.errors import SelectionError
from AutomaticEval.evaluation.results.captured_run import folder_name
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.report.extraction_page import write_summary
from AutomaticEval.report.figures import _FIGURES, save_with_figures
from AutomaticEval.safe_text import shown
from AutomaticEval.samples import Sample
from AutomaticEval.store.disk.file_names import own_name, plain_name
from AutomaticEval.store.hdf5.write import write_shard
from AutomaticEval.store.reader import open_run

HOSTILE = [
    "[/]",
    "x[/b]y",
    "[red]",
    "[link=http://a]b",
    "$x$y$",
    r"$\frac$",
    "a\ud800",
    "\x1b]52;c;ZXZpbA==\x07",
    "\x9b31m",
    "a\rb",
]


def test_what_would_command_a_terminal_is_spelled_out() -> None:
    assert shown("\x1b[31mred\x07\r\u202e\ud800") == r"\x1b[31mred\x07\r\u202e\ud800"
    plain = "a\tb\nc é 模型 👩\u200d💻 [/b] $x$"
    assert shown(plain) == plain
    for number in range(0x3000):
        if unicodedata.category(chr(number)) in ("Cc", "Cs") and chr(number) not in "\n\t":
            assert shown(chr(number)).startswith("\\"), hex(number)


@pytest.mark.parametrize("text", HOSTILE)
def test_tables_and_lines_hold_any_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(text, (text, "n"), [(text, text)])
    say(text)
    found = capsys.readouterr().out
    assert found.count(shown(text)) == 5
    assert "\x1b" not in found


def on_a_terminal(path: Path, *arguments: str) -> tuple[int, bytes]:
    """Exit code and what reached the terminal."""
    screen, terminal = pty.openpty()
    showing, out = Forked([MAIN, "show", str(path), *arguments], terminal=os.ttyname(terminal)), b""
    while (ready := select.select([screen], [], [], 0.1)[0]) or showing.poll() is None:
        out += os.read(screen, 2**16) if ready else b""
    os.close(terminal)
    os.close(screen)
    return showing.wait().returncode, out


@pytest.mark.parametrize("n", [1, 2])
def test_show_sends_no_command_of_a_file_to_the_terminal(tmp_path: Path, n: int) -> None:
    text = "\x1b]52;c;ZXZpbA==\x07\x1b[31mRED[/]\ud800"
    made = make_sample()
    sample = Sample(
        {**made.fields, "prompt": text, "task": text, "doc_id": 1}, made.input_ids, made.generated_ids, made.parts
    )
    write_shard(tmp_path / "x.h5", [sample] * n, text, {**SETTINGS, "why": text})
    code, out = on_a_terminal(tmp_path / "x.h5")
    assert code == 0, out
    assert b"\x1b]52" not in out
    assert b"\x07" not in out
    assert rb"\x1b]52;c;ZXZpbA==\x07" in out.replace(b"\r\n", b"")


def test_errors_and_warnings_are_text(tmp_path: Path) -> None:
    done = forked("show", "\x1b[31mabsent[/].h5", cwd=tmp_path)
    assert done.returncode == 2
    assert r"\x1b[31mabsent[/].h5" in done.stderr
    assert "\x1b" not in done.stderr


def test_a_model_whose_name_is_markup_is_scored_and_drawn(tmp_path: Path) -> None:
    model = tmp_path / "a[" / "b]y$\\frac$\x1b[31m"
    shutil.copytree(DEMO_FOLDER, model)
    (tmp_path / "texts.json").write_text('["What is red?"]')
    done = forked("--capture_activations", "--limit", "1", "--model", str(model), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "all questions" in done.stdout
    done = forked("heads", "strength", "--data_path", "texts.json", "--model", str(model), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "head_strength.png").exists()
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (kind, text)
        for number, kind in enumerate(_FIGURES)
        for at, text in enumerate(HOSTILE)
        if text == r"$\frac$" or (at - number) % 4 == 0  # the worst one in each, every other one in a quarter
    ],
)
def test_figures_hold_any_title(tmp_path: Path, kind: str, text: str) -> None:
    mean: dict[str, Any] = {"mean": 1.0, "interval": [0.5, 1.5], "n": 3}
    places = [{"layer": 0, "head": head, text: mean} for head in range(2)]
    scores = [
        {
            "layer": 0,
            "head": head,
            "category": text,
            "strength": {"d": 1.0, "p": 0.01},
            "attention": mean,
            "direct": mean,
        }
        for head in range(2)
    ]
    result = {
        "kind": kind,
        "model": text,
        "of": text,
        "settings": {
            "model": text,
            "mode": text,
            "heads": text,
            "site": text,
            "places": text,
            "position": text,
            "positions": [text, "prompt[-1]"],
            "file": text,
            "directions": {text: {}},
        },
        "benchmark": [
            {
                "scale": 1.0,
                "task": text,
                "metric": text,
                "value": 0.5,
                "stderr": 0.1,
                "n": 3,
                "before": 0.4,
                "after": 0.5,
            }
        ],
        "texts": [{"scale": 1.0, "task": text, "metric": text, **mean}],
        "heads": [{"layer": 0, "head": 0, "R_h": 1.0}],
        **{name: {"0:0": 1.0} for name in ("pre_tuned", "fine_tuned", "differences")},
        "samples": [],
        "tasks": [{"task": text, "n": 3, "difference": mean}],
        **{name: {"model": text, "path": text} for name in ("before", "after")},
        "sites": [{"site": f"layer_{layer}", "cosine": mean, "cka": 0.5} for layer in range(2)],
        "scores": scores,
        "places": places,
        "units": {text: text},
        **(of_probe(text, mean) if kind == "probe" else {}),
        **(
            of_layers(kind, text, mean)
            if kind in ("lens", "lens_question", "tuned_lens", "geometry", "experts")
            else {}
        ),
        "summary": {text: mean if kind == "pairs" else {"before": mean, "after": mean}},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(save_with_figures(tmp_path / "r.json", result)) > 1


def of_layers(kind: str, text: str, mean: object) -> dict[str, object]:
    """What only results of the lens, of geometry and of experts have."""
    names = "choice_accuracy top_agreement log_rank gold_probability taken_probability entropy kl plain tuned norm"
    cells = {"top_token": [text], "rank": [1], "probability": [0.5]}
    shape = {
        "explained": [0.5],
        "effective_rank": 2.0,
        "participation_ratio": 2.0,
        "random_effective_rank": 3.0,
        "n": 3,
    }
    place = {**dict.fromkeys(names.split(), mean), **cells, **shape}
    ends = {"positions": [], "means": [[], []], "n": []}
    of_scatter = {"site": "layer_0", "points": [[0, 1], [1, 0]], "task": [text, "b"], "correct": [True, None]}
    return {
        "run": {"path": text, "model": text},
        "places": [{"site": f"layer_{layer}", **place} for layer in range(2)],
        "n_questions": 3,
        "n_compared": 3,
        "n_left_out": 0,
        "n_prompts": {"train": 3, "held_out": 3},
        "task": text,
        "doc_id": 0,
        "question": text,
        "tokens": [text],
        "next_tokens": [text],
        "norms_by_position": {"from_start": ends, "from_end": ends},
        **{name: {"cka": [[1, 0.5], [0.5, 1]], "cosine": None} for name in ("between", "between_runs")},
        "experts": [{"layer": 0, "expert": number, "relative": float(number)} for number in range(2)],
        "other": {"path": text, "model": text},
        "other_places": [{"site": "layer_0", **place}],
        "scatter": of_scatter,
    }


def of_probe(text: str, mean: object) -> dict[str, object]:
    """What only a result of probes has."""
    judged = {"auroc": mean}
    return {
        "run": {"model": text, "path": text},
        "classes": {"target": text, "positive": text, "negative": text, "n_positive": 1, "n_negative": 2},
        "best": {"judged": judged, "site": "layer_0", "position": text, "places": {f"layer_0 at {text}": 5}},
        "places": [
            {"site": f"layer_{layer}", "position": at, "probe": judged, "difference_of_means": mean}
            for layer in range(2)
            for at in (text, "prompt[-1]")
        ],
        "grid": {"left_out": []},
        "baselines": [{"name": text, "told": text, "judged": judged}, {"name": text, "told": text, "judged": None}],
        "questions": {"label": [0, 1], "probability": [0.2, 0.6], "confidence": [None, 0.5]},
        "transfer": {
            "runs": [{"path": text}] * 2,
            "cells": [{"train": n // 2, "test": n % 2, "auroc": mean} for n in range(4)],
        },
    }


def test_a_summary_is_neither_html_nor_links(tmp_path: Path) -> None:
    text = "<script>x</script> [a](http://b) ![i](http://c) `code` | *b* \ud800 \x1b \n# heading"
    units = [Unit(text, text, tmp_path / "run", "failed", f"StoreError: {text}")]
    markdown, page = (path.read_text(encoding="utf-8") for path in write_summary(units, text, tmp_path))
    for whole in (markdown, page):
        assert "<script>" not in whole
        assert "&lt;script&gt;" in whole
        assert "\x1b" not in whole
    assert "[a](" not in markdown.replace(r"\[", "")
    assert not [line for line in markdown.splitlines() if line == "# heading"]
    assert markdown.count(r"\`code\` \| \*b\* \\ud800 \\x1b # heading") >= 3


@pytest.mark.parametrize(
    "text", ["..", ".", "", "/", "...", ".lock", ".git", "../..", "a/../..", "\0", "\ud800", "a\nb", "模" * 200]
)
def test_names_that_become_paths_are_one_visible_name(text: str) -> None:
    for name in (plain_name(text), own_name(text, 80), folder_name([text], text), *folder_names([text]).values()):
        assert name == Path(name).name
        assert name not in ("", ".", "..")
        assert not name.startswith(".")
        assert (Path("/folder") / name).resolve().parent == Path("/folder")
    assert len(own_name(text, 80).encode()) <= 80


def test_names_that_look_alike_keep_apart() -> None:
    for names in (["a b", "a-b"], ["x/a b", "y/a-b"], ["..", "-"], ["a" * 300 + "b", "b" + "a" * 299 + "b"]):
        assert len(set(folder_names(names).values())) == 2
    assert folder_names(["gpt2", "org/llama"]) == {"gpt2": "gpt2", "org/llama": "llama"}
    with pytest.raises(SelectionError, match="twice"):
        folder_names(["a", "a"])


def test_models_named_by_dots_stay_inside_the_output(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("Once upon a time")
    shutil.copytree(DEMO_FOLDER, tmp_path / "m")
    (tmp_path / "m" / "sub").mkdir()
    done = within(
        *("extract", "--texts", "../../texts.txt", "--model", "..,demo", "--output", "../../OUT/x", "--layers", "0"),
        cwd=tmp_path / "m" / "sub",
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "OUT").iterdir()] == ["x"]
    assert {path.parent.parent for path in (tmp_path / "OUT").rglob("*.h5")} == {tmp_path / "OUT" / "x"}


def test_a_table_holds_lone_surrogates(tmp_path: Path) -> None:
    made = make_sample()
    sample = Sample({**made.fields, "prompt": "a\ud800", "task": "t"}, made.input_ids, made.generated_ids, made.parts)
    write_shard(tmp_path / "x.h5", [sample, made], "m", SETTINGS)
    assert open_run(tmp_path / "x.h5").table().prompt.tolist() == ["a\ud800", made.fields["prompt"]]
