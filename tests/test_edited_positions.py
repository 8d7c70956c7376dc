"""Edits at positions: the tokens of a prompt or of a response, in left-padded batches, in decode steps and in lm-eval's requests.

The truth is a raw hook on one unpadded row, which is run anew for each token, without a cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.models import ALL, CONFIGS, build
from helpers.raw_hooks import n_hooks
from helpers.tasks import loglikelihoods
from torch import Tensor

from AutomaticEval import Edit, editing, evaluate, generate_inference, load_model, score_continuations
from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.errors import EditError, ModelError, SelectionError, UnknownLayer, UnknownPositions, UnknownSite
from AutomaticEval.evaluation.harness.model import CapturingHFLM
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.selection import Selection

N_NEW = 6
PROMPTS = [[5, 9, 33, 7, 120, 41, 8], [77, 3, 250], [31, 6, 90, 14, 15]]
VECTOR = 0.8 * torch.randn(32, generator=torch.Generator().manual_seed(5))

ASKED = "What is the capital of France?"

POSITIONS: dict[Any, Callable[[int, int], range]] = {
    "all": lambda n, end: range(end),
    "prompt": lambda n, end: range(n),
    "response": lambda n, end: range(n, end),
    "scored": lambda n, end: range(n - 1, end),
    "last": lambda n, end: range(n - 1, n),
    "prompt[-1]": lambda n, end: range(n - 1, n),
    "-2:": lambda n, end: range(n - 2, n),
    "prompt[1:3]": lambda n, end: range(1, 3),
    "response[:2]": lambda n, end: range(n, min(n + 2, end)),
    "response[1::2]": lambda n, end: range(n + 1, end, 2),
    "scored[:2]": lambda n, end: range(n - 1, min(n + 1, end)),
}
"""Positions -> the columns of one unpadded row that they are, of n tokens of the prompt and `end` tokens that are fed."""


@contextmanager
def raw(model: Any, layer: int, columns: range) -> Iterator[None]:
    def add(module: Any, args: Any, output: Any) -> Any:
        changed = (output[0] if isinstance(output, tuple) else output).clone()
        changed[0, columns.start : min(columns.stop, changed.shape[1]) : columns.step] += VECTOR
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    handle = blocks[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def truth(model: Any, prompt: list[int], layer: int, chosen: Callable[[int, int], range]) -> tuple[list[int], Tensor]:
    """The greedy answer, and what the last block received in the forward over all fed tokens [n, width]."""
    ids, seen = list(prompt), []
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    handle = blocks[-1].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()[0]))
    for _ in range(N_NEW):
        with raw(model, layer, chosen(len(prompt), len(ids))), torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    handle.remove()
    return ids[len(prompt) :], seen[-1]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_answers_and_rows_of_a_padded_batch_are_those_of_one_row_with_raw_hooks(
    name: str, positions: str, tokenizer: Any
) -> None:
    model = build(CONFIGS[name]())
    model.generation_config.eos_token_id = None
    loaded = LoadedModel(model, tokenizer, name)
    before = n_hooks(model)
    selection = Selection.parse("resid_pre", -1, "all")
    with editing(model, Edit.add("layer_0", VECTOR, positions=positions)):
        found = respond(loaded, PROMPTS, Sampling(max_new_tokens=N_NEW), selection)
        plain = respond(loaded, PROMPTS, Sampling(max_new_tokens=N_NEW))
    assert n_hooks(model) == before
    for prompt, answer, uncaptured in zip(PROMPTS, found, plain, strict=True):
        tokens, rows = truth(model, prompt, 0, POSITIONS[positions])
        assert answer.generated_ids == uncaptured.generated_ids == tokens
        assert answer.sample is not None
        kept = torch.cat(
            [part.rows.activations[f"layer_{len(list(blocks(model))) - 1}.resid_pre"] for part in answer.sample.parts]
        )
        torch.testing.assert_close(kept, rows, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["prompt", "response", "prompt[-5:]"])
def test_prompts_of_one_length_are_edited_as_each_by_itself(positions: str, demo: LoadedModel) -> None:
    """transformers drops the mask of a batch without padding. The sums of the demo benchmark are of few lengths, so that batches have none."""
    vector = 5 * torch.randn(128, generator=torch.Generator().manual_seed(3))
    with editing(demo, Edit.add("layer_1", vector, positions=positions)):
        one, together = (
            [
                entry["resps"]
                for entry in evaluate(demo, "demo_arithmetic", limit=16, batch_size=size).samples["demo_arithmetic"]
            ]
            for size in (1, 8)
        )
        prompts = [[5, 9, 33, 7], [77, 3, 250, 8], [31, 6, 90, 14]]
        batch = respond(demo, prompts, Sampling(max_new_tokens=N_NEW))
        alone = [respond(demo, [prompt], Sampling(max_new_tokens=N_NEW))[0] for prompt in prompts]
    assert one == together
    assert [each.generated_ids for each in batch] == [each.generated_ids for each in alone]
    plain = evaluate(demo, "demo_arithmetic", limit=16, batch_size=8).samples["demo_arithmetic"]
    assert one != [entry["resps"] for entry in plain]  # or the edit would not be seen


def blocks(model: Any) -> Any:
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def test_the_positions_are_told_apart(tiny_llama: LoadedModel) -> None:
    """The truths themselves differ, or the test above would tell nothing."""
    rows = {name: truth(tiny_llama.model, PROMPTS[0], 0, chosen)[1] for name, chosen in POSITIONS.items()}
    del rows["prompt[-1]"]  # which is last
    sums = {name: float(each.double().abs().sum()) for name, each in rows.items()}
    assert len(set(sums.values())) == len(sums), sums


def test_a_slice_object_is_of_the_prompt(tiny_llama: LoadedModel) -> None:
    assert (
        Edit.add("layer_0", 1.0, positions=slice(-2, None)).positions
        == Edit.add("layer_0", 1.0, positions="-2:").positions
    )
    assert Edit.add("layer_0", 1.0, positions="all").positions is None
    assert not Edit.add("layer_0", VECTOR, positions="all").is_by_position


@pytest.mark.parametrize("scoring", ["tree", "stock"])
@pytest.mark.parametrize("positions", ["prompt", "response", "last", "scored", "response[1:]"])
@pytest.mark.parametrize("captures", [False, True])
def test_requests_of_lm_eval_know_their_prompt_from_their_continuation(
    captures: bool, positions: str, scoring: str, tiny_llama: LoadedModel
) -> None:
    """Scores of batches that lm-eval pads on the right are those of one row with a raw hook."""
    model = tiny_llama.model
    pairs = [("What is the capital of", " France, they say"), ("Tell me", " more of it"), ("One, two", " three")]
    selection = Selection.parse("resid_post", None, "all") if captures else None
    with editing(tiny_llama, Edit.add("layer_0", VECTOR, positions=positions)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = CapturingHFLM(tiny_llama, selection, lambda samples: None, scoring=scoring, batch_size=3)
        found = lm.loglikelihood(loglikelihoods(pairs), disable_tqdm=True)
    for (context, continuation), (score, _) in zip(pairs, found, strict=True):
        whole, n = (
            lm._encode_pair(context, continuation)[0] + lm._encode_pair(context, continuation)[1],
            len(lm._encode_pair(context, continuation)[0]),
        )
        with (
            raw(model, 0, POSITIONS.get(positions, lambda n, end: range(n + 1, end))(n, len(whole) - 1)),
            torch.no_grad(),
        ):
            logits = model(torch.tensor([whole[:-1]]), use_cache=False).logits[0].log_softmax(-1)
        expected = sum(float(logits[at - 1, whole[at]]) for at in range(n, len(whole)))
        assert score == pytest.approx(expected, abs=1e-4)


def test_a_graph_is_left_by_name(tapes: None, tiny_llama: LoadedModel) -> None:
    edit = Edit.add("layer_0", VECTOR, positions="response")
    how = {"max_new_tokens": N_NEW}
    with editing(tiny_llama, edit):
        eager = respond(tiny_llama, PROMPTS, Sampling(generation="eager", **how))
        with pytest.warns(UserWarning, match="step by step.*edited at certain rows or columns"):
            found = respond(tiny_llama, PROMPTS, Sampling(generation="auto", **how))
    assert [each.generated_ids for each in found] == [each.generated_ids for each in eager]


def test_a_kind_of_site_with_layers_is_each_of_them(tiny_llama: LoadedModel) -> None:
    def answer(*edits: Edit) -> list[list[int]]:
        with editing(tiny_llama, edits):
            return [each.generated_ids for each in respond(tiny_llama, PROMPTS, Sampling(max_new_tokens=N_NEW))]

    how: dict[str, Any] = {"positions": "scored"}
    single = answer(Edit.add("layer_0", VECTOR, **how), Edit.add("layer_2", VECTOR, **how))
    assert answer(Edit.add("resid_post", VECTOR, layers=[0, -1], **how)) == single
    assert answer(Edit.add("resid_post", VECTOR, layers="0,2", **how)) == single
    assert answer(Edit.add("resid_post", VECTOR, layers=2)) == answer(Edit.add("layer_2", VECTOR))
    assert answer(Edit.scale("z", 0.0, layers=range(2), heads=[1])) == answer(
        Edit.scale("layer_0.z", 0.0, heads=[1]), Edit.scale("layer_1.z", 0.0, heads=[1])
    )


def test_editing_takes_a_name_and_gives_the_model() -> None:
    edit = Edit.add("layer_1", torch.full((128,), 2.0), positions="scored")
    plain = generate_inference(ASKED, "demo", max_new_tokens=8)
    with editing("demo", edit) as model:
        edited = generate_inference(ASKED, model, max_new_tokens=8)
        assert edited != plain
    with editing(load_model("demo"), edit) as loaded:
        assert generate_inference(ASKED, loaded, max_new_tokens=8) == edited
    with editing("demo", edit, dtype="bfloat16") as half:
        assert half.model.dtype == torch.bfloat16
    assert generate_inference(ASKED, "demo", max_new_tokens=8) == plain
    with pytest.raises(EditError, match="found int"), editing(3, edit):
        pass
    with pytest.raises(TypeError, match="no option 'dtpye'"), editing("demo", edit, dtpye="float32"):  # type: ignore[call-arg]
        pass


def test_a_name_never_gives_a_model_that_is_being_edited() -> None:
    edit = Edit.add("layer_1", torch.full((128,), 2.0))
    ways = [
        lambda: generate_inference(ASKED, "demo", max_new_tokens=8),
        lambda: evaluate("demo", "demo_facts", limit=1),
        lambda: load_model("demo"),
        lambda: editing("demo", edit).__enter__(),
    ]
    with editing("demo", edit):
        for ask in ways:
            with pytest.raises(ModelError, match=r"'demo' names the plain model.* as model"):
                ask()
        assert load_model("demo", dtype="float64").model.dtype == torch.float64  # loaded by itself, and not edited
    with editing(load_model("demo"), edit) as model:
        with pytest.raises(ModelError, match="names the plain model"):
            load_model("demo")
        with editing(model, Edit.scale("layer_1", 1.0)) as same:
            assert same is model
    assert ways[0]()


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Edit.add("layer_0", 1.0, positions="lats"), UnknownPositions, "lats"),
        (
            lambda: Edit.add("layer_0", 1.0, positions="response[-3:]"),
            EditError,
            r"end of the response.*response\[:8\]",
        ),
        (lambda: Edit.add("layer_0", 1.0, positions="last", where=lambda *_: None), EditError, "where and positions"),
        (
            lambda: Edit.add("layer_0", 1.0, position="last"),
            TypeError,
            "no option 'position'. Did you mean 'positions'",
        ),
        (lambda: Edit.add("layer_0", 1.0, layers=2).in_layers(3), SelectionError, "layer_0 name their layers"),
        (lambda: Edit.add("logits", 1.0, layers=2).in_layers(3), EditError, "logits, which a model has once"),
        (lambda: Edit.add("resid_post", 1.0, layers=7).in_layers(3), UnknownLayer, "no layer 7"),
        (lambda: Edit.add("resid_pots", 1.0, layers=7).in_layers(3), UnknownSite, "resid_post"),
    ],
)
def test_wrong_places_are_refused(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_what_is_a_prompt_is_never_guessed(tiny_llama: LoadedModel) -> None:
    model, ids = tiny_llama.model, torch.tensor(PROMPTS[:1])
    edit = Edit.add("layer_0", VECTOR, positions="response")
    with editing(model, edit), torch.no_grad():
        with pytest.raises(EditError, match="fed in one forward"):
            model.generate(ids, max_new_tokens=4, prefill_chunk_size=3)
        whole = torch.zeros(1, 1, 7, 7)
        with pytest.raises(EditError, match=r"attention mask is \(1, 1, 7, 7\)"):
            model(ids, attention_mask=whole)
        with pytest.raises(EditError, match="part of the model is run"):
            model.model(ids)


@pytest.mark.parametrize("name", ["rwkv", "gpt-1", "mamba"])
def test_models_that_do_not_say_how_many_tokens_came_before_are_refused(name: str, tokenizer: Any) -> None:
    loaded = LoadedModel(build(ALL[name]()), tokenizer, name)
    with (
        pytest.raises(EditError, match=r"positions cannot be given for \w+"),
        editing(loaded, Edit.add("embeddings", 1.0, positions="response")),
    ):
        pass


def test_tokens_that_are_fed_again_are_refused(tiny_llama: LoadedModel) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with editing(tiny_llama, Edit.add("layer_0", 1.0, positions="response")) as edited:
        with pytest.raises(EditError, match=r"feeds the tokens of those before again, and one more"):
            edited.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, use_cache=False
            )
        edited.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        edited.model(ids)
        edited.model(torch.cat([ids, ids], dim=1))  # another prompt that begins alike
        with pytest.raises(EditError, match="pass attention_mask"):
            edited.model(torch.cat([ids, ids]))


@pytest.mark.parametrize("positions", ["prompt", "response", "scored", "last", "prompt[-1:]"])
def test_continuations_of_several_tokens_are_edited_where_they_are(positions: str, demo: LoadedModel) -> None:
    """Against an edit of columns that are counted by hand, in one plain forward."""
    request = ("What is red? The", " fox is red")
    n_context = len(demo.tokenizer(request[0])["input_ids"])
    ids = demo.tokenizer(request[0] + request[1])["input_ids"]
    n_response = len(ids) - n_context
    assert n_response > 1
    columns = {
        "prompt": range(n_context),
        "response": range(n_context, len(ids) - 1),
        "scored": range(n_context - 1, len(ids) - 1),
        "last": [n_context - 1],
        "prompt[-1:]": [n_context - 1],
    }[positions]
    vector = torch.randn(128, generator=torch.Generator().manual_seed(1)) * 3

    def add(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[:, list(columns)] += vector
        return changed

    handle = demo.model.model.layers[1].register_forward_hook(add)
    with torch.no_grad():
        logits = demo.model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    handle.remove()
    expected = sum(float(logits[n_context - 1 + number, token]) for number, token in enumerate(ids[n_context:]))
    with editing(demo, Edit.add("layer_1", vector, positions=positions)) as edited:
        (found,) = score_continuations([request], edited)
    assert found.logprob == pytest.approx(expected, abs=1e-4)
