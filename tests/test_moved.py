"""Old names of modules import what has moved, and say where it is."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib import import_module

import pytest

import AutomaticEval
from AutomaticEval.moved import MOVED


def imported_anew(name: str) -> object:
    """As by a process that has not imported it yet; what it stands for stays as it is."""
    sys.modules.pop(name, None)
    return import_module(name)


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_module_that_moved_and_warns(old: str) -> None:
    new = import_module(MOVED[old])
    with pytest.warns(DeprecationWarning, match=rf"{old} has moved; import {MOVED[old]}$"):
        assert imported_anew(old) is new
    assert new.__name__ == MOVED[old]
    assert new.__spec__ is not None
    assert new.__spec__.name == MOVED[old]


def test_names_can_be_imported_from_an_old_name() -> None:
    code = (
        "import warnings; warnings.simplefilter('error'); import AutomaticEval\n"
        "warnings.simplefilter('always')\n"
        "from AutomaticEval.evaluation.parse_answer import extract_answer as new\n"
        "from AutomaticEval.evaluation.extraction import extract_answer as old\n"
        "assert old is new\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        done.stderr.count("AutomaticEval.evaluation.extraction has moved; import AutomaticEval.evaluation.parse_answer")
        == 1
    )
    assert "<string>:4: DeprecationWarning" in done.stderr  # the line that imports is named, not one of ours


def test_what_was_pickled_under_an_old_name_loads() -> None:
    sys.modules.pop("AutomaticEval.evaluation.extraction", None)
    with pytest.warns(DeprecationWarning, match="has moved"):
        found = pickle.loads(b"cAutomaticEval.evaluation.extraction\nextract_answer\n.")
    assert found is AutomaticEval.extract_answer


def test_a_name_that_never_was_is_no_module() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"AutomaticEval\.evaluation\.nothing"):
        import_module("AutomaticEval.evaluation.nothing")


def test_the_package_imports_nothing_that_moved() -> None:
    code = f"import sys, AutomaticEval; assert not {{*sys.modules}} & {{*{[*MOVED, *MOVED.values()]!r}}}"
    subprocess.run([sys.executable, "-c", code], check=True)
