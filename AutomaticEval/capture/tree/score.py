"""Continuations scored over the prefix tree of all of them: (context, continuation) tokens -> log-likelihoods, with activations.

Every token of the tree is computed once, and logits only where they score something. Knows nothing of texts, nor of benchmarks.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from AutomaticEval.capture.batch_independence import is_tested
from AutomaticEval.capture.tree.prefix_tree import Array, PrefixTree, n_shared
from AutomaticEval.capture.tree.rows import Pieces
from AutomaticEval.capture.tree.suitability import check_scores, most_columns, refuse_unsuitable
from AutomaticEval.capture.tree.walk import Stretch, Walk
from AutomaticEval.errors import PromptError
from AutomaticEval.models.loading import LoadedModel
from AutomaticEval.samples import Part
from AutomaticEval.selection import Selection

TOKENS_A_FORWARD = {"cpu": 256, "cuda": 2048}
"""Unless it is measured."""
CHECKED = 32
"""Tokens of the requests that are compared with plain forwards, at most; of a kind of model that is not tested, all."""


class Scored(NamedTuple):
    """One continuation's score."""

    request: int
    """Which one, by its place in the list."""

    logprob: float
    """Sum over the continuation's tokens, in nats."""

    is_greedy: bool
    """Whether each of its tokens is the likeliest."""

    logprobs: Tensor
    """[n_continuation], each token's."""

    parts: Sequence[Part]
    """Its rows; none without a selection."""


class Cut(NamedTuple):
    """A request, cut to the model's context."""

    context: Sequence[int]
    continuation: Sequence[int]
    n_truncated: int
    """Tokens cut off on the left, as lm-eval does."""

    @property
    def fed(self) -> list[int]:
        """What the model is given: all but the last token."""
        return [*self.context, *self.continuation[:-1]]

    @classmethod
    def of(cls, context: Sequence[int], continuation: Sequence[int], max_length: int) -> Cut:
        """Raises PromptError when one is empty, or the continuation alone is longer than the context."""
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
    """How many tokens a forward takes. None: TOKENS_A_FORWARD."""

    dtype: torch.dtype | None = torch.float32
    """The dtype in which the log-softmax is computed. None: that of the logits, as in lm-eval."""

    share: tuple[int, int] = (0, 1)
    """(rank, n_ranks) of the processes that share the requests: each scores a stretch of the tree."""


class _Targets(NamedTuple):
    """Every token that is scored, by the node whose logits score it."""

    nodes: Array
    requests: Array
    places: Array
    """Which token of the continuation."""
    tokens: Array


