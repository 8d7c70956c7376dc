"""What stands beside a sequence changes nothing of it: alone, in a batch, shuffled, after a shared beginning, packed, resumed, shared by processes."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.forked import MAIN, ended_together, two_ranks
from helpers.models import ALL, CONFIGS, FAMILIES, OTHERS, build
from helpers.samples import assert_near, assert_same_rows
from helpers.tasks import loglikelihoods
from lm_eval.api.instance import Instance
from torch import Tensor

from AutomaticEval import evaluate_with_activations, open_run, score_continuations
from AutomaticEval.capture.batch_independence import Company, Span, apart, settings_that_look
from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.padding_probes import batches_are_harmless, counts_from_zero, padding_changes
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.capture.texts.batching import TextPieces
from AutomaticEval.capture.texts.feeding import Feeding
from AutomaticEval.capture.texts.forward import inputs, padded
from AutomaticEval.capture.texts.piece_forwards import PieceForwards
from AutomaticEval.capture.texts.sources import as_text
from AutomaticEval.errors import ModelError, SelectionError, TreeUnsuitable
from AutomaticEval.evaluation.harness.model import CapturingHFLM
from AutomaticEval.models.architecture.forward_call import cache_in, cache_name
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.edit import Edit
from AutomaticEval.models.editing import editing
from AutomaticEval.models.recording import Kept, capturing
from AutomaticEval.samples import Sample
from AutomaticEval.selection import Selection

WORDS = [
    "cat",
    "dog",
    "red",
    "blue",
    "house",
    "tree",
    "seven",
    "plus",
    "is",
    "the",
    "a",
    "of",
    "in",
    "France",
    "Paris",
    "what",
    "where",
    "who",
    "big",
    "small",
    "ball",
]


WHOLE = ("llama", "phi3-longrope", "rwkv")
"""Every setting with a usual model, and with one of each reason for which rows are computed apart."""


def paired(*settings: dict[str, Any]) -> pytest.MarkDecorator:
    """Every model without settings and with one of them in turn, and the models of WHOLE with each."""
    pairs = []
    for number, name in enumerate(ALL):
        chosen = settings if name in WHOLE else [settings[number % len(settings)]]
        pairs += [(name, each) for each in ({}, *chosen)]
    return pytest.mark.parametrize(("loaded", "settings"), pairs, indirect=["loaded"])


@pytest.fixture(scope="module", params=list(ALL))
def loaded(request: pytest.FixtureRequest, tokenizer: Any) -> LoadedModel:
    model = build(ALL[request.param]())
    embedding = model.get_input_embeddings()  # of the padding token, too: zeros would hide what padding does
    with torch.no_grad():
        embedding.weight[0] = embedding.weight[7]
        if request.param == "roberta":
            embedding.weight[embedding.padding_idx] = embedding.weight[8]
    return LoadedModel(model, tokenizer, request.param)


def texts(seed: int, lengths: Sequence[int], begins: str = "") -> list[str]:
    drawn = random.Random(seed)
    return [begins + " ".join(drawn.choices(WORDS, k=length)) for length in lengths]


@paired({"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.7}, {"sequence_bias": [[[9, 11], 4.0]]})
def test_answers_and_rows(loaded: LoadedModel, settings: dict[str, Any]) -> None:
    """Prompts on both sides of 24 tokens, where long ropes change, of which some cross it while they are answered."""
    drawn = random.Random(1)
    prompts = [[drawn.randrange(1, 400) for _ in range(length)] for length in (3, 17, 9, 22, 30, 9)]
    stock = loaded.model.generation_config
    loaded.model.generation_config = copy.deepcopy(stock)
    for name, value in settings.items():
        setattr(loaded.model.generation_config, name, value)
    try:
        how = (Sampling(max_new_tokens=6), Selection.parse("embed,resid_post"))
        alone = [respond(loaded, [prompt], *how)[0] for prompt in prompts]
        for order in ([0, 1, 2, 3, 4, 5], [4, 0, 5, 3, 1, 2]):
            together = respond(loaded, [prompts[row] for row in order], *how)
            for row, found in zip(order, together, strict=True):
                assert found.sample is not None
                assert alone[row].sample is not None
                assert_same_rows(found.sample, alone[row].sample)
    finally:
        loaded.model.generation_config = stock


@pytest.mark.parametrize("name", ["gemma2", "llama", "qwen3"])
def test_answers_and_rows_in_float64(name: str, tokenizer: Any) -> None:
    """Where float noise is nothing. Gemma 2 softens its attention in float32, in which float64's mask of padding is infinite."""
    loaded = LoadedModel(build(ALL[name](), torch.float64), tokenizer, name)
    drawn = random.Random(1)
    prompts = [[drawn.randrange(1, 400) for _ in range(length)] for length in (3, 17, 9)]
    how = (Sampling(max_new_tokens=6), Selection.parse("embed,resid_post"))
    for prompt, found in zip(prompts, respond(loaded, prompts, *how), strict=True):
        (alone,) = respond(loaded, [prompt], *how)
        assert found.sample is not None
        assert alone.sample is not None
        kept = found.sample.activation_data("m", {})["activations"]
        assert all(bool(rows.isfinite().all()) for rows in kept.values())
        assert_same_rows(found.sample, alone.sample)


