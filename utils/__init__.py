"""A door for people who work in a clone: `from utils import …` gives the drop-in functions."""

from AutomaticEval import (
    answer_benchmark_question,
    answer_benchmark_question_with_activations,
    evaluate_with_activations,
    generate_inference,
    generate_inference_with_activations,
    load_activations,
    open_run,
    score_continuations,
)

__all__ = [
    "answer_benchmark_question",
    "answer_benchmark_question_with_activations",
    "evaluate_with_activations",
    "generate_inference",
    "generate_inference_with_activations",
    "load_activations",
    "open_run",
    "score_continuations",
]
