"""Stock tasks on files of your own: finds the data of each task in a folder, in the layouts that people have.

Example: a task has the data `cais/mmlu`, configuration `astronomy`. Its split `test` is looked for as PATTERNS say, in the folder itself and
in its subfolders `mmlu` and `<task>`. Files are read anew each time, never from a cache of an earlier state.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from AutomaticEval.errors import BenchmarkUnavailable

PATTERNS = (
    "{split}/{name}",
    "{split}/{name}_{split}",
    "{name}/{split}",
    "{name}/{split}-*-of-*",
    "{name}_{split}",
)
"""Where the split of a named configuration may be, without the file's ending."""
ALONE = ("{split}", "{split}-*-of-*", "data/{split}-*-of-*")
"""Where the split may be besides, if the configuration is the only one, or the folder is the task's own."""
ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
"""Formats that are read, in the order in which they are looked for."""
SPELLINGS = {"validation": ("validation", "valid", "val", "dev")}
"""Split -> the names that its file may have."""
OWN_FILES = ("json", "csv", "text", "parquet", "arrow")
"""Tasks with these data sets name their files themselves."""
LETTERS = "ABCD"


@contextmanager
def local_files(folder: str | None) -> Iterator[None]:
    """Have lm-eval's tasks take their data from a folder. None: from where the tasks say. Raises BenchmarkUnavailable."""
    if folder is None:
        yield
        return
    stock = ConfigurableTask.download

    def download(task: ConfigurableTask, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if callable(task.config.custom_dataset):
            stock(task, dataset_kwargs, **kwargs)
        elif task.DATASET_PATH in OWN_FILES:
            stock(task, _placed(dict(dataset_kwargs or {}), Path(folder), task.config.task), **kwargs)
        else:
            task.dataset = read_splits(Path(folder), task)
            for config in (task.config, task.fewshot_cfg):
                if callable(config.process_docs):
                    config.process_docs = _once(config.process_docs)

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = stock


def _placed(arguments: dict[str, Any], folder: Path, task: str) -> dict[str, Any]:
    """The arguments of a data set of files: a relative path that is not in the current folder is one in `folder`."""
    names = arguments.get("data_files")
    if isinstance(names, Mapping):
        placed: Any = {split: _each_placed(each, folder, task) for split, each in names.items()}
    else:
        placed = _each_placed(names, folder, task)
    return {**arguments, "data_files": placed} if names else arguments


def _each_placed(names: Any, folder: Path, task: str) -> Any:
    """A path, or each of several. Raises BenchmarkUnavailable for one that is in neither folder."""
    if isinstance(names, list | tuple):
        return [_each_placed(each, folder, task) for each in names]
    if not isinstance(names, str) or "://" in names or Path(names).is_absolute() or any(Path.cwd().glob(names)):
        return names
    if any(folder.glob(names)):
        return str(folder.absolute() / names)
    raise BenchmarkUnavailable(
        f"the task {task!r} names the file {names}, which is neither in the current folder ({Path.cwd()}) nor in --benchmark_data {folder}; put it "
        "into one of them, or write its whole path into the YAML file."
    )


def _once(process_docs: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """process_docs that processes the same documents once. lm-eval calls it at every look, and some tasks shuffle choices in it."""
    done: list[tuple[Any, Any]] = []

    @functools.wraps(process_docs)
    def processed(documents: Any) -> Any:
        for before, result in done:
            if before is documents:
                return result
        done.append((documents, process_docs(documents)))
        return done[-1][1]

    return processed


def read_splits(folder: Path, task: Any) -> datasets.DatasetDict:
    """Every split that a task names and the folder has. Raises BenchmarkUnavailable when the split with the questions is missing."""
    config = task.config
    asked = config.test_split or config.validation_split
    named = [config.test_split, config.validation_split, config.training_split, task.fewshot_cfg.split]
    splits = {}
    for split in dict.fromkeys(filter(None, named)):
        places = list(_places(folder, task, split))
        matches = (sorted(place.parent.glob(place.name)) for place in places)
        files = next((match for match in matches if match), None)
        if files is not None:
            splits[split] = _dataset([doc for file in files for doc in read_documents(file)], files[0])
        elif split == asked:
            raise BenchmarkUnavailable(missing(folder, task, split))
    for split in filter(None, named):
        splits.setdefault(split, datasets.Dataset.from_list([]))  # nothing is taken from it
    return datasets.DatasetDict(splits)


def _dataset(documents: list[dict[str, Any]], file: Path) -> datasets.Dataset:
    """Documents as a data set. It has every field that any document has, None where a document lacks it, as on the hub."""
    names = dict.fromkeys(name for document in documents for name in document)
    try:
        return datasets.Dataset.from_list([{name: document.get(name) for name in names} for document in documents])
    except (TypeError, ValueError) as failure:  # pyarrow's own are both
        raise BenchmarkUnavailable(f"{file}: a field has values of different types ({failure}).") from failure


def _places(folder: Path, task: Any, split: str) -> Iterator[Path]:
    """The paths where a split may be, the likeliest first. They may hold `*`."""
    for root in _roots(folder, task):
        for spelling in SPELLINGS.get(split, (split,)):
            for pattern in _patterns(root, task):
                for ending in ENDINGS:
                    yield root / (pattern.format(split=spelling, name=task.DATASET_NAME) + ending)


def _roots(folder: Path, task: Any) -> list[Path]:
    """The folders that a task's files may be in. The task's own comes first: two tasks may have files of the same name."""
    return [folder / task.config.task, folder / Path(task.DATASET_PATH).name, folder]


def _patterns(root: Path, task: Any) -> tuple[str, ...]:
    is_alone = task.DATASET_NAME in (None, "main", "default") or root.name in (task.config.task, task.DATASET_NAME)
    return (PATTERNS if task.DATASET_NAME else ()) + (ALONE if is_alone else ())


def missing(folder: Path, task: Any, split: str) -> str:
    """The message that says which files of a split were looked for, and what to do."""
    roots = _roots(folder, task)
    below = " and ".join(dict.fromkeys(root.name for root in roots[:2]))
    patterns = dict.fromkeys(pattern for root in roots for pattern in _patterns(root, task))
    tried = ", ".join(pattern.format(split=split, name=task.DATASET_NAME) for pattern in patterns)
    return (
        f"{folder} has no {split!r} split of the task {task.config.task!r} (data {task.DATASET_PATH}, configuration "
        f"{task.DATASET_NAME or 'none'}). Looked for {tried} ({', '.join(ENDINGS)}) in it and below it in "
        f"{below}. Put the file there; or leave --benchmark_data out and connect once, so that the "
        "hub client keeps a copy."
    )


def read_documents(file: Path) -> list[dict[str, Any]]:
    """The documents of one file. Raises BenchmarkUnavailable."""
    readers: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        ".jsonl": _read_lines,
        ".json": _read_list,
        ".csv": _read_csv,
        ".parquet": lambda path: datasets.Dataset.from_parquet(str(path), keep_in_memory=True).to_list(),
    }
    try:
        documents = readers[file.suffix](file)
    except (ValueError, OSError, csv.Error) as failure:
        raise BenchmarkUnavailable(f"{file} cannot be read: {failure}") from failure
    if not documents or not all(isinstance(each, Mapping) for each in documents):
        raise BenchmarkUnavailable(f"{file} holds no documents; it must hold objects, one a line or in a list.")
    return documents


def _read_list(file: Path) -> list[dict[str, Any]]:
    documents = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(documents, list):
        raise ValueError("the outermost value must be a list of documents")
    return documents


def _read_lines(file: Path) -> list[dict[str, Any]]:
    documents = []
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    documents.append(json.loads(line))
                except ValueError as failure:
                    raise ValueError(f"line {number}: {failure}") from failure
    return documents


def _read_csv(file: Path) -> list[dict[str, Any]]:
    """Rows under a header; or the rows of Hendrycks' MMLU, which have no header: question, four choices, letter."""
    with file.open(encoding="utf-8-sig", newline="") as text:
        rows = list(csv.reader(text))
    if not rows:
        return []
    if all(len(row) == 6 and row[5] and row[5] in tuple(LETTERS) for row in rows):
        subject = file.stem.rpartition("_")[0].replace("_", " ") or file.stem
        return [
            {"question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5]), "subject": subject}
            for row in rows
        ]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