def answered(loaded: LoadedModel, asked: Sequence[str], how: dict[str, Any], **lm: Any) -> dict[int, Sample]:
    """Document -> what lm-eval's generate_until captured of it."""
    found: list[Sample] = []
    capturing = CapturingHFLM(loaded, Selection.parse(None, None, "all"), found.extend, **lm)
    requests = [
        Instance("generate_until", {}, (text, dict(how)), 0, metadata=("t", number, 1))
        for number, text in enumerate(asked)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        capturing.generate_until(requests, disable_tqdm=True)
    return {int(sample.fields["doc_id"]): sample for sample in found}


@paired(
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[11, 12], [40]]},
    {"repetition_penalty": 1.7, "min_length": 80},
)
def test_lm_evals_answers_and_rows(loaded: LoadedModel, settings: dict[str, Any]) -> None:
    """By lm-eval's batches, whose prompts share a beginning of more than one prefilled chunk, or nothing."""
    begins = " ".join(texts(5, [40])) + " "
    asked = [*texts(2, [2, 9, 4], begins), *texts(3, [3, 12, 30])]
    how = {"until": ["zebra"], "max_gen_toks": 6, **settings}
    alone = {}
    for number, text in enumerate(asked):
        (alone[number],) = answered(loaded, [text], how, batch_size=1).values()
    for size in (2, 6):
        together = answered(loaded, asked, how, batch_size=size)
        for number, sample in together.items():
            assert_same_rows(sample, alone[number])
        assert len(together) == len(asked)


