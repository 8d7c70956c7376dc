"""Benchmark runs, prompts and commands whose answers come from a graph: lm-eval's answers, true rows, and settings that say so.

A tape stands in for CUDA's graphs (`helpers/tape.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import CONFIGS, build
from helpers.plain_lm_eval import as_json, plain
from helpers.tape import Tape
from helpers.tasks import DATA, GREEDY
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from AutomaticEval import (
    answer_benchmark_question,
    evaluate_with_activations,
    generate_inference_with_activations,
    load_activations,
    open_run,
    recompute,
)
from AutomaticEval.capture.graph.recorded_step import RecordedStep
from AutomaticEval.capture.graph.way import FAILED
from AutomaticEval.capture.tree import shared_prompt as prefill
from AutomaticEval.cli.app import app
from AutomaticEval.errors import BenchmarkError, DeviceUnavailable, OtherSettings
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.for_simple_evaluate import HFActivations
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.store.run import Run

BEGUN = GREEDY.replace("task: greedy", "task: begun") + (
    'description: "Answer each question in one word, as the one who asks would, and say no more than that. "\n'
)


@pytest.fixture
def llama(tokenizer: Any) -> LoadedModel:
    return LoadedModel(build(CONFIGS["llama"]()), tokenizer, "llama")


def assert_near(run: Run, other: Run) -> None:
    """The same answers, and rows that differ by no more than rounding."""
    assert len(run) == len(other) > 0
    for one, right in zip(run, other, strict=True):
        for name in ("task", "doc_id", "response", "correct", "metrics", "n_truncated"):
            assert one[name] == right[name], name
        assert torch.equal(one["generated_ids"], right["generated_ids"])
        for key, rows in one["activations"].items():
            expected = right["activations"][key]
            assert rows.shape == expected.shape
            assert float((rows - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), key


def run_of(folder: Path | None) -> Run:
    assert folder is not None
    return open_run(folder)


@pytest.mark.parametrize("batch_size", [1, 2])  # of three questions: the second batch is smaller
def test_benchmarks_answer_from_a_graph_as_step_by_step(
    batch_size: int, tapes: None, llama: LoadedModel, own_tasks: str, tmp_path: Path
) -> None:
    """Greedy and sampled answers that end at `until`, and log-likelihoods beside them."""
    how: dict[str, Any] = {"include_path": own_tasks, "batch_size": batch_size, "positions": "all", "seed": 1}
    names = "greedy,often,twice"
    eager = evaluate_with_activations(llama, names, activation_save_dir=tmp_path / "a", generation="eager", **how)
    assert Tape.n_recorded == 0
    graph = evaluate_with_activations(llama, names, activation_save_dir=tmp_path / "b", **how)
    assert Tape.n_replayed > 10
    assert as_json(graph.results["results"]) == as_json(eager.results["results"])
    assert_near(run_of(graph.folder), run_of(eager.folder))
    assert run_of(graph.folder).settings["generation"] == "graph"
    assert "generation" not in run_of(eager.folder).settings
    found = recompute(graph.folder or "", llama, 6)
    assert not found.different


def test_answers_from_a_graph_are_those_of_lm_eval(tapes: None, llama: LoadedModel, own_tasks: str) -> None:
    """Without capture, and beside lm-eval alone."""
    from AutomaticEval.evaluation.run import run_benchmark

    outcome = run_benchmark(llama, Benchmark(("greedy",), include_path=(own_tasks,), batch_size=2, generation="graph"))
    assert Tape.n_replayed > 0
    expected = plain(llama, ("greedy",), own_tasks, 2)
    assert [each["resps"] for each in outcome.samples["greedy"]] == [
        each["resps"] for each in expected["samples"]["greedy"]
    ]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_prefilled_beginnings_are_put_into_the_graphs_cache(
    name: str, batch_size: int, tapes: None, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "CHUNK", 8)
    (tmp_path / "begun.yaml").write_text(BEGUN)
    (tmp_path / "data.py").write_text(DATA)
    loaded = LoadedModel(build(CONFIGS[name]()), tokenizer, name)
    filled: list[int] = []
    real = prefill.Prefill.of
    monkeypatch.setattr(
        prefill.Prefill,
        "of",
        lambda self, *args: [found := real(self, *args), filled.append(found.n_tokens if found else 0)][0],
    )
    how: dict[str, Any] = {"include_path": tmp_path, "positions": "all", "batch_size": batch_size}
    eager = evaluate_with_activations(loaded, "begun", activation_save_dir=tmp_path / "a", generation="eager", **how)
    graph = evaluate_with_activations(loaded, "begun", activation_save_dir=tmp_path / "b", **how)
    assert filled
    assert min(filled) >= 8
    assert Tape.n_replayed > 0
    assert_near(run_of(graph.folder), run_of(eager.folder))
    assert len(run_of(graph.folder).rows("layer_0")) == len(run_of(eager.folder).rows("layer_0"))


class Stopped(KeyboardInterrupt):
    """Where a test cuts a run short."""


def unread(self: RecordedStep, tensors: Any, constants: Any) -> None:
    """A mutant: the graph goes on with the inputs of its first step."""
    self._static = {path: tensor.clone() for path, tensor in self._static.items()}


def moved(module: torch.nn.Linear) -> None:
    """Put the same weights elsewhere in memory, so that the model is checked anew."""
    module.weight = torch.nn.Parameter(module.weight.detach().clone())


def test_a_run_goes_on_only_the_way_it_began(
    tapes: None, llama: LoadedModel, own_tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"include_path": own_tasks, "batch_size": 1, "seed": 1}
    real, calls = HFLM._model_generate, []

    def stopped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Stopped
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(HFLM, "_model_generate", stopped)
        with pytest.raises(Stopped):
            evaluate_with_activations(llama, "greedy,often", activation_save_dir=tmp_path, **how)
    (folder,) = tmp_path.iterdir()
    with pytest.raises(OtherSettings, match="generation was 'graph' and is None"):
        evaluate_with_activations(llama, "greedy,often", resume=folder, generation="eager", **how)
    with monkeypatch.context() as patch:
        patch.setattr(RecordedStep, "_refuse_others", unread)
        moved(llama.model.lm_head)
        with pytest.warns(UserWarning, match="Generating step by step"), pytest.raises(OtherSettings, match=FAILED):
            evaluate_with_activations(llama, "greedy,often", resume=folder, **how)
    moved(llama.model.lm_head)
    ended = evaluate_with_activations(llama, "greedy,often", resume=folder, generation="graph", **how)
    whole = evaluate_with_activations(llama, "greedy,often", activation_save_dir=tmp_path / "whole", **how)
    assert_near(run_of(ended.folder), run_of(whole.folder))


def test_code_of_your_own_generates_from_a_graph(
    tapes: None, llama: LoadedModel, own_tasks: str, tmp_path: Path
) -> None:
    runs = []
    for generation in ("eager", "auto"):
        folder = tmp_path / generation
        lm = HFActivations(
            llama.model, tokenizer=llama.tokenizer, activation_save_dir=folder, generation=generation, batch_size=2
        )
        manager = TaskManager(include_path=own_tasks, include_defaults=False)
        results = simple_evaluate(model=lm, tasks=["greedy"], task_manager=manager)
        runs.append(open_run(lm.finish(results)))
    eager, graph = runs
    assert Tape.n_replayed > 0
    assert graph.settings["generation"] == "graph"
    assert "generation" not in eager.settings
    assert_near(graph, eager)


def test_stock_scoring_is_eager(tapes: None, llama: LoadedModel, own_tasks: str) -> None:
    from AutomaticEval.evaluation.run import run_benchmark

    run_benchmark(llama, Benchmark(("greedy",), include_path=(own_tasks,), batch_size=2, scoring="stock"))
    assert Tape.n_recorded == 0
    with pytest.raises(BenchmarkError, match="--generation graph was given, but --scoring stock"):
        Benchmark(("demo",), scoring="stock", generation="graph")
    with pytest.raises(BenchmarkError, match="--generation is 'fast'; write auto, graph or eager"):
        Benchmark(("demo",), generation="fast")


def test_a_benchmark_that_generates_nothing_says_nothing_of_it(
    tapes: None, llama: LoadedModel, own_tasks: str, tmp_path: Path
) -> None:
    done = evaluate_with_activations(llama, "twice", include_path=own_tasks, activation_save_dir=tmp_path)
    assert Tape.n_recorded == 0
    assert "generation" not in run_of(done.folder).settings


def test_prompts_are_answered_from_a_graph_and_their_files_say_so(
    tapes: None, llama: LoadedModel, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"tokenizer": llama.tokenizer, "max_new_tokens": 12}
    graph, data = generate_inference_with_activations("What is red?", llama.model, tmp_path / "graph.h5", **how)
    assert Tape.n_replayed > 0
    eager, other = generate_inference_with_activations(
        "What is red?", llama.model, tmp_path / "eager.h5", generation="eager", **how
    )
    assert graph == eager
    assert load_activations(tmp_path / "graph.h5")["settings"]["generation"] == "graph"
    assert "generation" not in load_activations(tmp_path / "eager.h5")["settings"]
    for key, rows in data["activations"].items():
        torch.testing.assert_close(rows, other["activations"][key])
    before = Tape.n_replayed
    answer_benchmark_question("What is red?", llama.model, generation="graph", **how)
    assert Tape.n_replayed > before


@pytest.mark.gpu
def test_benchmarks_answer_from_a_cuda_graph(tokenizer: Any, own_tasks: str, tmp_path: Path) -> None:
    loaded = LoadedModel(build(CONFIGS["llama"]()).to("cuda"), tokenizer, "llama")
    how: dict[str, Any] = {"include_path": own_tasks, "batch_size": 2, "positions": "all", "seed": 1}
    names = "greedy,often,twice"
    eager = evaluate_with_activations(loaded, names, activation_save_dir=tmp_path / "a", generation="eager", **how)
    graph = evaluate_with_activations(loaded, names, activation_save_dir=tmp_path / "b", **how)
    assert run_of(graph.folder).settings["generation"] == "graph"
    assert [each["response"] for each in run_of(graph.folder)] == [each["response"] for each in run_of(eager.folder)]
    assert not recompute(graph.folder or "", loaded, 6).different


def test_a_graph_is_refused_on_a_cpu(llama: LoadedModel, own_tasks: str, tmp_path: Path) -> None:
    told = "--generation graph needs a CUDA GPU, and the model is on cpu"
    for command in (["generate", "What is red?"], ["--limit", "1"]):
        done = CliRunner().invoke(app, [*command, "--generation", "graph"])
        assert done.exit_code == 2
        assert told in " ".join(done.output.split())
    with pytest.raises(DeviceUnavailable, match=told):
        evaluate_with_activations(
            llama, "twice", include_path=own_tasks, generation="graph", activation_save_dir=tmp_path
        )
    with pytest.raises(DeviceUnavailable, match=told):
        HFActivations(llama.model, tokenizer=llama.tokenizer, generation="graph", activation_save_dir=tmp_path)
    assert not list(tmp_path.iterdir())
