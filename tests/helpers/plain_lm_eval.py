"""Scores of lm-eval alone, and log-probabilities computed from stored rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from AutomaticEval.evaluation.benchmark import BUNDLED
from AutomaticEval.evaluation.run import Outcome
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.selection import Selection

SCORED = Selection.parse(positions="scored")


def plain(
    loaded: LoadedModel,
    names: tuple[str, ...],
    tasks: str,
    batch_size: Any = 8,
    of_model: Mapping[str, Any] = {},
    **how: Any,
) -> dict[str, Any]:
    """Results of lm-eval alone; only the demo's task files are ours. of_model: options of lm-eval's `hf`."""
    lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, **of_model)
    manager = TaskManager(include_path=[str(BUNDLED), tasks], include_defaults=False)
    results = simple_evaluate(model=lm, tasks=list(names), task_manager=manager, **how)
    assert results is not None
    return dict(results)


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def assert_same(outcome: Outcome, expected: dict[str, Any]) -> None:
    assert as_json(outcome.results["results"]) == as_json(expected["results"])
    assert as_json(outcome.samples) == as_json(expected["samples"])


def recompute(loaded: LoadedModel, sample: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities, [pos, d_vocab], from the stored rows of the last layer: norm, output head, log-softmax."""
    last = f"layer_{loaded.layout.n_layers - 1}"
    rows = sample["activations"][last][-len(sample["generated_ids"]) :]
    base = loaded.model.base_model
    norm = next(getattr(base, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(base, name))
    with torch.no_grad():
        return loaded.model.get_output_embeddings()(norm(rows)).log_softmax(-1)
