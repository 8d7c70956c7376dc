"""Continuations scored over the prefix tree of all of them: (context, continuation) tokens -> log-likelihoods, with activations.

Every token of the tree is computed once, and logits only at tokens that score something. Knows nothing of texts, nor of benchmarks.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from AutomaticEval.capture.padding_probes import is_tested
from AutomaticEval.capture.tree.prefix_tree import Array, Branch, PrefixTree, chosen, n_shared
from AutomaticEval.capture.tree.rows import WalkRows
from AutomaticEval.capture.tree.suitability import check_scores, most_columns, refuse_unsuitable
from AutomaticEval.capture.tree.walk import Stretch, Walk, sent
from AutomaticEval.errors import PromptError
from AutomaticEval.models.architecture.forward_call import input_device
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.samples import Part
from AutomaticEval.selection import Selection
from AutomaticEval.thinking.where import Thinking

TOKENS_A_FORWARD = {"cpu": 256, "cuda": 2048}
"""Tokens a forward, by kind of device, where the number is not measured."""
CHECKED = 32
"""The most tokens of a request that is compared with a plain forward. A model of an untested kind is checked with whole requests."""


WHOLE = 2**62
"""A length that no request has: nothing is cut to it."""


class Scored(NamedTuple):
    """One continuation's score."""

    request: int
    """The number of its request in the list."""

    logprob: float
    """Sum over the continuation's tokens, in nats."""

    is_greedy: bool
    """Whether each of its tokens is the likeliest."""

    logprobs: Tensor
    """[n_continuation], in nats."""

    parts: Sequence[Part]
    """Where its rows are; empty without a selection."""


class Cut(NamedTuple):
    """A request, cut to the model's context."""

    context: Sequence[int]
    continuation: Sequence[int]
    n_truncated: int
    """How many tokens were cut off on the left, as lm-eval cuts them."""

    @property
    def fed(self) -> list[int]:
        """The tokens that the model is fed: all but the last."""
        return [*self.context, *self.continuation[:-1]]

    @classmethod
    def of(cls, context: Sequence[int], continuation: Sequence[int], max_length: int) -> Cut:
        """A request cut to the model's context of max_length tokens. Raises PromptError when one part is empty, or the continuation too long."""
        if not len(context) or not len(continuation) or len(continuation) > max_length:
            raise PromptError(
                f"a context of {len(context)} and a continuation of {len(continuation)} tokens; each needs one at least, and the "
                f"continuation {max_length} at most."
            )
        n_truncated = max(0, len(context) + len(continuation) - (max_length + 1))
        return cls(context[n_truncated:] if n_truncated else context, continuation, n_truncated)


@dataclass(frozen=True)
class ScoringOptions:
    """How a list of requests is scored."""

    selection: Selection | None = None
    """What to capture; None captures nothing."""

    tokens: int | None = None
    """The number of tokens a forward. None: that of TOKENS_A_FORWARD."""

    dtype: torch.dtype | None = torch.float32
    """The dtype in which the log-softmax is computed. None: the dtype of the logits, as in lm-eval."""

    share: tuple[int, int] = (0, 1)
    """(rank, n_ranks) of the processes that share the requests. Each scores the requests that end in its part of the tree."""


class _Targets(NamedTuple):
    """Every token that is scored, ordered by the node whose logits score it. Each field is [n_scored]."""

    nodes: Array
    places: Array
    """The number of the token among those of all continuations, one request after the other."""
    tokens: Array
    """The token ids."""


class _Launched(NamedTuple):
    """A stretch whose forward is launched, and perhaps not computed yet."""

    stretch: Stretch
    """Its log-probabilities are [n_scored], those of the targets alone. They and `was_fed` are on the CPU after the events."""
    places: Array
    """[n_scored], of the targets that it scores."""
    are_likeliest: Tensor
    """[n_scored], bool, on the CPU after the events."""
    events: list[Any]
    """On a GPU: what to wait for."""


