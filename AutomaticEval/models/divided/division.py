"""Models whose weights are divided among processes (tensor parallel): each process has a part, and all run every forward together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from AutomaticEval.errors import CaptureError, UnsupportedModel
from AutomaticEval.models.architecture.inner_model import inner
from AutomaticEval.models.described.given_config import text_config
from AutomaticEval.processes import Ranks, join_ranks

T = TypeVar("T")


def n_processes(model: Any) -> int:
    """Among how many processes the weights of a model are divided; 1 for a model that this process has whole."""
    weights = (weight for weight in inner(model).parameters() if hasattr(weight, "full_tensor"))
    return next((int(weight.device_mesh.size()) for weight in weights), 1)


def ranks_of(model: Any) -> Ranks:
    """The processes that have a part of a model; of a model that is not divided, this process alone."""
    return join_ranks() if n_processes(model) > 1 else Ranks()


def by_first(model: Any, write: Callable[[], T]) -> T:
    """What `write` returns, which the first of a model's processes alone calls. The others wait for it."""
    ranks = ranks_of(model)
    return ranks.from_first(write() if ranks.is_first else None)


def check_alike(model: Any, mine: Any, what: str) -> None:
    """Raises CaptureError when the processes of a divided model have not computed the same. mine: what this one has, to be compared."""
    if any(each != mine for each in ranks_of(model).gathered(mine)):
        raise CaptureError(
            f"the processes among which {type(model).__name__} is divided have {what} that differ, so that it is not known which is right. They must "
            "be asked the same, on devices of one kind."
        )


def refuse_uneven(model: Any) -> None:
    """Raises UnsupportedModel for a model whose heads its processes do not divide evenly, so that no forward runs."""
    n = n_processes(model)
    if n == 1:
        return
    config = text_config(inner(model))
    for name in ("num_attention_heads", "num_key_value_heads"):
        n_heads = getattr(config, name, None)
        if isinstance(n_heads, int) and n_heads % n:
            raise UnsupportedModel(
                f"{type(model).__name__} has {name}={n_heads}, which {n} processes do not divide evenly; start as many as divide it."
            )


def refuse_divided(model: Any, what: str) -> None:
    """Raises UnsupportedModel for a model that is divided among processes. what: is not done with such a model."""
    n = n_processes(model)
    if n > 1:
        raise UnsupportedModel(
            f"{type(model).__name__} is divided among {n} processes (tensor parallel). Prompts are answered and captured so, and continuations "
            f"scored; {what} is not done. Spread the model over the GPUs of one process with device_map='auto'."
        )
