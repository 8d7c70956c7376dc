"""Models, clocks that wait for the GPU, and memory gauges for the sections of gpu.py."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from gauges import seconds
from scoring import llama_3b
from store_made import fresh, seconds_in, write_raw
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from AutomaticEval.models.checkpoint.loaded_model import LoadedModel


@dataclass
class Setting:
    """What is measured, and where."""

    device: str
    tokenizer: str
    folder: Path
    """On the disk to be measured."""
    mmlu: str | None = None
    is_tiny: bool = False
    ends: float = field(default=float("inf"))
    """A time of time.perf_counter, after which a running section begins no further round."""

    def begin(self, share: float) -> None:
        """A section begins, which has so many seconds. A dry run has as many as it needs."""
        self.ends = float("inf") if self.is_tiny else time.perf_counter() + share

    def part(self, share: float) -> float:
        """When a part of the running section ends, which has this share of the time that is left."""
        now = time.perf_counter()
        return now + share * (self.ends - now)

    @property
    def batches(self) -> dict[int, int]:
        """The name of a batch in the table -> the prompts that it has."""
        return {1: 1, 16: 2, 64: 3} if self.is_tiny else {1: 1, 16: 16, 64: 64}

    @cached_property
    def disk_rate(self) -> float:
        """Bytes a second of the disk below folder: `tofile` and fsync of 2 GB from four threads, the better of two."""
        plain = torch.randint(-(2**62), 2**62, ((2**20 if self.is_tiny else 2**31) // 8,)).numpy()
        return plain.nbytes / min(self.seconds_in_folder(lambda path: write_raw(path, plain, 4)) for _ in range(2))

    def seconds_in_folder(self, work: Callable[[Path], object]) -> float:
        """Seconds of work in a new folder on the disk to be measured."""
        if not self.is_tiny:
            return seconds_in(self.folder, work)
        with fresh(self.folder) as folder:
            return seconds(lambda: work(folder / "run"))

    def config(self, n_layers: int | None = None) -> LlamaConfig:
        config = llama_3b()
        if self.is_tiny:
            small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
            small["vocab_size"] = max(1000, len(AutoTokenizer.from_pretrained(self.tokenizer)))
            config = LlamaConfig(**(config.to_dict() | small | {"num_hidden_layers": 3, "head_dim": 16}))
        config.num_hidden_layers = n_layers or config.num_hidden_layers
        return config

    def made(self, config: Any, dtype: torch.dtype, name: str) -> LoadedModel:
        """A model with random weights, made on the device. It never ends a text by itself."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        model.generation_config.eos_token_id = None
        return LoadedModel(model, AutoTokenizer.from_pretrained(self.tokenizer), name)

    @cached_property
    def loaded(self) -> LoadedModel:
        return self.made(self.config(), torch.bfloat16, "llama-3b-shape")

    @cached_property
    def for_states(self) -> LoadedModel:
        """The model, made again: transformers leaves its own hooks on a model that was asked for `output_hidden_states`."""
        return self.made(self.config(), torch.bfloat16, "llama-3b-shape")

    def prompts(self, n: int, n_tokens: int) -> list[list[int]]:
        """[n, n_tokens] random ids that every tokenizer here has."""
        return torch.randint(1, 400, (n, n_tokens), generator=torch.Generator().manual_seed(n)).tolist()


def wait() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def waited(work: Callable[[], object]) -> float:
    """Seconds of work, until the GPU has finished it."""
    wait()
    return seconds(lambda: (work(), wait()))


def briefly(work: Callable[[], object]) -> float:
    """Seconds of work that takes milliseconds: nothing is collected before it."""
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def synced(work: Callable[[], object]) -> float:
    """Seconds of work that writes. What it left on its way to the disk costs the next side no time."""
    taken = waited(work)
    os.sync()
    return taken


def named(error: BaseException) -> str:
    """The error, in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """Peaks in GB: the GPU memory that torch held, and the resident memory of the process, sampled every 50 ms."""
    found = {"GPU peak GB": 0.0, "host peak GB": 0.0}
    over = threading.Event()

    def look() -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while True:
            n_pages = int(Path("/proc/self/statm").read_text().split()[1])
            found["host peak GB"] = max(found["host peak GB"], round(n_pages * page / 1e9, 2))
            if over.wait(0.05):
                return

    # what torch keeps for later is left to it: memory that must be asked for again would cost this side time
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        if torch.cuda.is_available():
            found["GPU peak GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)


class Sides:
    """Ways to do one piece of work, run in turn. A side that fails is left out from then on, and so is one that no time is left for."""

    def __init__(self, clocks: Mapping[str, Callable[[], float]], ends: float, *, gauged: bool = True) -> None:
        """clocks: side -> runs it once and returns its seconds. ends: no round begins that would end later, but for the first. gauged: with peaks."""
        self._clocks, self._ends, self._gauged = clocks, ends, gauged
        self.failed: dict[str, str] = {}
        """Side -> why it has no figures."""
        self._taken: dict[str, list[float]] = {name: [] for name in clocks}
        """Side -> seconds, round by round."""
        self._peaks: dict[str, dict[str, float]] = {name: {} for name in clocks}
        self.first: dict[str, float] = {}
        """Side -> seconds of its warm-up."""

    def warm_up(self, clocks: Mapping[str, Callable[[], float]] | None = None) -> Sides:
        """Run each side once, or a shorter form of it. Returns self."""
        for name, clock in (clocks or self._clocks).items():
            self._run(name, clock, partial(self.first.__setitem__, name))
        return self

    def run(self, rounds: int) -> Sides:
        """Run all sides in turn, at least once. Returns self."""
        for number in range(rounds):
            began = time.perf_counter()
            for name, clock in self._clocks.items():
                self._run(name, clock, self._taken[name].append)
            now = time.perf_counter()
            if number + 1 < rounds and now + (now - began) > self._ends:
                break
        return self

    def _run(self, name: str, clock: Callable[[], float], keep: Callable[[float], None]) -> None:
        if name in self.failed:
            return
        if time.perf_counter() > self._ends:
            if not self._taken[name]:
                self.failed[name] = "not measured: the time of the section was over"
            return
        try:
            with peaks() if self._gauged else nullcontext({}) as self._peaks[name]:
                taken = clock()
            keep(taken)
        except Exception as error:  # the other sides are still measured
            self.failed[name] = named(error)

    def median(self, side: str) -> float | None:
        """Seconds; None for a side that failed."""
        return None if side in self.failed or not self._taken[side] else statistics.median(self._taken[side])

    def ratio(self, side: str, to: str) -> float | None:
        """The median over the rounds in which both ran; None when one of the two failed."""
        if self.median(side) is None or self.median(to) is None:
            return None
        return round(statistics.median(a / b for a, b in zip(self._taken[side], self._taken[to], strict=False)), 4)

    def line(self, side: str, to: str) -> dict[str, Any]:
        """What is known of a side, for its line in the table."""
        if side in self.failed:
            return {"side": side, "error": self.failed[side]}
        line = {"side": side, "seconds": round(self.median(side) or 0, 4), f"of {to}": self.ratio(side, to)}
        return line | self._peaks[side] | {"rounds": len(self._taken[side])}
