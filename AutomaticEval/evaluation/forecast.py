"""How much a captured benchmark run will write, told from its requests before the model runs.

When a benchmark has up to EXACT_DOCS documents, every request is made and encoded, and the forecast is a bound. When it has more, a few
documents of each task are looked at, spread over the task, and the forecast is an estimate: encoding 14,042 questions with five examples
each would take as long as lm-eval's own encoding of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM

from AutomaticEval.capture.answers.think_marks import think_marks
from AutomaticEval.capture.reduced_rows import bytes_per_row, sites_of
from AutomaticEval.capture.tree.prefix_tree import PrefixTree
from AutomaticEval.capture.tree.score import Cut
from AutomaticEval.errors import BenchmarkError, SelectionError
from AutomaticEval.evaluation.benchmark import LoadedTasks, asked_docs, indistinct, requests_of
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.harness.refusals import document, new_tokens, refuse_generating, refuse_pair
from AutomaticEval.evaluation.harness.speedups import quick_templates, stock_model
from AutomaticEval.evaluation.harness.tokens import rolling_windows
from AutomaticEval.evaluation.results.earlier_answers import random_state
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.selection import Selection
from AutomaticEval.store.disk.whole_files import size_text
from AutomaticEval.store.int8 import BLOCK_ROWS
from AutomaticEval.store.writer import shard_bytes_for
from AutomaticEval.thinking.where import Thinking

EXACT_DOCS = 512
"""A benchmark of up to so many documents is looked at whole."""
SAMPLED_DOCS = 16
"""How many documents of each task are looked at in a larger benchmark."""
TIGHT = 1.5
"""A bound is told when it is no more than so many times what is expected. Otherwise the rows that requests share make it useless."""
MARGIN = 1.25
"""When the size is an estimate, so many times as much room is asked for."""
_FILE_BYTES, _DATASET_BYTES = 2**15, 2**10
"""The size of HDF5's own structures: in an empty file, and for each dataset of activations. Measured: 24 KB, and 0.6 to 0.8 KB."""
_SAMPLE_BYTES, _TEXT_BYTES = 256, 48
"""What a sample takes in one file: its columns of numbers and offsets; and, for each text, what is written beside the text. Measured: 410
bytes for a sample with five texts.
"""
_N_TEXTS = 11
"""The number of text columns, JSON included."""


@dataclass(frozen=True)
class Forecast:
    """What a run will write."""

    size_bytes: int
    """The size of all HDF5 files of the run."""

    is_bound: bool
    """Whether it cannot be more."""

    rows_bytes: int
    """The size of the activations alone, as they are gathered, before they are narrowed to int8."""

    text_bytes: int
    """The size of the texts that lm-eval's own files repeat."""

    def __str__(self) -> str:
        return f"{'at most' if self.is_bound else 'about'} {size_text(self.size_bytes)}"

    @property
    def room_bytes(self) -> int:
        """The free space with which a run may begin."""
        return round(self.size_bytes * (1 if self.is_bound else MARGIN)) + self.text_bytes


class _Document(NamedTuple):
    """What the requests of one document will leave in the files."""

    kept: dict[tuple[int, ...], set[int]]
    """Token ids that are fed -> the positions kept of them. Equal inputs share their rows."""

    n_samples: int
    n_positions: int
    """Kept positions of all samples; a position that samples share counts for each of them."""

    n_ids: int
    """Token ids of all samples, prompts and responses, and the log-probabilities of generated tokens, which take as much."""

    text_bytes: int
    """The size of prompts and responses, as JSON."""

    verdict_bytes: int
    """The size of target, prediction and metrics."""

    @property
    def n_rows(self) -> int:
        return sum(map(len, self.kept.values()))


@dataclass
class _Sum:
    """The sums over all documents that are asked."""

    rows: float = 0
    """Rows, when requests share nothing."""

    distinct_rows: float = 0
    """Rows, when those that requests share are counted once."""

    samples: float = 0
    positions: float = 0
    ids: float = 0
    text_bytes: float = 0
    verdict_bytes: float = 0
    most_rows: int = 0
    """The most rows of one document."""

    empty: list[str] = field(default_factory=list)
    """Tasks of which nothing is kept."""


