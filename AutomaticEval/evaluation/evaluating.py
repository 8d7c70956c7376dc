"""`evaluate` and `evaluate_with_activations`: a benchmark run in one call, for evaluation code that people already have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from AutomaticEval.errors import BenchmarkError, unknown_option
from AutomaticEval.evaluation.asked import asked_for, asked_of
from AutomaticEval.evaluation.benchmark import load_tasks
from AutomaticEval.evaluation.benchmark_options import WHY_NOT, Benchmark, BenchmarkKeywords
from AutomaticEval.evaluation.run import Outcome, run_benchmark
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.load_options import LoadKeywords, LoadOptions
from AutomaticEval.models.loading import adapter_chosen, load_model
from AutomaticEval.options import take_fields, take_options
from AutomaticEval.processes import join_ranks, own_device
from AutomaticEval.selection import Positions, Selection
from AutomaticEval.sites import LayersLike
from AutomaticEval.store.disk.overwriting import Overwrite

OF_COMMAND = {"tasks": "benchmark", "layers_to_capture": "layers"}
"""Name of an option here -> its name as an option of the command."""
PLACES = ("resume", "output", "activation_save_dir", "overwrite")


class EvaluateOptions(LoadKeywords, BenchmarkKeywords, total=False):
    """How the model is loaded, and which questions it is asked."""


class ScoresKeywords(EvaluateOptions, total=False):
    """`EvaluateOptions`, and where lm-eval's results go."""

    tokenizer: Any
    """With a loaded model: its tokenizer. With a name: another one, or the name of one."""
    output: str | Path | None
    """A folder for lm-eval's results and samples files; None writes none."""


class CaptureKeywords(EvaluateOptions, total=False):
    """`EvaluateOptions`, what is kept of every request, and where it goes."""

    tokenizer: Any
    """With a loaded model: its tokenizer. With a name: another one, or the name of one."""
    layers_to_capture: LayersLike
    sites: str | Iterable[str] | None
    positions: str | slice | Positions
    """scored by default."""
    store_dtype: str | None
    reduce: str | None
    """norm: the L2 norm of each row. mean, max: one line a sample, over its kept positions."""
    project: Any
    """A matrix [width, k] by which each row is multiplied: a file, an array, or one for each site."""
    think_tokens: str | Iterable[str] | None
    """The texts that open and close the model's thinking: "<think>,</think>". None: those of its tokenizer."""
    activation_save_dir: str | Path
    output: str | Path | None
    """The run's own folder, a new one, in place of one in activation_save_dir."""
    overwrite: Overwrite
    """True: replace the run in `output`. "version": write beside it, run-2."""
    resume: str | Path | None
    """A run folder that was cut short. The other options, as far as they are given, must be those of that run, but for compression and strict."""
    compression: str | None
    strict: bool
    """Stop once numbers are stored that are infinite or NaN; without it the run warns of them at its end."""
    output_path: str | Path | None
    """A folder for lm-eval's own results and samples files; None puts them into the run folder."""


def evaluate(model: Any, tasks: str | Sequence[str], **options: Unpack[ScoresKeywords]) -> Outcome:
    """Evaluate a model on lm-eval tasks, and capture nothing: for scores alone, such as those of a direction at ten strengths.

    model: a name, a folder, "demo", or a loaded model with tokenizer=. tasks: "mmlu,gsm8k" or a list. options: see `ScoresKeywords`.
    Returns an Outcome: `scores`, lm-eval's `results` and `samples`, and `results_file` when a folder was given.
    Raises ModelError, BenchmarkError, StoreError; TypeError for an unknown option.
    """
    _refuse_unknown(options, ScoresKeywords.__annotations__)
    given: dict[str, Any] = dict(options)
    tokenizer, output = given.pop("tokenizer", None), given.pop("output", None)
    load, benchmark = _load_of(model, given), Benchmark.parse(tasks, **given)
    loaded_tasks = load_tasks(benchmark)  # what is wrong with a task is told before a large model loads
    folder = None if output is None else Path(output).expanduser()
    with adapter_chosen(model, load) as load:
        loaded = load_model(model, tokenizer=tokenizer, options=load)
        return run_benchmark(loaded, benchmark, loaded_tasks=loaded_tasks, output_path=folder)


