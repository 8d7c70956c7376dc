"""`main.py lens RUN`: what each layer of a run would answer; one question token by token; and tuned lenses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.cli.finish import Table, finish, result_file
from AutomaticEval.cli.options import OUTPUT, RUN, OfLayers, OfToken, command, is_given, quiet_libraries, refuse_unused
from AutomaticEval.cli.printing import progress, say

if TYPE_CHECKING:
    from AutomaticEval.analysis.lens.by_layer import LensPlace
    from AutomaticEval.analysis.lens.train import TunedPlace
    from AutomaticEval.analysis.result import Estimate, Result
    from AutomaticEval.store.run import Run

Sites = Annotated[
    str | None,
    typer.Option(
        "--sites", help="embed, resid_pre, resid_mid, resid_post. Default: all of the run.", rich_help_panel=RUN
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="So many questions, drawn with --seed.", rich_help_panel=RUN)
]
Seed = Annotated[int, typer.Option("--seed", help="Seed for drawing questions, and for training.", rich_help_panel=RUN)]
Tuned = Annotated[Path | None, typer.Option("--tuned", help="A tuned lens, from --train_tuned.", rich_help_panel=RUN)]
DocId = Annotated[
    int | None,
    typer.Option("--doc_id", help="One question, token by token: the number of its document.", rich_help_panel=RUN),
]
Task = Annotated[
    str | None, typer.Option("--task", help="With --doc_id, in a run of several tasks.", rich_help_panel=RUN)
]
TrainTuned = Annotated[
    Path | None,
    typer.Option(
        "--train_tuned", help="Train a tuned lens, and write it: a .safetensors file.", rich_help_panel=OUTPUT
    ),
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Of the training, at each place.", rich_help_panel=RUN)]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="A .json file, or a folder for lens.json; figures and the questions' numbers go beside it.",
        rich_help_panel=OUTPUT,
    ),
]


@command
def lens(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A run of questions.", metavar="RUN")],
    sites: Sites = None,
    layers: OfLayers = None,
    position: OfToken = "prompt[-1]",
    limit: Limit = None,
    seed: Seed = 42,
    doc_id: DocId = None,
    task: Task = None,
    tuned: Tuned = None,
    steps: Steps = 250,
    train_tuned: TrainTuned = None,
    output: Output = Path("results"),
) -> None:
    """Read every layer of a run through the model's own output head: what it would answer there."""
    _refuse_what_is_ignored(context, doc_id, train_tuned)
    from AutomaticEval.store.reader import open_run
    from AutomaticEval.store.upkeep.prune import kept_keys

    run = open_run(path)
    keys = None if sites is None and layers is None else kept_keys(run, sites, layers)
    quiet_libraries()
    if train_tuned is not None:
        _train(run, keys, train_tuned.expanduser(), steps, seed, output)
    elif doc_id is not None:
        _one_question(run, keys, doc_id, task, tuned, output)
    else:
        _over_questions(run, keys, position, limit, seed, tuned, output)


def _refuse_what_is_ignored(context: typer.Context, doc_id: int | None, train_tuned: Path | None) -> None:
    """Raises SelectionError for an option that has no meaning beside the others."""
    if train_tuned is not None:
        refuse_unused(context, "--train_tuned learns from all rows", "position", "limit", "doc_id", "task", "tuned")
        return
    refuse_unused(context, "no lens is trained", "steps", remedy="add --train_tuned FILE")
    if doc_id is not None:
        refuse_unused(context, "--doc_id reads all stored tokens of one question", "position", "limit", "seed")
    elif is_given(context, "task"):
        refuse_unused(context, "no question is named", "task", remedy="add --doc_id N")


def _over_questions(
    run: Run, keys: list[str] | None, position: str, limit: int | None, seed: int, tuned: Path | None, output: Path
) -> None:
    from AutomaticEval.analysis.lens.by_layer import logit_lens
    from AutomaticEval.analysis.lens.question_file import NAME, write_lens_questions

    file = output if output.suffix == ".json" else output / "lens.json"
    result_file(file.parent, file.name, "lens", beside=[NAME])
    with progress("Reading", lambda: _n_reads(run, keys, limit), of_bytes=False) as advance:
        result = logit_lens(run, keys, position=position, limit=limit, tuned=tuned, seed=seed, advance=advance)
    measured = result.measured
    finish(
        file,
        result,
        _places(result),
        beside={NAME: lambda made: write_lens_questions(made, result.questions)},
    )
    if measured["n_learned_from"]:
        say(f"Left out:    {measured['n_learned_from']} questions that the tuned lens learned from")
    if measured["n_after_space"]:
        say(
            f"After space: {measured['n_after_space']} questions are read one or more tokens later: their answer begins with white space"
        )
    if measured["only_gold"] is not None:
        say(
            f"One gold:    all right answers begin with {measured['only_gold']!r}: gold says how likely this token is, and not what the model knows"
        )
    for reason, n in measured["without_gold"].items():
        say(f"No gold:     {n} of {measured['n_questions']} questions: {reason}")
    if measured["final"] is None:
        say("No last layer: the run has neither it nor final_norm, so nothing is compared with the model's own output.")


