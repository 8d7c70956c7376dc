"""A run as questions: one row each, with lm-eval's own verdict, and one row of activations that no answer has touched."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.places import ROOT
from helpers.plain_lm_eval import as_json
from helpers.raw_hooks import raw_residuals
from helpers.runs import extracted
from helpers.samples import SETTINGS, make_sample, same, sample_of, write_run
from helpers.tasks import MIXED
from torch.utils.data import DataLoader

from AutomaticEval import answer_benchmark_question_with_activations, evaluate_with_activations, open_run
from AutomaticEval.errors import StoreError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.store.run import Run
from AutomaticEval.store.writer import RunWriter
from AutomaticEval.thinking.text import split_thinking

OWN_PROMPTS = """
task: own_prompts
custom_dataset: !function own_prompts.docs
output_type: multiple_choice
test_split: test
doc_to_text: answer
doc_to_choice: choices
doc_to_target: rest
metric_list:
  - metric: acc
"""
"""As WinoGrande: each choice has a prompt of its own, and all have the same continuation."""
OWN_PROMPTS_DATA = """
from datasets import Dataset, DatasetDict
def docs(**unused):
    docs = [
        {"choices": ["What is red? The fox", "What is red? The fish and the owl"], "rest": "is an animal", "answer": 1},
        {"choices": ["Which one? A", "Which one? B"], "rest": "is red", "answer": 0},
    ]
    return DatasetDict({"test": Dataset.from_list(docs)})
"""


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The demo benchmark with the default selection: 90 questions with four choices, 90 with a generated answer."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    return open_run(evaluate_with_activations("demo", "demo", output=folder).folder or "")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, own_tasks: str) -> Run:
    """Every type of request, at every position."""
    (Path(own_tasks) / "own_prompts.yaml").write_text(OWN_PROMPTS)
    (Path(own_tasks) / "own_prompts.py").write_text(OWN_PROMPTS_DATA)
    return open_run(ask_all(tmp_path_factory.mktemp("mixed") / "run", own_tasks, "all"))


def ask_all(folder: Path, tasks: str, positions: str) -> Path:
    names = [*MIXED, "own_prompts"]
    evaluate_with_activations("demo", names, include_path=tasks, positions=positions, output=folder)
    return folder


def lm_eval_said(run: Run) -> dict[tuple[str, int], dict[str, Any]]:
    """(task, doc_id) -> the line of lm-eval's own samples file."""
    said = {}
    for file in run.path.glob("*/samples_*.jsonl"):
        task = re.fullmatch(r"samples_(.+)_\d{4}-.*\.jsonl", file.name)
        assert task is not None
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            said.setdefault((task[1], entry["doc_id"]), entry)  # the first filter
    return said


def test_questions_say_what_lm_evals_own_files_say(scored: Run, demo: LoadedModel) -> None:
    questions, said = scored.questions(), lm_eval_said(scored)
    assert len(questions) == len(said) == 180
    for question in questions:
        entry = said[question.task or "", question.doc_id or 0]
        assert str(question.target) == entry["target"]
        assert question.question == entry["arguments"]["gen_args_0"]["arg_0"]
        if question.task == "demo_arithmetic":
            assert (question.response, question.correct) == (entry["resps"][0][0], entry["exact_match"] == 1)
            assert question.prediction == entry["filtered_resps"][0]
            assert (question.choices, question.logprobs, question.probabilities) == ([], [], [])
            assert (question.margin, question.confidence) == (None, None)
            assert question.answer == entry["resps"][0][0].strip()
            continue
        logprobs = [float(response[0][0]) for response in entry["resps"]]
        assert question.choices == [arguments["arg_1"] for arguments in entry["arguments"].values()]
        assert question.logprobs == logprobs
        assert question.correct == (entry["acc"] == 1)
        assert question.prediction == max(range(4), key=logprobs.__getitem__)
        assert question.response == question.choices[question.prediction]
        assert question.answer == question.response.strip()
        expected = torch.tensor(logprobs, dtype=torch.float64).softmax(0)
        torch.testing.assert_close(torch.tensor(question.probabilities, dtype=torch.float64), expected)
        assert question.confidence == max(question.probabilities)
        assert question.margin == pytest.approx(sorted(logprobs)[-1] - sorted(logprobs)[-2])


