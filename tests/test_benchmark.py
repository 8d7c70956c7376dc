"""Benchmark runs: lm-eval's own scores, every request captured once and keyed, proven by recomputing the scores."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import CONFIGS, build
from helpers.places import ROOT, STORIES, needs_real
from helpers.plain_lm_eval import SCORED, as_json, recompute
from helpers.raw_hooks import raw_residuals
from helpers.tasks import DATA, DUPLICATES, REPEATS
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from AutomaticEval import open_run
from AutomaticEval.errors import (
    BenchmarkError,
    BenchmarkUnavailable,
    CaptureError,
    DiskFull,
    SelectionError,
    UnknownBenchmark,
)
from AutomaticEval.evaluation import benchmark as benchmark_module
from AutomaticEval.evaluation import run as run_module
from AutomaticEval.evaluation.benchmark import BUNDLED, load_tasks
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.forecast import forecast
from AutomaticEval.evaluation.harness.call import Call
from AutomaticEval.evaluation.results import captured_run as folder_module
from AutomaticEval.evaluation.results import join as join_module
from AutomaticEval.evaluation.results.join import join
from AutomaticEval.evaluation.run import Outcome, run_benchmark
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.loading import load_model
from AutomaticEval.selection import Selection

stock = partial(Benchmark, scoring="stock")  # lm-eval's own batches, bit for bit; test_tree.py has the others
ALL = Selection.parse()


def plain(loaded: LoadedModel, benchmark: Benchmark, samples: dict[str, list[int]] | None = None) -> dict[str, Any]:
    """lm-eval by itself: nothing of ours but the task files."""
    lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=benchmark.batch_size)
    results = simple_evaluate(
        model=lm,
        tasks=list(benchmark.names),
        task_manager=TaskManager(include_path=[str(BUNDLED), *benchmark.include_path], include_defaults=False),
        num_fewshot=benchmark.num_fewshot,
        limit=benchmark.limit,
        samples=samples,
    )
    assert results is not None
    return dict(results)


def assert_scores_are_plain(loaded: LoadedModel, benchmark: Benchmark, outcome: Outcome, **kwargs: Any) -> None:
    expected = plain(loaded, benchmark, **kwargs)
    assert as_json(outcome.results["results"]) == as_json(expected["results"])
    assert as_json(outcome.samples) == as_json(expected["samples"])


def assert_rows_reproduce_scores(loaded: LoadedModel, folder: Path | None) -> None:
    assert folder is not None
    run = open_run(folder)
    for sample in run:
        logprobs, answer = recompute(loaded, sample), sample["generated_ids"]
        assert len(logprobs) == len(answer)
        greedy = logprobs.argmax(-1)
        if sample["logprob"] is None:
            assert torch.equal(greedy, answer), sample["doc_id"]
        else:
            total = logprobs.gather(1, answer[:, None]).sum().item()
            assert total == pytest.approx(sample["logprob"], abs=1e-4, rel=1e-5)
            assert bool(torch.equal(greedy, answer)) == sample["is_greedy"]


@pytest.mark.parametrize("batch_size", [1, 8, "auto"])
@pytest.mark.parametrize("selection", [SCORED, ALL], ids=["scored", "all"])
@pytest.mark.usefixtures("small_probes")
def test_demo_scores_equal_plain_lm_eval_and_rows_reproduce_them(
    demo: LoadedModel, tmp_path: Path, batch_size: Any, selection: Selection, same_hooks_after: Callable[[Any], None]
) -> None:
    same_hooks_after(demo.model)
    benchmark = stock(("demo",), batch_size=batch_size, limit=24)
    outcome = run_benchmark(demo, benchmark, selection, output=RunOutput(tmp_path))
    assert_scores_are_plain(demo, benchmark, outcome)
    assert_rows_reproduce_scores(demo, outcome.folder)


@pytest.mark.parametrize("num_fewshot", [0, 3])
def test_every_family_and_fewshot(tiny: LoadedModel, tmp_path: Path, num_fewshot: int) -> None:
    """The tiny models' context is 128 tokens: with examples the prompts are cut on the left."""
    benchmark = stock(("demo",), batch_size=5, limit=12, num_fewshot=num_fewshot)
    outcome = run_benchmark(tiny, benchmark, SCORED, output=RunOutput(tmp_path))
    assert_scores_are_plain(tiny, benchmark, outcome)
    assert_rows_reproduce_scores(tiny, outcome.folder)


