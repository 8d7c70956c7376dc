"""What a module tree offers where parts were not found, and the description to complete, with what can be guessed filled in.

A guess is never believed by itself: it becomes a part of a description only when a person gives it, and then the identities decide.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from AutomaticEval.errors import UnsupportedModel, did_you_mean
from AutomaticEval.models.architecture.description import KEYS, KNOWN, NUMBERS, Description

MOST_SHOWN = 4
"""Lists of blocks, and lines of a block's tree, that a message names. A description to complete shows four times as many."""
SIGNS = {
    "attention": ("attn", "attention", "mixer", "mix"),
    "mlp": ("mlp", "feed", "ffn", "ff", "moe", "experts"),
}
"""What names and classes of such modules have in them."""
BACK = ("o_", "out", "wo", "proj", "c_proj", "dense", "down")
"""What the names of projections back into the stream begin with."""
ENDINGS = {"q": ("q", "query"), "k": ("k", "key"), "v": ("v", "value")}
"""What the names of projections begin or end with."""


class _Blocks(NamedTuple):
    """A list of modules of one class."""

    path: str
    modules: list[nn.Module]

    def __str__(self) -> str:
        first = self.modules[0]
        children = ", ".join(name for name, _ in first.named_children()) or "no modules"
        return f"{self.path}: {len(self.modules)} {type(first).__name__} ({children})"


def not_found(model: nn.Module, names: Description, what: str, path: str = "") -> UnsupportedModel:
    """The error for a part that was not found. what: a sentence without its full stop. path: the described path that is not there.

    Its note is the description to complete.
    """
    near = did_you_mean(path, [name for name, _ in model.named_modules() if name]) if path else ""
    lists = _lists(model)
    offers = "; ".join(map(str, lists[:MOST_SHOWN])) + (" …" if len(lists) > MOST_SHOWN else "")
    error = UnsupportedModel(
        f"{what}.{near} Lists of blocks in it: {offers or 'none'}. Describe its parts: describe_model(model, blocks=…), or --model_description FILE "
        "with what follows."
    )
    error.add_note(to_complete(model, names))
    return error


def to_complete(model: nn.Module, names: Description = KNOWN) -> str:
    """A TOML description of a model: what a person has said, what can be guessed, and comments that say what to choose from."""
    lists = _lists(model)
    guesses = _guesses(model, lists)
    guesses |= {name: value for name, value in names.said() if name in guesses or name in KEYS}
    lines = [
        f"# {type(model).__name__}: complete these lines, save them as model.toml, and give --model_description model.toml."
    ]
    lines.append(
        "# Paths from the model: blocks, embedding, final_norm, lm_head. All other names are those within a block."
    )
    if lists:
        lines += ["# Lists of blocks:", *(f"#   {each}" for each in lists[: 2 * MOST_SHOWN])]
        lines += ["# A block:", *(f"#   {line}" for line in _tree(lists[0].modules[0]))]
    if numbers := _config_numbers(model):
        lines.append(f"# Numbers in its config: {numbers}")
    for key in (
        "blocks",
        "embedding",
        "final_norm",
        *(each for each in KEYS if each not in ("blocks", "embedding", "final_norm")),
    ):
        if key in guesses:
            lines.append(f"{key} = {json.dumps(guesses[key], ensure_ascii=False)}")
        elif key in _WANTED and not (key in ENDINGS and "qkv" in guesses):
            lines.append(f"# {key} = {'0' if key in NUMBERS else _EMPTY}")
    return "\n".join(lines)


_WANTED = (
    "blocks",
    "embedding",
    "final_norm",
    "attention",
    "out_projection",
    "mlp",
    "down_projection",
    "q",
    "k",
    "v",
    "n_heads",
)
"""The parts that a description shows even when nothing could be guessed."""
_EMPTY = '""'


def _lists(model: nn.Module) -> list[_Blocks]:
    """The lists of at least two modules of one class that have modules in them, the longest first; of equal ones the outermost."""
    found = []
    for path, module in model.named_modules():
        modules = list(module.children())
        if path and len(modules) > 1 and len({type(each) for each in modules}) == 1 and list(modules[0].children()):
            found.append(_Blocks(path, modules))
    return sorted(found, key=lambda each: (-len(each.modules), each.path.count(".")))


def _tree(block: nn.Module) -> Iterator[str]:
    """The modules in a block, a line each, with the shapes of their weights."""
    lines = [
        f"{name} ({type(module).__name__}{''.join(f' {list(each.shape)}' for _, each in _own_weight(module))})"
        for name, module in block.named_modules()
        if name
    ]
    yield from lines[: 6 * MOST_SHOWN]
    if len(lines) > 6 * MOST_SHOWN:
        yield f"… and {len(lines) - 6 * MOST_SHOWN} more"


