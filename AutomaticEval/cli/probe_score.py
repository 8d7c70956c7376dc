"""`main.py probe_score FILE RUN|PROMPT`: what a saved probe says of the questions of a run, or of one prompt."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from AutomaticEval.cli.options import OUTPUT, RUN, command, is_given, quiet_libraries, refuse_unused, takes
from AutomaticEval.cli.printing import print_table, say
from AutomaticEval.errors import SelectionError, warn
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.selection import Positions

if TYPE_CHECKING:
    from AutomaticEval.analysis.probes.saved.saved_probe import SavedProbe

CHANCE = 0.5
SHOWN = 20
"""So many questions are printed; the file has all."""
OF_LOADING = tuple(LoadOptions.__dataclass_fields__)


@command
@takes(load=LoadOptions)
def probe_score(
    context: typer.Context,
    load: LoadOptions,
    file: Annotated[Path, typer.Argument(help="A file of probe --save_probe.", metavar="FILE")],
    of: Annotated[str, typer.Argument(help="A run of questions; or a prompt, for one forward.", metavar="RUN|PROMPT")],
    model: Annotated[
        str | None, typer.Option("--model", help="For a prompt. Default: the probe's.", rich_help_panel=RUN)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="For a run: a .json file for all scores.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Score the questions of a run, or one prompt, with a saved probe."""
    from AutomaticEval.analysis.probes.saved.saved_probe import load_probe
    from AutomaticEval.analysis.probes.saved.scores import is_path

    probe = load_probe(file)
    if is_path(of):
        refuse_unused(context, "a run is scored, and no model is loaded", "model", *OF_LOADING)
        _of_run(probe, Path(of), output)
        return
    if is_given(context, "output"):
        refuse_unused(context, "a prompt has one score, which is printed", "output")
    _of_prompt(probe, of, model or probe.model, load)


def _of_run(probe: SavedProbe, path: Path, output: Path | None) -> None:
    from AutomaticEval.analysis.probes.leaks.audit import number
    from AutomaticEval.analysis.probes.saved.scores import scores_of
    from AutomaticEval.store.disk.json_files import write_json
    from AutomaticEval.store.disk.whole_files import prepare_file
    from AutomaticEval.store.reader import open_run

    run = open_run(path)
    if output is not None:
        if output.suffix != ".json":
            raise SelectionError(f"--output {output}: scores are written as JSON; give the file the ending .json.")
        prepare_file(output)
    scores = scores_of(probe, run)
    _say_probe(probe)
    columns = scores.columns
    rows = list(zip(*(columns[name] for name in ("task", "doc_id", "probability", "label", "is_learned")), strict=True))
    print_table(
        f"Probability of {probe.target}: {probe.positive}, at {probe.site}, {probe.position}",
        ("Task", "Document", "Probability", "Label", ""),
        [
            (str(task), str(doc), f"{said:.3f}", "" if label is None else str(label), "learned from" if known else "")
            for task, doc, said, label, known in rows[:SHOWN]
        ],
    )
    if len(rows) > SHOWN:
        say(f"… and {len(rows) - SHOWN} more; --output FILE.json has all.")
    left_out = f"; {scores.n_learned} that the probe learned from are left out" if scores.n_learned else ""
    told = number(scores.auroc) if scores.auroc.mean is not None else f"none: {scores.auroc.reason}"
    say(f"AUROC:       {told} ({scores.auroc.n} questions{left_out})")
    if output is not None:
        about = {"kind": "probe_scores", "probe": _about(probe), "run": {"path": run.path.name}}
        write_json(output, {**about, **asdict(scores)})
        say(f"Written:     {output}")


def _about(probe: SavedProbe) -> dict[str, Any]:
    names = ("site", "position", "target", "positive", "negative", "model", "model_hash", "n_questions")
    return {name: getattr(probe, name) for name in names}


def _of_prompt(probe: SavedProbe, prompt: str, model: str, load: LoadOptions) -> None:
    """One forward over the prompt, in the chat template where the probe's prompts were in it."""
    if Positions.parse(probe.position).part != "prompt":
        raise SelectionError(f"the probe reads {probe.position}, which a prompt alone does not have; score a run.")
    quiet_libraries()
    from AutomaticEval.analysis.probes.saved.prompt_score import prompt_score

    said = prompt_score(probe, prompt, model, **vars(load))
    _say_probe(probe)
    say(f"Read:        the token {said.token!r}, {probe.position}, at {probe.site}")
    say(f"Probability: {said.probability:.3f} of {probe.target}: {probe.positive} (at {probe.site}, {probe.position})")


def _say_probe(probe: SavedProbe) -> None:
    """How good the probe was where it was made. Warns of one at chance. Files of earlier versions have one AUROC and no interval."""
    auroc, ends = probe.made_from.get("auroc_out_of_fold"), probe.made_from.get("interval_out_of_fold")
    if auroc is None:
        return
    alone = probe.made_from.get("auroc_of_place")
    of_place = "" if alone is None else f"; its place alone {alone:.3f}"
    within = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
    say(f"Probe:       AUROC {auroc:.3f}{within} out of fold, over {probe.n_questions} questions{of_place}")
    if (ends[0] if ends else auroc) <= CHANCE:
        warn("the probe was at chance where it was made, out of fold: its probabilities may mean nothing.")
