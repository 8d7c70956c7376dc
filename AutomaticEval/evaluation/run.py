"""A benchmark run: load the tasks, draw the questions, evaluate through lm-eval, join each sample to its score.

Scores are lm-eval's. With a selection, every request's activations are in one folder when the run is over.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from AutomaticEval import __version__
from AutomaticEval.capture.generation import bytes_per_row
from AutomaticEval.errors import (
    BenchmarkError,
    BenchmarkUnavailable,
    CaptureError,
    DiskFull,
    StoreError,
    UnknownBenchmark,
    did_you_mean,
)
from AutomaticEval.evaluation.lm import CapturingHFLM
from AutomaticEval.models.loading import LoadedModel
from AutomaticEval.selection import Positions, Selection
from AutomaticEval.store.writer import RunWriter, ensure_space, prepare_folder, size_text

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
        if not (self.batch_size == "auto" or (str(self.batch_size).isdigit() and int(self.batch_size) > 0)):
            raise BenchmarkError(f"--batch_size is {self.batch_size!r}; write a number or auto.")


class Score(NamedTuple):
    """One line of the results."""

    task: str
    metric: str
    value: float
    stderr: float | None
    chance: float | None
    answered: int
    total: int


@dataclass
class Outcome:
    """What a run gave."""

    scores: list[Score]
    results: dict[str, Any]
    """lm-eval's results, as simple_evaluate returns them, without the samples."""

    samples: dict[str, list[dict[str, Any]]] = field(repr=False)
    """lm-eval's logged samples, by task."""

    folder: Path | None = None
    """The run folder, when activations were captured."""

    n_samples: int = 0
    size_bytes: int = 0
    results_file: Path | None = None


@dataclass
class _Loaded:
    """Loaded tasks, cut down to the drawn documents."""

    top: list[Task | Group]
    tasks: dict[str, Task]
    drawn: dict[str, list[int]] | None
    """Task -> its drawn documents, sorted; None: all of them."""

    totals: dict[str, int]


