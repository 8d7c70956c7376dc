"""Models with adapters: what is read and changed is what runs, whichever way they are called."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers.models import CONFIGS, build
from helpers.raw_hooks import BLOCKS, n_hooks, raw_residuals
from torch import Tensor

from AutomaticEval import (
    evaluate_with_activations,
    generate_inference_with_activations,
    load_model,
    open_run,
    using_adapter,
)
from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.errors import EditError, ModelError, ModelUnavailable, UnsupportedModel
from AutomaticEval.models.architecture.inner_model import inner
from AutomaticEval.models.attention import check_patterns
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.edit import Edit
from AutomaticEval.models.edited_models import depends_on_position, layout_of, names_of
from AutomaticEval.models.editing import editing
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.recording import Kept, capturing
from AutomaticEval.models.weights.fingerprint import fingerprint
from AutomaticEval.selection import Selection
from AutomaticEval.sites import Site

peft = pytest.importorskip("peft", reason="models with adapters need peft: pip install peft")

PROMPTS = [[5, 17, 99, 3, 250, 41], [7, 8, 9]]
STATES = ("unmerged", "merge_adapter")


def adapted(name: str, state: str = "unmerged", **config: Any) -> Any:
    """A tiny model with a random LoRA adapter in all its linear layers, or in what config says."""
    config = {"target_modules": "all-linear", "r": 4, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(build(CONFIGS[name]()), peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "lora_" in path or "trainable_tokens_delta" in path or "modules_to_save" in path:
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
    if state == "merge_adapter":
        model.merge_adapter()
    return model


def merged(model: Any) -> Any:
    """The same weights in a plain model: the adapter's are added to those that they adapt."""
    return deepcopy(model).merge_and_unload()


def generated(model: Any, ids: list[int], n_tokens: int = 4) -> Tensor:
    with torch.no_grad():
        return model.generate(  # type: ignore[no-any-return]
            input_ids=torch.tensor([ids]), max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False
        )


def steps(model: Any, ids: list[int]) -> Tensor:
    """The logits that three tokens are chosen by: [3, d_vocab]."""
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.tensor([ids]),
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.cat(found.logits)


@pytest.fixture(params=["llama", "gpt2", "gpt_neox"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=STATES)
def model(request: pytest.FixtureRequest, name: str) -> Any:
    return adapted(name, request.param)


def test_rows_of_a_generation_are_those_of_the_merged_model(model: Any, name: str, tokenizer: Any) -> None:
    """Logits and stream, read while the model with adapters generates, against raw hooks on the merged one."""
    selection = Selection.parse("embed,resid_post,z,logits", None, "scored")
    plain, before = merged(model), n_hooks(model)
    for ids in PROMPTS:
        (response,) = respond(LoadedModel(model, tokenizer, "adapted"), [ids], Sampling(max_new_tokens=4), selection)
        assert response.sample is not None
        rows = dict(response.sample.activation_data("m", {})["activations"])
        fed = [*ids, *response.generated_ids][: len(ids) + len(response.generated_ids) - 1]
        expected = raw_residuals(plain, name, fed)
        with torch.no_grad():
            expected["logits"] = plain(torch.tensor([fed]), use_cache=False).logits[0]
        for key, value in expected.items():
            torch.testing.assert_close(rows[key], value[len(ids) - 1 :], atol=1e-4, rtol=1e-4)
    assert n_hooks(model) == before


def test_logits_are_those_of_the_inner_models_own_hook(model: Any) -> None:
    """In every way of calling it, to the last bit."""
    layout, seen = find_layout(model), []
    every = lambda first, n: Kept(torch.zeros(n, dtype=torch.long), torch.arange(first, first + n))  # noqa: E731
    ids = torch.tensor(PROMPTS[:1])
    ways: list[Callable[[], Any]] = [
        lambda: model(ids),
        lambda: model.base_model(ids),
        lambda: model.get_base_model()(ids),
    ]
    with torch.no_grad():
        for way in ways:
            handle = model.get_base_model().register_forward_hook(lambda *given: seen.append(given[2].logits[0]))
            with capturing(model, layout.pick([Site("logits")]), layout.embedding, every, 1) as found:
                way()
            handle.remove()
            assert torch.equal(found.rows["logits"], seen.pop())


def test_edit_of_logits_is_made_in_generation(model: Any) -> None:
    """A token is forbidden by an edit, and by a hook of the test's own on the module that runs."""
    plain = merged(model)
    forbidden = generated(plain, PROMPTS[0])[0, len(PROMPTS[0])]
    bias = torch.zeros(400)
    bias[forbidden] = -1e4
    handle = plain.register_forward_hook(lambda module, args, out: out.__class__({**out, "logits": out.logits + bias}))
    expected = generated(plain, PROMPTS[0])
    handle.remove()
    with editing(model, Edit.add("logits", bias)):
        found = generated(model, PROMPTS[0])
    assert torch.equal(found, expected)
    assert not torch.equal(found, generated(model, PROMPTS[0]))


def test_columns_begin_anew_with_the_second_prompt(model: Any, name: str) -> None:
    """An edit of the second column alone, in both prompts: as a hook that counts the columns for itself makes it."""
    asked: list[tuple[int, int]] = []
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(2))

    def where(first: int, n_columns: int) -> Kept | None:
        asked.append((first, n_columns))
        return Kept(torch.tensor([0]), torch.tensor([1])) if first == 0 else None

    with editing(model, Edit.add("layer_1", vector, where=where)):
        found = [steps(model, ids) for ids in PROMPTS]
    assert asked == [(0, 6), (6, 1), (7, 1), (0, 3), (3, 1), (4, 1)]

    def second_column(module: Any, args: Any, kwargs: Any) -> Any:
        stream = (args[0] if args else kwargs["hidden_states"]).clone()
        if stream.shape[1] > 1:
            stream[:, 1] += vector
        return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})

    plain = merged(model)
    handle = plain.get_submodule(BLOCKS[name])[2].register_forward_pre_hook(second_column, with_kwargs=True)
    expected = [steps(plain, ids) for ids in PROMPTS]
    handle.remove()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert all((one - steps(plain, ids)).abs().max() > 0.01 for one, ids in zip(found, PROMPTS, strict=True))


