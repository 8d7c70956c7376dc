"""One sample of a run against one plain forward of its tokens: rows, positions, scores, and what greedy decoding takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from AutomaticEval.capture.recompute.plain_forward import Plain, pattern_layer, plain_forward
from AutomaticEval.capture.recompute.tolerance import (
    IN_8_BITS,
    LIMITS,
    Judged,
    Limits,
    head_elsewhere,
    judged,
    measured,
    narrowed_to,
    score_of,
)
from AutomaticEval.models.loading import LoadedModel
from AutomaticEval.samples import fed_of
from AutomaticEval.selection import Positions
from AutomaticEval.store.hdf5.contract import dtype_named
from AutomaticEval.store.reader import Run

HARMLESS = frozenset(
    [
        "do_sample",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "typical_p",
        "max_length",
        "max_new_tokens",
        "max_gen_toks",
        "until",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "transformers_version",
        "_from_model_config",
    ]
)
"""What generation may be told and greedy decoding still takes the likeliest token; anything else may be a logits processor."""
SHOWN = 3
"""Problems of a sample that are told, of many."""
NUMBERS = 2**23
"""That are compared at once: logits have hundreds of thousands in a row."""


class Place(NamedTuple):
    """A stored row, and how far its furthest number is, as a part of its largest."""

    part: float
    key: str
    position: int


@dataclass(frozen=True)
class Compared:
    """What became of one sample."""

    number: int
    name: str
    """What it is of: its task, document and choice."""
    n_rows: int
    n_numbers: int
    is_equal: bool
    """Every stored number, bit for bit."""
    furthest: Place | None
    problems: tuple[str, ...]
    """What rounding does not explain, one line each."""

    def __str__(self) -> str:
        return f"sample {self.number}{self.name}: {self._verdict}"

    @property
    def _verdict(self) -> str:
        if self.problems:
            more = f"; and {len(self.problems) - SHOWN} more" if len(self.problems) > SHOWN else ""
            return "; ".join(f"DIFFERENT {problem}" for problem in self.problems[:SHOWN]) + more
        if self.is_equal:
            return "equal" if self.n_rows else "equal (it has no rows)"
        if self.furthest is None:
            return "within rounding (of the steps of int8)"
        part, key, position = self.furthest
        return f"within rounding (max {part:.1e} of a row's largest number, at {key}, position {position})"


class Comparison:
    """A run and the model that made it: samples are compared one by one."""

    def __init__(self, run: Run, loaded: LoadedModel) -> None:
        self.run, self.loaded = run, loaded
        self.limits = IN_8_BITS if loaded.numbers()["quantization"] == "8bit" else LIMITS[loaded.model.dtype]
        self._told: dict[str | None, Mapping[str, Any] | None] = {}

    def of(self, number: int) -> Compared:
        """One sample against one forward of it alone."""
        sample = self.run[number]  # checks that its rows are its tokens
        held = _Held.of(sample)
        n_scored = len(held.response) if sample.get("logprob") is not None or self._is_greedy(sample) else 0
        plain = plain_forward(self.loaded, held.fed, self.run.keys, held.around, n_scored)
        problems = _misplaced(held, self.run.settings)
        rows, furthest, is_equal = _Rows(held, plain), None, True
        for key, whole in sample["activations"].items():
            stored, steps = self._cropped(key, whole, self.run.steps(number, key), len(held.fed))
            found = self._judged(key, stored, steps, rows)
            problems += self._problems(key, stored, steps, rows, found)
            is_equal &= found.measured.is_equal
            parts = found.measured.parts
            if len(parts) and float(parts.max()) > (furthest.part if furthest else 0):
                furthest = Place(float(parts.max()), key, held.positions[int(parts.argmax())])
        if n_scored:
            problems += _score_problems(sample, plain.logits, held.response, self.limits)
        n_numbers = sum(stored.numel() for stored in sample["activations"].values())
        n_rows = len(held.positions) * len(self.run.keys)
        return Compared(number, _name(sample), n_rows, n_numbers, is_equal, furthest, tuple(problems))

    def _cropped(self, key: str, stored: Tensor, steps: Tensor | None, n_ids: int) -> tuple[Tensor, Tensor | None]:
        """A pattern [n, n_heads * n_keys] without the zeros beyond its sequence, of which there may be a hundred thousand."""
        if pattern_layer(key) is None:
            return stored, steps
        n_keys = stored.shape[1] // self.loaded.layout.n_heads
        own = torch.arange(stored.shape[1]) % n_keys < n_ids
        if stored[:, ~own].any():
            return stored, steps
        return stored[:, own], None if steps is None else steps[:, own]

    def _judged(self, key: str, stored: Tensor, steps: Tensor | None, rows: _Rows) -> Judged:
        """The rows of one key, a piece at a time."""
        step = max(1, NUMBERS // stored.shape[1])
        pieces = []
        for at in (slice(start, start + step) for start in range(0, max(1, len(stored)), step)):
            own = None if steps is None else steps[at]
            right, others = rows.own(key, stored, at), rows.others(key, stored, at)
            pieces.append(measured(stored[at], right, steps=own, through=self._through, others=others))
        return judged(pieces, self.limits)

    def _problems(self, key: str, stored: Tensor, steps: Tensor | None, rows: _Rows, found: Judged) -> Iterator[str]:
        """What is wrong with the rows of one key."""
        right = rows.own(key, stored)
        told, is_as = self.run.settings.get("store_dtype"), stored.dtype if steps is None else torch.int8
        promised = right.dtype if told is None else dtype_named(told)
        narrow = (
            narrowed_to(stored, right.to(self._through or promised)) if is_as == promised and steps is None else None
        )
        if is_as != promised:
            yield f"at {key}: stored as {_short(is_as)}, where {_short(promised)} was promised"
        if narrow is not None:
            yield f"at {key}: every number is one of {_short(narrow)}, where {_short(promised)} was promised"
        if found.measured.is_equal:
            return
        n_heads = self._n_heads(key)
        elsewhere = head_elsewhere(stored, right, n_heads) if n_heads else None
        if elsewhere is not None:
            yield f"at {key}: head {elsewhere[0]} has the values of head {elsewhere[1]}"
        if found.wrong.any():
            yield _row_problem(key, rows, found, self.limits)

    @property
    def _through(self) -> torch.dtype | None:
        """What the rows were stored in before they were converted."""
        before = self.run.settings.get("converted_from")
        return None if before is None else dtype_named(before)

    def _n_heads(self, key: str) -> int:
        """How many heads stand side by side in a row; 0 for a site that has none."""
        kind = key.rpartition(".")[2]
        if kind in ("q", "z", "head_result_norm", "pattern"):
            return self.loaded.layout.n_heads
        return self.loaded.layout.n_kv_heads if kind in ("k", "v") else 0

    def _is_greedy(self, sample: Mapping[str, Any]) -> bool:
        """Whether each token of a response is known to have been the likeliest: greedily taken, of logits that nothing had changed."""
        settings = self.run.settings
        if not len(sample["generated_ids"]):
            return False
        if "temperature" in settings:  # one prompt
            return settings["temperature"] == 0 and set(settings.get("generation_config", {})) <= HARMLESS
        task = sample.get("task")
        if task not in self._told:
            self._told[task] = _generation_kwargs(self.run.path, task)
        told = self._told[task]
        if told is None:
            return False
        is_sampled = told.get("do_sample", told.get("temperature", 0) != 0)
        return not is_sampled and {*told, *self.loaded.model.generation_config.to_diff_dict()} <= HARMLESS


class _Held(NamedTuple):
    """What a sample says of its tokens."""

    prompt: list[int]
    response: list[int]
    fed: list[int]
    positions: list[int]
    tokens: list[str]

    @property
    def around(self) -> list[int]:
        """The positions, and those beside them."""
        near = {at + step for at in self.positions for step in (-1, 0, 1)}
        return [at for at in sorted(near) if 0 <= at < len(self.fed)]

    @classmethod
    def of(cls, sample: Mapping[str, Any]) -> _Held:
        prompt, response = sample["input_ids"][0].tolist(), sample["generated_ids"].tolist()
        return cls(prompt, response, fed_of(prompt, response), sample["positions"].tolist(), sample["tokens"])


def _misplaced(held: _Held, settings: Mapping[str, Any]) -> list[str]:
    """Whether other positions are stored than the run kept; of a pruned one, those that were kept of those."""
    wanted = set(range(len(held.fed)))
    for part in str(settings.get("positions", "all")).split(" of "):
        wanted &= set(Positions.parse(part).resolve(len(held.prompt), len(held.response)))
    if sorted(wanted) == held.positions:
        return []
    odd = sorted(wanted.symmetric_difference(held.positions)) or held.positions
    return [
        f"positions: {len(held.positions)} are stored, and the run kept {len(wanted)}; the first that differs is {odd[0]}"
    ]


class _Rows:
    """The recomputed rows of one sample, by key, in the shape in which they are stored."""

    def __init__(self, held: _Held, plain: Plain) -> None:
        self._plain, self.positions, self.tokens = plain, held.positions, held.tokens
        self._place = {position: place for place, position in enumerate(held.around)}

    def own(self, key: str, stored: Tensor, at: slice = slice(None)) -> Tensor:
        return self._taken(key, self.positions[at], stored)

    def others(self, key: str, stored: Tensor, at: slice) -> dict[str, Tensor]:
        """What each row might be in place of its own: its neighbours' in the sequence, and those of the layers beside it."""
        found, positions = {}, self.positions[at]
        for step, name in ((-1, "the position before it"), (1, "the position after it")):
            there = [each + step if each + step in self._place else each for each in positions]
            found[name] = self._taken(key, there, stored)
        for other in _beside(key):
            if other in self._plain.rows and pattern_layer(key) is None:
                found[other] = self._taken(other, positions, stored)
        return found

    def _taken(self, key: str, positions: Sequence[int], stored: Tensor) -> Tensor:
        rows = self._plain.rows[key][[self._place[each] for each in positions]]
        if rows.dim() == 3:  # a pattern: [n, n_heads, n_ids], stored with zeros up to the longest sequence
            n_keys = stored.shape[1] // rows.shape[1]
            rows = torch.nn.functional.pad(rows, (0, n_keys - rows.shape[2])).flatten(1)
        return rows


