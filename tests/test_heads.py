"""Heads: their results against the attention itself, their strength against raw hooks, and two models side by side."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.commands import within
from helpers.forked import Forked, forked
from helpers.models import CONFIGS, FAMILIES, build
from helpers.raw_hooks import n_hooks
from scipy.stats import spearmanr
from torch import Tensor

from AutomaticEval import (
    ActivationComparator,
    ActivationExtractor,
    evaluate_with_activations,
    generate_inference_with_activations,
    open_run,
    strength_of_run,
)
from AutomaticEval.analysis.heads.compare import same_inputs
from AutomaticEval.analysis.heads.strength import inputs_of_run
from AutomaticEval.analysis.words.pairs import read_pairs
from AutomaticEval.analysis.words.profiles import load_profile
from AutomaticEval.capture.texts.sources import drawn, read_texts
from AutomaticEval.errors import ModelError, PathExists, PromptError, SelectionError, SiteUnavailable, StoreError
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.head_weights import head_results, output_weight
from AutomaticEval.models.loading import load_model
from AutomaticEval.models.recording import Kept, capturing
from AutomaticEval.sites import Site

IDS = [[5, 9, 33, 7, 120, 41, 8], [77, 3, 3, 250], [31, 6, 90, 12, 200, 111, 45, 8, 19, 20, 21]]


@pytest.fixture(params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> Any:
    return build(FAMILIES[request.param]())


def raw(model: Any, layer: int, ids: list[int]) -> tuple[Tensor, Tensor]:
    """What the output projection of a layer is given and gives, [pos, width] each, in one unpadded forward."""
    projection = model.get_submodule(find_layout(model).taps[Site("z", layer)].module)
    seen: list[Tensor] = []
    handle = projection.register_forward_hook(lambda module, args, out: seen.extend((args[0][0], out[0])))
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    return seen[0], seen[1]


def one_head_alone(model: Any, layer: int, z: Tensor) -> Tensor:
    """[pos, n_heads, d_model]: the projection itself, given one head's slice and zeros, less what it gives for zeros."""
    layout = find_layout(model)
    projection = model.get_submodule(layout.taps[Site("z", layer)].module)
    results = []
    for head in range(layout.n_heads):
        own = torch.zeros_like(z)
        columns = slice(head * layout.d_head, (head + 1) * layout.d_head)
        own[:, columns] = z[:, columns]
        with torch.no_grad():
            results.append(projection(own) - projection(torch.zeros_like(z)))
    return torch.stack(results, 1)


def norms(model: Any, layer: int, sequences: list[list[int]]) -> Tensor:
    """[tokens, n_heads]"""
    return torch.cat([one_head_alone(model, layer, raw(model, layer, ids)[0]).norm(dim=-1) for ids in sequences])


