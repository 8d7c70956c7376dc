"""Runs a model over a prefix tree, one stretch of its walk after the other: no token twice, and no padding.

The keys and values of the path that leads to a stretch are kept from earlier stretches. A mask lets each token attend to its ancestors
and to itself only. Does not know what the logits are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from AutomaticEval.capture.keeping import keep_columns, recorder_of
from AutomaticEval.capture.memory import unless_too_large
from AutomaticEval.capture.tree.prefix_tree import Array, PrefixTree
from AutomaticEval.errors import CaptureError
from AutomaticEval.models.architecture.forward_call import alone_with, cache_name, input_device
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.recording import Recording
from AutomaticEval.models.transfer.ring import on_device
from AutomaticEval.selection import Selection

Cached = list[tuple[Tensor | None, Tensor | None]]
"""For each layer its keys and values, [1, n_kv_heads, n_cached, d_head]. None for a layer that uses those of another layer."""


class Stretch(NamedTuple):
    """One forward, over the nodes `start` to `stop` of the walk."""

    start: int
    stop: int
    logprobs: Tensor
    """[scored nodes of the stretch, d_vocab], the log-softmax of the logits, on the model's device."""

    recording: Recording | None
    """What was kept: batch row 0, with a column for each node. The rows may still be on their way."""
    was_fed: Tensor | None
    """Whether the model was fed the nodes' tokens: one bool on its device. None without a recording."""


@dataclass
class Walk:
    """Forwards over stretches of a tree, which must be asked for in ascending order.

    scored: [n_nodes], bool: the nodes whose logits are wanted. kept: [n_nodes], bool: the nodes whose activations are wanted.
    The numbers of a node are meaningless when one of its ancestors is in no stretch.
    A stretch that does not fit into memory is halved, and later stretches are no longer than the halves.
    """

    loaded: LoadedModel
    tree: PrefixTree
    scored: Array
    dtype: torch.dtype | None = None
    """The dtype in which the log-softmax is computed. None: that of the logits."""

    selection: Selection | None = None
    kept: Array | None = None
    n_computed: int = 0
    """Tokens that were fed."""
    most: int = 2**62
    """The most tokens of a stretch that fit into memory, as far as is known."""

    _nodes: Array = field(default_factory=lambda: np.empty(0, np.int64))
    _cached: Cached = field(default_factory=list)
    """For each layer the keys and values of `_nodes`: [1, n_kv_heads, n_nodes, d_head]."""

    def over(self, stretches: Iterable[tuple[int, int]]) -> Iterator[Stretch]:
        """Each stretch, computed; in several when it does not fit into memory."""
        for start, stop in stretches:
            while start < stop:
                end = min(stop, start + self.most)
                computed = unless_too_large(partial(self._forward, start, end), can_be_smaller=end - start > 1)
                if computed is None:
                    self.most = (end - start) // 2
                else:
                    start = end
                    yield computed
                    del computed  # its log-probabilities are large

    @cached_property
    def _recorder(self) -> Callable[..., AbstractContextManager[Any]]:
        return recorder_of(self.loaded, self.selection)

    def _forward(self, start: int, stop: int) -> Stretch:
        tree = self.tree
        self._go_to(tree.path_to(start))
        nodes = np.concatenate([self._nodes, np.arange(start, stop)])
        scored = np.flatnonzero(self.scored[start:stop])
        token_ids = tree.token_ids[start:stop]  # sent twice: the second ones are no model's to change
        numbers = [token_ids, tree.depths[start:stop], nodes, tree.ends[nodes], scored, token_ids]
        ids, depths, columns, ends, lines, expected = sent(numbers, input_device(self.loaded.model))
        keeps_logits = self.selection is not None and "logits" in self.selection.kinds
        keep = None if self.kept is None else keep_columns([np.flatnonzero(self.kept[start:stop]).tolist()])
        with torch.no_grad(), alone_with(self.loaded.model), self._recorder(keep, 1, waits=False) as recording:
            out, cache = tree_forward(
                self.loaded.model,
                ids,
                depths,
                attended(columns, ends, stop - start),
                self._cached,
                None if keeps_logits else lines,
            )
        logits = out[0][lines.to(out.device, non_blocking=True)] if keeps_logits else out[0]
        if len(logits) != len(scored):
            raise CaptureError(f"the model gave logits at {len(logits)} of its tokens; {len(scored)} were asked for.")
        logprobs = torch.log_softmax(logits, -1, dtype=self.dtype)
        self._cached, self._nodes = cache, nodes
        self.n_computed += stop - start
        was_fed = None if recording is None else recording.was_fed(expected[None])
        return Stretch(start, stop, logprobs, recording, was_fed)

    def _go_to(self, path: Array) -> None:
        """Reduce the keys and values to those of one path. Zeros stand for nodes that were not computed."""
        if np.array_equal(path, self._nodes):
            return
        if not self._cached:
            self._cached, self._nodes = self._any_cached(), np.array([-1])
        at = np.searchsorted(self._nodes, path)  # ascending, both
        is_there = self._nodes[np.minimum(at, len(self._nodes) - 1)] == path
        columns, places = at[is_there], np.flatnonzero(is_there)
        devices = {each.device for pair in self._cached for each in pair if each is not None}
        indices = {device: sent([columns, places], device) for device in devices}
        self._cached = [
            (_chosen(keys, indices, len(path)), _chosen(values, indices, len(path))) for keys, values in self._cached
        ]
        self._nodes = path

    def _any_cached(self) -> Cached:
        """Keys and values of one token, which show the shapes of all."""
        numbers = [self.tree.token_ids[:1], np.zeros(1, np.int64)]
        with torch.no_grad(), alone_with(self.loaded.model):
            ids, depths = sent(numbers, input_device(self.loaded.model))
            return tree_forward(self.loaded.model, ids, depths, depths[None] == 0, [], None)[1]


