"""Patching: values of one run are put into another run, which shows how much of the first run's answer they carry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, ClassVar

import torch
from torch import Tensor

from AutomaticEval.analysis.numbers import ratios
from AutomaticEval.analysis.numbers.estimate import methods
from AutomaticEval.analysis.parts.before_after import Continuations, logprobs_one_by_one
from AutomaticEval.analysis.parts.replaced_values import replaced_values
from AutomaticEval.analysis.result import Result
from AutomaticEval.analysis.words.pairs import Pair, told_apart
from AutomaticEval.capture.texts.forward import padded, read
from AutomaticEval.errors import EditError
from AutomaticEval.models.architecture.forward_call import input_device
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.edit import Edit
from AutomaticEval.models.editing import editing
from AutomaticEval.models.recording import Kept
from AutomaticEval.sites import Site

POSITIONS = ("last", "all", "aligned")
SITES = ("z", "mlp_out", "resid_post")
Places = Mapping[int, Sequence[int] | None]
"""Layer -> which of its heads, for z. None stands for the whole width of the site."""


def matched(source: Sequence[int], destination: Sequence[int], positions: str) -> list[tuple[int, int]]:
    """(position in the source, position in the destination) of each value that is moved. Both prompts are token ids.

    positions: last, the last token to the last token; all, each token to the same position, for prompts of equal length; aligned, between
    tokens that both prompts have in the same order, and between stretches of equal length that lie between those.
    Raises EditError for other positions, and for all with prompts of different lengths.
    """
    if positions == "last":
        return [(len(source) - 1, len(destination) - 1)]
    if positions == "all":
        if len(source) != len(destination):
            raise EditError(
                f"positions all needs prompts of equal length; these have {len(source)} and {len(destination)} tokens. Use aligned."
            )
        return [(position, position) for position in range(len(source))]
    if positions != "aligned":
        raise EditError(f"the positions {positions!r} are not known; write {', '.join(POSITIONS)}.")
    moves = []
    for step, first, last, low, high in SequenceMatcher(None, source, destination, autojunk=False).get_opcodes():
        if step == "equal" or (step == "replace" and last - first == high - low):
            moves += list(zip(range(first, last), range(low, high), strict=True))
    return moves


@dataclass
class Patching:
    """Values of runs over source prompts are put into runs over destination prompts, the first into the first, and so on.

    Only positions of the prompt are patched; what is generated after them is the model's own.
    Raises EditError for a site or positions that cannot be patched, SiteUnavailable for a model that lacks the site.
    """

    kind: ClassVar[str] = "patching"
    n_draws: ClassVar[int] = 1

    loaded: LoadedModel
    sources: Sequence[str]
    destinations: Sequence[str]
    places: Places
    positions: str = "last"
    """last, all or aligned; see `matched`."""
    site: str = "z"
    """z, mlp_out or resid_post."""
    _values: list[dict[int, Tensor]] = field(init=False)
    _matched: list[list[tuple[int, int]]] = field(init=False)

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise EditError(f"the site {self.site!r} is not patched; write {', '.join(SITES)}.")
        if not self.sources or len(self.sources) != len(self.destinations):
            raise EditError(
                f"{len(self.sources)} sources and {len(self.destinations)} destinations; each needs its own."
            )
        tokenizer = self.loaded.tokenizer
        sources, destinations = (
            [tokenizer(text)["input_ids"] for text in texts] for texts in (self.sources, self.destinations)
        )
        self._matched = [matched(*both, self.positions) for both in zip(sources, destinations, strict=True)]
        self._values = [self._read(source) for source in sources]

    def _read(self, ids: Sequence[int]) -> dict[int, Tensor]:
        """Layer -> the site's values at each position of one source run: [pos, width]."""
        layout = self.loaded.layout
        taps = layout.pick(Site(self.site, layer) for layer in self.places)
        rows = read(self.loaded.model, layout, taps, padded([ids]))
        return {layer: rows[Site(self.site, layer).key] for layer in self.places}

    @contextmanager
    def applied(self, rows: Sequence[int], pads: Sequence[int]) -> Iterator[None]:
        """The model with the patch. rows: which destinations the batch holds. pads: the padding on the left of each."""
        edits = [self._edit(layer, heads, rows, pads) for layer, heads in self.places.items()]
        with editing(self.loaded.model, edits):
            yield

    def logprobs(self, continuations: Continuations) -> list[float]:
        """The log-likelihood of every destination's continuation with the patch, in nats."""
        return logprobs_one_by_one(self, continuations)

    def _edit(self, layer: int, heads: Sequence[int] | None, rows: Sequence[int], pads: Sequence[int]) -> Edit:
        moves = [
            (batch_row, pads[batch_row] + into, self._values[row][layer][source])
            for batch_row, row in enumerate(rows)
            for source, into in self._matched[row]
        ]
        batch_rows = torch.tensor([batch_row for batch_row, _, _ in moves], dtype=torch.long)
        columns = torch.tensor([column for _, column, _ in moves], dtype=torch.long)
        values = torch.stack([value for _, _, value in moves]) if moves else torch.empty(0)
        if heads is not None:
            values = values.view(len(moves), self.loaded.layout.n_heads, -1)[:, list(heads)]

        def choose(first: int, n_columns: int) -> tuple[Kept, Tensor]:
            is_fed = (columns >= first) & (columns < first + n_columns)
            return Kept(batch_rows[is_fed], columns[is_fed]), values[is_fed]

        return replaced_values(Site(self.site, layer), heads, choose)


