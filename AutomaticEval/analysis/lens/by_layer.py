"""`logit_lens`: what each layer of a run would answer, over its questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from AutomaticEval.analysis.lens.answers import NONE, ChoiceRows, FirstTokens, choice_rows, first_tokens
from AutomaticEval.analysis.lens.lens_rows import Said, said_by_lens
from AutomaticEval.analysis.lens.logit_lens import LogitLens
from AutomaticEval.analysis.lens.tuned_lens import TunedLens, prompt_digest, refuse_other_model, tuned_for
from AutomaticEval.analysis.numbers.estimate import mean_intervals, methods
from AutomaticEval.analysis.result import Estimate, Result
from AutomaticEval.capture.recompute.recomputed_run import model_of
from AutomaticEval.capture.vocabulary import token_strings
from AutomaticEval.errors import SelectionError, StoreError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.sites import Site, key_among, site_of
from AutomaticEval.store.questions.questions import AT, Questions
from AutomaticEval.store.reading.reduced_runs import refuse_reduced
from AutomaticEval.store.run import Run

Array = np.ndarray[Any, Any]
RESIDUAL = ("embed", "resid_pre", "resid_mid", "resid_post")
"""The kinds that the lens reads."""
UNIT = "mean over different prompts: the answers to one prompt count as one"


@dataclass(frozen=True)
class LensPlace:
    """What the lens says at one place, over the questions. Logarithms are natural (nats)."""

    site: str
    median_rank: float | None
    """Of the right answer's first token among all tokens; 1 is the likeliest."""

    log_rank: Estimate
    """The mean logarithm of that rank."""

    gold_first: Estimate
    """The share of questions where that token is the likeliest."""

    gold_probability: Estimate
    gold_logprob: Estimate
    taken_probability: Estimate
    """Of the first token of what the model answered."""

    entropy: Estimate
    top_agreement: Estimate
    """The share of questions whose likeliest token is that of the last layer."""

    kl: Estimate
    """The Kullback-Leibler divergence from the model's own distribution."""

    choice_accuracy: Estimate
    """The share of questions whose choice with the largest log-probability, over all its tokens, is the right one."""


@dataclass(frozen=True)
class LensResult(Result):
    """The result of `logit_lens`, with the numbers of each question."""

    questions: Mapping[str, list[Any]] = field(default_factory=dict)
    """Column -> a value for each question at each place; `docs/lens.md` lists the columns. `write_lens_questions` writes them."""


def logit_lens(
    run: Run,
    keys: Iterable[str] | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    position: str = AT,
    limit: int | None = None,
    tuned: TunedLens | str | Path | None = None,
    seed: int = 42,
    advance: Callable[[int], None] = lambda _: None,
) -> LensResult:
    """What each layer of a run would answer, if the final norm and the unembedding read it at once, over the run's questions.

    >>> result = logit_lens(open_run("results/run"))
    >>> [(each.site, each.gold_probability.mean) for each in result.measured["places"]]

    keys: places of the residual stream, in any spelling; by default all of the run. model: as in `recompute`, by default the one that the run names.
    position: as in `Questions.activations`. limit: so many questions, drawn with seed. tuned: a tuned lens or its file; questions that it learned
    from are left out, and counted. advance: is told of each row at each place.

    The result's `measured` has `places` (`LensPlace`), how many questions there are, and why some have no right token; its `questions` has the
    numbers of each question. Memory holds 64 MiB of logits a few times over, whatever the run's size.
    Raises SelectionError for sites that the lens does not read; StoreError for rows that the run did not keep; SiteUnavailable for a model that has
    no lens or whose logits are scaled or capped in an unknown way; OtherSettings for another model than the run's.
    """
    places = lens_places(run, keys)
    of_file = tuned_for(tuned, places)
    questions, n_learned = asked_questions(run, limit, seed, of_file)
    at = questions.row_numbers(position)
    loaded = model_of(run, model, tokenizer=tokenizer)  # after all that can be refused without it
    if of_file is not None:
        refuse_other_model(of_file, loaded)
    lens = LogitLens(loaded)
    first, at = _first_and_rows(questions, loaded.tokenizer, position, at)
    choices = choice_rows(questions)
    final = final_place(run, loaded.layout.n_layers)
    said = said_by_lens(
        questions.source,
        lens,
        places,
        final,
        at,
        first,
        choices,
        (lambda key, rows: rows) if of_file is None else of_file.translated,
        advance,
    )
    scores = _choice_scores(said, choices, len(questions))
    measured = {
        "run": {"path": run.path.name, "model": loaded.name},
        "n_questions": len(questions),
        "n_prompts": len(np.unique(questions.groups)),
        "n_learned_from": n_learned,
        "n_after_space": int((first.n_white > 0).sum()),
        "without_gold": first.without_gold,
        "only_gold": _only_gold(first, loaded),
        "n_with_choices": int(choices.is_whole.sum()),
        "final": final,
        "places": _places(questions, places, said, scores),
    }
    settings = {
        "position": position,
        "limit": limit,
        "seed": seed,
        "tuned": None if of_file is None else of_file.about,
        "run": run.settings,
    }
    columns = _columns(questions, loaded, places, said, first, scores)
    return LensResult("lens", measured, settings, methods(len(places), unit=UNIT), columns)