def test_results_of_heads_sum_to_the_attention(model: Any) -> None:
    layout = find_layout(model)
    for layer in range(layout.n_layers):
        z, out = raw(model, layer, IDS[0])
        projection = model.get_submodule(layout.taps[Site("z", layer)].module)
        results = head_results(z, projection, layout.n_heads)
        bias = projection.bias if getattr(projection, "bias", None) is not None else 0.0
        torch.testing.assert_close(results.sum(1) + bias, out, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(results, one_head_alone(model, layer, z), atol=1e-6, rtol=1e-6)


def test_captured_norms_are_those_of_the_results(model: Any) -> None:
    layout = find_layout(model)
    sites = [Site("head_result_norm", layer) for layer in range(layout.n_layers)]
    keep = Kept(torch.zeros(7, dtype=torch.long), torch.arange(7))
    with capturing(model, layout.pick(sites), layout.embedding, lambda *_: keep, 1) as found, torch.no_grad():
        model(torch.tensor([IDS[0]]), use_cache=False)
    for layer, site in enumerate(sites):
        assert layout.widths[site] == found.rows[site.key].shape[1] == layout.n_heads
        torch.testing.assert_close(found.rows[site.key], norms(model, layer, IDS[:1]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_strength_is_the_mean_over_real_tokens(side: str, model: Any) -> None:
    """Whatever the padding, the batches and their order; against one unpadded forward each, head by head."""
    width = max(map(len, IDS))
    pads = [[0] * (width - len(ids)) for ids in IDS]
    rows = [pad + ids if side == "left" else ids + pad for ids, pad in zip(IDS, pads, strict=True)]
    masks = [[int(number >= len(pad)) for number in range(width)] for pad in pads]
    masks = masks if side == "left" else [mask[::-1] for mask in masks]
    loader = [
        {"input_ids": torch.tensor(rows[:2]), "attention_mask": torch.tensor(masks[:2])},
        (torch.tensor(rows[2:]), torch.tensor(masks[2:])),
    ]
    with ActivationExtractor(model, "tiny") as extractor:
        extractor.extract_activations(loader)
        stats = extractor.get_all_stats()
        again = ActivationExtractor(model)
        again.extract_activations(IDS[::-1], batch_size=1)
    assert not n_hooks(model)
    for layer in range(find_layout(model).n_layers):
        expected = norms(model, layer, IDS)
        for head in range(expected.shape[1]):
            found, values = stats[layer, head], expected[:, head]
            assert found["n"] == sum(map(len, IDS))
            assert found["R_h"] == pytest.approx(values.mean().item(), rel=1e-5)
            assert found["std"] == pytest.approx(values.std(correction=0).item(), rel=1e-4)
            assert (found["min"], found["max"]) == pytest.approx((values.min().item(), values.max().item()), rel=1e-5)
            assert again.compute_R_h()[layer, head] == pytest.approx(found["R_h"], rel=1e-5)


def test_raw_slices_chosen_layers_and_heads(tiny_llama: LoadedModel) -> None:
    extractor = ActivationExtractor(tiny_llama, of="z")
    extractor.register_hooks(layers="1-2", heads=[3, 0])
    extractor.extract_activations(IDS, max_batches=1, batch_size=2)  # the first two
    found = extractor.compute_R_h()
    assert list(found) == [(1, 0), (1, 3), (2, 0), (2, 3)]
    for (layer, head), value in found.items():
        z = torch.cat([raw(tiny_llama.model, layer, ids)[0] for ids in (IDS[0], IDS[1])]).view(-1, 4, 8)
        assert value == pytest.approx(z[:, head].norm(dim=-1).mean().item(), rel=1e-5)


def test_texts_and_a_second_call_adds(demo: LoadedModel) -> None:
    texts = ["What is red?", "Is a dog an animal?", "What is 1 + 1?"]
    extractor, whole = ActivationExtractor(demo), ActivationExtractor(demo)
    extractor.extract_activations(texts[:1])
    extractor.extract_activations(texts[1:])
    whole.extract_activations(texts)
    assert extractor.get_all_stats()[0, 0]["n"] == sum(len(demo.tokenizer(text)["input_ids"]) for text in texts)
    assert extractor.compute_R_h() == pytest.approx(whole.compute_R_h(), rel=1e-6)


def test_trained_weights_are_looked_at_again(tokenizer: Any) -> None:
    loaded = LoadedModel(build(CONFIGS["gpt2"]()), tokenizer, "gpt2")
    before = ActivationExtractor(loaded)
    before.extract_activations(IDS)
    with torch.no_grad():
        loaded.model.transformer.h[1].attn.c_proj.weight[:8] *= 2  # what head 0 writes
    after = ActivationExtractor(loaded)
    after.extract_activations(IDS)
    ratio = after.compute_R_h()[1, 0] / before.compute_R_h()[1, 0]
    assert ratio == pytest.approx(2, rel=1e-6)
    assert after.compute_R_h()[1, 1] == pytest.approx(before.compute_R_h()[1, 1], rel=1e-6)


def test_projections_put_in_later_are_looked_at(tokenizer: Any) -> None:
    """Another module in the same place, columns exchanged, and a module whose own parameters say nothing of it."""

    class Adapted(torch.nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base, self.in_features, self.by = base, base.in_features, 1.0

        @property
        def weight(self) -> Any:
            return self.base.weight

        def forward(self, z: Tensor) -> Tensor:
            return self.base(z) * self.by  # type: ignore[no-any-return]

    loaded = LoadedModel(build(CONFIGS["llama"]()), tokenizer, "llama")

    def found() -> float:
        extractor = ActivationExtractor(loaded)
        extractor.extract_activations(IDS)
        return extractor.compute_R_h()[2, 1]

    attention = loaded.model.model.layers[2].self_attn
    before = found()
    with torch.no_grad():
        attention.o_proj.weight[:, [8, 22]] = attention.o_proj.weight[:, [22, 8]]
    exchanged = found()
    assert exchanged == pytest.approx(norms(loaded.model, 2, IDS)[:, 1].mean().item(), rel=1e-5)
    assert exchanged != pytest.approx(before, rel=1e-4)
    attention.o_proj = Adapted(attention.o_proj).eval()
    assert found() == pytest.approx(exchanged, rel=1e-5)
    attention.o_proj.by = 3.0
    assert found() == pytest.approx(3 * exchanged, rel=1e-5)


@pytest.mark.parametrize("how", ["load_in_8bit", "load_in_4bit"])
def test_quantised_projections(how: str) -> None:
    """Against the projection itself, given one head alone; LLM.int8 rounds what it is given, too."""
    loaded = load_model("demo", options=LoadOptions(**{how: True}))
    extractor = ActivationExtractor(loaded)
    extractor.extract_activations(IDS[:1])
    found = extractor.compute_R_h()
    within = 0.05 if how == "load_in_8bit" else 1e-3
    for layer in range(loaded.layout.n_layers):
        z = raw(loaded.model, layer, IDS[0])[0]
        expected = one_head_alone(loaded.model, layer, z).float().norm(dim=-1).mean(0)
        for head, value in enumerate(expected.tolist()):
            assert found[layer, head] == pytest.approx(value, rel=within)


def test_over_a_stored_run_and_beside_a_benchmark(demo: LoadedModel, tmp_path: Path) -> None:
    """Norms kept without z, z kept with the model: the same; and that of the prompts' tokens, each once."""
    how: dict[str, Any] = {"limit": 6, "positions": "all", "sites": "z,head_result_norm"}
    run = open_run(evaluate_with_activations(demo, "demo_facts", activation_save_dir=tmp_path, **how).folder or "")
    found = strength_of_run(run)
    prefixes = {tuple(sample["token_ids"][: n + 1].tolist()) for sample in run for n in range(len(sample["token_ids"]))}
    assert found[0, 0]["n"] == len(prefixes)
    for layer in range(demo.layout.n_layers):
        rows = {}
        for sample in run:
            whole = sample["token_ids"].tolist()
            for n, values in enumerate(norms(demo.model, layer, [whole])):
                rows[tuple(whole[: n + 1])] = values
        expected = torch.stack(list(rows.values())).mean(0)
        for head, value in enumerate(expected.tolist()):
            assert found[layer, head]["R_h"] == pytest.approx(value, rel=1e-4)
    only_z = evaluate_with_activations(
        demo, "demo_facts", activation_save_dir=tmp_path / "z", **{**how, "sites": "z"}
    ).folder
    from_z = strength_of_run(open_run(only_z or ""), demo)
    assert from_z.keys() == found.keys()
    assert all(from_z[key]["R_h"] == pytest.approx(found[key]["R_h"], rel=1e-5) for key in found)
    with pytest.raises(StoreError, match="other weights"):
        strength_of_run(open_run(only_z or ""), LoadedModel(build(CONFIGS["llama"]()), demo.tokenizer, "other"))
    script = f"import sys; from AutomaticEval import *; print(strength_of_run(open_run({str(only_z)!r}), 'demo')[0, 0]['R_h'])"
    alone = Forked(["-c", script]).wait()  # nothing is known there
    assert float(alone.stdout) == pytest.approx(found[0, 0]["R_h"], rel=1e-5)
    with pytest.raises(StoreError, match="keep z and pass the model"):
        strength_of_run(open_run(only_z or ""))


def test_norms_while_generating_and_in_bfloat16(tokenizer: Any, tmp_path: Path) -> None:
    loaded = LoadedModel(build(CONFIGS["llama"](), torch.bfloat16), tokenizer, "llama")
    file = tmp_path / "one.h5"
    _, data = generate_inference_with_activations(
        "What is red?", loaded, file, sites="z,head_result_norm,resid_post", max_new_tokens=5
    )
    weight = output_weight(loaded.model.model.layers[1].self_attn.o_proj)
    z = data["activations"]["layer_1.z"].float().view(-1, 4, 8)
    expected = torch.einsum("phd,hdm->phm", z, weight.view(4, 8, 32)).norm(dim=-1)
    torch.testing.assert_close(data["activations"]["layer_1.head_result_norm"], expected, atol=1e-5, rtol=1e-5)


def test_structure_that_is_not_recognised(tiny_llama: LoadedModel) -> None:
    expected = ActivationExtractor(tiny_llama)
    expected.extract_activations(IDS)
    named = ActivationExtractor(tiny_llama.model, "named by hand")
    named.set_model_structure("model.layers.{}.self_attn.o_proj", n_layers=3, n_heads=4, d_head=8)
    named.extract_activations(IDS)
    assert named.compute_R_h() == expected.compute_R_h()
    with pytest.raises(ModelError, match=r"no module model\.blocks\.0"):
        named.set_model_structure("model.blocks.{}", 3, 4, 8)


def test_state_space_models_have_no_heads(tokenizer: Any) -> None:
    config = hf.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2)
    with pytest.raises((SiteUnavailable, SelectionError), match=r"head"):
        ActivationExtractor(LoadedModel(build(config), tokenizer, "mamba")).register_hooks()


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        ([], PromptError, "no texts"),
        ("Hello", PromptError, r"write \[text\]"),
        ([None, "Hello"], PromptError, r"no numbers.*NoneType"),
        (["Hello", None], PromptError, "found NoneType"),
        (["Hello", ""], PromptError, "empty text"),
        ([{"ids": 1}], PromptError, "no input_ids"),
        ([torch.arange(3)], PromptError, r"\[3\]"),
        ([(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 2))], PromptError, r"\[1, 2\]"),
    ],
)
def test_wrong_data_is_refused(data: Any, error: type[Exception], says: str, tiny_llama: LoadedModel) -> None:
    extractor = ActivationExtractor(tiny_llama)
    with pytest.raises(error, match=says):
        extractor.extract_activations(data)
    assert not n_hooks(tiny_llama.model)
    with pytest.raises(PromptError, match="nothing was extracted"):
        extractor.compute_R_h()


