"""`main.py export RUN --to safetensors --output FOLDER`: activations for other tools, and up to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.options import one_line_errors
from AutomaticEval.cli.printing import progress, say

if TYPE_CHECKING:
    from AutomaticEval.store.reader import Run

HDF5 = "hdf5"
MOST_SHOWN = 100
"""Characters of a setting, before an upload."""
READING = {
    "safetensors": "from safetensors.torch import load_file; tensors = load_file({first!r})",
    "npz": "import numpy; arrays = numpy.load({first!r})",
    "arrow": "import datasets; rows = datasets.load_from_disk({output!r}).with_format('torch')",
    "transformer_lens": "from safetensors.torch import load_file; cache = load_file({first!r})",
    HDF5: "from AutomaticEval import open_run; run = open_run({output!r})",
}
"""Format -> one line of Python."""


@one_line_errors
def export(
    path: Annotated[Path, typer.Argument(help="A file, or a run folder.", metavar="FILE")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder; for hdf5, a new file.")],
    to: Annotated[
        str, typer.Option("--to", help="safetensors, npz, arrow, transformer_lens or hdf5.", metavar="FORMAT")
    ] = "safetensors",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="float32, float16 or bfloat16. Default: as stored, or float32 where the format has no bfloat16 or int8.",
        ),
    ] = None,
    compression: options.Compression = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push_to_hub",
            help="Upload it, too, as a private data set: shows what it holds, and asks.",
            metavar="REPO",
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the data set on the hub a public one.")] = False,
) -> None:
    """Write activations for other tools: safetensors, numpy, Hugging Face datasets, TransformerLens."""
    from AutomaticEval.errors import SelectionError
    from AutomaticEval.store.export import formats as store
    from AutomaticEval.store.export import hub
    from AutomaticEval.store.reader import open_run

    store.check_format(to, dtype, [*store.FORMATS, HDF5])
    if compression is not None and to != HDF5:
        raise SelectionError(f"--compression was given, but {to} is not compressed; use --to hdf5, or leave it out.")
    if public and push_to_hub is None:
        raise SelectionError("--public was given, but nothing is uploaded; add --push_to_hub user/name.")
    run = open_run(path)
    output, n_samples = output.expanduser(), len(run)
    if push_to_hub is not None:
        _ask(run, push_to_hub, public=public)
        hub.create_repository(push_to_hub, private=not public)  # before any work: it may be refused
    _write(path, output, to, dtype, compression, n_samples)
    say(f"{n_samples} samples of {path} are in {output} ({_size(output)}).")
    if push_to_hub is not None:
        say(f"Uploaded: {hub.push_to_hub(output, push_to_hub, private=not public)}")
    say(f"Read it: {READING[to].format(output=str(output), first=str(_first(output)))}")


def _ask(run: Run, repository: str, *, public: bool) -> None:
    """Show what would be uploaded. Without a yes the command ends before anything is written or sent."""
    from AutomaticEval.store.export.outgoing import column_names, places_of

    kind = "PUBLIC, for everyone to read" if public else "private, unless it is there already and public"
    say(f"To be uploaded to {repository} ({kind}):")
    say(f"  {len(run)} samples of the model {run.model}, with {', '.join(run.keys)}")
    say(f"  of each: {', '.join(column_names(run.contents))}, token ids")
    for name, value in run.settings.items():
        text = str(value)
        say(f"  {name}: {text if len(text) <= MOST_SHOWN else f'{text[:MOST_SHOWN]} …'}")
    found = places_of(run)
    if found:
        say(f"  It names folders of this machine: {', '.join(found)}")
    if not typer.confirm("Upload it?"):
        say("Nothing was written, and nothing was uploaded.")
        raise typer.Exit(1)


def _write(path: Path, output: Path, to: str, dtype: str | None, compression: str | None, n_samples: int) -> None:
    """Show a bar meanwhile: of bytes for one HDF5 file, of samples for the others."""
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
    """The first file of activations in it."""
    return next(iter(sorted(output.glob("s*-00000.*"))), output)


def _size(output: Path) -> str:
    from AutomaticEval.store.disk.whole_files import size_text

    files = output.iterdir() if output.is_dir() else [output]
    return size_text(sum(file.stat().st_size for file in files))
