"""What was tested is written down once, is at least what is pinned, and a newer library is told of in one line."""

from __future__ import annotations

import re

import pytest
from helpers.places import ROOT
from packaging.version import Version

from AutomaticEval import tested_versions as tested


def test_what_is_pinned_was_tested() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name, newest in tested.NEWEST.items():
        assert Version(pinned[name]) <= Version(newest)


def test_a_newer_library_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tested.version
    monkeypatch.setattr(tested, "version", lambda name: "99.1+cu130" if name == "transformers" else real(name))
    monkeypatch.setitem(
        tested.NEWEST, "torch", real("torch").split("+")[0]
    )  # a build of the same version is no newer one
    monkeypatch.setitem(tested.NEWEST, "no-such-library", "1.0")
    tested.tell_newer.cache_clear()
    with pytest.warns(UserWarning, match=r"transformers 99\.1\+cu130 \(5\.\d+\.\d+\)\.") as told:
        tested.tell_newer()
    assert len(told) == 1
    assert "torch" not in str(told[0].message)
    tested.tell_newer()
    assert len(told) == 1
    tested.tell_newer.cache_clear()
