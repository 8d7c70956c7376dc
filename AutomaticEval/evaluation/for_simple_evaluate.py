"""`HFActivations`: an lm-eval model for code that calls `simple_evaluate` itself.

    lm = HFActivations("gpt2", positions="scored")
    results = simple_evaluate(model=lm, tasks=["hellaswag"])
    run = open_run(lm.finish(results))

Registered with lm-eval as `hf-activations`.
"""

from __future__ import annotations

import atexit
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from AutomaticEval.errors import BenchmarkError, DeviceUnavailable, StoreError, unknown_option, warn
from AutomaticEval.evaluation.benchmark_options import WHY_NOT
from AutomaticEval.evaluation.harness.call import Call, Request, Workload
from AutomaticEval.evaluation.harness.model import CapturingHFLM
from AutomaticEval.evaluation.results.captured_run import RunFolder, folder_name, made_with
from AutomaticEval.evaluation.run_output import RunOutput
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.divided.division import refuse_divided
from AutomaticEval.models.loading import load_model
from AutomaticEval.options import take_fields
from AutomaticEval.processes import join_ranks, own_device
from AutomaticEval.public_names import public_name
from AutomaticEval.selection import Positions, Selection
from AutomaticEval.sites import LayersLike
from AutomaticEval.store.run_folder import shard_names
from AutomaticEval.store.writer import SHARD_BYTES

UNSERVED = {
    "autogptq": "transformers loads GPTQ checkpoints by itself, as it finds them; leave it out.",
    "gptqmodel": "transformers loads GPTQ checkpoints by itself, as it finds them; leave it out.",
    "gguf_file": "GGUF files are not loaded; let transformers write the model into a folder (save_pretrained), and name that.",
    "tp_plan": WHY_NOT["tp_plan"],
}
"""Option of lm-eval that would change the numbers -> why it is refused, and what to do."""


