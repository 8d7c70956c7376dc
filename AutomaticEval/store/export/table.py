"""The table of export formats. Imports no heavy library, since the help of `export` is made of it.

A new format is a row here and a module beside this one, with `write(run, folder, dtypes, advance)` and, where some runs cannot be
exported, `check(run)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from AutomaticEval.errors import SelectionError, did_you_mean

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Format:
    """A format that runs are exported to."""

    name: str
    module: str
    """The module in this folder that writes it."""

    reading: str
    """A line of Python that reads it. {output} stands for the folder, {first} for its first file of activations."""

    has_bfloat16: bool = True
    is_a_sample_at_a_time: bool = False
    """Whether rows that samples share are written once for each sample."""

    @property
    def writer(self) -> ModuleType:
        """The module that writes it."""
        return import_module(f"AutomaticEval.store.export.{self.module}")


_ROWS = (
    Format(
        "safetensors",
        "safetensors_files",
        "from safetensors.torch import load_file; tensors = load_file({first!r})",
    ),
    Format(
        "npz",
        "npz_files",
        "import numpy; arrays = numpy.load({first!r})",
        has_bfloat16=False,
    ),
    Format(
        "arrow",
        "arrow",
        "import datasets; rows = datasets.load_from_disk({output!r}).with_format('torch')",
        has_bfloat16=False,
        is_a_sample_at_a_time=True,
    ),
    Format(
        "transformer_lens",
        "transformer_lens_files",
        "from safetensors.torch import load_file; cache = load_file({first!r})",
        is_a_sample_at_a_time=True,
    ),
)
FORMATS = {row.name: row for row in _ROWS}
ELSEWHERE = {"embedding-atlas": "`main.py report RUN --to embedding-atlas` writes it: one row a question, at one place"}
"""What is no copy of a run, and where it is written."""


def check_format(to: str, dtype: str | None, others: Iterable[str] = ()) -> None:
    """Raises SelectionError for an unknown format or dtype, or when the two do not go together. others: formats besides FORMATS."""
    known = [*FORMATS, *others]
    if to in ELSEWHERE:
        raise SelectionError(f"{to} is no format of an export; {ELSEWHERE[to]}.")
    if to not in known:
        raise SelectionError(f"no format {to!r}.{did_you_mean(to, known)} Formats: {', '.join(known)}.")
    if dtype is not None and dtype not in DTYPES:
        raise SelectionError(f"no dtype {dtype!r}.{did_you_mean(dtype, DTYPES)} Dtypes: {', '.join(DTYPES)}.")
    if dtype == "bfloat16" and to in FORMATS and not FORMATS[to].has_bfloat16:
        raise SelectionError(f"{to} has no bfloat16; write float32, which holds the same numbers, or use safetensors.")