def test_the_row_of_a_question_is_that_of_its_prompt_alone(scored: Run, mixed: Run, demo: LoadedModel) -> None:
    """The prompt is fed once more, without any answer, to a model that only the test's own hooks read."""
    for run in (
        scored.where(doc_id=lambda number: number % 9 == 0),
        mixed.where(task=["twice", "greedy", "last_word"]),
    ):
        questions = run.questions()
        stored = {key: questions.activations(key) for key in run.keys}
        for number, question in enumerate(questions):
            ids = demo.tokenizer(question.question)["input_ids"]
            raw = raw_residuals(demo.model, "llama", ids)
            for key, rows in stored.items():
                torch.testing.assert_close(rows[number], raw[key][-1], atol=2e-5, rtol=2e-5)


def test_choices_with_prompts_of_their_own_share_what_is_before_the_word_that_differs(
    mixed: Run, demo: LoadedModel, own_tasks: str, tmp_path: Path
) -> None:
    questions = mixed.where(task="own_prompts").questions()
    assert questions.column("question") == ["What is red? The ", "Which one? "]
    assert [choice.split()[0] for choice in questions[0].choices] == ["fox", "fish"]
    rows = questions.activations("layer_1")
    for row, prompt in zip(
        rows, ("What is red? The", "Which one?"), strict=True
    ):  # "fox" and "fish" begin with one token
        raw = raw_residuals(demo.model, "llama", demo.tokenizer(prompt)["input_ids"])
        torch.testing.assert_close(row, raw["layer_1"][-1], atol=2e-5, rtol=2e-5)
    scored = open_run(ask_all(tmp_path / "run", own_tasks, "scored"))
    with pytest.raises(
        StoreError, match=r"\(prompt\[-1\]\) of sample 40 was not stored: the run kept positions='scored'"
    ):
        scored.questions().activations("layer_1")
    assert scored.where(task=list(MIXED)).questions().activations("layer_1").shape == (21, 128)


def test_every_type_of_request_is_a_row(mixed: Run) -> None:
    questions = mixed.questions()
    table = questions.table()
    assert table.groupby("task", sort=False).size().to_dict() == {
        "pages": 3,
        "last_word": 3,
        "twice": 3,
        "greedy": 3,
        "often": 9,  # three answers to each of three questions
        "own_prompts": 2,
    }
    assert table[table.task == "often"].repeat.tolist() == [0, 1, 2] * 3
    twice = questions.where(task="twice")
    assert [len(question.choices) for question in twice] == [
        4,
        3,
        4,
    ]  # and not those without a question, for acc_mutual_info
    said = lm_eval_said(mixed)
    for question in questions.where(task=["last_word", "pages"]):
        (logprob,) = question.logprobs
        logged = said[question.task or "", question.doc_id or 0]["resps"][0][0]
        assert logprob == pytest.approx(float(logged[0] if isinstance(logged, list) else logged), abs=1e-9)
        assert question.probabilities == [pytest.approx(math.exp(logprob))]
        assert (question.prediction, question.response, question.margin, question.confidence) == (
            None,
            None,
            None,
            None,
        )


def test_a_text_in_several_windows_is_one_row(tmp_path: Path) -> None:
    rows = {"layer_0": torch.zeros(2, 3)}
    windows = [
        sample_of(7, rows, task="pages", window=window, logprob=-1.5 - window, response=text, doc_id=doc)
        for doc, window, text in ((0, 0, "One "), (0, 1, "two"), (1, 0, "Three"))
    ]
    with RunWriter(tmp_path / "run", "m", SETTINGS) as made:
        made.add(windows)
        made.finish()
    questions = open_run(tmp_path / "run").questions()
    assert [(each.choices, each.logprobs) for each in questions] == [(["One two"], [-4.0]), (["Three"], [-1.5])]


def test_equal_prompts_are_one_group(mixed: Run, scored: Run) -> None:
    questions = mixed.questions()
    by_group: dict[int, set[str]] = {}
    by_prompt: dict[str, set[int]] = {}
    for group, prompt in zip(questions.groups.tolist(), questions.column("question"), strict=True):
        by_group.setdefault(group, set()).add(prompt)
        by_prompt.setdefault(prompt, set()).add(group)
    assert all(len(each) == 1 for each in (*by_group.values(), *by_prompt.values()))
    assert len(by_group) == 7
    red = questions.where(question=lambda text: text.startswith("Question: What is red?"))
    assert set(red.column("task")) == {"twice", "greedy", "often"}
    assert set(red.groups.tolist()) == {questions.groups[6]}
    assert red.groups.shape == (len(red),)
    assert len(set(scored.questions().groups.tolist())) == len(set(scored.column("prompt")))