def evaluate_with_activations(
    model: Any = None, tasks: str | Sequence[str] | None = None, **options: Unpack[CaptureKeywords]
) -> Outcome:
    """Evaluate a model on lm-eval tasks, and keep the activations of every request, joined to its score.

    model: a name, a folder, "demo", or a loaded model with tokenizer=. tasks: "mmlu,gsm8k" or a list. options: see `CaptureKeywords`.
    `evaluate_with_activations(resume=folder)` is enough for a run whose model was given by its name: the rest is in its folder.
    Returns an Outcome: `results` and `samples` are lm-eval's, `folder` is what `open_run` reads.
    Raises SelectionError, ModelError, BenchmarkError, StoreError, CaptureError; TypeError for an unknown option.
    """
    _refuse_unknown(options, CaptureKeywords.__annotations__)
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    given |= {name: value for name, value in (("model", model), ("tasks", tasks)) if value is not None}
    if "resume" in given and (model is None or tasks is None):
        given = _of_the_run(Path(given["resume"])) | given
    asked = _asked(given)
    model, tasks = given.pop("model", None), given.pop("tasks", None)
    if model is None or tasks is None:
        raise TypeError("give a model and tasks, or resume= alone.")
    given = {"positions": "scored", **given}
    layers, tokenizer = given.pop("layers_to_capture", None), given.pop("tokenizer", None)
    results = given.pop("output_path", None)
    selection = Selection.parse(layers=layers, **take_options(given, Selection))
    load = _load_of(model, given)
    output = replace(RunOutput.parse(**take_options(given, RunOutput)), asked=asked)
    benchmark = Benchmark.parse(tasks, **given)
    output.refuse_before_loading(makes_folder=join_ranks().is_first)
    loaded_tasks = load_tasks(benchmark)  # what is wrong with a task is told before a large model loads
    with adapter_chosen(model, load) as load:
        return run_benchmark(
            load_model(model, tokenizer=tokenizer, options=load),
            benchmark,
            selection,
            loaded_tasks=loaded_tasks,
            output=output,
            output_path=None if results is None else Path(results),
        )


def _asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is asked for, by the names of the command's options; {} when the command could not be asked so."""
    tasks = given.get("tasks", ())
    joined = {**given, "tasks": tasks if isinstance(tasks, str) else ",".join(map(str, tasks))}
    asked = asked_for({OF_COMMAND.get(name, name): value for name, value in joined.items() if name not in PLACES})
    return {**asked, "capture_activations": True} if asked else {}


def _of_the_run(folder: Path) -> dict[str, Any]:
    """What an unfinished run was asked for, by the names here. Raises StoreError."""
    here = {theirs: ours for ours, theirs in OF_COMMAND.items()}
    asked = {here.get(name, name): value for name, value in asked_of(folder).items()}
    return {
        name: value for name, value in asked.items() if name in {"model", "tasks", *CaptureKeywords.__annotations__}
    }


def _load_of(model: Any, given: dict[str, Any]) -> LoadOptions:
    """How the model is loaded, from the options of a call, out of which it is taken. Each of several processes has a device of its own."""
    if isinstance(model, str | Path):
        given["device"] = own_device(given.get("device", "auto"))
    return LoadOptions(**take_fields(given, LoadOptions))


def _refuse_unknown(options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raises TypeError for an unknown option, BenchmarkError for one of lm-eval's that cannot be served."""
    for name in options:
        if name in WHY_NOT:
            raise BenchmarkError(f"{name}: {WHY_NOT[name]}")
        if name not in known:
            raise unknown_option(name, known)
