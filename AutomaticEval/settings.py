"""What runs were made with, compared: the one rule by which two of them are of one model, and may be one run.

Settings are what a file says of itself: nested dicts of plain values. Knows nothing of where they come from.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from AutomaticEval.public_names import is_same

MODEL = "model_hash"
"""A hash of every number of the model (`models/weights/fingerprint.py`)."""
SAMPLED = "fingerprint"
"""The older one, of the first 64 numbers of each weight. Runs hold both, so that they can be compared with older runs."""
IDENTITY = (MODEL, SAMPLED, "adapters", "code", "config", "tokenizer")
"""Which model it is: what runs must share to be joined."""
LATER = (*IDENTITY, "arithmetic", "generation_config", "loaded_with", "versions.bitsandbytes", "versions.peft")
"""What the first versions did not write down, so that it cannot be compared with their runs."""

NAMES = ("model", "peft", "delta", "base", "offload_folder", "dataset", "names", "include_path", "local_files")
"""Settings that are names of what may be a folder."""
OF_TRANSFORMERS = ("config", "generation_config")


class Differing(NamedTuple):
    """A setting that two runs do not share."""

    name: str
    """The setting's name. Settings within settings have dotted names: "benchmark.num_fewshot"."""
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {self.before!r} and is {self.now!r}"


def differing(
    what: str, before: Mapping[str, Any], now: Mapping[str, Any], only: Collection[str] | None = None
) -> list[Differing]:
    """The settings that two runs do not share. only: names at the top that are compared; None for all.

    Models are the same when every number is: by `MODEL`. When one run does not hold it, by the older fingerprint, and what else of `LATER`
    only one of them holds is not compared; both are told in one line that begins with `what`.
    """
    first, second = (
        _flat({name: value for name, value in each.items() if only is None or name in only}) for each in (before, now)
    )
    if _of(first, MODEL) and _of(second, MODEL):
        left_out = {SAMPLED}
    else:
        unknown = [name for name in LATER if bool(_of(first, name)) != bool(_of(second, name))]
        left_out = {each for name in unknown for flat in (first, second) for each in _of(flat, name)}
        _tell(what, unknown)
    if before.get("versions") != now.get("versions"):  # each version of transformers has entries of its own
        left_out |= {name for name in first.keys() ^ second.keys() if name.split(".")[0] in OF_TRANSFORMERS}
    names = [name for name in dict.fromkeys([*first, *second]) if name not in left_out]
    found = [Differing(name, first.get(name), second.get(name)) for name in names]
    return [each for each in found if not _is_same(each)]


def _is_same(each: Differing) -> bool:
    """Whether both values name the same thing. Runs of the first versions hold a path where later ones hold its last name."""
    if each.name.rpartition(".")[2] in NAMES:
        one, other = ([value] if isinstance(value, str) else value for value in (each.before, each.now))
        if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
            return all(is_same(str(before), str(now)) for before, now in zip(one, other, strict=True))
    return bool(each.before == each.now)


def _tell(what: str, unknown: Collection[str]) -> None:
    if not unknown:
        return
    how = ""
    if MODEL in unknown:
        told = "by nothing but its name" if SAMPLED in unknown else f"by its {SAMPLED}, of 64 numbers of each weight"
        how = f" That the model is the same was told {told}."
    warnings.warn(f"{what}: {', '.join(unknown)} were not written down then, and are not compared.{how}", stacklevel=4)


def _of(flat: Mapping[str, Any], name: str) -> list[str]:
    """The settings at a name or under it."""
    return [each for each in flat if each == name or each.startswith(f"{name}.")]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings within settings as "benchmark.num_fewshot"; an empty dict is a value."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + str(name)] = value
    return flat
