"""What a person sees of lm-eval while it runs: its bars under names of ours, and none of the lines that say nothing of the run.

Everything of lm-eval that is replaced for this is replaced here, while the with lasts. Warnings that are about the run stay.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from typing import Any
from unittest.mock import patch

import lm_eval.api.metrics
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.models.huggingface
import tqdm as bars
from lm_eval.loggers.utils import get_commit_from_path
from tqdm import tqdm

BUILDING, SCORING, GENERATING = "Building prompts", "Scoring", "Generating"
NAMES = {"Running loglikelihood requests": SCORING, "Running generate_until requests": GENERATING}
"""Name of a bar of lm-eval -> ours. Its other bars are not shown."""
HUSHED = {
    "lm_eval.api.task": (
        "Custom kwargs can be passed to `--metadata`",
    ),  # of each task whose data are made by a function
    # a model that is loaded already is meant here: it is not shared out, and its other arguments are not lost
    "lm_eval.models.huggingface": ("Passed an already-initialized model", "`pretrained` model kwarg is not of type"),
}
"""Logger -> parts of the lines that it does not get to log."""


@contextmanager
def hushed() -> Iterator[None]:
    """Keep the lines of HUSHED off the log."""
    with ExitStack() as left:
        for name, parts in HUSHED.items():
            logger = logging.getLogger(name)
            keep = partial(_is_other, parts)
            logger.addFilter(keep)
            left.callback(logger.removeFilter, keep)
        yield


def _is_other(parts: Sequence[str], record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in parts)


@contextmanager
def whole_run(n_questions: int, *, shows: bool) -> Iterator[None]:
    """What `simple_evaluate` shows outside the model: one bar over the questions whose prompts are built. shows: whether there is a bar."""
    with ExitStack() as left:
        bar = left.enter_context(_shared(BUILDING, n_questions, "question", shows=shows and n_questions > 0))

        def built(docs: Iterable[Any], **_: Any) -> Iterator[Any]:
            for doc in docs:
                yield doc
                bar().update()
            if bar().n >= n_questions:
                bar().close()

        left.enter_context(patch.object(lm_eval.api.task, "tqdm", built))
        left.enter_context(patch.object(lm_eval.evaluator, "get_git_commit_hash", _commit))
        left.enter_context(patch.object(lm_eval.api.metrics, "bootstrap_stderr", _bootstrap))
        left.enter_context(hushed())
        yield


@contextmanager
def one_call() -> Iterator[None]:
    """What one call of lm-eval's model shows: one bar over its requests."""
    with ExitStack() as left:
        shown: dict[str, Callable[[], tqdm[Any]]] = {}

        def named(
            items: Any = None, *, total: int | None = None, desc: str | None = None, disable: bool = False
        ) -> Any:
            name = None if disable else NAMES.get(desc or "")
            if name is None:
                return tqdm(items, total=total, disable=True)
            if name in shown:  # lm-eval scores windows in several lists
                shown[name]().total += total or 0
                shown[name]().refresh()
            else:
                shown[name] = left.enter_context(_shared(name, total or 0, "request"))
            return _Part(shown[name]())

        for module in (lm_eval.api.model, lm_eval.models.huggingface):
            left.enter_context(patch.object(module, "tqdm", named))
        yield


class _Part:
    """A bar of lm-eval's that is a part of a bar of ours."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.update = bar.update

    def close(self) -> None:
        """The whole bar goes on."""


@contextmanager
def _shared(name: str, total: int, unit: str, *, shows: bool = True) -> Iterator[Callable[[], tqdm[Any]]]:
    """A bar that appears when it is first asked for."""
    made: list[tqdm[Any]] = []

    def bar() -> tqdm[Any]:
        if not made:
            made.append(tqdm(total=total, desc=name, unit=unit, disable=not shows))
        return made[0]

    try:
        yield bar
    finally:
        for each in made:
            each.close()


def _commit() -> str | None:
    """lm-eval's `get_git_commit_hash`, without what git says of a folder that is no repository."""
    try:
        told = subprocess.check_output(["git", "describe", "--always"], stderr=subprocess.DEVNULL)
    except (subprocess.CalledProcessError, FileNotFoundError):
        commit: str | None = get_commit_from_path(os.getcwd())  # noqa: PTH109 - as lm-eval does
        return commit
    return told.strip().decode()


_stock_bootstrap = lm_eval.api.metrics.bootstrap_stderr


def _bootstrap(*args: Any, **kwargs: Any) -> Any:
    """lm-eval's `bootstrap_stderr`, without its line and its bar."""

    def hidden(items: Any = None, **how: Any) -> Any:
        return tqdm(items, **{**how, "disable": True})

    with patch.object(bars, "tqdm", hidden), redirect_stdout(StringIO()):
        return _stock_bootstrap(*args, **kwargs)
