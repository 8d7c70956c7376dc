"""Interventions: exact, gone with their `with`, the same in one forward, in generation with its cache and in lm-eval's runs."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.models import CONFIGS, FAMILIES, SIZES, build
from helpers.raw_hooks import n_hooks
from helpers.tasks import loglikelihoods
from lm_eval.api.instance import Instance
from torch import Tensor

from AutomaticEval import Edit, editing, evaluate_with_activations, open_run
from AutomaticEval.errors import CaptureError, EditError, OtherSettings, SiteUnavailable, UnknownSite
from AutomaticEval.evaluation.harness.model import CapturingHFLM
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.recording import Kept, capturing
from AutomaticEval.sites import Site, expand

IDS = torch.tensor([[5, 9, 33, 7, 120, 41, 8], [77, 3, 3, 250, 31, 6, 90]])


@pytest.fixture(params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> Any:
    return build(FAMILIES[request.param]())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits  # type: ignore[no-any-return]


def captured(model: Any, edits: list[Edit], *kinds: str, around: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Key -> [2 * 7, width] of IDS, and the logits, with edits; capturing within the edits, or around them."""
    layout = find_layout(model)
    taps = layout.pick(expand(kinds, None, layout.n_layers))
    every = Kept(torch.arange(2).repeat_interleave(7), torch.arange(7).repeat(2))
    contexts = [
        lambda: editing(model, edits),
        lambda: capturing(model, taps, layout.embedding, lambda *_: every, 2),
    ]
    first, second = reversed(contexts) if around else contexts
    with first() as outer, second() as inner:
        out = logits(model)
    recording = outer if around else inner
    assert recording is not None
    rows = [recording.take(row, range(7)) for row in range(2)]
    return {key: torch.cat([each[key] for each in rows]) for key in taps}, out


def present(model: Any, *kinds: str) -> list[str]:
    return [kind for kind in kinds if not find_layout(model).lacking(kind)]


def test_its_own_values_change_nothing(model: Any) -> None:
    """To the last bit, at every site that the model has; but where a multiplier stands between, to rounding."""
    kinds = present(model, "embed", "resid_pre", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "mlp_post")
    kinds = [*kinds, "final_norm", "logits"]
    values, expected = captured(model, [], *kinds)
    scaled = model.config.model_type == "granite"
    for key, own in values.items():
        edit = Edit.replace(key, own.view(2, 7, -1))
        with editing(model, [edit]):
            found = logits(model)
        if scaled and key.endswith(("attn_out", "mlp_out")):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(found, expected), key


def test_another_runs_stream_gives_its_logits(model: Any) -> None:
    """The stream after one block replaced by that of other tokens: from there on it is that run."""
    others = IDS.flip(0)
    with torch.no_grad():
        expected = model(others, use_cache=False).logits
    n_layers = find_layout(model).n_layers
    for key in ["embeddings", *(f"layer_{layer}" for layer in range(n_layers))]:
        values, _ = captured(model, [], "embed", "resid_post")
        with editing(model, [Edit.replace(key, values[key].view(2, 7, -1).flip(0))]):
            if model.config.model_type == "mixtral":  # experts take their tokens in another order
                assert torch.allclose(logits(model), expected, atol=1e-5), key
            else:
                assert torch.equal(logits(model), expected), key


def test_all_heads_ablated_leave_the_bias(model: Any) -> None:
    """Heads one by one, all of them at once, and the output projection given zeros: the same."""
    layout = find_layout(model)
    edits = [Edit.scale("layer_1.z", 0.0, heads=[head]) for head in range(layout.n_heads)]
    one_by_one, out = captured(model, edits, "z", "attn_out")
    _, expected = captured(model, [Edit.replace("layer_1.z", 0.0)], "z", "attn_out")
    assert torch.equal(out, expected)
    assert not one_by_one["layer_1.z"].any()
    projection = model.get_submodule(layout.taps[Site("z", 1)].module)
    zeros = torch.zeros(1, layout.n_heads * layout.d_head)
    if model.config.model_type in ("llama", "gpt2", "gpt_neo", "phi"):
        with torch.no_grad():
            bias = projection(zeros)[0]
        assert torch.equal(one_by_one["layer_1.attn_out"], bias.expand(14, -1))
    assert not torch.equal(out, logits(model))


