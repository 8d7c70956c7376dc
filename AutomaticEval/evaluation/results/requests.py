"""What of a run is on the disk already: its answers by request, so that they are not computed again."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from AutomaticEval.errors import OtherSettings


class RequestKey(NamedTuple):
    """Which request: every sample has its own. window: of a text that is scored in several, which."""

    task: str
    doc_id: int
    choice: int
    repeat: int
    window: int = 0


@dataclass(frozen=True)
class Answered:
    """One request that was answered."""

    answer: Any
    """(log-likelihood, is greedy), or the text."""

    text: int
    """Hash of the prompt and, of a scored continuation, of its text."""

    random_state: str | None = None
    """torch's random state after the batch in which the answer was sampled."""

    def check(self, prompt: str, response: str | None) -> None:
        """Raises OtherSettings when the request asks something else now."""
        if hash_of(prompt, response) != self.text:
            raise OtherSettings(
                f"the run cannot be resumed: a request asks another text than it did ({prompt[-60:]!r} …). The task, its data "
                "or the tokenizer changed."
            )


def answered_in(records: Sequence[Mapping[str, Any]]) -> dict[RequestKey, Answered]:
    """The answers among a run's records."""
    found = {}
    for record in records:
        key = key_of(record)
        scored = record.get("is_greedy") is not None
        answer = (logprob_of(record), record["is_greedy"]) if scored else record["response"]
        text = hash_of(record["prompt"], record["response"] if scored else None)
        found[key] = Answered(answer, text, record.get("random_state") or None)
    return found


def key_of(record: Mapping[str, Any]) -> RequestKey:
    return RequestKey(*(record[name] for name in RequestKey._fields))


def logprob_of(record: Mapping[str, Any]) -> float:
    logprob = record["logprob"]
    return float("nan") if logprob is None else float(logprob)  # none is written as nan


def hash_of(prompt: str, response: str | None) -> int:
    return zlib.crc32(json.dumps([prompt, response]).encode())


def random_state(device: torch.device) -> str:
    """torch's random state here, as text."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return json.dumps([base64.b64encode(zlib.compress(state.numpy().tobytes())).decode() for state in states])


def set_random_state(text: str) -> None:
    states = [
        torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(each))), dtype=torch.uint8)
        for each in json.loads(text)
    ]
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
