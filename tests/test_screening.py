"""Scores of heads: models whose answer is known, and the same numbers by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from helpers.commands import within
from helpers.forked import forked
from helpers.models import CONFIGS, FAMILIES, build
from helpers.raw_hooks import n_hooks
from scipy.stats import permutation_test
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import DiffLlamaConfig, GPT2Config, GPTNeoConfig, PreTrainedTokenizerFast

from AutomaticEval.analysis.heads.ablate import Ablation
from AutomaticEval.analysis.heads.compare import ActivationComparator
from AutomaticEval.analysis.heads.screen import screen
from AutomaticEval.analysis.heads.strength import ActivationExtractor
from AutomaticEval.analysis.heads.sweep_folder import SweepFolder
from AutomaticEval.analysis.heads.sweep_results import sweep_pairs, sweep_prompts
from AutomaticEval.analysis.numbers.permutation import differences
from AutomaticEval.analysis.parts.before_after import greedy_answers
from AutomaticEval.analysis.parts.direct_effect import DirectEffects, _unembedded
from AutomaticEval.analysis.words.keywords import Words
from AutomaticEval.analysis.words.pairs import Pair
from AutomaticEval.analysis.words.profiles import Profile, load_profile
from AutomaticEval.analysis.words.targets import Target, first_tokens, targets_of, tokens_within
from AutomaticEval.capture.texts.forward import padded
from AutomaticEval.capture.texts.sources import drawn
from AutomaticEval.errors import PromptError, SiteUnavailable, StoreError
from AutomaticEval.models.attention import check_patterns, reading_patterns
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.head_weights import head_results
from AutomaticEval.models.recording import Kept, capturing
from AutomaticEval.report.figures import draw
from AutomaticEval.sites import Site

IDS = [5, 9, 33, 7, 120, 41, 8]
PROMPTS = {
    "gratitude": ["I want to thank you for the", "So many thanks to", "we thank all of", "a big thanks and"],
    "neutral": ["I want to give you the", "So many people go to", "we know all of", "a big house and"],
}
KEYWORDS = {"gratitude": ["thank", "thanks"]}


def screened(loaded: LoadedModel, prompts: Any, keywords: Any, *targets: Any, **how: Any) -> Any:
    """The scores, as files hold them."""
    return screen(loaded, Profile("own", prompts, keywords, "neutral"), *targets, **how).as_json()["scores"]


@pytest.fixture(params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> Any:
    return build(FAMILIES[request.param]())


def read(model: Any, taps: dict[str, Any], sequences: Sequence[Sequence[int]]) -> Any:
    """Key -> [real tokens, width]"""
    batch = padded(sequences)
    keep = Kept(*batch.mask.nonzero(as_tuple=True))
    given = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
    embedding = find_layout(model).embedding
    with torch.no_grad(), capturing(model, taps, embedding, lambda *_: keep, len(sequences)) as found:
        model(**given, use_cache=False)
    return found.rows


def test_patterns_times_values_are_z(model: Any) -> None:
    """The definition of attention, from the projection of the values; then the model attends as before."""
    layout = find_layout(model)
    kinds, before = ("v", "z"), (model.config._attn_implementation, n_hooks(model))
    taps = layout.pick(Site(kind, layer) for layer in range(layout.n_layers) for kind in kinds)
    with reading_patterns(model, layout) as patterns:
        rows = read(model, taps, [IDS])
        found = [patterns.of(layer) for layer in range(layout.n_layers)]
    assert (model.config._attn_implementation, n_hooks(model)) == before
    for layer in range(layout.n_layers):
        v = rows[f"layer_{layer}.v"].view(len(IDS), layout.n_kv_heads, -1)
        v = v.repeat_interleave(layout.n_heads // layout.n_kv_heads, 1)  # grouped queries
        z = torch.einsum("hqk,khd->qhd", found[layer][0], v).flatten(1)
        torch.testing.assert_close(z, rows[f"layer_{layer}.z"], atol=1e-5, rtol=1e-5)


def test_what_is_no_pattern_is_refused(tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout, before = tiny_llama.model, tiny_llama.layout, n_hooks(tiny_llama.model)
    attention = model.model.layers[1].self_attn
    halve = attention.register_forward_hook(lambda module, args, out: (out[0], out[1] / 2))
    refused = pytest.raises(SiteUnavailable, match=r"block 1 gives is no pattern: a position pays 0\.5")
    with refused, torch.no_grad(), reading_patterns(model, layout) as patterns:
        model(torch.tensor([IDS]))
        patterns.of(1)
    halve.remove()
    drop = attention.register_forward_hook(lambda module, args, out: (out[0], None))
    refused = pytest.raises(SiteUnavailable, match="block 1 gives no weights")
    with refused, torch.no_grad(), reading_patterns(model, layout) as patterns:
        model(torch.tensor([IDS]))
        patterns.of(1)
    drop.remove()
    assert (model.config._attn_implementation, n_hooks(model)) == ("sdpa", before)

    def cannot(name: str) -> None:
        raise ValueError("no eager")

    monkeypatch.setattr(model, "set_attn_implementation", cannot)
    with pytest.raises(SiteUnavailable, match="cannot attend eagerly"), reading_patterns(model, layout):
        pass


TARGETS = [Target([11], [250]), Target([3, 4, 5], [77, 90])]


def test_direct_effects_and_everything_else_are_the_logit_difference(model: Any, tokenizer: Any) -> None:
    """Of all heads, of their biases, of the MLPs and the embedding, in float64 through the norm with its size left as it was."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and gains that are not 0 and 1
                parameter.add_(torch.randn_like(parameter) * 0.2)
    loaded = LoadedModel(model, tokenizer, "tiny")
    effects, layout = DirectEffects(loaded, TARGETS), loaded.layout
    every = range(layout.n_layers)
    sites = [Site("embed"), Site("logits"), *(Site(kind, n) for n in every for kind in ("attn_out", "mlp_out"))]
    rows = {key: value[-1:] for key, value in read(model, effects.taps | layout.pick(sites), [IDS]).items()}
    found = effects.of(rows)  # [1, n_targets, n_layers, n_heads]
    last, norm = rows["final_norm_input"][0].double(), model.get_submodule(layout.taps[Site("final_norm")].module)

    def through(part: Tensor, module: Any, at: Tensor) -> Tensor:
        """The change of a norm's output along a part, its size held: the derivative without that of the size."""
        module = module.double()
        gave = module(at) - module(torch.zeros_like(at))
        centred = at - at.mean() if "LayerNorm" in type(module).__name__ else at
        part = part - part.mean() if "LayerNorm" in type(module).__name__ else part
        size = (centred @ centred) / (centred @ (gave / gain(module)))
        module.float()
        return gain(module) * part / size

    def gain(module: Any) -> Tensor:
        weight = module.weight.double()
        return 1 + weight if "Gemma" in type(module).__name__ else weight

    @torch.no_grad()
    def difference(stream: Tensor, target: Target) -> float:
        unembedding = model.get_output_embeddings().weight.double()
        return float((unembedding[target.answer].mean(0) - unembedding[target.against].mean(0)) @ stream)

    for number, target in enumerate(TARGETS):
        for layer in every:
            tap = layout.taps[Site("attn_out", layer)]
            projection = model.get_submodule(layout.taps[Site("z", layer)].module)
            parts = head_results(rows[f"layer_{layer}.z"][0], projection, layout.n_heads).double()
            if layer in effects._post_norms:
                given = rows[f"{layer}.given"][0].double()
                parts = torch.stack([through(part, model.get_submodule(tap.module), given) for part in parts])
            expected = [difference(through(part * tap.scale, norm, last), target) for part in parts]
            assert found[0, number, layer].tolist() == pytest.approx(expected, abs=1e-5, rel=1e-4)
        whole = sum(
            difference(through(rows[f"layer_{n}.{k}"][0].double(), norm, last), target)
            for n in every
            for k in ("attn_out", "mlp_out")
        )
        whole += difference(through(rows["embeddings"][0].double(), norm, last), target)
        offset = getattr(norm, "bias", None)
        whole += 0.0 if offset is None else difference(offset.double(), target)
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            whole += float((bias[target.answer].mean() - bias[target.against].mean()).detach())
        logits = rows["logits"][0].double()
        if getattr(model.config, "final_logit_softcapping", None):
            cap = model.config.final_logit_softcapping
            logits = torch.atanh(logits / cap) * cap
        logits = logits * getattr(model.config, "logits_scaling", 1.0)
        told = float(logits[target.answer].mean() - logits[target.against].mean())
        assert whole == pytest.approx(told, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("kind", ["plain", "wrapped"])
def test_several_tokens_in_bfloat16(kind: str, tokenizer: Any) -> None:
    """What all tokens' unembeddings share cancels out exactly, however many there are on either side."""
    model = build(CONFIGS["llama"]()).to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.add_(3 * model.lm_head.weight.std() * torch.randn(1, 32, dtype=torch.bfloat16))
    target = Target(list(range(15)), list(range(100, 137)))
    rows = model.lm_head.weight.detach().double()
    expected = (rows[target.answer].mean(0) - rows[target.against].mean(0)).float()
    if kind == "wrapped":  # no plain projection: by derivatives

        class Wrapped(torch.nn.Linear):
            pass

        model.lm_head.__class__ = Wrapped
    torch.testing.assert_close(_unembedded(model, [target], 32)[0], expected, atol=1e-6, rtol=1e-5)


def test_an_unembedding_that_reads_something_else_is_refused(tokenizer: Any) -> None:
    model = build(CONFIGS["llama"]())
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    with pytest.raises(SiteUnavailable, match="not what its final norm gives"):
        DirectEffects(LoadedModel(model, tokenizer, "tiny"), TARGETS)


def of_words() -> Any:
    """A tokenizer whose tokens are the words of PROMPTS."""
    words = sorted({word for texts in PROMPTS.values() for text in texts for word in text.split()})
    made = Tokenizer(WordLevel({"?": 0, **{word: number for number, word in enumerate(words, 1)}}, unk_token="?"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def constructed() -> LoadedModel:
    """One block of two heads. Head 0 attends to keywords, and writes the direction of token 11; head 1 attends to all alike, writes nothing."""
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2, n_positions=64, tie_word_embeddings=False)
    model = build(config)
    tokenizer = of_words()
    own = tokenizer("thank thanks")["input_ids"]
    block, zeros = model.transformer.h[0], torch.nn.init.zeros_
    with torch.no_grad():
        for parameter in (model.transformer.wpe.weight, *block.attn.parameters(), *block.mlp.parameters()):
            zeros(parameter)
        model.transformer.wte.weight.mul_(0.1)[:, 0] = 0
        model.transformer.wte.weight[own, 0] = 5.0  # keywords are told by the first feature
        block.attn.c_attn.bias[0] = 30.0  # q of head 0 looks at feature 0 of its keys
        block.attn.c_attn.weight[0, 32] = 10.0
        block.attn.c_attn.weight[0, 64] = 1.0  # v of head 0: that feature; of head 1: another
        block.attn.c_attn.weight[1, 64 + 16] = 1.0
        direction = model.lm_head.weight[11] - model.lm_head.weight[250]
        block.attn.c_proj.weight[0] = (
            0.01 * direction
        )  # small beside the stream, so that it does not make the norm's size
    return LoadedModel(model, tokenizer, "constructed")


def test_heads_whose_answer_is_known(same_hooks_after: Any) -> None:
    loaded = constructed()
    same_hooks_after(loaded.model)
    target = {"gratitude": Target([11], [250])}
    scores = screened(loaded, PROMPTS, KEYWORDS, target, n_permutations=500)
    assert [(each["layer"], each["head"], each["category"]) for each in scores] == [
        (0, 0, "gratitude"),
        (0, 1, "gratitude"),
    ]
    attending, uniform = scores
    assert attending["attention"]["mean"] > 0.4
    assert attending["attention"]["paid"] > 0.5
    assert attending["attention"]["beside_neutral"]["mean"] > 0.4
    assert attending["strength"]["change"] > 0
    assert attending["strength"]["d"] > 2
    assert attending["strength"]["p"] < 0.05
    assert attending["direct"]["own"] > 3 * abs(attending["direct"]["neutral"]) > 0
    assert attending["direct"]["mean"] == attending["direct"]["own"] - attending["direct"]["neutral"]
    assert uniform["attention"]["mean"] == pytest.approx(0, abs=1e-6)
    assert uniform["strength"] == {"change": 0.0, "d": 0.0, "p": 1.0}
    assert uniform["direct"]["mean"] == uniform["direct"]["own"] == uniform["direct"]["neutral"] == 0.0
    assert uniform["direct"]["n"] == uniform["attention"]["n"] == 4


def test_categories_without_keywords_and_what_is_neutral(tiny_llama: LoadedModel) -> None:
    """They have strengths; the neutral one has no score, keywords or not."""
    prompts = {**PROMPTS, "other": ["It is late in", "So he went to the"]}
    words = {**KEYWORDS, "neutral": ["house"]}
    found = screened(tiny_llama, prompts, words, {"gratitude": Target([11], [250])}, n_permutations=5)
    assert {each["category"] for each in found} == {"gratitude", "other"}
    other = next(each for each in found if each["category"] == "other")
    assert np.isfinite(other["strength"]["d"])
    assert (other["attention"]["mean"], other["direct"]["mean"]) == (None, None)
    without = screened(tiny_llama, PROMPTS, {}, n_permutations=5)
    assert {each["direct"]["mean"] for each in without} == {None}


def at_positions_of_both(norms: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Each prompt's mean norm beside what is usual at its positions, position by position."""
    n_positions = min(max(len(each) for each in group) for group in norms.values())
    every = [each for group in norms.values() for each in group]
    usual = [torch.stack([each[at] for each in every if len(each) > at]).mean(0) for at in range(n_positions)]
    return {
        name: [
            torch.stack([each[at] - usual[at] for at in range(min(n_positions, len(each)))]).mean(0) for each in group
        ]
        for name, group in norms.items()
    }


def above_placebo(attention: list[tuple[list[bool], Any]]) -> tuple[Any, Any]:
    """Attention paid to marked tokens, and that minus the mean of what other prompts pay where they have other words, pair by pair."""
    paid, above = [], []
    for marks, pattern in attention:
        of_queries = []
        for query in range(len(marks)):
            n_marked = sum(marks[: query + 1])
            sums = []
            for key in range(query + 1):
                placebo = [
                    other[:, :, query, key]
                    for its, other in attention
                    if len(its) > query and not its[key] and any(its)
                ]
                if marks[key] and 0 < n_marked < query + 1 and placebo:
                    sums.append((pattern[:, :, query, key], pattern[:, :, query, key] - np.mean(placebo, 0)))
            if sums:
                of_queries.append(np.sum(sums, 0))
        if of_queries:
            one, other = np.mean(of_queries, 0)
            paid.append(one)
            above.append(other)
    return np.mean(paid, 0), np.mean(above, 0)


def test_scores_are_those_of_each_prompt_by_itself(tiny: LoadedModel) -> None:
    """Strength from results, attention from the softmax of transformers' own output, prompt by prompt, whatever the batch."""
    target = {"gratitude": Target([11], [250])}
    found = screened(tiny, PROMPTS, KEYWORDS, target, n_permutations=10, batch_size=3)
    alone = screened(tiny, PROMPTS, KEYWORDS, target, n_permutations=10, batch_size=1)
    layout, tokenizer = tiny.layout, tiny.tokenizer
    taps = layout.pick(Site("z", layer) for layer in range(layout.n_layers))
    norms: dict[str, list[Tensor]] = {name: [] for name in PROMPTS}
    attention = []
    eager = copy.deepcopy(tiny.model)  # transformers leaves hooks where it was asked for attentions
    eager.set_attn_implementation("eager")
    for name, texts in PROMPTS.items():
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            rows = read(tiny.model, taps, [ids])
            per_layer = []
            for layer in range(layout.n_layers):
                projection = tiny.model.get_submodule(layout.taps[Site("z", layer)].module)
                per_layer.append(head_results(rows[f"layer_{layer}.z"], projection, layout.n_heads).norm(dim=-1))
            norms[name].append(torch.stack(per_layer, 1))  # [pos, n_layers, n_heads]
            if name == "gratitude":
                _, marks = tokens_within(tokenizer, text, Words(KEYWORDS["gratitude"]))
                with torch.no_grad():
                    patterns = eager(torch.tensor([ids]), output_attentions=True).attentions
                attention.append((marks, torch.stack([pattern[0] for pattern in patterns]).double().numpy()))
    strengths = at_positions_of_both(norms)
    paid, above = above_placebo(attention)
    for score, other in zip(found, alone, strict=True):
        layer, head = score["layer"], score["head"]
        own, base = (np.array([float(each[layer, head]) for each in strengths[name]]) for name in PROMPTS)
        pooled = np.sqrt((own.var(ddof=1) * 3 + base.var(ddof=1) * 3) / 6)
        assert score["strength"]["change"] == pytest.approx(own.mean() - base.mean(), abs=1e-5)
        assert score["strength"]["d"] == pytest.approx((own.mean() - base.mean()) / pooled, rel=1e-3, abs=1e-4)
        assert score["attention"]["mean"] == pytest.approx(above[layer, head], abs=1e-5)
        assert score["attention"]["paid"] == pytest.approx(paid[layer, head], abs=1e-5)
        for name in ("attention", "direct"):
            assert score[name]["mean"] == pytest.approx(other[name]["mean"], abs=1e-4)
    assert len({score["strength"]["d"] for score in found}) == len(found)  # no two heads tie


def test_permutations_are_those_of_scipy() -> None:
    """One column: the plain permutation test, here with all 252 permutations; and a column that is pure chance costs the others nothing."""
    draw = np.random.default_rng(0)
    values = np.concatenate([draw.normal(1.0, 1, 5), draw.normal(0, 1, 5)])[:, None]
    labels = np.arange(10) < 5
    exact = permutation_test(
        (values[:5, 0], values[5:, 0]), lambda a, b: abs(a.mean() - b.mean()), n_resamples=10_000, alternative="greater"
    )
    found = differences(values, labels, n_permutations=20_000)
    assert found.p[0] == pytest.approx(exact.pvalue, abs=0.01)
    pooled = np.sqrt((values[:5].var(ddof=1) + values[5:].var(ddof=1)) / 2)
    assert found.d[0] == pytest.approx((values[:5].mean() - values[5:].mean()) / pooled)
    constant = differences(np.hstack([values, np.full((10, 1), 3.0)]), labels, n_permutations=2000)
    assert (constant.d[1], constant.p[1], constant.change[1]) == (0, 1, 0)


def test_rounding_is_no_difference_and_nan_is_no_number() -> None:
    draw = np.random.default_rng(2)
    labels = np.arange(12) < 6
    noise = 1 + 5e-8 * (labels + 0.1 * draw.normal(size=12))  # as float32 rounds with the length of a prompt
    found = differences(np.stack([noise, draw.normal(size=12), np.where(labels, np.nan, 1.0)], 1), labels, 200)
    assert (found.d[0], found.p[0]) == (0, 1)
    assert np.isfinite(found.d[1])
    assert found.p[1] < 1.01
    assert np.isnan([found.d[2], found.p[2]]).all()


def test_p_is_corrected_over_heads() -> None:
    """Where labels mean nothing, the smallest p of 50 heads is below 0.05 in about one of twenty draws, not in nearly all."""
    draw = np.random.default_rng(1)
    labels = np.arange(24) < 12
    smallest = np.array([differences(draw.normal(size=(24, 50)), labels, 200, seed).p.min() for seed in range(120)])
    assert (smallest <= 0.05).mean() < 0.12
    strong = draw.normal(size=(24, 50))
    strong[:12, 7] += 4
    found = differences(strong, labels, 500)
    assert found.p[7] == pytest.approx(1 / 501)
    assert (np.delete(found.p, 7) > 0.05).all()


def test_tokens_of_words(tokenizer: Any) -> None:
    text = "Thanks a lot, but unthankful"
    ids, marks = tokens_within(tokenizer, text, Words(["thanks", "thankful"]))
    pieces = [tokenizer.decode([token]) for token, marked in zip(ids, marks, strict=True) if marked]
    assert "".join(pieces).strip() == "Thanks"
    with pytest.raises(PromptError, match="no token tells the keywords of 'one'"):
        targets_of(tokenizer, {"one": ["thanks"], "two": ["thanks"]})

    class Slow:
        is_fast = False

    with pytest.raises(PromptError, match="Slow does not tell"):
        tokens_within(Slow(), text, Words(["a"]))
    told = tokenizer.convert_ids_to_tokens(first_tokens(tokenizer, ["thanks", "red"]))
    assert told == ["Ġth", "re"]  # " red" begins with a space alone, which tells nothing


@pytest.mark.filterwarnings("ignore")
def test_patterns_that_do_not_weigh_the_values(tokenizer: Any) -> None:
    """DiffLlama's heads read differences of two patterns, of which its attention gives one."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = build(DiffLlamaConfig(vocab_size=400, num_key_value_heads=4, **sizes))
    with pytest.raises(SiteUnavailable, match="pattern of block 0 is not what its heads read"):
        check_patterns(model, find_layout(model))


HYBRIDS: dict[str, Any] = {
    "qwen3 next": (
        hf.Qwen3NextConfig,
        {"head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "granite 4 moe": (
        hf.GraniteMoeHybridConfig,
        {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
        | {
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        }
        | {"shared_intermediate_size": 16, "residual_multiplier": 0.3, "logits_scaling": 2.0},
    ),
    "lfm2": (hf.Lfm2Config, {"layer_types": ["conv", "full_attention", "conv"]}),
}
HYBRID_SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.filterwarnings("ignore:Computing request by request")
@pytest.mark.parametrize("name", list(HYBRIDS))
def test_hybrids_are_screened_swept_and_compared_in_the_layers_that_have_heads(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    """Attention is transformers' own, direct effects the change of logits along a head's result, a sweep a loop of ablations."""
    kind, more = HYBRIDS[name]
    loaded = LoadedModel(build(kind(**HYBRID_SIZES, **more)), tokenizer, name)
    model, layout = loaded.model, loaded.layout
    with pytest.warns(UserWarning, match="head_result_norm is kept in layer 1: the other layers have none"):
        found = screened(loaded, PROMPTS, KEYWORDS, {"gratitude": TARGETS[0]}, n_permutations=10, batch_size=3)
    assert [(each["layer"], each["head"]) for each in found] == [(1, head) for head in range(4)]

    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    effects = DirectEffects(loaded, TARGETS)
    projection, norm = (model.get_submodule(layout.taps[site].module) for site in (Site("z", 1), Site("final_norm")))
    attention, direct = [], {}
    for category, texts in PROMPTS.items():
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            _, marks = tokens_within(tokenizer, text, Words(KEYWORDS["gratitude"]))
            with torch.no_grad():
                out = eager(torch.tensor([ids]), output_attentions=True, output_hidden_states=True, use_cache=False)
            pattern = [each for each in out.attentions if each is not None and each.dim() == 4][-1]
            attention += [(marks, pattern.double().numpy())] if category == "gratitude" else []
            rows = read(model, effects.taps, [ids])
            at, results = (
                rows["final_norm_input"][-1].double(),
                head_results(rows["layer_1.z"][-1], projection, 4).double(),
            )
            size = (at.square().mean() + getattr(norm, "variance_epsilon", 1e-6)).sqrt()
            gain = norm.weight.double() + (name == "qwen3 next")
            unembedding = model.get_output_embeddings().weight.double()
            apart = (unembedding[11] - unembedding[250]) @ (
                gain * results * layout.taps[Site("attn_out", 1)].scale / size
            ).T
            direct.setdefault(category, []).append(apart.tolist())
    paid, above = above_placebo(attention)
    expected = np.mean(direct["gratitude"], 0)
    for score, own in zip(found, expected, strict=True):
        assert score["direct"]["own"] == pytest.approx(own, abs=1e-5)
        assert score["attention"]["paid"] == pytest.approx(paid[0, score["head"]], abs=1e-5)
        assert score["attention"]["mean"] == pytest.approx(above[0, score["head"]], abs=1e-5)

    with pytest.warns(UserWarning, match="z is kept in layer 1"):
        swept = sweep_prompts(loaded, PROMPTS["gratitude"][:2], SweepFolder(tmp_path, {"site": "z"}), max_new_tokens=2)
    places, samples = swept.measured["places"], swept.measured["samples"]
    assert [(each["layer"], each["head"]) for each in places] == [(1, head) for head in range(4)]
    with pytest.warns(UserWarning, match="z is kept in layer 1"):
        pairs = sweep_pairs(loaded, [Pair("3 is", "5 is", "a", "b")], SweepFolder(tmp_path / "pairs", {}))
    assert {each["layer"] for each in pairs.measured["places"]} == {1}
    continuations = [
        (tokenizer(each["prompt"])["input_ids"], answer)
        for each, answer in zip(samples, answers_of(loaded, samples), strict=True)
    ]
    for place in places:
        without = Ablation(loaded, {1: [place["head"]]}).logprobs(continuations)
        change = np.mean([one - each["logprob"] for one, each in zip(without, samples, strict=True)])
        assert place["change"].mean == pytest.approx(change, abs=1e-5)
    strengths = []
    for _ in range(2):
        extractor = ActivationExtractor(loaded)
        with pytest.warns(UserWarning, match="head_result_norm is kept in layer 1"):
            extractor.register_hooks()
        extractor.extract_activations(PROMPTS["neutral"])
        strengths.append(extractor)
    assert set(ActivationComparator(*strengths).compare()["differences"]) == {(1, head) for head in range(4)}
    with pytest.raises(SiteUnavailable, match=r"no 'z' at layer_0\.z: .*It has 'z' in layer 1"):
        Ablation(loaded, {0: [1]}).logprobs(continuations)


def answers_of(loaded: LoadedModel, samples: Sequence[dict[str, Any]]) -> list[list[int]]:
    return greedy_answers(loaded, [loaded.tokenizer(each["prompt"])["input_ids"] for each in samples], 2, 8)


def test_direct_effects_need_to_know_what_each_block_adds(tiny_llama: LoadedModel) -> None:
    layout = tiny_llama.layout
    lacking = {
        site: tap
        for site, tap in layout.taps.items()
        if site not in (Site("attn_out", 1), Site("mlp_out", 1), Site("z", 1))
    }
    unknown = replace(layout, taps=lacking, missing={Site("mlp_out", 1): "a norm stands in the stream"})
    with pytest.raises(SiteUnavailable, match=r"layer_1.*a norm stands in the stream"):
        DirectEffects(SimpleNamespace(model=tiny_llama.model, layout=unknown), TARGETS)


def test_what_cannot_be_screened(tokenizer: Any, tiny_llama: LoadedModel) -> None:
    target = {"gratitude": Target([11], [250])}
    with pytest.raises(PromptError, match="neutral has 1 prompts"):
        screened(tiny_llama, {**PROMPTS, "neutral": ["one"]}, KEYWORDS, target)
    with pytest.raises(PromptError, match="'neutral' and another category are needed"):
        screened(tiny_llama, {"gratitude": PROMPTS["gratitude"]}, KEYWORDS, target)
    for bad in (Target([3], [3]), Target([], [3]), Target([3], [4000])):
        with pytest.raises(PromptError, match=r"Target\(answer="):
            screened(tiny_llama, PROMPTS, KEYWORDS, {"gratitude": bad})
    config = GPTNeoConfig(
        vocab_size=400,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=64,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
    )
    narrow = LoadedModel(build(config), tokenizer, "narrow")
    with pytest.raises(PromptError, match=r"1 to 4 can.*It begins 'I want to"):
        screened(narrow, PROMPTS, KEYWORDS, target)
    assert not n_hooks(narrow.model)


command = partial(within, "heads")


def test_from_the_command_line(demo: LoadedModel, tmp_path: Path) -> None:
    done = forked(
        "heads", "screen", "--sample_num", "6", "--permutations", "50", "--output", "scores.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "scores.json").read_text())
    assert len(found["scores"]) == 4 * 4 * 3
    assert found["settings"]["prompts"] == dict.fromkeys(["gratitude", "anger", "apology", "neutral"], 6)
    profile = load_profile("baseline")
    prompts = {category: drawn(texts, 6, 42) for category, texts in profile.prompts.items()}
    expected = screened(demo, prompts, profile.keywords, n_permutations=50)
    assert found["scores"] == expected
    figures = ["head_reaction_heatmap.png", "top_heads.png"]
    again = command("plot", "scores.json", "--output", "figures", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    for name in figures:
        assert (tmp_path / name).read_bytes() == (tmp_path / "figures" / name).read_bytes()
    both = command("plot", "scores.json", "figures/../scores.json", "--output", "other", cwd=tmp_path)
    assert (both.returncode, "two of these results draw" in both.stderr, (tmp_path / "other").exists()) == (
        2,
        True,
        False,
    )
    over = command("plot", "scores.json", "--overwrite", cwd=tmp_path)
    assert over.returncode == 0, over.stderr
    kept = command("plot", "scores.json", cwd=tmp_path)
    assert (kept.returncode, kept.stderr.startswith("PathExists")) == (2, True)
    asked = ["--sample_num", "3", "--permutations", "5", "--target", "a", "--against", "b", "--output", "two"]
    done = command("screen", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "two" / "scores.json").read_text())
    assert written["settings"]["targets"]["anger"] == {"answer": ["a"], "against": ["b"]}
    assert (written["methods"]["comparisons"], "maxT" in written["methods"]["p"]) == (16, True)
    assert "3 prompts of anger against 3: no p value can be below 0.17" in " ".join(done.stderr.split())
    alone = command("screen", "--target", "a", "--output", "three", cwd=tmp_path)
    assert (alone.returncode, "takes two tokens" in alone.stderr) == (2, True)
    assert not (tmp_path / "three").exists()


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    for result, says in (
        ({"kind": "poem"}, "no figures of 'poem'; there are of strength"),
        ({}, "no figures of 'None'"),
        ({"kind": "sweep", "places": [{"head": 0}], "settings": {}}, "no whole result of the kind 'sweep': KeyError"),
    ):
        with pytest.raises(StoreError, match=says):
            draw(result, tmp_path)
    assert not list(tmp_path.iterdir())
