"""A norm whose size is held fixed. What each part of a sum contributes to the norm's output is then linear in that part."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from AutomaticEval.errors import SiteUnavailable


class FrozenNorm(NamedTuple):
    """norm(x) = gain * (x - its mean, if it is centred) / size(x) + offset."""

    gain: Tensor
    """[d_model], float32"""
    offset: Tensor
    """[d_model], float32"""
    is_centred: bool

    def back(self, direction: Tensor) -> Tensor:
        """Carries a direction [..., d_model] from behind the norm to before it. The factor 1 / size is left out, since it differs by row."""
        before = direction * self.gain
        return before - before.mean(-1, keepdim=True) if self.is_centred else before

    def sizes(self, given: Tensor, gave: Tensor) -> Tensor:
        """[n]: what each row [n, d_model] that the norm was given is divided by, as what it gave tells."""
        whole = self.before_size(given.float())
        found: Tensor = (whole * whole).sum(-1) / (whole * (gave.float() - self.offset)).sum(-1)
        return found

    def before_size(self, given: Tensor) -> Tensor:
        """given: [..., d_model], what the norm is given."""
        return self.gain * (given - given.mean(-1, keepdim=True) if self.is_centred else given)


def frozen(norm: nn.Module, d_model: int, dtype: torch.dtype) -> FrozenNorm:
    """Found from what a norm gives. dtype: of the stream.

    Raises SiteUnavailable for a module that is none (LayerNorm, RMSNorm and their like).
    """
    draw = torch.Generator().manual_seed(0)
    signs = torch.ones(d_model)
    signs[torch.randperm(d_model, generator=draw)[: d_model // 2]] = -1
    some = torch.randn(4, d_model, generator=draw)
    given = torch.cat([torch.zeros(1, d_model), signs[None], some, some + 2]).to(dtype)
    weight = next(norm.parameters(), given)
    with torch.no_grad():
        gave = norm.forward(given.to("cpu" if weight.is_meta else weight.device)).float().cpu()
    given = given.float()
    is_centred = bool((gave[6:] - gave[2:6]).abs().max() < 0.1 * gave[2:6].abs().max())
    without_gain = FrozenNorm(torch.ones(d_model), gave[0], is_centred)
    found = without_gain._replace(gain=(gave[1] - gave[0]) / without_gain.before_size(given[1]))
    expected = found.before_size(given[2:]) / found.sizes(given[2:], gave[2:])[:, None] + found.offset
    off, slack = (gave[2:] - expected).abs().max(), 32 * torch.finfo(dtype).eps * (1 + gave[2:].abs().max())
    if not bool(off <= slack):  # nan is off, too
        raise SiteUnavailable(
            f"{type(norm).__name__} is not gain * (x - mean) / size + offset, to {float(off):.2g}; what passes it has no parts."
        )
    return found
