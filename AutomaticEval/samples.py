"""A sample and its rows of activations: what capture, evaluation and store hand to one another.

Knows nothing of models or of files.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from AutomaticEval.errors import CaptureError, did_you_mean
from AutomaticEval.safe_text import html_table, shown
from AutomaticEval.sites import key_among

COLUMNS = {
    "prompt": "text",
    "response": "text",
    "timestamp": "text",
    "n_prompt_tokens": "int",
    "batch_rows": "int",
    "batch_columns": "int",
    "task": "text",
    "doc_id": "int",
    "choice": "int",
    "repeat": "int",
    "window": "int",
    "n_truncated": "int",
    "question": "text",
    "extracted_answer": "json",
    "choices": "json",
    "logprob": "float",
    "is_greedy": "bool",
    "scoring": "text",
    "token_logprobs": "floats",
    "thinking_start": "int",
    "thinking_stop": "int",
    "answer_start": "int",
    "thinking": "json",
    "answer": "json",
    "scored_text": "json",
    "correct": "bool",
    "target": "json",
    "prediction": "json",
    "metrics": "json",
    "prompt_hash": "text",
    "random_state": "text",
    "shard": "int",
    "index": "int",
}
"""The columns that a sample may have, and the type of each. `docs/format.md` says what they hold. No other can be written.

floats: an `array.array` of the type "f", one number for each token of the response; it takes four bytes a number, and equals another by value.
"""


IDS = torch.int16
"""The dtype of sites whose numbers are names of experts. It is never narrowed, averaged or quantised."""

NO_TOKEN = NO_POSITION = -1
"""Stand for the token and the position of a line that is no single token's."""

_MOST = 90
"""The most characters of a value that are printed."""


class RowFormat(NamedTuple):
    """How the rows of one site are kept."""

    dtype: torch.dtype
    """The dtype in which the numbers are stored."""

    width: int

    @property
    def read_as(self) -> torch.dtype:
        """The dtype in which rows are given back: float32 for int8."""
        return torch.float32 if self.dtype == torch.int8 else self.dtype


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one sequence that are stored together. Several samples may point into the same Rows."""

    token_ids: Sequence[int]
    tokens: Sequence[str]
    """The tokens' strings, aligned with token_ids."""

    positions: Sequence[int]
    activations: Mapping[str, Tensor]
    """Key -> [n_rows, width], on the CPU."""

    @cached_property
    def formats(self) -> dict[str, RowFormat]:
        """Site -> how its rows are kept. Raises CaptureError for a site that has not one row a position."""
        shapes = {key: (tensor.dtype, *tensor.shape) for key, tensor in self.activations.items()}
        if any(n_rows != len(self.positions) for _, n_rows, _ in shapes.values()):
            raise CaptureError(f"{len(self.positions)} rows of tokens have activations of the shapes {shapes}.")
        return {key: RowFormat(dtype, width) for key, (dtype, _, width) in shapes.items()}

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the activations."""
        return len(self.positions) * sum(dtype.itemsize * width for dtype, width in self.formats.values())

    @property
    def memory_bytes(self) -> int:
        """Approximate bytes in memory: of the activations, and of each row's token, string and position in Python."""
        return self.size_bytes + 150 * len(self.positions)


@dataclass(frozen=True, eq=False)
class Line(Rows):
    """One line [1, width] that stands for all kept rows of one sample. It is no token's, and at no position."""

    @classmethod
    def of(cls, activations: Mapping[str, Tensor]) -> Line:
        """activations: key -> [1, width]."""
        return cls([NO_TOKEN], [""], [NO_POSITION], activations)


class Part(NamedTuple):
    """Some of the rows that are stored together."""

    rows: Rows
    where: Sequence[int]
    """Indices into rows, ascending by position."""


