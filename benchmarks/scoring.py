"""Compares scoring over the prefix tree with plain lm-eval: same model, same requests, in turn in one process.

    python benchmarks/scoring.py --mmlu DATA --tokenizer GPT2 [--subjects astronomy] [--limit 40] [--rounds 3] [--json FILE]
    python benchmarks/scoring.py --mmlu DATA --tokenizer GPT2 --memory

There are four sides, each from lm-eval's requests to their answers: plain lm-eval `hf`; ours; ours with every layer at every position captured
and on the disk; and the floor. The floor is one bare forward over as many tokens as the tree has, in rows without padding, with logits for as
many tokens as are scored. Ratios are medians over the rounds. DATA holds MMLU as dev/SUBJECT.jsonl and test/SUBJECT.jsonl; without it, the bundled
demo is used with its own tokenizer. The model has random weights: GPT-2 with 124M parameters, or --model llama for Llama-3.2-3B's shape.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gauges import peak_memory, quiet, seconds
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from AutomaticEval.cli.options import quiet_libraries
from AutomaticEval.evaluation.benchmark import BUNDLED
from AutomaticEval.evaluation.harness.model import CapturingHFLM
from AutomaticEval.evaluation.results.captured_run import made_with
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.selection import Selection
from AutomaticEval.store.writer import RunWriter

QUESTION = "'{{question.strip()}}\n\n  A. {{choices[0]}}\n\n  B. {{choices[1]}}\n\n  C. {{choices[2]}}\n\n  D. {{choices[3]}}\n\n  Answer:'"
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}/test/{subject}.jsonl, dev: {data}/dev/{subject}.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
description: {description}
doc_to_text: {text}
doc_to_choice: {choices}
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
SIDES = ("plain", "tree", "captured", "floor")
ROW = 256
"""Tokens in a row of the floor."""


def shapes(mmlu: str | None, asked: str, folder: Path) -> dict[str, tuple[list[str], int]]:
    """Write the task files. Returns name -> (tasks, number of few-shot examples)."""
    if mmlu is None:
        return {"demo, 5-shot": (["demo_facts"], 5), "demo, 0-shot": (["demo_facts"], 0)}
    subjects = asked.split(",") if asked != "all" else sorted(each.stem for each in Path(mmlu, "test").iterdir())
    tasks: dict[str, list[str]] = {"lettered": [], "texts": []}
    for subject in subjects:
        about = (
            f"'The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n\n  '"
        )
        kinds = {
            "lettered": {"description": about, "text": QUESTION, "choices": '["A", "B", "C", "D"]'},
            "texts": {"description": "''", "text": '"Question: {{question}}\\nAnswer:"', "choices": '"{{choices}}"'},
        }
        for kind, parts in kinds.items():
            tasks[kind].append(f"{kind}_{subject}")
            written = TASK.format(name=tasks[kind][-1], data=Path(mmlu).resolve(), subject=subject, **parts)
            (folder / f"{tasks[kind][-1]}.yaml").write_text(written)
    title = subjects[0] if len(subjects) == 1 else f"{len(subjects)} subjects"
    return {
        f"{title}, 5-shot": (tasks["lettered"], 5),
        f"{title}, 0-shot": (tasks["lettered"], 0),
        f"{title}, choices as text": (tasks["texts"], 0),
    }


def llama_3b() -> LlamaConfig:
    """A config with the shape of Llama-3.2-3B."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    )


def loaded_model(kind: str, tokenizer: str, device: str, dtype: torch.dtype) -> LoadedModel:
    torch.manual_seed(0)
    config = GPT2Config() if kind == "gpt2" else llama_3b()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return LoadedModel(model, AutoTokenizer.from_pretrained(tokenizer), f"{kind}-shape")


class Asked(HFLM):  # type: ignore[misc]
    """A model for lm-eval that only records its requests."""

    def loglikelihood(self, requests: Any, **kwargs: Any) -> Any:
        self.requests = requests
        return [(0.0, False)] * len(requests)


def requests_of(loaded: LoadedModel, tasks: list[str], shots: int, limit: int | None, folder: Path) -> Any:
    lm = Asked(pretrained=loaded.model, tokenizer=loaded.tokenizer)
    manager = TaskManager(include_path=[str(BUNDLED), str(folder)], include_defaults=False)
    with quiet():
        simple_evaluate(model=lm, tasks=tasks, num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=0)
    return lm.requests


class Counts(NamedTuple):
    fed: int
    """Tokens that plain lm-eval feeds, padding excluded."""
    distinct: int
    """Tokens of the prefix tree."""
    scored: int
    """Tokens of the prefix tree whose logits are needed."""
    computed: int
    """Tokens that ours feeds."""


