"""The log-probability of each token of a generated answer is that of a plain forward of transformers, however it was generated and kept."""

from __future__ import annotations

import json
import warnings
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers.models import CONFIGS, build
from helpers.places import ROOT, STORIES, needs_real
from helpers.samples import SETTINGS, make_sample, with_right_checksums
from helpers.tape import Tape
from lm_eval.models.huggingface import HFLM
from typer.testing import CliRunner

from AutomaticEval import (
    evaluate_with_activations,
    generate_inference_with_activations,
    load_activations,
    open_run,
    recompute,
)
from AutomaticEval.analysis.probes.baselines import baselines
from AutomaticEval.capture.answers.token_logprobs import TokenLogprobs, token_logprobs
from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.capture.tree import shared_prompt as prefill
from AutomaticEval.cli.app import app
from AutomaticEval.errors import CaptureError, DamagedFile, FileRefused, StoreError, UnreadableFile
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.loading import load_model
from AutomaticEval.pages.question_rows import question_rows
from AutomaticEval.pages.run_page import run_page
from AutomaticEval.selection import Selection
from AutomaticEval.store import writer
from AutomaticEval.store.export.formats import export
from AutomaticEval.store.hdf5.write import write_shard
from AutomaticEval.store.run import Run
from AutomaticEval.store.upkeep.convert import convert
from AutomaticEval.store.upkeep.merge import merge
from AutomaticEval.store.upkeep.prune import prune
from AutomaticEval.store.upkeep.rebuild import rebuild_index
from AutomaticEval.store.upkeep.verify import verify

PROMPTS = [[5, 17, 99, 3, 250, 41, 7], [12, 13], [300, 8, 8, 120, 77], [64], [64]]
LAST = Selection.parse("resid_post", -1, "scored")
SAMPLED = Sampling(max_new_tokens=9, temperature=0.7, top_p=0.8, top_k=50, seed=3)
WAYS = {"greedy": Sampling(max_new_tokens=9), "sampled": SAMPLED, "torch's own draws": replace(SAMPLED, seed=None)}


def by_itself(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """[n_answer]: what one forward of transformers over prompt and answer, without padding or cache, says of the answer's tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
    likely = torch.log_softmax(logits.float(), -1)[len(prompt) - 1 : -1]
    return likely.gather(1, torch.tensor(list(answer))[:, None])[:, 0]


def assert_true(model: Any, data: dict[str, Any]) -> None:
    """data: an answer, as a dict."""
    kept, ids = data["token_logprobs"], data["generated_ids"]
    assert kept.dtype == torch.float32
    assert kept.shape == ids.shape
    torch.testing.assert_close(
        kept, by_itself(model, data["input_ids"][0].tolist(), ids.tolist()), atol=2e-5, rtol=1e-5
    )


def data_of(responses: Any) -> list[dict[str, Any]]:
    return [each.sample.activation_data("m", {}) for each in responses]


@pytest.fixture
def llama(tokenizer: Any) -> LoadedModel:
    return LoadedModel(build(CONFIGS["llama"]()), tokenizer, "llama")


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("penalty", [1.0, 1.8])
def test_each_token_is_that_of_a_plain_forward(tiny: LoadedModel, way: str, penalty: float, monkeypatch: Any) -> None:
    """In a padded batch, in which one prompt is asked twice; with penalties, the numbers are the model's own all the same."""
    monkeypatch.setattr(tiny.model.generation_config, "repetition_penalty", penalty)
    found = data_of(respond(tiny, PROMPTS, WAYS[way], LAST))
    for data in found:
        assert_true(tiny.model, data)
    if way == "sampled":
        assert found[3]["generated_ids"].tolist() != found[4]["generated_ids"].tolist()


def test_answers_that_end_early_have_a_number_for_each_of_their_own_tokens(llama: LoadedModel) -> None:
    free = data_of(respond(llama, PROMPTS, Sampling(max_new_tokens=12), LAST))
    llama.model.generation_config.eos_token_id = [int(free[0]["generated_ids"][3]), int(free[2]["generated_ids"][6])]
    stopped = data_of(respond(llama, PROMPTS, Sampling(max_new_tokens=12), LAST))
    assert len({len(each["generated_ids"]) for each in stopped}) > 1
    for data in stopped:
        assert_true(llama.model, data)


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=9), SAMPLED])
def test_steps_from_a_graph_have_them_too(tapes: None, llama: LoadedModel, sampling: Sampling) -> None:
    found = data_of(respond(llama, PROMPTS, replace(sampling, generation="graph"), LAST))
    assert Tape.n_replayed > 0
    for data in found:
        assert_true(llama.model, data)


