"""Mixtures of experts: what the router gives and chooses, each expert's output, the load of experts, and experts that are dropped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from families.configs import FAMILIES as SMALL
from families.configs import build as small
from helpers.commands import within
from helpers.models import SIZES, build
from helpers.places import ROOT
from helpers.runs import assert_honest
from helpers.staged import stage_the_cpu
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig

from AutomaticEval import Edit, difference_of_means, editing, expert_load, geometry, open_run
from AutomaticEval.analysis.experts.contrasts import Contrasts, Group
from AutomaticEval.analysis.numbers.permutation import differences
from AutomaticEval.analysis.probes.asked import sites_of
from AutomaticEval.capture.recompute.plain_forward import plain_forward
from AutomaticEval.errors import EditError, SelectionError, SiteUnavailable
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.run import run_benchmark
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.experts.rerouting import rerouted
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.selection import Selection
from AutomaticEval.sites import Site
from AutomaticEval.store.export.formats import export
from AutomaticEval.store.upkeep.convert import convert
from AutomaticEval.store.upkeep.merge import merge
from AutomaticEval.store.upkeep.prune import prune
from AutomaticEval.store.upkeep.verify import check

LOCAL_8 = {"num_local_experts": 8, "num_experts_per_tok": 2}
GROUPED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
KINDS = ("router_logits", "expert_ids", "expert_weights", "expert_out")


class Family(NamedTuple):
    """How a family is built, and where its router is, below layer 1."""

    config: dict[str, Any]
    router: str
    logits: int = 0
    """The element of what the router gives that holds the logits."""
    lacks: tuple[str, ...] = ()


FAMILIES = {
    "mixtral": Family(LOCAL_8, "mlp.gate"),
    "olmoe": Family({"num_experts": 8, "num_experts_per_tok": 2}, "mlp.gate"),
    "phimoe": Family(LOCAL_8, "mlp.router"),
    "granitemoe": Family({**LOCAL_8, "residual_multiplier": 0.5}, "block_sparse_moe.router"),
    "deepseek_v3": Family({**GROUPED, **LATENT, "num_key_value_heads": 4}, "mlp.gate"),
    "gpt_oss": Family({**LOCAL_8, "head_dim": 8}, "mlp.router"),
    "minimax_m2": Family({**LOCAL_8, "head_dim": 8}, "mlp.gate"),
    "llama4_text": Family(
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 24,
            "head_dim": 8,
        },
        "feed_forward.router",
        1,
        ("expert_weights", "expert_out"),
    ),
    "jetmoe": Family(
        {"num_local_experts": 8, "num_experts_per_tok": 2, "kv_channels": 8}, "mlp.router", 4, ("expert_out",)
    ),
}
STAGED = ("deepseek_v3", "jetmoe")
"""Whose rows leave the CPU as those of a GPU do."""
TEXT = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def made(tokenizer: Any) -> Callable[..., LoadedModel]:
    """Builds a family with routers that choose all sorts of experts; each once."""
    known: dict[str, LoadedModel] = {}

    def make(name: str, **more: Any) -> LoadedModel:
        key = f"{name} {more}"
        if key not in known:
            known[key] = LoadedModel(random_experts(name, len(tokenizer), **more), tokenizer, name)
        return known[key]

    return make


def random_experts(name: str, vocabulary: int, **more: Any) -> Any:
    sizes = {**SIZES, "vocab_size": vocabulary, "max_position_embeddings": 512}
    model = build(AutoConfig.for_model(name, **{**sizes, **FAMILIES[name].config, **more}))
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".experts." in path or "linear.weight" in path or path.endswith(("gate.weight", "router.weight")):
                parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.3)
            elif path.endswith((".router.layer.weight", ".router.bias")):
                parameter.copy_(torch.randn(parameter.shape, generator=source))
        for path, buffer in model.named_buffers():
            if path.endswith("correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=source) * 0.1)
    return model


def captured(loaded: LoadedModel, folder: Path, kinds: Sequence[str], n: int = 4, **how: Any) -> Any:
    """A run over the demo benchmark: choices through the tree, and answers in padded batches. Of layer 1."""
    asked = Benchmark(("demo",), num_trials=n, num_fewshot=1, batch_size="4")
    given = {"layers": "1", "positions": "all", **how}
    done = run_benchmark(loaded, asked, Selection.parse(list(kinds), **given), output=RunOutput(folder))
    assert done.folder is not None
    return open_run(done.folder)


@contextmanager
def hooked(module: nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """What a module is given and gives, as (arguments, output)."""
    seen: list[tuple[Any, Any]] = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append((args, output)))
    yield seen
    handle.remove()


def truth(loaded: LoadedModel, family: Family, ids: Sequence[int]) -> dict[str, Tensor]:
    """What hooks of this test see in layer 1, in one forward over one unpadded row."""
    block = loaded.model.model.layers[1]
    parent = family.router.rpartition(".")[0]
    experts = getattr(block.get_submodule(parent), "experts", nn.Identity())
    with torch.no_grad(), hooked(block.get_submodule(family.router)) as routed, hooked(experts) as ran:
        loaded.model(torch.tensor([list(ids)]), use_cache=False)
    [(_, output)] = routed
    found = {"router_logits": output[family.logits]}
    if family.lacks:  # the family's rule, by hand
        top = output[family.logits].topk(1 if family.logits == 1 else 2)
        return {**found, "expert_ids": top.indices, "expert_weights": top.values.softmax(-1)}
    weights, places = output[1].sort(dim=-1, descending=True, stable=True)
    return {**found, "expert_ids": output[2].gather(-1, places), "expert_weights": weights, "sum": ran[0][1]}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "olmoe"])
def test_sites_are_what_hooks_by_hand_see_in_the_tree_and_in_padded_batches(
    name: str, made: Callable[..., LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, loaded = FAMILIES[name], made(name)
    if name in STAGED:
        stage_the_cpu(monkeypatch)
    kinds = [kind for kind in KINDS if kind not in family.lacks]
    run = captured(loaded, tmp_path, kinds)
    ways = {(x is None, rows > 1) for x, rows in zip(run.column("logprob"), run.column("batch_rows"), strict=True)}
    assert {is_generated for is_generated, _ in ways} == {True, False}
    assert (True, True) in ways
    experts = set()
    for number in range(len(run)):
        sample = run[number]
        fed = [*sample["input_ids"][0].tolist(), *sample["generated_ids"].tolist()][:-1]
        right = {key: value[sample["positions"]] for key, value in truth(loaded, family, fed).items()}
        stored = {kind: sample["activations"][f"layer_1.{kind}"] for kind in kinds}
        assert stored["expert_ids"].dtype == torch.int16
        assert torch.equal(stored["expert_ids"].long(), right["expert_ids"])
        experts |= set(stored["expert_ids"].flatten().tolist())
        if "expert_out" in stored:
            outputs = stored["expert_out"].unflatten(-1, (stored["expert_ids"].shape[1], -1))  # type: ignore[no-untyped-call]
            stored["sum"] = outputs.sum(1)
        for kind in stored.keys() & right.keys() - {"expert_ids"}:
            size = max(1.0, float(right[kind].abs().max()))
            assert float((stored[kind] - right[kind]).abs().max()) <= 1e-5 * size, kind
    assert len(experts) > 3
    assert_honest(run.path, loaded, n=1)


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_router_logits_are_those_of_transformers(name: str, made: Callable[..., LoadedModel]) -> None:
    loaded = made(name)
    theirs = loaded.model(TEXT, output_router_logits=True).router_logits
    taps = loaded.layout.pick([Site("router_logits", layer) for layer in range(2)])
    for own, tap in zip(theirs, taps.values(), strict=True):
        with torch.no_grad(), hooked(loaded.model.get_submodule(tap.module)) as seen:
            loaded.model(TEXT)
        assert tap.elements == (0,)
        assert torch.equal(seen[0][1][0], own)


def test_sites_that_are_not_there_are_refused_with_the_reason(
    made: Callable[..., LoadedModel], tiny_llama: LoadedModel
) -> None:
    for loaded, site, reason in (
        (tiny_llama, Site("expert_ids", 0), "has no router"),
        (made("deepseek_v3"), Site("expert_ids", 0), "It has 'expert_ids' in layer 1"),
        (made("llama4_text"), Site("expert_weights", 1), "what an expert is given is multiplied"),
        (made("jetmoe"), Site("expert_out", 1), "no expert can be run alone"),
    ):
        with pytest.raises(SiteUnavailable, match=reason):
            loaded.layout.pick([site])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_weigh_in_another_way_are_refused_in_any_dtype(dtype: torch.dtype) -> None:
    """Mixtral's experts, which are given weights and use their share of their sum: an expert alone has the weight 1 then."""
    model = random_experts("mixtral", 64).to(dtype)
    experts = model.model.layers[1].mlp.experts
    stock = experts.forward
    model.model.layers[1].mlp.experts.forward = lambda x, ids, w: stock(x, ids, w / w.sum(-1, keepdim=True))
    layout = find_layout(model)
    assert "do not add up" in layout.missing[Site("expert_weights", 1)]
    assert Site("expert_out", 0) in layout.taps


