"""The logit lens: which token a row of the residual stream would give, if the final norm and the unembedding read it at once."""

from __future__ import annotations

from typing import Any

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


class LogitLens:
    """The lens of one model. Its last layer's order of tokens is the model's own, which is checked when it is made.

    Raises SiteUnavailable for a model without a final norm or unembedding, and for one that does more to the stream before it gives logits.
    Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        final = Site("final_norm")
        self._norm = loaded.model.get_submodule(loaded.layout.pick([final])[final.key].module)
        self._unembedding: Any = loaded.model.get_output_embeddings()
        if self._unembedding is None:
            raise SiteUnavailable(f"{type(loaded.model).__name__} names no unembedding, so it has no logit lens.")
        self._check(loaded)

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

    def _check(self, loaded: LoadedModel) -> None:
        """The lens must put the tokens in the order in which the model itself puts them."""
        last = Site("resid_post", loaded.layout.n_layers - 1).key
        plain = plain_forward(loaded, list(PROBE), [last], list(PROBE), n_last=len(PROBE))
        own = plain.logits
        ordered = own.gather(1, self.logits(plain.rows[last]).argsort(dim=1, descending=True, stable=True))
        rises = (ordered[:, 1:] - ordered.cummin(dim=1).values[:, :-1]).amax(dim=1)  # of a token above one before it
        allowed = ROUNDING * (own.amax(dim=1) - own.amin(dim=1))
        if not bool((rises <= allowed).all()):
            raise SiteUnavailable(
                f"{type(loaded.model).__name__} has no logit lens: its logits are not those of its final norm and unembedding (a token is "
                f"{float((rises - allowed).max()):.3g} above one that the lens puts before it)."
            )
