"""References to what hooks saw on a GPU, until the rows of a forward are gathered from them, and the proof that nobody wrote there meanwhile.

A reference costs no work on the GPU, a copy does. But a model may change a tensor in place after the hook saw it. So in the first recording of
a model every row is copied at its hook as well, and compared at the end of the forward. From then on a place that was never changed is kept
by reference. Torch counts the changes of a tensor, and a changed count raises.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from AutomaticEval.errors import CaptureError
from AutomaticEval.models.layout import Tap


class Place(NamedTuple):
    """A place in a model where a hook reads."""

    module: str
    end: str
    elements: tuple[int, ...]
    earlier: tuple[str, ...]
    """Modules whose outputs are added."""
    is_step: bool
    """Whether the forward feeds one column. Models may compute those in another way."""


_is_unchanged: weakref.WeakKeyDictionary[nn.Module, dict[Place, bool]] = weakref.WeakKeyDictionary()
"""Model -> place -> whether what a hook saw there was still the same when the forward ended. Places that were never compared are not there."""


class Reading(NamedTuple):
    """What one hook saw."""

    key: str
    place: Place
    value: Tensor | None
    """The tensor itself, when it is gathered or compared at the end of the forward."""
    version: int
    """Torch's count of changes of the tensor, at the hook."""
    rows: Tensor | None
    """A copy of the kept rows, when one was made at the hook."""


class References:
    """What the hooks of one forward saw on one device, until it is gathered."""

    def __init__(self, model: nn.Module) -> None:
        self._known = _is_unchanged.setdefault(model, {})
        self._readings: list[tuple[Reading, Callable[[Tensor], Tensor]]] = []
        self._compared: list[tuple[Place, Tensor]] = []
        """Places, and whether the model left them unchanged: a number on the device, [], bool."""
        self.n_bytes = 0
        """Bytes on the device that are kept until the next gathering."""

    def see(self, key: str, tap: Tap, value: Tensor, rows_of: Callable[[Tensor], Tensor], *, is_step: bool) -> None:
        """A hook sees a value. rows_of: takes its kept rows, [n_kept, width]."""
        place = Place(tap.module, tap.end, tap.elements, tap.earlier, is_step)
        counts = not value.is_inference()  # tensors of inference mode do not count their changes
        known = self._known.get(place) if counts else False
        rows = None if known else owned(rows_of(value), value)
        kept = None if known is False else value
        self._readings.append((Reading(key, place, kept, value._version if counts else 0, rows), rows_of))
        self.n_bytes += sum(each.untyped_storage().nbytes() for each in (kept, rows) if each is not None)

    def gather(self, *, is_end: bool) -> dict[str, Tensor]:
        """The rows of every key that was seen since the last gathering: key -> [n_kept, width], on the device.

        is_end: whether the forward is over. What is compared before that proves nothing, and such a place is copied for ever. Raises CaptureError when a value that was kept by reference was changed.
        """
        readings, self._readings, self.n_bytes = self._readings, [], 0
        gathered = {}
        for reading, rows_of in readings:
            rows = reading.rows
            if reading.value is not None:
                rows = self._checked(reading, rows_of, is_end=is_end)
            assert rows is not None
            gathered[reading.key] = rows
        return gathered

    def _checked(self, reading: Reading, rows_of: Callable[[Tensor], Tensor], *, is_end: bool) -> Tensor:
        assert reading.value is not None
        is_same = reading.value._version == reading.version
        now = rows_of(reading.value)
        if reading.rows is not None:
            is_equal = (_bits(now) == _bits(reading.rows)).all()
            self._compared.append((reading.place, is_equal & (is_same and is_end)))
            return reading.rows
        if not is_same:
            self._known[reading.place] = False
            raise CaptureError(
                f"the model changed the {reading.place.end} of {reading.place.module} in place after {reading.key} was read, which it did "
                "not do when this was tested. Nothing of this forward was stored. Run it again: its rows are copied at once from now on."
            )
        return now

    def conclude(self) -> None:
        """Note which places the model left unchanged. Waits for the device if any were compared."""
        compared, self._compared = self._compared, []
        if not compared:
            return
        for (place, _), is_unchanged in zip(
            compared, torch.stack([each for _, each in compared]).tolist(), strict=True
        ):
            self._known[place] = self._known.get(place, True) and is_unchanged


def owned(rows: Tensor, value: Tensor) -> Tensor:
    """The rows, in memory of their own."""
    is_view = rows.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    return rows.clone() if is_view else rows


def _bits(rows: Tensor) -> Tensor:
    """The bytes of rows, so that NaN equals NaN."""
    return rows.contiguous().view(-1).view(torch.uint8)