def sent(numbers: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Arrays of whole numbers as tensors on a device, in one transfer that nobody waits for."""
    flat = on_device(torch.from_numpy(np.concatenate(numbers, dtype=np.int64)), device)
    return list(flat.split_with_sizes([len(each) for each in numbers]))


def _chosen(cached: Tensor | None, indices: Mapping[torch.device, Sequence[Tensor]], n_columns: int) -> Tensor | None:
    """Some columns of keys or values [1, n_kv_heads, n, d_head], among zeros: [1, n_kv_heads, n_columns, d_head].

    indices: on each device the numbers of these columns, and their places in the result.
    """
    if cached is None:
        return None
    columns, places = indices[cached.device]
    chosen = cached.index_select(2, columns)
    if len(places) == n_columns:
        return chosen
    among_zeros = chosen.new_zeros((*chosen.shape[:2], n_columns, chosen.shape[3]))
    return among_zeros.index_copy_(2, places, chosen)


def attended(columns: Tensor, ends: Tensor, n: int) -> Tensor:
    """Which tokens each of the last n columns attends to: itself and its ancestors. [n, n_columns], bool.

    columns: [n_columns], the nodes that were computed before on the path of the first of the n, and the n. ends: [n_columns], `PrefixTree.ends` of each.
    """
    rows = columns[len(columns) - n :, None]
    return (columns <= rows) & (rows < ends)


def tree_forward(
    model: Any,
    token_ids: Tensor,
    depths: Tensor,
    mask: Tensor,
    cached: Cached,
    scored: Tensor | None,
) -> tuple[Tensor, Cached]:
    """One forward over tokens, each of which attends to what the mask says. All tensors are on the model's input device.

    token_ids, depths: [n], the tokens and their positions. mask: [n, n_cached + n], bool. scored: [n_scored], the tokens whose logits
    are wanted; None for all. Returns the logits [1, n_scored, d_vocab], and for each layer the keys and values of all tokens
    [1, n_kv_heads, n_cached + n, d_head].
    """
    cache = DynamicCache(cached) if cached else DynamicCache()
    logits_to_keep: Any = 0
    if scored is not None:
        # for transformers, 0 means everywhere: when no logits are wanted, those of the last token are computed and dropped
        logits_to_keep = scored if len(scored) else torch.full((1,), len(token_ids) - 1, device=token_ids.device)
    out = model(
        input_ids=token_ids[None],
        attention_mask=as_mask(model, mask[None, None]),
        position_ids=depths[None],
        use_cache=True,
        logits_to_keep=logits_to_keep,
        **{str(cache_name(model)): cache},
    )
    logits = out.logits[:, : len(scored)] if scored is not None else out.logits
    layers: list[Any] = [(layer.keys, layer.values) if layer.is_initialized else (None, None) for layer in cache.layers]
    return logits, layers


def as_mask(model: Any, attended: Tensor) -> Tensor:
    """A mask as the model's attention takes it: for sdpa the bools themselves, for other attention numbers to add.

    attended: [..., query_pos, key_pos], bool, True where a token attends to another.
    """
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        return attended
    added = torch.zeros(attended.shape, dtype=model.dtype, device=attended.device)
    return added.masked_fill(~attended, torch.finfo(model.dtype).min)
