"""A sweep on the disk: a file a layer as it is done, so that a sweep that was cut short goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

from AutomaticEval.analysis.heads.ablate import mean_of, reference_values
from AutomaticEval.analysis.heads.patch import Pair, told_apart
from AutomaticEval.analysis.heads.sweep import Sweep, sweep_of_answers, sweep_of_differences
from AutomaticEval.analysis.numbers.estimate import mean_intervals
from AutomaticEval.analysis.parts.before_after import greedy_answers
from AutomaticEval.errors import PromptError, StoreError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.settings import LATER, SAMPLED
from AutomaticEval.store.disk.json_files import read_json, refuse_others, write_json

CHECKSUM = "xxh3_64"
"""In the file of a layer."""
ANSWERED_TOGETHER = 16
SWEPT_TOGETHER = 4
"""Prompts, of like length, whose variants are run together: so little is padding."""


def sweep_prompts(
    loaded: LoadedModel,
    prompts: Sequence[str],
    folder: Path,
    settings: Mapping[str, Any],
    *,
    site: str = "z",
    neutral: Sequence[str] | None = None,
    max_new_tokens: int = 15,
) -> dict[str, Any]:
    """How much less likely a model's own greedy answers to prompts become without each head, or each position of another site.

    neutral: texts over whose tokens the mean stands in for what is taken out; None for zeros. settings: what the sweep is of; a folder with
    others is refused. Returns samples (prompt, answer, and logprob with nothing taken out, in nats; prompts that were answered by nothing are left
    out), places (layer, head or position, and change: without - with, with mean, 95 % bootstrap interval and n) and units. Raises OtherSettings, PromptError when no answer has a token.
    """
    asked, pairs = _answers(loaded, prompts, max_new_tokens)
    # a sweep that goes on goes on with the same answers and the same means
    _check_settings(
        folder, {**settings, "answers": [answer for _, answer in pairs], "neutral": neutral and list(neutral)}
    )
    values = None
    if neutral is not None:
        reference = reference_values(loaded, site, range(loaded.layout.n_layers), neutral)
        values = {layer: mean_of(each) for layer, each in reference.items()}
    longest = max(len(prompt) for prompt, _ in pairs)
    sweeps = [sweep_of_answers(loaded, some, site, values, longest) for some in _groups(pairs)]
    likely = _swept(sweeps, folder, "logprobs", loaded.layout.n_layers)  # [n_layers, n_places, n_pairs]
    baseline = torch.cat([sweep.baseline for sweep in sweeps])
    places = _places({"change": likely - baseline}, site)
    samples = [
        {"prompt": prompts[number], "answer": loaded.tokenizer.decode(answer), "logprob": logprob}
        for number, (_, answer), logprob in sorted(zip(asked, pairs, baseline.tolist(), strict=True))
    ]
    return {"samples": samples, "places": places, "units": {"change": "change of log-likelihood, nats"}}


def sweep_pairs(
    loaded: LoadedModel, pairs: Sequence[Pair], folder: Path, settings: Mapping[str, Any], *, site: str = "z"
) -> dict[str, Any]:
    """How much of the logit difference of clean and corrupted prompts comes with each head, or each position of another site.

    Returns samples (each pair, and clean and corrupted: the differences, in logits), places (layer, head or position, and denoising and noising as
    `recovered` defines them) and units. Raises OtherSettings, PromptError for pairs that are not of equal length or not told apart.
    """
    _check_settings(folder, settings)
    encoded = [_encoded(loaded, pair) for pair in pairs]
    longest = max(len(each) for each, _, _ in encoded)
    directions = {}
    for name, order in {"denoising": (1, 0), "noising": (0, 1)}.items():
        sweeps = []
        for some in _groups(encoded):
            columns = list(zip(*some, strict=True))
            into, source = (columns[place] for place in order)
            sweeps.append(sweep_of_differences(loaded, into, source, columns[2], site, longest))
        base = torch.cat([sweep.baseline for sweep in sweeps])
        directions[name] = base, _swept(sweeps, folder, name, loaded.layout.n_layers)
    (corrupted, denoised), (clean, noised) = directions.values()
    whole = (clean - corrupted).where(clean != corrupted, torch.nan)
    parts = {"denoising": (denoised - corrupted) / whole, "noising": (clean - noised) / whole}
    samples = [
        {"prompts": vars(pair), "clean": one, "corrupted": other}
        for pair, one, other in zip(pairs, clean.tolist(), corrupted.tolist(), strict=True)
    ]
    units = dict.fromkeys(parts, "part of the logit difference")
    return {"samples": samples, "places": _places(parts, site), "units": units}


def _encoded(loaded: LoadedModel, pair: Pair) -> tuple[list[int], list[int], tuple[int, int]]:
    clean, corrupted = (loaded.tokenizer(text)["input_ids"] for text in (pair.clean, pair.corrupted))
    if len(clean) != len(corrupted):
        raise PromptError(
            f"a sweep needs pairs of equal length; {pair.clean!r} has {len(clean)} tokens and {pair.corrupted!r} {len(corrupted)}."
        )
    return clean, corrupted, told_apart(loaded, pair)


def _answers(
    loaded: LoadedModel, prompts: Sequence[str], max_new_tokens: int
) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """Which prompts were answered with a token at least, and (prompt, greedy answer) of each, the short ones first."""
    encoded = [loaded.tokenizer(prompt)["input_ids"] for prompt in prompts]
    answers = greedy_answers(loaded, encoded, max_new_tokens, ANSWERED_TOGETHER)
    pairs = list(zip(encoded, answers, strict=True))
    asked = sorted((n for n, pair in enumerate(pairs) if pair[1]), key=lambda n: len(pairs[n][0]) + len(pairs[n][1]))
    if not asked:
        raise PromptError("no prompt was answered with a token, so there is nothing to score.")
    return asked, [pairs[number] for number in asked]


def _groups(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + SWEPT_TOGETHER] for start in range(0, len(items), SWEPT_TOGETHER)]


def _swept(sweeps: Sequence[Sweep], folder: Path, name: str, n_layers: int) -> Tensor:
    """[n_layers, n_places, n_sequences], float64; each layer from the disk, or computed and put there. Raises StoreError."""
    found: list[Tensor] = []
    for layer in tqdm(range(n_layers), desc=f"Layers ({name})", unit="layer"):
        file = folder / f"{name}_layer_{layer:03d}.json"
        if not file.exists():
            rows = torch.cat([sweep.layer(layer) for sweep in sweeps], 1).tolist()
            values = [[each if math.isfinite(each) else None for each in row] for row in rows]
            write_json(file, {name: values, CHECKSUM: _checksum(values)})
        found.append(_kept(file, name))
        if found[-1].shape != found[0].shape:
            raise _damaged(
                file, f"it has {list(found[-1].shape)} numbers, and other layers have {list(found[0].shape)}"
            )
    return torch.stack(found)


def _kept(file: Path, name: str) -> Tensor:
    """[n_places, n_sequences] of a layer's file. The first versions wrote no checksum. Raises StoreError."""
    kept = read_json(file)
    values = kept.get(name)
    if CHECKSUM in kept and kept[CHECKSUM] != _checksum(values):
        raise _damaged(file, "its numbers are not what its checksum says")
    try:
        rows = [[torch.nan if each is None else each for each in row] for row in values or []]
        found = torch.tensor(rows, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError):
        raise _damaged(file, f"it holds no table of numbers named {name!r}") from None
    if found.dim() != 2:
        raise _damaged(file, f"it holds no table of numbers named {name!r}")
    return found


def _checksum(values: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values).encode())


def _damaged(file: Path, why: str) -> StoreError:
    return StoreError(f"{file} is damaged: {why}. Delete it, and the same command computes that layer again.")


def _places(numbers: Mapping[str, Tensor], site: str) -> list[dict[str, Any]]:
    """numbers: name -> [n_layers, n_places, n_sequences], NaN where there is none."""
    n_layers, n_places, _ = next(iter(numbers.values())).shape
    across = "head" if site == "z" else "position"
    return [
        {"layer": layer, across: place, **{name: _interval(each[layer, place]) for name, each in numbers.items()}}
        for layer in range(n_layers)
        for place in range(n_places)
    ]


def _interval(values: Tensor) -> dict[str, Any]:
    return mean_intervals(values[~values.isnan()][:, None].numpy())[0]


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if not file.exists():
        write_json(file, settings)
        return
    before = read_json(file)
    if SAMPLED not in before and "weights" in before:  # as the first versions named it
        before[SAMPLED] = before.pop("weights")
        settings = {name: value for name, value in settings.items() if name in before or name in LATER}
    refuse_others(folder, before, {**dict.fromkeys(before), **settings})
