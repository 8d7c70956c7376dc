"""Sweeps over a model's own answers, and over pairs of prompts: how much every head, or every position, matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from AutomaticEval.analysis.heads.ablate import mean_of, reference_values
from AutomaticEval.analysis.heads.patch import SITES
from AutomaticEval.analysis.heads.sweep import Sweep, sweep_of_answers, sweep_of_differences
from AutomaticEval.analysis.heads.sweep_folder import SweepFolder
from AutomaticEval.analysis.numbers import ratios, signs
from AutomaticEval.analysis.numbers.estimate import effects, methods
from AutomaticEval.analysis.parts.before_after import greedy_answers
from AutomaticEval.analysis.result import Effect, Result
from AutomaticEval.analysis.words.pairs import Pair, told_apart
from AutomaticEval.errors import PromptError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

ANSWERED_TOGETHER = 16
SWEPT_TOGETHER = 4
"""Prompts whose variants are run together. They are of similar length, so that little is padding."""

Item = TypeVar("Item")


def sweep_prompts(
    loaded: LoadedModel,
    prompts: Sequence[str],
    folder: SweepFolder,
    *,
    site: str = "z",
    neutral: Sequence[str] | None = None,
    max_new_tokens: int = 15,
    seed: int = 42,
) -> Result:
    """How much less likely a model's own greedy answers become without each head, or each position of another site.

    neutral: texts over whose tokens the mean stands in for what is taken out. None puts zeros there. seed: of the p values.
    Measured are samples (prompt, answer, and the answer's log-likelihood with nothing taken out, in nats; prompts without an answer are left
    out), places (layer, head or position, and change: an Effect, of the log-likelihood without minus with) and units.
    Raises OtherSettings for a folder of another sweep, PromptError when no answer has a token.
    """
    layers = _layers(loaded, site)
    numbers, answered = _answers(loaded, prompts, max_new_tokens)
    # a sweep that goes on needs the same answers and the same means
    folder.check_settings(answers=[answer for _, answer in answered], neutral=neutral and list(neutral))
    means = None
    if neutral is not None:
        reference = reference_values(loaded, site, layers, neutral)
        means = {layer: mean_of(values) for layer, values in reference.items()}
    longest = max(len(prompt) for prompt, _ in answered)
    sweeps = [sweep_of_answers(loaded, group, site, means, longest) for group in _groups(answered)]
    without = _swept(sweeps, folder, "logprobs", layers)  # [n_layers, n_places, n_answered]
    baseline = torch.cat([sweep.baseline for sweep in sweeps])
    samples = [
        {"prompt": prompts[number], "answer": loaded.tokenizer.decode(answer), "logprob": logprob}
        for number, (_, answer), logprob in sorted(zip(numbers, answered, baseline.tolist(), strict=True))
    ]
    changes = _by_place(without - baseline)
    measured = {
        "samples": samples,
        "places": _places({"change": effects(changes, seed=seed)}, layers, without.shape[1], site),
        "units": {"change": "change of log-likelihood, nats"},
    }
    return Result("sweep", measured, folder.settings, methods(changes.shape[1], p=signs.METHOD))


def sweep_pairs(
    loaded: LoadedModel, pairs: Sequence[Pair], folder: SweepFolder, *, site: str = "z", seed: int = 42
) -> Result:
    """How much of the difference of logits of clean and corrupted prompts comes with each head, or each position of another site. seed: of the p values.

    Measured are samples (each pair's prompts, its clean and corrupted difference, in logits, and whether it is left out), places (layer, head
    or position, and denoising and noising as `recovered` defines them, a Part each) and units. What each pair gave in each place stays in the
    folder's files.
    Raises OtherSettings for a folder of another sweep, PromptError for prompts of different lengths and for words that are no single token.
    """
    layers = _layers(loaded, site)
    encoded = [_encoded(loaded, pair) for pair in pairs]
    folder.check_settings()
    longest = max(len(clean) for clean, _, _ in encoded)

    def patched(name: str, into: int, source: int) -> tuple[Tensor, Tensor]:
        """The differences before [n_pairs] and after [n_layers, n_places, n_pairs]. into, source: 0 is clean, 1 corrupted."""
        sweeps = []
        for group in _groups(encoded):
            columns = list(zip(*group, strict=True))
            sweeps.append(sweep_of_differences(loaded, columns[into], columns[source], columns[2], site, longest))
        return torch.cat([sweep.baseline for sweep in sweeps]), _swept(sweeps, folder, name, layers)

    corrupted, denoised = patched("denoising", into=1, source=0)
    clean, noised = patched("noising", into=0, source=1)
    whole = (clean - corrupted).numpy()
    moved = {name: _by_place(each) for name, each in (("denoising", denoised - corrupted), ("noising", clean - noised))}
    parts = {name: ratios.parts_of(each, whole, seed=seed) for name, each in moved.items()}
    columns = zip(pairs, clean.tolist(), corrupted.tolist(), ratios.too_small(whole).tolist(), strict=True)
    samples = [
        {"prompts": vars(pair), "clean": of_clean, "corrupted": of_corrupted, "left_out": is_left_out}
        for pair, of_clean, of_corrupted, is_left_out in columns
    ]
    units = dict.fromkeys(parts, "part of the logit difference")
    measured = {"samples": samples, "places": _places(parts, layers, denoised.shape[1], site), "units": units}
    n_places = moved["denoising"].shape[1]
    return Result("sweep", measured, folder.settings, methods(n_places, p=ratios.P_METHOD, part=ratios.METHOD))


def _encoded(loaded: LoadedModel, pair: Pair) -> tuple[list[int], list[int], tuple[int, int]]:
    """The token ids of the clean and the corrupted prompt, and of answer and wrong."""
    clean, corrupted = (loaded.tokenizer(text)["input_ids"] for text in (pair.clean, pair.corrupted))
    if len(clean) != len(corrupted):
        raise PromptError(
            f"a sweep needs pairs of equal length; {pair.clean!r} has {len(clean)} tokens and {pair.corrupted!r} {len(corrupted)}."
        )
    return clean, corrupted, told_apart(loaded, pair)


def _answers(
    loaded: LoadedModel, prompts: Sequence[str], max_new_tokens: int
) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """The numbers of the prompts whose answer has a token, and (prompt, greedy answer) of each as token ids, the shortest first."""
    encoded = [loaded.tokenizer(prompt)["input_ids"] for prompt in prompts]
    answers = greedy_answers(loaded, encoded, max_new_tokens, ANSWERED_TOGETHER)
    lengths = {n: len(prompt) + len(answers[n]) for n, prompt in enumerate(encoded) if answers[n]}
    if not lengths:
        raise PromptError("no prompt was answered with a token, so there is nothing to score.")
    numbers = sorted(lengths, key=lengths.__getitem__)
    return numbers, [(encoded[number], answers[number]) for number in numbers]


def _groups(items: Sequence[Item]) -> list[Sequence[Item]]:
    return [items[start : start + SWEPT_TOGETHER] for start in range(0, len(items), SWEPT_TOGETHER)]


def _layers(loaded: LoadedModel, site: str) -> list[int]:
    """The layers that are swept: those that have the site. A warning names the others' lack."""
    if site in SITES:
        loaded.layout.where_held(loaded.layout.sites(site))
    return loaded.layout.layers_of(site) if site in SITES else []


def _swept(sweeps: Sequence[Sweep], folder: SweepFolder, name: str, layers: Sequence[int]) -> Tensor:
    """[n_layers, n_places, n_sequences]: the numbers of several sweeps beside one another."""
    return folder.layers(name, layers, lambda layer: torch.cat([sweep.layer(layer) for sweep in sweeps], 1))


def _by_place(numbers: Tensor) -> Any:
    """[n_layers, n_places, n_sequences] -> [n_sequences, n_layers * n_places]"""
    return numbers.flatten(0, 1).T.double().numpy()


def _places(
    estimates: Mapping[str, Sequence[Effect]], layers: Sequence[int], n_places: int, site: str
) -> list[dict[str, Any]]:
    """For every place its layer, its head or position, and its estimates.

    estimates: name -> one for each place, layer after layer. n_places: of a layer.
    """
    across = "head" if site == "z" else "position"
    return [
        {"layer": layers[number // n_places], across: number % n_places, **dict(zip(estimates, of_place, strict=True))}
        for number, of_place in enumerate(zip(*estimates.values(), strict=True))
    ]
