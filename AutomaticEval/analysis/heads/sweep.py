"""Every place of a site changed by itself, layer by layer: each head of z, or each position of what is no head's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from AutomaticEval.analysis.heads.patch import SITES
from AutomaticEval.analysis.parts.before_after import Pairs
from AutomaticEval.analysis.parts.later_blocks import Rest, unpacked
from AutomaticEval.capture.texts.forward import padded, read
from AutomaticEval.errors import EditError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.editing import Edit
from AutomaticEval.sites import Site

ROWS = 64
"""Rows of a forward over several variants."""
Values = Mapping[int, Tensor]
"""Layer -> what a place becomes: [width] or [batch, pos, width]."""


class Sweep:
    """A number for each place and each sequence.

    rest: of the sequences. n_prompt: the tokens of each that are prompt, of which positions are counted from the end: 0 is the last. site:
    z, a head at a time at all positions; mlp_out and resid_post, a position at a time. values: None for zeros. n_positions: how many
    positions; those of the longest prompt by default.
    """

    def __init__(
        self, rest: Rest, n_prompt: Sequence[int], site: str = "z", values: Values | None = None, n_positions: int = 0
    ) -> None:
        if site not in SITES:
            raise EditError(f"the site {site!r} is not swept; write {', '.join(SITES)}.")
        self._rest, self._site, self._values = rest, site, values
        layout, (ids, mask) = rest.layout, rest.batch
        layout.pick(Site(site, layer) for layer in range(layout.n_layers))
        self.n_places = layout.n_heads if site == "z" else n_positions or max(n_prompt)
        first = ids.shape[1] - mask.sum(1)  # [batch]: padding is on the left
        end = first + torch.tensor(list(n_prompt))
        self._columns = end[:, None] - 1 - torch.arange(self.n_places)  # [batch, n_places], of positions
        self._exists = self._columns >= first[:, None]

    @property
    def baseline(self) -> Tensor:
        """[batch]: nothing changed."""
        return self._rest.baseline

    def layer(self, layer: int) -> Tensor:
        """[n_places, batch]; NaN where a sequence has no such position."""
        together = max(1, ROWS // len(self.baseline))
        change = self._head if self._site == "z" else self._position
        found = []
        for first in range(0, self.n_places, together):
            places = range(first, min(first + together, self.n_places))
            found.append(self._rest.scores(layer, len(places), Edit(Site(self._site, layer), change(layer, places))))
        whole: Tensor = torch.cat(found)
        return whole if self._site == "z" else whole.masked_fill(~self._exists.T, torch.nan)

    def _head(self, layer: int, heads: range) -> Callable[[Tensor], Tensor]:
        def change(found: Tensor) -> Tensor:
            changed, instead = _split(found, heads).clone(), self._instead(layer, found)
            changed, instead = (each.view(*each.shape[:-1], self.n_places, -1) for each in (changed, instead))
            for variant, head in enumerate(heads):
                changed[variant, :, :, head] = instead[..., head, :]
            return changed.reshape(found.shape)

        return change

    def _position(self, layer: int, places: range) -> Callable[[Tensor], Tensor]:
        def change(found: Tensor) -> Tensor:
            changed = _split(found, places).clone()
            instead = self._instead(layer, found).expand(changed.shape[1:])
            for variant, place in enumerate(places):
                rows = self._exists[:, place].nonzero()[:, 0]
                columns = self._columns[rows, place]
                changed[variant, rows, columns] = instead[rows, columns]
            return changed.reshape(found.shape)

        return change

    def _instead(self, layer: int, found: Tensor) -> Tensor:
        if self._values is None:
            return torch.zeros(found.shape[-1], device=found.device, dtype=found.dtype)
        return self._values[layer].to(found.device, found.dtype)


def _split(found: Tensor, variants: range) -> Tensor:
    """[n_variants * batch, pos, width] -> [n_variants, batch, pos, width]"""
    return found.reshape(len(variants), -1, *found.shape[1:])


def sweep_of_answers(
    loaded: LoadedModel, pairs: Pairs, site: str = "z", values: Values | None = None, n_positions: int = 0
) -> Sweep:
    """Of the log-likelihoods of answers, in nats. pairs: each with one token of an answer at least. values: [width] each."""
    longest = max(len(answer) for _, answer in pairs)
    asked = [  # the answers are at the end of every row, and logits there alone
        (row, longest - len(answer) + place, token)
        for row, (_, answer) in enumerate(pairs)
        for place, token in enumerate(answer)
    ]
    rows, places, targets = (torch.tensor(column) for column in zip(*asked, strict=True))

    def score(logits: Tensor) -> Tensor:
        each = logits.log_softmax(-1)[:, rows, places, targets].double()  # [n_variants, all answers' tokens]
        return each.new_zeros(len(logits), len(pairs)).index_add_(1, rows.to(each.device), each)

    rest = Rest(loaded, [[*prompt, *answer[:-1]] for prompt, answer in pairs], longest, score)
    return Sweep(rest, [len(prompt) for prompt, _ in pairs], site, values, n_positions)


def sweep_of_differences(
    loaded: LoadedModel,
    into: Sequence[Sequence[int]],
    source: Sequence[Sequence[int]],
    tokens: Sequence[tuple[int, int]],
    site: str = "z",
    n_positions: int = 0,
) -> Sweep:
    """Of the difference of two tokens' logits after each prompt, with values of another prompt of the same length put into it."""
    answer, wrong = torch.tensor(tokens).T
    rows = torch.arange(len(into))

    def score(logits: Tensor) -> Tensor:
        last = logits[:, :, -1].double()
        return last[:, rows, answer] - last[:, rows, wrong]

    rest = Rest(loaded, into, 1, score)
    batch, layout = padded(source, "left"), loaded.layout
    taps = layout.pick(Site(site, layer) for layer in range(layout.n_layers))
    found = read(loaded.model, layout, taps, batch)
    values = {layer: unpacked(rows, batch) for layer, rows in enumerate(found.values())}
    return Sweep(rest, [len(each) for each in into], site, values, n_positions)
