"""What cannot be asked, or not captured, is refused in one line before the model runs; a bound on the size is a bound."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import within
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from AutomaticEval import (
    HFActivations,
    evaluate_with_activations,
    generate_inference,
    generate_inference_with_activations,
    open_run,
)
from AutomaticEval.capture.generation import refuse_uncomputed_logits
from AutomaticEval.errors import BenchmarkError, FolderNotWritable, SelectionError, StoreError
from AutomaticEval.evaluation import run as run_module
from AutomaticEval.evaluation.benchmark import load_tasks
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.forecast import EXACT_DOCS, forecast
from AutomaticEval.evaluation.results.captured_run import folder_name
from AutomaticEval.evaluation.run import run_benchmark
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.selection import Positions, Selection
from AutomaticEval.store.disk.file_names import own_name
from AutomaticEval.store.disk.whole_files import prepare_file

GENERATING = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSING = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
READING = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which forwards were made."""
    made: list[str] = []
    forward = torch.nn.Module.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self).__name__.endswith("ForCausalLM"):
            made.append(type(self).__name__)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", counted)
    return made


def task(folder: Path, name: str, text: str, docs: list[dict[str, Any]]) -> str:
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(json.dumps(doc) for doc in docs), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(text.replace("NAME", name).replace("FILE", str(file)), encoding="utf-8")
    return name


def asked(n_docs: int, long: int = 0) -> list[dict[str, Any]]:
    """Questions, the last of which are long."""
    docs = [{"q": f"The capital of place {n} is", "a": "x", "choices": [" Paris", " Oslo town"]} for n in range(n_docs)]
    for doc in docs[n_docs - long :]:
        doc["q"] = "The capital of Jorostan is Peloton. " * 12 + doc["q"]
    return docs


# What a selection asks of a model that generates


def test_logits_are_kept_where_they_are_computed_when_nothing_else_is_said(demo: LoadedModel) -> None:
    how = {"tokenizer": demo.tokenizer, "max_new_tokens": 5}
    _, data = generate_inference_with_activations("The capital of", demo.model, sites="logits", **how)
    n_prompt = data["input_ids"].shape[1]
    assert data["positions"].tolist() == list(range(n_prompt - 1, n_prompt - 1 + len(data["generated_ids"])))
    assert torch.equal(data["activations"]["logits"].argmax(-1), data["generated_ids"])
    assert data["settings"]["positions"] == "scored"


@pytest.mark.parametrize("positions", ["all", "prompt", "-4:", "prompt[-2:]", "all[::2]", slice(0, 3)])
def test_logits_that_are_not_computed_are_refused_before_the_model_runs(
    positions: Any, demo: LoadedModel, runs: list[str]
) -> None:
    assert demo.layout
    runs.clear()
    with pytest.raises(SelectionError, match=r"positions=.* logits .*use positions scored"):
        generate_inference_with_activations(
            "The capital of", demo.model, sites="logits", positions=positions, tokenizer=demo.tokenizer
        )
    assert not runs


@pytest.mark.parametrize("positions", ["scored", "last", "response", "prompt[-1:]", "scored[-4:]"])
def test_logits_that_are_computed_are_kept(positions: str, demo: LoadedModel) -> None:
    _, data = generate_inference_with_activations(
        "The capital of", demo.model, sites="logits", positions=positions, tokenizer=demo.tokenizer, max_new_tokens=4
    )
    assert len(data["activations"]["logits"]) == len(data["positions"])


def test_model_that_computes_all_logits_keeps_them(demo: LoadedModel) -> None:
    class Whole(torch.nn.Module):
        def forward(self, input_ids: Any) -> None: ...

    refuse_uncomputed_logits(Whole(), Selection.parse("logits", positions="all"), 9, 4)
    with pytest.raises(SelectionError):
        refuse_uncomputed_logits(demo.model, Selection.parse("logits", positions="all"), 9, 4)
    refuse_uncomputed_logits(demo.model, Selection.parse("logits", positions="all"), 1, 4)  # a prompt of one token


