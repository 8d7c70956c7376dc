"""`train_tuned_lens`: a tuned lens, trained on a run's own rows, beside the plain lens on questions that were held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from AutomaticEval.analysis.lens.by_layer import final_place, lens_places
from AutomaticEval.analysis.lens.lens_rows import kl_of, rows_per_block
from AutomaticEval.analysis.lens.logit_lens import LogitLens
from AutomaticEval.analysis.lens.tuned_lens import TunedLens, prompt_digest
from AutomaticEval.analysis.numbers.estimate import mean_intervals, methods
from AutomaticEval.analysis.result import Estimate, Result
from AutomaticEval.capture.recompute.recomputed_run import model_of
from AutomaticEval.errors import SelectionError, StoreError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.settings import MODEL
from AutomaticEval.sites import site_of
from AutomaticEval.store.questions.questions import Questions
from AutomaticEval.store.ragged import indices_of
from AutomaticEval.store.run import Run

Array = np.ndarray[Any, Any]
HELD_OUT, CHOSEN = 0.2, 0.1
"""The shares of different prompts on which the lens is judged, and on which the best of its steps is chosen."""
LEAST_PROMPTS = 20
MOST_HELD_OUT, MOST_CHOSEN = 4000, 1000
"""Rows."""
N_LOOKS = 10
"""How often the divergence is measured where the best step is chosen."""
PARTS = ("train", "choose", "held_out")


@dataclass(frozen=True)
class Training:
    """How a tuned lens is trained. Raises SelectionError for a number that means nothing."""

    n_steps: int = 250
    batch_rows: int = 256
    """Rows in a step; fewer where the vocabulary is so large that their logits would not fit."""

    learning_rate: float = 1e-3
    """Of Adam, for rows whose root mean square is 1. It falls to 0 over the steps."""

    n_rows: int = 20_000
    """The most rows that are learned from."""

    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("n_steps", "batch_rows", "n_rows"):
            if getattr(self, name) < 1:
                raise SelectionError(f"{name} is {getattr(self, name)}; give 1 or more.")
        if not self.learning_rate > 0:
            raise SelectionError(f"learning_rate is {self.learning_rate}; give a number above 0.")


@dataclass(frozen=True)
class TunedPlace:
    """The divergence from the model's own distribution at one place, on the questions that were held out (nats)."""

    site: str
    plain: Estimate
    tuned: Estimate
    gain: Estimate
    """plain - tuned of the same questions; below 0 the tuned lens is the worse one."""

    step: int
    """The step at which it was best where that is chosen; 0: the plain lens was, and is kept."""


class Trained(NamedTuple):
    """A tuned lens, and how good it is."""

    lens: TunedLens
    result: Result


class _Split(NamedTuple):
    rows: dict[str, Array]
    """Part -> the numbers of its rows, ascending."""

    prompts: dict[str, Array]
    """Part -> for each row the number of its prompt."""

    n_prompts: dict[str, int]
    learned: frozenset[str]


def train_tuned_lens(
    run: Run,
    keys: Iterable[str] | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    training: Training = Training(),
    advance: Callable[[int], None] = lambda _: None,
) -> Trained:
    """Train an affine map for each place of a run, so that the lens there comes near the model's own distribution.

    >>> lens, result = train_tuned_lens(open_run("results/run"))
    >>> lens.save("tuned.safetensors")

    keys and model: as for `logit_lens`. It learns from all rows of the run's questions; those that several prompts share are left out. 20 % of the
    different prompts are held out and judge it, 10 % choose the step with the smallest divergence. advance: is told of each step at each place.

    The result's `measured` has `places` (`TunedPlace`). Memory holds the rows of two places, one map for each place, and a batch of logits.
    Raises StoreError for a run without the last layer, or with fewer than 20 different prompts; and as `logit_lens`.
    """
    places = lens_places(run, keys)
    questions = run.questions()
    split = _split(run, questions, training)
    loaded = model_of(run, model, tokenizer=tokenizer)
    lens = LogitLens(loaded)
    final = final_place(run, loaded.layout.n_layers)
    if final is None:
        raise StoreError(
            f"{run.path} holds neither the last layer nor final_norm, whose distribution a tuned lens is to match; it has {', '.join(run.keys)}."
        )
    n_pieces = rows_per_block(lens)
    own = _Own(lens, final, {part: _read(questions, final, rows) for part, rows in split.rows.items()}, n_pieces)
    weights, biases, judged = {}, {}, []
    for number, key in enumerate(places):
        rows = {part: _read(questions, key, of) for part, of in split.rows.items()}
        map_, step = None, 0
        if key == final:
            advance(training.n_steps)
        else:
            map_, step = _fitted(lens, own, rows, training, number, advance)
            weights[key], biases[key] = map_
        judged.append(_judged(key, own, rows["held_out"], map_, step, split, len(places)))
    return _trained(run, loaded, places, weights, biases, judged, split, training)