def fed_of(input_ids: Sequence[int], generated_ids: Sequence[int]) -> list[int]:
    """The token ids that a model was fed for a sample: the prompt, and the response without its last token, which is never fed."""
    return [*input_ids, *list(generated_ids)[:-1]]


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt (or context) with one response (or continuation), and where its rows are."""

    fields: Mapping[str, Any]
    """Values of COLUMNS: prompt, response, timestamp, …"""

    input_ids: Sequence[int]
    generated_ids: Sequence[int]
    parts: Sequence[Part]
    """Its rows, one part after the other: first a prefix that many samples share, then its own."""

    def __post_init__(self) -> None:
        """Raises CaptureError for rows that are not this sample's tokens, and for columns that cannot be written."""
        check_columns(self.fields)
        _check_each_token(self.fields, len(self.generated_ids))
        if not self.parts:
            raise CaptureError("a sample needs the rows it points into, of which it may keep none.")
        fed = fed_of(self.input_ids, self.generated_ids)
        for rows, where in self.parts:
            if isinstance(rows, Line):
                continue
            positions = [rows.positions[index] for index in where]
            token_ids = [rows.token_ids[index] for index in where]
            inside = not positions or (min(where) >= 0 and min(positions) >= 0 and max(positions) < len(fed))
            if not inside or [fed[position] for position in positions] != token_ids:
                raise CaptureError(
                    f"rows of the tokens {token_ids[:8]} at the positions {positions[:8]} do not belong to their sample, which was fed "
                    f"{len(fed)} tokens (prompt {self.fields.get('prompt', '')[:40]!r})."
                )

    @property
    def memory_bytes(self) -> int:
        """Approximate bytes that the sample needs in memory beside its rows: for Python's numbers and text."""
        n_ids = len(self.input_ids) + len(self.generated_ids)
        texts = sum(len(value) for value in self.fields.values() if isinstance(value, str))
        return 36 * n_ids + texts + sum(4 * len(numbers) for numbers in _numbers(self.fields).values()) + 2048

    def activation_data(self, model: str, settings: Mapping[str, Any]) -> ActivationData:
        """The dict that the drop-in functions return and that `load_activations` gives back."""
        first = self.parts[0].rows
        if isinstance(first, Line):
            return sample_data(model, settings, self.fields, self.input_ids, self.generated_ids, first)
        picked: dict[str, list[Tensor]] = {}
        for rows, where in self.parts:
            index = torch.tensor(list(where), dtype=torch.long)
            for key, tensor in rows.activations.items():
                picked.setdefault(key, []).append(tensor[index])
        own = Rows(
            [rows.token_ids[i] for rows, where in self.parts for i in where],
            [rows.tokens[i] for rows, where in self.parts for i in where],
            [rows.positions[i] for rows, where in self.parts for i in where],
            {key: torch.cat(tensors) for key, tensors in picked.items()},
        )
        return sample_data(model, settings, self.fields, self.input_ids, self.generated_ids, own)


class _PlainDict(dict[str, Any]):
    """A dict whose copies are as it is. It is pickled as an OrderedDict, so that `torch.load` reads a file of `torch.save` with
    weights_only=True, and without this package.
    """

    def copy(self) -> Self:
        return type(self)(self)

    def __copy__(self) -> Self:
        return type(self)(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)({name: copy.deepcopy(value, memo) for name, value in self.items()})

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, (), None, None, iter(self.items())


class BySite(_PlainDict):
    """Key -> value, where `[…]`, `in` and `get` also take the other spellings of a site: resid_post.2 for layer_2."""

    def __missing__(self, given: str) -> Any:
        key = key_among(self.keys(), given)
        if key is None:
            raise KeyError(f"{given!r}; there are {', '.join(self) or 'none'}")
        return self[key]

    def __contains__(self, given: object) -> bool:
        return super().__contains__(given) or (isinstance(given, str) and key_among(self.keys(), given) is not None)

    def get(self, given: str, default: Any = None) -> Any:
        try:
            return self[given]
        except KeyError:
            return default