def _beside(key: str) -> list[str]:
    """The same kind of site one layer below and above."""
    head, _, kind = key.partition(".")
    number = head.removeprefix("layer_")
    return [f"layer_{int(number) + step}{'.' * bool(kind)}{kind}" for step in (-1, 1)] if number.isdecimal() else []


def _row_problem(key: str, rows: _Rows, found: Judged, limits: Limits) -> str:
    """What is said of the wrong row that is furthest off."""
    all_rows = found.measured
    at = int(torch.where(found.wrong, all_rows.parts, -1).argmax())
    off, size = float(all_rows.off[at]), float(all_rows.size[at])
    explained = limits.largest * size
    told = f"off by {off:.3g}, where the largest number is {size:.3g} and rounding explains {explained:.1g}"
    if off <= explained:
        off, size = float(all_rows.mean_off[at]), float(all_rows.mean_size[at])
        told = f"off by {off:.3g} on average, where the mean size is {size:.3g} and rounding explains {limits.mean * size:.1g}"
    nearer = next((f" (it is nearer to {name})" for name, which in all_rows.nearer.items() if which[at]), "")
    half = f"; half of its rows are off by {found.median:.1e} of their mean size or more"
    n_wrong = f"{int(found.wrong.sum())} of {len(found.wrong)} rows differ"
    return (
        f"at {key}, position {rows.positions[at]} (token {rows.tokens[at]!r}): {told}{nearer}"
        f"{half if found.median > limits.median else ''}; {n_wrong}"
    )


