"""The rows of one decode step that is computed again and again, as a CUDA graph computes it: on the device, in memory that stays.

Hooks run once, while the step is recorded; each copies its rows to their place here. A replay does these copies again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from AutomaticEval.errors import CaptureError
from AutomaticEval.samples import RowFormat


class Step:
    """The rows of every key in one step of a batch. A later batch with the same keys and formats may use it again."""

    def __init__(self, formats: Mapping[str, RowFormat], n_rows: int, device: torch.device) -> None:
        self.n_rows = n_rows
        self.formats: dict[torch.dtype, dict[str, RowFormat]] = {}
        """By dtype, the keys in the order in which their rows stand in `flat`."""
        for key, form in formats.items():
            self.formats.setdefault(form.dtype, {})[key] = form
        with torch.inference_mode(False):
            self.flat = {
                dtype: torch.empty(n_rows * sum(form.width for form in forms.values()), dtype=dtype, device=device)
                for dtype, forms in self.formats.items()
            }
        """[n_rows, width] of every key, one after the other."""
        self._rooms = self._cut(self.flat)
        self._is_read = dict.fromkeys(formats, False)

    def _cut(self, flat: Mapping[torch.dtype, Tensor]) -> dict[str, Tensor]:
        """Key -> [n_rows, width], views of flat."""
        rooms = {}
        for dtype, forms in self.formats.items():
            parts = torch.split(flat[dtype], [self.n_rows * form.width for form in forms.values()])
            rooms.update({key: part.view(self.n_rows, -1) for key, part in zip(forms, parts, strict=True)})
        return rooms

    def put(self, key: str, rows: Tensor) -> None:
        """A hook saw the rows of a key, [n_rows, width]. Raises CaptureError when it sees them twice."""
        if self._is_read[key]:
            raise CaptureError(f"the hook of {key} fired twice in one step.")
        self._is_read[key] = True
        self._rooms[key].copy_(rows)

    def check(self) -> None:
        """The step is recorded. Raises CaptureError when a hook was not called in it."""
        absent = [key for key, is_read in self._is_read.items() if not is_read]
        if absent:
            raise CaptureError(f"the hook of {absent[0]} was not called while a step was recorded.")

    def rows(self) -> dict[str, Tensor]:
        """Key -> [n_rows, width] of the last replay, on the device. The next replay writes over them."""
        return self._rooms
