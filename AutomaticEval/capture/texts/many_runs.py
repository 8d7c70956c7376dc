"""Several models x several sets of texts, a run folder each: one that fails does not lose the others, one that is there is not made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from AutomaticEval.capture.texts.batching import Feeding
from AutomaticEval.capture.texts.extraction import Extracted, Forwards, as_text, extract, refuse_response
from AutomaticEval.capture.texts.sources import Text
from AutomaticEval.capture.vocabulary import token_strings
from AutomaticEval.errors import ModelUnavailable, SelectionError, StoreError, first_line
from AutomaticEval.models.loading import LoadedModel, LoadOptions, load_model, revision_of, state_of
from AutomaticEval.processes import Ranks
from AutomaticEval.public_names import public_name
from AutomaticEval.selection import Selection
from AutomaticEval.store.disk.file_names import own_name, plain_name
from AutomaticEval.store.disk.json_files import read_json, refuse_others, write_json
from AutomaticEval.store.disk.whole_files import prepare_folder, size_text
from AutomaticEval.store.hdf5.contract import as_json
from AutomaticEval.store.reader import Run, open_run
from AutomaticEval.store.run_folder import LOCK, is_finished, shards_bytes
from AutomaticEval.store.writer import leaving_nothing

NUMBERS = "extraction.json"
"""In each run folder: what the extraction gave."""


MOST = 80
"""Characters of a folder's name."""


@dataclass(frozen=True)
class TextSet:
    """Texts that go into one run folder a model."""

    name: str
    texts: Any
    """Strings or Texts; iterated once a model."""
    about: Mapping[str, Any]
    """What they are, so that others are not taken for them."""
    total: int | None = None

    @classmethod
    def of(cls, name: str, texts: Iterable[str | Text], **about: Any) -> TextSet:
        """Goes through the texts once, so that what is wrong with one is told before a model runs. Raises what they raise."""
        digest, total = xxhash.xxh3_64(), 0
        for text in texts:
            digest.update(json.dumps(as_text(text).text).encode())
            total += 1
        return cls(name, texts, {**about, "texts_xxh3_64": digest.hexdigest()}, total)


@dataclass(frozen=True)
class Plan:
    """What is done to every set and model."""

    selection: Selection
    feeding: Feeding
    load: LoadOptions
    compression: str | None
    ranks: Ranks


@dataclass
class Unit:
    """One model on one set."""

    model: str
    name: str
    folder: Path
    status: str = "captured"
    """captured, was there, or failed"""
    error: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    """The fields of `Extracted`."""

    def run(self) -> Run:
        return open_run(self.folder)


def extract_sets(
    models: Sequence[str],
    sets: Sequence[TextSet],
    plan: Plan,
    folder_of: Callable[[str, str], Path],
    announce: Callable[[str], None] = lambda line: None,
) -> list[Unit]:
    """Each model on each set. folder_of: model and set -> the run folder.

    A unit whose folder is finished is not made again, one that was cut short goes on. What goes wrong in one
    is told in the unit. Raises OtherSettings for a folder that was made otherwise, before anything is done.
    """
    refuse_response(plan.selection)
    units = [Unit(model, each.name, folder_of(model, each.name)) for model in models for each in sets]
    by_name = {each.name: each for each in sets}
    for unit in units:
        unit.status = _there(unit, by_name[unit.name], plan)
    failures: dict[str, Exception] = {}
    for unit in units:
        label = f"{unit.model}, {unit.name}"
        if unit.status == "was there":
            announce(f"{label}: is there already")
            continue
        loaded = None
        try:
            loaded = _load(unit.model, plan, failures)
            unit.numbers = _one(unit, loaded, by_name[unit.name], plan, announce)
            rate = unit.numbers["n_tokens"] / max(unit.numbers["seconds"], 1e-9)
            announce(f"{label}: {unit.numbers['n_samples']} samples, {rate:.0f} tokens a second, {unit.folder}")
        except Exception as failure:  # whatever it is, the others are not lost for it
            is_awaited = plan.ranks.n_ranks > 1 and loaded is not None  # by the other processes, in the middle of it
            if is_awaited or len(units) == 1:  # or there is nothing else to lose
                raise
            unit.status, unit.error = "failed", f"{type(failure).__name__}: {first_line(failure)}"
            announce(f"{label}: {unit.error}")
    return units


def folder_names(names: Sequence[str]) -> dict[str, str]:
    """Each name's last part, or the whole where several end alike, of characters that every file system takes.

    Raises SelectionError for a name that is there twice.
    """
    for number, name in enumerate(names):
        if name in names[:number]:
            raise SelectionError(f"{name} was named twice.")
    short = {name: plain_name(Path(public_name(name)).name)[-MOST:] for name in names}
    if len(set(short.values())) == len(short):
        return short
    whole = {name: plain_name(name.strip("/"))[-MOST:] for name in names}
    if len(set(whole.values())) == len(whole):
        return whole
    return {name: own_name(name, MOST) for name in names}


