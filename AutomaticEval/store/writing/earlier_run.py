"""What becomes of a run that is in the folder of a new one already: it is refused, replaced, or left, with the new one beside it.

Only a folder that holds a run, and nothing else, is ever replaced.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from AutomaticEval.errors import NotActivations, PathExists, StoreError, UnreadableFile
from AutomaticEval.store.disk.overwriting import VERSION, Overwrite, overwriting
from AutomaticEval.store.disk.partial_folders import is_leftover
from AutomaticEval.store.disk.whole_files import prepare_folder
from AutomaticEval.store.hdf5.contract import RUN_FORMAT
from AutomaticEval.store.hdf5.open import OpenedFile
from AutomaticEval.store.run_folder import DAMAGED, INDEX, LOCK, NO_PART, holds_nothing, is_finished, shard_names
from AutomaticEval.store.writing.folder_lock import locked

_BESIDE = {*NO_PART, INDEX, "head_strength.json", "extraction.json", "summary.md", "summary.html"}
"""Files of a run folder beside its shards."""
_NAMES = re.compile(rf"shard-[0-9]+\.h5({re.escape(DAMAGED)}(-[0-9]+)?)?|{re.escape(LOCK)}-[0-9]+")
_OF_LM_EVAL = re.compile(r"results_.*\.json|samples_.*\.jsonl")
"""lm-eval's own files, which are in a folder of the model's name, or beside the shards."""


def refuse_taken(folder: Path, overwrite: Overwrite = False) -> None:
    """Raises PathExists for a folder that a new run cannot have: one with anything in it that a killed process does not leave behind."""
    if overwrite == VERSION or _is_free(folder):
        return
    if not folder.is_dir():
        raise PathExists(f"{folder} is a file; name a folder.")
    other = next(_others(folder), None)
    beside = _numbered(folder, 2).name
    if overwrite and other is not None:
        raise PathExists(
            f"{folder} holds {other}, which is no part of a run, so that the folder is not replaced; name another one, or pass "
            f'overwrite="version", which writes {beside} (--overwrite version).'
        )
    if not overwrite:
        held = f"holds {other}" if other else "holds a run, which open_run reads"
        if is_cut_short(folder):
            held = "holds a run that was cut short; go on in it with resume (--resume)"
        raise PathExists(f"{folder} {held}; name a new folder{overwriting(beside)}.")


def new_run_folder(folder: Path, overwrite: Overwrite = False) -> Path:
    """The folder that a new run is written into, which is there and holds nothing. A run in it is deleted with overwrite=True.

    Raises PathExists as `refuse_taken`, FolderInUse for a run that is still being written, FolderNotWritable, DiskFull.
    """
    refuse_taken(folder, overwrite)
    if overwrite == VERSION:
        folder = next(each for each in (_numbered(folder, n) for n in itertools.count(1)) if _is_free(each))
    prepare_folder(folder)
    if not _is_free(folder):
        _delete_run(folder)
    return folder


def is_cut_short(folder: Path) -> bool:
    """Whether a folder holds a run that was begun and not finished."""
    with suppress(StoreError):  # a damaged run.h5 is of a run that was finished
        return (folder / LOCK).exists() and not is_finished(folder)
    return False


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and holds_nothing(folder))


def _numbered(folder: Path, number: int) -> Path:
    """The folder that is tried when those before it are taken: run, run-2, run-3, …"""
    return folder if number == 1 else folder.with_name(f"{folder.name}-{number}")


def _others(folder: Path) -> Iterator[str]:
    """What in a folder is not of a run; all of it when no run is there."""
    is_run = bool(shard_names(folder)) or (folder / INDEX).exists()
    for path in sorted(folder.iterdir()):
        if not is_run or not _is_of_run(path):
            yield path.name


def _is_of_run(path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        return is_leftover(path.name) or all(_OF_LM_EVAL.fullmatch(each.name) for each in path.iterdir())
    if not (path.name in _BESIDE or _NAMES.fullmatch(path.name) or _OF_LM_EVAL.fullmatch(path.name)):
        return False
    return _is_ours(path) if path.suffix == ".h5" else True


def _is_ours(path: Path) -> bool:
    """Whether an HDF5 file with the name of one of ours is one, also when it is damaged."""
    try:
        OpenedFile(path, *[RUN_FORMAT] * (path.name == INDEX), check=False)
    except NotActivations:
        return False
    except UnreadableFile:
        return True
    return True


def _delete_run(folder: Path) -> None:
    """Delete what is in a run's folder, and first what makes it a finished run."""
    lock = locked(folder)
    try:
        for path in sorted(folder.iterdir(), key=lambda each: each.name != INDEX):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    finally:
        lock.release()
