"""The section of gpu.py that scores questions: plain lm-eval, the prefix tree, and the floor."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gauges import quiet
from gpu_made import Setting, Sides, synced, waited
from gpu_targets import EVERY_POSITION, FED, FLOOR, SCORED, TREE, Number
from scoring import Sides as Asked
from scoring import requests_of, shapes
from store_made import WORDS

from AutomaticEval.capture.reduced_rows import bytes_per_row
from AutomaticEval.selection import Selection

Line = dict[str, Any]
PLAIN, UNCAPTURED, SOME, ALL = (
    "plain lm-eval hf, batch 16",
    "tree, not captured",
    "tree, positions=scored, on the disk",
    "tree, positions=all, on the disk",
)


def score(setting: Setting) -> Iterator[Line | Number]:
    """Score 5-shot questions with four choices of one token, six subjects of 60 questions, from lm-eval's requests to their answers."""
    n_docs = 2 if setting.is_tiny else 60
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = Path(setting.mmlu) if setting.mmlu else made_up(folder / "data", setting.loaded.tokenizer)
        subjects = sorted({each.stem for each in (data / "test").glob("*.jsonl")})[: 2 if setting.is_tiny else 6]
        shape = shapes(str(data), ",".join(subjects), folder)
        tasks, shots = next(each for name, each in shape.items() if "5-shot" in name)
        requests = requests_of(setting.loaded, tasks, 1 if setting.is_tiny else shots, n_docs, folder)
        asked = Asked(setting.loaded, requests, 16, setting.folder)
        counts = asked.counts  # a warm-up of the tree
        about = {"text": "MMLU" if setting.mmlu else "made up", "requests": len(asked.requests)}
        yield {**about, "fed": counts.fed, "distinct": counts.distinct, "computed": counts.computed}
        yield Number(FED, counts.fed)
        with quiet():
            expected, found = asked.plain(), asked.captured()  # a warm-up, too
        clocks = {
            PLAIN: lambda: waited(asked.plain),
            UNCAPTURED: lambda: waited(asked.tree),
            SOME: lambda: synced(asked.scored),
            ALL: lambda: synced(asked.captured),
            "floor": lambda: waited(asked.floor),
        }
        sides = Sides(clocks, setting.ends).run(3)
    for side in clocks:
        yield sides.line(side, PLAIN)
    off = max(abs(a[0] - b[0]) for a, b in zip(expected, found, strict=True))
    yield {"side": "log-likelihoods, tree and plain, differ by at most", "nats": off}
    for name, ratio in ((TREE, (UNCAPTURED, PLAIN)), (SCORED, (SOME, PLAIN)), (FLOOR, (UNCAPTURED, "floor"))):
        value = sides.ratio(*ratio)
        if value is not None:
            yield Number(name, value)
    tree, written = sides.median(UNCAPTURED), sides.median(ALL)
    if tree is not None and written is not None:
        n_bytes = counts.distinct * bytes_per_row(setting.loaded, Selection.parse(positions="all"))
        at_its_rate = n_bytes / setting.disk_rate
        yield {"side": "the bytes at the disk's own rate", "seconds": round(at_its_rate, 4), "GB": n_bytes / 1e9}
        yield Number(EVERY_POSITION, round(written / max(tree, at_its_rate), 4))


def made_up(folder: Path, tokenizer: Any) -> Path:
    """Write six subjects of made-up text in the form of MMLU's files: five few-shot examples and 60 questions each, of about 75 tokens each."""
    draw = random.Random(0)
    n_words = next(n for n in range(4, 200) if len(tokenizer(_text(_question(random.Random(0), n)))["input_ids"]) >= 70)
    for split, n_docs in (("dev", 5), ("test", 60)):
        (folder / split).mkdir(parents=True)
        for subject in range(6):
            docs = [_question(draw, n_words) for _ in range(n_docs)]
            (folder / split / f"made_up_{subject}.jsonl").write_text("\n".join(map(json.dumps, docs)) + "\n")
    return folder


def _question(draw: random.Random, n_words: int) -> dict[str, Any]:
    choices = [" ".join(draw.choices(WORDS, k=1 + n_words // 10)) for _ in range(4)]
    return {"question": " ".join(draw.choices(WORDS, k=n_words)) + "?", "choices": choices, "answer": draw.randrange(4)}


def _text(question: dict[str, Any]) -> str:
    """About what a task makes of a question."""
    return "\n".join([question["question"], *(f"A. {each}" for each in question["choices"]), "Answer: A"])
