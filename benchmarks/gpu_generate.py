"""The section of gpu.py that generates answers: plainly, captured, and from graphs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_made import Setting, Sides, synced, waited
from gpu_targets import Number, both_graphs, in_memory, on_disk
from store_made import rows_bytes

from AutomaticEval.capture.generation import Response, respond
from AutomaticEval.capture.graph.way import way_of
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.evaluation.results.captured_run import made_with
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.selection import Selection
from AutomaticEval.store.writer import RunWriter

Line = dict[str, Any]
EVERYTHING = Selection.parse()
RESPONSE = Selection.parse(positions="response")
WAYS = ("eager", "graph")
STATES = {"output_hidden_states": True, "return_dict_in_generate": True}
SHARES = {1: 0.22, 16: 0.4, 64: 1.0}
"""Batch -> its share of the time that the batches before left."""


def sampled(n_new: int, way: str) -> Sampling:
    """Greedy sampling in one of the two ways."""
    return Sampling(max_new_tokens=n_new, generation=way)


def refuse_other(loaded: LoadedModel, way: str) -> None:
    """Raises RuntimeError when the model does not generate in this way."""
    found = way_of(loaded.model, way, sampled(1, way).kwargs())
    if found.kind != way:
        raise RuntimeError("the graph's self-check failed" if found.failed else "the model is not served from a graph")


class Generating:
    """The ways to generate after one list of prompts, and the bytes of rows that each gave."""

    def __init__(self, setting: Setting, prompts: list[list[int]]) -> None:
        self._setting, self._loaded, self._prompts = setting, setting.loaded, prompts
        self._settings = made_with(self._loaded, EVERYTHING).as_dict()  # once a run
        self._proven: set[str] = set()
        """The ways in which the model was seen to generate, which is asked once."""
        self.n_bytes: dict[str, int] = {}
        """Side -> bytes of rows."""
        self.ways: dict[str, Callable[[int], Any]] = {
            "plain": lambda n: plainly(self._loaded, prompts, n),
            "HF output_hidden_states": lambda n: plainly(setting.for_states, prompts, n, **STATES),
        }
        """Side -> generates n new tokens."""
        for way in WAYS:
            if way == "graph":  # eager without capture is plain
                self.ways["graph, not captured"] = lambda n: self._ours(n, "graph", None)
            self.ways[f"{way}, in memory"] = lambda n, way=way: self._ours(n, way, EVERYTHING)
            self.ways[f"{way}, response only"] = lambda n, way=way: self._ours(n, way, RESPONSE)
            self.ways[f"{way}, on the disk"] = lambda n, way=way: self._written(n, way)

    def clocks(self, n_new: dict[str, int]) -> dict[str, Callable[[], float]]:
        """Side -> generates its number of new tokens, and returns the seconds."""
        return {side: partial(self._seconds, side, n) for side, n in n_new.items()}

    def _seconds(self, side: str, n_new: int) -> float:
        def work() -> None:
            self.n_bytes[side] = _bytes_of(self.ways[side](n_new))

        return synced(work) if side.endswith("on the disk") else waited(work)

    def _ours(self, n_new: int, way: str, selection: Selection | None) -> list[Response]:
        if way not in self._proven:
            refuse_other(self._loaded, way)
            self._proven.add(way)
        return respond(self._loaded, self._prompts, sampled(n_new, way), selection)

    def _written(self, n_new: int, way: str) -> list[Response]:
        with (
            tempfile.TemporaryDirectory(dir=self._setting.folder) as folder,
            RunWriter(Path(folder), self._loaded.name, self._settings) as writer,
        ):
            found = self._ours(n_new, way, EVERYTHING)
            writer.add([each.sample for each in found if each.sample is not None])
            writer.finish()
        return found


def generate(setting: Setting) -> Iterator[Line | Number]:
    """Generate 128 greedy tokens after 512 prompt tokens. A warm-up of each side comes first; a graph is recorded there."""
    n_tokens, n_new = (16, 6) if setting.is_tiny else (512, 128)
    for batch, n_prompts in setting.batches.items():
        work = Generating(setting, setting.prompts(n_prompts, n_tokens))
        n_first = {side: n_new if side.startswith("graph") else 4 for side in work.ways}
        sides = Sides(work.clocks(dict.fromkeys(work.ways, n_new)), setting.part(SHARES[batch]))
        sides.warm_up(work.clocks(n_first)).run(2)
        for side in work.ways:
            line = {"batch": n_prompts} | sides.line(side, "plain")
            middle = sides.median(side)
            if middle is not None:
                line["tokens/s"] = round(n_prompts * n_new / middle, 1)
                line["GB of rows"] = round(work.n_bytes[side] / 1e9, 4)
            if side.startswith("graph") and side in sides.first:
                line["first time"] = round(sides.first[side], 3)
            yield line
        yield from _numbers(batch, sides, work.n_bytes, setting)


def _numbers(batch: int, sides: Sides, n_bytes: dict[str, int], setting: Setting) -> Iterator[Number]:
    for way in WAYS:
        of_plain = sides.ratio(f"{way}, in memory", "plain")
        if of_plain is not None:
            yield Number(in_memory(way, batch), of_plain)
        memory, disk = sides.median(f"{way}, in memory"), sides.median(f"{way}, on the disk")
        if memory is not None and disk is not None:
            at_its_rate = n_bytes[f"{way}, on the disk"] / setting.disk_rate
            yield Number(on_disk(way, batch), round(disk / (memory + at_its_rate), 4))
    of_captured = sides.ratio("graph, not captured", "graph, in memory")
    if of_captured is not None and batch != 64:
        yield Number(both_graphs(batch), of_captured)


def plainly(loaded: LoadedModel, prompts: list[list[int]], n_new: int, **more: Any) -> Any:
    """What transformers' own `generate` gives."""
    ids = torch.tensor(prompts, device=loaded.model.device)
    with torch.no_grad():
        return loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=0,
            **(sampled(n_new, "eager").kwargs() | more),
        )


def _bytes_of(found: Any) -> int:
    """Bytes of the rows that one way of generating gave."""
    if isinstance(found, list):
        return rows_bytes([each.sample for each in found if each.sample is not None])
    states = getattr(found, "hidden_states", None) or ()
    return sum(state.numel() * state.element_size() for step in states for state in step)