@register_model("hf-activations")
class HFActivations(CapturingHFLM):
    """lm-eval's `hf` model that captures what it is asked into a run folder.

    pretrained: a name, a folder, or a loaded model with tokenizer=. scoring: tree scores over the prefix tree of all requests, stock in
    lm-eval's own batches. generation: graph, eager or auto: how decode steps of generated answers are run. strict: stop once numbers are stored that are infinite or NaN.
    options: those of loading (`LoadOptions`: dtype, device, peft, …) and those of lm-eval's `hf` (batch_size, max_length, parallelize, …). An
    option that cannot be served is refused.
    After each call of lm-eval what was captured is on the disk; `finish` joins it to the scores. When the process ends without it, a warning says so.
    Raises SelectionError, ModelError, StoreError, BenchmarkError; TypeError for an unknown option.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        tokenizer: Any = None,
        activation_save_dir: str | Path = "activations",
        layers_to_capture: LayersLike = None,
        sites: str | None = None,
        positions: str | Positions = "scored",
        store_dtype: str | None = None,
        reduce: str | None = None,
        project: Any = None,
        think_tokens: str | None = None,
        compression: str | None = None,
        strict: bool = False,
        scoring: str = "tree",
        generation: str = "auto",
        **options: Any,
    ) -> None:
        selection = Selection.parse(sites, layers_to_capture, positions, store_dtype, reduce, project, think_tokens)
        _refuse_unserved(options)
        load = _load_options(pretrained, tokenizer, options)
        loaded = load_model(pretrained, tokenizer=tokenizer, options=load)
        refuse_divided(loaded.model, "a benchmark")
        ranks = join_ranks()
        given = {
            name: str(value) if name == "think_end_token" else public_name(str(value))
            for name, value in options.items()
        }
        settings = made_with(loaded, selection).changed(scoring=scoring, lm_eval=given)
        name = folder_name(["lm-eval"], loaded.name)
        output = RunOutput(Path(activation_save_dir), compression=compression, strict=strict)
        how: dict[str, Any] = {"scoring": scoring, "generation": generation}
        super().__init__(loaded, selection, self._take, workload=Workload(ranks=ranks), **how, **options)
        settings = settings.changed(**self.way().settings)
        more = (SHARD_BYTES, ranks, loaded.paths, {**selection.matrices, **loaded.edit_values()})
        self._folder = RunFolder(output, name, loaded.name, settings, *more)
        self._open = ExitStack()
        self._writer = self._open.enter_context(self._folder.writing()).writer
        if ranks.is_first:
            atexit.register(_tell_unjoined, self._folder)

    def _take(self, samples: Any) -> None:
        self._writer.add(samples)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._writer.folder

    @contextmanager
    def _serving(self, requests: list[Request], placeholder: Any, groups: Sequence[int] = ()) -> Iterator[Call]:
        """On every exit what was captured is on the disk."""
        self._check_open()
        try:
            with super()._serving(requests, placeholder, groups) as call:
                yield call
        finally:
            self._writer.flush()

    def _check_open(self) -> None:
        if self._folder.is_finished:
            raise StoreError(f"{self.folder} is finished already; one instance makes one run.")

    def finish(self, results: Mapping[str, Any] | None) -> Path:
        """Join what was captured to what `simple_evaluate` returned, and close the run. Returns the run folder.

        results: None in the processes to which lm-eval gives none.
        Raises BenchmarkError for results without samples, or with documents that were not in order; CaptureError, StoreError.
        """
        if self._ranks.is_first and (results is None or not results.get("samples")):
            raise BenchmarkError("these results hold no samples; call simple_evaluate with log_samples=True.")
        self._check_open()
        samples = (results or {}).get("samples", {})
        doc_ids = {task: _documents(task, logged) for task, logged in samples.items()}
        self._open.close()
        self._folder.finish(samples, doc_ids=doc_ids, directions=(results or {}).get("higher_is_better"))
        return self.folder


def _tell_unjoined(run: RunFolder) -> None:
    """Warn, when the process ends, of a run that was captured and not joined to its scores."""
    if run.path is None or run.is_finished or not shard_names(run.path):
        return
    warn(
        f"{run.path} holds what HFActivations captured, without the verdicts of lm-eval: they are joined by run = open_run(lm.finish(results)), with what "
        "simple_evaluate returned. Call it before the process ends; its answers can be read as they are."
    )


def _refuse_unserved(options: Mapping[str, Any]) -> None:
    """Raises TypeError for an unknown option, BenchmarkError for one that is not served."""
    own, theirs = (inspect.signature(each).parameters.values() for each in (HFActivations, HFLM))
    known = dict.fromkeys(
        [
            *(each.name for each in [*own, *theirs] if each.kind is not each.VAR_KEYWORD),
            *(each.name for each in fields(LoadOptions)),
        ]
    )
    for name, value in options.items():
        if name not in known:
            raise unknown_option(name, known)
        if name in UNSERVED and value:
            raise BenchmarkError(f"{name}: {UNSERVED[name]}")
    if options.get("backend", "default") not in ("default", "causal"):
        raise BenchmarkError(f"backend: {options['backend']!r} is not captured, only decoders are; leave it out.")


def _load_options(pretrained: Any, tokenizer: Any, options: dict[str, Any]) -> LoadOptions:
    """How the model is loaded. Takes these options out of the others. Raises BenchmarkError, DeviceUnavailable, ModelError."""
    load = take_fields(options, LoadOptions)
    load = {**_placing(options), **load}
    for name in UNSERVED:
        options.pop(name, None)
    is_named = isinstance(pretrained, str | Path)
    if is_named and "device_map" not in load:
        load["device"] = own_device(load.get("device", "auto"))
    if "add_bos_token" in load:  # lm-eval tells both its tokenizer, if it loads it, and its own encoding
        options["add_bos_token"] = load["add_bos_token"]
        if not is_named or not isinstance(tokenizer, str | Path | None):
            del load["add_bos_token"]
    return LoadOptions(**load)


def _placing(options: dict[str, Any]) -> dict[str, Any]:
    """`device_map` and `max_memory` for lm-eval's parallelize, max_memory_per_gpu and max_cpu_memory, which are taken out of options."""
    parallelize = options.pop("parallelize", None)
    limits = {name: options.pop(name, None) for name in ("max_memory_per_gpu", "max_cpu_memory")}
    per_gpu, cpu = limits.values()
    if not parallelize:
        for name, limit in limits.items():
            if limit is not None:
                raise BenchmarkError(
                    f"{name} is for parallelize=True, which spreads the model; add that, or leave it out."
                )
        return {}
    if per_gpu is not None and not torch.cuda.is_available():
        raise DeviceUnavailable("max_memory_per_gpu was given, but torch sees no GPU here; leave it out.")
    gpus = {} if per_gpu is None else dict.fromkeys(range(torch.cuda.device_count()), per_gpu)
    max_memory = {**gpus, **({} if cpu is None else {"cpu": cpu})}
    return {"device_map": "auto", **({"max_memory": max_memory} if max_memory else {})}


def _documents(task: str, logged: Any) -> list[int]:
    """The documents that lm-eval asked of a task. Its requests count within this list. Raises BenchmarkError when it is not ascending."""
    documents = list(dict.fromkeys(entry["doc_id"] for entry in logged))
    if documents != sorted(documents):
        raise BenchmarkError(
            f"{task}: the documents of samples= were not in ascending order ({documents[:5]} …), and lm-eval mislabels such; sort "
            "them and run again."
        )
    return documents