def test_wrong_choices_are_refused(tiny_llama: LoadedModel) -> None:
    with pytest.raises(SelectionError, match="no head"):
        ActivationExtractor(tiny_llama).register_hooks(heads=[4])
    with pytest.raises(SelectionError, match="no head '0-9'"):
        ActivationExtractor(tiny_llama).register_hooks(heads="0-9")
    with pytest.raises(SelectionError, match="result or z"):
        ActivationExtractor(tiny_llama, of="y")
    with pytest.raises(ModelError, match="without a tokenizer"):
        ActivationExtractor(tiny_llama.model).extract_activations(["Hi"])


def test_long_texts_are_cut_and_counted(tiny_llama: LoadedModel) -> None:
    long = [random.Random(0).randrange(400) for _ in range(200)]
    extractor = ActivationExtractor(tiny_llama)
    with pytest.warns(UserWarning, match="1 texts were longer"):
        extractor.extract_activations([long, IDS[0]])
    assert extractor.get_all_stats()[0, 0]["n"] == 128 + 7


def strengths(loaded: LoadedModel) -> ActivationExtractor:
    extractor = ActivationExtractor(loaded)
    extractor.extract_activations(IDS)
    return extractor


def test_comparison_of_a_model_with_itself_changed(tokenizer: Any, tmp_path: Path) -> None:
    """The last layer's projection scaled, head by head: the ratios are the scales, and nothing else moved."""
    pre = LoadedModel(build(CONFIGS["llama"]()), tokenizer, "pre")
    fine = LoadedModel(build(CONFIGS["llama"]()), tokenizer, "fine")
    scales = [1.0, 2.0, 0.5, 3.0]
    with torch.no_grad():
        weight = fine.model.model.layers[2].self_attn.o_proj.weight
        weight.mul_(torch.tensor(scales).repeat_interleave(8))
    before, after = strengths(pre), strengths(fine)
    comparator = ActivationComparator(before, after)
    found = comparator.compare()
    for layer in range(3):
        for head in range(4):
            scale = scales[head] if layer == 2 else 1.0
            assert found["ratios"][layer, head] == pytest.approx(scale, rel=1e-5)
            assert (
                found["differences"][layer, head] == found["fine_tuned"][layer, head] - found["pre_tuned"][layer, head]
            )
    correlation = found["rank_correlation"]
    expected = spearmanr(list(found["pre_tuned"].values()), list(found["differences"].values()))
    assert correlation["rho"] == pytest.approx(expected.statistic)
    assert correlation["interval"] is None
    assert correlation["reason"].startswith("3 layers")
    before.save_results(tmp_path / "pre.json")
    after.save_results(tmp_path / "fine.json")
    assert ActivationComparator(tmp_path / "pre.json", tmp_path / "fine.json").compare() == found
    comparator.save_comparison(tmp_path / "comparison.json")
    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert stored["ratios"]["2:1"] == pytest.approx(2.0, rel=1e-5)
    comparator.visualize_comparison(tmp_path / "heat.png")
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(PathExists):
        comparator.save_comparison(tmp_path / "comparison.json")
    with pytest.raises(PathExists):
        comparator.visualize_comparison(tmp_path / "heat.png")


