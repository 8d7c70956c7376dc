"""Runs of questions with rows that are given, for probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from AutomaticEval import open_run
from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.store.run import Run
from AutomaticEval.store.writer import RunWriter
from helpers.samples import SETTINGS

WORDS = np.array([f"word{number}" for number in range(300)])


def run_of(
    folder: Path,
    sites: Mapping[str, Any],
    columns: Sequence[Mapping[str, Any]],
    prompts: Sequence[str] | None = None,
    first: Mapping[str, Any] | None = None,
) -> Run:
    """A run of generated answers: one question for each row of the sites [n_questions, width], which is that of the last token of its prompt.

    columns: of each question, such as correct. prompts: by default random words. Each different prompt has tokens of its own.
    first: rows of the first token, for a run that kept all positions.
    """
    draw = np.random.default_rng(0)
    asked = prompts or [" ".join(draw.choice(WORDS, 12)) for _ in columns]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(asked))}
    rows = {key: np.asarray(each)[:, None] for key, each in sites.items()}  # [n_questions, 1, width]
    if first is not None:
        rows = {key: np.concatenate([np.asarray(first[key])[:, None], each], 1) for key, each in rows.items()}
    with RunWriter(folder, "m", SETTINGS | {"positions": "prompt[-1:]" if first is None else "all"}) as made:
        made.add(
            [
                _sample(number, numbers[prompt], prompt, {key: of[number] for key, of in rows.items()}, each)
                for number, (prompt, each) in enumerate(zip(asked, columns, strict=True))
            ]
        )
        made.finish()
    return open_run(folder)


def _sample(number: int, group: int, prompt: str, rows: Mapping[str, Any], columns: Mapping[str, Any]) -> Sample:
    ids = [1 + group // 300, 1 + group % 300]
    tensors = {key: torch.as_tensor(np.asarray(row, np.float32)) for key, row in rows.items()}
    (n_rows,) = {len(each) for each in tensors.values()}
    fed = ids[-n_rows:]
    part = Part(Rows(fed, [f"t{token}" for token in fed], range(2)[-n_rows:], tensors), range(n_rows))
    about = {"prompt": prompt, "response": "That.", "task": "t", "doc_id": number, "choice": 0, "repeat": 0}
    return Sample({**about, **columns}, ids, [7], [part])
