"""Runs of questions with rows that are given, for probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from AutomaticEval import open_run
from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.selection import Positions
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


def run_of_tokens(
    folder: Path,
    tokens: Sequence[tuple[Sequence[str], Sequence[str]]],
    sites: Mapping[str, Sequence[Any]],
    columns: Sequence[Mapping[str, Any]],
    positions: str = "all",
    model: str = "m",
    ids: Mapping[str, int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """A run of generated answers whose tokens are given: of each question the strings of its prompt's and of its response's tokens.

    sites: key -> for each question the rows [n_fed, width] of all tokens but the last of the response. positions: those that are kept. ids: of the strings.
    """
    words = dict.fromkeys(token for both in tokens for part in both for token in part)
    known = ids or {word: 1 + number for number, word in enumerate(words)}
    with RunWriter(folder, model, {**SETTINGS, "positions": positions, **(settings or {})}) as made:
        for number, ((prompt, response), about) in enumerate(zip(tokens, columns, strict=True)):
            fed = [*prompt, *response][:-1]
            kept = list(Positions.parse(positions).resolve(len(prompt), len(response)))
            rows = {key: torch.as_tensor(np.asarray(of[number], np.float32))[kept] for key, of in sites.items()}
            own = Rows([known[fed[at]] for at in kept], [fed[at] for at in kept], kept, rows)
            fields = {"prompt": " ".join(prompt), "response": "That.", "task": "t", "doc_id": number, "choice": 0}
            all_ids = [[known[each] for each in part] for part in (prompt, response)]
            made.add([Sample({**fields, "repeat": 0, **about}, *all_ids, [Part(own, range(len(kept)))])])
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
