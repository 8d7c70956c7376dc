"""The rules for mixtures of experts: router_logits, expert_ids, expert_weights, expert_out.

A router gives logits and chooses; a module of all experts of the layer is given hidden states, ids and weights. Each is checked by running
the router, or the experts, again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from AutomaticEval.errors import EditError
from AutomaticEval.models.architecture.identities import Call, is_sum
from AutomaticEval.models.architecture.module_names import Parts
from AutomaticEval.models.described.stand_ins import are_active, repeating
from AutomaticEval.models.experts.expert_rows import ExpertOutputs, FromChoice, FromLogits
from AutomaticEval.models.experts.rerouting import rerouted
from AutomaticEval.models.layout import Tap
from AutomaticEval.samples import IDS
from AutomaticEval.sites import Site

CHOICE = ("expert_ids", "expert_weights")
SLACK = 64
"""By how many units of rounding, of the largest sum, outputs may miss the whole."""
FACTOR = "routed_scaling_factor"
"""What a mixture calls a number that scales its experts. In most models the router's weights have it in them."""
MEAN_SLACK = 8
"""By how many units of rounding they may miss it in the mean."""
EXPERTS = ("router_logits", *CHOICE, "expert_out")


class _Given(NamedTuple):
    """What a module of experts is given, by the numbers of its arguments."""

    path: str
    hidden: Tensor
    ids: Tensor
    weights: Tensor
    elements: tuple[int, int, int]
    """Of hidden states, ids and weights."""


def find_experts(parts: Parts) -> None:
    """Add the taps of all layers."""
    for layer, ran in enumerate(parts.ran):
        if ran:
            _find(parts, layer)


def _find(parts: Parts, layer: int) -> None:
    router, block = _router(parts, layer), parts.blocks[layer]
    if router is None:
        names = [name.rpartition(".")[2] for name, _ in parts.model.get_submodule(block).named_modules()]
        named = next((name for name in parts.names.router if name in names), None)
        if named is not None:  # without one the block is no mixture, and lacks nothing
            reason = f"its module {named} does not run once and give several tensors, as a router of experts does"
            parts.lack(EXPERTS, layer, parts.why(layer, block, reason))
        return
    logits = _find_logits(parts, layer, router)
    if isinstance(logits, str):
        parts.lack(EXPERTS, layer, logits)
        return
    parts.taps[Site("router_logits", layer)] = logits
    given = _given(parts, router)
    if given is None:
        _find_from_logits(parts, layer, router, logits)
        return
    unlike = _why_not_chosen(parts, layer, router, logits, given)
    if unlike is not None:
        parts.lack((*CHOICE, "expert_out"), layer, unlike)
        return
    n_active = given.ids.shape[-1]
    at = given.elements[1:]
    for kind, gives, dtype in (("expert_ids", "ids", IDS), ("expert_weights", "weights", given.weights.dtype)):
        parts.taps[Site(kind, layer)] = Tap(given.path, "input", elements=at, then=FromChoice(gives, n_active, dtype))
    _find_outputs(parts, layer, given)


def _router(parts: Parts, layer: int) -> str | None:
    """The path of the router of a block: it gives several tensors, and runs once. None without any."""
    block = parts.blocks[layer]
    attention = tuple(f"{path}." for path in parts.children(block, parts.names.attention))
    for path in parts.named(block, parts.names.router):
        call = parts.probe.calls.get(path)
        is_one = call is not None and isinstance(call.output, tuple) and parts.probe.n_fired[path] == 1
        if is_one and not path.startswith(attention or ("\0",)):
            return path
    return None


def _again(parts: Parts, router: str, n_experts: int, change: Any) -> Any:
    """What a router gives when it is run again on what it was given, with changed logits. Raises EditError."""
    call = parts.probe.calls[router]
    with torch.no_grad(), repeating(call.draws):
        return rerouted(parts.model.get_submodule(router), call.args, call.kwargs, n_experts, change)


