"""What is wrong with a file or with a whole run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from AutomaticEval.errors import AutomaticEvalError, DamagedFile, FileRefused, NotActivations, StoreError
from AutomaticEval.store.contents.columns import Listed
from AutomaticEval.store.contents.joined import joined
from AutomaticEval.store.hdf5.contract import RUN_FORMAT, SHARD_FORMAT
from AutomaticEval.store.hdf5.damage import Advance, ignore, verify_file
from AutomaticEval.store.reader import open_run
from AutomaticEval.store.run import Run
from AutomaticEval.store.run_folder import INDEX, not_replaced, shard_names, warn_of_set_aside
from AutomaticEval.store.shard_columns import order_of


def verify(path: Path, advance: Advance = ignore) -> list[str]:
    """What is wrong with a file or run, one line each, with the file and the dataset; empty when all is well.

    Every checksum is computed again, and every sample's rows are compared with its tokens. Every shard of a run must be there and
    belong to it. advance: is told how many bytes of activations were read.
    Raises StoreError when there is no such path, and NotActivations, FileRefused for a file that is not damaged but cannot be read.
    """
    if not path.exists():
        raise StoreError(f"no file or run folder {path}.")
    if path.is_file() and path.name == INDEX:
        path = path.parent
    if path.is_file():
        return verify_file(path, SHARD_FORMAT, advance)
    warn_of_set_aside(path)
    problems: list[str] = []
    if (path / INDEX).exists():
        problems += verify_file(path / INDEX, RUN_FORMAT, advance)
    for name in shard_names(path):
        problems += verify_file(path / name, SHARD_FORMAT, advance)
    if problems:
        return problems
    try:
        run = open_run(path, check=False)  # all of it was checked just now
        problems += _misplaced_samples(run)
        problems += _stray_shards(path, run)
    except (NotActivations, FileRefused):
        raise
    except AutomaticEvalError as failure:
        problems.append(str(failure))
    return problems


def check(path: Path) -> None:
    """Raises DamagedFile when anything is wrong: a copy gets checksums of its own, which would hide the damage."""
    problems = verify(path)
    if problems:
        rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DamagedFile(f"{problems[0]}{rest}. Nothing was copied from it; restore it from a copy.")


def _misplaced_samples(run: Run) -> list[str]:
    """The first sample of `run.h5` whose rows are not those of the shard that it names."""
    shards = run.shards  # each is checked to be of this run, with its rows
    files = [replace(shard.contents(), columns=Listed({})) for shard in shards]
    try:
        order = order_of(files, run.contents.columns)
    except ValueError as stray:
        return [f"{run.path / INDEX}: {stray}"]
    wrong = joined(files).segments.take(order).first_difference(run.contents.segments)
    if wrong is None:
        return []
    number, index = (run.column(name)[wrong] for name in ("shard", "index"))
    return [f"{run.path / INDEX}: sample {wrong} has not the rows of sample {index} of {shards[number].path.name}"]


def _stray_shards(path: Path, run: Run) -> list[str]:
    """Shards in the folder that are no part of the run. path: the folder, as it was given."""
    listed = {shard.path.name for shard in run.shards}
    names = shard_names(run.path)
    strays = [name for name in not_replaced(run.path, names) if name not in listed] if listed < set(names) else []
    return [f"{path / name}: it is there and no part of the run" for name in strays]
