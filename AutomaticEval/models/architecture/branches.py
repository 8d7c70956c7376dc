"""The rules for what the branches of a block add to the residual stream, and what lies on the way: attn_out, mixer_out, mlp_out, resid_mid, mlp_post.

A block has one branch or more: attention, another mixer of tokens, an MLP. Together they give the identity that is checked:
resid_pre + what each branch adds = resid_post.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from AutomaticEval.models.architecture.branch_reasons import why_no_branches, why_no_part, why_not_in_block
from AutomaticEval.models.architecture.identities import is_sum
from AutomaticEval.models.architecture.module_names import OUT, Kind, Parts
from AutomaticEval.models.layout import Tap
from AutomaticEval.sites import Site


class _Branch(NamedTuple):
    """A candidate for one branch: modules whose outputs, together, may be what it adds. Paths begin below the block."""

    kind: Kind
    paths: tuple[str, ...]
    """Mostly one. Several are in the order in which they run."""
    scale: float
    """What the model multiplies the outputs by."""

    def tap(self, block: str) -> Tap:
        """Where the outputs, or their sum, are read in a block."""
        *earlier, last = (f"{block}.{path}" for path in self.paths)
        return Tap(last, "output", self.scale, tuple(earlier))


_Choice = tuple[_Branch, ...]
"""A candidate for all branches of a block, one of each kind that the block has."""


def find_branches(parts: Parts) -> None:
    """Add the taps of all layers. Blocks that are built alike have one choice: the candidate for which the identity holds best."""
    alike: dict[tuple[tuple[str, ...], tuple[_Choice, ...]], list[int]] = {}
    for layer, ran in enumerate(parts.ran):
        if ran and parts.n_streams > 1:
            parts.lack((*OUT.values(), "resid_mid"), layer, why_no_branches(parts, layer, [], False))
            _find_mlp_post(parts, layer)
        elif ran:
            children = tuple(name for name, _ in parts.model.get_submodule(parts.blocks[layer]).named_children())
            alike.setdefault((children, tuple(_choices(parts, layer))), []).append(layer)
    for (_, choices), layers in alike.items():
        errors = {choice: _error(parts, choice, layers) for choice in choices}
        best = min(errors, key=lambda choice: errors[choice], default=None)
        holds = best is not None and errors[best] <= 0.25
        for layer in layers:
            if best is not None and holds:
                _take(parts, layer, best)
            else:
                _refuse(parts, layer, choices, len(layers) > 1)
            _find_resid_mid(parts, layer)
            _find_mlp_post(parts, layer)


def _choices(parts: Parts, layer: int) -> list[_Choice]:
    """The candidates of a block, the plainest first. None when it has no part that could add something."""
    slots = [_candidates(parts, layer, kind) for kind in OUT]
    return list(product(*[slot for slot in slots if slot])) if any(slots) else []


def _candidates(parts: Parts, layer: int, kind: Kind) -> list[_Branch]:
    """The candidates for one branch: the part of the block, the norm behind it, its last projection; or several parts together."""
    block, found = parts.blocks[layer], parts.parts_of(layer, kind)
    if kind == "mlp":
        paths = [*found, *parts.children(block, parts.names.post_mlp_norm), *down_projections(parts, layer)]
    else:
        ends = [path for parent in found for path in parts.named(parent, parts.names.out_projection)]
        paths = [*found, *parts.children(block, parts.names.post_attention_norm), *ends] if found else []
    groups = [(path,) for path in paths] + ([_in_turn(parts, found)] if len(found) > 1 else [])
    once = [group for group in groups if group and all(parts.probe.n_fired[path] == 1 for path in group)]
    below, scales = len(block) + 1, parts.scales(layer, kind)
    return [_Branch(kind, tuple(path[below:] for path in group), scale) for scale in scales for group in once]


def _in_turn(parts: Parts, paths: Iterable[str]) -> tuple[str, ...]:
    """Some modules in the order in which they gave their outputs; none when these cannot be added."""
    outputs, wanted = parts.probe.outputs, set(paths)
    ran = tuple(path for path in outputs if path in wanted)
    return ran if len({outputs[path].numel() for path in ran}) == 1 else ()


def down_projections(parts: Parts, layer: int) -> list[str]:
    """Paths of the output projections in a block's MLP, or in the block itself, outside of what mixes tokens, when that is the MLP."""
    mixing = [f"{path}." for kind in ("attention", "mixer") for path in parts.parts_of(layer, kind)]
    return [
        path
        for parent in _mlps(parts, layer)
        for path in parts.named(parent, parts.names.down_projection)
        if not path.startswith(tuple(mixing))
    ]


