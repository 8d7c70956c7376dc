"""What lies in a run folder, and which of it is the run's: shards, those that another replaces, and those that were set aside.

Knows nothing of how they are written.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from AutomaticEval.errors import DamagedFile, StoreError
from AutomaticEval.store.disk.partial_folders import clear_leftovers
from AutomaticEval.store.hdf5.contract import RUN_FORMAT, shard_number
from AutomaticEval.store.hdf5.open import OpenedFile
from AutomaticEval.store.local_paths import LOCAL_PATHS

INDEX = "run.h5"
LOCK = ".lock"
DAMAGED = ".damaged"
"""What follows the name of a shard that was set aside."""
_told: set[Path] = set()


def shard_names(folder: Path) -> list[str]:
    """The shards that are in a folder, in order."""
    numbers = {}
    for path in folder.glob("shard-*.h5"):
        with suppress(ValueError):  # a file of another name is none of the run's
            numbers[path.name] = shard_number(path.name)
    return sorted(numbers, key=lambda name: numbers[name])


def shards_bytes(folder: Path) -> int:
    """What the shards in a folder take on the disk."""
    return sum((folder / name).stat().st_size for name in shard_names(folder))


def living(folder: Path, names: Sequence[str]) -> list[str]:
    """Without those that another one replaces: a process was killed before it could delete them."""
    replaced = {old for name in names for old in _replaced_by(folder / name)}
    return [name for name in names if name not in replaced]


def _replaced_by(path: Path) -> list[str]:
    """Raises DamagedFile for a shard that says it replaces a later one, or itself: then none of them might be left."""
    replaced = OpenedFile(path).replaces
    for old in replaced:
        if shard_number(old) >= shard_number(path.name):
            raise DamagedFile(
                f"{path} says that it replaces {old}; a shard replaces earlier ones. Restore it from a copy."
            )
    return replaced


def delete_replaced(folder: Path) -> None:
    """Delete the shards that another one replaces; older ones first, so that a kill leaves none without its heir.

    Warns of one that cannot be deleted: it is read no more, and all that are newer stay.
    """
    names = shard_names(folder)
    alive = set(living(folder, names))
    for name in names:
        if name not in alive:
            try:
                (folder / name).unlink()
            except OSError as failure:
                told = f"{folder / name} could not be deleted ({failure.strerror}). Another shard has its samples; `index` deletes it."
                warnings.warn(told, UserWarning, stacklevel=3)
                return


def is_finished(folder: Path) -> bool:
    """Whether a run was evaluated to its end."""
    if not (folder / INDEX).exists():
        return False
    return OpenedFile(folder / INDEX, RUN_FORMAT).attributes.get("state", "finished") == "finished"


def refuse_finished(folder: Path) -> None:
    """Raises StoreError for a run that cannot be resumed, because it was evaluated to its end."""
    if is_finished(folder):
        raise StoreError(f"{folder} is finished, there is nothing to resume; read it with open_run.")


def set_aside_names(folder: Path) -> list[str]:
    """The damaged shards that a resume set aside."""
    return sorted(path.name for path in folder.glob(f"shard-*.h5{DAMAGED}*"))


def set_aside(path: Path) -> str:
    """Give a damaged shard a name by which it is no part of its run. Returns the name."""
    number, aside = 1, path.with_name(f"{path.name}{DAMAGED}")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}{DAMAGED}-{number}")
    path.rename(aside)
    return aside.name


def tell_set_aside(folder: Path) -> None:
    """Once: which damaged shards lie in a folder, no part of the run."""
    names = set_aside_names(folder) if folder not in _told else []
    if names:
        _told.add(folder)
        warnings.warn(
            f"{folder}: {', '.join(names)} {'was' if len(names) == 1 else 'were'} damaged and set aside by a resume, which "
            "computed the samples again; no part of the run, and not read.",
            UserWarning,
            stacklevel=3,
        )


def next_number(folder: Path) -> int:
    """The number for a new shard: higher than that of any shard that is or was in the folder."""
    names = [*shard_names(folder), *set_aside_names(folder)]
    matches = [re.match(r"shard-([0-9]+)\.h5", name) for name in names]
    return max((int(match[1]) + 1 for match in matches if match), default=0)


@contextmanager
def leaving_nothing(folder: Path) -> Iterator[None]:
    """Remove a folder when the with fails before anything of a run is in it: neither a shard nor a result."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            clear_leftovers(folder)
            if {path.name for path in folder.iterdir()} <= {LOCK, LOCAL_PATHS}:
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()
        raise
