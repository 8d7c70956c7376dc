"""`BatchCapture`: the samples of lm-eval's own batches, from the forward that served a request until its answer is known.

A batch row is compared with what its request asks before anything is kept: a change inside lm-eval fails here, loudly. This module does
not know why lm-eval made a batch (`model.py`), nor which of its rows are computed together (`row_groups.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from AutomaticEval.capture.answers.think_marks import think_marks
from AutomaticEval.capture.answers.token_logprobs import answer_column, token_logprobs
from AutomaticEval.capture.keeping import (
    BatchRow,
    dtype_of,
    keep_columns,
    keep_of,
    parts_of,
    sample_columns,
    sequence_rows,
)
from AutomaticEval.capture.reduced_rows import taps_of
from AutomaticEval.capture.tree.shared_prompt import Prefix
from AutomaticEval.errors import CaptureError, warn
from AutomaticEval.evaluation.harness.call import UNKNOWN, Call, Request
from AutomaticEval.evaluation.harness.generated import AnswerReader
from AutomaticEval.evaluation.results.earlier_answers import random_state, scored_text
from AutomaticEval.evaluation.results.request_key import RequestKey
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.recording import Keep, Recording, capturing
from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.selection import Positions, Selection
from AutomaticEval.thinking.text import columns_of
from AutomaticEval.thinking.where import Thinking

Sink = Callable[[list[Sample]], None]
"""Takes the samples of one batch; they may share rows."""


@dataclass(frozen=True)
class ScoredRow:
    """A row of a batch that scores continuations.

    It serves one request, or several that score one token each after the same context.
    """

    sequence: list[int]
    """The context and a continuation. The last token is not fed."""

    continuations: dict[int, list[int]]
    """Request, by its index in the call -> its own continuation."""

    n_truncated: int
    """Tokens that were cut off the context on the left."""

    @property
    def n_prompt(self) -> int:
        """The tokens of the context. Its requests' continuations are equally long."""
        return len(self.sequence) - len(next(iter(self.continuations.values())))

    @property
    def fed(self) -> list[int]:
        """The tokens that the model is given."""
        return self.sequence[:-1]

    def kept(self, positions: Positions) -> list[int]:
        """The positions that any of its requests keeps, ascending."""
        kept: set[int] = set()
        for continuation in self.continuations.values():
            n_prompt = len(self.sequence) - len(continuation)
            kept.update(positions.resolve(n_prompt, len(continuation), Thinking.without(n_prompt)))
        return sorted(kept)


@dataclass(frozen=True)
class PromptRows:
    """Prompts that are answered together."""

    requests: list[int]
    """The request of each row, by its index in the call."""

    context: Tensor
    """[n_prompts, width], left-padded."""

    mask: Tensor
    """[n_prompts, width]"""

    pads: list[int]
    """Columns of padding before each prompt."""

    tokens: list[list[int]]
    """The token ids of each prompt."""

    n_truncated: list[int]
    """Tokens that were cut off each prompt on the left."""


@dataclass(frozen=True)
class _Held:
    """What was captured of one request, until its answer is known."""

    request: int
    fields: dict[str, Any]
    input_ids: list[int]
    generated_ids: list[int]
    pieces: Sequence[Rows]
    """Its own rows."""

    shared: Sequence[Part] = ()
    """Where the rows of its beginning are, which it shares with other requests."""

    random_state: str | None = None
    """torch's random state after the batch, in the last sample of one that was sampled."""

    def sample(self, answer: Any, positions: Positions) -> Sample:
        """The sample with its answer. Raises CaptureError when lm-eval has another text than was generated."""
        fields = self.fields
        if self.random_state is not None:
            fields = {**fields, "random_state": self.random_state}
        if isinstance(answer, str):
            captured = scored_text(fields)
            if answer != captured:
                raise CaptureError(
                    f"{fields['task']} document {fields['doc_id']}: captured {captured!r}, lm-eval has {answer!r}."
                )
        else:
            logprob, is_greedy = answer
            fields = {**fields, "logprob": logprob, "is_greedy": is_greedy, "scoring": "stock"}
        n_prompt = len(self.input_ids)
        thinking = Thinking.of_record(fields) or Thinking.without(n_prompt)
        kept = positions.resolve(n_prompt, len(self.generated_ids), thinking)
        parts = [*self.shared, *parts_of(self.pieces, kept)]
        return Sample(fields, self.input_ids, self.generated_ids, parts)


