"""What every command shares: the options with their help, and errors in one line.

Options are declared with underscores; `SPELLINGS` makes `--capture-activations` mean the same.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

from AutomaticEval.cli.printing import end_bars, say
from AutomaticEval.errors import AutomaticEvalError

if TYPE_CHECKING:
    from AutomaticEval.selection import Selection

SPELLINGS = {"token_normalize_func": lambda name: name.replace("-", "_"), "help_option_names": ["--help", "-h"]}

CaptureActivations = Annotated[
    bool, typer.Option("--capture_activations", help="Keep the activations of every question.")
]
HeadStrength = Annotated[
    bool, typer.Option("--head_strength", help="Measure how strong each head is: head_strength.json in the run folder.")
]
Benchmarks = Annotated[str, typer.Option("--benchmark", help="lm-eval tasks or groups, comma-separated.")]
NumTrials = Annotated[int | None, typer.Option("--num_trials", help="Questions, drawn over the whole benchmark.")]
NumFewshot = Annotated[int | None, typer.Option("--num_fewshot", help="Examples before each question.")]
Limit = Annotated[float | None, typer.Option("--limit", help="First so many documents of each task.")]
Positions = Annotated[
    str | None, typer.Option("--positions", help="scored (default), all, prompt, response, last, or a slice.")
]
OutputPath = Annotated[
    Path | None, typer.Option("--output_path", help="Folder for lm-eval's own results and samples files.")
]
IncludePath = Annotated[
    list[Path] | None,
    typer.Option(
        "--include_path",
        help="Folder with task YAML files of your own. Their code (!function) runs when such a task is asked for.",
    ),
]
BenchmarkData = Annotated[
    Path | None, typer.Option("--benchmark_data", help="Folder with the tasks' data; no network is needed.")
]
Resume = Annotated[
    Path | None, typer.Option("--resume", help="Run folder that was cut short: go on, with the same other options.")
]
ApplyChatTemplate = Annotated[bool, typer.Option("--apply_chat_template", help="The tokenizer's own chat template.")]
SystemInstruction = Annotated[str | None, typer.Option("--system_instruction", help="What each prompt begins with.")]
GenKwargs = Annotated[
    str | None, typer.Option("--gen_kwargs", help="Such as do_sample=true,temperature=0.7,max_gen_toks=64.")
]
Repeats = Annotated[int | None, typer.Option("--repeats", help="Answers to each question; sampling only.")]
PredictOnly = Annotated[bool, typer.Option("--predict_only", help="Answers without scores.")]
UnsafeCode = Annotated[
    bool, typer.Option("--confirm_run_unsafe_code", help="Run tasks that execute code which the model wrote.")
]
BatchSize = Annotated[str, typer.Option("--batch_size", help="A number, or auto.")]
Scoring = Annotated[
    str, typer.Option("--scoring", help="tree (shared prefixes once), or stock: lm-eval's own batches.")
]
UseCache = Annotated[str | None, typer.Option("--use_cache", hidden=True)]
CacheRequests = Annotated[str | None, typer.Option("--cache_requests", hidden=True)]

Model = Annotated[str, typer.Option("--model", help="Hub name, folder, or demo (bundled).")]
Layers = Annotated[str | None, typer.Option("--layers", help="Such as 0-2,-1. Default: all.", metavar="LAYERS")]
Sites = Annotated[str | None, typer.Option("--sites", help="Such as embed,resid_post,mlp_out,z.", metavar="SITES")]
StoreDtype = Annotated[
    str | None, typer.Option("--store_dtype", help="Store narrower numbers: float16, bfloat16, or int8 (runs only).")
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Stop at infinite numbers and NaN, once they are stored. Default: warn at the end."),
]
Compression = Annotated[str | None, typer.Option("--compression", help="zstd, lz4 or gzip on the disk; default: none.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of everything drawn at random.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16.")]
Device = Annotated[str, typer.Option("--device", help="auto (cuda, mps, cpu) or a torch device.")]
DeviceMap = Annotated[str | None, typer.Option("--device_map", help='"auto" spreads a large model.')]
LoadIn8Bit = Annotated[bool, typer.Option("--load_in_8bit", help="LLM.int8 through bitsandbytes.")]
LoadIn4Bit = Annotated[bool, typer.Option("--load_in_4bit", help="NF4 through bitsandbytes.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")]
Peft = Annotated[str | None, typer.Option("--peft", help="Adapter of peft on the model: folder or hub name.")]
Delta = Annotated[str | None, typer.Option("--delta", help="Weights to add to the model's: folder or hub name.")]
Subfolder = Annotated[str | None, typer.Option("--subfolder", help="Where in the folder or on the hub the model is.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust_remote_code", help="Run code that comes with the checkpoint.")]
OffloadFolder = Annotated[
    str | None, typer.Option("--offload_folder", help="With --device_map: for weights that fit nowhere else.")
]
Mlflow = Annotated[
    str | None,
    typer.Option("--mlflow", metavar="[URI]", help="Log the run to MLflow; without a URI into its local store."),
]
SaveDir = Annotated[Path, typer.Option("--activation_save_dir", help="Where activations go.")]

P = ParamSpec("P")
R = TypeVar("R")


def one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Print our own errors in one line and exit with their code; any other goes through in full."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except AutomaticEvalError as error:
            end_bars()
            say(f"{type(error).__name__}: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(error.exit_code) from None

    return run


Load = Callable[[], Any]
"""Gives the LoadOptions; asked when the imports are made."""


def with_load(command: Callable[..., R]) -> Callable[..., R]:
    """Gives a command the options that say how its model is loaded; it takes them together, as `load`."""
    own, added = (inspect.signature(each, eval_str=True) for each in (command, _load))
    parameters = [each for each in own.parameters.values() if each.name != "load"] + list(added.parameters.values())

    @functools.wraps(command)
    def run(**given: Any) -> R:
        load = functools.partial(_load, **{name: given.pop(name) for name in added.parameters})
        return command(**given, load=load)

    run.__dict__["__signature__"] = own.replace(parameters=parameters)
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _load(
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    load_in_8bit: LoadIn8Bit = False,
    load_in_4bit: LoadIn4Bit = False,
    revision: Revision = None,
    peft: Peft = None,
    delta: Delta = None,
    subfolder: Subfolder = None,
    trust_remote_code: TrustRemoteCode = False,
    offload_folder: OffloadFolder = None,
) -> Any:
    from AutomaticEval.models.loading import LoadOptions
    from AutomaticEval.processes import own_device

    return LoadOptions(
        dtype=dtype,
        device=own_device(device),
        device_map=device_map,
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
        revision=revision,
        peft=peft,
        delta=delta,
        subfolder=subfolder,
        trust_remote_code=trust_remote_code,
        offload_folder=offload_folder,
    )


def chosen(
    sites: str | None,
    layers: str | None,
    positions: str | None,
    store_dtype: str | None,
    default: str,
    *,
    captures: bool,
    how: str,
) -> Selection | None:
    """What to keep, or None when nothing is captured. Raises SelectionError when a choice would be ignored."""
    from AutomaticEval.errors import SelectionError
    from AutomaticEval.selection import Selection

    if not captures and any(given is not None for given in (sites, layers, positions, store_dtype)):
        raise SelectionError(
            f"--sites, --layers, --positions or --store_dtype were given, but nothing is captured; add {how}."
        )
    return Selection.parse(sites, layers, positions or default, store_dtype) if captures else None


def refuse_unused(context: typer.Context, why: str, *names: str) -> None:
    """Raises SelectionError for an option that was given, and would be ignored."""
    from AutomaticEval.errors import SelectionError

    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise SelectionError(f"--{name} was given, but {why}; leave it out.")


def quiet_libraries() -> None:
    """Keep the warnings of the libraries off the screen; ours and their progress bars stay."""
    import logging

    import transformers

    transformers.logging.set_verbosity_error()
    for name in ("lm_eval", "lm-eval", "huggingface_hub", "datasets", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def tell_of_code(names: str, include_path: list[Path] | None, tell: Callable[[str], None]) -> None:
    """Once at a run: tasks of the user's own may be code."""
    if include_path or any(name.strip().endswith((".yaml", ".yml")) for name in names.split(",")):
        tell("Tasks of your own YAML files may run Python (!function, templates): read them before you run them.")


class Log:
    """Says lines on the error stream, and keeps them; processes but the first keep silent."""

    def __init__(self, *, speaks: bool = True) -> None:
        self._speaks = speaks
        self._lines: list[str] = []

    @property
    def text(self) -> str:
        """What was said."""
        return "\n".join(self._lines)

    def __call__(self, line: str) -> None:
        if self._speaks:
            self._lines.append(line)
            say(line, err=True)