def _find_logits(parts: Parts, layer: int, router: str) -> Tap | str:
    """The tap of the element of what a router gives that is the one product it computes with as many features. Or why there is none."""
    output = parts.probe.calls[router].output
    for number, element in enumerate(output):
        if not isinstance(element, Tensor) or not element.is_floating_point() or element.dim() < 2:
            continue
        seen: list[Tensor] = []

        def keep(logits: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(logits.clone())
            return logits

        try:
            _again(parts, router, element.shape[-1], keep)
        except EditError:
            continue
        if is_sum(element, seen[0].to(element.dtype)):
            return Tap(router, "output", elements=(number,))
    return (
        f"none of what its router {parts.below(layer, router)} gives is the result of one product with a number for each expert, so that "
        "its logits are not known"
    )


def _given(parts: Parts, router: str) -> _Given | None:
    """What the module of experts beside a router is given. None when there is no such module, or it is given something else."""
    path = next((f"{router.rpartition('.')[0]}.{name}" for name in parts.names.experts), "")
    call = parts.probe.calls.get(path)
    if call is None or parts.probe.n_fired[path] != 1:
        return None
    given = [*call.args, *call.kwargs.values()]
    whole = [n for n, each in enumerate(given) if _is_matrix(each) and not each.is_floating_point()]
    if len(whole) != 1 or not _is_matrix(given[0]) or not given[0].is_floating_point():
        return None
    ids = given[whole[0]]
    weights = [
        n
        for n, each in enumerate(given)
        if n and _is_matrix(each) and each.is_floating_point() and each.shape == ids.shape
    ]
    if len(weights) != 1 or len(ids) != len(given[0]):
        return None
    return _Given(path, given[0], ids, given[weights[0]], (0, whole[0], weights[0]))


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def _why_not_chosen(parts: Parts, layer: int, router: str, logits: Tap, given: _Given) -> str | None:
    """Why ids are not what the router chooses by its logits; None when they are: it chooses them again, and not when their logits are -inf."""
    below, n_experts = parts.below(layer, router), parts.value(logits).shape[-1]
    ids = given.ids.to(parts.value(logits).device)
    if not bool(((ids >= 0) & (ids < n_experts)).all()):
        return f"{parts.below(layer, given.path)} is given ids that are not those of the {n_experts} experts of {below}"
    try:
        same = _again(parts, router, n_experts, lambda old: old)
    except EditError as failure:
        return str(failure)
    numbers = [n for n, each in enumerate(same) if isinstance(each, Tensor) and torch.equal(each.to(ids.device), ids)]
    if not numbers:
        return f"{below} does not give the ids that {parts.below(layer, given.path)} is given"
    if n_experts <= ids.shape[-1]:
        return None
    first = ids[:, :1].long()

    def bar(old: Tensor) -> Tensor:
        return old.view(-1, n_experts).scatter(-1, first, -torch.inf).view_as(old)

    try:
        other = _again(parts, router, n_experts, bar)[numbers[0]]
    except EditError:  # too few others are left in a group
        return None
    return f"{below} chooses experts whose logits are -inf" if bool((other == first).any()) else None


def _find_outputs(parts: Parts, layer: int, given: _Given) -> None:
    """expert_out, and the proof that weights belong to ids: the outputs of the chosen experts add up to what all experts give."""
    call: Call = parts.probe.calls[given.path]
    names, n_active = tuple(call.kwargs), given.ids.shape[-1]
    whole = call.output[0] if isinstance(call.output, tuple) else call.output
    below = parts.below(layer, given.path)
    if given.elements != (0, 1, 2) or len(call.args) + len(names) != 3:
        parts.lack(["expert_out"], layer, f"{below} is given more than hidden states, ids and weights in this order")
        return
    of = ExpertOutputs(n_active, (given.hidden.dtype, given.ids.dtype, given.weights.dtype), names)
    of.refresh(parts.model.get_submodule(given.path))
    tap = Tap(given.path, "input", elements=given.elements, then=of)
    outputs = parts.value(tap).reshape(len(given.ids), n_active, -1)
    fits = outputs.shape[-1] == whole.shape[-1]
    if fits and (are_active() or _add_up(outputs, whole.reshape(outputs[:, 0].shape))):
        parts.taps[Site("expert_out", layer)] = tap
        _say_factor(parts, given.path, whole)
        return
    reason = f"the outputs of the chosen experts do not add up to what {below} gives"
    for kind in CHOICE:
        parts.taps.pop(Site(kind, layer))
    parts.lack((*CHOICE, "expert_out"), layer, reason)


def _say_factor(parts: Parts, experts: str, whole: Tensor) -> None:
    """Say when the mixture multiplies what all experts give, `whole`, by a number that is in no weight (MiniMax M3, Laguna)."""
    mixture = experts.rpartition(".")[0]
    module, gave = parts.model.get_submodule(mixture), parts.probe.outputs.get(mixture)
    factor = getattr(module, FACTOR, 1)
    if gave is None or not isinstance(factor, int | float) or factor == 1:
        return
    beside = [path for name, _ in module.named_children() if (path := f"{mixture}.{name}") != experts]
    given = [parts.probe.outputs[path] for path in beside if path in parts.probe.outputs]
    shared = [each.reshape(gave.shape) for each in given if each.numel() == gave.numel()]
    if is_sum(gave, whole.reshape(gave.shape) * factor, *shared):
        for kind in ("expert_weights", "expert_out"):
            parts.notes[kind] = (
                f"the mixture multiplies the sum of its experts by {factor:g} afterwards, which is not in {kind}"
            )


def _add_up(outputs: Tensor, whole: Tensor) -> bool:
    """Whether the outputs of the chosen experts [tokens, n_active, d_model] add up to what all experts give [tokens, d_model].

    A product of some rows rounds in another way than one of others, by a part of the largest numbers and not of each. So the slack is one for
    all numbers; outputs of wrong experts are off by as much as they are large. In bfloat16 that slack is half of the largest sum, so that the mean is
    held to a narrower one.
    """
    eps, size = torch.finfo(whole.dtype).eps, outputs.double().abs().sum(1)
    off = (outputs.double().sum(1) - whole.double()).abs()
    return bool((off <= SLACK * eps * size.max()).all() and off.mean() <= MEAN_SLACK * eps * size.mean())


def _find_from_logits(parts: Parts, layer: int, router: str, logits: Tap) -> None:
    """ids of routers whose experts are not given them, when what the router gives says that they are those of the largest logits."""
    below, values = parts.below(layer, router), parts.value(logits).reshape(-1, parts.value(logits).shape[-1])
    output = parts.probe.calls[router].output
    n_active = getattr(parts.model.get_submodule(router), "top_k", None)
    alone = f"the experts beside {below} do not take hidden states, ids and weights, so that no expert can be run alone"
    parts.lack(["expert_out"], layer, alone)
    if not isinstance(n_active, int) or not 0 < n_active <= values.shape[-1]:
        parts.lack(
            CHOICE,
            layer,
            f"{below} says no number of experts a token (top_k), and the experts beside it are given no ids",
        )
        return
    top = values.topk(n_active, dim=-1)
    ids = Tap(router, "output", elements=logits.elements, then=FromLogits("ids", n_active, IDS))
    if any(_are_scores_of(each, values, top.indices) for each in output):
        parts.taps[Site("expert_ids", layer)] = ids
        parts.lack(
            ["expert_weights"],
            layer,
            f"{below} gives scores by which what an expert is given is multiplied, so that its output has no weight; take the sigmoid of router_logits",
        )
        return
    gates = torch.softmax(top.values, dim=-1)
    dtype = _grouped_dtype(output, top.indices, gates)
    if dtype is None:
        parts.lack(
            CHOICE, layer, f"the experts beside {below} are given no ids, and it is not known which experts it chooses"
        )
        return
    parts.taps[Site("expert_ids", layer)] = ids
    weights = FromLogits("weights", n_active, dtype)
    parts.taps[Site("expert_weights", layer)] = Tap(router, "output", elements=logits.elements, then=weights)


def _are_scores_of(element: Any, logits: Tensor, ids: Tensor) -> bool:
    """Whether an element is the sigmoid of the logits of these experts, and zero for all others (Llama 4)."""
    if not isinstance(element, Tensor) or element.shape != logits.shape or not element.is_floating_point():
        return False
    expected = torch.zeros_like(element).scatter(
        -1, ids, torch.sigmoid(logits.float()).gather(-1, ids).to(element.dtype)
    )
    return is_sum(element, expected)


def _grouped_dtype(output: Any, ids: Tensor, gates: Tensor) -> torch.dtype | None:
    """The dtype of the weights when a router gives them grouped by expert, with the order of the groups (JetMoe); None when it does not."""
    flat = [each for each in output if isinstance(each, Tensor) and each.shape == (ids.numel(),)]
    for order in (each for each in flat if not each.is_floating_point()):
        if not torch.equal(order.sort().values, torch.arange(ids.numel(), device=order.device)):
            continue
        experts, weights = ids.flatten()[order], gates.flatten()[order]
        given = [each for each in flat if each.is_floating_point() and is_sum(each, weights.to(each.dtype))]
        if given and torch.equal(experts, experts.sort().values):
            return given[0].dtype
    return None
