"""What `main.py steer` measures at one scale: the scores of a benchmark, and the answers to prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.evaluation.benchmark_options import Benchmark

if TYPE_CHECKING:
    from AutomaticEval.analysis.steering.at_scales import Steering
    from AutomaticEval.analysis.words.metrics import TextMetric
    from AutomaticEval.evaluation.benchmark import LoadedTasks

SHARES = ("acc", "acc_norm", "acc_bytes", "exact_match", "correct")
"""Metrics that are the share of questions answered right."""
PROMPTS = "prompts"
"""What stands in the place of a task for the answers to prompts."""


@dataclass(frozen=True)
class Measuring:
    """What is measured at each scale."""

    steering: Steering
    metrics: Sequence[TextMetric]
    prompts: Sequence[str]
    sampling: Sampling
    batch_size: int
    asked: Benchmark | None
    tasks: LoadedTasks | None

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on, the scale aside."""
        from AutomaticEval.evaluation.benchmark import fingerprint_of

        loaded, texts = self.steering.loaded, json.dumps(self.prompts)
        of_prompts = {
            "prompts": f"{len(self.prompts)}, sha256 {hashlib.sha256(texts.encode()).hexdigest()[:16]}",
            "max_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "sampling_seed": self.sampling.seed,
        }
        return {
            "model": loaded.name,
            **loaded.made_with().as_dict(),
            "directions": {each.at.key: each.digest for each in self.steering.directions},
            "positions": str(self.steering.positions),
            "benchmark": None if self.asked is None else self.asked.as_dict(),
            "questions": None if self.asked is None or self.tasks is None else fingerprint_of(self.tasks, self.asked),
            **(of_prompts if self.prompts else {}),
        }

    def at(self, scale: float) -> dict[str, Any]:
        """The scores, the text metrics and the answers at one scale."""
        from AutomaticEval.analysis.parts.before_after import answered
        from AutomaticEval.evaluation.run import run_benchmark

        loaded, texts, scores = self.steering.loaded, {}, []
        if self.prompts:
            encoded = [loaded.tokenizer(prompt)["input_ids"] for prompt in self.prompts]
            applied = partial(self.steering.at, scale)
            responses = answered(loaded, encoded, self.sampling, self.batch_size, applied)
            texts[PROMPTS] = [each.text for each in responses]
        if self.asked is not None:
            with self.steering.at(scale):
                outcome = run_benchmark(loaded, self.asked, loaded_tasks=self.tasks)
            scores = [
                {
                    "task": each.task,
                    "metric": each.metric,
                    "value": each.value,
                    "stderr": each.stderr,
                    "n": each.answered,
                    "is_share": each.metric in SHARES and 0 <= (each.value or 0) <= 1,
                }
                for each in outcome.scores
            ]
            texts |= _generated(outcome.samples)
        return {
            "scale": scale,
            "benchmark": scores,
            "texts": [row for task, each in texts.items() for row in self._measured(task, each)],
            "answers": texts.get(PROMPTS, []),
        }

    def _measured(self, task: str, texts: Sequence[str]) -> list[dict[str, Any]]:
        from AutomaticEval.analysis.steering.at_scales import of_texts

        return [{"task": task, "metric": name, **vars(each)} for name, each in of_texts(texts, self.metrics).items()]


def _generated(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[str]]:
    """Task -> the answers that were generated, each once although several filters read it; nothing for tasks that score choices."""
    found: dict[str, list[str]] = {}
    for task, entries in samples.items():
        by_document = {entry["doc_id"]: entry["resps"] for entry in entries}
        texts = [
            each for resps in by_document.values() for answers in resps for each in answers if isinstance(each, str)
        ]
        if texts:
            found[task] = texts
    return found