def forecast(
    loaded: LoadedModel, benchmark: Benchmark, loaded_tasks: LoadedTasks, selection: Selection, n_ranks: int = 1
) -> Forecast:
    """What a run is expected to write. n_ranks: the processes that write it.

    Raises BenchmarkError for a request that lm-eval could not ask, SelectionError when nothing is kept of a task.
    """
    row_bytes = bytes_per_row(loaded, selection)
    tasks, drawn = loaded_tasks.tasks, loaded_tasks.drawn
    docs = {name: asked_docs(len(task.eval_docs), benchmark, drawn, name) for name, task in tasks.items()}
    is_exact = sum(map(len, docs.values())) <= EXACT_DOCS
    reader = _Reader(stock_model(loaded, benchmark.of_thinking), loaded, selection, benchmark)
    total = _Sum()
    for name, task in tasks.items():
        _add(total, name, task, docs[name], reader, is_exact=is_exact)
    if selection.is_by_sample:
        total.rows = total.distinct_rows = total.samples
        total.most_rows = 0  # lines are not shared
    if total.empty:
        is_thought = selection.positions.part == "thinking"
        why = "choices are scored, and not thought" if is_thought else "choices of one token are never fed to the model"
        raise SelectionError(
            f"positions={selection.positions} keep nothing of {', '.join(total.empty)}: {why}. "
            "Use scored (the positions that scored them), prompt or all, or leave these tasks out."
        )
    bound, expected = (
        _size(loaded, selection, total, rows * row_bytes, rows, n_ranks) for rows in (total.rows, total.distinct_rows)
    )
    is_bound = is_exact and bound <= TIGHT * expected
    if not is_bound:
        n_shards = expected // shard_bytes_for(round(expected))
        expected += n_shards * total.most_rows * row_bytes  # what is shared is written into each shard
    rows = total.rows if is_bound else total.distinct_rows
    widening = loaded.model.dtype.itemsize if selection.store_dtype == "int8" else 1
    return Forecast(
        round(bound if is_bound else expected),
        is_bound,
        round(rows * row_bytes * widening),
        round(2 * total.text_bytes),
    )


def _size(
    loaded: LoadedModel, selection: Selection, total: _Sum, rows_bytes: float, n_rows: float, n_ranks: int
) -> float:
    """The size of all files with so many rows: of the shards, and of `run.h5`, which has all tables once more."""
    layout = loaded.layout
    n_keys = len(sites_of(layout, selection))
    shard_bytes = shard_bytes_for(round(rows_bytes))
    # Shards of less than an eighth of this size are merged with their neighbours.
    n_files = 16 * rows_bytes // shard_bytes + 1 + n_ranks
    strings = min(len(loaded.tokenizer) + 1, n_rows) * 128
    edits = sum(int(each.nbytes) + _DATASET_BYTES for each in loaded.edit_values().values())
    files = n_files * (_FILE_BYTES + n_keys * _DATASET_BYTES + strings + selection.matrix_bytes + edits)
    in_8_bits = selection.store_dtype == "int8"
    scales = (n_rows / BLOCK_ROWS + n_files) * 4 * bytes_per_row(loaded, selection) if in_8_bits else 0
    table = n_rows * (12 if in_8_bits else 8) + scales + 4 * total.ids + 16 * total.positions
    table += total.samples * (_SAMPLE_BYTES + _N_TEXTS * _TEXT_BYTES) + total.text_bytes
    return rows_bytes + files + 2 * table + total.verdict_bytes