def test_layout_of_experts_follows_dtype_and_number_of_experts() -> None:
    model = random_experts("llama4_text", 64)
    assert find_layout(model).widths[Site("expert_ids", 1)] == 1
    for block in model.model.layers:
        block.feed_forward.router.top_k = 2
    assert find_layout(model).widths[Site("expert_ids", 1)] == 2
    model = random_experts("mixtral", 64)
    find_layout(model)
    tap = find_layout(model.to(torch.bfloat16)).taps[Site("expert_out", 1)]
    assert tap.then is not None
    assert tap.then.dtypes[0] == torch.bfloat16  # type: ignore[attr-defined]


# Dropping experts


def by_hand(model: Any, family: str, expert: int) -> Any:
    """Makes it impossible that layer 1 has an expert, without `Edit`. Returns what undoes it."""
    block = model.model.layers[1]
    if family == "gpt_oss":
        before = block.mlp.router.bias.detach().clone()
        block.mlp.router.bias.data[expert] = -1e9
        return lambda: block.mlp.router.bias.data.copy_(before)
    if family == "deepseek_v3":
        bias = block.mlp.gate.e_score_correction_bias
        before = bias.clone()
        bias[expert] = -1e9
        return lambda: bias.copy_(before)

    def without(module: Any, args: Any, output: Any) -> Any:  # Mixtral's rule: the softmax of two logits
        top = output[0].index_fill(-1, torch.tensor([expert]), -1e9).topk(2)
        return output[0], top.values.softmax(-1), top.indices

    return block.mlp.gate.register_forward_hook(without).remove


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_scores_without_an_expert_are_those_of_a_router_that_cannot_choose_it(
    name: str, made: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    loaded = made(name)
    expert = int(truth(loaded, FAMILIES[name], TEXT[0].tolist())["expert_ids"].flatten().bincount().argmax())
    whole = loaded.model(TEXT).logits.detach()
    with editing(loaded, Edit.drop_experts(1, [expert])):
        assert float((loaded.model(TEXT).logits.detach() - whole).abs().max()) > 1e-3
        edited = captured(loaded, tmp_path / "edited", ["expert_ids", "resid_post"])
    undo = by_hand(loaded.model, name, expert)
    changed = captured(loaded, tmp_path / "changed", ["expert_ids", "resid_post"])
    undo()
    assert edited.settings["edits"] == [f"drop_experts at layer_1.router_logits experts [{expert}]"]
    assert edited.column("response") == changed.column("response")
    scores, right = ([x for x in run.column("logprob") if x is not None] for run in (edited, changed))
    assert scores
    assert scores == pytest.approx(right, abs=1e-4)
    for number in range(len(edited)):
        ids = edited.read(number, "layer_1.expert_ids")
        assert not (ids == expert).any()
        assert torch.equal(ids, changed.read(number, "layer_1.expert_ids"))
    load = expert_load(edited, n_permutations=9).measured["experts"][expert]
    assert (load.expert, load.load.mean) == (expert, 0.0)


def test_a_router_that_is_forced_to_one_expert_has_load_1(made: Callable[..., LoadedModel], tmp_path: Path) -> None:
    loaded = made("mixtral", num_experts_per_tok=1)
    with editing(loaded, Edit.only_experts(1, [5])):
        run = captured(loaded, tmp_path, ["expert_ids", "expert_weights"])
    measured = expert_load(run, n_permutations=9).measured
    (layer,) = measured["layers"]
    assert (layer.largest_expert, layer.largest, layer.n_unused, layer.entropy_bits) == (5, 1.0, 7, 0.0)
    assert [each.load.mean for each in measured["experts"]] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert {float(run.read(n, "layer_1.expert_weights").min()) for n in range(len(run))} == {1.0}


def test_edits_of_one_router_are_made_one_after_the_other_and_at_positions(made: Callable[..., LoadedModel]) -> None:
    loaded = made("mixtral")
    router = loaded.model.model.layers[1].mlp.gate
    batch = {"input_ids": TEXT.repeat(2, 1), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    batch["attention_mask"][1, :4] = 0
    edits = [Edit.drop_experts(1, [2]), Edit.add("router_logits", 100.0, layers=1, experts=[2, 3])]
    with torch.no_grad(), editing(loaded, edits), hooked(router) as seen:
        loaded.model.generate(**batch, max_new_tokens=3, do_sample=False)
    for _, (logits, weights, ids) in seen:
        assert logits[:, 2].isneginf().all()
        assert not (ids == 2).any()
        assert (ids[:, 0] == 3).all()
        assert torch.allclose(weights.sum(-1), torch.ones(len(weights)))
    with torch.no_grad(), editing(loaded, Edit.only_experts(1, [0, 1], positions="prompt")), hooked(router) as seen:
        loaded.model.generate(**batch, max_new_tokens=6, do_sample=False)
    prompt, *steps = (set(output[2].view(2, -1, 2)[:, -8:].flatten().tolist()) for _, output in seen)
    assert prompt == {0, 1}
    assert not set.union(*steps) <= {0, 1}


def test_experts_that_cannot_be_dropped_are_refused(made: Callable[..., LoadedModel]) -> None:
    loaded = made("deepseek_v3")
    for edit, reason in (
        (partial(Edit.drop_experts, 1, [8]), "no expert 8: it has 8, 0 to 7"),
        (partial(Edit.drop_experts, 1, []), "write a list of numbers"),
        (partial(Edit.only_experts, 1, [1, 2]), "would leave 2 of 8 experts, and each token has 3"),
        (partial(Edit.scale, "layer_1.mlp_out", 0.0, experts=[1]), "they are those of router_logits"),
        (partial(Edit.scale, "layer_1.expert_ids", 0.0), "the router chooses; use Edit.drop_experts"),
        (partial(Edit.add, "layer_1.router_logits", torch.ones(3), experts=[1, 2]), r"expected \[2\]"),
    ):
        with pytest.raises(EditError, match=reason), editing(loaded, edit()):
            pass
    with pytest.raises(SiteUnavailable, match="has no router"), editing(loaded, Edit.drop_experts(0, [1])):
        pass
    left = [0, 4, 5]  # whichever of the two groups is chosen has too few
    with pytest.raises(EditError, match="too few others are left"), editing(loaded, Edit.only_experts(1, left)):
        loaded.model(TEXT)
    by_table = made("mixtral").model.model.layers[1].mlp.gate
    stock = by_table.forward
    by_table.forward = lambda x: (*stock(x)[:2], torch.tensor([[2, 5]]).expand(12, 2))
    with (
        pytest.raises(EditError, match="does not choose by its logits"),
        editing(made("mixtral"), Edit.drop_experts(1, [5])),
    ):
        made("mixtral").model(TEXT)
    del by_table.forward
    two = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
    with pytest.raises(EditError, match="computes 2 products with 8 features"):
        rerouted(two, [torch.ones(3, 4)], {}, 8, lambda logits: logits)


# Files


def test_ids_stay_as_they_are_in_every_copy(made: Callable[..., LoadedModel], tmp_path: Path) -> None:
    run = captured(made("mixtral"), tmp_path, ["expert_ids", "resid_post"], store_dtype="int8")
    ids = [run.read(number, "layer_1.expert_ids") for number in range(len(run))]
    file = merge([run.path], tmp_path / "merged.h5")
    alone = prune(file, tmp_path / "ids.h5", sites="expert_ids")
    for copy in (file, alone, convert(file, tmp_path / "wide.h5", dtype="float32")):
        for number, each in enumerate(ids):
            read = open_run(copy).read(number, "layer_1.expert_ids")
            assert read.dtype == torch.int16
            assert torch.equal(read, each)
    export(file, tmp_path / "st", "safetensors", dtype="float16")
    export(file, tmp_path / "np", "npz", dtype="float16")
    tensors = load_file(next((tmp_path / "st").glob("*.safetensors")))
    arrays = np.load(next((tmp_path / "np").glob("*.npz")))
    whole = run.rows("layer_1.expert_ids")[:]
    assert sorted(map(tuple, tensors["layer_1.expert_ids"].tolist())) == sorted(map(tuple, whole.tolist()))
    assert arrays["layer_1.expert_ids"].dtype == np.int16
    assert tensors["layer_1"].dtype == torch.float16


def test_a_file_of_version_1_6_reads_as_it_was_written() -> None:
    folder = ROOT / "tests" / "data" / "format-1.6" / "experts"
    check(folder)
    run = open_run(folder)
    ids = run.read(0, "layer_1.expert_ids")
    assert (ids.dtype, ids[:3].tolist()) == (torch.int16, [[2, 3], [2, 1], [3, 7]])
    assert (run.contents.activations["layer_1"].dtype, run.non_finite["layer_1.expert_ids"]) == (torch.int8, 0)


def test_what_needs_quantities_refuses_ids_by_name(made: Callable[..., LoadedModel], tmp_path: Path) -> None:
    run = captured(made("mixtral"), tmp_path, ["expert_ids"])
    for asked in (
        lambda: Selection.parse("expert_ids", reduce="mean"),
        lambda: Selection.parse("layer_1.expert_ids", project=torch.ones(2, 1)),
        lambda: sites_of(run.keys, run.questions(), ["layer_1.expert_ids"]),  # as `probe` asks first
        lambda: geometry(run, keys=["layer_1.expert_ids"]),
        lambda: difference_of_means(run, "layer_1.expert_ids"),
    ):
        with pytest.raises(SelectionError, match=r"expert_ids holds ids of experts"):
            asked()


# The load of experts


def test_loads_are_those_counted_by_hand(made: Callable[..., LoadedModel], tmp_path: Path) -> None:
    run = captured(made("mixtral"), tmp_path, ["expert_ids"], n=8)
    counted: dict[tuple[str, int], list[list[float]]] = {}
    table = run.table()
    for (task, _doc), own in table.groupby(["task", "doc_id"]):
        tokens: dict[tuple[int, ...], list[int]] = {}  # a token that choices share counts once
        for number in own.index:
            sample = run[number]
            fed = [*sample["input_ids"][0].tolist(), *sample["generated_ids"].tolist()]
            for position, ids in zip(
                sample["positions"].tolist(), sample["activations"]["layer_1.expert_ids"].tolist(), strict=True
            ):
                if position < sample["input_ids"].shape[1]:
                    tokens[tuple(fed[: position + 1])] = ids
        share = [sum(expert in ids for ids in tokens.values()) / len(tokens) for expert in range(8)]
        counted.setdefault(task, []).append(share)  # type: ignore[call-overload]
    by_question = np.array([share for own in counted.values() for share in own])
    measured = expert_load(run, positions="prompt", n_permutations=99).measured
    assert measured["n_questions"] == len(by_question) == 8
    assert [each.load.mean for each in measured["experts"]] == pytest.approx(by_question.mean(0))
    facts = next(each for each in measured["tasks"] if each.name == "demo_facts")
    own, others = (np.array(counted[name]).mean(0) for name in ("demo_facts", "demo_arithmetic"))
    for each in facts.experts:
        assert each.load == pytest.approx(own[each.expert])
        assert each.difference.mean == pytest.approx((own - others)[each.expert])


def test_p_values_are_those_of_the_test_over_one_table_and_find_what_was_planted() -> None:
    source = np.random.default_rng(0)
    values, group = source.random((40, 12)), np.arange(40) < 12
    values[group, 3] += 0.5
    everyone = np.ones(40, bool)
    ours = Contrasts([Group("a", group, everyone)], np.zeros(40, int), 2000, 1)
    for layer in (values[:, :5], values[:, 5:]):
        ours.add(layer)
    p = np.array([effect.p for layer in ours.effects()[0] for effect in layer])
    assert p == pytest.approx(differences(values, group, 2000, 2).p, abs=0.05)
    assert p.argmin() == 3
    assert p[3] < 0.01
    assert np.delete(p, 3).min() > 0.05


def test_right_and_wrong_are_compared_within_tasks() -> None:
    """Two tasks with other loads and other accuracies: without strata, the task would pass for a sign of right answers."""
    source = np.random.default_rng(0)
    task = np.arange(200) // 100
    right = source.random(200) < np.where(task == 0, 0.9, 0.2)
    values = source.normal(size=(200, 3)) + 3.0 * task[:, None]
    p = []
    for strata in (task, np.zeros(200, int)):
        contrasts = Contrasts([Group("all", right, np.ones(200, bool))], strata, 500, 0)
        contrasts.add(values)
        p.append(min(effect.p for effect in contrasts.effects()[0][0]))  # type: ignore[type-var]
    assert p[0] > 0.05
    assert p[1] < 0.01


@pytest.mark.parametrize(("name", "factor"), [("minimax-m3-text", 2.0), ("laguna", 2.5), ("deepseek-v3", 1.0)])
def test_a_number_that_multiplies_the_sum_of_experts_is_named(name: str, factor: float, tokenizer: Any) -> None:
    """MiniMax M3 and Laguna multiply behind the experts; DeepSeek V3 has its number (2.5) in the weights. Truth: what the mixture gives."""
    more = {"moe_routed_scaling_factor": 2.5} if name == "laguna" else {}
    loaded = LoadedModel(small(SMALL[name]._replace(settings={**SMALL[name].settings, **more})), tokenizer, name)
    layout, block = loaded.layout, loaded.model.model.layers[1].mlp
    notes = [f"by {factor:g} afterwards, which is not in {kind}" for kind in ("expert_weights", "expert_out")]
    assert [
        layout.notes.get(kind, "")[-len(note) :]
        for kind, note in zip(("expert_weights", "expert_out"), notes, strict=True)
    ] == (notes if factor != 1 else ["", ""])
    ids, seen = [5, 17, 99, 3, 250, 41, 7], dict[str, Tensor]()
    handles = [
        block.register_forward_hook(lambda module, args, out: seen.update(whole=out)),
        block.shared_experts.register_forward_hook(lambda module, args, out: seen.update(shared=out)),
    ]
    rows = plain_forward(loaded, ids, ["layer_1.expert_out"], range(len(ids))).rows["layer_1.expert_out"]
    for handle in handles:
        handle.remove()
    whole, shared = (seen[each].reshape(len(ids), -1) for each in ("whole", "shared"))
    torch.testing.assert_close(
        rows.view(len(ids), -1, whole.shape[1]).sum(1) * factor + shared, whole, atol=1e-6, rtol=1e-5
    )


def test_the_commands_drop_experts_and_measure_loads(
    made: Callable[..., LoadedModel], tokenizer: Any, tmp_path: Path
) -> None:
    made("mixtral").model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    asked = ["--capture_activations", "--benchmark", "demo", "--num_trials", "4", "--model", "tiny"]
    kept = ["--sites", "expert_ids", "--positions", "all", "--drop_experts", "1:0,1:2-3", "-o", "run"]
    done = within(*asked, *kept, cwd=tmp_path)
    assert not done.returncode, done.stderr
    done = within("experts", "run", "-o", "out", "--permutations", "19", cwd=tmp_path)
    assert not done.returncode, done.stderr
    assert "Largest (expert)" in done.stdout
    assert (tmp_path / "out/experts.png").is_file()
    found = json.loads((tmp_path / "out/experts.json").read_text())
    assert {each["expert"] for each in found["experts"] if each["layer"] == 1 and not each["load"]["mean"]} >= {0, 2, 3}
    wrong = within(*asked, "--drop_experts", "3", cwd=tmp_path)
    assert wrong.returncode
    assert "is no expert: write layer:expert" in wrong.stderr