class _Own:
    """The model's own distribution at the rows of each part, computed when it is asked for."""

    def __init__(self, lens: LogitLens, final: str, rows: dict[str, Tensor], n_at_once: int) -> None:
        self.lens, self._rows, self._n = lens, rows, n_at_once
        self._is_normed = site_of(final).kind == "final_norm"

    def logprobs(self, part: str, at: Any) -> Tensor:
        """[n, d_vocab]"""
        with torch.no_grad():
            return self.lens.translated(self._rows[part][at], is_normed=self._is_normed)

    def divergences(self, part: str, rows: Tensor, map_: tuple[Tensor, Tensor] | None) -> Tensor:
        """[n]: of the lens from the model's own distribution, some rows at a time."""
        found = []
        with torch.no_grad():
            for start in range(0, len(rows), self._n):
                at = slice(start, start + self._n)
                given = rows[at] if map_ is None else torch.addmm(map_[1], rows[at], map_[0].T)
                found.append(kl_of(self.logprobs(part, at), self.lens.translated(given)).cpu())
        return torch.cat(found)


def _fitted(
    lens: LogitLens, own: _Own, rows: dict[str, Tensor], training: Training, number: int, advance: Callable[[int], None]
) -> tuple[tuple[Tensor, Tensor], int]:
    """The map with the smallest divergence where that is chosen, and its step. number: of the place, for the seed."""
    of = rows["train"]
    size = of.square().mean().sqrt().clamp_min(1e-12)  # Adam's steps are then as large for small rows as for large ones
    width = of.shape[1]
    change = torch.zeros(width, width, requires_grad=True)
    shift = torch.zeros(width, requires_grad=True)
    adam = torch.optim.Adam([change, shift], training.learning_rate)
    draw = np.random.default_rng([training.seed, number])
    n_batch = min(training.batch_rows, rows_per_block(lens), len(of))
    best, best_step = (torch.eye(width), torch.zeros(width)), 0
    smallest = float(own.divergences("choose", rows["choose"], None).mean())
    look = max(1, training.n_steps // N_LOOKS)
    for step in range(1, training.n_steps + 1):
        at = torch.from_numpy(draw.choice(len(of), n_batch, replace=False))
        given = of[at]
        logprobs = lens.translated(given + torch.addmm(size * shift, given, change.T))
        loss = kl_of(own.logprobs("train", at), logprobs).mean()
        change.grad, shift.grad = (each.float() for each in torch.autograd.grad(loss, [change, shift]))
        adam.param_groups[0]["lr"] = training.learning_rate * (1 - (step - 1) / training.n_steps)
        adam.step()
        advance(1)
        if step % look == 0 or step == training.n_steps:
            map_ = (torch.eye(width) + change.detach(), size * shift.detach())
            found = float(own.divergences("choose", rows["choose"], map_).mean())
            if found < smallest:
                best, best_step, smallest = map_, step, found
    return best, best_step


def _split(run: Run, questions: Questions, training: Training) -> _Split:
    """The rows of each part. Equal prompts are in one part, and rows that several prompts share are in none."""
    groups = questions.groups
    different = np.unique(groups)
    if len(different) < LEAST_PROMPTS:
        raise StoreError(
            f"{run.path} has {len(different)} different prompts; a tuned lens needs at least {LEAST_PROMPTS}: to learn from, to choose on and to judge on."
        )
    draw = np.random.default_rng(training.seed)
    order = draw.permutation(different)
    n_held, n_chosen = round(HELD_OUT * len(order)), max(1, round(CHOSEN * len(order)))
    of_part = {
        "held_out": order[:n_held],
        "choose": order[n_held : n_held + n_chosen],
        "train": order[n_held + n_chosen :],
    }
    rows, owner = _rows_of_one_prompt(questions, groups)
    most = {"train": training.n_rows, "choose": MOST_CHOSEN, "held_out": MOST_HELD_OUT}
    picked, prompts = {}, {}
    for part in PARTS:
        of = np.flatnonzero(np.isin(owner, of_part[part]))
        if not len(of):
            raise StoreError(
                f"{run.path} has no rows that one prompt alone has in the part {part!r}; a tuned lens cannot be trained on it."
            )
        if len(of) > most[part]:
            of = np.sort(draw.choice(of, most[part], replace=False))
        picked[part], prompts[part] = rows[of], owner[of]
    seen = np.isin(groups, np.concatenate([of_part["train"], of_part["choose"]]))
    texts = questions.column("question")
    learned = frozenset(prompt_digest(texts[number]) for number in np.flatnonzero(seen).tolist())
    return _Split(picked, prompts, {part: len(of_part[part]) for part in PARTS}, learned)


def _rows_of_one_prompt(questions: Questions, groups: Array) -> tuple[Array, Array]:
    """The numbers of all rows of the questions' samples that are of one prompt alone, ascending, and the prompt of each."""
    of_questions = questions.samples
    samples = np.asarray(of_questions.values[:])
    of_sample = np.repeat(groups, np.diff(of_questions.offset))
    segments = questions.source.contents.segments.take(samples)
    ranges = np.asarray(segments.values[:]).reshape(-1, 2)
    rows = indices_of(ranges)
    owner = np.repeat(np.repeat(of_sample, np.diff(segments.offset)), ranges[:, 1] - ranges[:, 0])
    distinct, inverse = np.unique(rows, return_inverse=True)
    low, high = np.full(len(distinct), owner.max() + 1), np.full(len(distinct), -1)
    np.minimum.at(low, inverse, owner)
    np.maximum.at(high, inverse, owner)
    alone = low == high
    return distinct[alone], low[alone]


def _read(questions: Questions, key: str, rows: Array) -> Tensor:
    """[n, d_model], float32. Raises StoreError for numbers that are infinite or NaN."""
    read = questions.source.rows(key, rows)[:].float()
    if not bool(read.isfinite().all()):
        raise StoreError(
            f"{questions.source.path}: rows at {key} have numbers that are infinite or NaN. Leave their samples out: run.where(run.finite())."
        )
    return read


def _judged(
    key: str, own: _Own, rows: Tensor, map_: tuple[Tensor, Tensor] | None, step: int, split: _Split, n_places: int
) -> TunedPlace:
    plain = own.divergences("held_out", rows, None).double().numpy()
    tuned = plain if map_ is None or step == 0 else own.divergences("held_out", rows, map_).double().numpy()
    _, group = np.unique(split.prompts["held_out"], return_inverse=True)
    columns = np.stack([plain, tuned, plain - tuned], axis=1)
    sums = np.zeros((group.max() + 1, 3))
    np.add.at(sums, group, columns)
    of = mean_intervals(sums / np.bincount(group)[:, None])
    return TunedPlace(key, of[0], of[1], of[2], step)


def _trained(
    run: Run,
    loaded: LoadedModel,
    places: list[str],
    weights: dict[str, Tensor],
    biases: dict[str, Tensor],
    judged: list[TunedPlace],
    split: _Split,
    training: Training,
) -> Trained:
    made = {
        "model": loaded.name,
        MODEL: loaded.fingerprint(),
        "run": run.path.name,
        "n_prompts": split.n_prompts,
        "n_rows": {part: len(rows) for part, rows in split.rows.items()},
        "training": asdict(training),
        "held_out": {each.site: {"plain": each.plain.mean, "tuned": each.tuned.mean} for each in judged},
    }
    measured = {
        "run": {"path": run.path.name, "model": loaded.name},
        "n_prompts": split.n_prompts,
        "n_rows": made["n_rows"],
        "places": judged,
    }
    unit = "mean over held-out prompts of the mean over their rows"
    result = Result(
        "tuned_lens", measured, {**asdict(training), "run": run.settings}, methods(3, is_together=False, unit=unit)
    )
    return Trained(TunedLens(weights, biases, places, made, split.learned), result)
