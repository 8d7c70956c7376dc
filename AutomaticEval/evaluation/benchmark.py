"""Which questions a benchmark asks: its tasks loaded, the questions drawn, and the requests they become."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string
from transformers import GenerationConfig

from AutomaticEval.errors import (
    BenchmarkError,
    BenchmarkUnavailable,
    UnknownBenchmark,
    did_you_mean,
    first_line,
)
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.harness.refusals import refuse_unknown_metric, refused_by
from AutomaticEval.evaluation.harness.speedups import (
    RandomStates,
    quick_templates,
    random_states,
    seed_everything,
    task_manager,
)
from AutomaticEval.evaluation.local_files import local_files, missing
from AutomaticEval.evaluation.screen import hushed
from AutomaticEval.models.checkpoint.hub_reach import go_offline_without_hub

BUNDLED = Path(__file__).parent / "tasks" / "demo"
BUNDLED_NAMES = ("demo", "demo_facts", "demo_arithmetic", "demo_capitals")
OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")


@dataclass
class LoadedTasks:
    """A benchmark's tasks, without those of which no document was drawn."""

    top: list[Task | Group]
    """The tasks and groups that are in no group; lm-eval is given these."""

    tasks: dict[str, Task]
    """Name -> task, of all groups."""

    drawn: dict[str, list[int]] | None
    """Task -> its drawn documents, sorted. None: all documents are asked."""

    totals: dict[str, int]
    """Task or group -> the number of its documents, drawn or not."""

    n_questions: int
    """Documents of the whole benchmark."""

    random_states: RandomStates
    """The random states of Python, NumPy and torch after the tasks were loaded."""


def load_tasks(benchmark: Benchmark) -> LoadedTasks:
    """The benchmark's tasks, with the questions drawn. Raises UnknownBenchmark, BenchmarkUnavailable."""
    bundled = all(name in BUNDLED_NAMES for name in benchmark.names) and not benchmark.include_path
    manager = task_manager([str(BUNDLED), *benchmark.include_path], include_defaults=not bundled)
    names = [each for name in benchmark.names for each in _known(name, manager)]
    if not bundled and benchmark.local_files is None:
        go_offline_without_hub()
    seed_everything(benchmark.seed)  # lm-eval does so before it loads: a task may shuffle its documents
    try:
        with quick_templates(), hushed(), local_files(benchmark.local_files):
            tasks, groups = _load(manager, names)
            states = random_states()
            totals = {name: len(task.eval_docs) for name, task in tasks.items()}
    except OSError as failure:
        raise BenchmarkUnavailable(_unavailable(benchmark, failure)) from failure
    for name, task in tasks.items():
        _prepare(name, task, benchmark)
    children = {id(child) for group in groups.values() for child in group}
    top: list[Task | Group] = [item for item in (*groups.values(), *tasks.values()) if id(item) not in children]
    drawn = _draw(benchmark, totals)
    in_groups = {name: sum(totals[task.task_name] for task in group.get_all_tasks()) for name, group in groups.items()}
    if drawn is not None:
        top = [kept for kept in (_prune(item, drawn) for item in top) if kept is not None]
        tasks = {name: task for name, task in tasks.items() if name in drawn}
    return LoadedTasks(top, tasks, drawn, {**totals, **in_groups}, sum(totals.values()), states)


def _known(name: str, manager: TaskManager) -> list[str]:
    """The names of the tasks that a name, a pattern such as mmlu_*, or a YAML file stands for. Raises UnknownBenchmark."""
    if name in manager.all_tasks or (Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()):
        return [name]
    matching: list[str] = fnmatch.filter(manager.all_tasks, name)
    if not matching:
        raise UnknownBenchmark(
            f"lm-eval knows no task {name!r}.{did_you_mean(name, manager.all_tasks)} The bundled one is demo; "
            "--include_path adds a folder with YAML files of your own."
        )
    return matching