def test_where_keeps_rows_and_questions_together(scored: Run) -> None:
    questions = scored.questions()
    whole = questions.activations("layer_2")
    wrong = questions.where(correct=False, task="demo_facts")
    picked = [n for n, each in enumerate(questions) if each.correct is False and each.task == "demo_facts"]
    assert len(wrong) == len(picked) == 23
    assert same(wrong.activations("layer_2"), whole[picked])
    assert same(wrong[3:5].activations("resid_post.2", position="prompt[-1]"), whole[picked[3:5]])
    assert wrong[-1] == questions[picked[-1]] == list(questions)[picked[-1]]
    close = questions.where(margin=lambda nats: nats is not None and nats < 0.5)
    assert 0 < len(close) < 90
    table = questions.table()
    assert questions.where(table.correct == table.confidence.gt(0.9)).column("doc_id") == [
        each.doc_id for each in questions if each.correct == ((each.confidence or 0) > 0.9)
    ]
    backwards = scored[::-1].questions()
    assert same(backwards.activations("layer_2"), whole.flip(0))
    assert backwards.groups.tolist() == questions.groups.tolist()[::-1]


def test_some_samples_are_asked_with_all_their_choices(scored: Run) -> None:
    right = scored.where(task="demo_facts", choice=2).questions()
    assert len(right) == 90
    assert as_json(list(right)) == as_json(list(scored.where(task="demo_facts").questions()))


def test_a_probe_reads_batches_of_rows_and_labels(scored: Run) -> None:
    questions = scored.questions()
    loader = DataLoader(questions.dataset("layer_1", label="correct"), batch_size=64, num_workers=1)
    batches = list(loader)
    assert same(torch.cat([rows for rows, _ in batches]), questions.activations("layer_1"))
    assert torch.cat([labels for _, labels in batches]).tolist() == questions.column("correct")
    assert same(torch.stack(list(questions.dataset("layer_1"))), questions.activations("layer_1"))
    with pytest.raises(StoreError, match="question 90 has no 'margin'; leave it out with where"):
        questions.dataset("layer_1", label="margin")


def test_the_probe_of_the_readme(scored: Run) -> None:
    code = next(
        part.split("```")[0] for part in (ROOT / "README.md").read_text().split("```python\n") if "GroupKFold" in part
    )
    code = (
        re.sub(r'open_run\(".*?"\)', "run", code)
        .replace("layer_14", "layer_2")
        .replace("cross_val_score(L", "found = cross_val_score(L")
    )
    names: dict[str, Any] = {"run": scored}
    exec(code, names)
    assert names["x"].shape == (180, 128)
    assert len(names["found"]) == 5
    for train, test in names["folds"].split(names["x"], groups=names["questions"].groups):
        prompts = names["table"].question
        assert not set(prompts[train]) & set(prompts[test])


def test_the_row_of_a_question_knows_nothing_of_the_answers_text(scored: Run) -> None:
    """All prompts of the demo end with the same token, so that its embedding is one row; a sample's last row is a token of the answer."""
    assert len(scored.questions().activations("embeddings").unique(dim=0)) == 1
    assert len(scored.activations("embeddings", position="last").unique(dim=0)) > 9


def test_a_notebook_shows_a_question_with_its_choices_verdict_and_tokens(scored: Run) -> None:
    def row(*cells: str) -> str:
        return "".join(f"<td style='text-align:left'>{cell}</td>" for cell in cells)

    first, last = scored.questions()[0], scored.questions()[-1]
    shown = first._repr_html_()
    assert "<b>demo_facts document 0: wrong</b>" in shown
    assert row("0.993", " whale", "taken") in shown
    assert row("0.004", " fox", "target") in shown
    assert "1 tokens of the prompt have rows" in shown
    for said in ("Response", " 48", "Target", "57"):
        assert f">{said}<" in last._repr_html_()
    evil = "<script>\x1b"
    hostile = replace(first, question=evil, choices=[evil] * 4, tokens={0: evil})._repr_html_()
    assert "<script>" not in hostile
    assert "\x1b" not in hostile


