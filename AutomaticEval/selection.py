"""What is kept: which sites, of which layers, at which positions, in which dtype, and how much of each row.

Positions are derived from the sequence alone: P prompt tokens and R response tokens give P + R - 1 positions, because the last token is
never fed to the model. A text without a response is fed to its end. Where a response thinks and answers is told beside it. This file knows
neither models nor files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any

from AutomaticEval.errors import SelectionError, UnknownPositions, did_you_mean
from AutomaticEval.options import Option
from AutomaticEval.reducing.projection import Projection
from AutomaticEval.reducing.table import NAMED, PROJECT, REDUCTIONS, Reduction, is_by_sample
from AutomaticEval.sites import (
    DEFAULT_KINDS,
    LayersLike,
    Site,
    expand,
    parse_layers,
    parse_sites,
    refuse_ids,
    refuse_layers_twice,
)
from AutomaticEval.thinking.where import Thinking

STORE_DTYPES = ("float16", "bfloat16", "int8")
"""The dtypes that rows can be narrowed to. int8 needs a scale for each channel and block of rows, and is for runs only."""
PARTS = ("all", "prompt", "response", "scored", "thinking", "answer")
OF_THINKING = ("thinking", "answer")
"""The parts that are known only when a response is."""
_GRAMMAR = re.compile(rf"(?:({'|'.join(PARTS)})(?:\[([-\d:]+)\])?|\[?([-\d:]+)\]?)")
_HOW = "write all, prompt, response, scored, thinking, answer or last, or a slice: -4:, ::2, prompt[-1:], response[:8]"


@dataclass(frozen=True)
class Positions:
    """A slice of a part of the sequence."""

    part: str = "all"
    """all; prompt; response (the response tokens that were fed); scored (the positions whose logits gave the response); thinking and answer (the
    tokens of the response that are these, without the marks around them)."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None

    @classmethod
    def parse(cls, positions: str | slice | Positions) -> Positions:
        """Positions from `all`, `prompt[-1:]`, `-4:`, `last`, or a slice object. Raises UnknownPositions."""
        if isinstance(positions, Positions):
            return positions
        if isinstance(positions, slice):
            return cls._checked("all", positions.start, positions.stop, positions.step, repr(positions))
        if positions == "last":
            return cls("all", -1)
        match = _GRAMMAR.fullmatch(str(positions).replace(" ", ""))
        if match is None:
            raise UnknownPositions(f"no positions {positions!r}; {_HOW}.")
        part, inner, bare = match.groups()
        fields = (inner or bare or ":").split(":")
        try:
            numbers = [int(field) if field else None for field in fields]
        except ValueError:
            raise UnknownPositions(f"no positions {positions!r}; {_HOW}.") from None
        if len(numbers) == 1:  # an index names one position
            (index,) = numbers
            if part in OF_THINKING:
                raise UnknownPositions(
                    f"positions {positions}: which token that is, questions tell by what it says (docs/runs.md); to keep the tokens around it, write a "
                    f"slice, such as {part}[:4] or {part}[-4:]."
                )
            assert index is not None
            numbers = [index, None if index == -1 else index + 1]
        if len(numbers) > 3:
            raise UnknownPositions(f"no positions {positions!r}; {_HOW}.")
        start, stop, step = (*numbers, None)[:3]
        return cls._checked(part or "all", start, stop, step, str(positions))

    @classmethod
    def _checked(cls, part: str, start: int | None, stop: int | None, step: int | None, given: str) -> Positions:
        if step is not None and step < 1:
            raise UnknownPositions(f"the positions {given} step by {step}; the step must be 1 or more.")
        return cls(part, start, stop, step)

    def __str__(self) -> str:
        if (self.start, self.stop, self.step) == (None, None, None):
            return self.part
        if self == Positions("all", -1):
            return "last"
        step = "" if self.step is None else f":{self.step}"
        bounds = ":".join("" if bound is None else str(bound) for bound in (self.start, self.stop)) + step
        return f"{self.part}[{bounds}]"

    @property
    def needs_thinking(self) -> bool:
        """Whether the positions depend on where the response thinks and answers."""
        return self.part in OF_THINKING

    def resolve(self, n_prompt: int, n_response: int, thinking: Thinking | None = None) -> range:
        """The positions that are kept of a sequence of n_prompt + n_response tokens, in ascending order.

        thinking: where the response thinks and answers; only `thinking` and `answer` need it. Raises UnknownPositions when these lack it.
        """
        end = n_prompt + max(n_response - 1, 0)
        if self.needs_thinking:
            whole = self._said(thinking, end)
        else:
            whole = {
                "all": range(end),
                "prompt": range(n_prompt),
                "response": range(n_prompt, end),
                "scored": range(n_prompt - 1, end),
            }[self.part]
        return whole[self.start : self.stop : self.step]

    def _said(self, thinking: Thinking | None, end: int) -> range:
        """The tokens of the thinking or of the answer that were fed."""
        if thinking is None:
            raise UnknownPositions(f"positions={self} are those of a generated answer, and are not known here.")
        start, stop = thinking.span or (end, end)
        if self.part == "answer":
            start, stop = (end if thinking.answer_start is None else thinking.answer_start), end
        return range(min(start, end), min(stop, end))

    def most(self, n_prompt: int, n_response: int) -> range:
        """As many positions as may be kept of a sequence whose response is not known yet."""
        part = "response" if self.needs_thinking else self.part
        return replace(self, part=part).resolve(n_prompt, n_response)

    def window(self, n_prompt: int) -> tuple[int, int | None]:
        """Half-open bounds that hold every kept position, however long the response becomes. None: there is no upper bound.

        Rows are cut by them on the device while the response is still being generated.
        """
        if self.part == "prompt":
            kept = self.resolve(n_prompt, 1)
            return (kept[0], kept[-1] + 1) if kept else (0, 0)
        if self.needs_thinking:  # the thinking may end, and the answer begin, at any token of the response
            return n_prompt, None
        base = {"all": 0, "response": n_prompt, "scored": n_prompt - 1}[self.part]
        low = base if self.start is None else base + self.start
        if self.start is not None and self.start < 0:  # counted from the end, which is the end of the prompt or later
            low = max(base, n_prompt + self.start)
        return low, base + self.stop if self.stop is not None and self.stop >= 0 else None