def _load(manager: TaskManager, names: list[str]) -> tuple[dict[str, Task], dict[str, Group]]:
    """(tasks, groups), each by name. Raises BenchmarkError for a task that lm-eval cannot make."""
    try:
        loaded = manager.load(names)
        return loaded["tasks"], loaded["groups"]
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as failure:
        if "Duplicate task" in str(failure):
            raise BenchmarkError(f"{', '.join(names)}: {failure}; name each task once.") from failure
        made = refused_by(failure)
        if made is None:
            raise
        raise BenchmarkError(
            f"{made} cannot be made ({type(failure).__name__}: {first_line(failure)}); mend its YAML file, or leave it out."
        ) from failure


def _unavailable(benchmark: Benchmark, failure: OSError) -> str:
    return (
        f"the data of {', '.join(benchmark.names)} cannot be had ({first_line(failure)}). Two ways out: connect once, so that "
        "the hub client keeps a copy, or give the folder that holds the files with --benchmark_data. (Files named in a task of "
        "your own start at the current folder.)"
    )


def _prepare(name: str, task: Task, benchmark: Benchmark) -> None:
    """Set what a task is asked with. Raises BenchmarkError, BenchmarkUnavailable for a task that cannot be run."""
    _refuse_unserved(name, task, benchmark)
    _refuse_without_examples(task, benchmark)
    generates = task.OUTPUT_TYPE == "generate_until"
    given = _given_kwargs(benchmark)
    if generates and given:
        task.set_config(key="generation_kwargs", value=given, update=True)
    how = (task.config.generation_kwargs or {}) if generates else {}
    if benchmark.repeats is not None:
        if not how.get("do_sample"):
            raise BenchmarkError(
                f"--repeats would give the same answer again: the task {name!r} does not sample; of tasks that generate, add "
                "--gen_kwargs do_sample=true,temperature=0.7, or leave --repeats out."
            )
        task.set_config(key="repeats", value=benchmark.repeats)
    if how.get("do_sample") and not how.get("temperature"):
        raise BenchmarkError(f"the task {name!r} samples without a temperature; add --gen_kwargs temperature=0.7.")
    if generates and not how.get("do_sample") and any(given.get(each) for each in ("temperature", "top_p", "top_k")):
        raise BenchmarkError(
            f"the task {name!r} does not sample, so that {benchmark.gen_kwargs} changes nothing; add do_sample=true."
        )


def _refuse_unserved(name: str, task: Task, benchmark: Benchmark) -> None:
    """Raises BenchmarkError for a task that cannot be asked, scored, or trusted."""
    if task.OUTPUT_TYPE not in OUTPUT_TYPES or getattr(task, "MULTIMODAL", False):
        raise BenchmarkError(
            f"the task {name!r} ({task.OUTPUT_TYPE}) is none that a text model answers in one pass; tasks of the types "
            f"{', '.join(OUTPUT_TYPES)} are."
        )
    if not benchmark.predict_only:
        refuse_unknown_metric(name, task)
    if getattr(task, "UNSAFE_CODE", False) and not benchmark.confirm_run_unsafe_code:
        raise BenchmarkError(
            f"the task {name!r} runs code that the model wrote; where that is safe, add --confirm_run_unsafe_code."
        )
    if task.config.process_docs is not None and _first_docs(task) != _first_docs(task):
        raise BenchmarkError(
            f"the task {name!r} gives other documents each time it is read (its process_docs draws at random on data in memory), "
            "so that it would be asked in one form and scored in another."
        )


def _refuse_without_examples(task: Task, benchmark: Benchmark) -> None:
    """Raises BenchmarkUnavailable when files of one's own hold fewer examples than each question is to have."""
    shots = _shots(task, benchmark)
    if benchmark.local_files is not None and shots and len(list(task.fewshot_docs() or ())) < shots:
        split = task.fewshot_cfg.split or task.config.training_split or task.config.validation_split
        raise BenchmarkUnavailable(
            f"{shots} examples are needed. {missing(Path(benchmark.local_files), task, split)} Or ask with --num_fewshot 0."
        )


def _first_docs(task: Task, n_docs: int = 8) -> list[Any]:
    """The first documents of a task, read anew."""
    docs = task.eval_docs
    return [docs[number] for number in range(min(n_docs, len(docs)))]


