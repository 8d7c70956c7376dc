"""Measures the library on a CUDA GPU, in at most 8 minutes: a model with the shape of Llama-3.2-3B and random weights, in bfloat16.

    HF_HUB_OFFLINE=1 python benchmarks/gpu.py [section ...] [--out FILE] [--tokenizer FOLDER] [--mmlu DATA] [--folder DIR]
    HF_HUB_OFFLINE=1 python benchmarks/gpu.py --device cpu --size tiny    # a dry run, in a minute or two; its figures mean nothing

Sections (without a name, all of them run):
    truth        capture in generation, compared with plain hooks in the same forwards, bit for bit; graphs, with and without capture
    generate     512 + 128 tokens at batch 1, 16 and 64: plain, HF's output_hidden_states, ours step by step and from graphs
    prompt       one prompt of 512 tokens, every layer, compared with a bare forward
    score        5-shot questions: plain lm-eval, the prefix tree uncaptured and captured, the floor
    write        a run of 4 GB, compared with `tofile` of the same bytes from 1, 4 and 8 threads
    eight        8 and 4 bits by bitsandbytes, captured compared with uncaptured
    fingerprint  the hash of every number of the model

Sides run in turn in one process; ratios and seconds are medians over the rounds. Each section has its share of the time: it begins no
round that would end later, and leaves out the sides that no time is left for. At the end, a table gives each number that has a target, with its target.
FILE (JSON) is written after every line, with the error if a section failed; the others go on. Ctrl-C ends the run, and FILE holds what was measured.
DATA holds MMLU as dev/SUBJECT.jsonl and test/SUBJECT.jsonl; without it, the text is made up. Runs are written below --folder, which
should be on the disk to be measured, and are removed again. Needs 60 GB of GPU memory, 64 GB of memory and 20 GB of disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_sections
import torch
import transformers
from gpu_generate import generate
from gpu_made import Setting, named, wait
from gpu_score import score
from gpu_targets import TARGETS, Number, judged
from rich.console import Console
from rich.table import Table

from AutomaticEval.cli.options import quiet_libraries
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER

Section = Callable[[Setting], Iterator[dict[str, Any] | Number]]
Keep = Callable[[], None]
SECTIONS: dict[str, tuple[Section, float]] = {
    "truth": (gpu_sections.truth, 40),
    "generate": (generate, 225),
    "prompt": (gpu_sections.prompt, 12),
    "score": (score, 80),
    "write": (gpu_sections.written, 45),
    "eight": (gpu_sections.eight, 40),
    "fingerprint": (gpu_sections.fingerprint, 6),
}
"""Name -> section, and its share of the time in seconds."""


def where(device: str) -> dict[str, Any]:
    """The device, versions and threads that the figures belong to."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    cpu = {"python": platform.python_version(), "CPU cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"device": name, **versions, "dtype": "bfloat16", **cpu}


def run(name: str, setting: Setting, record: dict[str, Any], keep: Keep) -> None:
    """Run one section and fill its record: its lines, its numbers, its seconds, and the error that ended it, if any. Raises KeyboardInterrupt."""
    section, share = SECTIONS[name]
    began = time.perf_counter()
    setting.begin(share)
    record |= {"lines": [], "numbers": {}, "share": share}
    try:
        for each in section(setting):
            if isinstance(each, Number):
                assert TARGETS[each.name].section == name, each
                record["numbers"][each.name] = each.value
            else:
                record["lines"].append(each)
            keep()
    except Exception as error:  # the other sections are still measured
        record["error"] = named(error)
    except KeyboardInterrupt:
        record["error"] = "interrupted"
        raise
    finally:
        record["took"] = round(time.perf_counter() - began, 1)
        keep()


def has_failed(record: dict[str, Any]) -> bool:
    """Whether a section, or one of its sides, ended with an error."""
    return any("error" in each for each in (record, *record["lines"]))


def is_lost() -> bool:
    """Whether the GPU answers nothing more in this process, as after an illegal access."""
    gc.collect()
    try:
        wait()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def show(console: Console, name: str, record: dict[str, Any]) -> None:
    columns = list(dict.fromkeys(column for line in record["lines"] for column in line))
    table = Table(*columns, title=f"{name} ({record['took']} s of {record['share']})", title_justify="left")
    for line in record["lines"]:
        table.add_row(*("" if line.get(column) is None else str(line[column]) for column in columns))
    console.print(table)
    if "error" in record:
        console.print(f"{name} failed: {record['error']}", markup=False)


def show_targets(console: Console, lines: list[dict[str, Any]]) -> None:
    table = Table("number", "measured", "target", "", title="numbers with a target", title_justify="left")
    for line in lines:
        measured = "not measured" if line["measured"] is None else str(line["measured"])
        table.add_row(
            line["number"], measured, line["target"], {None: "", True: "holds", False: "missed"}[line["holds"]]
        )
    console.print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--tokenizer", default=str(DEMO_FOLDER))
    parser.add_argument("--mmlu")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=["3b", "tiny"], default="3b")
    parser.add_argument(
        "--after", type=json.loads, default={}, help=argparse.SUPPRESS
    )  # what an earlier process measured
    given = parser.parse_args()
    unknown = sorted(set(given.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU here; --device cpu --size tiny is a dry run")
    if given.device == "cpu" and given.size != "tiny":
        parser.error("on a CPU this would take hours; give --size tiny")
    return given


def go_on(given: argparse.Namespace, names: list[str], found: dict[str, Any]) -> None:
    """Run the sections that are left in a new process in place of this one, whose GPU is lost."""
    options = [f"--{each}={getattr(given, each)}" for each in ("tokenizer", "folder", "device", "size")]
    options += [f"--{each}={getattr(given, each)}" for each in ("out", "mmlu") if getattr(given, each)]
    os.execv(sys.executable, [sys.executable, __file__, *names, *options, f"--after={json.dumps(found['sections'])}"])


def main() -> int:
    """Returns 0; 1 when a section or a side failed; 130 when the run was interrupted."""
    given = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `timeout` ends it as Ctrl-C does
    quiet_libraries()
    given.folder.mkdir(parents=True, exist_ok=True)
    is_tiny = given.size == "tiny"
    folder = Path(
        tempfile.mkdtemp(dir=given.folder)
    )  # removed at the end: an interrupt may hit the removing of a section's own
    setting = Setting(given.device, given.tokenizer, folder, given.mmlu, is_tiny)
    console = Console(width=200)
    found: dict[str, Any] = {**where(given.device), "is_tiny": is_tiny, "tokenizer": given.tokenizer}
    console.print(", ".join(f"{key} {value}" for key, value in found.items()), markup=False)
    sections = found["sections"] = dict(given.after)

    def keep() -> None:
        found["targets"] = list(judged(sections))
        if given.out:
            partial = given.out.with_name(given.out.name + ".partial")
            partial.write_text(json.dumps(found, indent=1))
            partial.replace(given.out)

    gc.collect()
    gc.freeze()  # the libraries' own objects are not looked at before every side
    names = given.sections or list(SECTIONS)
    is_ended = False
    for number, name in enumerate(names):
        record = sections[name] = {}
        try:
            run(name, setting, record, keep)
        except KeyboardInterrupt:
            is_ended = True
        show(console, name, record)
        if is_ended:
            break
        if is_lost():
            shutil.rmtree(folder, ignore_errors=True)
            go_on(given, names[number + 1 :], found)
    shutil.rmtree(folder, ignore_errors=True)
    show_targets(console, list(judged(sections)))
    return 130 if is_ended else int(any(map(has_failed, sections.values())))


if __name__ == "__main__":
    sys.exit(main())
