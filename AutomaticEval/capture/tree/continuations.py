"""`score_continuations`: how likely a model finds continuations of contexts, and what happened inside while they were scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch

from AutomaticEval.capture.keeping import BatchRow, keep_of, parts_of, recording_of, sample_columns, sequence_rows
from AutomaticEval.capture.reduced_rows import taps_of
from AutomaticEval.capture.reduced_samples import SampleReducer
from AutomaticEval.capture.texts.sources import rows_of
from AutomaticEval.capture.tree.score import Cut, Scored, ScoringOptions, TreeScoring
from AutomaticEval.errors import PromptError, SelectionError, TreeUnsuitable, unknown_option, warn
from AutomaticEval.models.architecture.forward_call import alone_with, input_device
from AutomaticEval.models.checkpoint.load_options import LoadKeywords, LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.edited_positions import BatchSequence, told
from AutomaticEval.models.loading import adapter_chosen, load_model
from AutomaticEval.options import take_fields
from AutomaticEval.samples import Part, Sample
from AutomaticEval.selection import Positions, Selection
from AutomaticEval.sites import LayersLike
from AutomaticEval.thinking.where import Thinking

Text = str | Sequence[int]
"""A text, or its token ids."""
FALLBACK_LENGTH = 2**20
"""The context of a model whose config names none."""


class ScoreKeywords(LoadKeywords, total=False):
    """The keyword options of `score_continuations`, beside which layers are captured."""

    tokenizer: Any
    """With a loaded model: its tokenizer. With a name: another one, or the name of one."""
    sites: str | Iterable[str] | None
    """Kinds of sites: "resid_post,mlp_out". Default embed and resid_post."""
    positions: str | slice | Positions
    """scored (default), all, prompt, response, last, or a slice such as prompt[-1:]."""
    store_dtype: str | None
    """float16 or bfloat16: narrower numbers than the model's own."""
    reduce: str | None
    """norm: the L2 norm of each row. mean, max: one line over the kept positions, under "reduced"."""
    project: Any
    """A matrix [width, k] by which each row is multiplied: a file, an array, or one for each site."""


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
    requests: Iterable[tuple[Text, Text] | Mapping[str, Any]],
    model: Any,
    *,
    capture_activations: bool = False,
    layers_to_capture: LayersLike = None,
    **options: Unpack[ScoreKeywords],
) -> list[ScoredContinuation]:
    """The log-likelihood of each continuation after its context, over the prefix tree of all requests.

    requests: (context, continuation) pairs of texts, which are tokenised as lm-eval does it, or of token ids; also objects, or a DataFrame,
    with the fields context and continuation. Tokens with which several requests begin are computed once. A context that is too long loses its beginning. model: a name, a folder, "demo", or a loaded model
    with tokenizer=. options: see `ScoreKeywords`: sites, positions, dtype, device, peft, …
    A model that cannot be scored over a tree (state-space, ALiBi, sliding windows shorter than a request) computes each request by itself,
    and a warning says why.
    Raises SelectionError, PromptError, ModelError, CaptureError; TypeError for an unknown option.
    """
    for name in options:
        if name not in ScoreKeywords.__annotations__:
            raise unknown_option(name, [*ScoreKeywords.__annotations__, "layers_to_capture"])
    selection = None
    if capture_activations:
        positions, store_dtype = options.get("positions", "scored"), options.get("store_dtype")
        selection = Selection.parse(
            options.get("sites"),
            layers_to_capture,
            positions,
            store_dtype,
            options.get("reduce"),
            options.get("project"),
        )
        if selection.positions.needs_thinking:
            raise SelectionError(
                f"positions={selection.positions} are those of generated answers, and continuations are only scored; use scored or response."
            )
    load = LoadOptions(**take_fields(dict(options), LoadOptions))
    pairs = [_pair(number, each) for number, each in enumerate(rows_of(requests))]
    with adapter_chosen(model, load) as load:
        loaded = load_model(model, tokenizer=options.get("tokenizer"), options=load)
        return _scores_of(loaded, pairs, selection)


