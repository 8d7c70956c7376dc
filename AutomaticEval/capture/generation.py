"""Batches of token sequences -> responses, with the activations of the very forwards that produced them.

Knows nothing of prompts as people write them (`prompt.py`), nor of benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from typing import Any, NamedTuple

import torch
from torch import Tensor

from AutomaticEval.capture.batch_independence import Span, apart, company_of, is_fed_again, rope_limit
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.capture.vocabulary import text_of, token_strings
from AutomaticEval.errors import CaptureError, SelectionError
from AutomaticEval.models.architecture.forward_call import alone_with, forward_takes, input_device
from AutomaticEval.models.loading import LoadedModel
from AutomaticEval.models.recording import Keep, Kept, Recording, capturing
from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.selection import Positions, Selection
from AutomaticEval.sites import TABLE


class Response(NamedTuple):
    """One prompt's response."""

    text: str
    sample: Sample | None
    """With its rows, when activations were captured."""

    generated_ids: list[int]
    """Up to its own end."""


def bytes_per_row(loaded: LoadedModel, selection: Selection) -> int:
    """Size of one position over all selected sites. Raises UnknownLayer, SiteUnavailable."""
    layout = loaded.layout
    sites = selection.sites(layout.n_layers)
    layout.pick(sites)
    names = {site: selection.store_dtype or TABLE[site.kind].dtype for site in sites}
    dtypes = {site: loaded.model.dtype if name is None else getattr(torch, name) for site, name in names.items()}
    return sum(layout.widths[site] * int(dtypes[site].itemsize) for site in sites)


def refuse_uncomputed_logits(model: Any, selection: Selection, n_prompt: int, n_new: int) -> None:
    """Raises SelectionError for logits that a model which generates does not compute: those of a prompt but for its last token.

    n_prompt: tokens of the prompt. n_new: the most that are generated; the answer may be any shorter.
    """
    if "logits" not in selection.kinds or "logits_to_keep" not in forward_takes(model):
        return
    kept = [selection.positions.resolve(n_prompt, n_response) for n_response in (1, n_new)]
    if any(positions and positions[0] < n_prompt - 1 for positions in kept):
        raise SelectionError(
            f"positions={selection.positions} would keep logits of the prompt, which a model that generates does not compute but at its "
            "last token; use positions scored (the logits that gave the answer), or leave the site logits out."
        )


def dtype_of(selection: Selection) -> torch.dtype | None:
    """What rows are narrowed to when they are copied out of the model; None leaves them."""
    return None if selection.copied_as is None else getattr(torch, selection.copied_as)


def recording_of(
    loaded: LoadedModel, selection: Selection | None, keep: Keep | None, n_rows: int
) -> AbstractContextManager[Any]:
    """`capturing` of a selection; without one nothing is hooked, and the recording is None."""
    if selection is None or keep is None:
        return nullcontext()
    layout = loaded.layout
    taps = layout.pick(selection.sites(layout.n_layers))
    return capturing(loaded.model, taps, layout.embedding, keep, n_rows, dtype_of(selection))


def respond(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    selection: Selection | None = None,
    texts: Sequence[str] | None = None,
) -> list[Response]:
    """Responses to token sequences, run together, left-padded, as far as they change nothing of one another.

    selection: what to capture; None captures nothing. texts: what was asked, for the samples' `prompt`.
    Raises CaptureError when what the model was fed is not what it answered.
    """
    found: dict[int, Response] = {}
    refuse_logits_fed_again(loaded.model, selection, _spans(prompts, sampling))
    with _seeded(sampling):
        for group in harmless_groups(loaded, prompts, sampling):
            some = [prompts[row] for row in group]
            asked = [texts[row] if texts else text_of(loaded.tokenizer, prompts[row]) for row in group]
            found |= zip(group, _respond_together(loaded, some, sampling, selection, asked), strict=True)
    return [found[row] for row in range(len(prompts))]


