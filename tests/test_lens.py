"""The logit lens, held against transformers' own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import ALL, build
from torch import nn

from AutomaticEval.analysis.lens.logit_lens import LogitLens
from AutomaticEval.errors import SiteUnavailable
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

IDS = [3, 141, 59, 26, 5, 35]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "granite", "opt", "gpt_neox"])
def test_the_last_layers_ranks_are_the_models_and_each_layers_those_of_norm_and_head(name: str, tokenizer: Any) -> None:
    loaded = LoadedModel(build(ALL[name]()), tokenizer, name)
    lens = LogitLens(loaded)
    kept: list[torch.Tensor] = []
    norm = loaded.model.get_submodule(
        loaded.layout.taps[next(s for s in loaded.layout.taps if s.kind == "final_norm")].module
    )

    def keep(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        kept.append(args[0][0].detach())

    handle = norm.register_forward_pre_hook(keep)
    with torch.no_grad():
        out = loaded.model(torch.tensor([IDS]), output_hidden_states=True)
    handle.remove()
    token = 77
    expected = [int((row > row[token]).sum()) + 1 for row in out.logits[0]]
    assert lens.ranks(kept[0], token) == expected
    with torch.no_grad():
        middle = loaded.model.get_output_embeddings()(norm(out.hidden_states[1][0]))
    assert torch.equal(lens.logits(out.hidden_states[1][0]), middle)


def test_rows_of_the_stores_dtype_are_read(tokenizer: Any) -> None:
    lens = LogitLens(LoadedModel(build(ALL["llama"]()), tokenizer, "llama"))
    rows = torch.randn(3, lens._norm.weight.shape[0])
    assert torch.allclose(lens.logits(rows.bfloat16()), lens.logits(rows.bfloat16().float()))


def test_a_model_that_does_more_to_the_stream_is_refused(tokenizer: Any) -> None:
    loaded = LoadedModel(build(ALL["llama"]()), tokenizer, "llama")

    class Turned(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return -self.head(rows)

    plain = loaded.model.lm_head
    loaded.model.get_output_embeddings = lambda: plain
    loaded.model.lm_head = Turned(plain).eval()
    with pytest.raises(SiteUnavailable, match=r"has no logit lens: its logits are not those of its final norm"):
        LogitLens(loaded)