def run_benchmark(
    loaded: LoadedModel,
    benchmark: Benchmark,
    selection: Selection | None = None,
    *,
    save_dir: Path = Path("activations"),
    output_path: Path | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Evaluate a model on a benchmark; with a selection, capture it into a run folder in save_dir.

    output_path: folder for lm-eval's own results and samples files; None puts them into the run folder.
    Raises BenchmarkError, DiskFull before the first forward; CaptureError, StoreError during the run, whose
    sealed shards then stay readable.
    """
    found = load_tasks(benchmark)
    if output_path is not None:
        prepare_folder(output_path)
    if selection is None:
        lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=benchmark.batch_size)
        outcome = _evaluate(lm, loaded, benchmark, found)
    else:
        outcome = _captured(loaded, benchmark, found, selection, save_dir, announce)
    target = output_path or outcome.folder
    if target is not None:
        outcome.results_file = _save_results(outcome, loaded, benchmark, target)
    return outcome


def _captured(
    loaded: LoadedModel,
    benchmark: Benchmark,
    found: _Loaded,
    selection: Selection,
    save_dir: Path,
    announce: Callable[[str], None],
) -> Outcome:
    _refuse_rolling(found)
    size = forecast(loaded, benchmark, found, selection)
    announce(f"Activations: at most {size_text(size)} expected in {save_dir}")
    ensure_space(save_dir, size)
    folder = _run_folder(save_dir, benchmark, loaded.name)
    writer = RunWriter(folder, loaded.name, _settings(loaded, benchmark, selection))
    lm = CapturingHFLM(loaded, selection, writer.add, doc_ids=found.drawn, batch_size=benchmark.batch_size)
    try:
        outcome = _evaluate(lm, loaded, benchmark, found)
        writer.seal()
        writer.finish(join(writer.records, outcome.samples))
    except DiskFull as full:
        full.exit_code = 1  # the run had begun
        raise
    except BaseException:
        writer.seal()  # what was captured so far is kept
        raise
    outcome.folder, outcome.n_samples, outcome.size_bytes = folder, len(writer.records), writer.size_bytes
    return outcome


def load_tasks(benchmark: Benchmark) -> _Loaded:
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
        found = manager.load(list(benchmark.names))
        totals = {name: len(task.eval_docs) for name, task in found["tasks"].items()}
    except (ConnectionError, FileNotFoundError, OSError) as failure:
        raise BenchmarkUnavailable(
            f"the data of {', '.join(benchmark.names)} cannot be had ({str(failure).splitlines()[0]}); connect once to "
            "download them, or use a task on local files with --include_path."
        ) from failure
    children = {id(task) for group in found["groups"].values() for task in group}
    top: list[Task | Group] = [*found["groups"].values(), *found["tasks"].values()]
    top = [item for item in top if id(item) not in children]
    drawn = _draw(benchmark, totals)
    if drawn is not None:
        top = [kept for kept in (_prune(item, drawn) for item in top) if kept is not None]
    tasks = {name: task for name, task in found["tasks"].items() if drawn is None or name in drawn}
    return _Loaded(top, tasks, drawn, totals)


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


def _refuse_rolling(found: _Loaded) -> None:
    for name, task in found.tasks.items():
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise BenchmarkError(
                f"the task {name!r} scores whole texts (loglikelihood_rolling), which is not captured; run it without "
                "--capture_activations."
            )


def forecast(loaded: LoadedModel, benchmark: Benchmark, found: _Loaded, selection: Selection) -> int:
    """The most bytes that the run is expected to write, from the first FORECAST_DOCS documents of each task."""
    row = bytes_per_row(loaded, selection)
    lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer)
    total = 0.0
    for name, task in found.tasks.items():
        docs = _documents(task, found, benchmark, name)
        trial = docs[:FORECAST_DOCS]
        rows = [_rows_of(lm, task, doc, benchmark.num_fewshot, selection.positions) for doc in trial]
        total += sum(rows) / len(rows) * len(docs) * task.config.repeats
    return round(total * row)


def _documents(task: Task, found: _Loaded, benchmark: Benchmark, name: str) -> list[Any]:
    docs = list(task.eval_docs)
    if found.drawn is not None:
        return [docs[index] for index in found.drawn[name]]
    if benchmark.limit is None:
        return docs
    return docs[: round(len(docs) * benchmark.limit) if benchmark.limit < 1 else int(benchmark.limit)] or docs[:1]


def _rows_of(lm: HFLM, task: Task, doc: Any, num_fewshot: int | None, positions: Positions) -> int:
    """The rows that one document will give, at most."""
    own = task.config.num_fewshot
    shots = own or 0 if num_fewshot is None or own == 0 else num_fewshot
    made = task.construct_requests(doc=doc, ctx=task.fewshot_context(doc, shots), metadata=(None, 0, 1))
    kept: dict[tuple[int, ...], set[int]] = {}
    for request in made if isinstance(made, list) else [made]:
        if request.request_type == "generate_until":
            new = request.args[1].get("max_gen_toks", lm.max_gen_toks)
            prompt = lm.tok_encode(request.args[0])[-(lm.max_length - new) :]
            kept[()] = set(positions.resolve(len(prompt), new))
        else:
            context, continuation = lm._encode_pair(*request.args)
            whole = (context + continuation)[-(lm.max_length + 1) :]
            own_positions = positions.resolve(len(whole) - len(continuation), len(continuation))
            kept.setdefault(tuple(whole[:-1]), set()).update(own_positions)  # one row serves equal inputs
    return sum(map(len, kept.values()))


def _evaluate(lm: HFLM, loaded: LoadedModel, benchmark: Benchmark, found: _Loaded) -> Outcome:
    seeds = {}
    if benchmark.seed is not None:
        names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        seeds = dict.fromkeys(names, benchmark.seed)
    results = simple_evaluate(
        model=lm,
        model_args={"pretrained": loaded.name},
        tasks=list(found.top),
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=benchmark.num_fewshot,
        limit=benchmark.limit,
        samples=found.drawn,
        batch_size=benchmark.batch_size,
        **seeds,
    )
    assert results is not None  # rank 0
    samples = results.pop("samples")
    return Outcome(_scores(results, samples, found.totals), results, samples)


def join(
    records: Sequence[Mapping[str, Any]], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Each captured sample with what lm-eval logged for its request, in the order of (task, doc, choice, repeat).

    Raises CaptureError when a request was captured twice or not at all, or when its text is not what was logged.
    """
    captured = {(r["task"], r["doc_id"], r["choice"], r["repeat"]): r for r in records}
    if len(captured) != len(records):
        raise CaptureError(f"{len(records)} samples were captured for {len(captured)} requests.")
    joined = []
    for task, logged in samples.items():
        for doc_id in sorted({entry["doc_id"] for entry in logged}):
            entries = [entry for entry in logged if entry["doc_id"] == doc_id]
            verdict = _verdict(entries)
            for choice, repeats in enumerate(entries[0]["resps"]):
                for repeat, response in enumerate(repeats):
                    record = captured.pop((task, doc_id, choice, repeat), None)
                    if record is None:
                        raise CaptureError(
                            f"no activations for {task} document {doc_id} choice {choice} repeat {repeat}."
                        )
                    joined.append({**record, **verdict, **_response(record, entries[0]["arguments"][choice], response)})
    if captured:
        raise CaptureError(f"{len(captured)} captured samples have no logged request, first {next(iter(captured))}.")
    return joined


def _response(record: Mapping[str, Any], arguments: Sequence[Any], response: Any) -> dict[str, Any]:
    """The score of one request, after checking that the captured text is the logged one."""
    if record["prompt"] != arguments[0]:
        raise CaptureError(f"{record['task']} document {record['doc_id']}: the captured prompt is not the logged one.")
    if isinstance(response, str):
        if response != record["response"]:
            raise CaptureError(
                f"{record['task']} document {record['doc_id']}: captured {record['response']!r}, logged {response!r}."
            )
        return {"logprob": None, "is_greedy": None}
    if record["response"] != arguments[1]:
        raise CaptureError(f"{record['task']} document {record['doc_id']}: the captured choice is not the logged one.")
    logprob, is_greedy = response
    return {"logprob": float(logprob), "is_greedy": bool(is_greedy)}


def _verdict(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What lm-eval said of one document, over all its filters; `correct` is the first filter's first metric."""
    metrics = {entry["filter"]: {name: entry[name] for name in entry["metrics"]} for entry in entries}
    first = entries[0]
    main = first[first["metrics"][0]] if first["metrics"] else None
    answers = first["filtered_resps"]
    scored = all(isinstance(answer, tuple | list) and len(answer) == 2 for answer in answers)
    prediction = max(range(len(answers)), key=lambda i: answers[i][0]) if scored else answers[0]
    return {
        "target": first["target"],
        "prediction": prediction,
        "metrics": metrics,
        "correct": bool(main) if isinstance(main, int | float) and main in (0, 1) else None,
        "prompt_hash": first["prompt_hash"],
    }


def _scores(
    results: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]], totals: Mapping[str, int]
) -> list[Score]:
    scores = []
    for task, logged in samples.items():
        answered = len({entry["doc_id"] for entry in logged})
        for name, value in results["results"][task].items():
            metric, _, filtered = name.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = results["results"][task].get(f"{metric}_stderr,{filtered}")
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            error = stderr if isinstance(stderr, float) else None
            scores.append(Score(task, shown, float(value), error, _chance(metric, logged), answered, totals[task]))
    if len(samples) > 1:
        scores.append(_overall(samples, totals))
    return scores


