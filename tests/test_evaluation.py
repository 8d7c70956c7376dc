"""Every kind of lm-eval task: plain lm-eval's scores to the last bit, rows that reproduce them, and the ways to ask."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.forked import Forked
from helpers.models import CONFIGS, build
from helpers.places import REAL, ROOT, STORIES, needs_real
from helpers.plain_lm_eval import SCORED, as_json, assert_same, plain, recompute
from helpers.raw_hooks import raw_residuals
from helpers.tasks import MIXED
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.tasks import TaskManager
from torch.utils import collect_env
from transformers import AutoTokenizer

from AutomaticEval import HFActivations, evaluate_with_activations, open_run
from AutomaticEval.errors import BenchmarkError, BenchmarkUnavailable, CaptureError, StoreError
from AutomaticEval.evaluation import local_files as local_files_module
from AutomaticEval.evaluation.benchmark import BUNDLED, load_tasks
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.forecast import forecast
from AutomaticEval.evaluation.harness import speedups as harness
from AutomaticEval.evaluation.harness.batches import RecordingCollator
from AutomaticEval.evaluation.harness.call import Call
from AutomaticEval.evaluation.harness.generated import AnswerReader
from AutomaticEval.evaluation.harness.model import CapturingHFLM
from AutomaticEval.evaluation.harness.tokens import EncodedAhead, texts_of
from AutomaticEval.evaluation.local_files import read_documents
from AutomaticEval.evaluation.run import Outcome, run_benchmark
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.models.loading import load_model
from AutomaticEval.selection import Selection

# lm-eval's own batches, bit for bit; test_tree.py has the others
evaluate = partial(evaluate_with_activations, scoring="stock")
stock = partial(Benchmark, scoring="stock")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def assert_reproduced(loaded: LoadedModel, folder: Path | None, per_token: float = 1e-5) -> None:
    """Norm, head and log-softmax over the stored last layer give each logged log-likelihood, and greedy texts."""
    run = open_run(folder or "")
    assert len(run)
    sampled = {"often"}
    for sample in run:
        logprobs, answer = recompute(loaded, sample).float(), sample["generated_ids"]
        greedy = logprobs.argmax(-1)
        if sample["is_greedy"] is None:
            text = loaded.tokenizer.decode(answer, skip_special_tokens=True)
            assert text.startswith(sample["response"])
            assert sample["task"] in sampled or torch.equal(greedy, answer)
        else:
            total = logprobs.gather(1, answer[:, None]).sum().item()
            assert abs(total - sample["logprob"]) <= per_token * len(answer)
            assert torch.equal(greedy, answer) == sample["is_greedy"]


@pytest.mark.parametrize("batch_size", [1, 8, "auto"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.usefixtures("small_probes")
def test_scores_of_every_kind_of_task_are_plain_lm_evals(
    name: str, batch_size: Any, tokenizer: Any, own_tasks: str, tmp_path: Path
) -> None:
    loaded = LoadedModel(build(CONFIGS[name]()), tokenizer, name)
    names = (*MIXED, "demo_facts")
    outcome = evaluate(
        loaded, names, include_path=own_tasks, batch_size=batch_size, limit=5, activation_save_dir=tmp_path
    )
    assert_same(outcome, plain(loaded, names, own_tasks, batch_size, limit=5))
    assert_reproduced(loaded, outcome.folder)
    table = open_run(outcome.folder or "").table()
    assert not table.duplicated(["task", "doc_id", "choice", "repeat", "window"]).any()
    assert set(table.task) == set(names)


def test_windows_of_a_whole_text_are_samples_and_sum_up(
    tiny_llama: LoadedModel, own_tasks: str, tmp_path: Path
) -> None:
    outcome = evaluate(tiny_llama, "pages", include_path=own_tasks, positions="all", activation_save_dir=tmp_path)
    run = open_run(outcome.folder or "")
    table = run.table()
    assert table[table.doc_id == 0].window.tolist() == list(range(len(table[table.doc_id == 0]))) != [0]
    logged = {entry["doc_id"]: entry for entry in outcome.samples["pages"]}
    for doc_id, windows in table.groupby("doc_id"):
        assert windows.logprob.sum() == pytest.approx(logged[doc_id]["resps"][0][0], rel=1e-12)
        page = logged[doc_id]["doc"]["page"]
        fed = [token for sample in run.where(doc_id=doc_id) for token in sample["generated_ids"].tolist()]
        assert fed == tiny_llama.tokenizer.encode(page)
    for sample in run:
        sequence = [*sample["input_ids"][0].tolist(), *sample["generated_ids"].tolist()]
        assert sample["token_ids"].tolist() == sequence[:-1]
        raw = raw_residuals(tiny_llama.model, "llama", sequence[:-1])
        torch.testing.assert_close(sample["activations"]["layer_2"], raw["layer_2"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_chat_template_and_system_instruction(name: str, batch_size: int, own_tasks: str, tmp_path: Path) -> None:
    chatty = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    chatty.chat_template = TEMPLATE
    loaded = LoadedModel(build(CONFIGS[name]()), chatty, name)
    how = {"apply_chat_template": True, "system_instruction": "Be short.", "num_fewshot": 2, "limit": 4}
    names = ("demo", "twice", "greedy")
    outcome = evaluate(
        loaded, names, include_path=own_tasks, batch_size=batch_size, activation_save_dir=tmp_path, **how
    )
    assert_same(outcome, plain(loaded, names, own_tasks, batch_size, **how))
    assert_reproduced(loaded, outcome.folder)
    prompts = open_run(outcome.folder or "").column("prompt")
    assert any("<system>Be short." in prompt for prompt in prompts)
    with pytest.raises(BenchmarkError, match="no chat template"):
        evaluate("demo", "demo", apply_chat_template=True, activation_save_dir=tmp_path)


def test_bfloat16_scores_are_plain_lm_evals(tokenizer: Any, own_tasks: str, tmp_path: Path) -> None:
    loaded = LoadedModel(build(CONFIGS["llama"](), torch.bfloat16), tokenizer, "bf16")
    outcome = evaluate(loaded, MIXED, include_path=own_tasks, activation_save_dir=tmp_path)
    assert_same(outcome, plain(loaded, MIXED, own_tasks))


def test_predict_only_answers_without_verdicts(demo: LoadedModel, own_tasks: str, tmp_path: Path) -> None:
    how = {"predict_only": True, "limit": 3}
    outcome = evaluate(demo, "demo", activation_save_dir=tmp_path, **how)
    assert_same(outcome, plain(demo, ("demo",), own_tasks, **how))
    table = open_run(outcome.folder or "").table()
    assert table.correct.isna().all()
    assert (table.response != "").all()


def test_each_sampled_answer_has_its_own_verdict(demo: LoadedModel, tmp_path: Path) -> None:
    """lm-eval scores the first answer alone; the others' verdicts are recomputed here from their texts."""
    how = {"gen_kwargs": "do_sample=true,temperature=1.5", "limit": 12}
    outcome = evaluate(demo, "demo_arithmetic", repeats=4, activation_save_dir=tmp_path, **how)
    table = open_run(outcome.folder or "").table()
    assert table.groupby("doc_id").size().tolist() == [4] * 12
    targets = table.target.astype(str).str.strip()
    assert (table.correct == (table.response.str.strip() == targets)).all()
    assert table.groupby("doc_id").correct.nunique().max() == 2  # some question has a right and a wrong answer
    first = table[table.repeat == 0]
    assert first.correct.mean() == outcome.results["results"]["demo_arithmetic"]["exact_match,none"]


