"""`docs/families.md`: what was found of each family, as a table. `pytest tests/test_families.py --write-families` writes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from AutomaticEval.sites import KINDS

from .check import Row
from .configs import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
GROUPS: dict[str, tuple[str, ...]] = {
    "stream": ("embed", "resid_pre", "resid_post", "final_norm", "logits"),
    "middle": ("resid_mid",),
    "branches": ("attn_out", "mixer_out", "mlp_out"),
    "z": ("z", "head_result_norm"),
    "q k v": ("q", "k", "v"),
    "MLP": ("mlp_post",),
    "experts": ("router_logits", "expert_ids", "expert_weights", "expert_out"),
}
"""Column -> kinds of sites. A kind that is in none of them has a column of its own."""
VERSIONS = "Made with "
WITHOUT_ROW = "Beside those of the table, "
INTRO = """---
hide: [toc]
---

# Families: what is right in which models

- **My model**: look for the `model_type` in its `config.json` (`qwen3_moe` is the row `qwen3-moe`). A row with something behind it (`-window`, `-v8`, `-lite`) is the same family with another setting.
- **Only ✓ in its row**: every site that the command lists is right, as far as a small model with random weights shows it.
- **My checkpoint itself**: `python main.py sites --model NAME --verify` runs a forward of it, and checks each site by what must add up. `verify RUN --recompute 20` checks the rows of a run.
- **No row**: the family was not tried. The same two commands say what works; parts with other names can be [described](describe.md).

This page is made by the tests. For each family a tiny model with random weights was built, and each site of it was compared with plain hooks of torch, at places that
were written by hand from the source of transformers (`tests/families/by_hand.py`). Compared were the rows of a left-padded batch of three answers and those of three
scored continuations, with one whole forward without a cache, padding or company: within 1e-5 of the largest number, or 1e-4 for the families with linear attention.
Scores are within 1e-4 of plain log-likelihoods. A head and a branch were taken away by `editing` and by a plain hook, with the same logits; the results of all heads and
the bias add up to what the output projection gives.

| cell | means |
|---|---|
| ✓ | all sites of this column are right, in all layers that have them |
| ✓ in 1, 3 | right in these layers; the other layers of this model have no such part |
| ✗ (4) | not offered: the model has it, and reason 4 below says why it cannot be kept |
| **wrong** (4) | known to be wrong: reason 4 says in which way |
| – | the family has no such part |
"""
COLUMNS = """
A site that stands alone in a cell, as in `q: ✗ (4)`, differs from the others of its column. """
SCORED = """The reasons are shortened: `python main.py sites --model NAME` says them in full. The column *scored* says how log-likelihoods are computed: over
the *tree* of what requests have in common, or each request *alone*, and why. A family with an attention window is scored over the tree when its requests are not longer than the window.
"""


def page(rows: Mapping[str, Row], known_wrong: Mapping[str, str]) -> str:
    """The whole page."""
    columns, reasons = _columns(rows.values()), _Reasons()
    lines = [
        _line(
            [
                _family(row, reasons),
                *(_cell(row, kinds, reasons, known_wrong) for kinds in columns.values()),
                _scored(row, reasons),
            ]
        )
        for row in rows.values()
    ]
    named = "; ".join(f"*{column}*: {', '.join(f'`{kind}`' for kind in kinds)}" for column, kinds in columns.items())
    head = [_line(["family", *columns, "scored"]), _line(["---"] * (len(columns) + 2))]
    text = [
        INTRO,
        f"The columns are {named}.{COLUMNS}{SCORED}",
        f"{_versions()}\n",
        *head,
        *lines,
        "",
        "## Reasons",
        "",
    ]
    return "\n".join(
        [*text, *(f"{number}. {reason}" for reason, number in reasons.numbers.items()), *_without_row(), ""]
    )


def compared(text: str, *, with_versions: bool) -> list[str]:
    """The lines of a page that are compared."""
    return [line for line in text.splitlines() if with_versions or not line.startswith((VERSIONS, WITHOUT_ROW))]


def made_with_this_transformers(text: str) -> bool:
    """Whether a page was made with the transformers that is installed."""
    return f"transformers {transformers.__version__}" in text


def _versions() -> str:
    return f"{VERSIONS}transformers {transformers.__version__} and torch {torch.__version__.partition('+')[0]}."


def _without_row() -> list[str]:
    """The families of transformers that the table has not. A model of images and text has a row if its type has one, not if its text part has."""
    there = {
        form for family in FAMILIES.values() for form in (family.model_type, family.model_type.removesuffix("_text"))
    }
    types = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES} - there)
    named = ", ".join(f"`{each}`" for each in types if each.removesuffix("_text") not in there)
    why = f"{WITHOUT_ROW}transformers {transformers.__version__} has these types of models that generate text, which are not tested, and may work or be refused all the same: {named}."
    return ["", "## Families without a row", "", why]


class _Reasons:
    """The numbers of the reasons, in the order of the table."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, reason: str) -> str:
        """(4). Reasons that differ in the parts of a block, or in measured numbers, are one."""
        plain = re.sub(r"(, only|, whose parts are) \w+ \(\w+\)(, \w+ \(\w+\))*", "", " ".join(reason.split()))
        plain = re.sub(r"-?\d+\.\d{3,}", "…", plain.replace(" (or in one that is built like it)", "")).replace(
            "<", "&lt;"
        )
        return f"({self.numbers.setdefault(plain, len(self.numbers) + 1)})"


