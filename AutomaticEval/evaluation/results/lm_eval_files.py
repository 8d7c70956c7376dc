"""lm-eval's own `results_*.json` and `samples_*.jsonl`, written by lm-eval: either all of them are there and whole, or it is an error.

lm-eval itself catches what goes wrong when it writes, and only warns.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker, evaluation_tracker

from AutomaticEval.errors import DiskFull, StoreError
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.public_names import public_name
from AutomaticEval.store.disk.file_names import own_name
from AutomaticEval.store.disk.json_text import as_json
from AutomaticEval.store.disk.read_back import read_back
from AutomaticEval.store.disk.system import FULL
from AutomaticEval.store.disk.whole_files import new_files

MODEL_BYTES, TASK_BYTES = 220, 180
"""The most bytes of a file's name that the name of a model, and of a task, may take."""


CHANGES_SCORES = ("edits", "loaded_with", "adapters", "quantization")
"""Settings that lm-eval's results hold, too, in `config`: with another of them, the same model has other scores."""


def save_results(
    results: Mapping[str, Any],
    samples: Mapping[str, list[dict[str, Any]]],
    loaded: LoadedModel,
    benchmark: Benchmark,
    folder: Path,
) -> Path:
    """Write results and samples into `<folder>/<model>/`. Returns the path of the results.

    Raises StoreError or DiskFull, which name the files; then none of the files is there.
    """
    with new_files(folder, "lm-eval") as made:
        tracker = EvaluationTracker(output_path=str(made))
        tracker.general_config_tracker.log_experiment_args(
            model_source="hf",
            model_args=f"pretrained={short_name(loaded.name)}",
            system_instruction=benchmark.system_instruction,
            chat_template=loaded.tokenizer.chat_template if benchmark.apply_chat_template else None,
            fewshot_as_multiturn=True,
        )
        by_file = {own_name(task, TASK_BYTES): json.loads(as_json(logged)) for task, logged in samples.items()}
        with _listening() as heard:
            tracker.save_results_aggregated(results=_named(results, loaded), samples=dict(samples))
            date = getattr(tracker, "date_id", "")
            for name, logged in by_file.items():
                tracker.save_results_samples(task_name=name, samples=logged)
        inside = Path(str(tracker.general_config_tracker.model_name_sanitized))
        expected: dict[Path, int | None] = {inside / f"results_{date}.json": None}
        expected |= {inside / f"samples_{name}_{date}.jsonl": len(logged) for name, logged in by_file.items()}
        _refuse_broken([file for file, n in expected.items() if not _is_whole(made / file, n)], folder, heard)
    return folder / next(iter(expected))


def _named(results: Mapping[str, Any], loaded: LoadedModel) -> dict[str, Any]:
    """Results with names in the place of paths: of the model, and of the tasks' files. Beside the model stands what makes its scores others: edits, adapters."""
    numbers = loaded.numbers().as_dict()
    changed = {name: numbers[name] for name in CHANGES_SCORES if numbers.get(name)}
    named = {**results, "config": {**results.get("config", {}), "model": loaded.name, **changed}}
    return named | {"configs": _without_places(results.get("configs", {}))}


def _without_places(value: Any) -> Any:
    """A value with the last name of each path that exists here. A prompt that begins with / is no such path, and stays."""
    if isinstance(value, Mapping):
        return {name: _without_places(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(each) for each in value]
    is_place = isinstance(value, str | Path) and os.path.isabs(value) and os.path.exists(value)  # noqa: PTH110, PTH117
    return public_name(value) if is_place else value


def short_name(model: str) -> str:
    """A model's name, short enough for lm-eval to name a folder by it."""
    return "/".join(own_name(part, MODEL_BYTES // 2) for part in model.split("/", 1))


def _is_whole(file: Path, n_lines: int | None) -> bool:
    """Whether a file can be read back, with as many lines as are expected; None expects any number."""
    try:
        read_back(file)
        if n_lines is None:
            return True
        with file.open(encoding="utf-8") as lines:
            return sum(1 for _ in lines) == n_lines
    except (OSError, StoreError):
        return False


def _refuse_broken(files: list[Path], folder: Path, heard: list[str]) -> None:
    """Raises StoreError or DiskFull when there are broken files. heard: what lm-eval logged."""
    if not files:
        return
    why = heard[-1] if heard else "it did not say why"
    code = re.match(r"\w*Error\((\d+),", why)
    named = ", ".join(str(folder / file) for file in files)
    if code and int(code[1]) in FULL:
        raise DiskFull(f"the disk is full: lm-eval could not write {named}, and nothing of them was left behind.")
    raise StoreError(f"lm-eval could not write {named} ({why}), and nothing of them was left behind.")


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Collect what lm-eval logs about the failures that it catches."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if re.match(r"\w+\(", record.getMessage()):  # the repr of an exception
                heard.append(record.getMessage())

    logger, listener = evaluation_tracker.eval_logger, Listener()
    level, spreads = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield heard
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = spreads
