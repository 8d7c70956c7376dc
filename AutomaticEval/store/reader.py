"""Opens files and runs: `load_activations` for one sample, `open_run` for many, lazily. Never unpickles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from AutomaticEval.errors import ManySamples, RefusedPickle, StoreError
from AutomaticEval.samples import ActivationData
from AutomaticEval.store.disk.file_names import PICKLE_SUFFIXES
from AutomaticEval.store.run import Run
from AutomaticEval.store.run_folder import INDEX, warn_of_unfinished


def load_activations(path: str | Path, sample: int | None = None, *, check: bool = True) -> dict[str, Any]:
    """One sample of a file or run folder. For a file that a drop-in function wrote, it is bit for bit what the function returned.

    path: a file, a run folder, or the old pickle name of a file written as `.h5`. sample: which one, from 0; needed
    where there are several. check: check the numbers against their checksums; False is for measuring what checking costs.
    Returns prompt, response, model, timestamp, input_ids [1, P], generated_ids [R], token_ids, positions and
    tokens (aligned with the rows), n_prompt_tokens, settings, and activations: key -> [n_positions, width]. Of a generated response also
    token_logprobs [R], float32, in files since version 1.5 of the format.
    Raises UnreadableFile (NotActivations, TruncatedFile, DamagedFile, NewerFormat), RefusedPickle, ManySamples, StoreError.
    """
    given = Path(path).expanduser()
    if given.suffix.lower() in PICKLE_SUFFIXES:
        if not given.with_suffix(".h5").exists():
            return _load_torch(given)
        given = given.with_suffix(".h5")
    run = open_run(given, check=check)
    if sample is None and len(run) != 1:
        raise ManySamples(
            f"{given} holds {len(run)} samples, not one; say which (sample=0), or read it with open_run({str(given)!r})."
        )
    number = sample or 0
    if not -len(run) <= number < len(run):
        raise StoreError(f"{given} has no sample {number}; it holds {len(run)}, from 0.")
    data = run[number]
    return data if given.is_dir() else ActivationData({**data, "path": str(given.resolve())})


def open_run(path: str | Path, *, check: bool = True) -> Run:
    """The samples of a run folder (or of one file) as a lazy sequence.

    check: check every number that is read, now and later, against its checksum; False is for measuring what checking costs.
    Warns of a run that is not finished: its samples have no scores, and more of them may come.
    Raises UnreadableFile, StoreError. Every read may raise DamagedFile, with the shard, the dataset and the rows.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise StoreError(f"open_run takes the path of a run folder or of a file; found {path!r}.")
    given = Path(path).expanduser().absolute()
    run = Run(given.parent if given.name == INDEX and given.is_file() else given, check=check)
    if not run.finished and run.path.is_dir():
        warn_of_unfinished(run.path)
    return run


def as_run(run: Run | str | Path) -> Run:
    """An open run as it is; a path is opened, as by `open_run`."""
    return run if isinstance(run, Run) else open_run(run)


def _load_torch(path: Path) -> dict[str, Any]:
    """The file of an older script: tensors and plain values only. A file that would need unpickling is refused."""
    if not path.exists():
        raise StoreError(f"no file {path}, nor {path.with_suffix('.h5')} beside it.")
    try:
        stored = torch.load(path, weights_only=True)
    except Exception as failure:  # torch raises many kinds; each means that it is not plain tensors
        raise RefusedPickle(
            f"{path} is a pickle of more than tensors and plain values; unpickling it could run any code, so it is "
            "refused. Save it again with torch.save(dict_of_tensors), or capture again."
        ) from failure
    if not isinstance(stored, dict):
        raise RefusedPickle(f"{path} holds a {type(stored).__name__}, not a dict of activations.")
    return ActivationData(stored)