def _given_kwargs(benchmark: Benchmark) -> dict[str, Any]:
    """gen_kwargs as a dict. Raises BenchmarkError for a name that neither lm-eval nor transformers knows."""
    given = benchmark.gen_kwargs or {}
    parsed: dict[str, Any] = simple_parse_args_string(given) if isinstance(given, str) else dict(given)
    known = {"until", "max_gen_toks", *GenerationConfig().to_dict()}
    for name in ("use_cache", "pad_token_id"):
        if name in parsed:
            raise BenchmarkError(f"--gen_kwargs {name}: lm-eval gives it to the model itself; leave it out.")
    for name in parsed:
        if name not in known:
            raise BenchmarkError(f"--gen_kwargs: nothing is called {name!r}.{did_you_mean(name, known)}")
    return parsed


def indistinct(task: str) -> str:
    """The line that says why the requests of a task cannot be told apart."""
    return (
        f"the task {task!r} asks several requests of one document under the same index, so that they cannot be told apart; run "
        "it without --capture_activations."
    )


def _shots(task: Task, benchmark: Benchmark) -> int:
    """The number of examples before each question. A task that says 0 is never given any."""
    own = task.config.num_fewshot
    return int(own or 0) if benchmark.num_fewshot is None or own == 0 else benchmark.num_fewshot


def _draw(benchmark: Benchmark, totals: Mapping[str, int]) -> dict[str, list[int]] | None:
    """Task -> its drawn documents: num_trials drawn over all documents of all tasks. None when all are asked."""
    every = [(task, doc) for task, total in totals.items() for doc in range(total)]
    if benchmark.num_trials is None:
        return None
    chosen = random.Random(benchmark.seed or 0).sample(every, min(benchmark.num_trials, len(every)))
    drawn: dict[str, list[int]] = {}
    for task, doc in sorted(chosen):  # lm-eval mixes up documents that are not in ascending order
        drawn.setdefault(task, []).append(doc)
    return drawn


def _prune(item: Task | Group, drawn: Mapping[str, list[int]]) -> Task | Group | None:
    """A task or group without the tasks of which no question was drawn, which lm-eval would run in full; None when nothing is left."""
    if not isinstance(item, Group):
        return item if item.task_name in drawn else None
    for child in list(item):
        if _prune(child, drawn) is None:
            item.pop(child.name if isinstance(child, Group) else child.task_name)
    return item if len(item) else None


def fingerprint_of(loaded: LoadedTasks, benchmark: Benchmark) -> str:
    """A hash of how the tasks are made and of the documents that are asked, 16 hex digits: it changes when a task's YAML or its data do."""
    told = hashlib.sha256()
    for name, task in sorted(loaded.tasks.items()):
        docs = task.eval_docs
        asked = [docs[number] for number in asked_docs(len(docs), benchmark, loaded.drawn, name)]
        text = json.dumps([name, task.dump_config(), asked], sort_keys=True, default=str)
        told.update(re.sub(r" at 0x[0-9a-f]+", "", text).encode())  # where functions lie in this process's memory
    return told.hexdigest()[:16]


def asked_docs(n_docs: int, benchmark: Benchmark, drawn: Mapping[str, list[int]] | None, task: str) -> Sequence[int]:
    """The documents of a task that are asked: those that were drawn, the first so many, or all."""
    if drawn is not None:
        return drawn[task]
    if benchmark.limit is None:
        return range(n_docs)
    return range(n_docs)[: math.ceil(n_docs * benchmark.limit) if benchmark.limit < 1 else int(benchmark.limit)]


def requests_of(lm: HFLM, task: Task, doc: Any, benchmark: Benchmark) -> list[Instance]:
    """The requests that lm-eval will make of one document."""
    chat = {
        "apply_chat_template": bool(benchmark.apply_chat_template),
        "chat_template": lm.apply_chat_template if benchmark.apply_chat_template else None,
    }
    context = task.fewshot_context(
        doc,
        num_fewshot=_shots(task, benchmark),
        system_instruction=benchmark.system_instruction,
        fewshot_as_multiturn=True,
        gen_prefix=task.doc_to_prefix(doc),
        **chat,
    )
    made = task.construct_requests(doc=doc, ctx=context, metadata=(None, 0, 1), **chat)
    return made if isinstance(made, list) else [made]
