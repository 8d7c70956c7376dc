"""Names for new files and folders, which every file system accepts."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import xxhash

from AutomaticEval.errors import StoreError, warn

PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt")
OTHER_SUFFIXES = frozenset(
    [
        ".pth",
        ".ckpt",
        ".bin",
        ".npy",
        ".npz",
        ".safetensors",
        ".json",
        ".jsonl",
        ".csv",
        ".tsv",
        ".txt",
        ".md",
        ".parquet",
        ".arrow",
        ".feather",
        ".yaml",
        ".yml",
        ".toml",
        ".zip",
        ".gz",
        ".tar",
        ".png",
        ".pdf",
        ".html",
        ".mat",
        ".nc",
        ".zarr",
        ".onnx",
        ".gguf",
        ".py",
        ".log",
    ]
)
"""Endings that tell of a format, and not of HDF5."""


def hdf5_path(path: str | Path) -> Path:
    """The path that is written for a save path: the path itself. For a pickle's name it is `.h5` beside it, with a warning that says so.

    Raises StoreError for the name of another format.
    """
    given = Path(path).expanduser()
    if given.suffix.lower() not in PICKLE_SUFFIXES:
        refuse_other_format(given)
        return given
    written = given.with_suffix(".h5")
    warn(f"files are HDF5: {given} is written as {written}")
    return written


def refuse_other_format(path: Path) -> None:
    """Raises StoreError for a file that would be HDF5 under the name of another format."""
    if path.suffix.lower() in OTHER_SUFFIXES:
        raise StoreError(
            f"{path} would be HDF5, and {path.suffix} is the ending of another format; name it {path.with_suffix('.h5').name}. `main.py export` "
            "makes files of other formats."
        )


def numbered(path: Path, number: int) -> Path:
    """The path that is tried when those before it are taken: france.h5, france-2.h5, france-3.h5, …"""
    return path if number == 1 else path.with_stem(f"{path.stem}-{number}")


def plain_name(text: str) -> str:
    """The text as the name of one file or folder: not hidden, and neither `.` nor `..`."""
    return re.sub(r"[^\w.-]+", "-", text).lstrip(".") or "-"


def own_name(text: str, most_bytes: int) -> str:
    """A plain name of at most most_bytes bytes, which no other text gets.

    A text that is such a name already stays as it is. Of any other text the name is its plain name, or the beginning of it, and a hash
    of the whole text. File systems take 255 bytes, and a Chinese character has three.
    """
    name, raw = plain_name(text), text.encode("utf-8", "surrogatepass")
    if name == text and len(raw) <= most_bytes:
        return name
    mark = f"-{xxhash.xxh3_64_hexdigest(raw)[:8]}"
    return name.encode()[: most_bytes - len(mark)].decode("utf-8", "ignore") + mark


def file_stem(prefix: str, text: str, now: datetime | None = None) -> str:
    """`<prefix>_20240915_143022_123456_What_is_the_capital_of`: the time to the microsecond, and the first words of the text."""
    name = "_".join(re.findall(r"\w+", text)[:5])
    while len(name.encode("utf-8", "replace")) > 60:  # names are limited in bytes; a Chinese character has three
        name = name[:-1]
    return f"{prefix}_{now or datetime.now():%Y%m%d_%H%M%S_%f}_{name.strip('_') or 'question'}"
