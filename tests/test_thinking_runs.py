"""Benchmark runs of models that think: lm-eval's scores, what is stored of each response, and what becomes of it in copies and later reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import within
from helpers.places import ROOT
from helpers.plain_lm_eval import assert_same, plain
from helpers.raw_hooks import raw_residuals
from helpers.samples import SETTINGS, make_sample
from helpers.thinkers import TAGS, ids_of, thinker, tokenizer_with, writing
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from AutomaticEval import HFActivations, evaluate, evaluate_with_activations, open_run, recompute
from AutomaticEval.cli.app import app
from AutomaticEval.errors import BenchmarkError, SelectionError
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.store import writer
from AutomaticEval.store.contents.columns import Listed
from AutomaticEval.store.contents.thinking_in import ThinkingIn
from AutomaticEval.store.export.formats import export
from AutomaticEval.store.hdf5.write import write_shard
from AutomaticEval.store.run import Run
from AutomaticEval.store.upkeep.convert import convert
from AutomaticEval.store.upkeep.merge import merge
from AutomaticEval.store.upkeep.prune import prune
from AutomaticEval.store.upkeep.verify import verify

TASK = """
task: asks
custom_dataset: !function docs.asks
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "4."
generation_kwargs: {until: ["Stop"], max_gen_toks: 26}
metric_list:
  - metric: exact_match
"""
DOCS = """
from datasets import Dataset, DatasetDict
def asks(**unused):
    before = ["Tell me of it. ", "", "What is 3? ", "Say it. ", "", "It is 3 and not 5. ", "", "Once more: "]
    return DatasetDict({"test": Dataset.from_list([{"question": f"{each}Q{n}"} for n, each in enumerate(before)])})
"""
SCRIPTS = {
    "Q0": "<think>\n3 or 4.</think>\n\n4.",
    "Q1": "<think>It is 3 or 4.</think>5",
    "Q2": "4.",
    "Q3": "<think>3 or 4, 3 or 4, 3 or 4, 3 or 4, 3 or 4",
    "Q4": "<think></think>4.",
    "Q5": "<think>3</think> or 4</think>4.",
    "Q6": "<think>It is 3.</think>4.Stop, 5",
    "Q7": "<think>3. Stop 5</think>4.Stop 6",
}
SAID = {
    "Q0": ("3 or 4.", "4."),
    "Q1": ("It is 3 or 4.", "5"),
    "Q2": (None, "4."),
    "Q4": ("", "4."),
    "Q5": ("3</think> or 4", "4."),
    "Q6": ("It is 3.", "4."),
}
"""Thinking and answer of those responses that are the same in every batch: Q7's thinking holds a stop string, and Q3's is not finished."""
KINDS: dict[str, Mapping[str, Any]] = {"shown": {"tokens": TAGS}, "special": {"tokens": TAGS, "special": True}}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("asks")
    (folder / "asks.yaml").write_text(TASK)
    (folder / "docs.py").write_text(DOCS)
    return str(folder)


@pytest.fixture(scope="module")
def models() -> dict[str, LoadedModel]:
    return {
        name: thinker(tokenizer_with(*how["tokens"], special=how.get("special", False))) for name, how in KINDS.items()
    }


@pytest.fixture(scope="module")
def whole(models: dict[str, LoadedModel], tasks: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every position of a model whose marks are shown; lm-eval scores what follows the thinking."""
    loaded, folder = models["shown"], tmp_path_factory.mktemp("whole")
    with writing(loaded.tokenizer, SCRIPTS):
        outcome = evaluate_with_activations(
            loaded,
            "asks",
            include_path=tasks,
            think_end_token="</think>",
            positions="all",
            output=folder / "run",
            batch_size=8,
        )
    assert outcome.folder is not None
    return open_run(outcome.folder)