def test_bfloat16_is_taken_to_float32_first(tokenizer: Any) -> None:
    loaded = LoadedModel(build(CONFIGS["llama"](), torch.bfloat16), tokenizer, "llama")
    (data,) = data_of(
        respond(loaded, PROMPTS[:1], Sampling(max_new_tokens=3), Selection.parse("logits", None, "scored"))
    )
    likely = torch.log_softmax(data["activations"]["logits"].float(), -1)
    expected = likely.gather(1, data["generated_ids"][:, None])[:, 0]
    assert torch.equal(data["token_logprobs"], expected)


@needs_real
def test_of_a_trained_model() -> None:
    loaded = load_model(STORIES)
    prompts = [loaded.tokenizer(text)["input_ids"] for text in ("Once upon a time", "Lily saw a dog. She")]
    for sampling in (Sampling(max_new_tokens=60), replace(SAMPLED, max_new_tokens=60)):
        for data in data_of(respond(loaded, prompts, sampling, LAST)):
            assert_true(loaded.model, data)


@pytest.mark.parametrize(
    "how", [{"num_beams": 2}, {"num_beams": 2, "do_sample": True}, {"prompt_lookup_num_tokens": 3}]
)
def test_other_ways_of_decoding_have_no_numbers_rather_than_wrong_ones(llama: LoadedModel, how: dict[str, Any]) -> None:
    ids = torch.tensor([[5, 17, 99, 5, 17, 99, 5, 17]])
    with warnings.catch_warnings(), token_logprobs(llama.model) as found:
        warnings.simplefilter("ignore")
        out = llama.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, pad_token_id=0, **how)
    assert found.of(out, ids.shape[1]) is None
    assert "_get_logits_processor" not in llama.model.__dict__


def test_steps_after_the_end_that_are_taken_back_are_left_out() -> None:
    """As on a GPU, where transformers asks only now and then whether all answers have ended."""
    found, steps = TokenLogprobs(), torch.randn(5, 2, 7)
    ids = torch.randint(0, 7, (2, 8))
    for number, logits in enumerate(steps):
        assert found(ids[:, : 3 + number], logits) is logits
    for n_new in (5, 4, 2):
        expected = torch.log_softmax(steps[:n_new], -1).gather(2, ids[:, 3 : 3 + n_new].T[:, :, None])[:, :, 0].T
        assert torch.equal(found.of(ids[:, : 3 + n_new], 3), expected)
    assert found.of(torch.cat([ids, ids[:, :1]], 1), 3) is None
    assert found.of((ids + 1) % 7, 3) is None


def test_the_text_is_what_it_was(llama: LoadedModel) -> None:
    for sampling in WAYS.values():
        seeded = replace(sampling, seed=1)
        plain = respond(llama, PROMPTS, seeded)
        assert [each.generated_ids for each in respond(llama, PROMPTS, seeded, LAST)] == [
            each.generated_ids for each in plain
        ]


# Benchmarks


def stopping_after(n: int) -> Any:
    """lm-eval's generation of a batch, which is killed when n batches were generated."""
    real, made = HFLM._model_generate, []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(made) >= n:
            raise KeyboardInterrupt
        made.append(1)
        return real(self, *args, **kwargs)

    return counted


