"""Which questions a benchmark asks: its tasks loaded, the questions drawn, and what capturing them would write."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from AutomaticEval.capture.generation import bytes_per_row
from AutomaticEval.errors import (
    BenchmarkError,
    BenchmarkUnavailable,
    SelectionError,
    UnknownBenchmark,
    did_you_mean,
    first_line,
)
from AutomaticEval.models.loading import LoadedModel
from AutomaticEval.selection import Positions, Selection

BUNDLED = Path(__file__).parent / "tasks" / "demo"
BUNDLED_NAMES = ("demo", "demo_facts", "demo_arithmetic")
FORECAST_DOCS = 16
"""Documents of each task that the forecast of the size is made from."""


@dataclass(frozen=True)
class Benchmark:
    """Which questions are asked, and how."""

    names: tuple[str, ...]
    """Tasks or groups that lm-eval knows, or the bundled demo."""

    num_trials: int | None = None
    """Questions drawn over the whole benchmark; None asks all."""

    limit: float | None = None
    """lm-eval's own limit: the first so many documents of each task (below 1: that share)."""

    num_fewshot: int | None = None
    """Examples before each question; None leaves it to the task."""

    seed: int | None = None
    """Of the draw, and of lm-eval's random numbers; None keeps lm-eval's own seeds and draws with 0."""

    batch_size: int | str = 8
    """A number, or auto."""

    include_path: tuple[str, ...] = ()
    """Folders with task YAML files of your own."""

    def __post_init__(self) -> None:
        if self.num_trials is not None and self.limit is not None:
            raise BenchmarkError("--num_trials and --limit were both given; choose one.")
        if self.num_trials is not None and self.num_trials < 1:
            raise BenchmarkError(f"--num_trials is {self.num_trials}; at least 1 is needed.")
        if self.limit is not None and self.limit <= 0:
            raise BenchmarkError(f"--limit is {self.limit}; it must be above 0.")
        for folder in self.include_path:
            if not Path(folder).is_dir():
                raise BenchmarkError(
                    f"--include_path {folder} is no folder; give the folder that holds your YAML files."
                )
        if not self.names:
            raise BenchmarkError("no benchmark was named; write for example demo or mmlu,gsm8k.")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise BenchmarkError(f"--seed is {self.seed}; it must be from 0 to {2**32 - 1}.")
        if not (self.batch_size == "auto" or (str(self.batch_size).isdecimal() and int(self.batch_size) > 0)):
            raise BenchmarkError(f"--batch_size is {self.batch_size!r}; write a number or auto.")


@dataclass
class LoadedTasks:
    """Loaded tasks, cut down to the drawn documents."""

    top: list[Task | Group]
    tasks: dict[str, Task]
    drawn: dict[str, list[int]] | None
    """Task -> its drawn documents, sorted; None: all of them."""

    totals: dict[str, int]
    """Task or group -> the number of its documents, drawn or not."""

    n_questions: int
    """Documents of the whole benchmark."""


def load_tasks(benchmark: Benchmark) -> LoadedTasks:
    """The benchmark's tasks, with the questions drawn. Raises UnknownBenchmark, BenchmarkUnavailable."""
    bundled = all(name in BUNDLED_NAMES for name in benchmark.names) and not benchmark.include_path
    manager = TaskManager(include_path=[str(BUNDLED), *benchmark.include_path], include_defaults=not bundled)
    for name in benchmark.names:
        if name not in manager.all_tasks:
            raise UnknownBenchmark(
                f"lm-eval knows no task {name!r}.{did_you_mean(name, manager.all_tasks)} The bundled one is demo; "
                "--include_path adds a folder with YAML files of your own."
            )
    try:
        found = _load(manager, benchmark.names)
        totals = {name: len(task.eval_docs) for name, task in found["tasks"].items()}
    except OSError as failure:
        raise BenchmarkUnavailable(
            f"the data of {', '.join(benchmark.names)} cannot be had ({first_line(failure)}). Files named in a task "
            "start at the current folder; data of the hub need a connection once; --include_path adds tasks on local files."
        ) from failure
    children = {id(task) for group in found["groups"].values() for task in group}
    top: list[Task | Group] = [*found["groups"].values(), *found["tasks"].values()]
    top = [item for item in top if id(item) not in children]
    drawn = _draw(benchmark, totals)
    in_groups = {
        name: sum(totals[task.task_name] for task in group.get_all_tasks()) for name, group in found["groups"].items()
    }
    if drawn is not None:
        top = [kept for kept in (_prune(item, drawn) for item in top) if kept is not None]
    tasks = {name: task for name, task in found["tasks"].items() if drawn is None or name in drawn}
    return LoadedTasks(top, tasks, drawn, {**totals, **in_groups}, sum(totals.values()))