def recovered(
    loaded: LoadedModel, pairs: Sequence[Pair], places: Places, positions: str = "all", site: str = "z"
) -> Result:
    """How much of the difference of logits (answer - wrong, after the prompt) comes with the patched values.

    denoising puts clean values into the corrupted run: (patched - corrupted) / (clean - corrupted). noising puts corrupted values into the
    clean run: (clean - patched) / (clean - corrupted). 0 is none of the difference, 1 is all of it.
    Measured are samples (each pair, its differences of logits, both parts, and whether it is left out) and summary (denoising and noising, a
    Part each: the sum over pairs of what was moved, divided by the sum of the differences). Left out of the summary are pairs whose clean and
    corrupted differences are nearly equal, as `ratios.too_small` says; where they are equal, both parts are None.
    """
    clean, corrupted = [pair.clean for pair in pairs], [pair.corrupted for pair in pairs]
    into_corrupted = Patching(loaded, clean, corrupted, places, positions, site)
    into_clean = Patching(loaded, corrupted, clean, places, positions, site)
    samples: list[dict[str, Any]] = []
    wholes: list[float] = []
    moved: dict[str, list[float]] = {"denoising": [], "noising": []}
    for row, pair in enumerate(pairs):
        tokens = told_apart(loaded, pair)
        of_clean, of_corrupted = (_difference(loaded, text, tokens) for text in (pair.clean, pair.corrupted))
        with into_corrupted.applied([row], [0]):
            denoised = _difference(loaded, pair.corrupted, tokens)
        with into_clean.applied([row], [0]):
            noised = _difference(loaded, pair.clean, tokens)
        whole = of_clean - of_corrupted
        numbers = {"clean": of_clean, "corrupted": of_corrupted, "denoised": denoised, "noised": noised}
        wholes.append(whole)
        moved["denoising"].append(denoised - of_corrupted)
        moved["noising"].append(of_clean - noised)
        parts = {name: each[-1] / whole if whole else None for name, each in moved.items()}
        samples.append({**vars(pair), **numbers, **parts})
    for sample, is_left_out in zip(samples, ratios.too_small(wholes).tolist(), strict=True):
        sample["left_out"] = is_left_out
    summary = {name: ratios.part_of(each, wholes) for name, each in moved.items()}
    measured = {"samples": samples, "summary": summary}
    return Result("pairs", measured, methods=methods(p=ratios.P_METHOD, part=ratios.METHOD))


def _difference(loaded: LoadedModel, text: str, tokens: tuple[int, int]) -> float:
    """logit(answer) - logit(wrong) after a prompt."""
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]], device=input_device(loaded.model))
    with torch.no_grad():
        logits = loaded.model(ids, use_cache=False).logits[0, -1].double()
    return float(logits[tokens[0]] - logits[tokens[1]])
