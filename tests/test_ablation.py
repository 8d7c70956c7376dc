"""Heads taken out: the same as weights set to zero, as means and other tokens' values put in; and what is told of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from helpers.commands import within
from helpers.forked import forked
from helpers.models import CONFIGS, build
from helpers.raw_hooks import n_hooks
from scipy.stats import binomtest

from AutomaticEval import score_continuations
from AutomaticEval.analysis.heads.ablate import Ablation, parse_head_spec, reference_z
from AutomaticEval.analysis.parts.before_after import answers_with
from AutomaticEval.analysis.words.metrics import classifier, keywords, vader
from AutomaticEval.analysis.words.profiles import load_profile
from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.errors import EditError, ModelUnavailable, PromptError, SelectionError
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.run import run_benchmark
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER

PROMPTS = ["What is red?", "Is a dog an animal, and if it is, since when?", "1 + 1 is"]
REFERENCE = ["The bus leaves at noon.", "Stir the soup", "A table has four legs"]
HEADS = {0: [1], 2: [0, 3]}
WORDS = keywords(["red", "dog"])


@pytest.fixture(params=list(CONFIGS))
def loaded(request: pytest.FixtureRequest, tokenizer: Any) -> LoadedModel:
    return LoadedModel(build(CONFIGS[request.param]()), tokenizer, request.param)


@contextmanager
def without_weights(loaded: LoadedModel) -> Iterator[None]:
    """HEADS' parts of the output projections set to zero."""
    layout = loaded.layout
    kept = {name: value.clone() for name, value in loaded.model.named_parameters()}
    with torch.no_grad():
        for layer, heads in HEADS.items():
            projection = loaded.model.get_submodule(layout.pick(_z(layer))[f"layer_{layer}.z"].module)
            is_conv = type(projection).__name__ == "Conv1D"
            for head in heads:
                columns = slice(head * layout.d_head, (head + 1) * layout.d_head)
                (projection.weight[columns] if is_conv else projection.weight[:, columns]).zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in loaded.model.named_parameters():
                value.copy_(kept[name])


def _z(layer: int) -> Any:
    from AutomaticEval.sites import Site

    return [Site("z", layer)]


