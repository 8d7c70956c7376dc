"""One family, checked: what the package keeps of answers and of scored continuations, and how it edits, against `by_hand.py`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from AutomaticEval import score_continuations
from AutomaticEval.capture.generation import Response, respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.errors import AutomaticEvalError, CaptureError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.edit import Edit
from AutomaticEval.models.editing import editing
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.head_weights import head_results
from AutomaticEval.models.layout import Layout
from AutomaticEval.selection import Selection
from AutomaticEval.sites import KINDS, TABLE, Site, site_of

from .by_hand import BY_HAND, ByHand, read, sites_of, zeroed
from .configs import FAMILIES, build

PROMPTS = [[5, 17, 99, 3, 250, 41, 7], [5, 17, 99, 12], [64]]
N_NEW = 4
ONE_BY_ONE = "Computing request by request: "
SCORES_WITHIN = 1e-4
Values = Mapping[tuple[str, int | None], Tensor]


@dataclass
class Row:
    """What was found of one family."""

    name: str
    right: dict[str, set[int | None]] = field(default_factory=dict)
    """Kind -> the layers in which everything was equal."""
    refused: dict[str, dict[str, set[int | None]]] = field(default_factory=dict)
    """Kind -> reason -> the layers that have it by hand, and where the package says that it has not."""
    n_layers: int = 0
    whole: str | None = None
    """Why the model is refused as a whole."""
    scoring: str = "–"
    """tree, or why requests are computed one by one, or are refused."""
    note: str = ""
    """What the truth is, where it is not one whole forward."""
    wrong: list[str] = field(default_factory=list)
    """What was not equal; empty when the family is right."""


def check(name: str, tokenizer: Any) -> Row:
    """Build a family's model, and check all that is promised of it."""
    row, model = Row(name), build(FAMILIES[name])
    loaded = LoadedModel(model, tokenizer, name)
    by_hand = BY_HAND.get(name)
    layout: Layout | None = None
    try:
        layout = find_layout(model)
    except AutomaticEvalError as refused:
        row.whole = _reason(refused, model)
    if layout is None or by_hand is None:
        if layout is not None:
            row.wrong.append("by_hand.py has no entry for this family")
        _score_uncaptured(row, loaded)
        return row
    row.n_layers, row.note = layout.n_layers, by_hand.like_transformers
    _sort_sites(row, layout, by_hand)
    with torch.no_grad():
        sequences = _check_answers(row, loaded, layout, by_hand)
        _check_scoring(row, loaded, layout, by_hand, sequences)
        _check_edits(row, loaded, layout, by_hand)
    return row


def _reason(error: Exception, model: Any) -> str:
    return str(error).strip().removeprefix(f"{type(model).__name__}: ").rstrip(".")


def _sort_sites(row: Row, layout: Layout, by_hand: ByHand) -> None:
    """Which sites are offered, and why others are not."""
    there = set(sites_of(by_hand, layout.n_layers))
    there.add(("logits", None))
    for kind, layer in there:
        site = Site(kind, layer)
        if kind in KINDS and site not in layout.taps:
            reason = next(why for why, sites in layout.lacking(kind).items() if site in sites)
            row.refused.setdefault(kind, {}).setdefault(reason, set()).add(layer)
    for site in layout.taps:
        row.right.setdefault(site.kind, set()).add(site.layer)
        of_z = ("z", site.layer) in there and site.kind == "head_result_norm"
        if tuple(site) not in there and not of_z:
            row.wrong.append(f"{site.key}: offered, and by_hand.py says nothing of it (no oracle)")


def _expected(loaded: LoadedModel, layout: Layout, by_hand: ByHand, run: Any) -> dict[tuple[str, int | None], Tensor]:
    """By hand, with the norms of heads' results, which are made of z."""
    values = read(loaded.model, by_hand, layout.n_layers, run)
    for (kind, layer), z in list(values.items()):
        if kind == "z":
            weight = _out_weight(loaded.model, by_hand, layer)  # [n_heads * d_head, d_model]
            if weight is not None:
                cut = z.view(len(z), by_hand.heads, -1)
                results = torch.einsum("phd,hdm->phm", cut, weight.view(by_hand.heads, cut.shape[-1], -1))
                values["head_result_norm", layer] = results.norm(dim=-1)
    return values


