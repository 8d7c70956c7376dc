"""Writes `run.h5` again from the shards that are there."""

from __future__ import annotations

from pathlib import Path

from AutomaticEval.errors import DamagedFile, StoreError
from AutomaticEval.store.contents.columns import Listed
from AutomaticEval.store.disk.whole_files import prepare_folder
from AutomaticEval.store.reader import open_run
from AutomaticEval.store.run_folder import INDEX, delete_replaced
from AutomaticEval.store.upkeep.verify import check
from AutomaticEval.store.writing.folder_lock import locked
from AutomaticEval.store.writing.run_index import source_of, write_index


def rebuild_index(folder: Path) -> Path:
    """Write `run.h5` again. What an earlier one said of the samples, such as their scores, is kept.

    Returns its path. Raises FolderInUse, StoreError, UnreadableFile.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder} is not a run folder.")
    open_run(folder)  # raises for a folder that is no run, before a lock is left in it
    try:
        check(folder)
    except DamagedFile as damaged:
        raise DamagedFile(
            f"{damaged} If it is {INDEX} alone, delete that: the run is then read without its scores."
        ) from None
    prepare_folder(folder)
    lock = locked(folder)
    try:
        run = open_run(folder)
        sources = [source_of(shard) for shard in run.shards]
        write_index(folder, sources, run.shards, Listed.of(run.records()), finished=run.finished)
        delete_replaced(folder)
    finally:
        lock.release()
    return folder / INDEX
