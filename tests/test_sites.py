"""The tables of kinds are the only place that knows them: a row is parsed, expanded, keyed and ordered."""

from __future__ import annotations

import random

import pytest

from AutomaticEval.errors import UnknownSite
from AutomaticEval.selection import Selection
from AutomaticEval.sites import KINDS, ONCE, PER_LAYER, Site, expand, key_order, parse_kinds, site_of


@pytest.mark.parametrize("table", [ONCE, PER_LAYER], ids=["once", "per layer"])
def test_a_kind_that_is_added_is_a_kind_everywhere(table: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownSite):
        parse_kinds("embed,new_kind")
    monkeypatch.setitem(table, "new_kind", "as a newcomer adds it: [pos, d_model]")
    assert parse_kinds("embed,new_kind") == ("embed", "new_kind")
    assert KINDS["new_kind"].startswith("as a newcomer")
    sites = Selection.parse("new_kind,logits,embed,resid_post", "1-2").sites(4)
    if table is ONCE:
        own = [Site("new_kind")]
        assert sites == (Site("embed"), Site("resid_post", 1), Site("resid_post", 2), Site("logits"), *own)
    else:
        own = [Site("new_kind", 1), Site("new_kind", 2)]
        assert sites == (Site("embed"), Site("resid_post", 1), own[0], Site("resid_post", 2), own[1], Site("logits"))
    for site in own:
        assert site_of(site.key) == site
    assert [site for site in sites if site.kind == "new_kind"] == own


def test_every_kind_is_expanded_keyed_and_ordered() -> None:
    """Keys in any order are sorted as they are expanded, those that nobody knows last."""
    sites = expand(KINDS, None, 12)
    assert len(sites) == len(ONCE) + 12 * len(PER_LAYER)
    assert [site_of(site.key) for site in sites] == list(sites)
    keys = [*(site.key for site in sites), "zebra"]
    shuffled = random.Random(0).sample(keys, len(keys))
    assert sorted(shuffled, key=key_order) == keys
