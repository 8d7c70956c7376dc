"""Refuses what a task, a model and a selection make impossible, before the model runs, and names the task and the document.

Without these refusals an assertion of lm-eval would fail later, or a forward would turn out not to be the one that its request asks.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs

from AutomaticEval.capture.generation import refuse_uncomputed_logits
from AutomaticEval.errors import BenchmarkError, SelectionError
from AutomaticEval.models.refused.cache_settings import why_not
from AutomaticEval.selection import Selection

ONE_SEQUENCE: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "prompt_lookup_num_tokens": None,
    "guidance_scale": 1,
}
"""Option of generation -> the value that it must have if it is given, so that each row of a forward is one prompt's next token."""
ANY_PROMPT = 2**20
"""Stands for the length of any prompt, because the rules here hold for every length."""


def document(task: str, doc_id: int) -> str:
    """The words that name a document of a task in messages."""
    return f"the task {task!r}, document {doc_id},"


def new_tokens(gen_kwargs: Mapping[str, Any], default: int) -> int:
    """How many tokens lm-eval lets a model generate. default: the number where gen_kwargs give none."""
    return int(normalize_gen_kwargs(dict(gen_kwargs), default)["max_gen_toks"])


def refuse_generating(
    model: Any, selection: Selection | None, where: str, gen_kwargs: Mapping[str, Any], max_length: int, default: int
) -> None:
    """Raises BenchmarkError or SelectionError for answers that cannot be generated, or not captured.

    selection: None captures nothing. where: the task, and the document where it is known. max_length: the model's context.
    default: the new tokens where gen_kwargs name none.
    """
    n_new = new_tokens(gen_kwargs, default)
    if n_new >= max_length:
        raise BenchmarkError(
            f"{where} asks for up to {n_new} new tokens, and the model's context is {max_length}, which has to hold a prompt, too; add "
            f"--gen_kwargs max_gen_toks={max(1, max_length // 2)}, or a smaller number."
        )
    cache = why_not(model, gen_kwargs)
    if cache is not None:
        raise BenchmarkError(
            f"{where} generates its answers: {cache}, or set it to None in the model's generation_config."
        )
    if selection is None:
        return
    for name, wanted in ONE_SEQUENCE.items():
        value = gen_kwargs.get(name, getattr(model.generation_config, name, None))
        if value not in (None, wanted):
            raise BenchmarkError(
                f"{where} generates with {name}={value}, whose forwards are not one sequence's, and cannot be captured; set "
                f"{name}={wanted}, or run it without --capture_activations."
            )
    try:
        refuse_uncomputed_logits(model, selection, ANY_PROMPT, n_new)
    except SelectionError as why:
        raise SelectionError(f"{where} generates its answers: {why}") from None


def refuse_tasks(model: Any, selection: Selection | None, tasks: Mapping[str, Task], lm: Any) -> None:
    """Raises what `refuse_generating` raises, for every task that generates. lm: lm-eval's model, for its limits."""
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            how = task.config.generation_kwargs or {}
            refuse_generating(model, selection, f"the task {name!r}", how, lm.max_length, lm.max_gen_toks)


def refuse_thinking(options: Mapping[str, Any], tokenizer: Any, tasks: Mapping[str, Task]) -> None:
    """Raises BenchmarkError where lm-eval would not cut the thinking off, or not score at all.

    options: think_end_token and enable_thinking, as far as they are given. tasks: those that are asked; none when they are not known yet.
    """
    end = options.get("think_end_token")
    if isinstance(end, str) and not end.isdigit():
        token = tokenizer.convert_tokens_to_ids(end)
        is_token = isinstance(token, int) and tokenizer.convert_ids_to_tokens(token) == end
        if is_token and not tokenizer.decode([token], skip_special_tokens=True):
            raise BenchmarkError(
                f"--think_end_token {end} is a special token of this tokenizer, which lm-eval drops from the text before it looks for it, so that it "
                f"would score the thinking, too; give the token's id: --think_end_token {token}."
            )
    scored = [name for name, task in tasks.items() if task.OUTPUT_TYPE != "generate_until"]
    if options.get("enable_thinking") and scored:
        raise BenchmarkError(
            f"--enable_thinking true is for generated answers, and {', '.join(scored[:3])} {'score' if len(scored) > 1 else 'scores'} choices or texts; "
            "leave one out."
        )


def refuse_pair(
    where: str, context: Sequence[int], continuation: Sequence[int], texts: Sequence[str], max_length: int
) -> None:
    """Raises BenchmarkError for a continuation that lm-eval could not score: it has no tokens, follows none, or is too long.

    where: the task and the document. context, continuation: token ids. texts: of both. max_length: the model's context.
    """
    prompt, response = texts
    said = f"{where} asks to score {response[:60]!r} after {prompt[-60:]!r}"
    if not len(continuation):
        raise BenchmarkError(
            f"{said}, of which no token is left to be scored; mend the task, or leave the document out."
        )
    if not len(context):
        raise BenchmarkError(
            f"{said}, which has no token to be scored after; mend the task, or leave the document out."
        )
    if len(continuation) > max_length:
        raise BenchmarkError(
            f"{said}: {len(continuation)} tokens, and the model's context is {max_length}; leave the document out, or choose a model with "
            "a longer context."
        )


def refuse_unknown_metric(name: str, task: Task) -> None:
    """Raises BenchmarkError for a metric or an aggregation that lm-eval does not know. It would fail when all answers are there."""
    metrics = getattr(task, "_metric_fn_list", {})
    unknown = [each for each, scores in metrics.items() if scores is None] if not task.config.process_results else []
    if unknown:
        raise BenchmarkError(
            f"the task {name!r} is scored by {', '.join(map(repr, unknown))}, which is no metric that lm-eval or the evaluate library has "
            "here; mend its metric_list."
        )
    for each, aggregation in getattr(task, "_aggregation_list", {}).items():
        if aggregation is None:
            raise BenchmarkError(
                f"the task {name!r} has no aggregation for its metric {each!r} that lm-eval knows; name one."
            )


def refused_by(failure: BaseException) -> str | None:
    """The name of the task that lm-eval was making when it failed, with its metric; None when it was not making a task."""
    for frame, _ in reversed(list(traceback.walk_tb(failure.__traceback__))):
        task = frame.f_locals.get("self")
        if isinstance(task, Task) and getattr(task, "_config", None) is not None:
            metric = frame.f_locals.get("metric_name")
            return f"the task {task.config.task!r}" + (f" with the metric {metric!r}" if metric else "")
    return None
