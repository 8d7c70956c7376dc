"""The demo world: what the model has read and what not, and that the shipped benchmark is the script's."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from AutomaticEval.demo import train
from AutomaticEval.demo.world import facts, larger_sums, sums
from AutomaticEval.evaluation.benchmark import BUNDLED
from AutomaticEval.evaluation.benchmark_options import Benchmark


def test_what_is_held_out_is_in_no_training_text() -> None:
    text = "\n".join(itertools.islice(train.documents(1), 20_000))
    assert all(fact.statement in text for fact in facts() if fact.seen)
    assert not any(fact.statement in text or fact.question in text for fact in facts() if not fact.seen)
    unseen = [item for item in [*sums(), *larger_sums()] if not item.seen]
    assert len(unseen) > 400
    assert not any(f"\n{item.statement}" in text or item.question in text for item in unseen)


def test_shipped_benchmark_and_tokenizer_are_the_scripts(tmp_path: Path) -> None:
    train.write_benchmark(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_text() == (BUNDLED / file.name).read_text()
    train.train_tokenizer().save_pretrained(tmp_path / "tokenizer")
    shipped = train.HERE / "model" / "tokenizer.json"
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_text() == shipped.read_text()


@pytest.mark.slow
def test_shipped_model_is_what_the_script_trains() -> None:
    """Ten minutes. The scores, not the bits: other processors round otherwise."""
    from AutomaticEval.evaluation.run import run_benchmark
    from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

    tokenizer = train.train_tokenizer()
    model = train.train_model(tokenizer, steps=3200, batch=24)
    outcome = run_benchmark(LoadedModel(model, tokenizer, "again"), Benchmark(("demo",)))
    (overall,) = (score for score in outcome.scores if score.metric == "correct")
    assert 0.65 < overall.value < 0.85
