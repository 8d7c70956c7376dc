"""A decoder whose parts have names that nobody has, as a plain module and as the code of a checkpoint. Imports nothing of ours."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

PARTS: dict[str, Any] = {
    "blocks": "decoder.stack",
    "embedding": "decoder.tokens",
    "final_norm": "decoder.last",
    "attention": "mix",
    "out_projection": "proj",
    "mlp": "ff",
    "down_projection": "w_b",
    "q": "ask",
    "k": "label",
    "v": "carry",
    "n_heads": 4,
    "n_kv_heads": 2,
}
"""The description of the decoders here."""


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain


class Mixer(nn.Module):
    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.heads, self.shared = heads, shared
        self.ask, self.proj = nn.Linear(width, width), nn.Linear(width, width)
        self.label, self.carry = (nn.Linear(width, width * shared // heads) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        n_rows, n_tokens, width = x.shape
        q, k, v = (
            each.unflatten(-1, (-1, width // self.heads)).transpose(1, 2)
            for each in (self.ask(x), self.label(x), self.carry(x))
        )
        k, v = (each.repeat_interleave(self.heads // self.shared, 1) for each in (k, v))
        later = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        z = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        return self.proj(z.transpose(1, 2).reshape(n_rows, n_tokens, width))


class Feed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.w_a, self.w_b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_b(functional.gelu(self.w_a(x)))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.pre_a, self.mix = Scale(width), Mixer(width, heads, shared)
        self.pre_b, self.ff = Scale(width), Feed(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.pre_a(x))
        return x + self.ff(self.pre_b(x))


class Stack(nn.Module):
    def __init__(self, rows: int, width: int, heads: int, shared: int, depth: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(rows, width), nn.Embedding(1024, width)
        self.stack = nn.ModuleList(Layer(width, heads, shared) for _ in range(depth))
        self.last = Scale(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for layer in self.stack:
            x = layer(x)
        return self.last(x)


class Plain(nn.Module):
    """A plain module: no config, ids under a name of its own, a tuple that begins with the logits."""

    def __init__(self, rows: int = 400, width: int = 32, heads: int = 4, shared: int = 2, depth: int = 3) -> None:
        super().__init__()
        self.decoder = Stack(rows, width, heads, shared, depth)
        self.unembed = nn.Linear(width, rows)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        return self.unembed(self.decoder(idx)), None


class OddConfig(PretrainedConfig):
    model_type = "odd"

    def __init__(
        self, rows: int = 400, wide: int = 32, deep: int = 3, n_ways: int = 4, n_shared: int = 2, **others: Any
    ) -> None:
        self.rows, self.wide, self.deep, self.n_ways, self.n_shared = rows, wide, deep, n_ways, n_shared
        super().__init__(**others)


class OddForCausalLM(PreTrainedModel, GenerationMixin):
    """What the code of a checkpoint would hold: no get_input_embeddings, and no entry of the config that is known."""

    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.decoder = Stack(config.rows, config.wide, config.n_ways, config.n_shared, config.deep)
        self.unembed = nn.Linear(config.wide, config.rows)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, input_ids: Tensor, **others: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.unembed(self.decoder(input_ids)))


def save_odd(folder: Path, tokenizer: Any) -> OddForCausalLM:
    """Write a model folder with this file as its code, and give the model that is in it."""
    torch.manual_seed(0)
    model = OddForCausalLM(OddConfig(bos_token_id=0, eos_token_id=0, use_cache=False)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "modeling_odd.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "odd", "auto_map": names}))
    return model