def _load(manager: TaskManager, names: tuple[str, ...]) -> dict[str, Any]:
    try:
        return dict(manager.load(list(names)))
    except ValueError as failure:
        if "Duplicate task" not in str(failure):
            raise
        raise BenchmarkError(f"{', '.join(names)}: {failure}; name each task once.") from failure


def _draw(benchmark: Benchmark, totals: Mapping[str, int]) -> dict[str, list[int]] | None:
    """num_trials questions over all documents of all tasks, or None for all of them."""
    every = [(task, doc) for task, total in totals.items() for doc in range(total)]
    if benchmark.num_trials is None:
        return None
    chosen = random.Random(benchmark.seed or 0).sample(every, min(benchmark.num_trials, len(every)))
    drawn: dict[str, list[int]] = {}
    for task, doc in sorted(chosen):  # lm-eval mislabels documents that are not in order
        drawn.setdefault(task, []).append(doc)
    return drawn


def _prune(item: Task | Group, drawn: Mapping[str, list[int]]) -> Task | Group | None:
    """A task or group without the tasks that no question was drawn from: lm-eval would run those in full."""
    if not isinstance(item, Group):
        return item if item.task_name in drawn else None
    for child in list(item):
        if _prune(child, drawn) is None:
            item.pop(child.name if isinstance(child, Group) else child.task_name)
    return item if len(item) else None


def refuse_rolling(found: LoadedTasks) -> None:
    for name, task in found.tasks.items():
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise BenchmarkError(
                f"the task {name!r} scores whole texts (loglikelihood_rolling), which is not captured; run it without "
                "--capture_activations."
            )


def forecast(loaded: LoadedModel, benchmark: Benchmark, found: LoadedTasks, selection: Selection) -> int:
    """The most bytes that the run is expected to write, from the first FORECAST_DOCS documents of each task."""
    row = bytes_per_row(loaded, selection)
    lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer)
    total = 0.0
    for name, task in found.tasks.items():
        docs = task.eval_docs
        asked = _asked(len(docs), benchmark, found.drawn, name)
        trial = [docs[index] for index in asked[:FORECAST_DOCS]]
        rows = [_rows_of(lm, task, doc, benchmark.num_fewshot, selection.positions) for doc in trial]
        total += sum(rows) / len(rows) * len(asked) * task.config.repeats
    if total == 0:
        raise SelectionError(
            f"positions={selection.positions} keep nothing of {', '.join(benchmark.names)}: choices of one token are never "
            "fed to the model. Use scored (the positions that scored them), prompt or all."
        )
    return round(total * row)


def _asked(n_docs: int, benchmark: Benchmark, drawn: Mapping[str, list[int]] | None, task: str) -> Sequence[int]:
    """The documents of a task that are asked: the drawn ones, the first so many, or all."""
    if drawn is not None:
        return drawn[task]
    if benchmark.limit is None:
        return range(n_docs)
    return range(n_docs)[: math.ceil(n_docs * benchmark.limit) if benchmark.limit < 1 else int(benchmark.limit)]


def _rows_of(lm: HFLM, task: Task, doc: Any, num_fewshot: int | None, positions: Positions) -> int:
    """The rows that one document will give, at most."""
    own = task.config.num_fewshot
    shots = own or 0 if num_fewshot is None or own == 0 else num_fewshot
    made = task.construct_requests(doc=doc, ctx=task.fewshot_context(doc, shots), metadata=(None, 0, 1))
    kept: dict[tuple[int, ...], set[int]] = {}
    requests = made if isinstance(made, list) else [made]
    if len({request.idx for request in requests}) < len(requests):
        raise BenchmarkError(
            f"the task {task.config.task!r} asks several requests of one document under the same index, so that they cannot "
            "be told apart; run it without --capture_activations."
        )
    for request in requests:
        if request.request_type == "generate_until":
            new = request.args[1].get("max_gen_toks", lm.max_gen_toks)
            prompt = lm.tok_encode(request.args[0])[-(lm.max_length - new) :]
            kept[()] = set(positions.resolve(len(prompt), new))
        else:
            # without a context lm-eval feeds one token in its place; "?" stands for it here
            context, continuation = lm._encode_pair(request.args[0] or "?", request.args[1])
            whole = (context + continuation)[-(lm.max_length + 1) :]
            own_positions = positions.resolve(len(whole) - len(continuation), len(continuation))
            kept.setdefault(tuple(whole[:-1]), set()).update(own_positions)  # one row serves equal inputs
    return sum(map(len, kept.values()))
