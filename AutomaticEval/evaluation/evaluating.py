"""`evaluate_with_activations`: a benchmark run in one call, for evaluation code that people already have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Unpack

from AutomaticEval.errors import BenchmarkError, unknown_option
from AutomaticEval.evaluation.benchmark import load_tasks
from AutomaticEval.evaluation.benchmark_options import WHY_NOT, Benchmark
from AutomaticEval.evaluation.run import Outcome, run_benchmark
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.load_options import LoadKeywords, LoadOptions
from AutomaticEval.models.loading import load_model
from AutomaticEval.processes import own_device
from AutomaticEval.selection import Positions, Selection
from AutomaticEval.sites import LayersLike


class EvaluateOptions(LoadKeywords, total=False):
    """Keyword options of `evaluate_with_activations`: lm-eval's own, and those of loading the model."""

    num_trials: int | None
    """How many questions are drawn over the whole benchmark."""
    limit: float | None
    num_fewshot: int | None
    seed: int | None
    batch_size: int | str
    scoring: str
    """tree scores over the prefix tree of all requests, stock in lm-eval's own batches."""
    include_path: str | Path | Iterable[str | Path]
    benchmark_data: str | Path | None
    """A folder with the tasks' data."""
    apply_chat_template: bool | str
    system_instruction: str | None
    gen_kwargs: str | dict[str, Any] | None
    repeats: int | None
    predict_only: bool
    confirm_run_unsafe_code: bool


def evaluate_with_activations(
    model: Any,
    tasks: str | Sequence[str],
    *,
    tokenizer: Any = None,
    activation_save_dir: str | Path = "activations",
    resume: str | Path | None = None,
    output_path: str | Path | None = None,
    layers_to_capture: LayersLike = None,
    sites: str | Iterable[str] | None = None,
    positions: str | slice | Positions = "scored",
    store_dtype: str | None = None,
    compression: str | None = None,
    strict: bool = False,
    **options: Unpack[EvaluateOptions],
) -> Outcome:
    """Evaluate a model on lm-eval tasks, and keep the activations of every request, joined to its score.

    model: a name, a folder, "demo", or a loaded model with tokenizer=. tasks: "mmlu,gsm8k" or a list.
    resume: a run folder that was cut short; the other arguments must be those of that run.
    strict: stop once numbers are stored that are infinite or NaN; without it the run warns of them at its end.
    output_path: for lm-eval's own results and samples files; None puts them into the run folder.
    Returns an Outcome: `results` and `samples` are lm-eval's, `folder` is what `open_run` reads.
    Raises SelectionError, ModelError, BenchmarkError, StoreError, CaptureError; TypeError for an unknown option.
    """
    given: dict[str, Any] = dict(options)
    selection = Selection.parse(sites, layers_to_capture, positions, store_dtype)
    if isinstance(model, str | Path):
        given["device"] = own_device(given.get("device", "auto"))
    load = LoadOptions(**{each.name: given.pop(each.name) for each in fields(LoadOptions) if each.name in given})
    for name in given:
        if name in WHY_NOT:
            raise BenchmarkError(f"{name}: {WHY_NOT[name]}")
        if name not in EvaluateOptions.__annotations__:
            own = evaluate_with_activations.__kwdefaults__ or {}
            raise unknown_option(name, [*EvaluateOptions.__annotations__, *own])
    include = given.pop("include_path", ())
    include = [include] if isinstance(include, str | Path) else include
    data = given.pop("benchmark_data", None)
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    benchmark = Benchmark(
        tuple(name.strip() for name in names if name.strip()),
        include_path=tuple(map(str, include)),
        local_files=None if data is None else str(data),
        **given,
    )
    output = RunOutput(Path(activation_save_dir), None, None if resume is None else Path(resume), compression, strict)
    loaded_tasks = load_tasks(benchmark)  # what is wrong with a task is told before a large model loads
    loaded = load_model(model, tokenizer=tokenizer, options=load)
    results = None if output_path is None else Path(output_path)
    return run_benchmark(loaded, benchmark, selection, loaded_tasks=loaded_tasks, output=output, output_path=results)