def test_truncated_prompts_are_captured_as_they_were_fed(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    benchmark = stock(("demo_facts",), batch_size=4, limit=6, num_fewshot=6)
    outcome = run_benchmark(tiny_llama, benchmark, ALL, output=RunOutput(tmp_path))
    assert_scores_are_plain(tiny_llama, benchmark, outcome)
    run = open_run(outcome.folder or "")
    assert max(sample["n_truncated"] for sample in run) > 0
    for sample in run:
        assert len(sample["input_ids"][0]) + len(sample["generated_ids"]) - 1 <= 128
        raw = raw_residuals(tiny_llama.model, "llama", sample["token_ids"].tolist())
        for key, rows in sample["activations"].items():
            torch.testing.assert_close(rows, raw[key], atol=1e-5, rtol=1e-5)


def test_rows_of_a_whole_run_equal_raw_hooks_on_single_rows(demo: LoadedModel, tmp_path: Path) -> None:
    outcome = run_benchmark(demo, stock(("demo",), limit=10, batch_size=7), ALL, output=RunOutput(tmp_path))
    for sample in open_run(outcome.folder or ""):
        sequence = [*sample["input_ids"][0].tolist(), *sample["generated_ids"].tolist()]
        assert sample["token_ids"].tolist() == sequence[:-1]
        raw = raw_residuals(demo.model, "llama", sequence[:-1])
        for key, rows in sample["activations"].items():
            torch.testing.assert_close(rows, raw[key], atol=2e-5, rtol=2e-5)  # other batch shapes round otherwise


def test_every_request_is_there_once_with_its_own_text(demo: LoadedModel, tmp_path: Path) -> None:
    outcome = run_benchmark(demo, stock(("demo",), limit=20), SCORED, output=RunOutput(tmp_path))
    table = open_run(outcome.folder or "").table()
    assert not table.duplicated(["task", "doc_id", "choice", "repeat"]).any()
    assert table.groupby("task").size().to_dict() == {"demo_arithmetic": 20, "demo_facts": 80}
    docs = [json.loads(line) for line in (BUNDLED / "facts_test.jsonl").read_text().splitlines()]
    for row in table[table.task == "demo_facts"].itertuples():
        doc = docs[row.doc_id]
        assert doc["question"] in row.prompt
        assert row.response == f" {doc['choices'][row.choice]}"
        assert row.target == doc["answer"]
        assert row.correct == (row.prediction == doc["answer"])
        assert row.metrics == {"none": {"acc": float(row.correct)}}
    best = table[table.task == "demo_facts"].groupby("doc_id")["logprob"].idxmax()
    assert (table.loc[best, "choice"] == table.loc[best, "prediction"]).all()


def test_demo_model_is_right_where_it_has_read_and_above_chance(demo: LoadedModel) -> None:
    outcome = run_benchmark(demo, stock(("demo",), batch_size=16))
    for task in ("facts", "arithmetic"):
        docs = [json.loads(line) for line in (BUNDLED / f"{task}_test.jsonl").read_text().splitlines()]
        logged = outcome.samples[f"demo_{task}"]
        metric = "acc" if task == "facts" else "exact_match"
        right = {seen: [s[metric] for s in logged if docs[s["doc_id"]]["seen"] == seen] for seen in (True, False)}
        assert sum(right[True]) / len(right[True]) > 0.9
        assert 0 < sum(right[False]) < len(right[False])
    scores = {score.task: score for score in outcome.scores}
    assert scores["demo_facts"].value > (scores["demo_facts"].chance or 1) + 0.3
    assert scores["demo_facts"].chance == 0.25
    assert (scores["all questions"].answered, scores["all questions"].total) == (180, 180)
    assert outcome.folder is None


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_num_trials_draws_over_the_whole_benchmark(demo: LoadedModel, tmp_path: Path, seed: int | None) -> None:
    benchmark = stock(("demo",), num_trials=7, seed=seed)
    outcome = run_benchmark(demo, benchmark, SCORED, output=RunOutput(tmp_path))
    asked = {(task, entry["doc_id"]) for task, logged in outcome.samples.items() for entry in logged}
    assert len(asked) == 7
    assert sum(score.answered for score in outcome.scores if score.metric != "correct") == 7
    assert (outcome.scores[-1].answered, outcome.scores[-1].total) == (7, 180)
    table = open_run(outcome.folder or "").table()
    assert set(zip(table.task, table.doc_id, strict=True)) == asked
    again = run_benchmark(demo, benchmark)
    assert {(task, entry["doc_id"]) for task, logged in again.samples.items() for entry in logged} == asked
    docs = [json.loads(line) for line in (BUNDLED / "facts_test.jsonl").read_text().splitlines()]
    for row in table[table.task == "demo_facts"].itertuples():  # lm-eval counts within the selection
        assert docs[row.doc_id]["question"] in row.prompt


def test_draws_differ_with_the_seed_and_stop_at_the_whole(demo: LoadedModel) -> None:
    totals = {"a": 5, "b": 300}
    draws = [benchmark_module._draw(stock(("x",), num_trials=10, seed=seed), totals) for seed in range(5)]
    assert len({json.dumps(draw) for draw in draws}) == 5
    assert all(draw is not None and sum(map(len, draw.values())) == 10 for draw in draws)
    whole = benchmark_module._draw(stock(("x",), num_trials=1000), totals)
    assert whole == {"a": list(range(5)), "b": list(range(300))}


def test_tasks_without_a_drawn_question_do_not_run(demo: LoadedModel) -> None:
    """lm-eval runs a task in full when its list of samples is empty or absent."""
    outcome = run_benchmark(demo, stock(("demo",), num_trials=1))
    assert sum(len(logged) for logged in outcome.samples.values()) == 1


@pytest.fixture
def own_tasks(tmp_path: Path) -> str:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "twice.yaml").write_text(DUPLICATES)
    (folder / "often.yaml").write_text(REPEATS)
    (folder / "data.py").write_text(DATA)
    return str(folder)