def _mlps(parts: Parts, layer: int) -> list[str]:
    """Paths of a block's MLP; of the block itself when no part of it is one."""
    whole_block = [] if parts.parts_of(layer, "mixer") else [parts.blocks[layer]]
    return parts.parts_of(layer, "mlp") or whole_block


def _error(parts: Parts, choice: _Choice, layers: list[int]) -> float:
    """Mean error of the identity over layers, as a part of what is added. Infinite when it does not hold in one of them."""
    wrong = added = 0.0
    for layer in layers:
        before = parts.value(parts.taps[Site("resid_pre", layer)])
        after = parts.value(parts.taps[Site("resid_post", layer)])
        taps = [branch.tap(parts.blocks[layer]) for branch in choice]
        if any(parts.value(tap).numel() != before.numel() for tap in taps):
            return float("inf")
        terms = [parts.value(tap).reshape(before.shape).to(after.device) for tap in taps]
        if not is_sum(after, before, *terms):
            return float("inf")
        total = sum(term.double() for term in terms)
        wrong += (after.double() - before.double().to(after.device) - total).abs().mean().item()
        added += sum(term.double().abs().mean().item() for term in terms)
    return wrong / added if added else float("inf")


def _take(parts: Parts, layer: int, choice: _Choice) -> None:
    """The taps of a layer for which a choice is right, and why it lacks the branches of the other kinds."""
    block = parts.blocks[layer]
    for branch in choice:
        parts.taps[Site(OUT[branch.kind], layer)] = branch.tap(block)
    kinds = {branch.kind for branch in choice}
    for kind in OUT.keys() - kinds - ({"mixer"} if "attention" in kinds else set()):
        parts.lack([OUT[kind]], layer, why_not_in_block(parts, layer, kind))


def _refuse(parts: Parts, layer: int, choices: Iterable[_Choice], has_others: bool) -> None:
    """Say why a layer lacks all branches. has_others: whether other blocks are built like its block."""
    terms = [[parts.value(branch.tap(parts.blocks[layer])) for branch in choice] for choice in choices]
    has_attention, has_mixer = (bool(parts.parts_of(layer, kind)) for kind in ("attention", "mixer"))
    kinds = [kind for kind in OUT if kind != "mixer" or has_mixer or not has_attention]
    parts.lack([OUT[kind] for kind in kinds], layer, why_no_branches(parts, layer, terms, has_others))
    if has_mixer and not has_attention:
        parts.lack(["attn_out"], layer, why_not_in_block(parts, layer, "attention"))


def _find_mlp_post(parts: Parts, layer: int) -> None:
    """The input of the projection whose output is the MLP's, or is what the MLP adds."""
    added, parents = parts.taps.get(Site("mlp_out", layer)), _mlps(parts, layer)
    for parent in parents if len(parents) == 1 else ():
        ends = [parts.probe.outputs[name] for name in (parent, added.module if added else parent)]
        for down in down_projections(parts, layer):
            gave = parts.probe.outputs[down] * _down_scale(parts, parent)
            if any(is_sum(gave, end) for end in ends) or _is_added_to_a_norm(parts, layer, gave):
                parts.taps[Site("mlp_post", layer)] = Tap(down, "input")
                return
    parts.lack(["mlp_post"], layer, _why_no_mlp_post(parts, layer))


def _down_scale(parts: Parts, mlp: str) -> float:
    """What an MLP multiplies by what its last projection gives (Falcon-H1)."""
    module = parts.model.get_submodule(mlp)
    numbers = (getattr(module, name, None) for name in parts.names.down_scale)
    return float(next((each for each in numbers if isinstance(each, int | float)), 1.0))


