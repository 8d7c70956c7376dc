"""The kept rows of a recording, from the hooks that see them to their last place on the CPU.

Rows of a model on the CPU are copied there at the hook. Rows of a GPU are gathered once a forward from references, and sent through a ring;
those of decode steps, which are small, wait on the device until there are enough of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from AutomaticEval.errors import CaptureError
from AutomaticEval.models.layout import Tap
from AutomaticEval.models.transfer.host_rows import HostRows, OneForward, Steps, runs_of
from AutomaticEval.models.transfer.kept_positions import Forward, Kept, is_whole
from AutomaticEval.models.transfer.references import References, owned
from AutomaticEval.models.transfer.ring import STAGED, Sending, ring_of
from AutomaticEval.models.transfer.step import Step
from AutomaticEval.samples import RowFormat

MOST_REFERENCED = 32 << 20
"""Bytes on a device that references and copies may keep alive. Beyond it, rows are gathered before the forward ends."""
MOST_PACKED = 4 << 20
"""Bytes of decode steps that wait on a device until they are sent."""
FEWEST_STEPS, MOST_STEPS = 16, 256
"""For how many decode steps room is made on the CPU at once."""


@dataclass
class _Pack:
    """The rows of some keys in steps that follow each other, which wait on the device: each [n_rows, width] of every key."""

    steps: Steps
    formats: Mapping[str, RowFormat]
    first: int
    flats: list[Tensor]

    @property
    def n_bytes(self) -> int:
        return sum(flat.numel() * flat.element_size() for flat in self.flats)


class KeptRows:
    """Takes the kept rows of forward after forward, and gives them when all have arrived."""

    def __init__(self, model: nn.Module, n_rows: int, dtype: torch.dtype | None, n_columns: int | None) -> None:
        """n_rows: of the batch. dtype: rows are narrowed to it; None leaves them. n_columns: the most columns of all forwards, if known."""
        self._model, self._n_rows, self.dtype, self._n_columns = model, n_rows, dtype, n_columns
        self.formats: dict[str, RowFormat] = {}
        """Of the keys that were seen."""
        self._holders: list[HostRows] = []
        self._copies = False
        """Whether `runs` gives copies."""
        self._forward: Forward | None = None
        self._references: dict[torch.device, References] = {}
        self._sendings: dict[torch.device, Sending] = {}
        self._packs: dict[tuple[torch.device, tuple[str, ...]], _Pack] = {}

    def begin(self, kept: Kept | None, first: int, n_columns: int) -> None:
        """A forward begins, which feeds n_columns columns from number `first` on."""
        self.end()
        self._forward = None
        if kept is None or not len(kept.rows):
            return
        kept = Kept(*(each.cpu() for each in kept))
        forward = Forward(kept, first, n_columns, is_whole(kept, first, n_columns, self._n_rows))
        if forward.is_whole and n_columns == 1 and self.formats:
            steps = self._steps_from(first)
            forward.step = steps.n
            steps.n += 1
        else:
            self._holders.append(OneForward(*kept))
        self._forward = forward

    def _steps_from(self, first: int) -> Steps:
        """Room for a step that feeds column `first`."""
        last = self._holders[-1] if self._holders else None
        if isinstance(last, Steps) and last.n < last.most and last.first + last.n == first:
            return last
        most = 2 * last.most if isinstance(last, Steps) else FEWEST_STEPS
        if self._n_columns is not None and self._n_columns > first:
            most = self._n_columns - first
        steps = Steps(self._n_rows, first, min(most, MOST_STEPS))
        self._holders.append(steps)
        return steps

    def learn(self, key: str, tap: Tap, value: Tensor) -> None:
        """The format of a key, from the first value [batch, columns, width] that is seen of it."""
        if key not in self.formats:
            none = self._narrowed(tap.take(value[:0, 0]))
            self.formats[key] = RowFormat(none.dtype, none.shape[-1])

    def see(self, key: str, tap: Tap, value: Tensor) -> None:
        """A hook sees a value [batch, columns, width] in the current forward. Raises CaptureError."""
        forward = self._forward
        if forward is None:
            return

        def rows_of(value: Tensor) -> Tensor:
            return self._narrowed(tap.take(forward.cut(key, value)))

        device = value.device
        if device.type not in STAGED:
            self._put(key, forward, rows_of(value), value)
            return
        if device not in self._references:
            self._references[device] = References(self._model)
        references = self._references[device]
        references.see(key, tap, value, rows_of, is_step=forward.n_columns == 1)
        if references.n_bytes >= MOST_REFERENCED:
            self._send(forward, device, references.gather(is_end=False))

    def _narrowed(self, rows: Tensor) -> Tensor:
        return rows.to(self.dtype) if self.dtype is not None and rows.is_floating_point() else rows  # ids stay

    def _put(self, key: str, forward: Forward, rows: Tensor, value: Tensor) -> None:
        """Rows of a device without a ring, [n_kept, width], straight into their place. They may be a view of value."""
        holder = self._holders[-1]
        if isinstance(holder, Steps):
            assert forward.step is not None
            holder.room(key, self.formats[key])[:, forward.step].copy_(rows)
        else:
            holder.arrays[key] = owned(rows, value).cpu()

    def end(self, *, is_whole: bool = True) -> None:
        """The current forward is over, if there is one: gather what its hooks saw. is_whole: whether the model computed all of it.

        Raises CaptureError.
        """
        for device, references in self._references.items():
            rows = references.gather(is_end=is_whole)
            if rows and self._forward is not None:
                self._send(self._forward, device, rows)

    def replayed(self, step: Step) -> None:
        """A replay of a step is over, which stands in the place of a forward that has begun."""
        forward = self._forward
        if forward is None:
            return
        device = next(iter(step.flat.values())).device
        rows = step.rows()
        if forward.step is None:
            chosen = forward.on(device, forward.first).rows
            rows = {key: each[chosen] for key, each in rows.items()}
        if device.type not in STAGED:
            for key, each in rows.items():
                self._put(key, forward, each, each)
        elif forward.step is None:
            self._send(forward, device, rows)
        else:
            for dtype, formats in step.formats.items():
                self._pack(forward.step, device, formats, step.flat[dtype].clone())

    def _send(self, forward: Forward, device: torch.device, rows: Mapping[str, Tensor]) -> None:
        """Send gathered rows, key -> [n_kept, width], to their place on the CPU, or let them wait for those of the next steps."""
        by_dtype: dict[torch.dtype, dict[str, RowFormat]] = {}
        for key in rows:
            by_dtype.setdefault(self.formats[key].dtype, {})[key] = self.formats[key]
        for dtype, formats in by_dtype.items():
            flat = torch.cat([rows[key].reshape(-1) for key in formats])
            if flat.dtype != dtype:
                raise CaptureError(f"{', '.join(formats)}: rows came as {flat.dtype}, in earlier forwards as {dtype}.")
            holder = self._holders[-1]
            if isinstance(holder, OneForward):
                self._sending(device).send(flat, holder.landing(formats))
            else:
                assert forward.step is not None
                self._pack(forward.step, device, formats, flat)

    def _pack(self, step: int, device: torch.device, formats: Mapping[str, RowFormat], flat: Tensor) -> None:
        """Let the rows of a step wait, and send what waits when it is much."""
        steps = self._holders[-1]
        assert isinstance(steps, Steps)
        n_bytes, most = flat.numel() * flat.element_size(), min(MOST_PACKED, ring_of(device).chunk_bytes)
        if n_bytes > most:
            parts = torch.split(flat, [self._n_rows * form.width for form in formats.values()])
            for (key, form), part in zip(formats.items(), parts, strict=True):
                land = steps.landing_of_rows(key, form, step)
                self._sending(device).send(part, land, form.width * form.dtype.itemsize)
            return
        place = (device, tuple(formats))
        pack = self._packs.get(place)
        if pack is not None and (
            pack.steps is not steps or pack.first + len(pack.flats) != step or pack.n_bytes + n_bytes > most
        ):
            self._send_pack(place)
            pack = None
        if pack is None:
            pack = self._packs[place] = _Pack(steps, formats, step, [])
        pack.flats.append(flat)

    def _send_pack(self, place: tuple[torch.device, tuple[str, ...]]) -> None:
        pack = self._packs.pop(place)
        land = pack.steps.landing(pack.formats, pack.first, len(pack.flats))
        self._sending(place[0]).send(torch.cat(pack.flats), land)

    def _sending(self, device: torch.device) -> Sending:
        if device not in self._sendings:
            self._sendings[device] = Sending(ring_of(device))
        return self._sendings[device]

    def flush(self) -> None:
        """Send everything that still waits on a device."""
        self.end()
        for place in list(self._packs):
            self._send_pack(place)

    def settle(self) -> None:
        """Wait until every row has arrived. Raises CaptureError when one did not, or does not fit into float16."""
        for sending in self._sendings.values():
            sending.wait()
        for references in self._references.values():
            references.conclude()
        if self.dtype == torch.float16:
            self._check_range()

    def _check_range(self) -> None:
        for key in self.formats:
            if any(holder.all_rows(key).isinf().any() for holder in self._holders if key in holder.arrays):
                raise CaptureError(
                    f"{key} holds values that float16 cannot hold (65504 at most); store it as bfloat16."
                )

    def forget(self) -> None:
        """Drop every row, because the forward that begins computes it again."""
        self.flush()
        for sending in self._sendings.values():
            sending.wait()
        self._holders, self._forward = [], None

    def all_rows(self) -> dict[str, Tensor]:
        """Key -> [n_kept, width], forward after forward."""
        return {
            key: _joined([each.all_rows(key) for each in self._holders if len(each)], form)
            for key, form in self.formats.items()
        }

    def will_give(self, n_rows: int) -> None:
        """`runs` will be asked for so many rows in all."""
        self._copies = 2 * n_rows < sum(holder.n_room for holder in self._holders)

    def runs(self, row: int, columns: Sequence[int]) -> list[Mapping[str, Tensor]]:
        """Some columns of one batch row, as parts that follow each other: key -> [n_columns, width] each. One part at least."""
        none = {key: torch.empty(0, form.width, dtype=form.dtype) for key, form in self.formats.items()}
        runs = runs_of(self._holders, row, columns) or [none]
        return [{key: rows.clone() for key, rows in run.items()} for run in runs] if self._copies else runs


def _joined(arrays: Sequence[Tensor], form: RowFormat) -> Tensor:
    if not arrays:
        return torch.empty(0, form.width, dtype=form.dtype)
    return arrays[0] if len(arrays) == 1 else torch.cat(list(arrays))
