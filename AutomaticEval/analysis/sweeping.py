"""A sweep on the disk: a file a layer as it is done, so that a sweep that was cut short goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from AutomaticEval.analysis.ablation import mean_z, reference_z
from AutomaticEval.analysis.answers import greedy_answers
from AutomaticEval.analysis.bootstrap import mean_interval
from AutomaticEval.analysis.results import write_json
from AutomaticEval.analysis.sweep import Sweep
from AutomaticEval.errors import OtherSettings, PromptError
from AutomaticEval.models.loading import LoadedModel

ANSWERED_TOGETHER = 16
SWEPT_TOGETHER = 4
"""Prompts, of like length, whose variants are run together: so little is padding."""


def sweep_prompts(
    loaded: LoadedModel,
    prompts: Sequence[str],
    folder: Path,
    settings: Mapping[str, Any],
    *,
    neutral: Sequence[str] | None = None,
    max_new_tokens: int = 15,
) -> dict[str, Any]:
    """How much less likely a model's own greedy answers to prompts become without each head.

    neutral: texts over whose tokens each head's mean stands in for it; None for zeros. settings: what the sweep is of; a folder with others
    is refused. Returns baseline (the answers' log-likelihoods, in nats) and heads: layer, head, and change (without - with) with mean,
    95 % bootstrap interval and n. Raises OtherSettings, PromptError when no answer has a token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder / "settings.json", dict(settings))
    layout = loaded.layout
    every = range(layout.n_layers)
    means = None
    if neutral is not None:
        means = {layer: mean_z(z) for layer, z in reference_z(loaded, every, neutral).items()}
    pairs = _answers(loaded, prompts, max_new_tokens)
    sweeps = [
        Sweep(loaded, pairs[start : start + SWEPT_TOGETHER], means) for start in range(0, len(pairs), SWEPT_TOGETHER)
    ]
    baseline = torch.cat([sweep.baseline for sweep in sweeps])
    heads = []
    for layer in tqdm(every, desc="Layers", unit="layer"):
        file = folder / f"layer_{layer:03d}.json"
        found = _kept(file, lambda layer=layer: torch.cat([sweep.layer(layer) for sweep in sweeps], 1))  # type: ignore[misc]
        for head, likely in enumerate(found):
            heads.append({"layer": layer, "head": head, "change": mean_interval((likely - baseline).tolist())})
    return {"baseline": baseline.tolist(), "heads": heads}


def _answers(loaded: LoadedModel, prompts: Sequence[str], max_new_tokens: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, greedy answer); prompts whose answer has no token are left out."""
    encoded = [loaded.tokenizer(prompt)["input_ids"] for prompt in prompts]
    answers = greedy_answers(loaded, encoded, max_new_tokens, ANSWERED_TOGETHER)
    pairs = [(ids, answer) for ids, answer in zip(encoded, answers, strict=True) if answer]
    if not pairs:
        raise PromptError("no prompt was answered with a token, so there is nothing to score.")
    return sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))


def _kept(file: Path, compute: Callable[[], Tensor]) -> Tensor:
    """[n_heads, n_pairs] of a layer: from the disk, or computed and put there."""
    if not file.exists():
        write_json(file, {"logprobs": compute().tolist()})
    return torch.tensor(json.loads(file.read_text())["logprobs"], dtype=torch.float64)


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    if not file.exists():
        write_json(file, settings)
        return
    before = json.loads(file.read_text())
    apart = [name for name in {*before, *settings} if before.get(name) != settings.get(name)]
    if apart:
        name = min(apart)
        raise OtherSettings(
            f"the sweep in {file.parent} was made with other settings: {name} was {before.get(name)!r} and is {settings.get(name)!r}. "
            "Name another folder."
        )
