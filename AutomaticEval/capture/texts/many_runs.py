"""Several models x several sets of texts, with a run folder for each pair.

When one fails, the others are still made. A run that is finished is not made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from AutomaticEval.capture.texts.extraction import Extracted, Writing, extract, refuse_response
from AutomaticEval.capture.texts.feeding import Feeding
from AutomaticEval.capture.texts.piece_forwards import PieceForwards
from AutomaticEval.capture.texts.text_set import TextSet as TextSet
from AutomaticEval.capture.vocabulary import token_strings
from AutomaticEval.errors import ModelUnavailable, SelectionError, StoreError, first_line
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.loading import load_model, revision_of, state_of
from AutomaticEval.processes import Ranks
from AutomaticEval.public_names import public_name
from AutomaticEval.selection import Selection
from AutomaticEval.store.disk.file_names import own_name, plain_name
from AutomaticEval.store.disk.json_files import read_json, refuse_others, write_json
from AutomaticEval.store.disk.json_text import as_json
from AutomaticEval.store.disk.whole_files import prepare_folder, size_text
from AutomaticEval.store.reader import open_run
from AutomaticEval.store.run import Run
from AutomaticEval.store.run_folder import LOCK, is_finished, leaving_nothing, shards_bytes

NUMBERS = "extraction.json"
"""The file in each run folder that says what the extraction gave."""
LONGEST_NAME = 80
"""The most characters of a folder's name."""


@dataclass(frozen=True)
class Plan:
    """What is done with every set and model."""

    selection: Selection
    feeding: Feeding
    load: LoadOptions
    compression: str | None
    ranks: Ranks


@dataclass
class Unit:
    """One model on one set of texts."""

    model: str
    name: str
    folder: Path
    status: str = "captured"
    """captured, was there, or failed"""
    error: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    """The fields of `Extracted`."""

    def run(self) -> Run:
        """The finished run, opened. Raises what `open_run` raises."""
        return open_run(self.folder)


def extract_sets(
    models: Sequence[str],
    sets: Sequence[TextSet],
    plan: Plan,
    folder_of: Callable[[str, str], Path],
    announce: Callable[[str], None] = lambda line: None,
) -> list[Unit]:
    """Run each model on each set. folder_of: (model, name of a set) -> the run folder. announce: takes a line for each step.

    A finished folder is not made again, and one that was cut short goes on. A unit that fails holds its error, unless it is the only one.
    Raises OtherSettings for a folder that was made with other settings, before anything is done.
    """
    refuse_response(plan.selection)
    units = [Unit(model, each.name, folder_of(model, each.name)) for model in models for each in sets]
    by_name = {each.name: each for each in sets}
    for unit in units:
        unit.status = _status_before(unit, by_name[unit.name], plan)
    failures: dict[str, Exception] = {}
    told: set[str] = set()
    for unit in units:
        label = f"{unit.model}, {unit.name}"
        if unit.status == "was there":
            announce(f"{label}: is there already")
            continue
        loaded = None
        try:
            loaded = _load(unit.model, plan, failures)
            unit.numbers = _extract_unit(unit, loaded, by_name[unit.name], plan, announce)
            rate = unit.numbers["n_tokens"] / max(unit.numbers["seconds"], 1e-9)
            announce(f"{label}: {unit.numbers['n_samples']} samples, {rate:.0f} tokens a second, {unit.folder}")
        except Exception as failure:  # whatever it is, the other units are still made
            is_awaited = plan.ranks.n_ranks > 1 and loaded is not None  # the other processes would wait for this one
            if is_awaited or len(units) == 1:
                raise
            unit.status, unit.error = "failed", f"{type(failure).__name__}: {first_line(failure)}"
            if unit.model not in told:
                announce(f"{label}: {unit.error}")
            if failures.get(unit.model) is failure:  # a model that cannot be loaded is told once, not for each set
                told.add(unit.model)
    return units


def folder_names(names: Sequence[str]) -> dict[str, str]:
    """A folder name for each name: its last part, or the whole name where several last parts are equal.

    All characters are such that every file system takes them. Raises SelectionError for a name that is given twice.
    """
    for number, name in enumerate(names):
        if name in names[:number]:
            raise SelectionError(f"{name} was named twice.")
    short = {name: plain_name(Path(public_name(name)).name)[-LONGEST_NAME:] for name in names}
    if len(set(short.values())) == len(short):
        return short
    whole = {name: plain_name(name.strip("/"))[-LONGEST_NAME:] for name in names}
    if len(set(whole.values())) == len(whole):
        return whole
    return {name: own_name(name, LONGEST_NAME) for name in names}


