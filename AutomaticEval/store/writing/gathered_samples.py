"""The samples that wait in memory for the next shard."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from AutomaticEval.errors import CaptureError
from AutomaticEval.samples import Rows, Sample
from AutomaticEval.store.contents.file_contents import RowFormat
from AutomaticEval.store.contents.from_samples import distinct_rows


class GatheredSamples:
    """Takes samples, all of the same sites, dtypes and widths, and says how large and how old they are.

    in_8_bits: they are to be stored as int8.
    """

    def __init__(self, *, in_8_bits: bool) -> None:
        self.formats: Mapping[str, RowFormat] | None = None
        """Site -> how its rows are stored. None until there are rows."""

        self._in_8_bits = in_8_bits
        self.clear()

    def clear(self) -> None:
        """Begin anew, without samples."""
        self.samples: list[Sample] = []
        self._counted: set[int] = set()
        """The ids of the Rows whose bytes are in n_bytes."""

        self.n_bytes = 0
        self._since = time.monotonic()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def age_seconds(self) -> float:
        """Since it began anew."""
        return time.monotonic() - self._since

    def add(self, samples: Sequence[Sample]) -> None:
        """Take samples. Raises CaptureError, and takes none, for rows that could not be stored together with the rest."""
        for rows in distinct_rows(samples):
            self._check(rows)
        self.samples.extend(samples)
        for sample in samples:
            self.n_bytes += sample.memory_bytes
            for part in sample.parts:
                if id(part.rows) not in self._counted:
                    self._counted.add(id(part.rows))
                    self.n_bytes += part.rows.memory_bytes

    def _check(self, rows: Rows) -> None:
        formats = rows.formats
        if self._in_8_bits:
            formats = {
                key: RowFormat(torch.int8, each.width) if each.dtype.is_floating_point else each
                for key, each in formats.items()
            }
        self.formats = self.formats or formats
        if formats != self.formats:
            raise CaptureError("these rows have not the sites, dtypes or widths of the run's others; none was taken.")
        for key, tensor in rows.activations.items() if self._in_8_bits else ():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise CaptureError(
                    f"{key} holds values that are infinite or not a number, which int8 cannot hold; use bfloat16."
                )
