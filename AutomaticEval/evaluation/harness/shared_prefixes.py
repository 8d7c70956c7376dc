"""`SharedPrefixes`: what the prompts of a batch begin with, computed once where that changes no answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from AutomaticEval.capture.tree.shared_prompt import Prefill, Prefix
from AutomaticEval.errors import TreeUnsuitable, warn
from AutomaticEval.evaluation.harness.batch_capture import PromptRows
from AutomaticEval.evaluation.harness.tokens import shared_beginnings
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.selection import Selection


class SharedPrefixes:
    """Finds prompts that begin alike, and prefills what a batch of them begins with.

    selection: what is captured of the prefix; None captures nothing. autocast: the precision that lm-eval computes in. is_wanted: False
    computes every prompt by itself.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        selection: Selection | None,
        autocast: Callable[[], AbstractContextManager[Any]],
        *,
        is_wanted: bool,
    ) -> None:
        self._prefill, self._autocast = Prefill(loaded, selection), autocast
        self._is_wanted = self._is_suitable = is_wanted
        self._shares: list[float] = []

    def expect(self, prompts: Sequence[str]) -> list[int]:
        """Hear of all prompts of a call. Returns the group of each, to be batched one after the other; nothing for lm-eval's own order."""
        if not self._is_wanted:
            return []
        self._shares, groups = shared_beginnings(prompts)
        return groups

    def of(self, prompts: PromptRows, max_length: int, kwargs: Mapping[str, Any]) -> Prefix | None:
        """What the prompts of a batch begin with, prefilled; None when each is computed by itself.

        max_length: columns of the batch with its answers. kwargs: for transformers' generate.
        """
        if not self._is_suitable or not self._prefill.suits(max_length, kwargs):
            return None
        most = len(prompts.tokens[0])
        if len(prompts.requests) == 1:  # the part that a prompt of another batch begins with, too
            most = int(most * self._shares[prompts.requests[0]])
        try:
            with self._autocast():
                return self._prefill.of(prompts.tokens, most)
        except TreeUnsuitable as why:
            warn(f"Prompts that begin alike are computed one by one: {why}")
            self._is_suitable = False
            return None

    def forget(self) -> None:
        """Free what was computed; the next call computes and checks it anew."""
        self._prefill.forget()
