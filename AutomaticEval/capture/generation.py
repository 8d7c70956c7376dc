"""Batches of token sequences -> responses, with the activations of the very forwards that produced them.

Knows nothing of prompts as people write them (`prompt.py`), nor of benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from AutomaticEval.capture.answers.think_marks import ThinkMarks, think_marks
from AutomaticEval.capture.answers.token_logprobs import answer_column, token_logprobs
from AutomaticEval.capture.batch_independence import Span, apart, company_of, is_fed_again, rope_limit
from AutomaticEval.capture.draws import drawing, random_numbers, repeats_of
from AutomaticEval.capture.graph.decoding import again_without_graphs, decoding
from AutomaticEval.capture.graph.way import Way, way_of
from AutomaticEval.capture.keeping import BatchRow, keep_of, parts_of, recording_of, sample_columns, sequence_rows
from AutomaticEval.capture.reduced_samples import SampleReducer
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.capture.vocabulary import text_of
from AutomaticEval.errors import SelectionError
from AutomaticEval.models.architecture.forward_call import alone_with, forward_takes, input_device, without_cache
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.described.plain_module import refuse_plain
from AutomaticEval.models.edited_positions import given_mask
from AutomaticEval.models.refused.cache_settings import refuse_cache_settings
from AutomaticEval.samples import Sample
from AutomaticEval.selection import Selection
from AutomaticEval.thinking.text import columns_of


class Response(NamedTuple):
    """The response to one prompt."""

    text: str
    sample: Sample | None
    """The sample with its rows, when activations were captured."""

    generated_ids: list[int]
    """The tokens of the response, up to its own end."""

    answer: str | None
    """The text without the thinking; None when the thinking was not finished."""


class Asked(NamedTuple):
    """Prompts that are answered together."""

    prompts: Sequence[Sequence[int]]
    texts: Sequence[str]
    repeats: Sequence[int]
    """How many equal prompts were asked before each."""

    def draws(self, sampling: Sampling) -> list[np.random.Generator] | None:
        """What each response is sampled by; None for greedy decoding, and for sampling from torch's own random state."""
        if sampling.seed is None or not sampling.kwargs()["do_sample"]:
            return None
        pairs = zip(self.prompts, self.repeats, strict=True)
        return [random_numbers(sampling.seed, "response", prompt, repeat) for prompt, repeat in pairs]


def refuse_uncomputed_logits(model: Any, selection: Selection, n_prompt: int, n_new: int) -> None:
    """Raises SelectionError when logits are selected that are not computed: a model that generates computes those of a prompt at its last
    token only.

    n_prompt: tokens of the prompt. n_new: the most tokens that are generated; the response may be any shorter.
    """
    if "logits" not in selection.kinds or "logits_to_keep" not in forward_takes(model):
        return
    kept = [selection.positions.most(n_prompt, n_response) for n_response in (1, n_new)]
    if any(positions and positions[0] < n_prompt - 1 for positions in kept):
        raise SelectionError(
            f"positions={selection.positions} would keep logits of the prompt, which a model that generates computes at its last token "
            "only; use positions scored (the logits that gave the answer), or leave the site logits out."
        )


def refuse_logits_fed_again(model: Any, selection: Selection | None, spans: Sequence[Span]) -> None:
    """Raises SelectionError when logits are selected, and the model feeds tokens again without computing their logits."""
    if selection is None or "logits" not in selection.kinds:
        return
    for span in spans:
        if is_fed_again(model, span):
            raise SelectionError(
                f"logits cannot be kept: between {span.first} and {span.last} tokens {type(model).__name__} crosses {rope_limit(model)}, feeds all "
                "tokens again, and computes logits for the last alone. Leave logits out, or ask for fewer tokens."
            )


def respond(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    selection: Selection | None = None,
    texts: Sequence[str] | None = None,
    repeats: Sequence[int] | None = None,
    think_tokens: tuple[str, str] | None = None,
) -> list[Response]:
    """The responses to token sequences. They are run together, padded on the left, where none changes the numbers of another.

    Sampled with a seed, a response depends on the seed, its prompt and its repeat, and not on the batch.
    selection: what to capture; None captures nothing. texts: the prompts as texts, for the column `prompt` of the samples. repeats: how many
    equal prompts were asked before each, in other batches too; by default those of this batch are counted. think_tokens: the marks around the
    model's thinking, given by hand; by default those of the selection, or of the tokenizer. Raises CaptureError when the model was fed other tokens than those that it answered; SelectionError.
    """
    responses: dict[int, Response] = {}
    refuse_cache_settings(loaded.model, sampling.kwargs())
    refuse_logits_fed_again(loaded.model, selection, _spans(prompts, sampling))
    way = way_of(loaded.model, sampling.generation, sampling.kwargs())
    marks = think_marks(loaded.tokenizer, think_tokens or (None if selection is None else selection.think_tokens))
    repeats = repeats_of(prompts) if repeats is None else repeats
    with _seeded(sampling):
        for group in harmless_groups(loaded, prompts, sampling):
            own = [prompts[row] for row in group]
            own_texts = [texts[row] if texts else text_of(loaded.tokenizer, prompts[row]) for row in group]
            asked = Asked(own, own_texts, [repeats[row] for row in group])
            together = partial(_respond_together, loaded, asked, sampling, selection, way, marks)
            responses |= zip(group, again_without_graphs(together, way), strict=True)
    return [responses[row] for row in range(len(prompts))]