def test_tasks_that_generate_are_named_before_any_task_runs(demo: LoadedModel, tmp_path: Path, runs: list[str]) -> None:
    assert demo.layout
    runs.clear()
    with pytest.raises(SelectionError, match=r"'demo_arithmetic' generates its answers.*scored"):
        run_benchmark(
            demo, Benchmark(("demo",), limit=2), Selection.parse("logits", positions="all"), output=RunOutput(tmp_path)
        )
    assert not runs
    assert os.listdir(tmp_path) == []


def test_instance_refuses_what_it_cannot_keep_at_its_first_call(
    demo: LoadedModel, tmp_path: Path, runs: list[str]
) -> None:
    lm = HFActivations(
        demo.model, tokenizer=demo.tokenizer, sites="logits", positions="all", activation_save_dir=tmp_path
    )
    task(tmp_path, "writes", GENERATING, asked(3))
    runs.clear()
    with pytest.raises(SelectionError, match="'writes', document 0, generates"):
        simple_evaluate(
            model=lm, tasks=["writes"], task_manager=TaskManager(include_path=[str(tmp_path)], include_defaults=False)
        )
    assert not runs


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("num_beams: 2", "num_beams=2"),
        ("num_return_sequences: 2, do_sample: true, temperature: 1.0", "num_return_sequences=2"),
    ],
)
def test_generation_of_many_sequences_is_refused_before_it_runs(
    options: str, says: str, demo: LoadedModel, tmp_path: Path, runs: list[str]
) -> None:
    task(tmp_path, "many", GENERATING.replace("max_gen_toks: 8", f"max_gen_toks: 8, {options}"), asked(3))
    assert demo.layout
    runs.clear()
    with pytest.raises(BenchmarkError, match=f"'many' generates with {says}"):
        evaluate_with_activations(demo.model, "many", tokenizer=demo.tokenizer, include_path=tmp_path)
    assert not runs


def test_tasks_of_which_nothing_is_kept_are_named(demo: LoadedModel, tmp_path: Path, runs: list[str]) -> None:
    letters = [{**doc, "choices": ["A", "B"]} for doc in asked(3)]
    task(tmp_path, "letters", CHOOSING, letters)
    task(tmp_path, "words", CHOOSING, asked(3))
    assert demo.layout
    runs.clear()
    with pytest.raises(SelectionError, match=r"positions=response keep nothing of letters:"):
        evaluate_with_activations(
            demo.model, "words,letters", tokenizer=demo.tokenizer, include_path=tmp_path, positions="response"
        )
    assert not runs


# lm-eval's own assertions


@pytest.mark.parametrize("captures", [True, False])
def test_more_new_tokens_than_the_context_holds_are_refused(
    captures: bool, demo: LoadedModel, tmp_path: Path, runs: list[str]
) -> None:
    task(tmp_path, "wordy", GENERATING.replace("max_gen_toks: 8", "max_gen_toks: 512"), asked(3))
    task(tmp_path, "words", CHOOSING, asked(3))
    benchmark = Benchmark(("words", "wordy"), include_path=(str(tmp_path),))
    assert demo.layout
    runs.clear()
    with pytest.raises(BenchmarkError, match=r"'wordy' asks for up to 512 new tokens.*context is 512"):
        run_benchmark(demo, benchmark, Selection.parse() if captures else None, output=RunOutput(tmp_path / "to"))
    assert not runs


