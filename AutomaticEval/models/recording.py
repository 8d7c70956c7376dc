"""`capturing`: read chosen sites of a model in every forward, whoever runs the model.

Hooks are installed on entry and removed, by handle, on every exit. What they see is kept by `transfer/kept_rows.py`. The columns of a
forward are known from the token ids that reached the embedding, and from the keys and values beside them. They are never counted by calls,
since chunked prefill and deferred stops change that count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from AutomaticEval.errors import CaptureError
from AutomaticEval.models.architecture.added_outputs import AddedOutputs
from AutomaticEval.models.architecture.forward_call import alone_with, cache_in, input_of, tensor_of
from AutomaticEval.models.architecture.inner_model import Virtual, inner, virtual_tokens
from AutomaticEval.models.hook_handles import Hooks
from AutomaticEval.models.layout import Tap
from AutomaticEval.models.transfer.kept_positions import Kept as Kept
from AutomaticEval.models.transfer.kept_rows import KeptRows
from AutomaticEval.models.transfer.step import Step

Keep = Callable[[int, int], Kept | None]
"""keep(first column, number of columns) -> what is kept of that forward; None keeps nothing."""


class Enough(Exception):
    """Ends a forward early: every site that is wanted of it has been read."""


class _Columns:
    """The columns that the forwards so far have fed to the model, and those of the current forward."""

    def __init__(self, virtual: Virtual | None) -> None:
        self._n_virtual = 0 if virtual is None else virtual.n
        self.first = 0
        """The first column of the current forward."""
        self.n = 0
        """The number of columns of the current forward."""
        self._ids: list[Tensor] = []
        """Each [batch, columns], on any device."""

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
        n_cached = None if cache is None or not hasattr(cache, "get_seq_length") else int(cache.get_seq_length())
        is_empty = cache is None or n_cached in (0, self._n_virtual)
        return is_empty and torch.equal(ids[:, :n_before].cpu(), self.ids())

    def ids(self) -> Tensor:
        """[batch, columns], on the CPU."""
        if len(self._ids) != 1 or self._ids[0].device.type != "cpu":  # joined on the device, and fetched once
            self._ids = [torch.cat(self._ids, 1).cpu()]
        return self._ids[0]

    def are(self, ids: Tensor) -> Tensor:
        """Whether ids [batch, columns] are those of all forwards: one bool on their device, for which nothing waits."""
        fed = torch.cat(self._ids, 1) if self._ids else ids[:, :0]
        return (fed == ids).all() if fed.shape == ids.shape else torch.zeros_like(ids[0, 0], dtype=torch.bool)


class Recording:
    """What `capturing` has read: for every kept (batch row, column) pair, one row a key. Read it after the with.

    A model that is fed everything again has the rows of the last time.
    """

    def __init__(
        self,
        taps: Mapping[str, Tap],
        keep: Keep,
        rows: KeptRows,
        n_rows: int,
        *,
        stops: bool = False,
        virtual: Virtual | None = None,
    ) -> None:
        self.taps = taps
        """Key -> where it is read."""
        self._keep, self._kept_rows, self._n_rows, self._stops = keep, rows, n_rows, stops
        self._n_forwards = self._n_replays = 0
        self._given: Mapping[str, Any] | None = None
        """The named arguments of the forward that begins."""
        self._virtual = virtual
        self._n_before = 0
        """The columns of virtual tokens that stand before those of the current forward. They are never kept."""
        self._columns = _Columns(virtual)
        self._n_unread = 0
        """How many sites of the current forward are still to be read."""
        self._n_reads = dict.fromkeys(taps, 0)
        self._step: Step | None = None
        """The step that is being recorded, to be replayed later."""
        self._is_ignoring = False
        self._is_settled = False

    @property
    def dtype(self) -> torch.dtype | None:
        """To which rows are narrowed; None leaves them as the model computes them."""
        return self._kept_rows.dtype

    @property
    def n_forwards(self) -> int:
        """How many forwards have begun, with those that were replayed."""
        return self._n_forwards + self._n_replays

    def begins(self, given: Mapping[str, Any]) -> None:
        """The model is called. given: its named arguments. Raises CaptureError when virtual tokens are not where they are known to be."""
        self._given, self._n_before = given, 0
        if self._virtual is not None and not self._is_ignoring:
            self._begins_with(self._virtual, given)

    def _begins_with(self, virtual: Virtual, given: Mapping[str, Any]) -> None:
        """A forward of a model with a soft prompt begins. Its embeddings may have been computed before, and the ids been fed by that."""
        embedded, cache = given.get("inputs_embeds"), cache_in(given)
        if embedded is not None and virtual.are_columns:
            self._given = None
            n_found = self._n_before = embedded.shape[1] - self._columns.n
        else:
            n_cached = 0 if cache is None else int(cache.get_seq_length())
            n_fed = self._columns.first + self._columns.n
            is_first = virtual.are_cached and n_cached == virtual.n
            n_found = n_cached if is_first else n_cached - n_fed
        if n_found != virtual.n:
            raise CaptureError(
                f"a forward has {n_found} columns of virtual tokens; {virtual.n} of {virtual.method} were expected, so that it is not known "
                "which row is which token's."
            )

    def feed(self, ids: Tensor | None) -> None:
        """A forward feeds these token ids [batch, columns]: the columns after those before, or all of them again.

        Raises CaptureError when the batch has another number of rows.
        """
        if self._is_ignoring or self._step is not None:
            return
        self._kept_rows.end()
        self._n_unread = len(self._n_reads)
        self._n_forwards += 1
        anew = self._columns_begin(ids, self._given)
        self._given = None
        if anew:
            self._kept_rows.forget()
        self._kept_rows.begin(self._keep(self._columns.first, self._columns.n), self._columns.first, self._columns.n)

    def _columns_begin(self, ids: Tensor | None, given: Mapping[str, Any] | None) -> bool:
        """Note the ids that are fed. Returns whether everything is fed again. Raises CaptureError."""
        if ids is None or ids.dim() != 2 or len(ids) != self._n_rows:
            shape = None if ids is None else tuple(ids.shape)
            raise CaptureError(
                f"the embedding was given ids of shape {shape}; expected [{self._n_rows}, columns]. Beam search, "
                "assisted decoding and several sequences a prompt cannot be captured."
            )
        # what embeds ids before the model is called computes the soft prompt again, and all that follows
        is_embedded = self._virtual is not None and self._virtual.are_columns and given is None
        anew = is_embedded or self._columns.are_fed_again(ids, given)
        self._columns.begin(ids, anew=anew)
        return anew

    def read(self, key: str, tap: Tap, value: Tensor | None) -> None:
        """Keep what is wanted of a module's value [batch, columns, width] in the current forward.

        Raises Enough after the last site, when the recording stops forwards; CaptureError when a hook is called twice in a forward.
        """
        if self._is_ignoring:
            return
        if value is None:
            raise CaptureError(f"the module of {key} ({tap.module}) gave no tensor.")
        value = tap.joined(tap.stream_of(value.detach()))
        if self._step is not None:
            self._step.put(key, tap.take(value.reshape(self._n_rows, -1)))
            return
        self._n_reads[key] += 1
        if self._n_reads[key] != self._n_forwards:
            raise CaptureError(f"the hook of {key} fired {self._n_reads[key]} times in {self._n_forwards} forwards.")
        if value.dim() == 2:  # some blocks flatten batch and columns
            value = value.view(-1, self._n_before + self._columns.n, value.shape[-1])
        if self._n_before:
            value = self._of_tokens(key, value)
        self._kept_rows.learn(key, tap, value)
        self._kept_rows.see(key, tap, value)
        self._n_unread -= 1
        if self._stops and not self._n_unread:
            self._kept_rows.end(is_whole=False)
            raise Enough

    def _of_tokens(self, key: str, value: Tensor) -> Tensor:
        """A value without the columns of virtual tokens. value: [batch, columns, width]; of logits, the last columns may be there alone."""
        n_all = self._n_before + self._columns.n
        if value.shape[1] != n_all and not (key == "logits" and value.shape[1] < n_all):
            raise CaptureError(
                f"{key}: {value.shape[1]} columns; expected {self._columns.n} after {self._n_before} of virtual tokens."
            )
        return value[:, -self._columns.n :]

    def ends(self) -> None:
        """The model has computed its output."""
        if not self._is_ignoring and self._step is None:
            self._kept_rows.end()

    @contextmanager
    def ignoring(self) -> Iterator[None]:
        """Record nothing of the forwards inside the with."""
        self._is_ignoring = True
        try:
            yield
        finally:
            self._is_ignoring = False

    @contextmanager
    def taping(self, device: torch.device) -> Iterator[Step]:
        """Inside the with, one forward of one column is run while it is recorded, to be replayed. It counts as no forward.

        Its hooks copy their rows into the step. A forward must have been recorded before. Raises CaptureError when a hook is not called once.
        """
        self._kept_rows.end()
        self._step = Step(self._kept_rows.formats, self._n_rows, device)
        try:
            yield self._step
            self._step.check()
        finally:
            self._step = None

    def replayed(self, step: Step, ids: Tensor) -> None:
        """A replay of a step was started, which feeds ids [batch, 1]. Its rows are copied before the next replay may overwrite them."""
        self._kept_rows.end()
        self._n_replays += 1
        self._columns_begin(ids.clone(), None)
        self._kept_rows.begin(self._keep(self._columns.first, 1), self._columns.first, 1)
        self._kept_rows.replayed(step)

    def close(self) -> None:
        """The last forward is over. Check that every hook was called in every forward, and send what was kept.

        Raises CaptureError when one was not.
        """
        for key, n_reads in self._n_reads.items():
            if n_reads != self._n_forwards:
                raise CaptureError(f"the hook of {key} fired {n_reads} times in {self._n_forwards} forwards.")
        self._kept_rows.flush()

    def settle(self) -> None:
        """Wait until every row has arrived. What reads rows calls this itself.

        Raises CaptureError when one did not arrive, or when a value does not fit into float16.
        """
        if not self._is_settled:
            self._kept_rows.settle()
            self._is_settled = True

    @cached_property
    def rows(self) -> Mapping[str, Tensor]:
        """Key -> [n_kept, width], on the CPU: all that was kept, forward after forward."""
        self.settle()
        return self._ordered(self._kept_rows.all_rows())

    def fed_ids(self) -> Tensor:
        """The token ids of all forwards: [batch, columns], on the CPU."""
        return self._columns.ids()

    def was_fed(self, ids: Tensor) -> Tensor:
        """Whether the model was fed just these ids [batch, columns]: one bool on their device, for which nothing waits."""
        return self._columns.are(ids)

    def fed(self, row: int) -> list[int]:
        """The token ids that the model was given in one batch row, column after column."""
        return self._columns.ids()[row].tolist() if self.n_forwards else []

    def will_give(self, n_rows: int) -> None:
        """`runs` will be asked for so many rows in all. When this is less than half of the rows that there is room for, it copies them, so that
        a few rows do not keep the room of a whole batch."""
        self._kept_rows.will_give(n_rows)

    def runs(self, row: int, columns: Sequence[int]) -> list[Mapping[str, Tensor]]:
        """Some columns of one batch row, in one part or several that follow each other, as they arrived.

        Each is key -> [n_columns, width], on the CPU, in the dtype that is kept. Raises CaptureError for a column that was not kept.
        """
        self.settle()
        return [self._ordered(run) for run in self._kept_rows.runs(row, columns)]

    def _ordered(self, by_key: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """In the order in which the keys were asked for, whatever order the hooks were called in."""
        return {key: by_key[key] for key in self._n_reads if key in by_key}

    def take(self, row: int, columns: Iterable[int]) -> dict[str, Tensor]:
        """Some columns of one batch row: key -> [n_columns, width], as in `runs`, in one part."""
        runs = self.runs(row, list(columns))
        if len(runs) == 1:
            return dict(runs[0])
        return {key: torch.cat([run[key] for run in runs]) for key in runs[0]}


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
    waits: bool = True,
    n_columns: int | None = None,
) -> Iterator[Recording]:
    """Record sites of a model in every forward inside the with.

    taps: key -> where it is read, from `Layout.pick`. embedding: `Layout.embedding`. keep: says what is kept of a forward.
    n_rows: the number of rows of the batch, the same in every forward. dtype: what is kept is narrowed to it; None leaves the model's.
    stops: whether a forward ends, by raising Enough, as soon as all taps are read. Whoever runs the model must catch that.
    waits: whether the end of the with waits until all rows have arrived; without it, whoever reads the rows waits.
    n_columns: the most columns of all forwards together, when that is known: then room is made for them at once.
    Raises CaptureError when a forward has another number of rows, when a hook is not called exactly once in each forward, and when a value
    does not fit into float16.
    """
    whole = inner(model)
    virtual = virtual_tokens(model)
    recording = Recording(taps, keep, KeptRows(whole, n_rows, dtype, n_columns), n_rows, stops=stops, virtual=virtual)
    with alone_with(model), Hooks() as hooks:

        def feed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recording.feed(input_of(args, kwargs))

        def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recording.begins(kwargs)

        def ends(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            recording.ends()

        hooks.before(whole, begins)
        if "logits" in taps:
            hooks.before(whole, _refuse_some_logits)
        hooks.before(model.get_submodule(embedding), feed)
        for key, tap in taps.items():
            if tap.then is not None:
                tap.then.refresh(model.get_submodule(tap.module))
            _install(hooks, model, key, tap, recording)
        hooks.after(whole, ends)
        yield recording
    recording.close()
    if waits:
        recording.settle()


def _refuse_some_logits(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise CaptureError(
            "logits_to_keep names columns, so that it is not known which logits are where; give a number, or leave it out."
        )


def _install(hooks: Hooks, model: nn.Module, key: str, tap: Tap, recording: Recording) -> None:
    """Hook the modules of one tap."""
    module, added = model.get_submodule(tap.module), AddedOutputs(hooks, model, tap)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.read(key, tap, input_of(args, kwargs, tap.elements))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recording.read(key, tap, added.with_last(tensor_of(output, tap.elements)))

    if tap.end == "input":
        hooks.before(module, before)
    else:
        hooks.after(module, after)
