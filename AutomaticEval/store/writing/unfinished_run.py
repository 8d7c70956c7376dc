"""Which shards of an unfinished run are kept when it goes on: those that are whole, and were made with the same settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from AutomaticEval.errors import DamagedFile, NotActivations, OtherSettings, StoreError, TruncatedFile, warn
from AutomaticEval.settings import RunSettings
from AutomaticEval.store.hdf5.damage import verify_file
from AutomaticEval.store.hdf5.read import Shard
from AutomaticEval.store.run_folder import INDEX, not_replaced, refuse_finished, set_aside, shard_names


def take_up_shards(folder: Path, settings: Mapping[str, Any], *, resume: bool, finishing: bool) -> list[Shard]:
    """The shards of a folder with which a run goes on, in order; none for a folder without a run.

    settings: of the run, with its model. resume: check every byte first, and set damaged shards aside, with a warning. finishing: the
    processes that wrote the folder have just closed it; nothing is set aside. The `run.h5` of the unfinished run is deleted.
    Raises StoreError for a folder that holds a run when neither is given, OtherSettings, DamagedFile.
    """
    names = shard_names(folder)
    if not (resume or finishing) and (names or (folder / INDEX).exists()):
        raise StoreError(f"{folder} holds a run; choose another folder, or resume it.")
    refuse_finished(folder)
    if resume:
        _set_damaged_aside(folder, names, settings)
    shards = [Shard(folder / name) for name in not_replaced(folder, shard_names(folder))]
    _check_settings(folder, shards, settings)
    (folder / INDEX).unlink(missing_ok=True)  # it was built over the shards of the unfinished run
    return shards


def _set_damaged_aside(folder: Path, names: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Check every byte of every shard; before that, whether the run may be resumed at all."""
    opened: dict[str, Shard | None] = dict.fromkeys(names)
    for name in names:
        with suppress(NotActivations, TruncatedFile, DamagedFile):
            opened[name] = Shard(folder / name)
    _check_settings(folder, [shard for shard in opened.values() if shard is not None], settings)
    for name, problem in _damaged(folder, opened).items():
        message = f"{problem.removesuffix('.')}. It was set aside as {set_aside(folder / name)}; its samples are computed again."
        warn(message)


def _check_settings(folder: Path, shards: Sequence[Shard], settings: Mapping[str, Any]) -> None:
    """Raises OtherSettings when a shard was made with other settings, or is not of the same run as the first one."""
    for shard in shards:
        wanted = RunSettings.from_dict({**settings, "run_id": shards[0].made_with.run_id})
        apart = RunSettings.from_dict({"model": shard.model, **shard.settings}).differences(wanted, str(folder))
        if apart:
            raise OtherSettings(
                f"{folder} cannot be resumed: {'; '.join(map(str, apart))}. Give the options that it was made with, or another folder (--output)."
            )


def _damaged(folder: Path, opened: Mapping[str, Shard | None]) -> dict[str, str]:
    """Damaged shards, and what is wrong with each. All bytes are read, but not those of shards that a sound one replaces.

    opened: the shards of a folder by their names; None for one that cannot be opened.
    """
    problem_of: dict[str, str] = {}
    replaced: set[str] = set()
    for name, shard in reversed(list(opened.items())):  # a shard comes after those that it replaces
        if name in replaced:
            continue
        try:
            problems = verify_file(folder / name)
        except NotActivations as failure:
            problems = [str(failure)]
        if problems:
            problem_of[name] = problems[0]
        elif shard is not None:
            replaced.update(shard.replaces)
    return problem_of