def test_zeroed_heads_are_zeroed_weights(loaded: LoadedModel) -> None:
    """Answers, and the log-likelihood of the answer before, of a model whose weights were changed to the same effect."""
    found = answers_with(Ablation(loaded, HEADS), PROMPTS, [WORDS], Sampling(max_new_tokens=8), batch_size=2).as_json()
    assert not n_hooks(loaded.model)
    ids = [loaded.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    before = [respond(loaded, [each], Sampling(max_new_tokens=8))[0] for each in ids]
    with without_weights(loaded):
        after = [respond(loaded, [each], Sampling(max_new_tokens=8))[0] for each in ids]
        pairs = [(each, answer.generated_ids) for each, answer in zip(ids, before, strict=True)]
        likely = [each.logprob for each in score_continuations(pairs, loaded)]
    assert [each["before"]["text"] for each in found["samples"]] == [each.text for each in before]
    assert [each["after"]["text"] for each in found["samples"]] == [each.text for each in after]
    assert [each["after"]["logprob"] for each in found["samples"]] == pytest.approx(likely, abs=1e-4)
    plainly = [each.logprob for each in score_continuations(pairs, loaded)]
    assert [each["before"]["logprob"] for each in found["samples"]] == pytest.approx(plainly, abs=1e-4)
    assert likely != pytest.approx(plainly, abs=1e-3)


def test_means_are_over_the_references_real_tokens(loaded: LoadedModel) -> None:
    reference = reference_z(loaded, list(HEADS), REFERENCE, batch_size=2)
    tap = loaded.layout.pick(_z(2))["layer_2.z"]
    rows: list[torch.Tensor] = []
    handle = loaded.model.get_submodule(tap.module).register_forward_pre_hook(lambda _, args: rows.append(args[0][0]))
    for text in REFERENCE:
        with torch.no_grad():
            loaded.model(torch.tensor([loaded.tokenizer(text)["input_ids"]]), use_cache=False)
    mean = torch.cat(rows).view(-1, loaded.layout.n_heads, loaded.layout.d_head).mean(0)
    rows.clear()
    ids = torch.tensor([loaded.tokenizer(PROMPTS[0])["input_ids"]])
    with torch.no_grad(), Ablation(loaded, HEADS, "mean", reference).applied():
        handle.remove()
        handle = loaded.model.get_submodule(tap.module).register_forward_pre_hook(
            lambda _, args: rows.append(args[0][0])
        )
        loaded.model(ids, use_cache=False)
    handle.remove()
    found = rows[0].view(-1, loaded.layout.n_heads, loaded.layout.d_head)
    for head in HEADS[2]:
        torch.testing.assert_close(found[:, head], mean[head].expand(len(found), -1), atol=1e-5, rtol=1e-5)


def test_resampled_values_are_a_positions_own(loaded: LoadedModel) -> None:
    """Whatever the batch, and with the cache as without: each step is a forward over all so far."""
    ablation = Ablation(loaded, HEADS, "resample", reference_z(loaded, list(HEADS), REFERENCE))
    sampling = Sampling(max_new_tokens=6)
    together = answers_with(ablation, PROMPTS, [], sampling, batch_size=3).as_json()["samples"]
    alone = answers_with(ablation, PROMPTS, [], sampling, batch_size=1).as_json()["samples"]
    for row, (one, other, prompt) in enumerate(zip(together, alone, PROMPTS, strict=True)):
        assert one["after"]["text"] == other["after"]["text"]
        assert [each["text"] for each in one["further_draws"]] == [each["text"] for each in other["further_draws"]]
        assert one["after"]["logprob"] == pytest.approx(other["after"]["logprob"], abs=1e-4)
        ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
        n_prompt = ids.shape[1]
        for _ in range(6):
            with torch.no_grad(), ablation.applied([row], [0]):
                ids = torch.cat([ids, loaded.model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
        generated = ids[0, n_prompt:].tolist()
        end = generated.index(0) + 1 if 0 in generated else None
        assert loaded.tokenizer.decode(generated[:end], skip_special_tokens=True) == one["after"]["text"]
    other_seed = Ablation(loaded, HEADS, "resample", ablation.reference, seed=1)
    differs = answers_with(other_seed, PROMPTS, [], sampling).as_json()["samples"]
    assert [each["after"]["logprob"] for each in differs] != [each["after"]["logprob"] for each in together]


def test_sampled_answers_differ_by_the_ablation_alone(tiny_llama: LoadedModel, tokenizer: Any) -> None:
    """Heads that write nothing change nothing: the same draws before and after."""
    loaded = LoadedModel(build(CONFIGS["llama"]()), tokenizer, "llama")
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=7)
    with without_weights(loaded):
        found = answers_with(Ablation(loaded, HEADS), PROMPTS, [], sampling).as_json()["samples"]
        assert [each["before"]["text"] for each in found] == [each["after"]["text"] for each in found]
    changed = answers_with(Ablation(loaded, HEADS), PROMPTS, [], sampling).as_json()["samples"]
    assert [each["before"]["text"] for each in changed] != [each["after"]["text"] for each in changed]


def test_summary_is_of_the_samples(tiny_llama: LoadedModel) -> None:
    found = answers_with(Ablation(tiny_llama, HEADS), PROMPTS, [vader(), WORDS], Sampling(max_new_tokens=8)).as_json()
    for name in ("sentiment", "keywords", "logprob"):
        before, after = ([each[when][name] for each in found["samples"]] for when in ("before", "after"))
        assert found["summary"][name]["before"]["mean"] == pytest.approx(np.mean(before))
        change = found["summary"][name]["change"]
        assert change["mean"] == pytest.approx(np.mean(np.array(after) - before))
        spread = np.std(np.array(after) - before, ddof=1)
        assert change["d"] == (pytest.approx(change["mean"] / spread) if spread else None)
        assert (change["n"], change["interval"]) == (3, None)
        assert change["reason"].startswith("3 values")
    assert found["methods"]["comparisons"] == 3


def test_text_metrics() -> None:
    sentiment = vader()
    good, bad, nothing = sentiment.of(["I love this, it is wonderful!", "I hate this, it is horrible.", ""])
    assert good > 0.5
    assert bad < -0.5
    assert nothing == 0.0
    assert keywords(["thank", "so sorry"]).of(["Thank you. thanks, THANK! I am so sorry", "thankful"]) == [3.0, 0.0]


def test_a_classifier_of_ones_own(tmp_path: Path) -> None:
    config = hf.BertConfig(
        vocab_size=400,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    model = hf.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = hf.AutoTokenizer.from_pretrained(DEMO_FOLDER)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([tokenizer("red dog")["input_ids"]])
    with torch.no_grad():
        likely = model(ids).logits.softmax(-1)[0]
    assert classifier(str(tmp_path)).of(["red dog"]) == [pytest.approx(likely[1].item(), abs=1e-6)]
    assert classifier(str(tmp_path), "NEGATIVE").of(["red dog"]) == [pytest.approx(likely[0].item(), abs=1e-6)]
    with pytest.raises(SelectionError, match="no label 'JOY'; it has NEGATIVE, POSITIVE"):
        classifier(str(tmp_path), "JOY")
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        classifier(str(tmp_path / "absent"))


def test_head_specs() -> None:
    assert parse_head_spec("0:0, 3:5,0:2", 4, 6) == {0: [0, 2], 3: [5]}
    assert parse_head_spec("1:*", 4, 3) == {1: [0, 1, 2]}
    assert parse_head_spec("2:1-2", 4, 3) == {2: [1, 2]}
    for wrong in ("", "3", "4:0", "a:0", ":1"):
        with pytest.raises(EditError, match="is no head: write layer:head"):
            parse_head_spec(wrong, 4, 6)
    with pytest.raises(SelectionError, match="no head '9'"):
        parse_head_spec("0:9", 4, 6)


def test_what_cannot_be_ablated(tiny_llama: LoadedModel) -> None:
    with pytest.raises(EditError, match="the mode 'none'"):
        Ablation(tiny_llama, HEADS, "none")
    with pytest.raises(EditError, match="mean needs a reference"):
        Ablation(tiny_llama, HEADS, "mean")
    reference = reference_z(tiny_llama, [0, 2], REFERENCE)
    with (
        pytest.raises(EditError, match="draws by prompt and position"),
        Ablation(tiny_llama, HEADS, "resample", reference).applied(),
    ):
        pass
    with pytest.raises(PromptError, match="no prompts"):
        answers_with(Ablation(tiny_llama, HEADS), [], [])


def own_profile(folder: Path) -> Path:
    lines = [("joy", "The red ball"), ("joy", "A dog and"), ("plain", "The bus"), ("plain", "Stir the")]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"category": c, "text": t}) for c, t in lines))
    (folder / "own.toml").write_text('prompts = "texts.jsonl"\nneutral = "plain"\n[keywords]\njoy = ["red", "dog"]\n')
    return folder / "own.toml"


