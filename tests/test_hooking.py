"""No hook stays, and no lock, wherever an interrupt falls: it is made to fall at each place in turn where Python serves signals."""

from __future__ import annotations

import dis
import gc
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from helpers.models import CONFIGS, build
from helpers.places import ROOT
from helpers.raw_hooks import n_hooks
from torch import nn

from AutomaticEval.models import edited_models as edited
from AutomaticEval.models.architecture.forward_call import alone_with
from AutomaticEval.models.attention import reading_patterns
from AutomaticEval.models.edit import Edit
from AutomaticEval.models.editing import editing
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.hook_handles import Hooks
from AutomaticEval.models.recording import Kept, capturing
from AutomaticEval.selection import Selection


@pytest.fixture(scope="module")
def model() -> Any:
    found = build(CONFIGS["llama"]())
    find_layout(found)
    return found


def recording(model: Any) -> AbstractContextManager[Any]:
    layout = find_layout(model)
    kept = Kept(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    taps = layout.pick(Selection.parse("embed,resid_post,z,logits").sites(layout.n_layers))
    return capturing(model, taps, layout.embedding, lambda *_: kept, 1)


def edits(model: Any) -> AbstractContextManager[Any]:
    return editing(model, [Edit.scale("layer_1", 2.0), Edit.scale("layer_0.z", 0.0, heads=[1])])


def patterns(model: Any) -> AbstractContextManager[Any]:
    return reading_patterns(model, find_layout(model))


OURS = tuple(
    f"AutomaticEval/models/{name}.py"
    for name in (
        "hook_handles",
        "recording",
        "editing",
        "edited_models",
        "attention",
        "layout",
        "architecture/inner_model",
        "architecture/forward_call",
    )
)
assert all((ROOT / name).is_file() for name in OURS), "a module that was renamed would no longer be interrupted"
TORCHS = ("register_forward_hook", "register_forward_pre_hook", "remove")


class Interrupt(BaseException):
    """What no handler of KeyboardInterrupt, such as pytest's, takes for one of a person."""


@cache
def served(code: CodeType) -> frozenset[int]:
    """Where Python looks for signals in a function: when it begins, after each call, and where a loop goes back. Offsets of what follows."""
    found: set[int] = set()
    looks = False
    for each in dis.get_instructions(code):
        if looks:
            found.add(each.offset)
        looks = each.opname.startswith(("RESUME", "CALL", "JUMP_BACKWARD"))
        if each.opname.startswith("JUMP_BACKWARD"):
            found.add(each.argval)
    return frozenset(found)


def interrupted(run: Callable[[], None], at: int) -> bool:
    """Run, with an interrupt at the place of that number among those of the code that hooks; whether it came so far."""
    n_seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal n_seen
        name = frame.f_code.co_filename
        if not name.endswith((*OURS, "contextlib.py")) and frame.f_code.co_name not in TORCHS:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_lasti in served(frame.f_code):
            n_seen += 1
            if n_seen == at:
                raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        run()
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def is_free(lock: Any) -> bool:
    """Whether another thread gets it."""
    found = []
    other = threading.Thread(target=lambda: found.append(lock.acquire(blocking=False) and lock.release() is None))
    other.start()
    other.join()
    return bool(found[0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of an interrupt within Hooks.__del__
@pytest.mark.parametrize("opened", [recording, edits, patterns])
def test_an_interrupt_leaves_no_hook(opened: Callable[[Any], AbstractContextManager[Any]], model: Any) -> None:
    def run() -> None:
        with opened(model):
            pass

    run()
    attends = model.config._attn_implementation
    number = 1
    while interrupted(run, number):
        gc.collect(0)
        assert not n_hooks(model), f"an interrupt before instruction {number} leaves {n_hooks(model)} hooks"
        assert is_free(alone_with(model)), f"an interrupt before instruction {number} leaves the model locked"
        assert model.config._attn_implementation == attends, f"an interrupt before instruction {number}"
        assert not edited.names_of(model), f"an interrupt before instruction {number} leaves an edit noted"
        number += 1
    assert number > 100
    run()


def test_hooks_of_others_stay_and_so_do_those_of_an_outer_with() -> None:
    module, seen = nn.Linear(2, 2), []

    def own(*_: Any) -> None:
        seen.append("own")

    others = module.register_forward_hook(lambda *_: seen.append("other"))
    with Hooks() as outer:
        outer.after(module, own, always_call=True)
        outer.before(module, own)
        with Hooks() as inner:
            inner.after(module, own)
            inner.before(module, own)
            module(torch.zeros(2))
            assert seen == ["own", "own", "other", "own", "own"]
        seen.clear()
        module(torch.zeros(2))
        assert seen == ["own", "other", "own"]
    seen.clear()
    module(torch.zeros(2))
    assert seen == ["other"]
    others.remove()
    tables = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_pre_hooks_with_kwargs,
    )
    assert not any(tables)
