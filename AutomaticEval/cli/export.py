"""`main.py export RUN --to safetensors --output FOLDER`: activations for other tools, and up to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.options import OUTPUT, command, options_of, takes
from AutomaticEval.cli.printing import progress, say
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.store.export.table import FORMATS, check_format

if TYPE_CHECKING:
    from AutomaticEval.store.run import Run

HDF5 = "hdf5"
MOST_SHOWN = 100
"""How many characters of a setting are shown before an upload."""
READING_HDF5 = "from AutomaticEval import open_run; run = open_run({output!r})"


Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="A new folder; for hdf5, a new file.", rich_help_panel=OUTPUT),
]
To = Annotated[str, typer.Option("--to", help=f"{', '.join(FORMATS)} or {HDF5}.", metavar="FORMAT")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, float16 or bfloat16. Default: as stored, or float32 where the format has no bfloat16 or int8.",
    ),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push_to_hub",
        help="Upload it, too, as a private data set: shows what it holds, and asks.",
        metavar="REPO",
    ),
]
Public = Annotated[bool, typer.Option("--public", help="Make the data set on the hub a public one.")]


@command
@takes(written=options_of(RunOutput, "compression"))
def export(
    path: options.File,
    output: Output,
    written: RunOutput,
    to: To = "safetensors",
    dtype: Dtype = None,
    push_to_hub: PushToHub = None,
    public: Public = False,
) -> None:
    """Write activations for other tools: safetensors, numpy, Hugging Face datasets, TransformerLens."""
    from AutomaticEval.errors import SelectionError
    from AutomaticEval.store.export import hub
    from AutomaticEval.store.reader import open_run

    check_format(to, dtype, [HDF5])
    if written.compression is not None and to != HDF5:
        raise SelectionError(f"--compression was given, but {to} is not compressed; use --to hdf5, or leave it out.")
    if public and push_to_hub is None:
        raise SelectionError("--public was given, but nothing is uploaded; add --push_to_hub user/name.")
    run = open_run(path)
    output, n_samples = output.expanduser(), len(run)
    if push_to_hub is not None:
        _ask(run, push_to_hub, public=public)
        hub.create_repository(push_to_hub, private=not public)  # before any work: it may be refused
    _write(path, output, to, dtype, written.compression, n_samples)
    say(f"{n_samples} samples of {path} are in {output} ({_size(output)}).")
    if push_to_hub is not None:
        say(f"Uploaded: {hub.push_to_hub(output, push_to_hub, private=not public)}")
    reading = READING_HDF5 if to == HDF5 else FORMATS[to].reading
    say(f"Read it: {reading.format(output=str(output), first=str(_first(output)))}")


def _ask(run: Run, repository: str, *, public: bool) -> None:
    """Show what would be uploaded. Without a yes the command ends before anything is written or sent."""
    from AutomaticEval.store.export.outgoing import absolute_paths, column_names

    kind = "PUBLIC, for everyone to read" if public else "private, unless it is there already and public"
    say(f"To be uploaded to {repository} ({kind}):")
    say(f"  {len(run)} samples of the model {run.model}, with {', '.join(run.keys)}")
    say(f"  of each: {', '.join(column_names(run.contents))}, token ids")
    for name, value in run.settings.items():
        text = str(value)
        say(f"  {name}: {text if len(text) <= MOST_SHOWN else f'{text[:MOST_SHOWN]} …'}")
    folders = absolute_paths(run)
    if folders:
        say(f"  It names folders of this machine: {', '.join(folders)}")
    if not typer.confirm("Upload it?"):
        say("Nothing was written, and nothing was uploaded.")
        raise typer.Exit(1)


def _write(path: Path, output: Path, to: str, dtype: str | None, compression: str | None, n_samples: int) -> None:
    """Export, with a bar that counts bytes for one HDF5 file, and samples for the other formats."""
    if to == HDF5:
        from AutomaticEval.store.upkeep.convert import convert
        from AutomaticEval.store.upkeep.sizes import size_of

        with progress("Exporting", lambda: size_of(path)) as advance:
            convert(path, output, dtype=dtype, compression=compression, advance=advance)
        return
    from AutomaticEval.store.export.formats import export as to_folder

    with progress("Exporting", lambda: n_samples, of_bytes=False) as advance:
        to_folder(path, output, to, dtype=dtype, advance=advance)


def _first(output: Path) -> Path:
    """The first file of activations in a folder."""
    return next(iter(sorted(output.glob("s*-00000.*"))), output)


def _size(output: Path) -> str:
    from AutomaticEval.store.disk.whole_files import size_text

    files = output.iterdir() if output.is_dir() else [output]
    return size_text(sum(file.stat().st_size for file in files))
