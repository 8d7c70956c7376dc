"""Rows from a GPU: what is sent comes back, in order, whatever is overwritten meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import CONFIGS, build
from torch import Tensor

from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.transfer import Staging
from AutomaticEval.selection import Selection


class Late(Staging):
    """On the CPU: a transfer that happens only when it is waited for, as a GPU's may."""

    def _make_stream(self) -> Any:
        return None

    def _make_host(self, size: int) -> Tensor:
        return torch.full((size,), 0xAB, dtype=torch.uint8)

    def _copy(self, flat: Tensor, host: Tensor) -> Any:
        return lambda: host.copy_(flat)

    def _wait(self, event: Any) -> None:
        event()


def test_rows_of_every_forward_arrive_in_order_through_two_buffers() -> None:
    arrived: dict[str, list[Tensor]] = {}
    staging = Late(torch.device("cpu"), lambda key, rows: arrived.setdefault(key, []).append(rows))
    sent: dict[str, list[Tensor]] = {}
    for forward in range(7):
        n_rows = [5, 1, 1, 9, 0, 2, 1][forward]
        cuts = {
            "layer_0": torch.randn(n_rows, 3).to(torch.bfloat16),
            "embeddings": torch.randn(n_rows, 4),
            "layer_1": torch.randn(n_rows, 5).to(torch.float16),
        }
        for key, rows in cuts.items():
            sent.setdefault(key, []).append(rows)
        staging.send(cuts)
        assert len(arrived.get("layer_0", [])) == max(0, forward - 1)  # two on their way, no more
    staging.finish()
    for key, rows in sent.items():
        assert all(torch.equal(one, other) for one, other in zip(arrived[key], rows, strict=True))
        assert arrived[key][0].dtype == rows[0].dtype


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capture_on_a_gpu_holds_what_its_own_forward_computed(tokenizer: Any, dtype: torch.dtype) -> None:
    """Against transformers' hidden states of the same prompt on the same device."""
    model = build(CONFIGS["llama"](), dtype).to("cuda")
    loaded = LoadedModel(model, tokenizer, "llama")
    ids = tokenizer("The capital of France is a city, and its name is")["input_ids"]
    (response,) = respond(loaded, [ids], Sampling(max_new_tokens=12), Selection.parse(positions="prompt"))
    assert response.sample is not None
    with torch.no_grad():
        states = model(torch.tensor([ids], device="cuda"), output_hidden_states=True).hidden_states
    kept = response.sample.parts[0].rows.activations
    for number, key in enumerate(("embeddings", "layer_0", "layer_1")):
        assert torch.equal(kept[key], states[number][0].cpu()), key
