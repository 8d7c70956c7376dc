"""A ring for the CPU that copies as late as a GPU's may: only when a thread waits for the copy. Its chunks hold garbage until then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from AutomaticEval.models.transfer import kept_rows, ring
from AutomaticEval.models.transfer.ring import Ring

CPU = torch.device("cpu")


class LateRing(Ring):
    """Counts its chunks, and copies late."""

    n_made = 0

    def _make_chunk(self) -> Tensor:
        self.n_made += 1
        return torch.full((self.chunk_bytes,), 0xAB, dtype=torch.uint8)

    def _start_copy(self, part: Tensor, chunk: Tensor) -> Any:
        return lambda: chunk.copy_(part)

    def _wait(self, event: Any) -> None:
        event()


def stage_the_cpu(monkeypatch: pytest.MonkeyPatch, n_bytes: int = 8192, chunk_bytes: int = 2048) -> LateRing:
    """Rows of models on the CPU go through a ring for the rest of the test, as those of a GPU do."""
    late = LateRing(CPU, n_bytes, chunk_bytes)
    monkeypatch.setattr(ring, "STAGED", {"cuda", "cpu"})
    monkeypatch.setattr(kept_rows, "STAGED", {"cuda", "cpu"})
    monkeypatch.setattr(ring, "_rings", {CPU: late})
    return late