def _first_and_rows(questions: Questions, tokenizer: Any, position: str, at: Array) -> tuple[FirstTokens, Array]:
    """The answers' first tokens, and the rows that predict them: those at the position or, where white space comes first, those of the response after it.

    Such a question has no right token where another position is asked for, or where the run did not keep these rows.
    """
    first = first_tokens(questions, tokenizer, may_skip=position == AT)
    rows = at.copy()
    try:
        for n in np.unique(first.n_white[first.n_white > 0]).tolist():
            later = np.flatnonzero(first.n_white == n)
            rows[later] = questions.take(later.tolist()).row_numbers(f"response[{n - 1}]")
    except StoreError:
        return first_tokens(questions, tokenizer, may_skip=False), at
    return first, rows


def _only_gold(first: FirstTokens, loaded: LoadedModel) -> str | None:
    """The right answers' first token where two or more questions all have the same; None where they differ."""
    known = first.gold[first.gold != NONE]
    return (
        str(token_strings(loaded.tokenizer, known[:1].tolist())[0])
        if len(known) > 1 and len(set(known.tolist())) == 1
        else None
    )


def lens_places(run: Run, keys: Iterable[str] | None) -> list[str]:
    """The places that the lens reads. Raises SelectionError for others, and for a run that was reduced or holds none."""
    refuse_reduced(run.settings, "the lens")
    wanted = run.keys if keys is None else [run.questions().source.key(key) for key in keys]
    places = [key for key in wanted if site_of(key).kind in RESIDUAL]
    others = [key for key in wanted if key not in places]
    if (keys is not None and others) or not places:
        raise SelectionError(
            f"the lens reads the residual stream ({', '.join(RESIDUAL)}), and {', '.join(others) or 'nothing'} was asked for; {run.path} has {', '.join(run.keys)}."
        )
    return list(dict.fromkeys(places))


def final_place(run: Run, n_layers: int) -> str | None:
    """The key that gives the model's own distribution; None when the run did not keep it."""
    for site in (Site("resid_post", n_layers - 1), Site("final_norm")):
        key = key_among(run.keys, site)
        if key is not None:
            return key
    return None


def asked_questions(run: Run, limit: int | None, seed: int, tuned: TunedLens | None = None) -> tuple[Questions, int]:
    """The questions that are read, and how many are left out because a tuned lens learned from them. Raises StoreError when none is left."""
    questions = run.questions()
    kept = list(range(len(questions)))
    if tuned is not None:
        kept = [
            number
            for number, text in enumerate(questions.column("question"))
            if prompt_digest(text) not in tuned.learned
        ]
    n_learned = len(questions) - len(kept)
    if not kept:
        why = "the tuned lens learned from all of them" if n_learned else "it has none"
        raise StoreError(f"{run.path} has no question to read: {why}.")
    if limit is not None and limit < 1:
        raise SelectionError(f"{limit} questions were asked for; give 1 or more.")
    if limit is not None and limit < len(kept):
        kept = np.sort(np.random.default_rng(seed).choice(kept, limit, replace=False)).tolist()
    return questions.take(kept), n_learned


def _choice_scores(said: Said, choices: ChoiceRows, n_questions: int) -> list[Array | None]:
    """For each question [n_places, n_choices]: the log-probability of all tokens of each choice; None without choices."""
    scores: list[Array | None] = [None] * n_questions
    order = np.argsort(choices.question, kind="stable")
    numbers, starts = np.unique(choices.question[order], return_index=True)
    for number, lines in zip(numbers.tolist(), np.split(order, starts[1:]) if len(starts) else [], strict=True):
        of_choice = choices.choice[lines]
        one_hot = (of_choice[:, None] == np.arange(of_choice.max() + 1)).astype(float)
        scores[number] = said.choices[:, lines] @ one_hot
    return scores