def test_a_correlation_over_six_layers_is_for_other_layers_and_other_texts(tokenizer: Any, tmp_path: Path) -> None:
    """From extractors and from their files; the interval is wider than that of the same strengths without texts."""
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 6
    pre, fine = (LoadedModel(build(config), tokenizer, name) for name in ("pre", "fine"))
    with torch.no_grad():
        for layer in fine.model.model.layers:
            layer.self_attn.o_proj.weight.add_(
                0.02 * torch.randn(32, 32, generator=torch.Generator().manual_seed(layer.self_attn.layer_idx))
            )
    texts = [[number % 90 + 1, number % 7 + 1, number + 3, 5] for number in range(30)]
    both = [ActivationExtractor(each) for each in (pre, fine)]
    for extractor, name, batch_size in zip(both, ("pre", "fine"), (8, 3), strict=True):
        extractor.extract_activations(texts, batch_size=batch_size)
        extractor.save_results(tmp_path / f"{name}.json")
    found = ActivationComparator(*both).compare()["rank_correlation"]
    low, high = found["interval"]
    assert -1 < low < found["rho"] < high < 1
    assert (found["n_layers"], found["interval_over"], found["reason"]) == (6, "layers and texts", None)
    assert 5 <= found["n_text_groups"] <= 20
    of_files = ActivationComparator(tmp_path / "pre.json", tmp_path / "fine.json").compare()["rank_correlation"]
    assert of_files == found
    of_means = ActivationComparator(*(each.compute_R_h() for each in both)).compare()["rank_correlation"]
    assert of_means["interval_over"] == "layers"
    assert low < of_means["interval"][0]
    assert high > of_means["interval"][1]