def _is_added_to_a_norm(parts: Parts, layer: int, gave: Tensor) -> bool:
    """Whether what a projection gives is added to what a norm of its block gives, where norms stand in the stream (OPT-350m)."""
    block = parts.blocks[layer]
    norms = [
        f"{block}.{name}"
        for name, module in parts.model.get_submodule(block).named_children()
        if "norm" in type(module).__name__.lower() and f"{block}.{name}" in parts.probe.outputs
    ]
    sums = [parts.probe.outputs[block], *(parts.probe.inputs[norm] for norm in norms)]
    terms = [parts.probe.outputs[norm] for norm in norms]
    alike = [each for each in (*sums, *terms) if each.numel() != gave.numel()] == []
    return alike and any(
        is_sum(total.reshape(gave.shape), gave, term.reshape(gave.shape)) for total in sums for term in terms
    )


def _why_no_mlp_post(parts: Parts, layer: int) -> str:
    mlp = next(iter(parts.parts_of(layer, "mlp")), None)
    down = down_projections(parts, layer)
    if mlp is None:
        unsure = f", so that {parts.below(layer, down[0])} is not known to be a part of one" if down else ""
        return why_no_part(parts, layer, "mlp") + unsure
    below, kind = parts.below(layer, mlp), type(parts.model.get_submodule(mlp)).__name__
    modules = parts.model.get_submodule(mlp).named_modules()
    if any("experts" in f"{name} {type(module).__name__}".lower() for name, module in modules):
        return f"{below} ({kind}) is a mixture of experts, each with a down projection of its own"
    if down:
        reason = f"what {parts.below(layer, down[0])} gives is not what {below} gives: something comes between"
    else:
        names = ", ".join(parts.names.down_projection)
        reason = f"no down projection ({names}) was found in {below}, whose parts are {parts.described(mlp)}"
    return parts.why(layer, mlp, reason)


def _find_resid_mid(parts: Parts, layer: int) -> None:
    """The input of the part of the block that receives, most exactly, resid_pre and what is added to it by what mixes tokens."""
    block = parts.blocks[layer]
    mixing = [site for site in (Site("attn_out", layer), Site("mixer_out", layer)) if site in parts.taps]
    if not mixing:
        lacking = next(
            (Site(OUT[kind], layer) for kind in ("attention", "mixer") if parts.parts_of(layer, kind)),
            Site("attn_out", layer),
        )
        parts.lack(["resid_mid"], layer, parts.missing[lacking])
        return
    if not parts.parts_of(layer, "mlp") and not down_projections(parts, layer):
        parts.lack(
            ["resid_mid"], layer, "its block adds one thing alone: resid_pre and resid_post are before and after it"
        )
        return
    before, added = (
        parts.value(parts.taps[Site("resid_pre", layer)]),
        [parts.value(parts.taps[site]) for site in mixing],
    )
    added = [each.reshape(before.shape).to(before.device) for each in added]
    size = torch.stack([each.double() for each in added]).sum(0).abs().mean()
    expected, found = torch.stack([each.double() for each in (before, *added)]).sum(0), {}
    for name, _ in parts.model.get_submodule(block).named_children():
        value = parts.probe.inputs.get(f"{block}.{name}")
        if value is None or value.numel() != before.numel() or parts.probe.n_fired[f"{block}.{name}"] != 1:
            continue
        value = value.reshape(before.shape).to(before.device)
        # resid_pre itself is close to the sum, too, when little is added
        is_moved = (value - before).double().abs().mean() > 0.5 * size
        if is_moved and is_sum(value, before, *added):
            found[name] = float((value.double() - expected).abs().mean())
    if found:  # a norm of a stream whose size is 1 already gives nearly the same, in few bits
        best = min(found, key=lambda name: found[name])
        parts.taps[Site("resid_mid", layer)] = Tap(f"{block}.{best}", "input")
        return
    names = " + ".join(site.kind for site in mixing)
    parts.lack(["resid_mid"], layer, f"nothing in its block receives resid_pre + {names} (a parallel block)")
