"""Scores and rows over the prefix tree, against one unpadded forward for each request."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.models import CONFIGS, SIZES, VOCABULARY, build
from helpers.raw_hooks import raw_residuals
from helpers.tasks import loglikelihoods
from torch import Tensor
from transformers import AutoTokenizer

from AutomaticEval import score_continuations
from AutomaticEval.capture.tree import forward_size as measuring
from AutomaticEval.capture.tree import score as scoring_module
from AutomaticEval.capture.tree import suitability as serving
from AutomaticEval.capture.tree import walk as walking
from AutomaticEval.capture.tree.score import Cut, Scored, ScoringOptions, TreeScoring, likeliest_tokens
from AutomaticEval.errors import PromptError, TreeUnsuitable
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.selection import Selection

OLD: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
MORE: dict[str, Callable[[], Any]] = {
    "gemma2": lambda: hf.Gemma2Config(**SIZES, head_dim=8, sliding_window=128),
    "gemma3": lambda: hf.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=128),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=8),
    "mistral": lambda: hf.MistralConfig(**SIZES, sliding_window=128),
    "mixtral": lambda: hf.MixtralConfig(**SIZES, num_local_experts=4),
    "phi": lambda: hf.PhiConfig(**SIZES),
    "phi3": lambda: hf.Phi3Config(**SIZES, pad_token_id=0),
    "olmo2": lambda: hf.Olmo2Config(**SIZES),
    "granite": lambda: hf.GraniteConfig(**SIZES, residual_multiplier=0.3, attention_multiplier=0.2),
    "stablelm": lambda: hf.StableLmConfig(**SIZES),
    "cohere": lambda: hf.CohereConfig(**SIZES),
    "starcoder2": lambda: hf.Starcoder2Config(**SIZES),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "gptj": lambda: hf.GPTJConfig(**OLD, rotary_dim=4),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**OLD),
    "falcon": lambda: hf.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False
    ),
}


def drawn(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Few-shot prefixes of two depths, choices of one token and of several, duplicates, contexts that begin others."""
    rng = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(n)]

    shots, pairs = tokens(40), []
    for _ in range(9):
        context = shots[: rng.choice([0, 20, 40, 40])] + tokens(rng.randrange(1, 15))
        pairs += [(context, tokens(rng.choice([1, 1, 2, 5]))) for _ in range(3)]
    pairs += [pairs[3], (pairs[3][0] + pairs[3][1], tokens(2)), (shots[:20], tokens(1)), (tokens(1), tokens(1))]
    rng.shuffle(pairs)
    return pairs


def scored(
    loaded: LoadedModel, pairs: Sequence[Any], positions: str | None = "all", **how: Any
) -> tuple[list[Scored], TreeScoring]:
    selection = None if positions is None else Selection.parse(positions=positions)
    scoring = TreeScoring(loaded, [Cut.of(*pair, 128) for pair in pairs], ScoringOptions(selection, **how))
    scoring.check()
    found = {each.request: each for batch in scoring.results() for each in batch}
    return [found[index] for index in range(len(pairs))], scoring


def plain(model: Any, context: list[int], continuation: list[int]) -> tuple[Tensor, bool]:
    """Each token's log-likelihood in one forward without a cache, and whether all are the likeliest."""
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation]), use_cache=False).logits[0].float()
    likely = logits.log_softmax(-1)[len(context) - 1 : -1]
    expected = torch.tensor(continuation)
    return likely.gather(1, expected[:, None])[:, 0], torch.equal(likely.argmax(-1), expected)


def gathered(each: Scored, key: str) -> Tensor:
    """A request's rows, through its parts."""
    return torch.cat([rows.activations[key][list(where)] for rows, where in each.parts])


@pytest.mark.parametrize("tokens", [5, 32, 1000])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_scores_and_rows_are_those_of_one_unpadded_forward(name: str, tokens: int, tokenizer: Any) -> None:
    loaded = LoadedModel(build(CONFIGS[name]()), tokenizer, name)
    pairs = drawn()
    found, scoring = scored(loaded, pairs, tokens=tokens)
    assert scoring.walk.n_computed == scoring.tree.n_nodes
    for (context, continuation), each in zip(pairs, found, strict=True):
        expected, is_greedy = plain(loaded.model, context, continuation)
        assert each.logprob == pytest.approx(expected.sum().item(), abs=2e-5)
        assert torch.allclose(each.logprobs, expected, atol=1e-5)
        assert each.is_greedy == is_greedy
        sequence = (context + continuation)[:-1]
        assert [rows.token_ids[i] for rows, where in each.parts for i in where] == sequence
        assert [rows.positions[i] for rows, where in each.parts for i in where] == list(range(len(sequence)))
        for key, rows in raw_residuals(loaded.model, name, sequence).items():
            assert torch.allclose(gathered(each, key), rows, atol=1e-5)


