"""Where texts come from: a file (JSONL, JSON, CSV, or one text a line), or a Hugging Face data set. They are read one after another.

Every reader of JSON lines that people write stands here.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from AutomaticEval.errors import DatasetUnavailable, PromptError, SelectionError, did_you_mean, first_line
from AutomaticEval.file_states import file_states
from AutomaticEval.models.checkpoint.hub_reach import go_offline_without_hub
from AutomaticEval.public_names import public_name

T = TypeVar("T")
FIELDS = ("text", "input", "question", "prompt")
"""Names of the field that holds the text of an item; the first that the item has counts."""


class Text(NamedTuple):
    """One text, and where it comes from."""

    text: str
    place: str
    """For errors, such as `texts.jsonl, line 3`."""


def read_texts(path: str | Path, field: str | None = None) -> list[str]:
    """All texts of a file. Raises what `texts_in` raises."""
    return [text for text, _ in texts_in(path, field)]


def texts_in(path: str | Path, field: str | None = None) -> Iterator[Text]:
    """The texts of a file, in their order. field: the field of its objects that holds the text; None for the first of FIELDS that each has.

    Raises PromptError, which names the line, for an item that is no text or an empty one, for a file without texts, and for bytes that are
    not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise PromptError(f"no file {path}; give a JSONL, JSON, CSV or txt file of texts.")
    is_empty = True
    for text in _read(path, field):
        is_empty = False
        yield text
    if is_empty:
        raise PromptError(f"{path} holds no texts.")


def as_text(text: str | Text) -> Text:
    """A text that was given as it is, or with its place. Raises PromptError for an empty one, and for one that is no text."""
    if isinstance(text, Text):
        return text
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"{'an empty text' if isinstance(text, str) else type(text).__name__} among the texts.")
    return Text(text, "a text")


def drawn(texts: list[T], n: int | None, seed: int) -> list[T]:
    """n texts drawn at random, in their order; all of them when there are not more than n, or when n is None. Raises PromptError."""
    if n is not None and n < 1:
        raise PromptError(f"{n} texts were asked for; at least 1 is needed.")
    if n is None or n >= len(texts):
        return texts
    return [texts[index] for index in sorted(random.Random(seed).sample(range(len(texts)), n))]


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a file. Only newlines end a line, because JSON strings may hold the other characters that Python takes for an end.

    Raises PromptError for bytes that are not UTF-8.
    """
    with path.open("rb") as file:
        begins_at = 0
        for number, raw in enumerate(file):
            try:
                line = raw.decode("utf-8-sig" if number == 0 else "utf-8")
            except UnicodeDecodeError as broken:
                raise PromptError(
                    f"{path}, line {number + 1}, is not UTF-8: byte {begins_at + broken.start} of the file."
                ) from None
            begins_at += len(raw)
            yield line.removesuffix("\n")


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line of a JSONL file; empty lines are left out. Raises PromptError for a line that is not JSON."""
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            yield number, _parsed(line, path, number)


