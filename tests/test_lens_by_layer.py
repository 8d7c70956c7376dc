"""The lens over a run, tuned lenses and geometry, each held against a second way of computing it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import build
from transformers import CohereConfig, Gemma2Config, GraniteConfig

from AutomaticEval import evaluate_with_activations, load_tuned_lens, logit_lens, open_run, train_tuned_lens
from AutomaticEval.analysis.geometry.spectrum import effective_rank, participation_ratio, spectrum
from AutomaticEval.analysis.lens.answers import NONE, FirstTokens
from AutomaticEval.analysis.lens.by_layer import _only_gold
from AutomaticEval.analysis.lens.logit_lens import LogitLens
from AutomaticEval.analysis.lens.train import Training
from AutomaticEval.analysis.numbers.similarity import cka_between, kernels_of, linear_cka
from AutomaticEval.capture.recompute.plain_forward import plain_forward
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def run(demo: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lens") / "run"
    evaluate_with_activations(demo, "demo", limit=30, output=folder)
    return folder


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, head_dim=16, num_key_value_heads=2, final_logit_softcapping=2.0),
        GraniteConfig(**SIZES, logits_scaling=7.0),
        CohereConfig(**SIZES, logit_scale=0.3),
    ],
    ids=["gemma2", "granite", "cohere"],
)
def test_the_last_layer_gives_the_models_own_probabilities(config: object, tokenizer: object) -> None:
    loaded = LoadedModel(build(config), tokenizer, "tiny")
    plain = plain_forward(loaded, [3, 14, 15, 9], ["layer_1"], [0, 1, 2, 3], n_last=4)
    with torch.no_grad():
        ours = LogitLens(loaded).translated(plain.rows["layer_1"])
    torch.testing.assert_close(ours, plain.logits.log_softmax(dim=-1), atol=2e-5, rtol=1e-5)


def test_the_last_layers_choices_are_the_benchmarks(run: Path, demo: LoadedModel) -> None:
    opened = open_run(run)
    result = logit_lens(opened, model=demo)
    last = result.measured["places"][-1]
    facts = opened.questions().where(task="demo_facts")
    assert last.choice_accuracy.mean == pytest.approx(np.mean(facts.column("correct")))
    assert (last.kl.mean, last.top_agreement.mean) == (0, 1)
    lines = [n for n, place in enumerate(result.questions["place"]) if place == last.site]
    scored = [result.questions["choice_logprobs"][n] for n in lines if result.questions["task"][n] == "demo_facts"]
    np.testing.assert_allclose(scored, facts.column("logprobs"), atol=1e-4)


def test_a_tuned_lens_is_nearer_on_held_out_prompts_and_survives_its_file(
    run: Path, demo: LoadedModel, tmp_path: Path
) -> None:
    lens, result = train_tuned_lens(open_run(run), ["layer_1", "layer_3"], model=demo, training=Training(n_steps=60))
    first, last = result.measured["places"]
    assert first.gain.interval[0] > 0
    assert (last.plain.mean, last.tuned.mean, last.step) == (0, 0, 0)
    lens.save(tmp_path / "tuned.safetensors")
    again = load_tuned_lens(tmp_path / "tuned.safetensors")
    assert torch.equal(again.weights["layer_1"], lens.weights["layer_1"])
    read = logit_lens(open_run(run), ["layer_1"], model=demo, tuned=again).measured
    assert read["n_learned_from"] + read["n_questions"] == 60


@pytest.mark.parametrize("positions", ["all", "prompt"])
def test_white_space_before_an_answer_is_no_gold(positions: str, demo: LoadedModel, tmp_path: Path) -> None:
    """The demo's tokenizer makes a token of the space before a number. The last layer gives the model's own greedy answer to the token after it."""
    evaluate_with_activations(demo, "demo_arithmetic", limit=20, positions=positions, output=tmp_path / "run")
    opened = open_run(tmp_path / "run")
    result = logit_lens(opened, ["layer_3"], model=demo)
    gold, taken, rank = (result.questions[name] for name in ("gold_token", "taken_token", "gold_rank"))
    if positions == "prompt":  # without the row after the space
        assert result.measured["without_gold"] == {"the right answer begins with a token that is only white space": 20}
        assert (set(gold), set(taken), result.measured["n_after_space"]) == ({None}, {None}, 0)
        return
    targets, said = (opened.questions().column(name) for name in ("target", "response"))
    assert gold == [each.strip()[0] for each in targets]
    assert taken == [each.strip()[0] for each in said]
    assert [each == 1 for each in rank] == [
        one.strip()[0] == other.strip()[0] for one, other in zip(targets, said, strict=True)
    ]
    assert (result.measured["n_after_space"], result.measured["only_gold"]) == (20, None)
    assert result.measured["places"][0].kl.mean == pytest.approx(0, abs=1e-6)
    elsewhere = logit_lens(opened, ["layer_3"], model=demo, position="prompt[-2]")
    assert elsewhere.measured["without_gold"] == {"the right answer begins with a token that is only white space": 20}


def test_a_gold_token_that_all_questions_share_is_named(demo: LoadedModel) -> None:
    def only(*gold: int) -> str | None:
        tokens = np.array(gold)
        return _only_gold(FirstTokens(tokens, tokens, tokens, {}), demo)

    assert (only(20, 20, NONE), only(20, 21), only(20, NONE), only(NONE)) == ("4", None, None, None)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_components_and_ranks_are_scikit_learns_and_numpys(shape: tuple[int, int]) -> None:
    from sklearn.decomposition import PCA

    rows = np.random.default_rng(0).standard_normal(shape) * np.arange(1, shape[1] + 1)
    found, fitted = spectrum(rows), PCA().fit(rows)
    n = len(found.variances)
    np.testing.assert_allclose(found.variances, fitted.explained_variance_[:n], rtol=1e-8)
    np.testing.assert_allclose(np.abs(found.first_two), np.abs(fitted.transform(rows)[:, :2]), atol=1e-6)
    shares = fitted.explained_variance_ratio_[:n]
    assert effective_rank(found.variances) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert participation_ratio(found.variances) == pytest.approx(1 / (shares**2).sum())


def test_cka_of_all_pairs_is_that_of_each_pair() -> None:
    draw = np.random.default_rng(0)
    sets = [draw.standard_normal((20, width)) for width in (3, 8, 30)]
    kernels = kernels_of(iter(sets), 20)
    expected = [[linear_cka(one, other) for other in sets] for one in sets]
    np.testing.assert_allclose(cka_between(kernels, kernels), np.array(expected, dtype=float))
