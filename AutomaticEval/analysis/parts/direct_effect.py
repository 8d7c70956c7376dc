"""Direct logit attribution: what each head's result alone adds to a difference of logits.

The result goes through the final norm, which divides by the size it had for the whole stream, and through the unembedding.
"""

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
from AutomaticEval.models.layout import Layout, Tap
from AutomaticEval.sites import Site

FINAL = Site("final_norm")
ADDED = ("mlp_out", "attn_out", "mixer_out")
"""What blocks add: one of them at least is known where `resid_pre` and what is added give `resid_post`."""


class DirectEffects:
    """The direct effects of all heads of a model on some targets.

    targets: at least one. Raises PromptError for a target without tokens, SiteUnavailable for a model whose final norm is no LayerNorm or
    RMSNorm, whose unembedding reads something else than this norm's output, or that has a block whose additions to the stream are not known.
    Source: direct logit attribution, Elhage et al. 2021.
    """

    def __init__(self, loaded: LoadedModel, targets: Sequence[Target]) -> None:
        for target in targets:
            check_target(target, loaded.model.config.get_text_config().vocab_size)
        self._layout = layout = loaded.layout
        self._final_tap = layout.pick([FINAL])[FINAL.key]
        if layout.norm not in (None, self._final_tap.module):
            raise SiteUnavailable(
                f"{layout.norm} of {type(loaded.model).__name__} is used elsewhere than behind the last block, too, so that what heads add to "
                "logits is not computed."
            )
        _check_unembedding(loaded.model, self._final_tap.module)
        self._final = self._frozen(loaded.model, self._final_tap.module)
        before_norm = self._final.back(_unembedded(loaded.model, targets, layout.d_model))  # [n_targets, d_model]
        self._post_norms: dict[int, FrozenNorm] = {}
        """Layer -> the norm that follows its attention, in models that have one (Gemma 2)."""
        _check_stream(layout)
        self._directions = {layer: self._direction(loaded.model, layer, before_norm) for layer in layout.layers_of("z")}
        """For each layer with heads what z is multiplied by: [n_targets, n_heads, d_head]."""

    def _direction(self, model: Any, layer: int, direction: Tensor) -> Tensor:
        """What a layer's z is multiplied by. direction: [n_targets, d_model], what the stream is multiplied by."""
        added, projection = self._taps_of(layer)
        if not f"{projection.module}.".startswith(f"{added.module}."):  # a norm stands between the two
            self._post_norms[layer] = self._frozen(model, added.module)
            direction = self._post_norms[layer].back(direction)
        weight = output_weight(model.get_submodule(projection.module)).cpu()  # [n_heads * d_head, d_model]
        of_z: Tensor = (weight @ (direction * added.scale).T).T
        return of_z.view(len(direction), self._layout.n_heads, -1)

    def _frozen(self, model: Any, path: str) -> FrozenNorm:
        return frozen(model.get_submodule(path), self._layout.d_model, model.dtype)

    def _taps_of(self, layer: int) -> tuple[Tap, Tap]:
        """Where to read what attention adds to the stream, and z, the input of its output projection."""
        sites = (Site("attn_out", layer), Site("z", layer))
        added, z = self._layout.pick(sites).values()
        return added, z

    @property
    def taps(self) -> dict[str, Tap]:
        """Where a forward must be read for `of`."""
        taps = {"final_norm_input": Tap(self._final_tap.module, "input"), FINAL.key: self._final_tap}
        taps |= self._layout.pick(Site("z", layer) for layer in self._directions)
        for layer in self._post_norms:
            added, projection = self._taps_of(layer)
            taps |= {f"{layer}.given": Tap(projection.module, "output"), f"{layer}.gave": Tap(added.module, "output")}
        return taps

    def of(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Each head's direct effect on each target, in logits: [n, n_targets, n_layers, n_heads], float32. Layers are those that have heads.

        rows: key of `taps` -> [n, width].
        """
        size = self._final.sizes(rows["final_norm_input"], rows[FINAL.key])  # [n]
        per_layer: list[Tensor] = []
        for layer, directions in self._directions.items():
            z = rows[Site("z", layer).key].float().view(len(size), self._layout.n_heads, -1)
            effects = torch.einsum("nhd,thd->nth", z, directions)
            if layer in self._post_norms:
                post_size = self._post_norms[layer].sizes(rows[f"{layer}.given"], rows[f"{layer}.gave"])
                effects = effects / post_size[:, None, None]
            per_layer.append(effects / size[:, None, None])
        return torch.stack(per_layer, 2)


def _check_stream(layout: Layout) -> None:
    """Raises SiteUnavailable for a block of which it is not known that what came before stays in the stream: what heads below it add may be changed."""
    for layer in range(layout.n_layers):
        added = [Site(kind, layer) for kind in ADDED]
        if not any(site in layout.taps for site in added):
            layout.pick(added)


def _unembedded(model: Any, targets: Sequence[Target], d_model: int) -> Tensor:
    """For each target the direction whose product with the final norm's output is its difference of logits: [n_targets, d_model], float32."""
    tokens = sorted({token for target in targets for token in (*target.answer, *target.against)})
    rows = dict(zip(tokens, _unembedding_rows(model, tokens, d_model), strict=True))
    directions = [_mean_row(rows, target.answer) - _mean_row(rows, target.against) for target in targets]
    return torch.stack(directions)


def _mean_row(rows: Mapping[int, Tensor], tokens: Sequence[int]) -> Tensor:
    return torch.stack([rows[token] for token in tokens]).mean(0)


def _unembedding_rows(model: Any, tokens: Sequence[int], d_model: int) -> Tensor:
    """The unembedding's row of each token: [n_tokens, d_model], float32.

    A quantised, adapted or offloaded unembedding has no plain weight: its rows are the derivatives of the logits.
    """
    head = model.get_output_embeddings()
    weight = head.weight
    if hasattr(weight, "__tensor_flatten__"):  # of torchao
        weight = weight.dequantize()
    if type(head) is nn.Linear and not weight.is_meta:
        plain: Tensor = weight.detach()[list(tokens)].float().cpu()
        return plain
    given = torch.zeros(1, d_model, dtype=model.dtype, device="cpu" if weight.is_meta else weight.device)
    given.requires_grad_()
    derivatives: list[Tensor] = []
    with torch.enable_grad():
        logits = head.forward(given)[0]
        for token in tokens:  # one by one: sums would be rounded in the model's dtype
            derivatives += torch.autograd.grad(logits[token], given, retain_graph=True)
    return torch.cat(derivatives).float().cpu()


def _check_unembedding(model: Any, norm: str) -> None:
    """Raises SiteUnavailable when the unembedding reads something else than the final norm's output. norm: the module's path."""
    head = model.get_output_embeddings()
    seen: dict[str, Tensor] = {}
    with Hooks() as hooks, torch.no_grad():
        if head is not None:
            hooks.before(head, lambda module, args, kwargs: seen.update(given=args[0]))
        hooks.after(model.get_submodule(norm), lambda module, args, output: seen.update(gave=output))
        model(input_ids=torch.tensor([[1, 2]], device=input_device(model)))
    given, gave = seen.get("given"), seen["gave"]
    if given is None or not torch.equal(given[0, -1].to(gave.device), gave[0, -1]):
        raise SiteUnavailable(
            f"what {type(model).__name__}'s unembedding is given is not what its final norm gives, so what heads add to logits is not known."
        )
