"""What the layers hold at each token of a question's prompt: the norm of each row, or the rank that the logit lens gives the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from AutomaticEval.safe_text import shown, with_signs
from AutomaticEval.sites import kind_and_layer, site_of
from AutomaticEval.store.questions.questions import Questions
from AutomaticEval.store.ragged import indices_of

if TYPE_CHECKING:
    from torch import Tensor

    from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

MOST_QUESTIONS = 100
MOST_NUMBERS = 600_000
"""So many numbers of all questions together are in a page."""
MOST_TOKENS = 400
"""The last tokens of a prompt that are shown."""
SLAB_BYTES = 2**26
LENS_ROWS = 64
"""The rows whose logits are in memory together."""
RESIDUAL = ("embed", "resid_pre", "resid_mid", "resid_post")
NOT_ROWS = ("pattern", "logits")

Array = np.ndarray[Any, Any]
Measure = Callable[[str, "Tensor", Array], "Tensor"]
"""(site, rows [n, width], the token after each, or -1) -> a number for each row."""


def sampled(questions: Questions, keys: Sequence[str]) -> list[int]:
    """The numbers of the questions whose tokens are in a page: evenly spread over the run, within MOST_NUMBERS."""
    if not len(questions) or not keys or questions.source.contents.is_by_sample:
        return []
    n_prompt = [
        len(questions.source.contents.input_ids.item(number)) for number in questions.first_samples[:50].tolist()
    ]
    each = len(keys) * min(MOST_TOKENS, max(1, sum(n_prompt) // len(n_prompt)))
    n = min(len(questions), MOST_QUESTIONS, max(3, MOST_NUMBERS // each))
    return sorted({int(number) for number in np.linspace(0, len(questions) - 1, n)})


def shown_keys(keys: Sequence[str], *, of_lens: bool = False) -> list[str]:
    """The sites whose rows are shown, in their order: those of the residual stream for the lens."""
    kinds = {key: kind_and_layer(key).kind for key in keys}
    if of_lens:
        return [key for key in keys if kinds[key] in RESIDUAL]
    return [key for key in keys if kinds[key] not in NOT_ROWS]


def prompt_rows(
    questions: Questions,
    numbers: Sequence[int],
    keys: Sequence[str],
    measure: Measure | None = None,
    most: int = MOST_TOKENS,
) -> dict[int, dict[str, Any]]:
    """Number of a question -> its tokens, their positions, how many there are, and `values`: site -> a number for each token.

    measure: by default the L2 norm of the row. most: so many tokens of a prompt, its last. Rows are read a site at a time, SLAB_BYTES of them at once.
    """
    contents = questions.source.contents
    strings = contents.strings()
    firsts = questions.first_samples
    found: dict[int, dict[str, Any]] = {}
    places: list[Array] = []
    following: list[Array] = []
    for number in numbers:
        sample = int(firsts[number])
        token_ids, positions = contents.fed(sample)
        prompt = contents.input_ids.item(sample).tolist()
        whole = [*prompt, *contents.generated_ids.item(sample).tolist()]
        rows = indices_of(contents.segments.item(sample))
        kept = [at for at, position in enumerate(positions) if position < len(prompt)][-most:]
        places.append(np.asarray(rows, dtype=np.int64)[kept])
        after = [whole[positions[at] + 1] if positions[at] + 1 < len(whole) else -1 for at in kept]
        following.append(np.asarray(after, dtype=np.int64))
        found[number] = {
            "tokens": [shown(with_signs(strings[token_ids[at]])) for at in kept],
            "positions": [positions[at] for at in kept],
            "nPrompt": len(prompt),
            "values": {},
        }
    for key in keys:
        width = questions.source.rows(key, np.zeros(0, np.int64)).shape[1]
        for some in _slabs([len(each) for each in places], max(1, SLAB_BYTES // (4 * width))):
            wanted = np.concatenate([places[at] for at in some])
            if not len(wanted):
                continue
            read = questions.source.rows(key, wanted)[:]
            nexts = np.concatenate([following[at] for at in some])
            values = (read.double().norm(dim=1) if measure is None else measure(key, read, nexts)).tolist()
            for at in some:
                number = list(found)[at]
                found[number]["values"][key] = [_short(value) for value in values[: len(places[at])]]
                del values[: len(places[at])]
    return found


def _slabs(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of questions that are read together: of at most so many rows, or one question."""
    slabs: list[list[int]] = []
    n_rows = 0
    for at, length in enumerate(lengths):
        if not slabs or n_rows + length > most:
            slabs.append([])
            n_rows = 0
        slabs[-1].append(at)
        n_rows += length
    return slabs


def _short(value: float) -> float | None:
    return float(f"{value:.3g}") if np.isfinite(value) else None


def ranks_by(loaded: LoadedModel) -> Measure:
    """Measures the rank of the next token among all tokens, 1 for the likeliest. Raises SiteUnavailable for a model without a lens."""
    import torch

    from AutomaticEval.analysis.lens.logit_lens import LogitLens

    lens = LogitLens(loaded)

    def ranks(key: str, rows: Tensor, after: Array) -> Tensor:
        assert site_of(key).kind in RESIDUAL, key
        wanted = torch.from_numpy(after)
        found = torch.full((len(rows),), float("nan"), dtype=torch.float64)
        for start in range(0, len(rows), LENS_ROWS):
            logits = lens.logits(rows[start : start + LENS_ROWS])
            of = wanted[start : start + LENS_ROWS]
            own = logits.gather(1, of.clamp(min=0)[:, None])
            above = (logits > own).sum(dim=1).double() + 1
            found[start : start + LENS_ROWS] = torch.where(of >= 0, above, float("nan"))
        return found

    return ranks
