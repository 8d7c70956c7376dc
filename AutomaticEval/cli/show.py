"""`main.py show FILE`: what is in a file or a run."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.options import command, refuse_unused
from AutomaticEval.cli.printing import print_table, say
from AutomaticEval.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

    from AutomaticEval.store.reading.overview import TaskLine
    from AutomaticEval.store.run import Run


@command
def show(
    context: typer.Context,
    path: options.File,
    sample: Annotated[int | None, typer.Option("--sample", help="Which sample of a run, from 0.")] = None,
    doc: Annotated[
        int | None, typer.Option("--doc", help="Which question of a run: the number of its document.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="With --doc: the question's task, in a run of several.")
    ] = None,
    lens: Annotated[
        bool, typer.Option("--lens", help="With --doc: load the model, for the rank of the right answer by layer.")
    ] = False,
) -> None:
    """Print what a run is; or one question of it, or one sample: prompt, response, settings, shapes, and statistics of each layer."""
    from AutomaticEval.cli.show_question import show_question
    from AutomaticEval.store.disk.file_names import PICKLE_SUFFIXES
    from AutomaticEval.store.reader import load_activations, open_run

    if doc is None:
        refuse_unused(context, "no question is shown", "task", "lens", remedy="add --doc N")
    else:
        refuse_unused(context, "--doc shows a question", "sample")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        _show_sample(load_activations(path))
        return
    run = open_run(path)
    if doc is not None:
        show_question(run, task, doc, has_lens=lens)
    elif len(run) > 1 and sample is None:
        _show_run(run)
    else:
        _show_sample(run[_there(run, sample or 0)])


def _there(run: Run, sample: int) -> int:
    if not -len(run) <= sample < len(run):
        raise StoreError(f"{run.path} has no sample {sample}; it holds {len(run)}, from 0.")
    return sample


def _show_run(run: Run) -> None:
    from AutomaticEval.sites import keys_text, kind_and_layer
    from AutomaticEval.store.reading.overview import facts_of

    facts, tasks = facts_of(run), run.tasks()
    print_table("", ("Run", str(run.path)), facts.items(), n_words=2)
    if run.made_with.corpus is not None:
        print_table(
            "", ("Set", "Texts", "Samples", "Tokens", "Texts that were cut"), [_set_row(run, each) for each in tasks]
        )
    else:
        print_table("", ("Task", "Samples", "Questions", "Correct"), map(_task_row, tasks))
    means = [
        (each.task, name, f"{mean:.4f}" + ("" if error is None else f" ± {error:.4f}"))
        for each in tasks
        for name, (mean, error) in each.means.items()
    ]
    if means:
        print_table("", ("Task", "Metric", "Mean over the questions"), means, n_words=2)
    stored = run.contents.activations
    alike: dict[tuple[str, str, str], list[str]] = {}
    for key, each in stored.items():
        how = (kind_and_layer(key).kind, str(each.width), str(each.read_as).removeprefix("torch."))
        alike.setdefault(how, []).append(key)
    print_table("", ("Site", "Width", "Dtype"), [(keys_text(keys), *how[1:]) for how, keys in alike.items()], n_words=3)
    wrong = {key: count for key, count in run.non_finite.items() if count}
    if wrong:
        say("Infinite or NaN: " + ", ".join(f"{key} {count}" for key, count in wrong.items()))
    say(f"One sample: python main.py show {shlex.quote(str(run.path))} --sample 0")


def _set_row(run: Run, line: TaskLine) -> tuple[str, ...]:
    """What there is to say of a set of texts, of which nothing is right or wrong."""
    some = run.where(task=line.task)
    n_cut = sum((each or 0) > 0 for each in some.column("n_truncated"))
    return line.task, str(line.n_questions), str(line.n_samples), str(sum(some.column("n_prompt_tokens"))), str(n_cut)


def _task_row(line: TaskLine) -> tuple[str, ...]:
    correct = "unknown" if line.correct is None else f"{line.correct:.4f}"
    return line.task, str(line.n_samples), str(line.n_questions), correct


def _show_sample(data: dict[str, Any]) -> None:
    """The prompt and the response first, and last the settings, which are long."""
    first = [name for name in ("prompt", "response") if name in data]
    for name in dict.fromkeys([*first, *data]):
        if name not in (
            "activations",
            "reduced",
            "tokens",
            "settings",
            "input_ids",
            "generated_ids",
            "token_ids",
            "positions",
            "token_logprobs",
            "thinking",  # which the response holds
        ):
            say(f"{name}: {data[name]}")
    if data.get("token_logprobs") is not None:
        numbers = data["token_logprobs"].double()
        say(f"Mean log-probability of the response's {len(numbers)} tokens: {numbers.mean():.4f} nats")
    rows = []
    lines = {key: line[None] for key, line in data.get("reduced", {}).items()}
    for key, tensor in {**data["activations"], **lines}.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows.append((key, "x".join(map(str, tensor.shape)), dtype, *statistics(tensor)))
    print_table("", ("Site", "Shape", "Dtype", "Mean", "Std", "Min", "Max", "Mean norm"), rows, n_words=8)
    settings = data.get("settings", {})
    say("settings: " + ", ".join(f"{name}={value}" for name, value in settings.items()))


def statistics(tensor: Tensor) -> list[str]:
    """Mean, standard deviation, smallest and largest value, and the mean L2 norm of a row, as text."""
    if not len(tensor):
        return ["–"] * 5
    wide = tensor.double()
    numbers = (wide.mean(), wide.std(correction=0), wide.min(), wide.max(), wide.norm(dim=1).mean())
    return [f"{number.item():.4g}" for number in numbers]
