"""`expert_load`: how often each expert of a mixture serves the tokens of a run, and which serve which task, or right answers, more than others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from AutomaticEval.analysis.experts.contrasts import Contrasts, Group
from AutomaticEval.analysis.experts.question_rows import QuestionRows, question_rows
from AutomaticEval.analysis.numbers.estimate import mean_intervals, methods
from AutomaticEval.analysis.result import Effect, Estimate, Result
from AutomaticEval.errors import SelectionError, StoreError
from AutomaticEval.sites import LayersLike, kind_and_layer
from AutomaticEval.store.reader import as_run
from AutomaticEval.store.run import Run
from AutomaticEval.store.upkeep.prune import kept_keys

Array = np.ndarray[Any, Any]
N_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
"""The fields of a model's config that say how many experts a layer has, the likeliest first."""
MOST_TOLD = 20
"""The most experts that are told of one task."""
SIGNIFICANT = 0.05
METHOD = "labels of the questions permuted, corrected by the largest difference over all experts, layers and tasks (single-step maxT)"


@dataclass(frozen=True)
class LayerLoad:
    """How evenly the experts of one layer are used."""

    layer: int
    n_experts: int
    n_active: int
    """Experts a token."""

    even: float
    """n_active / n_experts: the load of each expert if all were used alike."""

    largest: float
    largest_expert: int
    n_unused: int
    """Experts that no token has."""

    entropy_bits: float
    """Of the shares of all choices: log2(n_experts) when all are used alike, 0 when one is used alone."""

    effective_experts: float
    """2 to the power of the entropy: so many experts, used alike, would have it."""


@dataclass(frozen=True)
class ExpertLoad:
    """How often one expert is chosen."""

    layer: int
    expert: int
    load: Estimate
    """The share of a question's tokens that have the expert, as a mean over questions."""

    relative: float
    """The load divided by the even one."""


@dataclass(frozen=True)
class ExpertDifference:
    """One expert in a group of questions beside the others."""

    layer: int
    expert: int
    load: float
    """In the group."""

    difference: Effect
    """Its load in the group minus that in the others."""


@dataclass(frozen=True)
class GroupLoads:
    """The experts whose load differs most between a group of questions and others."""

    name: str
    n_in: int
    n_out: int
    n_significant: int
    """Experts with p < 0.05."""

    experts: list[ExpertDifference]
    """Those with the smallest p, the furthest interval first; MOST_TOLD at most."""


def expert_load(
    run: Run | str,
    *,
    positions: str = "all",
    layers: LayersLike = None,
    n_permutations: int = 1000,
    seed: int = 42,
    advance: Callable[[int], None] = lambda _: None,
) -> Result:
    """How a run's tokens are shared among experts, by layer, task, and right and wrong answers.

    >>> result = expert_load(open_run("results/run"), positions="prompt[-32:]")
    >>> result.measured["layers"][0].effective_experts

    run: a run that kept `expert_ids`, or its path. positions: which of its tokens count, as for a capture. layers: of those that it kept.
    advance: is told of each layer. A load is the share of a question's tokens that have the expert, averaged over questions, so that all loads of a layer
    add up to n_active. Of questions with equal prompts, the first counts.
    The result's `measured` has `layers` (LayerLoad), `experts` (ExpertLoad), `tasks` (each task against all others) and `right_wrong` (right against wrong
    answers of each task, and of all tasks, within tasks): lists of GroupLoads. Memory holds one layer.
    Raises SelectionError for a run without expert_ids; StoreError for positions that it did not keep.
    """
    run = as_run(run)
    keys = _keys(run, layers)
    sizes = {key: n_experts_of(run, key) for key in keys}
    of = question_rows(run, positions)
    by_task, right = _by_task(of, n_permutations, seed), _right(of, n_permutations, seed)
    of_layers, of_experts, means = [], [], []
    for key in keys:
        values = of.loads(key, sizes[key])
        layer = kind_and_layer(key).layer or 0
        estimates = mean_intervals(values)
        of_layers.append(_layer(layer, values.mean(0)))
        even = of_layers[-1].even
        of_experts += [
            ExpertLoad(
                layer, expert, Estimate(each.mean, each.interval, each.n, reason=each.reason), (each.mean or 0.0) / even
            )
            for expert, each in enumerate(estimates)
        ]
        means.append(
            {
                name: [values[g.is_in & g.is_known].mean(0) for g in c.groups]
                for name, c in (("task", by_task), ("right", right))
            }
        )
        by_task.add(values)
        right.add(values)
        advance(1)
    numbers = [kind_and_layer(key).layer or 0 for key in keys]
    measured: dict[str, Any] = {
        "run": {"path": run.path.name, "model": run.model},
        "positions": positions,
        "n_questions": len(of),
        "n_again": of.n_again,
        "n_tokens": int(of.n_rows.sum()),
        "layers": of_layers,
        "experts": of_experts,
        "tasks": _told(by_task, numbers, [each["task"] for each in means]),
        "right_wrong": _told(right, numbers, [each["right"] for each in means]),
    }
    settings = {
        "positions": positions,
        "layers": None if layers is None else str(layers),
        "permutations": n_permutations,
        "seed": seed,
        "run": run.settings,
    }
    n_comparisons = max(1, by_task.n_comparisons + right.n_comparisons)
    return Result("experts", measured, settings, methods(n_comparisons, p=METHOD, is_together=False))


