"""Runs over the prefix tree: lm-eval's scores within float noise, true rows, and lm-eval's own path where the tree cannot serve."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.models import CONFIGS, SIZES, VOCABULARY, build
from helpers.places import REAL, ROOT, STORIES, needs_real
from helpers.plain_lm_eval import as_json, assert_same, plain
from helpers.raw_hooks import raw_residuals
from helpers.tasks import DATA, GREEDY, MIXED, loglikelihoods
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from AutomaticEval import HFActivations, evaluate_with_activations, open_run
from AutomaticEval.capture.tree import shared_prompt as prefill
from AutomaticEval.errors import BenchmarkError
from AutomaticEval.evaluation.benchmark import load_tasks
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.forecast import forecast
from AutomaticEval.evaluation.harness.model import CapturingHFLM
from AutomaticEval.evaluation.harness.tokens import shared_beginnings
from AutomaticEval.evaluation.run import Outcome, run_benchmark
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.loading import load_model
from AutomaticEval.selection import Selection
from AutomaticEval.store.run import Run

KEY = ("task", "doc_id", "choice", "repeat", "window")


def assert_near(outcome: Outcome, expected: dict[str, Any], within: float = 1e-4) -> None:
    """Every logged log-likelihood within float noise, every greedy text and verdict the same."""
    for task, logged in expected["samples"].items():
        for ours, theirs in zip(outcome.samples[task], logged, strict=True):
            assert ours["doc_id"] == theirs["doc_id"]
            for one, other in zip(ours["resps"], theirs["resps"], strict=True):
                for mine, stock in zip(one, other, strict=True):
                    if isinstance(stock, tuple):
                        assert mine == (pytest.approx(stock[0], abs=within), stock[1])
                    elif isinstance(stock, float):
                        assert mine == pytest.approx(stock, abs=within)
                    elif task != "often":  # whose answers are sampled
                        assert mine == stock
            for name in ("acc", "acc_norm", "exact_match"):
                assert ours.get(name) == theirs.get(name) or task == "often"


def assert_true(run: Run, model: Any, family: str, within: float = 1e-5) -> None:
    """Every sample's rows, through its segments, are those of raw hooks on one unpadded row.

    within: as a part of each row's largest number, since float32 rounds sums as parts of what is summed; which way, the processor decides.
    """
    assert len(run)
    for sample in run:
        sequence = [*sample["input_ids"][0].tolist(), *sample["generated_ids"].tolist()][:-1]
        assert sample["token_ids"].tolist() == [sequence[at] for at in sample["positions"].tolist()]
        raw = raw_residuals(model, family, sequence)
        for key, rows in sample["activations"].items():
            expected = raw[key][sample["positions"]]
            off = (rows - expected).abs().amax(-1)
            assert bool((off <= within * expected.abs().amax(-1).clamp(min=1)).all())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_kind_of_task(name: str, tokenizer: Any, own_tasks: str, tmp_path: Path) -> None:
    """Windows, last words, choices, duplicates, greedy and sampled answers; few-shot prefixes; rows stored once."""
    loaded = LoadedModel(build(CONFIGS[name]()), tokenizer, name)
    names = (*MIXED, "demo") if name != "gpt_neo" else ("twice", "greedy", "demo_facts")  # its windows fill the context
    how = {"num_fewshot": 2, "limit": 6}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        outcome = evaluate_with_activations(
            loaded, names, include_path=own_tasks, positions="all", activation_save_dir=tmp_path, **how
        )
    assert_near(outcome, plain(loaded, names, own_tasks, **how))
    run = open_run(outcome.folder or "")
    assert_true(run, loaded.model, name)
    table = run.table()
    assert set(table.scoring[table.is_greedy.notna()]) == {"tree"}
    scored = [sample for sample in run if sample["is_greedy"] is not None]
    prefixes = {tuple(each["token_ids"][: n + 1].tolist()) for each in scored for n in range(len(each["token_ids"]))}
    assert outcome.n_computed >= len(prefixes)
    assert outcome.n_computed < outcome.n_tokens
    if len(names) == 3:
        assert outcome.n_computed == len(prefixes)  # one call of lm-eval: every distinct token once


def test_each_distinct_row_is_stored_once(demo: LoadedModel, tmp_path: Path) -> None:
    outcome = evaluate_with_activations(
        demo, "demo_facts", positions="all", num_fewshot=4, limit=12, activation_save_dir=tmp_path
    )
    run = open_run(outcome.folder or "")
    prefixes = {tuple(each["token_ids"][: n + 1].tolist()) for each in run for n in range(len(each["token_ids"]))}
    assert len(run.rows("layer_0")) == len(prefixes) == outcome.n_computed
    assert run.finished


def test_the_same_with_and_without_capture(demo: LoadedModel, tmp_path: Path) -> None:
    asked = Benchmark(("demo",), limit=15, num_fewshot=3)
    bare = run_benchmark(demo, asked)
    captured = evaluate_with_activations(demo, "demo", limit=15, num_fewshot=3, activation_save_dir=tmp_path)
    assert as_json(bare.samples) == as_json(captured.samples)
    assert (bare.n_computed, bare.n_tokens) == (captured.n_computed, captured.n_tokens)


@pytest.mark.usefixtures("small_probes")
def test_measured_budget(demo: LoadedModel, tmp_path: Path) -> None:
    outcome = evaluate_with_activations(demo, "demo", limit=8, batch_size="auto", activation_save_dir=tmp_path)
    assert_near(outcome, plain(demo, ("demo",), str(tmp_path), limit=8))


def test_models_without_a_tree_are_served_by_lm_eval(tokenizer: Any, own_tasks: str, tmp_path: Path) -> None:
    """ALiBi, with capture: a warning, lm-eval's scores to the last bit, and each sample says how it was scored."""
    config = hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    loaded = LoadedModel(build(config), tokenizer, "bloom")
    names = ("twice", "greedy", "last_word", "pages")
    with pytest.warns(UserWarning, match="position_ids"):
        outcome = evaluate_with_activations(
            loaded, names, include_path=own_tasks, limit=6, activation_save_dir=tmp_path
        )
    assert_same(outcome, plain(loaded, names, own_tasks, limit=6))
    assert outcome.n_computed == 0
    table = open_run(outcome.folder or "").table()
    assert set(table.scoring[table.is_greedy.notna()]) == {"stock"}


