"""The check that a graph gives what the model gives: a few steps from a graph, beside one plain forward over the same tokens.

It finds what `unsuited.py` has no name for: a branch or a number that is frozen in the graph, a mask that is not enough, a forward that cannot be
recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from AutomaticEval.capture.graph.from_graph import GraphBatch, from_graph
from AutomaticEval.capture.keeping import keep_columns
from AutomaticEval.capture.padding_probes import LONGEST_TRIED
from AutomaticEval.capture.recompute.tolerance import IN_8_BITS, LIMITS, judged, measured
from AutomaticEval.capture.tree.suitability import window_of
from AutomaticEval.errors import first_line
from AutomaticEval.models.architecture.forward_call import alone_with, forward_takes, input_device
from AutomaticEval.models.checkpoint.loaded_model import computed_dtype, quantization_of
from AutomaticEval.models.described.remembered import embedding_of
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.recording import Recording, capturing
from AutomaticEval.sites import Site

STEPS = 4
"""The tokens that are generated. The first comes from the prefill, the others from the graph."""
SHORT, LONG = 5, 12
"""The tokens of the two prompts, unless an attention window makes the longer one longer than itself."""


def why_unequal(model: Any) -> str | None:
    """In what a graph differs from plain forwards of a model; None when it differs in nothing that rounding does not explain."""
    try:
        with torch.no_grad(), alone_with(model):
            compared = _both_ways(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as why:  # a model is a program of its own and may raise anything; step by step, it does as before
        return f"a step of it cannot be recorded: {type(why).__name__}: {first_line(why)}"
    return _first_difference(model, compared)


def _both_ways(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Key, or logits -> the rows [n, width] of some tokens, from a graph and from a plain forward."""
    ids, mask = _batch(model)
    layout = find_layout(model)
    sites = [Site("embed"), *(Site("resid_post", layer) for layer in range(layout.n_layers))]
    taps = layout.pick([site for site in sites if site in layout.taps])
    width = ids.shape[1]
    columns = range(width, width + STEPS - 1)
    keep = keep_columns([columns] * len(ids))
    with capturing(model, taps, layout.embedding, keep, len(ids)) as graphed:
        fed, logits = _generated(model, GraphBatch(len(ids), width + STEPS, graphed), ids, mask)
    with capturing(model, taps, layout.embedding, keep, len(ids)) as plain:
        expected = _plain(model, fed, mask)
    return _compared(graphed, plain, columns) | {"logits": (logits, expected)}


def _batch(model: Any) -> tuple[Tensor, Tensor]:
    """Two prompts of different lengths, left-padded, and their mask: both [2, width]. The longer one is longer than an attention window."""
    window = window_of(model)
    longest = LONG if window is None or window + STEPS > LONGEST_TRIED else max(LONG, window + 2)
    n_ids = embedding_of(model).weight.shape[0]
    ids = torch.arange(2 * longest).view(2, longest) * 7 % 89 % (n_ids - 1) + 1
    mask = torch.ones_like(ids)
    mask[0, : longest - SHORT] = 0
    device = input_device(model)
    return ids.to(device), mask.to(device)


def _generated(model: Any, batch: GraphBatch, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What was fed [2, width + STEPS - 1], and the logits of all steps [2 * STEPS, d_vocab]. The graph is not kept."""
    with from_graph(model, batch, is_kept=False) as extra:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **extra,
        )
    return out.sequences[:, :-1], torch.stack(list(out.logits), 1).flatten(0, 1).float().cpu()


def _plain(model: Any, fed: Tensor, mask: Tensor) -> Tensor:
    """The logits of the last STEPS tokens of one forward over all tokens, without a cache: [2 * STEPS, d_vocab], float32."""
    whole = torch.cat([mask, mask.new_ones(len(mask), STEPS - 1)], 1)
    given: dict[str, Any] = {"attention_mask": whole, "use_cache": False}
    if "position_ids" in forward_takes(model):
        given["position_ids"] = (whole.cumsum(1) - 1).clamp(min=0)
    logits: Tensor = model(input_ids=fed, **given).logits
    return logits[:, -STEPS:].flatten(0, 1).float().cpu()


def _compared(graphed: Recording, plain: Recording, columns: range) -> dict[str, tuple[Tensor, Tensor]]:
    """Key -> the rows [n, width] of the columns that the graph was fed, from the graph and from the plain forward."""
    own, right = ([each.take(number, columns) for number in range(2)] for each in (graphed, plain))
    return {key: (torch.cat([one[key] for one in own]), torch.cat([one[key] for one in right])) for key in own[0]}


def _first_difference(model: Any, compared: Mapping[str, tuple[Tensor, Tensor]]) -> str | None:
    """The first key whose rows differ by more than rounding explains, in words; None when there is none."""
    limits = (
        IN_8_BITS if quantization_of(model) == "8bit" else LIMITS.get(computed_dtype(model), LIMITS[torch.bfloat16])
    )
    for key, (rows, right) in compared.items():
        found = judged([measured(rows, right)], limits)
        if bool(found.wrong.any()):
            part = float(found.measured.parts.max())
            return f"in the self-check its {key} differed from that of a plain forward, by up to {part:.1g} of the largest number."
    return None
