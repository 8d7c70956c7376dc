"""`lens_of_question`: the lens at each token and layer of one question."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from AutomaticEval.analysis.lens.by_layer import lens_places
from AutomaticEval.analysis.lens.lens_rows import rows_per_block
from AutomaticEval.analysis.lens.logit_lens import LogitLens
from AutomaticEval.analysis.lens.tuned_lens import TunedLens, refuse_other_model, tuned_for
from AutomaticEval.analysis.result import Result
from AutomaticEval.capture.recompute.recomputed_run import model_of
from AutomaticEval.capture.vocabulary import token_strings
from AutomaticEval.errors import StoreError, did_you_mean
from AutomaticEval.store.questions.questions import Questions
from AutomaticEval.store.ragged import indices_of
from AutomaticEval.store.run import Run

MOST_TOKENS = 60
"""The last ones of the sequence are read."""


def lens_of_question(
    run: Run,
    doc_id: int,
    task: str | None = None,
    keys: Iterable[str] | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    tuned: TunedLens | str | Path | None = None,
) -> Result:
    """What the lens says at each token and place of one question: the likeliest token, and the rank and probability of the token that came next.

    Of choices, the tokens are those of the right choice, or of the first one where no choice is named as right; of a generated answer, its own. task: may be left out
    where the run has one. The last 60 stored tokens are read. keys, model and tuned: as for `logit_lens`.
    Raises StoreError for a question or task that the run does not have; and as `logit_lens`.
    """
    places = lens_places(run, keys)
    questions = _question(run, task, doc_id)
    question, contents = questions[0], questions.source.contents
    of_file = tuned_for(tuned, places)
    sample = _sample(questions)
    ids = np.concatenate([contents.input_ids.item(sample), contents.generated_ids.item(sample)])
    rows = indices_of(contents.segments.item(sample))
    positions = np.asarray(contents.positions[rows] if len(rows) else rows)
    order = np.argsort(positions)[-MOST_TOKENS:]
    if not len(order):
        raise StoreError(f"{run.path} kept no row of {question.name}.")
    rows, positions = rows[order], positions[order]
    loaded = model_of(run, model, tokenizer=tokenizer)  # after all that can be refused without it
    if of_file is not None:
        refuse_other_model(of_file, loaded)
    lens = LogitLens(loaded)
    wanted = torch.from_numpy(ids[positions + 1])
    measured: dict[str, Any] = {
        "run": {"path": run.path.name, "model": loaded.name},
        "task": question.task,
        "doc_id": doc_id,
        "question": question.question,
        "choices": question.choices,
        "target": question.target,
        "prediction": question.prediction,
        "positions": positions.tolist(),
        "tokens": token_strings(loaded.tokenizer, ids[positions].tolist()),
        "next_tokens": token_strings(loaded.tokenizer, wanted.tolist()),
        "n_left_out": len(contents.fed(sample)[0]) - len(rows),
        "places": [],
    }
    distinct = np.unique(rows)
    for key in places:
        given = questions.source.rows(key, distinct)[:][torch.from_numpy(np.searchsorted(distinct, rows))]
        given = given if of_file is None else of_file.translated(key, given)
        measured["places"].append({"site": key, **_cells(lens, given, wanted, loaded.tokenizer)})
    settings = {"tuned": None if of_file is None else of_file.about, "run": run.settings}
    return Result("lens_question", measured, settings)


def _cells(lens: LogitLens, rows: torch.Tensor, wanted: torch.Tensor, tokenizer: Any) -> dict[str, Any]:
    """top_token, top_probability, and rank and probability of the token that came next, [n_tokens] each."""
    found: dict[str, list[Any]] = {"top_token": [], "top_probability": [], "rank": [], "probability": []}
    step = rows_per_block(lens)
    for start in range(0, len(rows), step):
        with torch.no_grad():
            logprobs = lens.translated(rows[start : start + step])
        token = wanted[start : start + step].to(logprobs.device)
        of_next = logprobs.gather(1, token[:, None])
        top = logprobs.max(dim=1)
        found["top_token"] += token_strings(tokenizer, top.indices.tolist())
        found["top_probability"] += top.values.exp().tolist()
        found["rank"] += ((logprobs > of_next).sum(dim=1) + 1).tolist()
        found["probability"] += of_next[:, 0].exp().tolist()
    return found


def _question(run: Run, task: str | None, doc_id: int) -> Questions:
    """The question; of several sampled answers the first. Raises StoreError."""
    questions = run.questions()
    tasks = sorted({str(each) for each in questions.column("task") if each is not None})
    if task is None and len(tasks) > 1:
        raise StoreError(f"{run.path} has several tasks; say which with --task (task=): {', '.join(tasks)}.")
    if task is not None and task not in tasks:
        raise StoreError(f"{run.path} has no task {task!r}.{did_you_mean(task, tasks)} It has {', '.join(tasks)}.")
    asked = questions.where(doc_id=doc_id, **({} if task is None else {"task": task}))
    if not len(asked):
        raise StoreError(
            f"{run.path} has no document {doc_id}{f' of {task}' if task else ''}; `questions().table()` lists them."
        )
    return asked


def _sample(questions: Questions) -> int:
    """The number of the sample whose tokens are read."""
    own, target = questions.samples.item(0).tolist(), questions[0].target
    columns = questions.source.contents.columns
    choices = columns.whole("choice") if "choice" in columns.names else None
    if choices is not None and questions[0].logprobs and type(target) is int:
        return int(next((sample for sample in own if (choices[sample] or 0) == target), own[0]))
    return int(own[0])
