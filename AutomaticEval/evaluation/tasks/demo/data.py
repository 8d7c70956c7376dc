"""The documents of the demo tasks, from the JSONL files beside this one. lm-eval calls these by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict


def facts(**unused: Any) -> DatasetDict:
    """Facts of the closed world, four choices each."""
    return _splits("facts")


def arithmetic(**unused: Any) -> DatasetDict:
    """Sums of two numbers."""
    return _splits("arithmetic")


def capitals(**unused: Any) -> DatasetDict:
    """Capitals of further countries; the model has read those of half of them."""
    return _splits("capitals", ("test",))


def _splits(name: str, splits: tuple[str, ...] = ("train", "test")) -> DatasetDict:
    return DatasetDict({split: Dataset.from_list(_read(f"{name}_{split}.jsonl")) for split in splits})


def _read(file: str) -> list[dict[str, Any]]:
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
