"""Answers whose decode steps are replayed from a graph: the same tokens and rows as step by step, or step by step, with the reason.

A tape stands in for CUDA's graphs (`helpers/tape.py`); the tests marked `gpu` run the real ones.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import ALL, CONFIGS, FAMILIES, SIZES, build
from helpers.raw_hooks import BLOCKS, n_hooks, raw_residuals
from helpers.tape import Tape
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import GemmaConfig, MistralConfig
from transformers.generation.utils import GenerationMixin

from AutomaticEval.capture.generation import Response, respond
from AutomaticEval.capture.graph import device_graph, from_graph, kept_steps, self_check, way
from AutomaticEval.capture.graph.recorded_step import N_WARM_UPS, RecordedStep
from AutomaticEval.capture.graph.static_cache import STEP
from AutomaticEval.capture.graph.way import FAILED, way_of
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.errors import DeviceUnavailable, PromptError, UnsupportedModel
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.edit import Edit
from AutomaticEval.models.editing import editing
from AutomaticEval.models.recording import Kept
from AutomaticEval.models.transfer.step import Step
from AutomaticEval.selection import Selection

SITES = Selection.parse("embed,resid_post,z,mlp_out,final_norm")
GREEDY = Sampling(max_new_tokens=20)
SAMPLED = Sampling(max_new_tokens=20, temperature=1.5, top_k=50, seed=3)
LIMIT = 2e-6
"""How far rows in float32 may differ, as a part of the largest number of their key: attention adds up longer rows with a static cache."""
SERVED = [name for name in FAMILIES if name != "gpt_neo"]
OTHERS = {
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=8),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=16),
    "roberta": ALL["roberta"],
}


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 400, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = prompts_of(3, 17, 9)


def loaded_as(name: str, tokenizer: Any) -> LoadedModel:
    return LoadedModel(build({**ALL, **OTHERS}[name]()), tokenizer, name)


def answered(
    loaded: LoadedModel, generation: str, sampling: Sampling = GREEDY, prompts: Any = PROMPTS
) -> list[Response]:
    return respond(loaded, prompts, replace(sampling, generation=generation), sites_of(loaded))


def sites_of(loaded: LoadedModel) -> Selection:
    return Selection.parse([kind for kind in SITES.kinds if not loaded.layout.lacking(kind)])


def rows_of(response: Response) -> dict[str, torch.Tensor]:
    assert response.sample is not None
    parts = response.sample.parts
    return {
        key: torch.cat([part.rows.activations[key][list(part.where)] for part in parts])
        for key in parts[0].rows.activations
    }


def assert_same_answers(found: Sequence[Response], expected: Sequence[Response]) -> None:
    assert [each.generated_ids for each in found] == [each.generated_ids for each in expected]
    for one, other in zip(found, expected, strict=True):
        rows, right = rows_of(one), rows_of(other)
        assert list(rows) == list(right)
        for key, value in rows.items():
            assert value.shape == right[key].shape, key
            assert float((value - right[key]).abs().max()) <= LIMIT * float(right[key].abs().max()), key


@pytest.mark.parametrize("name", [*SERVED, *OTHERS])
def test_a_graph_gives_eagers_tokens_and_rows_captured_or_not(name: str, tapes: None, tokenizer: Any) -> None:
    """Also with a window shorter than the text (mistral), experts (mixtral) and positions that begin at 2 (roberta)."""
    loaded = loaded_as(name, tokenizer)
    eager = answered(loaded, "eager")
    assert Tape.n_recorded == 0
    found = answered(loaded, "graph")
    assert Tape.n_replayed > 0
    assert_same_answers(found, eager)
    plain = respond(loaded, PROMPTS, GREEDY)  # auto, and nothing captured
    assert [each.generated_ids for each in plain] == [each.generated_ids for each in eager]
    assert not n_hooks(loaded.model)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name in SERVED])
def test_rows_from_a_graph_are_those_of_one_unpadded_row(name: str, tapes: None, tokenizer: Any) -> None:
    loaded = loaded_as(name, tokenizer)
    for prompt, found in zip(PROMPTS, answered(loaded, "graph"), strict=True):
        right = raw_residuals(loaded.model, name, [*prompt, *found.generated_ids[:-1]])
        for key, value in right.items():
            own = rows_of(found)[key]
            assert own.shape == value.shape
            assert float((own - value).abs().max()) <= 5 * LIMIT * float(value.abs().max()), key


def test_a_graph_is_used_again_by_later_batches_and_hooks_are_called_once(
    tapes: None, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted are the forwards of a block in Python: of its class, since a forward put into an instance means eager."""
    loaded, calls = loaded_as("llama", tokenizer), []
    block = type(loaded.model.get_submodule(BLOCKS["llama"])[0])
    real = block.forward
    n_layers = loaded.layout.n_layers
    way_of(loaded.model, "graph", {})  # the self-check runs forwards of its own
    monkeypatch.setattr(block, "forward", lambda self, *args, **kwargs: calls.append(1) or real(self, *args, **kwargs))
    recorded = Tape.n_recorded
    first = answered(loaded, "graph")
    assert len(calls) == n_layers * (1 + N_WARM_UPS + 1)  # the prefill, the warm-ups, the recording
    assert Tape.n_recorded == recorded + 1
    calls.clear()
    others = prompts_of(20, 4, 11)[::-1]
    again = answered(loaded, "graph", prompts=others)
    assert len(calls) == n_layers  # the prefill
    assert Tape.n_recorded == recorded + 1
    monkeypatch.setattr(block, "forward", real)
    assert_same_answers(first, answered(loaded, "eager"))
    assert_same_answers(again, answered(loaded, "eager", prompts=others))