def test_the_tokens_of_a_question_are_those_of_its_prompt_that_have_rows(mixed: Run) -> None:
    for question in mixed.questions():
        samples = mixed.where(task=question.task, doc_id=question.doc_id, choice=lambda choice: not choice)
        sample = samples[0]
        rows = zip(sample["positions"].tolist(), sample["tokens"], strict=True)
        expected = {position: token for position, token in rows if position < sample["n_prompt_tokens"]}
        assert question.tokens == expected
        assert type(copy.deepcopy(question).tokens) is dict
        assert pickle.loads(pickle.dumps(question)).tokens == expected


def test_a_notebook_shows_the_first_questions(scored: Run) -> None:
    questions = scored.questions()
    html = questions._repr_html_()
    assert html.count("<tr>") == 11
    assert f"and {len(questions) - 10} more" in html
    assert "<td style='text-align:left'> fox</td><td style='text-align:left'>wrong</td>" in html
    assert "more" not in questions[:3]._repr_html_()


def test_other_tokens_of_the_prompt_and_of_an_answer(mixed: Run, scored: Run) -> None:
    twice = mixed.where(task="twice")
    for position in ("prompt[0]", "prompt[-3]"):
        expected = twice.where(choice=0).activations("layer_1", position=position)
        assert same(twice.questions().activations("layer_1", position=position), expected)
    generated = scored.where(task="demo_arithmetic")
    for at in ("response[0]", "last", 1):
        assert same(generated.questions().activations("layer_1", at), generated.activations("layer_1", position=at))


@pytest.mark.parametrize(
    ("key", "position", "says"),
    [
        (
            "layer_1",
            "last",
            "demo_facts document 0 has choices, and 'last' is another token in each, or inside its text",
        ),
        ("layer_1", "response[0]", 'Ask for a token of the prompt, such as "prompt[-1]"'),
        ("layer_1", -1, "demo_facts document 0 has choices"),
        ("layer_1", "prompt[0]", "position 0 (prompt[0]) of sample 0 was not stored: the run kept positions='scored'"),
        ("layer_1", "prompt[-99]", "0 positions of demo_facts document 0, whose prompt has 13 tokens"),
        ("layer_1", "prompt", "13 positions of demo_facts document 0"),
        ("layer_9", "prompt[-1]", "holds no 'layer_9'. It has embeddings, layer_0"),
        (1, "prompt[-1]", "1 is no site"),
    ],
)
def test_rows_that_a_question_does_not_have_are_refused(scored: Run, key: Any, position: Any, says: str) -> None:
    with pytest.raises(StoreError, match=re.escape(says)):
        scored.questions().activations(key, position)


def test_only_what_is_asked_for_is_read(scored: Run) -> None:
    run = open_run(scored.path)
    questions = run.questions().where(correct=True)
    questions.activations("layer_1")
    assert len(questions.groups) == len(questions) == 133
    columns: Any = run.contents.columns
    assert not {"prompt", "response", "metrics"} & set(columns._whole)


def test_choices_that_lost_other_parts_of_the_prompts_beginning_have_one_prompt(tmp_path: Path) -> None:
    """lm-eval cuts a prompt on the left, by as much as the choice is long."""
    ids = list(range(1, 9))
    samples = []
    for choice, n_cut in enumerate((3, 1)):
        fed = ids[n_cut:]
        n = len(fed)
        rows = Rows(fed, ["t"] * n, range(n), {"layer_0": torch.randn(n, 4)})
        fields = {
            "prompt": "P",
            "response": "r",
            "task": "t",
            "doc_id": 0,
            "choice": choice,
            "repeat": 0,
            "logprob": -1.0,
        }
        samples.append(Sample({**fields, "n_truncated": n_cut}, fed, [9], [Part(rows, range(n))]))
    with RunWriter(tmp_path / "run", "m", SETTINGS) as made:
        made.add(samples)
        made.finish()
    found = open_run(tmp_path / "run").questions().activations("layer_0")
    assert same(found, samples[0].parts[0].rows.activations["layer_0"][-1:])


