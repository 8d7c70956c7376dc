"""lm-eval's own `hf` model, with every request's activations captured in the forward that served it.

No scoring code is copied: the scores are lm-eval's. lm-eval forgets which request a batch row serves, so its
Collator is asked (it alone knows order and grouping), and the tokens of each row are then compared with the
expected ones: a change inside lm-eval fails here, loudly.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, postprocess_generated_text
from torch import Tensor

from AutomaticEval.capture.generation import dtype_of, keep_of, sample_columns, sequence_rows, until_end
from AutomaticEval.errors import BenchmarkError, CaptureError
from AutomaticEval.models.hooks import Kept, capturing
from AutomaticEval.models.loading import LoadedModel
from AutomaticEval.selection import Selection
from AutomaticEval.store.format import Part, Rows, Sample

Sink = Callable[[list[Sample]], None]
"""Takes the samples of one batch; they may share rows."""


class RequestKey(NamedTuple):
    """Which request: every sample has its own."""

    task: str
    doc_id: int
    choice: int
    repeat: int


class _Member(NamedTuple):
    """One request that a batch row serves."""

    key: RequestKey
    prompt: str
    response: str
    n_prompt: int
    continuation: list[int]


class RecordingCollator(Collator):  # type: ignore[misc]
    """lm-eval's Collator, which says of each batch what requests (by index) each of its rows serves."""

    announce: Callable[[list[list[int]]], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._order: deque[int] = deque()
        self._members: dict[int, list[int]] | None = None
        if self._group_by == "contexts":  # now: get_cache takes groups out as it goes
            groups = self._arr_with_indices.values()
            self._members = {index: [other for other, _ in group] for group in groups for index, _ in group}

    def _reorder(self, arr: Any) -> Iterator[Any]:
        arr = list(arr)
        waiting: dict[int, deque[int]] = defaultdict(deque)  # tuples pass by identity; equal ones keep their order
        for index, request in arr:
            waiting[id(request)].append(index)
        for request in super()._reorder(arr):
            self._order.append(waiting[id(request)].popleft())
            yield request

    def get_batched(self, n: int = 1, batch_fn: Any = None) -> Iterator[Any]:
        for chunk in super().get_batched(n=n, batch_fn=batch_fn):
            served = [self._order.popleft() for _ in chunk]
            self.announce([[index] if self._members is None else self._members[index] for index in served])
            yield chunk


class CapturingHFLM(HFLM):  # type: ignore[misc]
    """HFLM that hands every captured sample to a sink.

    doc_ids: task -> the documents' own indices, when only some of a task's documents are evaluated.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        selection: Selection,
        sink: Sink,
        *,
        doc_ids: Mapping[str, Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, **kwargs)
        self._sink, self._positions, self._doc_ids = sink, selection.positions, doc_ids or {}
        self._layout, self._dtype = loaded.layout, dtype_of(selection)
        self._taps = self._layout.pick(selection.sites(self._layout.n_layers))
        self._requests: list[Instance] | None = None
        self._keys: list[RequestKey] = []
        self._token_lists: Sequence[Any] = ()
        self._announced: list[list[int]] | None = None

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        with self._serving(requests):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        with self._serving(requests):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        raise BenchmarkError(
            f"the task {requests[0].task_name!r} scores whole texts (loglikelihood_rolling), which is not captured; "
            "run it without --capture_activations."
        )

    @contextmanager
    def _serving(self, requests: list[Instance]) -> Iterator[None]:
        """Remember which requests are being served, and have the Collator say which rows serve them."""
        seen: Counter[int] = Counter()
        self._requests, self._keys = requests, []
        for request in requests:  # lm-eval repeats a request by listing the same object again
            self._keys.append(self._key(request, seen[id(request)]))
            seen[id(request)] += 1
        stock = huggingface.Collator
        recording = type("RecordingCollator", (RecordingCollator,), {"announce": staticmethod(self._announce)})
        huggingface.Collator = recording
        try:
            yield
        finally:
            huggingface.Collator = stock
            self._requests, self._announced = None, None

    def _key(self, request: Instance, repeat: int) -> RequestKey:
        own = self._doc_ids.get(request.task_name)
        doc_id = request.doc_id if own is None else own[request.doc_id]  # lm-eval counts within the selection
        return RequestKey(request.task_name, doc_id, request.idx, repeat)

    def _announce(self, rows: list[list[int]]) -> None:
        if self._announced is not None:
            raise CaptureError("lm-eval made a batch that no forward served; this version of lm-eval is not known.")
        self._announced = rows

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        self._token_lists = requests
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> Any:
        """batch_size=auto probes with made-up batches; they serve no request and are not captured."""
        announced, self._announced = self._announced, None
        requests, self._requests = self._requests, None
        try:
            return super()._detect_batch_size(*args, **kwargs)
        finally:
            self._announced, self._requests = announced, requests

    def _take_announced(self, n_rows: int) -> list[list[int]]:
        announced, self._announced = self._announced, None
        if announced is None or len(announced) != n_rows:
            found = "none" if announced is None else len(announced)
            raise CaptureError(f"a forward of {n_rows} rows, but {found} were announced; this lm-eval is not known.")
        return announced

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self._requests is None:
            probed: Tensor = super()._model_call(inps, attn_mask, labels)
            return probed
        rows = [self._scored_row(indices) for indices in self._take_announced(len(inps))]
        keep = _keep_rows([self._kept(members) for _, members, _ in rows])
        with capturing(self.model, self._taps, self._layout.embedding, keep, len(rows), self._dtype) as recording:
            out: Tensor = super()._model_call(inps, attn_mask, labels)
        samples = []
        for number, (tokens, members, n_truncated) in enumerate(rows):
            sequence = [*tokens, members[0].continuation[-1]]
            stored = sequence_rows(recording, number, 0, sequence, self._kept(members), self.tokenizer)
            for member in members:
                extra = {"n_truncated": n_truncated}
                ids = (tokens[: member.n_prompt], member.continuation)
                samples.append(self._sample(member, *ids, stored, tuple(inps.shape), extra))
        self._sink(samples)
        return out

    def _scored_row(self, indices: list[int]) -> tuple[list[int], list[_Member], int]:
        """The tokens of a row, the requests it serves, and how many tokens were cut off on the left."""
        _, context, continuation = self._token_lists[indices[0]]
        whole = (context + continuation)[-(self.max_length + 1) :]
        assert self._requests is not None
        members = []
        for index in indices:
            own = self._token_lists[index][2]
            prompt, response = self._requests[index].args
            members.append(_Member(self._keys[index], prompt, response, len(whole) - len(own), own))
        return whole[:-1], members, len(context) + len(continuation) - len(whole)

    def _kept(self, members: Sequence[_Member]) -> list[int]:
        """Positions that any of a row's requests keeps, ascending."""
        wanted = [self._positions.resolve(member.n_prompt, len(member.continuation)) for member in members]
        return sorted({position for positions in wanted for position in positions})

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        assert self._requests is not None
        announced = self._take_announced(len(context))
        pads = [int(row.numel() - row.sum()) for row in kwargs["attention_mask"]]
        prompts = [row[pad:].tolist() for row, pad in zip(context, pads, strict=True)]
        keep = keep_of(self._positions, prompts, pads)
        with capturing(self.model, self._taps, self._layout.embedding, keep, len(prompts), self._dtype) as recording:
            out: Tensor = super()._model_generate(context, max_length, stop, **kwargs)
        samples = []
        for number, (prompt, (index,)) in enumerate(zip(prompts, announced, strict=True)):
            generated = self._own_tokens(out[number, context.shape[1] :].tolist(), stop)
            kept = self._positions.resolve(len(prompt), len(generated))
            sequence = [*prompt, *generated]
            stored = sequence_rows(recording, number, pads[number], sequence, kept, self.tokenizer)
            text = self._requests[index].args[0]
            response = postprocess_generated_text(self.tok_decode(generated), stop, None)
            member = _Member(self._keys[index], text, response, len(prompt), generated)
            extra = {"n_truncated": max(0, len(self.tok_encode(text)) - len(prompt))}
            samples.append(self._sample(member, prompt, generated, stored, tuple(context.shape), extra))
        self._sink(samples)
        return out

    def _own_tokens(self, generated: list[int], stop: Sequence[str]) -> list[int]:
        """A row's tokens up to its own end: its end token, or the token that completes its first stop string.

        A row that has stopped goes on generating until the whole batch has.
        """
        ended = until_end(generated, self.model.generation_config.eos_token_id)
        stops = [text for text in stop if text]

        def stopped(n_tokens: int) -> bool:
            text = self.tok_decode(ended[:n_tokens])
            return any(each in text for each in stops)

        if not stopped(len(ended)):
            return ended
        low, high = 0, len(ended)  # stopped(high), not stopped(low)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if stopped(middle) else (middle, high)
        return ended[:high]

    def _sample(
        self,
        member: _Member,
        input_ids: Sequence[int],
        generated_ids: Sequence[int],
        rows: Rows,
        batch: tuple[int, ...],
        extra: Mapping[str, Any],
    ) -> Sample:
        kept = set(self._positions.resolve(len(input_ids), len(generated_ids)))
        fields = {
            **sample_columns(member.prompt, member.response, len(input_ids), batch),
            **member.key._asdict(),
            **extra,
        }
        where = [index for index, position in enumerate(rows.positions) if position in kept]
        return Sample(fields, input_ids, generated_ids, [Part(rows, where)])


def _keep_rows(positions: Sequence[Sequence[int]]) -> Callable[[int, int], Kept]:
    """What to keep of one right-padded forward: these positions of each row."""

    def keep(first: int, n_columns: int) -> Kept:
        rows = torch.tensor([row for row, kept in enumerate(positions) for _ in kept], dtype=torch.long)
        columns = torch.tensor([column for kept in positions for column in kept], dtype=torch.long)
        return Kept(rows, columns)

    return keep