def test_a_model_that_did_not_change_has_no_correlation(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    same = strengths(tiny_llama)
    comparator = ActivationComparator(same, same)
    found = comparator.compare()
    assert set(found["differences"].values()) == {0.0}
    assert found["rank_correlation"]["rho"] is None
    comparator.save_comparison(tmp_path / "comparison.json")
    comparator.visualize_comparison(tmp_path / "heat.png")


def test_numbers_that_are_not_finite_are_null_in_files(tmp_path: Path) -> None:
    """A head that wrote nothing before has no ratio; one that overflows has no strength."""
    heads = {(0, 0): 0.0, (0, 1): 1.0, (0, 2): 2.0}
    ActivationComparator(heads, {**heads, (0, 2): float("inf")}).save_comparison(tmp_path / "comparison.json")
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["ratios"] == {"0:0": None, "0:1": 1.0, "0:2": None}
    assert found["fine_tuned"]["0:2"] is None


def test_other_inputs_are_not_compared(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    raw_slices, fewer = ActivationExtractor(tiny_llama, of="z"), ActivationExtractor(tiny_llama)
    raw_slices.extract_activations(IDS)
    fewer.extract_activations(IDS[:1])
    raw_slices.save_results(tmp_path / "z.json")
    with pytest.raises(SelectionError, match="of is result and z"):
        ActivationComparator(strengths(tiny_llama), tmp_path / "z.json")
    with pytest.raises(SelectionError, match="n, the number of tokens, is 22 and 7"):
        ActivationComparator(strengths(tiny_llama), fewer)
    shuffled = ActivationExtractor(tiny_llama)
    shuffled.extract_activations([each[::-1] for each in IDS])
    for name, each in (("one", strengths(tiny_llama)), ("other", shuffled)):
        each.save_results(tmp_path / f"{name}.json")
    with pytest.raises(SelectionError, match="the fingerprint of the texts is"):
        ActivationComparator(tmp_path / "one.json", tmp_path / "other.json")
    old = json.loads((tmp_path / "other.json").read_text())
    del old["inputs"]
    for head in old["heads"]:
        del head["by_group"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    with pytest.warns(UserWarning, match="does not say of which texts"):
        ActivationComparator(tmp_path / "one.json", tmp_path / "old.json")
    with pytest.raises(SelectionError, match="longer than the 448 tokens that both models can read"):
        same_inputs({"a": "demo", "b": "demo"}, ["Hi", "What is red? " * 400], answers_of="a")


def test_training_mode_and_wrong_structures_are_refused(tokenizer: Any) -> None:
    loaded = LoadedModel(build(CONFIGS["llama"]()), tokenizer, "llama")
    extractor = ActivationExtractor(loaded)
    extractor.register_hooks()
    loaded.model.train()
    with pytest.raises(ModelError, match="training mode"):
        extractor.extract_activations(IDS)
    loaded.model.eval()
    for path, n_heads, d_head in (("model.layers.{}.self_attn.o_proj", 2, 8), ("model.layers.{}.self_attn", 4, 8)):
        with pytest.raises(ModelError, match="is no projection"):
            extractor.set_model_structure(path, 3, n_heads, d_head)
    with pytest.raises(ModelError, match="for the layer"):
        extractor.set_model_structure("model.layers.0.self_attn.o_proj", 3, 4, 8)


def test_models_of_other_heads_are_not_compared(tiny_llama: LoadedModel) -> None:
    some = ActivationExtractor(tiny_llama)
    some.register_hooks(heads=[0])
    some.extract_activations(IDS)
    with pytest.raises(SelectionError, match=r"9 are in one alone, first \(layer, head\) \(0, 1\)"):
        ActivationComparator(strengths(tiny_llama), some)
    with pytest.raises(StoreError, match="is no JSON"):
        ActivationComparator(str(Path(__file__)), some)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ('{"input": "a"}\n{"input": " "}\n', r"line 2, field 'input': an empty text"),
        ('{"input": "a"}\n{"body": "b"}\n', r"line 2: none of the fields text, input, question, prompt\. Found body"),
        ('{"input": "a"}\n{"text"\n', "line 2: not JSON"),
        ('["a", 3]', "item 2: int, not a text"),
        ("[]", "holds no texts"),
        ("", "holds no texts"),
    ],
)
def test_files_without_a_text_say_where(written: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(written)
    with pytest.raises(PromptError, match=says):
        read_texts(tmp_path / "data.json")


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    """JSON may hold U+2028 and the like as they are, in every file of texts that is read; and a file may begin with a mark."""
    odd = "one\u2028two\u0085three"
    (tmp_path / "texts.jsonl").write_text("\ufeff" + json.dumps({"text": odd}, ensure_ascii=False) + "\n", "utf-8")
    assert read_texts(tmp_path / "texts.jsonl") == [odd]
    pair = {"clean": odd, "corrupted": "b", "answer": "c", "wrong": "d"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair, ensure_ascii=False), "utf-8")
    assert read_pairs(tmp_path / "pairs.jsonl")[0].clean == odd
    item = {"category": "plain", "text": odd}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(item, ensure_ascii=False) + "\n", "utf-8")
    (tmp_path / "own.toml").write_text('prompts = "prompts.jsonl"\nneutral = "plain"\n')
    assert load_profile(tmp_path / "own.toml").category("plain") == [odd]


