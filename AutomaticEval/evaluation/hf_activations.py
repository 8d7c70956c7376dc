"""`HFActivations`: an lm-eval model for code that calls `simple_evaluate` itself.

    lm = HFActivations("gpt2", positions="scored")
    results = simple_evaluate(model=lm, tasks=["hellaswag"])
    run = open_run(lm.finish(results))

Registered with lm-eval as `hf-activations`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from AutomaticEval.errors import BenchmarkError, StoreError, unknown_option
from AutomaticEval.evaluation.calls import Call, Request
from AutomaticEval.evaluation.folder import Keeping, RunFolder, folder_name, made_with
from AutomaticEval.evaluation.lm import CapturingHFLM
from AutomaticEval.models.loading import LoadOptions, load_model
from AutomaticEval.ranks import join_ranks, own_device
from AutomaticEval.selection import Positions, Selection
from AutomaticEval.sites import LayersLike
from AutomaticEval.store.writer import SHARD_BYTES


@register_model("hf-activations")
class HFActivations(CapturingHFLM):
    """lm-eval's `hf` model that captures what it is asked into a run folder.

    pretrained: a name, a folder, or a loaded model with tokenizer=. scoring: tree, or stock: lm-eval's own batches.
    options: of loading (dtype, device, device_map, load_in_8bit, load_in_4bit, revision) and of lm-eval's HFLM (batch_size,
    max_length, …).
    After each of lm-eval's calls what was captured is on the disk; `finish` joins it to the scores.
    Raises SelectionError, ModelError, StoreError.
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
        compression: str | None = None,
        scoring: str = "tree",
        **options: Any,
    ) -> None:
        selection = Selection.parse(sites, layers_to_capture, positions, store_dtype)
        own = inspect.signature(HFActivations).parameters
        known = dict.fromkeys([*own, *inspect.signature(HFLM).parameters, *(each.name for each in fields(LoadOptions))])
        for name in options:
            if name not in known:
                raise unknown_option(name, known)
        load = {each.name: options.pop(each.name) for each in fields(LoadOptions) if each.name in options}
        if isinstance(pretrained, str | Path):
            load["device"] = own_device(load.get("device", "auto"))
        loaded = load_model(pretrained, tokenizer=tokenizer, options=LoadOptions(**load))
        ranks = join_ranks()
        settings = {
            **made_with(loaded, selection),
            "scoring": scoring,
            "lm_eval": {name: str(value) for name, value in options.items()},
        }
        name = folder_name(["lm-eval"], loaded.name)
        keeping = Keeping(Path(activation_save_dir), compression=compression)
        super().__init__(loaded, selection, self._take, scoring=scoring, ranks=ranks, **options)
        self._folder = RunFolder(keeping, name, loaded.name, settings, SHARD_BYTES, ranks)
        self._open = ExitStack()
        self._writer = self._open.enter_context(self._folder.writing()).writer

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
        """Join what was captured to what `simple_evaluate` returned, and close the run. Returns its folder.

        results: None in the processes that lm-eval gives none.
        Raises BenchmarkError for results without samples, or of samples that were not in order; CaptureError.
        """
        if self._ranks.is_first and (results is None or not results.get("samples")):
            raise BenchmarkError("these results hold no samples; call simple_evaluate with log_samples=True.")
        self._check_open()
        samples = (results or {}).get("samples", {})
        doc_ids = {task: _asked(task, logged) for task, logged in samples.items()}
        self._open.close()
        self._folder.finish(samples, doc_ids=doc_ids, directions=(results or {}).get("higher_is_better"))
        return self.folder


def _asked(task: str, logged: Any) -> list[int]:
    """The documents that lm-eval asked of a task, in their order: its requests count within them."""
    asked = list(dict.fromkeys(entry["doc_id"] for entry in logged))
    if asked != sorted(asked):
        raise BenchmarkError(
            f"{task}: the documents of samples= were not in ascending order ({asked[:5]} …), and lm-eval mislabels such; sort "
            "them and run again."
        )
    return asked
