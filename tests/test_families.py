"""Each decoder family against plain hooks at places that were written by hand; `docs/families.md` says what was found.

`--write-families` writes that page. A new family is one line in `families/configs.py`, and one in `families/by_hand.py`.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

import families.check
import pytest
from families.by_hand import BY_HAND
from families.check import Row, check
from families.configs import FAMILIES
from families.table import PAGE, compared, made_with_this_transformers, page

from AutomaticEval.models import editing
from AutomaticEval.models.checkpoint import loaded_model
from AutomaticEval.models.layout import Layout
from AutomaticEval.sites import Site

WRONG: dict[str, str] = {}
"""Families that are known to be wrong, and in which way. A family that is right has no line here."""
found: dict[str, Row] = {}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_all_that_is_offered_is_right(name: str, tokenizer: Any) -> None:
    row = found[name] = check(name, tokenizer)
    if name in WRONG:
        assert row.wrong, f"{name} is right: take its line out of WRONG"
    else:
        assert not row.wrong, "\n".join(row.wrong)


def test_page_says_what_was_found(request: pytest.FixtureRequest) -> None:
    if len(found) < len(FAMILIES):
        pytest.skip("the page is compared when all families are checked: python -m pytest tests/test_families.py")
    now = page(found, WRONG)
    if request.config.getoption("--write-families"):
        PAGE.write_text(now, encoding="utf-8")
    there = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    with_versions = made_with_this_transformers(there)
    lines = [compared(text, with_versions=with_versions) for text in (there, now)]
    difference = "\n".join(difflib.unified_diff(*lines, "docs/families.md", "found", lineterm="", n=0))
    assert not difference, (
        f"docs/families.md is stale; python -m pytest tests/test_families.py --write-families writes it\n{difference}"
    )


def test_a_wrong_place_is_found(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is no use unless it fails: a place of another layer, a scale that is left out, a site that nobody wrote down."""
    find_layout = families.check.find_layout

    def wrong(model: Any) -> Layout:
        layout = find_layout(model)
        of_next = replace(layout.taps[Site("mlp_out", 0)], module=layout.taps[Site("mlp_out", 1)].module)
        unscaled = replace(layout.taps[Site("attn_out", 1)], scale=1.0)
        return replace(layout, taps={**layout.taps, Site("mlp_out", 0): of_next, Site("attn_out", 1): unscaled})

    for module in (families.check, loaded_model, editing):
        monkeypatch.setattr(module, "find_layout", wrong)
    monkeypatch.setitem(BY_HAND, "granite", replace(BY_HAND["granite"], norm=None))
    said = "\n".join(check("granite", tokenizer).wrong)
    for place in ("answer 0, layer_0.mlp_out", "answer 2, layer_1.attn_out", "score 1, layer_0.mlp_out"):
        assert f"{place}: differs" in said
    assert "edit of mlp_out 0, logits: differs" in said
    assert "final_norm: offered, and by_hand.py says nothing of it" in said
    assert "layer_1.z" not in said