def test_state_space_models_run_uncaptured(tokenizer: Any, own_tasks: str) -> None:
    config = hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
    loaded = LoadedModel(build(config), tokenizer, "mamba")
    with pytest.warns(UserWarning, match="not keys and values"):
        outcome = run_benchmark(loaded, Benchmark(("twice", "demo_facts"), include_path=(own_tasks,), limit=6))
    assert_same(outcome, plain(loaded, ("twice", "demo_facts"), own_tasks, limit=6))


def test_instance_for_simple_evaluate(demo: LoadedModel, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from AutomaticEval.evaluation.benchmark import BUNDLED

    lm = HFActivations(demo, activation_save_dir=tmp_path, positions="all", batch_size=4)
    manager = TaskManager(include_path=str(BUNDLED), include_defaults=False)
    results = simple_evaluate(model=lm, tasks=["demo"], task_manager=manager, limit=5, num_fewshot=6)
    run = open_run(lm.finish(results))
    assert_true(run, demo.model, "llama")
    assert run.settings["scoring"] == "tree"


def test_instance_asked_several_times(demo: LoadedModel, tmp_path: Path) -> None:
    """A tree for each call; the rows of all of them in one run, each its own request's."""
    lm = HFActivations(demo, positions="all", activation_save_dir=tmp_path)
    asked = loglikelihoods(
        [(f"{SHARED}Item {number} is", f" {end}") for number in range(6) for end in ("red", "a dog")]
    )
    answers = [answer for at in range(0, 12, 4) for answer in lm.loglikelihood(asked[at : at + 4])]
    plainly = HFLM(pretrained=demo.model, tokenizer=demo.tokenizer).loglikelihood(asked)
    assert [each[0] for each in answers] == pytest.approx([each[0] for each in plainly], abs=1e-4)
    run = open_run(lm.folder)
    assert_true(run, demo.model, "llama")
    assert sorted(run.column("doc_id")) == list(range(12))
    assert len(run.rows("layer_0")) == lm.n_tokens[1]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_generated_answers_share_their_prefill(
    name: str, batch_size: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What prompts begin with is computed and stored once, answers are lm-eval's, and rows are true."""
    monkeypatch.setattr(prefill, "CHUNK", 8)
    beginning = (
        'description: "Answer each question in one word, as the one who asks would, and say no more than that. "\n'
    )
    (tmp_path / "begun.yaml").write_text(GREEDY.replace("task: greedy", "task: begun") + beginning)
    (tmp_path / "data.py").write_text(DATA)
    loaded = LoadedModel(build(CONFIGS[name]()), tokenizer, name)
    assert loaded.layout.n_layers  # found with a few forwards of its own
    fed = []
    handle = loaded.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: fed.append(args[0].numel()))
    outcome = evaluate_with_activations(
        loaded,
        "begun",
        include_path=tmp_path,
        positions="all",
        activation_save_dir=tmp_path / "out",
        batch_size=batch_size,
    )
    n_fed = sum(fed)
    fed.clear()
    assert_near(outcome, plain(loaded, ("begun",), str(tmp_path), batch_size))
    handle.remove()
    assert n_fed < 0.85 * sum(fed)  # which holds the answers and the check, too
    run = open_run(outcome.folder or "")
    assert_true(run, loaded.model, name)
    n_prompts = sum(run.column("n_prompt_tokens"))
    n_answers = sum(len(sample["generated_ids"]) for sample in run)
    assert len(run.rows("layer_0")) < n_prompts / 2 + n_answers  # shared rows are there once


def generated(loaded: LoadedModel, prompts: list[str], scoring: str, **kwargs: Any) -> list[str]:
    """lm-eval's answers to prompts, uncaptured."""
    return answered(CapturingHFLM(loaded, None, list, scoring=scoring, batch_size=4), prompts, **kwargs)


def answered(lm: CapturingHFLM, prompts: list[str], **kwargs: Any) -> list[str]:
    how = {"until": ["\n\n"], "max_gen_toks": 24, **kwargs}
    asked = [Instance("generate_until", {}, (text, how), 0, metadata=("t", at, 1)) for at, text in enumerate(prompts)]
    return list(lm.generate_until(asked))


SHARED = "Here is what is asked of you, and you shall answer it. " * 4


@pytest.mark.parametrize(
    "config",
    [
        lambda longest: hf.MistralConfig(**SIZES, sliding_window=longest + 4),
        lambda longest: hf.Gemma2Config(**SIZES, head_dim=8, sliding_window=longest + 4),
        lambda longest: hf.GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=longest + 4,
        ),
        lambda longest: hf.LlamaConfig(**SIZES),
    ],
    ids=["mistral", "gemma2", "gpt_neo", "llama"],
)
def test_answers_that_grow_out_of_a_window_are_lm_evals(config: Any, tokenizer: Any) -> None:
    """Padding between a prefix and the rest of a prompt would take up some of the window."""
    prompts = [
        SHARED + each for each in ("A?", "What is it that is red, and why is it so, and since when is it red?", "B")
    ]
    longest = max(len(tokenizer(each)["input_ids"]) for each in prompts)
    loaded = LoadedModel(build(config(longest)), tokenizer, "sliding")
    assert generated(loaded, prompts, "tree") == generated(loaded, prompts, "stock")


