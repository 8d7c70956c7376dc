"""lm-eval's own `hf` model, with every request's activations captured in the forward that served it.

No scoring code is copied: the scores are lm-eval's. What a batch row is expected to hold is compared with what the model was
fed: a change inside lm-eval fails here, loudly.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix
from torch import Tensor

from AutomaticEval.capture.batch_independence import Company, Span, apart, company_of, rope_limit
from AutomaticEval.capture.generation import refuse_logits_fed_again
from AutomaticEval.capture.keeping import BatchRow, dtype_of, keep_columns, keep_of, sample_columns, sequence_rows
from AutomaticEval.capture.tree.score import Cut
from AutomaticEval.capture.tree.shared_prompt import Prefill, Prefix
from AutomaticEval.errors import BenchmarkError, CaptureError, TreeUnsuitable
from AutomaticEval.evaluation.benchmark import WHY_NOT, check_scoring, indistinct
from AutomaticEval.evaluation.harness.batches import AnswerHook, recording
from AutomaticEval.evaluation.harness.call import UNKNOWN, Call, Request
from AutomaticEval.evaluation.harness.generated import Answers
from AutomaticEval.evaluation.harness.refusals import document, refuse_generating, refuse_pair
from AutomaticEval.evaluation.harness.speedups import quiet
from AutomaticEval.evaluation.harness.tokens import EncodedAhead, rolling_windows, shared_beginnings, texts_of
from AutomaticEval.evaluation.harness.tree_scores import TreeScorer
from AutomaticEval.evaluation.results.requests import Answered, RequestKey, random_state
from AutomaticEval.models.find_layout import refuse_untrue
from AutomaticEval.models.layout import cache_name, input_device
from AutomaticEval.models.loading import LoadedModel
from AutomaticEval.models.recording import capturing
from AutomaticEval.processes import Ranks
from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.selection import Selection

Sink = Callable[[list[Sample]], None]
"""Takes the samples of one batch; they may share rows."""


@dataclass(frozen=True)
class _Captured:
    """What was captured of one request, until its answer is known."""

    index: int
    fields: dict[str, Any]
    input_ids: list[int]
    generated_ids: list[int]
    rows: Rows
    before: Sequence[Part] = ()
    """Where the rows of its beginning are, that it shares with others."""


class _Prompts(NamedTuple):
    """Prompts that are answered together."""

    batch: list[list[int]]
    """For each row of the batch: the requests that it answers."""
    context: Tensor
    """[n_prompts, width], left-padded."""
    mask: Tensor
    """[n_prompts, width]"""
    first: str | None
    """The prompt that decided about special tokens for all of them; None when each decided for itself."""


class CapturingHFLM(HFLM):  # type: ignore[misc]
    """HFLM that hands every captured sample to a sink.

    selection: None captures nothing. scoring: "tree" scores log-likelihoods over the prefix tree of all requests, if the model can
    be served so; "stock" in lm-eval's own batches. doc_ids: task -> the documents' own indices, when only some of a task's documents are
    evaluated. answered: requests that are not computed again. ranks: the processes that share the requests; each is given
    all of them, and answers all of them.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        selection: Selection | None,
        sink: Sink,
        *,
        scoring: str = "tree",
        doc_ids: Mapping[str, Sequence[int]] | None = None,
        answered: Mapping[RequestKey, Answered] | None = None,
        ranks: Ranks = Ranks(),
        **kwargs: Any,
    ) -> None:
        refuse_untrue(loaded.model)  # lm-eval would silently change its mode
        self._ahead = EncodedAhead((), self._encode_many)
        with quiet(HFLM.__module__):  # lm-eval warns that a model which is loaded already is not shared out; here it is
            super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, **kwargs)
        self._device = input_device(loaded.model)  # lm-eval takes the first weight's, which may be offloaded
        self._sink, self._doc_ids, self._ranks = sink, doc_ids or {}, ranks
        self._answered = answered or {}
        self._selection = selection
        if selection is not None:
            self._positions, self._dtype = selection.positions, dtype_of(selection)
            self._layout = loaded.layout
            self._taps = self._layout.pick(selection.sites(self._layout.n_layers))
        check_scoring(scoring)
        self._scoring = scoring
        measures = str(self.batch_size).startswith("auto")
        self._tree = TreeScorer(loaded, selection, sink, ranks, measures, self.max_length, self.softmax_dtype)
        self._prefill, self._prefills = Prefill(loaded, selection), scoring == "tree"
        self._said: set[str] = set()
        self._shared: list[float] = []
        """For each request to generate: which part of its prompt another prompt begins with, too."""
        self._call: Call | None = None
        self._held: list[_Captured] = []
        self._is_probing = False
        self._asked: set[RequestKey] = set()
        if selection is not None and kwargs.get("think_end_token") is not None:
            raise BenchmarkError(
                "think_end_token: thinking that lm-eval cuts off an answer is not captured yet; leave it out."
            )

    @property
    def n_tokens(self) -> tuple[int, int]:
        """(tokens that the requests scored over a tree here would have fed one by one, tokens that were computed)."""
        return self._tree.n_alone, self._tree.n_computed

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        found = None if args or kwargs else self._ahead.get(string)
        return list(super().tok_encode(string, *args, **kwargs)) if found is None else found

    def _encode_many(self, texts: Sequence[str]) -> Sequence[list[int]]:
        """What tok_encode gives for each."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        if self.add_bos_token is not None or any(has_bos_prefix(text, bos) for text in texts):
            return [super(CapturingHFLM, self).tok_encode(text) for text in texts]
        encoded: list[list[int]] = self.tokenizer(texts, return_attention_mask=False)["input_ids"]
        return encoded

    def set_cache_hook(self, cache_hook: Any) -> None:
        raise BenchmarkError(f"use_cache: {WHY_NOT['use_cache']}")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        asked = [Request(key, *request.args) for key, request in self._keyed(requests)]
        for request in asked:  # over which lm-eval would fail while it encodes
            key, prompt, response = request
            if not response or (not prompt and not self.tok_encode(response, add_special_tokens=False)):
                refuse_pair(document(key.task, key.doc_id), [0], [], (prompt, response or ""), self.max_length)
        self._ahead = EncodedAhead(texts_of(request.args for request in requests), self._encode_many)
        with self._serving(asked, placeholder=(float("nan"), False)) as call:
            own = super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self._ranks.is_first)
            return call.complete(own)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        keyed = self._keyed(requests)
        asked = [Request(key, request.args[0], None) for key, request in keyed]
        for key, how in {(key.task, repr(each.args[1])): (key, each.args[1]) for key, each in reversed(keyed)}.values():
            where = document(key.task, key.doc_id)
            refuse_generating(self.model, self._selection, where, how, self.max_length, self.max_gen_toks)
        for request in asked if self._selection is not None else ():
            if not request.prompt and not self.tok_encode(""):
                raise BenchmarkError(
                    f"the task {request.key.task!r} asks document {request.key.doc_id} with an empty prompt, which feeds nothing that "
                    "could be captured; run it without --capture_activations."
                )
        self._ahead = EncodedAhead((request.prompt for request in asked), self._encode_many)
        groups: list[int] = []
        if self._scoring == "tree":
            self._shared, groups = shared_beginnings([request.prompt for request in asked])
        with self._serving(asked, placeholder="", groups=groups) as call:
            own = super().generate_until(requests, disable_tqdm=disable_tqdm or not self._ranks.is_first)
            return call.complete(own)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        cut = [rolling_windows(self, request.args[0]) for request in requests]
        asked = [
            Request(key._replace(window=number), *map(self._text, window))
            for (key, _), windows in zip(self._keyed(requests), cut, strict=True)
            for number, window in enumerate(windows)
        ]
        own = None
        with self._serving(asked, placeholder=(float("nan"), False)) as call:
            call.tokens = dict(enumerate(window for windows in cut for window in windows))
            if not self._over_tree(call, disable_tqdm=disable_tqdm):
                own = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not self._ranks.is_first)
            scored = iter(call.complete([call.answers.get(index) for index in range(len(asked))]))
        totals: list[float] = [sum(next(scored)[0] for _ in windows) for windows in cut]
        if own is not None and len(call.computed) == len(asked) and repr(totals) != repr(own):
            raise CaptureError(f"lm-eval's sums over windows are not ours; {UNKNOWN}.")
        return totals

    def _text(self, ids: list[int]) -> str:
        return str(self.tok_decode(ids, skip_special_tokens=False))

    def _keyed(self, requests: Sequence[Instance]) -> list[tuple[RequestKey, Instance]]:
        """Each request with its key. Raises BenchmarkError for a task whose requests cannot be told apart."""
        seen: Counter[int] = Counter()
        keyed = []
        for request in requests:  # lm-eval repeats a request by listing the same object again
            own = self._doc_ids.get(request.task_name)
            doc_id = request.doc_id if own is None else own[request.doc_id]  # lm-eval counts within the selection
            keyed.append((RequestKey(request.task_name, doc_id, request.idx, seen[id(request)]), request))
            seen[id(request)] += 1
        if self._selection is not None:
            for key, _ in keyed:
                if key in self._asked:
                    raise BenchmarkError(
                        f"{indistinct(key.task)} (Or it was asked before: one instance makes one run.)"
                    )
                self._asked.add(key)
        return keyed

    @contextmanager
    def _serving(self, requests: list[Request], placeholder: Any, groups: Sequence[int] = ()) -> Iterator[Call]:
        """Follow lm-eval through one call. groups: of the requests, to be batched one after the other."""
        self._call = call = Call(requests, self._answered, self._ranks, self._store)
        stock = self.cache_hook
        self.cache_hook: Any = AnswerHook(call.hear)
        try:
            with recording(call.begins, placeholder, groups):
                yield call
        finally:
            self._call, self._held, self.cache_hook = None, [], stock
            self._ahead = EncodedAhead((), self._encode_many)
            self._prefill.forget()

    def _serves(self) -> Call:
        if self._call is None:
            raise CaptureError(f"lm-eval ran the model outside a request; {UNKNOWN}.")
        return self._call

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        call = self._serves()
        listed = call.listed(requests)
        for index, context, continuation in listed:
            key, prompt, response = call.requests[index]
            refuse_pair(
                document(key.task, key.doc_id), context, continuation, (prompt, response or ""), self.max_length
            )
        if self._over_tree(call, disable_tqdm=kwargs.get("disable_tqdm", False)):
            return [call.answers.get(index, (float("nan"), False)) for index in range(len(listed))]
        return super()._loglikelihood_tokens(listed, *args, **kwargs)

    def _autocast(self) -> torch.autocast:
        """As lm-eval has it around its own forwards."""
        kind = self.mixed_precision_dtype
        return torch.autocast(self.device.type, kind, enabled=kind is not None)

    def _over_tree(self, call: Call, *, disable_tqdm: bool) -> bool:
        """Score what a call listed over its prefix tree. False, with a warning, when the model cannot be served so."""
        if self._scoring != "tree" or not call.tokens:
            return False
        bar = None if disable_tqdm or not self._ranks.is_first else "Running loglikelihood requests"
        try:
            with self._autocast():
                self._tree.score(call, bar)
        except TreeUnsuitable as why:
            warnings.warn(f"Scoring request by request, as --scoring stock does: {why}", stacklevel=2)
            return False
        return True

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        """batch_size=auto probes with made-up batches; they serve no request and are not captured."""
        self._is_probing = True
        try:
            found = super()._detect_batch_size(*args, **kwargs)
        finally:
            self._is_probing = False
        return min(self._ranks.gathered(int(found)))

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self._is_probing:
            probed: Tensor = super()._model_call(inps, attn_mask, labels)
            return probed
        batch = self._serves().fed(len(inps))
        lengths = [len(self._cut(indices).fed) for indices in batch]
        groups = self._groups([Span(each, each) for each in lengths])  # padding on the right changes nothing
        parts = []
        for group in groups:
            width = inps.shape[1] if len(groups) == 1 else max(lengths[row] for row in group)
            parts.append(self._called([batch[row] for row in group], inps[group, :width]))
        if len(groups) == 1:
            return parts[0]
        out = parts[0].new_zeros((*inps.shape, parts[0].shape[-1]))
        for group, logits in zip(groups, parts, strict=True):
            out[group, : logits.shape[1]] = logits
        return out

    def _called(self, batch: list[list[int]], inps: Tensor) -> Tensor:
        """The logits of rows that are run together [n_rows, width, d_vocab]; keeps what was captured."""
        if self._selection is None:
            plain: Tensor = super()._model_call(inps)
            return plain
        rows = [self._scored_row(indices) for indices in batch]
        for (sequence, _, _), fed in zip(rows, inps, strict=True):
            self._check_fed(sequence[:-1], fed[: len(sequence) - 1].tolist())
        keep = keep_columns([kept for _, _, kept in rows])
        with capturing(self.model, self._taps, self._layout.embedding, keep, len(rows), self._dtype) as captured:
            out: Tensor = super()._model_call(inps)
        for number, (sequence, members, kept) in enumerate(rows):
            stored = sequence_rows(captured, BatchRow(number), sequence, kept, self.tokenizer)
            for index, n_prompt, continuation, n_truncated in members:
                self._hold(index, sequence[:n_prompt], continuation, stored, tuple(inps.shape), n_truncated)
        return out

    def _cut(self, indices: Sequence[int]) -> Cut:
        """What a row that serves these requests holds."""
        return Cut.of(*self._serves().tokens[indices[0]], self.max_length)

    def _scored_row(self, indices: list[int]) -> tuple[list[int], list[tuple[int, int, list[int], int]], list[int]]:
        """A row's sequence (of which the last token is not fed), the requests it serves, and the positions they keep.

        Of each request: its index, the number of prompt tokens, its continuation, and how many tokens were cut off.
        """
        call = self._serves()
        context, continuation, n_truncated = self._cut(indices)
        whole = [*context, *continuation]
        members = []
        wanted: set[int] = set()
        for index in indices:
            own = call.tokens[index][1]
            members.append((index, len(whole) - len(own), own, n_truncated))
            wanted.update(self._positions.resolve(len(whole) - len(own), len(own)))
        return whole, members, sorted(wanted)

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """lm-eval adds special tokens to all prompts of a batch or to none, as the first of them has it; over the tree each has its own."""
        if self._scoring == "stock" or len({self._writes_bos(text) for text in strings}) == 1:
            encoded: tuple[Tensor, Tensor] = super().tok_batch_encode(strings, *args, **kwargs)
            return encoded
        each = [super(CapturingHFLM, self).tok_batch_encode([text], *args, **kwargs) for text in strings]
        width = max(ids.shape[1] for ids, _ in each)
        ids, masks = (
            torch.cat(
                [torch.nn.functional.pad(row[part], (width - row[part].shape[1], 0), value=filler) for row in each]
            )
            for part, filler in ((0, self.tokenizer.pad_token_id), (1, 0))
        )
        return ids, masks

    def _writes_bos(self, text: str) -> bool:
        return bool(has_bos_prefix(text, getattr(self.tokenizer, "bos_token", None)))

    def _prompt_ids(self, text: str, first: str) -> list[int]:
        """A prompt's tokens in a batch that begins with `first`."""
        with_special = False if self._writes_bos(first) else self.add_bos_token
        special = {} if with_special is None else {"add_special_tokens": with_special}
        return list(self.tokenizer.encode(text, truncation=self.truncation, **special))

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        call = self._serves()
        batch = call.fed(len(context))
        mask = kwargs.pop("attention_mask")
        lengths = [int(row.sum()) for row in mask]
        n_new = max_length - context.shape[1]
        first = call.requests[batch[0][0]].prompt if self._scoring == "stock" else None
        answers: dict[int, Tensor] = {}
        n_most = max(n_new, kwargs.get("max_new_tokens") or 0)
        spans = [Span(each, each + n_most - 1) for each in lengths]
        refuse_logits_fed_again(self.model, self._selection, spans)
        for group in self._groups(spans, company_of(self.model, kwargs, spans)):
            width = max(lengths[row] for row in group)
            rows = _Prompts([batch[row] for row in group], context[group, -width:], mask[group, -width:], first)
            answers |= zip(group, self._generated(rows, width + n_new, stop, kwargs)[:, width:], strict=True)
        if self._selection is not None and kwargs.get("do_sample"):
            self._held[-1].fields["random_state"] = random_state(self.device)
        longest = max(map(len, answers.values()))
        out = context.new_full((len(context), longest), self.tokenizer.pad_token_id)
        for row, answer in answers.items():
            out[row, : len(answer)] = answer
        return torch.cat([context, out], 1)

    def _groups(self, spans: Sequence[Span], company: Company = Company()) -> list[list[int]]:
        """The rows of a batch in groups that change nothing of one another; lm-eval's own batches stay whole."""
        groups = apart(self.model, spans, company)
        if len(groups) == 1:
            return groups
        why = company.why or f"beyond {rope_limit(self.model)} tokens positions depend on the longest row of a batch"
        if self._scoring == "stock":
            self._say(f"Rows of a batch change one another, as in lm-eval's own batches: {why}.")
            return [list(range(len(spans)))]
        self._say(f"Rows are computed apart from others of their batch: {why}.")
        return groups

    def _say(self, line: str) -> None:
        """Warn, once."""
        if line not in self._said:
            self._said.add(line)
            warnings.warn(line, stacklevel=2)

    def _generated(self, rows: _Prompts, max_length: int, stop: list[str], kwargs: Mapping[str, Any]) -> Tensor:
        """Generate for prompts that are run together, and keep what was captured."""
        call = self._serves()
        batch, context, mask, first = rows
        pads = [int(row.numel() - row.sum()) for row in mask]
        prompts = [row[pad:].tolist() for row, pad in zip(context, pads, strict=True)]
        prefix = self._prefix(prompts, batch, max_length, kwargs)
        n_past = 0 if prefix is None else prefix.n_tokens
        given = {**kwargs, "attention_mask": mask}
        if prefix is not None:
            context = prefix.arranged(context, pads)
            given["attention_mask"] = prefix.arranged(mask, pads)
            given[str(cache_name(self.model))] = prefix.cache(len(context))
        if self._selection is None:
            plain: Tensor = super()._model_generate(context, max_length, stop, **given)
            return plain
        keep = keep_of(self._positions, prompts, pads, n_past)
        with capturing(self.model, self._taps, self._layout.embedding, keep, len(prompts), self._dtype) as captured:
            out: Tensor = super()._model_generate(context, max_length, stop, **given)
        answers = Answers(self.tok_decode, stop, self.model.generation_config.eos_token_id)
        for number, (prompt, (index,)) in enumerate(zip(prompts, batch, strict=True)):
            generated = answers.own(out[number, context.shape[1] :].tolist())
            kept = self._positions.resolve(len(prompt), len(generated))
            before = prefix.parts(kept) if prefix is not None else []
            own = [position for position in kept if position >= n_past]
            at = BatchRow(number, pads[number], n_past)
            stored = sequence_rows(captured, at, [*prompt, *generated], own, self.tokenizer)
            text = call.requests[index].prompt
            whole = self._prompt_ids(text, text if first is None else first)
            self._check_fed(whole[len(whole) - len(prompt) :], prompt)
            n_truncated = len(whole) - len(prompt)
            member = self._hold(index, prompt, generated, stored, tuple(context.shape), n_truncated, before)
            member.fields["response"] = answers.text(generated)
        return out

    def _prefix(
        self, prompts: list[list[int]], batch: Sequence[Sequence[int]], max_length: int, kwargs: Mapping[str, Any]
    ) -> Prefix | None:
        """What the prompts of a batch begin with together, prefilled; None when they are computed by themselves."""
        if not self._prefills or not self._prefill.suits(max_length, kwargs):
            return None
        most = len(prompts[0])
        if len(batch) == 1:
            most = int(most * self._shared[batch[0][0]])
        try:
            with self._autocast():
                return self._prefill.of(prompts, most)
        except TreeUnsuitable as why:
            warnings.warn(f"Prompts that begin alike are computed one by one: {why}", stacklevel=2)
            self._prefills = False
            return None

    def _check_fed(self, expected: list[int], fed: list[int]) -> None:
        if fed != expected:
            raise CaptureError(f"a row of {len(fed)} tokens is not what its request asks ({len(expected)}); {UNKNOWN}.")

    def _hold(
        self,
        index: int,
        input_ids: list[int],
        generated: list[int],
        rows: Rows,
        batch: Sequence[int],
        n_truncated: int,
        before: Sequence[Part] = (),
    ) -> _Captured:
        """Keep what was captured of a request until its answer is known."""
        key, prompt, response = self._serves().requests[index]
        columns = sample_columns(prompt, response or "", len(input_ids), batch)
        fields = {**columns, **key._asdict(), "n_truncated": n_truncated}
        self._held.append(_Captured(index, fields, input_ids, generated, rows, before))
        return self._held[-1]

    def _store(self) -> None:
        """A batch is answered: give its samples away."""
        held, self._held = self._held, []
        call = self._serves()
        new = [each for each in held if call.requests[each.index].key not in self._answered]
        if new:
            self._sink([self._sample(each, call.answers[each.index]) for each in new])

    def _sample(self, member: _Captured, answer: Any) -> Sample:
        fields = member.fields
        if isinstance(answer, str):
            if answer != fields["response"]:
                raise CaptureError(
                    f"{fields['task']} document {fields['doc_id']}: captured {fields['response']!r}, lm-eval has {answer!r}."
                )
        else:
            fields["logprob"], fields["is_greedy"] = answer
            fields["scoring"] = "stock"
        kept = set(self._positions.resolve(len(member.input_ids), len(member.generated_ids)))
        where = [index for index, position in enumerate(member.rows.positions) if position in kept]
        return Sample(fields, member.input_ids, member.generated_ids, [*member.before, Part(member.rows, where)])