def test_what_has_no_questions_says_so(tmp_path: Path, demo: LoadedModel) -> None:
    texts = open_run(extracted(demo, tmp_path / "texts", "resid_post"))
    with pytest.raises(StoreError, match="holds texts, not questions"):
        texts.questions()
    write_run(tmp_path / "cut", 9, shard_bytes=600)
    (tmp_path / "cut" / "run.h5").unlink()
    with pytest.raises(StoreError, match=r"is not finished.*--resume"):
        open_run(tmp_path / "cut").questions()
    samples = [make_sample(seed=n, task="t", doc_id=3, choice=n, repeat=0, logprob=-1.0) for n in (0, 2)]
    with RunWriter(tmp_path / "part", "m", SETTINGS) as made:
        made.add(samples)
        made.finish()
    with pytest.raises(StoreError, match=r"lacks choices of t document 3; it has \[0, 2\]"):
        open_run(tmp_path / "part").questions()


def test_a_question_that_was_asked_alone(tmp_path: Path) -> None:
    _, answer, data = answer_benchmark_question_with_activations(
        "What is red?", "demo", True, tmp_path, choices=["red", "blue"], max_new_tokens=5
    )
    (question,) = questions = open_run(data["path"]).questions()
    assert (question.question, question.choices, question.prediction) == ("What is red?", ["red", "blue"], answer)
    assert (question.response, question.logprobs, question.correct) == (data["response"], [], None)
    assert same(questions.activations("layer_1")[0], data["activations"]["layer_1"][data["n_prompt_tokens"] - 1])


@pytest.mark.parametrize(
    ("response", "prompt", "thinking", "answer"),
    [
        ("Paris.", "", None, "Paris."),
        ("<think>France …</think>\nParis.", "", "France …", "\nParis."),
        ("<thinking>a</thinking>b", "", "a", "b"),
        ("a</think>b", "Q?<think>\n", "a", "b"),
        ("France …</think>Paris.", "", "France …", "Paris."),  # the template began it, and is not in the prompt
        ("<think>a</think>b</think>c", "", "a</think>b", "c"),
        ("<think>France", "", "France", None),
        ("France is", "Question?\n<think>\n", "France is", None),
        ("<think></think>", "", "", ""),
        ("a <think> b", "", "a  b", None),
    ],
)
def test_a_response_is_thinking_and_an_answer(
    response: str, prompt: str, thinking: str | None, answer: str | None
) -> None:
    assert split_thinking(response, prompt) == (thinking, answer)


def test_a_slice_of_a_run_is_a_run(scored: Run) -> None:
    some = scored[2:5]
    assert isinstance(some, Run)
    assert some.column("choice") == [2, 3, 0]
    assert same(some.activations("layer_1"), scored.activations("layer_1")[2:5])
    assert same(some[-1]["activations"], scored[4]["activations"])
    assert len(scored[::2]) == 225
    assert len(scored[3:3]) == 0
    with pytest.raises(IndexError):
        scored[450]


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (lambda run: run.where(task="demo_fact"), "has no task 'demo_fact'. Did you mean 'demo_facts'? It has demo_facts, demo_arithmetic."),
        (lambda run: run.where(task=["demo_facts", "demo_arithmetik"]), "has no task 'demo_arithmetik'. Did you mean 'demo_arithmetic'"),
        (lambda run: run.where(correct=True).questions().where(task="mmlu_x"), "has no task 'mmlu_x'"),
        (lambda run: run.where(corect=True), "has no column 'corect'. Did you mean 'correct'"),
        (lambda run: run.questions().where(corect=True), "has no column 'corect'. Did you mean 'correct'"),
        (lambda run: run.activations(2), "2 is no site; this run has embeddings, layer_0, layer_1, layer_2, layer_3. Layer 2 is 'layer_2', and sample 2 is run[2]."),
        (lambda run: run.rows(2), "Layer 2 is 'layer_2'"),
        (lambda run: run.read("layer_1", 2), "2 is no site"),
        (lambda run: run["layer_3"], "samples are numbered from 0, and 'layer_3' is no number: the rows of a site are run.rows('layer_3')"),
        (lambda run: run["correct"], "a column is run.column('correct')"),
        (lambda run: run[1.5], "1.5 is no number"),
        (lambda run: run.questions()["correct"], 'questions are numbered from 0, and \'correct\' is no number: a column is questions.column("correct")'),
    ],
)  # fmt: skip
def test_what_was_wanted_is_said(scored: Run, typed: Any, says: str) -> None:
    with pytest.raises(StoreError, match=re.escape(says)):
        typed(scored)


