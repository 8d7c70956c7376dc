"""`main.py heads ablate`: what a model answers, and how it scores, without some of its heads."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.cli import options
from AutomaticEval.cli.finish import finish, result_file
from AutomaticEval.cli.interventions import (
    HeadSpec,
    OwnTexts,
    Prompts,
    Sentiment,
    answers_table,
    asked_prompts,
    metrics_of,
    number,
    tell_of_few,
)
from AutomaticEval.cli.options import RUN, command, options_of, refuse_unused, takes
from AutomaticEval.cli.printing import print_table, say
from AutomaticEval.errors import PromptError, SelectionError, did_you_mean
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.models.checkpoint.load_options import LoadOptions

if TYPE_CHECKING:
    from AutomaticEval.analysis.heads.ablate import Ablation
    from AutomaticEval.analysis.made_with import TextsRead
    from AutomaticEval.analysis.numbers.paired import PairedChange
    from AutomaticEval.analysis.words.profiles import Profile
    from AutomaticEval.models.checkpoint.loaded_model import LoadedModel


Mode = Annotated[
    str,
    typer.Option("--mode", help="zero, mean or resample (over the profile's neutral prompts).", rich_help_panel=RUN),
]


@command
@takes(
    prompts=Prompts,
    sampling=options_of(Sampling, "max_new_tokens", "temperature", "seed", max_new_tokens=15),
    asked=options_of(Benchmark, "benchmark", "limit", "num_fewshot", "include_path", "batch_size"),
    load=LoadOptions,
)
def ablate(
    context: typer.Context,
    prompts: Prompts,
    sampling: Sampling,
    asked: Benchmark | None,
    load: LoadOptions,
    head_spec: HeadSpec,
    mode: Mode = "zero",
    model: options.Model = "demo",
    texts: OwnTexts = None,
    sentiment: Sentiment = "vader",
    batch_size: options.BatchSize = 8,
    output: options.Results = Path("results"),
) -> None:
    """Take heads out of a model, and compare its answers, text metrics and benchmark scores with those of the whole model."""
    if asked is None:
        refuse_unused(context, "it is of a --benchmark", "limit", "num_fewshot", "include_path")
    if prompts.category is None and texts is None:
        of_answers = ("num_trials", "max_new_tokens", "temperature", "sentiment")
        refuse_unused(context, "it is of prompts, and none are asked", *of_answers)
    options.quiet_libraries()
    from AutomaticEval.analysis.heads.ablate import Ablation, parse_head_spec, reference_z
    from AutomaticEval.analysis.made_with import AnalysisSettings
    from AutomaticEval.analysis.numbers import estimate, paired
    from AutomaticEval.analysis.parts.before_after import answers_with
    from AutomaticEval.analysis.result import Result
    from AutomaticEval.models.loading import load_model

    file = result_file(output, "ablation.json", "ablation")
    profile = prompts.load_profile()
    questions = prompts.drawn(asked_prompts(profile, prompts.category, texts))
    _refuse(mode, profile, asked, n_questions=len(questions))
    tell_of_few(len(questions), "prompts")
    if asked is not None:
        options.tell_of_code(asked, partial(say, err=True))
    loaded = load_model(model, options=load)
    heads = parse_head_spec(head_spec, loaded.layout.n_layers, loaded.layout.n_heads)
    neutral = [] if profile is None else profile.category(profile.neutral)
    reference = None if mode == "zero" else reference_z(loaded, list(heads), neutral, batch_size)
    ablation = Ablation(loaded, heads, mode, reference, prompts.seed)
    told = {
        "heads": head_spec,
        "mode": mode,
        **prompts.asked_as(sampling, sentiment),
        "draws": ablation.n_draws,
        "reference": f"{len(neutral)} neutral prompts",
        "prompts_in_reference": _own_in_reference(mode, questions, neutral),
        **({} if asked is None else {"benchmark": asked.as_dict()}),
    }
    read = _texts_read(loaded, questions, texts or f"{prompts.profile}, {prompts.category}", mode, profile)
    about = AnalysisSettings.of(loaded, read, batch_size=batch_size, seed=prompts.seed, options=told)
    measured: dict[str, Any] = {}
    methods: dict[str, Any] = {}
    if questions:
        metrics = metrics_of(sentiment, prompts.keywords(profile))
        answers = answers_with(ablation, questions, metrics, sampling, batch_size=batch_size)
        measured |= answers.measured
        methods |= answers.methods or {}
        print_table(*answers_table(answers))  # before the benchmark, which takes long and may fail
    if asked is not None:
        measured["benchmark"] = _scores(ablation, asked)
        methods["benchmark"] = estimate.methods(len(measured["benchmark"]), p=paired.METHOD, is_together=False)
    finish(file, Result("ablation", measured, about.as_dict(), methods))


def _texts_read(
    loaded: LoadedModel, questions: list[str], source: str | Path, mode: str, profile: Profile | None
) -> dict[str, TextsRead]:
    """What the file says of the prompts and of the reference."""
    from AutomaticEval.analysis.made_with import TextsRead, n_longer

    read = {"prompts": TextsRead.of(questions, source)} if questions else {}
    if mode != "zero" and profile is not None:
        neutral = profile.category(profile.neutral)
        read["reference"] = TextsRead.of(neutral, f"{profile.name}, {profile.neutral}", n_longer(loaded, neutral))
    return read


def _own_in_reference(mode: str, questions: list[str], neutral: list[str]) -> int:
    """How many of the prompts are among the reference's texts, which is said."""
    n = 0 if mode == "zero" else sum(each in neutral for each in questions)
    if n:
        say(
            f"The reference of --mode {mode} holds {n} of the {len(questions)} prompts themselves: values of their own stand in for the heads', so "
            "the change is smaller than with other texts.",
            err=True,
        )
    return n


