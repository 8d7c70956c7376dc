"""How fine-tuning changed the strength of each head: two models over the same inputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from AutomaticEval.analysis.heads.strength import ActivationExtractor
from AutomaticEval.analysis.numbers import ranks
from AutomaticEval.analysis.numbers.ranks import ByGroup, rank_correlation
from AutomaticEval.analysis.numbers.skewed_t import LEVEL, Array
from AutomaticEval.analysis.parts.before_after import greedy_answers
from AutomaticEval.analysis.result import Result
from AutomaticEval.errors import SelectionError
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.loading import load_model
from AutomaticEval.report.figures import comparison_panels
from AutomaticEval.report.heatmap import heatmaps
from AutomaticEval.store.disk.json_files import read_strength, write_json
from AutomaticEval.store.disk.whole_files import new_file, prepare_file

PerHead = dict[tuple[int, int], float]
"""(layer, head) -> R_h"""


class ActivationComparator:
    """Compares the strength of each head before and after fine-tuning.

    pre, fine: the model before and after, each as an ActivationExtractor, as {(layer, head): R_h}, or as a file of `save_results`.
    Raises SelectionError when the two have other heads or other inputs (as a fingerprint of the tokens says), StoreError for another file.
    Warns when a file does not say of which inputs it is.
    """

    def __init__(self, pre: Any, fine: Any) -> None:
        before, after = _strengths(pre), _strengths(fine)
        self.pre, self.fine = before.per_head, after.per_head
        _check_same_inputs("of", before.of, after.of)
        _check_same_inputs("n, the number of tokens,", before.n_tokens, after.n_tokens)
        _check_same_inputs("the fingerprint of the texts", before.inputs, after.inputs)
        if before.n_tokens is not None and after.n_tokens is not None and None in (before.inputs, after.inputs):
            warnings.warn(
                "a file does not say of which texts it is: that both are of the same is not checked, but for the number of tokens.",
                UserWarning,
                stacklevel=2,
            )
        if self.pre.keys() != self.fine.keys():
            apart = sorted(self.pre.keys() ^ self.fine.keys())
            raise SelectionError(
                f"the two have not the same heads: {len(apart)} are in one alone, first (layer, head) {apart[0]}. Extract the same "
                "layers and heads from both."
            )
        self._by_group = _by_group(before, after)

    def compare(self) -> dict[str, Any]:
        """The strengths before and after, and how they differ.

        pre_tuned, fine_tuned, differences (fine - pre) and ratios (fine / pre; NaN where pre is 0): (layer, head) -> number each.
        rank_correlation: a dict of `RankCorrelation`: Spearman's rho over heads of the strength before with the change, its 95 % interval for
        other layers and other texts, and the mean rho within a layer.
        """
        differences = {key: self.fine[key] - before for key, before in self.pre.items()}
        ratios = {key: self.fine[key] / before if before else math.nan for key, before in self.pre.items()}
        before, change = np.array(list(self.pre.values())), np.array(list(differences.values()))
        layers = np.array([layer for layer, _ in self.pre])
        return {
            "pre_tuned": dict(self.pre),
            "fine_tuned": dict(self.fine),
            "differences": differences,
            "ratios": ratios,
            "rank_correlation": asdict(rank_correlation(before, change, layers, self._by_group)),
        }

    def visualize_comparison(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write three heatmaps (before, after, change) as a PNG. Raises PathExists."""
        compared = self.compare()
        prepare_file(Path(path), overwrite=overwrite)
        panels = comparison_panels(compared["pre_tuned"], compared["fine_tuned"], compared["differences"])
        with new_file(Path(path), overwrite=overwrite) as partial:
            heatmaps(panels, partial)

    def save_comparison(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write what `compare` gives as a JSON file, with heads as "layer:head" and NaN as null. Raises PathExists."""
        write_json(path, self.results(), overwrite=overwrite)

    def results(self) -> dict[str, Any]:
        """What `compare` gives, with heads as "layer:head": what `save_comparison` writes."""
        compared = self.compare()
        correlation = compared.pop("rank_correlation")
        per_head = {
            name: {f"{layer}:{head}": value for (layer, head), value in numbers.items()}
            for name, numbers in compared.items()
        }
        methods = {"interval": ranks.METHOD, "level": LEVEL, "comparisons": 1}
        return Result("comparison", {**per_head, "rank_correlation": correlation}, methods=methods).as_json()


def same_inputs(
    models: Mapping[str, str],
    texts: Sequence[str],
    load: LoadOptions = LoadOptions(),
    answers_of: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
) -> list[list[int]]:
    """The token ids of texts, the same for several models; with `answers_of`, followed by that model's greedy answers.

    models: name -> model. answers_of: one of the names. max_new_tokens: of an answer.
    Raises SelectionError when the models' tokenizers give different ids, and for texts that one of the models cannot read whole.
    """
    if answers_of is not None and answers_of not in models:
        raise SelectionError(f"--answers_of is {answers_of!r}; write {' or '.join(models)}, or leave it out.")
    encoded = _encoded_alike(models, texts, load)
    contexts = [load_model(model, options=load).context for model in models.values()]
    _check_lengths(encoded, contexts, room=max_new_tokens if answers_of is not None else 0)
    if answers_of is None:
        return encoded
    loaded = load_model(models[answers_of], options=load)
    answers = greedy_answers(loaded, encoded, max_new_tokens, batch_size)
    return [prompt + answer for prompt, answer in zip(encoded, answers, strict=True)]


def _encoded_alike(models: Mapping[str, str], texts: Sequence[str], load: LoadOptions) -> list[list[int]]:
    """The token ids of texts. Raises SelectionError when the models' tokenizers give different ids."""
    by_model = [
        [load_model(model, options=load).tokenizer(text)["input_ids"] for text in texts] for model in models.values()
    ]
    for number, of_text in enumerate(zip(*by_model, strict=True), 1):
        if any(ids != of_text[0] for ids in of_text):
            raise SelectionError(
                f"text {number} has other tokens in {' and '.join(models.values())}: heads are compared over the same tokens only."
            )
    return by_model[0]


def _check_lengths(encoded: Sequence[Sequence[int]], contexts: Sequence[int | None], room: int) -> None:
    """Raises SelectionError for texts that do not fit into every model's context. room: tokens of an answer after each text."""
    known = [context for context in contexts if context is not None]
    if not known:
        return
    longest = min(known) - room
    too_long = [number for number, ids in enumerate(encoded, 1) if len(ids) > longest]
    if too_long:
        raise SelectionError(
            f"{len(too_long)} texts, first number {too_long[0]}, are longer than the {longest} tokens that both models can read"
            + (f" before {room} of an answer." if room else ".")
        )


class _Strengths(NamedTuple):
    """How strong the heads of one model are."""

    per_head: PerHead
    of: str | None = None
    """What was measured: "result" or "z"; None when only the numbers are given."""
    n_tokens: int | None = None
    """How many tokens R_h is the mean over; None when only the numbers are given."""
    inputs: str | None = None
    """The fingerprint of the texts; None when it is not known."""
    by_group: Array | None = None
    """[n_groups, n_heads]: the strengths in each group of texts; None when they are not known."""
    group_tokens: Sequence[int] = ()
    """The tokens of each group."""


def _strengths(given: Any) -> _Strengths:
    """given: an ActivationExtractor, {(layer, head): R_h}, or a file. Raises StoreError for a file without head strengths."""
    if isinstance(given, Mapping):
        return _Strengths({(int(layer), int(head)): float(value) for (layer, head), value in given.items()})
    if isinstance(given, ActivationExtractor):
        stats, of, groups = given.get_all_stats(), given.of, given.groups
        assert groups is not None, "there are statistics"
        columns = [groups.means(layer) for layer in dict.fromkeys(layer for layer, _ in stats)]
        about: dict[str, Any] = {"fingerprint": groups.fingerprint, "group_tokens": groups.n_tokens}
        by_group = np.concatenate(columns, 1)
    else:
        stats, of, about = read_strength(given)
        by_group = np.array([numbers.get("by_group", []) for numbers in stats.values()], np.float64).T
    per_head = {key: numbers["R_h"] for key, numbers in stats.items()}
    n_tokens = int(next(iter(stats.values()))["n"])
    return _Strengths(
        per_head,
        of,
        n_tokens,
        about.get("fingerprint"),
        by_group if len(by_group) else None,
        about.get("group_tokens", ()),
    )


def _by_group(before: _Strengths, after: _Strengths) -> ByGroup | None:
    """The strength before, and the change, in each group of texts. None when they are not known of both."""
    if before.by_group is None or after.by_group is None:
        return None
    return ByGroup(before.by_group, after.by_group - before.by_group, np.array(before.group_tokens, np.float64))


def _check_same_inputs(name: str, before: Any, after: Any) -> None:
    """Raises SelectionError when both values are known and differ."""
    if before is not None and after is not None and before != after:
        raise SelectionError(f"the two are not of the same inputs: {name} is {before} and {after}.")