def assert_true(loaded: LoadedModel, run: Run, part: str) -> None:
    """The rows are those of raw hooks at the positions that the tokens' marks give."""
    opens, closes = loaded.tokenizer.convert_tokens_to_ids(TAGS)
    for number in range(len(run)):
        sample = run[number]
        n, response = sample["input_ids"].shape[1], sample["generated_ids"].tolist()
        sequence = [*sample["input_ids"][0].tolist(), *response]
        end = n + len(response) - response[::-1].index(closes) - 1 if closes in response else len(sequence)
        thought = range(n + 1, end) if response[0] == opens else range(0)
        answered = (
            range(end + 1, len(sequence))
            if closes in response
            else range(0 if thought else n, 0 if thought else len(sequence))
        )
        wanted = [each for each in (thought if part == "thinking" else answered) if each < len(sequence) - 1]
        assert sample["positions"].tolist() == wanted
        expected = raw_residuals(loaded.model, "llama", sequence[:-1])
        for key, rows in sample["activations"].items():
            torch.testing.assert_close(rows, expected[key][wanted], atol=1e-5, rtol=1e-5)


def assert_honest(run: Run, loaded: LoadedModel) -> None:
    """`recompute` finds nothing but that the tokens, which a script chose, are not those of greedy decoding."""
    problems = [problem for each in recompute(run, loaded).samples for problem in each.problems]
    assert [each for each in problems if "greedy decoding takes another" not in each] == []


@pytest.mark.parametrize(
    ("kind", "end", "scoring", "part"),
    [
        ("shown", "</think>", "tree", "answer"),
        ("shown", "id", "stock", "thinking"),
        ("special", "id", "tree", "thinking"),
        ("shown", None, "stock", "answer"),
    ],
)
def test_scores_are_lm_evals_and_rows_those_of_the_part(
    kind: str, end: str | None, scoring: str, part: str, models: dict[str, LoadedModel], tasks: str, tmp_path: Path
) -> None:
    loaded = models[kind]
    given = str(loaded.tokenizer.convert_tokens_to_ids("</think>")) if end == "id" else end
    of_model = {} if given is None else {"think_end_token": given}
    with writing(loaded.tokenizer, SCRIPTS):
        expected = plain(loaded, ("asks",), tasks, 3, of_model)
        outcome = evaluate_with_activations(
            loaded,
            "asks",
            include_path=tasks,
            positions=part,
            scoring=scoring,
            batch_size=3,
            output=tmp_path / "run",
            **of_model,
        )
    assert_same(outcome, expected)
    assert outcome.folder is not None
    run = open_run(outcome.folder)
    assert_true(loaded, run, part)
    asked = run.questions()
    said = {question.question[-2:]: (question.thinking, question.answer) for question in asked}
    expected_said = {**SAID, "Q5": ("3 or 4", "4.")} if kind == "special" else SAID
    assert {name: said[name] for name in SAID} == expected_said
    assert said["Q3"][1] is None
    assert said["Q3"][0] is not None
    right = {question.question[-2:]: question.correct for question in asked}
    assert right["Q0"] is (end is not None)  # the whole response is no "4."
    assert right["Q2"]
    assert_honest(run, loaded)


def test_thinking_is_scored_apart_from_what_is_kept(models: dict[str, LoadedModel], tasks: str, tmp_path: Path) -> None:
    """think_tokens say where the thinking is, and leave lm-eval's scores as they are; think_end_token is lm-eval's own."""
    loaded = models["shown"]
    how: dict[str, Any] = {"include_path": tasks, "batch_size": 8, "limit": 3}
    with writing(loaded.tokenizer, SCRIPTS):
        scores = {
            name: evaluate(loaded, "asks", **how, **more).scores[0].value
            for name, more in {"plain": {}, "cut": {"think_end_token": "</think>"}}.items()
        }
        by_hand = evaluate_with_activations(
            loaded, "asks", **how, think_tokens="<think>,</think>", positions="answer", output=tmp_path / "run"
        )
    assert scores == {"plain": 1 / 3, "cut": 2 / 3}
    assert by_hand.scores[0].value == 1 / 3
    run = open_run(tmp_path / "run")
    assert run.settings["think_tokens"] == "<think>,</think>"
    assert run.column("answer")[0] == "\n\n4."