@pytest.mark.parametrize(
    ("docs", "says"),
    [
        ([*asked(2), {"q": "What?", "a": "x", "choices": ["", " b"]}], "document 2, asks to score '' after"),
        ([*asked(2), {"q": "", "a": "x", "choices": [" a", ""]}], "document 2, asks to score '' after ''"),
        ([*asked(2), {"q": "  ", "a": "x", "choices": [" a", " b"]}], "document 2, asks to score ' a' after"),
        ([*asked(2), {"q": "So", "a": "x", "choices": [" a", " word" * 700]}], "document 2, .* context is 512"),
    ],
)
@pytest.mark.parametrize("scoring", ["tree", "stock"])
@pytest.mark.parametrize("captures", [True, False])
def test_continuations_that_cannot_be_scored_are_named(
    captures: bool, scoring: str, docs: Any, says: str, demo: LoadedModel, tmp_path: Path, runs: list[str]
) -> None:
    task(tmp_path, "odd", CHOOSING.replace("doc_to_target: 0", "doc_to_target: 0\ntarget_delimiter: ''"), docs)
    benchmark = Benchmark(("odd",), include_path=(str(tmp_path),), scoring=scoring)
    assert demo.layout
    runs.clear()
    with pytest.raises(BenchmarkError, match=says):
        run_benchmark(demo, benchmark, Selection.parse() if captures else None, output=RunOutput(tmp_path / "to"))
    assert not runs


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("{metric: exakt_match}", "the task 'odd' with the metric 'exakt_match' cannot be made"),
        ("{metric: exakt_match, aggregation: mean, higher_is_better: true}", "'odd' is scored by 'exakt_match'"),
        ("{metric: exact_match, aggregation: meen, higher_is_better: true}", "'odd'.*'exact_match'"),
    ],
)
def test_metrics_that_lm_eval_does_not_have_are_refused_when_a_task_loads(
    metric: str, says: str, tmp_path: Path
) -> None:
    text = GENERATING.replace("{metric: exact_match, aggregation: mean, higher_is_better: true}", metric)
    task(tmp_path, "odd", text, asked(3))
    with pytest.raises(BenchmarkError, match=says):
        load_tasks(Benchmark(("odd",), include_path=(str(tmp_path),)))


@pytest.mark.parametrize("option", ["use_cache=true", "pad_token_id=3"])
def test_options_that_lm_eval_gives_itself_are_refused(option: str) -> None:
    with pytest.raises(BenchmarkError, match=option.partition("=")[0]):
        load_tasks(Benchmark(("demo_arithmetic",), gen_kwargs=option))


# Names that are too long for a file system


def test_long_names_become_names_of_files(demo: LoadedModel, tmp_path: Path) -> None:
    name = "задание" * 30  # 420 bytes
    text = CHOOSING.replace("task: NAME", f"task: {name}")
    task(tmp_path, "long", text, asked(2))
    loaded = LoadedModel(demo.model, demo.tokenizer, "模型" * 100)
    outcome = run_benchmark(
        loaded, Benchmark((name,), include_path=(str(tmp_path),)), Selection.parse(), output=RunOutput(tmp_path / "to")
    )
    assert outcome.folder is not None
    assert len(open_run(outcome.folder)) == 4
    written = list(outcome.folder.rglob("*"))
    assert max(len(file.name.encode()) for file in [*written, outcome.folder]) <= 255
    (samples,) = outcome.folder.rglob("samples_*.jsonl")
    assert len(samples.read_text().splitlines()) == 2


def test_shortened_names_stay_apart() -> None:
    assert own_name("short", 80) == "short"
    names = ["模型" * 60 + end for end in ("a", "b")]
    assert len({own_name(name, 80) for name in names}) == 2
    assert all(len(own_name(name, 80).encode()) <= 80 for name in names)
    assert len(folder_name(["任务" * 90], "模型" * 90).encode()) < 200


def test_file_names_that_are_too_long_are_refused_by_name(tmp_path: Path) -> None:
    long = "n" * 300
    with pytest.raises(FolderNotWritable, match="File name too long"):
        prepare_file(tmp_path / f"{long}.h5")
    with pytest.raises(FolderNotWritable, match="File name too long"):
        generate_inference("Hi", "demo", capture_activations=True, save_path=tmp_path / f"{long}.h5")
    with pytest.raises(StoreError, match="File name too long"):
        RunOutput(resume=tmp_path / long)


# What a run that was cut short is told


@pytest.mark.parametrize(
    ("failure", "says", "not_says"),
    [
        (KeyboardInterrupt(), "To go on:\n  main.py --resume x", "cause"),
        (OSError("no space"), "Once the cause is gone, to go on:\n  main.py --resume x", "Resumed as it is"),
        (RuntimeError("CUDA out of memory"), "Once the cause is gone", "Resumed as it is"),
        (BenchmarkError("the task"), "Resumed as it is, it would end in the same way", "--resume"),
        (SelectionError("positions"), "Resumed as it is, it would end in the same way", "--resume"),
    ],
)
def test_resume_is_offered_only_where_it_can_go_on(failure: BaseException, says: str, not_says: str) -> None:
    told = run_module._what_next(failure, "main.py --resume x")
    assert says in told
    assert not_says not in told