@pytest.mark.parametrize("kwargs", [{"num_beams": 2}, {"cache_implementation": "static"}, {"repetition_penalty": 1.3}])
def test_other_ways_to_generate_are_lm_evals(kwargs: dict[str, Any], demo: LoadedModel) -> None:
    prompts = [SHARED + "A?", SHARED + "What is red?"]
    alone = [generated(demo, [each], "stock", **kwargs)[0] for each in prompts]
    assert generated(demo, prompts, "tree", **kwargs) == alone  # with beams, lm-eval's own stop depends on the batch


def test_a_model_that_changed_between_calls_is_prefilled_anew() -> None:
    """An edit, or a step of training: what a prefix gave before is not what it gives now."""
    loaded = load_model("demo")
    lm = CapturingHFLM(loaded, None, list, batch_size=4)
    asked = [SHARED + "What is red?", SHARED + "What is 1 + 1?"]
    before = answered(lm, asked)
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    try:
        assert answered(lm, asked) == generated(loaded, asked, "stock") != before
    finally:
        with torch.no_grad():
            loaded.model.model.layers[0].mlp.down_proj.weight.mul_(-1)


def test_empty_prompts_beside_others_that_share(demo: LoadedModel) -> None:
    prompts = [SHARED + "A?", "", SHARED + "What is red?"]
    assert demo.tokenizer("")["input_ids"] == []
    assert generated(demo, prompts, "tree") == generated(demo, prompts, "stock")


