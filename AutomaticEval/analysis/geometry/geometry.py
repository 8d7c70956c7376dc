"""`geometry`: how long a run's rows are, how alike its layers are, and how many directions they fill; of one run or of two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from AutomaticEval.analysis.compare_runs import same_prompts, shared_questions
from AutomaticEval.analysis.geometry.between_places import MOST_ROWS, alike
from AutomaticEval.analysis.geometry.norms import norms
from AutomaticEval.analysis.geometry.spectrum import (
    Spectrum,
    effective_rank,
    of_random_rows,
    participation_ratio,
    spectrum,
)
from AutomaticEval.analysis.numbers.estimate import mean_intervals, methods
from AutomaticEval.analysis.result import Estimate, Result
from AutomaticEval.errors import SelectionError, StoreError
from AutomaticEval.sites import key_among, kind_and_layer, refuse_ids, site_of
from AutomaticEval.store.questions.questions import AT, Questions
from AutomaticEval.store.reading.reduced_runs import refuse_reduced
from AutomaticEval.store.run import Run

Array = np.ndarray[Any, Any]
USUAL = ("embed", "resid_pre", "resid_mid", "resid_post", "final_norm")
"""The kinds that are measured without being named."""
NEVER = ("pattern", "logits")
MOST_QUESTIONS = 5000
MOST_POINTS = 1000
N_SHARES = 50
"""So many components are told with the share of the variance that they explain."""
LEAST = 4


@dataclass(frozen=True)
class PlaceShape:
    """The rows of one place at the questions' token."""

    site: str
    width: int
    n: int
    norm: Estimate
    """The mean L2 norm over the questions."""

    explained: list[float]
    """The share of the variance along each of the first 50 principal components."""

    effective_rank: float | None
    """exp of the entropy of the normalised variances. None where all rows are the same."""

    participation_ratio: float | None
    most_rank: int
    """min(n - 1, width): no number of rows can show more."""

    random_effective_rank: float
    """Of as many independent normal rows of this width."""

    random_participation_ratio: float


def geometry(
    run: Run,
    other: Run | None = None,
    keys: Iterable[str] | None = None,
    *,
    position: str = AT,
    limit: int | None = None,
    scatter: str | None = None,
    seed: int = 42,
    advance: Callable[[int], None] = lambda _: None,
) -> Result:
    """The shape of a run's activations by layer; of two runs over the same questions, also how alike their layers are.

    >>> result = geometry(open_run("results/run"))
    >>> [(each.site, each.effective_rank) for each in result.measured["places"]]

    keys: sites, in any spelling; by default the residual stream and final_norm, as far as the run has them (of two runs: each its own). position: as in
    `Questions.activations`. limit: so many questions; by default 5,000 at the most, drawn with seed. scatter: the place whose two first principal
    components are given as points; by default the residual stream's middle one. advance: is told of each place, three times.

    The result's `measured` has `places` (`PlaceShape`), `norms_by_position`, `between` (CKA and cosine of all pairs), `scatter`, and of two runs
    `other_places` and `between_runs`. Memory holds the rows of one place, and 8 MB for each.
    Raises SelectionError for sites that have no place here, StoreError for runs without the rows or without shared questions.
    """
    places = _places(run, keys)
    questions, others, n_other_prompts = _questions(run, other, limit, seed)
    at = questions.row_numbers(position)
    own = [] if other is None else _places(other, keys)
    other_at = at if others is None else others.row_numbers(position)
    shown = _scatter_place(questions, places, scatter)
    shapes, points = _shapes(questions, places, at, shown, advance)
    few = _few(len(questions), seed)
    arrays = [questions.source.rows(key, at[few]) for key in places]
    measured: dict[str, Any] = {
        "run": {"path": run.path.name, "model": run.model},
        "n_questions": len(questions),
        "n_compared": len(few),
        "places": shapes,
        "norms_by_position": _norms_of(questions, places, advance),
        "between": _between(arrays, None, advance),
        "scatter": {"site": shown, **_points(questions, points, few)},
    }
    if other is not None and others is not None:
        measured["other"] = {"path": other.path.name, "model": other.model}
        measured["n_other_prompts"] = n_other_prompts
        measured["other_places"], _ = _shapes(others, own, other_at, None, advance)
        measured["between_runs"] = _between(arrays, [others.source.rows(key, other_at[few]) for key in own], advance)
    settings = {
        "position": position,
        "limit": limit,
        "seed": seed,
        "run": run.settings,
        "other": None if other is None else other.settings,
    }
    return Result("geometry", measured, settings, methods(len(places)))


def _places(run: Run, keys: Iterable[str] | None) -> list[str]:
    refuse_reduced(run.settings, "geometry")
    key_of = run.questions().source.key
    wanted = [key for key in run.keys if site_of(key).kind in USUAL] if keys is None else [key_of(key) for key in keys]
    refuse_ids(wanted, "geometry")
    wrong = [key for key in wanted if kind_and_layer(key).kind in NEVER]
    if wrong or not wanted:
        raise SelectionError(
            f"{run.path}: {', '.join(wrong) or 'nothing'} is not measured here; it has {', '.join(run.keys)}. Name some with keys= (--sites, --layers)."
        )
    return list(dict.fromkeys(wanted))


