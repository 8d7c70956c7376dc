"""The modules of one model, found by the names of its description.

`models/find_layout.py`, `branches.py` and `projections.py` check what the names point at. A reason why a site is missing speaks of "its block", so that blocks that are built alike have the same reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from AutomaticEval.errors import UnsupportedModel
from AutomaticEval.models.architecture.description import KNOWN, Description
from AutomaticEval.models.architecture.forward_call import input_of, tensor_of
from AutomaticEval.models.architecture.identities import Probe
from AutomaticEval.models.architecture.inner_model import inner, is_compiled
from AutomaticEval.models.layout import Tap
from AutomaticEval.sites import Site


def n_layers_in(config: Any, name: str) -> int:
    """The number of layers in the config of a model's text part. Raises UnsupportedModel, with the model's name, when it has none."""
    n_layers = _first(config, KNOWN.n_layers)
    if not isinstance(n_layers, int):
        raise UnsupportedModel(
            f"{name}: its config says no number of layers ({', '.join(KNOWN.n_layers)}), so that its blocks cannot be told."
        )
    return n_layers


class Heads(NamedTuple):
    """The heads of one layer, as the config gives them."""

    n: int
    """0 when the config names no heads, as that of a state-space model."""
    d_head: int


class Parts:
    """The blocks of one model with their modules, one small forward over it, and the taps that the rules have found so far.

    model: the model as people call it; paths begin at its inner model. Raises UnsupportedModel when its blocks are not found, or do not run
    once in a forward.
    """

    def __init__(self, model: Any, names: Description = KNOWN) -> None:
        self.model = inner(model)
        self.names = names
        self.name = type(self.model).__name__
        self.config = self.model.config.get_text_config()
        self.taps: dict[Site, Tap] = {}
        """The sites that were found."""
        self.missing: dict[Site, str] = {}
        """The sites that were not found, and why."""
        self._names = {id(module): name for name, module in self.model.named_modules(remove_duplicate=False)}
        self.blocks = self._find_blocks()
        """The paths of the blocks, in the order of the layers."""
        self.owner = self.blocks[0].rsplit(".", 2)[0] if self.blocks[0].count(".") > 1 else ""
        """The path of the module that holds the list of blocks."""
        self.norm = self._find_norm()
        """The path of the final norm; None when there is none of a known name."""
        self.embedding = self._find_embedding()
        modules = {path: self.model.get_submodule(path) for path in self._to_probe()}
        with_experts = (*names.router, *names.experts)
        self.probe = Probe(model, modules, {path for path in modules if path.rpartition(".")[2] in with_experts})
        self.ran = [self.probe.n_fired[block] == 1 for block in self.blocks]
        """For each block, whether it runs when the input is text alone."""
        if self.probe.n_fired[""] != 1:
            raise UnsupportedModel(
                f"a forward of {type(model).__name__} runs its {self.name} {self.probe.n_fired['']} times; once was expected. Another version "
                f"of what wraps it may do so, or pass the {self.name} itself."
            )
        times = [self.probe.n_fired[block] for block in self.blocks]
        if max(times) != 1:
            raise UnsupportedModel(
                f"{self.name}: in a forward the blocks of {self.blocks[0].rpartition('.')[0]} run {times} times; once was expected, so that a "
                "token has one row of each."
            )

    def _find_blocks(self) -> list[str]:
        n_layers = n_layers_in(self.config, self.name)
        lists = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList)
            and len(module) == n_layers
            and not any(part.startswith(("visual", "vision", "audio")) for part in name.split("."))
        ]
        if not lists:
            raise UnsupportedModel(
                f"{self.name}: no list of {n_layers} blocks in the module tree, so layers cannot be named."
            )
        blocks = [self._names[id(block)] for block in min(lists, key=lambda item: item[0].count("."))[1]]
        for above in self._above(blocks[0]):
            if is_compiled(self.model.get_submodule(above)):
                raise UnsupportedModel(
                    f"{above or self.name} of {self.name} is compiled: hooks on the blocks in it fire only by chance. Pass the model before "
                    "torch.compile, or compile block by block."
                )
        return blocks

    def _find_norm(self) -> str | None:
        parent = self.model.get_submodule(self.owner)
        norms = (name for name in self.names.final_norm if isinstance(getattr(parent, name, None), nn.Module))
        return next((f"{self.owner}.{name}".strip(".") for name in norms), None)

    def _find_embedding(self) -> str:
        try:
            path: str = self._names[id(self.model.get_input_embeddings())]
        except (NotImplementedError, KeyError):
            raise UnsupportedModel(
                f"{self.name}: get_input_embeddings gives no module of it, so that which tokens are fed cannot be seen."
            ) from None
        return path

    def _to_probe(self) -> Iterator[str]:
        yield from ("", self.embedding, *self.blocks)
        if self.norm is not None:
            yield self.norm
        for block in self.blocks:
            below = (f"{block}.{name}" for name, _ in self.model.get_submodule(block).named_modules() if name)
            yield from (path for path in below if self._compiled_around(path, block) is None)

    @staticmethod
    def _above(path: str) -> list[str]:
        """The paths of the modules that hold a module, the model first."""
        parts = path.split(".")
        return [".".join(parts[:end]) for end in range(len(parts))]

    def _compiled_around(self, path: str, block: str) -> str | None:
        """The path of the outermost compiled module, from a block inwards, that holds a module of the block. None without any."""
        within = (above for above in self._above(path) if above == block or above.startswith(f"{block}."))
        return next((above for above in within if is_compiled(self.model.get_submodule(above))), None)

    def heads(self, layer: int) -> Heads:
        """The heads of a layer, as the config gives them."""
        config = self.config
        if getattr(
            config, "is_heterogeneous", False
        ):  # the config of the whole model does not have what differs among layers
            config = config.per_layer_config[layer]
        n_heads = _first(config, self.names.n_heads)
        n_heads = n_heads if isinstance(n_heads, int) else 0
        return Heads(n_heads, getattr(config, "head_dim", None) or self.d_model // max(n_heads, 1))

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.probe.inputs[self.blocks[self.ran.index(True)]].shape[-1]

    def cached(self, layer: int) -> Tensor | None:
        """The values that a layer keeps in the cache: [1, n_kv_heads, pos, d_head]."""
        return self.probe.values[layer] if layer < len(self.probe.values) else None

    def value(self, tap: Tap) -> Tensor:
        """What a tap takes in the small forward: [1, pos, width]."""
        if tap.elements:
            call = self.probe.calls[tap.module]
            seen = (
                input_of(call.args, dict(call.kwargs), tap.elements)
                if tap.end == "input"
                else tensor_of(call.output, tap.elements)
            )
            assert seen is not None
            return tap.take(seen)
        return tap.take((self.probe.inputs if tap.end == "input" else self.probe.outputs)[tap.module])

    def named(self, parent: str, names: Iterable[str]) -> Iterator[str]:
        """The paths of the modules within parent, at any depth, whose own name is one of names; in the order of names."""
        for name in names:
            yield from (
                path for path in self.probe.outputs if path.startswith(f"{parent}.") and path.endswith(f".{name}")
            )

    def children(self, block: str, names: Iterable[str]) -> list[str]:
        """The paths of a block's direct children that have one of these names; in the order of names."""
        return [f"{block}.{name}" for name in names if f"{block}.{name}" in self.probe.outputs]

    def lack(self, kinds: Iterable[str], layer: int, reason: str) -> None:
        """Say that a layer lacks sites of these kinds. The reason speaks of "its block", with paths below the block."""
        self.missing |= {Site(kind, layer): reason for kind in kinds}

    def below(self, layer: int, path: str) -> str:
        """A path within a layer's block, without the block's own path."""
        return path[len(self.blocks[layer]) + 1 :] or "its block"

    def described(self, path: str) -> str:
        """The children of a module, with their classes."""
        children = [
            f"{name} ({type(module).__name__})" for name, module in self.model.get_submodule(path).named_children()
        ]
        return ", ".join(children) or "none"

    def why(self, layer: int, path: str, otherwise: str) -> str:
        """Why something was not found in a module of a block: the module is compiled, or else the reason `otherwise`."""
        block = self.blocks[layer]
        within = (f"{path}.{name}".rstrip(".") for name, _ in self.model.get_submodule(path).named_modules())
        compiled = self._compiled_around(f"{path}.", block) or next(
            (each for each in within if is_compiled(self.model.get_submodule(each))), None
        )
        if compiled is None:
            return otherwise
        return f"{self.below(layer, compiled)} is compiled, and hooks within what is compiled fire only by chance; capture before torch.compile"

    def no_child(self, layer: int, what: str, names: Sequence[str]) -> str:
        """The reason that a block has no child of these names. what: what such a child is."""
        block = self.blocks[layer]
        return self.why(
            layer,
            block,
            f"no {what} ({', '.join(names)}) was found in its block, whose parts are {self.described(block)}",
        )


def _first(config: Any, names: Iterable[str]) -> Any:
    """The value of a config under the first of some names that it has; None when it has none of them."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
