"""Failures of reading a model from the hub or a folder, as one line each that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from AutomaticEval.errors import ModelUnavailable, first_line


def read_or_explain(name: str, read: Callable[[], Any], *, of_adapter: bool = False) -> Any:
    """What `read` returns, which reads files of the model, or the adapter, `name`. Raises ModelUnavailable when it fails."""
    try:
        return read()
    except (OSError, ValueError, ImportError) as failure:
        raise ModelUnavailable(_explained(name, failure, of_adapter=of_adapter)) from failure


def _explained(name: str, failure: BaseException, *, of_adapter: bool) -> str:
    """What failed and what to do, in one line. The causes of a failure tell more than the failure itself."""
    causes = _with_causes(failure)
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    text = " ".join(str(cause) for cause in causes)
    if "GatedRepoError" in kinds or "gated repo" in text:
        return (
            f"the model {name!r} is gated: accept its licence on its page on the hub, log in with `hf auth login`, "
            "and run again."
        )
    if "trust_remote_code" in text:
        return f"{name!r} comes with code of its own, which runs only when it is trusted: give --trust_remote_code (in code trust_remote_code=True)."
    if "ImportError" in kinds:
        return f"the model {name!r} needs a library that is not here: {_on_one_line(failure)}"
    if "tp_plan" in text:
        return f"the model {name!r} cannot be divided among processes: {first_line(failure)}"
    if "attn_implementation" in text:
        return f"the model {name!r} cannot be loaded with this kernel of attention: {first_line(failure)}"
    if Path(name).is_dir():
        return f"the folder {name!r} holds no model that transformers can load: {first_line(failure)}"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        needed = "adapter_config.json" if of_adapter else "config.json"
        return f"no folder {name!r}; give a folder with {needed} and weights, or a hub name{'' if of_adapter else ' such as gpt2'}."
    if kinds & {"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"}:
        return f"the hub has no model {name!r} (or it is private: `hf auth login`); check the name and revision."
    if (
        kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError"}
        or "couldn't connect" in text
    ):
        return (
            f"the model {name!r} is not in the local cache and the hub cannot be reached; connect once to download it, "
            "or give a local folder. The bundled model is called demo."
        )
    return f"the model {name!r} cannot be loaded: {first_line(failure)}"


def _on_one_line(failure: BaseException) -> str:
    """A message whose first line may be empty, as that of a library that transformers misses."""
    return " ".join(str(failure).split())


def _with_causes(failure: BaseException) -> list[BaseException]:
    """A failure and the failures that led to it, the latest first."""
    causes: list[BaseException] = []
    cause: BaseException | None = failure
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return causes
