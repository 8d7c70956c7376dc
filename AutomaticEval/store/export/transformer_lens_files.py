"""Writes a run for TransformerLens: a safetensors file a sample, with the names and shapes of an ActivationCache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from AutomaticEval.store.bits import bits
from AutomaticEval.store.export.outgoing import Advance, records, sample
from AutomaticEval.store.export.safetensors_files import save_safetensors
from AutomaticEval.store.export.shard_files import OutgoingTensor
from AutomaticEval.store.export.transformer_lens import as_activation_cache, places
from AutomaticEval.store.reading.reduced_runs import refuse_reduced
from AutomaticEval.store.run import Run


def check(run: Run) -> None:
    """Raises SelectionError for a site without a name there and for reduced rows, StoreError when the file does not say how many heads there are."""
    refuse_reduced(run.settings, "TransformerLens' ActivationCache")
    places({key: each.width for key, each in run.contents.activations.items()}, run.settings)


def write(run: Run, folder: Path, dtypes: Mapping[str, torch.dtype], advance: Advance) -> None:
    """Write a file for each sample, and samples.jsonl with the file's name, token_ids and positions."""
    with (folder / "samples.jsonl").open("w", encoding="ascii") as lines:
        for number, record in enumerate(records(run)):
            data, name = sample(run, number, dtypes), f"sample-{number:05d}.safetensors"
            save_safetensors(
                folder / name,
                [
                    OutgoingTensor(each, tensor.dtype, tuple(tensor.shape), partial(iter, [bits(tensor)]))
                    for each, tensor in as_activation_cache(data).items()
                ],
            )
            rows = {each: data[each].tolist() for each in ("token_ids", "positions")}
            lines.write(json.dumps({**record, **rows, "tokens": data["tokens"], "file": name}) + "\n")
            advance(1)
