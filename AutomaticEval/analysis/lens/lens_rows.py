"""What the lens says at each place of a run: numbers of each question, some rows at a time, so that memory is bounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from AutomaticEval.analysis.lens.answers import NONE, ChoiceRows, FirstTokens
from AutomaticEval.analysis.lens.logit_lens import LogitLens
from AutomaticEval.errors import StoreError
from AutomaticEval.sites import site_of
from AutomaticEval.store.questions.source import Source

Array = np.ndarray[Any, Any]
MOST_NUMBERS = 2**24
"""So many logits are in memory at once, a few times over: 64 MiB each time."""
LEAST = torch.finfo(torch.float32).min
Translate = Callable[[str, Tensor], Tensor]
"""Gives, of a key and rows [n, d_model] of it, the rows that the final norm reads."""


class Said(NamedTuple):
    """What the lens says of each question at each place."""

    numbers: dict[str, Array]
    """Name -> [n_places, n_questions]: gold_rank, gold_logprob, taken_logprob, entropy, top_token, top_logprob, kl, agrees. NaN where there is none."""

    choices: Array
    """[n_places, n_lines]: the log-probability of the token of each line of the choices' rows."""


NAMES = ("gold_rank", "gold_logprob", "taken_logprob", "entropy", "top_token", "top_logprob", "kl", "agrees")


def rows_per_block(lens: LogitLens) -> int:
    """How many rows may be given to the unembedding at once."""
    return max(1, MOST_NUMBERS // lens.n_tokens)


def said_by_lens(
    source: Source,
    lens: LogitLens,
    keys: Sequence[str],
    final: str | None,
    at: Array,
    first: FirstTokens,
    choices: ChoiceRows,
    translate: Translate,
    advance: Callable[[int], None],
) -> Said:
    """Read each place through the lens.

    final: the key whose distribution is the model's own; None when the run holds none. at: [n_questions], the number of each question's row.
    advance: is told of each row at each place.
    """
    numbers = {name: np.full((len(keys), len(at)), np.nan) for name in NAMES}
    of_choices = np.full((len(keys), len(choices.row)), np.nan)
    rows = np.unique(np.concatenate([at, choices.row]))
    arrays = {key: source.rows(key, rows) for key in dict.fromkeys([*keys, *([final] if final else [])])}
    where, line_where = np.searchsorted(rows, at), np.searchsorted(rows, choices.row)
    step = rows_per_block(lens)
    for start in range(0, len(rows), step):
        stop = min(len(rows), start + step)
        asked = np.flatnonzero((where >= start) & (where < stop))
        lines = np.flatnonzero((line_where >= start) & (line_where < stop))
        picked = torch.from_numpy(where[asked] - start)
        with torch.no_grad():
            own = None
            if final is not None and len(asked):
                own = lens.translated(arrays[final][start:stop][picked], is_normed=site_of(final).kind == "final_norm")
            for place, key in enumerate(keys):
                given = arrays[key][start:stop]
                _refuse_other_numbers(source, key, given)
                logprobs = lens.translated(translate(key, given))  # [n, d_vocab]
                if len(lines):
                    pair = torch.from_numpy(line_where[lines] - start), torch.from_numpy(choices.token[lines])
                    of_choices[place, lines] = logprobs[pair].double().cpu().numpy()
                if len(asked):
                    of = _of_rows(logprobs[picked], own, first.gold[asked], first.taken[asked])
                    for name, values in of.items():
                        numbers[name][place, asked] = values
                advance(stop - start)
    return Said(numbers, of_choices)


def _of_rows(logprobs: Tensor, own: Tensor | None, gold: Array, taken: Array) -> dict[str, Array]:
    """Name of `NAMES` -> [n]. logprobs, own: [n, d_vocab], of the lens and of the model."""
    finite = logprobs.clamp_min(LEAST)
    top = logprobs.max(dim=1)
    of_gold = _at(logprobs, gold)
    found: dict[str, Tensor] = {
        "gold_rank": (logprobs > of_gold[:, None]).sum(dim=1) + 1.0,
        "gold_logprob": of_gold,
        "taken_logprob": _at(logprobs, taken),
        "entropy": -(logprobs.exp() * finite).sum(dim=1),
        "top_token": top.indices,
        "top_logprob": top.values,
    }
    if own is not None:
        found["kl"] = kl_of(own, logprobs)
        found["agrees"] = (own.argmax(dim=1) == top.indices).float()
    numbers = {name: values.double().cpu().numpy() for name, values in found.items()}
    for name, token in (("gold_rank", gold), ("gold_logprob", gold), ("taken_logprob", taken)):
        numbers[name] = np.where(token == NONE, np.nan, numbers[name])
    return numbers


def kl_of(own: Tensor, logprobs: Tensor) -> Tensor:
    """[n]: the Kullback-Leibler divergence of the lens from the model's own distribution (nats). own, logprobs: [n, d_vocab], log-probabilities."""
    return (own.exp() * (own.clamp_min(LEAST) - logprobs.clamp_min(LEAST))).sum(dim=1)


def _at(logprobs: Tensor, tokens: Array) -> Tensor:
    """[n]: the log-probability of each row's token."""
    wanted = torch.from_numpy(np.maximum(tokens, 0)).to(logprobs.device)
    return logprobs.gather(1, wanted[:, None])[:, 0]


def _refuse_other_numbers(source: Source, key: str, rows: Tensor) -> None:
    if not bool(rows.isfinite().all()):
        raise StoreError(
            f"{source.path}: rows at {key} have numbers that are infinite or NaN. Leave their samples out: run.where(run.finite())."
        )
