"""A sweep: every head, or every position, of a site is changed by itself, and each change is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from AutomaticEval.analysis.heads.patch import SITES
from AutomaticEval.analysis.parts.before_after import Continuations
from AutomaticEval.analysis.parts.later_blocks import LaterBlocks, unpacked
from AutomaticEval.capture.texts.forward import padded, read
from AutomaticEval.errors import EditError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.edit import Edit
from AutomaticEval.sites import Site

ROWS = 64
"""How many rows a forward over several variants has at most."""
Values = Mapping[int, Tensor]
"""Layer -> what is put into a place: [width], or [batch, pos, width]."""


class Sweep:
    """The score of each sequence when one place is changed: a head at all positions (z), or one position (mlp_out, resid_post).

    blocks: the sequences and their score. n_prompt: how many tokens of each sequence are its prompt; positions are counted from the
    prompt's end, where 0 is its last token. values: None puts zeros. n_positions: how many positions are swept; 0 stands for those of the
    longest prompt. Raises EditError for another site, SiteUnavailable.
    """

    def __init__(
        self,
        blocks: LaterBlocks,
        n_prompt: Sequence[int],
        site: str = "z",
        values: Values | None = None,
        n_positions: int = 0,
    ) -> None:
        if site not in SITES:
            raise EditError(f"the site {site!r} is not swept; write {', '.join(SITES)}.")
        self._blocks, self._site, self._values = blocks, site, values
        layout, (ids, mask) = blocks.layout, blocks.batch
        layout.pick(Site(site, layer) for layer in layout.layers_of(site))
        self.n_places = layout.n_heads if site == "z" else n_positions or max(n_prompt)
        first = ids.shape[1] - mask.sum(1)  # [batch]: padding is on the left
        end = first + torch.tensor(list(n_prompt))
        self._columns = end[:, None] - 1 - torch.arange(self.n_places)  # [batch, n_places]: the column of each position
        self._exists = self._columns >= first[:, None]

    @property
    def baseline(self) -> Tensor:
        """[batch]: the scores when nothing is changed."""
        return self._blocks.baseline

    def layer(self, layer: int) -> Tensor:
        """The scores for each place of a layer: [n_places, batch]; NaN where a sequence has no such position."""
        together = max(1, ROWS // len(self.baseline))
        change = self._head if self._site == "z" else self._position
        scores = []
        for first in range(0, self.n_places, together):
            places = range(first, min(first + together, self.n_places))
            edit = Edit(Site(self._site, layer), change(layer, places))
            scores.append(self._blocks.scores(layer, len(places), edit))
        whole: Tensor = torch.cat(scores)
        return whole if self._site == "z" else whole.masked_fill(~self._exists.T, torch.nan)

    def _head(self, layer: int, heads: range) -> Callable[[Tensor], Tensor]:
        """Takes and gives z [n_variants * batch, pos, width]. In each variant another head is changed."""

        def change(z: Tensor) -> Tensor:
            changed, instead = _by_variant(z, heads).clone(), self._instead(layer, z)
            changed, instead = (each.view(*each.shape[:-1], self.n_places, -1) for each in (changed, instead))
            for variant, head in enumerate(heads):
                changed[variant, :, :, head] = instead[..., head, :]
            return changed.reshape(z.shape)

        return change

    def _position(self, layer: int, places: range) -> Callable[[Tensor], Tensor]:
        """Takes and gives values [n_variants * batch, pos, width]. In each variant another position is changed."""

        def change(values: Tensor) -> Tensor:
            changed = _by_variant(values, places).clone()
            instead = self._instead(layer, values).expand(changed.shape[1:])
            for variant, place in enumerate(places):
                rows = self._exists[:, place].nonzero()[:, 0]
                columns = self._columns[rows, place]
                changed[variant, rows, columns] = instead[rows, columns]
            return changed.reshape(values.shape)

        return change

    def _instead(self, layer: int, values: Tensor) -> Tensor:
        """What is put in: [width], or [batch, pos, width], with device and dtype of the values that it replaces."""
        if self._values is None:
            return torch.zeros(values.shape[-1], device=values.device, dtype=values.dtype)
        return self._values[layer].to(values.device, values.dtype)


def _by_variant(values: Tensor, variants: range) -> Tensor:
    """[n_variants * batch, pos, width] -> [n_variants, batch, pos, width]"""
    return values.reshape(len(variants), -1, *values.shape[1:])


def sweep_of_answers(
    loaded: LoadedModel,
    answered: Continuations,
    site: str = "z",
    values: Values | None = None,
    n_positions: int = 0,
) -> Sweep:
    """A sweep whose scores are the log-likelihoods of answers, in nats.

    answered: (prompt, answer) of each row; every answer has a token at least. values: [width] for each layer.
    """
    longest = max(len(answer) for _, answer in answered)
    scored = [  # answers stand at the end of each row, and only there are logits computed
        (row, longest - len(answer) + place, token)
        for row, (_, answer) in enumerate(answered)
        for place, token in enumerate(answer)
    ]
    rows, places, tokens = (torch.tensor(column) for column in zip(*scored, strict=True))

    def score(logits: Tensor) -> Tensor:
        each = logits.log_softmax(-1)[:, rows, places, tokens].double()  # [n_variants, tokens of all answers]
        return each.new_zeros(len(logits), len(answered)).index_add_(1, rows.to(each.device), each)

    blocks = LaterBlocks(loaded, [[*prompt, *answer[:-1]] for prompt, answer in answered], longest, score)
    return Sweep(blocks, [len(prompt) for prompt, _ in answered], site, values, n_positions)


def sweep_of_differences(
    loaded: LoadedModel,
    into: Sequence[Sequence[int]],
    source: Sequence[Sequence[int]],
    tokens: Sequence[tuple[int, int]],
    site: str = "z",
    n_positions: int = 0,
) -> Sweep:
    """A sweep whose scores are differences of two tokens' logits after each prompt, and which puts in values of other prompts.

    into: the prompts that are changed. source: prompts of the same lengths, which the values come from. tokens: (answer, wrong) of each.
    """
    answer, wrong = torch.tensor(tokens).T
    rows = torch.arange(len(into))

    def score(logits: Tensor) -> Tensor:
        last = logits[:, :, -1].double()
        return last[:, rows, answer] - last[:, rows, wrong]

    blocks = LaterBlocks(loaded, into, 1, score)
    batch, layout = padded(source, "left"), loaded.layout
    layers = layout.layers_of(site)
    read_rows = read(loaded.model, layout, layout.pick(Site(site, layer) for layer in layers), batch).values()
    values = {layer: unpacked(of_layer, batch) for layer, of_layer in zip(layers, read_rows, strict=True)}
    return Sweep(blocks, [len(prompt) for prompt in into], site, values, n_positions)
