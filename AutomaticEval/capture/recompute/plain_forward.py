"""One plain forward of one sequence, without padding, batch or cache, read by hooks of its own.

It shares nothing with capture but where the sites are (`models/find_layout.py`), so that it can show what capture got wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from AutomaticEval.capture.recompute.plain_experts import OF_EXPERTS, expert_rows
from AutomaticEval.errors import CaptureError, SiteUnavailable
from AutomaticEval.models.architecture.forward_call import alone_with, forward_takes, input_device
from AutomaticEval.models.architecture.heads.latent import LatentHeads
from AutomaticEval.models.architecture.inner_model import virtual_tokens
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.hook_handles import Hooks
from AutomaticEval.models.layout import Layout, Tap
from AutomaticEval.models.refused.unsuited import refuse_unready
from AutomaticEval.sites import Site, site_of

MASKED_NUMBERS = 2**24
"""The most numbers that an output projection is given at once, when each head is projected by itself."""


class Plain(NamedTuple):
    """What one plain forward gave, on the CPU."""

    rows: dict[str, Tensor]
    """Key -> [n_positions, width], in the dtype in which the model gave it."""

    logits: Tensor
    """[n_last, d_vocab], float32, of the last positions."""


def refuse_lacking(loaded: LoadedModel, keys: Iterable[str]) -> None:
    """Raises SiteUnavailable or UnknownSite for keys that this model does not have."""
    layers = {key: pattern_layer(key) for key in keys}
    loaded.layout.pick(
        site_of(key) if layer is None else Site("z", layer) for key, layer in layers.items() if key != "logits"
    )


def pattern_layer(key: str) -> int | None:
    """The layer of a key such as `layer_3.pattern`; None for other keys."""
    match = re.fullmatch(r"layer_(\d+)\.pattern", key)
    return int(match[1]) if match else None


def plain_forward(
    loaded: LoadedModel, ids: Sequence[int], keys: Sequence[str], positions: Sequence[int], n_last: int = 0
) -> Plain:
    """One forward over all ids: the rows of each key at some positions, and the logits of the last n_last positions.

    With a pattern among the keys the model runs eager attention, as a run that keeps patterns does.
    Raises CaptureError when a module is not used exactly once, or does not give a row for each token; SiteUnavailable.
    """
    model, layout = loaded.model, loaded.layout
    refuse_unready(model)
    layers = {key: layer for key in keys if (layer := pattern_layer(key)) is not None}
    taps = layout.pick(site_of(key) for key in keys if key not in layers and key != "logits")
    virtual = virtual_tokens(model)
    reader = _Reader(len(ids), positions, virtual.n if virtual is not None and virtual.are_columns else 0)
    n_logits = max(n_last, len(ids) - min(positions, default=len(ids)) if "logits" in keys else 0)
    arguments: dict[str, Any] = {"input_ids": torch.tensor([list(ids)], device=input_device(model))}
    takes = forward_takes(model)
    for name, value in (("use_cache", False), ("logits_to_keep", max(1, n_logits))):
        if name in takes:
            arguments[name] = value
    attending = _attending_eagerly(model) if layers else nullcontext()
    with torch.no_grad(), alone_with(model), attending, Hooks() as hooks:
        for key, tap in taps.items():
            reader.install(hooks, model.get_submodule(tap.module), key, tap)
            for path in tap.earlier:
                reader.install(hooks, model.get_submodule(path), _of_earlier(key, path), Tap("", "output"))
            if isinstance(tap.then, LatentHeads):
                reader.install(hooks, tap.then.up, _of_up(key), Tap("", "output"))
        patterns: dict[str, Tensor] = {}
        for key, layer in layers.items():
            (z, stream) = layout.pick([Site("z", layer), Site("resid_pre", layer)]).values()
            for module in _around(model, z.module, stream):
                hook = _pattern_hook(patterns, key, layout.n_heads, list(positions))
                hooks.after(module, hook)
        logits = model(**arguments).logits[0]  # [at least n_logits, d_vocab]
        rows = {key: _derived(model, layout, key, tap, reader) for key, tap in taps.items()}
    if "logits" in keys:
        rows["logits"] = logits[[position - len(ids) for position in positions]].cpu()
    for key in layers:
        if key not in patterns:
            raise SiteUnavailable(f"{key}: the attention of this block gives no weights.")
        rows[key] = patterns[key]
    return Plain(rows, logits[len(logits) - n_last :].float().cpu())


class _Reader:
    """Keeps the rows of some positions of the values of modules."""

    def __init__(self, n_ids: int, positions: Sequence[int], n_virtual: int) -> None:
        self._n_virtual = n_virtual
        """The columns of virtual tokens, which stand before those of the ids."""
        self._n_ids, self._positions = n_ids, list(positions)
        self._values: dict[str, list[list[Tensor]]] = {}

    def install(self, hooks: Hooks, module: nn.Module, key: str, tap: Tap) -> None:
        """Read the input or output of a module under a key, or those elements of it that a tap names; of several streams the tap's."""
        self._values[key] = []
        elements = tap.elements or (0,)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            if not tap.elements and not args and "hidden_states" in kwargs:
                given = [kwargs["hidden_states"]]
            self._keep(key, tap, [given[number] for number in elements])

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            output = getattr(output, "last_hidden_state", output)
            given = output if isinstance(output, tuple | list) else [output]
            self._keep(key, tap, [given[number] for number in elements])

        if tap.end == "input":
            hooks.before(module, before)
        else:
            hooks.after(module, after)

    def _keep(self, key: str, tap: Tap, values: list[Any]) -> None:
        self._values[key].append([self._kept(key, tap, each) for each in values])

    def _kept(self, key: str, tap: Tap, value: Any) -> Tensor:
        if tap.stream is not None:
            value = value[tap.stream]
        n_axes = 2 if tap.heads_apart else 1  # of one token
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == self._n_virtual + self._n_ids:
            value = value[:, self._n_virtual :]
        if not isinstance(value, Tensor) or value.shape[:-n_axes].numel() != self._n_ids:
            raise CaptureError(
                f"{key}: one sequence of {self._n_ids} tokens gave {shape}; expected a row for each token."
            )
        return value.reshape(self._n_ids, -1)[self._positions].clone()  # [n_positions, width]

    def taken(self, key: str) -> list[Tensor]:
        """[n_positions, width of the module] each: one, or those that a tap names."""
        if len(self._values[key]) != 1:
            raise CaptureError(f"{key}: its module was used {len(self._values[key])} times in one forward, not once.")
        return self._values[key][0]