def test_what_decides_the_operations_decides_the_graph(tapes: None, tokenizer: Any) -> None:
    loaded = loaded_as("llama", tokenizer)
    answered(loaded, "graph")

    def n_new(act: Callable[[], Any]) -> int:
        before = Tape.n_recorded
        act()
        return Tape.n_recorded - before

    assert n_new(lambda: answered(loaded, "graph")) == 0
    assert n_new(lambda: answered(loaded, "graph", prompts=PROMPTS[:2])) == 1  # rows
    assert n_new(lambda: answered(loaded, "graph", prompts=prompts_of(3, 9, STEP - 10))) == 1  # length
    narrow = Selection.parse("embed,resid_post", store_dtype="float16")
    assert n_new(lambda: respond(loaded, PROMPTS, GREEDY, narrow)) == 1  # sites and dtype
    assert n_new(lambda: respond(loaded, PROMPTS, GREEDY, replace(narrow, store_dtype="bfloat16"))) == 1
    assert n_new(lambda: respond(loaded, PROMPTS, GREEDY)) == 1  # nothing captured
    loaded.model.set_attn_implementation("eager")
    assert n_new(lambda: respond(loaded, PROMPTS, GREEDY)) == 2  # the attention kernel, which the self-check sees, too
    loaded.model.set_attn_implementation("sdpa")
    assert n_new(lambda: respond(loaded, PROMPTS, GREEDY)) == 0
    head = loaded.model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())
    assert n_new(lambda: respond(loaded, PROMPTS, GREEDY)) == 2  # another address


