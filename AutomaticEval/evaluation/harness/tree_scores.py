"""Scores lm-eval's log-likelihood requests over the prefix tree of all of them, in the place of lm-eval's own batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from AutomaticEval.capture.keeping import sample_columns
from AutomaticEval.capture.tree.forward_size import measured_tokens
from AutomaticEval.capture.tree.score import Cut, Scored, ScoringOptions, TreeScoring
from AutomaticEval.capture.tree.suitability import refuse_unsuitable
from AutomaticEval.errors import TreeUnsuitable
from AutomaticEval.evaluation.harness.call import Call
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.processes import Ranks
from AutomaticEval.samples import Sample
from AutomaticEval.selection import Selection


@dataclass
class TreeScorer:
    """Scores one call of lm-eval after the other, and hands the captured samples to a sink."""

    loaded: LoadedModel
    selection: Selection | None
    sink: Callable[[list[Sample]], None]
    ranks: Ranks
    measures: bool
    """Measure once how many tokens a forward should take; otherwise a fixed number is taken."""

    max_length: int
    dtype: torch.dtype | None
    """The dtype in which the log-softmax is computed. None: that of the logits."""

    n_computed: int = 0
    """Tokens fed so far, by this process."""
    n_alone: int = 0
    """Tokens that these requests would have fed one by one, equal requests counted once."""

    _tokens: int | None = None
    """The tokens of a forward, where they are measured or stand in the run that is resumed; None until then."""

    def score(self, call: Call, bar: str | None) -> None:
        """Answer the requests of a call. bar: the name of the progress bar; None shows no bar.

        Raises TreeUnsuitable, in all processes, before anything is answered.
        """
        requests = [Cut.of(*call.tokens[index], self.max_length) for index in range(len(call.tokens))]
        answered = call.take_earlier()
        refusal = None
        try:
            how = ScoringOptions(
                self.selection, self._tokens_for(call, requests), self.dtype, (self.ranks.rank, self.ranks.n_ranks)
            )
            scoring = TreeScoring(self.loaded, requests, how, answered)
            if len(answered) < len(requests):
                scoring.check()
        except TreeUnsuitable as unsuitable:
            refusal = str(unsuitable)
        for each in self.ranks.gathered(refusal):
            if each is not None:
                raise TreeUnsuitable(each)
        with tqdm(
            total=len(requests), initial=len(answered), desc=bar, unit="request", disable=bar is None
        ) as progress:
            for batch in scoring.results():
                self._hand_on(call, requests, batch, scoring)
                progress.update(len(batch))
        self.n_computed += scoring.walk.n_computed
        self.n_alone += scoring.n_alone

    def _tokens_for(self, call: Call, requests: list[Cut]) -> int | None:
        """The tokens of a forward: those of the run that is resumed, or measured ones; None when they are not to be measured."""
        if self._tokens is None:
            self._tokens = call.earlier_tokens
        if self.measures and self._tokens is None:
            lengths = [len(request.context) + len(request.continuation) for request in requests]
            refuse_unsuitable(self.loaded.model, max(lengths) - 1)  # in all processes, or in none
            n_past = sum(lengths) // len(lengths) // 2
            self._tokens = min(self.ranks.gathered(measured_tokens(self.loaded, n_past)))
        return self._tokens

    def _hand_on(self, call: Call, requests: list[Cut], batch: list[Scored], scoring: TreeScoring) -> None:
        for scored in batch:
            call.answer(scored.request, (scored.logprob, scored.is_greedy))
        if self.selection is not None:
            self.sink([self._sample(call, requests[scored.request], scored, scoring) for scored in batch])

    def _sample(self, call: Call, request: Cut, scored: Scored, scoring: TreeScoring) -> Sample:
        key, prompt, response = call.requests[scored.request]
        fields: dict[str, Any] = {
            **sample_columns(prompt, response or "", len(request.context), (1, scoring.tokens)),
            **key._asdict(),
            "n_truncated": request.n_truncated,
            "logprob": scored.logprob,
            "is_greedy": scored.is_greedy,
            "scoring": "tree",
        }
        return Sample(fields, request.context, request.continuation, scored.parts)
