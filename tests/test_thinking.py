"""What a model thought, and what it answered after that: where each is, which rows are kept of it, and what lm-eval scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.places import STORIES, needs_real
from helpers.raw_hooks import raw_residuals
from helpers.tape import Tape
from helpers.thinkers import HARMONY, TAGS, ids_of, thinker, tokenizer_with, writing
from typer.testing import CliRunner

from AutomaticEval import answer_benchmark_question, generate_inference_with_activations, load_activations
from AutomaticEval.capture.answers.think_marks import think_marks
from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.cli.app import app
from AutomaticEval.errors import EditError, SelectionError, UnknownPositions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.edit import Edit
from AutomaticEval.models.loading import load_model
from AutomaticEval.selection import Positions, Selection
from AutomaticEval.thinking.where import Thinking

PROMPT = "What is 3?"


@pytest.fixture(scope="module")
def qwen() -> LoadedModel:
    """`<think>` and `</think>` are tokens, which texts show."""
    return thinker(tokenizer_with(*TAGS))


@pytest.fixture(scope="module")
def harmony() -> LoadedModel:
    """Channels, whose marks texts do not show."""
    return thinker(tokenizer_with(*HARMONY, special=True))


# The marks, and the rule. `¦` stands where the thinking begins, where it ends, and where the answer begins: one that
# stands alone begins thinking without an end, and two begin an answer without thinking.

TOKENIZERS: dict[str, dict[str, Any]] = {
    "tokens": {"tokens": TAGS},
    "special tokens": {"tokens": ["[THINK]", "[/THINK]"], "special": True},
    "channels": {"tokens": HARMONY, "special": True},
    "cohere": {"tokens": ["<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>"], "special": True},
    "gemma": {"tokens": ["<|channel>", "<channel|>"], "special": True},
    "no tokens": {"tokens": []},
    "granite": {"tokens": [], "template": "{# Here is my thought process: … Here is my response: #}"},
}
RESPONSES = [
    ("tokens", "", "<think>¦3 or 4.¦</think>¦4."),
    ("tokens", "", "<think>¦\n\n¦</think>¦\n\n4."),
    ("tokens", "", "<think>¦¦</think>¦4."),
    ("tokens", "", "<think>¦3 or 4.¦</think>¦"),
    ("tokens", "", "¦¦4."),
    ("tokens", "<think>\n", "¦3 or 4.¦</think>¦4."),
    ("tokens", "<think>", "<think>¦3 or 4.¦</think>¦4."),
    ("tokens", "<think>\n\n</think>\n\n", "¦¦4."),
    ("tokens", "", "¦3 or 4.¦</think>¦4."),  # the template began it, and the prompt was cut
    ("tokens", "", "<think>¦3</think> or 4.¦</think>¦4."),
    ("tokens", "", "So: <think>¦3 or 4.¦</think>¦4."),
    ("tokens", "", "<think>¦3 or 4."),
    ("tokens", "<think>\n", "¦3 or 4."),
    ("tokens", "", "<think>¦3</think>4. <think>5"),
    ("tokens", "", "¦3</think>4. <think>5"),
    ("tokens", "Say <think> first.", "¦¦4."),  # a prompt that speaks of it
    ("special tokens", "", "[THINK]¦3 or 4.¦[/THINK]¦4."),
    ("special tokens", "[THINK]", "¦3 or 4."),
    (
        "channels",
        "",
        "<|channel|>analysis<|message|>¦3 or 4.¦<|end|><|start|>assistant<|channel|>final<|message|>¦4.<|return|>",
    ),
    (
        "channels",
        "",
        "<|channel|>analysis<|message|>¦3.<|end|><|start|>assistant<|channel|>analysis<|message|>4.¦"
        "<|end|><|start|>assistant<|channel|>final<|message|>¦4.",
    ),
    ("channels", "", "<|channel|>analysis<|message|>¦3 or 4."),
    ("channels", "<|channel|>final<|message|>", "¦¦4."),
    ("cohere", "", "<|START_THINKING|>¦3 or 4.¦<|END_THINKING|><|START_RESPONSE|>¦4."),
    ("cohere", "", "<|START_THINKING|>¦3 or 4.¦<|END_THINKING|>¦4."),
    ("gemma", "", "<|channel>thought\n¦3 or 4.¦<channel|>¦4."),
    ("no tokens", "", "<think>¦3 or 4.¦</think>¦4."),
    ("no tokens", "", "<thinking>¦3 or 4.¦</thinking>¦\n\n4."),
    ("no tokens", "<think>\n", "¦3 or 4.¦</think>¦4."),
    ("no tokens", "<think>\n", "¦3 or 4."),
    ("no tokens", "", "¦¦4."),
    ("granite", "", "Here is my thought process:¦ 3 or 4. ¦Here is my response:¦ 4."),
]


def marked(tokenizer: Any, n_prompt: int, response: str) -> tuple[list[int], Thinking]:
    """The tokens of a response, and where its bars say that it thinks and answers."""
    pieces = [ids_of(tokenizer, each) for each in response.split("¦")]
    ends = [n_prompt + sum(map(len, pieces[: n + 1])) for n in range(len(pieces))]
    ids = [token for piece in pieces for token in piece]
    if len(pieces) == 4:
        return ids, Thinking((ends[0], ends[1]), ends[2])
    return ids, Thinking((ends[0], ends[1]), None) if len(pieces) == 2 else Thinking(None, ends[1])


@pytest.mark.parametrize(("kind", "prompt", "response"), RESPONSES)
def test_marks_say_where_a_response_thinks_and_answers(kind: str, prompt: str, response: str) -> None:
    how = TOKENIZERS[kind]
    tokenizer = tokenizer_with(*how["tokens"], special=how.get("special", False), template=how.get("template"))
    fed = ids_of(tokenizer, f"{PROMPT} {prompt}")
    ids, expected = marked(tokenizer, len(fed), response)
    assert think_marks(tokenizer).thinking(fed, ids) == expected


def test_a_response_that_goes_straight_to_its_final_channel_thought_nothing() -> None:
    tokenizer = tokenizer_with(*HARMONY, special=True)
    ids = ids_of(tokenizer, "<|channel|>final<|message|>")
    assert think_marks(tokenizer).thinking([1, 2], [*ids, 5]) == Thinking((2, 2), 2 + len(ids))


def test_marks_given_by_hand() -> None:
    tokenizer = tokenizer_with(*TAGS)
    fed, ids = ids_of(tokenizer, PROMPT), ids_of(tokenizer, "<reason>3</reason>4. <think>5")
    n = len(fed)
    found = think_marks(tokenizer, ("<reason>", "</reason>")).thinking(fed, ids)
    opens, three, closes = (len(ids_of(tokenizer, each)) for each in ("<reason>", "3", "</reason>"))
    assert found == Thinking((n + opens, n + opens + three), n + opens + three + closes)
    assert think_marks(tokenizer).thinking(fed, ids) == Thinking((n + len(ids) - 1, n + len(ids)), None)


@pytest.mark.parametrize(
    ("kind", "response", "end"),
    [
        (
            "channels",
            "<|channel|>analysis<|message|>¦3.¦<|end|><|start|>assistant<|channel|>final<|message|>¦4.",
            "<|message|>",
        ),
        ("channels", "<|channel|>analysis<|message|>¦3.", "<|message|>"),  # of which lm-eval scores "3."
        ("tokens", "<think>¦3.¦ So: ¦4.", " So: "),
        ("tokens", "¦3.¦ So: ¦4.", " So: "),
        ("tokens", "<think>¦3.¦</think>¦4. So: 5", " So: "),
        ("tokens", "<think>¦3.</think>4. <think>5", "</think>"),
        ("tokens", "¦¦4.", " So: "),
    ],
)
def test_lm_evals_token_closes_where_no_mark_does(kind: str, response: str, end: str) -> None:
    tokenizer = tokenizer_with(*TOKENIZERS[kind]["tokens"], special=TOKENIZERS[kind].get("special", False))
    ids, expected = marked(tokenizer, 2, response)
    token = tokenizer.convert_tokens_to_ids(end) if kind == "channels" else end
    assert think_marks(tokenizer, end=token).thinking([1, 2], ids) == expected


def test_a_token_that_spells_a_mark_and_more_is_the_marks() -> None:
    tokenizer = tokenizer_with("k>", ">4")
    ids = [token for each in ("<thin", "k>", "3", "</think", ">4", "2") for token in ids_of(tokenizer, each)]
    before = len(ids_of(tokenizer, "<thin"))
    closes = len(ids_of(tokenizer, "</think"))
    assert think_marks(tokenizer).thinking([1], ids) == Thinking((before + 2, before + 3), before + closes + 4)


@pytest.mark.parametrize("given", ["<think>", "<think>,", "a,b,c", ("a",), 3.0])
def test_think_tokens_that_are_no_pair_are_refused(given: Any) -> None:
    with pytest.raises((SelectionError, TypeError), match=r"think_tokens|iterable"):
        Selection.parse(think_tokens=given)


# Positions.

THOUGHT = Thinking((7, 12), 13)
"""In a sequence of 5 tokens of a prompt and 15 of a response, of which the last is not fed."""


@pytest.mark.parametrize(
    ("positions", "thinking", "expected"),
    [
        ("thinking", THOUGHT, range(7, 12)),
        ("answer", THOUGHT, range(13, 19)),
        ("thinking[-2:]", THOUGHT, range(10, 12)),
        ("answer[:2]", THOUGHT, range(13, 15)),
        ("thinking[::2]", THOUGHT, range(7, 12, 2)),
        ("thinking", Thinking((7, 20), None), range(7, 19)),
        ("answer", Thinking((7, 20), None), range(0)),
        ("thinking", Thinking.without(5), range(0)),
        ("answer", Thinking.without(5), range(5, 19)),
        ("answer", Thinking((5, 19), 20), range(0)),
        ("response", THOUGHT, range(5, 19)),
    ],
)
def test_positions_of_thinking_and_answer(positions: str, thinking: Thinking, expected: range) -> None:
    parsed = Positions.parse(positions)
    assert list(parsed.resolve(5, 15, thinking)) == list(expected)
    assert len(parsed.most(5, 15)) >= len(expected)
    low, high = parsed.window(5)
    assert all(low <= each and (high is None or each < high) for each in expected)
    assert Positions.parse(str(parsed)) == parsed


def test_what_cannot_be_known_is_refused() -> None:
    with pytest.raises(UnknownPositions, match=r"slice, such as answer\[:4\]"):
        Positions.parse("answer[0]")
    with pytest.raises(UnknownPositions, match="generated answer"):
        Positions.parse("thinking").resolve(5, 15)
    with pytest.raises(EditError, match="not known before the response is"):
        Edit.add("resid_post", torch.zeros(32), layers="1", positions="thinking")


# Rows.

SCRIPTS = {
    "Q1": "<think>\n3 or 4.</think>\n\n4.",
    "Q2": "<think>So it is 3 or 4, and I say 4.</think>5",
    "Q3": "4 it is.",
    "Q4": "<think>3 or 4, 3 or 4, 3 or 4, 3 or 4, 3 or 4",
    "Q5": "<think></think>4.",
    "Q6": "<think>3</think> or 4</think>4.",
}
ASKED = ["Tell me of it. Q1", "Q2", "What is 3? Q3", "Say it. Q4", "Q5", "It is 3 and not 5. Q6"]
"""Of different lengths, so that rows are padded."""
PLACES = {"Q1": (1, 8, 9), "Q3": None, "Q4": (1, 24, None), "Q5": (1, 1, 2)}
"""Counted by hand in the responses: thinking start and stop, answer start."""


@pytest.mark.parametrize("positions", ["all", "thinking", "answer", "thinking[-2:]"])
def test_rows_are_those_of_raw_hooks_at_exactly_these_positions(qwen: LoadedModel, positions: str) -> None:
    """In one batch, with thinking of different lengths."""
    prompts = [ids_of(qwen.tokenizer, each) for each in ASKED]
    chosen = Selection.parse("embed,resid_post", positions=positions)
    with writing(qwen.tokenizer, SCRIPTS):
        responses = respond(qwen, prompts, Sampling(max_new_tokens=24), chosen, ASKED)
    for name, prompt, response in zip(SCRIPTS, prompts, responses, strict=True):
        assert response.sample is not None
        data = response.sample.activation_data("m", {})
        sequence, n = [*prompt, *response.generated_ids], len(prompt)
        opens, closes = (
            [at for at, token in enumerate(sequence) if token == each]
            for each in qwen.tokenizer.convert_tokens_to_ids(TAGS)
        )
        thought = range(opens[0] + 1, closes[-1] if closes else len(sequence)) if opens else range(0)
        answered = range(closes[-1] + 1, len(sequence)) if closes else range(0) if opens else range(n, len(sequence))
        fed = range(len(sequence) - 1)
        wanted = {"all": fed, "thinking": thought, "answer": answered, "thinking[-2:]": thought[-2:]}[positions]
        wanted = [each for each in wanted if each in fed]
        if positions == "thinking[-2:]" and not closes:
            wanted = [each for each in thought if each in fed][-2:]
        assert data["positions"].tolist() == wanted
        expected = raw_residuals(qwen.model, "llama", sequence[:-1])
        for key, rows in expected.items():
            if key in data["activations"]:
                torch.testing.assert_close(data["activations"][key], rows[wanted], atol=1e-5, rtol=1e-5)
        places = PLACES.get(name, 0)
        if places != 0:
            told = [data.get(each) for each in ("thinking_start", "thinking_stop", "answer_start")]
            assert told == ([None, None, n] if places is None else [each and n + each for each in places])


def test_texts_are_stored_beside_the_positions(qwen: LoadedModel, harmony: LoadedModel, tmp_path: Path) -> None:
    analysis = "<|channel|>analysis<|message|>3 or 4.<|end|><|start|>assistant<|channel|>final<|message|>It is 4."
    for loaded, script in ((qwen, "<think>3 or 4.</think>It is 4."), (harmony, analysis)):
        with writing(loaded.tokenizer, {"Q": script}):
            file = tmp_path / f"{len(script)}.h5"
            response, data = generate_inference_with_activations(
                "Q", loaded, file, positions="answer", max_new_tokens=80, sites="embed"
            )
        assert (data["thinking"], data["answer"]) == ("3 or 4.", "It is 4.")
        assert response.endswith("It is 4.")
        read = load_activations(file)
        assert {name: read[name] for name in ("thinking", "answer", "answer_start")} == {
            name: data[name] for name in ("thinking", "answer", "answer_start")
        }
        first = ids_of(loaded.tokenizer, "It is 4.")
        assert read["token_ids"].tolist() == first
        assert read["positions"][0] == read["answer_start"]


def test_a_mean_is_over_the_thinking_alone(qwen: LoadedModel) -> None:
    prompts = [ids_of(qwen.tokenizer, each) for each in ASKED[:3]]
    chosen = Selection.parse("resid_post", 1, "thinking", reduce="mean")
    with writing(qwen.tokenizer, SCRIPTS):
        responses = respond(qwen, prompts, Sampling(max_new_tokens=24), chosen, ASKED[:3])
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        assert response.sample is not None
        data = response.sample.activation_data("m", {})
        if number == 2:  # it did not think
            assert data["reduced"]["layer_1"].isnan().all()
            continue
        thought = slice(data["thinking_start"], data["thinking_stop"])
        fed = [*prompt, *response.generated_ids][:-1]
        rows = raw_residuals(qwen.model, "llama", fed)["layer_1"][thought]
        torch.testing.assert_close(data["reduced"]["layer_1"], rows.mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("tapes")
def test_steps_from_a_graph_keep_the_same_rows(qwen: LoadedModel) -> None:
    prompts = [ids_of(qwen.tokenizer, each) for each in ASKED]
    chosen = Selection.parse("resid_post", -1, "answer")
    with writing(qwen.tokenizer, SCRIPTS):
        found = [
            respond(qwen, prompts, Sampling(max_new_tokens=24, generation=way), chosen) for way in ("eager", "graph")
        ]
    assert Tape.n_replayed > 0
    for one, other in zip(*found, strict=True):
        assert one.sample is not None
        assert other.sample is not None
        eager, graph = (each.activation_data("m", {}) for each in (one.sample, other.sample))
        assert eager["positions"].tolist() == graph["positions"].tolist()
        torch.testing.assert_close(eager["activations"]["layer_2"], graph["activations"]["layer_2"])


@needs_real
@pytest.mark.parametrize("part", ["thinking", "answer"])
def test_a_trained_model_whose_tokenizer_has_no_tokens_for_thinking(part: str) -> None:
    """SentencePiece: its tokens spell the marks together with nothing else."""
    loaded = load_model(STORIES)
    prompt = loaded.tokenizer("Lily saw a dog. Q")["input_ids"]
    with writing(loaded.tokenizer, {"Q": "<think> It was big.</think> She was happy."}):
        (response,) = respond(loaded, [prompt], Sampling(max_new_tokens=60), Selection.parse("resid_post", 2, part))
    assert response.sample is not None
    data = response.sample.activation_data("m", {})
    said = {"thinking": "It was big.", "answer": "She was happy."}
    assert {name: data[name].strip() for name in said} == said
    assert loaded.tokenizer.decode(data["token_ids"]).strip().startswith(said[part][:-1])
    rows = raw_residuals(loaded.model, "llama", [*prompt, *response.generated_ids])["layer_2"]
    torch.testing.assert_close(data["activations"]["layer_2"], rows[data["positions"]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("captures", [True, False])
def test_the_answer_to_a_question_is_not_taken_out_of_its_thinking(captures: bool, harmony: LoadedModel) -> None:
    script = "<|channel|>analysis<|message|>FINAL ANSWER: A<|end|><|start|>assistant<|channel|>final<|message|>FINAL ANSWER: B"
    how: dict[str, Any] = {"choices": ["3", "4"], "max_new_tokens": 99, "template": "Q {question}"}
    with writing(harmony.tokenizer, {"Q": script}):
        if captures:
            given = answer_benchmark_question(
                "Which?", harmony, capture_activations=True, save_activations=False, **how
            )
        else:
            given = answer_benchmark_question("Which?", harmony, **how)
    assert given[1] == "B"


def test_the_command_keeps_the_thinking_between_marks_given_by_hand(tmp_path: Path) -> None:
    options = ["--positions", "thinking", "--think_tokens", "<reason>,</reason>", "--layers", "0"]
    with writing(tokenizer_with(), {"Q": "<reason>3 or 4</reason>4."}):
        done = CliRunner().invoke(app, ["generate", "Q", *options, "-o", str(tmp_path / "x.h5"), "--no_chat_template"])
    assert done.exit_code == 0, done.output
    data = load_activations(tmp_path / "x.h5")
    assert data["token_ids"].tolist() == ids_of(tokenizer_with(), "3 or 4")
    assert data["settings"]["think_tokens"] == "<reason>,</reason>"
