"""The rules for the residual stream between blocks: embed, resid_pre and resid_post. Some models have several streams, or rescale theirs."""

from __future__ import annotations

from torch import Tensor

from AutomaticEval.errors import UnsupportedModel
from AutomaticEval.models.architecture.identities import PROBE_LENGTH, is_sum
from AutomaticEval.models.architecture.module_names import Parts
from AutomaticEval.models.layout import Tap, layers_text
from AutomaticEval.sites import PER_LAYER, Site

STREAM = ("embed", "resid_pre", "resid_post")


def find_residual(parts: Parts) -> None:
    """Add the taps of all layers. Raises UnsupportedModel when a block is not given what the block before it gives."""
    first = parts.blocks[parts.ran.index(True)]
    stream = _active_stream(parts, parts.probe.inputs[first])
    why = None
    if parts.n_streams > 1 and stream is None:
        shape = list(parts.probe.inputs[first].shape)
        why = f"its blocks hand on {parts.n_streams} residual streams side by side {shape}, and none of them is the stream"
        parts.missing[Site("embed")] = why
    else:
        parts.taps[Site("embed")] = Tap(first, "input", stream=stream)
    rescaled: list[int] = []
    for layer, ran in enumerate(parts.ran):
        if not ran:
            reason = "its block does not run in a forward over text (as those that attend to images)"
            parts.lack(PER_LAYER, layer, reason)
        elif _find_between(parts, layer, stream, why):
            rescaled.append(layer)
    if rescaled:
        where = layers_text(rescaled)
        parts.notes["resid_post"] = (
            f"the stream is rescaled behind {where}, so that it is not resid_pre of the next layer there"
        )


def _active_stream(parts: Parts, entering: Tensor) -> int | None:
    """Which of several streams is the one that begins as the embedding, as the config says. Counts the streams."""
    if entering.dim() != 4:
        return None
    leads = entering.shape[1:3] == (1, PROBE_LENGTH)  # [stream, batch, pos, width]
    parts.n_streams = entering.shape[0 if leads else 2]
    named = next(
        (n for name in parts.names.active_stream if (n := getattr(parts.config, name, None)) is not None), None
    )
    if not leads or not isinstance(named, int) or not is_sum(entering[named], parts.probe.outputs[parts.embedding]):
        return None
    for kind in STREAM:
        parts.notes[kind] = f"of {parts.n_streams} residual streams the active one, number {named}"
    return named


def _find_between(parts: Parts, layer: int, stream: int | None, why: str | None) -> bool:
    """resid_pre and resid_post of a layer. Returns whether the stream is rescaled behind it.

    resid_post is read where the next part receives it, so that edits between blocks are seen. why: the reason that there is no stream.
    """
    here, after = parts.blocks[layer], _next_part(parts, layer)
    given, gave = parts.probe.inputs.get(after or here), parts.probe.outputs.get(here)
    is_scaled = after is not None and _is_rescaled(parts, given, gave)
    is_same = after is None or (given is not None and gave is not None and is_sum(given, gave))
    if gave is None or given is None or not (is_same or is_scaled) or gave.isnan().any():
        shapes = [None if each is None else list(each.shape) for each in (gave, given)]
        raise UnsupportedModel(
            f"{parts.name}: what {after} receives (shape {shapes[1]}) is not what block {layer} returns (shape {shapes[0]}), or it is NaN, so "
            "the residual stream cannot be named. If a hook of yours edits the stream, run once without it first."
        )
    if why is not None:
        parts.lack(("resid_pre", "resid_post"), layer, why)
        return False
    parts.taps[Site("resid_pre", layer)] = Tap(here, "input", stream=stream)
    leaves = Tap(here, "output", stream=stream) if after is None or is_scaled else Tap(after, "input", stream=stream)
    parts.taps[Site("resid_post", layer)] = leaves
    return is_scaled


def _next_part(parts: Parts, layer: int) -> str | None:
    """The path of what receives the stream that leaves a layer: the next block that runs, or the final norm. None when that is not known."""
    running = (block for block, ran in zip(parts.blocks[layer + 1 :], parts.ran[layer + 1 :], strict=True) if ran)
    after = next(running, None)
    # a final norm that is used in several places does not say where the stream is; nor does one behind several streams
    is_single = parts.norm is not None and parts.probe.n_fired[parts.norm] == 1 and parts.n_streams == 1
    return parts.norm if after is None and is_single else after


def _is_rescaled(parts: Parts, given: Tensor | None, gave: Tensor | None) -> bool:
    """Whether a part is given half of what the block before it gives, in a model whose config says that it rescales its stream (RWKV)."""
    says = any(getattr(parts.config, name, 0) for name in parts.names.rescaling)
    return says and given is not None and gave is not None and is_sum(given, gave / 2) and bool(given.any())
