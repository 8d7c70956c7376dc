"""Keys and values of heads that a model computes anew, in every forward, of the latents in its cache (DeepSeek's latent attention).

The projection that gives them runs over all tokens so far, and no module gives the keys as a whole. So they are computed of what the
model projects the new tokens to, by the model's own modules.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal

import torch
from torch import Tensor, nn


class LatentHeads:
    """Turns what the latent projection gives, [..., rank + d_rotated], into the keys or values of heads, before rotary: [..., n_heads * width].

    attention: the module within which the others are; they are looked up by their paths in it, as an adapter may take their place. norm: the
    latent's norm, over the first `rank` features. up: the projection of the normed latent to [n_heads, d_plain + d_value] features: for each head
    the part of its key that is not rotated, and its value. The rotated part of the key is one for all heads, and stands behind the plain part.
    """

    def __init__(
        self, kind: Literal["k", "v"], attention: nn.Module, norm: str, up: str, rank: int, n_heads: int, d_plain: int
    ) -> None:
        self.kind = kind
        self._attention, self._norm, self._up = attention, norm, up
        self._rank, self._n_heads, self._d_plain = rank, n_heads, d_plain

    @property
    def up(self) -> nn.Module:
        """The up-projection."""
        return self._attention.get_submodule(self._up)

    @property
    def mark(self) -> Hashable:
        """Its own: it reads the weights that the modules have then."""
        return self

    def refresh(self, module: nn.Module) -> None:
        """Nothing is kept from one forward to the next."""

    def __call__(self, given: Tensor) -> Tensor:
        with torch.no_grad():
            normed: Any = self._attention.get_submodule(self._norm).forward(given[..., : self._rank])
            return self.heads_of(self.up.forward(normed), given)

    def heads_of(self, up: Tensor, given: Tensor) -> Tensor:
        """The same, of what the up-projection gave: [..., n_heads * (d_plain + d_value)]."""
        by_head: Tensor = up.unflatten(-1, (self._n_heads, -1))  # type: ignore[no-untyped-call]
        if self.kind == "v":
            return by_head[..., self._d_plain :].flatten(-2)
        rotated = given[..., None, self._rank :].to(by_head).expand(*by_head.shape[:-1], -1)
        return torch.cat([by_head[..., : self._d_plain], rotated], -1).flatten(-2)
