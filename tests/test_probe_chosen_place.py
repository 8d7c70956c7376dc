"""The place that a probe or a direction is saved of, where folds choose different places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import within
from helpers.probed import run_of

from AutomaticEval import load_direction, load_probe, probe
from AutomaticEval.analysis.probes.across.transfer import Learned
from AutomaticEval.analysis.probes.folds import folds
from AutomaticEval.analysis.probes.grid.spots import spots_of
from AutomaticEval.analysis.probes.judged import Judge
from AutomaticEval.analysis.probes.out_of_fold import OutOfFold
from AutomaticEval.store.run import Run

N = 80
LABELS = np.arange(N) % 2


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twelve layers of noise: folds choose as many different places."""
    rows = np.random.default_rng(1).normal(size=(12, N, 4))
    sites = {f"layer_{layer}": each for layer, each in enumerate(rows)}
    return run_of(
        tmp_path_factory.mktemp("noise") / "run", sites, [{"correct": bool(each), "task": "t"} for each in LABELS]
    )


def test_a_tie_of_folds_is_broken_by_the_mean_where_strengths_were_chosen() -> None:
    """Three places, each best in one of three folds; the last has the highest mean, and the first is chosen first."""
    repeats = list(folds(LABELS, np.arange(N), 3, 1, 0))
    probes = [["one", "two", "three"]]
    chosen_on = [[0.9, 0.1, 0.1], [0.5, 0.9, 0.5], [0.8, 0.8, 0.9]]
    places: list[Any] = [OutOfFold(np.zeros((1, N)), np.array([each]), probes) for each in chosen_on]  # type: ignore[arg-type]
    spots = spots_of(["a", "b", "c"], ["prompt[-1]"])
    of: Any = None
    own = Learned.at_best(of, Judge(LABELS, np.arange(N), repeats), spots, places)
    assert own.named == {"c": 1, "b": 1, "a": 1}
    assert list(own.named) == ["c", "b", "a"]
    places[0] = OutOfFold(places[0].log_odds, np.array([[0.9, 0.9, 0.0]]), probes)  # type: ignore[arg-type]
    places[1] = OutOfFold(places[1].log_odds, np.array([[0.5, 0.8, 0.5]]), probes)  # type: ignore[arg-type]
    own = Learned.at_best(of, own.judge, spots, places)
    assert own.named == {"a": 2, "c": 1}  # two folds weigh more than a higher mean


def test_what_is_saved_says_what_its_place_tells_alone_and_warns_when_few_folds_chose_it(
    noise: Run, tmp_path: Path
) -> None:
    options = ("--save_probe", "p.safetensors", "--save_direction", "d.safetensors", "-o", "out")
    with pytest.warns(UserWarning, match=r"was chosen in \d of 5 folds: folds differ in the best place"):
        done = within("probe", str(noise.path), *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    measured = probe(noise).measured
    best = measured["best"]
    (place,) = (each for each in measured["places"] if each.site == best["site"])
    name, n_chosen = next(iter(best["places"].items()))
    assert n_chosen < 3
    saved, direction = load_probe(tmp_path / "p.safetensors"), load_direction(tmp_path / "d.safetensors")
    assert saved.site == name
    assert saved.made_from == {
        "run": "run",
        "auroc_out_of_fold": best["judged"].auroc.mean,
        "interval_out_of_fold": list(best["judged"].auroc.interval),
        "auroc_of_place": place.probe.auroc.mean,
        "interval_of_place": list(place.probe.auroc.interval),
        "split": "question",
        "chosen_in": n_chosen,
        "n_folds": 5,
    }
    about = {key: direction.made_from[key] for key in ("position", "auroc", "p", "chosen_in", "n_folds")}
    alone = place.difference_of_means.mean
    assert about == {"position": "prompt[-1]", "auroc": alone, "p": place.p, "chosen_in": n_chosen, "n_folds": 5}
    assert place.p > 0.05
    told = " ".join(done.stdout.split())
    for part in (
        f"at prompt[-1], the best place of a probe (chosen in {n_chosen} of 5 folds)",
        f"AUROC along it, out of fold: {alone:.3f}, p {place.p:.3f}: p is above 0.05, so that chance alone may give it",
        f"chosen in {n_chosen} of 5 folds; this place alone has AUROC {place.probe.auroc.mean:.3f}",
        "(This AUROC is of choosing a place in each fold. A line of the table is one place in all folds.)",
    ):
        assert part in told
    assert "most folds" not in told
