"""What a model answers with an intervention, beside what it answers without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch

from AutomaticEval.analysis.numbers.estimate import mean_interval
from AutomaticEval.analysis.result import Estimate, Result
from AutomaticEval.analysis.words.metrics import TextMetric
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

    def applied(self, rows: Sequence[int], pads: Sequence[int]) -> AbstractContextManager[None]:
        """The model with the intervention. rows: which prompts the batch holds. pads: the padding on the left of each."""
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
    answer before, in nats); and summary (metric -> before, after and change, an Estimate each; the change is after - before, prompt by
    prompt). Sampled answers are drawn with the same seed before and after. Raises PromptError without prompts.
    """
    if not prompts:
        raise PromptError("there are no prompts to answer.")
    encoded = [intervention.loaded.tokenizer(prompt)["input_ids"] for prompt in prompts]
    before = answered(intervention.loaded, encoded, sampling, batch_size)
    after = answered(intervention.loaded, encoded, sampling, batch_size, intervention.applied)
    continuations = [(prompt, response.generated_ids) for prompt, response in zip(encoded, before, strict=True)]
    texts = {"before": [each.text for each in before], "after": [each.text for each in after]}
    columns = {metric.name: {when: metric.of(each) for when, each in texts.items()} for metric in metrics}
    columns["logprob"] = {
        "before": logprobs(intervention.loaded, continuations),
        "after": intervention.logprobs(continuations),
    }
    samples = [
        {"prompt": prompt, **{when: _numbers(texts, columns, when, n) for when in texts}}
        for n, prompt in enumerate(prompts)
    ]
    units = {metric.name: metric.unit for metric in metrics} | {"logprob": "log-likelihood of the answer before, nats"}
    summary = {name: _summary(column) for name, column in columns.items()}
    return Result(intervention.kind, {"units": units, "samples": samples, "summary": summary})


def _plainly(rows: Sequence[int], pads: Sequence[int]) -> AbstractContextManager[None]:
    """No intervention."""
    return nullcontext()


def answered(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    batch_size: int,
    applied: Callable[[Sequence[int], Sequence[int]], AbstractContextManager[None]] = _plainly,
) -> list[Response]:
    """Each prompt's response, in batches and with seeds that are the same under every intervention.

    prompts: token ids. applied: as `Intervention.applied`.
    """
    if sampling.generation == "auto":  # one way for all, also when only one of them could come from a graph
        sampling = replace(sampling, generation="eager")
    responses: dict[int, Response] = {}  # by row
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        for group in harmless_groups(loaded, batch, sampling):
            rows, ids = [start + row for row in group], [batch[row] for row in group]
            seeded = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + rows[0])
            with applied(rows, [max(map(len, ids)) - len(each) for each in ids]):
                responses |= zip(rows, respond(loaded, ids, seeded), strict=True)
    return [responses[row] for row in range(len(prompts))]


def greedy_answers(
    loaded: LoadedModel, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Each prompt's greedy answer. Prompts and answers are token ids."""
    answers: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        responses = respond(loaded, prompts[start : start + batch_size], Sampling(max_new_tokens=max_new_tokens))
        answers += [response.generated_ids for response in responses]
    return answers


def _numbers(texts: Mapping[str, Sequence[str]], columns: Mapping[str, Any], when: str, n: int) -> dict[str, Any]:
    return {"text": texts[when][n], **{name: column[when][n] for name, column in columns.items()}}


def _summary(column: Mapping[str, Sequence[float]]) -> dict[str, Estimate]:
    changes = [after - before for before, after in zip(column["before"], column["after"], strict=True)]
    return {**{when: mean_interval(values) for when, values in column.items()}, "change": mean_interval(changes)}


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