def test_duplicate_documents_keep_a_sample_each_and_share_rows(
    demo: LoadedModel, tmp_path: Path, own_tasks: str
) -> None:
    benchmark = stock(("twice",), include_path=(own_tasks,))
    outcome = run_benchmark(demo, benchmark, SCORED, output=RunOutput(tmp_path / "out"))
    assert_scores_are_plain(demo, benchmark, outcome)
    assert_rows_reproduce_scores(demo, outcome.folder)
    run = open_run(outcome.folder or "")
    table = run.table()
    assert table.groupby("doc_id").size().to_dict() == {0: 8, 1: 6, 2: 8}  # acc_mutual_info scores each choice twice
    for choice in range(8):
        assert torch.equal(run[choice]["activations"]["layer_0"], run[14 + choice]["activations"]["layer_0"])
    for _, doc in table.groupby("doc_id"):
        asked = doc[doc.prompt != ""]
        assert set(doc.prediction) == {asked.loc[asked.logprob.idxmax(), "choice"]}
    import h5py

    with h5py.File((outcome.folder or Path()) / "shard-00000.h5") as shard:
        stored = len(shard["rows/token_id"])
        pointed = int((shard["segments/stop"][()] - shard["segments/start"][()]).sum())
    assert stored < pointed


def test_sampled_repeats_and_stop_strings_are_keyed_and_cut(demo: LoadedModel, tmp_path: Path, own_tasks: str) -> None:
    benchmark = stock(("often",), include_path=(own_tasks,))
    outcome = run_benchmark(demo, benchmark, ALL, output=RunOutput(tmp_path / "out"))
    assert_scores_are_plain(demo, benchmark, outcome)
    run = open_run(outcome.folder or "")
    assert run.table().groupby(["doc_id", "repeat"]).size().to_dict() == {(d, r): 1 for d in range(3) for r in range(3)}
    lengths = set()
    for sample in run:
        text = demo.tokenizer.decode(sample["generated_ids"], skip_special_tokens=True)
        before_last = demo.tokenizer.decode(sample["generated_ids"][:-1], skip_special_tokens=True)
        assert not any(stop in before_last for stop in ("\n", "a"))
        assert sample["response"] == text.split("\n")[0].split("a")[0]
        assert set(sample["metrics"]) == {"first", "upper"}
        raw = raw_residuals(demo.model, "llama", sample["token_ids"].tolist())
        torch.testing.assert_close(sample["activations"]["layer_3"], raw["layer_3"], atol=2e-5, rtol=2e-5)
        lengths.add(len(sample["generated_ids"]))
    assert len(lengths) > 1


