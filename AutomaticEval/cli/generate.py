"""`main.py generate "…"`: one prompt, one response, and on request its activations."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.cli import options
from AutomaticEval.cli.options import KEEP, MODEL, OUTPUT, RUN, command, options_of, refuse_unused, takes
from AutomaticEval.cli.printing import say
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.selection import Positions, Selection

Prompt = Annotated[str, typer.Argument(help="What to ask.")]
SystemPrompt = Annotated[
    str | None,
    typer.Option("--system_prompt", help="Instructions that come before the prompt.", rich_help_panel=RUN),
]
NoChatTemplate = Annotated[
    bool, typer.Option("--no_chat_template", help="Do not use the model's chat template.", rich_help_panel=RUN)
]
CaptureActivations = Annotated[
    bool,
    typer.Option(
        "--capture_activations",
        help="Capture into a new file in --activation_save_dir.",
        rich_help_panel=KEEP,
    ),
]
PositionsText = Annotated[
    str | None,
    typer.Option(
        "--positions",
        help="all (default; of logits: scored), prompt, response, scored, thinking, answer, last, or a slice.",
        rich_help_panel=KEEP,
    ),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Write no file with infinite numbers or NaN. Default: warn.", rich_help_panel=KEEP),
]
TpPlan = Annotated[
    str | None,
    typer.Option(
        "--tp_plan",
        help="auto divides each layer among the processes that torchrun started.",
        metavar="auto",
        rich_help_panel=MODEL,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Capture, and write the activations to this HDF5 file.", rich_help_panel=OUTPUT
    ),
]


def _say_nothing(text: object, *, err: bool = False) -> None:
    """What the other processes of a divided model say: the first says it."""


def _refuse_ignored(context: typer.Context, capture_activations: bool, output: Path | None, **others: object) -> None:
    """Raises SelectionError for options that would be ignored."""
    captures = capture_activations or output is not None
    if not captures:
        unused = ("sites", "layers", "positions", "store_dtype", "reduce", "project", "think_tokens", "strict")
        refuse_unused(context, "nothing is captured", *unused, remedy="add --output or --capture_activations")
    if output is None:
        refuse_unused(context, "no --output is named that it could replace", "overwrite")
    if output is not None or not captures:
        refuse_unused(context, "no file is made in it", "activation_save_dir")


@command
@takes(
    _refuse_ignored,
    sampling=Sampling,
    selection=options_of(Selection, "sites", "layers", "store_dtype", "reduce", "project", "think_tokens"),
    load=LoadOptions,
)
def generate(
    sampling: Sampling,
    selection: Selection,
    load: LoadOptions,
    prompt: Prompt,
    model: options.Model = "demo",
    system_prompt: SystemPrompt = None,
    no_chat_template: NoChatTemplate = False,
    capture_activations: CaptureActivations = False,
    positions: PositionsText = None,
    strict: Strict = False,
    output: Output = None,
    activation_save_dir: options.SaveDir = Path("activations"),
    overwrite: options.Overwrite = None,
    tp_plan: TpPlan = None,
) -> None:
    """Answer one prompt; with --output or --capture_activations, keep its activations."""
    load = replace(load, tp_plan=tp_plan)
    tell = say if tp_plan is None or os.environ.get("RANK", "0") == "0" else _say_nothing
    captures = capture_activations or output is not None
    if positions is not None:
        Positions.parse(positions)  # what is wrong with it is told before the libraries are imported
    options.quiet_libraries()
    from AutomaticEval.capture.prompt import generate_inference, generate_inference_with_activations
    from AutomaticEval.store.disk.file_names import file_stem
    from AutomaticEval.store.disk.whole_files import size_text

    chosen = selection.as_dict()
    asked: dict[str, Any] = {
        **vars(load),
        **vars(sampling),
        "sites": chosen["sites"],
        "positions": positions,
        "store_dtype": selection.store_dtype,
        "reduce": selection.reduce,
        "project": selection.project,
        "think_tokens": selection.think_tokens,
        "system_prompt": system_prompt,
        "apply_chat_template": not no_chat_template,
        "overwrite": overwrite,
        "strict": strict,
    }
    if not captures:
        tell(generate_inference(prompt, model, **asked))
        return
    layers = None if selection.layers is None else selection.layers_text()
    file = output or activation_save_dir / f"{file_stem('generation', prompt)}.h5"
    response, kept = generate_inference_with_activations(prompt, model, file, layers, **asked)
    tell(response)
    file = Path(kept["path"])
    held = f"the {selection.reduce} of its positions" if "reduced" in kept else f"{len(kept['token_ids'])} positions"
    tell(f"Activations: {file} ({size_text(file.stat().st_size)}, {held})", err=True)
    if kept.get("thinking") is None and (positions or "").startswith("thinking"):
        tell(f"Thinking:    none in this response. {options.NO_THINKING}", err=True)
    tell(f"Load them:   from AutomaticEval import load_activations; load_activations({str(file)!r})", err=True)
