"""What the docs give as proof of a claim is there."""

from __future__ import annotations

import re

import pytest
from helpers.places import ROOT

NAMED = sorted(set(re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py(?:::\w+)?)`", (ROOT / "docs/claims.md").read_text())))


@pytest.mark.parametrize("named", NAMED)
def test_what_shows_a_claim_exists(named: str) -> None:
    path, _, test = named.partition("::")
    text = (ROOT / path).read_text()
    assert re.search(rf"^def {test or 'test_|^def main'}", text, re.MULTILINE)


def test_there_are_claims() -> None:
    assert len(NAMED) > 20
