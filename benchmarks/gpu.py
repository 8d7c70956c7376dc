"""Measures the library on a CUDA GPU, in at most 8 minutes: a model with the shape of Llama-3.2-3B and random weights, in bfloat16.

    HF_HUB_OFFLINE=1 python benchmarks/gpu.py [section ...] [--out FILE] [--tokenizer FOLDER] [--mmlu DATA] [--folder DIR]
    HF_HUB_OFFLINE=1 python benchmarks/gpu.py --tiny    # a dry run on the CPU, in a minute; its figures mean nothing

Sections (without a name, all of them run):
    truth        capture in generation, compared with plain hooks in the same forwards, bit for bit
    generate     512 + 128 tokens at batch 1, 16 and 64: plain, HF's output_hidden_states, ours
    prompt       one prompt of 512 tokens, every layer, compared with a bare forward
    score        5-shot questions: plain lm-eval, the prefix tree uncaptured and captured, the floor
    write        a run of 4 GB, compared with `tofile` of the same bytes
    eight        8 and 4 bits by bitsandbytes, captured compared with uncaptured
    fingerprint  the hash of every number of the model

Sides run in turn in one process; ratios and seconds are medians over the rounds. Each section has its share of the time and begins no
round that would end later: `rounds` is the number of rounds. Each line is written to FILE as soon as it is known, with the error if something failed.
DATA holds MMLU as dev/SUBJECT.jsonl and test/SUBJECT.jsonl; without it, the text is made up. Runs are written below --folder, which
should be on the disk to be measured, and are removed again. Needs 60 GB of GPU memory, 64 GB of memory and 20 GB of disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_sections
import torch
import transformers
from gpu_made import Setting, named
from rich.console import Console
from rich.table import Table

from AutomaticEval.cli.options import quiet_libraries
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER

Section = Callable[[Setting], Iterator[dict[str, Any]]]
SECTIONS: dict[str, tuple[Section, float]] = {
    "truth": (gpu_sections.truth, 35),
    "generate": (gpu_sections.generate, 220),
    "prompt": (gpu_sections.prompt, 10),
    "score": (gpu_sections.score, 75),
    "write": (gpu_sections.written, 45),
    "eight": (gpu_sections.eight, 45),
    "fingerprint": (gpu_sections.fingerprint, 10),
}
"""Name -> section, and its share of the time in seconds."""


def where(device: str) -> dict[str, Any]:
    """The device, versions and threads that the figures belong to."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    cpu = {"python": platform.python_version(), "CPU cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"device": name, **versions, "dtype": "bfloat16", **cpu}


def run(name: str, setting: Setting, record: dict[str, Any], keep: Callable[[], None]) -> None:
    """Run one section and fill its record: its lines, its seconds, and the error that ended it, if any."""
    section, share = SECTIONS[name]
    began = time.perf_counter()
    setting.ends = began + share
    record["lines"] = []
    try:
        for line in section(setting):
            record["lines"].append(line)
            keep()
    except Exception as error:  # the other sections are still measured
        record["error"] = named(error)
    record["took"] = round(time.perf_counter() - began, 1)
    keep()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show(console: Console, name: str, record: dict[str, Any]) -> None:
    columns = list(dict.fromkeys(column for line in record["lines"] for column in line))
    table = Table(*columns, title=f"{name} ({record['took']} s)", title_justify="left")
    for line in record["lines"]:
        table.add_row(*("" if line.get(column) is None else str(line[column]) for column in columns))
    console.print(table)
    if "error" in record:
        console.print(f"{name} failed: {record['error']}", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--tokenizer", default=str(DEMO_FOLDER))
    parser.add_argument("--mmlu")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU")
    given = parser.parse_args()
    unknown = sorted(set(given.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if not given.tiny and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU here; --tiny is a dry run on the CPU")
    quiet_libraries()
    given.folder.mkdir(parents=True, exist_ok=True)
    device = "cpu" if given.tiny else "cuda"
    setting = Setting(device, given.tokenizer, given.folder, given.mmlu, given.tiny)
    console = Console(width=180)
    found: dict[str, Any] = {**where(device), "is_tiny": given.tiny, "tokenizer": given.tokenizer, "sections": {}}
    console.print(", ".join(f"{key} {value}" for key, value in found.items() if key != "sections"), markup=False)

    def keep() -> None:
        if given.out:
            partial = given.out.with_name(given.out.name + ".partial")
            partial.write_text(json.dumps(found, indent=1))
            partial.replace(given.out)

    for name in given.sections or SECTIONS:
        record = found["sections"][name] = {}
        run(name, setting, record, keep)
        show(console, name, record)


if __name__ == "__main__":
    main()