def generation_setting(model: Any, sampling: Sampling) -> dict[str, str]:
    """What the settings of a run say of how its decode steps were run; nothing when they were run one by one."""
    return way_of(model, sampling.generation, sampling.kwargs()).settings


def harmless_groups(loaded: LoadedModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Groups of prompts, by number, that may be answered in one batch because none changes the numbers of another."""
    spans = _spans(prompts, sampling)
    return apart(loaded.model, spans, company_of(loaded.model, sampling.kwargs(), spans))


def _spans(prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Span]:
    return [Span(len(prompt), len(prompt) + sampling.max_new_tokens - 1) for prompt in prompts]


def _respond_together(
    loaded: LoadedModel, asked: Asked, sampling: Sampling, selection: Selection | None, way: Way, marks: ThinkMarks
) -> list[Response]:
    """The responses to one batch."""
    model, tokenizer = loaded.model, loaded.tokenizer
    prompts, texts = asked.prompts, asked.texts
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    refuse_plain(model, "an answer needs generate of transformers")
    given, own = sampling.kwargs(), model.generation_config
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    filler = given.pop("pad_token_id", filler)
    ids = [[filler] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=input_device(model))
    keep = None if selection is None else keep_of(selection.positions, prompts, pads)
    shape = (len(prompts), width + sampling.max_new_tokens - 1)
    recorder = recording_of(loaded, selection, keep, len(prompts), n_columns=shape[1])
    with (
        torch.no_grad(),
        alone_with(model),
        recorder as recording,
        token_logprobs(model, is_wanted=selection is not None) as likely,
        drawing(model, asked.draws(sampling)),
        given_mask(model, mask),
        decoding(model, way, shape, recording) as extra,
    ):
        sequences: Tensor = model.generate(  # [batch, width + longest response]
            input_ids=torch.tensor(ids, device=input_device(model)),
            attention_mask=mask,
            pad_token_id=filler,
            tokenizer=tokenizer if given.get("stop_strings", own.stop_strings) else None,
            **{**given, **without_cache(model), **extra},
        )
    end = given.get("eos_token_id", own.eos_token_id)
    answers = [until_end(each, end) for each in sequences[:, width:].tolist()]
    kept: list[range] = []
    pairs = list(zip(prompts, answers, strict=True))
    thinking = [marks.thinking(*pair) for pair in pairs]
    if selection is not None:
        resolve = selection.positions.resolve
        kept = [resolve(len(p), len(a), own) for (p, a), own in zip(pairs, thinking, strict=True)]
        recording.will_give(sum(map(len, kept)))
    found = likely.of(sequences, width)
    reduced = SampleReducer(selection)
    responses = []
    for row, (prompt, generated) in enumerate(zip(prompts, answers, strict=True)):
        text = text_of(tokenizer, generated, skip_special_tokens=True)
        said = marks.texts(thinking[row], len(prompt), generated, text)
        sample = None
        if selection is not None:
            pieces = sequence_rows(recording, BatchRow(row, pads[row]), [*prompt, *generated], kept[row], tokenizer)
            columns = sample_columns(texts[row], text, len(prompt), (len(prompts), width))
            columns |= answer_column(found, row, len(generated))
            columns |= columns_of(thinking[row], said)
            whole = Sample(columns, list(prompt), generated, parts_of(pieces, kept[row]))
            (sample,) = reduced([whole])
        responses.append(Response(text, sample, generated, said.answer))
    return responses


@contextmanager
def _seeded(sampling: Sampling) -> Iterator[None]:
    """Seeds torch for the sampling, and gives the caller's random state back afterwards."""
    if sampling.seed is None or sampling.temperature == 0:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        yield


def until_end(generated: Sequence[int], end: int | Sequence[int] | None) -> list[int]:
    """The tokens of one row up to and including its first end token. What follows is padding of the batch.

    end: the end token, several of them, or None.
    """
    ends = {end} if isinstance(end, int) else set(end or ())
    for n_before, token in enumerate(generated):
        if token in ends:
            return list(generated[: n_before + 1])
    return list(generated)