def test_texts_of_files(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('[{"question": "a"}, {"text": "b", "other": 1}, "c"]')
    (tmp_path / "data.jsonl").write_text('{"input": "a"}\n\n{"text": "b"}\n"c"\n')
    assert read_texts(tmp_path / "data.json") == read_texts(tmp_path / "data.jsonl") == ["a", "b", "c"]
    assert drawn(list("abcdefgh"), 3, 1) == drawn(list("abcdefgh"), 3, 1) == sorted(drawn(list("abcdefgh"), 3, 1))
    with pytest.raises(PromptError, match="no file"):
        read_texts(tmp_path / "absent.json")


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The demo model, and itself with one head's result doubled, saved as a checkpoint."""
    folder = tmp_path_factory.mktemp("fine")
    model = hf.AutoModelForCausalLM.from_pretrained(DEMO_FOLDER)
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight[:, :32] *= 2
    model.save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(DEMO_FOLDER).save_pretrained(folder)
    return "demo", str(folder)


command = within


@pytest.mark.parametrize("answers", [[], ["--answers_of", "fine", "--max-new-tokens", "6"]])
def test_heads_compare_from_the_command_line(answers: list[str], two_models: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([{"input": f"What is {n} + 1?"} for n in range(12)]))
    asked = ["heads", "compare", "--pre_tuned_model", two_models[0], "--fine_tuned_model", two_models[1]]
    asked += ["--data_path", "data.json", "--sample_num", "5", "--output_dir", "results", *answers]
    done = forked(*asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert written == [
        "comparison.json",
        "comparison_heatmap.png",
        "fine_tuned_activations.json",
        "pre_tuned_activations.json",
    ]
    found = json.loads((tmp_path / "results" / "comparison.json").read_text())
    moved = {key: ratio for key, ratio in found["ratios"].items() if abs(ratio - 1) > 1e-3}
    assert moved == {"3:0": pytest.approx(2.0, rel=1e-4)}
    assert "Rank correlation" in done.stdout
    heads = json.loads((tmp_path / "results" / "pre_tuned_activations.json").read_text())["heads"]
    n_prompt = 5 * len(hf.AutoTokenizer.from_pretrained(DEMO_FOLDER)("What is 3 + 1?")["input_ids"])
    assert heads[0]["n"] > n_prompt + 4 if answers else heads[0]["n"] <= n_prompt + 5
    before = (tmp_path / "results" / "comparison.json").read_bytes()
    again = command(*asked, cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("PathExists")
    assert (tmp_path / "results" / "comparison.json").read_bytes() == before


def test_heads_strength_from_the_command_line(demo: LoadedModel, tmp_path: Path) -> None:
    texts = ["What is red?", "Is a dog an animal?"]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    done = command("heads", "strength", "--data_path", "data.jsonl", "--layers", "0-1", "--heads", "-1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    extractor = ActivationExtractor(demo)
    extractor.extract_activations(texts)
    found = json.loads((tmp_path / "results" / "head_strength.json").read_text())["heads"]
    assert [(each["layer"], each["head"]) for each in found] == [(0, 3), (1, 3)]
    assert [each["R_h"] for each in found] == pytest.approx([extractor.compute_R_h()[n, 3] for n in (0, 1)], rel=1e-5)
    assert (tmp_path / "results" / "head_strength.png").exists()
    (tmp_path / "data.jsonl").write_text('{"text": ""}')
    bad = command("heads", "strength", "--data_path", "data.jsonl", "--output_dir", "other", cwd=tmp_path)
    assert (bad.returncode, "line 1" in bad.stderr) == (2, True)


def test_head_strength_beside_a_benchmark(tmp_path: Path) -> None:
    done = command("--head_strength", "--benchmark", "demo", "--limit", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "activations").iterdir()
    run = open_run(folder)
    assert run.keys == [f"layer_{layer}.head_result_norm" for layer in range(4)]
    written = json.loads((folder / "head_strength.json").read_text())
    assert (written["scoring"], written["positions"]) == ("tree", "all")
    assert written["inputs"] == {**inputs_of_run(run), "n_texts": len(run)} != inputs_of_run(run[1:])
    ActivationComparator(folder / "head_strength.json", folder / "head_strength.json")
    assert {(each["layer"], each["head"]): each["R_h"] for each in written["heads"]} == {
        key: each["R_h"] for key, each in strength_of_run(run).items()
    }
    both = command(
        *("--head_strength", "--capture_activations", "--benchmark", "demo_facts", "--limit", "2"),
        *("--activation_save_dir", "both", "--scoring", "stock"),
        cwd=tmp_path,
    )
    assert both.returncode == 0, both.stderr
    (folder,) = (tmp_path / "both").iterdir()
    assert {"embeddings", "layer_0", "layer_0.head_result_norm"} <= set(open_run(folder).keys)
    assert json.loads((folder / "head_strength.json").read_text())["scoring"] == "stock"