class BatchCapture:
    """Captures what lm-eval's batches compute of a selection, and hands it to a sink. Raises SiteUnavailable, UnknownLayer."""

    def __init__(self, loaded: LoadedModel, selection: Selection, sink: Sink) -> None:
        self._model, self._tokenizer, self._sink = loaded.model, loaded.tokenizer, sink
        self._positions, self._dtype = selection.positions, dtype_of(selection)
        self._embedding, self._taps = loaded.layout.embedding, taps_of(loaded.layout, selection)
        self._given = selection.think_tokens
        self._marks = think_marks(loaded.tokenizer, self._given)
        self._has_told = False
        self._held: list[_Held] = []

    def cuts_thinking_at(self, end: str | int | None) -> None:
        """lm-eval scores what follows this text or token id; None: it scores whole responses."""
        self._marks = think_marks(self._tokenizer, self._given, end)

    def scored(self, call: Call, rows: Sequence[ScoredRow], ids: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """The logits of rows that are run together [n_rows, width, d_vocab]; holds what the forward computed of their requests.

        ids: [n_rows, width], right-padded. forward: lm-eval's own. Raises CaptureError when ids are not the tokens of the rows.
        """
        for row, fed in zip(rows, ids, strict=True):
            check_fed(row.fed, fed[: len(row.fed)].tolist())
        kept = [row.kept(self._positions) for row in rows]
        with self._recording(keep_columns(kept), len(rows)) as recording:
            logits = forward(ids)
        n_rows, n_columns = ids.shape
        for number, row in enumerate(rows):
            stored = sequence_rows(recording, BatchRow(number), row.sequence, kept[number], self._tokenizer)
            for index, continuation in row.continuations.items():
                prompt = row.sequence[: len(row.sequence) - len(continuation)]
                fields = _fields(call.requests[index], len(prompt), (n_rows, n_columns), row.n_truncated)
                self._held.append(_Held(index, fields, prompt, continuation, stored))
        return logits

    def generated(
        self,
        call: Call,
        prompts: PromptRows,
        prefix: Prefix | None,
        reader: AnswerReader,
        generate: Callable[[Recording], Tensor],
    ) -> Tensor:
        """The token ids of prompts and answers [n_prompts, width + longest answer]; holds what was computed of each.

        prefix: what the prompts begin with and was computed before. generate: lm-eval's own generation of these prompts, which is given the
        recording that follows it.
        """
        n_past = 0 if prefix is None else prefix.n_tokens
        n_rows, n_columns = prompts.context.shape
        keep = keep_of(self._positions, prompts.tokens, prompts.pads, n_past)
        with self._recording(keep, n_rows) as recording, token_logprobs(self._model) as likely:
            out = generate(recording)
        found = likely.of(out, n_columns)
        answers = [reader.own(each) for each in out[:, n_columns:].tolist()]
        pairs = list(zip(prompts.tokens, answers, strict=True))
        each_thinking = [self._marks.thinking(*pair) for pair in pairs]
        each_kept = [
            self._positions.resolve(len(p), len(a), own) for (p, a), own in zip(pairs, each_thinking, strict=True)
        ]
        recording.will_give(sum(position >= n_past for kept in each_kept for position in kept))
        for number, index in enumerate(prompts.requests):
            prompt, pad = prompts.tokens[number], prompts.pads[number]
            generated, kept = answers[number], each_kept[number]
            shared = [] if prefix is None else prefix.parts(kept)
            own = [position for position in kept if position >= n_past]
            at = BatchRow(number, pad, n_past)
            rows = sequence_rows(recording, at, [*prompt, *generated], own, self._tokenizer)
            fields = _fields(call.requests[index], len(prompt), (n_rows, n_columns), prompts.n_truncated[number])
            text, scored = reader.whole(generated), reader.text(generated)
            fields |= {"response": text, **answer_column(found, number, len(generated))}
            fields |= self._said(each_thinking[number], prompt, generated, text)
            if reader.think_end_token is not None:
                fields["scored_text"] = scored
            elif each_thinking[number].span is not None:
                self._tell_of_scored_thinking()
            self._held.append(_Held(index, fields, prompt, generated, rows, shared))
        return out

    def _said(self, thinking: Thinking, prompt: list[int], generated: list[int], text: str) -> dict[str, Any]:
        """The columns on thinking and answer. text: of the whole response."""
        return columns_of(thinking, self._marks.texts(thinking, len(prompt), generated, text))

    def _tell_of_scored_thinking(self) -> None:
        """Warn once a run that the scores are not those of answers alone."""
        if not self._has_told:
            warn(
                f"the model thinks before it answers, and lm-eval scores both together; with --think_end_token {self._marks.name_of_end} it scores the answer alone."
            )
        self._has_told = True

    def _recording(self, keep: Keep, n_rows: int) -> Any:
        return capturing(self._model, self._taps, self._embedding, keep, n_rows, self._dtype)

    def note_random_state(self, device: torch.device) -> None:
        """Write torch's random state beside the last sample that is held, for a run that is resumed after this batch."""
        self._held[-1] = replace(self._held[-1], random_state=random_state(device))

    def hand_on(self, call: Call, known: Container[RequestKey]) -> None:
        """Give the held samples, whose answers are there now, to the sink, but for those of requests that are known from before."""
        held, self._held = self._held, []
        new = [each for each in held if call.requests[each.request].key not in known]
        if new:
            self._sink([each.sample(call.answers[each.request], self._positions) for each in new])

    def drop(self) -> None:
        """Forget what is held: its answers do not come any more."""
        self._held = []


def check_fed(expected: list[int], fed: list[int]) -> None:
    """Raises CaptureError when a batch row is not what its request asks."""
    if fed != expected:
        raise CaptureError(f"a row of {len(fed)} tokens is not what its request asks ({len(expected)}); {UNKNOWN}.")


def _fields(request: Request, n_prompt: int, batch: tuple[int, int], n_truncated: int) -> dict[str, Any]:
    """The columns of a sample whose answer is not known yet. batch: rows and columns of the batch it was computed in."""
    columns = sample_columns(request.prompt, request.response or "", n_prompt, batch)
    return {**columns, **request.key._asdict(), "n_truncated": n_truncated}