def test_lm_evals_own_files_are_written_and_hold_its_scores(demo: LoadedModel, tmp_path: Path) -> None:
    outcome = run_benchmark(demo, stock(("demo",), limit=3), SCORED, output=RunOutput(tmp_path))
    assert outcome.results_file is not None
    assert outcome.folder in outcome.results_file.parents
    written = json.loads(outcome.results_file.read_text())
    assert written["results"] == as_json(outcome.results["results"])
    lines = [path.read_text().splitlines() for path in outcome.results_file.parent.glob("samples_*.jsonl")]
    assert sorted(map(len, lines)) == [3, 3]
    elsewhere = run_benchmark(demo, stock(("demo_facts",), limit=2), output_path=tmp_path / "results")
    assert elsewhere.results_file is not None
    assert tmp_path / "results" in elsewhere.results_file.parents


def test_forecast_is_never_less_than_what_is_written(demo: LoadedModel, tmp_path: Path) -> None:
    for selection in (SCORED, ALL):
        for benchmark in (stock(("demo",), num_trials=20), stock(("demo",), limit=9, num_fewshot=2)):
            found = load_tasks(benchmark)
            foreseen = forecast(demo, benchmark, found, selection)
            assert foreseen.is_bound
            outcome = run_benchmark(demo, benchmark, selection, output=RunOutput(tmp_path))
            rows = sum(
                len(sample["token_ids"])
                for sample in open_run(outcome.folder or "")
                if sample["task"] == "demo_arithmetic"
            )
            assert rows * 5 * 128 * 4 <= foreseen.rows_bytes
            written = sum(file.stat().st_size for file in (outcome.folder or tmp_path).glob("*.h5"))
            assert outcome.size_bytes <= written <= foreseen.size_bytes


