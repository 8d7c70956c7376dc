"""Compares a captured lm-eval run with plain lm-eval: the same requests, in turn in one process; medians of the ratios.

    python benchmarks/evaluation.py cost      # a random GPT-2 of 124M parameters; all layers, all positions, on the disk
    python benchmarks/evaluation.py generation --tasks demo_arithmetic  # answers alone, in lm-eval's own batches
    python benchmarks/evaluation.py harness   # lm-eval's own work alone: the model takes no time
    python benchmarks/evaluation.py memory    # peak memory with n and 10 n documents, each in its own process

Both sides begin with the names of the tasks and end with scores (captured: with a finished run folder). The default is the
bundled demo; --tasks, --include_path and --tokenizer take others, such as MMLU at full scale. Both sides use lm-eval's own
batches; with --scoring tree, ours uses the prefix tree (see scoring.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gauges import peak_memory, quiet, seconds
from lm_eval import simple_evaluate
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from AutomaticEval.cli.options import quiet_libraries
from AutomaticEval.evaluation.benchmark import BUNDLED
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.harness.model import CapturingHFLM
from AutomaticEval.evaluation.results.captured_run import made_with
from AutomaticEval.evaluation.run import run_benchmark
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.selection import Selection
from AutomaticEval.store import writer
from AutomaticEval.store.writer import RunWriter

PEAK_SHARD_BYTES = 32 * 2**20
"""Bytes of a shard: few, so that the smaller run also fills several shards."""


def gpt2(tokenizer: str, n_layers: int = 12) -> LoadedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=n_layers)).eval()
    return LoadedModel(model, AutoTokenizer.from_pretrained(tokenizer), "gpt2-shape")


def plain(loaded: LoadedModel, asked: Benchmark) -> Any:
    """Run lm-eval as its own command line does: index every task file, then run its hf model."""
    manager = TaskManager(include_path=[str(BUNDLED), *asked.include_path])
    lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=asked.batch_size)
    how = {"num_fewshot": asked.num_fewshot, "limit": asked.limit, "gen_kwargs": asked.gen_kwargs}
    return simple_evaluate(model=lm, tasks=list(asked.names), task_manager=manager, **how)


def captured(loaded: LoadedModel, asked: Benchmark, selection: Selection | None) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return run_benchmark(loaded, asked, selection, output=RunOutput(Path(folder)))


def compared(name: str, before: Callable[[], object], after: Callable[[], object], rounds: int) -> None:
    seconds(before), seconds(after)  # warm-up
    pairs = [(seconds(before), seconds(after)) for _ in range(rounds)]
    middle = statistics.median(second / first for first, second in pairs)
    of_plain, of_ours = (statistics.median(each) for each in zip(*pairs, strict=True))
    each = [round(second / first, 3) for first, second in pairs]
    print(f"{name}: ours / plain lm-eval = {middle:.3f}  ({of_ours:.1f} s / {of_plain:.1f} s) {each}", flush=True)


@contextlib.contextmanager
def no_model() -> Iterator[None]:
    """Replace lm-eval's forwards by logits that take no time and no memory."""
    stock = HFLM._model_call, huggingface.F.log_softmax

    def nothing(self: Any, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(1).expand(*inps.shape, self.model.config.vocab_size)

    HFLM._model_call, huggingface.F.log_softmax = nothing, lambda logits, **kwargs: logits
    try:
        yield
    finally:
        HFLM._model_call, huggingface.F.log_softmax = stock


@contextlib.contextmanager
def timed_scoring() -> Iterator[list[float]]:
    """Measure the seconds from tokens to answers: forwards, capture and scores, without tasks, templates, tokenising and metrics."""
    spent: list[float] = []

    def timed(stock: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return stock(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - started)

        return call

    names = ("_loglikelihood_tokens", "_model_generate")
    stock = {name: getattr(HFLM, name) for name in names}
    for name in names:
        setattr(HFLM, name, timed(stock[name]))
    try:
        yield spent
    finally:
        for name in names:
            setattr(HFLM, name, stock[name])


def cost(asked: Benchmark, tokenizer: str, rounds: int) -> None:
    """Compare all that capture adds, on the disk, with the time from tokens to answers; print the harness's time separately."""
    loaded = gpt2(tokenizer)
    sides = {
        "plain": lambda: plain(loaded, asked),
        "not captured": lambda: captured(loaded, asked, None),
        "captured": lambda: captured(loaded, asked, Selection.parse()),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            with timed_scoring() as spent:
                total = seconds(work)
            if number:  # the first is a warm-up
                taken[name].append((total, sum(spent)))
    for name, each in taken.items():
        total, inside = (statistics.median(values) for values in zip(*each, strict=True))
        print(f"{name:13s} {total:6.1f} s, of which harness {total - inside:5.1f} s", flush=True)
    whole = [after[0] / before[0] for before, after in zip(taken["plain"], taken["captured"], strict=True)]
    added = [
        (after[0] - (without[0] - without[1])) / before[1]
        for before, without, after in zip(*(taken[name] for name in sides), strict=True)
    ]
    print(f"captured / plain, whole run:        {statistics.median(whole):.3f}")
    print(f"captured / plain, without harness:  {statistics.median(added):.3f}  {[round(each, 3) for each in added]}")


class Asked(HFLM):  # type: ignore[misc]
    """A model for lm-eval that only records the prompts that it is asked to continue."""

    def generate_until(self, requests: Any, **kwargs: Any) -> Any:
        self.requests = requests
        return [""] * len(requests)


def generation(asked: Benchmark, tokenizer: str, rounds: int) -> None:
    """Measure from lm-eval's requests to their answers, in the same batches. Captured: every layer and position, on the disk."""
    loaded = gpt2(tokenizer)
    lm = Asked(pretrained=loaded.model, tokenizer=loaded.tokenizer)
    manager = TaskManager(include_path=[str(BUNDLED), *asked.include_path], include_defaults=False)
    how = {"num_fewshot": asked.num_fewshot, "limit": asked.limit, "bootstrap_iters": 0}
    with quiet():
        simple_evaluate(model=lm, tasks=list(asked.names), task_manager=manager, **how)

    def plainly() -> None:
        HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=8).generate_until(lm.requests)

    def all_captured() -> None:
        selection = Selection.parse()
        with (
            tempfile.TemporaryDirectory() as folder,
            RunWriter(Path(folder), loaded.name, made_with(loaded, selection).as_dict()) as into,
        ):
            ours = CapturingHFLM(loaded, selection, into.add, scoring=asked.scoring, batch_size=8)
            ours.generate_until(lm.requests)
            into.finish()

    compared(f"{len(lm.requests)} answers", plainly, all_captured, rounds)


def harness(asked: Benchmark, tokenizer: str, rounds: int) -> None:
    loaded = gpt2(tokenizer, n_layers=1)
    with no_model():
        compared("harness", lambda: plain(loaded, asked), lambda: captured(loaded, asked, None), rounds)


TASK = """
task: alike
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def memory(n_docs: int, tokenizer: str) -> None:
    """One process for each number of documents, which have one length: lm-eval's logits of the longest batch are most of the peak."""
    peaks = []
    for number in (n_docs, 10 * n_docs):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "alike.jsonl")
            docs = [
                {"question": f"{doc:06d} is what is asked here. " + "Is it so or not? " * 12} for doc in range(number)
            ]
            file.write_text("\n".join(map(json.dumps, docs)))
            Path(folder, "alike.yaml").write_text(TASK.format(file=file))
            again = [
                sys.executable,
                __file__,
                "peak",
                "--tasks",
                "alike",
                "--include_path",
                folder,
                "--num_fewshot",
                "0",
            ]
            printed = subprocess.run([*again, "--tokenizer", tokenizer], check=True, capture_output=True, text=True)
        peaks.append(int(printed.stdout.split()[-1]))
        print(f"{number} documents: peak {peaks[-1] / 2**20:.0f} MB", flush=True)
    print(f"10 times the documents: {peaks[1] / peaks[0]:.3f} of the peak memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "generation", "harness", "memory", "peak"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", default="demo_facts")
    parser.add_argument("--include_path", action="append", default=[])
    parser.add_argument("--tokenizer", default=str(DEMO_FOLDER))
    parser.add_argument("--num_fewshot", type=int, default=5)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--scoring", choices=["stock", "tree"], default="stock")
    given = parser.parse_args()
    quiet_libraries()
    asked = Benchmark(
        tuple(given.tasks.split(",")),
        limit=given.limit,
        num_fewshot=given.num_fewshot,
        scoring=given.scoring,
        include_path=tuple(given.include_path),
    )
    if given.what == "peak":
        writer.SHARD_BYTES = PEAK_SHARD_BYTES
        with quiet():
            captured(gpt2(given.tokenizer), asked, Selection.parse())
        print(peak_memory())
    elif given.what == "memory":
        memory(given.limit or 100, given.tokenizer)
    else:
        {"cost": cost, "generation": generation, "harness": harness}[given.what](asked, given.tokenizer, given.rounds)


if __name__ == "__main__":
    main()