def outside_of(tape: Any) -> set[int]:
    """The memory that the operations of a tape read, and that none of them made."""
    made: set[int] = set()
    outside: set[int] = set()
    for _, args, kwargs, out in tape._done:
        for tensor in (each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)):
            address = tensor.untyped_storage().data_ptr()
            outside |= set() if address in made else {address}
        results = {t.untyped_storage().data_ptr() for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        made |= results - outside
    return outside


MATRIX = torch.randn(32, 3, generator=torch.Generator().manual_seed(1))
WITH_MEMORY: dict[str, Callable[[], tuple[list[Edit], Selection]]] = {
    "heads": lambda: ([Edit.scale("layer_1.z", 0.5, heads=[1])], SITES),
    "value": lambda: ([Edit.add("layer_0", torch.ones(32, dtype=torch.float64))], SITES),
    "direction": lambda: ([Edit.project_out("layer_0", torch.arange(32))], SITES),
    "projection": lambda: ([], Selection.parse("resid_post", project=MATRIX)),
    "norms of heads": lambda: ([], Selection.parse("resid_post,head_result_norm")),
}


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_what_a_graph_reads_lives_as_long_as_the_graph(name: str, tapes: None, tokenizer: Any) -> None:
    """A graph knows addresses. Later batches bring equal edits and reductions of their own, with other memory, and use it again."""
    loaded = loaded_as("llama", tokenizer)
    steps: list[RecordedStep] = []
    for _ in range(3):
        edits, selection = WITH_MEMORY[name]()
        with editing(loaded.model, edits):
            respond(loaded, PROMPTS, replace(GREEDY, generation="graph"), selection)
        (step,) = kept_steps._kept[loaded.model].values()
        steps.append(step)
        held = {tensor.untyped_storage().data_ptr() for tensor in step._holds}
        assert outside_of(step._graph) <= held
    assert steps[0] is steps[1] is steps[2]


def test_weights_that_are_changed_in_place_are_read_anew(tapes: None, tokenizer: Any) -> None:
    loaded = loaded_as("llama", tokenizer)
    before, recorded = answered(loaded, "graph"), Tape.n_recorded
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(-1)
    after = answered(loaded, "graph")
    assert Tape.n_recorded == recorded
    assert [each.generated_ids for each in before] != [each.generated_ids for each in after]
    assert_same_answers(after, answered(loaded, "eager"))


@pytest.mark.parametrize("positions", ["response", "scored", "prompt", "last", "all"])
def test_positions_are_kept_as_without_a_graph(positions: str, tapes: None, tokenizer: Any) -> None:
    loaded = loaded_as("llama", tokenizer)
    kept = Selection.parse("embed,resid_post,mlp_out", positions=positions, store_dtype="float16")
    eager = respond(loaded, PROMPTS, replace(GREEDY, generation="eager"), kept)
    graph = respond(loaded, PROMPTS, GREEDY, kept)
    for one, other in zip(graph, eager, strict=True):
        assert one.sample is not None
        assert other.sample is not None
        places, expected = (
            [part.rows.positions[n] for part in each.sample.parts for n in part.where]
            for each in (one, other)
            if each.sample
        )
        assert places == expected
        right = rows_of(other)
        for key, rows in rows_of(one).items():
            assert rows.dtype == torch.float16
            torch.testing.assert_close(rows, right[key], rtol=2e-3, atol=2e-3)


def test_logits_are_captured_from_a_graph(tapes: None, tokenizer: Any) -> None:
    loaded = loaded_as("llama", tokenizer)
    kept = Selection.parse("logits", positions="scored")
    eager = respond(loaded, PROMPTS, replace(GREEDY, generation="eager"), kept)
    assert_same_answers(respond(loaded, PROMPTS, GREEDY, kept), eager)


@pytest.mark.parametrize(
    "how", [{"reduce": "norm"}, {"reduce": "mean"}, {"reduce": "max"}, {"project": torch.eye(32)[:, :5]}]
)
def test_reduced_rows_are_those_of_eager_with_a_new_graph_for_another_matrix(
    how: dict[str, Any], tapes: None, tokenizer: Any
) -> None:
    loaded = loaded_as("llama", tokenizer)
    for change in (1.0, 1.0, -2.0):
        how = {name: value if isinstance(value, str) else change * value for name, value in how.items()}
        kept = Selection.parse("embed,resid_post", **how)
        eager = respond(loaded, PROMPTS, replace(GREEDY, generation="eager"), kept)
        before = Tape.n_replayed
        found = respond(loaded, PROMPTS, GREEDY, kept)
        assert Tape.n_replayed > before
        for one, other in zip(found, eager, strict=True):
            assert one.generated_ids == other.generated_ids
            assert one.sample is not None
            assert other.sample is not None
            kept_rows, expected = (
                {
                    key: torch.cat([part.rows.activations[key].flatten() for part in each.parts])
                    for key in each.parts[0].rows.activations
                }
                for each in (one.sample, other.sample)
            )
            for key, right in expected.items():
                torch.testing.assert_close(kept_rows[key], right, rtol=1e-5, atol=1e-5)


def test_sampling_with_a_seed_gives_eagers_answers(tapes: None, tokenizer: Any) -> None:
    loaded = loaded_as("llama", tokenizer)
    eager = answered(loaded, "eager", SAMPLED)
    assert_same_answers(answered(loaded, "graph", SAMPLED), eager)
    assert_same_answers(answered(loaded, "graph", SAMPLED), eager)  # from a graph that is there already


def test_answers_that_end_early_and_a_batch_that_stops_early(tapes: None, tokenizer: Any) -> None:
    loaded = loaded_as("llama", tokenizer)
    free = [each.generated_ids for each in answered(loaded, "eager")]
    for ends in ([free[0][4], free[1][9]], [free[0][2], free[1][5], free[2][7]]):
        loaded.model.generation_config.eos_token_id = ends
        eager = answered(loaded, "eager")
        assert min(len(each.generated_ids) for each in eager) < 20
        assert_same_answers(answered(loaded, "graph"), eager)


def test_settings_that_look_at_tokens_work_as_in_eager(tapes: None, tokenizer: Any) -> None:
    loaded = loaded_as("llama", tokenizer)
    loaded.model.generation_config.repetition_penalty = 1.8
    loaded.model.generation_config.no_repeat_ngram_size = 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_answers(answered(loaded, "graph"), answered(loaded, "eager"))


def test_one_new_token_needs_no_graph_and_no_room_is_lost(tapes: None, tokenizer: Any) -> None:
    loaded = loaded_as("llama", tokenizer)
    way_of(loaded.model, "graph", {})
    before = Tape.n_recorded
    short = replace(GREEDY, max_new_tokens=1)
    assert_same_answers(answered(loaded, "graph", short), answered(loaded, "eager", short))
    assert Tape.n_recorded == before
    exact = prompts_of(STEP - 19, 50)  # with the answers exactly as long as a cache
    assert_same_answers(answered(loaded, "graph", GREEDY, exact), answered(loaded, "eager", GREEDY, exact))


# Edits and adapters.

DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(5))
FIXED = {
    "scale": [Edit.scale("layer_1", 0.5)],
    "a head to zero": [Edit.scale("layer_1.z", 0.0, heads=[1, 3])],
    "a vector added": [Edit.add("layer_0", 3 * DIRECTION)],
    "a vector put there": [Edit.replace("layer_1.attn_out", DIRECTION)],
    "a direction projected out": [Edit.project_out("layer_0", DIRECTION), Edit.project_out("layer_1", DIRECTION)],
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_edits_are_made_in_a_graph(name: str, tapes: None, tokenizer: Any) -> None:
    loaded = loaded_as("llama", tokenizer)
    untouched = answered(loaded, "graph")
    with editing(loaded, FIXED[name]):
        eager = answered(loaded, "eager")
        before = Tape.n_replayed
        assert_same_answers(answered(loaded, "graph"), eager)
        assert Tape.n_replayed > before
    assert any(
        not torch.equal(rows_of(one)["final_norm"], rows_of(other)["final_norm"])
        for one, other in zip(untouched, eager, strict=True)
    )
    assert_same_answers(answered(loaded, "graph"), untouched)


def test_an_edit_with_another_value_has_another_graph(tapes: None, tokenizer: Any) -> None:
    loaded = loaded_as("llama", tokenizer)
    value = DIRECTION.clone()
    edit = Edit.add("layer_0", value)
    for factor in (1.0, -4.0):
        value.copy_(factor * DIRECTION)  # the same edit, whose tensor was changed
        with editing(loaded, edit):
            assert_same_answers(answered(loaded, "graph"), answered(loaded, "eager"))


def _at_some(first: int, n: int) -> Kept:
    return Kept(torch.tensor([0]), torch.tensor([first]))


OWN: dict[str, tuple[Edit, str]] = {
    "own function": (Edit("layer_0", lambda old: old * float(old.mean())), "a function of your own"),
    "by position": (Edit.scale("layer_0", 0.5, where=_at_some), "edited at certain rows or columns"),
}


@pytest.mark.parametrize("name", OWN)
def test_other_edits_go_step_by_step_and_are_named(name: str, tapes: None, tokenizer: Any) -> None:
    loaded, (edit, told) = loaded_as("llama", tokenizer), OWN[name]
    with editing(loaded, edit):
        eager = answered(loaded, "eager")
        with pytest.warns(UserWarning, match=told):
            found = answered(loaded, "graph")
    assert Tape.n_replayed == 0
    assert_same_answers(found, eager)


def test_an_edit_that_only_claims_to_be_fixed_is_found_by_the_self_check(tapes: None, tokenizer: Any) -> None:
    loaded = loaded_as("llama", tokenizer)
    calls: list[int] = []

    def growing(old: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return old * (1 + 0.1 * len(calls))

    with (
        editing(loaded, Edit("layer_0", growing, is_fixed=True, is_positionwise=True)),
        pytest.warns(UserWarning, match="in the self-check"),
    ):
        assert way_of(loaded.model, "auto", {}).failed
    with (
        editing(loaded, Edit("layer_0", lambda old: old * float(old.mean()), is_fixed=True, is_positionwise=True)),
        pytest.warns(UserWarning, match="a number was read back"),
    ):
        assert way_of(loaded.model, "auto", {}).failed


def test_adapters_are_served_each_with_a_graph_of_its_own(tapes: None, tokenizer: Any) -> None:
    peft = pytest.importorskip("peft", reason="models with adapters need peft: pip install peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    model = peft.get_peft_model(build(CONFIGS["llama"]()), config).eval()
    model.add_adapter("other", config)
    model.eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "lora_" in path:
                weight += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(path)))
    loaded = LoadedModel(model, tokenizer, "adapted")
    answers = []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        before = Tape.n_replayed
        eager = answered(loaded, "eager")
        assert_same_answers(answered(loaded, "graph"), eager)
        assert Tape.n_replayed > before
        answers.append([each.generated_ids for each in eager])
    assert answers[0] == answers[2] != answers[1]
    with model.disable_adapter():
        assert_same_answers(answered(loaded, "graph"), answered(loaded, "eager"))
    assert "get_compiled_call" not in model.get_base_model().__dict__


# What goes step by step.


def _hooked(model: Any) -> Any:
    return model.model.layers[1].register_forward_hook(lambda module, args, output: None)


def _with(**settings: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name, value in settings.items():
            setattr(model.generation_config, name, value)

    return change


def _replaced(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = mlp.forward


def _quantised(model: Any) -> None:
    model.hf_quantizer, model.quantization_method = type("Own", (), {"is_compileable": False})(), "own"


def _spread(model: Any) -> None:
    model.hf_device_map = {"a": 0, "b": "disk"}


REASONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a hook": (_hooked, "a hook of test_graph is on a LlamaDecoderLayer"),
    "a forward": (_replaced, "the forward of a LlamaMLP was replaced"),
    "flash": (lambda model: setattr(model.config, "_attn_implementation_internal", "flash_attention_2"), "flash_attention_2"),
    "chunks": (_with(prefill_chunk_size=4), "prefill_chunk_size is 4"),
    "looked up": (_with(prompt_lookup_num_tokens=2), "prompt_lookup_num_tokens is 2"),
    "a cache": (_with(cache_implementation="static"), "cache_implementation is 'static'"),
    "quantised": (_quantised, "quantised by own cannot be recorded"),
    "on the disk": (_spread, "offloaded"),
    "not loaded": (lambda model: model.lm_head.to("meta"), "offloaded"),
    "training": (lambda model: model.train(), "in training mode"),
    "compiled": (lambda model: model.model.layers[0].compile(), "compiled"),
    "experts": (
        lambda model: [setattr(model.config, "num_experts", 4), setattr(model.config, "_experts_implementation_internal", "eager")],
        "which experts it runs is decided on the host",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_what_a_graph_cannot_serve_is_named_once_and_goes_step_by_step(name: str, tapes: None) -> None:
    model = build(CONFIGS["llama"]())
    assert way_of(model, "auto", {}).kind == "graph"
    change, told = REASONS[name]
    change(model)
    with pytest.warns(
        UserWarning, match=f"Generating step by step, as --generation eager does: LlamaForCausalLM: .*{told}"
    ):
        assert way_of(model, "auto", {}) == way.EAGER
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert way_of(model, "auto", {}) == way.EAGER  # said once
        assert way_of(model, "eager", {}) == way.EAGER


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gpt_neo", "GPT-Neo"),
        ("phi3-longrope", "long rope"),
        ("mamba", "no keys and values"),
        ("gpt-1", "no keys and values"),
        ("minimax", "no static form"),
        ("recurrent-gemma", "no static form"),
    ],
)
def test_families_without_a_graph_answer_as_before(name: str, told: str, tapes: None, tokenizer: Any) -> None:
    loaded = loaded_as(name, tokenizer)
    eager = answered(loaded, "eager")
    with pytest.warns(UserWarning, match=told):
        found = answered(loaded, "auto")
    assert [each.generated_ids for each in found] == [each.generated_ids for each in eager]
    assert Tape.n_recorded == 0


def test_virtual_tokens_are_named(tapes: None) -> None:
    peft = pytest.importorskip("peft", reason="models with adapters need peft: pip install peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build(CONFIGS["llama"]()), config).eval()
    with pytest.warns(UserWarning, match="PROMPT_TUNING"):
        assert way_of(model, "auto", {}) == way.EAGER


@pytest.mark.parametrize(
    "given", [{"num_beams": 2}, {"guidance_scale": 2.0}, {"use_cache": False}, {"synced_gpus": True}]
)
def test_calls_that_a_graph_cannot_serve_are_named(given: dict[str, Any], tapes: None) -> None:
    model = build(CONFIGS["llama"]())
    with pytest.warns(UserWarning, match=next(iter(given))):
        assert way_of(model, "auto", given) == way.EAGER
    assert way_of(model, "auto", {}).kind == "graph"


def test_autocast_and_hooks_on_all_modules_are_named(tapes: None) -> None:
    model = build(CONFIGS["llama"]())
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast"):
        assert way_of(model, "auto", {}) == way.EAGER
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        with pytest.warns(UserWarning, match="hooks are on all modules"):
            assert way_of(model, "auto", {}) == way.EAGER
    finally:
        handle.remove()
    assert way_of(model, "auto", {}).kind == "graph"


# The self-check.


def _stale(self: RecordedStep, tensors: Any, constants: Any) -> None:
    """A mutant: the inputs of the first step stay in the graph."""
    for path in tensors:
        self._static[path] = self._static[path].clone()


def _longer(cache: Any) -> list[Any]:
    """A mutant: warm-up forwards leave their columns in the cache."""
    return []


def _forgotten(model: Any, length: int) -> Any:
    """A mutant: transformers' own layers for windows, which roll."""
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=length)


MUTANTS = {
    "stale inputs": (RecordedStep, "_refuse_others", _stale, "llama"),
    "lengths not put back": ("recorded_step", "lengths_of", _longer, "llama"),
    "rolling windows": (from_graph, "full_length_cache", _forgotten, "mistral"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_graph_that_gives_other_numbers_is_found_and_said(
    name: str, tapes: None, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from AutomaticEval.capture.graph import recorded_step

    where, attribute, mutant, family = MUTANTS[name]
    loaded = loaded_as(family, tokenizer)
    assert self_check.why_unequal(loaded.model) is None
    eager = answered(loaded, "eager")
    monkeypatch.setattr(recorded_step if isinstance(where, str) else where, attribute, mutant)
    with pytest.warns(UserWarning, match="Generating step by step"):
        found = answered(loaded, "graph")
    assert way_of(loaded.model, "graph", {}).settings == {"generation": FAILED}
    assert_same_answers(found, eager)


def test_rows_that_differ_are_found_although_the_logits_are_right(
    tapes: None, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    model, put, first = build(CONFIGS["llama"]()), Step.put, []

    def one_for_all(self: Step, key: str, rows: torch.Tensor) -> None:
        first.append(rows)
        put(self, key, first[0])

    monkeypatch.setattr(Step, "put", one_for_all)
    found = self_check.why_unequal(model)
    assert found is not None
    assert "its layer_0 differed" in found


def test_a_model_whose_parts_are_not_found_still_answers_uncaptured(
    tapes: None, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_as("llama", tokenizer)
    expected = respond(loaded, PROMPTS, replace(GREEDY, generation="eager"))

    def unknown(model: Any) -> Any:
        raise UnsupportedModel("its blocks were not found.")

    monkeypatch.setattr(self_check, "find_layout", unknown)
    with pytest.warns(UserWarning, match="cannot be recorded: UnsupportedModel: its blocks were not found"):
        found = respond(loaded, PROMPTS, GREEDY)
    assert [each.generated_ids for each in found] == [each.generated_ids for each in expected]


# The rest of the machine.


def test_a_device_without_graphs_is_eager_and_refuses_a_graph_by_name(tiny_llama: LoadedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is to be said of it
        assert way_of(tiny_llama.model, "auto", {}) == way.EAGER
    with pytest.raises(DeviceUnavailable, match="--generation graph needs a CUDA GPU, and the model is on cpu"):
        respond(tiny_llama, PROMPTS, replace(GREEDY, generation="graph"))
    with pytest.raises(PromptError, match="--generation is 'cuda'; write auto, graph or eager"):
        Sampling(generation="cuda")


@pytest.mark.parametrize("value", [None, "true"])
def test_tokenizers_stay_as_parallel_as_they_were(
    value: str | None, tapes: None, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if value is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
    answered(loaded_as("llama", tokenizer), "graph")
    assert os.environ.get("TOKENIZERS_PARALLELISM") == value


def test_graphs_go_when_they_are_too_large_together(
    tapes: None, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_as("llama", tokenizer)
    respond(loaded, PROMPTS, GREEDY)
    (kept,) = kept_steps._kept[loaded.model].values()
    layer = 2 * 2 * STEP * 8 * 4  # keys and values, 2 heads, 8 numbers of 4 bytes
    assert kept.size_bytes == 3 * 3 * layer
    monkeypatch.setattr(kept_steps, "WITHOUT_GPU", 2 * kept.size_bytes)
    recorded = Tape.n_recorded
    for n_rows in (3, 2, 1):
        respond(loaded, PROMPTS[:n_rows], GREEDY)
    assert Tape.n_recorded == recorded + 2
    respond(loaded, PROMPTS[:1], GREEDY)
    assert Tape.n_recorded == recorded + 2
    assert len(kept_steps._kept[loaded.model]) == 3  # 3 + 2 + 1 rows of 6
    monkeypatch.setattr(kept_steps, "WITHOUT_GPU", kept.size_bytes)
    respond(loaded, PROMPTS[:2], GREEDY)
    assert len(kept_steps._kept[loaded.model]) == 2  # the longest unused is gone: 1 + 2 rows of 3
    respond(loaded, PROMPTS, GREEDY)
    assert Tape.n_recorded == recorded + 3


def test_a_full_memory_drops_graphs_and_tries_again_from_the_same_random_state(
    tapes: None, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_as("llama", tokenizer)
    expected = answered(loaded, "graph", SAMPLED)
    failed: list[int] = []
    real = GenerationMixin.prepare_inputs_for_generation

    def full_once(self: Any, ids: Any, **kwargs: Any) -> Any:
        if ids.shape[1] == 20 and not failed:  # a few tokens were drawn already
            failed.append(len(kept_steps._kept))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, ids, **kwargs)

    respond(loaded, PROMPTS[:1], GREEDY)
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", full_once)
    assert_same_answers(answered(loaded, "graph", SAMPLED), expected)
    assert failed
    assert len(kept_steps._kept[loaded.model]) == 1  # only the one that was made after it


def test_an_interrupt_leaves_nothing_behind(tapes: None, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_as("llama", tokenizer)
    expected = answered(loaded, "graph")
    real, calls = Tape.replay, []

    def interrupted(self: Tape) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(Tape, "replay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answered(loaded, "graph")
    assert "get_compiled_call" not in loaded.model.__dict__
    assert not n_hooks(loaded.model)
    assert_same_answers(answered(loaded, "graph"), expected)


def test_a_model_is_freed_with_its_graphs(tapes: None, tokenizer: Any) -> None:
    import gc
    import weakref

    loaded = loaded_as("llama", tokenizer)
    answered(loaded, "graph")
    gone = weakref.ref(loaded.model)
    del loaded
    gc.collect()
    assert gone() is None
    assert not list(kept_steps._kept)


def test_under_inference_mode_and_outside_of_it(tapes: None, tokenizer: Any) -> None:
    """A cache that is made under inference mode cannot be written to outside of it."""
    loaded = loaded_as("llama", tokenizer)
    eager = answered(loaded, "eager")
    for _ in range(2):
        with torch.inference_mode():
            assert_same_answers(answered(loaded, "graph"), eager)
        assert_same_answers(answered(loaded, "graph"), eager)


def test_norms_of_heads_follow_weights_that_are_changed(tapes: None, tokenizer: Any) -> None:
    """They are computed with factors of the output projection, which are made anew when it changes."""
    loaded = loaded_as("llama", tokenizer)
    kept = Selection.parse("head_result_norm")
    for factor in (1.0, 1.0, 3.0):
        with torch.no_grad():
            loaded.model.model.layers[1].self_attn.o_proj.weight.mul_(factor)
        eager = respond(loaded, PROMPTS, replace(GREEDY, generation="eager"), kept)
        assert_same_answers(respond(loaded, PROMPTS, GREEDY, kept), eager)


def test_cuda_alone_has_graphs() -> None:
    assert device_graph.graphs_of(torch.device("cpu")) is None
    assert device_graph.graphs_of(torch.device("meta")) is None
    assert device_graph.graphs_of(torch.device("cuda")) is not None


# The real graphs.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*SERVED, "mistral"])
def test_cuda_graphs_give_eagers_answers(name: str, dtype: torch.dtype, tokenizer: Any) -> None:
    loaded = LoadedModel(build({**ALL, **OTHERS}[name](), dtype).to("cuda"), tokenizer, name)
    assert way_of(loaded.model, "graph", {}).kind == "graph"
    captured, plain = answered(loaded, "graph"), respond(loaded, PROMPTS, GREEDY)
    again = answered(loaded, "graph")
    assert [each.generated_ids for each in captured] == [each.generated_ids for each in plain]
    for one, other in zip(captured, again, strict=True):
        assert all(torch.equal(rows, rows_of(other)[key]) for key, rows in rows_of(one).items())
    if dtype == torch.float32:
        eager = answered(loaded, "eager")
        assert [each.generated_ids for each in captured] == [each.generated_ids for each in eager]
        for one, other in zip(captured, eager, strict=True):
            for key, rows in rows_of(one).items():
                assert float((rows - rows_of(other)[key]).abs().max()) <= 1e-4 * float(rows.abs().max()), key


@pytest.mark.gpu
@pytest.mark.parametrize("positions", ["all", "response", "last"])
def test_a_replayed_step_waits_for_nothing(positions: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what runs between two calls of transformers' loop, torch refuses everything that waits for the GPU."""
    loaded, n_steps = LoadedModel(build(CONFIGS["llama"](), torch.bfloat16).to("cuda"), tokenizer, "llama"), []
    assert way_of(loaded.model, "graph", {}).kind == "graph"
    kept = Selection.parse("embed,resid_post", positions=positions)
    expected = respond(loaded, PROMPTS, GREEDY, kept)
    real = RecordedStep.run

    def watched(self: RecordedStep, *args: Any) -> Any:
        n_steps.append(1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(RecordedStep, "run", watched)
    found = respond(loaded, PROMPTS, GREEDY, kept)
    assert len(n_steps) == GREEDY.max_new_tokens - 1
    assert [each.generated_ids for each in found] == [each.generated_ids for each in expected]


@pytest.mark.gpu
@pytest.mark.parametrize("name", FIXED)
def test_fixed_edits_are_made_in_a_cuda_graph(name: str, tokenizer: Any) -> None:
    loaded = LoadedModel(build(CONFIGS["llama"]()).to("cuda"), tokenizer, "llama")
    with editing(loaded, FIXED[name]):
        assert way_of(loaded.model, "graph", {}).kind == "graph"
        graph, eager = answered(loaded, "graph"), answered(loaded, "eager")
    assert [each.generated_ids for each in graph] == [each.generated_ids for each in eager]


@pytest.mark.gpu
def test_what_reads_a_number_back_is_found_while_a_cuda_graph_is_recorded(tokenizer: Any) -> None:
    loaded = LoadedModel(build(CONFIGS["llama"]()).to("cuda"), tokenizer, "llama")
    reading = Edit("layer_0", lambda old: old * float(old.mean()), is_fixed=True, is_positionwise=True)
    with editing(loaded, reading), pytest.warns(UserWarning, match="cannot be recorded"):
        assert way_of(loaded.model, "auto", {}).failed
    assert way_of(loaded.model, "auto", {}).kind == "graph"  # the device goes on
    answered(loaded, "graph")