def _own_weight(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, each) for name, each in module.named_parameters(recurse=False) if name == "weight"]


def _guesses(model: nn.Module, lists: list[_Blocks]) -> dict[str, Any]:
    """Part -> a name, of those that names, classes and shapes tell."""
    guesses: dict[str, Any] = {}
    embedding = _embedding(model)
    if embedding is not None:
        guesses["embedding"] = embedding
    if not lists:
        return guesses
    blocks = lists[0]
    guesses["blocks"] = blocks.path
    above = blocks.path.rpartition(".")[0]
    vectors = {type(each) for each in blocks.modules[0].modules() if _holds_vectors(each)}
    siblings = list(model.get_submodule(above).named_children())
    beside = [name for name, each in siblings if _is_norm(name, each) or type(each) in vectors]
    if beside:
        guesses["final_norm"] = f"{above}.{beside[-1]}".strip(".")
    block = blocks.modules[0]
    width = _width(block)
    for part, signs in SIGNS.items():
        named = [name for name, each in block.named_children() if _has(signs, name, each) and not _is_norm(name, each)]
        if len(named) != 1:
            continue
        guesses[part] = named[0]
        inside = [
            (name, each.weight.shape)
            for name, each in block.get_submodule(named[0]).named_modules()
            if _is_matrix(each)
        ]
        back = [name for name, shape in inside if width in shape]
        back = [name for name in back if name.rpartition(".")[2].lower().startswith(BACK)] or back
        if back:
            guesses["out_projection" if part == "attention" else "down_projection"] = back[-1]
        if part == "attention":
            guesses |= _projections([name for name, _ in inside if name not in back[-1:]])
    return guesses | _numbers(model)


def _embedding(model: nn.Module) -> str | None:
    """The embedding that has a row for each logit of some projection, or else the largest one."""
    sizes = {each.out_features for each in model.modules() if isinstance(each, nn.Linear)}
    embeddings = [
        (each.num_embeddings in sizes, each.num_embeddings, name)
        for name, each in model.named_modules()
        if isinstance(each, nn.Embedding)
    ]
    return max(embeddings)[2] if embeddings else None


def _projections(names: list[str]) -> dict[str, str]:
    """q, k and v, when their names tell them, or the one projection that is all of them."""
    own = {name: name.rpartition(".")[2].lower() for name in names}
    told = {
        part: [name for name, last in own.items() if last.startswith(ends) or last.endswith(ends)]
        for part, ends in ENDINGS.items()
    }
    if all(len(found) == 1 for found in told.values()) and len({found[0] for found in told.values()}) == 3:
        return {part: found[0] for part, found in told.items()}
    return {"qkv": names[0]} if len(names) == 1 else {}


def _numbers(model: nn.Module) -> dict[str, Any]:
    """n_heads, when one entry of the config alone is called so."""
    entries = _entries(model)
    heads = [name for name, value in entries.items() if "head" in str(name).lower() and type(value) is int]
    heads = [name for name in heads if not any(sign in name.lower() for sign in ("kv", "key", "dim", "size"))]
    return {"n_heads": heads[0]} if len(heads) == 1 else {}


def _config_numbers(model: nn.Module) -> str:
    """The whole numbers in a model's config, but for those of tokens."""
    numbers = [
        f"{name}={value}" for name, value in _entries(model).items() if type(value) is int and "token" not in str(name)
    ]
    return ", ".join(numbers[: 6 * MOST_SHOWN])


def _entries(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return config if isinstance(config, dict) else getattr(config, "__dict__", {})


def _width(block: nn.Module) -> int | None:
    """The width of the stream: the size that most matrices of a block share."""
    shapes: list[Any] = [each.weight.shape for each in block.modules() if _is_matrix(each)]
    sizes = Counter(size for shape in shapes for size in set(shape))
    return sizes.most_common(1)[0][0] if sizes else None


def _holds_vectors(module: nn.Module) -> bool:
    """Whether a module has weights, all of one dimension, as a norm has."""
    weights = list(module.parameters())
    return bool(weights) and not list(module.children()) and all(each.dim() == 1 for each in weights)


def _is_matrix(module: Any) -> bool:
    return getattr(getattr(module, "weight", None), "dim", lambda: 0)() == 2 and not isinstance(module, nn.Embedding)


def _is_norm(name: str, module: nn.Module) -> bool:
    return any(
        "norm" in each or each.startswith(("ln", "rms")) for each in (name.lower(), type(module).__name__.lower())
    )


def _has(signs: tuple[str, ...], name: str, module: nn.Module) -> bool:
    return any(sign in f"{name} {type(module).__name__}".lower() for sign in signs)