def test_disk_without_room_is_refused_before_the_first_forward(
    demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    monkeypatch.setattr(run_module, "simple_evaluate", lambda **k: pytest.fail("it ran"))
    with pytest.raises(DiskFull) as raised:
        run_benchmark(demo, stock(("demo",)), SCORED, output=RunOutput(tmp_path))
    assert raised.value.exit_code == 2
    assert os.listdir(tmp_path) == []


def test_disk_that_fills_up_in_a_run_keeps_the_sealed_shards(
    demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_hooks_after: Callable[[Any], None]
) -> None:
    same_hooks_after(demo.model)
    from AutomaticEval.store import writer

    real, written = writer.filled_file, []

    def full_after_two(path: Path, *args: Any, **kwargs: Any) -> Any:
        if len(written) == 2:
            raise DiskFull("the disk is full")
        written.append(path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(writer, "filled_file", full_after_two)
    monkeypatch.setattr(writer, "SHARD_BYTES", 20_000)
    with pytest.raises(DiskFull) as raised:
        run_benchmark(demo, stock(("demo",)), SCORED, output=RunOutput(tmp_path))
    assert raised.value.exit_code == 1
    (folder,) = tmp_path.iterdir()
    run = open_run(folder)
    assert not run.finished
    assert len(run) == sum(1 for _ in run) > 0
    assert sorted(path.name for path in folder.glob("*")) == [".lock", "shard-00000.h5", "shard-00001.h5"]


def test_failure_in_a_run_seals_what_was_captured(
    demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_hooks_after: Callable[[Any], None]
) -> None:
    from lm_eval.models import huggingface

    same_hooks_after(demo.model)
    collator, calls = huggingface.Collator, []
    real = HFLM._model_call

    def fails_third(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_call", fails_third)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(demo, stock(("demo_facts",), batch_size=8), SCORED, output=RunOutput(tmp_path))
    assert huggingface.Collator is collator
    (folder,) = tmp_path.iterdir()
    assert len(open_run(folder)) >= 16


def test_change_inside_lm_eval_fails_loudly(demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches in another order than announced: the tokens of the row are not the expected ones."""
    begins = Call.begins
    monkeypatch.setattr(Call, "begins", lambda self, batch: begins(self, batch[::-1]))
    for task in ("demo_facts", "demo_arithmetic"):
        with pytest.raises(CaptureError, match="not what its request asks"):
            run_benchmark(demo, stock((task,), limit=6), SCORED, output=RunOutput(tmp_path))


def test_beam_search_in_a_task_is_refused(demo: LoadedModel, tmp_path: Path, own_tasks: str) -> None:
    task = REPEATS.replace("do_sample: true, temperature: 1.0", "num_beams: 2").replace("often", "beams")
    (Path(own_tasks) / "beams.yaml").write_text(task)
    with pytest.raises(BenchmarkError, match="'beams' generates with num_beams=2"):
        run_benchmark(demo, stock(("beams",), include_path=(own_tasks,)), SCORED, output=RunOutput(tmp_path / "out"))


def test_scores_outlive_a_join_that_fails(demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise CaptureError("they do not match")

    monkeypatch.setattr(folder_module, "join", fail)
    with pytest.raises(CaptureError, match="do not match"):
        run_benchmark(demo, stock(("demo",), limit=3), SCORED, output=RunOutput(tmp_path))
    assert list(tmp_path.rglob("results_*.json"))
    assert list(tmp_path.rglob("shard-00000.h5"))


def test_task_whose_requests_cannot_be_told_apart_is_refused_before(
    demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As squadv2 does: two requests of a document with the same index."""
    from lm_eval.api.task import ConfigurableTask

    construct = ConfigurableTask.construct_requests

    def twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        return [construct(self, *args, **kwargs)] * 2

    monkeypatch.setattr(ConfigurableTask, "construct_requests", twice)
    monkeypatch.setattr(run_module, "simple_evaluate", lambda **k: pytest.fail("it ran"))
    with pytest.raises(BenchmarkError, match="told apart"):
        run_benchmark(demo, stock(("demo_arithmetic",)), SCORED, output=RunOutput(tmp_path))


def entry(doc_id: int, **metrics: Any) -> dict[str, Any]:
    answers = [(-1.0, False), (-2.0, True)]
    shared = {"filter": "none", "target": 0, "prompt_hash": "h", "arguments": [("q", " a"), ("q", " b")]}
    return {**shared, "doc_id": doc_id, "filtered_resps": answers, "metrics": list(metrics), **metrics}


def test_correct_is_the_first_metric_that_says_right_or_wrong() -> None:
    assert join_module.main_metric([entry(0, ppl=3.2, acc=1.0), entry(1, ppl=1.0, acc=0.0)]) == "acc"
    assert join_module.main_metric([entry(0, f1=1.0), entry(1, f1=0.5)]) is None
    assert join_module.main_metric([entry(0)]) is None
    fractions = {"squad": [entry(0, f1=1.0), entry(1, f1=0.5)], "quiz": [entry(0, acc=1.0), entry(1, acc=0.0)]}
    (overall,) = join_module._overall({}, fractions, 10)
    assert (overall.value, overall.answered, overall.total) == (0.5, 2, 10)
    assert join_module._overall({}, {"squad": [entry(0, f1=0.5)]}, 10) == []
    assert join_module._verdict([entry(0, acc=1.0)], "acc")["prediction"] == 0
    assert join_module._verdict([entry(0, acc_norm=0.0)], "acc_norm")["prediction"] is None


def test_sample_joined_to_another_request_is_refused(demo: LoadedModel, tmp_path: Path) -> None:
    outcome = run_benchmark(demo, stock(("demo",), limit=4), SCORED, output=RunOutput(tmp_path))
    run = open_run(outcome.folder or "")
    records = run.table().to_dict("records")
    assert len(join(records, outcome.samples)) == len(records)
    with pytest.raises(CaptureError, match="no activations"):
        join(records[1:], outcome.samples)
    with pytest.raises(CaptureError, match="captured for"):
        join([*records, records[0]], outcome.samples)
    with pytest.raises(CaptureError, match="no logged request"):
        join([*records, {**records[0], "doc_id": 77}], outcome.samples)
    for column, says in (("prompt", "prompt"), ("response", "captured|choice")):
        wrong = copy.deepcopy(records)
        for record in wrong:
            record[column] += "!"
        with pytest.raises(CaptureError, match=says):
            join(wrong, outcome.samples)


def test_positions_that_keep_nothing_are_refused(demo: LoadedModel, tmp_path: Path, own_tasks: str) -> None:
    letters = DUPLICATES.replace("twice\n", "letters\n", 1).replace('"{{choices}}"', '["A", "B"]')
    (Path(own_tasks) / "letters.yaml").write_text(letters)
    with pytest.raises(SelectionError, match="keep nothing"):
        run_benchmark(
            demo,
            stock(("letters",), include_path=(own_tasks,)),
            Selection.parse(positions="response"),
            output=RunOutput(tmp_path / "out"),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"names": ("dem",)}, UnknownBenchmark, "demo"),
        ({"names": ("demo",), "num_trials": 3, "limit": 2}, BenchmarkError, "choose one"),
        ({"names": ()}, BenchmarkError, "no benchmark"),
        ({"names": ("demo", "demo_facts")}, BenchmarkError, "once"),
        ({"names": ("demo",), "seed": -1}, BenchmarkError, "seed"),
        ({"names": ("demo",), "batch_size": "²"}, BenchmarkError, "auto"),
        ({"names": ("demo",), "num_trials": 0}, BenchmarkError, "at least 1"),
        ({"names": ("demo",), "limit": 0}, BenchmarkError, "above 0"),
        ({"names": ("demo",), "batch_size": "many"}, BenchmarkError, "auto"),
        ({"names": ("demo",), "include_path": ("/no/such/folder",)}, BenchmarkError, "no folder"),
    ],
)
def test_wrong_benchmarks_are_refused(given: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        load_tasks(Benchmark(**given))


def test_benchmark_without_its_data_says_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
    with pytest.raises(BenchmarkUnavailable, match=r"connect once.*--benchmark_data"):
        load_tasks(stock(("arc_easy",)))


def test_bfloat16_run_keeps_bfloat16_and_plain_scores(tokenizer: Any, tmp_path: Path) -> None:
    loaded = LoadedModel(build(CONFIGS["gpt2"](), torch.bfloat16), tokenizer, "bf16")
    benchmark = stock(("demo",), limit=8)
    outcome = run_benchmark(loaded, benchmark, SCORED, output=RunOutput(tmp_path))
    assert_scores_are_plain(loaded, benchmark, outcome)
    assert open_run(outcome.folder or "").activations("layer_2").dtype == torch.bfloat16


@needs_real
@pytest.mark.parametrize("task", ["local_mmlu_astronomy", "local_gsm8k"])
def test_real_tasks_on_a_real_model(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the task files name their data relative to the project
    loaded = load_model(STORIES)
    tasks = str(ROOT.parent / "shared" / "real" / "lm_eval_tasks")
    benchmark = stock((task,), include_path=(tasks,), limit=4, num_fewshot=2, batch_size=4)
    outcome = run_benchmark(loaded, benchmark, SCORED, output=RunOutput(tmp_path))
    assert_scores_are_plain(loaded, benchmark, outcome)
    assert_rows_reproduce_scores(loaded, outcome.folder)


@needs_real
def test_group_of_57_tasks_with_5_trials_answers_5_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tasks = str(ROOT.parent / "shared" / "real" / "lm_eval_tasks")
    benchmark = stock(("local_mmlu",), include_path=(tasks,), num_trials=5)
    outcome = run_benchmark(load_model(STORIES), benchmark, SCORED, output=RunOutput(tmp_path))
    (overall,) = (score for score in outcome.scores if score.metric == "correct")
    assert (overall.answered, overall.total) == (5, 14042)
    (group,) = (score for score in outcome.scores if score.task == "local_mmlu")
    assert (group.value, group.answered, group.total) == (overall.value, 5, 14042)
    assert len(open_run(outcome.folder or "")) == 20
