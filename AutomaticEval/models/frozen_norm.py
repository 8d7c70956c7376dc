"""A norm (LayerNorm, RMSNorm) as a linear map: the size by which it divides is held fixed.

Then the output of the norm for a sum is the sum of what each part contributes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from AutomaticEval.errors import SiteUnavailable


class FrozenNorm(NamedTuple):
    """A norm written as norm(x) = gain * (x - mean(x)) / size(x) + offset; the mean is subtracted only if the norm is centred."""

    gain: Tensor
    """[d_model], float32"""
    offset: Tensor
    """[d_model], float32"""
    is_centred: bool

    def back(self, direction: Tensor) -> Tensor:
        """The direction before the norm whose product with x is that of `direction` with the output of the norm, times size(x).

        direction: [..., d_model], after the norm. The offset is left out. Returns [..., d_model].
        """
        before = direction * self.gain
        return before - before.mean(-1, keepdim=True) if self.is_centred else before

    def sizes(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """[n]: the size by which the norm divided each row. inputs, outputs: [n, d_model], of the norm."""
        whole = self.before_size(inputs.float())
        sizes: Tensor = (whole * whole).sum(-1) / (whole * (outputs.float() - self.offset)).sum(-1)
        return sizes

    def before_size(self, inputs: Tensor) -> Tensor:
        """gain * (x - mean(x)): the output of the norm before it is divided by the size. inputs: [..., d_model]."""
        return self.gain * (inputs - inputs.mean(-1, keepdim=True) if self.is_centred else inputs)


def frozen(norm: nn.Module, d_model: int, dtype: torch.dtype) -> FrozenNorm:
    """The gain, offset and centring of a norm, found from what it gives for a few inputs, and checked. dtype: that of the stream.

    Raises SiteUnavailable for a module that is not gain * (x - mean) / size + offset.
    """
    draw = torch.Generator().manual_seed(0)
    signs = torch.ones(d_model)
    signs[torch.randperm(d_model, generator=draw)[: d_model // 2]] = -1
    drawn = torch.randn(4, d_model, generator=draw)
    inputs = torch.cat([torch.zeros(1, d_model), signs[None], drawn, drawn + 2]).to(dtype)
    weight = next(norm.parameters(), inputs)
    with torch.no_grad():
        outputs = norm.forward(inputs.to("cpu" if weight.is_meta else weight.device)).float().cpu()
    inputs = inputs.float()
    is_centred = bool((outputs[6:] - outputs[2:6]).abs().max() < 0.1 * outputs[2:6].abs().max())
    without_gain = FrozenNorm(torch.ones(d_model), outputs[0], is_centred)
    measured = without_gain._replace(gain=(outputs[1] - outputs[0]) / without_gain.before_size(inputs[1]))
    sizes = measured.sizes(inputs[2:], outputs[2:])[:, None]
    expected = measured.before_size(inputs[2:]) / sizes + measured.offset
    difference = (outputs[2:] - expected).abs().max()
    explained = 32 * torch.finfo(dtype).eps * (1 + outputs[2:].abs().max())
    if not bool(difference <= explained):  # also when it is NaN
        raise SiteUnavailable(
            f"{type(norm).__name__} is not gain * (x - mean) / size + offset, to {float(difference):.2g}; what passes it has no parts."
        )
    return measured
