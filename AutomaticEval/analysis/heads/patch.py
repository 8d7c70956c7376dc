"""Patching: values from one run are put into another run, to see which part of its answer they carry."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from AutomaticEval.analysis.numbers.estimate import mean_interval
from AutomaticEval.analysis.parts.before_after import Pairs, logprobs_one_by_one
from AutomaticEval.analysis.words.targets import one_token
from AutomaticEval.capture.texts.forward import padded, read
from AutomaticEval.capture.texts.sources import lines_of
from AutomaticEval.errors import EditError, PromptError
from AutomaticEval.models.architecture.forward_call import input_device
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.editing import Edit, editing
from AutomaticEval.models.recording import Kept
from AutomaticEval.sites import Site

POSITIONS = ("last", "all", "aligned")
SITES = ("z", "mlp_out", "resid_post")
Places = Mapping[int, Sequence[int] | None]
"""Layer -> its heads, for z; None for all of a site."""


def matched(source: Sequence[int], destination: Sequence[int], positions: str) -> list[tuple[int, int]]:
    """(position in the source, position in the destination) of each value that is moved.

    last: the last tokens. all: each to the same position, of prompts of equal length. aligned: tokens that both have in the same order,
    and stretches of equal length between them.
    Raises EditError for prompts of other lengths with all.
    """
    if positions == "last":
        return [(len(source) - 1, len(destination) - 1)]
    if positions == "all":
        if len(source) != len(destination):
            raise EditError(
                f"positions all needs prompts of equal length; these have {len(source)} and {len(destination)} tokens. Use aligned."
            )
        return [(place, place) for place in range(len(source))]
    if positions != "aligned":
        raise EditError(f"the positions {positions!r} are not known; write {', '.join(POSITIONS)}.")
    found = []
    for kind, first, last, low, high in SequenceMatcher(None, source, destination, autojunk=False).get_opcodes():
        if kind == "equal" or (kind == "replace" and last - first == high - low):
            found += list(zip(range(first, last), range(low, high), strict=True))
    return found


@dataclass
class Patching:
    """Values at chosen places of runs over source prompts, put into runs over as many destination prompts.

    places: layer -> heads (z), or None for all of the site. Only the prompt's positions are patched; what is generated after them is the
    model's own. Raises EditError, SiteUnavailable.
    """

    loaded: LoadedModel
    sources: Sequence[str]
    destinations: Sequence[str]
    places: Places
    positions: str = "last"
    site: str = "z"
    _values: list[dict[int, Tensor]] = field(init=False)
    _matched: list[list[tuple[int, int]]] = field(init=False)

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise EditError(f"the site {self.site!r} is not patched; write {', '.join(SITES)}.")
        if not self.sources or len(self.sources) != len(self.destinations):
            raise EditError(
                f"{len(self.sources)} sources and {len(self.destinations)} destinations; each needs its own."
            )
        encode = self.loaded.tokenizer
        pairs = [
            (encode(a)["input_ids"], encode(b)["input_ids"])
            for a, b in zip(self.sources, self.destinations, strict=True)
        ]
        self._matched = [matched(*pair, self.positions) for pair in pairs]
        self._values = [self._read(source) for source, _ in pairs]

    def _read(self, ids: Sequence[int]) -> dict[int, Tensor]:
        """Layer -> the values of one source run, at each of its positions: [pos, width]."""
        layout = self.loaded.layout
        taps = layout.pick(Site(self.site, layer) for layer in self.places)
        rows = read(self.loaded.model, layout, taps, padded([ids]))
        return {layer: rows[Site(self.site, layer).key] for layer in self.places}

    @contextmanager
    def applied(self, rows: Sequence[int], pads: Sequence[int]) -> Iterator[None]:
        """rows: which destinations the batch holds. pads: the padding on the left of each."""
        edits = [self._edit(layer, heads, rows, pads) for layer, heads in self.places.items()]
        with editing(self.loaded.model, edits):
            yield

    def logprobs(self, pairs: Pairs) -> list[float]:
        return logprobs_one_by_one(self, pairs)

    def _edit(self, layer: int, heads: Sequence[int] | None, rows: Sequence[int], pads: Sequence[int]) -> Edit:
        moved = [
            (number, pads[number] + there, self._values[row][layer][here])
            for number, row in enumerate(rows)
            for here, there in self._matched[row]
        ]
        batch_rows = torch.tensor([number for number, _, _ in moved], dtype=torch.long)
        columns = torch.tensor([column for _, column, _ in moved], dtype=torch.long)
        values = torch.stack([value for _, _, value in moved]) if moved else torch.empty(0)
        if heads is not None:
            values = values.view(len(moved), self.loaded.layout.n_heads, -1)[:, list(heads)]
        current: list[Tensor] = []

        def where(first: int, n_columns: int) -> Kept:
            some = (columns >= first) & (columns < first + n_columns)
            current[:] = [values[some]]
            return Kept(batch_rows[some], columns[some])

        return Edit(Site(self.site, layer), lambda found: current[0].to(found.device, found.dtype), heads, where)


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupted prompt, and the tokens whose logits tell them apart."""

    clean: str
    corrupted: str
    answer: str
    wrong: str


