"""`CapturingHFLM`: lm-eval's own `hf` model, which knows of every forward which requests it serves, and has them captured.

No scoring code is copied: the scores are lm-eval's. What is kept of a forward is `batch_capture.py`'s affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from AutomaticEval.capture.batch_independence import Span, company_of
from AutomaticEval.capture.draws import drawing, random_numbers
from AutomaticEval.capture.generation import refuse_logits_fed_again
from AutomaticEval.capture.graph.decoding import again_without_graphs, decoding
from AutomaticEval.capture.graph.way import Way, way_of
from AutomaticEval.capture.reduced_samples import SampleReducer
from AutomaticEval.capture.tree.score import Cut
from AutomaticEval.errors import BenchmarkError, CaptureError, TreeUnsuitable, warn
from AutomaticEval.evaluation.benchmark_options import WHY_NOT, check_generation, check_scoring
from AutomaticEval.evaluation.harness.batch_capture import BatchCapture, PromptRows, ScoredRow, Sink, check_fed
from AutomaticEval.evaluation.harness.batches import AnswerHook, recording
from AutomaticEval.evaluation.harness.call import UNKNOWN, Call, Request, Workload
from AutomaticEval.evaluation.harness.generated import AnswerReader
from AutomaticEval.evaluation.harness.refusals import document, refuse_generating, refuse_pair, refuse_thinking
from AutomaticEval.evaluation.harness.request_keys import RequestKeys
from AutomaticEval.evaluation.harness.row_groups import RowGroups
from AutomaticEval.evaluation.harness.shared_prefixes import SharedPrefixes
from AutomaticEval.evaluation.harness.tokens import EncodingHFLM, rolling_windows, texts_of
from AutomaticEval.evaluation.harness.tree_scores import TreeScorer
from AutomaticEval.evaluation.screen import SCORING, one_call
from AutomaticEval.models.architecture.forward_call import cache_name
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.divided.division import refuse_divided
from AutomaticEval.models.edited_positions import BatchSequence, given_mask, told
from AutomaticEval.models.recording import Recording
from AutomaticEval.models.refused.unsuited import refuse_untrue
from AutomaticEval.selection import Selection

NO_SCORE = (float("nan"), False)
"""Stands in for the score of a request that is not computed by lm-eval here."""


class CapturingHFLM(EncodingHFLM):
    """HFLM that hands every captured sample to a sink.

    selection: what is captured; None captures nothing. scoring: "tree" scores log-likelihoods over the prefix tree of all requests, if the
    model can be served so; "stock" scores in lm-eval's own batches. generation: graph, eager or auto; stock scoring is eager. workload: which
    requests there are, and which are computed here. kwargs: HFLM's own.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        selection: Selection | None,
        sink: Sink,
        *,
        scoring: str = "tree",
        generation: str = "auto",
        workload: Workload = Workload(),
        **kwargs: Any,
    ) -> None:
        refuse_untrue(loaded.model)  # lm-eval would silently change its mode
        refuse_divided(loaded.model, "a benchmark")
        check_scoring(scoring)
        check_generation(generation, scoring)
        super().__init__(loaded, has_stock_batches=scoring == "stock", **kwargs)
        self._selection, self._scoring = selection, scoring
        self._generation = "eager" if scoring == "stock" else generation
        sink = SampleReducer(selection).before(sink)
        self._workload, self._ranks = workload, workload.ranks
        self._keys = RequestKeys(workload.doc_ids, is_captured=selection is not None)
        self._capture = None if selection is None else BatchCapture(loaded, selection, sink)
        self._groups = RowGroups(loaded.model, keeps_batches=scoring == "stock")
        self._prefixes = SharedPrefixes(loaded, selection, self._autocast, is_wanted=scoring == "tree")
        measures = str(self.batch_size).startswith("auto")
        self._tree = TreeScorer(loaded, selection, sink, self._ranks, measures, self.max_length, self.softmax_dtype)
        self._call: Call | None = None
        """The call of lm-eval that is being served."""
        self._is_probing = False
        refuse_thinking(kwargs, loaded.tokenizer, {})
        if self._capture is not None:
            self._capture.cuts_thinking_at(self.think_end_token)

    @property
    def n_tokens(self) -> tuple[int, int]:
        """(tokens that the requests scored over a tree here would have fed one by one, tokens that were computed)."""
        return self._tree.n_alone, self._tree.n_computed

    def set_cache_hook(self, cache_hook: Any) -> None:
        raise BenchmarkError(f"use_cache: {WHY_NOT['use_cache']}")

    # The calls of lm-eval.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        keyed = [Request(key, *request.args) for key, request in self._keys.of(requests)]
        for key, prompt, response in keyed:  # lm-eval would fail over these while it encodes
            if not response or (not prompt and not self.tok_encode(response, add_special_tokens=False)):
                refuse_pair(document(key.task, key.doc_id), [0], [], (prompt, response or ""), self.max_length)
        self._encode_ahead(texts_of(request.args for request in requests))
        with self._serving(keyed, placeholder=NO_SCORE) as call:
            own = super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self._ranks.is_first)
            return call.complete(own)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        keyed = self._keys.of(requests)
        self._refuse_generating(keyed)
        prompts = [request.args[0] for request in requests]
        self._encode_ahead(prompts)
        groups = self._prefixes.expect(prompts)
        asked = [Request(key, prompt, None) for (key, _), prompt in zip(keyed, prompts, strict=True)]
        with self._serving(asked, placeholder="", groups=groups) as call:
            own = super().generate_until(requests, disable_tqdm=disable_tqdm or not self._ranks.is_first)
            return call.complete(own)

    def _refuse_generating(self, keyed: Sequence[tuple[Any, Instance]]) -> None:
        """Raises BenchmarkError, SelectionError for answers that cannot be generated, or not captured."""
        first_of_kind = {(key.task, repr(each.args[1])): (key, each.args[1]) for key, each in reversed(keyed)}
        for key, how in first_of_kind.values():
            where = document(key.task, key.doc_id)
            refuse_generating(self.model, self._selection, where, how, self.max_length, self.max_gen_toks)
        for key, request in keyed if self._selection is not None else ():
            if not request.args[0] and not self.tok_encode(""):
                raise BenchmarkError(
                    f"the task {key.task!r} asks document {key.doc_id} with an empty prompt, which feeds nothing that "
                    "could be captured; run it without --capture_activations."
                )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [rolling_windows(self, request.args[0]) for request in requests]
        keyed = [
            Request(key._replace(window=number), *map(self._text, window))
            for (key, _), own in zip(self._keys.of(requests), windows, strict=True)
            for number, window in enumerate(own)
        ]
        stock = None
        with self._serving(keyed, placeholder=NO_SCORE) as call:
            call.tokens = dict(enumerate(window for own in windows for window in own))
            if not self._over_tree(call, disable_tqdm=disable_tqdm):
                stock = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not self._ranks.is_first)
            scored = iter(call.complete([call.answers.get(index) for index in range(len(keyed))]))
        totals: list[float] = [sum(next(scored)[0] for _ in own) for own in windows]
        if stock is not None and len(call.computed) == len(keyed) and repr(totals) != repr(stock):
            raise CaptureError(f"lm-eval's sums over windows are not ours; {UNKNOWN}.")
        return totals

    @contextmanager
    def _serving(self, requests: list[Request], placeholder: Any, groups: Sequence[int] = ()) -> Iterator[Call]:
        """Follow lm-eval through one call. groups: of the requests, to be batched one after the other."""
        self._call = call = Call(requests, self._workload, self._hand_on)
        stock = self.cache_hook
        self.cache_hook: Any = AnswerHook(call.hear)
        try:
            with one_call(), recording(call.begins, placeholder, groups):
                yield call
        finally:
            self._call, self.cache_hook = None, stock
            if self._capture is not None:
                self._capture.drop()
            self._encode_ahead(())
            self._prefixes.forget()

    def _served(self) -> Call:
        """The call of lm-eval that is being served."""
        if self._call is None:
            raise CaptureError(f"lm-eval ran the model outside a request; {UNKNOWN}.")
        return self._call

    def _hand_on(self) -> None:
        """A batch is answered: give its samples away."""
        if self._capture is not None:
            self._capture.hand_on(self._served(), self._workload.answered)

    # Log-likelihoods.

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        call = self._served()
        listed = call.listed(requests)
        for index, context, continuation in listed:
            key, prompt, response = call.requests[index]
            refuse_pair(
                document(key.task, key.doc_id), context, continuation, (prompt, response or ""), self.max_length
            )
        if self._over_tree(call, disable_tqdm=kwargs.get("disable_tqdm", False)):
            return [call.answers.get(index, NO_SCORE) for index in range(len(listed))]
        return super()._loglikelihood_tokens(listed, *args, **kwargs)

    def _over_tree(self, call: Call, *, disable_tqdm: bool) -> bool:
        """Score what a call listed over its prefix tree. False, with a warning, when the model cannot be served so."""
        if self._scoring != "tree" or not call.tokens:
            return False
        bar = None if disable_tqdm or not self._ranks.is_first else SCORING
        try:
            with self._autocast():
                self._tree.score(call, bar)
        except TreeUnsuitable as why:
            warn(f"Scoring request by request, as --scoring stock does: {why}")
            return False
        return True

    def _autocast(self) -> torch.autocast:
        """The precision that lm-eval sets around its own forwards."""
        kind = self.mixed_precision_dtype
        return torch.autocast(self.device.type, kind, enabled=kind is not None)

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        """batch_size=auto probes with made-up batches; they serve no request and are not captured."""
        self._is_probing = True
        try:
            size = super()._detect_batch_size(*args, **kwargs)
        finally:
            self._is_probing = False
        return min(self._ranks.gathered(int(size)))

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self._is_probing:
            probed: Tensor = super()._model_call(inps, attn_mask, labels)
            return probed
        rows = [self._scored_row(requests) for requests in self._served().fed(len(inps))]
        lengths = [len(row.fed) for row in rows]
        groups = self._groups.of([Span(each, each) for each in lengths])  # padding on the right changes nothing
        parts = []
        for group in groups:
            width = inps.shape[1] if len(groups) == 1 else max(lengths[row] for row in group)
            parts.append(self._scored([rows[number] for number in group], inps[group, :width]))
        if len(groups) == 1:
            return parts[0]
        n_virtual = parts[0].shape[1] - max(lengths[row] for row in groups[0])  # a soft prompt stands before each row
        out = parts[0].new_zeros((len(inps), n_virtual + inps.shape[1], parts[0].shape[-1]))
        for group, logits in zip(groups, parts, strict=True):
            out[group, : logits.shape[1]] = logits
        return out

    def _scored_row(self, requests: Sequence[int]) -> ScoredRow:
        """What a row that serves these requests holds, by what they ask."""
        tokens = self._served().tokens
        context, continuation, n_truncated = Cut.of(*tokens[requests[0]], self.max_length)
        return ScoredRow([*context, *continuation], {index: tokens[index][1] for index in requests}, n_truncated)

    def _scored(self, rows: Sequence[ScoredRow], ids: Tensor) -> Tensor:
        """The logits of rows that are run together [n_rows, width, d_vocab]."""
        forward = super()._model_call
        sequences = [BatchSequence(0, row.n_prompt, len(row.sequence) - row.n_prompt) for row in rows]
        with told(self.model, sequences):
            if self._capture is None:
                plain: Tensor = forward(ids)
                return plain
            return self._capture.scored(self._served(), rows, ids, forward)

    # Generation.

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        requests = [index for (index,) in self._served().fed(len(context))]
        mask = kwargs.pop("attention_mask")
        lengths = [int(row.sum()) for row in mask]
        n_new = max_length - context.shape[1]
        n_most = max(n_new, kwargs.get("max_new_tokens") or 0)
        spans = [Span(each, each + n_most - 1) for each in lengths]
        refuse_logits_fed_again(self.model, self._selection, spans)
        answers: dict[int, Tensor] = {}
        way = self.way(kwargs)
        for group in self._groups.of(spans, company_of(self.model, kwargs, spans)):
            width = max(lengths[row] for row in group)
            own, pads = [requests[row] for row in group], [width - lengths[row] for row in group]
            prompts = self._prompt_rows(own, context[group, -width:], mask[group, -width:], pads, requests[0])
            together = partial(self._generated, prompts, width + n_new, stop, kwargs, way)
            answers |= zip(group, again_without_graphs(together, way)[:, width:], strict=True)
        if self._capture is not None and kwargs.get("do_sample") and self._scoring == "stock":
            self._capture.note_random_state(self.device)
        longest = max(map(len, answers.values()))
        out = context.new_full((len(context), longest), self.tokenizer.pad_token_id)
        for row, answer in answers.items():
            out[row, : len(answer)] = answer
        return torch.cat([context, out], 1)

    def _prompt_rows(
        self, requests: list[int], context: Tensor, mask: Tensor, pads: list[int], first: int
    ) -> PromptRows:
        """Prompts that are answered together; when they are captured, compared with what their requests ask.

        first: the first request of the whole batch.
        """
        tokens = [row[pad:].tolist() for row, pad in zip(context, pads, strict=True)]
        n_truncated = [0] * len(tokens)
        if self._capture is not None:
            n_truncated = [self._n_cut_off(index, own, first) for index, own in zip(requests, tokens, strict=True)]
        return PromptRows(requests, context, mask, pads, tokens, n_truncated)

    def _n_cut_off(self, request: int, fed: list[int], first: int) -> int:
        """How many tokens of a request's prompt are not fed. Raises CaptureError when what is fed is not its end."""
        asked = self._served().requests
        prompt = asked[request].prompt
        whole = self._prompt_ids(prompt, asked[first].prompt)
        check_fed(whole[len(whole) - len(fed) :], fed)
        return len(whole) - len(fed)

    def _draws(self, requests: Sequence[int], kwargs: Mapping[str, Any]) -> list[np.random.Generator] | None:
        """What each request's answer is sampled by: draws of torch's seed, the request and its prompt. None for greedy decoding, and for
        lm-eval's own sampling."""
        if self._scoring == "stock" or not kwargs.get("do_sample"):
            return None
        asked = self._served().requests
        seed = torch.initial_seed()  # which lm-eval set
        return [random_numbers(seed, "response", *asked[index].key, asked[index].prompt) for index in requests]

    def way(self, kwargs: Mapping[str, Any] = {}) -> Way:
        """How answers are generated. kwargs: for transformers' generate. Raises DeviceUnavailable."""
        with self._autocast():
            return way_of(self.model, self._generation, kwargs)

    def _generated(
        self, prompts: PromptRows, max_length: int, stop: list[str], kwargs: Mapping[str, Any], way: Way
    ) -> Tensor:
        """The token ids of prompts and answers that are generated together [n_prompts, width + longest answer]."""
        prefix = self._prefixes.of(prompts, max_length, kwargs)
        context, given = prompts.context, {**kwargs, "attention_mask": prompts.mask}
        if prefix is not None:
            context = prefix.arranged(context, prompts.pads)
            given["attention_mask"] = prefix.arranged(prompts.mask, prompts.pads)
            if way.kind == "eager":
                given[str(cache_name(self.model))] = prefix.cache(len(context))
        stock = partial(super()._model_generate, context, max_length, stop)
        longest = max(max_length, context.shape[1] + (kwargs.get("max_new_tokens") or 0))

        def generate(recording: Recording | None = None) -> Tensor:
            drawn = drawing(self.model, self._draws(prompts.requests, kwargs))
            masked = given_mask(self.model, given["attention_mask"])
            with drawn, masked, decoding(self.model, way, (len(context), longest), recording, prefix) as extra:
                out: Tensor = stock(**{**given, **extra})
            return out

        if self._capture is None:
            return generate()
        end = self.model.generation_config.eos_token_id
        reader = AnswerReader(self.tok_decode, stop, end, self.think_end_token)
        return self._capture.generated(self._served(), prompts, prefix, reader, generate)
