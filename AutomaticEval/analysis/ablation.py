"""What a model does without some of its heads: their `z` is replaced, in every forward and at every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from AutomaticEval.analysis.bootstrap import mean_interval
from AutomaticEval.analysis.reading import Reader, read
from AutomaticEval.analysis.text_metrics import TextMetric
from AutomaticEval.capture.continuations import score_continuations
from AutomaticEval.capture.generation import Response, Sampling, respond
from AutomaticEval.errors import EditError, PromptError
from AutomaticEval.models.editing import Edit, editing
from AutomaticEval.models.hooks import Kept
from AutomaticEval.models.loading import LoadedModel
from AutomaticEval.models.taps import input_device
from AutomaticEval.sites import Site, parse_heads

MODES = ("zero", "mean", "resample")
Heads = Mapping[int, Sequence[int]]
"""Layer -> its heads."""


def parse_head_spec(spec: str, n_layers: int, n_heads: int) -> dict[int, list[int]]:
    """Layer -> heads from "0:0,3:5" (layer 0 head 0, layer 3 head 5), "3:0-4" or "3:*".

    Raises EditError for what is no head.
    """
    heads: dict[int, list[int]] = {}
    for item in spec.split(","):
        layer, colon, own = item.strip().partition(":")
        if not colon or not layer.strip().isdecimal() or int(layer) >= n_layers:
            raise EditError(
                f"{item.strip()!r} is no head: write layer:head, such as 0:0,3:5; layers are 0 to {n_layers - 1}."
            )
        found = parse_heads(None if own.strip() == "*" else own, n_heads)
        heads[int(layer)] = sorted({*heads.get(int(layer), []), *found})
    return heads


def reference_z(
    loaded: LoadedModel, layers: Sequence[int], texts: Sequence[str], batch_size: int = 8
) -> dict[int, Tensor]:
    """Layer -> z at every token of some texts: [tokens, n_heads, d_head]."""
    layout = loaded.layout
    taps = layout.pick(Site("z", layer) for layer in layers)
    found: dict[str, list[Tensor]] = {key: [] for key in taps}
    for batch in Reader(loaded.model, loaded.tokenizer).batches(texts, batch_size):
        for key, rows in read(loaded.model, layout, taps, batch).items():
            found[key].append(rows)
    shape = (-1, layout.n_heads, layout.d_head)
    return {layer: torch.cat(found[Site("z", layer).key]).view(shape) for layer in layers}


@dataclass(frozen=True)
class Ablation:
    """Which heads are taken out, and what stands in for them.

    mode: "zero"; "mean", each head's mean z over the reference's tokens; "resample", at each position another z of the reference,
    drawn by seed: the same for that position in every text, whatever the batch. reference: `reference_z` of the layers.
    """

    loaded: LoadedModel
    heads: Heads
    mode: str = "zero"
    reference: Mapping[int, Tensor] | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise EditError(f"the mode {self.mode!r} is not one; write {', '.join(MODES)}.")
        if self.mode != "zero" and self.reference is None:
            raise EditError(f"{self.mode} needs a reference: texts whose z stands in for the heads'.")

    @contextmanager
    def applied(self, pads: Sequence[int] | None = None) -> Iterator[None]:
        """The model without the heads. pads: of each row of the batch, the padding on its left; only resample needs them."""
        with editing(self.loaded.model, [self._edit(layer, own, pads) for layer, own in self.heads.items()]):
            yield

    def _edit(self, layer: int, heads: Sequence[int], pads: Sequence[int] | None) -> Edit:
        site = Site("z", layer)
        if self.mode == "zero" or self.reference is None:
            return Edit.scale(site, 0.0, heads=heads)
        reference = self.reference[layer][:, list(heads)]  # [tokens, heads, d_head]
        if self.mode == "mean":
            return Edit.replace(site, reference.double().mean(0).float(), heads=heads)
        if pads is None:
            raise EditError(
                "resample draws by position, which only forwards over left-padded prompts tell; use zero or mean here."
            )
        return _resampled(site, reference, heads, pads, self.seed + layer)


def _resampled(site: Site, reference: Tensor, heads: Sequence[int], pads: Sequence[int], seed: int) -> Edit:
    drawn = torch.empty(0, dtype=torch.long)  # of each position: which of the reference's tokens
    current: list[Tensor] = []

    def where(first: int, n_columns: int) -> Kept:
        nonlocal drawn
        if len(drawn) < first + n_columns:
            source = torch.Generator().manual_seed(seed)
            drawn = torch.randint(len(reference), (2 * (first + n_columns),), generator=source)
        rows = torch.arange(len(pads)).repeat_interleave(n_columns)
        columns = torch.arange(first, first + n_columns).repeat(len(pads))
        positions = (columns - torch.tensor(list(pads))[rows]).clamp(min=0)
        current[:] = [drawn[positions]]
        return Kept(rows, columns)

    return Edit(site, lambda found: reference[current[0]].to(found.device, found.dtype), heads, where)


def ablate(
    ablation: Ablation,
    prompts: Sequence[str],
    metrics: Sequence[TextMetric],
    sampling: Sampling = Sampling(max_new_tokens=15),
    *,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Answers to prompts with and without the heads.

    Returns samples (prompt, before and after: text, and logprob of the answer before, in nats) and summary: for each metric and
    for logprob, before, after and change (after - before, prompt by prompt), each with mean, 95 % bootstrap interval and n.
    Sampled answers are drawn with the same seed before and after. Raises PromptError without prompts.
    """
    if not prompts:
        raise PromptError("there are no prompts to answer.")
    loaded = ablation.loaded
    encoded = [loaded.tokenizer(prompt)["input_ids"] for prompt in prompts]
    before: list[Response] = []
    after: list[Response] = []
    for start in range(0, len(encoded), batch_size):
        some = encoded[start : start + batch_size]
        drawn = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + start)
        pads = [max(map(len, some)) - len(ids) for ids in some]
        before += respond(loaded, some, drawn)
        with ablation.applied(pads):
            after += respond(loaded, some, drawn)
    pairs = [(prompt, response.generated_ids) for prompt, response in zip(encoded, before, strict=True)]
    likely = {"before": _logprobs(loaded, pairs), "after": _logprobs_without(ablation, pairs)}
    texts = {"before": [each.text for each in before], "after": [each.text for each in after]}
    columns = {metric.name: {when: metric.of(each) for when, each in texts.items()} for metric in metrics}
    columns["logprob"] = likely
    samples = [
        {
            "prompt": prompt,
            **{
                when: {"text": each[n], **{name: column[when][n] for name, column in columns.items()}}
                for when, each in texts.items()
            },
        }
        for n, prompt in enumerate(prompts)
    ]
    return {"samples": samples, "summary": {name: _summed_up(column) for name, column in columns.items()}}


def _summed_up(column: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    changes = [after - before for before, after in zip(column["before"], column["after"], strict=True)]
    return {**{when: mean_interval(values) for when, values in column.items()}, "change": mean_interval(changes)}


Pairs = Sequence[tuple[list[int], list[int]]]
"""(prompt, answer), as token ids."""


def _logprobs(loaded: LoadedModel, pairs: Pairs) -> list[float]:
    """Of each answer, in nats; 0 of one without a token."""
    answered = [pair for pair in pairs if pair[1]]
    found = iter(score_continuations(answered, loaded) if answered else [])
    return [next(found).logprob if answer else 0.0 for _, answer in pairs]


def _logprobs_without(ablation: Ablation, pairs: Pairs) -> list[float]:
    if ablation.mode != "resample":
        with ablation.applied():
            return _logprobs(ablation.loaded, pairs)
    model, found = ablation.loaded.model, []
    for prompt, answer in pairs:  # what is drawn depends on the position, which a prefix tree does not keep
        ids = torch.tensor([[*prompt, *answer]], device=input_device(model))
        with torch.no_grad(), ablation.applied([0]):
            likely = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        found.append(float(likely.gather(1, ids[0, len(prompt) :, None]).sum()) if answer else 0.0)
    return found
