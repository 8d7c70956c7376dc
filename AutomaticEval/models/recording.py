"""`capturing`: read chosen sites of a model in every forward, whoever runs the model.

Hooks are installed on entry and removed, by handle, on every exit. A hook cuts out the rows that are kept at once, on the device; they are
then copied to the CPU (from a GPU by `transfer.py`). The columns of a forward are known from the token ids that reached the embedding, and
from the keys and values beside them. They are never counted by calls, since chunked prefill and deferred stops change that count.
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
    """Which (batch row, column) pairs of one forward are kept. Both tensors are [n_kept], int64, on any device."""

    rows: Tensor
    columns: Tensor


Keep = Callable[[int, int], Kept | None]
"""keep(first column, number of columns) -> what is kept of that forward; None keeps nothing."""


class Enough(Exception):
    """Ends a forward early: every site that is wanted of it has been read."""


class _Columns:
    """The columns that the forwards so far have fed to the model, and those of the current forward."""

    def __init__(self) -> None:
        self.first = 0
        """The first column of the current forward."""
        self.n = 0
        """The number of columns of the current forward."""
        self._ids: list[Tensor] = []
        """Each [batch, columns]."""

    def begin(self, ids: Tensor, *, anew: bool) -> None:
        """A forward feeds ids [batch, columns]. anew: from column 0, in place of all that was fed before."""
        self._ids = [] if anew else self._ids
        self.first = 0 if anew else self.first + self.n
        self.n = ids.shape[1]
        self._ids.append(ids.detach())

    def are_fed_again(self, ids: Tensor, given: Mapping[str, Any] | None) -> bool:
        """Whether ids hold every column so far and more, and what the model is given holds no keys and values of them.

        Models without a cache do so, and models whose ropes change when the sequence becomes long.
        """
        n_before = self.first + self.n
        if not self._ids or ids.shape[1] <= n_before or given is None:
            return False
        cache = cache_in(given)
        is_empty = cache is None or (hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) == 0)
        return is_empty and torch.equal(ids[:, :n_before].cpu(), self.ids())

    def ids(self) -> Tensor:
        """[batch, columns], on the CPU."""
        return torch.cat([ids.cpu() for ids in self._ids], 1)

    def row(self, number: int) -> list[int]:
        """The ids of one batch row."""
        return torch.cat([ids[number].cpu() for ids in self._ids]).tolist() if self._ids else []


class Step:
    """What the hooks saw of a forward that was recorded into a graph, gathered on the device."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self.seen: dict[str, tuple[Tap, Tensor]] = {}
        self.out: dict[str, Tensor] = {}

    def gather(self) -> None:
        """The values of all keys [batch, 1, width], into the static output. The last operation of the graph."""
        for key, (tap, value) in self.seen.items():
            taken = tap.take(value if value.dim() == 3 else value[:, None])
            self.out[key] = taken.clone() if self._dtype is None else taken.to(self._dtype, copy=True)
        self.seen = {}