def _chosen(scores: list[Array | None], n_places: int) -> Array:
    """[n_places, n_questions]: the choice that the lens prefers; NONE without choices."""
    none = np.full(n_places, NONE)
    return np.stack([none if each is None else each.argmax(axis=1) for each in scores], axis=1)


def _places(questions: Questions, places: list[str], said: Said, scores: list[Array | None]) -> list[LensPlace]:
    numbers = said.numbers
    target = np.array([each if type(each) is int else NONE for each in questions.column("target")])
    chosen = _chosen(scores, len(places))
    right = np.where((chosen == NONE) | (target == NONE), np.nan, (chosen == target).astype(float))
    rank = numbers["gold_rank"]
    of: dict[str, Array] = {
        "log_rank": np.log(rank),
        "gold_first": np.where(np.isnan(rank), np.nan, (rank == 1).astype(float)),
        "gold_probability": np.exp(numbers["gold_logprob"]),
        "gold_logprob": numbers["gold_logprob"],
        "taken_probability": np.exp(numbers["taken_logprob"]),
        "entropy": numbers["entropy"],
        "top_agreement": numbers["agrees"],
        "kl": numbers["kl"],
        "choice_accuracy": right,
    }
    estimates = {name: mean_intervals(by_prompt(values, questions.groups)) for name, values in of.items()}
    medians = [float(np.median(known)) if len(known := each[~np.isnan(each)]) else None for each in rank]
    return [
        LensPlace(key, medians[place], **{name: each[place] for name, each in estimates.items()})
        for place, key in enumerate(places)
    ]


def by_prompt(values: Array, groups: Array) -> Array:
    """[n_prompts, n_places]: the mean over the questions of each prompt; NaN where none has a value. values: [n_places, n_questions]."""
    _, group = np.unique(groups, return_inverse=True)
    known = ~np.isnan(values)
    sums, counts = np.zeros((2, group.max() + 1, len(values)))
    np.add.at(sums, group, np.where(known, values, 0.0).T)
    np.add.at(counts, group, known.T.astype(float))
    means: Array = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return means


def _columns(
    questions: Questions,
    loaded: LoadedModel,
    places: list[str],
    said: Said,
    first: FirstTokens,
    scores: list[Array | None],
) -> dict[str, list[Any]]:
    """The numbers of each question at each place: all places of a question, then the next question."""
    n, each_place = len(questions), len(places)
    top = said.numbers["top_token"].T.astype(np.int64).ravel().tolist()
    known = dict.fromkeys([*top, *first.gold.tolist(), *first.taken.tolist()])
    known.pop(NONE, None)
    strings: dict[int, str | None] = dict(zip(known, token_strings(loaded.tokenizer, list(known)), strict=True))

    def spread(values: Iterable[Any]) -> list[Any]:
        return [value for value in values for _ in range(each_place)]

    def numbers(name: str, *, is_log: bool = False) -> list[Any]:
        table = np.exp(said.numbers[name]) if is_log else said.numbers[name]
        return [None if np.isnan(value) else value for value in table.T.ravel().tolist()]

    logprobs = [None if row is None else row.tolist() for each in scores for row in _rows_of(each, each_place)]
    chances = [None if each is None else _softmax(each) for each in logprobs]
    return {
        **{name: spread(questions.column(name)) for name in ("task", "doc_id", "repeat", "correct")},
        "place": places * n,
        "gold_token": spread(strings.get(token) for token in first.gold.tolist()),
        "gold_rank": [None if value is None else int(value) for value in numbers("gold_rank")],
        "gold_probability": numbers("gold_logprob", is_log=True),
        "gold_logprob": numbers("gold_logprob"),
        "taken_token": spread(strings.get(token) for token in first.taken.tolist()),
        "taken_probability": numbers("taken_logprob", is_log=True),
        "entropy": numbers("entropy"),
        "kl": numbers("kl"),
        "top_token": [strings[token] for token in top],
        "top_probability": numbers("top_logprob", is_log=True),
        "choice_logprobs": logprobs,
        "choice_probabilities": chances,
        "choice": [None if each is None else int(np.argmax(each)) for each in logprobs],
    }


def _rows_of(scores: Array | None, n_places: int) -> Any:
    return scores if scores is not None else [None] * n_places


def _softmax(logprobs: list[float]) -> list[float]:
    values = np.array(logprobs)
    shares: list[float] = np.exp(values - np.logaddexp.reduce(values)).tolist()
    return shares
