"""`recompute`: computes some samples of a run again, each by one plain forward, and compares them with what is stored."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from AutomaticEval.capture.recompute.plain_forward import refuse_lacking
from AutomaticEval.capture.recompute.recomputed_sample import Compared, Comparison, RowDifference
from AutomaticEval.errors import OtherSettings, SelectionError
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.loading import load_model
from AutomaticEval.settings import MODEL, SAMPLED, RunSettings
from AutomaticEval.store.local_paths import read_local_paths
from AutomaticEval.store.reader import as_run
from AutomaticEval.store.run import Run

FINGERPRINTS = (MODEL, SAMPLED)
"""The settings that identify a model's weights, the strictest first. Of those that a run holds, the first one is compared."""
OF_THE_MODEL = ("shape", "dtype", "quantization")
"""The other settings that a model must have in common with the model of the run. A setting that the run does not hold is not compared."""
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "top_k_experts")
"""Names that configs give to the number of experts to which a token is sent."""


@dataclass
class Recomputed:
    """The verdicts on all samples that were computed again."""

    n_samples: int
    """How many samples the run has."""
    seed: int
    """The seed that drew the samples."""
    n_keys: int
    notes: tuple[str, ...] = ()
    """What makes the verdicts weaker, a sentence for each reason."""
    samples: list[Compared] = field(default_factory=list)

    @property
    def different(self) -> list[Compared]:
        """The samples that rounding does not explain."""
        return [each for each in self.samples if each.problems]

    @property
    def furthest(self) -> tuple[int, RowDifference] | None:
        """The number of the sample with the largest difference, and that difference; None when there is none."""
        differences = [(each.number, each.furthest) for each in self.samples if each.furthest is not None]
        return max(differences, key=lambda each: each[1].part, default=None)

    def __str__(self) -> str:
        n_equal = sum(each.is_equal and not each.problems for each in self.samples)
        n_near = len(self.samples) - n_equal - len(self.different)
        rows, numbers = (sum(getattr(each, name) for each in self.samples) for name in ("n_rows", "n_numbers"))
        ending = ""
        if self.furthest is not None:
            number, (part, key, place) = self.furthest
            ending = (
                f"; the largest difference is {part:.1e} of a row's largest number: sample {number}, {key}, {place}"
            )
        return (
            f"{len(self.samples)} of {self.n_samples} samples recomputed (seed {self.seed}): {n_equal} equal, {n_near} within rounding, "
            f"{len(self.different)} DIFFERENT; {rows} rows and {numbers} numbers of {self.n_keys} keys compared{ending}"
            + "".join(f". {note}" for note in self.notes)
        )


def recompute(
    run: Run | str | Path,
    model: Any = None,
    n: int = 8,
    *,
    seed: int | None = None,
    tokenizer: Any = None,
    options: LoadOptions = LoadOptions(),
    tell: Callable[[str], None] = lambda line: None,
) -> Recomputed:
    """Compute n samples of a run again, each by one plain forward of its own tokens, and compare every stored row and score.

    run: an open run, or its path. model: a name, a folder, "demo", or a loaded model (then with tokenizer=); None for the model that the run
    names. n: how many samples, drawn at random. seed: draws them; None draws a seed, which the result holds. options: how the model is loaded;
    what they leave open is taken from the settings of the run. tell: takes a line for each sample.
    Raises OtherSettings for another model than the run's, and for a run that was made while the model was edited; SiteUnavailable, UnknownSite
    for a site that the model does not have; StoreError, UnreadableFile for a run that cannot be read.
    """
    if n < 1:
        raise SelectionError(f"{n} samples were asked for; recompute 1 at least.")
    run = as_run(run)
    loaded = model_of(run, model, tokenizer=tokenizer, options=options)
    seed = secrets.randbits(31) if seed is None else seed
    numbers = sorted(random.Random(seed).sample(range(len(run)), min(n, len(run))))
    comparison = Comparison(run, loaded)
    recomputed = Recomputed(len(run), seed, len(run.keys), tuple(_notes(run, loaded)))
    for number in tqdm(numbers, desc="Recomputing", unit="sample", disable=None):
        recomputed.samples.append(comparison.of(number))
        tell(str(recomputed.samples[-1]))
    return recomputed


