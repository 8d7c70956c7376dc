"""Tokens of a response that are asked for by what they say, against tokens that are counted by hand and against a tokenizer's own offsets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.probed import run_of_tokens
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from AutomaticEval.errors import StoreError, UnknownPositions
from AutomaticEval.models.loading import DEMO_FOLDER
from AutomaticEval.store.questions.exact_answer import exact_answer
from AutomaticEval.store.questions.response_tokens import is_in_prompt, is_in_response
from AutomaticEval.store.questions.spelling import spelled
from AutomaticEval.store.run import Run
from AutomaticEval.thinking.text import spans, split_thinking

PROMPT = ["What", "Ġis", "Ġit", "?"]
BYTES = ["<think>", "Ġ3", "Ġor", "Ġ42", "</think>", "ĊĊ", "Ġ42", ",", "Ġso", "Ġ4", "2", ".", "<|im_end|>"]
"""Byte-level tokens; the answer ends with 42 in two tokens."""
PIECES = [
    *("▁So", "▁it", "▁is", "<0xE2>", "<0x82>", "<0xAC>"),
    *("5", "</s>"),
]
SHORT = ["Ġno"]
ASKED: list[tuple[list[str], str, str]] = [
    (BYTES, "<think> 3 or 42</think>\n\n 42, so 42.", "42"),
    (PIECES, "So it is€5", "€5"),
    (SHORT, " no", "no"),
]


def rows_that_say_where(tokens: list[tuple[list[str], list[str]]]) -> list[Any]:
    """[n_fed, 2] for each question: its number, and the position."""
    return [
        np.stack([np.full(n, number), np.arange(n)], 1)
        for number, n in enumerate(len(prompt) + len(response) - 1 for prompt, response in tokens)
    ]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Run:
    tokens = [(PROMPT, each) for each, _, _ in ASKED]
    columns = [{"response": text, "prediction": prediction} for _, text, prediction in ASKED]
    sites = {"layer_0": rows_that_say_where(tokens)}
    return run_of_tokens(tmp_path_factory.mktemp("said") / "run", tokens, sites, columns)


@pytest.mark.parametrize(
    ("position", "of_bytes", "of_pieces"),
    [
        ("thinking[0]", 1, None),
        ("thinking[-1]", 3, None),
        ("answer[0]", 6, 0),
        ("answer[1]", 7, 1),
        ("answer[-1]", 11, 6),
        ("exact_answer[0]", 9, 3),
        ("exact_answer[-1]", 10, 6),
        ("exact_answer[2]", None, 5),
        ("response[0]", 0, 0),
        ("response[-1]", 11, 6),
        ("prompt[-2]", -2, -2),
    ],
)
def test_each_spelling_is_the_token_that_is_counted_by_hand(
    said: Run, position: str, of_bytes: int | None, of_pieces: int | None
) -> None:
    """The third answer has one token, which was not fed: it has no row but those of its prompt."""
    questions = said.questions()
    expected = [each is not None for each in (of_bytes, of_pieces)]
    assert questions.has(position).tolist() == [*expected, position.startswith("prompt")]
    some = said.where(questions.has(position)).questions()
    found = some.activations("layer_0", position).int().tolist()
    wanted = [(0, of_bytes), (1, of_pieces), *([(2, -2)] if position.startswith("prompt") else [])]
    assert found == [[number, len(PROMPT) + at] for number, at in wanted if at is not None]


def test_a_question_without_the_token_is_named_and_counted(said: Run) -> None:
    with pytest.raises(
        StoreError,
        match=r"2 of 3 questions have no thinking\[0\] that was fed, the first of them t document 1.*run\.where\(",
    ):
        said.questions().activations("layer_0", "thinking[0]")
    with pytest.raises(UnknownPositions):
        said.questions().has("exact[0]")
    with pytest.raises(StoreError, match=r"1 of 1 questions have no exact_answer\[-1\] that was fed"):
        said.questions()[2:].activations("layer_0", "exact_answer[-1]")


def test_a_row_that_was_not_kept_is_not_there(tmp_path: Path) -> None:
    tokens = [(PROMPT, BYTES)]
    columns = [{"response": ASKED[0][1], "prediction": "42"}]
    run = run_of_tokens(tmp_path / "run", tokens, {"layer_0": rows_that_say_where(tokens)}, columns, "scored")
    questions = run.questions()
    assert [bool(questions.has(each)[0]) for each in ("prompt[-1]", "prompt[-2]", "exact_answer[-1]")] == [
        True,
        False,
        True,
    ]
    assert questions.positions("prompt[-2]").tolist() == [2]
    assert not run.where(run.questions().has("thinking[7]")).questions().has("prompt[-1]").any()


def test_which_positions_are_before_the_answer() -> None:
    assert [
        each for each in ("prompt[-1]", "prompt", "last", "first", "response[0]", "answer[0]") if is_in_prompt(each)
    ] == ["prompt[-1]", "prompt"]
    assert [each for each in ("prompt[-1]", "last", "response[0]", "exact_answer[-1]") if is_in_response(each)] == [
        "response[0]",
        "exact_answer[-1]",
    ]


@pytest.mark.parametrize(
    ("text", "prediction", "choices", "found"),
    [
        ("The answer is 1,000.", "1000", (), "1,000"),
        ("42 or 7? It is 42, not 421 or 42.5", "42", (), 15),
        ("-3", "-3", (), "-3"),
        ("so 42.5", "42", (), None),
        ("Answer: PARIS", "Paris", (), "PARIS"),
        ("It is parisian", "Paris", (), None),
        ("A nice town: Paris", "B", ("Rome", "Paris"), "Paris"),
        ("A. I take (B), A friend says", "B", ("x", "y"), "B"),
        ("I would go with B because", "B", ("", ""), "B"),
        ("B", "B", ("x", "y"), "B"),
        ("So (A). A friend agrees", "A", (), 4),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", (), r"\frac{1}{2}"),
        ("It is 5, not -5", "5", (), 6),
        ("-5", "5", (), None),
        ("12-5", "5", (), "5"),
        ("It is 2: H2O, step2, 1e2", "2", (), 6),
        ("答えは5です", "5", (), "5"),
        ("#### 18.", "18.", (), "18"),
        ("So 18.5, or 18.", "18.", (), 12),
        ("It is (a). It is a cat", "A", (), 7),
        ("It is (a). It is a cat", "a", (), 7),
        ("It is a cat", "A", (), None),
        ("nothing", "[invalid]", (), None),
        ("nothing", None, (), None),
        ("7", 7, (), None),
        ("any", " ", (), None),
    ],
)
def test_where_an_exact_answer_stands(text: str, prediction: Any, choices: Any, found: Any) -> None:
    span = exact_answer(text, (0, len(text)), prediction, choices)
    if isinstance(found, int):
        assert span is not None
        assert span[0] == found
    else:
        assert (None if span is None else text[slice(*span)]) == found
    assert exact_answer(text, None, prediction, choices) is None


@pytest.mark.parametrize(
    ("response", "prompt"),
    [
        ("<think> a b </think>\n C.", ""),
        ("a </think> b", "<think>\n"),
        ("<thinking>a", ""),
        ("a", "<think>"),
        ("plain \n", ""),
        ("", ""),
        ("<think></think>", ""),
        ("<think>a</think> b </think> c", ""),
    ],
)
def test_spans_are_of_the_two_parts(response: str, prompt: str) -> None:
    """With what else `split_thinking` says; tags between are in the span, and not in the text."""
    for span, text in zip(spans(response, prompt), split_thinking(response, prompt), strict=True):
        assert (span is None) == (not (text or "").strip())
        if span is not None:
            assert response[slice(*span)] == (text or "").strip()


def test_tokens_spell_what_a_tokenizers_own_offsets_say() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    for text in (" 49", "What's it, 3.5 €? 日本 naïve\n\tyes  no 😀", "", "\x00 \x7f ¡"):
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        own = spelled(text, tokenizer.convert_ids_to_tokens(encoded["input_ids"]))
        assert own is not None
        for (start, stop), (first, last) in zip(own, encoded["offset_mapping"], strict=True):
            letters = text[first:last].encode()  # a part of a letter has the offsets of the whole letter
            assert text.encode()[start:stop] in letters
    table = {byte: spelled(bytes([byte]).decode("latin-1"), [letter]) for byte, letter in bytes_to_unicode().items()}
    assert all(table[byte] == [(0, 1)] for byte in range(128))


@pytest.mark.parametrize(
    ("text", "tokens", "found"),
    [
        ("no", ["▁no", "</s>"], [(0, 2), (2, 2)]),
        ("ab", ["a", None, "b"], [(0, 1)]),
        ("ab", ["abc", "d"], [(0, 2), (2, 2)]),  # cut by a stop string
        ("ab", ["a", "x"], None),
        ("ab", ["a"], None),
        ("a", ["ĊĊ", "a"], [(0, 0), (0, 1)]),
        ("é", ["<0xC3>", "<0xA9>"], [(0, 1), (1, 2)]),
        ("\ufffd", ["Ã"], None),
    ],
)
def test_spelling(text: str, tokens: list[str | None], found: Any) -> None:
    assert spelled(text, tokens) == found