@dataclass(frozen=True)
class Selection:
    """What is kept of every sequence."""

    kinds: Annotated[
        tuple[str, ...],
        Option(
            "Sites, such as embed,resid_post,mlp_out,z or layer_3.mlp_out. Default: embed,resid_post.",
            name="sites",
            reads=str | None,
            default=None,
            metavar="SITES",
        ),
    ] = DEFAULT_KINDS
    """Kinds of sites, names from `AutomaticEval.sites`; those that each layer has are kept in `layers`."""

    layers: Annotated[
        tuple[tuple[int, int], ...] | None,
        Option("Layers, such as 0-2,-1. Default: all.", reads=str | None, metavar="LAYERS"),
    ] = None
    """Inclusive (first, last) pairs; None for all layers."""

    positions: Annotated[
        Positions,
        Option(
            "Positions: all, prompt, response, scored (whose logits gave the score), thinking, answer, last, or a slice such as prompt[-4:].",
            reads=str,
            default="all",
        ),
    ] = Positions()
    store_dtype: Annotated[
        str | None, Option("Store narrower numbers: float16, bfloat16, or int8 (runs only). Default: the model's own.")
    ] = None
    reduce: Annotated[
        str | None,
        Option("Keep less: norm (the L2 norm of each row); mean or max over the kept positions of each sample."),
    ] = None
    """A name of `reducing.table.NAMED`, or None. With `project` it is None."""

    project: Annotated[
        Projection | None,
        Option(
            "Keep each row times a matrix [width, k]: .npy, or .npz or .safetensors with a matrix for each site.",
            reads=str | None,
            metavar="FILE",
        ),
    ] = None

    think_tokens: Annotated[
        tuple[str, str] | None,
        Option(
            "The texts that open and close the model's thinking. Default: those of its tokenizer, such as <think>,</think>.",
            reads=str | None,
            metavar="OPEN,CLOSE",
        ),
    ] = None

    single_sites: tuple[Site, ...] = ()
    """Sites of single layers (`layer_3.mlp_out`), which are kept beside those of `kinds`. Only without `layers`."""

    def __post_init__(self) -> None:
        refuse_layers_twice(self.single_sites, self.layers_text())
        if self.store_dtype is not None and self.store_dtype not in STORE_DTYPES:
            raise SelectionError(
                f"no store_dtype {self.store_dtype!r}; write {', '.join(STORE_DTYPES)}, or leave it out for the model's own."
            )
        if self.reduce is not None and self.reduce not in NAMED:
            raise SelectionError(
                f"no reduce {self.reduce!r}.{did_you_mean(self.reduce, NAMED)} Write {', '.join(NAMED)}, or leave it out to keep whole rows."
            )
        if self.reduce is not None and self.project is not None:
            raise SelectionError(
                f"reduce {self.reduce} and project were both given; a row is reduced once. Leave one out."
            )
        if self.reduction is not None:
            how = f"reduce {self.reduce}" if self.project is None else "project"
            refuse_ids((*self.kinds, *(site.key for site in self.single_sites)), how)
        if self.is_by_sample and self.store_dtype == "int8":
            raise SelectionError(
                f"reduce {self.reduce} keeps one line a sample, and int8 needs the rows of many tokens together; use float16 or bfloat16."
            )

    @classmethod
    def parse(
        cls,
        sites: str | Iterable[str] | None = None,
        layers: LayersLike = None,
        positions: str | slice | Positions = "all",
        store_dtype: str | None = None,
        reduce: str | None = None,
        project: Any = None,
        think_tokens: str | Iterable[str] | None = None,
    ) -> Selection:
        """A selection from what people type. Raises UnknownSite, UnknownLayer, UnknownPositions, SelectionError.

        project: a file, an array or tensor [width, k], or a mapping of a site to one. think_tokens: "<think>,</think>", or the two texts.
        """
        dtype = None if store_dtype is None else str(store_dtype).removeprefix("torch.")
        parsed = parse_sites(sites)
        kinds = tuple(site.kind for site in parsed if site.layer is None)
        single_sites = tuple(site for site in parsed if site.layer is not None)
        chosen = Positions.parse(positions)
        projection = None if project is None else Projection.of(project)
        marks = parse_think_tokens(think_tokens)
        return cls(kinds, parse_layers(layers), chosen, dtype, reduce, projection, marks, single_sites)

    def sites(self, n_layers: int) -> tuple[Site, ...]:
        """The sites kept in a model of n_layers, in the order of a forward. Raises UnknownLayer."""
        return expand((*self.kinds, *self.single_sites), self.layers_text(), n_layers)

    @property
    def reduction(self) -> Reduction | None:
        """How rows are reduced; None keeps them whole."""
        name = self.reduce if self.project is None else PROJECT
        return None if name is None else REDUCTIONS[name]

    @property
    def is_by_sample(self) -> bool:
        """Whether one line is kept of each sample, in the place of its rows."""
        return is_by_sample(self.reduce)

    @property
    def matrices(self) -> dict[str, Any]:
        """The matrices of a projection, which are stored beside the rows: name -> [width, k]."""
        return {} if self.project is None else dict(self.project.matrices)

    @property
    def matrix_bytes(self) -> int:
        """The size of these matrices in each file."""
        return sum(int(matrix.numel()) * 4 for matrix in self.matrices.values())

    @property
    def copied_as(self) -> str | None:
        """The dtype in which rows leave the model; None is that in which they were computed.

        int8 needs many rows together, so they become int8 only when they are written. Rows of which a mean is taken are not rounded before.
        """
        return None if self.store_dtype == "int8" or self.is_by_sample else self.store_dtype

    def layers_text(self) -> str:
        """The layers as people write them: `0-2,-1`, or `all`."""
        if self.layers is None:
            return "all"
        return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in self.layers)

    def as_dict(self) -> dict[str, str]:
        """Sites, layers, positions, store_dtype and the reduction as people write them, for the settings in files.

        A projection is there by its hash: `reduce` is then "project".
        """
        names = (*self.kinds, *(site.key for site in self.single_sites))
        chosen = {"sites": ",".join(names), "layers": self.layers_text(), "positions": str(self.positions)}
        others = {
            "store_dtype": self.store_dtype,
            "reduce": None if self.reduction is None else self.reduction.name,
            "project": None if self.project is None else self.project.sha256,
            "think_tokens": None if self.think_tokens is None else ",".join(self.think_tokens),
        }
        return {**chosen, **{name: value for name, value in others.items() if value is not None}}


def parse_think_tokens(given: str | Iterable[str] | None) -> tuple[str, str] | None:
    """The texts that open and close thinking, of "<think>,</think>" or of two texts. Raises SelectionError for anything else."""
    if given is None:
        return None
    parts = given.split(",") if isinstance(given, str) else list(given)
    if len(parts) != 2 or not all(isinstance(each, str) and each.strip() for each in parts):
        raise SelectionError(
            f"think_tokens are {given!r}; write the text that opens the model's thinking and the one that closes it: <think>,</think>."
        )
    return parts[0], parts[1]
