"""What a person sees of lm-eval while it runs: a bar for each step, and nothing that is not about the run."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from helpers.tasks import MIXED
from lm_eval import simple_evaluate

from AutomaticEval import HFActivations, evaluate_with_activations
from AutomaticEval.evaluation.screen import hushed
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

NOISE = (
    "Custom kwargs",
    "already-initialized",
    "not of type",
    "fatal:",
    "bootstrapping",
    "Tokenizing inputs",
    "Running ",
)


@pytest.mark.parametrize("scoring", ["tree", "stock"])
def test_each_step_has_one_bar_with_its_name(
    scoring: str,
    demo: LoadedModel,
    own_tasks: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tasks of every type, one of which lm-eval bootstraps; in a folder that is no git repository."""
    monkeypatch.chdir(tmp_path)
    names = (*MIXED, "demo")
    evaluate_with_activations(demo, names, include_path=own_tasks, limit=3, scoring=scoring)
    said = "".join([*capfd.readouterr(), caplog.text])
    drawn = re.split(r"[\r\n]+", said)
    bars = [line.strip() for line in drawn if "%|" in line]
    assert not [line for line in bars if re.match(r"\d+%", line)]
    begun = [line.partition(":")[0] for line in bars if re.search(r":\s+0%\|", line)]
    assert begun.count("Building prompts") == 1
    assert begun.count("Generating") == 1
    assert 1 <= begun.count("Scoring") <= 2  # of continuations, and of whole texts
    assert set(begun) == {"Building prompts", "Scoring", "Generating"}
    assert not [noise for noise in NOISE if noise in said]


def test_only_these_lines_are_kept_off_the_log(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lm_eval.api.task")
    caplog.set_level(logging.WARNING, "lm_eval")  # a command that ran before has set ERROR
    level = logger.level
    with hushed():
        logger.warning("t: Custom kwargs can be passed to `--metadata` in console")
        logger.warning("t: no metric was given")
        logging.getLogger("mine").warning("Custom kwargs can be passed to `--metadata`")
    logger.warning("t: Custom kwargs can be passed to `--metadata` again")
    assert [each.getMessage().split(" in ")[0] for each in caplog.records] == [
        "t: no metric was given",
        "Custom kwargs can be passed to `--metadata`",
        "t: Custom kwargs can be passed to `--metadata` again",
    ]
    assert (logger.level, logger.filters) == (level, [])


def test_code_that_calls_lm_eval_itself_sees_the_names_too(
    demo: LoadedModel,
    own_tasks: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from lm_eval.tasks import TaskManager

    lm = HFActivations(demo.model, tokenizer=demo.tokenizer, activation_save_dir=tmp_path)
    manager = TaskManager(include_path=own_tasks, include_defaults=False)
    lm.finish(simple_evaluate(model=lm, tasks=[MIXED[0]], task_manager=manager, limit=2, bootstrap_iters=0))
    said = capfd.readouterr().err + caplog.text
    assert not [noise for noise in ("already-initialized", "not of type", "Tokenizing", "Running ") if noise in said]