def test_device_map_over_cpu_and_disk(demo: LoadedModel, tmp_path: Path) -> None:
    layers = {f"model.layers.{number}": "cpu" if number % 2 else "disk" for number in range(demo.layout.n_layers)}
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", **layers}
    spread = load_model(str(DEMO_FOLDER), tokenizer=demo.tokenizer, options=LoadOptions(device_map=parts))
    assert any(parameter.device.type == "meta" for parameter in spread.model.parameters())
    outcome = evaluate(spread, "demo", limit=6, activation_save_dir=tmp_path)
    assert_same(outcome, plain(demo, ("demo",), str(tmp_path), limit=6))
    whole = evaluate(demo, "demo", limit=6, activation_save_dir=tmp_path)
    for one, other in zip(open_run(outcome.folder or ""), open_run(whole.folder or ""), strict=True):
        for key, rows in one["activations"].items():
            assert torch.equal(rows, other["activations"][key])


def test_a_model_that_is_wholly_on_the_disk(demo: LoadedModel, tmp_path: Path) -> None:
    """Its weights say meta for a device: where token ids go is the CPU. Scores and generated answers, captured and not."""
    options = LoadOptions(device_map={"": "disk"}, offload_folder=str(tmp_path / "weights"))
    away = load_model(str(DEMO_FOLDER), tokenizer=demo.tokenizer, options=options)
    assert {parameter.device.type for parameter in away.model.parameters()} == {"meta"}
    outcome = evaluate(away, "demo", limit=3, activation_save_dir=tmp_path)
    assert_same(outcome, plain(demo, ("demo",), str(tmp_path), limit=3))
    without = run_benchmark(away, stock(("demo",), limit=3))
    assert without.scores == outcome.scores


@pytest.mark.parametrize("how", ["load_in_8bit", "load_in_4bit"])
def test_quantised_runs(how: str, tmp_path: Path) -> None:
    loaded = load_model("demo", options=LoadOptions(**{how: True}))
    outcome = evaluate(loaded, "demo", limit=6, activation_save_dir=tmp_path)
    assert_same(outcome, plain(loaded, ("demo",), str(tmp_path), limit=6))
    assert_reproduced(loaded, outcome.folder)
    settings = open_run(outcome.folder or "").settings
    assert settings["quantization"] == how.removeprefix("load_in_")


def test_forecast_knows_how_much_context_the_last_window_has(
    tiny_llama: LoadedModel, own_tasks: str, tmp_path: Path
) -> None:
    benchmark = stock(("pages",), include_path=(own_tasks,), limit=1)
    expected = forecast(tiny_llama, benchmark, load_tasks(benchmark), Selection.parse())
    outcome = run_benchmark(tiny_llama, benchmark, Selection.parse(), output=RunOutput(tmp_path))
    run = open_run(outcome.folder or "")
    assert run.column("n_prompt_tokens")[-1] > 1
    stored = sum(rows.numel() * rows.element_size() for sample in run for rows in sample["activations"].values())
    assert stored == expected.rows_bytes


