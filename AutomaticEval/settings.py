"""`RunSettings`: what a run was made with, and the one rule that compares two runs.

Two runs are of one model, and may be one run, when `RunSettings.differences` names no setting that decides it. In files the settings are
a JSON object; here they are the fields of one dataclass. This module does not know where the values come from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from AutomaticEval.errors import warn
from AutomaticEval.public_names import is_same

MODEL = "model_hash"
"""The name of the field that tells the model by every number of it."""
SAMPLED = "fingerprint"
"""The name of the older field, which tells the model by 64 numbers of each weight."""
IDENTITY = (MODEL, SAMPLED, "adapters", "code", "config", "tokenizer")
"""The fields that say which model it is. Runs must share them to be joined."""
LATER = (*IDENTITY, "arithmetic", "generation_config", "loaded_with", "versions.bitsandbytes", "versions.peft")
"""The settings that the first versions did not write down. They cannot be compared with the runs of those versions."""

FOLDERS = ("model", "peft", "delta", "base", "offload_folder", "dataset", "names", "include_path", "local_files")
"""Settings whose value is a name, of which the first versions wrote down the path."""
OF_TRANSFORMERS = ("config", "generation_config")
"""Settings whose entries come from transformers. Each of its versions has entries of its own."""


class Difference(NamedTuple):
    """A setting that two runs do not share."""

    name: str
    """The setting's name. Settings within settings have dotted names: "benchmark.num_fewshot"."""
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {self.before!r} and is {self.now!r}"


@dataclass(frozen=True)
class RunSettings:
    """What a run was made with.

    Make one with `from_dict` or `changed`. A setting that was not written is None; `names` tells it from one that was written as
    null. Values that come from a file are kept as they are there, and are not checked to be of the field's type.
    """

    run_id: str | None = None
    """What the shards of one run, and only they, have in common."""

    model: str | None = None
    """The model's name. In HDF5 files it has an attribute of its own; result files have it here."""

    edits: Sequence[str] | None = None
    """The interventions that the model was under, the outermost first."""

    loaded_with: Mapping[str, Any] | None = None
    """The options of loading that say which numbers the model was made of: peft, delta, subfolder, …"""

    adapters: Mapping[str, Any] | None = None
    """Adapter -> its type, its base, and whether it is active."""

    dtype: str | None = None
    """The dtype of the model's weights, such as "float32"."""

    attention: str | None = None
    """The attention kernel: "eager", "sdpa", …"""

    device: str | None = None
    quantization: str | None = None
    """"8bit", "4bit", or the name of another method; None for weights that are not quantised."""

    revision: str | None = None
    """The commit on the hub that the model came from."""

    versions: Mapping[str, str] | None = None
    """Library -> its version."""

    model_hash: str | None = None
    """A hash of every number of the model (`models/weights/fingerprint.py`)."""

    fingerprint: str | None = None
    """The older hash, of the first 64 numbers of each weight. Runs hold both, so that they can be compared with older runs."""

    shape: Mapping[str, int] | None = None
    """n_layers, d_model, n_heads, n_kv_heads, d_head."""

    heads: Mapping[str, int] | None = None
    """Key -> how many heads a row holds, of the sites that the shape does not cut rightly into heads; None when there are none."""

    config: Mapping[str, Any] | None = None
    """The entries of the model's config that differ from its class's defaults."""

    generation_config: Mapping[str, Any] | None = None
    tokenizer: Mapping[str, Any] | None = None
    """Hashes of what makes token ids of a text."""

    arithmetic: Mapping[str, Any] | None = None
    """What of torch decides the last digits, such as the precision of matrix products."""

    code: Any = None
    """A hash of the code that came with the checkpoint."""

    sites: str | None = None
    """The kinds of sites that were kept, as people type them; so are the next two."""

    layers: str | None = None
    positions: str | None = None
    store_dtype: str | None = None
    """The dtype of the stored numbers; None for the model's own."""

    reduce: str | None = None
    """How rows were reduced: a name of `reducing.table.REDUCTIONS`; None for whole rows."""

    project: str | None = None
    """The sha256 of a projection (`reducing/projection.py`)."""

    think_tokens: str | None = None
    """The texts that open and close thinking, as they were given; None for those of the tokenizer."""

    benchmark: Mapping[str, Any] | None = None
    """Which questions a benchmark run asked, and how (`Benchmark.as_dict`)."""

    scoring: str | None = None
    """How `HFActivations` scored: "tree" or "stock". A benchmark run has it in `benchmark`."""

    generation: str | None = None
    """How decode steps were run: "graph"; or that the self-check of the graph failed, so that they were run one by one. None: one by one."""

    lm_eval: Mapping[str, str] | None = None
    """The options that `HFActivations` handed on to lm-eval."""

    corpus: Mapping[str, Any] | None = None
    """Which texts an extraction read, and how they were packed."""

    max_new_tokens: int | None = None
    """The most tokens of the response. This field and the next seven are those of a single prompt."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    generate_arguments: Mapping[str, Any] | None = None
    """Further arguments of transformers' `generate` that a single prompt was answered with, by their own names."""

    system_prompt: str | None = None
    chat_template: bool | None = None
    """Whether the prompt was put into the model's chat template."""

    merged: Sequence[Mapping[str, Any]] | None = None
    """What each part of a merged run says where the parts differ."""

    pruned_from: Sequence[Mapping[str, Any]] | None = None
    """What the selection of a pruned run was before, with one entry for each time that it was pruned."""

    converted_from: str | None = None
    """The dtype in which the numbers of a converted run were stored before."""

    others: Mapping[str, Any] = field(default_factory=dict)
    """Settings that this version does not know, from a file of an older or a newer one. They are written as they were read."""

    names: tuple[str, ...] = ()
    """The names of all settings that are written, in the order of the file."""

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> RunSettings:
        """The settings of a file. `as_dict` gives an equal dict, in the same order."""
        known = {name: value for name, value in written.items() if name in KNOWN}
        others = {name: value for name, value in written.items() if name not in KNOWN}
        return cls(**known, others=others, names=tuple(written))

    def as_dict(self) -> dict[str, Any]:
        """The settings as they are written into files: every one that was given, None included."""
        return {name: getattr(self, name) if name in KNOWN else self.others[name] for name in self.names}

    def changed(self, **settings: Any) -> RunSettings:
        """A copy with other values. New settings are written after the ones before. Raises TypeError for what is no field."""
        for name in settings:
            if name not in KNOWN:
                raise TypeError(f"RunSettings has no field {name!r}; add it to the class.")
        return self.from_dict({**self.as_dict(), **settings})

    def of_parts(self) -> list[RunSettings]:
        """These settings and, of a merged run, what each of its parts says beside them."""
        return [self, *map(RunSettings.from_dict, self.merged or [])]

    def differences(self, other: RunSettings, where: str, only: Collection[str] | None = None) -> list[Difference]:
        """The settings that two runs do not share; self is the earlier run.

        where: what the warning begins with. only: the names of the settings that are compared; None compares all.
        Models are the same when every number is, which `model_hash` tells. When only one run has it, the older `fingerprint` decides, and
        whatever else of `LATER` only one run has is not compared. One warning names all that is not compared.
        """
        before, now = (
            _flat({name: value for name, value in each.as_dict().items() if only is None or name in only})
            for each in (self, other)
        )
        if _at(before, MODEL) and _at(now, MODEL):
            left_out = {SAMPLED}
        else:
            unknown = [name for name in LATER if bool(_at(before, name)) != bool(_at(now, name))]
            left_out = {each for name in unknown for flat in (before, now) for each in _at(flat, name)}
            _warn_not_compared(where, unknown)
        if self.versions != other.versions:
            left_out |= {name for name in before.keys() ^ now.keys() if name.split(".")[0] in OF_TRANSFORMERS}
        names = [name for name in dict.fromkeys([*before, *now]) if name not in left_out]
        pairs = [Difference(name, before.get(name), now.get(name)) for name in names]
        return [pair for pair in pairs if not _is_equal(pair)]


