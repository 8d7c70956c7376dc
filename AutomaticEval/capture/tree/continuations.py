"""`score_continuations`: how likely a model finds continuations of contexts, and what happened inside while they were scored."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Unpack

import torch

from AutomaticEval.capture.generation import keep_of, recording_of, sample_columns, sequence_rows
from AutomaticEval.capture.tree.score import Cut, Scored, ScoringOptions, TreeScoring
from AutomaticEval.errors import PromptError, TreeUnsuitable, unknown_option
from AutomaticEval.models.architecture.forward_call import alone_with, input_device
from AutomaticEval.models.load_options import LoadKeywords, LoadOptions
from AutomaticEval.models.loading import LoadedModel, load_model
from AutomaticEval.samples import Part, Sample
from AutomaticEval.selection import Positions, Selection
from AutomaticEval.sites import LayersLike

Text = str | Sequence[int]
"""A text, or its token ids."""
FALLBACK_LENGTH = 2**20
"""The context of a model whose config names none."""


@dataclass(frozen=True)
class ScoredContinuation:
    """A continuation's score."""

    logprob: float
    """Sum over the continuation's tokens, in nats."""

    is_greedy: bool
    """Whether each of its tokens is the likeliest."""

    context_ids: list[int]
    continuation_ids: list[int]
    logprobs: list[float]
    """The log-probability of each token of the continuation, in nats."""

    activation_data: dict[str, Any] | None = None
    """What `generate_inference_with_activations` gives, with the continuation as the response; None without capture."""


def score_continuations(
    requests: Iterable[tuple[Text, Text]],
    model: Any,
    *,
    tokenizer: Any = None,
    capture_activations: bool = False,
    layers_to_capture: LayersLike = None,
    sites: str | Iterable[str] | None = None,
    positions: str | slice | Positions = "scored",
    store_dtype: str | None = None,
    **options: Unpack[LoadKeywords],
) -> list[ScoredContinuation]:
    """The log-likelihood of each continuation after its context, over the prefix tree of all of them.

    requests: (context, continuation) pairs of texts, which are tokenised as lm-eval does, or of token ids. What several begin
    with is computed once. A context that is too long loses its beginning. model: a name, a folder, "demo", or a loaded model
    with tokenizer=. options: those of `LoadOptions`: dtype, device, peft, …
    A model that cannot be served so (state-space, ALiBi, sliding windows shorter than a request) is warned of, and computes
    each request by itself.
    Raises SelectionError, PromptError, ModelError, CaptureError; TypeError for an option there is not.
    """
    known = [field.name for field in fields(LoadOptions)]
    for name in options:
        if name not in known:
            raise unknown_option(name, known)
    selection = Selection.parse(sites, layers_to_capture, positions, store_dtype) if capture_activations else None
    loaded = load_model(model, tokenizer=tokenizer, options=LoadOptions(**options))
    asked = list(requests)
    length = loaded.context or FALLBACK_LENGTH
    cuts = [Cut.of(*_tokens(loaded.tokenizer, *pair), length) for pair in asked]
    how = ScoringOptions(selection)
    try:
        scoring = TreeScoring(loaded, cuts, how)
        scoring.check()
        batches, shape = scoring.results(), (1, scoring.tokens)
    except TreeUnsuitable as why:
        warnings.warn(f"Computing request by request: {why}", stacklevel=2)
        batches, shape = _one_by_one(loaded, cuts, how), (1, 0)
    settings = loaded.numbers().changed(**({} if selection is None else selection.as_dict())).as_dict()
    found: dict[int, ScoredContinuation] = {}
    for scored in (each for batch in batches for each in batch):
        cut = cuts[scored.request]
        data = None
        if selection is not None:
            prompt, response = (_text(loaded.tokenizer, each) for each in asked[scored.request])
            columns = sample_columns(prompt, response, len(cut.context), shape)
            sample = Sample(
                {**columns, "n_truncated": cut.n_truncated, "logprob": scored.logprob, "is_greedy": scored.is_greedy},
                cut.context,
                cut.continuation,
                scored.parts,
            )
            data = sample.activation_data(loaded.name, settings)
        found[scored.request] = ScoredContinuation(
            scored.logprob, scored.is_greedy, [*cut.context], [*cut.continuation], scored.logprobs.tolist(), data
        )
    return [found[index] for index in range(len(cuts))]


def _tokens(tokenizer: Any, context: Text, continuation: Text) -> tuple[list[int], list[int]]:
    """A pair's tokens, as lm-eval encodes them: spaces before the continuation belong to it; the context has the tokens that it has by
    itself, and the continuation those of both as one text, less as many as the context has.
    """
    if isinstance(context, str) != isinstance(continuation, str):
        raise PromptError("a request is a pair of texts, or a pair of lists of token ids; found one of each.")
    if not isinstance(context, str) or not isinstance(continuation, str):
        return list(map(int, context)), list(map(int, continuation))
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if context:
        n_text = len(context.rstrip())
        before = _encoded(tokenizer, context[:n_text], first)
        own = _encoded(tokenizer, context + continuation, first)[len(before) :]
    elif first is None:
        raise PromptError("a context is empty, and the tokenizer has neither a first nor a last token to stand for it.")
    else:
        own = list(tokenizer.encode(continuation, add_special_tokens=False))
        before, own = (own[:1], own[1:]) if own[:1] == [first] else ([int(first)], own)
    if not own:
        raise PromptError(
            f"the continuation {continuation[:60]!r} of {context[-60:]!r} has no token of its own, so that there is nothing to score."
        )
    return before, own


def _encoded(tokenizer: Any, text: str, first: int | None) -> list[int]:
    """With the special tokens that the tokenizer adds, unless the text begins with the first one, as lm-eval does."""
    begins = first is not None and text.startswith(tokenizer.decode(first))
    return list(tokenizer.encode(text, **({"add_special_tokens": False} if begins else {})))


def _text(tokenizer: Any, text: Text) -> str:
    return text if isinstance(text, str) else str(tokenizer.decode(list(text)))


def _one_by_one(loaded: LoadedModel, cuts: Sequence[Cut], options: ScoringOptions) -> Iterator[list[Scored]]:
    """Each request in a forward of its own."""
    model, selection = loaded.model, options.selection
    for index, cut in enumerate(cuts):
        context, continuation, _ = cut
        keep = None if selection is None else keep_of(selection.positions, [context], [0])
        with torch.no_grad(), alone_with(model), recording_of(loaded, selection, keep, 1) as recording:
            out = model(torch.tensor([cut.fed], device=input_device(model)))
        logits = out.logits[0, -len(continuation) :]  # counted from the end: an adapter may put tokens before the first
        likely = torch.log_softmax(logits, -1, dtype=options.dtype).cpu()
        logprobs = likely.gather(1, torch.tensor(list(continuation))[:, None])[:, 0]
        parts: list[Part] = []
        if selection is not None:
            kept = selection.positions.resolve(len(context), len(continuation))
            rows = sequence_rows(recording, 0, 0, [*context, *continuation], kept, loaded.tokenizer)
            parts = [Part(rows, range(len(rows.positions)))]
        is_greedy = likely.argmax(-1).tolist() == [*continuation]
        yield [Scored(index, float(logprobs.sum()), is_greedy, logprobs, parts)]
