"""Where texts come from: a file, a Hugging Face data set, or objects in Python (a table, a list, a generator). They are read one after
another. How the items of a file are read, `item_files` says.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from AutomaticEval.capture.texts.item_files import items_in, name_of
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

    Raises PromptError, which names the line, for an item that is no text or an empty one, for a file without texts, and what items_in raises.
    """
    path = Path(path)
    is_empty = True
    for place, item in items_in(path, FIELDS if field is None else (field,)):
        is_empty = False
        yield _text_of(item, f"{path}, {place}", field)
    if is_empty:
        raise PromptError(f"{path} holds no texts.")


def as_text(text: Any, field: str | None = None, place: str = "a text") -> Text:
    """A text that was given as it is, with its place, or as an object with a field that holds it.

    Raises PromptError for an empty one, and for what is no text.
    """
    if isinstance(text, Text):
        return text
    if isinstance(text, Mapping):
        return _text_of(text, place, field)
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"{'an empty text' if isinstance(text, str) else type(text).__name__} among the texts.")
    return Text(text, place)


def texts_of(given: Any, split: str = "train", field: str | None = None) -> Iterable[Text]:
    """The texts of what a person gives: a file, a data set, a DataFrame, or any iterable of texts or of objects that hold one.

    given: the path of a file; the name of a data set, or its folder; a DataFrame of pandas or polars; a list, a generator, a Series, a
    `datasets.Dataset`. field: the column, or the field of the objects, that holds the text; None for the first of FIELDS that is there.
    The result can be gone through again if what is given can be. Raises PromptError for what is none of these, and for a DataFrame
    without such a column, which it names.
    """
    if isinstance(given, str | Path):
        return FileTexts(Path(given), field) if Path(given).is_file() else DatasetTexts(str(given), split, field=field)
    if is_table(given):
        names = [str(name) for name in given.columns]
        return GivenTexts(given, field_of(names, field, "the DataFrame"), is_table=True)
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise PromptError(
            f"texts were given as a {type(given).__name__}; give a file, a data set, a DataFrame, or a list of texts."
        )
    texts = GivenTexts(given, field)
    return iter(texts) if iter(given) is given else texts


def is_table(given: Any) -> bool:
    """Whether something is a DataFrame, of pandas or of another library that has its columns by name."""
    return hasattr(given, "columns") and hasattr(given, "shape") and hasattr(given, "__getitem__")


def rows_of(given: Any) -> Iterable[Any]:
    """The rows of a DataFrame as objects; of anything else, its items."""
    if not is_table(given):
        return cast(Iterable[Any], given)
    names = [str(name) for name in given.columns]
    return (dict(zip(names, row, strict=True)) for row in zip(*(given[name] for name in given.columns), strict=True))


def name_of_texts(given: Any) -> str:
    """What a run calls its texts: the name of the file or of the data set, or "texts"."""
    if not isinstance(given, str | Path):
        return "texts"
    return name_of(Path(given)) if Path(given).is_file() else Path(given).stem


def drawn(texts: list[T], n: int | None, seed: int) -> list[T]:
    """n texts drawn at random, in their order; all of them when there are not more than n, or when n is None. Raises PromptError."""
    if n is not None and n < 1:
        raise PromptError(f"{n} texts were asked for; at least 1 is needed.")
    if n is None or n >= len(texts):
        return texts
    return [texts[index] for index in sorted(random.Random(seed).sample(range(len(texts)), n))]


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
        raise PromptError(
            f"{place}: none of the fields {', '.join(wanted)}.{near} Found {', '.join(names) or 'none'}. Call the one with the text so, or "
            "name it with text_field (extract --text_field, FromHuggingFace)."
        )
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


@dataclass(frozen=True)
class GivenTexts:
    """The texts of objects in Python, looked at one after another."""

    given: Any
    """Texts, or objects with a field that holds one; or a table."""
    field: str | None = None
    is_table: bool = False

    def __iter__(self) -> Iterator[Text]:
        """Raises PromptError, with the number of the item from 0, for one that is no text."""
        if self.is_table:
            where = f"the DataFrame, row {{}} (from 0), field {self.field!r}"
            return (_text_of(item, where.format(number), None) for number, item in enumerate(self.given[self.field]))
        return (as_text(item, self.field, f"item {number} (from 0)") for number, item in enumerate(self.given))


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
