"""What a model answers with an intervention, beside what it answers without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from AutomaticEval.analysis.numbers import signs
from AutomaticEval.analysis.numbers.estimate import effects, mean_interval, methods
from AutomaticEval.analysis.result import Estimate, Result
from AutomaticEval.analysis.words.metrics import TextMetric
from AutomaticEval.capture.draws import repeats_of
from AutomaticEval.capture.generation import Response, harmless_groups, respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.capture.tree.continuations import score_continuations
from AutomaticEval.errors import PromptError
from AutomaticEval.models.architecture.forward_call import input_device
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

Continuations = Sequence[tuple[list[int], list[int]]]
"""(prompt, what follows it) of each row, as token ids."""


class Intervention(Protocol):
    """Something that is done to a model while it runs."""

    kind: ClassVar[str]
    """The kind of its results, such as "ablation"."""

    @property
    def loaded(self) -> LoadedModel: ...

    @property
    def n_draws(self) -> int:
        """How many times each prompt is answered with the intervention: more than once when it draws at random."""
        ...

    def applied(self, rows: Sequence[int], pads: Sequence[int]) -> AbstractContextManager[None]:
        """The model with the intervention. rows: which prompts the batch holds; those of the second draw have the numbers after all of the
        first, and so on. pads: the padding on the left of each."""
        ...

    def logprobs(self, continuations: Continuations) -> list[float]:
        """The log-likelihood of every prompt's continuation with the intervention, in nats."""
        ...


def answers_with(
    intervention: Intervention,
    prompts: Sequence[str],
    metrics: Sequence[TextMetric],
    sampling: Sampling = Sampling(max_new_tokens=15),
    *,
    batch_size: int = 8,
) -> Result:
    """Answers to prompts without an intervention (before) and with it (after).

    Measured are units (metric -> unit); samples (prompt, and for before and after the text, each metric, and the log-likelihood of the
    answer before, in nats; after holds the first draw of an intervention that draws at random, and further_draws the others); and summary
    (metric -> before and after, an Estimate each, and change, an Effect: after - before, prompt by prompt, over the mean of its draws).
    Sampled answers are drawn with the same seed before and after, in any batch. Raises PromptError without prompts.
    """
    if not prompts:
        raise PromptError("there are no prompts to answer.")
    encoded = [intervention.loaded.tokenizer(prompt)["input_ids"] for prompt in prompts]
    before = answered(intervention.loaded, encoded, sampling, batch_size)
    after = answered(intervention.loaded, encoded, sampling, batch_size, intervention.applied, intervention.n_draws)
    continuations = [(prompt, response.generated_ids) for prompt, response in zip(encoded, before, strict=True)]
    texts = {"before": [each.text for each in before], "after": [each.text for each in after]}
    columns = {metric.name: {when: metric.of(each) for when, each in texts.items()} for metric in metrics}
    columns["logprob"] = {
        "before": logprobs(intervention.loaded, continuations),
        "after": intervention.logprobs(continuations * intervention.n_draws),
    }
    samples = [_sample(prompts, texts, columns, n) for n in range(len(prompts))]
    units = {metric.name: metric.unit for metric in metrics} | {"logprob": "log-likelihood of the answer before, nats"}
    means = {
        name: {when: np.reshape(values, (-1, len(prompts))).mean(0).tolist() for when, values in column.items()}
        for name, column in columns.items()
    }
    summary = _summary(means, 42 if sampling.seed is None else sampling.seed)
    measured = {"units": units, "samples": samples, "summary": summary}
    return Result(intervention.kind, measured, methods=methods(len(columns), p=signs.METHOD))


def _plainly(rows: Sequence[int], pads: Sequence[int]) -> AbstractContextManager[None]:
    """No intervention."""
    return nullcontext()


def answered(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    batch_size: int,
    applied: Callable[[Sequence[int], Sequence[int]], AbstractContextManager[None]] = _plainly,
    n_draws: int = 1,
) -> list[Response]:
    """Each prompt's response, sampled by the same draws under every intervention: all of the first draw of values, then all of the second, and so on.

    prompts: token ids. applied, n_draws: as `Intervention.applied` and `Intervention.n_draws`.
    """
    if sampling.generation == "auto":  # one way for all, also when only one of them could come from a graph
        sampling = replace(sampling, generation="eager")
    responses: dict[int, Response] = {}
    repeats = repeats_of(prompts)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        for group in harmless_groups(loaded, batch, sampling):
            rows, ids = [start + row for row in group], [batch[row] for row in group]
            answer = partial(respond, loaded, ids, sampling, repeats=[repeats[row] for row in rows])
            pads = [max(map(len, ids)) - len(each) for each in ids]
            for draw in range(n_draws):
                of_draw = [draw * len(prompts) + row for row in rows]
                with applied(of_draw, pads):
                    responses |= zip(of_draw, answer(), strict=True)
    return [responses[row] for row in sorted(responses)]


def greedy_answers(
    loaded: LoadedModel, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Each prompt's greedy answer. Prompts and answers are token ids."""
    answers: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        responses = respond(loaded, prompts[start : start + batch_size], Sampling(max_new_tokens=max_new_tokens))
        answers += [response.generated_ids for response in responses]
    return answers


def _sample(prompts: Sequence[str], texts: Mapping[str, Sequence[str]], columns: Mapping[str, Any], n: int) -> Any:
    """What is told of one prompt: n is its number."""
    further = [_numbers(texts, columns, "after", row) for row in range(n, len(texts["after"]), len(prompts))][1:]
    sample = {"prompt": prompts[n], **{when: _numbers(texts, columns, when, n) for when in texts}}
    return {**sample, "further_draws": further} if further else sample


def _numbers(texts: Mapping[str, Sequence[str]], columns: Mapping[str, Any], when: str, n: int) -> dict[str, Any]:
    return {"text": texts[when][n], **{name: column[when][n] for name, column in columns.items()}}


def _summary(columns: Mapping[str, Mapping[str, Sequence[float]]], seed: int) -> dict[str, dict[str, Estimate]]:
    """Metric -> before, after and change."""
    table = [np.subtract(column["after"], column["before"]) for column in columns.values()]
    changes = effects(np.stack(table, 1), seed=seed)
    return {
        name: {**{when: mean_interval(values) for when, values in column.items()}, "change": change}
        for (name, column), change in zip(columns.items(), changes, strict=True)
    }


def logprobs(loaded: LoadedModel, continuations: Continuations) -> list[float]:
    """The log-likelihood of each continuation, in nats; 0 for one without a token."""
    with_tokens = [each for each in continuations if each[1]]
    scores = iter(score_continuations(with_tokens, loaded) if with_tokens else [])
    return [next(scores).logprob if tokens else 0.0 for _, tokens in continuations]


def logprobs_one_by_one(intervention: Intervention, continuations: Continuations) -> list[float]:
    """The log-likelihood of each continuation with the intervention, in nats; 0 for one without a token.

    Each has a forward of its own, for interventions that depend on the row and its positions.
    """
    model, likelihoods = intervention.loaded.model, []
    for row, (prompt, tokens) in enumerate(continuations):
        ids = torch.tensor([[*prompt, *tokens]], device=input_device(model))
        with torch.no_grad(), intervention.applied([row], [0]):
            likely = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        likelihoods.append(float(likely.gather(1, ids[0, len(prompt) :, None]).sum()) if tokens else 0.0)
    return likelihoods
