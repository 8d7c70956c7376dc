"""Texts encoded in parts have the tokens of whole texts, for each tokenizer of which it is proven; others are encoded whole."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
from helpers.places import REAL, needs_real
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.models.tokens.cuts import NUMERALS, PATTERNS, around, last_cut
from AutomaticEval.models.tokens.parallelism import VARIABLE, keeping_parallelism
from AutomaticEval.models.tokens.parts import PartEncoder, n_chars_alike

ALPHABET = (
    *"aAbzZ019.,:;!?'\"-()[]{}<|>/_#$",
    *(" ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2003", "\u3000", "\u200b", "\x00", "\x1f"),
    *(
        "é",
        "e\u0301",
        "\u0301",
        "ß",
        "İ",
        "ǅ",
        "中",
        "京",
        "ﬁ",
        "Ⅷ",
        "²",
        "٣",
        "ا",
        "\u0345",
        "क\u094d",
        "👩\u200d🚀",
        "\u212b",
    ),
    *(
        "'s",
        "'LL",
        "don't",
        "Answer:",
        " Answer:",
        "Question: ",
        "word",
        " word",
        " 1234",
        "12 345",
        "</s>",
        "<s>",
        "<pad> ",
    ),
)
TRAINED_ON = [
    "The answer: don't ask. 1234 times, said 中京 naïve é",
    "Question: word Answer: word's WORDS </s>",
    "a  b   c\n\n d\r\n",
]


def drawn(rng: random.Random, n: int) -> str:
    return "".join(rng.choice(ALPHABET) for _ in range(n))


def begun_alike(rng: random.Random) -> list[str]:
    """Texts, each of which keeps a random beginning of the one before it, as contexts and whole requests do."""
    texts, before = [], drawn(rng, 60)
    for _ in range(25):
        texts += [before, before + rng.choice([" ", "", "\n", "  "]) + drawn(rng, 2), before + drawn(rng, 1)]
        before = before[: rng.randrange(len(before) + 1)] + drawn(rng, rng.randrange(1, 40))
    return list(dict.fromkeys(texts))


def fast(pre: Any, normalizer: Any = None, template: str | None = None, added: Any = ()) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    rng = random.Random(7)
    made.train_from_iterator([*TRAINED_ON * 5, *(drawn(rng, 50) for _ in range(200))], trainer)
    made.add_tokens(list(added))
    if template is not None:
        ids = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
        steps = [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=template, pair=f"{template} $B", special_tokens=ids),
        ]
        made.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def split_by(pattern: str, *more: Any, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior), *more, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
PROVEN: dict[str, Any] = {
    **{f"pattern {number}": lambda each=each: fast(split_by(each)) for number, each in enumerate(sorted(PATTERNS))},
    "GPT-2": lambda: fast(BYTES),
    "NFC": lambda: fast(split_by(sorted(PATTERNS)[0]), normalizers.NFC()),
    "both ends": lambda: fast(BYTES, template="<s> $A </s>"),
    "digits": lambda: fast(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTES]), template="<s> $A"),
    "numerals": lambda: fast(
        pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(each), "isolated") for each in sorted(NUMERALS)), BYTES])
    ),
    "added spaces": lambda: fast(BYTES, added=["  ", "   ", "\n\n", AddedToken("<pad>", lstrip=True), "A", ":", " 1"]),
}
NOT_PROVEN: dict[str, Any] = {
    "a space in front": lambda: fast(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no pattern": lambda: fast(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "another pattern": lambda: fast(split_by(r"\S+ \S+|\s")),
    "removed": lambda: fast(split_by(sorted(PATTERNS)[0], behavior="removed")),
    "lower case": lambda: fast(BYTES, normalizers.Lowercase()),
    "strips on the right": lambda: fast(BYTES, added=[AddedToken("word", rstrip=True)]),
    "single words": lambda: fast(BYTES, added=[AddedToken("word", single_word=True)]),
    "an added token with a space": lambda: fast(BYTES, added=["a b"]),
    "pieces": lambda: fast(pre_tokenizers.Metaspace()),
}


def whole(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [list(tokenizer.encode(text)) for text in texts]


@pytest.mark.parametrize("name", list(PROVEN))
def test_texts_in_parts_have_the_tokens_of_whole_texts(name: str) -> None:
    tokenizer = PROVEN[name]()
    assert around(tokenizer) is not None
    encoder = PartEncoder(tokenizer)
    n_cut = 0
    for seed in range(12):
        texts = begun_alike(random.Random(seed))
        n_cut += sum(len(bounds) - 2 for bounds in encoder._bounds(texts))
        assert encoder.encode(texts) == whole(tokenizer, texts)
    assert n_cut > 100


@pytest.mark.parametrize("name", list(PROVEN))
def test_every_cut_keeps_the_tokens(name: str) -> None:
    """All cuts of random texts, not only those that a list needs."""
    tokenizer, rng = PROVEN[name](), random.Random(3)
    n_cuts = 0
    for _ in range(300):
        text = drawn(rng, rng.randrange(2, 30))
        cuts = {last_cut(text, most) for most in range(len(text))} - {0}
        expected = tokenizer.encode(text, add_special_tokens=False)
        for cut in cuts:
            parts = [tokenizer.encode(part, add_special_tokens=False) for part in (text[:cut], text[cut:])]
            assert [*parts[0], *parts[1]] == expected, (text, cut)
        n_cuts += len(cuts)
    assert n_cuts > 300


@pytest.mark.parametrize("name", list(NOT_PROVEN))
def test_other_tokenizers_get_whole_texts(name: str) -> None:
    tokenizer = NOT_PROVEN[name]()
    assert around(tokenizer) is None
    texts = begun_alike(random.Random(0))
    assert PartEncoder(tokenizer).encode(texts) == whole(tokenizer, texts)


def test_a_class_that_encodes_otherwise_gets_whole_texts() -> None:
    class Shouts(PreTrainedTokenizerFast):  # type: ignore[misc]
        def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            return super()._encode_plus([each.upper() for each in text], *args, **kwargs)

    tokenizer = Shouts(tokenizer_object=fast(BYTES).backend_tokenizer)
    assert around(tokenizer) is None


@pytest.mark.parametrize(
    "folder", [DEMO_FOLDER, pytest.param(REAL / "tokenizers" / "gpt2", marks=needs_real)], ids=["demo", "gpt2"]
)
def test_tokenizers_on_the_disk(folder: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert around(tokenizer) is not None
    encoder = PartEncoder(tokenizer)
    for seed in range(8):
        texts = begun_alike(random.Random(seed))
        assert encoder.encode(texts) == whole(tokenizer, texts)


def test_what_texts_begin_with_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = PROVEN["GPT-2"]()
    shots = "Question: word, or a word? Answer: word.\n\n" * 40
    contexts = [f"{shots}Question: what is {number}, and why? Answer:" for number in range(200)]
    texts = [text for each in contexts for text in (f"{each} yes", each, f"{each} no")]
    expected, n_chars = whole(tokenizer, texts), 0
    encoder = PartEncoder(tokenizer)
    stock = encoder._encoded

    def counted(texts: Any, **how: Any) -> Any:
        nonlocal n_chars
        n_chars += sum(map(len, texts))
        return stock(texts, **how)

    monkeypatch.setattr(encoder, "_encoded", counted)
    assert [ids for at in range(0, 600, 50) for ids in encoder.encode(texts[at : at + 50])] == expected
    assert n_chars < sum(map(len, texts)) / 20


@pytest.mark.parametrize("seed", range(5))
def test_characters_alike(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        first, second = ("".join(rng.choice("ab") for _ in range(rng.randrange(12))) for _ in range(2))
        alike = [one == other for one, other in zip(first, second, strict=False)]
        assert n_chars_alike(first, second) == [*alike, False].index(False)


@pytest.mark.parametrize("before", [None, "0", "true"])
def test_parallelism_is_given_back(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(VARIABLE, before)
    with keeping_parallelism():
        os.environ[VARIABLE] = "0"
    assert os.environ.get(VARIABLE) == before
