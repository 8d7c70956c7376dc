"""Infinite numbers and NaN: stored as they were computed, counted in every file, said once at the end, and refused with strict."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers.forked import forked
from helpers.models import build
from helpers.places import ROOT
from helpers.samples import SETTINGS, make_sample
from transformers import GPT2Config

from AutomaticEval import evaluate_with_activations, generate_inference_with_activations, open_run
from AutomaticEval.errors import NotFinite
from AutomaticEval.samples import Part, Sample
from AutomaticEval.store.bits import bits, from_bits
from AutomaticEval.store.finite import n_non_finite
from AutomaticEval.store.run_folder import shard_names
from AutomaticEval.store.upkeep.convert import convert
from AutomaticEval.store.upkeep.merge import merge
from AutomaticEval.store.writer import RunWriter

INF, NAN = math.inf, math.nan


def sample_with(number: int, wrong: dict[tuple[str, int, int], float], logprob: float | None = -1.0) -> Sample:
    """wrong: (site, row, column) -> value."""
    made = make_sample(seed=number, task="t", doc_id=number, logprob=logprob)
    for (key, row, column), value in wrong.items():
        made.parts[0].rows.activations[key][row, column] = value
    return made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_random_bits_are_counted_as_torch_counts_them(dtype: torch.dtype) -> None:
    size = torch.empty((), dtype=dtype).element_size()
    raw = np.random.default_rng(0).integers(0, 256, 700_001 * size, dtype=np.uint8).view(f"<u{size}")  # several steps
    expected = int((~from_bits(raw, dtype).isfinite()).sum())
    assert n_non_finite(raw, dtype) == expected > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_largest_numbers_and_the_smallest_are_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    values = torch.tensor([limits.max, limits.min, limits.tiny, limits.smallest_normal, 0.0, -0.0], dtype=dtype)
    assert n_non_finite(bits(values), dtype) == 0
    for value in (INF, -INF, NAN):
        assert n_non_finite(bits(torch.tensor([1.0, value, 2.0], dtype=dtype)), dtype) == 1
    assert n_non_finite(bits(values[:0]), dtype) == 0


def write(folder: Path, samples: list[Sample], **options: Any) -> None:
    with RunWriter(folder, "m", SETTINGS, shard_bytes=1, **options) as made:
        for sample in samples:
            made.add([sample])
        made.finish()


SAMPLES = {
    "sound": {},
    "one": {("layer_0", 2, 3): NAN},
    "also sound": {},
    "many": {("layer_0", 0, 0): INF, ("layer_0", 0, 1): -INF, ("embeddings", 5, 7): NAN},
}


def made() -> list[Sample]:
    return [sample_with(number, wrong) for number, wrong in enumerate(SAMPLES.values())]


def test_a_run_counts_them_says_it_once_and_names_the_samples(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="infinite or NaN") as told:
        write(tmp_path / "run", made())
    assert len(told) == 1
    assert re.search(r"4 of the stored numbers .*\(embeddings: 1, layer_0: 3\)", str(told[0].message))
    run = open_run(tmp_path / "run")
    assert run.non_finite == {"embeddings": 1, "layer_0": 3, "logprob": 0}
    with h5py.File(tmp_path / "run" / "run.h5") as file:  # as another program reads it
        assert file["activations/layer_0"].attrs["non_finite"] == 3
        assert file["samples/logprob"].attrs["non_finite"] == 0
    assert run.finite().tolist() == [True, False, True, False]
    alone = [all(torch.isfinite(rows).all() for rows in sample["activations"].values()) for sample in run]
    assert alone == run.finite().tolist()
    backwards = run.where([False, True, True, True])
    assert backwards.where(backwards.finite()).column("doc_id") == [2]


def test_a_sound_run_says_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    write(tmp_path, [sample_with(number, {}) for number in range(3)])
    assert open_run(tmp_path).finite().all()
    assert not [each for each in recwarn if "NaN" in str(each.message)]


def test_rows_that_samples_share_count_once_and_mark_each(tmp_path: Path) -> None:
    first = sample_with(0, {("layer_0", 1, 0): NAN})
    second = replace(first, fields={**first.fields, "doc_id": 1})
    later = Sample(
        {**first.fields, "doc_id": 2}, first.input_ids, first.generated_ids, [Part(first.parts[0].rows, [3, 4])]
    )
    with RunWriter(tmp_path, "m", SETTINGS) as writer:
        writer.add([first, second, later])
        with pytest.warns(UserWarning, match="1 of the stored"):
            writer.finish()
    run = open_run(tmp_path)
    assert run.non_finite["layer_0"] == 1
    assert run.finite().tolist() == [False, False, True]


def test_a_logprob_that_is_nan_is_not_one_that_is_absent(tmp_path: Path) -> None:
    samples = [sample_with(number, {}, logprob) for number, logprob in enumerate((-1.5, None, NAN, -INF))]
    with pytest.warns(UserWarning, match=r"2 of the stored numbers .*logprob: 2"):
        write(tmp_path, samples)
    run = open_run(tmp_path)
    one, none, nan, infinite = run.column("logprob")
    assert (one, none, infinite) == (-1.5, None, -INF)
    assert math.isnan(nan)
    assert [sample["logprob"] is None for sample in run] == [False, True, False, False]
    assert run.finite().tolist() == [True, True, False, False]


def test_strict_stops_with_everything_stored_and_the_run_goes_on_without(tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match=r"shard-00001.h5: 1 of the stored numbers .*layer_0: 1"):
        write(tmp_path, made(), strict=True)
    there = open_run(tmp_path)
    assert there.column("doc_id")[:2] == [0, 1]
    assert not there.finished
    assert there.finite().tolist()[:2] == [True, False]
    with pytest.raises(NotFinite), RunWriter(tmp_path, "m", SETTINGS, strict=True, resume=True):
        pass
    with RunWriter(tmp_path, "m", SETTINGS, resume=True) as writer:
        writer.add(made()[len(there) :])
        with pytest.warns(UserWarning, match="4 of the stored"):
            writer.finish()
    assert open_run(tmp_path).finite().tolist() == [True, False, True, False]


def test_files_of_older_versions_do_not_say_it_and_are_looked_through(tmp_path: Path) -> None:
    for version in ("1.0", "1.1"):
        old = ROOT / "tests" / "data" / f"format-{version}"
        for path in (old / "one_bfloat16.h5", old / "run"):
            run = open_run(path)
            assert run.non_finite == {}
            alone = [all(rows.isfinite().all() for rows in sample["activations"].values()) for sample in run]
            assert run.finite().tolist() == alone


def test_copies_count_anew(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="infinite or NaN"):
        write(tmp_path / "run", made())
    copy = merge([tmp_path / "run"], tmp_path / "copy.h5")
    assert open_run(copy).non_finite == open_run(tmp_path / "run").non_finite
    assert open_run(copy).finite().tolist() == [True, False, True, False]
    narrow = convert(tmp_path / "run", tmp_path / "narrow.h5", dtype="float16")
    assert open_run(narrow).non_finite == {"embeddings": 1, "layer_0": 3, "logprob": 0}


@pytest.fixture
def overflowing(tokenizer: Any) -> Any:
    """A model whose embedding of "capital", and of "+", holds an infinite number."""
    model = build(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=256))
    with torch.no_grad():
        for text in (" capital", "+"):
            model.transformer.wte.weight[tokenizer(text)["input_ids"][-1], 5] = INF
    return model


def test_one_prompt_warns_and_strict_keeps_the_file(overflowing: Any, tokenizer: Any, tmp_path: Path) -> None:
    how = {"tokenizer": tokenizer, "max_new_tokens": 2, "sites": "resid_post"}
    with pytest.warns(UserWarning, match=r"one\.h5: \d+ of the stored numbers .*layer_1"):
        _, kept = generate_inference_with_activations("The capital of", overflowing, tmp_path / "one.h5", **how)
    assert not kept["activations"]["layer_1"].isfinite().all()
    with pytest.raises(NotFinite, match=r"two\.h5"):
        generate_inference_with_activations("The capital of", overflowing, tmp_path / "two.h5", strict=True, **how)
    assert open_run(tmp_path / "two.h5").finite().tolist() == [False]


def test_a_benchmark_says_it_at_its_end_and_strict_stops_it(
    overflowing: Any, tokenizer: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    how = {"tokenizer": tokenizer, "activation_save_dir": tmp_path, "limit": 2, "positions": "all", "scoring": "stock"}
    done = evaluate_with_activations(overflowing, "demo_arithmetic", **how)
    told = [str(each.message) for each in recwarn if "infinite or NaN" in str(each.message)]
    assert len(told) == 1
    assert str(done.folder) in told[0]
    assert not open_run(done.folder).finite().any()
    with pytest.raises(NotFinite):
        evaluate_with_activations(overflowing, "demo_arithmetic", strict=True, **how)


def test_the_command_line_has_strict(tmp_path: Path) -> None:
    done = forked("--strict", "--limit", "1", cwd=tmp_path)
    assert done.returncode != 0
    assert "--strict was given, but nothing is captured" in done.stderr
    assert shard_names(tmp_path) == []
