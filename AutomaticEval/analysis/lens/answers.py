"""Which tokens a question's right answer and the model's own answer begin with, and which rows predict the tokens of its choices."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from AutomaticEval.capture.vocabulary import text_of
from AutomaticEval.store.questions.questions import Questions
from AutomaticEval.store.ragged import Array, indices_of

NONE = -1
"""In the place of a token that is not known."""


class FirstTokens(NamedTuple):
    """What the answers of some questions begin with."""

    gold: Array
    """[n_questions]: the first token of the right choice, or of the target of a generated answer; NONE where it is not known."""

    taken: Array
    """[n_questions]: the first token of what the model answered: of the choice that it took, or of its text. NONE where it is only white space."""

    n_white: Array
    """[n_questions]: so many tokens of only white space come before them in the target and in the model's own text, so that a row of the response predicts them."""

    without_gold: dict[str, int]
    """Why a question has no gold token -> how many have none for this reason."""


class ChoiceRows(NamedTuple):
    """The rows that predict the tokens of choices: one line for each token of each choice of the questions that have several."""

    row: Array
    """[n]: the number of the row."""

    token: Array
    """[n]: the token that came next."""

    question: Array
    """[n]: whose choice it is."""

    choice: Array
    """[n]: the number of the choice."""

    is_whole: Array
    """[n_questions]: whether the question has several choices, and the run kept the rows of all their tokens."""


def first_tokens(questions: Questions, tokenizer: Any, *, may_skip: bool = True) -> FirstTokens:
    """The first tokens of the right answers and of the model's. A token that is only white space says nothing, and is none of them.

    tokenizer: encodes the targets of generated answers. may_skip: whether the token after white space is taken where the model wrote the same white space.
    """
    contents = questions.source.contents
    samples, n_shared = questions.samples, questions.n_prompt_tokens
    choices = contents.columns.whole("choice") if "choice" in contents.columns.names else [None] * contents.n_samples
    gold, taken = np.full((2, len(questions)), NONE, dtype=np.int64)
    n_white, white = np.zeros(len(questions), dtype=np.int64), _White(tokenizer)
    prompts = contents.columns.whole("prompt") if "prompt" in contents.columns.names else [""] * contents.n_samples
    missing: Counter[str] = Counter()
    for number, question in enumerate(questions):
        own = samples.item(number).tolist()
        if question.logprobs:
            of_choice = {choices[sample] or 0: sample for sample in reversed(own)}
            target = 0 if len(of_choice) == 1 else question.target
            right, said = (of_choice.get(each) if type(each) is int else None for each in (target, question.prediction))
            gold[number] = NONE if right is None else _token_after(contents, right, int(n_shared[number]), own)
            taken[number] = NONE if said is None else _token_after(contents, said, int(n_shared[number]), own)
            reason = "the target is not the number of one choice"
        else:
            ids, prompt = contents.generated_ids.item(own[0]).tolist(), contents.input_ids.item(own[0])
            target = _encoded(tokenizer, prompts[own[0]], question.target, prompt)
            n = next((n for n, token in enumerate(target) if token not in white), 0)
            if may_skip and ids[:n] == target[:n] and len(ids) > n:
                n_white[number] = n
            taken[number] = ids[n_white[number]] if ids else NONE
            gold[number] = target[n_white[number]] if target else NONE
            reason = "the target is no text whose first token after the prompt is known"
        if gold[number] in white:
            gold[number], reason = NONE, "the right answer begins with a token that is only white space"
        if taken[number] in white:
            taken[number] = NONE
        if gold[number] == NONE:
            missing[reason] += 1
    return FirstTokens(gold, taken, n_white, dict(missing))


class _White:
    """The tokens that are only white space."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._known = tokenizer, {NONE: False}

    def __contains__(self, token: int) -> bool:
        token = int(token)
        if token not in self._known:
            self._known[token] = not text_of(self._tokenizer, [token]).strip()
        return self._known[token]


def _token_after(contents: Any, sample: int, n_shared: int, own: list[int]) -> int:
    """The first token of a choice: the one after the tokens with which the prompts of all choices begin."""
    prompt, ids = contents.input_ids.item(sample), contents.generated_ids.item(sample)
    has_own_prompt = n_shared != len(contents.input_ids.item(own[0]))
    after = np.concatenate([prompt[n_shared:], ids]) if has_own_prompt else ids
    return int(after[0]) if len(after) else NONE


def _encoded(tokenizer: Any, prompt: str, target: Any, ids: Array) -> list[int]:
    """The tokens of a target after a prompt, with a space between them unless the prompt ends with one; none where the tokens of the two do not part there."""
    if not isinstance(target, str) or not target.strip():
        return []
    between = "" if prompt[-1:].isspace() else " "
    before, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + between + target.strip())
    )
    n = min(len(before), len(ids))
    parts_there = len(whole) > len(before) and whole[: len(before)] == before
    is_the_prompt = n > 0 and before[len(before) - n :] == ids[len(ids) - n :].tolist()
    return list(whole[len(before) :]) if parts_there and is_the_prompt else []


def choice_rows(questions: Questions) -> ChoiceRows:
    """The rows that predict the tokens of the questions' choices, as far as the run kept them."""
    contents, of_questions = questions.source.contents, questions.samples
    samples = np.asarray(of_questions.values[:])
    question = np.repeat(np.arange(len(questions)), np.diff(of_questions.offset))
    numbered = contents.columns.whole("choice") if "choice" in contents.columns.names else [None] * contents.n_samples
    choice = np.array([numbered[sample] or 0 for sample in samples.tolist()], dtype=np.int64)
    n_choices = np.zeros(len(questions), dtype=np.int64)
    np.maximum.at(n_choices, question, choice + 1)
    several = n_choices[question] > 1
    samples, question, choice = samples[several], question[several], choice[several]
    prompts, answers = (each.take(samples) for each in (contents.input_ids, contents.generated_ids))
    n_prompt, n_answer = np.diff(prompts.offset), np.diff(answers.offset)
    segments = contents.segments.take(samples)
    ranges = np.asarray(segments.values[:]).reshape(-1, 2)
    ends = np.concatenate([[0], np.cumsum(ranges[:, 1] - ranges[:, 0])])[segments.offset]
    rows = indices_of(ranges)
    owner = np.repeat(np.arange(len(samples)), np.diff(ends))
    distinct, inverse = np.unique(rows, return_inverse=True)  # samples share rows
    place = np.asarray(contents.positions[distinct])[inverse] - n_prompt[owner] + 1  # of the token that it predicts
    scored = (place >= 0) & (place < n_answer[owner])
    rows, owner, place = rows[scored], owner[scored], place[scored]
    token = np.asarray(answers.values[:])[answers.offset[owner] + place]
    kept = (np.bincount(owner, minlength=len(samples)) == n_answer) & (n_answer > 0)
    is_whole = n_choices > 1
    np.logical_and.at(is_whole, question, kept)
    of_whole = is_whole[question[owner]]
    rows, owner, token = rows[of_whole], owner[of_whole], token[of_whole]
    return ChoiceRows(rows, token, question[owner], choice[owner], is_whole)