@pytest.mark.parametrize("scoring", ["tree", "stock"])
def test_a_benchmark_that_is_killed_and_goes_on_keeps_them(
    scoring: str, llama: LoadedModel, own_tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy answers, several sampled ones a question, answers that end at `until`, and choices beside them, which have none."""
    monkeypatch.setattr(prefill, "CHUNK", 8)  # so that answers go on from a shared prefill
    monkeypatch.setattr(writer, "SHARD_BYTES", 1)
    how: dict[str, Any] = {"include_path": own_tasks, "batch_size": 2, "scoring": scoring, "limit": 2, "sites": "embed"}
    names = "greedy,often,twice"
    with monkeypatch.context() as patched:
        patched.setattr(HFLM, "_model_generate", stopping_after(2))
        with pytest.raises(KeyboardInterrupt):
            evaluate_with_activations(llama, names, activation_save_dir=tmp_path / "cut", **how)
    (folder,) = (tmp_path / "cut").iterdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = [each for each in open_run(folder) if each.get("token_logprobs") is not None]
    assert before
    evaluate_with_activations(llama, names, resume=folder, **how)
    run = open_run(folder)
    assert len(run.where(task="often")) == 6
    for data in run:
        if data["task"] == "twice":
            assert data["token_logprobs"] is None
        else:
            assert data["logprob"] is None
            assert_true(llama.model, data)
    assert not recompute(run, llama, 99).different
    assert verify(folder) == []
    kept = by_question(run)
    (folder / "run.h5").unlink()
    rebuild_index(folder)
    assert by_question(open_run(folder)) == kept


def by_question(run: Run) -> dict[Any, Any]:
    return {
        tuple(each[name] for name in ("task", "doc_id", "choice", "repeat")): each["token_logprobs"]
        for each in run.records()
    }


# Files


NUMBERS = [[-0.5, -1.25, -2.0], None, [-0.75]]
OF_TODAY = ROOT / "tests" / "data" / "format-1.5" / "run"
"""Three samples, the second of a choice that was scored."""


def numbers_of(path: Path) -> list[list[float] | None]:
    run = open_run(path)
    assert [None if each is None else list(each) for each in run.column("token_logprobs")] == [
        None if each["token_logprobs"] is None else each["token_logprobs"].tolist() for each in run
    ]
    return [None if each is None else list(each) for each in run.column("token_logprobs")]


def test_a_file_of_the_formats_first_day_and_its_copies(tmp_path: Path) -> None:
    assert numbers_of(OF_TODAY) == NUMBERS
    assert verify(OF_TODAY) == []
    merge([OF_TODAY], tmp_path / "merged.h5")
    prune(OF_TODAY, tmp_path / "pruned.h5", positions="last")
    convert(OF_TODAY, tmp_path / "narrow.h5", dtype="bfloat16")
    for name in ("merged", "pruned", "narrow"):
        assert numbers_of(tmp_path / f"{name}.h5") == NUMBERS
    for to in ("safetensors", "npz"):
        folder = export(OF_TODAY, tmp_path / to, to=to)
        lines = (folder / "samples.jsonl").read_text().splitlines()
        assert [json.loads(each)["token_logprobs"] for each in lines] == NUMBERS
    assert [each["token_logprobs"] for each in read_arrow(export(OF_TODAY, tmp_path / "arrow", to="arrow"))] == NUMBERS


def read_arrow(folder: Path) -> Any:
    import datasets

    return datasets.load_from_disk(str(folder))


def test_any_hdf5_tool_reads_them() -> None:
    with h5py.File(OF_TODAY / "run.h5") as file:
        assert file["token_logprobs/offset"][()].tolist() == [0, 3, 3, 4]
        assert file["token_logprobs/values"].dtype == np.float32
        assert file["token_logprobs/values"][()].tolist() == [-0.5, -1.25, -2.0, -0.75]
        assert file["generated_ids/offset"][()].tolist() == [0, 3, 5, 6]


def test_runs_with_and_without_them_are_merged(tmp_path: Path) -> None:
    for name, fields in (("old", {}), ("new", {"token_logprobs": array("f", [-1.0, -2.0, -4.0])})):
        sample = make_sample(task=name, doc_id=0, choice=0, repeat=0, **fields)
        write_shard(tmp_path / f"{name}.h5", [sample], "m", SETTINGS)
    with h5py.File(tmp_path / "old.h5") as file:
        assert "token_logprobs" not in file
    merge([tmp_path / "old.h5", tmp_path / "new.h5"], tmp_path / "both.h5")
    assert numbers_of(tmp_path / "both.h5") == [None, [-1.0, -2.0, -4.0]]


@pytest.mark.parametrize("version", ["1.1", "1.3", "1.4"])
def test_older_files_have_none(version: str) -> None:
    folder = next(path for path in sorted((ROOT / "tests" / "data" / f"format-{version}").iterdir()) if path.is_dir())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = open_run(folder)
        assert "token_logprobs" not in run[0]
        assert set(run.questions().column("mean_logprob")) == {None}
        with pytest.raises(StoreError, match="no column 'token_logprobs'"):
            run.column("token_logprobs")


def test_a_sample_with_another_number_of_them_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="token_logprobs has 2 numbers for a response of 3 tokens"):
        make_sample(token_logprobs=array("f", [-1.0, -2.0]))
    with pytest.raises(CaptureError, match="no array of float32"):
        write_shard(tmp_path / "x.h5", [make_sample(token_logprobs=[-1.0, -2.0, -3.0])], "m", SETTINGS)
    path = tmp_path / "one.h5"
    write_shard(path, [make_sample(token_logprobs=array("f", [-1.0, -2.0, -3.0]))], "m", SETTINGS)
    with h5py.File(path, "r+") as file:
        file["segments/stop"][()] = 5  # the rows of two tokens of a response
        del file["generated_ids/values"], file["generated_ids/offset"]
        file["generated_ids/values"], file["generated_ids/offset"] = np.array([1, 2], "<i4"), np.array([0, 2], "<i8")
        with_right_checksums(file, "generated_ids/values", "generated_ids/offset", "segments/stop")
    with pytest.raises(UnreadableFile, match="token_logprobs has 3 numbers for sample 0, of 2 tokens"):
        load_activations(path)


def test_a_changed_number_is_found(tmp_path: Path) -> None:
    path = tmp_path / "one.h5"
    write_shard(path, [make_sample(token_logprobs=array("f", [-1.0, -2.0, -3.0]))], "m", SETTINGS)
    with h5py.File(path) as file:
        offset = file["token_logprobs/values"].id.get_offset()
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(np.float32(-1.5).tobytes())
    with pytest.raises((DamagedFile, FileRefused), match="token_logprobs/values"):
        load_activations(path)
    (line,) = verify(path)
    assert "/token_logprobs/values is not what its checksum says" in line


def test_numbers_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    samples = [
        make_sample(seed=n, token_logprobs=array("f", [-1.0, last, -3.0])) for n, last in enumerate((-2.0, -np.inf))
    ]
    with pytest.warns(match="token_logprobs: 1"):
        write_shard(tmp_path / "x.h5", samples, "m", SETTINGS)
    assert open_run(tmp_path / "x.h5").finite().tolist() == [True, False]


def test_recompute_finds_a_wrong_one(llama: LoadedModel, tmp_path: Path) -> None:
    samples = [each.sample for each in respond(llama, PROMPTS, SAMPLED, LAST)]
    settings = {**llama.numbers().as_dict(), **LAST.as_dict(), **SAMPLED.settings()}
    write_shard(tmp_path / "true.h5", samples, "llama", settings)
    assert not recompute(tmp_path / "true.h5", llama, 99).different
    numbers = array("f", samples[2].fields["token_logprobs"])
    numbers[4] += 0.01
    samples[2] = replace(samples[2], fields={**samples[2].fields, "token_logprobs": numbers})
    write_shard(tmp_path / "false.h5", samples, "llama", settings)
    (wrong,) = recompute(tmp_path / "false.h5", llama, 99).different
    assert wrong.number == 2
    assert "DIFFERENT at token_logprobs, token 4 of the response: " in str(wrong)


# Readers


def test_questions_have_the_mean(tmp_path: Path) -> None:
    questions = open_run(OF_TODAY).questions()
    assert questions.column("mean_logprob") == [-1.25, None, -0.75]
    assert questions.column("logprobs") == [[], [-3.5], []]
    assert list(questions[0].token_logprobs or ()) == NUMBERS[0]
    assert questions.table()["mean_logprob"].tolist()[0] == -1.25
    assert "-1.2500 nats" in questions[0]._repr_html_()
    found = {each.name: each for each in baselines(questions, "correct")}["mean_logprob"]
    assert found.rows is not None
    assert found.rows(None).tolist() == [[-1.25, 1], [-1.0, 0], [-0.75, 1]]
    without = {each.name: each for each in baselines(questions.take([1]), "correct")}["mean_logprob"]
    assert without.rows is None
    assert without.reason is not None


def test_the_page_has_a_column_for_them() -> None:
    rows = question_rows(open_run(OF_TODAY).questions(), None)["rows"]
    assert [each["tokenProbability"] for each in rows] == [0.2865, None, 0.4724]  # exp of the means
    assert "Probability a token" in run_page(open_run(OF_TODAY))
    assert "Probability a token" not in run_page(open_run(OF_TODAY).where(task="scored"))


def test_show_tells_the_mean() -> None:
    for how in (("--sample", "0"), ("--task", "written", "--doc", "0")):
        done = CliRunner().invoke(app, ["show", str(OF_TODAY), *how])
        assert done.exit_code == 0, done.output
        assert "3 tokens: -1.2500 nats" in " ".join(done.output.split())
        assert "array(" not in done.output
        assert "tensor(" not in done.output


def test_one_prompts_file_has_them(demo: LoadedModel, tmp_path: Path) -> None:
    _, data = generate_inference_with_activations("What is red?", demo, tmp_path / "x.h5", max_new_tokens=5)
    assert_true(demo.model, data)
    assert torch.equal(load_activations(tmp_path / "x.h5")["token_logprobs"], data["token_logprobs"])
