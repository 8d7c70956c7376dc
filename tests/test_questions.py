"""Asking questions one by one: what is asked, what is returned, what is saved and under which name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.raw_hooks import raw_residuals
from helpers.samples import assert_same_data

from AutomaticEval import (
    answer_benchmark_question,
    answer_benchmark_question_with_activations,
    load_activations,
)
from AutomaticEval.demo.world import facts
from AutomaticEval.errors import EmptyPrompt, FolderNotWritable, PromptError
from AutomaticEval.evaluation import question as questions
from AutomaticEval.evaluation.question import write_question
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

FACT = next(fact for fact in facts() if fact.seen)
LETTER = "ABCD"[FACT.answer]


def test_demo_model_chooses_the_right_letter_and_the_file_says_so(tmp_path: Path, demo: LoadedModel) -> None:
    response, answer, data = answer_benchmark_question_with_activations(
        FACT.question, "demo", activation_save_dir=tmp_path / "new", choices=FACT.choices, max_new_tokens=40
    )
    assert answer == LETTER
    assert f"FINAL ANSWER: {LETTER}" in response
    (file,) = (tmp_path / "new").iterdir()
    assert re.fullmatch(r"benchmark_activations_\d{8}_\d{6}_\d{6}_What_is_the_capital_of\.h5", file.name)
    assert_same_data(load_activations(file), data)
    assert (data["question"], data["choices"], data["extracted_answer"]) == (FACT.question, list(FACT.choices), LETTER)
    assert data["prompt"] == write_question(FACT.question, FACT.choices)
    raw = raw_residuals(demo.model, "llama", data["token_ids"].tolist())
    for key, rows in data["activations"].items():
        torch.testing.assert_close(rows, raw[key], atol=2e-5, rtol=2e-5)


def test_flag_decides_what_is_returned_and_not_the_text(tmp_path: Path) -> None:
    given: dict[str, Any] = {"choices": FACT.choices, "max_new_tokens": 40}
    plain = answer_benchmark_question(FACT.question, "demo", **given)
    with_flag = answer_benchmark_question(
        FACT.question, "demo", capture_activations=True, activation_save_dir=tmp_path, **given
    )
    assert with_flag[:2] == plain
    assert len(with_flag) == 3
    assert len(os.listdir(tmp_path)) == 1


def test_nothing_is_saved_when_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, _, data = answer_benchmark_question_with_activations(FACT.question, "demo", False, max_new_tokens=3)
    assert data["path"] is None
    assert os.listdir(tmp_path) == []


def test_unfinished_answer_is_none(tmp_path: Path) -> None:
    _, answer, data = answer_benchmark_question_with_activations(
        FACT.question, "demo", activation_save_dir=tmp_path, choices=FACT.choices, max_new_tokens=3
    )
    assert answer is None
    assert load_activations(data["path"])["extracted_answer"] is None


def test_questions_of_one_microsecond_and_of_any_script_get_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem = questions.file_stem
    from datetime import datetime

    now = datetime(2024, 9, 15, 14, 30, 22, 123456)
    monkeypatch.setattr(questions, "file_stem", lambda prefix, text: stem(prefix, text, now))
    paths = set()
    for question in ("法国的首都是哪里?", "法国的首都是哪里?", "a/b/../c?", "a/b/../c?", "???"):
        _, _, data = answer_benchmark_question_with_activations(question, "demo", True, tmp_path, max_new_tokens=2)
        assert load_activations(data["path"])["question"] == question
        paths.add(data["path"])
    assert len(paths) == 5
    assert sorted(os.listdir(tmp_path))[0].startswith("benchmark_activations_20240915_143022_123456_")


def test_question_is_written_with_lettered_choices() -> None:
    text = write_question("Who {was} it?", ["Ann", "{Bob}"])
    assert text.startswith("Question: Who {was} it?\nA. Ann\nB. {Bob}\n")
    assert "FINAL ANSWER: <letter>" in text
    assert "FINAL ANSWER: <answer>" in write_question("Who?")
    assert write_question("Who?", ["x", "y"], "{choices}{question}") == "A. x\nB. y\nWho?"


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"question": " "}, EmptyPrompt, "empty"),
        ({"question": "Who?", "choices": ["one"]}, PromptError, "2 to 26"),
        ({"question": "Who?", "choices": ["x"] * 27}, PromptError, "2 to 26"),
        ({"question": "Who?", "choices": "abc"}, PromptError, "list of texts"),
        ({"question": "Who?", "choices": {"A": "x", "B": "y"}}, PromptError, "list of texts"),
        ({"question": "Who?", "save_activations": ["x", "y"]}, PromptError, "choices="),
        ({"question": "Who?", "template": "nothing"}, PromptError, "{question}"),
        ({"question": "Who?", "template": "{question} {other}"}, PromptError, "other"),
        ({"question": "Who?", "template": "{question} {"}, PromptError, "braces"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_happens(
    given: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=re.escape(says)):
        answer_benchmark_question_with_activations(model="demo", activation_save_dir=tmp_path / "x", **given)
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderNotWritable):
        answer_benchmark_question_with_activations("Who?", "demo", activation_save_dir=tmp_path / "file")


def test_choices_may_be_numbers_and_arrays(tmp_path: Path) -> None:
    import numpy as np

    for choices in ([1, 2], np.array(["a", "b"]), ("a", "b")):
        _, _, data = answer_benchmark_question_with_activations(
            "Who?", "demo", True, tmp_path, choices=choices, max_new_tokens=2
        )
        assert load_activations(data["path"])["choices"] == [str(choice) for choice in choices]