def harmless_groups(loaded: LoadedModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """The prompts (by number) that may be answered in one batch, because they change nothing of one another."""
    spans = _spans(prompts, sampling)
    return apart(loaded.model, spans, company_of(loaded.model, sampling.kwargs(), spans))


def _spans(prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Span]:
    return [Span(len(prompt), len(prompt) + sampling.max_new_tokens - 1) for prompt in prompts]


def refuse_logits_fed_again(model: Any, selection: Selection | None, spans: Sequence[Span]) -> None:
    """Raises SelectionError where logits are wanted of tokens that are fed again without them."""
    if selection is None or "logits" not in selection.kinds:
        return
    for span in spans:
        if is_fed_again(model, span):
            raise SelectionError(
                f"logits cannot be kept: between {span.first} and {span.last} tokens {type(model).__name__} crosses {rope_limit(model)}, feeds all "
                "tokens again, and computes logits for the last alone. Leave logits out, or ask for fewer tokens."
            )


def _respond_together(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    selection: Selection | None,
    texts: Sequence[str],
) -> list[Response]:
    """Responses to one batch."""
    model, tokenizer = loaded.model, loaded.tokenizer
    width = max(map(len, prompts))
    pads = [width - len(ids) for ids in prompts]
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    ids = [[filler] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    mask = [[0] * pad + [1] * (width - pad) for pad in pads]
    keep = None if selection is None else keep_of(selection.positions, prompts, pads)
    recorder = recording_of(loaded, selection, keep, len(prompts))
    with torch.no_grad(), alone_with(model), recorder as recording:
        sequences: Tensor = model.generate(  # [batch, width + longest response]
            input_ids=torch.tensor(ids, device=input_device(model)),
            attention_mask=torch.tensor(mask, device=input_device(model)),
            pad_token_id=filler,
            tokenizer=tokenizer if model.generation_config.stop_strings else None,
            **sampling.kwargs(),
        )
    responses = []
    for row, prompt in enumerate(prompts):
        generated = until_end(sequences[row, width:].tolist(), model.generation_config.eos_token_id)
        text = text_of(tokenizer, generated, skip_special_tokens=True)
        sample = None
        if selection is not None:
            kept = selection.positions.resolve(len(prompt), len(generated))
            rows = sequence_rows(recording, row, pads[row], [*prompt, *generated], kept, tokenizer)
            columns = sample_columns(texts[row], text, len(prompt), (len(prompts), width))
            sample = Sample(columns, list(prompt), generated, [Part(rows, range(len(rows.positions)))])
        responses.append(Response(text, sample, generated))
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


def sample_columns(prompt: str, response: str, n_prompt_tokens: int, batch: Sequence[int]) -> dict[str, Any]:
    """The columns that every sample has. batch: rows and columns of the batch it was computed in."""
    return {
        "prompt": prompt,
        "response": response,
        "timestamp": datetime.now().astimezone().isoformat(),
        "n_prompt_tokens": n_prompt_tokens,
        "batch_rows": batch[0],
        "batch_columns": batch[1],
    }


def keep_of(positions: Positions, prompts: Sequence[Sequence[int]], pads: Sequence[int], n_past: int = 0) -> Keep:
    """What to keep of each forward of a left-padded batch: never padding, and what may still be selected.

    n_past: tokens of each prompt that were computed before, and are not fed.
    """
    windows = [positions.window(len(prompt)) for prompt in prompts]
    begins = [pad - n_past for pad in pads]
    low = torch.tensor([begin + first for begin, (first, _) in zip(begins, windows, strict=True)])
    high = torch.tensor(
        [2**62 if last is None else begin + last for begin, (_, last) in zip(begins, windows, strict=True)]
    )
    low = torch.maximum(low, torch.tensor(list(pads)))

    def keep(first: int, n_columns: int) -> Kept:
        columns = torch.arange(first, first + n_columns)[None]  # [1, columns]
        rows, chosen = torch.nonzero((columns >= low[:, None]) & (columns < high[:, None]), as_tuple=True)
        return Kept(rows, chosen + first)

    return keep


def until_end(generated: Sequence[int], end: int | Sequence[int] | None) -> list[int]:
    """A row's own tokens: up to and including its first end token; what follows is padding of the batch."""
    ends = {end} if isinstance(end, int) else set(end or ())
    stop = next((number + 1 for number, token in enumerate(generated) if token in ends), len(generated))
    return list(generated[:stop])


def sequence_rows(
    recording: Recording,
    row: int,
    pad: int,
    sequence: Sequence[int],
    positions: range | Sequence[int],
    tokenizer: Any,
    n_past: int = 0,
) -> Rows:
    """The kept rows of one sequence of a batch, after checking that the model was fed that very sequence.

    sequence: prompt and response, of which the last token is never fed. n_past: its tokens that were computed before, and
    of which no positions may be asked. Raises CaptureError.
    """
    own = list(sequence[n_past:-1])
    fed = recording.fed(row)[pad : pad + len(own)]
    if fed != own:
        raise CaptureError(
            f"batch row {row}: the model was fed {len(fed)} tokens that are not the {len(own)} of its sequence "
            "(beam search and assisted decoding cannot be captured). Nothing was stored."
        )
    token_ids = [sequence[position] for position in positions]
    activations: Mapping[str, Tensor] = recording.take(row, [pad + position - n_past for position in positions])
    return Rows(token_ids, token_strings(tokenizer, token_ids), list(positions), activations)
