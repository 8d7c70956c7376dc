"""Random numbers: what decides them, and that answers sampled by them do not depend on the batch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import CONFIGS, build
from scipy import stats

from AutomaticEval import evaluate
from AutomaticEval.analysis.heads.ablate import Ablation, reference_z
from AutomaticEval.analysis.parts.before_after import answers_with
from AutomaticEval.capture import draws
from AutomaticEval.capture.draws import _ChosenByDraws, derived_seed, drawing, random_numbers, repeats_of
from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.errors import CaptureError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

PROMPTS = [[5, 9, 33, 7], [120, 41], [5, 9, 33, 7], [8, 8, 8, 8, 8, 8], [7]]
SAMPLING = Sampling(max_new_tokens=12, temperature=1.3, top_k=60, seed=3, generation="eager")


@pytest.fixture(scope="module")
def llama(tokenizer: Any) -> LoadedModel:
    return LoadedModel(build(CONFIGS["llama"]()), tokenizer, "llama")


def answers(loaded: LoadedModel, prompts: list[list[int]], size: int, sampling: Sampling = SAMPLING) -> list[list[int]]:
    repeats, found = repeats_of(prompts), []
    for start in range(0, len(prompts), size):
        some = slice(start, start + size)
        found += respond(loaded, prompts[some], sampling, repeats=repeats[some])
    return [each.generated_ids for each in found]


def test_no_two_seeds_and_purposes_share_draws() -> None:
    """Also where the numbers have the same sum, or the texts the same letters."""
    purposes = [*itertools.product(range(3), repeat=2), ("ab", "c"), ("a", "bc"), ([1, 2], 3), ([1], 2, 3)]
    drawn = {tuple(random_numbers(seed, *purpose).random(3)) for seed in range(4) for purpose in purposes}
    assert len(drawn) == 4 * len(purposes)
    assert random_numbers(1, "a", [2]).random() == random_numbers(1, "a", (np.int64(2),)).random()
    assert len({derived_seed(seed, "process", rank) for seed in range(8) for rank in range(8)}) == 64
    assert 0 <= derived_seed(-5, "\ud800") < 2**32


def test_each_token_is_left_with_its_own_probability() -> None:
    """40,000 rows by chi-squared; what has no probability is never left."""
    logits = torch.tensor([0.3, -torch.inf, 2.0, 1.0, -3.0, -torch.inf])
    sources = [random_numbers(0, "row", row) for row in range(20_000)]
    chosen = _ChosenByDraws(sources)
    counts = np.zeros(6)
    for _ in range(2):
        left = chosen(torch.empty(0), logits.expand(len(sources), -1))
        assert (torch.isfinite(left).sum(1) == 1).all()
        counts += torch.isfinite(left).sum(0).numpy()
    assert counts[1] == counts[5] == 0
    expected = logits.softmax(0).double().numpy() * counts.sum()
    assert stats.chisquare(counts[[0, 2, 3, 4]], expected[[0, 2, 3, 4]], sum_check=False).pvalue > 0.001
    broken = torch.full((1, 4), torch.nan)
    assert _ChosenByDraws(sources[:1])(torch.empty(0), broken).isnan().all()  # which transformers refuses
    with pytest.raises(CaptureError, match="samples 1 rows, and 2"):
        _ChosenByDraws(sources[:2])(torch.empty(0), broken)


def test_sampled_answers_do_not_depend_on_the_batch(llama: LoadedModel) -> None:
    alone = answers(llama, PROMPTS, 1)
    for size in (2, 3, 5):
        assert answers(llama, PROMPTS, size) == alone
    assert alone[0] != alone[2]  # a prompt that is asked again
    order = [3, 0, 4, 1, 2]
    assert answers(llama, [PROMPTS[row] for row in order], 5) == [alone[row] for row in order]
    others = [answers(llama, PROMPTS, 5, replace(SAMPLING, seed=seed)) for seed in range(3, 6)]
    every = [tuple(each) for of_seed in others for each in of_seed]
    assert len(set(every)) == len(every)  # no seed answers a prompt as another answers the next one


def test_a_sampled_answer_by_hand(llama: LoadedModel) -> None:
    """Token by token, without a cache: the first token at which the cumulated probability exceeds the draw."""
    sampling = replace(SAMPLING, top_k=0, top_p=0.8)
    for row, (prompt, found) in enumerate(zip(PROMPTS, answers(llama, PROMPTS, 5, sampling), strict=True)):
        source = random_numbers(3, "response", prompt, 1 if row == 2 else 0)
        ids = list(prompt)
        for token in found:
            with torch.no_grad():
                logits = llama.model(torch.tensor([ids]), use_cache=False).logits[0, -1].double() / 1.3
            likely = logits.softmax(-1).numpy()
            order = np.argsort(-likely)
            kept = order[: 1 + int((likely[order].cumsum() < 0.8).sum())]
            likely = np.where(np.isin(np.arange(len(likely)), kept), likely, 0)
            assert int(np.argmax(likely.cumsum() / likely.sum() > source.random())) == token
            ids.append(token)


def test_nothing_is_left_on_the_model(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before, state = set(llama.model.__dict__), torch.get_rng_state()
    answers(llama, PROMPTS, 5)
    assert set(llama.model.__dict__) == before
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(CaptureError, match="not known"), drawing(llama.model, [random_numbers(0)]):
        pass
    assert set(llama.model.__dict__) == before
    monkeypatch.setattr(draws, "BLOCK", 5)
    blocks = answers(llama, PROMPTS, 5)
    monkeypatch.undo()
    assert blocks == answers(llama, PROMPTS, 5)


def test_sampled_answers_of_a_benchmark_do_not_depend_on_the_batch(demo: LoadedModel, tmp_path: Path) -> None:
    """Repeats are others of one another."""
    how: dict[str, Any] = {"gen_kwargs": "do_sample=true,temperature=4.0", "limit": 4, "repeats": 3}

    def responses(**more: Any) -> list[Any]:
        outcome = evaluate(demo, "demo_arithmetic", **how, **more)
        return [[each["resps"], each["doc_id"]] for each in next(iter(outcome.samples.values()))]

    alone = responses(batch_size=1)
    assert responses(batch_size=8) == responses(batch_size=3) == alone
    assert len({text for resps, _ in alone for text in resps[0]}) > 4
    assert responses(batch_size=8, seed=5) != alone


def test_resampled_values_are_each_prompts_own(llama: LoadedModel) -> None:
    """Equal prompts get other draws, so that intervals over prompts include the draws; neighbouring seeds and layers share none."""
    text = "The colour of the ball is"
    reference = reference_z(llama, [0, 1], ["Some words of another text", "And a few more of them"])
    ablation = Ablation(llama, {0: [0, 1], 1: [2]}, "resample", reference)
    found = answers_with(ablation, [text] * 3, [], Sampling(max_new_tokens=4)).as_json()
    after = [each["after"]["logprob"] for each in found["samples"]]
    further = [[each["logprob"] for each in sample["further_draws"]] for sample in found["samples"]]
    assert [len(each) for each in further] == [3, 3, 3]
    every = {*after, *(each for draws in further for each in draws)}
    assert len(every) == 12
    assert len({sample["before"]["logprob"] for sample in found["samples"]}) == 1
    mean = np.mean([[one, *others] for one, others in zip(after, further, strict=True)])
    assert found["summary"]["logprob"]["after"]["mean"] == pytest.approx(mean)
    assert found["summary"]["logprob"]["after"]["n"] == 3
    of_layers = [random_numbers(seed, "resample", layer, 0).random(8).tolist() for seed in (42, 43) for layer in (0, 1)]
    assert len({tuple(each) for each in of_layers}) == 4
