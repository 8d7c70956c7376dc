"""`capturing`: read chosen sites of a model while it runs, whoever runs it.

Hooks are installed on entry and removed, by handle, on every exit. What is kept is cut on the device at
once, then copied to the CPU (from a GPU by `transfer.py`). A model that is fed everything again (without a cache, or when long ropes change) has the
rows of the last time. Which columns a forward fed is known from the token ids that reached the
embedding and from the keys and values beside them, never from counting calls: chunked prefill and deferred stops change the count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from AutomaticEval.errors import CaptureError
from AutomaticEval.models.architecture.forward_call import alone_with, cache_in, input_of, tensor_of
from AutomaticEval.models.architecture.inner_model import inner
from AutomaticEval.models.hook_handles import Hooks
from AutomaticEval.models.layout import Tap
from AutomaticEval.models.transfer import Staging


class Kept(NamedTuple):
    """Which (batch row, column) pairs of one forward are kept. Both are [n_kept], int64, on any device."""

    rows: Tensor
    columns: Tensor


Keep = Callable[[int, int], Kept | None]
"""keep(first column, number of columns) -> what to keep of that forward; None for nothing."""


class Enough(Exception):
    """A forward was stopped, because all that is wanted of it was read."""


class Recording:
    """What `capturing` saw: for every kept (batch row, column) pair, one row a key. Read it after the with."""

    def __init__(
        self, keys: list[str], keep: Keep, n_rows: int, dtype: torch.dtype | None = None, *, stops: bool = False
    ) -> None:
        self._keep, self._n_rows, self._dtype, self._stops = keep, n_rows, dtype, stops
        self._n_unread = 0
        self._n_forwards = 0
        self._given: Any = None
        self._fed: list[Tensor] = []
        self._kept: list[Kept] = []
        self._current: Kept | None = None
        self._keeps_all = False
        self._n_columns = 0
        self._first = 0
        self._fired = dict.fromkeys(keys, 0)
        self._pieces: dict[str, list[Tensor]] = {key: [] for key in keys}
        self._rows: dict[str, Tensor] = {}
        self._where: dict[tuple[int, int], int] = {}
        self._cuts: dict[torch.device, dict[str, Tensor]] = {}
        self._staging: dict[torch.device, Staging] = {}

    @property
    def n_forwards(self) -> int:
        return self._n_forwards

    @property
    def rows(self) -> Mapping[str, Tensor]:
        """Key -> [n_kept, width]: all that was kept, forward after forward."""
        return self._rows

    def begins(self, given: Mapping[str, Any]) -> None:
        """The model is called with what is given by name."""
        self._given = given

    def feed(self, ids: Tensor | None) -> None:
        """A forward begins with these token ids [batch, columns]: those after the ones before, or all of them again."""
        if ids is None or ids.dim() != 2 or len(ids) != self._n_rows:
            found = None if ids is None else tuple(ids.shape)
            raise CaptureError(
                f"the embedding was given ids of shape {found}; expected [{self._n_rows}, columns]. Beam search, "
                "assisted decoding and several sequences a prompt cannot be captured."
            )
        self._send()
        self._n_unread = len(self._fired)
        self._n_forwards += 1
        if self._is_fed_again(ids):
            self._forget()
        else:
            self._first += self._n_columns
        self._given = None
        self._fed.append(ids.detach())
        self._n_columns = ids.shape[1]
        kept = self._keep(self._first, self._n_columns)
        self._current = None if kept is None or not len(kept.rows) else Kept(*(t.to(ids.device) for t in kept))
        self._keeps_all = self._current is not None and self._is_whole(self._current)
        if self._current is not None:
            self._kept.append(self._current)

    def _is_fed_again(self, ids: Tensor) -> bool:
        """Whether a forward without earlier keys and values is fed all columns before it again, and more."""
        n_before = self._first + self._n_columns
        if not self._fed or ids.shape[1] <= n_before or self._given is None:
            return False
        cache = cache_in(self._given)
        is_empty = cache is None or (hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) == 0)
        return is_empty and torch.equal(ids[:, :n_before].cpu(), self.fed_ids())

    def _forget(self) -> None:
        """Drop what was kept: the forward that begins computes it again, and what follows goes on from that."""
        for staging in self._staging.values():
            staging.finish()
        self._pieces = {key: pieces[:1] for key, pieces in self._pieces.items()}  # the first has no rows
        self._fed, self._kept = [], []
        self._first = 0

    def _is_whole(self, kept: Kept) -> bool:
        """Whether every position of the forward is kept, row after row."""
        n_positions = self._n_rows * self._n_columns
        if len(kept.rows) != n_positions:
            return False
        place = kept.rows * self._n_columns + kept.columns - self._first
        return torch.equal(place, torch.arange(n_positions, device=place.device))

    def read(self, key: str, tap: Tap, value: Tensor | None) -> None:
        """A site's value [batch, columns, width] in the current forward: keep what is wanted of it.

        Raises Enough after the last site of a forward that is to stop there.
        """
        self._take(key, tap, value)
        self._n_unread -= 1
        if self._stops and not self._n_unread:
            raise Enough

    def _take(self, key: str, tap: Tap, value: Tensor | None) -> None:
        if value is None:
            raise CaptureError(f"the module of {key} ({tap.module}) gave no tensor.")
        self._fired[key] += 1
        if self._fired[key] != self.n_forwards:
            raise CaptureError(f"the hook of {key} fired {self._fired[key]} times in {self.n_forwards} forwards.")
        if value.dim() == 2:  # some blocks flatten batch and columns
            value = value.view(-1, self._n_columns, value.shape[-1])
        if self._fired[key] == 1:
            self._arrived(
                key, self._narrowed(tap.take(value.detach()[:0, 0])).cpu()
            )  # [0, width]: when nothing is kept
        if self._current is None:
            return
        cut = self._narrowed(tap.take(self._cut(key, value.detach(), self._current)))  # [n_kept, width]
        if cut.device.type == "cuda":
            self._cuts.setdefault(cut.device, {})[key] = cut
        else:
            self._arrived(key, cut.cpu())

    def _narrowed(self, rows: Tensor) -> Tensor:
        return rows if self._dtype is None else rows.to(self._dtype)

    def _arrived(self, key: str, rows: Tensor) -> None:
        self._pieces[key].append(rows)

    def _send(self) -> None:
        """A forward is over: what was cut of it on a GPU goes to the CPU in one transfer."""
        for device, cuts in self._cuts.items():
            if device not in self._staging:
                self._staging[device] = Staging(device, self._arrived)
            self._staging[device].send(cuts)
        self._cuts = {}

    def _cut(self, key: str, value: Tensor, kept: Kept) -> Tensor:
        """A copy of the kept rows of a value [batch, columns, width]: the model may change the value in place."""
        lacking = self._n_columns - value.shape[1]  # logits are computed for the last columns only
        if self._keeps_all and not lacking:
            return value.flatten(0, 1).clone()
        rows, columns = (index.to(value.device) for index in kept)
        columns = columns - self._first - lacking
        if lacking and int(columns.min()) < 0:
            raise CaptureError(
                f"{key} was not computed at {int((columns < 0).sum())} of the positions asked for: a model that generates computes it, of the "
                'prompt, for the last token only (logits, and layers that share their keys and values). Use positions="scored".'
            )
        return value[rows, columns]

    def close(self) -> None:
        """The last forward is over: check that every hook saw every forward, and join the pieces."""
        for key, fired in self._fired.items():
            if fired != self.n_forwards:
                raise CaptureError(f"the hook of {key} fired {fired} times in {self.n_forwards} forwards.")
        self._send()
        for staging in self._staging.values():
            staging.finish()
        for key in list(self._pieces):
            pieces = self._pieces.pop(key)
            full = [piece for piece in pieces if len(piece)] or pieces[:1]
            if full:
                self._rows[key] = full[0] if len(full) == 1 else torch.cat(full)
        if self._dtype == torch.float16:
            self._check_range()
        pairs = [(kept.rows.tolist(), kept.columns.tolist()) for kept in self._kept]
        every = [pair for rows, columns in pairs for pair in zip(rows, columns, strict=True)]
        self._where = {pair: number for number, pair in enumerate(every)}

    def _check_range(self) -> None:
        for key, rows in self._rows.items():
            if rows.isinf().any():
                raise CaptureError(
                    f"{key} holds values that float16 cannot hold (65504 at most); store it as bfloat16."
                )

    def fed_ids(self) -> Tensor:
        """The token ids of all forwards: [batch, columns], on the CPU."""
        return torch.cat([ids.cpu() for ids in self._fed], 1)

    def fed(self, row: int) -> list[int]:
        """The token ids that the model was given in one batch row, column after column."""
        return torch.cat([ids[row].cpu() for ids in self._fed]).tolist() if self._fed else []

    def take(self, row: int, columns: Iterable[int]) -> dict[str, Tensor]:
        """Key -> [n_columns, width] of one batch row, on the CPU, in the model's dtype."""
        try:
            where = [self._where[row, column] for column in columns]
        except KeyError as absent:
            raise CaptureError(
                f"batch row {row}: column {absent.args[0][1]} was asked for but never computed."
            ) from None
        if where and where == list(range(where[0], where[0] + len(where))):  # one forward: no copy is needed
            return {key: rows[where[0] : where[0] + len(where)] for key, rows in self._rows.items()}
        return {key: rows[torch.tensor(where, dtype=torch.long)] for key, rows in self._rows.items()}


