"""The logit lens: which token a row of the residual stream would give, if the final norm and the unembedding read it at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from AutomaticEval.capture.recompute.plain_forward import plain_forward
from AutomaticEval.errors import SiteUnavailable
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.sites import Site

PROBE = range(5)
"""The token ids of the forward that the lens is checked with. Every vocabulary has them."""
ROUNDING = 0.01
"""Logits may be out of the lens's order by this part of their range, as by rounding."""
CAPS = ("final_logit_softcapping", "final_logit_soft_cap", "logits_soft_cap", "output_logits_soft_cap")
"""Names that configs give to a cap: logits become cap * tanh(logits / cap)."""


class Ending(NamedTuple):
    """What a model does to the unembedding's output before it is its logits: cap * tanh(scale * output / cap)."""

    scale: float = 1.0
    cap: float | None = None
    """None: there is no tanh."""

    def of(self, output: Tensor) -> Tensor:
        """[n, d_vocab], the model's logits."""
        scaled = output if self.scale == 1.0 else output * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap


class LogitLens:
    """The lens of one model. Its last layer's order of tokens is the model's own, which is checked when it is made.

    Raises SiteUnavailable for a model without a final norm or unembedding, and for one that does more to the stream before it gives logits.
    Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        final = Site("final_norm")
        tap = loaded.layout.pick([final])[final.key]
        self._norm = loaded.model.get_submodule(loaded.layout.norm or tap.module)
        self._unembedding: Any = loaded.model.get_output_embeddings()
        if self._unembedding is None:
            raise SiteUnavailable(f"{type(loaded.model).__name__} names no unembedding, so it has no logit lens.")
        self.ending: Ending | None = self._check(loaded)
        """How the model's logits follow from what the lens computes; None where that is not known, and there are ranks but no probabilities."""
        self._name = type(loaded.model).__name__

    @property
    def n_tokens(self) -> int:
        """How many logits a row has."""
        return int(self._n_tokens)

    def translated(self, rows: Tensor, *, is_normed: bool = False) -> Tensor:
        """The model's log-probabilities [n, d_vocab], float32, on its device. rows: [n, d_model]; is_normed: what the final norm gave.

        Gradients go through it to the rows. Raises SiteUnavailable for a model whose cap or scale of logits is not known.
        """
        if self.ending is None:
            raise SiteUnavailable(
                f"{self._name} does something to its logits that is neither a scale nor a cap which its config names, so the lens gives ranks "
                "and no probabilities: `show RUN --doc N --lens` prints these."
            )
        weight = next(self._norm.parameters(), next(self._unembedding.parameters()))
        rows = rows.to(weight.device, weight.dtype)
        logprobs: Tensor = self.ending.of(
            self._unembedding(rows if is_normed else self._norm(rows)).float()
        ).log_softmax(dim=-1)
        return logprobs

    def logits(self, rows: Tensor) -> Tensor:
        """[n, d_vocab], float32, on the CPU. rows: [n, d_model], of any residual site.

        A cap or scale that the model puts on its logits is left out: it does not change their order.
        """
        weight = next(self._norm.parameters(), next(self._unembedding.parameters()))
        with torch.no_grad():
            logits: Tensor = self._unembedding(self._norm(rows.to(weight.device, weight.dtype)))
        return logits.float().cpu()

    def ranks(self, rows: Tensor, token_id: int) -> list[int]:
        """For each row, the rank of a token among all tokens: 1 for the likeliest."""
        logits = self.logits(rows)
        above = logits > logits[:, token_id, None]
        return [int(n) + 1 for n in above.sum(dim=1)]

    def _check(self, loaded: LoadedModel) -> Ending | None:
        """The lens must put the tokens in the order in which the model itself puts them. Returns how the model's logits follow from the lens's."""
        last = Site("resid_post", loaded.layout.n_layers - 1).key
        plain = plain_forward(loaded, list(PROBE), [last], list(PROBE), n_last=len(PROBE))
        own, ours = plain.logits, self.logits(plain.rows[last])
        self._n_tokens = own.shape[1]
        ordered = own.gather(1, ours.argsort(dim=1, descending=True, stable=True))
        rises = (ordered[:, 1:] - ordered.cummin(dim=1).values[:, :-1]).amax(dim=1)  # of a token above one before it
        allowed = ROUNDING * (own.amax(dim=1) - own.amin(dim=1))
        if not bool((rises <= allowed).all()):
            raise SiteUnavailable(
                f"{type(loaded.model).__name__} has no logit lens: its logits are not those of its final norm and unembedding (a token is "
                f"{float((rises - allowed).max()):.3g} above one that the lens puts before it)."
            )
        return _ending(loaded, ours.double(), own.double())


def _ending(loaded: LoadedModel, output: Tensor, own: Tensor) -> Ending | None:
    """The scale and cap that make the unembedding's output [n, d_vocab] the model's own logits. None when no such pair does."""
    config = loaded.model.config.get_text_config()
    eps = torch.finfo(loaded.model.dtype).eps
    known = output.isfinite() & own.isfinite()
    output, own = output[known], own[known]
    scale = float((output @ own) / (output @ output)) if bool(output.any()) else 1.0
    caps = [float(cap) for name in CAPS if (cap := getattr(config, name, None))]
    tried = [Ending(1.0 if abs(scale - 1) < eps else scale), *(Ending(1.0, cap) for cap in caps)]
    off = [float((each.of(output) - own).square().mean().sqrt()) for each in tried]
    best = min(range(len(tried)), key=off.__getitem__)
    furthest = float((tried[best].of(output) - own).abs().max()) if len(own) else 0.0
    return tried[best] if furthest <= max(1e-5, 4 * eps) * max(1.0, float(own.abs().max())) else None
