"""Models, clocks that wait for the GPU, and memory gauges for the sections of gpu.py."""

from __future__ import annotations

import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gauges import seconds
from scoring import llama_3b
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


def named(error: BaseException) -> str:
    """The error, in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """Peaks in GB: the GPU memory that torch held, and the resident memory of the process, sampled every 10 ms."""
    found = {"GPU peak GB": 0.0, "host peak GB": 0.0}
    over = threading.Event()

    def look() -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while True:
            n_pages = int(Path("/proc/self/statm").read_text().split()[1])
            found["host peak GB"] = max(found["host peak GB"], round(n_pages * page / 1e9, 2))
            if over.wait(0.01):
                return

    gc.collect()
    os.sync()  # the earlier side's bytes are then on the disk and cost this side no time
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
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


Taken = dict[str, list[float]]


def alternated(
    sides: Mapping[str, Callable[[], float]], rounds: int, ends: float, failed: dict[str, str] | None = None
) -> Taken:
    """Seconds of each side, round by round: at least one round, and no round that would end too late.

    failed: side -> its error; that side is left out. None: the error is raised.
    """
    taken: Taken = {name: [] for name in sides}
    for number in range(rounds):
        began = time.perf_counter()
        for name, clock in sides.items():
            if failed is not None and name in failed:
                continue
            try:
                taken[name].append(clock())
            except Exception as error:
                if failed is None:
                    raise
                failed[name] = named(error)
        now = time.perf_counter()
        if number + 1 < rounds and now + (now - began) > ends:
            break
    return taken


def ratio(taken: Taken, side: str, to: str) -> float:
    """Median over the rounds."""
    return round(statistics.median(a / b for a, b in zip(taken[side], taken[to], strict=True)), 3)
