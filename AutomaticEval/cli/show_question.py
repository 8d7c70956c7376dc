"""`main.py show RUN --task T --doc N`: one question of a run, its choices, and what the layers hold at its last token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from AutomaticEval.cli.printing import print_table, say
from AutomaticEval.errors import StoreError, did_you_mean

if TYPE_CHECKING:
    from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
    from AutomaticEval.store.questions.question import Question
    from AutomaticEval.store.questions.questions import Questions
    from AutomaticEval.store.run import Run


def show_question(run: Run, task: str | None, doc_id: int, *, has_lens: bool) -> None:
    """Print a question. task: None for a run of one task. has_lens: load the model, for the ranks of the right answer by layer.

    Raises StoreError for a question that the run does not have, and what loading the model raises.
    """
    asked = _asked(run, task, doc_id)
    samples = run.where(task=asked[0].task, doc_id=doc_id)
    _print_text(asked[0])
    for question in asked:
        _print_verdict(question)
    _print_layers(asked[:1], samples, _model_of(run) if has_lens and asked[0].choices else None)
    if has_lens and not asked[0].choices:
        say("No ranks: the question was answered with a text, and the lens ranks the first token of a right choice.")


def _asked(run: Run, task: str | None, doc_id: int) -> Questions:
    """The question: one row, or several when several answers were sampled."""
    tasks = sorted(set(run.column("task"))) if "task" in run.contents.columns.names else []
    if task is None and len(tasks) == 1:
        task = tasks[0]
    if task is None and tasks:
        raise StoreError(f"{run.path} has several tasks; say which with --task: {', '.join(tasks)}.")
    if task not in tasks:
        has = f"It has {', '.join(tasks)}." if tasks else "It has no tasks; --sample N shows a sample."
        raise StoreError(f"{run.path} has no task {task!r}.{did_you_mean(str(task), tasks)} {has} --task names one.")
    asked = run.questions().where(task=task, doc_id=doc_id)
    if not len(asked):
        docs = sorted({doc for name, doc in zip(run.column("task"), run.column("doc_id"), strict=True) if name == task})
        some = ", ".join(map(str, docs[:10])) + (f" and {len(docs) - 10} more" if len(docs) > 10 else "")
        raise StoreError(f"{run.path} has no document {doc_id} of {task}; it has {some}.")
    return asked


def _print_text(question: Question) -> None:
    say(f"{question.task}, document {question.doc_id}")
    say(question.question)
    tokens = [f"{position}:{token!r}" for position, token in question.tokens.items()]
    say(f"Its tokens that have rows: {' '.join(tokens) or 'none'}")


def _print_verdict(question: Question) -> None:
    if question.choices:
        rows = zip(question.choices, question.logprobs, question.probabilities, strict=True)
        told = (("right", question.target), ("predicted", question.prediction))
        lines = [
            (
                str(number),
                text,
                ", ".join(name for name, which in told if which == number),
                f"{logprob:.4f}",
                f"{probability:.4f}",
            )
            for number, (text, logprob, probability) in enumerate(rows)
        ]
        print_table("", ("Choice", "Text", "", "Log-probability", "Probability"), lines, n_words=3)
        if question.margin is not None:
            say(f"Margin: {question.margin:.4f} nats")
    else:
        say(f"Response: {question.response}")
        if question.thinking is not None:
            say(f"Answer, after thinking: {question.answer}")
        say(f"Target: {question.target}")
        if question.mean_logprob is not None:
            n_tokens = len(question.token_logprobs or ())
            say(f"Mean log-probability of the answer's {n_tokens} tokens: {question.mean_logprob:.4f} nats")
    say(f"Correct: {question.correct}")


def _print_layers(asked: Questions, samples: Run, loaded: LoadedModel | None) -> None:
    try:
        rows = {key: asked.activations(key) for key in samples.keys}
    except StoreError as absent:
        say(f"No rows of the question's last token: {absent}")
        return
    lines = [[key, f"{row.double().norm():.4g}"] for key, row in rows.items()]
    columns = ["Site", "Norm"]
    token = _token_of_the_answer(asked[0], samples)
    if loaded is not None and token is not None:
        columns.append(f"Rank of {loaded.tokenizer.decode([token])!r}")
        ranks = _ranks(loaded, rows, token)
        lines = [[*line, ranks.get(line[0], "")] for line in lines]
    say("At the question's last token:")
    print_table("", columns, lines)
    if loaded is None and token is not None:
        say("Ranks of the right answer by layer: add --lens, which loads the model.")


def _token_of_the_answer(question: Question, samples: Run) -> int | None:
    """The first token of the right choice; None for a generated answer, whose tokens are not known."""
    if not question.choices or not isinstance(question.target, int):
        return None
    right = samples.where(choice=question.target)
    return int(right[0]["generated_ids"][0]) if len(right) else None


def _ranks(loaded: LoadedModel, rows: dict[str, Any], token: int) -> dict[str, str]:
    """Residual site -> the rank of a token that the logit lens gives there."""
    from AutomaticEval.analysis.lens.logit_lens import LogitLens
    from AutomaticEval.sites import site_of

    lens = LogitLens(loaded)
    kinds, width = ("embed", "resid_pre", "resid_mid", "resid_post"), loaded.layout.d_model
    residual = [key for key, row in rows.items() if site_of(key).kind in kinds and row.shape[1] == width]
    return {key: str(lens.ranks(rows[key], token)[0]) for key in residual}


def _model_of(run: Run) -> LoadedModel:
    from AutomaticEval.capture.recompute.recomputed_run import model_of
    from AutomaticEval.cli.options import quiet_libraries

    quiet_libraries()
    return model_of(run)