def _questions(run: Run, other: Run | None, limit: int | None, seed: int) -> tuple[Questions, Questions | None, int]:
    """The questions of the run and the same of the other one, and how many are left out because they were asked in other words."""
    questions, others, n_other_prompts = run.questions(), None, 0
    if limit is not None and limit < LEAST:
        raise SelectionError(f"{limit} questions were asked for; give {LEAST} or more.")
    if other is not None:
        questions, others, _ = shared_questions(run, other)
        same = same_prompts(list(zip(questions, others, strict=True)))
        questions, others, n_other_prompts = questions.where(same), others.where(same), same.count(False)
    if len(questions) < LEAST:
        raise StoreError(f"{run.path} has {len(questions)} questions to measure; {LEAST} are needed.")
    most = MOST_QUESTIONS if limit is None else limit
    if len(questions) > most:
        drawn = np.sort(np.random.default_rng(seed).choice(len(questions), most, replace=False)).tolist()
        questions, others = questions.take(drawn), None if others is None else others.take(drawn)
    return questions, others, n_other_prompts


def _few(n: int, seed: int) -> Array:
    """The questions over which pairs of places are compared, ascending."""
    if n <= MOST_ROWS:
        return np.arange(n)
    return np.sort(np.random.default_rng([seed, 1]).choice(n, MOST_ROWS, replace=False))


def _scatter_place(questions: Questions, places: Sequence[str], scatter: str | None) -> str:
    if scatter is not None:
        found = key_among(places, questions.source.key(scatter))
        if found is None:
            raise SelectionError(f"{scatter} is not among the places that are measured: {', '.join(places)}.")
        return found
    layered = [key for key in places if kind_and_layer(key).layer is not None] or list(places)
    return layered[len(layered) // 2]


def _shapes(
    questions: Questions, places: Sequence[str], at: Array, shown: str | None, advance: Callable[[int], None]
) -> tuple[list[PlaceShape], Array]:
    """The shape of each place, a place at a time, and the points of the one that is shown."""
    shapes, lengths, points = [], [], np.zeros((len(at), 2))
    for key in places:
        rows = _rows(questions, key, at)
        lengths.append(np.linalg.norm(rows, axis=1))
        of = spectrum(rows)
        points = of.first_two if key == shown else points
        shapes.append((key, rows.shape[1], of))
        advance(1)
    estimates = mean_intervals(np.stack(lengths, axis=1))
    return [_shape(*each, len(at), norm) for each, norm in zip(shapes, estimates, strict=True)], points


def _shape(key: str, width: int, of: Spectrum, n: int, norm: Estimate) -> PlaceShape:
    whole = of.variances.sum()
    shares = (of.variances[:N_SHARES] / whole).tolist() if whole > 0 else []
    own = effective_rank(of.variances), participation_ratio(of.variances)
    return PlaceShape(key, width, n, norm, shares, *own, min(n - 1, width), *of_random_rows(n, width))


def _rows(questions: Questions, key: str, at: Array) -> Array:
    rows: Array = questions.source.rows(key, at)[:].float().numpy()
    wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(wrong):
        raise StoreError(
            f"{questions.source.path}: the rows of {len(wrong)} questions at {key} have numbers that are infinite or NaN, the first of them "
            f"{questions[int(wrong[0])].name}. Leave these out: run.where(run.finite())."
        )
    return rows


def _norms_of(questions: Questions, places: Sequence[str], advance: Callable[[int], None]) -> dict[str, Any]:
    of = norms(questions, places, advance)
    ends = {"from_start": (of.from_start, of.n_from_start), "from_end": (of.from_end, of.n_from_end)}
    found: dict[str, Any] = {}
    for name, (means, n) in ends.items():
        kept = np.flatnonzero(n)
        positions = kept if name == "from_start" else kept - len(n)
        found[name] = {
            "positions": positions.tolist(),
            "n": n[kept].tolist(),
            "means": means[:, kept].tolist(),
        }
    return found


def _between(one: Any, other: Any, advance: Callable[[int], None]) -> dict[str, Any]:
    of = alike(one, other, advance)
    if of.cosine is None:
        return {"cka": of.cka.tolist(), "cosine": None, "no_cosine": "the places have different widths, or one number"}
    return {"cka": of.cka.tolist(), "cosine": of.cosine.tolist()}


def _points(questions: Questions, points: Array, few: Array) -> dict[str, Any]:
    """Points for a figure, with what they may be coloured by."""
    shown = few[:MOST_POINTS]
    some = questions.take(shown.tolist())
    return {
        "points": points[shown].tolist(),
        **{name: some.column(name) for name in ("task", "doc_id", "correct")},
    }
