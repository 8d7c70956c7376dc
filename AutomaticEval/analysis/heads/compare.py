"""How fine-tuning moved the strength of each head: two models over the same inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from AutomaticEval.analysis.heads.strength import ActivationExtractor
from AutomaticEval.analysis.numbers.estimate import resampled
from AutomaticEval.analysis.parts.before_after import greedy_answers
from AutomaticEval.errors import SelectionError
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.loading import load_model
from AutomaticEval.report.figures import comparison_panels
from AutomaticEval.report.heatmap import heatmaps
from AutomaticEval.store.disk.json_files import read_strength, write_json
from AutomaticEval.store.disk.whole_files import new_file, prepare_file

PerHead = dict[tuple[int, int], float]


class ActivationComparator:
    """pre, fine: the model before and after: an ActivationExtractor, {(layer, head): R_h}, or a file of `save_results`."""

    def __init__(self, pre: Any, fine: Any, *, seed: int = 42) -> None:
        (self.pre, *before), (self.fine, *after) = _strengths(pre), _strengths(fine)
        self.seed = seed
        for name, one, other in zip(("of", "n, the number of tokens,"), before, after, strict=True):
            if one is not None and other is not None and one != other:
                raise SelectionError(f"the two are not of the same inputs: {name} is {one} and {other}.")
        if self.pre.keys() != self.fine.keys():
            apart = sorted(self.pre.keys() ^ self.fine.keys())
            raise SelectionError(
                f"the two have not the same heads: {len(apart)} are in one alone, first (layer, head) {apart[0]}. Extract the same "
                "layers and heads from both."
            )

    def compare(self) -> dict[str, Any]:
        """pre_tuned, fine_tuned, differences (fine - pre) and ratios (fine / pre; NaN where pre is 0), each (layer, head) -> number;
        rank_correlation: Spearman's rho over heads of the strength before with the change, and its 95 % bootstrap interval.
        """
        differences = {key: self.fine[key] - before for key, before in self.pre.items()}
        ratios = {key: self.fine[key] / before if before else math.nan for key, before in self.pre.items()}
        before, change = np.array(list(self.pre.values())), np.array(list(differences.values()))
        return {
            "pre_tuned": dict(self.pre),
            "fine_tuned": dict(self.fine),
            "differences": differences,
            "ratios": ratios,
            "rank_correlation": _correlated(before, change, self.seed),
        }

    def visualize_comparison(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the heatmaps before, after and change as a PNG. Raises PathExists."""
        found = self.compare()
        prepare_file(Path(path), overwrite=overwrite)
        panels = comparison_panels(found["pre_tuned"], found["fine_tuned"], found["differences"])
        with new_file(Path(path), overwrite=overwrite) as partial:
            heatmaps(panels, partial)

    def save_comparison(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write what `compare` gives as JSON: heads as "layer:head", NaN as null. Raises PathExists."""
        found = self.compare()
        named = {
            name: {f"{layer}:{head}": value for (layer, head), value in each.items()}
            for name, each in found.items()
            if name != "rank_correlation"
        }
        write_json(
            path, {"kind": "comparison", **named, "rank_correlation": found["rank_correlation"]}, overwrite=overwrite
        )


def same_inputs(
    models: Mapping[str, str],
    texts: Sequence[str],
    load: LoadOptions = LoadOptions(),
    answers_of: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
) -> list[list[int]]:
    """Token ids that two models both read: the texts', and on request one model's greedy answers after them.

    models: name -> model. answers_of: one of the names. Raises SelectionError when the models' tokenizers give other ids.
    """
    if answers_of is not None and answers_of not in models:
        raise SelectionError(f"--answers_of is {answers_of!r}; write {' or '.join(models)}, or leave it out.")
    encoded = [
        [load_model(model, options=load).tokenizer(text)["input_ids"] for text in texts] for model in models.values()
    ]
    for number, each in enumerate(zip(*encoded, strict=True), 1):
        if any(ids != each[0] for ids in each):
            raise SelectionError(
                f"text {number} has other tokens in {' and '.join(models.values())}: heads are compared over the same tokens only."
            )
    room = max_new_tokens if answers_of is not None else 0
    longest = min(load_model(model, options=load).context or 2**62 for model in models.values()) - room
    too_long = [number for number, ids in enumerate(encoded[0], 1) if len(ids) > longest]
    if too_long:
        raise SelectionError(
            f"{len(too_long)} texts, first number {too_long[0]}, are longer than the {longest} tokens that both models can read"
            + (f" before {room} of an answer." if room else ".")
        )
    if answers_of is None:
        return encoded[0]
    loaded = load_model(models[answers_of], options=load)
    answers = greedy_answers(loaded, encoded[0], max_new_tokens, batch_size)
    return [prompt + answer for prompt, answer in zip(encoded[0], answers, strict=True)]


def _strengths(given: Any) -> tuple[PerHead, str | None, int | None]:
    """(layer, head) -> R_h, of what it is, and over how many tokens, as far as that is told."""
    if isinstance(given, Mapping):
        return {(int(layer), int(head)): float(value) for (layer, head), value in given.items()}, None, None
    stats, of = (given.get_all_stats(), given.of) if isinstance(given, ActivationExtractor) else read_strength(given)
    return {key: each["R_h"] for key, each in stats.items()}, of, int(next(iter(stats.values()))["n"])


def _correlated(first: Any, second: Any, seed: int) -> dict[str, Any]:
    """Spearman's rho, resampled over heads. None when one side is all one number."""
    rho = _spearman(first, second)
    interval, n_resamples = None, 0
    if rho is not None:
        interval, n_resamples = resampled(lambda index: _spearman(first[index], second[index]), len(first), seed)
    return {"rho": rho, "interval": interval, "n_heads": len(first), "n_resamples": n_resamples, "seed": seed}


def _spearman(first: Any, second: Any) -> float | None:
    one, other = rankdata(first), rankdata(second)
    if len(first) < 2 or one.std() == 0 or other.std() == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])