class ActivationData(_PlainDict):
    """One sample as a dict: prompt, response, activations, …. It is a dict in all but its repr, which is short, and its look in a notebook."""

    def __repr__(self) -> str:
        wide = max((len(name) for name, _ in self._lines()), default=0)
        lines = [f"  {name:{wide}}  {text}" for name, text in self._lines()]
        return "\n".join([f"<activation data: {len(self)} entries", *lines, ">"])

    def _repr_html_(self) -> str:
        """As a table, for notebooks."""
        return html_table("activation data", self._lines())

    def _lines(self) -> list[tuple[str, str]]:
        return [(shown(str(name)), each) for name, value in self.items() for each in _texts(value)]


def sample_data(
    model: str,
    settings: Mapping[str, Any],
    fields: Mapping[str, Any],
    input_ids: Sequence[int],
    generated_ids: Sequence[int],
    rows: Rows,
) -> ActivationData:
    """One sample as a dict, which is the same whether the sample comes from a model or from a file. rows: its own, and no others.

    With a line in the place of rows, `reduced` has it, key -> [width], and `activations` has no rows.
    """
    reduced = {}
    if isinstance(rows, Line):
        reduced = {"reduced": BySite({key: line[0] for key, line in rows.activations.items()})}
        rows = Rows([], [], [], {})
    hidden = ("batch_rows", "batch_columns", "shard", "index")
    batch_shape = [fields[name] for name in ("batch_rows", "batch_columns") if name in fields]
    data = {
        **{name: value for name, value in fields.items() if name not in hidden},
        **{name: torch.tensor(numbers, dtype=torch.float32) for name, numbers in _numbers(fields).items()},  # [R]
        "model": model,
        "input_ids": torch.tensor(list(input_ids), dtype=torch.long)[None],  # [1, P]
        "generated_ids": torch.tensor(list(generated_ids), dtype=torch.long),  # [R]
        "token_ids": torch.tensor(list(rows.token_ids), dtype=torch.long),  # [n_positions]
        "positions": torch.tensor(list(rows.positions), dtype=torch.long),  # [n_positions]
        "tokens": list(rows.tokens),
        "activations": BySite(rows.activations),
        **reduced,
        "settings": {**settings, "batch_shape": batch_shape} if batch_shape else dict(settings),
    }
    return ActivationData(data)


def _numbers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The columns with a number for each token of the response."""
    return {name: value for name, value in fields.items() if value is not None and COLUMNS.get(name) == "floats"}


def _check_each_token(fields: Mapping[str, Any], n_response: int) -> None:
    """Raises CaptureError for a column with another number of numbers than the response has tokens."""
    for name, numbers in _numbers(fields).items():
        if len(numbers) != n_response:
            raise CaptureError(f"{name} has {len(numbers)} numbers for a response of {n_response} tokens.")


def check_columns(names: Iterable[str]) -> None:
    """Raises CaptureError for a column that is not in COLUMNS: it would be lost."""
    for name in names:
        if name not in COLUMNS:
            raise CaptureError(
                f"a sample has the column {name!r}, which the file format does not have, and nothing was written."
                f"{did_you_mean(name, COLUMNS)} Columns: {', '.join(COLUMNS)}."
            )


def _texts(value: Any) -> list[str]:
    """What a value is, in one line; of tensors by name, a line for each shape."""
    if isinstance(value, Mapping) and value and all(isinstance(each, Tensor) for each in value.values()):
        by_shape: dict[str, list[str]] = {}
        for name, tensor in value.items():
            by_shape.setdefault(_kind(tensor), []).append(str(name))
        return [f"{kind} at {len(names)} sites: {_some(names)}" for kind, names in by_shape.items()]
    if isinstance(value, Tensor):
        return [_kind(value)]
    if isinstance(value, Mapping):
        return [f"{len(value)} entries: {_some([str(name) for name in value])}" if value else "none"]
    if isinstance(value, list | tuple) and len(repr(value)) > _MOST:
        return [f"{len(value)} items, {_cut(repr(value[0]), _MOST // 2)} …"]
    return [_cut(shown(repr(value)), _MOST)]


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _some(names: list[str]) -> str:
    """Names, of many the first three and the last."""
    return shown(", ".join(names if len(names) <= 5 else [*names[:3], "…", names[-1]]))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} …"