class Recording:
    """What `capturing` has read: for every kept (batch row, column) pair, one row a key. Read it after the with.

    A model that is fed everything again has the rows of the last time.
    """

    def __init__(
        self, keys: list[str], keep: Keep, n_rows: int, dtype: torch.dtype | None = None, *, stops: bool = False
    ) -> None:
        self._keep, self._n_rows, self._dtype, self._stops = keep, n_rows, dtype, stops
        self._n_forwards = 0
        self._given: Mapping[str, Any] | None = None
        """The named arguments of the forward that begins."""
        self._columns = _Columns()
        self._step: Step | None = None
        self._ignores = False
        self._kept: list[Kept] = []
        self._current: Kept | None = None
        """What is kept of the current forward."""
        self._keeps_all = False
        self._n_unread = 0
        """How many sites of the current forward are still to be read."""
        self._n_reads = dict.fromkeys(keys, 0)
        self._cuts: dict[torch.device, dict[str, Tensor]] = {}
        """What was cut of the current forward on each GPU."""
        self._staging: dict[torch.device, Staging] = {}
        self._pieces: dict[str, list[Tensor]] = {key: [] for key in keys}
        """What has come to the CPU. The first piece of a key is empty, [0, width]."""
        self._rows: dict[str, Tensor] = {}
        self._where: dict[tuple[int, int], int] = {}
        """(batch row, column) -> its place among the rows."""

    @property
    def n_forwards(self) -> int:
        """How many forwards have begun."""
        return self._n_forwards

    @property
    def rows(self) -> Mapping[str, Tensor]:
        """Key -> [n_kept, width], on the CPU: all that was kept, forward after forward."""
        return self._rows

    @contextmanager
    def ignoring(self) -> Iterator[None]:
        """The forwards inside are not recorded at all."""
        self._ignores = True
        try:
            yield
        finally:
            self._ignores = False

    @contextmanager
    def taping(self) -> Iterator[Step]:
        """The forward inside is run while a graph is recorded. It counts as no forward."""
        self._step = Step(self._dtype)
        try:
            yield self._step
        finally:
            self._step = None

    def replayed(self, step: Step, ids: Tensor) -> None:
        """One replay of a graph, which was fed ids [batch, 1], is queued. Its kept rows are copied at once."""
        self.begins({})
        self.feed(ids)
        for key, value in step.out.items():
            self._n_reads[key] += 1
            if self._current is not None:
                self._arrived(key, self._cut(key, value, self._current).cpu())

    def begins(self, given: Mapping[str, Any]) -> None:
        """The model is called. given: its named arguments."""
        self._given = given

    def feed(self, ids: Tensor | None) -> None:
        """A forward feeds these token ids [batch, columns]: the columns after those before, or all of them again.

        Raises CaptureError when the batch has another number of rows.
        """
        if self._ignores or self._step is not None:
            return
        if ids is None or ids.dim() != 2 or len(ids) != self._n_rows:
            shape = None if ids is None else tuple(ids.shape)
            raise CaptureError(
                f"the embedding was given ids of shape {shape}; expected [{self._n_rows}, columns]. Beam search, "
                "assisted decoding and several sequences a prompt cannot be captured."
            )
        self._send()
        self._n_unread = len(self._n_reads)
        self._n_forwards += 1
        anew = self._columns.are_fed_again(ids, self._given)
        if anew:
            self._forget()
        self._columns.begin(ids, anew=anew)
        self._given = None
        kept = self._keep(self._columns.first, self._columns.n)
        self._current = None if kept is None or not len(kept.rows) else Kept(*(t.to(ids.device) for t in kept))
        self._keeps_all = self._current is not None and self._is_whole(self._current)
        if self._current is not None:
            self._kept.append(self._current)

    def _forget(self) -> None:
        """Drop what was kept, because the forward that begins computes it again."""
        for staging in self._staging.values():
            staging.finish()
        self._pieces = {key: pieces[:1] for key, pieces in self._pieces.items()}
        self._kept = []

    def _is_whole(self, kept: Kept) -> bool:
        """Whether every position of the forward is kept, row after row."""
        n_positions = self._n_rows * self._columns.n
        if len(kept.rows) != n_positions:
            return False
        place = kept.rows * self._columns.n + kept.columns - self._columns.first
        return torch.equal(place, torch.arange(n_positions, device=place.device))

    def read(self, key: str, tap: Tap, value: Tensor | None) -> None:
        """Keep what is wanted of a module's value [batch, columns, width] in the current forward.

        Raises Enough after the last site, when the recording stops forwards; CaptureError when a hook is called twice in a forward.
        """
        if self._ignores:
            return
        if self._step is not None and value is not None:
            self._step.seen[key] = (tap, value)
            return
        self._take(key, tap, value)
        self._n_unread -= 1
        if self._stops and not self._n_unread:
            raise Enough

    def _take(self, key: str, tap: Tap, value: Tensor | None) -> None:
        if value is None:
            raise CaptureError(f"the module of {key} ({tap.module}) gave no tensor.")
        self._n_reads[key] += 1
        if self._n_reads[key] != self.n_forwards:
            raise CaptureError(f"the hook of {key} fired {self._n_reads[key]} times in {self.n_forwards} forwards.")
        if value.dim() == 2:  # some blocks flatten batch and columns
            value = value.view(-1, self._columns.n, value.shape[-1])
        if self._n_reads[key] == 1:  # [0, width] tells the width when nothing is kept
            self._arrived(key, self._narrowed(tap.take(value.detach()[:0, 0])).cpu())
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
        """A forward is over. What was cut of it on a GPU is sent to the CPU in one transfer."""
        for device, cuts in self._cuts.items():
            if device not in self._staging:
                self._staging[device] = Staging(device, self._arrived)
            self._staging[device].send(cuts)
        self._cuts = {}

    def _cut(self, key: str, value: Tensor, kept: Kept) -> Tensor:
        """The kept rows of a value [batch, columns, width]: [n_kept, width]. A copy, since the model may change the value in place."""
        lacking = self._columns.n - value.shape[1]  # logits are computed for the last columns only
        if self._keeps_all and not lacking:
            return value.flatten(0, 1).clone()
        rows, columns = (index.to(value.device) for index in kept)
        columns = columns - self._columns.first - lacking
        if lacking and int(columns.min()) < 0:
            raise CaptureError(
                f"{key} was not computed at {int((columns < 0).sum())} of the positions asked for: a model that generates computes it, of the "
                'prompt, for the last token only (logits, and layers that share their keys and values). Use positions="scored".'
            )
        return value[rows, columns]

    def close(self) -> None:
        """The last forward is over. Check that every hook was called in every forward, and join what was kept.

        Raises CaptureError when one was not, or when a value does not fit into float16.
        """
        for key, n_reads in self._n_reads.items():
            if n_reads != self.n_forwards:
                raise CaptureError(f"the hook of {key} fired {n_reads} times in {self.n_forwards} forwards.")
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
        return self._columns.ids()

    def fed(self, row: int) -> list[int]:
        """The token ids that the model was given in one batch row, column after column."""
        return self._columns.row(row)

    def take(self, row: int, columns: Iterable[int]) -> dict[str, Tensor]:
        """Some columns of one batch row: key -> [n_columns, width], on the CPU, in the dtype that is kept.

        Raises CaptureError for a column that was not kept.
        """
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
    """Record sites of a model in every forward inside the with.

    taps: key -> where it is read, from `Layout.pick`. embedding: `Layout.embedding`. keep: says what is kept of a forward.
    n_rows: the number of rows of the batch, the same in every forward. dtype: what is kept is narrowed to it; None leaves the model's.
    stops: whether a forward ends, by raising Enough, as soon as all taps are read. Whoever runs the model must catch that.
    Raises CaptureError when a forward has another number of rows, when a hook is not called exactly once in each forward, and when a value
    does not fit into float16.
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
            "logits_to_keep names columns, so that it is not known which logits are where; give a number, or leave it out."
        )


def _install(hooks: Hooks, module: nn.Module, key: str, tap: Tap, recording: Recording) -> None:
    """Hook the module of one tap."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.read(key, tap, input_of(args, kwargs))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recording.read(key, tap, tensor_of(output))

    if tap.end == "input":
        hooks.before(module, before)
    else:
        hooks.after(module, after)