def model_of(
    run: Run, model: Any = None, *, tokenizer: Any = None, options: LoadOptions = LoadOptions()
) -> LoadedModel:
    """The model with which a run was made, loaded as it was then. Raises what `recompute` raises for the model."""
    refuse_unknown_numbers(run)
    if model is None or isinstance(model, str | Path):
        model, options = loaded_as(run, model, options)
    loaded = load_model(model, tokenizer=tokenizer, options=options)
    refuse_other_model(run, loaded)
    refuse_lacking(loaded, run.keys)
    return loaded


def loaded_as(
    run: Run, model: str | Path | None = None, options: LoadOptions = LoadOptions()
) -> tuple[str | Path, LoadOptions]:
    """The name or path of a run's model, and how it was loaded. model, options: what is given takes the place of what the run says."""
    paths = read_local_paths(run.path)
    name = paths.get("model", run.model) if model is None else model
    return name, _as_then(options, run.made_with, paths)


def refuse_unknown_numbers(run: Run) -> None:
    """Raises OtherSettings for a run whose numbers cannot come from a plain forward of its model."""
    for made in run.made_with.of_parts():
        if made.edits:
            raise OtherSettings(
                f"{run.path} was made while its model was edited ({', '.join(made.edits)}); a plain forward gives other numbers, so "
                "that it cannot be recomputed."
            )
        if made.converted_from == "int8":
            raise OtherSettings(
                f"{run.path} was converted from int8, and how coarse its numbers are is not known any more; recompute the run it was made of."
            )


def refuse_other_model(run: Run, loaded: LoadedModel) -> None:
    """Raises OtherSettings when the settings of a run say that it was made with another model."""
    own = loaded.made_with()
    if own.edits:
        raise OtherSettings(f"{loaded.name} is being edited ({', '.join(own.edits)}); recompute outside of it.")
    for made in run.made_with.of_parts():
        strictest = [name for name in FINGERPRINTS if name in made.names][:1]
        for name in strictest + [name for name in OF_THE_MODEL if name in made.names]:
            then, now = getattr(made, name), getattr(own, name)
            if then != now:
                raise OtherSettings(
                    f"{run.path} was made with another model than {loaded.name}: its {name} is {then}, and this one's is {now}. "
                    f"Give the model that made it ({run.model!r}), loaded as it was then."
                )


def _notes(run: Run, loaded: LoadedModel) -> Iterator[str]:
    """What makes the verdicts on a run weaker."""
    if not any(name in made.names for made in run.made_with.of_parts() for name in FINGERPRINTS):
        yield "The run holds no fingerprint of its model, which is known by its shape and dtype alone"
    config, dtype = loaded.model.config.get_text_config(), loaded.model.dtype
    if dtype.itemsize < 4 and any(getattr(config, name, None) for name in CHOSEN_EXPERTS):
        name = str(dtype).removeprefix("torch.")
        yield f"The model chooses among experts: in {name} near ties fall either way, and such a token is DIFFERENT without a fault"


def _as_then(options: LoadOptions, made: RunSettings, paths: Mapping[str, str]) -> LoadOptions:
    """The options, with what they leave open taken from the settings of the run."""
    bits = made.quantization
    made_of = {**(made.loaded_with or {}), **paths}
    is_open = not (options.load_in_8bit or options.load_in_4bit)
    return replace(
        options,
        dtype=(made.dtype or "auto") if options.dtype == "auto" else options.dtype,
        load_in_8bit=bits == "8bit" if is_open else options.load_in_8bit,
        load_in_4bit=bits == "4bit" if is_open else options.load_in_4bit,
        revision=options.revision or made.revision,
        peft=options.peft or made_of.get("peft"),
        adapter=options.adapter or made_of.get("adapter"),
        delta=options.delta or made_of.get("delta"),
        subfolder=options.subfolder or made_of.get("subfolder"),
        model_description=options.model_description or made_of.get("model_description"),
    )