def _out_weight(model: Any, by_hand: ByHand, layer: int | None) -> Tensor | None:
    assert layer is not None
    place = by_hand.of(layer)["z"]
    path = (place if isinstance(place, str) else place.place).lstrip("<")
    module = model.get_submodule(f"{by_hand.blocks}.{layer}.{path}")
    weight: Tensor | None = getattr(module, "weight", None)
    if weight is None:
        return None
    return weight if type(module).__name__ == "Conv1D" else weight.T


def _compare(
    row: Row, what: str, kept: Mapping[str, Tensor], expected: Values, noise: float, rows: slice | None = None
) -> None:
    """Note which of the kept sites differ from what is expected."""
    for key, value in kept.items():
        site = site_of(key)
        truth = expected.get((site.kind, site.layer))
        if truth is None:
            continue  # that there is no oracle was noted before
        truth = truth if rows is None else truth[rows]
        if value.shape != truth.shape:
            row.wrong.append(f"{what}, {key}: shape {list(value.shape)}, by hand {list(truth.shape)}")
            continue
        limit = noise * max(1.0, float(truth.abs().max()))
        worst = float((value.double() - truth.double()).abs().max())
        if not worst <= limit:
            row.wrong.append(f"{what}, {key}: differs by {worst:.1e} (limit {limit:.1e})")


def _kinds(layout: Layout, *but: str) -> str:
    return ",".join(site.key for site in layout.taps if site.kind not in but)


def _check_answers(row: Row, loaded: LoadedModel, layout: Layout, by_hand: ByHand) -> list[tuple[list[int], list[int]]]:
    """A left-padded batch of answers. The prompts and the answers are given back."""
    sequences = []
    for number, response in enumerate(_answers(row, loaded, layout)):
        prompt, sample = PROMPTS[number], response.sample
        assert sample is not None
        fed = torch.tensor([[*prompt, *response.generated_ids[:-1]]])
        if by_hand.like_transformers:
            run = lambda prompt=prompt: loaded.model.generate(  # noqa: E731
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=N_NEW,
                do_sample=False,
            )
        else:
            run = lambda fed=fed: loaded.model(fed, use_cache=False)  # noqa: E731
        truth = _expected(loaded, layout, by_hand, run)
        kept = sample.activation_data("m", {})
        places = kept["positions"].tolist()
        truth = {site: values[places] if len(values) == fed.shape[1] else values for site, values in truth.items()}
        _compare(row, f"answer {number}", kept["activations"], truth, by_hand.noise)
        likeliest = truth["logits", None][-len(response.generated_ids) :].argmax(-1).tolist()
        if likeliest != response.generated_ids:
            row.wrong.append(f"answer {number}: {response.generated_ids}, and the likeliest tokens are {likeliest}")
        _check_sum_of_heads(row, loaded, layout, by_hand, kept["activations"], truth)
        sequences.append((list(prompt), list(response.generated_ids)))
    return sequences


def _answers(row: Row, loaded: LoadedModel, layout: Layout) -> list[Response]:
    """The answers, with all sites but logits at all positions; at those that gave the answer, where a model computes no others."""
    sampling = Sampling(max_new_tokens=N_NEW)
    try:
        return respond(loaded, PROMPTS, sampling, Selection.parse(_kinds(layout, "logits")))
    except CaptureError as refused:
        if 'Use positions="scored"' not in str(refused):
            raise
        row.note = "of a prompt, a model that generates computes some layers for the last token only: there, answers were compared at the positions `scored`"
        return respond(loaded, PROMPTS, sampling, Selection.parse(_kinds(layout, "logits"), positions="scored"))


def _check_sum_of_heads(
    row: Row, loaded: LoadedModel, layout: Layout, by_hand: ByHand, kept: Mapping[str, Tensor], truth: Values
) -> None:
    """The results of all heads and the bias are what the output projection gives."""
    for site, tap in layout.taps.items():
        if site.kind != "z" or ("behind z", site.layer) not in truth:
            continue
        module = loaded.model.get_submodule(tap.module)
        total = head_results(kept[site.key], module, layout.n_heads).sum(1)
        bias = getattr(module, "bias", None)
        total = total if bias is None else total + bias
        _compare(
            row,
            "sum of heads",
            {f"layer_{site.layer}.z": total},
            {("z", site.layer): truth["behind z", site.layer]},
            by_hand.noise,
        )


