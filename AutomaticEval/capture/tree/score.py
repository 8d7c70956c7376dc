"""Continuations scored over the prefix tree of all of them: (context, continuation) tokens -> log-likelihoods, with activations.

Every token of the tree is computed once, and logits only at tokens that score something. Knows nothing of texts, nor of benchmarks.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from AutomaticEval.capture.padding_probes import is_tested
from AutomaticEval.capture.tree.prefix_tree import Array, PrefixTree, n_shared
from AutomaticEval.capture.tree.rows import WalkRows
from AutomaticEval.capture.tree.suitability import check_scores, most_columns, refuse_unsuitable
from AutomaticEval.capture.tree.walk import Stretch, Walk
from AutomaticEval.errors import PromptError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.samples import Part
from AutomaticEval.selection import Selection

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
    requests: Array
    indices: Array
    """The number of the token in its continuation."""
    tokens: Array
    """The token ids."""


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
        self._rows = WalkRows(self.tree, self.bounds, kept, self.loaded.tokenizer)
        self.walk = Walk(self.loaded, self.tree, scored, self.options.dtype, self.options.selection, kept)
        self._logprobs: dict[int, Tensor] = {}
        self._greedy: dict[int, bool] = {}

    def _wanted_here(self) -> Array:
        """[n_requests], bool: the requests that this process scores."""
        rank, n_ranks = self.options.share
        owner = self._stretch_of(self._ends) * n_ranks // max(1, len(self.bounds) - 1)
        wanted: Array = owner == rank
        wanted[list(self.answered)] = False
        return wanted

    def _planned(self) -> tuple[_Targets, Array]:
        """The tokens that are scored, and [n_nodes], bool: the nodes whose activations are kept."""
        nodes, requests = [np.empty(0, np.int64)], []
        indices: list[int] = []
        tokens: list[int] = []
        for branch in self.tree.branches():
            for index in branch.members:
                context, continuation, _ = self.requests[index]
                nodes.append(branch.path[len(context) - 1 :].copy())
                tokens += continuation
                indices += range(len(continuation))
                requests += [index] * len(continuation)
        scoring_nodes = np.concatenate(nodes)
        order = np.argsort(scoring_nodes, kind="stable")
        columns = (np.array(values, np.int64)[order] for values in (requests, indices, tokens))
        return _Targets(scoring_nodes[order], *columns), self.tree.marked(self._positions)

    def _positions(self, index: int) -> list[int]:
        """The positions of a request whose rows are kept by this process."""
        if self.options.selection is None or not self.wanted[index]:
            return []
        context, continuation, _ = self.requests[index]
        return list(self.options.selection.positions.resolve(len(context), len(continuation)))

    def _needed(self) -> list[tuple[int, int]]:
        """The stretches (start, stop) that hold a token of a request that this process scores."""
        needed = np.zeros(len(self.bounds) - 1, dtype=bool)
        for branch in self.tree.branches():
            if self.wanted[branch.members].any():
                needed[self._stretch_of(branch.path)] = True
        return [(int(self.bounds[n]), int(self.bounds[n + 1])) for n in np.flatnonzero(needed)]

    def _stretch_of(self, nodes: Array) -> Array:
        """The number of the stretch that each node is in."""
        numbers: Array = np.searchsorted(self.bounds, nodes, side="right") - 1
        return numbers

    @property
    def n_alone(self) -> int:
        """How many tokens the requests of this process would feed one by one; equal requests count once."""
        return sum(len(branch.path) for branch in self.tree.branches() if self.wanted[branch.members].any())

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
        """The scores of the requests, each as soon as its last token is computed."""
        branches = self.tree.branches()
        branch = next(branches, None)
        for stretch in self.walk.over(self._needed()):
            self._take(stretch)
            done = []
            while branch is not None and branch.path[-1] < stretch.stop:
                for index in branch.members:
                    if self.wanted[index]:
                        done.append(self._scored(index, branch.path))
                branch = next(branches, None)
            self._rows.forget(stretch.stop)
            if done:
                yield done

    def _take(self, stretch: Stretch) -> None:
        """Take the log-probabilities that a stretch gives to scored tokens, and its kept rows."""
        first, last = np.searchsorted(self._targets.nodes, (stretch.start, stretch.stop))
        if last > first:
            self._take_scores(stretch.logprobs, _Targets(*(column[first:last] for column in self._targets)))
        if stretch.recording is not None:
            self._rows.take(stretch)

    def _take_scores(self, logprobs: Tensor, targets: _Targets) -> None:
        """logprobs: [n, d_vocab], a line for each of the n nodes that score the targets, ascending."""
        line_numbers = np.unique(targets.nodes, return_inverse=True)[1]
        lines = torch.from_numpy(line_numbers).to(logprobs.device)
        tokens = torch.from_numpy(targets.tokens).to(logprobs.device)
        of_tokens = logprobs[lines, tokens].cpu()
        is_likeliest = (logprobs.argmax(-1)[lines] == tokens).tolist()
        for number, (request, index) in enumerate(
            zip(targets.requests.tolist(), targets.indices.tolist(), strict=True)
        ):
            if not self.wanted[request]:
                continue
            if request not in self._logprobs:
                n_tokens = len(self.requests[request].continuation)
                self._logprobs[request] = torch.full((n_tokens,), float("nan"), dtype=of_tokens.dtype)
                self._greedy[request] = True
            self._logprobs[request][index] = of_tokens[number]
            self._greedy[request] &= is_likeliest[number]

    def _scored(self, index: int, path: Array) -> Scored:
        logprobs, is_greedy = self._logprobs.pop(index), self._greedy.pop(index)
        parts = self._rows.parts(path[self._positions(index)]) if self.options.selection is not None else ()
        return Scored(index, float(logprobs.sum()), is_greedy, logprobs, parts)


def _in_two(fed: Sequence[Sequence[int]]) -> int:
    """How many tokens a forward may take so that the check takes two forwards, which tests both the mask and the cache.

    fed: one or two sequences. The second forward begins within the tokens that the last sequence does not share. When there is only one such
    token, it begins before that token, where the mask must hide the other sequence's own tokens from it.
    """
    n_first = len(fed[0]) if len(fed) == 2 else 0
    shared = n_shared(*fed) if len(fed) == 2 else 0
    n_own = len(fed[-1]) - shared
    return n_first + (n_own + 1) // 2 if n_own > 1 else max(shared, (n_first + 2) // 2)
