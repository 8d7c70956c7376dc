"""How a response is chosen: the options of sampling. Imports no heavy library."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

from AutomaticEval.errors import PromptError
from AutomaticEval.options import Option

GENERATIONS = ("auto", "graph", "eager")
Generation = Annotated[
    str,
    Option(
        "auto: generated answers from a CUDA graph where there can be one; graph: the same, refused on a CPU; eager: step by step."
    ),
]
"""How the decode steps of generated answers are run. Prompts and benchmarks have this option alike."""


def wrong_generation(generation: object) -> str | None:
    """What is wrong with a value of the option; None when nothing is."""
    if generation in GENERATIONS:
        return None
    return f"--generation is {generation!r}; write {', '.join(GENERATIONS[:-1])} or {GENERATIONS[-1]}."


@dataclass(frozen=True)
class Sampling:
    """How the response is chosen."""

    max_new_tokens: Annotated[int, Option("The most tokens to generate; fewer when the context ends first.")] = 256
    temperature: Annotated[float, Option("Temperature for sampling; 0 is greedy decoding.")] = 0.0
    top_p: Annotated[float, Option("Sample from the fewest tokens that hold this share of the probability.")] = 1.0
    top_k: Annotated[int, Option("Sample from so many of the most probable tokens; 0: no limit.")] = 0
    seed: Annotated[
        int | None, Option("Seed for sampling. Default: one drawn at random, which the settings record.")
    ] = None
    generation: Generation = "auto"

    def __post_init__(self) -> None:
        at_least_1, n_or_none = "a whole number, at least 1", "a whole number, or None"
        self._require("max_new_tokens", _is_whole(self.max_new_tokens) and self.max_new_tokens >= 1, at_least_1)
        self._require("temperature", _is_number(self.temperature) and self.temperature >= 0, "0 (greedy) or more")
        self._require("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require("top_k", _is_whole(self.top_k) and self.top_k >= 0, "a whole number, 0 (no limit) or more")
        self._require("seed", self.seed is None or _is_whole(self.seed), n_or_none)
        wrong = wrong_generation(self.generation)
        if wrong is not None:
            raise PromptError(wrong)
        plain = {"max_new_tokens": int, "temperature": float, "top_p": float, "top_k": int, "seed": int}
        for name, kind in plain.items():  # numbers of numpy are taken too, and become Python's own
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else kind(value))

    def _require(self, name: str, is_sound: bool, expected: str) -> None:
        if not is_sound:
            raise PromptError(f"{name} is {getattr(self, name)!r}; it must be {expected}.")

    def settings(self) -> dict[str, Any]:
        """What the settings of a file say of it. How decode steps were run is told by `generation_setting`."""
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
        return {name: getattr(self, name) for name in names}

    def kwargs(self) -> dict[str, Any]:
        """The arguments for transformers' `generate`.

        They override the checkpoint's own generation config. What that config says besides (a repetition penalty, say) still
        counts, and is written into the settings of a run.
        """
        chosen: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": 1,
            "num_return_sequences": 1,
            "use_cache": True,
            "return_dict_in_generate": False,
            "disable_compile": True,  # a compiled model ignores hooks that are added later
        }
        if self.temperature == 0:
            return {**chosen, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {**chosen, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


class SamplingKeywords(TypedDict, total=False):
    """The options of `Sampling` as keywords of functions, for editors and type checkers; a test compares the two."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    generation: str
