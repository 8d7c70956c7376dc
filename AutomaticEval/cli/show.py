"""`main.py show FILE`: what is in a file or a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.options import command
from AutomaticEval.cli.printing import print_table, say

if TYPE_CHECKING:
    from torch import Tensor

    from AutomaticEval.store.reader import Run


@command
def show(
    path: options.File,
    sample: Annotated[int | None, typer.Option("--sample", help="Which sample of a run, from 0.")] = None,
) -> None:
    """Print what is in a file: prompt, response, settings, shapes, and statistics of each layer."""
    from AutomaticEval.errors import StoreError
    from AutomaticEval.store.disk.file_names import PICKLE_SUFFIXES
    from AutomaticEval.store.reader import load_activations, open_run

    if path.suffix.lower() in PICKLE_SUFFIXES:
        _show_sample(load_activations(path))
        return
    run = open_run(path)
    if len(run) > 1 and sample is None:
        _show_run(run)
        return
    number = sample or 0
    if not -len(run) <= number < len(run):
        raise StoreError(f"{path} has no sample {number}; it holds {len(run)}, from 0.")
    _show_sample(run[number])


def _show_run(run: Run) -> None:
    say(repr(run))
    from AutomaticEval.store.reading.reduced_runs import how_reduced

    tasks = [
        (task, str(n_samples), str(n_docs), "unknown" if correct is None else f"{correct:.4f}")
        for task, n_samples, n_docs, correct in run.tasks()
    ]
    print_table("", ("Task", "Samples", "Documents", "Correct"), tasks, n_words=4)
    stored = run.contents.activations
    sites = [(key, str(each.width), str(each.read_as).removeprefix("torch.")) for key, each in stored.items()]
    print_table("", ("Site", "Width", "Dtype"), sites, n_words=3)
    if run.made_with.reduce is not None:
        say(f"Reduced: each {'line' if run.contents.is_by_sample else 'row'} is {how_reduced(run.settings)}")
    wrong = {key: count for key, count in run.non_finite.items() if count}
    if wrong:
        say("Infinite or NaN: " + ", ".join(f"{key} {count}" for key, count in wrong.items()))
    say(f"One sample: python main.py show {run.path} --sample 0")


def _show_sample(data: dict[str, Any]) -> None:
    for name, value in data.items():
        if name not in (
            "activations",
            "reduced",
            "tokens",
            "settings",
            "input_ids",
            "generated_ids",
            "token_ids",
            "positions",
        ):
            say(f"{name}: {value}")
    settings = data.get("settings", {})
    say("settings: " + ", ".join(f"{name}={value}" for name, value in settings.items()))
    rows = []
    lines = {key: line[None] for key, line in data.get("reduced", {}).items()}
    for key, tensor in {**data["activations"], **lines}.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows.append((key, "x".join(map(str, tensor.shape)), dtype, *statistics(tensor)))
    print_table("", ("Site", "Shape", "Dtype", "Mean", "Std", "Min", "Max", "Mean norm"), rows, n_words=8)


def statistics(tensor: Tensor) -> list[str]:
    """Mean, standard deviation, smallest and largest value, and the mean L2 norm of a row, as text."""
    if not len(tensor):
        return ["–"] * 5
    wide = tensor.double()
    numbers = (wide.mean(), wide.std(correction=0), wide.min(), wide.max(), wide.norm(dim=1).mean())
    return [f"{number.item():.4g}" for number in numbers]
