"""What scores of heads must not react to: positions, lengths, and words that mean nothing to a model."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import build
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, PreTrainedTokenizerFast

from AutomaticEval.analysis.heads.screen import screen
from AutomaticEval.analysis.numbers.estimate import mean_intervals
from AutomaticEval.analysis.numbers.permutation import differences
from AutomaticEval.analysis.numbers.two_groups import mean_differences
from AutomaticEval.analysis.parts.same_positions import SamePositions, at_same_positions
from AutomaticEval.analysis.words.keywords import Words, plain
from AutomaticEval.analysis.words.metrics import keywords
from AutomaticEval.analysis.words.placebos import p_beside_placebos, placebo_targets
from AutomaticEval.analysis.words.profiles import Profile, load_profile
from AutomaticEval.analysis.words.targets import Target, tokens_within
from AutomaticEval.errors import PromptError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

BASELINE = load_profile("baseline")


@pytest.fixture(scope="module")
def of_words() -> Any:
    """A tokenizer whose tokens are the words of the baseline profile."""
    texts = [text for each in BASELINE.prompts.values() for text in each]
    every = [*(word for each in BASELINE.keywords.values() for word in each), "I", "am"]
    words = sorted({*every, *(word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text))})
    made = Tokenizer(WordLevel({"?": 0, **{word: number for number, word in enumerate(words, 1)}}, unk_token="?"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def marked(tokenizer: Any, category: str, texts: list[str]) -> list[list[bool]]:
    words = Words(BASELINE.keywords[category])
    return [tokens_within(tokenizer, text, words)[1] for text in texts]


def constructed(length: int) -> Any:
    """The patterns of heads that look at nothing but position: [n_heads, query_pos, key_pos]."""
    query, key = np.arange(length)[:, None], np.arange(length)[None, :]
    heads = [
        np.where(query == 0, key == 0, key == query - 1),  # the token before
        key == query,  # itself
        np.exp(-(query - key) / 2.0) * (key <= query),  # recency
        np.broadcast_to(key == 0, (length, length)),  # the first token
        np.tril(np.ones((length, length))),  # all alike
        np.tril(1.0 + (query * 7 + key * 13) % 5),  # any function of positions
    ]
    patterns = np.array(heads, float)
    return patterns / patterns.sum(-1, keepdims=True)


def scored(same: SamePositions, patterns: list[Any], pool: list[Any] | None = None) -> Any:
    for number, pattern in enumerate(patterns):
        same.add(number, 0, pattern)
    for number, pattern in enumerate(pool or []):
        same.add_pool(number, 0, pattern)
    return same.result()


@pytest.mark.parametrize("category", list(BASELINE.keywords))
def test_heads_that_look_at_positions_alone_score_zero(category: str, of_words: Any) -> None:
    """On the prompts and keywords of the bundled profile, beside words of the same prompts and beside neutral prompts."""
    own, neutral = (marked(of_words, category, BASELINE.prompts[name]) for name in (category, "neutral"))
    patterns, others = ([constructed(len(each)) for each in marks] for marks in (own, neutral))
    among_own = scored(SamePositions(own, None, 1, 6), patterns)
    assert len(among_own.own) > 50
    estimates = mean_intervals((among_own.own - among_own.pool)[:, 0])
    beside = scored(SamePositions(own, neutral, 1, 6), patterns, others)
    estimates += mean_differences(beside.own[:, 0], beside.pool[:, 0])
    for estimate in estimates:
        assert estimate.mean == pytest.approx(0, abs=1e-12)
        low, high = estimate.interval
        assert low - 1e-12 <= 0 <= high + 1e-12
        assert high - low < 1e-9
    old = [above_uniform(pattern, each) for pattern, each in zip(patterns, own, strict=True) if any(each)]
    assert np.abs(np.nanmean(old, 0)).max() > 0.02  # what they scored beside all tokens alike


def above_uniform(pattern: Any, marks: list[bool]) -> Any:
    """The attention to marked tokens minus the part of the visible tokens that is marked: [n_heads]."""
    above = []
    for query in range(len(marks)):
        share = np.mean(marks[: query + 1])
        if 0 < share < 1:
            above.append(pattern[:, query] @ np.array(marks, float) - share)
    return np.mean(above, 0) if above else np.full(len(pattern), np.nan)


def attending(marks: list[bool], source: Any, strength: float) -> Any:
    """A head that attends at random, and more to marked tokens."""
    scores = source.normal(size=(len(marks), len(marks))) + strength * np.array(marks)[None, :]
    weights = np.tril(np.exp(scores))
    return (weights / weights.sum(-1, keepdims=True))[None]


def test_attention_to_keywords_is_found_and_its_interval_holds() -> None:
    """Over 300 simulated sets of 16 prompts: 91 to 98 % of the intervals hold the truth, which other sets tell; and a head that does
    attend to keywords is found."""
    source = np.random.default_rng(0)
    for strength, most in ((0.0, 1.0), (1.0, 1.0)):
        means, intervals, alone = [], [], []
        for _ in range(300):
            sets = [source.permutation([True, *[False] * 8]).tolist() for _ in range(16)]
            found = scored(SamePositions(sets, None, 1, 1), [attending(each, source, strength) for each in sets])
            values = (found.own - found.pool)[:, 0, 0]
            means.append(values.mean())
            reach = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
            intervals.append((means[-1] - reach, means[-1] + reach))
            alone.append(found.own[:, 0, 0].std(ddof=1) / len(values) ** 0.5)
        truth = np.mean(means)
        holds = np.mean([low <= truth <= high for low, high in intervals])
        assert 0.91 <= holds <= 0.98 * most, holds
        assert truth == pytest.approx(0, abs=0.005) if strength == 0 else truth > 0.1
        if strength == 0:  # what placebo words vary is a part of it
            assert np.mean(alone) < 0.95 * np.std(means)


def test_a_prompt_that_nothing_can_be_compared_with_is_left_out() -> None:
    """One is longer than all others and has its keyword at the end; one has none."""
    marks = [[False, True, False], [True, False, False], [False] * 8 + [True], [False, False, False]]
    same = SamePositions(marks, None, 1, 6)
    assert same.own == [0, 1]
    found = scored(same, [constructed(len(each)) for each in marks])
    assert found.own.shape == found.pool.shape == (2, 1, 6)
    nothing = SamePositions([[False, False]], None, 1, 1).result()
    assert nothing.own.shape == (0, 1, 1)
    assert np.isnan(nothing.paid).all()


def test_differences_of_means_hold() -> None:
    """Welch's interval is scipy's; and it holds for groups of 5 and of 70 that vary differently."""
    source = np.random.default_rng(2)
    one, other = source.normal(1, 1, (6, 3)), source.normal(0, 4, (11, 3))
    expected = stats.ttest_ind(one, other, equal_var=False)
    bounds = expected.confidence_interval(0.95)
    for column, found in enumerate(mean_differences(one, other)):
        assert found.mean == pytest.approx(one[:, column].mean() - other[:, column].mean())
        assert found.interval == pytest.approx((bounds.low[column], bounds.high[column]))
    for n, m in ((5, 5), (5, 70), (16, 16), (70, 70)):
        found = mean_differences(source.normal(1, 1, (n, 4000)), source.normal(0, 3, (m, 4000)))
        holds = np.mean([each.interval[0] <= 1 <= each.interval[1] for each in found])
        assert 0.93 <= holds <= 0.98, (n, m, holds)
    (same,) = mean_differences(np.full((5, 1), 2.0), np.full((6, 1), 0.5))
    assert (same.mean, same.interval) == (1.5, (1.5, 1.5))
    assert mean_differences(np.empty((0, 1)), np.ones((2, 1)))[0].mean is None
    assert mean_differences(np.ones((4, 1)), np.zeros((9, 1)))[0].interval is None


def cut(text: str, n_words: int = 6) -> str:
    return " ".join(text.split()[:n_words])


def test_strength_does_not_react_to_length_alone(demo: LoadedModel) -> None:
    """Neutral prompts beside neutral prompts that end after six words: the same ones, and others."""
    neutral = BASELINE.prompts["neutral"]
    for whole, short in ((neutral[:40], neutral[:40]), (neutral[::2], neutral[1::2])):
        profile = Profile("own", {"cut": list(map(cut, short)), "neutral": whole}, {}, "neutral")
        found = screen(demo, profile, n_permutations=200, batch_size=40).as_json()
        assert sum(each["strength"]["p"] < 0.05 for each in found["scores"]) <= 1
        length = found["lengths"]["cut"]
        assert length["p"] < 0.05
        assert length["mean"] < length["neutral"]
        assert length["change"] == pytest.approx(length["mean"] - length["neutral"])
        n_tokens = [max(len(demo.tokenizer(text)["input_ids"]) for text in map(cut, short))]
        assert length["n_positions"] == n_tokens[0]


def test_strength_at_the_same_positions_keeps_a_real_change() -> None:
    """Norms that fall with position: prompts of 4 and of 9 tokens differ by what was added alone, and are not told apart without it."""
    source = np.random.default_rng(3)
    p = []
    for number in range(40):
        longer = [10 / (1 + np.arange(9))[:, None] + source.normal(size=(9, 3)) for _ in range(12)]
        shorter = [10 / (1 + np.arange(4))[:, None] + source.normal(size=(4, 3)) for _ in range(12)]
        one, other, n_positions = at_same_positions(shorter, longer)
        assert n_positions == 4
        p.append(differences(np.concatenate([one, other]), np.arange(24) < 12, 200, number).p.min())
        raised = [each + 2.0 for each in shorter]
        one, other, _ = at_same_positions(raised, longer)
        assert (one.mean(0) - other.mean(0)) == pytest.approx([2, 2, 2], abs=0.8)
    assert np.mean(np.array(p) < 0.05) <= 0.125


def random_model(seed: int, tokenizer: Any) -> LoadedModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=48,
        n_layer=3,
        n_head=4,
        n_positions=64,
        tie_word_embeddings=seed % 2 == 0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = build(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * (0.1 if weight.dim() > 1 else 0)) if "ln" not in name else None
    return LoadedModel(model, tokenizer, "random")


def test_random_weights_are_at_chance(of_words: Any) -> None:
    """Six random models over twelve prompts a category. Before, most intervals left zero out: what a head adds to a difference of logits
    whatever the prompt."""
    prompts = {name: texts[:12] for name, texts in BASELINE.prompts.items()}
    profile = Profile("own", prompts, BASELINE.keywords, "neutral")
    direct: list[Any] = []
    for seed in range(6):
        found = screen(random_model(seed, of_words), profile, n_permutations=1, batch_size=48).as_json()["scores"]
        direct += [each["direct"] for each in found]
        assert min(each["direct"]["p"] for each in found) > 0.01  # 36 heads and categories, corrected over 12 each
    assert len(direct) == 6 * 12 * 3
    leaves_out_zero = np.mean([not each["interval"][0] <= 0 <= each["interval"][1] for each in direct])
    assert leaves_out_zero <= 0.12, leaves_out_zero
    assert np.mean([each["p"] < 0.05 for each in direct]) <= 0.03
    own, neutral, change = (np.array([each[name] for each in direct]) for name in ("own", "neutral", "mean"))
    assert np.corrcoef(own, neutral)[0, 1] > 0.9  # which is why the difference is what is reported
    assert abs(np.corrcoef(change, neutral)[0, 1]) < 0.3


def test_placebo_words() -> None:
    source = np.random.default_rng(0)
    target = Target([3, 4], [5, 6, 7])
    placebos = placebo_targets(target, range(40), source)
    assert len(placebos) == 99
    for each in placebos:
        assert (len(each.answer), len(each.against)) == (2, 3)
        assert len({*each.answer, *each.against}) == 5
        assert not {3, 4, 5, 6, 7} & {*each.answer, *each.against}
    assert placebo_targets(target, range(12), source) == []
    values = source.normal(size=(100, 20))
    values[0, 4] = 9.0
    p = p_beside_placebos(values[0], values[1:])
    assert p[4] == 0.01
    assert (np.delete(p, 4) > 0.05).all()
    chance = [p_beside_placebos(each[0], each[1:]).min() for each in source.normal(size=(300, 40, 20))]
    assert np.mean(np.array(chance) <= 0.05) == pytest.approx(0.05, abs=0.035)
    assert np.isnan(p_beside_placebos([1.0], [])).all()


@pytest.mark.parametrize(
    ("word", "text", "spans"),
    [
        ("c++", "I like C++, and c++11", ["C++", "c++"]),
        (":)", "hi:) there :)", [":)", ":)"]),
        ("谢谢", "我说谢谢你", ["谢谢"]),
        ("thanks", "我说thanks你, unthankful thanksgiving", ["thanks"]),
        ("don't", "They don’t, DON'T and donʼt", ["don’t", "DON'T", "donʼt"]),
        ("don’t", "They don't", ["don't"]),
        ("café", "cafe\u0301s and cafe\u0301.", ["cafe\u0301"]),
        ("cafe\u0301", "a café", ["café"]),
        ("thank you", "thank\n you, Thank\u00a0you", ["thank\n you", "Thank\u00a0you"]),
        ("ﬁne", "fine ﬁne", ["fine", "ﬁne"]),
        ("한국", "\u1112\u1161\u11ab\u1100\u116e\u11a8 한국어", ["\u1112\u1161\u11ab\u1100\u116e\u11a8"]),
        ("cafe", "cafe\u0301", []),
        ("ありがとう", "本当にありがとうね", ["ありがとう"]),
        ("a_b", "a_b a_bc", ["a_b"]),
    ],
)
def test_keywords_are_found_however_a_text_writes_them(word: str, text: str, spans: list[str]) -> None:
    assert [text[start:end] for start, end in Words([word]).found(text)] == spans
    assert keywords([word]).of([text, ""]) == [len(spans), 0]


def test_longer_keywords_are_found_before_their_beginnings() -> None:
    text = "thank you, thank"
    assert [text[start:end] for start, end in Words(["thank", "thank you"]).found(text)] == ["thank you", "thank"]
    assert Words([]).found(text) == []
    assert plain(" a\r\n b’s ") == " a b's "


@pytest.mark.parametrize("word", ["\u200b", "\u0301", "\u00ad", "\ue000"])
def test_keywords_that_no_text_holds_are_refused(word: str, tmp_path: Any) -> None:
    with pytest.raises(PromptError, match="no letter, digit"):
        Words(["fine", word])
    (tmp_path / "p.jsonl").write_text('{"category": "a", "text": "x"}\n{"category": "n", "text": "y"}\n')
    (tmp_path / "p.toml").write_text(f'prompts = "p.jsonl"\nneutral = "n"\n[keywords]\na = ["\\u{ord(word):04x}"]\n')
    with pytest.raises(PromptError, match="category 'a': the keyword"):
        load_profile(tmp_path / "p.toml")
