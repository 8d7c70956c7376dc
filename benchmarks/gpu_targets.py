"""The numbers that gpu.py promises to give, each with its target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Number(NamedTuple):
    """A number that was measured."""

    name: str
    value: float


class Target(NamedTuple):
    """What a number should be."""

    section: str
    sense: str
    """<= or >=."""

    limit: float

    def holds(self, value: float) -> bool:
        return value <= self.limit if self.sense == "<=" else value >= self.limit


IN_MEMORY = {
    ("graph", 1): 0.30,
    ("graph", 16): 0.30,
    ("graph", 64): 0.5,
    ("eager", 1): 1.05,
    ("eager", 16): 1.05,
    ("eager", 64): 1.15,
}
"""(how answers are generated, batch) -> the most of plain generate's time, every layer in memory."""


def in_memory(way: str, batch: int) -> str:
    return f"generate, batch {batch}: {way}, in memory / plain"


def on_disk(way: str, batch: int) -> str:
    return f"generate, batch {batch}: {way}, on the disk / (in memory + the bytes at the disk's own rate)"


def both_graphs(batch: int) -> str:
    return f"generate, batch {batch}: graph, not captured / captured"


PROMPT = "one prompt of 512 tokens: every layer / bare forward"
TREE = "score: tree / plain"
SCORED = "score: positions=scored / plain"
EVERY_POSITION = "score: positions=all, on the disk / the larger of the tree and the bytes at the disk's own rate"
FLOOR = "score: tree / floor"
FED = "score: tokens fed by plain lm-eval"
WRITE = "write: the fastest parallel tofile and fsync / our run"
EQUAL = "truth: tensors that equal those of plain hooks, of all"
FORWARDS = "truth: forwards compared"
SAME_TEXT = "truth: graph, tokens that are equal with and without capture, of all"

TARGETS: dict[str, Target] = {
    EQUAL: Target("truth", ">=", 1),
    FORWARDS: Target("truth", ">=", 1000),
    SAME_TEXT: Target("truth", ">=", 1),
    **{in_memory(*which): Target("generate", "<=", limit) for which, limit in IN_MEMORY.items()},
    **{on_disk(*which): Target("generate", "<=", 1) for which in IN_MEMORY},
    **{both_graphs(batch): Target("generate", ">=", 0.95) for batch in (1, 16)},
    PROMPT: Target("prompt", "<=", 1.05),
    TREE: Target("score", "<=", 0.12),
    SCORED: Target("score", "<=", 0.15),
    EVERY_POSITION: Target("score", "<=", 1.1),
    FLOOR: Target("score", "<=", 1.3),
    FED: Target("score", ">=", 150_000),
    WRITE: Target("write", ">=", 0.85),
}


def judged(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A line for each number of the sections that ran: the number, what it should be, and whether it is so. None: not measured."""
    for name, target in TARGETS.items():
        if target.section not in sections:
            continue
        value = sections[target.section].get("numbers", {}).get(name)
        holds = None if value is None else target.holds(value)
        yield {"number": name, "measured": value, "target": f"{target.sense} {target.limit}", "holds": holds}


def lacking(section: str, numbers: Mapping[str, float]) -> list[str]:
    """The numbers that a section owes and has not given."""
    return [name for name, target in TARGETS.items() if target.section == section and name not in numbers]
