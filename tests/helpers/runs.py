"""Runs made in every way that the package has, and the assertion that `recompute` finds them honest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from AutomaticEval import generate_inference_with_activations, recompute
from AutomaticEval.capture.recompute.recomputed_run import Recomputed
from AutomaticEval.capture.texts.extraction import extract
from AutomaticEval.capture.texts.feeding import Feeding
from AutomaticEval.capture.texts.text_set import TextSet
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.run import run_benchmark
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.selection import Selection
from AutomaticEval.sites import KINDS

TEXTS = [
    "What is 3 + 4?",
    "The capital of Fenland is a city with a long name, and people there drink tea.",
    "Short",
    "Is an otter an animal? It is, and so is a whale.",
    "What is 3 + 4?",  # again
    "One two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen",
]
SOME_KINDS = "embed,resid_mid,resid_post,mlp_out,mlp_post,z"
ALL = ",".join(kind for kind in KINDS if kind not in ("logits", "mixer_out"))
PROMPT = "Is an otter an animal? Tell me about the sea."


def selection(loaded: LoadedModel, kinds: str = ALL, **how: Any) -> Selection:
    return Selection.parse([kind for kind in kinds.split(",") if not loaded.layout.lacking(kind)], **how)


def extracted(loaded: LoadedModel, folder: Path, kinds: str = ALL, feeding: Feeding = Feeding(), **how: Any) -> Path:
    extract(loaded, TextSet("texts", TEXTS), selection(loaded, kinds, **how), folder, feeding)
    return folder


def evaluated(loaded: LoadedModel, folder: Path, kinds: str = ALL, scoring: str = "tree", **how: Any) -> Path:
    benchmark = Benchmark(("demo",), num_trials=6, num_fewshot=2, scoring=scoring)
    done = run_benchmark(
        loaded, benchmark, selection(loaded, kinds, **{"positions": "all", **how}), output=RunOutput(folder)
    )
    assert done.folder is not None
    return done.folder


def generated(loaded: LoadedModel, file: Path, kinds: str = ALL, **how: Any) -> Path:
    sites = list(selection(loaded, kinds).kinds)
    given = {"max_new_tokens": 12, "apply_chat_template": False, **how}
    generate_inference_with_activations(PROMPT, loaded, file, sites=sites, **given)
    return file


def every_kind(loaded: LoadedModel, folder: Path, kinds: str = ALL) -> Iterator[tuple[str, Path]]:
    """One run for each way of making one: its name and its path."""
    yield "plain", extracted(loaded, folder / "plain", kinds)
    yield "packed", extracted(loaded, folder / "packed", kinds, Feeding(seq_length=24, packing=True))
    yield "patterns", extracted(loaded, folder / "patterns", kinds, Feeding(patterns=True))
    yield "tree", evaluated(loaded, folder, kinds)
    yield "stock", evaluated(loaded, folder, kinds, "stock")
    yield "one prompt", generated(loaded, folder / "one.h5", kinds)


def assert_honest(path: Path, loaded: Any, n: int = 3, **how: Any) -> Recomputed:
    done = recompute(path, loaded, n, seed=2, **how)
    assert not done.different, [str(each) for each in done.different]
    assert len(done.samples) == min(n, done.n_samples)
    assert any(each.n_numbers for each in done.samples)
    return done
