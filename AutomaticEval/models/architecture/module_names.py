"""The modules of one model, found by the names of its description.

`models/find_layout.py`, `branches.py` and `projections.py` check what the names point at. A reason why a site is missing speaks of "its block", so that blocks that are built alike have the same reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from AutomaticEval.errors import UnsupportedModel
from AutomaticEval.models.architecture.description import KNOWN, Description
from AutomaticEval.models.architecture.forward_call import input_of, tensor_of
from AutomaticEval.models.architecture.identities import Probe, is_sum
from AutomaticEval.models.architecture.inner_model import inner, is_compiled
from AutomaticEval.models.described.given_config import GivenConfig, text_config
from AutomaticEval.models.described.offered import not_found
from AutomaticEval.models.described.plain_module import callable_as_ours
from AutomaticEval.models.described.remembered import embedding_of
from AutomaticEval.models.layout import Tap
from AutomaticEval.sites import Site


def n_layers_in(config: Any, name: str, names: Description = KNOWN) -> int:
    """The number of layers in the config of a model's text part. Raises UnsupportedModel, with the model's name, when it has none."""
    n_layers = _first(config, names.n_layers)
    if not isinstance(n_layers, int):
        raise UnsupportedModel(
            f"{name}: its config says no number of layers ({', '.join(KNOWN.n_layers)}), so that its blocks cannot be told."
        )
    return n_layers


Kind = Literal["attention", "mixer", "mlp"]
"""What a part of a block may be. A mixer mixes tokens, and is no attention."""
OUT: dict[Kind, str] = {"attention": "attn_out", "mixer": "mixer_out", "mlp": "mlp_out"}
"""What each of them adds to the stream: a kind of site."""


class Heads(NamedTuple):
    """The heads of one layer, as the config gives them."""

    n: int
    """0 when the config names no heads, as that of a state-space model."""
    d_head: int
    d_value: int
    """The width of a head's value: d_head in most models."""