def test_edits_are_the_merged_models(model: Any) -> None:
    """Heads, stream and logits, in one forward, whichever way it is called."""
    plain, ids = merged(model), torch.tensor(PROMPTS[:1])
    edits = [Edit.scale("layer_0.z", 0.0, heads=[2]), Edit.add("layer_1", 0.5), Edit.scale("logits", 2.0)]
    with torch.no_grad():
        with editing(plain, edits):
            expected = plain(ids).logits
        for outer in (model, model.base_model, model.get_base_model()):
            for called in (model, model.base_model, model.get_base_model()):
                with editing(outer, edits):
                    torch.testing.assert_close(called(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_edits_are_those_of_every_way_of_naming_the_model() -> None:
    model = adapted("llama")
    base, asked = model.get_base_model(), []
    with editing(model, [Edit.scale("layer_0.z", 0.0), Edit("layer_1", lambda found: asked.append(1) or found * 2)]):
        assert names_of(base) == names_of(model) != []
        assert depends_on_position(base)
        assert layout_of(base) == layout_of(model)
        assert find_layout(base).taps[Site("z", 0)].module == "model.layers.0.self_attn.o_proj"
        assert find_layout(model).taps[Site("z", 0)].module == "base_model.model.model.layers.0.self_attn.o_proj"
    assert not asked
    assert names_of(base) == []


def test_paths_lead_to_the_same_modules() -> None:
    model = adapted("llama")
    outer, own = find_layout(model), find_layout(model.get_base_model())
    assert inner(model) is inner(model.base_model) is inner(model.get_base_model()) is model.get_base_model()
    assert model.get_submodule(outer.whole) is model.get_base_model()
    assert model.get_submodule(outer.embedding) is model.get_input_embeddings()
    assert outer.taps.keys() == own.taps.keys()
    for site, tap in outer.taps.items():
        assert model.get_submodule(tap.module) is inner(model).get_submodule(own.taps[site].module)
    assert find_layout(model) is outer


def test_patterns_are_read_through_the_adapters_model() -> None:
    model = adapted("llama")
    check_patterns(model, find_layout(model))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["o_proj", "lm_head", "down_proj"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 17, 41]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["v_proj"], "use_dora": True},
    ],
    ids=["embedding", "head", "tokens", "saved", "dora"],
)
def test_adapted_embeddings_and_heads(config: dict[str, Any], tokenizer: Any) -> None:
    model = adapted("llama", **config)
    plain, loaded = merged(model), LoadedModel(model, tokenizer, "adapted")
    assert not loaded.layout.missing
    (response,) = respond(
        loaded, PROMPTS[:1], Sampling(max_new_tokens=3), Selection.parse("embed,resid_post,final_norm")
    )
    assert response.sample is not None
    rows = dict(response.sample.activation_data("m", {})["activations"])
    for key, value in raw_residuals(plain, "llama", [*PROMPTS[0], *response.generated_ids][:-1]).items():
        torch.testing.assert_close(rows[key], value, atol=1e-4, rtol=1e-4)
    with editing(model, Edit.scale("layer_0.z", 0.0)), editing(plain, Edit.scale("layer_0.z", 0.0)):
        assert torch.equal(generated(model, PROMPTS[1]), generated(plain, PROMPTS[1]))