class Sides:
    """The four ways to answer one list of requests."""

    def __init__(self, loaded: LoadedModel, requests: Any, batch_size: int | str, folder: Path | None = None) -> None:
        """folder: below which runs are written; None: where temporary files are."""
        self.loaded, self.requests, self.batch_size, self.folder = loaded, requests, batch_size, folder

    @cached_property
    def counts(self) -> Counts:
        lm = self._ours(None, None)
        with quiet():
            lm.loglikelihood(self.requests)
        plain = HFLM(pretrained=self.loaded.model, tokenizer=self.loaded.tokenizer)
        pairs = [plain._encode_pair(*request.args) for request in self.requests]
        fed = {tuple((context + continuation)[:-1]) for context, continuation in pairs}
        distinct = {row[:n] for row in fed for n in range(1, len(row) + 1)}
        scored = {tuple((a + b)[: len(a) + n]) for a, b in pairs for n in range(len(b))}
        return Counts(sum(map(len, fed)), len(distinct), len(scored), lm.n_tokens[1])

    def plain(self) -> Any:
        lm = HFLM(pretrained=self.loaded.model, tokenizer=self.loaded.tokenizer, batch_size=self.batch_size)
        return lm.loglikelihood(self.requests)

    def _ours(self, selection: Selection | None, sink: Any) -> CapturingHFLM:
        return CapturingHFLM(self.loaded, selection, sink, batch_size=self.batch_size)

    def tree(self) -> Any:
        return self._ours(None, None).loglikelihood(self.requests)

    def captured(self) -> Any:
        return self._on_disk("all")

    def scored(self) -> Any:
        """Ours, capturing only the scored positions."""
        return self._on_disk("scored")

    def _on_disk(self, positions: str) -> Any:
        selection = Selection.parse(positions=positions)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            settings = made_with(self.loaded, selection).as_dict()
            with RunWriter(Path(folder), self.loaded.name, settings) as writer:
                answers = self._ours(selection, writer.add).loglikelihood(self.requests)
                writer.finish()
        return answers

    def floor(self) -> Any:
        model, device = self.loaded.model, self.loaded.model.device
        n_tokens = self.counts.distinct
        sizes = [ROW] * (n_tokens // ROW) + ([n_tokens % ROW] if n_tokens % ROW else [])
        rows = 1 if device.type == "cpu" else 8
        with torch.no_grad():
            for at in range(0, len(sizes), rows):
                batch = sizes[at : at + rows]
                whole = [size for size in batch if size == ROW]
                for shape in ([(len(whole), ROW)] if whole else []) + [(1, size) for size in batch if size != ROW]:
                    ids = torch.ones(shape, dtype=torch.long, device=device)
                    n_logits = max(1, round(shape[1] * self.counts.scored / n_tokens))
                    model(ids, use_cache=False, logits_to_keep=n_logits)
        if device.type == "cuda":
            torch.cuda.synchronize()


def measured(name: str, sides: Sides, rounds: int) -> dict[str, Any]:
    with quiet():
        expected, found = sides.plain(), sides.captured()  # a warm-up, too
    off = max(abs(a[0] - b[0]) for a, b in zip(expected, found, strict=True))
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            taken[side].append(seconds(getattr(sides, side)))

    def ratio(side: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(taken[side], taken[to], strict=True))

    return {
        "task": name,
        "requests": len(sides.requests),
        "seconds": {side: round(statistics.median(each), 2) for side, each in taken.items()},
        "tree / plain": round(ratio("tree", "plain"), 3),
        "captured / plain": round(ratio("captured", "plain"), 3),
        "captured / floor": round(ratio("captured", "floor"), 3),
        "tokens fed by plain": sides.counts.fed,
        "distinct tokens": sides.counts.distinct,
        "of these scored": sides.counts.scored,
        "computed / distinct": round(sides.counts.computed / sides.counts.distinct, 3),
        "log-likelihoods differ by": off,
    }


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| task | captured / plain | tree / plain | captured / floor | tokens fed by plain | distinct | computed |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for each in found:
        ratios = " | ".join(f"{each[name]:.3f}" for name in ("captured / plain", "tree / plain", "captured / floor"))
        tokens = f"{each['tokens fed by plain']} | {each['distinct tokens']} | {each['computed / distinct']:.3f} ×"
        lines.append(f"| {each['task']} | {ratios} | {tokens} |")
    return "\n".join(lines)


def peaks(names: list[str]) -> None:
    """Print the peak memory of each side, each in its own process."""
    for name in names:
        for side in ("nothing", "plain", "tree", "captured"):
            again = [sys.executable, __file__, *sys.argv[1:], "--peak", name, side]
            printed = subprocess.run(again, check=True, capture_output=True, text=True).stdout
            print(f"{name}: {side} {int(printed.split()[-1]) / 2**20:.0f} MB", flush=True)


def peak_here(sides: Callable[[], Sides], side: str) -> None:
    if side != "nothing":
        with quiet():
            getattr(sides(), side)()
    print(peak_memory())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mmlu")
    parser.add_argument("--subjects", default="astronomy", help="divided by commas, or all")
    parser.add_argument("--tokenizer", default=str(DEMO_FOLDER))
    parser.add_argument("--model", choices=["gpt2", "llama"], default="gpt2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch_size", default="8")
    parser.add_argument("--limit", type=int, default=40, help="documents of each subject")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="part of the name of a task")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        asked = shapes(given.mmlu, given.subjects, Path(temporary))
        asked = {name: each for name, each in asked.items() if (given.only or "") in name}
        if given.memory and not given.peak:
            peaks(list(asked))
            return
        loaded = loaded_model(given.model, given.tokenizer, given.device, getattr(torch, given.dtype))
        batch_size = int(given.batch_size) if given.batch_size.isdecimal() else given.batch_size

        def sides(name: str) -> Sides:
            requests = requests_of(loaded, *asked[name], given.limit, Path(temporary))
            return Sides(loaded, requests, batch_size)

        if given.peak:
            peak_here(lambda: sides(given.peak[0]), given.peak[1])
            return
        found = [measured(name, sides(name), given.rounds) for name in asked]
    device = (
        torch.cuda.get_device_name() if given.device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    )
    print(f"{given.model} shape, {given.dtype}, {device}, {torch.get_num_threads()} threads, {given.rounds} rounds")
    print(table(found))
    if given.json:
        given.json.write_text(
            json.dumps({"device": device, "settings": {**vars(given), "json": None}, "tasks": found}, indent=1)
        )


if __name__ == "__main__":
    main()