# How much will be written


SELECTIONS = [
    Selection.parse(positions="scored"),
    Selection.parse(positions="all"),
    Selection.parse("resid_post", -1, "last", "int8"),
    Selection.parse("resid_post,mlp_out,head_result_norm", None, "prompt", "float16"),
]


def bounded(loaded: LoadedModel, benchmark: Benchmark, selection: Selection, folder: Path) -> tuple[int, int]:
    """(bytes that were written, bytes that were foreseen), after checking that more than a bound was not written."""
    foreseen = forecast(loaded, benchmark, load_tasks(benchmark), selection)
    said: list[str] = []
    outcome = run_benchmark(loaded, benchmark, selection, output=RunOutput(folder), announce=said.append)
    assert outcome.folder is not None
    written = sum(file.stat().st_size for file in outcome.folder.glob("*.h5"))
    assert said[0] == f"Activations: {foreseen} expected"
    assert said[0].startswith("Activations: at most") == foreseen.is_bound
    if foreseen.is_bound:
        assert outcome.size_bytes <= written <= foreseen.size_bytes
    assert written <= foreseen.room_bytes
    return written, foreseen.size_bytes


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda each: str(each.positions))
@pytest.mark.parametrize("kind", ["write", "choose", "read", "sample"])
def test_bound_is_a_bound(kind: str, selection: Selection, demo: LoadedModel, tmp_path: Path) -> None:
    """Also where the last documents are the long ones, which the first do not foretell."""
    texts = {"write": GENERATING, "choose": CHOOSING, "read": READING}
    texts["sample"] = (
        GENERATING.replace("max_gen_toks: 8", "max_gen_toks: 8, do_sample: true, temperature: 1.0") + "repeats: 3\n"
    )
    task(tmp_path, kind, texts[kind], asked(40, long=12))
    benchmark = Benchmark((kind,), include_path=(str(tmp_path),))
    written, foreseen = bounded(demo, benchmark, selection, tmp_path / "to")
    assert foreseen < 12 * written  # and of some use


def test_bound_of_a_small_run_counts_what_is_beside_the_rows(tmp_path: Path) -> None:
    done = within("--capture_activations", "--limit", "1", "--benchmark", "demo_facts", cwd=tmp_path)
    assert "Activations: at most" in done.stderr
    number, unit = done.stderr.split("at most ")[1].split()[:2]
    written = sum(file.stat().st_size for file in (tmp_path / "activations").rglob("*.h5"))
    assert written <= float(number) * {"KB": 2**10, "MB": 2**20}[unit]


def test_large_benchmark_is_about_and_looks_at_its_whole_length(demo: LoadedModel, tmp_path: Path) -> None:
    n_docs = EXACT_DOCS + 88
    task(tmp_path, "grows", CHOOSING, asked(n_docs, long=n_docs // 2))
    benchmark = Benchmark(("grows",), include_path=(str(tmp_path),), scoring="stock")
    selection = Selection.parse("resid_post", -1, "prompt")
    foreseen = forecast(demo, benchmark, load_tasks(benchmark), selection)
    assert str(foreseen).startswith("about")
    tokens = [len(demo.tokenizer(doc["q"])["input_ids"]) for doc in asked(n_docs, long=n_docs // 2)]
    rows = 2 * sum(tokens) * 128 * 4
    assert 0.8 * rows <= foreseen.rows_bytes <= 1.2 * rows
    assert foreseen.room_bytes > 1.2 * foreseen.size_bytes


def test_window_holds_every_position_that_may_be_kept() -> None:
    """Of a prompt of n tokens and any answer; and it begins late enough for logits, which only its last token has."""
    starts, stops = (None, -7, -3, -1, 0, 1, 4), (None, -4, -1, 0, 3)
    for part, start, stop, step in itertools.product(("all", "prompt", "response", "scored"), starts, stops, (None, 2)):
        positions = Positions(part, start, stop, step)
        for n_prompt, n_response in itertools.product(range(1, 7), range(10)):
            low, high = positions.window(n_prompt)
            kept = positions.resolve(n_prompt, n_response)
            assert all(low <= each and (high is None or each < high) for each in kept)
    assert Positions.parse("last").window(5) == (4, None)
