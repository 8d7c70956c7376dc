"""One sample of a run compared with one plain forward of its tokens: rows, positions, scores, and the tokens of greedy decoding."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from AutomaticEval.capture.answers.think_marks import think_marks
from AutomaticEval.capture.recompute.plain_forward import Plain, pattern_layer, plain_forward
from AutomaticEval.capture.recompute.reduced_again import ReducedAgain
from AutomaticEval.capture.recompute.tolerance import (
    IN_8_BITS,
    LIMITS,
    Judged,
    Limits,
    RecomputedScore,
    head_elsewhere,
    ids_judged,
    judged,
    measured,
    narrowed_to,
    score_of,
)
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel, computed_dtype
from AutomaticEval.samples import fed_of
from AutomaticEval.selection import Positions, parse_think_tokens
from AutomaticEval.settings import think_end_token
from AutomaticEval.sites import Site, holds_ids, site_of
from AutomaticEval.store.contents.thinking_in import ThinkingIn
from AutomaticEval.store.hdf5.contract import dtype_named
from AutomaticEval.store.run import Run

KEEPS_GREEDY = frozenset(
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
"""Settings of a generation with which greedy decoding still takes the likeliest token. Any other may change the logits first."""
FEWEST_NUMBERS = 8
"""Reduced rows with fewer numbers, such as norms, are not compared with other rows: these may be as near by chance."""
SHOWN = 3
"""The most problems of a sample that are shown."""
NUMBERS = 2**23
"""The most numbers that are compared at once: a row of logits has hundreds of thousands."""


class RowDifference(NamedTuple):
    """The largest difference of a stored row, and which row that is."""

    part: float
    """The difference, as a part of the largest number of the row."""
    key: str
    place: str
    """Its position, in words; or that it is a sample's line."""


@dataclass(frozen=True)
class Compared:
    """The verdict on one sample."""

    number: int
    name: str
    """Its task, document and choice, for messages."""
    n_rows: int
    n_numbers: int
    is_equal: bool
    """Whether every stored number is equal, bit for bit."""
    furthest: RowDifference | None
    """The largest difference of all rows; None when there is none."""
    problems: tuple[str, ...]
    """What rounding does not explain, a line for each."""

    def __str__(self) -> str:
        question = f" ({self.name})" if self.name else ""
        return f"sample {self.number}{question}: {self._verdict}"

    @property
    def _verdict(self) -> str:
        if self.problems:
            more = f"; and {len(self.problems) - SHOWN} more" if len(self.problems) > SHOWN else ""
            return "; ".join(f"DIFFERENT {problem}" for problem in self.problems[:SHOWN]) + more
        if self.is_equal:
            return "equal" if self.n_rows else "equal (it has no rows)"
        if self.furthest is None:
            return "within rounding (of the steps of int8)"
        part, key, place = self.furthest
        return f"within rounding (max {part:.1e} of a row's largest number, at {key}, {place})"