def test_what_lm_eval_would_not_cut_is_refused(models: dict[str, LoadedModel], tasks: str) -> None:
    loaded = models["special"]
    token = loaded.tokenizer.convert_tokens_to_ids("</think>")
    with pytest.raises(BenchmarkError, match=f"special token.*--think_end_token {token}"):
        evaluate(loaded, "asks", include_path=tasks, think_end_token="</think>")
    for given, message in [
        ({"enable_thinking": True, "apply_chat_template": True}, "needs --think_end_token"),
        ({"enable_thinking": False}, "add --apply_chat_template"),
        ({"enable_thinking": "perhaps"}, "true or false"),
        ({"think_end_token": ""}, "is empty"),
    ]:
        with pytest.raises(BenchmarkError, match=message):
            Benchmark.parse("asks", **given)


def test_choices_are_not_thought(demo: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match=r"positions=thinking keep nothing of demo_facts.*scored, and not thought"):
        evaluate_with_activations(demo, "demo_facts", positions="thinking", limit=1, output=tmp_path / "run")
    how: dict[str, Any] = {"apply_chat_template": True, "think_end_token": "</think>", "enable_thinking": True}
    tokenizer = tokenizer_with(template="{{ messages[0]['content'] }}")
    with pytest.raises(BenchmarkError, match="demo_facts scores choices or texts"):
        evaluate(demo.model, "demo_facts", tokenizer=tokenizer, limit=1, **how)


@pytest.mark.parametrize(
    ("enabled", "begins"), [(True, "Tell me of it. Q0<think>"), (False, "Tell me of it. Q0<think></think>")]
)
def test_the_chat_template_is_told_whether_to_think(
    enabled: bool, begins: str, models: dict[str, LoadedModel], tasks: str, tmp_path: Path
) -> None:
    template = "{{ messages[0]['content'] }}<think>{% if not enable_thinking %}</think>{% endif %}"
    tokenizer = tokenizer_with(*TAGS, template=template)
    how: dict[str, Any] = {"apply_chat_template": True, "think_end_token": "</think>", "enable_thinking": enabled}
    with writing(tokenizer, {"Q0": "3 or 4.</think>4." if enabled else "4."}):
        evaluate_with_activations(
            models["shown"].model,
            "asks",
            tokenizer=tokenizer,
            include_path=tasks,
            limit=1,
            output=tmp_path / "run",
            **how,
        )
    (sample,) = open_run(tmp_path / "run").records()
    n = len(ids_of(tokenizer, begins))
    assert sample["prompt"] == begins
    if enabled:
        assert (sample["thinking"], sample["answer"]) == ("3 or 4.", "4.")
        assert sample["thinking_start"] == n
    else:
        assert sample["answer_start"] == n
        assert "thinking_start" not in sample


