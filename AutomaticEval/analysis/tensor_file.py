"""What our safetensors files share: the name and version of a format in their metadata, the ending of their names, and how they are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from AutomaticEval.errors import NewerFormat, StoreError, UnreadableFile
from AutomaticEval.store.disk.whole_files import OVERWRITING, prepare_file

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class TensorFile:
    """One kind of file."""

    name: str
    """Of the format, in the metadata: automatic-eval/probe."""

    version: str
    """A file with another first number is not read."""

    what: str
    """In messages: a probe."""

    made_by: str
    """The command that writes such files."""

    @property
    def metadata(self) -> dict[str, str]:
        """What the metadata of a new file begin with."""
        return {"format": self.name, "format_version": self.version}

    def prepare(self, path: Path, *, overwrite: bool = False, offer: str = OVERWRITING) -> None:
        """Whether a file can be written here. offer: as in `prepare_file`. Raises StoreError for another ending of the name, PathExists, FolderNotWritable."""
        if path.suffix != SUFFIX:
            raise StoreError(f"{path}: {self.what} is written as {SUFFIX}; give the file that ending.")
        prepare_file(path, overwrite=overwrite, offer=offer)

    def read(self, path: Path) -> tuple[Mapping[str, str], dict[str, Any]]:
        """The metadata and the tensors of a file. Raises UnreadableFile for a file of another kind, NewerFormat."""
        if not path.is_file():
            raise UnreadableFile(f"there is no file {path}; {self._expected}.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != self.name:
                    found = metadata.get("format", "other tensors")
                    noun = self.what.partition(" ")[2]
                    raise UnreadableFile(f"{path} holds {found}, and no {noun} ({self.name}); {self._expected}.")
                self.refuse_newer(path, metadata)
                return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except SafetensorError as failure:
            raise UnreadableFile(f"{path} is no safetensors file ({failure}); {self._expected}.") from None

    def refuse_newer(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Raises NewerFormat for a file of another version. metadata: of a file of this format."""
        version = metadata.get("format_version", "")
        if version.partition(".")[0] != self.version.partition(".")[0]:
            raise NewerFormat(
                f"{path} has the format {version or 'none'}, and this version reads {self.version}; update AutomaticEval."
            )

    @property
    def _expected(self) -> str:
        return f"{self.what} is a {SUFFIX} file of `{self.made_by}`"


DIRECTION = TensorFile("automatic-eval/direction", "1.0", "a direction", "probe --save_direction")
PROBE = TensorFile("automatic-eval/probe", "1.0", "a probe", "probe --save_probe")
TUNED_LENS = TensorFile("automatic-eval/tuned-lens", "1.0", "a tuned lens", "lens RUN --train_tuned FILE")