def test_scores_and_rows(loaded: LoadedModel) -> None:
    """Of continuations over the tree of all, or of one; by lm-eval over the tree, or where the model cannot be served so."""
    pairs = [
        (f"{text} ", each) for text in texts(4, [3, 6, 20]) for each in ("red", "a big ball", "the cat is in France")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how: dict[str, Any] = {"tokenizer": loaded.tokenizer, "capture_activations": True, "positions": "all"}
        together = score_continuations(pairs, loaded.model, **how)
        for pair, found in zip(pairs, together, strict=True):
            (alone,) = score_continuations([pair], loaded.model, **how)
            assert found.logprob == pytest.approx(alone.logprob, abs=1e-4)
            assert found.activation_data is not None
            assert alone.activation_data is not None
            for key, rows in found.activation_data["activations"].items():
                assert_near(rows, alone.activation_data["activations"][key])
        scored = CapturingHFLM(loaded, Selection.parse(None), lambda samples: None, batch_size=8)
        for found, (logprob, _) in zip(together, scored.loglikelihood(loglikelihoods(pairs)), strict=True):
            assert logprob == pytest.approx(found.logprob, abs=1e-4)


def test_extracted_rows(loaded: LoadedModel) -> None:
    """Texts alone, in batches in two orders, and packed where that is served, against forwards without mask and positions."""
    asked = texts(6, [2, 30, 5, 12, 9])
    kept: list[Tensor] = []
    taps = loaded.layout.pick(Selection.parse("resid_post", 1).sites(loaded.layout.n_layers))
    module = loaded.model.get_submodule(taps["layer_1"].module)
    end = taps["layer_1"].end

    def read(module: Any, args: Any, kwargs: Any, out: Any = None) -> None:
        value = (args[0] if args else kwargs["hidden_states"]) if end == "input" else out
        kept.append((value[0] if isinstance(value, tuple | list) else value)[0].clone())

    handle = (
        module.register_forward_pre_hook(read, with_kwargs=True)
        if end == "input"
        else module.register_forward_hook(read, with_kwargs=True)
    )
    with torch.no_grad():
        for text in asked:
            loaded.model(torch.tensor([loaded.tokenizer(text)["input_ids"]]))
    handle.remove()
    selection = Selection.parse("resid_post", 1)
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        for packing in (False, True):
            feeding = Feeding(seq_length=100 if packing else None, packing=packing, batch_size=5)
            try:
                forwards = PieceForwards(loaded, selection, feeding)
                pieces = TextPieces(loaded.tokenizer, feeding, forwards.longest)
                window = next(pieces.windows((number, as_text(asked[number])) for number in order))
                samples = [sample for _, each in forwards.over(window) for sample in each]
            except TreeUnsuitable:
                assert packing
                assert loaded.name not in FAMILIES
                continue
            assert len(samples) == len(asked)
            for sample in samples:
                assert_near(sample.parts[0].rows.activations["layer_1"], kept[sample.fields["doc_id"]])


def task(folder: Path, **how: Any) -> str:
    """A generating task of 12 prompts of many lengths. Returns its name."""
    lines = [json.dumps({"q": text, "a": "x"}) for text in texts(8, [2, 9, 4, 12, 3, 7, 2, 5, 11, 6, 8, 10])]
    (folder / "t.jsonl").write_text("\n".join(lines))
    config = {
        "task": "t",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "t.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["zebra"], "max_gen_toks": 5, **how},
        "metric_list": [{"metric": "exact_match"}],
    }
    (folder / "t.yaml").write_text(yaml.safe_dump(config))
    return "t"


def assert_same_runs(found: Path, expected: Path) -> None:
    one, other = open_run(found), open_run(expected)
    assert len(one) == len(other) == 12
    for mine, its in zip(one, other, strict=True):
        assert (mine["doc_id"], mine["response"], mine["token_ids"].tolist()) == (
            its["doc_id"],
            its["response"],
            its["token_ids"].tolist(),
        )
        for key, rows in mine["activations"].items():
            assert_near(rows, its["activations"][key])


def test_resumed_and_shared_runs(demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a setting that looks at padding: one by one, in batches, cut short and resumed, and shared by two processes."""
    name = task(tmp_path, no_repeat_ngram_size=2)
    how: dict[str, Any] = {"include_path": tmp_path, "positions": "all"}
    alone = evaluate_with_activations(demo, name, activation_save_dir=tmp_path / "alone", batch_size=1, **how).folder
    assert alone is not None
    with pytest.warns(UserWarning, match="computed apart from others of their batch: no_repeat_ngram_size look"):
        evaluate_with_activations(demo, name, activation_save_dir=tmp_path / "cut", batch_size=5, **how)
    (batched,) = (tmp_path / "cut").iterdir()
    assert_same_runs(batched, alone)

    stock, n_calls = CapturingHFLM._model_generate, 0

    def cut_short(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal n_calls
        n_calls += 1
        if n_calls > 1:
            raise KeyboardInterrupt
        return stock(self, *args, **kwargs)

    how |= {"activation_save_dir": tmp_path / "resumed", "batch_size": 5}
    monkeypatch.setattr(CapturingHFLM, "_model_generate", cut_short)
    with pytest.raises(KeyboardInterrupt):
        evaluate_with_activations(demo, name, **how)
    monkeypatch.undo()
    (folder,) = (tmp_path / "resumed").iterdir()
    evaluate_with_activations(demo, name, resume=folder, **how)
    assert_same_runs(folder, alone)

    arguments = ["--capture_activations", "--benchmark", name, "--include_path", str(tmp_path), "--positions", "all"]
    arguments += ["--batch_size", "3", "--activation_save_dir", str(tmp_path / "shared")]
    for done in ended_together(two_ranks(MAIN, *arguments, cwd=tmp_path)):
        assert done.returncode == 0, done.stderr
    (shared,) = (tmp_path / "shared").iterdir()
    assert_same_runs(shared, alone)


def test_lm_evals_own_batches_stay_whole_and_say_what_they_do(tokenizer: Any) -> None:
    """scoring="stock" changes nothing of lm-eval's batches, and says that they matter."""
    loaded = LoadedModel(build(OTHERS["phi3-longrope"]()), tokenizer, "phi3")
    pairs = [("red", " blue"), (" ".join(texts(1, [30])), " blue")]
    lm = CapturingHFLM(loaded, None, lambda samples: None, scoring="stock", batch_size=2)
    with pytest.warns(
        UserWarning, match="Rows of a batch change one another, as in lm-eval's own batches: beyond 24 tokens"
    ):
        stock = lm.loglikelihood(loglikelihoods(pairs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = CapturingHFLM(loaded, None, lambda samples: None, batch_size=2).loglikelihood(loglikelihoods(pairs))
        alone = CapturingHFLM(loaded, None, lambda samples: None).loglikelihood(loglikelihoods(pairs[:1]))
    assert ours[0][0] == pytest.approx(alone[0][0], abs=1e-5)
    assert abs(stock[0][0] - alone[0][0]) > 1e-3


def test_settings_that_look_at_tokens(tiny_llama: LoadedModel) -> None:
    """Known ones that look at scores alone do not count, neutral values do not, and unknown ones do."""
    model = tiny_llama.model
    assert (
        settings_that_look(
            model, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "attention_mask": torch.ones(1)}
        )
        == []
    )
    assert (
        settings_that_look(model, {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "x": None})
        == []
    )
    looking = {"repetition_penalty": 1.05, "no_repeat_ngram_size": 3, "something_new": True}
    assert settings_that_look(model, looking) == sorted(looking)


def test_groups() -> None:
    """Rows are apart by what matters, and only then; those that cross a limit while they grow are alone."""
    plain, long = build(CONFIGS["llama"]()), build(OTHERS["llama-longrope"]())
    spans = [Span(3, 9), Span(24, 25), Span(20, 24), Span(30, 40), Span(3, 5), Span(20, 30), Span(25, 30)]
    assert apart(plain, spans) == [[0, 1, 2, 3, 4, 5, 6]]
    assert apart(plain, spans, Company("equal lengths")) == [[0, 4], [1], [2, 5], [3], [6]]
    assert apart(plain, spans, Company("none")) == [[0], [1], [2], [3], [4], [5], [6]]
    assert apart(long, spans) == [[0, 2, 4], [1], [3, 6], [5]]


def test_batches_stay_whole_where_edits_name_their_rows(demo: LoadedModel) -> None:
    edit = Edit(
        "layer_1", lambda found: found + 1, where=lambda first, n: Kept(torch.tensor([1]), torch.tensor([first]))
    )
    with editing(demo.model, [edit]):
        assert apart(demo.model, [Span(3, 9), Span(30, 40)], Company("none")) == [[0, 1]]


def test_what_is_found_of_models(tokenizer: Any) -> None:
    """Padding and positions are tried, not looked up: of each kind what is known of it comes out."""
    found = {name: padding_changes(build(make())) for name, make in OTHERS.items()}
    assert {name for name, changes in found.items() if changes} >= {"rwkv", "recurrent-gemma", "minimax"}
    assert not found["mamba"]
    assert [name for name, make in OTHERS.items() if not batches_are_harmless(build(make()))] == ["rwkv"]
    counting = {name: counts_from_zero(build(make())) for name, make in ALL.items() if name not in ("rwkv", "mamba")}
    assert [name for name, counts in counting.items() if not counts] == ["roberta"]


def test_padding_on_the_left_is_refused_where_positions_do_not_begin_at_0(tokenizer: Any) -> None:
    model = build(OTHERS["roberta"]())
    with pytest.raises(ModelError, match="does not begin its positions at 0"):
        inputs(model, padded([[5, 6], [5, 6, 7]], "left"))
    assert "position_ids" not in inputs(model, padded([[5, 6], [5, 6, 7]]))


@pytest.mark.parametrize("name", ["phi3-longrope", "gpt-1"])
def test_rows_of_tokens_that_are_fed_again_are_those_of_the_last_time(name: str, tokenizer: Any) -> None:
    """Phi-3 feeds all again when it crosses 24 tokens, GPT-1 has no cache: rows are those of one forward of all that was fed."""
    loaded = LoadedModel(build(OTHERS[name]()), tokenizer, name)
    prompt = [random.Random(3).randrange(1, 400) for _ in range(21)]
    (answer,) = respond(loaded, [prompt], Sampling(max_new_tokens=8), Selection.parse("embed,resid_post"))
    (plain,) = respond(loaded, [prompt], Sampling(max_new_tokens=8))
    assert answer.generated_ids == plain.generated_ids
    fed = [*prompt, *answer.generated_ids[:-1]]
    with torch.no_grad():
        hidden = loaded.model(torch.tensor([fed]), output_hidden_states=True).hidden_states
    assert answer.sample is not None
    found = answer.sample.activation_data("m", {})
    assert found["token_ids"].tolist() == fed
    assert len(fed) == 28
    for key, expected in zip(("embeddings", "layer_0"), hidden, strict=False):
        assert_near(found["activations"][key], expected[0])


def test_logits_of_tokens_that_are_fed_again_are_refused_before_the_model_runs(tokenizer: Any) -> None:
    loaded = LoadedModel(build(OTHERS["phi3-longrope"]()), tokenizer, "phi3")
    selection = Selection.parse("logits", None, "scored")
    ran: list[int] = []
    handle = loaded.model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(SelectionError, match="crosses 24, feeds all tokens again"):
        respond(loaded, [[5] * 20], Sampling(max_new_tokens=8), selection)
    handle.remove()
    assert not ran
    (answer,) = respond(loaded, [[5] * 10], Sampling(max_new_tokens=8), selection)
    assert answer.sample is not None
    assert len(answer.sample.activation_data("m", {})["activations"]["logits"]) == 8


def test_chunks_that_repeat_themselves_are_not_taken_for_tokens_fed_again(tiny_llama: LoadedModel) -> None:
    """Two chunks of one token, of which the second is longer than what was before: only the cache tells."""
    ids = torch.tensor([[7] * 9])
    keep = lambda first, n: Kept(torch.zeros(n, dtype=torch.long), torch.arange(first, first + n))  # noqa: E731
    taps = tiny_llama.layout.pick(Selection.parse(None).sites(tiny_llama.layout.n_layers))
    with torch.no_grad(), capturing(tiny_llama.model, taps, tiny_llama.layout.embedding, keep, 1) as recording:
        cache = cache_in(tiny_llama.model(ids[:, :3], use_cache=True))
        tiny_llama.model(ids[:, 3:], use_cache=True, **{str(cache_name(tiny_llama.model)): cache})
    with torch.no_grad():
        expected = tiny_llama.model(ids, output_hidden_states=True).hidden_states[1][0]
    assert recording.fed(0) == [7] * 9
    assert_near(recording.take(0, range(9))["layer_0"], expected)