# An lm-eval model in code that calls simple_evaluate itself


def manager() -> TaskManager:
    return TaskManager(include_path=str(BUNDLED), include_defaults=False)


def test_instance_in_simple_evaluate(demo: LoadedModel, tmp_path: Path) -> None:
    lm = HFActivations(
        demo, scoring="stock", activation_save_dir=tmp_path, batch_size=4, positions="all", layers_to_capture=[0, -1]
    )
    results = simple_evaluate(model=lm, tasks=["demo"], task_manager=manager(), limit=5)
    assert results is not None
    expected = plain(demo, ("demo",), str(tmp_path), 4, limit=5)
    assert as_json(results["results"]) == as_json(expected["results"])
    run = open_run(lm.finish(results))
    assert run.finished
    assert len(run) == 5 * 4 + 5
    assert set(run.keys) == {"embeddings", "layer_0", "layer_3"}
    assert_reproduced(demo, lm.folder)
    with pytest.raises(StoreError, match="one run"):
        lm.finish(results)


def test_an_instance_that_is_not_finished_says_finish(tmp_path: Path) -> None:
    """When a verdict is asked for, and when the process ends."""
    code = f"""
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from AutomaticEval import HFActivations, open_run
from AutomaticEval.errors import StoreError
lm = HFActivations("demo", activation_save_dir={str(tmp_path)!r}, layers_to_capture=0)
manager = TaskManager(include_path={str(BUNDLED)!r}, include_defaults=False)
results = simple_evaluate(model=lm, tasks=["demo_facts"], task_manager=manager, limit=1)
try:
    open_run(lm.folder).where(correct=True)
except StoreError as error:
    print("refused:", error)
if finishes:
    open_run(lm.finish(results)).where(correct=True)
"""
    for finishes in (False, True):
        done = Forked(["-c", f"finishes = {finishes}\n{code}"]).wait()
        assert done.returncode == 0, done.stderr
        assert re.search(r"refused: .*no column 'correct'.*lm\.finish\(results\)", done.stdout)
        assert ("holds what HFActivations captured, without the verdicts" in done.stderr) is not finishes


def test_instance_knows_the_documents_of_a_selection(demo: LoadedModel, tmp_path: Path) -> None:
    lm = HFActivations(demo, scoring="stock", activation_save_dir=tmp_path)
    results = simple_evaluate(
        model=lm, tasks=["demo_facts"], task_manager=manager(), samples={"demo_facts": [3, 7, 40]}
    )
    table = open_run(lm.finish(results)).table()
    docs = [json.loads(line) for line in (BUNDLED / "facts_test.jsonl").read_text().splitlines()]
    assert sorted(set(table.doc_id)) == [3, 7, 40]
    assert all(docs[row.doc_id]["question"] in row.prompt for row in table.itertuples())


def test_instance_refuses_what_breaks_the_mapping(demo: LoadedModel, tmp_path: Path) -> None:
    lm = HFActivations(demo, scoring="stock", activation_save_dir=tmp_path)
    with pytest.raises(BenchmarkError, match=r"use_cache.*no forward"):
        simple_evaluate(model=lm, tasks=["demo_facts"], task_manager=manager(), use_cache=str(tmp_path / "cache"))
    unsorted = simple_evaluate(model=lm, tasks=["demo_facts"], task_manager=manager(), samples={"demo_facts": [7, 3]})
    with pytest.raises(BenchmarkError, match="ascending"):
        lm.finish(unsorted)
    with pytest.raises(BenchmarkError, match="log_samples"):
        lm.finish({"results": {}})
    assert len(open_run(lm.folder)) == 8  # what was captured is on the disk all the same


def test_entry_point_names_a_model_that_lm_eval_makes(tmp_path: Path) -> None:
    from importlib.metadata import entry_points

    from lm_eval.api.registry import get_model

    (entry,) = entry_points(group="lm_eval.models", name="hf-activations")
    assert entry.load() is HFActivations is get_model("hf-activations")
    assert get_model("hf") is HFLM  # the others are still there
    results = simple_evaluate(
        model="hf-activations",
        model_args=f"pretrained={DEMO_FOLDER},activation_save_dir={tmp_path},positions=last",
        tasks=["demo_facts"],
        task_manager=manager(),
        limit=2,
    )
    assert results is not None
    (folder,) = tmp_path.iterdir()
    assert open_run(folder).table().logprob.notna().all()  # without finish: no verdicts, but all that the model said