@dataclass
class TreeScoring:
    """One list of requests over its prefix tree.

    requests: cut to the model's context. answered: those that need not be scored.
    Forwards are the same whatever is answered or shared, but for those that nothing needs.
    Raises TreeUnsuitable for a model that cannot be served.
    """

    loaded: LoadedModel
    requests: Sequence[Cut]
    options: ScoringOptions = ScoringOptions()
    answered: Collection[int] = ()
    wanted: Array = field(init=False)
    """[n_requests], bool: those that are scored here."""
    walk: Walk = field(init=False)

    def __post_init__(self) -> None:
        self.tree = PrefixTree(request.fed for request in self.requests)
        tokens = self.options.tokens or TOKENS_A_FORWARD.get(self.loaded.model.device.type, 256)
        longest = int(self.tree.depths.max(initial=0)) + 1
        refuse_unsuitable(self.loaded.model, longest)
        limit = most_columns(self.loaded.model)
        self.tokens = tokens if limit is None else min(tokens, limit - longest)
        self.bounds = np.append(np.arange(0, self.tree.n_nodes, self.tokens), self.tree.n_nodes)
        self._ends = np.empty(len(self.requests), np.int64)
        for branch in self.tree.branches():
            self._ends[branch.members] = branch.path[-1]
        self.wanted = self._wanted_here()
        self._targets, kept = self._planned()
        scored = np.zeros(self.tree.n_nodes, dtype=bool)
        scored[self._targets.nodes] = True
        self._pieces = Pieces(self.tree, self.bounds, kept, self.loaded.tokenizer)
        self.walk = Walk(self.loaded, self.tree, scored, self.options.dtype, self.options.selection, kept)
        self._logprobs: dict[int, Tensor] = {}
        self._greedy: dict[int, bool] = {}

    def _wanted_here(self) -> Array:
        """[n_requests], bool: those that this process scores."""
        rank, n_ranks = self.options.share
        owner = self._number(self._ends) * n_ranks // max(1, len(self.bounds) - 1)
        wanted: Array = owner == rank
        wanted[list(self.answered)] = False
        return wanted

    def _planned(self) -> tuple[_Targets, Array]:
        """What is scored at each node, and which nodes' activations are kept."""
        nodes, requests = [np.empty(0, np.int64)], []
        places: list[int] = []
        tokens: list[int] = []
        for branch in self.tree.branches():
            for index in branch.members:
                context, continuation, _ = self.requests[index]
                nodes.append(branch.path[len(context) - 1 :].copy())
                tokens += continuation
                places += range(len(continuation))
                requests += [index] * len(continuation)
        found = np.concatenate(nodes)
        order = np.argsort(found, kind="stable")
        columns = (np.array(values, np.int64)[order] for values in (requests, places, tokens))
        return _Targets(found[order], *columns), self.tree.marked(self._positions)

    def _positions(self, index: int) -> list[int]:
        """The positions of a request that are kept here."""
        if self.options.selection is None or not self.wanted[index]:
            return []
        context, continuation, _ = self.requests[index]
        return list(self.options.selection.positions.resolve(len(context), len(continuation)))

    def _needed(self) -> list[tuple[int, int]]:
        """The stretches that hold a token of a request scored here."""
        needed = np.zeros(len(self.bounds) - 1, dtype=bool)
        for branch in self.tree.branches():
            if self.wanted[branch.members].any():
                needed[self._number(branch.path)] = True
        return [(int(self.bounds[n]), int(self.bounds[n + 1])) for n in np.flatnonzero(needed)]

    def _number(self, nodes: Array) -> Array:
        """Which of the stretches each node is in."""
        found: Array = np.searchsorted(self.bounds, nodes, side="right") - 1
        return found

    @property
    def n_alone(self) -> int:
        """Tokens that the requests scored here would have fed one by one, equal ones once."""
        return sum(len(branch.path) for branch in self.tree.branches() if self.wanted[branch.members].any())

    def check(self) -> None:
        """Score two requests that part from each other over a tree of their own, and the second by a plain forward.

        They are the first of the longest, cut to CHECKED tokens; the second's later half is scored. Two forwards make their tree,
        so that mask and cache both matter. Raises TreeUnsuitable when its scores disagree.
        """
        is_known = is_tested(self.loaded.model)
        self._check(CHECKED if is_known else 2**62, sharing=True)
        if not is_known:
            self._check(2**62, sharing=False)

    def _check(self, most: int, *, sharing: bool) -> None:
        """Check two requests. sharing: two that begin alike, or one request alone when no two do; otherwise two that share nothing, if there are any. most: longer requests are cut to so many tokens."""
        before: list[int] = []
        pair: list[list[int]] = []
        for branch in self.tree.branches():
            context, continuation, _ = self.requests[branch.members[0]]
            sequence = [*context, *continuation]
            parts = bool(before) and bool(branch.shared) == sharing and branch.shared < len(before) - 1
            drop = max(0, min(max(len(before), len(sequence)) - most, branch.shared - 1))
            cut = slice(drop, drop + most)
            found = [before[cut], sequence[cut]] if parts else [sequence[cut]]
            if [len(found), len(found[-1])] > [len(pair), len(pair[-1]) if pair else 0]:
                pair = found
            before = sequence
        if not pair or not (sharing or len(pair) == 2):
            return
        last = pair[-1]
        checked = Cut(last[: len(last) // 2], last[len(last) // 2 :], 0)
        cuts = [*(Cut(each[:-1], each[-1:], 0) for each in pair[:-1]), checked]
        tokens = min(self.tokens, _in_two([cut.fed for cut in cuts]))
        options = replace(self.options, selection=None, tokens=tokens, share=(0, 1))
        for scored in itertools.chain.from_iterable(TreeScoring(self.loaded, cuts, options).results()):
            if scored.request == len(cuts) - 1:
                check_scores(self.loaded.model, checked.context, checked.continuation, scored.logprobs)

    def results(self) -> Iterator[list[Scored]]:
        """The requests' scores, each as soon as its last token is computed."""
        branches = self.tree.branches()
        branch = next(branches, None)
        for stretch in self.walk.over(self._needed()):
            self._hear(stretch)
            done = []
            while branch is not None and branch.path[-1] < stretch.stop:
                for index in branch.members:
                    if self.wanted[index]:
                        done.append(self._scored(index, branch.path))
                branch = next(branches, None)
            self._pieces.forget(stretch.stop)
            if done:
                yield done

    def _hear(self, stretch: Stretch) -> None:
        """Take the log-probabilities that a stretch's logits give to wanted tokens, and its kept rows."""
        targets = self._targets
        first, last = np.searchsorted(targets.nodes, (stretch.start, stretch.stop))
        if last > first:
            logprobs = stretch.logprobs
            line = np.unique(targets.nodes[first:last], return_inverse=True)[1]
            lines = torch.from_numpy(line).to(logprobs.device)
            tokens = torch.from_numpy(targets.tokens[first:last]).to(logprobs.device)
            found = logprobs[lines, tokens].cpu()
            greedy = (logprobs.argmax(-1)[lines] == tokens).tolist()
            for number, (index, place) in enumerate(
                zip(targets.requests[first:last].tolist(), targets.places[first:last].tolist(), strict=True)
            ):
                if not self.wanted[index]:
                    continue
                if index not in self._logprobs:
                    n_tokens = len(self.requests[index].continuation)
                    self._logprobs[index] = torch.full((n_tokens,), float("nan"), dtype=found.dtype)
                    self._greedy[index] = True
                self._logprobs[index][place] = found[number]
                self._greedy[index] &= greedy[number]
        if stretch.recording is not None:
            self._pieces.take(stretch)

    def _scored(self, index: int, path: Array) -> Scored:
        logprobs, is_greedy = self._logprobs.pop(index), self._greedy.pop(index)
        parts = self._pieces.parts(path[self._positions(index)]) if self.options.selection is not None else ()
        return Scored(index, float(logprobs.sum()), is_greedy, logprobs, parts)


def _in_two(fed: Sequence[Sequence[int]]) -> int:
    """How many tokens a forward may take so that the check needs two forwards, which tests both the mask and the cache.

    The second forward begins within the tokens that the second sequence does not share. When there is one such token alone, it begins
    before that token, where the mask must hide the first sequence's own tokens from it.
    """
    n_first = len(fed[0]) if len(fed) == 2 else 0
    shared = n_shared(*fed) if len(fed) == 2 else 0
    n_own = len(fed[-1]) - shared
    return n_first + (n_own + 1) // 2 if n_own > 1 else max(shared, (n_first + 2) // 2)
