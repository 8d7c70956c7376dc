"""`write_atlas`: the questions of a run for the command `embedding-atlas`, a Parquet file with one row a question."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from AutomaticEval.errors import StoreError
from AutomaticEval.pages.question_rows import prompts_of
from AutomaticEval.safe_text import shown
from AutomaticEval.sites import kind_and_layer, refuse_ids
from AutomaticEval.store.disk.parquet_files import write_parquet
from AutomaticEval.store.questions.questions import AT
from AutomaticEval.store.run import Run

Array = np.ndarray[Any, Any]
KIND = "atlas"
TEXTS = ("task", "response")
OTHERS = ("doc_id", "repeat", "correct", "confidence")


class Atlas(NamedTuple):
    """What was written."""

    n: int
    """Questions."""

    n_off_map: int
    """Questions whose row holds an infinite number or NaN, so that they have no coordinates."""

    site: str
    share: float | None
    """The part of the rows' variance that the two coordinates hold. None where nothing varies."""


def last_residual(run: Run) -> str:
    """The key of the last layer's residual stream that a run has. Raises StoreError for a run without one."""
    layers = {site.layer: key for key in run.keys if (site := kind_and_layer(key)).kind == "resid_post"}
    if not layers:
        raise StoreError(
            f"{run.path} has no residual stream of a layer; name one of its sites with --site: {', '.join(run.keys)}."
        )
    return layers[max(layers, key=lambda layer: -1 if layer is None else layer)]


def write_atlas(run: Run, path: Path, site: str | None = None, position: str = AT) -> Atlas:
    """Write a Parquet file to a path, which the caller names when it is whole.

    Columns: prompt, task, doc_id, repeat, response, correct, confidence, where any question has them; activation, a list of the float32
    numbers of the row at `site` (by default the last layer's residual stream) and `position`; x and y, where the row lies along the first two
    principal components of all rows. Raises StoreError for a run without questions, and for a place that it does not have.
    """
    questions = run.questions()
    if not len(questions):
        raise StoreError(f"{run.path} has no questions, so there is nothing to write.")
    site = site or last_residual(run)
    refuse_ids([questions.source.key(site)], "an atlas")
    rows = questions.activations(site, position).float().numpy()
    is_finite = np.isfinite(rows).all(axis=1)
    points, share = _coordinates(rows, is_finite)
    columns: dict[str, Any] = {"prompt": [shown(text) for text in prompts_of(questions)]}
    columns |= {name: _texts(questions.column(name)) for name in TEXTS}
    columns |= {name: questions.column(name) for name in OTHERS}
    columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    places: dict[str, Any] = {"activation": rows, "x": points[:, 0], "y": points[:, 1]}
    write_parquet(path, {**columns, **places}, KIND)
    return Atlas(len(questions), int((~is_finite).sum()), questions.source.key(site), share)


def _texts(values: list[Any]) -> list[str | None]:
    return [None if value is None else shown(str(value)) for value in values]


def _coordinates(rows: Array, is_finite: Array) -> tuple[Array, float | None]:
    """[n, 2], NaN for rows that are not finite; and the part of the variance that these hold. By Lanczos, for of all components two are wanted."""
    from sklearn.decomposition import PCA

    points = np.full((len(rows), 2), np.nan)
    points[is_finite] = 0
    finite = rows[is_finite]
    if len(finite) < 2:
        return points, None
    finite = finite - finite.mean(axis=0, dtype=np.float64).astype(
        np.float32
    )  # in float32, for speed, once their mean is off
    largest = float(np.abs(finite).max())
    if not largest > 0:
        return points, None
    n = min(2, *finite.shape)
    components = PCA(n, svd_solver="arpack" if min(finite.shape) > n else "full", random_state=0)
    points[is_finite, :n] = components.fit_transform(finite / np.float32(largest)) * largest
    return points, float(components.explained_variance_ratio_.sum())