def test_requests_that_cannot_be_told_apart_run_uncaptured(demo: LoadedModel) -> None:
    """As squadv2 makes them. Without capture nothing is keyed, and answers are lm-eval's."""
    texts = ("One. " * 200, "Two.")
    twice = [Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("t", 0, 1)) for text in texts]
    lm = CapturingHFLM(demo, None, lambda samples: None, scoring="stock")
    assert lm.loglikelihood_rolling(twice) == HFLM(demo.model, tokenizer=demo.tokenizer).loglikelihood_rolling(twice)
    with pytest.raises(BenchmarkError, match="told apart"):
        CapturingHFLM(demo, SCORED, lambda samples: None, scoring="stock").loglikelihood_rolling(twice)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"use_cache": "x"}, BenchmarkError, "no forward"),
        ({"cache_requests": True}, BenchmarkError, "wrong ones"),
        ({"num_fewshots": 3}, TypeError, "num_fewshot'"),
        ({"repeats": 3}, BenchmarkError, "does not sample"),
        ({"repeats": 0}, BenchmarkError, "at least 1"),
        ({"num_fewshot": -1}, BenchmarkError, "at least 0"),
        ({"gen_kwargs": "do_sample=true,temperature=0"}, BenchmarkError, "temperature"),
        ({"benchmark_data": "/no/such/folder"}, BenchmarkError, "no folder"),
        ({"resume": "/no/such/folder"}, StoreError, "no folder"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], error: type[Exception], says: str, demo: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        evaluate(demo, "demo_arithmetic", activation_save_dir=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_tasks_that_no_text_model_answers_in_one_pass_are_refused(
    demo: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.task import ConfigurableTask

    real = ConfigurableTask.__init__

    def other_type(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.OUTPUT_TYPE = "generate_until_multi_round"

    for attribute, value, says in (
        ("__init__", other_type, "one pass"),
        ("MULTIMODAL", True, "one pass"),
        ("UNSAFE_CODE", True, "runs code"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(ConfigurableTask, attribute, value, raising=False)
            with pytest.raises(BenchmarkError, match=says):
                load_tasks(stock(("demo_facts",)))


def test_patterns_and_task_files_name_tasks(own_tasks: str) -> None:
    assert set(load_tasks(stock(("demo_*",), include_path=(own_tasks,))).tasks) == {
        "demo_facts",
        "demo_arithmetic",
        "demo_capitals",
    }
    assert set(load_tasks(stock((f"{own_tasks}/twice.yaml",))).tasks) == {"twice"}


# Stock tasks on local files


def hendrycks(folder: Path, subject: str, n_test: int = 4) -> list[dict[str, Any]]:
    """Files as Hendrycks' MMLU has them: no header, question, four choices, a letter."""
    docs = [
        {"question": f'What, "exactly", is {n}?', "choices": [f"{n}", "two\nlines", "b", "c"], "answer": n % 4}
        for n in range(n_test + 5)
    ]
    for split, part in (("dev", docs[:5]), ("test", docs[5:])):
        (folder / split).mkdir(parents=True, exist_ok=True)
        with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([d["question"], *d["choices"], "ABCD"[d["answer"]]] for d in part)
    return docs


def test_hendrycks_folders_feed_the_stock_task(demo: LoadedModel, tmp_path: Path) -> None:
    docs = hendrycks(tmp_path / "data", "astronomy")
    how = {"benchmark_data": tmp_path / "data", "num_fewshot": 2, "activation_save_dir": tmp_path / "out"}
    with pytest.warns(
        UserWarning, match="the model demo knows only its own small world, and guesses on mmlu_astronomy"
    ):
        outcome = evaluate(demo, "mmlu_astronomy", **how)
    logged = outcome.samples["mmlu_astronomy"]
    assert [entry["doc"]["question"] for entry in logged] == [doc["question"] for doc in docs[5:]]
    assert [entry["target"] for entry in logged] == [doc["answer"] for doc in docs[5:]]
    assert all(docs[0]["question"] in entry["arguments"][0][0] for entry in logged)
    assert "about astronomy" in logged[0]["arguments"][0][0]
    assert len(open_run(outcome.folder or "")) == 16


@pytest.mark.parametrize(
    ("files", "task"),
    [
        (
            ["mmlu/astronomy/test-00000-of-00002.parquet", "mmlu/astronomy/test-00001-of-00002.parquet"],
            "mmlu_astronomy",
        ),
        (["astronomy/test.json"], "mmlu_astronomy"),
        (["mmlu_astronomy/test.jsonl"], "mmlu_astronomy"),
        (["test/astronomy.jsonl"], "mmlu_astronomy"),
        (["gsm8k/test.jsonl"], "gsm8k"),
        (["lambada_openai/test.csv"], "lambada_openai"),
        (["wikitext/test.jsonl"], "wikitext"),
        (["ai2_arc/ARC-Challenge/test.jsonl"], "arc_challenge"),
        (["hellaswag/validation.jsonl"], "hellaswag"),
        (["truthful_qa/multiple_choice/validation.jsonl"], "truthfulqa_mc2"),
    ],
)
def test_layouts_of_local_files(files: list[str], task: str, demo: LoadedModel, tmp_path: Path) -> None:
    """Named stock tasks, of each type, run from the layouts that downloads have."""
    mc = {"labels": [1, 0], "choices": ["red", "blue"]}
    docs = {
        "mmlu_astronomy": {"question": "What is red?", "choices": ["a", "b", "c", "d"], "answer": 1},
        "gsm8k": {"question": "What is 1 plus 1?", "answer": "1+1=2\n#### 2"},
        "lambada_openai": {"text": "The capital of Jorostan is Peloton"},
        "wikitext": {"page": " = Red = \n\n Red is a colour . \n"},
        "arc_challenge": {
            "question": "What is red?",
            "choices": {"text": ["a colour", "a fox"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        "hellaswag": {
            "ctx_a": "A fox",
            "ctx_b": "it",
            "activity_label": "Foxes",
            "endings": ["runs", "is blue", "sings", "reads"],
            "label": "0",
        },
        "truthfulqa_mc2": {"question": "What is red?", "mc1_targets": mc, "mc2_targets": mc},
    }
    for name in files:
        write_documents(tmp_path / "data" / name, [docs[task]] * 2)
    how = {"benchmark_data": tmp_path / "data", "num_fewshot": 0, "limit": 2, "gen_kwargs": "max_gen_toks=8"}
    outcome = evaluate(demo, task, activation_save_dir=tmp_path / "out", **how)
    assert len(outcome.samples[task]) == (4 if task == "gsm8k" else 2)  # gsm8k has two filters
    assert set(open_run(outcome.folder or "").column("task")) == {task}
    assert_reproduced(demo, outcome.folder)


def write_documents(file: Path, docs: list[dict[str, Any]]) -> None:
    import datasets

    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        datasets.Dataset.from_list(docs).to_parquet(str(file))
    elif file.suffix == ".csv":
        with file.open("w", newline="") as text:
            writer = csv.DictWriter(text, docs[0])
            writer.writeheader()
            writer.writerows(docs)
    else:
        lines = "\n".join(map(json.dumps, docs))
        file.write_text(lines if file.suffix == ".jsonl" else json.dumps(docs))


def test_local_files_that_are_missing_or_broken_say_so(demo: LoadedModel, tmp_path: Path) -> None:
    hendrycks(tmp_path, "astronomy")
    asked = stock(("mmlu_anatomy",), local_files=str(tmp_path))
    with pytest.raises(BenchmarkUnavailable, match=r"no 'test' split.*anatomy.*Looked for test/anatomy.*connect once"):
        load_tasks(asked)
    with pytest.raises(BenchmarkUnavailable, match=r"7 examples are needed.*--num_fewshot 0"):
        load_tasks(stock(("mmlu_astronomy",), local_files=str(tmp_path), num_fewshot=7))
    broken = tmp_path / "broken.jsonl"
    for text, says in (('{"a": 1}\n{"a": 1', "line 2"), ("", "no documents"), ("[1]", "no documents")):
        broken.write_text(text)
        with pytest.raises(BenchmarkUnavailable, match=says):
            read_documents(broken)
    (tmp_path / "ragged.csv").write_text("a,b\n1\n")
    with pytest.raises(BenchmarkUnavailable, match="ragged"):
        read_documents(tmp_path / "ragged.csv")


def test_local_files_are_read_again_when_they_change(tmp_path: Path) -> None:
    for n_test in (4, 6):
        hendrycks(tmp_path, "astronomy", n_test)
        assert load_tasks(stock(("mmlu_astronomy",), local_files=str(tmp_path))).n_questions == n_test


def test_files_that_a_task_names_are_found_in_the_folder_of_the_data_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    line = '{"q": "One?", "a": ["yes", "no"], "n": 0}\n'
    (tmp_path / "data" / "mine.jsonl").write_text(line * 2)
    (tmp_path / "data" / "deep" / "part-1.jsonl").write_text(line)
    task = (
        "dataset_path: json\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{a}}'\n"
        "doc_to_target: n\nmetric_list: [{metric: acc}]\n"
    )
    for name, files in (("one", "mine.jsonl"), ("two", "[mine.jsonl, deep/part-*.jsonl]"), ("none", "absent.jsonl")):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\n{task}dataset_kwargs: {{data_files: {{test: {files}}}}}\n"
        )
    how: dict[str, Any] = {"include_path": (str(tmp_path / "tasks"),), "local_files": str(tmp_path / "data")}
    assert load_tasks(stock(("one",), **how)).n_questions == 2
    assert load_tasks(stock(("two",), **how)).n_questions == 3
    (tmp_path / "here" / "mine.jsonl").write_text(line * 5)  # the current folder goes first, as without the option
    assert load_tasks(stock(("one",), **how)).n_questions == 5
    with pytest.raises(
        BenchmarkUnavailable,
        match=r"'none' names the file absent.jsonl, which is neither in the current folder .*/here\) nor in",
    ):
        load_tasks(stock(("none",), **how))


@needs_real
def test_whole_stock_mmlu_on_real_local_files(tmp_path: Path) -> None:
    """57 subjects and their groups' scores, drawn from 14,042 real questions, and the prompts of the task files beside them."""
    loaded = load_model(STORIES)
    how = {"num_trials": 40, "num_fewshot": 1, "benchmark_data": REAL / "data", "activation_save_dir": tmp_path}
    outcome = evaluate(loaded, "mmlu", **how)
    scores = {score.task: score for score in outcome.scores}
    assert {"mmlu", "mmlu_stem", "mmlu_humanities", "mmlu_other", "mmlu_social_sciences"} <= set(scores)
    assert (scores["mmlu"].answered, scores["mmlu"].total) == (40, 14042)
    table = open_run(outcome.folder or "").table()
    assert scores["mmlu"].value == pytest.approx(table.groupby(["task", "doc_id"]).correct.first().mean())
    assert_reproduced(loaded, outcome.folder)


@needs_real
@pytest.mark.parametrize(("stock", "local"), [("mmlu_astronomy", "local_mmlu_astronomy"), ("gsm8k", "local_gsm8k")])
def test_stock_tasks_ask_what_local_task_files_ask(
    stock: str, local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5-shot, real questions, a real model: the scores of plain lm-eval on tasks that name their files."""
    monkeypatch.chdir(ROOT)
    loaded = load_model(STORIES)
    how: dict[str, Any] = {"num_fewshot": 5, "limit": 6, "gen_kwargs": "max_gen_toks=24"}
    expected = plain(loaded, (local,), str(REAL / "lm_eval_tasks"), **how)
    outcome = evaluate(loaded, stock, benchmark_data=REAL / "data", activation_save_dir=tmp_path, **how)
    for one, other in zip(outcome.samples[stock], expected["samples"][local], strict=True):
        for name in ("arguments", "resps", "filtered_resps", "target", "prompt_hash", "doc_hash", "metrics"):
            assert as_json(one[name]) == as_json(other[name])
    assert_reproduced(loaded, outcome.folder)


# lm-eval's own work, done once


def test_kept_index_of_tasks_is_lm_evals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scanned, none = TaskManager(), TaskManager(include_defaults=False)  # a scan takes seconds
    full = scanned._index
    monkeypatch.setattr(harness, "TaskManager", lambda **how: none if how else scanned)
    harness.task_manager([], include_defaults=True)
    (file,) = (tmp_path / "automatic-eval").iterdir()
    monkeypatch.setattr(harness, "TaskManager", lambda **how: TaskManager(include_defaults=False))  # not scanned again
    kept = harness.task_manager([], include_defaults=True)._index
    assert list(kept) == list(full)
    for name, entry in full.items():
        assert (kept[name].kind, kept[name].yaml_path, kept[name].tags) == (entry.kind, entry.yaml_path, entry.tags)
    file.write_text('{"half')  # not ours: made again
    assert harness.task_manager([], include_defaults=True).all_tasks == []


def test_templates_are_compiled_once_and_render_alike() -> None:
    from lm_eval import utils

    stock = utils.env.from_string
    before = utils.apply_template("{{a}} {{b|upper}}", {"a": 1, "b": "x"})
    with harness.quick_templates():
        assert utils.apply_template("{{a}} {{b|upper}}", {"a": 1, "b": "x"}) == before == "1 X"
        assert utils.env.from_string("{{a}}") is utils.env.from_string("{{a}}")
    assert utils.env.from_string == stock


def test_the_environment_is_described_once_and_as_lm_eval_does_it(
    demo: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, asked = collect_env.get_pretty_env_info(), []
    known = collect_env.get_env_info()
    monkeypatch.setattr(collect_env, "get_env_info", lambda: asked.append(1) or known)
    harness._environment.cache_clear()
    for _ in range(2):
        outcome = run_benchmark(demo, stock(("demo_facts",), limit=1))
        assert outcome.results["pretty_env_info"] == expected
    assert asked == [1]
    assert collect_env.get_pretty_env_info() == expected
    assert asked == [1, 1]  # others' calls are as they were


@pytest.mark.parametrize("folder", [DEMO_FOLDER, pytest.param(STORIES, marks=needs_real)], ids=["demo", "stories"])
def test_texts_are_encoded_ahead_as_lm_eval_encodes_them(folder: Path) -> None:
    """Also where a tokenizer adds a first token, and a text brings it along."""
    loaded = load_model(str(folder))
    bos = loaded.tokenizer.decode(HFLM(loaded.model, tokenizer=loaded.tokenizer).prefix_token_id)
    pairs = [(f"What is {n}?  ", f" {n} é") for n in range(1500)] + [("", "x"), ("ends\n", "y")]
    for more in ([], [(bos + "What", " is")]):
        ours, theirs = (
            CapturingHFLM(loaded, None, list, scoring="stock"),
            HFLM(loaded.model, tokenizer=loaded.tokenizer),
        )
        asked = [*pairs, *more]
        ours._ahead = EncodedAhead(texts_of(asked), ours._encode_many)
        for context, continuation in asked:
            if context:
                assert ours._encode_pair(context, continuation) == theirs._encode_pair(context, continuation)
        assert ours._ahead.get("never asked") is None


def other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Collator.get_cache
    monkeypatch.setattr(Collator, "get_cache", lambda self, *a, **k: reversed(list(stock(self, *a, **k))))


def other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = HFLM._loglikelihood_tokens
    monkeypatch.setattr(
        HFLM, "_loglikelihood_tokens", lambda self, r, **k: stock(self, [(a, b[1:], c) for a, b, c in r], **k)
    )


def other_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = HFLM._model_call
    monkeypatch.setattr(
        HFLM, "_model_call", lambda self, inps, *a, **k: (self._call.fed(len(inps)), stock(self, inps, *a, **k))[1]
    )


def no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Call, "hear", lambda self, *a: None)


def other_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Collator.get_original
    monkeypatch.setattr(RecordingCollator, "get_original", lambda self, new: stock(self, new)[::-1])


@pytest.mark.parametrize(
    ("drift", "says"),
    [
        (other_order, "another order"),
        (other_rows, "not what its request asks"),
        (other_batches, "none were announced"),
        (no_hook, "no forward served"),
        (other_answers, "is not its answer"),
    ],
)
def test_drift_in_lm_eval_fails_loudly(
    drift: Callable[[pytest.MonkeyPatch], None],
    says: str,
    demo: LoadedModel,
    own_tasks: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another lm-eval, which orders, cuts, groups or answers otherwise."""
    drift(monkeypatch)
    with pytest.raises(CaptureError, match=says):
        evaluate(demo, "twice,demo_facts", include_path=own_tasks, limit=10, batch_size=2, activation_save_dir=tmp_path)


def test_drifting_windows_and_sums_fail_loudly(
    demo: LoadedModel, own_tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import utils

    stock = utils.get_rolling_token_windows

    def other_context(*args: Any, **kwargs: Any) -> Any:
        """lm-eval's windows, cut elsewhere than ours."""
        return stock(*args, **{**kwargs, "max_seq_len": 40})

    def asked() -> Outcome:
        return evaluate(demo, "pages", include_path=own_tasks, limit=1, activation_save_dir=tmp_path, positions="last")

    with monkeypatch.context() as patched:
        patched.setattr(utils, "get_rolling_token_windows", other_context)
        with pytest.raises(CaptureError, match="window"):
            asked()
    real = HFLM.loglikelihood_rolling
    with monkeypatch.context() as patched:
        patched.setattr(HFLM, "loglikelihood_rolling", lambda *a, **k: [each + 1e-9 for each in real(*a, **k)])
        with pytest.raises(CaptureError, match="sums"):
            asked()


def test_hooks_are_gone_after_every_kind_of_task(
    demo: LoadedModel, own_tasks: str, tmp_path: Path, same_hooks_after: Callable[[Any], None]
) -> None:
    same_hooks_after(demo.model)
    outcome = run_benchmark(demo, stock(MIXED, include_path=(own_tasks,)), SCORED, output=RunOutput(tmp_path))
    assert open_run(outcome.folder or "").finished


# Found by attack: each would have been silent, or the end of a long run

SHUFFLED = """
import random
def process_docs(docs):
    def shuffled(doc):
        choices = ["right", "w1", "w2", "w3"]
        random.shuffle(choices)
        return {**doc, "choices": choices, "gold": choices.index("right")}
    return docs.map(shuffled)
def documents(**unused):
    return DatasetDict({"test": Dataset.from_list([{"question": f"What is {n}?"} for n in range(6)])})
def drawn(**unused):
    docs = [{"question": f"What is {n}?"} for n in range(6)]
    random.shuffle(docs)
    return DatasetDict({"test": Dataset.from_list(docs)})
def two(**unused):
    return DatasetDict({"test": Dataset.from_list([{"prompt": "What is red?"}, {"prompt": ""}])})
"""
SHUFFLED_TASK = """
task: shuffled
custom_dataset: !function shuffled.documents
process_docs: !function shuffled.process_docs
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}]
"""
DRAWN_TASK = """
task: drawn
custom_dataset: !function shuffled.drawn
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""
EMPTY_TASK = DRAWN_TASK.replace("task: drawn", "task: empty").replace("shuffled.drawn", "shuffled.two")
EMPTY_TASK = EMPTY_TASK.replace("{{question}}", "{{prompt}}")
VOTED_TASK = DRAWN_TASK.replace("task: drawn", "task: voted").replace(
    'until: ["."]', 'until: ["."], do_sample: true, temperature: 1.0'
)
VOTED_TASK += """repeats: 3
filter_list:
  - {name: vote, filter: [{function: take_first_k, k: 3}, {function: majority_vote}, {function: take_first}]}
  - {name: first, filter: [{function: take_first}]}
"""


@pytest.fixture
def odd_tasks(tmp_path: Path) -> str:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "shuffled.py").write_text("from datasets import Dataset, DatasetDict\n" + SHUFFLED)
    for name, text in {"s": SHUFFLED_TASK, "d": DRAWN_TASK, "e": EMPTY_TASK, "v": VOTED_TASK}.items():
        (folder / f"{name}.yaml").write_text(text)
    return str(folder)


def test_task_that_is_other_each_time_it_is_read_is_refused(odd_tasks: str) -> None:
    with pytest.raises(BenchmarkError, match="each time it is read"):
        load_tasks(stock(("shuffled",), include_path=(odd_tasks,)))


def test_local_files_are_processed_once(demo: LoadedModel, tmp_path: Path) -> None:
    """GPQA shuffles its choices as it processes them; on the hub's files the result is cached, here it is kept."""
    doc = {"Question": "What is red?", "Correct Answer": "a colour"}
    doc |= {f"Incorrect Answer {n}": text for n, text in ((1, "a fox"), (2, "tea"), (3, "blue"))}
    write_documents(tmp_path / "data" / "gpqa" / "gpqa_main" / "train.jsonl", [doc] * 6)
    outcome = evaluate(
        demo, "gpqa_main_zeroshot", benchmark_data=tmp_path / "data", activation_save_dir=tmp_path / "out"
    )
    letters = set()
    for entry in outcome.samples["gpqa_main_zeroshot"]:
        asked = entry["arguments"][0][0]
        letter = entry["target"] if isinstance(entry["target"], str) else f"({'ABCD'[entry['target']]})"
        assert f"{letter} a colour" in asked
        letters.add(letter)
    assert len(letters) > 1


def test_documents_drawn_while_a_task_loads_are_plain_lm_evals(
    demo: LoadedModel, odd_tasks: str, tmp_path: Path
) -> None:
    outcome = evaluate(demo, "drawn", include_path=odd_tasks, activation_save_dir=tmp_path / "out")
    assert_same(outcome, plain(demo, ("drawn",), odd_tasks))


def test_votes_over_all_answers_leave_each_answer_its_own_verdict(
    demo: LoadedModel, odd_tasks: str, tmp_path: Path
) -> None:
    outcome = evaluate(demo, "voted", include_path=odd_tasks, activation_save_dir=tmp_path / "out")
    table = open_run(outcome.folder or "").table()
    assert len(table) == 18
    assert table.correct.isna().all()  # the first filter takes all answers together
    assert all(set(metrics) == {"first"} for metrics in table.metrics)


def test_empty_prompts_are_refused_before_a_forward(demo: LoadedModel, odd_tasks: str, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="empty prompt"):
        evaluate(demo, "empty", include_path=odd_tasks, activation_save_dir=tmp_path / "out")
    assert len(evaluate_plainly(demo, odd_tasks).samples["empty"]) == 2


def evaluate_plainly(loaded: LoadedModel, tasks: str) -> Outcome:
    return run_benchmark(loaded, stock(("empty",), include_path=(tasks,)))


def test_answer_ends_where_lm_eval_ends_it_when_later_tokens_change_earlier_text() -> None:
    """Byte fallback: a newline before half a character is no newline any more."""
    texts = {(1,): "foo", (1, 2): "foo\n", (1, 2, 3): "foo??", (1, 2, 3, 4): "foo??bar", (1, 2, 3, 4, 2): "foo??bar\n"}
    answers = AnswerReader(lambda ids: texts[tuple(ids)], ["\n"], None)
    assert answers.own([1, 2, 3, 4, 2]) == [1, 2, 3, 4]
    assert answers.own([1, 2]) == [1, 2]


def test_odd_local_files(tmp_path: Path) -> None:
    folder = tmp_path / "test"
    folder.mkdir()
    (folder / "astronomy_test.csv").write_text("What?,a,b,c,d,\nWhat?,a,b,c,d,B\n")
    assert read_documents(folder / "astronomy_test.csv")[0].keys() != {"question", "choices", "answer", "subject"}
    (tmp_path / "excel.csv").write_bytes("\ufeffquestion,answer\nx,y\n".encode())
    assert read_documents(tmp_path / "excel.csv") == [{"question": "x", "answer": "y"}]
    (tmp_path / "wrapped.json").write_text('{"data": [{"a": 1}]}')
    with pytest.raises(BenchmarkUnavailable, match="must be a list"):
        read_documents(tmp_path / "wrapped.json")
    assert local_files_module._dataset([{"q": "a"}, {"q": "b", "hint": "h"}], tmp_path)[1] == {"q": "b", "hint": "h"}
    with pytest.raises(BenchmarkUnavailable, match="different types"):
        local_files_module._dataset([{"q": "a"}, {"q": 5}], tmp_path)


@pytest.mark.parametrize(
    ("gen_kwargs", "says"),
    [("max_gen_tok=16", "max_gen_toks"), ({"temperature": 3.0}, "does not sample"), ("temprature=1", "temperature")],
)
def test_generation_options_that_would_do_nothing_are_refused(gen_kwargs: Any, says: str) -> None:
    with pytest.raises(BenchmarkError, match=says):
        load_tasks(stock(("demo_arithmetic",), gen_kwargs=gen_kwargs))


def test_misspelt_options_of_the_instance_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="positions"):
        HFActivations("demo", activation_save_dir=tmp_path / "out", position="scored")
    assert not (tmp_path / "out").exists()


def test_one_instance_makes_one_run(demo: LoadedModel, tmp_path: Path) -> None:
    lm = HFActivations(demo, scoring="stock", activation_save_dir=tmp_path)
    one, other = (
        simple_evaluate(model=lm, tasks=[task], task_manager=manager(), limit=2)
        for task in ("demo_facts", "demo_arithmetic")
    )
    with pytest.raises(BenchmarkError, match="demo_facts was captured"):
        lm.finish(other)
    with pytest.raises(BenchmarkError, match="one instance makes one run"):
        simple_evaluate(model=lm, tasks=["demo_facts"], task_manager=manager(), limit=2)
    assert one is not None


def test_resume_needs_the_run_folder_itself(demo: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(StoreError, match="holds no run"):
        evaluate(demo, "demo", resume=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
