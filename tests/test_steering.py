"""`main.py steer`, typed as a person types it: a planted direction moves the answers, and every score is that of `evaluate`."""

from __future__ import annotations

import json
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import within
from helpers.forked import MAIN, Forked
from helpers.raw_hooks import n_hooks

from AutomaticEval import (
    Direction,
    Edit,
    difference_of_means,
    editing,
    evaluate,
    evaluate_with_activations,
    generate_inference,
    load_direction,
    open_run,
)
from AutomaticEval.analysis.steering.at_scales import Steering, parse_scales
from AutomaticEval.analysis.words.wording import wording
from AutomaticEval.demo.world import _ANIMALS, _DRINKS
from AutomaticEval.errors import SelectionError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.edited_models import names_of
from AutomaticEval.report.by_scale import _panels, by_scale
from AutomaticEval.selection import Positions

VECTOR = torch.randn(128, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def asked(demo: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts.jsonl (questions about animals, then about drinks), animal.safetensors (one kind minus the other) and v.npy."""
    folder = tmp_path_factory.mktemp("asked")
    evaluate_with_activations(demo, "demo_facts", positions="prompt[-1:]", layers_to_capture=2, output=folder / "run")
    questions = open_run(folder / "run").questions()
    texts = questions.column("question")
    kinds = [True if "animal" in text else False if "drink" in text else None for text in texts]
    difference_of_means(questions, "layer_2", kinds).save(folder / "animal.safetensors")
    chosen = [text for kind in (True, False) for text, each in zip(texts, kinds, strict=True) if each is kind]
    assert sum("animal" in text for text in chosen) == len(chosen) / 2
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
    np.save(folder / "v.npy", VECTOR.numpy())
    return folder


def steer(cwd: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The result of a command that works, and what it printed."""
    output = arguments[arguments.index("-o") + 1] if "-o" in arguments else "results"
    done = within("steer", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert (cwd / output / "steering.png").stat().st_size > 10_000
    return json.loads((cwd / output / "steer.json").read_text()), done.stdout


@pytest.mark.parametrize("positions", ["all", "response"])
def test_scores_at_a_scale_are_those_of_evaluate(
    asked: Path, tmp_path: Path, demo: LoadedModel, positions: str
) -> None:
    """Also with examples before each question, although the tasks are loaded once for all scales; scale 0 is the plain model, to the last bit."""
    of_tasks = ("--benchmark", "demo", "--limit", "5", "--num_fewshot", "2")
    options = ("--direction", str(asked / "v.npy"), "--site", "resid_post", "--layer", "2", "--positions", positions)
    result, shown = steer(tmp_path, *options, "--scale", "-4,0", *of_tasks)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [
        *("scale_-4.0.json", "scale_0.0.json", "settings.json", "steer.json", "steering.png")
    ]  # no activations
    for scale in (-4.0, 0.0):
        edits = [Edit.add("layer_2", scale * VECTOR, positions=positions)] if scale else []
        with editing(demo, edits):
            outcome = evaluate(demo.model, "demo", tokenizer=demo.tokenizer, limit=5, num_fewshot=2)
        expected = [[each.task, each.metric, each.value, each.stderr, each.answered] for each in outcome.scores]
        rows = [each for each in result["benchmark"] if each["scale"] == scale]
        assert [[each[name] for name in ("task", "metric", "value", "stderr", "n")] for each in rows] == expected
        texts = [entry["resps"][0][0] for entry in outcome.samples["demo_arithmetic"]]
        words = {each["metric"]: each for each in result["texts"] if each["scale"] == scale}["words"]
        assert (words["task"], words["n"]) == ("demo_arithmetic", 5)
        split = ["".join(each if each.isalnum() else " " for each in text).split() for text in texts]
        assert words["mean"] == pytest.approx(np.mean([len(each) for each in split]))
        assert f"{scale:g} │ {rows[0]['value']:.4f} ± {rows[0]['stderr']:.4f}" in shown
    assert len({each["value"] for each in result["benchmark"] if each["task"] == "all questions"}) > 1
    assert result["settings"]["positions"] == positions
    assert result["settings"]["directions"]["layer_2"]["norm"] == pytest.approx(float(VECTOR.norm()))
    assert {"versions", "model_hash", "attention", "batch_size", "seed", "texts"} <= result["settings"].keys()


def test_scale_0_makes_no_edit(demo: LoadedModel) -> None:
    """Also at positions: adding zeros there would score requests in other batches than the plain model's."""
    steering = Steering(demo, [Direction(VECTOR, "layer_1"), Direction(VECTOR, "layer_2")], Positions("response"))
    for scale, n_edits in ((0.0, 0), (-0.0, 0), (1e-9, 2)):
        with steering.at(scale):
            assert len(names_of(demo.model)) == n_edits
        assert not n_hooks(demo.model)


def share(result: dict[str, Any], scale: float, about: str, words: list[str]) -> float:
    """The share of the prompts about something whose answer begins with the two letters of one of some words: answers are cut after a few tokens."""
    answers = [
        next(each["text"] for each in sample["answers"] if each["scale"] == scale).strip()
        for sample in result["samples"]
        if about in sample["prompt"]
    ]
    return sum(answer[:2] in {word[:2] for word in words} for answer in answers) / len(answers)


def test_a_direction_between_two_kinds_of_question_turns_answers_both_ways(asked: Path, tmp_path: Path) -> None:
    options = ("--direction", str(asked / "animal.safetensors"), "--texts", str(asked / "texts.jsonl"))
    result, shown = steer(tmp_path, *options, "--scale=-1,0,1", "--max_new_tokens", "3")
    for about, own, others, towards in (("drink", _DRINKS, _ANIMALS, 1.0), ("animal", _ANIMALS, _DRINKS, -1.0)):
        assert share(result, 0.0, about, own) > 0.9
        assert share(result, 0.0, about, others) < 0.1
        assert share(result, towards, about, others) > 0.5
        assert share(result, -towards, about, others) < 0.1
    assert "layer_2, norm" in shown
    assert "difference of means of given labels over run" in shown
    assert f"the first 5 of {len(result['samples'])}" in shown


def test_answers_by_scale_are_those_of_generate(asked: Path, tmp_path: Path, demo: LoadedModel) -> None:
    (tmp_path / "t.txt").write_text("What is red?\nQuestion: What is 20 + 29? Answer:\n")
    place = ("--direction", str(asked / "v.npy"), "--site", "resid_post", "--layer", "-2,1", "--texts", "t.txt")
    result, shown = steer(tmp_path, *place, "--scale", "0,3", "--max_new_tokens", "6")
    assert result["settings"]["directions"].keys() == {"layer_1", "layer_2"}
    for sample in result["samples"]:
        for each in sample["answers"]:
            edit = Edit.add("resid_post", each["scale"] * VECTOR, layers=[1, 2])
            with editing(demo, [edit] if each["scale"] else []):
                text = generate_inference(sample["prompt"], demo.model, tokenizer=demo.tokenizer, max_new_tokens=6)
            assert each["text"] == text
    assert result["benchmark"] == []
    assert "Scores by scale" not in shown


SCALES = ",".join(f"{n / 10:g}" for n in range(-6, 6))


def of_12_scales(asked: Path) -> list[str]:
    place = ["--direction", str(asked / "animal.safetensors"), "--texts", str(asked / "texts.jsonl")]
    return [*place, "--scale", SCALES, "--max_new_tokens", "3", "--num_trials", "4"]


@pytest.fixture(scope="module")
def unbroken(asked: Path) -> dict[str, Any]:
    """The result at 12 scales of a command that nothing cut short."""
    return steer(asked, *of_12_scales(asked), "-o", "unbroken")[0]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_steer_goes_on_and_computes_only_what_is_missing(
    asked: Path, tmp_path: Path, unbroken: dict[str, Any], sent: signal.Signals
) -> None:
    command = ["steer", *of_12_scales(asked)]
    killed = Forked([MAIN, *command], tmp_path)
    folder = tmp_path / "results" / "steer"
    end = time.monotonic() + 120
    while len(list(folder.glob("scale_*.json"))) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    killed.send_signal(sent)
    shown = killed.wait().stderr
    there = {path.name: path.stat().st_mtime_ns for path in folder.glob("scale_*.json")}
    assert 2 <= len(there) < 12  # a file that is interrupted while it gets its name is taken away again
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["steer"]
    if sent is signal.SIGTERM:
        told = (
            f"{len(there)} of 12 scales are in results/steer. To go on:\n  {shlex.join(['python', MAIN, *command])}\n"
        )
        assert told in shown
    done = within(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is there already") == len(there)
    assert {name: (folder / name).stat().st_mtime_ns for name in there} == there
    assert json.loads((tmp_path / "results" / "steer.json").read_text()) == unbroken
    assert [len(sample["answers"]) for sample in unbroken["samples"]] == [12] * 4


def test_another_direction_or_question_is_another_sweep(asked: Path, tmp_path: Path) -> None:
    base = ("--direction", str(asked / "v.npy"), "--texts", str(asked / "texts.jsonl"), "--num_trials", "2")
    place = ("--site", "resid_post", "--layer", "1")
    steer(tmp_path, *base, *place, "--scale", "1")
    done = within("steer", *base, *place, "--scale", "1", cwd=tmp_path)
    assert "steer.json exists" in done.stderr.replace("\n", " ")
    for file in ("steer.json", "steering.png"):
        (tmp_path / "results" / file).unlink()
    told = {
        "--layer 2": "directions.layer_1 was",
        "--positions last": "positions was 'all' and is 'prompt[-1:]'",
        "--max_new_tokens 3": "max_tokens was 15 and is 3",
        "--num_trials 3": "and is '3, sha256",
    }
    for other, why in told.items():
        done = within("steer", *base, *place, "--scale", "1", *other.split(), cwd=tmp_path)
        assert done.returncode == 2, other
        message = done.stderr.splitlines()[-1]
        assert message.startswith("OtherSettings: results/steer was made with other settings")
        assert why in message
    (tmp_path / "results" / "steer" / "scale_1.0.json").write_text('{"part": {"scale": 1}}')
    done = within("steer", *base, *place, "--scale", "1", cwd=tmp_path)
    assert "scale_1.0.json is damaged" in done.stderr
    (tmp_path / "results" / "steer" / "scale_1.0.json").unlink()
    result, _ = steer(tmp_path, *base, *place, "--scale", "1,2")
    assert result["settings"]["scales"] == [1, 2]


def test_scales_are_read_as_they_are_written() -> None:
    assert parse_scales("4, -4,0,.5,1e-3") == [-4, 0, 0.001, 0.5, 4]
    assert str(parse_scales("-0")) == "[0.0]"
    for text, why in (
        ("", "'' is no number"),
        ("1,", "'' is no number"),
        ("1,nan", "'nan' is no number"),
        ("-inf", "'-inf' is no number"),
        ("1;2", "'1;2' is no number"),
        ("2,2.0", "names 2 twice"),
        ("0,-0", "names 0 twice"),
    ):
        with pytest.raises(SelectionError, match=why):
            parse_scales(text)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--scale", "1", "--benchmark", "demo"], "does not say where its vector belongs"),
        (["--site", "resid_post", "--scale", "1", "--benchmark", "demo"], "in which layer"),
        (["--site", "resid_past", "--layer", "1", "--scale", "1", "--benchmark", "demo"], "resid_post"),
        (["--site", "resid_post", "--layer", "9", "--scale", "1", "--benchmark", "demo"], "no layer 9"),
        (["--site", "layer_1", "--scale", "nan", "--benchmark", "demo"], "'nan' is no number"),
        (["--site", "layer_1", "--scale", "", "--benchmark", "demo"], "'' is no number"),
        (["--site", "layer_1", "--scale", "1"], "nothing is asked"),
        (["--site", "layer_1", "--scale", "1", "--limit", "2"], "--limit was given, but it is of a --benchmark"),
        (["--site", "layer_1", "--scale", "1", "--benchmark", "demo", "--temperature", "1"], "--temperature was given, but"),
        (["--site", "layer_1", "--scale", "1", "--benchmark", "demo", "--positions", "middle"], "middle"),
        (["--site", "layer_1", "--scale", "1", "--benchmark", "demmo"], "demo"),
        (["--site", "layer_1", "--scale", "1", "--category", "joy"], "add --profile"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_before_the_model_loads(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.setattr("AutomaticEval.models.loading.load_model", lambda *_, **__: pytest.fail("the model loads"))
    done = within("steer", "--direction", str(asked / "v.npy"), *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert told in " ".join(done.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_a_direction_of_another_model_is_told(demo: LoadedModel, tmp_path: Path) -> None:
    hand = {"models": [{"name": "gpt2", "hash": "ab" * 16}]}
    Direction(VECTOR, "layer_1", made_from=hand).save(tmp_path / "other.safetensors")
    Direction(VECTOR[:100], "layer_1").save(tmp_path / "narrow.safetensors")
    Direction(VECTOR, "layer_9").save(tmp_path / "high.safetensors")
    Direction(VECTOR, "resid_mid", 1).save(tmp_path / "mid.safetensors")
    ask = ("--scale", "1", "--benchmark", "demo_facts", "--limit", "2")
    for name, told in (
        ("narrow", "has 100 numbers, and layer_1 of demo has 128"),
        ("high", "it has 4 layers"),
        ("mid", "cannot be edited"),
    ):
        done = within("steer", "--direction", f"{name}.safetensors", *ask, cwd=tmp_path)
        assert done.returncode == 2
        assert told in " ".join(done.stderr.split())
    with pytest.warns(UserWarning, match="was made with gpt2, and is added to demo of other weights"):
        steer(tmp_path, "--direction", "other.safetensors", *ask)
    for n, said in enumerate(("gpt2", [3], [{"name": 3}], [{"name": "demo", "hash": 3}])):
        Direction(VECTOR, "layer_1", made_from={"models": said}).save(tmp_path / f"odd{n}.safetensors")
        Steering(demo, [load_direction(tmp_path / f"odd{n}.safetensors")], Positions())


def test_wording_is_what_counting_by_hand_gives() -> None:
    texts = ["The cat, the CAT!", "no no no no", "", "one two three four"]
    found = {metric.name: metric.of(texts) for metric in wording()}
    assert found["words"] == [4, 4, 0, 4]
    np.testing.assert_equal(found["different words"], [0.5, 0.25, np.nan, 1])
    np.testing.assert_equal(found["repetition"], [0, 0.5, np.nan, 0])


def test_a_line_breaks_where_a_metric_has_no_number_and_shares_end_at_0_and_1(tmp_path: Path) -> None:
    texts = [
        {"scale": scale, "task": "a", "metric": metric, "mean": mean, "interval": interval, "n": 3}
        for metric in ("repetition", "words")
        for scale, mean, interval in ((0.0, 0.9, [0.7, 1.1]), (1.0, None, None), (2.0, 0.1, [-0.1, 0.3]))
    ]
    scores = [
        {"scale": 0.0, "task": "a", "metric": metric, "value": 0.9, "stderr": 0.2, "n": 3, "is_share": metric == "acc"}
        for metric in ("acc", "perplexity")
    ]
    empty = [{"scale": 0.0, "task": "a", "metric": "none", "mean": None, "interval": None, "n": 0}]
    units = {"repetition": "share of phrases", "words": "words an answer", "none": "nothing"}
    panels = {panel.title: panel.lines["a"] for panel in _panels(scores, texts + empty, units)}
    assert list(panels) == ["acc", "perplexity", "repetition", "words"]
    assert [each.value for each in panels["repetition"]] == [0.9, pytest.approx(np.nan, nan_ok=True), 0.1]
    ends = {title: (points[0].high, points[-1].low) for title, points in panels.items()}
    assert (ends["repetition"], ends["words"]) == ((1.0, 0.0), (1.1, -0.1))
    assert (ends["acc"][0], ends["perplexity"][0]) == (1.0, pytest.approx(0.9 + 1.96 * 0.2))
    by_scale(scores, texts + empty, units, "demo", tmp_path / "f.png")


@pytest.mark.parametrize("scales", [[0.0], [4.0, 8.0], [n / 7 for n in range(-15, 15)]])
@pytest.mark.parametrize("n_tasks", [0, 1, 57])
def test_figures_hold_any_number_of_scales_and_tasks(tmp_path: Path, scales: list[float], n_tasks: int) -> None:
    tasks = [f"a_group_of_tasks_with_a_very_long_name_that_goes_on_subject_{n}" for n in range(n_tasks)]
    rows = [
        {
            "scale": scale,
            "task": task,
            "metric": "acc",
            "value": 0.5 + 0.01 * number * scale,
            "stderr": 0.05,
            "n": 10 + number,
        }
        for scale in scales
        for number, task in enumerate(tasks)
    ]
    texts = [
        {"scale": scale, "task": "prompts", "metric": "words", "mean": scale, "interval": None, "n": 3}
        for scale in scales
    ]
    by_scale(rows, texts, {"words": "words an answer"}, "demo, v.npy added at layer_1", tmp_path / "f.png")
    header = (tmp_path / "f.png").read_bytes()[:24]
    width, height = (int.from_bytes(header[at : at + 4], "big") for at in (16, 20))
    assert width < 3000
    assert height < 2000


def test_a_folder_of_other_keywords_or_of_another_task_is_refused(tmp_path: Path) -> None:
    """What is there was measured with the keywords and the documents of then; both are in the settings that a folder is compared by."""
    Direction(VECTOR, "layer_2").save(tmp_path / "d.safetensors")
    (tmp_path / "p.jsonl").write_text(
        '{"category": "anger", "text": "Go away."}\n{"category": "neutral", "text": "The bus."}\n'
    )
    (tmp_path / "docs.jsonl").write_text('{"q": "What is red?", "a": ["red", "blue"]}\n')
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/docs.jsonl\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_target: 0\ndoc_to_choice: "{{a}}"\nmetric_list:\n  - metric: acc\n'
    )

    def asked(keyword: str, scale: str, *more: str) -> Any:
        profile = (
            'prompts = "p.jsonl"\nneutral = "neutral"\nmodels = ["demo"]\n[keywords]\nanger = ["' + keyword + '"]\n'
        )
        (tmp_path / "own.toml").write_text(profile)
        (tmp_path / "results" / "steer.json").unlink(missing_ok=True)
        (tmp_path / "results" / "steering.png").unlink(missing_ok=True)
        given = (
            "--direction",
            "d.safetensors",
            "--profile",
            "own.toml",
            "--category",
            "anger",
            "--max_new_tokens",
            "2",
        )
        return within(
            "steer", *given, "--benchmark", "own", "--include_path", ".", "--scale", scale, *more, cwd=tmp_path
        )

    done = asked("away", "0")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "results" / "steer.json").read_text())
    assert written["settings"]["profile"] == "own.toml"
    for change in (
        lambda: "flag",
        lambda: (tmp_path / "docs.jsonl").write_text('{"q": "What is blue?", "a": ["red", "blue"]}\n') and "away",
    ):
        refused = asked(change(), "0,1")
        assert (refused.returncode, "OtherSettings" in refused.stderr) == (2, True), refused.stdout
