"""What a benchmark run was asked for, kept in its folder until it is finished, so that `resume` alone goes on. Imports no heavy library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from AutomaticEval.errors import StoreError
from AutomaticEval.models.architecture.description import description_text
from AutomaticEval.public_names import BUNDLED_MODELS, absolute

MAY_BE_PATHS = ("model", "peft", "delta", "offload_folder", "project", "include_path", "tokenizer")
"""Options whose text may be a path; where there is such a path, it is kept as one that holds in every current folder."""
FILES = (".yaml", ".yml")
"""The endings of names in `benchmark` that are task files."""


def asked_for(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run as JSON holds them, by the names of the command's options; {} when one of them is no text, number or list.

    options: those that were given.
    """
    kept = {name: _anywhere(name, value) for name, value in options.items()}
    with suppress(TypeError, ValueError):
        if json.loads(json.dumps(kept)) == kept:
            return kept
    return {}


def _anywhere(name: str, value: Any) -> Any:
    """A value that means the same in every current folder."""
    if name == "model_description" and value is not None:
        return description_text(value)
    if isinstance(value, Path):
        return str(absolute(value))
    if isinstance(value, list | tuple):
        return [_anywhere(name, each) for each in value]
    if name == "benchmark" and isinstance(value, str):
        return ",".join(_file(each.strip()) for each in value.split(","))
    if name in MAY_BE_PATHS and isinstance(value, str) and value not in BUNDLED_MODELS:
        with suppress(OSError):  # a name that is too long for a path
            return str(absolute(value)) if Path(value).expanduser().exists() else value
    return value


def _file(name: str) -> str:
    return str(absolute(name)) if name.endswith(FILES) and Path(name).is_file() else name


def asked_of(folder: Path) -> dict[str, Any]:
    """The options of an unfinished run, by the names of the command's options.

    Raises StoreError for a folder that holds no run which was cut short, and for a run that does not say them: one of an earlier version, or
    one that was given a model or options which are no text.
    """
    from AutomaticEval.evaluation.run_output import RunOutput
    from AutomaticEval.store.local_paths import read_asked

    RunOutput(resume=folder)  # raises for a folder that holds no unfinished run
    asked = read_asked(folder.expanduser())
    if not asked:
        raise StoreError(
            f"{folder} does not say what it was asked for; go on with --resume and all options of the run (in code: the same call with resume=)."
        )
    return asked