def _n_reads(run: Run, keys: list[str] | None, limit: int | None) -> int:
    """About how many rows are read, for the bar."""
    from AutomaticEval.analysis.lens.by_layer import lens_places

    n = len(run.questions())
    return min(n, limit or n) * len(lens_places(run, keys))


def _one_question(
    run: Run, keys: list[str] | None, doc_id: int, task: str | None, tuned: Path | None, output: Path
) -> None:
    from AutomaticEval.analysis.lens.one_question import lens_of_question

    file = output if output.suffix == ".json" else output / "lens_question.json"
    result_file(file.parent, file.name, "lens_question")
    result = lens_of_question(run, doc_id, task, keys, tuned=tuned)
    measured = result.measured
    say(measured["question"])
    if not measured["places"]:
        return
    wanted = measured["next_tokens"][-1]
    rows = [
        (
            each["site"],
            each["top_token"][-1],
            f"{each['top_probability'][-1]:.4f}",
            str(each["rank"][-1]),
            f"{each['probability'][-1]:.4f}",
        )
        for each in measured["places"]
    ]
    columns = ("Place", "Likeliest", "Probability", f"Rank of {wanted!r}", "Its probability")
    finish(file, result, Table(f"After {measured['tokens'][-1]!r}", columns, rows, 2))


def _train(run: Run, keys: list[str] | None, file: Path, steps: int, seed: int, output: Path) -> None:
    from AutomaticEval.analysis.lens.by_layer import lens_places
    from AutomaticEval.analysis.lens.train import Training, train_tuned_lens
    from AutomaticEval.analysis.tensor_file import TUNED_LENS

    TUNED_LENS.prepare(file, offer="")
    written = output if output.suffix == ".json" else output / "tuned_lens.json"
    result_file(written.parent, written.name, "tuned_lens")
    training = Training(n_steps=steps, seed=seed)
    with progress("Training", lambda: steps * len(lens_places(run, keys)), of_bytes=False) as advance:
        trained = train_tuned_lens(run, keys, training=training, advance=advance)
    with trained.lens.saving(file):  # neither is there when the other cannot be written
        finish(written, trained.result, _tuned(trained.result))
    _say_worse(trained.result.measured["places"])
    say(f"Tuned lens:  {file} (python main.py lens {run.path} --tuned {file} …)")


def _say_worse(places: list[TunedPlace]) -> None:
    worse = [each.site for each in places if each.gain.mean is not None and each.gain.mean < 0]
    if worse:
        say(
            f"Worse than the plain lens on held-out prompts: {', '.join(worse)}. Give it more rows, or leave these out.",
            is_grave=True,
        )


def _places(result: Result) -> Table:
    """A line for each place; the last line says over how many different prompts each column is."""
    places: list[LensPlace] = result.measured["places"]
    rows = [
        (
            each.site,
            _number(each.choice_accuracy, ".3f"),
            "" if each.median_rank is None else f"{each.median_rank:g}",
            _number(each.gold_first, ".3f"),
            *(_number(of, ".4f") for of in (each.gold_probability, each.taken_probability, each.entropy, each.kl)),
            _number(each.top_agreement, ".3f"),
        )
        for each in places
    ]
    of = places[0]
    gold = of.gold_first.n
    counts = (of.choice_accuracy.n, gold, gold, gold, of.taken_probability.n, of.entropy.n, of.kl.n, of.top_agreement.n)
    rows.append(("prompts", *map(str, counts)))
    columns = (
        "Place",
        "Choice right",
        "Gold: median rank",
        "first",
        "probability",
        "Taken",
        "Entropy",
        "KL",
        "Top as last",
    )
    asked = f"{result.measured['n_questions']} questions, {result.measured['n_prompts']} different prompts"
    return Table(f"Logit lens over {asked} (KL and entropy in nats)", columns, rows)


def _tuned(result: Result) -> Table:
    rows = [
        (
            each.site,
            _number(each.plain, ".4f"),
            _number(each.tuned, ".4f"),
            _number(each.gain, "+.4f", has_interval=True),
            str(each.step),
        )
        for each in result.measured["places"]
    ]
    columns = ("Place", "Plain", "Tuned", "Gain, 95 % interval", "Step")
    return Table(f"Divergence on {result.measured['n_prompts']['held_out']} held-out prompts (nats)", columns, rows)


def _number(estimate: Estimate, form: str, *, has_interval: bool = False) -> str:
    if estimate.mean is None:
        return ""
    interval: Any = estimate.interval if has_interval else None
    return f"{estimate.mean:{form}}" + ("" if interval is None else " [{:{f}}, {:{f}}]".format(*interval, f=form))
