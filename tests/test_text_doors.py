"""Every function and command that takes texts takes them as they lie about, and gives what a list of the same texts gives."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.commands import within as command

from AutomaticEval import ActivationExtractor, FromHuggingFace, open_run, score_continuations
from AutomaticEval.analysis.words.pairs import Pair, read_pairs
from AutomaticEval.analysis.words.profiles import load_profile
from AutomaticEval.errors import PromptError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

TEXTS = ["What is red?", "The bus is late,\nand so are we.", 'He said "no".', "A"]
FRAME = pd.DataFrame({"id": range(4), "review": TEXTS, "score": [0.5] * 4})


def lazily(texts: list[Any]) -> Iterator[Any]:
    yield from texts


def test_features_of_texts_in_every_form(demo: LoadedModel, tmp_path: Path) -> None:
    def features(given: Any, **how: Any) -> torch.Tensor:
        return FromHuggingFace(demo, 1, given, inference_batch_size=2, **how).extract_features()[:]

    expected = features(TEXTS)
    FRAME.to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    FRAME.to_parquet(tmp_path / "a.parquet")
    FRAME.to_csv(tmp_path / "a.csv.gz", index=False)
    objects = FRAME.to_dict("records")
    for given in (tmp_path / "a.tsv", str(tmp_path / "a.parquet"), tmp_path / "a.csv.gz", FRAME, objects):
        assert torch.equal(features(given, text_field="review"), expected), type(given)
    for given in (FRAME["review"], lazily(TEXTS), tuple(TEXTS)):
        assert torch.equal(features(given), expected), type(given)
    kept = features(lazily(objects), text_field="review", save_features=tmp_path / "kept")
    assert torch.equal(kept, expected)
    assert open_run(tmp_path / "kept").column("prompt") == TEXTS
    with pytest.raises(PromptError, match=r"none of the fields text, .* Found id, review, score\. .* text_field"):
        features(FRAME)
    with pytest.raises(
        PromptError,
        match=r"a\.tsv, line 2: none of the fields .* Found id, review, score\. .* name it with text_field \(extract --text_field",
    ):
        features(tmp_path / "a.tsv")


def test_strength_and_scores_of_a_table(demo: LoadedModel, tmp_path: Path) -> None:
    FRAME.rename(columns={"review": "text"}).to_csv(tmp_path / "a.tsv", sep="\t", index=False)

    def strength(given: Any) -> dict[tuple[int, int], float]:
        with ActivationExtractor(demo) as extractor:
            extractor.extract_activations(given)
            return extractor.compute_R_h()

    expected = strength(TEXTS)
    table = FRAME.rename(columns={"review": "text"})
    for given in (table, table["text"], lazily(TEXTS), table.to_dict("records"), tmp_path / "a.tsv"):
        assert strength(given) == expected, type(given)
    with pytest.raises(PromptError, match="Found id, review, score"):
        strength(FRAME)
    pairs = [("What is red?", " The bus"), ("What is", " late")]
    asked = pd.DataFrame(pairs, columns=["context", "continuation"]).assign(id=0)
    scores = [each.logprob for each in score_continuations(pairs, demo)]
    for given in (asked, asked.to_dict("records"), lazily(pairs)):
        assert [each.logprob for each in score_continuations(given, demo)] == scores, type(given)
    with pytest.raises(PromptError, match="request 0 has not the fields context and continuation; it has context, id"):
        score_continuations(asked[["context", "id"]], demo)
    with pytest.raises(PromptError, match=r"request 1 is no pair \(context, continuation\): 'What'"):
        score_continuations([pairs[0], "What"], demo)


def test_pairs_and_profiles_from_a_table(tmp_path: Path) -> None:
    pair = Pair("a\tb", 'c "d"', " e", " f")
    pd.DataFrame([vars(pair)]).to_csv(tmp_path / "pairs.tsv", sep="\t", index=False)
    pd.DataFrame([vars(pair)]).to_parquet(tmp_path / "pairs.parquet")
    assert read_pairs(tmp_path / "pairs.tsv") == read_pairs(tmp_path / "pairs.parquet") == [pair]
    pd.DataFrame({"category": ["plain", "joy"], "text": ["one", "two"]}).to_csv(tmp_path / "prompts.csv.gz")
    (tmp_path / "own.toml").write_text('prompts = "prompts.csv.gz"\nneutral = "plain"\n')
    assert load_profile(tmp_path / "own.toml").prompts == {"plain": ["one"], "joy": ["two"]}


def test_commands_read_a_tsv_and_gzip_and_refuse_a_broken_one(tmp_path: Path) -> None:
    FRAME.to_csv(tmp_path / "reviews.tsv", sep="\t", index=False)
    asked = ["--model", "demo", "--layers", "0", "--text_field", "review"]
    done = command("extract", "--texts", "reviews.tsv", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "activations").glob("reviews_demo_*")
    assert open_run(folder).column("prompt") == TEXTS
    packed = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    (tmp_path / "reviews.jsonl.gz").write_bytes(packed)
    done = command("heads", "strength", "--texts", "reviews.jsonl.gz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "reviews.jsonl.gz").write_bytes(packed[:-8])
    done = command("heads", "strength", "--texts", "reviews.jsonl.gz", "-o", "other", cwd=tmp_path)
    assert done.returncode == 2
    assert "reviews.jsonl.gz is no whole gzip file" in done.stderr
    assert "Traceback" not in done.stderr