def _refuse(mode: str, profile: Profile | None, asked: Benchmark | None, *, n_questions: int) -> None:
    """Raises PromptError when nothing is asked, SelectionError for a mode that has nothing to take its values from."""
    if not n_questions and asked is None:
        raise PromptError("nothing is asked: give --profile with --category, --texts, or --benchmark.")
    from AutomaticEval.analysis.heads.ablate import MODES

    if mode not in MODES:
        raise SelectionError(f"--mode {mode} is not one; write {', '.join(MODES)}.{did_you_mean(mode, MODES)}")
    if mode != "zero" and profile is None:
        raise SelectionError(f"--mode {mode} takes its values from the neutral prompts of a --profile; name one.")
    if mode == "resample" and asked is not None:
        raise SelectionError(
            "--mode resample draws by position, which a benchmark's batches do not keep; use zero or mean."
        )


def _scores(ablation: Ablation, asked: Benchmark) -> list[dict[str, Any]]:
    """The scores of each task with the heads and without them, paired by question."""
    from AutomaticEval.analysis.numbers.paired import corrected, paired_change
    from AutomaticEval.evaluation.results.question_scores import question_scores
    from AutomaticEval.evaluation.run import run_benchmark

    before = run_benchmark(ablation.loaded, asked)
    with ablation.applied():
        after = run_benchmark(ablation.loaded, asked)
    of_questions = [question_scores(each.scores, each.results, each.samples) for each in (before, after)]
    known = [line for line in of_questions[0] if line in of_questions[1]]
    changes = []
    for line in known:
        whole, without = (each[line] for each in of_questions)
        changes.append(paired_change(list(whole.values()), [without[question] for question in whole], list(whole)))
    paired = dict(zip(known, corrected(changes), strict=True))
    rows = []
    for one, other in zip(before.scores, after.scores, strict=True):
        about = {"task": one.task, "metric": one.metric, "before": one.value, "after": other.value, "n": one.answered}
        errors = {"before_stderr": one.stderr, "after_stderr": other.stderr}
        change = paired.get((one.task, one.metric))
        rows.append({**about, **errors, **(dict.fromkeys(OF_CHANGE) if change is None else _told(change))})
    print_table("Benchmark without the heads", COLUMNS, map(_row, rows))
    return rows


OF_CHANGE = ("difference", "n_gained", "n_lost", "p", "p_corrected")
"""What is told of a change that is paired by question. All are None for a score that is no mean over its questions."""
COLUMNS = ("Task", "Metric", "Before", "After", "Change, 95 % interval", "Flipped", "p", "corrected")


def _told(change: PairedChange) -> dict[str, Any]:
    return {name: getattr(change, name) for name in OF_CHANGE}


def _row(line: dict[str, Any]) -> tuple[str, ...]:
    change = "" if line["difference"] is None else number(line["difference"])
    flipped = "" if line["n_gained"] is None else f"+{line['n_gained']} -{line['n_lost']}"
    p = ["" if line[name] is None else f"{line[name]:.3g}" for name in ("p", "p_corrected")]
    return (line["task"], line["metric"], f"{line['before']:.4f}", f"{line['after']:.4f}", change, flipped, *p)