@pytest.mark.parametrize("name", ["bloom", "mamba", "gpt_neo"])
def test_measured_budget_of_models_without_much_of_a_tree(name: str, tokenizer: Any, own_tasks: str) -> None:
    configs: dict[str, Any] = {
        "bloom": lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        "mamba": lambda: hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
        "gpt_neo": CONFIGS["gpt_neo"],
    }
    loaded = LoadedModel(build(configs[name]()), tokenizer, name)
    asked = Benchmark(("twice",), include_path=(own_tasks,), batch_size="auto", limit=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = run_benchmark(loaded, asked)
    assert bool(outcome.n_computed) == (name == "gpt_neo")
    assert_near(outcome, plain(loaded, ("twice",), own_tasks, limit=3))


def test_each_call_is_checked_by_itself(tokenizer: Any) -> None:
    """A model that only long requests show to be unsuitable: the short ones before them prove nothing."""
    loaded = LoadedModel(build(hf.DogeConfig(**SIZES, keep_window_size=20)), tokenizer, "doge")
    lm = CapturingHFLM(loaded, None, list, batch_size=1)
    lm.loglikelihood(loglikelihoods([("A", "B")]))
    long = [(SHARED + "What is red?", " a colour"), (SHARED + "Who is it?", " I am")]
    with pytest.warns(UserWarning, match="in a plain forward"):
        found = lm.loglikelihood(loglikelihoods(long))
    assert found == HFLM(pretrained=loaded.model, tokenizer=tokenizer, batch_size=1).loglikelihood(loglikelihoods(long))


def test_prompts_that_share_less_than_a_chunk_are_lm_evals_own(demo: LoadedModel, tmp_path: Path) -> None:
    how: dict[str, Any] = {"limit": 10}
    outcome = evaluate_with_activations(demo, "demo_arithmetic", activation_save_dir=tmp_path, **how)
    assert_same(outcome, plain(demo, ("demo_arithmetic",), str(tmp_path), **how))


def test_prompts_of_one_beginning_are_grouped() -> None:
    shots = "Here are some examples of what to answer. " * 4
    texts = ["Alone.", shots + "A?", "B" + shots + "?", shots + "C?", "B" + shots + "!", "Also alone."]
    shares, groups = shared_beginnings(texts)
    assert groups[0] == groups[5] == 0
    assert groups[1] == groups[3] != 0
    assert groups[2] == groups[4] not in (0, groups[1])
    assert shares[1] == pytest.approx(len(shots) / len(texts[1]))
    assert shares[0] == pytest.approx(2 / 6)
    assert shared_beginnings([]) == ([], [])


def test_size_is_foreseen_with_shared_rows_once(demo: LoadedModel, tmp_path: Path) -> None:
    """Not far below what was written, and not as much as samples by themselves would take."""
    selection = Selection.parse(positions="all")
    how = {"num_fewshot": 5, "limit": 40}
    asked = Benchmark(("demo_facts",), **how)  # type: ignore[arg-type]
    foreseen = forecast(demo, asked, load_tasks(asked), selection)
    alone = Benchmark(("demo_facts",), scoring="stock", **how)  # type: ignore[arg-type]
    outcome = evaluate_with_activations(demo, "demo_facts", positions="all", activation_save_dir=tmp_path, **how)
    row_bytes = 5 * 128 * 4
    written = len(open_run(outcome.folder or "").rows("layer_0")) * row_bytes
    assert (
        not foreseen.is_bound
    )  # what is shared is written again with each shard, and how many there are depends on the time
    assert 0.8 * written <= foreseen.rows_bytes <= 1.5 * written
    assert foreseen.rows_bytes <= foreseen.size_bytes <= 2 * written
    by_themselves = forecast(demo, alone, load_tasks(alone), selection)
    assert by_themselves.is_bound
    assert by_themselves.rows_bytes > 3 * written


def test_unknown_scoring_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="tree or stock"):
        Benchmark(("demo",), scoring="fast")


