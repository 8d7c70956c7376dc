"""Probes of every site at several positions: what is planted at one layer and position is found there, and nowhere else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import within
from helpers.probed import WORDS, run_of, run_of_tokens
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from AutomaticEval import difference_of_means, evaluate_with_activations, load_direction, load_probe, open_run, probe
from AutomaticEval.analysis.probes.asked import Asked, judge_of, rows_of
from AutomaticEval.analysis.probes.grid.positions import grid_of
from AutomaticEval.analysis.probes.saved.prompt_score import prompt_score
from AutomaticEval.analysis.probes.target import target_of
from AutomaticEval.analysis.steering.of_probe import best_direction
from AutomaticEval.errors import SelectionError, StoreError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.pages.probe_result import probe_section
from AutomaticEval.store.run import Run

N, WIDTH = 120, 6
USUAL = [*(f"prompt[-{n}]" for n in (4, 3, 2, 1)), "response[0]", "exact_answer[0]", "exact_answer[-1]", "response[-1]"]
PLANTED = ("layer_1", "prompt[-3]")
RESPONSE = ["It", "Ġis", "Ġ4", "2", ".", "</s>"]
LABELS = np.random.default_rng(9).integers(0, 2, N)


def generated(
    folder: Path, at: int, seed: int = 0, strength: float = 3.0, response: list[str] = RESPONSE, **how: Any
) -> Run:
    """Prompts of four tokens, answers with an exact answer of two; right answers lie further along one number of layer_1 at one token."""
    draw = np.random.default_rng(seed)
    tokens = [([*draw.choice(WORDS, 3), "?"], response) for _ in range(N)]
    n_fed = 3 + len(response)
    sites = {key: draw.normal(size=(N, n_fed, WIDTH)) for key in ("embeddings", "layer_0", "layer_1")}
    sites["layer_1"][:, at, 2] += strength * LABELS
    about = {"response": "".join(response[:5]).replace("Ġ", " "), "prediction": "42"}
    columns = [{**about, "correct": bool(each), "doc_id": 1000 * seed + n} for n, each in enumerate(LABELS)]
    return run_of_tokens(folder, tokens, sites, columns, **how)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return generated(tmp_path_factory.mktemp("planted") / "run", at=1)


@pytest.fixture(scope="module")
def result(planted: Run) -> Any:
    return probe(planted, grid=True)


def test_what_is_planted_at_a_layer_and_position_is_found_there_and_nowhere_else(result: Any) -> None:
    best = result.measured["best"]
    assert best["places"] == {"layer_1 at prompt[-3]": 5}
    assert (best["site"], best["position"]) == PLANTED
    assert best["judged"].auroc.interval[0] > 0.9
    places = result.measured["places"]
    assert [each.position for each in places[: len(USUAL)]] == USUAL
    assert len(places) == 2 * len(USUAL)
    for each in places:
        is_there = (each.site, each.position) == PLANTED
        for auroc in (each.probe.auroc, each.difference_of_means):
            assert (auroc.simultaneous[0] > 0.5) == is_there, each
        assert (each.p < 0.05) == is_there
    assert result.measured["findings"] == []


def test_a_place_of_the_grid_is_the_probe_at_that_position_and_scikit_learns(planted: Run, result: Any) -> None:
    alone = probe(planted, position="exact_answer[-1]").measured
    of_grid = [each for each in result.measured["places"] if each.position == "exact_answer[-1]"]
    for one, other in zip(alone["places"], of_grid, strict=True):
        assert (one.site, one.probe.auroc.mean, one.probe.brier.mean) == (
            other.site,
            other.probe.auroc.mean,
            other.probe.brier.mean,
        )
        assert one.p <= other.p  # corrected for fewer places
    assert "position_in_answer" in [each.name for each in alone["findings"]]
    of = target_of(planted.questions())
    judge = judge_of(of, Asked("correct", "prompt[-3]", "question", 5, 1, 42))
    rows = rows_of(of.questions, *PLANTED)
    found = []
    for fold in judge.repeats[0]:
        tried = []
        for strength in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
            scaler = StandardScaler().fit(rows[fold.fit])
            plain = LogisticRegression(C=strength).fit(scaler.transform(rows[fold.fit]), of.labels[fold.fit])
            said = plain.predict_proba(scaler.transform(rows[fold.choose]))[
                np.arange(len(fold.choose)), of.labels[fold.choose]
            ]
            tried.append((-np.log(said).mean(), strength))
        scaler = StandardScaler().fit(rows[fold.train])
        plain = LogisticRegression(C=min(tried)[1]).fit(scaler.transform(rows[fold.train]), of.labels[fold.train])
        found.append(roc_auc_score(of.labels[fold.test], plain.decision_function(scaler.transform(rows[fold.test]))))
    (place,) = (each for each in result.measured["places"] if (each.site, each.position) == PLANTED)
    assert place.probe.auroc.mean == pytest.approx(np.mean(found), abs=0.002)
    assert result.measured["best"]["judged"].auroc.mean == place.probe.auroc.mean


def test_the_embedding_is_judged_at_its_best_position(tmp_path: Path) -> None:
    run = generated(tmp_path / "run", at=1)
    rows = {each: rows_of(run.questions(), "embeddings", each) for each in ("prompt[-1]", "prompt[-3]")}
    rows["prompt[-3]"][:, 0] += 3 * LABELS
    sites = {
        "embeddings": np.stack([*rows.values()], 1),
        "layer_0": np.random.default_rng(2).normal(size=(N, 2, WIDTH)),
    }
    columns = [{"correct": bool(each)} for each in LABELS]
    both = run_of(
        tmp_path / "both",
        {key: each[:, 1] for key, each in sites.items()},
        columns,
        first={key: each[:, 0] for key, each in sites.items()},
    )
    measured = probe(both, grid=True).measured
    (embedding,) = (each for each in measured["baselines"] if each.name == "embedding")
    assert embedding.judged.auroc.interval[0] > 0.9
    assert [each.name for each in measured["findings"]] == ["follows:embedding", "at_chance"]


def test_the_audit_says_when_folds_chose_a_token_of_the_response(tmp_path: Path) -> None:
    measured = probe(generated(tmp_path / "run", at=7), keys=["layer_1"], grid=True, n_folds=3).measured
    assert list(measured["best"]["places"]) == ["layer_1 at exact_answer[-1]"]
    (finding,) = (each for each in measured["findings"] if each.name == "position_in_answer")
    assert finding.text.startswith("the rows at exact_answer[-1] are inside the answer's text")


def test_what_is_saved_is_of_the_chosen_place(planted: Run, result: Any, tmp_path: Path) -> None:
    options = ("--grid", "--save_probe", "p.safetensors", "--save_direction", "d.safetensors", "-o", "out")
    done = within("probe", str(planted.path), *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    saved, direction = load_probe(tmp_path / "p.safetensors"), load_direction(tmp_path / "d.safetensors")
    assert (saved.site, saved.position) == PLANTED
    right = difference_of_means(planted, PLANTED[0], position=PLANTED[1])
    torch.testing.assert_close(direction.vector, right.vector)
    torch.testing.assert_close(best_direction(planted, result).vector, right.vector)
    said = saved.probabilities(planted.questions().activations(*PLANTED))
    assert roc_auc_score(LABELS, said) > 0.95
    told = " ".join(done.stdout.split())
    for part in (
        "chosen inside the training folds: layer_1 at prompt[-3] in 5",
        "Left out: prompt[-5]: 120 of 120 questions have no such token that was fed",
        "Probe: layer_1 at prompt[-3], 120 questions",
        "Logistic probe at prompt[-3] (probe_grid.png has all 16 places)",
    ):
        assert part in told
    written = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert written == json.loads(json.dumps(result.as_json()))
    assert (tmp_path / "out" / "probe_grid.png").stat().st_size > 20_000
    assert (tmp_path / "out" / "probe.png").stat().st_size > 20_000


def test_the_file_has_the_keys_of_its_contract_and_the_page_shows_one_position(planted: Run, result: Any) -> None:
    written = json.loads(json.dumps(result.as_json()))
    assert written["settings"]["positions"] == USUAL
    assert written["settings"]["position"] == ",".join(USUAL)
    assert set(written["places"][0]) == {"site", "position", "probe", "difference_of_means", "p"}
    assert set(written["best"]) == {"judged", "site", "position", "places", "strength"}
    assert {each["position"]: each["n_without"] for each in written["grid"]["left_out"]} == {"prompt[-5]": N}
    alone = json.loads(json.dumps(probe(planted, position="prompt[-3]").as_json()))
    assert "grid" not in alone
    assert (alone["settings"]["position"], alone["settings"]["positions"]) == ("prompt[-3]", ["prompt[-3]"])
    assert alone["best"]["places"] == {"layer_1": 5}
    section, of_one = probe_section(written), probe_section(alone)
    assert [row[:2] for row in section["places"]] == [row[:2] for row in of_one["places"]]
    assert section["position"] == "prompt[-3], the best of 8 positions (chosen in 5 of 5 folds)"
    assert of_one["position"] == "prompt[-3]"
    ((_, columns, rows),) = section["matrices"]
    assert of_one["matrices"] == []
    told = {(row[0], name): cell for row in rows for name, cell in zip(columns[1:], row[1:], strict=True)}
    measured = {(each["site"], each["position"]): each["probe"]["auroc"]["mean"] for each in written["places"]}
    assert told == {place: f"{mean:.3f}" for place, mean in measured.items()}


def test_positions_that_some_questions_lack_are_named_and_not_in_the_grid(tmp_path: Path) -> None:
    """Five answers hold no exact answer, and ten think."""
    draw = np.random.default_rng(3)
    response = ["<think>", "a", "</think>", "Ġ4", "2", "."]
    tokens = [([f"Why{number}", "?"], response if number < 10 else response[3:]) for number in range(N)]
    texts = ["<think>a</think> 42." if number < 10 else " 42." for number in range(N)]
    columns = [
        {"response": text, "prediction": "7" if number < 5 else "42", "correct": bool(each), "prompt": f"Why {number}?"}
        for number, (text, each) in enumerate(zip(texts, LABELS, strict=True))
    ]
    rows = [draw.normal(size=(len(prompt) + len(said) - 1, WIDTH)) for prompt, said in tokens]
    run = run_of_tokens(tmp_path / "run", tokens, {"layer_0": rows}, columns)
    grid = grid_of([run.questions()])
    assert grid.positions == ("prompt[-2]", "prompt[-1]", "response[0]", "answer[0]", "response[-1]")
    left_out = {each.position: (each.n_without, each.reason) for each in grid.left_out}
    assert left_out["thinking[0]"] == (110, "110 of 120 questions have no such token that was fed")
    assert left_out["exact_answer[-1]"] == (5, "5 of 120 questions have no such token that was fed")
    assert left_out["prompt[-3]"][0] == N
    some = run.where(run.questions().has("exact_answer[-1]"))
    assert len(some) == N - 5
    assert "its rows are those of answer[0]" in [each.reason for each in grid_of([some.questions()]).left_out]
    with pytest.raises(StoreError, match=r"5 of 120 questions have no exact_answer\[-1\] that was fed.*run\.where"):
        probe(run, position=["prompt[-1]", "exact_answer[-1]"])


def test_a_run_with_one_position_has_no_grid(tmp_path: Path) -> None:
    run = generated(tmp_path / "run", at=1, positions="prompt[-1:]")
    with pytest.raises(
        StoreError,
        match=r"two positions or more.*has prompt\[-1\] \(prompt\[-2\]: the row of 120 of 120 questions was not stored",
    ) as told:
        probe(run, grid=True)
    assert "--positions all" in str(told.value)
    with pytest.raises(SelectionError, match="leave one out"):
        probe(run, grid=True, position="prompt[-2]")
    for wrong in (-1, 7, ["last", 0]):  # 0 is the first stored row, and "0" the first token
        with pytest.raises(SelectionError, match=r"position is .*; write a text"):
            probe(run, position=wrong)


def test_runs_are_compared_at_the_positions_that_all_have(planted: Run, tmp_path: Path) -> None:
    other = generated(tmp_path / "other", at=1, seed=4, positions="prompt[-3:]")
    assert grid_of([planted.questions(), other.questions()]).positions == ("prompt[-3]", "prompt[-2]", "prompt[-1]")
    measured = probe(planted, keys=["layer_0", "layer_1"], grid=True, transfer=[other]).measured
    told = measured["transfer"]
    assert [each["places"] for each in told["runs"]] == [{"layer_1 at prompt[-3]": 5}] * 2
    assert all(each.auroc.interval[0] > 0.8 for each in told["cells"])
    named = probe(planted, keys=["layer_1"], position="prompt[-3], prompt[-2]", transfer=[other]).measured["transfer"]
    assert [each.auroc.mean for each in named["cells"]] == [each.auroc.mean for each in told["cells"]]
    with pytest.raises(StoreError, match=r"prompt\[-4\]\) of sample 0 was not stored"):
        probe(planted, keys=["layer_1"], position="prompt[-3],prompt[-4]", transfer=[other])


def test_a_probe_of_the_response_scores_no_prompt(tmp_path: Path) -> None:
    run = generated(tmp_path / "run", at=7)
    done = within(
        "probe", "run", "--position", "exact_answer[-1]", "--save_probe", "p.safetensors", "-o", "out", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    saved = load_probe(tmp_path / "p.safetensors")
    assert saved.position == "exact_answer[-1]"
    with pytest.raises(SelectionError, match=r"the probe reads exact_answer\[-1\], a token of the response"):
        prompt_score(saved, "Who?", "demo")
    with pytest.raises(SelectionError, match="the probe reads last, which may have been a token of the response"):
        prompt_score(replace(saved, position="last"), "Who?", "demo")
    again = within("probe_score", "p.safetensors", str(run.path), cwd=tmp_path)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ("--grid", "--position", "prompt[-1]"),
            "SelectionError: --position was given, but --grid has positions of its own",
        ),
        (("--position", "prompt[-1],somewhere"), "UnknownPositions: no positions 'somewhere'"),
        (("--position", "prompt[-1],prompt[-9]"), "are 0 positions of t document 0"),
        (("--position", "thinking[0]"), "StoreError: "),
    ],
)
def test_positions_that_cannot_be_asked_are_told_in_one_line(
    planted: Run, given: Any, message: str, tmp_path: Path
) -> None:
    done = within("probe", str(planted.path), *given, "-o", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_choices_beside_generated_answers_have_the_prompt_alone(demo: LoadedModel, tmp_path: Path) -> None:
    """Facts with four choices, and sums with a generated answer."""
    evaluate_with_activations(demo, "demo", limit=6, output=tmp_path / "run", positions="all")
    run = open_run(tmp_path / "run")
    grid = grid_of([run.questions()])
    assert grid.positions == tuple(f"prompt[-{n}]" for n in range(8, 0, -1))
    assert {each.position: each.reason for each in grid.left_out}["response[0]"] == (
        "6 of 12 questions have choices, or no such token that was fed"
    )
    assert "response[0]" not in [each.position for each in grid_of([run.where(task="demo_facts").questions()]).left_out]
    of_sums = grid_of([run.where(task="demo_arithmetic").questions()])
    assert of_sums.positions[8:] == ("response[0]", "exact_answer[0]", "exact_answer[-1]")
    norms = tmp_path / "norms"
    evaluate_with_activations(demo, "demo_arithmetic", limit=4, output=norms, positions="all", reduce="mean")
    with pytest.raises(StoreError, match="two positions or more"):
        grid_of([open_run(norms).questions()])
