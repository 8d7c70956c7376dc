"""Where the parts of a model come from: its base, an adapter or a delta, and its tokenizer. And the state of those folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from AutomaticEval.errors import ModelError
from AutomaticEval.file_states import file_states
from AutomaticEval.models.checkpoint.hub_reach import go_offline_without_hub
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.weights.adapters import Alone, adapter_alone, subfolder_of
from AutomaticEval.public_names import BUNDLED_MODELS

DEMO_FOLDER = Path(__file__).parents[2] / "demo" / "model"


class ModelSources(NamedTuple):
    """Where each part of a model comes from, as `from_pretrained` takes it: a folder's absolute path, or a hub name."""

    name: str
    """The name that was asked for."""
    base: str
    revision: str | None
    """The revision of the base model."""
    adapter: str | None
    delta: str | None
    alone: Alone | None
    """The adapter that the name itself holds, when it holds an adapter and no model; else None."""
    tokenizer: str


def sources_of(name: str, options: LoadOptions, *, ask_hub: bool = True) -> ModelSources:
    """Where the parts of a named model come from.

    ask_hub: whether to ask the hub if a name there is that of an adapter; without asking, it counts as a model's.
    Raises ModelError when a name that holds only an adapter is combined with options for another base; ModelUnavailable for an
    adapter that does not name its base.
    """
    source, delta = source_of(name), options.delta and source_of(options.delta)
    is_looked_into = ask_hub or Path(source).is_dir()
    inside = options.subfolder or subfolder_of(source, options.adapter)
    alone = adapter_alone(source, options.revision, inside) if is_looked_into else None
    if alone is None:
        if options.adapter and not options.peft and is_looked_into:
            raise ModelError(
                f"adapter={options.adapter!r}: {name!r} is a model without adapters; give peft=, the folder or hub name of these."
            )
        adapter = options.peft and source_of(options.peft)
        return ModelSources(name, source, options.revision, adapter, delta, None, source)
    if options.peft or options.delta or options.subfolder:
        raise ModelError(f"{name} is an adapter for {alone.base}; name that, and give peft={name!r}.")
    beside = str(Path(source, inside)) if inside else source
    is_there = alone.has_tokenizer and (not inside or Path(beside).is_dir())
    tokenizer = beside if is_there else alone.base
    return ModelSources(name, alone.base, alone.revision, source, None, alone, tokenizer)


def source_of(name: str) -> str:
    """What `from_pretrained` takes for a name: the absolute path of a folder, or the hub name itself."""
    if name in BUNDLED_MODELS:
        return str(DEMO_FOLDER.with_name(BUNDLED_MODELS[name]))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if not name.startswith((".", "/", "~")):
        go_offline_without_hub()
    return name


def base_arguments(sources: ModelSources, options: LoadOptions) -> dict[str, Any]:
    """The arguments with which `from_pretrained` finds and reads the files of the base."""
    inside = {"subfolder": options.subfolder} if options.subfolder else {}
    return {"revision": sources.revision, "trust_remote_code": options.trust_remote_code, **inside}


def folder_states(sources: ModelSources, options: LoadOptions) -> tuple[Any, ...]:
    """The state of the folders that a model comes from; () when all its parts come from the hub.

    A checkpoint that was trained further in its folder has another state, and so it is another model.
    """
    base = file_states(Path(sources.base, options.subfolder or ""))
    others = [file_states(Path(source)) for source in (sources.adapter, sources.delta) if source is not None]
    return (base, *others) if any(others) else base
