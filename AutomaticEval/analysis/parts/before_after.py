"""What a model answers with an intervention, beside what it answers without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch

from AutomaticEval.analysis.numbers.estimate import mean_interval
from AutomaticEval.analysis.words.metrics import TextMetric
from AutomaticEval.capture.generation import Response, harmless_groups, respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.capture.tree.continuations import score_continuations
from AutomaticEval.errors import PromptError
from AutomaticEval.models.architecture.forward_call import input_device
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

Pairs = Sequence[tuple[list[int], list[int]]]
"""(prompt, answer) of each row, as token ids."""


class Intervention(Protocol):
    """Something that is done to a model while it runs."""

    @property
    def loaded(self) -> LoadedModel: ...

    def applied(self, rows: Sequence[int], pads: Sequence[int]) -> AbstractContextManager[None]:
        """rows: which of the prompts a batch holds. pads: the padding on the left of each."""
        ...

    def logprobs(self, pairs: Pairs) -> list[float]:
        """Of all prompts' answers, in nats, with the intervention."""
        ...


def answers_with(
    intervention: Intervention,
    prompts: Sequence[str],
    metrics: Sequence[TextMetric],
    sampling: Sampling = Sampling(max_new_tokens=15),
    *,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Answers to prompts without an intervention (before) and with it (after).

    Returns samples (prompt, before and after: text, and logprob of the answer before, in nats) and summary: for each metric and
    for logprob, before, after and change (after - before, prompt by prompt), each with mean, 95 % bootstrap interval and n.
    Sampled answers are drawn with the same seed before and after. Raises PromptError without prompts.
    """
    if not prompts:
        raise PromptError("there are no prompts to answer.")
    loaded = intervention.loaded
    encoded = [loaded.tokenizer(prompt)["input_ids"] for prompt in prompts]
    found: dict[int, tuple[Response, Response]] = {}
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        for group in harmless_groups(loaded, batch, sampling):
            rows, some = [start + row for row in group], [batch[row] for row in group]
            drawn = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + rows[0])
            pads = [max(map(len, some)) - len(ids) for ids in some]
            without = respond(loaded, some, drawn)
            with intervention.applied(rows, pads):
                found |= zip(rows, zip(without, respond(loaded, some, drawn), strict=True), strict=True)
    before, after = zip(*(found[row] for row in range(len(encoded))), strict=True)
    pairs = [(prompt, response.generated_ids) for prompt, response in zip(encoded, before, strict=True)]
    texts = {"before": [each.text for each in before], "after": [each.text for each in after]}
    columns = {metric.name: {when: metric.of(each) for when, each in texts.items()} for metric in metrics}
    columns["logprob"] = {"before": logprobs(loaded, pairs), "after": intervention.logprobs(pairs)}
    samples = [
        {"prompt": prompt, **{when: _numbers(texts, columns, when, n) for when in texts}}
        for n, prompt in enumerate(prompts)
    ]
    return {"samples": samples, "summary": {name: _summed_up(column) for name, column in columns.items()}}


def greedy_answers(
    loaded: LoadedModel, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Each prompt's answer, as token ids."""
    found: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        responses = respond(loaded, prompts[start : start + batch_size], Sampling(max_new_tokens=max_new_tokens))
        found += [response.generated_ids for response in responses]
    return found


def _numbers(texts: Mapping[str, Sequence[str]], columns: Mapping[str, Any], when: str, n: int) -> dict[str, Any]:
    return {"text": texts[when][n], **{name: column[when][n] for name, column in columns.items()}}


def _summed_up(column: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    changes = [after - before for before, after in zip(column["before"], column["after"], strict=True)]
    return {**{when: mean_interval(values) for when, values in column.items()}, "change": mean_interval(changes)}


def logprobs(loaded: LoadedModel, pairs: Pairs) -> list[float]:
    """Of each answer, in nats; 0 of one without a token."""
    answered = [pair for pair in pairs if pair[1]]
    found = iter(score_continuations(answered, loaded) if answered else [])
    return [next(found).logprob if answer else 0.0 for _, answer in pairs]


def logprobs_one_by_one(intervention: Intervention, pairs: Pairs) -> list[float]:
    """The same with an intervention that depends on the row and its positions: a forward each."""
    model, found = intervention.loaded.model, []
    for row, (prompt, answer) in enumerate(pairs):
        ids = torch.tensor([[*prompt, *answer]], device=input_device(model))
        with torch.no_grad(), intervention.applied([row], [0]):
            likely = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        found.append(float(likely.gather(1, ids[0, len(prompt) :, None]).sum()) if answer else 0.0)
    return found