def _add(total: _Sum, name: str, task: Task, asked: Sequence[int], reader: _Reader, *, is_exact: bool) -> None:
    """Add a task to the sums. asked: its documents. is_exact: look at each; otherwise at a few, for all."""
    if not asked:
        return
    docs, step = task.eval_docs, max(1, len(asked) // SAMPLED_DOCS)
    seen = list(asked) if is_exact else list(asked)[step // 2 :: step][:SAMPLED_DOCS]
    task.set_fewshot_seed(reader.benchmark.seed or 0)  # which is set again when the run begins
    with quick_templates():
        documents = [reader.read(name, task, docs[index], index) for index in seen]
    times = len(asked) / len(seen) * (task.config.repeats if task.OUTPUT_TYPE == "generate_until" else 1)
    rows = sum(each.n_rows for each in documents)
    total.rows += times * rows
    total.distinct_rows += _distinct(documents, len(asked)) if reader.shares(task) else times * rows
    total.samples += times * sum(each.n_samples for each in documents)
    total.positions += times * sum(each.n_positions for each in documents)
    total.ids += times * sum(each.n_ids for each in documents)
    total.text_bytes += times * sum(each.text_bytes for each in documents)
    total.verdict_bytes += times * sum(each.verdict_bytes for each in documents)
    total.most_rows = max(total.most_rows, *(each.n_rows for each in documents))
    if not rows:
        total.empty.append(name)


def _distinct(documents: Sequence[_Document], n_asked: int) -> float:
    """The rows of all documents over their prefix tree. Each document adds what it does not share with those before it."""
    first = _n_distinct(documents[0].kept)
    whole = _n_distinct(dict(chain.from_iterable(each.kept.items() for each in documents)))
    return first + max(0, whole - first) / max(1, len(documents) - 1) * (n_asked - 1)


def _n_distinct(kept: Mapping[tuple[int, ...], set[int]]) -> int:
    """The rows that sequences give over their prefix tree. kept: sequence -> its positions that are kept."""
    positions = list(kept.values())
    return int(PrefixTree(list(kept)).marked(lambda index: sorted(positions[index])).sum())


class _Reader:
    """Makes and encodes the requests of a document as lm-eval will make and encode them."""

    def __init__(self, lm: HFLM, loaded: LoadedModel, selection: Selection, benchmark: Benchmark) -> None:
        self._lm, self._model, self._selection, self.benchmark = lm, loaded.model, selection, benchmark
        self._longest_token = max(map(len, map(str, loaded.tokenizer.get_vocab())), default=1)
        marks = think_marks(loaded.tokenizer, selection.think_tokens)
        self._n_texts = 2 if marks.opens.ids or selection.think_tokens else 1  # the response, and its two parts again
        self._state_bytes = len(random_state(torch.device(loaded.model.device)))

    def shares(self, task: Task) -> bool:
        """Whether what requests begin with together is stored once."""
        return self.benchmark.scoring == "tree" and task.OUTPUT_TYPE != "generate_until"

    def read(self, name: str, task: Task, doc: Any, doc_id: int) -> _Document:
        """What one document will leave. Raises BenchmarkError for requests that cannot be told apart, or not be asked."""
        requests = requests_of(self._lm, task, doc, self.benchmark)
        if len({request.idx for request in requests}) < len(requests):
            raise BenchmarkError(indistinct(name))
        kept: dict[tuple[int, ...], set[int]] = {}
        n_samples = n_positions = n_ids = texts = answers = 0
        for request in requests:
            is_generated = request.request_type == "generate_until"
            for fed, n_prompt, n_response, text in self._samples(request, document(name, doc_id)):
                positions = self._positions(n_prompt, n_response, is_generated=is_generated)
                kept.setdefault(fed, set()).update(positions)  # one row serves equal inputs
                n_samples, n_positions = n_samples + 1, n_positions + len(positions)
                n_logprobs = n_response if is_generated else 0
                n_ids, texts = n_ids + n_prompt + n_response + n_logprobs, texts + text
            if is_generated:
                answers += self._answer_bytes(request)
        verdict = n_samples * self._verdict_bytes(task, doc, len(requests), answers)
        return _Document(kept, n_samples, n_positions, n_ids, texts, verdict)

    def _positions(self, n_prompt: int, n_response: int, *, is_generated: bool) -> range:
        """The positions that are kept of a sample; of a generated answer as many as may be."""
        chosen = self._selection.positions
        if is_generated:
            return chosen.most(n_prompt, n_response)
        return chosen.resolve(n_prompt, n_response, Thinking.without(n_prompt))

    def _samples(self, request: Instance, where: str) -> Iterator[tuple[tuple[int, ...], int, int, int]]:
        """For each sample of a request: (fed token ids, prompt tokens, response tokens, bytes of its texts).

        Of a generation only the prompt's token ids are known, and the response is as long as it may become.
        """
        lm = self._lm
        if request.request_type == "generate_until":
            refuse_generating(self._model, self._selection, where, request.args[1], lm.max_length, lm.max_gen_toks)
            n_new = new_tokens(request.args[1], lm.max_gen_toks)
            prompt = lm.tok_encode(request.args[0])[-(lm.max_length - n_new) :]
            sampled = self._state_bytes if request.args[1].get("do_sample") else 0
            text = _json_bytes(request.args[0]) + self._n_texts * self._answer_bytes(request) + sampled
            yield tuple(prompt), len(prompt), n_new, text
        elif request.request_type == "loglikelihood_rolling":
            for context, continuation in rolling_windows(lm, request.args[0]):
                text = sum(
                    _json_bytes(lm.tok_decode(ids, skip_special_tokens=False)) for ids in (context, continuation)
                )
                yield (*context, *continuation[:-1]), len(context), len(continuation), text
        else:
            # Without a context lm-eval feeds one token in its place; "?" stands for it here.
            context, continuation = lm._encode_pair(request.args[0] or "?", request.args[1])
            refuse_pair(where, context, continuation, request.args, lm.max_length)
            cut = Cut.of(context, continuation, lm.max_length)
            yield tuple(cut.fed), len(cut.context), len(continuation), sum(map(_json_bytes, request.args))

    def _answer_bytes(self, request: Instance) -> int:
        """The most bytes that the text of a generated answer can take as JSON: each of its tokens is the longest there is."""
        return 6 * self._longest_token * new_tokens(request.args[1], self._lm.max_gen_toks)

    def _verdict_bytes(self, task: Task, doc: Any, n_requests: int, answer: int) -> int:
        """Bytes of target, prediction and metrics of one sample. Metrics may hold what they were computed of."""
        target = _json_bytes(task.doc_to_target(doc))
        n_filters, n_metrics = len(task._filters), len(task.aggregation())
        return target + answer + n_filters * n_metrics * (128 + 32 * n_requests + target + answer)


def _json_bytes(value: Any) -> int:
    """The bytes of a value as JSON. No text takes more in a file, whether it is written as it is or as JSON."""
    return len(json.dumps(value, default=str))
