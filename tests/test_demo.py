"""The demo world: what the model has read and what not, and that the shipped benchmark is the script's."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from AutomaticEval import evaluate_with_activations, open_run, probe
from AutomaticEval.demo import train
from AutomaticEval.demo.world import capitals, facts, guessed_capital, larger_sums, sums
from AutomaticEval.evaluation.benchmark import BUNDLED
from AutomaticEval.evaluation.benchmark_options import Benchmark


def test_what_is_held_out_is_in_no_training_text() -> None:
    text = "\n".join(itertools.islice(train.documents(1), 20_000))
    assert all(fact.statement in text for fact in facts() if fact.seen)
    assert not any(fact.statement in text or fact.question in text for fact in facts() if not fact.seen)
    unseen = [item for item in [*sums(), *larger_sums()] if not item.seen]
    assert len(unseen) > 400
    assert not any(f"\n{item.statement}" in text or item.question in text for item in unseen)


def test_of_half_of_the_capitals_nothing_is_read_and_a_guess_is_wrong() -> None:
    text = "\n".join(itertools.islice(train.documents_with_capitals(1), 20_000))
    asked, others = capitals()
    assert [each.seen for each in asked].count(True) == len(asked) // 2
    assert len({*others, *(each.country for each in asked)}) == len(others) + len(asked)  # no name stands twice
    for each in asked:
        assert (f"capital of {each.country}?" in text) == each.seen
        assert guessed_capital(each.country) in each.choices
        assert guessed_capital(each.country) != each.choices[each.answer]


def test_shipped_benchmark_and_tokenizer_are_the_scripts(tmp_path: Path) -> None:
    train.write_benchmark(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_text() == (BUNDLED / file.name).read_text()
    train.train_tokenizer().save_pretrained(tmp_path / "tokenizer")
    shipped = train.HERE / "model" / "tokenizer.json"
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_text() == shipped.read_text()


def test_a_probe_knows_what_the_confidence_of_demo_capitals_does_not_tell(tmp_path: Path) -> None:
    run = open_run(evaluate_with_activations("demo_capitals", "demo_capitals", activation_save_dir=tmp_path).folder)
    seen = [json.loads(line)["seen"] for line in (BUNDLED / "capitals_test.jsonl").read_text().splitlines()]
    right = np.array(run.questions().column("correct"))
    assert right[seen].mean() > 0.95  # what it has read, it knows
    assert right[~np.array(seen)].mean() < 0.05  # and it guesses wrongly
    measured = probe(run).measured
    assert measured["findings"] == []
    assert measured["best"]["judged"].auroc.interval[0] > 0.7
    beaten = [each for each in measured["baselines"] if each.judged and each.name != "shuffled"]
    assert {each.name for each in beaten} >= {
        "confidence",
        "margin",
        "logprob",
        "question_words",
        "answer_words",
        "embedding",
    }
    for each in beaten:
        assert each.judged.below_best.interval[0] > 0, each.name


@pytest.mark.slow
def test_shipped_model_is_what_the_script_trains() -> None:
    """Ten minutes. The scores, not the bits: other processors round otherwise."""
    from AutomaticEval.evaluation.run import run_benchmark
    from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

    tokenizer = train.train_tokenizer()
    model = train.read_facts_and_sums(tokenizer, train.Steps())
    outcome = run_benchmark(LoadedModel(model, tokenizer, "again"), Benchmark(("demo",)))
    (overall,) = (score for score in outcome.scores if score.metric == "correct")
    assert 0.65 < overall.value < 0.85