@contextmanager
def capturing(
    model: nn.Module,
    taps: Mapping[str, Tap],
    embedding: str,
    keep: Keep,
    n_rows: int,
    dtype: torch.dtype | None = None,
    *,
    stops: bool = False,
) -> Iterator[Recording]:
    """Record taps of a model in every forward inside the with.

    taps: key -> place, from `Layout.pick`. embedding: `Layout.embedding`. keep: what to keep of a forward.
    n_rows: the rows of the batch, which every forward must have. dtype: to narrow what is kept to; None leaves it.
    stops: whether a forward ends, by Enough, when all taps were read; what calls it must catch that.
    Raises CaptureError when a forward has other rows, a hook does not fire exactly once a forward, or a value does
    not fit into float16.
    """
    recording = Recording(list(taps), keep, n_rows, dtype, stops=stops)
    with alone_with(model), Hooks() as hooks:

        def feed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recording.feed(input_of(args, kwargs))

        def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recording.begins(kwargs)

        whole = inner(model)
        hooks.before(whole, begins)
        if "logits" in taps:
            hooks.before(whole, _refuse_some_logits)
        hooks.before(model.get_submodule(embedding), feed)
        for key, tap in taps.items():
            if tap.then is not None:
                tap.then.refresh(model.get_submodule(tap.module))
            _install(hooks, model.get_submodule(tap.module), key, tap, recording)
        yield recording
    recording.close()


def _refuse_some_logits(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise CaptureError(
            "logits_to_keep names columns, so that which logits are where is not known; give a number, or leave it out."
        )


def _install(hooks: Hooks, module: nn.Module, key: str, tap: Tap, recording: Recording) -> None:
    """Hook one tap."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.read(key, tap, input_of(args, kwargs))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recording.read(key, tap, tensor_of(output))

    if tap.end == "input":
        hooks.before(module, before)
    else:
        hooks.after(module, after)
