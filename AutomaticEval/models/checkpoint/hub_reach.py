"""Whether the hub can be reached. Asked once a process, because its client repeats each request for a minute or more."""

from __future__ import annotations

import os
import sys
from functools import cache
from threading import Thread

from AutomaticEval.errors import warn

PATIENCE = 5.0
"""Seconds in which the hub must give any answer. Looking up its name alone may take longer without a network."""


@cache
def go_offline_without_hub() -> None:
    """Have the hub's client use the local cache alone when the hub does not answer, and warn of it. Call it before files are asked for."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        return
    os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported or started later
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    warn(
        f"the hub ({constants.ENDPOINT}) cannot be reached: what is in the local cache is used, and this process does not ask again."
    )


def _answers(endpoint: str) -> bool:
    """Whether an address gives any answer, also a refusal, through the client's own proxies."""
    from huggingface_hub import get_session

    answered: list[bool] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=PATIENCE)
            answered.append(True)
        except Exception:  # whatever kind the client has for it
            answered.append(False)

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answered) and answered[0]
