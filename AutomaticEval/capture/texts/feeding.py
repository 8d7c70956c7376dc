"""How texts are fed to a model: the options of extracting. Imports no heavy library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from AutomaticEval.errors import PromptError
from AutomaticEval.options import Option


@dataclass(frozen=True)
class Feeding:
    """How texts are fed."""

    seq_length: Annotated[
        int | None, Option("The most tokens of a text; a longer one is cut. Default: the model's context.", minimum=1)
    ] = None
    packing: Annotated[
        bool,
        Option(
            "Cut nothing: a long text goes on in the next piece, and short pieces share a row, unseen by one another."
        ),
    ] = False
    strict: Annotated[
        bool,
        Option("Refuse texts that are too long or empty, and stop at infinite numbers and NaN, once they are stored."),
    ] = False
    patterns: bool = False
    """Whether attention after softmax is kept, too, of the layers that are selected."""

    batch_size: Annotated[
        int | None, Option("Texts in a forward, or auto: as many tokens as are fastest.", reads=str, default="auto")
    ] = None

    @classmethod
    def parse(
        cls, seq_length: int | None = None, packing: bool = False, strict: bool = False, batch_size: str = "auto"
    ) -> Feeding:
        """How texts are fed, from what people type. Raises PromptError."""
        if batch_size != "auto" and not batch_size.isdecimal():
            raise PromptError(f"--batch_size is {batch_size!r}; write a number, or auto.")
        return cls(seq_length, packing, strict, batch_size=None if batch_size == "auto" else int(batch_size))

    def __post_init__(self) -> None:
        for name in ("seq_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PromptError(f"{name} is {value}; it must be 1 or more.")