def read_pairs(path: str | Path) -> list[Pair]:
    """From JSONL: clean, corrupted, answer (of the clean prompt) and wrong (of the corrupted one) a line.

    Raises PromptError, with the line.
    """
    path = Path(path)
    if not path.is_file():
        raise PromptError(f"no file {path}; give a JSONL file of pairs.")
    pairs = []
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            pair = Pair(*(found[name] for name in ("clean", "corrupted", "answer", "wrong")))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise PromptError(
                f"{path}, line {number}: not an object with clean, corrupted, answer and wrong."
            ) from None
        if not all(isinstance(text, str) and text for text in (pair.clean, pair.corrupted, pair.answer, pair.wrong)):
            raise PromptError(
                f"{path}, line {number}: clean, corrupted, answer and wrong are texts, none of them empty."
            )
        pairs.append(pair)
    if not pairs:
        raise PromptError(f"{path} holds no pairs.")
    return pairs


def recovered(
    loaded: LoadedModel, pairs: Sequence[Pair], places: Places, positions: str = "all", site: str = "z"
) -> dict[str, Any]:
    """How much of the logit difference (answer - wrong, after the prompt) comes with the patched values.

    denoising: clean values in the corrupted run, (patched - corrupted) / (clean - corrupted); noising: corrupted values in the clean run,
    (clean - patched) / (clean - corrupted). 0: nothing; 1: all of it. Returns samples and a summary of means with 95 % bootstrap intervals;
    a pair whose clean and corrupted differences are equal has None, and does not count.
    """
    clean, corrupted = [pair.clean for pair in pairs], [pair.corrupted for pair in pairs]
    into_corrupted = Patching(loaded, clean, corrupted, places, positions, site)
    into_clean = Patching(loaded, corrupted, clean, places, positions, site)
    samples = []
    for row, pair in enumerate(pairs):
        tokens = told_apart(loaded, pair)
        before, after = (_difference(loaded, text, tokens) for text in (pair.clean, pair.corrupted))
        with into_corrupted.applied([row], [0]):
            denoised = _difference(loaded, pair.corrupted, tokens)
        with into_clean.applied([row], [0]):
            noised = _difference(loaded, pair.clean, tokens)
        whole = before - after
        parts = {"denoising": (denoised - after), "noising": (before - noised)}
        numbers = {"clean": before, "corrupted": after, "denoised": denoised, "noised": noised}
        samples.append(
            {**vars(pair), **numbers, **{name: part / whole if whole else None for name, part in parts.items()}}
        )
    summary = {
        name: mean_interval([each[name] for each in samples if each[name] is not None])
        for name in ("denoising", "noising")
    }
    return {"samples": samples, "summary": summary}


def told_apart(loaded: LoadedModel, pair: Pair) -> tuple[int, int]:
    """The tokens of answer and wrong. Raises PromptError when either is several tokens, or both are the same."""
    answer, wrong = (one_token(loaded.tokenizer, text) for text in (pair.answer, pair.wrong))
    if answer == wrong:
        raise PromptError(f"{pair.answer!r} and {pair.wrong!r} are the same token.")
    return answer, wrong


def _difference(loaded: LoadedModel, text: str, tokens: tuple[int, int]) -> float:
    """logit(answer) - logit(wrong) after a prompt."""
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]], device=input_device(loaded.model))
    with torch.no_grad():
        logits = loaded.model(ids, use_cache=False).logits[0, -1].double()
    return float(logits[tokens[0]] - logits[tokens[1]])
