"""Asks a model one question, takes the answer out of its response, and keeps what happened inside.

This is for evaluation loops that people already have. Benchmarks through lm-eval are in `run.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack, overload

from AutomaticEval.capture.prompt import AskOptions, CheckedPrompt, PromptResponse, ask, check_prompt
from AutomaticEval.errors import PromptError
from AutomaticEval.evaluation.parse_answer import LETTERS, extract_answer
from AutomaticEval.models.divided.division import by_first
from AutomaticEval.models.loading import adapter_chosen, load_model
from AutomaticEval.samples import Sample
from AutomaticEval.sites import LayersLike
from AutomaticEval.store.disk.file_names import file_stem
from AutomaticEval.store.disk.whole_files import prepare_folder
from AutomaticEval.store.hdf5.write import write_named

TEMPLATE = (
    "Question: {question}\n"
    "{choices}"
    'Reason step by step, then finish with one line of the form "FINAL ANSWER: {form}".\n'
    "Answer:"
)
"""The prompt of a question. A template of your own must contain {question}; {choices} stands for the lettered lines."""


def write_question(question: str, choices: Sequence[str] | None = None, template: str = TEMPLATE) -> str:
    """The prompt for a question, with its choices as lettered lines. Raises PromptError, EmptyPrompt."""
    check_prompt(question)
    if isinstance(choices, str | Mapping):
        raise PromptError(f"choices are a list of texts; found {type(choices).__name__}.")
    if choices is not None and not 2 <= len(choices) <= len(LETTERS):
        raise PromptError(f"{len(choices)} choices; give 2 to {len(LETTERS)}, or none for an open question.")
    if "{question}" not in template:
        raise PromptError("the template has no {question} in it; the question would not be asked.")
    lettered = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices or (), strict=False))
    try:
        return template.format(question=question, choices=lettered, form="<letter>" if choices else "<answer>")
    except (KeyError, IndexError, ValueError) as failure:
        raise PromptError(
            f"the template cannot be filled ({failure}); it may hold {{question}}, {{choices}} and {{form}}, and other "
            "braces doubled."
        ) from failure


def answer_benchmark_question_with_activations(
    question: str,
    model: Any,
    save_activations: bool = True,
    activation_save_dir: str | Path = "activations",
    *,
    choices: Sequence[Any] | None = None,
    template: str = TEMPLATE,
    layers_to_capture: LayersLike = None,
    **options: Unpack[AskOptions],
) -> tuple[str, str | None, dict[str, Any]]:
    """A model's answer to a question, and the activations of the pass that produced it.

    save_activations: write `benchmark_activations_<time>_<question>.h5` into activation_save_dir.
    choices: written as lettered lines; the answer is then a letter. template: the prompt, see TEMPLATE.
    options: see `capture.prompt.AskOptions`.
    Returns (full_response, extracted_answer, activation_data); the answer is None when the response gives none.
    activation_data is that of `generate_inference_with_activations`, with `question`, `choices` and
    `extracted_answer`. Raises SelectionError, PromptError, ModelError, StoreError, CaptureError.
    """
    if not isinstance(save_activations, bool):
        raise PromptError(
            f"save_activations is True or False; found {save_activations!r}. Folder and choices: "
            "activation_save_dir=, choices=."
        )
    choices = _texts(choices)
    folder = Path(activation_save_dir).expanduser() if save_activations else None
    request = CheckedPrompt.parse(write_question(question, choices, template), model, layers_to_capture, options)
    if folder is not None:
        prepare_folder(folder)
    with adapter_chosen(model, request.load) as load:
        loaded = load_model(model, tokenizer=request.tokenizer, options=load)
        asked = ask(loaded, request, capture=True, folder=folder)
    answer = _extracted(asked, choices)
    asked = _with_question(asked, question, choices, answer)
    assert asked.sample is not None
    file = None
    if folder is not None:
        named = folder / f"{file_stem('benchmark_activations', question)}.h5"
        how: dict[str, Any] = {"matrices": asked.matrices, "strict": request.strict}
        file = by_first(loaded.model, partial(write_named, named, asked.sample, asked.model, asked.settings, **how))
    return asked.text, answer, asked.activation_data(file)


@overload
def answer_benchmark_question(
    question: str,
    model: Any,
    *,
    capture_activations: Literal[False] = False,
    choices: Sequence[Any] | None = None,
    template: str = TEMPLATE,
    **options: Unpack[AskOptions],
) -> tuple[str, str | None]: ...
@overload
def answer_benchmark_question(
    question: str,
    model: Any,
    *,
    capture_activations: Literal[True],
    save_activations: bool = True,
    activation_save_dir: str | Path = "activations",
    choices: Sequence[Any] | None = None,
    template: str = TEMPLATE,
    layers_to_capture: LayersLike = None,
    **options: Unpack[AskOptions],
) -> tuple[str, str | None, dict[str, Any]]: ...
def answer_benchmark_question(
    question: str,
    model: Any,
    *,
    capture_activations: bool = False,
    save_activations: bool = True,
    activation_save_dir: str | Path = "activations",
    choices: Sequence[Any] | None = None,
    template: str = TEMPLATE,
    layers_to_capture: LayersLike = None,
    **options: Unpack[AskOptions],
) -> tuple[str, str | None] | tuple[str, str | None, dict[str, Any]]:
    """(full_response, extracted_answer); with capture_activations, what `answer_benchmark_question_with_activations` returns.

    The text is the same with and without capture. Raises SelectionError, PromptError, ModelError, StoreError, CaptureError.
    """
    if capture_activations:
        return answer_benchmark_question_with_activations(
            question,
            model,
            save_activations,
            activation_save_dir,
            choices=choices,
            template=template,
            layers_to_capture=layers_to_capture,
            **options,
        )
    choices = _texts(choices)
    request = CheckedPrompt.parse(write_question(question, choices, template), model, layers_to_capture, options)
    with adapter_chosen(model, request.load) as load:
        asked = ask(load_model(model, tokenizer=request.tokenizer, options=load), request, capture=False)
    return asked.text, _extracted(asked, choices)


def _extracted(asked: PromptResponse, choices: Sequence[str] | None) -> str | None:
    """The answer that a response gives after its thinking; None when it gives none."""
    return None if asked.answer is None else extract_answer(asked.answer, choices)


def _texts(choices: Sequence[Any] | None) -> Sequence[str] | None:
    """The choices as texts: people give numbers and arrays, too."""
    if choices is None or isinstance(choices, str | Mapping):
        return choices  # write_question refuses what is no list
    return [str(choice) for choice in choices]


def _with_question(
    asked: PromptResponse, question: str, choices: Sequence[str] | None, answer: str | None
) -> PromptResponse:
    sample = asked.sample
    assert sample is not None
    added = {"question": question, "extracted_answer": answer, "choices": None if choices is None else list(choices)}
    kept = Sample({**sample.fields, **added}, sample.input_ids, sample.generated_ids, sample.parts)
    return replace(asked, sample=kept)