def test_profiles(tmp_path: Path) -> None:
    file = own_profile(tmp_path)
    profile = load_profile(file)
    assert profile.category("joy") == ["The red ball", "A dog and"]
    with pytest.raises(SelectionError, match=r"no category 'jo'\. Did you mean 'joy'"):
        profile.category("jo")
    with pytest.raises(SelectionError, match="no profile 'nowhere'"):
        load_profile("nowhere")
    with (tmp_path / "texts.jsonl").open("a") as texts:
        texts.write('\n{"category": "joy", "text": ""}')
    with pytest.raises(PromptError, match="line 5: an empty text"):
        load_profile(file)
    file.write_text('prompts = "texts.jsonl"')
    with pytest.raises(PromptError, match="lacks 'neutral'"):
        load_profile(file)


command = partial(within, "heads", "ablate")


def test_from_the_command_line(demo: LoadedModel, tmp_path: Path) -> None:
    own_profile(tmp_path)
    asked = [
        "--head-spec",
        "0:0,3:1-2",
        "--profile",
        "own.toml",
        "--emotion",
        "joy",
        "--mode",
        "mean",
        "--max-tokens",
        "6",
    ]
    done = forked("heads", "ablate", *asked, "--benchmark", "demo", "--limit", "20", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert (tmp_path / "out" / "ablation_sentiment_comparison.png").read_bytes().startswith(b"\x89PNG")
    heads = {0: [0], 3: [1, 2]}
    ablation = Ablation(demo, heads, "mean", reference_z(demo, list(heads), ["The bus", "Stir the"]))
    expected = answers_with(
        ablation, ["The red ball", "A dog and"], [vader(), keywords(["red", "dog"])], Sampling(max_new_tokens=6)
    ).as_json()
    assert [each["after"]["text"] for each in found["samples"]] == [
        each["after"]["text"] for each in expected["samples"]
    ]
    assert found["summary"]["keywords"] == expected["summary"]["keywords"]
    benchmark = Benchmark(("demo",), limit=20)
    plainly = {score.task: score.value for score in run_benchmark(demo, benchmark).scores}
    with ablation.applied():
        without = {score.task: score.value for score in run_benchmark(demo, benchmark).scores}
    assert {each["task"]: each["before"] for each in found["benchmark"]} == plainly
    assert {each["task"]: each["after"] for each in found["benchmark"]} == without != plainly
    assert (tmp_path / "out" / "ablation_benchmark.png").read_bytes().startswith(b"\x89PNG")
    again = command(*asked, "--output", "out", cwd=tmp_path)
    assert (again.returncode, again.stderr.startswith("PathExists")) == (2, True)


def test_a_benchmark_alone_is_paired_by_question_and_drawn(demo: LoadedModel, tmp_path: Path) -> None:
    """Held against lm-eval's own samples, and McNemar's test by its binomial tail."""
    asked = ("--head-spec", "0:*,1:*", "--benchmark", "demo", "--limit", "15", "--num_fewshot", "0")
    done = command(*asked, "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())
    settings = found["settings"]["benchmark"]
    assert (settings["names"], settings["limit"], settings["num_fewshot"]) == (["demo"], 15, 0)
    benchmark = Benchmark(("demo",), limit=15, num_fewshot=0)
    before = run_benchmark(demo, benchmark)
    with Ablation(demo, {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}).applied():
        after = run_benchmark(demo, benchmark)
    assert [each["task"] for each in found["benchmark"]] == [score.task for score in before.scores]
    own = {task: [[e["doc_id"], *(e[m] for m in e["metrics"])] for e in each] for task, each in before.samples.items()}
    changed = {
        task: [[e["doc_id"], *(e[m] for m in e["metrics"])] for e in each] for task, each in after.samples.items()
    }
    for each, score in zip(found["benchmark"], before.scores, strict=True):
        tasks = [each["task"]] if each["task"] in own else list(own)
        pairs = [(one[1], other[1]) for task in tasks for one, other in zip(own[task], changed[task], strict=True)]
        gained, lost = pairs.count((0, 1)), pairs.count((1, 0))
        assert (each["n_gained"], each["n_lost"]) == (gained, lost)
        difference = each["difference"]
        assert difference["mean"] == pytest.approx((gained - lost) / len(pairs))
        assert difference["mean"] == pytest.approx(each["after"] - each["before"])
        assert difference["interval"][0] <= difference["mean"] <= difference["interval"][1]
        assert each["p"] == pytest.approx(binomtest(gained, gained + lost).pvalue if gained + lost else 1.0)
        assert each["before_stderr"] == score.stderr
        assert each["p"] <= each["p_corrected"] <= 1
    assert any(each["n_lost"] for each in found["benchmark"]), "the heads do nothing"
    assert found["methods"]["benchmark"]["comparisons"] == 3
    (tmp_path / "out" / "ablation_benchmark.png").unlink()
    for file in ("ablation.json", "old.json"):
        drawn = within(
            "heads", "plot", f"out/{file}" if file == "ablation.json" else file, "-o", f"of_{file}", cwd=tmp_path
        )
        assert drawn.returncode == 0, drawn.stderr
        assert [each.name for each in (tmp_path / f"of_{file}").iterdir()] == ["ablation_benchmark.png"]
        kept = ("task", "metric", "before", "after", "n")  # what the first versions wrote
        old = [{name: each[name] for name in kept} for each in found["benchmark"]]
        (tmp_path / "old.json").write_text(json.dumps({**found, "benchmark": old}))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--head-spec", "0:0"], "nothing is asked"),
        (["--head-spec", "9:0", "--benchmark", "demo"], "'9:0' is no head"),
        (["--head-spec", "0:0", "--emotion", "joy"], "add --profile"),
        (["--head-spec", "0:0", "--mode", "mean", "--benchmark", "demo"], "--profile"),
        (["--head-spec", "0:0", "--mode", "resample", "--profile", "own.toml", "--benchmark", "demo"], "zero or mean"),
    ],
)
def test_wrong_commands(arguments: list[str], says: str, tmp_path: Path) -> None:
    own_profile(tmp_path)
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "results").glob("*"))