def think_end_token(settings: RunSettings) -> str | int | None:
    """lm-eval's option of this name, with which a run was made: it cut the thinking off at this text or token id. None: it did not."""
    given = [(each or {}).get("think_end_token") for each in (settings.benchmark, settings.lm_eval)]
    end: str | int | None = next((each for each in given if each not in (None, "None")), None)
    return int(end) if isinstance(end, str) and end.isdigit() else end


KNOWN = frozenset(each.name for each in fields(RunSettings)) - {"others", "names"}
"""The names of all settings that this version writes."""


def _is_equal(pair: Difference) -> bool:
    """Whether both values name the same thing. Runs of the first versions hold a path where later ones hold its last name."""
    if pair.name.rpartition(".")[2] in FOLDERS:
        before, now = ([value] if isinstance(value, str) else value for value in (pair.before, pair.now))
        if isinstance(before, list | tuple) and isinstance(now, list | tuple) and len(before) == len(now):
            return all(is_same(str(one), str(other)) for one, other in zip(before, now, strict=True))
    return bool(pair.before == pair.now)


def _warn_not_compared(where: str, unknown: Collection[str]) -> None:
    if not unknown:
        return
    how = ""
    if MODEL in unknown:
        told = "by nothing but its name" if SAMPLED in unknown else f"by its {SAMPLED}, of 64 numbers of each weight"
        how = f" That the model is the same was told {told}."
    warn(f"{where}: {', '.join(unknown)} were not written down then, and are not compared.{how}")


def _at(flat: Mapping[str, Any], name: str) -> list[str]:
    """The dotted names at a name or under it."""
    return [each for each in flat if each == name or each.startswith(f"{name}.")]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings within settings under dotted names, such as "benchmark.num_fewshot". An empty dict is a value."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + str(name)] = value
    return flat