def objects_with(names: Sequence[str], path: Path) -> Iterator[tuple[str, list[Any]]]:
    """For each line of a JSONL file: its place, for errors, and the values of the named fields of its object. Empty lines are left out.

    Raises PromptError, which names the line, for a line that is not an object with these fields.
    """
    for number, line in enumerate(lines_of(path), 1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            values = [item[name] for name in names]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise PromptError(f"{place}: not an object with {', '.join(names[:-1])} and {names[-1]}.") from None
        yield place, values


def _read(path: Path, field: str | None) -> Iterator[Text]:
    readers = {".txt": _txt, ".csv": _csv, ".json": _json, ".jsonl": _json, ".ndjson": _json}
    read = readers.get(path.suffix.lower())
    if read is None:
        raise PromptError(
            f"{path} ends in {path.suffix or 'nothing'!r}; give a JSONL, JSON, CSV or txt file, or a data set's folder."
        )
    for place, item in read(path):
        yield _text_of(item, f"{path}, {place}", field)


def _txt(path: Path) -> Iterator[tuple[str, Any]]:
    return ((f"line {number}", line.removesuffix("\r")) for number, line in enumerate(lines_of(path), 1))


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    """For each row: the line in which it ends, and the row as an object."""
    csv.field_size_limit(2**31 - 1)  # texts are long
    reader = csv.DictReader((f"{line}\n" for line in lines_of(path)), strict=True)
    try:
        for row in reader:
            if None in row:
                raise PromptError(f"{path}, line {reader.line_num}: more fields than the first line names.")
            yield f"line {reader.line_num}", row
    except csv.Error as broken:
        raise PromptError(f"{path}, line {reader.line_num}: not CSV ({broken}).") from None


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """The items of a list, or of JSON lines; the first character decides which."""
    first = next((line for line in lines_of(path) if line.strip()), "")
    if first.lstrip().startswith("["):
        whole = _parsed("\n".join(lines_of(path)), path, 1)
        yield from ((f"item {number}", item) for number, item in enumerate(whole, 1))
        return
    yield from ((f"line {number}", item) for number, item in json_lines(path))


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as broken:
        raise PromptError(f"{path}, line {line + broken.lineno - 1}: not JSON ({broken.msg}).") from None
    except (ValueError, RecursionError) as broken:  # a number of thousands of digits; thousands of brackets
        raise PromptError(f"{path}, line {line}: JSON that cannot be read ({first_line(broken)}).") from None


def _text_of(item: Any, place: str, field: str | None) -> Text:
    """The text of an item of a file. Raises PromptError for an item without text, and for half a character."""
    if isinstance(item, Mapping):
        name = field_of(list(item), field, place)
        item, place = item[name], f"{place}, field {name!r}"
    elif field is not None:
        raise PromptError(f"{place}: a {type(item).__name__}, in which there is no field {field!r}.")
    if not isinstance(item, str) or not item.strip():
        raise PromptError(
            f"{place}: {'an empty text' if isinstance(item, str) else type(item).__name__ + ', not a text'}."
        )
    if not item.isascii() and any("\ud800" <= each <= "\udfff" for each in item):
        raise PromptError(f"{place}: half a character (a lone surrogate), which no tokenizer takes.")
    return Text(item, place)


def field_of(names: Sequence[str], field: str | None, place: str) -> str:
    """The name of the field that holds a text. Raises PromptError when there is none."""
    wanted = FIELDS if field is None else (field,)
    name = next((each for each in wanted if each in names), None)
    if name is None:
        near = "" if field is None else did_you_mean(field, names)
        raise PromptError(f"{place}: none of the fields {', '.join(wanted)}.{near} Found {', '.join(names) or 'none'}.")
    return name


@dataclass(frozen=True)
class FileTexts:
    """The texts of a file. They are read again whenever they are iterated."""

    path: Path
    field: str | None = None
    most: int | None = None
    """So many texts; None for all."""

    def __iter__(self) -> Iterator[Text]:
        return islice(texts_in(self.path, self.field), self.most)


@dataclass
class DatasetTexts:
    """The texts of a Hugging Face data set, streamed; also of a folder that `datasets` saved, or whose files it can read."""

    name: str
    split: str = "train"
    config: str | None = None
    field: str | None = None
    most: int | None = None
    """So many texts; None for all."""
    strict: bool = False
    """Whether an empty text is an error, and not counted and left out."""
    n_empty: int = 0

    def __post_init__(self) -> None:
        if self.most is not None and self.most < 1:
            raise PromptError(f"{self.most} texts were asked for; at least 1 is needed.")
        if Path(self.name).is_file():
            raise SelectionError(f"{self.name} is a file; give it as texts (--texts), or name a folder or a data set.")

    @property
    def about(self) -> dict[str, Any]:
        """What decides which texts these are, for settings."""
        about = {"dataset": public_name(self.name), "config": self.config, "split": self.split, "field": self.field}
        return {**about, "num_samples": self.most, "files": _state_of_folder(Path(self.name))}

    def __iter__(self) -> Iterator[Text]:
        """Raises DatasetUnavailable; PromptError for an unknown field, and for an item that is no text."""
        self.n_empty = 0
        yield from islice(self._all(), self.most)

    def _all(self) -> Iterator[Text]:
        name = None
        for number, item in enumerate(_streamed(self.name, self.config, self.split)):
            place = f"{self.name}, {self.split}, item {number}"
            name = name or field_of(list(item), self.field, place)
            text = "" if item.get(name) is None else item[name]
            if not isinstance(text, str):
                raise PromptError(f"{place}, field {name!r}: {type(text).__name__}, not a text.")
            if text.strip():
                yield Text(text, place)
            elif self.strict:
                raise PromptError(f"{place}, field {name!r}: an empty text.")
            else:
                self.n_empty += 1


def _state_of_folder(folder: Path) -> str | None:
    """A hash of the names, sizes and times of a local folder's files; None for a data set on the hub."""
    if not folder.is_dir():
        return None
    state = repr([*file_states(folder, with_subfolders=True)])
    return hashlib.blake2b(state.encode(), digest_size=8).hexdigest()


def _streamed(name: str, config: str | None, split: str) -> Iterator[Mapping[str, Any]]:
    """The items of a data set, one after another. Raises SelectionError for an unknown split, DatasetUnavailable."""
    import datasets

    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            saved = datasets.load_from_disk(name)
            items = saved[split] if isinstance(saved, dict) else saved
            if items.split is not None and str(items.split) != split:
                raise SelectionError(f"{name} holds the split {str(items.split)!r}, not {split!r}.")
        else:
            if not Path(name).exists():
                go_offline_without_hub()
            items = datasets.load_dataset(name, config, split=split, streaming=True)
        yield from items
    except SelectionError:
        raise
    except KeyError as absent:
        raise SelectionError(f"{name} has no split {absent.args[0]!r}.") from None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as failure:
        raise DatasetUnavailable(
            f"the data set {name!r} ({config or 'default'}, {split}) cannot be read: {first_line(failure)}"
        ) from None