def _scores_of(
    loaded: LoadedModel, pairs: Sequence[tuple[Text, Text]], selection: Selection | None
) -> list[ScoredContinuation]:
    """The log-likelihoods of pairs of context and continuation, in their order."""
    if selection is not None:
        taps_of(loaded.layout, selection)  # refuses a model or a site before anything is scored
    length = loaded.context or FALLBACK_LENGTH
    cuts = [Cut.of(*_tokens(loaded.tokenizer, *pair), length) for pair in pairs]
    batches, batch_shape = _scored(loaded, cuts, ScoringOptions(selection))
    settings = loaded.numbers().changed(**({} if selection is None else selection.as_dict())).as_dict()
    reduced = SampleReducer(selection)
    scores: dict[int, ScoredContinuation] = {}
    for scored in (each for batch in batches for each in batch):
        cut = cuts[scored.request]
        data = None
        if selection is not None:
            context, continuation = (_text(loaded.tokenizer, each) for each in pairs[scored.request])
            columns = sample_columns(context, continuation, len(cut.context), batch_shape)
            (sample,) = reduced([_sample(scored, cut, columns)])
            data = sample.activation_data(loaded.name, settings)
        scores[scored.request] = ScoredContinuation(
            scored.logprob, scored.is_greedy, [*cut.context], [*cut.continuation], scored.logprobs.tolist(), data
        )
    return [scores[number] for number in range(len(cuts))]


def _pair(number: int, request: Any) -> tuple[Text, Text]:
    """A request as a pair. number: of the request, from 0. Raises PromptError for what is none."""
    if isinstance(request, Mapping):
        if not {"context", "continuation"} <= request.keys():
            raise PromptError(
                f"request {number} has not the fields context and continuation; it has {', '.join(map(str, request))}."
            )
        return request["context"], request["continuation"]
    if isinstance(request, str) or not hasattr(request, "__len__") or len(request) != 2:
        raise PromptError(f"request {number} is no pair (context, continuation): {request!r:.80}.")
    context, continuation = request
    return context, continuation


def _scored(
    loaded: LoadedModel, cuts: Sequence[Cut], options: ScoringOptions
) -> tuple[Iterator[list[Scored]], tuple[int, int]]:
    """The scores of the requests, and the rows and columns of the forwards that give them."""
    try:
        scoring = TreeScoring(loaded, cuts, options)
        scoring.check()
    except TreeUnsuitable as why:
        warn(f"Computing request by request: {why}")
        return _one_by_one(loaded, cuts, options), (1, 0)
    return scoring.results(), (1, scoring.tokens)


def _sample(scored: Scored, cut: Cut, columns: Mapping[str, Any]) -> Sample:
    """The sample of a continuation. columns: those that every sample has."""
    score = {"n_truncated": cut.n_truncated, "logprob": scored.logprob, "is_greedy": scored.is_greedy}
    return Sample({**columns, **score}, cut.context, cut.continuation, scored.parts)


def _tokens(tokenizer: Any, context: Text, continuation: Text) -> tuple[list[int], list[int]]:
    """The tokens of a context and of its continuation, as lm-eval encodes them.

    Spaces at the end of the context are moved to the continuation. The context has the tokens that it has by itself; the continuation has
    the tokens of both as one text, without as many tokens at the beginning as the context has.
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
    """The tokens of a text with the special tokens that the tokenizer adds. A text that begins with the first one gets none, as in lm-eval."""
    begins_with_it = first is not None and text.startswith(tokenizer.decode(first))
    return list(tokenizer.encode(text, **({"add_special_tokens": False} if begins_with_it else {})))


def _text(tokenizer: Any, text: Text) -> str:
    return text if isinstance(text, str) else str(tokenizer.decode(list(text)))


def _one_by_one(loaded: LoadedModel, cuts: Sequence[Cut], options: ScoringOptions) -> Iterator[list[Scored]]:
    """The scores of the requests, each from a forward of its own."""
    model, selection = loaded.model, options.selection
    for number, cut in enumerate(cuts):
        context, continuation, _ = cut
        keep = None if selection is None else keep_of(selection.positions, [context], [0])
        sequence = BatchSequence(0, len(context), len(continuation))
        with (
            torch.no_grad(),
            alone_with(model),
            told(model, [sequence]),
            recording_of(loaded, selection, keep, 1) as recording,
        ):
            out = model(torch.tensor([cut.fed], device=input_device(model)))
        logits = out.logits[0, -len(continuation) :]  # counted from the end: an adapter may put tokens before the first
        likely = torch.log_softmax(logits, -1, dtype=options.dtype).cpu()
        logprobs = likely.gather(1, torch.tensor(list(continuation))[:, None])[:, 0]
        parts: list[Part] = []
        if selection is not None:
            kept = selection.positions.resolve(len(context), len(continuation), Thinking.without(len(context)))
            pieces = sequence_rows(recording, BatchRow(0), [*context, *continuation], kept, loaded.tokenizer)
            parts = parts_of(pieces, kept)
        is_greedy = likely.argmax(-1).tolist() == [*continuation]
        yield [Scored(number, float(logprobs.sum()), is_greedy, logprobs, parts)]