def test_a_run_that_was_cut_short_goes_on(
    models: dict[str, LoadedModel], tasks: str, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, stock, made = models["shown"], HFLM._model_generate, []
    monkeypatch.setattr(writer, "SHARD_BYTES", 1)

    def stopped(self: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(1)
        if len(made) == 4:
            raise KeyboardInterrupt
        return stock(self, *args, **kwargs)

    how: dict[str, Any] = {"include_path": tasks, "think_end_token": "</think>", "positions": "all", "batch_size": 1}
    with writing(loaded.tokenizer, {**SCRIPTS, "Q7": SCRIPTS["Q0"]}):
        expected = evaluate(loaded, "asks", **{name: how[name] for name in how if name != "positions"})
        monkeypatch.setattr(HFLM, "_model_generate", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate_with_activations(loaded, "asks", output=tmp_path / "run", **how)
        outcome = evaluate_with_activations(loaded, "asks", resume=tmp_path / "run", **how)
    assert outcome.n_before == 3
    assert [each.value for each in outcome.scores] == [each.value for each in expected.scores]
    again = open_run(tmp_path / "run")
    for name in (
        "thinking_start",
        "thinking_stop",
        "answer_start",
        "thinking",
        "answer",
        "response",
        "scored_text",
        "correct",
    ):
        assert again.column(name)[:7] == whole.column(name)[:7]


def test_hf_activations_captures_what_lm_eval_cuts_off(
    models: dict[str, LoadedModel], tasks: str, tmp_path: Path
) -> None:
    loaded = models["shown"]
    lm = HFActivations(
        loaded.model,
        tokenizer=loaded.tokenizer,
        activation_save_dir=tmp_path,
        think_end_token="</think>",
        positions="thinking",
        batch_size=8,
    )
    manager = TaskManager(include_path=tasks, include_defaults=False)
    with writing(loaded.tokenizer, SCRIPTS):
        results = simple_evaluate(model=lm, tasks=["asks"], task_manager=manager)
    run = open_run(lm.finish(results))
    assert_true(loaded, run, "thinking")
    assert (run.column("answer")[0], run.column("scored_text")[0]) == ("\n\n4.", "4.")
    assert_honest(run, loaded)


def test_each_of_several_sampled_answers_has_its_own(
    models: dict[str, LoadedModel], tasks: str, tmp_path: Path
) -> None:
    (tmp_path / "tasks").mkdir()
    often = TASK.replace("asks\n", "often\n", 1).replace(
        "max_gen_toks: 26", "do_sample: true, temperature: 1.0, max_gen_toks: 26"
    )
    (tmp_path / "tasks" / "often.yaml").write_text(often + "repeats: 2\n")
    (tmp_path / "tasks" / "docs.py").write_text(DOCS)
    loaded = models["shown"]
    with writing(loaded.tokenizer, SCRIPTS):
        outcome = evaluate_with_activations(
            loaded,
            "often",
            include_path=tmp_path / "tasks",
            think_end_token="</think>",
            positions="answer",
            limit=3,
            output=tmp_path / "run",
        )
    run = open_run(outcome.folder or "")
    assert_true(loaded, run, "answer")
    assert run.column("repeat") == [0, 1] * 3
    assert run.column("thinking") == ["\n3 or 4."] * 2 + ["It is 3 or 4."] * 2 + [None] * 2
    assert run.column("correct") == [True, True, False, False, True, True]


# Later reads.


OF_TODAY = ROOT / "tests" / "data" / "format-1.6" / "run"
"""Three samples: without thinking, with it, and with one that was not finished."""
PLACES = {
    "thinking_start": [None, 5, 5],
    "thinking_stop": [None, 7, 9],
    "answer_start": [4, 8, None],
    "thinking": [None, "3 or", "3 or 4"],
    "answer": [None, "4.", None],
    "scored_text": [None, "4.", None],
}


def test_a_file_of_the_formats_first_day_and_its_copies(tmp_path: Path) -> None:
    assert verify(OF_TODAY) == []
    copies = [
        merge([OF_TODAY], tmp_path / "merged.h5"),
        prune(OF_TODAY, tmp_path / "pruned.h5", positions="thinking"),
        convert(OF_TODAY, tmp_path / "narrow.h5", dtype="bfloat16"),
    ]
    for path in (OF_TODAY, *copies):
        run = open_run(path)
        assert {name: run.column(name) for name in PLACES} == PLACES
        assert {*PLACES} <= {*run.table().columns}
        said = [(each.thinking, each.answer) for each in run.questions()]
        assert said == [(None, "That."), ("3 or", "4."), ("3 or 4", None)]
    assert [each["positions"].tolist() for each in open_run(copies[1])] == [[], [5, 6], [5, 6, 7]]
    lines = (export(OF_TODAY, tmp_path / "npz", to="npz") / "samples.jsonl").read_text().splitlines()
    assert {name: [json.loads(each).get(name) for each in lines] for name in PLACES} == PLACES


def test_questions_name_tokens_of_thinking_and_answer(
    whole: Run, models: dict[str, LoadedModel], tmp_path: Path
) -> None:
    """Also where only the rows of the answer are there, so that no other token has a string."""
    tokenizer = models["shown"].tokenizer
    answers = open_run(prune(whole.path, tmp_path / "answers.h5", positions="answer"))
    for run in (whole, answers):
        asked = run.questions()
        at = {
            name: asked.positions(name).tolist()
            for name in ("thinking[0]", "thinking[-1]", "answer[0]", "exact_answer[0]")
        }
        for number, n in enumerate(run.column("n_prompt_tokens")):
            name, response = asked[number].question[-2:], run[number]["generated_ids"].tolist()
            if name == "Q0":  # "\n" and "\n\n" are blank
                texts = {"answer[0]": "4", "exact_answer[0]": "4"} | (
                    {"thinking[0]": "3", "thinking[-1]": "."} if run is whole else {}
                )
                assert {each: tokenizer.decode([response[at[each][number] - n]]) for each in texts} == texts
            if name == "Q2":
                assert (at["answer[0]"][number], at["thinking[0]"][number]) == (n, -1)
            if name == "Q3":
                assert at["answer[0]"][number] == -1
    first = whole.where(answered(whole)).activations("layer_1", position="answer[:1]")
    assert first.shape == (len(SAID), 32)


def answered(run: Run) -> list[bool]:
    """Of each sample, whether its answer was fed."""
    return [str(prompt)[-2:] in SAID for prompt in run.column("prompt")]


@pytest.mark.parametrize("part", ["thinking", "answer"])
def test_a_copy_of_a_part_is_what_a_run_of_that_part_keeps(
    part: str, whole: Run, models: dict[str, LoadedModel], tmp_path: Path
) -> None:
    pruned = open_run(prune(whole.path, tmp_path / "part.h5", positions=part))
    assert_true(models["shown"], pruned, part)
    assert verify(pruned.path) == []
    assert_honest(pruned, models["shown"])


def test_files_that_do_not_say_it_are_read_by_their_text(whole: Run) -> None:
    """As those before 1.6: the same places, from the strings of the tokens."""
    kept = {name: whole.contents.columns.whole(name) for name in whole.contents.columns.names}
    older = {name: values for name, values in kept.items() if "thinking" not in name and "answer" not in name}
    found = ThinkingIn(replace(whole.contents, columns=Listed(older)))
    known = ThinkingIn(whole.contents)
    assert [found.of(number) for number in range(len(whole))] == [known.of(number) for number in range(len(whole))]


@pytest.mark.parametrize(
    "columns", [{"answer_start": 2}, {"answer_start": 99}, {"thinking_start": 6, "thinking_stop": 5}]
)
def test_verify_names_a_sample_whose_answer_is_not_in_its_response(columns: dict[str, int], tmp_path: Path) -> None:
    sample = make_sample()
    wrong = replace(sample, fields={**sample.fields, **columns})
    write_shard(tmp_path / "x.h5", [wrong], "m", SETTINGS)
    (problem,) = verify(tmp_path / "x.h5")
    assert "do not lie in its response" in problem


def test_recompute_tells_where_the_thinking_is_elsewhere(
    models: dict[str, LoadedModel], tmp_path: Path, whole: Run
) -> None:
    loaded = models["shown"]
    run = open_run(whole.path)
    moved = {name: list(run.contents.columns.whole(name)) for name in run.contents.columns.names}
    moved["answer_start"] = [None if each is None else each + 1 for each in moved["answer_start"]]
    run._contents = replace(run._contents, columns=Listed(moved))
    assert any("answer_start" in problem for each in recompute(run, loaded).different for problem in each.problems)


def test_the_command_line_shows_thinking(whole: Run) -> None:
    shown = CliRunner().invoke(app, ["show", str(whole.path), "--task", "asks", "--doc", "0"])
    assert "Answer, after thinking: 4." in shown.output
    sample = CliRunner().invoke(app, ["show", str(whole.path), "--sample", "0"]).output
    assert "answer_start: " in sample


def test_a_command_says_when_nothing_was_thought(tmp_path: Path) -> None:
    kept = ["--capture_activations", "--positions", "thinking", "--layers", "0", "-o", "run"]
    done = within("--benchmark", "demo_arithmetic", "--limit", "2", *kept, cwd=tmp_path)
    assert not done.returncode, done.stderr
    assert "Thinking:    in 0 of 2 samples. If the model thinks" in done.stdout
    assert "--think_tokens OPEN,CLOSE" in done.stdout
    done = within("generate", "What is 1 + 1?", "--positions", "thinking", "-o", "one.h5", cwd=tmp_path)
    assert "Thinking:    none in this response" in done.stderr