def test_one_head_is_changed_and_no_other(model: Any) -> None:
    layout = find_layout(model)
    plainly, _ = captured(model, [], "z")
    found, _ = captured(model, [Edit.scale("layer_0.z", 2.0, heads=[1, 3])], "z")
    expected = plainly["layer_0.z"].view(14, layout.n_heads, layout.d_head).clone()
    expected[:, [1, 3]] *= 2
    assert torch.equal(found["layer_0.z"], expected.flatten(1))


@pytest.mark.parametrize("around", [False, True])
def test_what_is_captured_is_what_the_next_part_receives(around: bool, tiny_llama: LoadedModel) -> None:
    model = tiny_llama.model
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    edits = [Edit.add("layer_0", direction), Edit.project_out("layer_0", direction), Edit.add("layer_0", 1.0)]
    found, out = captured(model, edits, "resid_post", "resid_pre", around=around)
    plainly, before = captured(model, [], "resid_post")
    unit = direction / direction.norm()
    without = plainly["layer_0"] - (plainly["layer_0"] @ unit)[:, None] * unit
    torch.testing.assert_close(found["layer_0"], without + 1.0, atol=1e-5, rtol=1e-5)
    assert torch.equal(found["layer_0"], found["layer_1.resid_pre"])
    assert not torch.equal(out, before)


def test_some_positions_of_some_rows(tiny_llama: LoadedModel) -> None:
    where = Kept(torch.tensor([1, 1]), torch.tensor([2, 5]))
    found, _ = captured(tiny_llama.model, [Edit.replace("layer_1.z", 0.0, where=lambda *_: where)], "z")
    plainly, _ = captured(tiny_llama.model, [], "z")
    changed = (found["layer_1.z"] != plainly["layer_1.z"]).any(-1).nonzero().flatten().tolist()
    assert changed == [7 + 2, 7 + 5]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_generation_with_a_cache_is_generation_without(name: str) -> None:
    """Every decode step is edited: as a forward over the whole sequence is, token after token."""
    model = build(CONFIGS[name]())
    edits = [Edit.scale("layer_0.z", 0.0, heads=[2]), Edit.add("layer_1", 0.5)]
    ids = IDS[:1]
    with editing(model, edits), torch.no_grad():
        found = model.generate(ids, max_new_tokens=8, do_sample=False)
        for _ in range(found.shape[1] - ids.shape[1]):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)
    assert not torch.equal(found, model.generate(IDS[:1], max_new_tokens=8, do_sample=False))


