"""`RequestKeys`: gives each request of lm-eval the key that its sample has in the run's files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from lm_eval.api.instance import Instance

from AutomaticEval.errors import BenchmarkError
from AutomaticEval.evaluation.benchmark import indistinct
from AutomaticEval.evaluation.results.request_key import RequestKey


class RequestKeys:
    """Gives keys to requests.

    doc_ids: task -> the documents' own indices, for tasks of which only some documents are asked. is_captured: each key is given once,
    because a run holds one sample a request.
    """

    def __init__(self, doc_ids: Mapping[str, Sequence[int]], *, is_captured: bool) -> None:
        self._doc_ids, self._is_captured = doc_ids, is_captured
        self._given: set[RequestKey] = set()

    def of(self, requests: Sequence[Instance]) -> list[tuple[RequestKey, Instance]]:
        """Each request with its key. Raises BenchmarkError for a task whose requests cannot be told apart."""
        n_seen: Counter[int] = Counter()
        keyed = []
        for request in requests:  # lm-eval repeats a request by listing the same object again
            own = self._doc_ids.get(request.task_name)
            doc_id = request.doc_id if own is None else own[request.doc_id]  # lm-eval counts within the drawn documents
            keyed.append((RequestKey(request.task_name, doc_id, request.idx, n_seen[id(request)]), request))
            n_seen[id(request)] += 1
        if self._is_captured:
            for key, _ in keyed:
                self._give_once(key)
        return keyed

    def _give_once(self, key: RequestKey) -> None:
        if key in self._given:
            raise BenchmarkError(f"{indistinct(key.task)} (Or it was asked before: one instance makes one run.)")
        self._given.add(key)
