"""What each head's result adds to a difference of logits by itself: through the final norm, its size left as it was, and the unembedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from AutomaticEval.analysis.words.targets import Target, check_target
from AutomaticEval.errors import SiteUnavailable
from AutomaticEval.models.architecture.forward_call import input_device
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.frozen_norm import FrozenNorm, frozen
from AutomaticEval.models.head_weights import output_weight
from AutomaticEval.models.hook_handles import Hooks
from AutomaticEval.models.layout import Tap
from AutomaticEval.sites import Site

FINAL = Site("final_norm")


class DirectEffects:
    """Of all heads of a model, on some targets.

    targets: one at least. Raises PromptError for one without tokens, SiteUnavailable for a model whose final norm or unembedding are not what
    they are elsewhere.
    Source: direct logit attribution, Elhage et al. 2021.
    """

    def __init__(self, loaded: LoadedModel, targets: Sequence[Target]) -> None:
        for target in targets:
            check_target(target, loaded.model.config.get_text_config().vocab_size)
        self._layout = layout = loaded.layout
        self._final_tap = layout.pick([FINAL])[FINAL.key]
        _check_unembedding(loaded.model, self._final_tap.module)
        self._final = self._frozen(loaded.model, self._final_tap.module)
        before_norm = self._final.back(_unembedded(loaded.model, targets, layout.d_model))  # [n_targets, d_model]
        self._post: dict[int, FrozenNorm] = {}
        self._directions: list[Tensor] = []
        """Of each layer: [n_targets, n_heads, d_head], what z is multiplied by."""
        for layer in range(layout.n_layers):
            self._directions.append(self._of_layer(loaded.model, layer, before_norm))

    def _of_layer(self, model: Any, layer: int, direction: Tensor) -> Tensor:
        added, projection = self._taps_of(layer)
        if not f"{projection.module}.".startswith(f"{added.module}."):  # a norm stands between the two
            self._post[layer] = self._frozen(model, added.module)
            direction = self._post[layer].back(direction)
        weight = output_weight(model.get_submodule(projection.module)).cpu()  # [n_heads * d_head, d_model]
        found: Tensor = (weight @ (direction * added.scale).T).T
        return found.view(len(direction), self._layout.n_heads, -1)

    def _frozen(self, model: Any, path: str) -> FrozenNorm:
        return frozen(model.get_submodule(path), self._layout.d_model, model.dtype)

    def _taps_of(self, layer: int) -> tuple[Tap, Tap]:
        """Of what attention adds, and of its output projection."""
        sites = (Site("attn_out", layer), Site("z", layer))
        added, z = self._layout.pick(sites).values()
        return added, z

    @property
    def taps(self) -> dict[str, Tap]:
        """What a forward is read at for `of`."""
        own = {"final_norm_input": Tap(self._final_tap.module, "input"), FINAL.key: self._final_tap}
        own |= self._layout.pick(Site("z", layer) for layer in range(self._layout.n_layers))
        for layer in self._post:
            added, projection = self._taps_of(layer)
            own |= {f"{layer}.given": Tap(projection.module, "output"), f"{layer}.gave": Tap(added.module, "output")}
        return own

    def of(self, rows: Mapping[str, Tensor]) -> Tensor:
        """rows: key -> [n, width], of `taps`. Returns [n, n_targets, n_layers, n_heads], float32, in logits."""
        size = self._final.sizes(rows["final_norm_input"], rows[FINAL.key])  # [n]
        found: list[Tensor] = []
        for layer, directions in enumerate(self._directions):
            z = rows[Site("z", layer).key].float().view(len(size), self._layout.n_heads, -1)
            effects = torch.einsum("nhd,thd->nth", z, directions)
            if layer in self._post:
                own = self._post[layer].sizes(rows[f"{layer}.given"], rows[f"{layer}.gave"])
                effects = effects / own[:, None, None]
            found.append(effects / size[:, None, None])
        return torch.stack(found, 2)


def _unembedded(model: Any, targets: Sequence[Target], d_model: int) -> Tensor:
    """[n_targets, d_model], float32. The product of a row with the final norm's output is the target's difference of logits."""
    tokens = sorted({token for target in targets for token in (*target.answer, *target.against)})
    rows = dict(zip(tokens, _unembedding_rows(model, tokens, d_model), strict=True))
    found = [
        torch.stack([rows[t] for t in one]).mean(0) - torch.stack([rows[t] for t in o]).mean(0) for one, o in targets
    ]
    return torch.stack(found)


def _unembedding_rows(model: Any, tokens: Sequence[int], d_model: int) -> Tensor:
    """[n_tokens, d_model], float32. For a quantised, adapted or offloaded unembedding each row is computed as the derivative of its logit."""
    head = model.get_output_embeddings()
    weight = head.weight
    if type(head) is nn.Linear and not weight.is_meta:
        plain: Tensor = weight.detach()[list(tokens)].float().cpu()
        return plain
    given = torch.zeros(1, d_model, dtype=model.dtype, device="cpu" if weight.is_meta else weight.device)
    given.requires_grad_()
    found: list[Tensor] = []
    with torch.enable_grad():
        logits = head.forward(given)[0]
        for token in tokens:  # one by one: sums would be rounded in the model's dtype
            found += torch.autograd.grad(logits[token], given, retain_graph=True)
    return torch.cat(found).float().cpu()


def _check_unembedding(model: Any, norm: str) -> None:
    """Raises SiteUnavailable when the unembedding is given something else than the final norm gives."""
    head = model.get_output_embeddings()
    seen: dict[str, Tensor] = {}
    with Hooks() as hooks, torch.no_grad():
        if head is not None:
            hooks.before(head, lambda module, args, kwargs: seen.update(given=args[0]))
        hooks.after(model.get_submodule(norm), lambda module, args, output: seen.update(gave=output))
        model(input_ids=torch.tensor([[1, 2]], device=input_device(model)))
    given = seen.get("given")
    if given is None or given.shape[-1] != seen["gave"].shape[-1]:
        is_same = False
    else:
        is_same = torch.equal(given[0, -1].to(seen["gave"].device), seen["gave"][0, -1])
    if not is_same:
        raise SiteUnavailable(
            f"what {type(model).__name__}'s unembedding is given is not what its final norm gives, so that what heads add to "
            "logits is not known."
        )
