"""How commands get their options: those of dataclasses from their fields, and those that several commands share.

    @command
    @takes(load=LoadOptions, sampling=Sampling)
    def generate(prompt: …, load: LoadOptions, sampling: Sampling) -> None: ...

gives the command an option for each annotated field (`AutomaticEval/options.py`), and calls it with the dataclasses made.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, ParamSpec, TypeVar

import typer

from AutomaticEval.cli.printing import end_bars, say
from AutomaticEval.errors import AutomaticEvalError, SelectionError, UnsupportedModel
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.options import NamedOption, options_in
from AutomaticEval.selection import Selection
from AutomaticEval.store.disk.whole_files import leaving_no_empty_folder

RUN, KEEP, MODEL, OUTPUT = "What to run", "What to keep", "The model", "The output"
PANELS = (RUN, KEEP, MODEL, OUTPUT)
"""The groups of a command's help, in their order."""
PANEL_OF: Mapping[type, str] = {
    Selection: KEEP,
    LoadOptions: MODEL,
    RunOutput: OUTPUT,
}
"""The options of all other dataclasses say what to run."""

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C stopped."""
NO_THINKING = "If the model thinks between marks of its own, name them: --think_tokens OPEN,CLOSE (docs/runs.md, Reasoning models)."
"""What to do when no response was found to have thinking."""
LAST = ("drop_experts",)
"""Options of few models, which stand last in their group."""
SHORT = {"output": "-o"}
"""Options that also have a short form."""
OLD_SPELLINGS = {
    "save_path": "output",
    "output_dir": "output",
    "sample_num": "num_trials",
    "num_samples": "limit",
    "max_tokens": "max_new_tokens",
    "data_path": "texts",
    "emotion": "category",
}
"""Older names of options. Commands still read them, and no help shows them."""


def spelling(name: str) -> str:
    """The one name of an option: `--max-tokens` and `--max_tokens` are `--max_new_tokens`."""
    name = name.replace("-", "_")
    return OLD_SPELLINGS.get(name, name)


SPELLINGS = {"token_normalize_func": spelling, "help_option_names": ["--help", "-h"]}

File = Annotated[Path, typer.Argument(help="A file, or a run folder.", metavar="FILE")]
Model = Annotated[str, typer.Option("--model", help="Hub name, folder, or demo (bundled).", rich_help_panel=MODEL)]
Texts = Annotated[
    Path,
    typer.Option(
        "--texts",
        help="JSONL, JSON, CSV, TSV, parquet or txt, also .gz: texts, or objects with text, input, question or prompt.",
        rich_help_panel=RUN,
    ),
]
OfLayers = Annotated[
    str | None, typer.Option("--layers", help="Such as 10-14. Default: all of the run.", rich_help_panel=RUN)
]
OfToken = Annotated[
    str, typer.Option("--position", help="One token of each question: prompt[-1], prompt[-3].", rich_help_panel=RUN)
]
BatchSize = Annotated[
    int, typer.Option("--batch_size", min=1, help="Prompts or texts in a forward.", rich_help_panel=RUN)
]
Results = Annotated[
    Path,
    typer.Option("--output", "-o", help="Folder for results; nothing there is overwritten.", rich_help_panel=OUTPUT),
]
SaveDir = Annotated[
    Path, typer.Option("--activation_save_dir", help="Folder for the activations.", rich_help_panel=OUTPUT)
]
Overwrite = Annotated[
    str | None,
    typer.Option(
        "--overwrite",
        help="Replace what is there; with `version`, write beside it: france-2.h5.",
        metavar="[version]",
        rich_help_panel=OUTPUT,
    ),
]
Mlflow = Annotated[
    str | None,
    typer.Option(
        "--mlflow",
        metavar="[URI]",
        help="Log the run to MLflow; without a URI into its local store.",
        rich_help_panel=OUTPUT,
    ),
]

P = ParamSpec("P")
R = TypeVar("R")


class OptionsOf(NamedTuple):
    """The options of a dataclass that a command takes."""

    kind: type
    names: tuple[str, ...]
    """The options that the command takes. Empty: all of them."""

    defaults: Mapping[str, Any]
    """The defaults of this command that differ from those of the fields."""

    @property
    def options(self) -> dict[str, NamedOption]:
        """The options by their names, with the defaults of this command. An option without a default gets None."""
        chosen = {
            name: option for name, option in options_in(self.kind).items() if not self.names or name in self.names
        }
        return {
            name: option._replace(default=self.defaults.get(name, None if option.default is ... else option.default))
            for name, option in chosen.items()
        }

    def made(self, given: Mapping[str, Any]) -> Any:
        """The dataclass, made of the values that were given. None when a value is missing that has no default."""
        own = options_in(self.kind)
        values = {name: given[name] for name in self.options}
        if any(own[name].default is ... and value is None for name, value in values.items()):
            return None
        make: Callable[..., Any] = getattr(self.kind, "parse", self.kind)
        return make(**values)


def options_of(kind: type, *names: str, **defaults: Any) -> OptionsOf:
    """The options of a dataclass for `takes`: all of them or the named ones, with the defaults of one command."""
    return OptionsOf(kind, names, defaults)


def takes(
    before: Callable[..., dict[str, Any] | None] | None = None, **groups: type | OptionsOf
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Gives a command the options of dataclasses. The command is called with the dataclasses that are made of them.

    An option that two dataclasses share is asked for once, and given to both. before: is called with the context and all that was
    given, before the dataclasses are made, so that an option that would be ignored is refused before it is looked at. It may return other
    values in the place of those that were given.
    """
    chosen = {name: group if isinstance(group, OptionsOf) else options_of(group) for name, group in groups.items()}

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        signature = inspect.signature(function, eval_str=True)
        names = [name for name in signature.parameters if name not in chosen]
        own = [signature.parameters[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in names]
        if before is not None and "context" not in names:
            own.append(inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
        added: dict[str, inspect.Parameter] = {}
        for group in chosen.values():
            for name, option in group.options.items():
                if name not in names:
                    added.setdefault(name, _parameter(option, PANEL_OF.get(group.kind, RUN)))

        @functools.wraps(function)
        def run(**given: Any) -> R:
            if before is not None:
                given |= before(**given) or {}
            made = {name: group.made(given) for name, group in chosen.items()}
            return function(**{name: given[name] for name in names}, **made)

        parameters = sorted([*own, *added.values()], key=_place)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def _parameter(option: NamedOption, panel: str) -> inspect.Parameter:
    """An option as a parameter that typer reads."""
    names = [f"--{option.name}", *([SHORT[option.name]] if option.name in SHORT else [])]
    shown = typer.Option(
        *names,
        help=option.option.help,
        min=option.option.minimum,
        metavar=option.option.metavar,
        rich_help_panel=panel,
    )
    kind = option.type if option.default is not None else option.type | None
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=Annotated[kind, shown]
    )


def _place(parameter: inspect.Parameter) -> tuple[int, bool]:
    """Where a parameter stands in the help: arguments first, then the groups in their order."""
    for extra in getattr(parameter.annotation, "__metadata__", ()):
        panel = getattr(extra, "rich_help_panel", None)
        if panel in PANELS:
            return 1 + PANELS.index(panel), parameter.name in LAST
    return 0, False


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Prints our own errors in one line and exits with their code; any other error is printed in full. A command that fails leaves no empty folder."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with leaving_no_empty_folder():
                return function(*args, **kwargs)
        except AutomaticEvalError as error:
            end_bars()
            say(f"{type(error).__name__}: {' '.join(str(error).split())}", err=True)
            if isinstance(error, UnsupportedModel):
                for note in getattr(error, "__notes__", ()):  # a description of the model, to be completed and saved
                    say(f"\n{note}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:  # typer would end without a word
            end_bars()
            say("Stopped (Ctrl-C).", err=True)
            raise typer.Exit(INTERRUPTED) from None

    return run


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was written on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def given_arguments(context: typer.Context, *left_out: str) -> list[str]:
    """The options that were written on the command line, but for some, as they are written there."""
    written: list[str] = []
    for name, value in context.params.items():
        if is_given(context, name) and name not in left_out:
            for each in value if isinstance(value, list) else [value]:
                written += [f"--{name}"] if each is True else [f"--{name}", str(each)]
    return written


def refuse_unused(context: typer.Context, why: str, *names: str, remedy: str = "leave it out") -> None:
    """Raises SelectionError for an option that was given, and would be ignored."""
    for name in names:
        if is_given(context, name):
            raise SelectionError(f"--{name} was given, but {why}; {remedy}.")


def quiet_libraries() -> None:
    """Keep the warnings of the libraries off the screen; ours and their progress bars stay."""
    import logging

    import transformers

    transformers.logging.set_verbosity_error()
    for name in ("lm_eval", "lm-eval", "huggingface_hub", "datasets", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def tell_of_code(benchmark: Benchmark, tell: Callable[[str], None]) -> None:
    """Say that tasks of the user's own may run code, when there are any."""
    if benchmark.include_path or any(name.endswith((".yaml", ".yml")) for name in benchmark.names):
        tell("Tasks of your own YAML files may run Python (!function, templates): read them before you run them.")


class Log:
    """Prints lines on the error stream, and keeps them. Of several processes only the first one prints."""

    def __init__(self, *, speaks: bool = True) -> None:
        self._speaks = speaks
        self._lines: list[str] = []

    @property
    def text(self) -> str:
        """The lines that were printed."""
        return "\n".join(self._lines)

    def __call__(self, line: str) -> None:
        if self._speaks:
            self._lines.append(line)
            say(line, err=True)