def _load(name: str, plan: Plan, failures: dict[str, Exception]) -> LoadedModel:
    """A loaded model. When one of the processes cannot load it, none of them goes on with it.

    failures: model -> the error of loading it, which is raised for each of its sets without another try.
    """
    if name not in failures:
        try:
            loaded = load_model(name, options=plan.load)
        except Exception as failure:  # whatever it is, the other models are still run
            failures[name] = failure
        own = failures.get(name)
        reasons = [reason for reason in plan.ranks.gathered(own and first_line(own)) if reason is not None]
        if not reasons:
            return loaded
        failures.setdefault(name, ModelUnavailable(f"another process could not load {name!r}: {reasons[0]}"))
    raise failures[name]


def _extract_unit(
    unit: Unit, loaded: LoadedModel, texts: TextSet, plan: Plan, announce: Callable[[str], None]
) -> dict[str, Any]:
    """Run one model on one set, and write what the extraction gave beside the run. Returns those numbers."""
    per_token = PieceForwards(loaded, plan.selection, plan.feeding).bytes_per_token
    announce(
        f"{unit.model}, {unit.name}: {size_text(per_token)} a {'sample' if plan.selection.is_by_sample else 'token'}"
    )
    with leaving_nothing(unit.folder):
        described = replace(texts, about=_about(unit.model, texts, plan))
        writing = Writing(plan.compression, plan.ranks, resume=(unit.folder / LOCK).exists())
        extracted = extract(loaded, described, plan.selection, unit.folder, plan.feeding, writing)
    numbers = _numbers(extracted) | _tokenizer_facts(loaded.tokenizer, loaded.context)
    numbers["n_empty"] = getattr(texts.texts, "n_empty", 0)
    if numbers["n_empty"]:
        announce(f"{unit.model}, {unit.name}: {numbers['n_empty']} texts were empty, and left out")
    if plan.ranks.is_first:
        write_json(unit.folder / NUMBERS, numbers, overwrite=True)
    return numbers


def _about(model: str, texts: TextSet, plan: Plan) -> dict[str, Any]:
    """The settings of a run that are known without loading the model."""
    feeding = {
        "asked_seq_length": plan.feeding.seq_length,
        "patterns": plan.feeding.patterns,
        "strict": plan.feeding.strict,
    }
    return {**texts.about, **feeding, "load": plan.load.as_dict(), "model_files": state_of(model, plan.load)}


def _numbers(extracted: Extracted) -> dict[str, Any]:
    """The fields of `Extracted` but the folder, with a summary of the lengths."""
    numbers = {name: value for name, value in asdict(extracted).items() if name not in ("folder", "lengths")}
    return {**numbers, "lengths": _spread(extracted.lengths)}


def _spread(lengths: Sequence[int]) -> dict[str, float | None]:
    if not lengths:
        return dict.fromkeys(("shortest", "median", "mean", "longest"))
    shortest, median, longest = (float(each) for each in np.percentile(lengths, (0, 50, 100)))
    return {"shortest": shortest, "median": median, "mean": float(np.mean(lengths)), "longest": longest}


def _tokenizer_facts(tokenizer: Any, context: int | None) -> dict[str, Any]:
    """What the page of an extraction says of the tokenizer."""
    adds_first = tokenizer("a")["input_ids"][:1] != tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    return {
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "n_tokens": len(tokenizer),
            "first_token_added": token_strings(tokenizer, tokenizer("a")["input_ids"][:1])[0] if adds_first else None,
            "context": context,
        }
    }


def _status_before(unit: Unit, texts: TextSet, plan: Plan) -> str:
    """The status of a unit before anything is made. Raises OtherSettings for a finished folder that was made with other settings."""
    if not unit.folder.exists():
        return "captured"
    if not is_finished(unit.folder):
        prepare_folder(unit.folder)
        return "captured"
    run = unit.run()
    wanted = {
        "model": public_name(unit.model),
        **dict.fromkeys(("store_dtype", "reduce", "project")),
        **plan.selection.as_dict(),
        **_about(unit.model, texts, plan),
        "packing": plan.feeding.packing,
    }
    commit = revision_of(unit.model, plan.load)
    wanted |= {} if commit is None else {"revision": commit}
    held = {"model": run.model, **run.settings, **(run.made_with.corpus or {})}
    refuse_others(unit.folder, held, json.loads(as_json(wanted)))
    unit.numbers = _kept_numbers(unit.folder, run)
    return "was there"


def _kept_numbers(folder: Path, run: Run) -> dict[str, Any]:
    """The numbers that were written beside a run; without them, those that the run itself gives."""
    with suppress(StoreError):  # the process was killed before it wrote them
        return read_json(folder / NUMBERS)
    lengths = _spread(run.column("n_prompt_tokens"))
    return {"n_samples": len(run), "size_bytes": shards_bytes(folder), "lengths": lengths}