def _columns(rows: Iterable[Row]) -> dict[str, tuple[str, ...]]:
    """Of the table: the groups that some family has, and the kinds that are in no group."""
    found = {kind for row in rows for kind in (*row.right, *row.refused)}
    grouped = {kind for kinds in GROUPS.values() for kind in kinds}
    columns = {name: tuple(kind for kind in kinds if kind in found) for name, kinds in GROUPS.items()}
    columns |= {kind: (kind,) for kind in KINDS if kind in found and kind not in grouped}
    return {name: kinds for name, kinds in columns.items() if kinds}


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _family(row: Row, reasons: _Reasons) -> str:
    return f"{row.name} {reasons.mark(f'Answers: {row.note}.')}" if row.note else row.name


def _cell(row: Row, kinds: Sequence[str], reasons: _Reasons, known_wrong: Mapping[str, str]) -> str:
    if row.whole is not None:
        return f"✗ {reasons.mark(row.whole)}" if kinds[0] == "embed" else "–"
    said: dict[str, list[str]] = {}
    for kind in kinds:
        state = _state(row, kind, reasons, known_wrong)
        if state:
            said.setdefault(state, []).append(kind)
    return "<br>".join(state if len(said) == 1 else f"{', '.join(of)}: {state}" for state, of in said.items()) or "–"


def _state(row: Row, kind: str, reasons: _Reasons, known_wrong: Mapping[str, str]) -> str:
    """How one kind of site is in a family; empty when the family has none."""
    right, refused = row.right.get(kind, set()), row.refused.get(kind, {})
    is_wrong = any(f"{kind}:" in each.replace(".", " ").split() or f".{kind}:" in each for each in row.wrong)
    if is_wrong and row.name in known_wrong:
        return f"**wrong** {reasons.mark(known_wrong[row.name])}"
    states = []
    if right:
        states.append("✓" if len(right) == row.n_layers or None in right else f"✓ in {_layers(right)}")
    by_layers: dict[tuple[int | None, ...], list[str]] = {}
    for reason, layers in refused.items():
        by_layers.setdefault(tuple(sorted(layers, key=str)), []).append(reason)
    for layers, why in sorted(by_layers.items(), key=str):
        where = "" if not right and len(by_layers) == 1 else f" in {_layers(layers)}"
        states.append(f"✗ {''.join(map(reasons.mark, why))}{where}")
    return "<br>".join(states)


def _layers(layers: Iterable[int | None]) -> str:
    return ", ".join(str(layer) for layer in sorted(layer for layer in layers if layer is not None))


def _scored(row: Row, reasons: _Reasons) -> str:
    way, _, why = row.scoring.partition(": ")
    if why and why == row.whole:
        return f"✗ {reasons.mark(why)}"
    return f"{ {'one by one': 'alone', 'refused': '✗'}[way] } {reasons.mark(f'Scores: {why}.')}" if why else way