def _of_up(key: str) -> str:
    """The key under which the up-projection of latents is read."""
    return f"{key} up"


def _of_earlier(key: str, path: str) -> str:
    """The key under which a module is read whose output is added to that of the site's own module."""
    return f"{key} + {path}"


def _derived(model: nn.Module, layout: Layout, key: str, tap: Tap, reader: _Reader) -> Tensor:
    """The rows of a site [n, width of the site], on the CPU, from what was read of its module [n, width of the module]."""
    values = reader.taken(key)
    site, value = site_of(key), values[0]
    if isinstance(tap.then, LatentHeads):  # without a cache the up-projection runs over just these tokens
        return tap.then.heads_of(reader.taken(_of_up(key))[0], value).cpu()
    if site.kind in OF_EXPERTS:
        n_active = layout.widths[Site("expert_ids", site.layer)]
        return expert_rows(site.kind, model.get_submodule(tap.module), values, n_active).cpu()
    if tap.then is not None:
        return _head_norms(model.get_submodule(tap.module), value, layout.n_heads).cpu()
    others = [reader.taken(_of_earlier(key, path))[0] for path in tap.earlier]
    value = sum([*others[1:], value], others[0]) if others else value
    picked = value if tap.columns is None else value[:, list(tap.columns)]
    picked = picked if tap.scale == 1.0 else picked * tap.scale
    return (picked if tap.clip is None else picked.clamp(-tap.clip, tap.clip)).cpu()


def _head_norms(projection: nn.Module, z: Tensor, n_heads: int) -> Tensor:
    """The L2 norm of what each head adds, [n, n_heads], float32.

    z: [n, n_heads * d_head]. What a head adds is the projection of z with all other heads set to zero, without the bias.
    """
    own = torch.arange(z.shape[1], device=z.device) // (z.shape[1] // n_heads)
    masks = (
        torch.arange(-1, n_heads, device=z.device)[:, None] == own
    )  # [1 + n_heads, width]; the first keeps no head, and so gives the bias
    step = max(1, MASKED_NUMBERS // masks.numel())
    norms = [torch.empty(0, n_heads, device=z.device)]
    for start in range(0, len(z), step):
        masked = torch.where(
            masks[:, None], z[None, start : start + step], torch.zeros((), dtype=z.dtype, device=z.device)
        )
        projected = projection.forward(masked).float()  # [1 + n_heads, at most step, d_model]
        norms.append((projected[1:] - projected[:1]).norm(dim=-1).T.to(z.device))
    return torch.cat(norms)


def _pattern_hook(patterns: dict[str, Tensor], key: str, n_heads: int, positions: list[int]) -> Any:
    """A hook that keeps the rows [n_positions, n_heads, key_pos] of the first 4-dimensional weights that an attention returns."""

    def after(module: nn.Module, args: Any, output: Any) -> None:
        for each in output[1:] if isinstance(output, tuple) else ():
            if isinstance(each, Tensor) and each.dim() == 4 and each.shape[1] == n_heads:
                patterns[key] = each[0][:, positions].transpose(0, 1).clone().cpu()
                return

    return after


def _around(model: nn.Module, projection: str, block: Tap) -> Iterator[nn.Module]:
    """The modules around an output projection, up to its block: one of them is the attention."""
    around = projection.rpartition(".")[0]
    while around != block.module:
        yield model.get_submodule(around)
        around = around.rpartition(".")[0]


@contextmanager
def _attending_eagerly(model: Any) -> Iterator[None]:
    """Switch the model to eager attention inside the with."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    try:
        base.set_attn_implementation("eager")
        yield
    finally:
        base.set_attn_implementation(before)