class Comparison:
    """Compares samples of a run with plain forwards of the model that made it."""

    def __init__(self, run: Run, loaded: LoadedModel) -> None:
        self.run, self.loaded = run, loaded
        self._made, self._reduced = run.made_with, ReducedAgain(run)
        self.limits = IN_8_BITS if loaded.numbers().quantization == "8bit" else LIMITS[computed_dtype(loaded.model)]
        self._thinking, end = ThinkingIn(run.contents), think_end_token(self._made)
        self._marks = think_marks(loaded.tokenizer, parse_think_tokens(self._made.think_tokens), end)
        self._generation: dict[str | None, Mapping[str, Any] | None] = {}

    def of(self, number: int) -> Compared:
        """The verdict on one sample, from one forward of its tokens alone."""
        sample = self.run[number]  # this checks that its rows belong to its tokens
        tokens = _SampleTokens.of(sample, self._wanted(number, sample))
        is_greedy = sample.get("logprob") is None and self._is_greedy(sample)
        is_scored = is_greedy or any(sample.get(name) is not None for name in ("logprob", "token_logprobs"))
        n_scored = len(tokens.response) if is_scored else 0
        plain = plain_forward(self.loaded, tokens.fed, self.run.keys, tokens.around, n_scored)
        problems = [*_misplaced(tokens), *self._thinking_problems(number, sample)]
        rows, furthest, is_equal = _RightRows(tokens, plain, self._reduced), None, True
        held = {**sample["activations"], **{key: line[None] for key, line in sample.get("reduced", {}).items()}}
        for key, whole in held.items():
            stored, steps = self._cropped(key, whole, self._steps(number, key), len(tokens.fed))
            verdict = self._judged(key, stored, steps, rows)
            problems += self._problems(key, stored, steps, rows, verdict)
            is_equal &= verdict.measured.is_equal
            parts = verdict.measured.parts
            if len(parts) and float(parts.max()) > (furthest.part if furthest else 0):
                furthest = RowDifference(float(parts.max()), key, rows.place(int(parts.argmax())))
        if n_scored:
            score = score_of(plain.logits, tokens.response, self.limits)
            problems += _score_problems(sample, score)
            problems += _token_problems(sample, score)
            problems += _greedy_problems(score, tokens.response) if is_greedy else []
        n_numbers = sum(stored.numel() for stored in held.values())
        n_rows = sum(map(len, held.values()))
        return Compared(number, _name(sample), n_rows, n_numbers, is_equal, furthest, tuple(problems))

    def _wanted(self, number: int, sample: Mapping[str, Any]) -> list[int]:
        """The positions that the run keeps of a sample. A run that was pruned keeps those that every pruning left."""
        n_prompt, n_response = sample["input_ids"].shape[1], len(sample["generated_ids"])
        wanted = set(range(n_prompt + max(n_response - 1, 0)))
        for part in str(self._made.positions or "all").split(" of "):
            positions = Positions.parse(part)
            thinking = self._thinking.of(number) if positions.needs_thinking else None
            wanted &= set(positions.resolve(n_prompt, n_response, thinking))
        return sorted(wanted)

    def _thinking_problems(self, number: int, sample: Mapping[str, Any]) -> list[str]:
        """A line when the tokens have their thinking elsewhere than the sample says."""
        stored = self._thinking.known(number)
        if stored is None:
            return []
        found = self._marks.thinking(sample["input_ids"][0].tolist(), sample["generated_ids"].tolist())
        if found == stored:
            return []
        return [
            f"at thinking_start, thinking_stop and answer_start: {stored} is stored, and by the marks of the tokenizer it is {found}"
        ]

    def _steps(self, number: int, key: str) -> Tensor | None:
        return None if self._reduced.is_by_sample else self.run.steps(number, key)

    def _cropped(self, key: str, stored: Tensor, steps: Tensor | None, n_ids: int) -> tuple[Tensor, Tensor | None]:
        """A pattern [n, n_heads * n_keys] without the columns beyond its sequence, of which there may be a hundred thousand, all of zeros."""
        if pattern_layer(key) is None:
            return stored, steps
        n_keys = stored.shape[1] // self.loaded.layout.n_heads
        own = torch.arange(stored.shape[1]) % n_keys < n_ids
        if stored[:, ~own].any():
            return stored, steps
        return stored[:, own], None if steps is None else steps[:, own]

    def _judged(self, key: str, stored: Tensor, steps: Tensor | None, rows: _RightRows) -> Judged:
        """The verdict on the rows of one key, which are compared in blocks."""
        if holds_ids(key):
            return ids_judged(stored, rows.own(key, stored), self.limits)
        step = max(1, NUMBERS // stored.shape[1])
        blocks = []
        for at in (slice(start, start + step) for start in range(0, max(1, len(stored)), step)):
            own = None if steps is None else steps[at]
            right, others = rows.own(key, stored, at), rows.others(key, stored, at)
            how: dict[str, Any] = {"steps": own, "through": self._through, "sizes": rows.sizes(key, at)}
            blocks.append(measured(stored[at], right, others=others, **how))
        return judged(blocks, self.limits)

    def _problems(
        self, key: str, stored: Tensor, steps: Tensor | None, rows: _RightRows, verdict: Judged
    ) -> Iterator[str]:
        """What is wrong with the rows of one key."""
        right = rows.own(key, stored)
        named, is_as = self._made.store_dtype, stored.dtype if steps is None else torch.int8
        promised = right.dtype if named is None or holds_ids(key) else dtype_named(named)
        narrow = (
            narrowed_to(stored, right.to(self._through or promised)) if is_as == promised and steps is None else None
        )
        if is_as != promised:
            yield f"at {key}: stored as {_short(is_as)}, where {_short(promised)} was promised"
        if narrow is not None:
            yield f"at {key}: every number is one of {_short(narrow)}, where {_short(promised)} was promised"
        if verdict.measured.is_equal:
            return
        n_heads = self._n_heads(key)
        elsewhere = head_elsewhere(stored, right, n_heads) if n_heads else None
        if elsewhere is not None:
            yield f"at {key}: head {elsewhere[0]} has the values of head {elsewhere[1]}"
        if verdict.wrong.any() and holds_ids(key):
            n_wrong, share = int(verdict.wrong.sum()), self.limits.mean
            yield f"at {key}: {n_wrong} of {len(stored)} rows name other experts, or in another order; rounding explains {share:.2%} of them"
        elif verdict.wrong.any():
            yield _row_problem(key, rows, verdict, self.limits)

    @property
    def _through(self) -> torch.dtype | None:
        """The dtype in which the rows were stored before they were converted; None when they were not."""
        before = self._made.converted_from
        return None if before is None else dtype_named(before)

    def _n_heads(self, key: str) -> int:
        """How many heads a row of this key holds side by side; 0 for a site without heads, and for reduced rows."""
        return 0 if self._made.reduce is not None else self.loaded.layout.heads_at(site_of(key))

    def _is_greedy(self, sample: Mapping[str, Any]) -> bool:
        """Whether each token of the response is known to have been the likeliest: chosen greedily, from logits that no setting changed."""
        made = self._made
        if not len(sample["generated_ids"]):
            return False
        if made.temperature is not None:  # one prompt
            given = {*(made.generation_config or {}), *(made.generate_arguments or {})}
            return made.temperature == 0 and given <= KEEPS_GREEDY
        task = sample.get("task")
        if task not in self._generation:
            self._generation[task] = _generation_kwargs(self.run.path, task)
        generation = self._generation[task]
        if generation is None:
            return False
        is_sampled = generation.get("do_sample", generation.get("temperature", 0) != 0)
        return not is_sampled and {*generation, *self.loaded.model.generation_config.to_diff_dict()} <= KEEPS_GREEDY


class _SampleTokens(NamedTuple):
    """The tokens of a sample, and which of them have rows."""

    prompt: list[int]
    response: list[int]
    fed: list[int]
    wanted: list[int]
    """The positions that the run keeps of it."""
    positions: list[int]
    tokens: list[str]

    @property
    def around(self) -> list[int]:
        """The positions that have rows, and their neighbours, ascending."""
        near = {position + step for position in self.positions for step in (-1, 0, 1)}
        return [position for position in sorted(near) if 0 <= position < len(self.fed)]

    @classmethod
    def of(cls, sample: Mapping[str, Any], wanted: list[int]) -> _SampleTokens:
        """wanted: the positions that the run keeps of the sample, which a line stands for."""
        prompt, response = sample["input_ids"][0].tolist(), sample["generated_ids"].tolist()
        fed = fed_of(prompt, response)
        if "reduced" in sample:
            return cls(prompt, response, fed, wanted, wanted, [])
        return cls(prompt, response, fed, wanted, sample["positions"].tolist(), sample["tokens"])


def _misplaced(tokens: _SampleTokens) -> list[str]:
    """A line when other positions are stored than the run keeps."""
    if tokens.wanted == tokens.positions:
        return []
    different = sorted(set(tokens.wanted).symmetric_difference(tokens.positions)) or tokens.positions
    return [
        f"positions: {len(tokens.positions)} are stored, and the run kept {len(tokens.wanted)}; the first that differs is {different[0]}"
    ]


class _RightRows:
    """The recomputed rows of one sample, by key, in the shape in which they are stored."""

    def __init__(self, tokens: _SampleTokens, plain: Plain, reduced: ReducedAgain) -> None:
        self._plain, self._positions, self._tokens, self._reduced = plain, tokens.positions, tokens.tokens, reduced
        self._row_of = {position: row for row, position in enumerate(tokens.around)}

    def own(self, key: str, stored: Tensor, at: slice = slice(None)) -> Tensor:
        """[n, width]: the right rows for some of the stored rows of a key."""
        return self._reduced.of(key, self._taken(key, self._at(at), stored))

    def sizes(self, key: str, at: slice) -> Tensor | None:
        """[n, width]: what counts as the size of the numbers of these rows; None: the numbers themselves."""
        if self._plain.rows[key].dim() == 3:
            return None
        return self._reduced.sizes(key, self._plain.rows[key][[self._row_of[each] for each in self._at(at)]])

    def place(self, row: int) -> str:
        """Which of the stored rows it is, in words."""
        if self._reduced.is_by_sample:
            return f"the line of {len(self._positions)} positions"
        return f"position {self._positions[row]}"

    def token(self, row: int) -> str:
        """Its token, as a message shows it; nothing for a line."""
        return "" if self._reduced.is_by_sample else f" (token {self._tokens[row]!r})"

    def _at(self, at: slice) -> list[int]:
        """The positions of some of the stored rows. A line is of all of them."""
        return self._positions if self._reduced.is_by_sample else self._positions[at]

    def others(self, key: str, stored: Tensor, at: slice) -> dict[str, Tensor]:
        """Rows that may have been stored by mistake: those of the neighbours in the sequence, and those of the layers below and above."""
        if stored.shape[1] < FEWEST_NUMBERS and self._reduced.is_reducing:
            return {}
        others, positions = {}, self._at(at)
        for step, name in ((-1, "the position before it"), (1, "the position after it")):
            there = [each + step if each + step in self._row_of else each for each in positions]
            others[name] = self._reduced.of(key, self._taken(key, there, stored))
        for other in _beside(key):  # the heads of another layer may have another width
            is_alike = other in self._plain.rows and self._plain.rows[other].shape == self._plain.rows[key].shape
            if is_alike and pattern_layer(key) is None:
                others[other] = self._reduced.of(key, self._taken(other, positions, stored))
        return others

    def _taken(self, key: str, positions: Sequence[int], stored: Tensor) -> Tensor:
        rows = self._plain.rows[key][[self._row_of[each] for each in positions]]
        if rows.dim() == 3:  # a pattern [n, n_heads, n_ids] is stored with zeros up to the longest sequence
            n_keys = stored.shape[1] // rows.shape[1]
            rows = torch.nn.functional.pad(rows, (0, n_keys - rows.shape[2])).flatten(1)
        return rows


def _beside(key: str) -> list[str]:
    """The keys of the same kind of site, one layer below and one above."""
    kind, layer = site_of(key)
    return [] if layer is None else [Site(kind, layer + step).key for step in (-1, 1)]


def _row_problem(key: str, rows: _RightRows, verdict: Judged, limits: Limits) -> str:
    """A line on the wrong row with the largest difference."""
    all_rows = verdict.measured
    at = int(torch.where(verdict.wrong, all_rows.parts, -1).argmax())
    off, size = float(all_rows.off[at]), float(all_rows.size[at])
    explained = limits.largest * size
    size_told = f"off by {off:.3g}, where the largest number is {size:.3g} and rounding explains {explained:.1g}"
    if off <= explained:
        off, size = float(all_rows.mean_off[at]), float(all_rows.mean_size[at])
        size_told = f"off by {off:.3g} on average, where the mean size is {size:.3g} and rounding explains {limits.mean * size:.1g}"
    nearer = next((f" (it is nearer to {name})" for name, which in all_rows.nearer.items() if which[at]), "")
    half = f"; half of its rows are off by {verdict.median:.1e} of their mean size or more"
    n_wrong = f"{int(verdict.wrong.sum())} of {len(verdict.wrong)} rows differ"
    return (
        f"at {key}, {rows.place(at)}{rows.token(at)}: {size_told}{nearer}"
        f"{half if verdict.median > limits.median else ''}; {n_wrong}"
    )


def _token_problems(sample: Mapping[str, Any], score: RecomputedScore) -> list[str]:
    """A line on the stored log-probability of the first token of which it is wrong."""
    stored = sample.get("token_logprobs")
    if stored is None:
        return []
    wrong = ~((stored.double() - score.of_tokens).abs() <= score.slack_of_tokens)  # also where it is NaN
    at = next(iter(wrong.nonzero()[:, 0].tolist()), None)
    if at is None:
        return []
    return [
        f"at token_logprobs, token {at} of the response: {float(stored[at]):.5f} is stored, {float(score.of_tokens[at]):.5f} "
        f"recomputed (rounding explains {float(score.slack_of_tokens[at]):.1g}); {int(wrong.sum())} of {len(wrong)} tokens differ"
    ]


def _greedy_problems(score: RecomputedScore, tokens: Sequence[int]) -> list[str]:
    """A line on the first token that greedy decoding would not have taken."""
    at = next(iter(score.not_likeliest), None)
    return [] if at is None else [f"at token {at} of the response: greedy decoding takes another than {tokens[at]}"]


def _score_problems(sample: Mapping[str, Any], score: RecomputedScore) -> list[str]:
    """Lines on the stored log-likelihood of a continuation."""
    stored = sample.get("logprob")
    if stored is None:
        return []
    problems = []
    if not abs(stored - score.logprob) <= score.slack:  # also when it is NaN
        problems.append(
            f"at logprob: {stored:.5f} is stored, {score.logprob:.5f} recomputed (rounding explains {score.slack:.1g})"
        )
    is_greedy = sample.get("is_greedy")
    if is_greedy is not None and (score.not_likeliest if is_greedy else score.is_surely_greedy):
        problems.append(
            f"at is_greedy: {is_greedy} is stored, and {'not ' if is_greedy else ''}every token is the likeliest"
        )
    return problems


def _generation_kwargs(folder: Path, task: str | None) -> Mapping[str, Any] | None:
    """The settings with which a task's responses were generated, from lm-eval's results in the run folder; None when they are not there."""
    for file in sorted(folder.rglob("results_*.json"), reverse=True) if folder.is_dir() else ():
        configs = json.loads(file.read_text(encoding="utf-8")).get("configs", {})
        settings = configs.get(task, {}).get("generation_kwargs")
        if isinstance(settings, dict):
            return settings
    return None


def _name(sample: Mapping[str, Any]) -> str:
    """The question of a sample, as `mmlu_anatomy document 3, choice 1`; "" for a single prompt."""
    if not sample.get("task"):
        return ""
    document = f"{sample['task']} document {sample.get('doc_id')}"
    more = [f"{name} {sample[name]}" for name in ("repeat", "window") if sample.get(name)]
    choice = [] if sample.get("choice") is None else [f"choice {sample['choice']}"]
    return ", ".join([document, *choice, *more])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
