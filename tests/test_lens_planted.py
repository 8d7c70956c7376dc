"""The lens and geometry on rows whose truth is planted: a direction at a known layer, a known rotation, runs of two widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import within
from helpers.models import ALL, CONFIGS, build
from helpers.probed import run_of
from helpers.samples import SETTINGS

from AutomaticEval import geometry, logit_lens, open_run, train_tuned_lens
from AutomaticEval.analysis.lens.logit_lens import LogitLens
from AutomaticEval.analysis.lens.train import Training
from AutomaticEval.errors import SiteUnavailable
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.store.writer import RunWriter

TARGETS = ("otter", "Paris", "the fox", "is it")
N = 40


@pytest.fixture(scope="module")
def loaded(tokenizer: Any) -> LoadedModel:
    return LoadedModel(build(CONFIGS["llama"]()), tokenizer, "llama")


def planted(folder: Path, loaded: LoadedModel) -> tuple[Any, list[int]]:
    """A run whose rows turn to the right answer's first token at layer_1, and that token of each question."""
    draw, unembedding = np.random.default_rng(0), loaded.model.lm_head.weight.detach().numpy()
    directions = unembedding / np.linalg.norm(unembedding, axis=1, keepdims=True)
    encode = loaded.tokenizer
    gold = []
    with RunWriter(folder, "llama", SETTINGS | {"positions": "prompt[-1:]"}) as made:
        for number in range(N):
            prompt, target = f"What is {number}?", TARGETS[number % len(TARGETS)]
            ids = encode(prompt, add_special_tokens=False)["input_ids"]
            whole = encode(f"{prompt} {target}", add_special_tokens=False)["input_ids"]
            assert whole[: len(ids)] == ids
            gold.append(whole[len(ids)])
            rows = {key: torch.tensor(draw.normal(size=(1, 32)), dtype=torch.float32) for key in KEYS}
            for key in KEYS[1:]:
                rows[key] += torch.tensor(40 * directions[gold[-1]], dtype=torch.float32)
            part = Part(Rows(ids[-1:], ["t"], range(len(ids) - 1, len(ids)), rows), range(1))
            about = {"prompt": prompt, "response": "That.", "task": "t", "doc_id": number, "choice": 0, "repeat": 0}
            made.add([Sample({**about, "target": target, "correct": True}, ids, [7], [part])])
        made.finish()
    return open_run(folder), gold


KEYS = ("layer_0", "layer_1", "layer_2")


def test_a_planted_answer_shows_first_where_it_was_planted_with_the_ranks_of_plain_algebra(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    run, gold = planted(tmp_path / "run", loaded)
    result = logit_lens(run, model=loaded)
    assert result.measured["without_gold"] == {}
    ranks = np.array(result.questions["gold_rank"]).reshape(N, len(KEYS))
    norm, head = (each.weight.detach().double().numpy() for each in (loaded.model.model.norm, loaded.model.lm_head))
    eps = loaded.model.config.rms_norm_eps
    for place, key in enumerate(KEYS):
        rows = np.stack([sample["activations"][key][-1].double().numpy() for sample in run])
        logits = (rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + eps) * norm) @ head.T
        own = logits[np.arange(N), gold]
        np.testing.assert_array_equal(ranks[:, place], (logits > own[:, None]).sum(axis=1) + 1)
        logprobs = own - np.logaddexp.reduce(logits, axis=1)
        np.testing.assert_allclose(result.questions["gold_logprob"][place :: len(KEYS)], logprobs, atol=1e-4)
        assert result.measured["places"][place].median_rank == np.median(ranks[:, place])
    first = [each.gold_first.mean for each in result.measured["places"]]
    assert first[0] < 0.1
    assert min(first[1:]) > 0.95
    strings = loaded.tokenizer.convert_ids_to_tokens(gold)
    assert [each.lstrip(" Ġ") for each in result.questions["gold_token"][:: len(KEYS)]] == [
        each.lstrip("Ġ") for each in strings
    ]


def test_a_tuned_lens_undoes_a_rotation(loaded: LoadedModel, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rotation = np.linalg.qr(draw.normal(size=(32, 32)))[0]
    stream = draw.normal(size=(400, 32))
    run = run_of(tmp_path / "run", {"layer_0": stream @ rotation, "layer_2": stream}, [{"correct": True}] * 400)
    training = Training(n_steps=500, learning_rate=0.02)
    lens, result = train_tuned_lens(run, ["layer_0"], model=loaded, training=training)
    (place,) = result.measured["places"]
    assert place.tuned.mean < 0.02 * place.plain.mean
    product = lens.weights["layer_0"].double().numpy() @ rotation.T  # the stream again, up to its length
    scale = np.trace(product) / 32
    assert np.abs(product / scale - np.eye(32)).max() < 0.1


def test_a_model_without_a_final_norm_is_refused(tokenizer: Any) -> None:
    with pytest.raises(SiteUnavailable, match="final_norm"):
        LogitLens(LoadedModel(build(ALL["gpt-1"]()), tokenizer, "gpt-1"))


def test_runs_of_two_widths_have_cka_and_no_cosine(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(50, 8))
    wider = np.linalg.qr(draw.normal(size=(12, 8)))[0].T  # [8, 12], keeps lengths and angles
    for name, of in (("narrow", {"layer_0": rows}), ("wide", {"layer_0": rows @ wider, "layer_1": rows[::-1] @ wider})):
        run_of(tmp_path / name, of, [{"correct": True}] * 50)
    found = geometry(open_run(tmp_path / "narrow"), open_run(tmp_path / "wide")).measured["between_runs"]
    assert found["cosine"] is None
    assert "different widths" in found["no_cosine"]
    same, shuffled = found["cka"][0]
    assert same == pytest.approx(1, abs=1e-5)
    assert abs(shuffled) < 0.2
    done = within("geometry", "narrow", "wide", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No cosine:   the places have different widths" in done.stdout
    assert (tmp_path / "out" / "geometry_two_runs.png").exists()