def _chance(metric: str, logged: Sequence[Mapping[str, Any]]) -> float | None:
    """Accuracy of guessing among the choices."""
    n_choices = [len(entry["arguments"]) for entry in logged]
    if not metric.startswith("acc") or min(n_choices, default=0) < 2:
        return None
    return sum(1 / n for n in n_choices) / len(n_choices)


def _overall(samples: Mapping[str, Sequence[Mapping[str, Any]]], totals: Mapping[str, int]) -> Score:
    """The share of all questions that were answered right, whatever their task."""
    verdicts = []
    for logged in samples.values():
        first = logged[0]["filter"]
        verdicts += [_verdict([entry])["correct"] for entry in logged if entry["filter"] == first]
    known = [verdict for verdict in verdicts if verdict is not None]
    share = sum(known) / len(known) if known else float("nan")
    return Score("all questions", "correct", share, None, None, len(verdicts), sum(totals.values()))


def _settings(loaded: LoadedModel, benchmark: Benchmark, selection: Selection) -> dict[str, Any]:
    from lm_eval import __version__ as lm_eval_version

    numbers = loaded.numbers()
    versions = {**numbers["versions"], "lm_eval": lm_eval_version, "AutomaticEval": __version__}
    return {**numbers, "versions": versions, **selection.as_dict(), "benchmark": asdict(benchmark)}


def _run_folder(save_dir: Path, benchmark: Benchmark, model: str) -> Path:
    """A new folder `<benchmark>_<model>_<timestamp>`."""
    prepare_folder(save_dir)
    parts = ("-".join(benchmark.names)[:60], Path(model).name[:60], f"{datetime.now():%Y%m%d_%H%M%S}")
    stem = "_".join(re.sub(r"[^\w.-]+", "-", part) for part in parts)
    number = 1
    while True:
        folder = save_dir / (stem if number == 1 else f"{stem}_{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def _save_results(outcome: Outcome, loaded: LoadedModel, benchmark: Benchmark, folder: Path) -> Path:
    """lm-eval's own `results_*.json` and `samples_*.jsonl`. lm-eval only warns when it cannot write; this raises."""
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.log_experiment_args(
        model_source="hf",
        model_args=f"pretrained={loaded.name}",
        system_instruction=None,
        chat_template=None,
        fewshot_as_multiturn=False,
    )
    samples = json.loads(json.dumps(outcome.samples, default=str))  # saving changes them
    tracker.save_results_aggregated(results=dict(outcome.results), samples=samples)
    for task in samples:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    written = sorted(folder.rglob(f"results_{getattr(tracker, 'date_id', '')}*.json"))
    if not written:
        raise StoreError(f"lm-eval could not write its results into {folder}; the scores were printed nowhere else.")
    return written[-1]