def _load(name: str, plan: Plan, failures: dict[str, Exception]) -> LoadedModel:
    """A model, of which load_model keeps the last ones. When a process cannot load it, none has it.

    failures: model -> why it could not be loaded; it is told of each set, and not tried again. Raises it.
    """
    if name not in failures:
        try:
            loaded = load_model(name, options=plan.load)
        except Exception as failure:  # whatever it is, the other models are not lost for it
            failures[name] = failure
        own = failures.get(name)
        whys = [why for why in plan.ranks.gathered(own and first_line(own)) if why is not None]
        if not whys:
            return loaded
        failures.setdefault(name, ModelUnavailable(f"another process could not load {name!r}: {whys[0]}"))
    raise failures[name]


def _one(
    unit: Unit, loaded: LoadedModel, texts: TextSet, plan: Plan, announce: Callable[[str], None]
) -> dict[str, Any]:
    per_token = Forwards(loaded, plan.selection, plan.feeding).bytes_per_token
    announce(f"{unit.model}, {unit.name}: {size_text(per_token)} a token")
    with nullcontext() if unit.folder.exists() else leaving_nothing(unit.folder):
        done = extract(
            loaded,
            texts.texts,
            plan.selection,
            unit.folder,
            feeding=plan.feeding,
            name=texts.name,
            about=_about(unit.model, texts, plan),
            compression=plan.compression,
            ranks=plan.ranks,
            resume=(unit.folder / LOCK).exists(),
            total=texts.total,
        )
    numbers = _numbers(done) | _of_tokenizer(loaded.tokenizer, loaded.context)
    numbers["n_empty"] = getattr(texts.texts, "n_empty", 0)
    if numbers["n_empty"]:
        announce(f"{unit.model}, {unit.name}: {numbers['n_empty']} texts were empty, and left out")
    if plan.ranks.is_first:
        write_json(unit.folder / NUMBERS, numbers, overwrite=True)
    return numbers


def _about(model: str, texts: TextSet, plan: Plan) -> dict[str, Any]:
    """What a run must have been made with, as far as it is known without loading the model."""
    feeding = {
        "asked_seq_length": plan.feeding.seq_length,
        "patterns": plan.feeding.patterns,
        "strict": plan.feeding.strict,
    }
    return {**texts.about, **feeding, "load": plan.load.as_dict(), "model_files": state_of(model, plan.load)}


def _numbers(done: Extracted) -> dict[str, Any]:
    found = {name: value for name, value in asdict(done).items() if name not in ("folder", "lengths")}
    return {**found, "lengths": _spread(done.lengths)}


def _spread(lengths: Sequence[int]) -> dict[str, float | None]:
    if not lengths:
        return dict.fromkeys(("shortest", "median", "mean", "longest"))
    low, middle, high = (float(each) for each in np.percentile(lengths, (0, 50, 100)))
    return {"shortest": low, "median": middle, "mean": float(np.mean(lengths)), "longest": high}


def _of_tokenizer(tokenizer: Any, context: int | None) -> dict[str, Any]:
    begins = tokenizer("a")["input_ids"][:1] != tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    return {
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "n_tokens": len(tokenizer),
            "first_token_added": token_strings(tokenizer, tokenizer("a")["input_ids"][:1])[0] if begins else None,
            "context": context,
        }
    }


def _there(unit: Unit, texts: TextSet, plan: Plan) -> str:
    """The status of a unit before it is made. Raises OtherSettings."""
    if not unit.folder.exists():
        return "captured"
    if not is_finished(unit.folder):
        prepare_folder(unit.folder)
        return "captured"
    run = unit.run()
    wanted = {
        "model": public_name(unit.model),
        **plan.selection.as_dict(),
        **_about(unit.model, texts, plan),
        "packing": plan.feeding.packing,
    }
    commit = revision_of(unit.model, plan.load)
    wanted |= {} if commit is None else {"revision": commit}
    found = {"model": run.model, "store_dtype": None, **run.settings, **run.settings.get("corpus", {})}
    refuse_others(unit.folder, found, json.loads(as_json(wanted)))
    unit.numbers = _kept_numbers(unit.folder, run)
    return "was there"


def _kept_numbers(folder: Path, run: Run) -> dict[str, Any]:
    """What is written of a run; without that, what the run itself tells."""
    with suppress(StoreError):  # killed before it was written
        return read_json(folder / NUMBERS)
    lengths = _spread(run.column("n_prompt_tokens"))
    return {"n_samples": len(run), "size_bytes": shards_bytes(folder), "lengths": lengths}
