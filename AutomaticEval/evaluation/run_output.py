"""Where a benchmark run is written, and how: the options of its output. Imports no heavy library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from AutomaticEval.errors import StoreError
from AutomaticEval.options import Option
from AutomaticEval.store.disk.overwriting import Overwrite, parse_overwrite


@dataclass(frozen=True)
class RunOutput:
    """Where what is captured goes."""

    activation_save_dir: Annotated[
        Path, Option("Folder in which the run gets a folder of its own, named after benchmark, model and time.")
    ] = Path("activations")
    output: Annotated[
        Path | None,
        Option(
            "The run's own folder, a new one, in place of one below --activation_save_dir. When nothing is captured: the folder for lm-eval's results."
        ),
    ] = None
    overwrite: Annotated[
        Overwrite,
        Option(
            "Replace the run in --output; with `version`, write beside it: run-2.",
            reads=str | None,
            default=None,
            metavar="[version]",
        ),
    ] = False
    resume: Annotated[
        Path | None,
        Option(
            "Run folder that was cut short: go on in it. No other option is needed; one that would change a number is refused."
        ),
    ] = None
    compression: Annotated[
        str | None, Option("Compress the activations on the disk: zstd, lz4 or gzip. Default: none.")
    ] = None
    strict: Annotated[
        bool,
        Option("Stop at infinite numbers and NaN, once they are stored. Default: count them, and warn at the end."),
    ] = False
    asked: Mapping[str, Any] = field(default_factory=dict)
    """What the run is asked for, by the names of the command's options: a resume then needs no more than the folder."""

    @classmethod
    def parse(
        cls,
        activation_save_dir: str | Path = "activations",
        output: str | Path | None = None,
        resume: str | Path | None = None,
        overwrite: bool | str | None = False,
        **given: Any,
    ) -> RunOutput:
        """An output from what people type. Raises StoreError for a folder that holds no run which was cut short, SelectionError."""
        own, earlier = (None if path is None else Path(path) for path in (output, resume))
        return cls(Path(activation_save_dir), own, parse_overwrite(overwrite), earlier, **given)

    def __post_init__(self) -> None:
        for name in ("activation_save_dir", "output", "resume"):
            path = getattr(self, name)
            object.__setattr__(self, name, None if path is None else path.expanduser())
        if self.overwrite and self.output is None:
            raise StoreError(
                "overwrite was given, but no output is named that it could replace; add output, or leave it out."
            )
        if self.resume is None:
            return
        if self.output is not None:
            raise StoreError("resume and output were both given; resume goes on in its own folder. Leave output out.")
        from AutomaticEval.store.disk.whole_files import named_failures
        from AutomaticEval.store.run_folder import LOCK, refuse_finished

        with named_failures(self.resume):
            is_folder = self.resume.is_dir()
        if not is_folder:
            raise StoreError(f"{self.resume} is no folder; resume needs the run folder that is to go on.")
        if not (self.resume / LOCK).exists():
            raise StoreError(f"{self.resume} holds no run that was cut short; resume needs the run folder itself.")
        refuse_finished(self.resume)

    @property
    def place(self) -> Path:
        """A folder on the disk that the run will fill."""
        return self.resume or self.output or self.activation_save_dir

    def refuse_before_loading(self, *, makes_folder: bool) -> None:
        """Raises an error for an output that could not be written, before a large model loads.

        makes_folder: whether this process makes the run's folder. Raises PathExists, SelectionError, MissingFilter.
        """
        from AutomaticEval.store.hdf5.write import check_compression

        check_compression(self.compression)
        if makes_folder:
            self.refuse_existing()

    def holds(self, folder: Path) -> bool:
        """Whether a folder is the run's own folder or inside it."""
        return self.output is not None and folder.absolute().is_relative_to(self.output.absolute())

    def refuse_existing(self) -> None:
        """Raises PathExists when the run's own folder is taken, and is not to be overwritten."""
        from AutomaticEval.store.writing.earlier_run import refuse_taken

        if self.output is not None:
            refuse_taken(self.output, self.overwrite)
