"""A walk over a prefix tree never waits for the device: the next forward is launched before the numbers of the one before it are read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.models import ALL, CONFIGS, VOCABULARY, build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from AutomaticEval.capture.tree import score
from AutomaticEval.capture.tree.score import Cut, Scored, ScoringOptions, TreeScoring
from AutomaticEval.capture.tree.walk import Walk
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.selection import Selection

READS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
"""Methods by which the host reads a tensor's numbers."""
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_consecutive"}
"""Operations whose result, or its shape, the host has to know."""


class NoWaits(TorchDispatchMode):
    """Raises where an operation on a GPU would wait for it, also when it runs on a CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put_") and any(
            isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1]
        )
        if name in WAITS or by_mask:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_is_read() -> Iterator[None]:
    """Inside the with, the host reads no tensor."""

    def refuse(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"{name} waits for the device")

        return call

    with pytest.MonkeyPatch.context() as patch, NoWaits():
        for name in READS:
            patch.setattr(Tensor, name, refuse(name))
        yield


@contextmanager
def no_wait_on_gpu() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pairs() -> list[tuple[list[int], list[int]]]:
    rng = random.Random(1)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(n)]

    shots = tokens(30)
    contexts = [shots[: rng.choice([0, 15, 30])] + tokens(rng.randrange(1, 15)) for _ in range(12)]
    return [(context, tokens(rng.choice([1, 2, 4]))) for context in contexts for _ in range(3)]


def scored(loaded: LoadedModel, selection: Selection | None, order: list[str], guard: Any) -> dict[int, Scored]:
    """The scores of the pairs. order: gets a word for each forward that is launched, and for each whose numbers are taken."""
    scoring = TreeScoring(loaded, [Cut.of(*pair, 128) for pair in pairs()], ScoringOptions(selection, tokens=32))

    def guarded(real: Any, word: str | None) -> Any:
        def call(*args: Any) -> Any:
            if word is not None:
                order.append(word)
            with guard():
                return real(*args)

        return call

    def noted(real: Any) -> Any:
        def call(*args: Any) -> Any:
            order.append("take")
            return real(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Walk, "_forward", guarded(Walk._forward, "launch"))
        patch.setattr(TreeScoring, "_launched", guarded(TreeScoring._launched, None))
        patch.setattr(TreeScoring, "_take", noted(TreeScoring._take))
        patch.setattr(
            score, "likeliest_tokens", lambda logprobs: logprobs.argmax(-1)
        )  # as on a GPU; numpy is the CPU's
        return {each.request: each for batch in scoring.results() for each in batch}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "qwen3"])
def test_a_walk_reads_no_number_between_its_forwards(name: str, tokenizer: Any) -> None:
    loaded = LoadedModel(build(ALL[name]()), tokenizer, name)
    order: list[str] = []
    found = scored(loaded, None, order, nothing_is_read)
    assert len(found) == len(pairs())
    n = order.count("launch")
    assert n > 4
    assert order == ["launch", *["launch", "take"] * (n - 1), "take"]


def test_the_guard_tells() -> None:
    tensor = torch.ones(3)
    for read in (lambda: tensor.tolist(), lambda: int(tensor[0]), lambda: tensor[tensor > 0], lambda: tensor.nonzero()):
        with nothing_is_read(), pytest.raises(AssertionError, match="waits for the device"):
            read()


@pytest.mark.gpu
@pytest.mark.parametrize("positions", [None, "all", "scored"])
def test_a_walk_never_waits_for_a_gpu(positions: str | None, tokenizer: Any) -> None:
    """After a first walk, whose recordings compare references with copies. Scores and rows are those of the CPU, within rounding."""
    selection = None if positions is None else Selection.parse(positions=positions)
    loaded = LoadedModel(build(CONFIGS["llama"]()).to("cuda"), tokenizer, "llama")
    order: list[str] = []
    first = scored(loaded, selection, order, torch.no_grad)
    found = scored(loaded, selection, order, no_wait_on_gpu)
    loaded.model.to("cpu")
    expected = scored(loaded, selection, order, torch.no_grad)
    for number, each in expected.items():
        assert torch.equal(first[number].logprobs, found[number].logprobs)
        assert torch.allclose(found[number].logprobs, each.logprobs, atol=1e-3)
        for part, other in zip(found[number].parts, each.parts, strict=True):
            assert part.rows.positions == other.rows.positions
            for key, rows in part.rows.activations.items():
                assert torch.allclose(rows, other.rows.activations[key], atol=1e-3)