@dataclass
class TreeScoring:
    """Scores a list of requests over their prefix tree.

    requests: cut to the model's context. answered: the numbers of requests that need not be scored.
    The forwards do not depend on which requests are answered or scored by other processes; only forwards that nothing needs are left out.
    Raises TreeUnsuitable for a model that cannot be scored over a prefix tree.
    """

    loaded: LoadedModel
    requests: Sequence[Cut]
    options: ScoringOptions = ScoringOptions()
    answered: Collection[int] = ()
    wanted: Array = field(init=False)
    """[n_requests], bool: the requests that this process scores."""
    walk: Walk = field(init=False)

    def __post_init__(self) -> None:
        self.tree = PrefixTree(_all_fed(self.requests))
        tokens = self.options.tokens or TOKENS_A_FORWARD.get(self.loaded.model.device.type, 256)
        longest = int(self.tree.depths.max(initial=0)) + 1
        refuse_unsuitable(self.loaded.model, longest)
        limit = most_columns(self.loaded.model)
        self.tokens = tokens if limit is None else min(tokens, limit - longest)
        self.bounds = np.append(np.arange(0, self.tree.n_nodes, self.tokens), self.tree.n_nodes)
        self._ends = self.tree.last[self.tree.branch_of]
        self.wanted = self._wanted_here()
        n_tokens = np.array([len(request.continuation) for request in self.requests], np.int64)
        self._places = np.concatenate([[0], np.cumsum(n_tokens)])
        """[n_requests + 1], where the tokens of each request's continuation begin among those of all."""
        self._targets = self._planned()
        kept = self.tree.marked(self._positions)
        scored = np.zeros(self.tree.n_nodes, dtype=bool)
        scored[self._targets.nodes] = True
        self._rows = WalkRows(self.tree, self.bounds, kept, self.loaded.tokenizer)
        self.walk = Walk(self.loaded, self.tree, scored, self.options.dtype, self.options.selection, kept)
        self._logprobs: Tensor | None = None
        """[n_scored], of the tokens of all continuations; NaN where there is none yet. None until the first."""
        self._greedy = np.zeros(self._places[-1], dtype=bool)
        self._n_ended = 0
        """How many branches have ended."""

    def _wanted_here(self) -> Array:
        """[n_requests], bool: the requests that this process scores."""
        rank, n_ranks = self.options.share
        owner = self._stretch_of(self._ends) * n_ranks // max(1, len(self.bounds) - 1)
        wanted: Array = owner == rank
        wanted[list(self.answered)] = False
        return wanted

    def _planned(self) -> _Targets:
        """The tokens that are scored."""
        nodes = np.empty(self._places[-1], np.int64)
        for branch in self.tree.branches():
            for index in branch.members:
                own = branch.path[len(self.requests[index].context) - 1 :]
                nodes[self._places[index] : self._places[index + 1]] = own
        continuations = itertools.chain.from_iterable(request.continuation for request in self.requests)
        tokens = np.fromiter(continuations, np.int64, len(nodes))
        order = np.argsort(nodes, kind="stable")
        return _Targets(nodes[order], order, tokens[order])

    def _positions(self, index: int) -> range:
        """The positions of a request whose rows are kept by this process."""
        if self.options.selection is None or not self.wanted[index]:
            return range(0)
        context, continuation, _ = self.requests[index]
        without = Thinking.without(len(context))
        return self.options.selection.positions.resolve(len(context), len(continuation), without)

    def _needed(self) -> list[tuple[int, int]]:
        """The stretches (start, stop) that hold a token of a request that this process scores."""
        leads = self.tree.leading_to(self._ends[self.wanted])
        return [(start, stop) for start, stop in itertools.pairwise(self.bounds.tolist()) if leads[start:stop].any()]

    def _stretch_of(self, nodes: Array) -> Array:
        """The number of the stretch that each node is in."""
        numbers: Array = np.searchsorted(self.bounds, nodes, side="right") - 1
        return numbers

    @property
    def n_alone(self) -> int:
        """How many tokens the requests of this process would feed one by one; equal requests count once."""
        return int(self.tree.lengths[np.unique(self.tree.branch_of[self.wanted])].sum())

    def check(self) -> None:
        """Score two requests over a tree of their own, and compare the second one's scores with those of a plain forward.

        The two begin alike and then part. They are the first of the longest such pair, cut to CHECKED tokens, and the later half of the second
        is scored. Their tree takes two forwards, so that both the mask and the cache matter. A model of an untested kind is also checked with
        two requests that share nothing, and with whole requests. Raises TreeUnsuitable when scores disagree.
        """
        is_known = is_tested(self.loaded.model)
        self._check(self._pair(CHECKED if is_known else WHOLE, sharing=True))
        if not is_known:
            apart = self._pair(WHOLE, sharing=False)
            if len(apart) == 2:
                self._check(apart)

    def _pair(self, most: int, *, sharing: bool) -> list[list[int]]:
        """Two requests that follow each other in the tree: the first of those with most tokens. One request alone, when there is no such pair.

        sharing: whether the two begin alike, or share nothing. most: longer requests are cut to so many tokens.
        """
        longest: list[list[int]] = []
        before: list[int] = []
        for branch in self.tree.branches():
            context, continuation, _ = self.requests[branch.members[0]]
            sequence = [*context, *continuation]
            is_pair = bool(before) and bool(branch.shared) == sharing and branch.shared < len(before) - 1
            n_dropped = max(0, min(max(len(before), len(sequence)) - most, branch.shared - 1))
            cut = slice(n_dropped, n_dropped + most)
            candidate = [before[cut], sequence[cut]] if is_pair else [sequence[cut]]
            if not longest or (len(candidate), len(candidate[-1])) > (len(longest), len(longest[-1])):
                longest = candidate
            before = sequence
        return longest

    def _check(self, sequences: Sequence[Sequence[int]]) -> None:
        """Compare the scores of the last of one or two requests with those of a plain forward. Raises TreeUnsuitable."""
        if not sequences:
            return
        *others, last = sequences
        checked = Cut(last[: len(last) // 2], last[len(last) // 2 :], 0)
        cuts = [*(Cut(each[:-1], each[-1:], 0) for each in others), checked]
        tokens = min(self.tokens, _in_two([cut.fed for cut in cuts]))
        options = replace(self.options, selection=None, tokens=tokens, share=(0, 1))
        for scored in itertools.chain.from_iterable(TreeScoring(self.loaded, cuts, options).results()):
            if scored.request == len(cuts) - 1:
                check_scores(self.loaded.model, checked.context, checked.continuation, scored.logprobs)

    def results(self) -> Iterator[list[Scored]]:
        """The scores of the requests, each as soon as its last token is computed.

        What a forward gives is taken when the next one is launched, so that a GPU computes while the host works.
        """
        branches, self._n_ended = self.tree.branches(), 0
        before: _Launched | None = None
        for launched in map(self._launched, self.walk.over(self._needed())):
            if before is not None:
                yield from self._done(before, branches)
            before = launched
        if before is not None:
            yield from self._done(before, branches)

    def _launched(self, stretch: Stretch) -> _Launched:
        """A stretch with its numbers on their way to the CPU. Nothing waits here."""
        first, last = np.searchsorted(self._targets.nodes, (stretch.start, stretch.stop))
        nodes, places, tokens = (column[first:last] for column in self._targets)
        device = stretch.logprobs.device
        lines, of_tokens = sent([np.cumsum(np.diff(nodes, prepend=nodes[:1]) != 0), tokens], device)
        logprobs = stretch.logprobs[lines, of_tokens].to("cpu", non_blocking=True)
        likeliest = likeliest_tokens(stretch.logprobs) if len(lines) else lines
        are_likeliest = (likeliest[lines] == of_tokens).to("cpu", non_blocking=True)
        was_fed = None if stretch.was_fed is None else stretch.was_fed.to("cpu", non_blocking=True)
        devices = {each for each in (device, input_device(self.loaded.model)) if each.type == "cuda"}
        events = [torch.cuda.current_stream(each).record_event() for each in devices]
        return _Launched(stretch._replace(logprobs=logprobs, was_fed=was_fed), places, are_likeliest, events)

    def _done(self, launched: _Launched, branches: Iterator[Branch]) -> Iterator[list[Scored]]:
        """The scores of the requests that end in a stretch. branches: those that no earlier stretch ended."""
        stretch = launched.stretch
        self._take(launched)
        n_ended = int(np.searchsorted(self.tree.last, stretch.stop))
        done = [
            self._scored(index, branch.path)
            for branch in itertools.islice(branches, n_ended - self._n_ended)
            for index in branch.members
            if self.wanted[index]
        ]
        self._n_ended = n_ended
        self._rows.forget(stretch.stop)
        if done:
            yield done

    def _take(self, launched: _Launched) -> None:
        """Take the log-probabilities and the kept rows of a stretch."""
        for event in launched.events:
            event.synchronize()
        logprobs = launched.stretch.logprobs
        if self._logprobs is None:
            self._logprobs = torch.full((len(self._greedy),), float("nan"), dtype=logprobs.dtype)
        self._logprobs[torch.from_numpy(launched.places)] = logprobs
        self._greedy[launched.places] = launched.are_likeliest.numpy()
        if launched.stretch.recording is not None:
            self._rows.take(launched.stretch)

    def _scored(self, index: int, path: Array) -> Scored:
        assert self._logprobs is not None
        own = slice(self._places[index], self._places[index + 1])
        logprobs, is_greedy = self._logprobs[own], bool(self._greedy[own].all())
        parts = self._rows.parts(chosen(path, self._positions(index))) if self.options.selection is not None else ()
        return Scored(index, float(logprobs.sum()), is_greedy, logprobs, parts)


def likeliest_tokens(logprobs: Tensor) -> Tensor:
    """[n]: the token of each line [d_vocab] with the largest number; of equal ones the first."""
    if logprobs.device.type == "cpu" and logprobs.dtype == torch.float32:  # torch takes several times as long as numpy
        return torch.from_numpy(logprobs.numpy().argmax(-1))
    return logprobs.argmax(-1)


def _all_fed(requests: Iterable[Cut]) -> Iterator[Array]:
    """The tokens that each request feeds. A context that several requests share, the very same list, is made an array once."""
    context: Sequence[int] | None = None
    ids = np.empty(0, ">u4")
    for request in requests:
        if request.context is not context:
            context, ids = request.context, np.asarray(request.context, ">u4")
        own = request.continuation[:-1]
        yield np.concatenate([ids, np.asarray(own, ">u4")]) if len(own) else ids


def _in_two(fed: Sequence[Sequence[int]]) -> int:
    """How many tokens a forward may take so that the check takes two forwards, which tests both the mask and the cache.

    fed: one or two sequences. The second forward begins within the tokens that the last sequence does not share. When there is only one such
    token, it begins before that token, where the mask must hide the other sequence's own tokens from it.
    """
    n_first = len(fed[0]) if len(fed) == 2 else 0
    shared = n_shared(*fed) if len(fed) == 2 else 0
    n_own = len(fed[-1]) - shared
    return n_first + (n_own + 1) // 2 if n_own > 1 else max(shared, (n_first + 2) // 2)