@pytest.mark.parametrize("name", list(MORE))
def test_other_families(name: str, tokenizer: Any) -> None:
    """Log-likelihoods, and the residual stream as transformers itself reports it."""
    loaded = LoadedModel(build(MORE[name]()), tokenizer, name)
    pairs = drawn(1)
    found, _ = scored(loaded, pairs, tokens=48)
    for (context, continuation), each in zip(pairs, found, strict=True):
        assert each.logprob == pytest.approx(plain(loaded.model, context, continuation)[0].sum().item(), abs=1e-4)
    context, continuation = pairs[0]
    with torch.no_grad():
        ids = torch.tensor([(context + continuation)[:-1]])
        states = loaded.model(ids, use_cache=False, output_hidden_states=True).hidden_states
    for key, state in (("embeddings", states[0]), ("layer_0", states[1])):
        assert torch.allclose(gathered(found[0], key), state[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_pass_their_check(dtype: torch.dtype, tokenizer: Any) -> None:
    loaded = LoadedModel(build(CONFIGS["llama"](), dtype), tokenizer, "llama")
    pairs = drawn(2)
    found, _ = scored(loaded, pairs, None, dtype=None)
    assert found[0].logprobs.dtype == dtype  # as lm-eval's log-softmax
    for (context, continuation), each in zip(pairs, found, strict=True):
        expected = plain(loaded.model, context, continuation)[0]
        assert torch.all((each.logprobs.float() - expected).abs() <= 5e-2 * (1 + expected.abs()))


@pytest.mark.parametrize("positions", ["scored", "last", "prompt[-2:]", "prompt[:3]", "response", "::3"])
def test_only_what_some_request_keeps_is_stored(positions: str, tiny_llama: LoadedModel) -> None:
    pairs = drawn(3)
    found, _ = scored(tiny_llama, pairs, positions, tokens=16)
    wanted: set[tuple[int, ...]] = set()
    for (context, continuation), each in zip(pairs, found, strict=True):
        sequence = context + continuation
        kept = Selection.parse(positions=positions).positions.resolve(len(context), len(continuation))
        assert [rows.positions[i] for rows, where in each.parts for i in where] == list(kept)
        expected = raw_residuals(tiny_llama.model, "llama", sequence[:-1])["layer_2"][list(kept)]
        assert torch.allclose(gathered(each, "layer_2"), expected, atol=1e-5)
        wanted |= {tuple(sequence[: position + 1]) for position in kept}
    stored = {id(rows): rows for each in found for rows, _ in each.parts}
    assert sum(len(rows.positions) for rows in stored.values()) == len(wanted)  # each distinct row once


def test_logits_of_every_kept_position(tiny_llama: LoadedModel) -> None:
    selection = Selection.parse("logits", positions="all")
    pairs = drawn(4)[:6]
    scoring = TreeScoring(tiny_llama, [Cut.of(*pair, 128) for pair in pairs], ScoringOptions(selection, tokens=20))
    for each in (one for batch in scoring.results() for one in batch):
        context, continuation = pairs[each.request]
        with torch.no_grad():
            expected = tiny_llama.model(torch.tensor([(context + continuation)[:-1]])).logits[0]
        assert torch.allclose(gathered(each, "logits"), expected, atol=1e-4)
        assert each.logprob == pytest.approx(plain(tiny_llama.model, context, continuation)[0].sum().item(), abs=1e-4)


def test_too_long_contexts_lose_their_beginning_as_in_lm_eval(tiny_llama: LoadedModel) -> None:
    context, continuation = list(range(3, 203)), [7, 8, 9]
    cut = Cut.of(context, continuation, 128)
    assert (cut.n_truncated, len(cut.fed)) == (203 - 129, 128)
    (each,), _ = scored(tiny_llama, [(context, continuation)])
    expected = plain(tiny_llama.model, (context + continuation)[-129:-3], continuation)[0]
    assert torch.allclose(each.logprobs, expected, atol=1e-5)
    for wrong in (([], [1]), ([1], []), ([1], [1] * 129)):
        with pytest.raises(PromptError, match="one at least"):
            Cut.of(*wrong, 128)


def test_forward_that_does_not_fit_is_halved(tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that runs out of memory in its middle leaves nothing behind, and the run goes on with fewer tokens."""
    pairs = drawn(5)
    expected, _ = scored(tiny_llama, pairs, tokens=64)
    mlp = tiny_llama.model.model.layers[1].mlp

    def full(module: Any, args: Any) -> None:
        if args[0].shape[1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = mlp.register_forward_pre_hook(full)
    monkeypatch.setattr(scoring_module, "CHECKED", 30)
    monkeypatch.setattr(serving, "check_scores", lambda *a: None)
    monkeypatch.setattr(scoring_module, "check_scores", lambda *a: None)
    found, scoring = scored(tiny_llama, pairs, tokens=64)
    handle.remove()
    assert scoring.walk.most == 16
    assert scoring.walk.n_computed == scoring.tree.n_nodes
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=2e-5)
        assert torch.allclose(gathered(one, "layer_2"), gathered(other, "layer_2"), atol=1e-5)


def test_scores_that_do_not_fit_are_halved_too(tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the words of a CPU; the log-softmax takes as much as the logits."""
    pairs = drawn(5)
    expected, _ = scored(tiny_llama, pairs, None, tokens=64)
    real = torch.log_softmax

    def full(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(logits) > 8:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
            )
        return real(logits, *args, **kwargs)

    monkeypatch.setattr(scoring_module, "check_scores", lambda *a: None)
    monkeypatch.setattr(scoring_module, "CHECKED", 12)
    monkeypatch.setattr(torch, "log_softmax", full)
    found, scoring = scored(tiny_llama, pairs, None, tokens=64)
    assert scoring.walk.most < 64
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=2e-5)


def test_other_failures_are_not_taken_for_a_lack_of_memory(tiny_llama: LoadedModel) -> None:
    def breaks(module: Any, args: Any) -> None:
        raise RuntimeError("something else")

    handle = tiny_llama.model.model.layers[1].mlp.register_forward_pre_hook(breaks)
    try:
        with pytest.raises(RuntimeError, match="something else"):
            scored(tiny_llama, drawn(5))
    finally:
        handle.remove()


def test_shares_and_answered_requests_have_the_bits_of_one_run(tiny_llama: LoadedModel) -> None:
    pairs = drawn(6)
    cuts = [Cut.of(*pair, 128) for pair in pairs]
    whole = {
        each.request: each
        for batch in TreeScoring(tiny_llama, cuts, ScoringOptions(Selection.parse(), 24)).results()
        for each in batch
    }
    found: dict[int, Scored] = {}
    for rank in range(3):
        options = ScoringOptions(Selection.parse(), 24, share=(rank, 3))
        for batch in TreeScoring(tiny_llama, cuts, options).results():
            for each in batch:
                assert each.request not in found
                found[each.request] = each
    assert found.keys() == whole.keys()
    late = TreeScoring(tiny_llama, cuts, ScoringOptions(Selection.parse(), 24), answered=set(range(0, len(cuts), 2)))
    rest = {each.request: each for batch in late.results() for each in batch}
    assert sorted(rest) == list(range(1, len(cuts), 2))
    for index, each in [*found.items(), *rest.items()]:
        assert torch.equal(each.logprobs, whole[index].logprobs)
        assert torch.equal(gathered(each, "layer_2"), gathered(whole[index], "layer_2"))


def test_last_answered_requests_alone_need_no_others(tiny_llama: LoadedModel) -> None:
    """Sequences that share nothing: one of them is computed without those before it."""
    pairs = [([token] * 50, [1]) for token in range(3, 20)]
    cuts = [Cut.of(*pair, 128) for pair in pairs]
    scoring = TreeScoring(tiny_llama, cuts, ScoringOptions(tokens=32), answered=set(range(16)))
    ((last,),) = scoring.results()
    assert scoring.walk.n_computed <= 96
    assert torch.allclose(last.logprobs, plain(tiny_llama.model, *pairs[16])[0], atol=1e-5)


@pytest.mark.parametrize("broken", ["mask", "positions", "cache"])
def test_check_finds_a_model_that_heeds_no(
    broken: str, tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = walking.tree_forward

    def ignores(model: Any, ids: Any, depths: Any, attended: Any, cached: Any, kept: Any) -> Any:
        if broken == "mask":
            n_past = attended.shape[1] - len(ids)
            attended = attended | (torch.ones(attended.shape).tril(n_past).bool())
        if broken == "positions":
            depths = depths.min() + torch.arange(len(ids))
        if broken == "cache" and cached:
            cached = [(keys.flip(2), values) for keys, values in cached]
        return real(model, ids, depths, attended, cached, kept)

    monkeypatch.setattr(walking, "tree_forward", ignores)
    with pytest.raises(TreeUnsuitable, match="in a plain forward"):
        scored(tiny_llama, drawn(7))


def test_check_finds_a_model_that_masks_by_column(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-Neo with a short window, were its limit not known."""
    config = CONFIGS["gpt_neo"]()
    config.window_size = 20
    loaded = LoadedModel(build(config), tokenizer, "gpt_neo")
    with pytest.raises(TreeUnsuitable, match="no room for others in the 20"):
        scored(loaded, drawn())
    for module in (serving, scoring_module):
        monkeypatch.setattr(module, "most_columns", lambda model: None)
    with pytest.raises(TreeUnsuitable, match="in a plain forward"):
        scored(loaded, drawn())


UNSUITABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "bloom": (lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4), "position_ids"),
    "mpt": (
        lambda: hf.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
        "position_ids",
    ),
    "falcon-alibi": (
        lambda: hf.FalconConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
        ),
        "ALiBi",
    ),
    "mamba": (
        lambda: hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
        "not keys and values",
    ),
    "sliding": (lambda: hf.MistralConfig(**SIZES, sliding_window=16), "window of 16"),
    "gemma-sliding": (lambda: hf.Gemma2Config(**SIZES, head_dim=8, sliding_window=16), "window of 16"),
    "nested rope": (
        lambda: hf.Gemma3TextConfig(
            **SIZES,
            head_dim=8,
            sliding_window=128,
            rope_parameters={
                kind: {
                    "rope_type": "dynamic",
                    "factor": 2.0,
                    "rope_theta": 10000.0,
                    "original_max_position_embeddings": 32,
                }
                for kind in ("full_attention", "sliding_attention")
            },
        ),
        "beyond 32",
    ),
    "longrope": (
        lambda: hf.LlamaConfig(
            **{**SIZES, "max_position_embeddings": 128},
            rope_parameters={
                "rope_type": "dynamic",
                "factor": 2.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 32,
            },
        ),
        "beyond 32",
    ),
}


@pytest.mark.parametrize("name", list(UNSUITABLE))
def test_models_that_cannot_be_served_compute_each_request_by_itself(name: str, tokenizer: Any) -> None:
    config, says = UNSUITABLE[name]
    model = build(config())
    pairs = drawn(8)[:5]
    with pytest.warns(UserWarning, match=says):
        found = score_continuations(pairs, model, tokenizer=tokenizer)
    for (context, continuation), each in zip(pairs, found, strict=True):
        expected, is_greedy = plain(model, context, continuation)
        assert each.logprob == pytest.approx(expected.sum().item(), abs=1e-4)
        assert (each.is_greedy, each.activation_data) == (is_greedy, None)


def test_continuations_of_texts(demo: LoadedModel) -> None:
    """Tokens as lm-eval makes them, rows of the very forward; the same with and without capture, and row by row."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=demo.model, tokenizer=demo.tokenizer)
    pairs = [
        ("What is red?", " a colour"),
        ("What is red? ", "a fruit"),
        ("What is red?", " a"),
        ("", "What"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score_continuations(pairs, demo, capture_activations=True, positions="all")
    for pair, each, bare in zip(pairs, found, score_continuations(pairs, demo), strict=True):
        if pair[0]:
            assert (each.context_ids, each.continuation_ids) == tuple(map(list, lm._encode_pair(*pair)))
        expected, is_greedy = plain(demo.model, each.context_ids, each.continuation_ids)
        assert each.logprob == bare.logprob == pytest.approx(expected.sum().item(), abs=2e-5)
        assert each.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
        assert each.is_greedy == is_greedy
        assert each.activation_data is not None
        assert each.activation_data["response"] == pair[1]
        sequence = [*each.context_ids, *each.continuation_ids][:-1]
        assert each.activation_data["token_ids"].tolist() == sequence
        raw = raw_residuals(demo.model, "llama", sequence)
        for key, rows in each.activation_data["activations"].items():
            assert torch.allclose(rows, raw[key], atol=1e-5)


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ([("a", "")], "no token of its own"),
        ([("a", [1])], "one of each"),
        ([([1], [])], "one at least"),
        ([([], [1])], "one at least"),
        ([("  ", "x")], "one at least"),
    ],
)
def test_requests_that_ask_nothing(pairs: Any, says: str, demo: LoadedModel) -> None:
    with pytest.raises(PromptError, match=says):
        score_continuations(pairs, demo)


def test_first_tokens_are_lm_evals(demo: LoadedModel) -> None:
    """A tokenizer that adds a first token adds it once, and an empty context is that token."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    first = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, tokenizer.bos_token_id)]
    )
    assert tokenizer("red")["input_ids"][0] == tokenizer.bos_token_id
    lm = HFLM(pretrained=demo.model, tokenizer=tokenizer)
    pairs = [("What is red?", " a"), (f"{first}What is red?", " a"), ("", f"{first}What is"), ("", "What is")]
    requests = loglikelihoods(pairs)
    expected = lm.loglikelihood(requests)
    found = score_continuations(pairs, demo.model, tokenizer=tokenizer)
    assert [each.logprob for each in found] == pytest.approx([each[0] for each in expected], abs=2e-5)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(PromptError, match="neither a first nor a last"):
        score_continuations([("", "What")], demo.model, tokenizer=tokenizer)


def test_no_requests_and_unknown_options(demo: LoadedModel) -> None:
    assert score_continuations([], demo) == []
    with pytest.raises(TypeError, match="dtype"):
        score_continuations([("a", "b")], "demo", dtyp="float32")


def test_rows_captured_request_by_request(tokenizer: Any) -> None:
    model = build(hf.MistralConfig(**SIZES, sliding_window=16))
    pairs = drawn(9)[:4]
    with pytest.warns(UserWarning, match="window of 16"):
        found = score_continuations(pairs, model, tokenizer=tokenizer, capture_activations=True, positions="all")
    for each in found:
        sequence = [*each.context_ids, *each.continuation_ids][:-1]
        with torch.no_grad():
            states = model(torch.tensor([sequence]), use_cache=False, output_hidden_states=True).hidden_states
        assert each.activation_data is not None
        assert torch.allclose(each.activation_data["activations"]["layer_0"], states[1][0], atol=1e-5)


def test_measured_tokens_stop_where_more_are_no_faster(
    tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(model: Any, ids: Any, *rest: Any) -> float:
        if len(ids) > 1024:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return float(len(ids) + 200 if len(ids) <= fastest else 1.5 * len(ids))

    monkeypatch.setattr(measuring, "_timed", seconds)
    fastest = 512
    assert measuring.measured_tokens(tiny_llama, 20) == 512
    fastest = 10**6
    assert measuring.measured_tokens(tiny_llama, 0) == 1024
    monkeypatch.undo()
    assert measuring.measured_tokens(tiny_llama, 20) in measuring.CHOICES


def test_check_of_unknown_models_looks_at_requests_that_share_nothing(
    tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which one stretch holds all the same: a mask that is plain causal lets one see the other."""
    pairs = [([token, 5, 9], [token + 1, 7]) for token in range(20, 60, 10)]
    real = walking.tree_forward

    def causal(model: Any, ids: Any, depths: Any, attended: Any, *rest: Any) -> Any:
        n_past = attended.shape[1] - len(ids)
        return real(model, ids, depths, attended | torch.ones(attended.shape).tril(n_past).bool(), *rest)

    monkeypatch.setattr(walking, "tree_forward", causal)
    monkeypatch.setattr(scoring_module, "is_tested", lambda model: False)
    with pytest.raises(TreeUnsuitable, match="in a plain forward"):
        scored(tiny_llama, pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_likeliest_token_is_torchs_also_among_equals(dtype: torch.dtype) -> None:
    """lm-eval asks torch, which gives the first of equal numbers."""
    torch.manual_seed(0)
    for shape in ((1, 5), (7, 400), (3, 50_257)):
        few = torch.randint(-3, 3, shape).to(dtype)  # full of equal numbers
        assert torch.equal(likeliest_tokens(few), few.argmax(-1))
        wide = torch.log_softmax(torch.randn(shape, dtype=dtype), -1)
        assert torch.equal(likeliest_tokens(wide), wide.argmax(-1))
    holes = torch.tensor([[1.0, float("nan"), 2.0], [float("-inf"), float("-inf"), float("-inf")]], dtype=dtype)
    assert torch.equal(likeliest_tokens(holes), holes.argmax(-1))
