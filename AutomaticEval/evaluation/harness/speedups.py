"""Does lm-eval's own work once instead of again and again: compiles templates, indexes task files, loads tasks, describes the machine.

Prompts and results stay the same.

The index of lm-eval's 14,000 task files takes seconds to make. It is kept in the user's cache folder, and made again when a task file or
lm-eval changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import torch
from lm_eval import utils
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from torch.utils import collect_env

from AutomaticEval.errors import StoreError
from AutomaticEval.evaluation.screen import hushed
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.described.plain_module import refuse_plain
from AutomaticEval.store.disk.json_files import write_json

FOR_LM_EVAL = "lm-eval runs transformers models"
STOCK = Path(lm_eval.tasks.__file__).parent
"""The folder of the task files that come with lm-eval."""


def stock_model(loaded: LoadedModel, options: Mapping[str, Any] = {}) -> HFLM:
    """lm-eval's own model of a loaded one, for its limits and its encoding. options: of lm-eval's `hf`."""
    refuse_plain(loaded.model, FOR_LM_EVAL)
    with hushed():
        return HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, **{"backend": "causal", **options})


@contextmanager
def quick_templates() -> Iterator[None]:
    """Compile each of lm-eval's templates once, not at every use."""
    stock = utils.env.from_string
    utils.env.from_string = lru_cache(maxsize=4096)(stock)
    try:
        yield
    finally:
        utils.env.from_string = stock


@contextmanager
def environment_once() -> Iterator[None]:
    """Describe the environment once in a process. lm-eval does it after every evaluation, and asks pip, which takes 0.6 s or more."""
    stock = collect_env.get_pretty_env_info
    collect_env.get_pretty_env_info = _environment
    try:
        yield
    finally:
        collect_env.get_pretty_env_info = stock


@cache
def _environment() -> str:
    """What torch says of the system, the devices and the installed packages."""
    return str(collect_env.pretty_str(collect_env.get_env_info()))  # type: ignore[no-untyped-call]


RandomStates = tuple[Any, Any, Any]
"""The random states of Python, NumPy and torch."""


def seed_everything(seed: int | None) -> None:
    """Seed Python, NumPy and torch as lm-eval does before it loads tasks. None: with lm-eval's own seeds."""
    random.seed(DEFAULT_RANDOM_SEED if seed is None else seed)
    np.random.seed(DEFAULT_OTHER_SEED if seed is None else seed)
    torch.manual_seed(DEFAULT_OTHER_SEED if seed is None else seed)


def random_states() -> RandomStates:
    """The random states as they are now."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


class LoadedBefore(TaskManager):  # type: ignore[misc]
    """Gives lm-eval tasks that are loaded already, and sets the random states that loading them now would leave.

    is_first: this is the first process of the run. torch's state is set in it alone: the other processes sample other answers.
    """

    def __init__(self, states: RandomStates, *, is_first: bool) -> None:
        super().__init__(include_defaults=False)
        self._states, self._is_first = states, is_first

    def load(self, task_list: Any) -> Any:
        random.setstate(self._states[0])
        np.random.set_state(self._states[1])
        if self._is_first:
            torch.set_rng_state(self._states[2])
        return super().load(task_list)


def task_manager(include_path: Sequence[str], *, include_defaults: bool) -> TaskManager:
    """lm-eval's TaskManager, made quicker from the second time on. include_defaults: with lm-eval's own tasks."""
    manager = TaskManager(include_path=list(include_path), include_defaults=False)
    if include_defaults:
        manager._index = {**_stock_index(), **manager._index}
        manager._all_tasks = sorted(manager._index)
    return manager


def _stock_index() -> dict[str, Entry]:
    """Name -> entry, for every task, group and tag that comes with lm-eval."""
    file = _cache_folder() / f"lm_eval_tasks_{_state_of_stock()}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # no such file, or not one of ours
        return {name: _entry(name, **fields) for name, fields in json.loads(file.read_text(encoding="utf-8")).items()}
    index = TaskManager()._index
    with suppress(StoreError):  # a home that cannot be written only costs time
        write_json(file, {name: _fields(entry) for name, entry in index.items()}, overwrite=True)
    return dict(index)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "automatic-eval"


def _state_of_stock() -> str:
    """A hash of path, size and time of every task file. It changes when a task file does."""
    state = hashlib.blake2b(lm_eval.__version__.encode(), digest_size=12)
    for folder, _, names in sorted(os.walk(STOCK)):
        for name in sorted(name for name in names if not name.endswith((".pyc", ".md"))):
            file = f"{folder}{os.sep}{name}"  # 14,000 times: a Path would take longer than the file system
            status = os.stat(file)  # noqa: PTH116
            state.update(f"{file} {status.st_size} {status.st_mtime_ns}".encode())
    return state.hexdigest()


def _fields(entry: Entry) -> dict[str, Any]:
    path = None if entry.yaml_path is None else str(entry.yaml_path)
    return {"kind": entry.kind.name, "yaml_path": path, "tags": sorted(entry.tags)}


def _entry(name: str, kind: str, yaml_path: str | None, tags: list[str]) -> Entry:
    return Entry(name, Kind[kind], None if yaml_path is None else Path(yaml_path), tags=set(tags))