def _check_scoring(
    row: Row, loaded: LoadedModel, layout: Layout, by_hand: ByHand, sequences: Sequence[tuple[list[int], list[int]]]
) -> None:
    """Log-likelihoods of the same tokens, and the rows of the forwards that gave them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = score_continuations(
            sequences,
            loaded.model,
            tokenizer=loaded.tokenizer,
            capture_activations=True,
            sites=_kinds(layout),
            positions="all",
        )
    row.scoring = _way(said, loaded.model)
    for number, (each, (context, continuation)) in enumerate(zip(found, sequences, strict=True)):
        fed = torch.tensor([[*context, *continuation[:-1]]])
        truth = _expected(loaded, layout, by_hand, lambda fed=fed: loaded.model(fed, use_cache=False))
        assert each.activation_data is not None
        _compare(row, f"score {number}", each.activation_data["activations"], truth, by_hand.noise)
        _compare_score(row, number, each.logprob, truth["logits", None], continuation)


def _compare_score(row: Row, number: int, logprob: float, logits: Tensor, continuation: Sequence[int]) -> None:
    likely = logits[-len(continuation) :].float().log_softmax(-1)
    expected = float(likely.gather(1, torch.tensor(continuation)[:, None]).sum())
    if not abs(logprob - expected) <= SCORES_WITHIN:
        row.wrong.append(f"score {number}: {logprob:.5f}, by hand {expected:.5f}")


def _score_uncaptured(row: Row, loaded: LoadedModel) -> None:
    """Scores of a model of which nothing can be kept."""
    sequences = [(prompt, [11, 7, 120]) for prompt in PROMPTS]
    try:
        with warnings.catch_warnings(record=True) as said, torch.no_grad():
            warnings.simplefilter("always")
            found = score_continuations(sequences, loaded.model, tokenizer=loaded.tokenizer)
    except AutomaticEvalError as refused:
        row.scoring = f"refused: {_reason(refused, loaded.model)}"
        return
    row.scoring = _way(said, loaded.model)
    for number, (each, (context, continuation)) in enumerate(zip(found, sequences, strict=True)):
        with torch.no_grad():
            logits = loaded.model(torch.tensor([[*context, *continuation[:-1]]]), use_cache=False).logits[0]
        _compare_score(row, number, each.logprob, logits, continuation)


def _way(said: Sequence[warnings.WarningMessage], model: Any) -> str:
    """tree, or why not."""
    why = [str(each.message) for each in said if str(each.message).startswith(ONE_BY_ONE)]
    return f"one by one: {_reason(Exception(why[0].removeprefix(ONE_BY_ONE)), model)}" if why else "tree"


def _check_edits(row: Row, loaded: LoadedModel, layout: Layout, by_hand: ByHand) -> None:
    """A head, and a branch, without which the logits are what they are when a plain hook takes it away."""
    sites, ids = sites_of(by_hand, layout.n_layers), torch.tensor([PROMPTS[0]])

    def run() -> Tensor:
        logits: Tensor = loaded.model(ids, use_cache=False).logits[0]
        return logits

    plain = run()
    for kind in ("z", "attn_out", "mixer_out", "mlp_out"):
        layer = next((site.layer for site in layout.taps if site.kind == kind and tuple(site) in sites), None)
        if layer is None or TABLE[kind].not_edited:
            continue
        at, block = sites[kind, layer]
        columns = None
        edit = Edit.scale(Site(kind, layer), 0.0, heads=[1] if kind == "z" else None)
        if kind == "z":
            d_head = layout.widths[Site("z", layer)] // by_hand.heads
            columns = slice(d_head, 2 * d_head)
        expected = zeroed(loaded.model, at, block, columns, run)
        try:
            with editing(loaded.model, edit):
                found = run()
        except AutomaticEvalError as refused:
            row.wrong.append(f"edit of {kind}: {refused}")
            continue
        _compare(row, f"edit of {kind} {layer}", {"logits": found}, {("logits", None): expected}, by_hand.noise)
        if torch.equal(expected, plain):
            row.wrong.append(f"edit of {kind} {layer}: nothing changes by hand, so that nothing is shown")
