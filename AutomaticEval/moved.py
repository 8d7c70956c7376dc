"""Old names of modules that have moved: importing one gives the module under its new name, and warns.

Kept are the names that documents gave, and those of the modules that public names come from.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

MOVED = {
    "AutomaticEval.analysis.compare": "AutomaticEval.analysis.heads.compare",
    "AutomaticEval.analysis.strength": "AutomaticEval.analysis.heads.strength",
    "AutomaticEval.capture.asking": "AutomaticEval.capture.prompt",
    "AutomaticEval.capture.continuations": "AutomaticEval.capture.tree.continuations",
    "AutomaticEval.capture.features": "AutomaticEval.capture.texts.features",
    "AutomaticEval.capture.recompute.run": "AutomaticEval.capture.recompute.recomputed_run",
    "AutomaticEval.evaluation.extraction": "AutomaticEval.evaluation.parse_answer",
    "AutomaticEval.evaluation.hf_activations": "AutomaticEval.evaluation.for_simple_evaluate",
    "AutomaticEval.evaluation.questions": "AutomaticEval.evaluation.question",
    "AutomaticEval.store.lens": "AutomaticEval.store.export.transformer_lens",
}


class OldNames:
    """Is asked for a module after all other finders, and knows those of MOVED."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, cast("Any", _Loader())) if name in MOVED else None


class _Loader:
    """Gives the very module that has the new name, so that its classes and its settings are there once.

    It is no `importlib.abc.Loader`, whose import takes longer than all else here.
    """

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} has moved; import {new}", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # importing has put the old name there


def keep_old_names() -> None:
    """Once a process."""
    if not any(isinstance(each, OldNames) for each in sys.meta_path):
        sys.meta_path.append(OldNames())
