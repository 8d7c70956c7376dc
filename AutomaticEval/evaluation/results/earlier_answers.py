"""The answers that a run has on the disk already, so that a resumed run does not compute them again."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from AutomaticEval.errors import OtherSettings
from AutomaticEval.evaluation.results.request_key import RequestKey, key_of


@dataclass(frozen=True)
class EarlierAnswer:
    """The answer to one request, which is on the disk."""

    answer: Any
    """(log-likelihood, is greedy), or the generated text."""

    text_hash: int
    """Hash of the prompt and, when a continuation was scored, of the continuation."""

    random_state: str | None = None
    """torch's random state after the batch in which the answer was sampled."""

    tokens: int | None = None
    """The tokens of a forward over the prefix tree that scored it; None when it was scored, or generated, in another way."""

    def check(self, prompt: str, response: str | None) -> None:
        """Raises OtherSettings when the request has another text now. response: None when it is generated."""
        if hash_of(prompt, response) != self.text_hash:
            raise OtherSettings(
                f"the run cannot be resumed: a request asks another text than it did ({prompt[-60:]!r} …). The task, its data "
                "or the tokenizer changed."
            )


def earlier_answers(records: Sequence[Mapping[str, Any]]) -> dict[RequestKey, EarlierAnswer]:
    """The answers in a run's records, by request."""
    answers = {}
    for record in records:
        is_scored = record.get("is_greedy") is not None
        answer = (logprob_of(record), record["is_greedy"]) if is_scored else scored_text(record)
        text_hash = hash_of(record["prompt"], record["response"] if is_scored else None)
        tokens = record["batch_columns"] if record.get("scoring") == "tree" else None
        answers[key_of(record)] = EarlierAnswer(answer, text_hash, record.get("random_state") or None, tokens)
    return answers


def scored_text(record: Mapping[str, Any]) -> str:
    """The text of a record's response that lm-eval scores: all of it, unless it cut the thinking off."""
    cut = record.get("scored_text")
    return str(record["response"] if cut is None else cut)


def logprob_of(record: Mapping[str, Any]) -> float:
    """The log-likelihood of a record in nats; files write NaN as null."""
    logprob = record["logprob"]
    return float("nan") if logprob is None else float(logprob)


def hash_of(prompt: str, response: str | None) -> int:
    """A hash of a request's texts."""
    return zlib.crc32(json.dumps([prompt, response]).encode())


def random_state(device: torch.device) -> str:
    """torch's random state on the CPU and, for a GPU, on that GPU; as text."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return json.dumps([base64.b64encode(zlib.compress(state.numpy().tobytes())).decode() for state in states])


def set_random_state(text: str) -> None:
    """Set the random state that `random_state` gave."""
    states = [
        torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(each))), dtype=torch.uint8)
        for each in json.loads(text)
    ]
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