def test_positions_go_on_over_decode_steps(tiny_llama: LoadedModel) -> None:
    """The columns of a step follow on those before it."""
    seen: list[tuple[int, int]] = []

    def where(first: int, n_columns: int) -> None:
        seen.append((first, n_columns))

    with editing(tiny_llama.model, [Edit.replace("layer_0", 0.0, where=where)]):
        tiny_llama.model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        tiny_llama.model.generate(IDS, max_new_tokens=2, min_new_tokens=2, do_sample=False)  # which begins anew
        logits(tiny_llama.model)
        logits(tiny_llama.model)
    assert seen == [(0, 7), (7, 1), (8, 1), (0, 7), (7, 1), (0, 7), (0, 7)]


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_edits_by_column_are_made_in_lm_evals_own_batches(kind: str, demo: LoadedModel) -> None:
    """What is shared is not computed once, since it would be edited in other columns there."""
    vector = torch.full((128,), 3.0)

    def last_column(found: Tensor) -> Tensor:
        changed = found.clone()
        changed[:, -1] += vector
        return changed

    shared = "Here is what is asked of you, and you shall answer it. " * 4
    texts = [shared + "A?", shared + "What is red, and why?"]
    pairs = [(text, " red") for text in texts] if kind == "loglikelihood" else []
    asked = loglikelihoods(pairs) or [
        Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 8}), 0, metadata=("t", at, 1))
        for at, text in enumerate(texts)
    ]
    found = []
    with editing(demo.model, Edit("layer_0", last_column)):
        for scoring in ("tree", "stock"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lm = CapturingHFLM(demo, None, list, scoring=scoring, batch_size=2)
                found.append(getattr(lm, kind)(asked))
    assert found[0] == found[1]


def test_runs_name_their_edits_and_are_not_resumed_with_others(demo: LoadedModel, tmp_path: Path) -> None:
    edit = Edit.add("layer_1", torch.ones(128))
    with editing(demo.model, edit):
        outcome = evaluate_with_activations(demo, "demo_facts", limit=2, activation_save_dir=tmp_path)
    (name,) = open_run(outcome.folder or "").settings["edits"]
    assert name.startswith("add [128] ")
    assert name.endswith(" at layer_1")
    (Path(outcome.folder or "") / "run.h5").unlink()  # as if it had been killed before its last step
    for again in (nullcontext(), editing(demo.model, Edit.add("layer_1", torch.full((128,), 2.0)))):
        with again, pytest.raises(OtherSettings, match="edits"):
            evaluate_with_activations(demo, "demo_facts", limit=2, resume=outcome.folder)


def test_forwards_that_fail_and_are_made_again(tiny_llama: LoadedModel) -> None:
    """As after a lack of memory."""
    fails = [True]

    def sometimes(module: Any, args: Any) -> None:
        if fails.pop():
            raise torch.OutOfMemoryError("out of memory")
        fails.append(False)

    handle = tiny_llama.model.model.layers[1].mlp.register_forward_pre_hook(sometimes)
    with editing(tiny_llama.model, Edit.scale("layer_2.z", 0.0)):
        with pytest.raises(torch.OutOfMemoryError):
            logits(tiny_llama.model)
        fails.append(False)
        logits(tiny_llama.model)
    handle.remove()


def test_layouts_are_not_looked_for_within_edits() -> None:
    """transformers leaves hooks of its own once hidden states were asked for."""
    model = build(CONFIGS["gpt_neox"]())
    with torch.no_grad():
        model(IDS, output_hidden_states=True)
    seen = []
    with editing(model, Edit("layer_0", lambda found: seen.append(1) or found * 2)):
        assert find_layout(model).n_layers == 3
    assert not seen


def test_logits_of_named_columns_are_refused(tiny_llama: LoadedModel) -> None:
    kept = Kept(torch.tensor([0]), torch.tensor([5]))
    some = {"input_ids": IDS, "logits_to_keep": torch.tensor([1, 5])}
    with (
        pytest.raises(EditError, match="names columns"),
        editing(tiny_llama.model, Edit.add("logits", 1.0, where=lambda *_: kept)),
    ):
        tiny_llama.model(**some)
    layout = find_layout(tiny_llama.model)
    taps = layout.pick([Site("logits")])
    with (
        pytest.raises(CaptureError, match="names columns"),
        capturing(tiny_llama.model, taps, layout.embedding, lambda *_: kept, 2),
    ):
        tiny_llama.model(**some)


@pytest.mark.parametrize("scoring", ["tree", "stock"])
def test_benchmark_over_an_edited_model(scoring: str, demo: LoadedModel, tmp_path: Any) -> None:
    """Scores and rows are those of a model whose weights were changed to the same effect."""
    how: dict[str, Any] = {"limit": 8, "scoring": scoring, "sites": "z,resid_post", "positions": "all"}
    projection = demo.model.model.layers[1].self_attn.o_proj
    d_head = find_layout(demo.model).d_head
    with editing(demo.model, [Edit.scale("layer_1.z", 0.0, heads=[1])]):
        edited = evaluate_with_activations(demo, "demo", activation_save_dir=tmp_path / "edited", **how)
    weight = projection.weight.detach().clone()
    with torch.no_grad():
        projection.weight[:, d_head : 2 * d_head] = 0
    try:
        expected = evaluate_with_activations(demo, "demo", activation_save_dir=tmp_path / "changed", **how)
    finally:
        with torch.no_grad():
            projection.weight.copy_(weight)
    plainly = evaluate_with_activations(demo, "demo", activation_save_dir=tmp_path / "plain", **how)
    answers = [
        [each["resps"] for task in sorted(outcome.samples) for each in outcome.samples[task]]
        for outcome in (edited, expected, plainly)
    ]
    assert flat(answers[0]) == pytest.approx(flat(answers[1]), abs=1e-4)
    assert flat(answers[0]) != pytest.approx(flat(answers[2]), abs=1e-2)


def flat(values: Any) -> list[float]:
    """The numbers in nested answers; a text counts by its length."""
    if isinstance(values, list | tuple):
        return [number for value in values for number in flat(value)]
    return [float(len(values)) if isinstance(values, str) else float(values)]


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (Edit.replace("layer_0.head", 0.0), UnknownSite, "layer_0.head"),
        (Edit.replace("layer_9.z", 0.0), SiteUnavailable, "layer_9.z"),
        (Edit.replace("layer_0.resid_mid", 0.0), EditError, "attn_out"),
        (Edit.scale("layer_0.z", 0.0, heads=[4]), EditError, "no head 4: it has 4"),
        (Edit.scale("layer_0.k", 0.0, heads=[2]), EditError, "no head 2: it has 2"),
        (Edit.scale("layer_0.mlp_out", 0.0, heads=[0]), EditError, "has no heads"),
        (Edit.scale("layer_0.z", 0.0, heads=[]), EditError, "write a list of numbers"),
        (Edit.scale("layer_0.z", 0.0, heads=5), EditError, "write a list of numbers"),
        (Edit.scale("layer_0.z", 0.0, heads=[1.0]), EditError, "no head 1.0; write numbers"),
        (Edit.add("layer_0", torch.ones(5)), EditError, r"of shape \[5\]; expected \[32\], the d_model of this model"),
        (Edit.project_out("layer_0", torch.ones(1)), EditError, r"of shape \[1\]; expected \[32\]"),
        (Edit.replace("layer_0.z", torch.ones(32), heads=[1]), EditError, r"expected \[8\] of 1 heads, the d_head"),
        (Edit.replace("layer_0.z", torch.ones(3, 8), heads=[1, 2]), EditError, r"expected \[8\] of 2 heads"),
        (Edit.add("layer_0", torch.ones(3, 2, 32)), EditError, r"failed on values of shape \[2, 7, 32\]"),
        (Edit("layer_0", lambda found: None), EditError, "gave values of NoneType"),
        (
            Edit.replace("layer_0", 0.0, where=lambda *_: Kept(torch.tensor([0]), torch.tensor([9]))),
            EditError,
            r"\[2, 7\]",
        ),
        (Edit("layer_0", lambda found: found[..., :3]), EditError, r"shape \[2, 7, 3\]; expected \[2, 7, 32\]"),
    ],
)
def test_edits_that_cannot_be_made(edit: Edit, error: type[Exception], says: str, tiny_llama: LoadedModel) -> None:
    before = n_hooks(tiny_llama.model)
    expected = logits(tiny_llama.model)
    with pytest.raises(error, match=says), editing(tiny_llama.model, [Edit.add("layer_1", 1.0), edit]):
        logits(tiny_llama.model)
    assert n_hooks(tiny_llama.model) == before
    assert torch.equal(logits(tiny_llama.model), expected)


def test_no_direction_is_refused() -> None:
    with pytest.raises(EditError, match="length 0"):
        Edit.project_out("layer_0", torch.zeros(32))


def test_weights_are_untouched_and_hooks_gone(tiny_llama: LoadedModel) -> None:
    model = tiny_llama.model
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def failing() -> None:
        logits(model)
        raise KeyError

    with pytest.raises(KeyError), editing(model, [Edit.scale("layer_0.z", 0.0)]):
        failing()
    assert not n_hooks(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_mixtures_of_experts_are_edited_as_any_other() -> None:
    """Mixtures of experts give their tokens as one axis inside; outside they are edited as any other."""
    model = build(hf.MixtralConfig(**SIZES, num_local_experts=4))
    found, _ = captured(model, [Edit.replace("layer_0.mlp_out", 0.0)], "resid_post", "mlp_out", "attn_out", "resid_pre")
    assert not found["layer_0.mlp_out"].any()
    assert torch.allclose(found["layer_0"], found["layer_0.resid_pre"] + found["layer_0.attn_out"], atol=1e-6)