def _keys(run: Run, layers: LayersLike) -> list[str]:
    if not any(kind_and_layer(key).kind == "expert_ids" for key in run.keys):
        raise SelectionError(
            f"{run.path} keeps no expert_ids; capture a mixture of experts with --sites expert_ids. It has {', '.join(run.keys)}."
        )
    return kept_keys(run, "expert_ids", layers)


def n_experts_of(run: Run, key: str) -> int:
    """How many experts the layer of a key has: as many as its router gives logits, or as the model's config says. Raises StoreError when neither is there."""
    layer = kind_and_layer(key).layer or 0
    logits = f"layer_{layer}.router_logits"
    if logits in run.keys and run.settings.get("reduce") is None:
        return run.contents.activations[logits].width
    config: Any = run.settings.get("config") or {}
    for part in (config, *(each for each in config.values() if isinstance(each, Mapping))):
        for name in N_EXPERTS:
            found = part.get(name)
            found = found[layer] if isinstance(found, list) and layer < len(found) else found
            if isinstance(found, int) and found > 0:
                return found
    raise StoreError(
        f"{run.path} does not say how many experts layer {layer} has: its config has none of {', '.join(N_EXPERTS)}. Keep router_logits, too."
    )


def _by_task(of: QuestionRows, n_permutations: int, seed: int) -> Contrasts:
    """Each task against all others."""
    tasks, everyone = np.array(of.tasks), np.ones(len(of), bool)
    groups = [Group(name, tasks == name, everyone) for name in dict.fromkeys(of.tasks)]
    return Contrasts(groups, np.zeros(len(of), np.int64), n_permutations, seed)


def _right(of: QuestionRows, n_permutations: int, seed: int) -> Contrasts:
    """Right answers against wrong ones: of each task, and of all tasks together. Labels stay within their task."""
    tasks = list(dict.fromkeys(of.tasks))
    strata = np.array([tasks.index(name) for name in of.tasks])
    known, is_right = np.array([each is not None for each in of.correct]), np.array([bool(each) for each in of.correct])
    groups = [Group(name, is_right, known & (strata == number)) for number, name in enumerate(tasks)]
    both = [
        group for group in groups if group.n_in and group.n_out
    ]  # a task of one verdict says nothing of right and wrong
    if len(both) > 1:
        groups.append(Group("all tasks", is_right, np.logical_or.reduce([group.is_known for group in both])))
    return Contrasts(groups, strata, n_permutations, seed)


def _layer(layer: int, loads: Array) -> LayerLoad:
    """loads: [n_experts], the mean over questions."""
    n_active = float(loads.sum())
    shares = loads[loads > 0] / n_active
    entropy = float(-(shares * np.log2(shares)).sum()) + 0.0
    largest = int(loads.argmax())
    n_unused = int((loads == 0).sum())
    return LayerLoad(
        layer,
        len(loads),
        round(n_active),
        n_active / len(loads),
        float(loads[largest]),
        largest,
        n_unused,
        entropy,
        2.0**entropy,
    )


def _told(contrasts: Contrasts, layers: Sequence[int], means: Sequence[Sequence[Array]]) -> list[GroupLoads]:
    """What is told of each group. means: of each layer, the loads [n_experts] in each group."""
    told = []
    for number, (group, by_layer) in enumerate(zip(contrasts.groups, contrasts.effects(), strict=True)):
        found = [
            ExpertDifference(layer, expert, float(means[at][number][expert]), effect)
            for at, (layer, effects) in enumerate(zip(layers, by_layer, strict=True))
            for expert, effect in enumerate(effects)
        ]
        found.sort(key=_order)
        n_significant = sum((each.difference.p or 0.0) < SIGNIFICANT for each in found)
        told.append(GroupLoads(group.name, group.n_in, group.n_out, n_significant, found[:MOST_TOLD]))
    return told


def _order(each: ExpertDifference) -> tuple[float, float]:
    """The smallest p first, and of equal ones the largest difference."""
    return each.difference.p or 0.0, -abs(each.difference.mean or 0.0)
