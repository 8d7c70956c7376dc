"""Which files of a run folder are part of the run: shards, but not those that another shard replaces or that were set aside.

Knows nothing of how they are written.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from AutomaticEval.errors import DamagedFile, StoreError, warn
from AutomaticEval.store.disk.partial_folders import clear_leftovers, is_leftover
from AutomaticEval.store.hdf5.contract import RUN_FORMAT, shard_number
from AutomaticEval.store.hdf5.open import OpenedFile
from AutomaticEval.store.local_paths import ASKED, LOCAL_PATHS

INDEX = "run.h5"
LOCK = ".lock"
NO_PART = {LOCK, LOCAL_PATHS, ASKED}
"""Files beside a run that hold nothing of it."""
DAMAGED = ".damaged"
"""The ending that a shard gets behind its name when it is set aside."""
_warned_of: set[Path] = set()
_told_unfinished: set[Path] = set()


def shard_names(folder: Path) -> list[str]:
    """The names of all shards in a folder, in order of their numbers."""
    numbers = {}
    for path in folder.glob("shard-*.h5"):
        with suppress(ValueError):  # a file with another name is no part of the run
            numbers[path.name] = shard_number(path.name)
    return sorted(numbers, key=lambda name: numbers[name])


def shards_bytes(folder: Path) -> int:
    """Bytes that the shards in a folder take on the disk."""
    return sum((folder / name).stat().st_size for name in shard_names(folder))


def not_replaced(folder: Path, names: Sequence[str]) -> list[str]:
    """The shards without those that another one replaces, which a process could not delete before it was killed.

    names: of all shards in the folder. Raises UnreadableFile.
    """
    replaced = {old for name in names for old in _replaced_by(folder / name)}
    return [name for name in names if name not in replaced]


def _replaced_by(path: Path) -> list[str]:
    """The shards that a shard replaces. Raises DamagedFile when one of them is not earlier than it, since then none might be left."""
    replaced = OpenedFile(path).replaces
    for old in replaced:
        if shard_number(old) >= shard_number(path.name):
            raise DamagedFile(
                f"{path} says that it replaces {old}; a shard replaces earlier ones. Restore it from a copy."
            )
    return replaced


def delete_replaced(folder: Path) -> None:
    """Delete the shards that another one replaces. Older ones go first, so that after a kill every shard that is left has the shard that replaces it.

    Warns of a shard that cannot be deleted, and stops there. Such shards are not read any more.
    """
    names = shard_names(folder)
    alive = set(not_replaced(folder, names))
    for name in names:
        if name not in alive:
            try:
                (folder / name).unlink()
            except OSError as failure:
                message = f"{folder / name} could not be deleted ({failure.strerror}). Another shard has its samples; `index` deletes it."
                warn(message)
                return


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder was evaluated to its end."""
    if not (folder / INDEX).exists():
        return False
    return OpenedFile(folder / INDEX, RUN_FORMAT).attributes.get("state", "finished") == "finished"


def refuse_finished(folder: Path) -> None:
    """Raises StoreError for a run that was evaluated to its end, and so cannot be resumed."""
    if is_finished(folder):
        raise StoreError(f"{folder} is finished, there is nothing to resume; read it with open_run.")


def set_aside_names(folder: Path) -> list[str]:
    """The names of damaged shards that a resume set aside."""
    return sorted(path.name for path in folder.glob(f"shard-*.h5{DAMAGED}*"))


def set_aside(path: Path) -> str:
    """Rename a damaged shard, so that it is no part of its run any more. Returns the new name."""
    number, aside = 1, path.with_name(f"{path.name}{DAMAGED}")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}{DAMAGED}-{number}")
    path.rename(aside)
    return aside.name


def warn_of_set_aside(folder: Path) -> None:
    """Warn, once a process, of the damaged shards that were set aside in a folder."""
    names = set_aside_names(folder) if folder not in _warned_of else []
    if names:
        _warned_of.add(folder)
        warn(
            f"{folder}: {', '.join(names)} {'was' if len(names) == 1 else 'were'} damaged and set aside by a resume, which "
            "computed the samples again; no part of the run, and not read."
        )


def warn_of_unfinished(folder: Path) -> None:
    """Warn, once a process, of a run that was not evaluated to its end, or is still being written."""
    if folder not in _told_unfinished:
        _told_unfinished.add(folder)
        warn(
            f"{folder} is not finished: samples may be missing, and those of a benchmark have no scores.{way_on(folder)}"
        )


def way_on(folder: Path) -> str:
    """A sentence with the command that goes on with an unfinished run, for messages."""
    if (folder / ASKED).exists():
        return f" Unless it is being written, it goes on with: python main.py --resume {shlex.quote(str(folder))}"
    return " It goes on with the command that made it and --resume, or with the call and resume=; what HFActivations captured, with lm.finish(results)."


def next_number(folder: Path) -> int:
    """The number for a new shard: higher than the number of any shard in the folder, also of those that were set aside."""
    names = [*shard_names(folder), *set_aside_names(folder)]
    matches = [re.match(r"shard-([0-9]+)\.h5", name) for name in names]
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def holds_nothing(folder: Path) -> bool:
    """Whether a folder is empty but for what a process leaves that is killed before its first shard."""
    names = [path.name for path in folder.iterdir()]
    return all(name in NO_PART or re.fullmatch(rf"\{LOCK}-[0-9]+", name) or is_leftover(name) for name in names)


@contextmanager
def leaving_nothing(folder: Path) -> Iterator[None]:
    """Remove a folder when the with fails before anything of a run is in it: neither a shard nor a result."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            clear_leftovers(folder)
            if holds_nothing(folder):
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()
        raise
