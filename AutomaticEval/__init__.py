"""Run language models on prompts and benchmarks, and capture their activations in the very pass that answered.

Names are imported when they are first used, so that `import AutomaticEval` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from AutomaticEval import moved

if TYPE_CHECKING:
    from AutomaticEval.analysis.compare_runs import compare_runs as compare_runs
    from AutomaticEval.analysis.experts.load import expert_load as expert_load
    from AutomaticEval.analysis.geometry.geometry import geometry as geometry
    from AutomaticEval.analysis.heads.compare import ActivationComparator as ActivationComparator
    from AutomaticEval.analysis.heads.strength import ActivationExtractor as ActivationExtractor
    from AutomaticEval.analysis.heads.strength import strength_of_run as strength_of_run
    from AutomaticEval.analysis.lens.by_layer import logit_lens as logit_lens
    from AutomaticEval.analysis.lens.one_question import lens_of_question as lens_of_question
    from AutomaticEval.analysis.lens.question_file import read_lens_questions as read_lens_questions
    from AutomaticEval.analysis.lens.train import train_tuned_lens as train_tuned_lens
    from AutomaticEval.analysis.lens.tuned_lens import load_tuned_lens as load_tuned_lens
    from AutomaticEval.analysis.probes.probe import probe as probe
    from AutomaticEval.analysis.probes.saved.saved_probe import load_probe as load_probe
    from AutomaticEval.analysis.steering.difference import difference_of_means as difference_of_means
    from AutomaticEval.analysis.steering.direction import Direction as Direction
    from AutomaticEval.analysis.steering.direction import load_direction as load_direction
    from AutomaticEval.capture.prompt import generate_inference as generate_inference
    from AutomaticEval.capture.prompt import generate_inference_with_activations as generate_inference_with_activations
    from AutomaticEval.capture.recompute.recomputed_run import recompute as recompute
    from AutomaticEval.capture.texts.features import ExtractSingleSample as ExtractSingleSample
    from AutomaticEval.capture.texts.features import FromHuggingFace as FromHuggingFace
    from AutomaticEval.capture.tree.continuations import score_continuations as score_continuations
    from AutomaticEval.evaluation.evaluating import evaluate as evaluate
    from AutomaticEval.evaluation.evaluating import evaluate_with_activations as evaluate_with_activations
    from AutomaticEval.evaluation.for_simple_evaluate import HFActivations as HFActivations
    from AutomaticEval.evaluation.parse_answer import extract_answer as extract_answer
    from AutomaticEval.evaluation.question import answer_benchmark_question as answer_benchmark_question
    from AutomaticEval.evaluation.question import (
        answer_benchmark_question_with_activations as answer_benchmark_question_with_activations,
    )
    from AutomaticEval.models.described.describe_model import describe_model as describe_model
    from AutomaticEval.models.edit import Edit as Edit
    from AutomaticEval.models.editing import editing as editing
    from AutomaticEval.models.loading import load_model as load_model
    from AutomaticEval.models.weights.active_adapters import using_adapter as using_adapter
    from AutomaticEval.pages.inline import run_report as run_report
    from AutomaticEval.pages.inline import show as show
    from AutomaticEval.store.reader import load_activations as load_activations
    from AutomaticEval.store.reader import open_run as open_run

moved.keep_old_names()

__version__ = "0.1.0"

_HOMES = {
    "compare_runs": "analysis.compare_runs",
    "ActivationComparator": "analysis.heads.compare",
    "ActivationExtractor": "analysis.heads.strength",
    "strength_of_run": "analysis.heads.strength",
    "expert_load": "analysis.experts.load",
    "geometry": "analysis.geometry.geometry",
    "lens_of_question": "analysis.lens.one_question",
    "load_tuned_lens": "analysis.lens.tuned_lens",
    "logit_lens": "analysis.lens.by_layer",
    "read_lens_questions": "analysis.lens.question_file",
    "train_tuned_lens": "analysis.lens.train",
    "probe": "analysis.probes.probe",
    "load_probe": "analysis.probes.saved.saved_probe",
    "difference_of_means": "analysis.steering.difference",
    "Direction": "analysis.steering.direction",
    "load_direction": "analysis.steering.direction",
    "generate_inference": "capture.prompt",
    "generate_inference_with_activations": "capture.prompt",
    "evaluate": "evaluation.evaluating",
    "evaluate_with_activations": "evaluation.evaluating",
    "extract_answer": "evaluation.parse_answer",
    "HFActivations": "evaluation.for_simple_evaluate",
    "answer_benchmark_question": "evaluation.question",
    "answer_benchmark_question_with_activations": "evaluation.question",
    "ExtractSingleSample": "capture.texts.features",
    "FromHuggingFace": "capture.texts.features",
    "describe_model": "models.described.describe_model",
    "Edit": "models.edit",
    "editing": "models.editing",
    "load_model": "models.loading",
    "using_adapter": "models.weights.active_adapters",
    "run_report": "pages.inline",
    "show": "pages.inline",
    "load_activations": "store.reader",
    "open_run": "store.reader",
    "recompute": "capture.recompute.recomputed_run",
    "score_continuations": "capture.tree.continuations",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'AutomaticEval' has no attribute {name!r}")
    return getattr(import_module(f"AutomaticEval.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