def several(how: str = "peft") -> Any:
    """A tiny Llama with two random adapters of different ranks, "low" and "high". The first is active."""
    kinds = {
        "low": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=2),
        "high": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj", "embed_tokens"], r=5, use_dora=False),
    }
    if how == "ia3":
        kind = peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]
        )
        kinds = {"low": kind, "high": deepcopy(kind)}
    model = build(CONFIGS["llama"]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "transformers":
            for name, config in kinds.items():
                model.add_adapter(config, name)
            model.set_adapter("low")
        else:
            model = peft.get_peft_model(model, kinds["low"], adapter_name="low")
            model.add_adapter("high", kinds["high"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "lora_" in path or "ia3" in path:
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return model.eval()


def state(model: Any) -> Any:
    """All that switching may change, as the test sees it: plain attributes of modules, what is trained, and the fingerprint."""
    plain = {
        path: {
            name: repr(value) for name, value in vars(module).items() if not name.startswith(("_forward", "_modules"))
        }
        for path, module in model.named_modules()
        if type(module).__module__.startswith("peft")
    }
    return plain, [(name, each.requires_grad) for name, each in model.named_parameters()], fingerprint(model)


@pytest.mark.parametrize("how", ["peft", "ia3", "transformers"])
def test_an_adapter_is_chosen_by_its_name_and_given_back(how: str, tokenizer: Any) -> None:
    """Rows by raw hooks on a model in which that adapter alone is active; the model that was given stays as it was."""
    model, rows = several(how), {}
    generated(model, PROMPTS[0])  # which leaves attributes of peft's on its modules
    before = state(model)
    ids = tokenizer("Who is it?")["input_ids"]
    for name in ("low", "high", "base", None):
        _, found = generate_inference_with_activations(
            "Who is it?", model, tokenizer=tokenizer, max_new_tokens=2, apply_chat_template=False, adapter=name
        )
        assert state(model) == before
        other = several(how)
        if name == "base":
            other = build(CONFIGS["llama"]())
        elif name is not None:
            other.set_adapter(name)
        inside = inner(other)
        expected = raw_residuals(inside, "llama", [*ids, *found["generated_ids"].tolist()][:-1])
        for key, value in expected.items():
            torch.testing.assert_close(found["activations"][key], value, atol=1e-5, rtol=1e-5)
        adapters = found["settings"]["adapters"]
        assert [each for each in adapters if adapters[each]["active"]] == ([] if name == "base" else [name or "low"])
        rows[name] = found["activations"]["layer_2"][len(ids) - 1]
    assert torch.equal(rows["low"], rows[None])
    assert len({float(each[0]) for each in rows.values()}) == 3


def test_a_model_is_given_back_after_an_error_and_names_are_told(tokenizer: Any) -> None:
    model = several()
    hashes = set()
    before = state(model)
    for name in ("low", "high", "base"):
        loaded = LoadedModel(model, tokenizer, "several")
        with suppress(ZeroDivisionError), using_adapter(loaded, name):
            hashes.add(loaded.fingerprint())
            1 / 0  # noqa: B018
        assert state(model) == before
    assert len(hashes) == 3
    with pytest.raises(ModelError, match=r"no adapter 'hihg'; it has low, high, and base"):
        evaluate_with_activations(model, "demo", tokenizer=tokenizer, adapter="hihg")
    with (
        pytest.raises(ModelError, match=r"no adapter 'low'; it has none"),
        using_adapter(build(CONFIGS["llama"]()), "low"),
    ):
        pass
    with pytest.raises(ModelError, match="using_adapter"):
        load_model(model, tokenizer=tokenizer, adapter="low")
    model.merge_adapter()
    merged_before = state(model)
    for name in ("high", "base"):
        with pytest.raises(ModelError, match=r"merged with low.*unmerge_adapter"), using_adapter(model, name):
            pass
    with using_adapter(model, "low"):
        pass
    assert state(model) == merged_before


def test_scores_of_a_benchmark_are_those_of_the_adapter_that_is_named(tokenizer: Any, tmp_path: Any) -> None:
    def responses(found: Any) -> list[Any]:
        return [each["resps"] for own in found.samples.values() for each in own]

    model, scores = several(), {}
    how: Any = {"tokenizer": tokenizer, "num_trials": 2, "positions": "scored", "sites": "layer_2"}
    for name in ("low", "high"):
        outcome = evaluate_with_activations(
            model, "demo_facts", activation_save_dir=tmp_path / name, adapter=name, **how
        )
        assert open_run(outcome.folder).settings["adapters"][name]["active"]
        scores[name] = responses(outcome)
    model.set_adapter("high")
    again = evaluate_with_activations(model, "demo_facts", activation_save_dir=tmp_path / "again", **how)
    assert scores["high"] != scores["low"]
    assert responses(again) == scores["high"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """A base, and a folder with two adapters in subfolders, as peft saves them."""
    folder = tmp_path_factory.mktemp("saved")
    build(CONFIGS["llama"]()).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    several().save_pretrained(folder / "adapters")
    return folder


def test_an_adapter_of_a_folder_with_several_is_named(saved: Any) -> None:
    ids = torch.tensor(PROMPTS[:1])
    how: Any = {"peft": str(saved / "adapters"), "device": "cpu"}
    for name in ("low", "high", "base"):
        loaded = load_model(saved / "base", adapter=name, **how)
        with using_adapter(several(), name) as expected, torch.no_grad():
            torch.testing.assert_close(loaded.model(ids).logits, expected(ids).logits)
        assert loaded.loaded_with == {"peft": "adapters", "adapter": name}
    for name in ("low", "high"):  # which then tell their base
        file = saved / "adapters" / name / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(saved / "base")}))
    alone = load_model(saved / "adapters", adapter="high", device="cpu")
    with using_adapter(several(), "high") as expected, torch.no_grad():
        torch.testing.assert_close(alone.model(ids).logits, expected(ids).logits)
    assert alone.loaded_with == {"adapter": "high", "base": "base"}
    with pytest.raises(
        ModelUnavailable, match=r"several adapters; name one by --adapter \(in code adapter=\): high, low, or base"
    ):
        load_model(saved / "base", **how)
    with pytest.raises(ModelUnavailable, match=r"no adapter 'hihg'; it has high, low"):
        load_model(saved / "base", adapter="hihg", **how)
    with pytest.raises(ModelError, match="model without adapters; give peft="):
        load_model(saved / "base", adapter="low", device="cpu")


def test_wrapper_that_does_not_call_the_models_hooks_is_refused() -> None:
    """As peft did in earlier versions, whose tuners call the forward of their model."""
    model = adapted("llama")
    model.base_model.forward = lambda *args, **kwargs: model.get_base_model().forward(*args, **kwargs)
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM 0 times"):
        find_layout(model)


def test_adapters_around_a_compiled_model_are_refused() -> None:
    model = build(CONFIGS["llama"]())
    model.compile(backend="eager")
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM is compiled"):
        find_layout(peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")).eval())
    outside = torch.compile(build(CONFIGS["llama"]()), backend="eager")
    with pytest.raises(UnsupportedModel, match="OptimizedModule is compiled"):
        find_layout(peft.get_peft_model(outside, peft.LoraConfig(task_type="CAUSAL_LM")).eval())


def test_edit_that_a_part_of_the_model_never_makes_raises() -> None:
    """Its body, run by itself, computes no logits: that is seen although the model's own forward never ends."""
    model = build(CONFIGS["llama"]())
    ids, before = torch.tensor(PROMPTS[:1]), n_hooks(model)

    def run(edits: list[Edit], *calls: Callable[[Tensor], Any]) -> None:
        with torch.no_grad(), editing(model, edits):
            for call in calls:
                call(ids)

    forbid = [Edit.add("layer_0", 1.0), Edit.add("logits", 1.0)]
    for calls in ((model.model,), (model.model, model), (model.model, model.model), (model, model.model)):
        with pytest.raises(EditError, match=r"edit of logits was made 0 times.*part of the model"):
            run(forbid, *calls)
    run(forbid, model)
    run([Edit.add("layer_0", 1.0)], model.model, model, model.model)
    with pytest.raises(EditError, match="`where`"):
        run([Edit.add("layer_0", 1.0, where=lambda *_: None)], model.model)
    assert n_hooks(model) == before


def test_edit_by_column_of_a_forward_without_ids_raises() -> None:
    model = build(CONFIGS["llama"]())
    given = model.get_input_embeddings()(torch.tensor(PROMPTS[:1]))
    where = Kept(torch.tensor([0]), torch.tensor([2]))
    with torch.no_grad():
        with editing(model, Edit.add("layer_0", 1.0)):
            found = model(inputs_embeds=given).logits
            expected = model(torch.tensor(PROMPTS[:1])).logits
        assert torch.equal(found, expected)
        with editing(model, Edit.add("layer_0", 1.0, where=lambda *_: where)):
            model(torch.tensor(PROMPTS[:1]))
            with pytest.raises(EditError, match="no token ids"):
                model(inputs_embeds=given)


@pytest.mark.parametrize("name", [["demo"], None, 3])
def test_editing_says_what_to_pass(name: Any) -> None:
    with pytest.raises(EditError, match="load_model"), editing(name, Edit.scale("layer_0.z", 0.0)):
        pass