def test_a_task_without_samples_in_a_selection_is_no_misspelling(scored: Run) -> None:
    assert len(scored.where(doc_id=3, task="demo_facts").where(task="demo_arithmetic")) == 0
    assert len(scored.where(task=lambda name: name == "none")) == 0


def test_a_row_leads_back_to_its_samples(mixed: Run, scored: Run) -> None:
    """Every sample that has a row is named, and no other: each row is equal, and as many are named as the samples have."""
    for run in (mixed, scored, scored.where(correct=True), mixed[::-3]):
        rows, samples = run.rows("layer_1"), list(run)
        origins = rows.where_from[:]
        assert len(origins) == len(rows)
        assert sum(len(origin.samples) for origin in origins) == sum(len(sample["positions"]) for sample in samples)
        whole = rows[:]
        for number, (numbers, position) in enumerate(origins):
            for sample in (samples[each] for each in numbers):
                (at,) = (sample["positions"] == position).nonzero()[:, 0].tolist()
                assert same(sample["activations"]["layer_1"][at], whole[number])
    origin = mixed.rows("layer_1").where_from[100]
    assert (
        origin
        == mixed.rows("layer_1").where_from[[7, 100]][1]
        == mixed.rows("layer_1").where_from[torch.tensor([100])][0]
    )
    assert len(origin.samples) > 1
    origins = mixed.rows("layer_1").where_from
    mask = np.arange(len(origins)) % 50 == 3
    assert origins[mask] == origins[3::50] == [origins[number] for number in range(3, len(origins), 50)]
    assert (origins[[]], origins[-1]) == ([], origins[len(origins) - 1])


def test_rows_of_one_sample_after_the_other_lead_back_to_that_sample(mixed: Run) -> None:
    some = mixed[5:20]
    origins = some.rows("layer_1", by_sample=True).where_from[:]
    expected = [([n], position) for n, each in enumerate(some) for position in each["positions"].tolist()]
    assert [tuple(each) for each in origins] == expected
    last = some.dataset("layer_1", position="last").rows.where_from[:]
    assert [tuple(each) for each in last] == [([n], int(each["positions"][-1])) for n, each in enumerate(some)]


@pytest.mark.parametrize("spelling", ["resid_post.2", "layer_2.resid_post", "layer_2"])
def test_a_site_is_read_in_each_of_its_spellings(scored: Run, spelling: str) -> None:
    for read in (
        lambda key: scored.read(3, key),
        lambda key: scored.activations(key),
        lambda key: scored.rows(key)[:5],
        lambda key: torch.stack(list(scored[:9].dataset(key, position="first"))),
        lambda key: next(iter(scored.batches(key, 32))),
        lambda key: scored.questions().activations(key),
        lambda key: torch.stack(list(scored.questions()[:9].dataset(key))),
    ):
        assert same(read(spelling), read("layer_2"))
    assert scored.steps(3, spelling) is None
    assert same(scored.read(0, "embed"), scored.read(0, "embeddings"))


def test_choices_without_any_prompt_are_all_kept(demo: LoadedModel, tmp_path: Path) -> None:
    """As in BLiMP, whose questions are two sentences: nothing stands before a choice."""
    (tmp_path / "pairs.jsonl").write_text('{"good": "The fox is red.", "bad": "The fox are red."}\n' * 2)
    (tmp_path / "pairs.yaml").write_text(
        f"task: pairs\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/pairs.jsonl\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: ""\ndoc_to_target: 0\ndoc_to_choice: "{{[good, bad]}}"\nmetric_list:\n  - metric: acc\n'
    )
    outcome = evaluate_with_activations(
        demo, "pairs", include_path=[str(tmp_path)], output=tmp_path / "run", positions="all"
    )
    questions = open_run(outcome.folder).questions()
    assert len(questions) == 2
    for question in questions:
        assert [text.strip() for text in question.choices] == ["The fox is red.", "The fox are red."]
        assert sum(question.probabilities) == pytest.approx(1)
        assert question.correct == (question.prediction == 0)