class Parts:
    """The blocks of one model with their modules, one small forward over it, and the taps that the rules have found so far.

    model: the model as people call it; paths begin at its inner model. Raises UnsupportedModel when its blocks are not found, or do not run
    once in a forward.
    """

    def __init__(self, model: Any, names: Description = KNOWN) -> None:
        self.model = inner(model)
        self.names = names
        self.name = type(self.model).__name__
        self.config: Any = GivenConfig(text_config(self.model), names)
        self.taps: dict[Site, Tap] = {}
        """The sites that were found."""
        self.missing: dict[Site, str] = {}
        """The sites that were not found, and why."""
        self.notes: dict[str, str] = {}
        """Kind -> what has to be said of it."""
        self.n_streams = 1
        """How many residual streams the blocks hand on."""
        self.n_heads: dict[Site, int] = {}
        """How many heads a row holds, of the sites with heads that were found."""
        self._names = {id(module): name for name, module in self.model.named_modules(remove_duplicate=False)}
        self._within: dict[str, list[str]] = {}
        """Module -> the paths of all modules in it that the probe saw, so that names are not looked up among all modules of the model."""
        self.blocks = self._find_blocks()
        """The paths of the blocks, in the order of the layers."""
        self._refuse_compiled(self.blocks)
        self.owner = self.blocks[0].rsplit(".", 2)[0] if self.blocks[0].count(".") > 1 else ""
        """The path of the module that holds the list of blocks."""
        parent = self.model.get_submodule(self.owner)
        given = self.described_module("final_norm")
        norms = [name for name in names.final_norm if isinstance(getattr(parent, name, None), nn.Module)]
        self._norms = [f"{self.owner}.{name}".strip(".") for name in norms] if given is None else [given]
        self.lm_head = self.described_module("lm_head")
        """The path of what gives the logits; None when they are what the model returns."""
        self.embedding = self._find_embedding()
        self.head = self._find_head()
        """The path of the unembedding; None when the model does not name one."""
        modules = {path: self.model.get_submodule(path) for path in self._to_probe()}
        with_experts = (*names.router, *names.experts)
        in_full = {path for path in modules if path.rpartition(".")[2] in with_experts}
        self.probe = Probe(callable_as_ours(model), modules, in_full)
        self.ran = [self.probe.n_fired[block] == 1 for block in self.blocks]
        """For each block, whether it runs when the input is text alone."""
        self.norm = self._find_norm()
        """The path of the final norm: the one that is given what the last block gives, or else the first of a known name. None without any."""
        self._refuse_other_runs(type(model).__name__)

    def _refuse_other_runs(self, wrapper: str) -> None:
        """Raises UnsupportedModel when the model or a block did not run once in the small forward. wrapper: the class of what people call."""
        if self.probe.n_fired[""] != 1:
            raise UnsupportedModel(
                f"a forward of {wrapper} runs its {self.name} {self.probe.n_fired['']} times; once was expected. Another version "
                f"of what wraps it may do so, or pass the {self.name} itself."
            )
        times = [self.probe.n_fired[block] for block in self.blocks]
        if max(times) != 1:
            raise UnsupportedModel(
                f"{self.name}: in a forward the blocks of {self.blocks[0].rpartition('.')[0]} run {times} times; once was expected, so that a "
                "token has one row of each."
            )

    def _find_blocks(self) -> list[str]:
        path = self.described_module("blocks")
        if path is not None and len(self.names.blocks) > 1:  # the blocks themselves
            return [self.described_module("blocks", each) or "" for each in self.names.blocks]
        if path is not None:
            described = [f"{path}.{name}" for name, _ in self.model.get_submodule(path).named_children()]
            if not described:
                raise not_found(self.model, self.names, f"{path} of {self.name} (blocks) holds no modules")
            return described
        try:
            n_layers = n_layers_in(self.config, self.name, self.names)
        except UnsupportedModel as error:
            raise not_found(self.model, self.names, str(error).rstrip(".")) from None
        lists = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList)
            and len(module) == n_layers
            and not any(part.startswith(("visual", "vision", "audio")) for part in name.split("."))
        ]
        if not lists:
            raise not_found(
                self.model,
                self.names,
                f"{self.name}: no list of {n_layers} blocks in the module tree, so layers cannot be named",
            )
        return [self._names[id(block)] for block in min(lists, key=lambda item: item[0].count("."))[1]]

    def _refuse_compiled(self, blocks: list[str]) -> None:
        """Raises UnsupportedModel when something that holds the blocks is compiled."""
        for above in self._above(blocks[0]):
            if is_compiled(self.model.get_submodule(above)):
                raise UnsupportedModel(
                    f"{above or self.name} of {self.name} is compiled: hooks on the blocks in it fire only by chance. Pass the model before "
                    "torch.compile, or compile block by block."
                )

    def described_module(self, what: str, *paths: str) -> str | None:
        """The path of a part of the model that a person has described. None for one that nobody has described. Raises UnsupportedModel."""
        if what not in self.names.given:
            return None
        paths = paths or getattr(self.names, what)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        path = next((each for each in paths if each in modules), None)
        if path is None:
            raise not_found(
                self.model, self.names, f"{self.name} has no module {' or '.join(paths)} ({what})", paths[0]
            )
        return str(path)

    def _find_norm(self) -> str | None:
        last = next((block for block, ran in zip(self.blocks[::-1], self.ran[::-1], strict=True) if ran), "")
        gave, given = self.probe.outputs.get(last), self.probe.inputs
        right = (norm for norm in self._norms if gave is not None and norm in given and is_sum(given[norm], gave))
        return next(right, next(iter(self._norms), None))

    def _find_embedding(self) -> str:
        path = self.described_module("embedding")
        if path is not None:
            if not hasattr(self.model.get_submodule(path), "weight"):
                raise not_found(self.model, self.names, f"{path} of {self.name} (embedding) has no weight")
            return path
        try:
            return str(self._names[id(embedding_of(self.model))])
        except (NotImplementedError, AttributeError, KeyError):
            raise not_found(
                self.model,
                self.names,
                f"{self.name}: get_input_embeddings gives no module of it (embedding), so that which tokens are fed cannot be seen",
            ) from None

    def _find_head(self) -> str | None:
        try:
            return self._names.get(id(self.model.get_output_embeddings()))
        except (NotImplementedError, AttributeError):
            return None

    def _to_probe(self) -> Iterator[str]:
        yield from ("", self.embedding, *self.blocks)
        yield from self._norms
        if self.owner:
            yield self.owner
        yield from (path for path in (self.head, self.lm_head) if path is not None)
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

    def config_of(self, layer: int) -> Any:
        """The config of a layer: that of the whole model does not have what differs among layers (Gemma 4)."""
        return self.config.per_layer_config[layer] if getattr(self.config, "is_heterogeneous", False) else self.config

    def setting(self, layer: int, names: Iterable[str]) -> Any:
        """The value of a layer's config under the first of some names, which may be dotted; None when it has none of them."""
        return _first(self.config_of(layer), names)

    def heads(self, layer: int) -> Heads:
        """The heads of a layer, as the config gives them."""
        n_heads = self.setting(layer, self.names.n_heads)
        n_heads = n_heads if isinstance(n_heads, int) else 0
        d_head = self.setting(layer, self.names.d_head) or self.d_model // max(n_heads, 1)
        return Heads(n_heads, d_head, self.setting(layer, self.names.d_value) or d_head)

    def rows(self, tap: Tap) -> Tensor:
        """What a tap takes in the small forward: [1, pos, width], also of modules that flatten batch and positions."""
        return self.value(tap).reshape(*self.probe.ids.shape, -1)

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.probe.inputs[self.blocks[self.ran.index(True)]].shape[-1]

    def cached(self, layer: int, what: str = "values") -> Tensor | None:
        """The values, or the keys, that a layer keeps in the cache for its heads: [1, n_kv_heads, pos, d_head]. None when it keeps something else."""
        cached: list[Tensor | None] = getattr(self.probe, what)
        own = cached[layer] if layer < len(cached) else None
        n_pos = self.probe.ids.shape[1]
        return own if isinstance(own, Tensor) and own.dim() == 4 and own.shape[2] == n_pos else None

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
        if tap.earlier:
            return tap.take(tap.summed([self.probe.outputs[path] for path in (*tap.earlier, tap.module)]))
        value = (self.probe.inputs if tap.end == "input" else self.probe.outputs)[tap.module]
        return tap.take(tap.joined(tap.stream_of(value)))

    def named(self, parent: str, names: Iterable[str]) -> Iterator[str]:
        """The paths of the modules within parent, at any depth, whose own name is one of names; in the order of names."""
        if parent not in self._within:
            self._within[parent] = [path for path in self.probe.outputs if path.startswith(f"{parent}.")]
        for name in names:
            yield from (path for path in self._within[parent] if path.endswith(f".{name}"))

    def children(self, block: str, names: Iterable[str]) -> list[str]:
        """The paths of a block's direct children that have one of these names; in the order of names."""
        return [f"{block}.{name}" for name in names if f"{block}.{name}" in self.probe.outputs]

    def parts_of(self, layer: int, kind: Kind) -> list[str]:
        """The paths below a layer's block of what may be its attention, another mixer, or its MLP."""
        names = (*self.names.attention, *self.names.any_mixer, *self.names.mixer, *self.names.mlp)
        return [path for path in self.children(self.blocks[layer], names) if self._kind(layer, path) == kind]

    def attention(self, layer: int) -> str | None:
        """The path of what a layer's block calls attention, whether it is one or another mixer with heads; None without any."""
        named = self.children(self.blocks[layer], self.names.attention)
        return next(iter([*named, *self.parts_of(layer, "attention")]), None)

    def _kind(self, layer: int, path: str) -> Kind:
        """What a part of a block is: by its name, by the type that the config gives its layer, and by the name of its class."""
        name, names = self.below(layer, path), self.names
        if name in names.mlp:
            return "mlp"
        types = _first(self.config, names.layer_types)
        of_layer = str(types[layer]) if isinstance(types, list | tuple) and layer < len(types) else ""
        if name in names.any_mixer and of_layer in names.mlp_types:
            return "mlp"
        of_class = type(self.model.get_submodule(path)).__name__.lower()
        is_other = of_layer in names.mixer_types or any(part in of_class for part in names.mixer_classes)
        is_attention = name in names.attention or (name in names.any_mixer and "attention" in of_layer)
        return "attention" if is_attention and not is_other else "mixer"

    def scales(self, layer: int, kind: Kind) -> list[float]:
        """What the model may multiply by that a part of a block adds: the numbers of known names that its block or the config has, and 1."""
        block, names = self.model.get_submodule(self.blocks[layer]), self.names
        if "residual_multiplier" in names.given:
            return [float(self.config.residual_multiplier)]
        of_kind = {"attention": names.attention_scale, "mixer": names.mixer_scale, "mlp": ()}[kind]
        given = [getattr(each, name, None) for name in (*of_kind, *names.scale) for each in (block, self.config)]
        depths = [getattr(self.config, name, None) for name in names.depth_scale]
        given += [depth / len(self.blocks) ** 0.5 for depth in depths if isinstance(depth, int | float)]
        numbers = [float(each) for each in given if isinstance(each, int | float) and each]
        return list(dict.fromkeys([*numbers, 1.0]))

    def found(self, kind: str, layer: int, tap: Tap, n_heads: int) -> None:
        """Add the tap of a site whose rows hold n_heads heads."""
        self.taps[Site(kind, layer)], self.n_heads[Site(kind, layer)] = tap, n_heads

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
    return next((value for name in names if (value := _dotted(config, name)) is not None), None)


def _dotted(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part, None)
    return config
