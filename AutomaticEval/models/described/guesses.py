"""What names, classes and shapes tell of the parts of a model that is not known. A guess is a proposal to a person, and is never used by itself."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import nn

NO_TEXT = ("visual", "vision", "audio")
"""What parts of a path begin with, of modules that do not read text."""
MOST_NUMBERS = 24
"""Numbers of a config that are shown."""
SIGNS = {
    "attention": ("attn", "attention", "mixer", "mix"),
    "mlp": ("mlp", "feed", "ffn", "ff", "moe", "experts"),
}
"""What names and classes of such modules have in them."""
BACK = ("o_", "out", "wo", "proj", "c_proj", "dense", "down")
"""What the names of projections back into the stream begin with."""
ENDINGS = {"q": ("q", "query"), "k": ("k", "key"), "v": ("v", "value")}
"""What the names of projections begin or end with."""


class Blocks(NamedTuple):
    """A list of modules of one class."""

    path: str
    modules: list[nn.Module]

    def __str__(self) -> str:
        first = self.modules[0]
        children = ", ".join(name for name, _ in first.named_children()) or "no modules"
        return f"{self.path}: {len(self.modules)} {type(first).__name__} ({children})"


def lists_of(model: nn.Module) -> list[Blocks]:
    """The lists of at least two modules of one class that have modules in them: those of text before others, outer before inner ones, long before short."""
    found: list[Blocks] = []
    for path, module in model.named_modules():
        modules = list(module.children())
        if path and len(modules) > 1 and len({type(each) for each in modules}) == 1 and list(modules[0].children()):
            found.append(Blocks(path, modules))

    def place(blocks: Blocks) -> tuple[bool, bool, int]:
        is_other = any(part.startswith(NO_TEXT) for part in blocks.path.split("."))
        is_inner = any(blocks.path.startswith(f"{each.path}.") for each in found)
        return is_other, is_inner, -len(blocks.modules)

    return sorted(found, key=place)


def guesses_of(model: nn.Module, lists: list[Blocks]) -> dict[str, Any]:
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
    return guesses | _in_block(blocks.modules[0]) | _numbers(model)


def _in_block(block: nn.Module) -> dict[str, Any]:
    """The parts of a block."""
    guesses: dict[str, Any] = {}
    width = _width(block)
    for part, signs in SIGNS.items():
        name = _branch(block, signs)
        if name is None:
            continue
        guesses[part] = name
        matrices: dict[str, Any] = {
            path: each.weight for path, each in block.get_submodule(name).named_modules() if _is_matrix(each)
        }
        back = [path for path, weight in matrices.items() if width in weight.shape and "gate" not in path]
        back = [path for path in back if path.rpartition(".")[2].lower().startswith(BACK)] or back
        if back:
            guesses["out_projection" if part == "attention" else "down_projection"] = back[-1]
        if part == "attention":
            guesses |= _projections([path for path in matrices if path not in back[-1:]])
    return guesses


def _branch(block: nn.Module, signs: tuple[str, ...]) -> str | None:
    """The one child of a block whose name has one of the signs in it; or else the one whose class has."""
    children = [(name, type(each).__name__) for name, each in block.named_children() if not _is_norm(name, each)]
    for which in (0, 1):
        named = [child[0] for child in children if any(sign in child[which].lower() for sign in signs)]
        if len(named) == 1:
            return named[0]
    return None


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


def config_numbers(model: nn.Module) -> str:
    """The whole numbers in a model's config, but for those of tokens."""
    numbers = [
        f"{name}={value}" for name, value in _entries(model).items() if type(value) is int and "token" not in str(name)
    ]
    return ", ".join(numbers[:MOST_NUMBERS])


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