@needs_real
@pytest.mark.parametrize(
    ("task", "shots"), [("local_mmlu_astronomy", 1), ("local_mmlu_virology", 0), ("local_gsm8k", 1)]
)
def test_real_tasks_on_a_real_model(task: str, shots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained Llama with MMLU and GSM8K: the same accuracy, log-likelihoods within 1e-4, true rows."""
    monkeypatch.chdir(ROOT)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    loaded = load_model(str(STORIES), tokenizer=tokenizer)
    tasks = str(REAL / "lm_eval_tasks")
    how: dict[str, Any] = {"limit": 12, "num_fewshot": shots}
    if task == "local_gsm8k":
        how["gen_kwargs"] = {"max_gen_toks": 24}
    outcome = evaluate_with_activations(
        loaded, task, include_path=tasks, positions="all", activation_save_dir=tmp_path, **how
    )
    expected = plain(loaded, (task,), tasks, **how)
    assert_near(outcome, expected)
    for metric, value in expected["results"][task].items():
        if isinstance(value, float):
            assert outcome.results["results"][task][metric] == pytest.approx(value, abs=1e-9)
    assert_true(open_run(outcome.folder or ""), loaded.model, "llama")


def test_equal_inputs_with_other_splits_are_scored_each_by_its_own(demo: LoadedModel) -> None:
    """lm-eval's own batches take the longest continuation's tokens for both; over the tree each has its own."""
    lm = CapturingHFLM(demo, None, list)
    both = lm.loglikelihood(loglikelihoods([("What is", " red? A colour"), ("What is red?", " A colour")]))
    alone = [
        CapturingHFLM(demo, None, list).loglikelihood(loglikelihoods([pair]))[0]
        for pair in (("What is", " red? A colour"), ("What is red?", " A colour"))
    ]
    assert [each[0] for each in both] == [pytest.approx(each[0], abs=2e-5) for each in alone]


@pytest.mark.parametrize(
    ("how", "within"),
    [
        ({"load_in_8bit": True}, 0.3),
        ({"load_in_4bit": True}, 0.5),
        ({"dtype": "bfloat16"}, 0.3),
        ({"dtype": "float16"}, 0.05),
    ],
)
def test_narrow_numbers(how: dict[str, Any], within: float, tmp_path: Path) -> None:
    """Tree, stock, and stock again on one loaded model: rounding apart the same, and running it changes nothing."""
    loaded = load_model("demo", options=LoadOptions(**how))
    before = loaded.fingerprint()
    asked: dict[str, Any] = {"limit": 8, "num_fewshot": 4}
    tree, stock, again = (
        evaluate_with_activations(loaded, "demo_facts", activation_save_dir=tmp_path, scoring=scoring, **asked)
        for scoring in ("tree", "stock", "stock")
    )
    assert as_json(stock.samples) == as_json(again.samples)
    assert tree.n_computed
    for one, other in zip(tree.samples["demo_facts"], stock.samples["demo_facts"], strict=True):
        for (mine,), (theirs,) in zip(one["resps"], other["resps"], strict=True):
            assert mine[0] == pytest.approx(theirs[0], abs=within * (1 + abs(theirs[0])) / 5)
    assert loaded.fingerprint() == before


def test_weights_spread_over_cpu_and_disk(demo: LoadedModel, tmp_path: Path) -> None:
    layers = {f"model.layers.{number}": "cpu" if number % 2 else "disk" for number in range(demo.layout.n_layers)}
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", **layers}
    spread = load_model("demo", tokenizer=demo.tokenizer, options=LoadOptions(device_map=parts))
    outcome = evaluate_with_activations(spread, "demo", limit=6, num_fewshot=4, activation_save_dir=tmp_path)
    assert outcome.n_computed
    assert_near(outcome, plain(demo, ("demo",), str(tmp_path), limit=6, num_fewshot=4))


def test_a_way_to_score_that_there_is_not(demo: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="'teee'; write tree or stock"):
        HFActivations(demo.model, tokenizer=demo.tokenizer, activation_save_dir=tmp_path, scoring="teee")