def _score_problems(sample: Mapping[str, Any], logits: Tensor, tokens: Sequence[int], limits: Limits) -> list[str]:
    found = score_of(logits, tokens, limits)
    stored = sample.get("logprob")
    if stored is None:
        at = next(iter(found.not_likeliest), None)
        return [] if at is None else [f"at token {at} of the response: greedy decoding takes another than {tokens[at]}"]
    problems = []
    if not abs(stored - found.logprob) <= found.slack:  # nan is off, too
        problems.append(
            f"at logprob: {stored:.5f} is stored, {found.logprob:.5f} recomputed (rounding explains {found.slack:.1g})"
        )
    is_greedy = sample.get("is_greedy")
    if is_greedy is not None and (found.not_likeliest if is_greedy else found.is_surely_greedy):
        problems.append(
            f"at is_greedy: {is_greedy} is stored, and {'not ' if is_greedy else ''}every token is the likeliest"
        )
    return problems


def _generation_kwargs(folder: Path, task: str | None) -> Mapping[str, Any] | None:
    """How a task's answers were generated, as lm-eval's results in a run folder say; None when they do not."""
    for file in sorted(folder.rglob("results_*.json"), reverse=True) if folder.is_dir() else ():
        told = json.loads(file.read_text(encoding="utf-8")).get("configs", {}).get(task, {}).get("generation_kwargs")
        if isinstance(told, dict):
            return told
    return None


def _name(sample: Mapping[str, Any]) -> str:
    """` (mmlu_anatomy document 3, choice 1)`; nothing of a single prompt."""
    if not sample.get("task"):
        return ""
    document = f"{sample['task']} document {sample.get('doc_id')}"
    more = [f"{name} {sample[name]}" for name in ("choice", "repeat", "window") if sample.get(name)]
    return f" ({', '.join([document, *more])})"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
