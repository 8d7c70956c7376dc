"""Where each site lives in a Hugging Face decoder: found from the module tree, verified on a few tokens.

Architecture knowledge is the lists of names below and nothing else. What they point at is then checked on
one small forward, so that a site that does not mean what its name says is refused, never stored.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from AutomaticEval.errors import UnsupportedModel
from AutomaticEval.models.edited import layout_of
from AutomaticEval.models.heads import HeadResultNorms
from AutomaticEval.models.probe import Probe, is_sum
from AutomaticEval.models.taps import Layout, Tap, alone_with
from AutomaticEval.sites import Site

ATTENTION = ("self_attn", "attn", "attention", "self_attention", "temporal_block")
MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
OUT_PROJECTION = ("o_proj", "out_proj", "c_proj", "dense", "wo")
DOWN_PROJECTION = ("down_proj", "c_proj", "dense_4h_to_h", "fc_out", "fc2", "w2")
POST_ATTENTION_NORM = ("post_attention_layernorm", "post_self_attn_layernorm", "post_attention_norm")
POST_MLP_NORM = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_feedforward_norm")
FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "layer_norm")
QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")


_known: weakref.WeakKeyDictionary[nn.Module, Layout] = weakref.WeakKeyDictionary()


def find_layout(model: nn.Module) -> Layout:
    """The layout of a decoder, from one forward of a few tokens; remembered as long as the model lives.

    Raises UnsupportedModel for encoder-decoders, compiled models, models in training mode, and models
    whose blocks are not found.
    """
    refuse_unready(model)
    with alone_with(model):
        if model in _known:
            return _known[model]
        while_edited: Layout | None = layout_of(model)
        if while_edited is not None:  # a forward now would show the edits
            return while_edited
        others = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        found = _Finder(model).layout()
        if not (found.missing and others):  # what others' hooks change now may hold again without them
            _known[model] = found
        return found


def refuse_unready(model: nn.Module) -> None:
    """Raises UnsupportedModel for compiled models, models in training mode, and encoder-decoders."""
    name = type(model).__name__
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise UnsupportedModel(f"{name} is compiled: hooks do not fire reliably. Pass the model before torch.compile.")
    if any(module.training for module in model.modules()):
        raise UnsupportedModel(f"{name} is in training mode: dropout changes every value. Call model.eval() first.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder; only decoders are captured.")


class _Branch(NamedTuple):
    """A candidate for what the two branches of a block add: paths below the block, and a multiplier."""

    attn: str
    mlp: str
    scale: float


class _Finder:
    """Finds the parts of one model and checks each against an identity."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
        self.blocks = self._find_blocks()
        self.taps: dict[Site, Tap] = {}
        self.missing: dict[str, str] = {}
        self.n_heads = getattr(self.config, "num_attention_heads", None) or 0  # 0: a state-space model
        self.d_model = self.config.hidden_size
        self.d_head = getattr(self.config, "head_dim", None) or self.d_model // max(self.n_heads, 1)

    def layout(self) -> Layout:
        norm = self._final_norm()
        self.probe = Probe(self.model, self._modules_to_probe(norm))
        cached = [value for value in self.probe.values if value is not None]
        self.n_kv_heads = cached[0].shape[1] if cached else self.n_heads
        first = self.names[id(self.blocks[0])]
        self.taps[Site("embed")] = Tap(first, "input")
        self.taps[Site("logits")] = Tap("", "output")
        if norm is None or self.probe.n_fired[norm] != 1:
            self.missing["final_norm"] = "no norm that is used once follows the last block"
        else:
            self.taps[Site("final_norm")] = Tap(norm, "output")
        for layer in range(len(self.blocks)):
            self._find_residual(layer, norm)
        self._find_branches()
        for layer, block in enumerate(self.blocks):
            self._find_attention(layer, block)
            self._find_mlp(layer, block)
            self._find_resid_mid(layer, block)
        embedding = self.names[id(self.model.get_input_embeddings())]
        widths = {
            site: self._value(tap).shape[-1] if tap.then is None else self.n_heads for site, tap in self.taps.items()
        }
        shape = (len(self.blocks), self.d_model, self.n_heads, self.n_kv_heads, self.d_head)
        return Layout(*shape, embedding, self.taps, widths, self.missing)

    def _find_blocks(self) -> list[nn.Module]:
        n_layers = self.config.num_hidden_layers
        lists = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList)
            and len(module) == n_layers
            and not any(part.startswith(("visual", "vision", "audio")) for part in name.split("."))
        ]
        if not lists:
            raise UnsupportedModel(
                f"{type(self.model).__name__}: no list of {n_layers} blocks in the module tree, so layers cannot be named."
            )
        return list(min(lists, key=lambda item: item[0].count("."))[1])

    def _final_norm(self) -> str | None:
        owner = self.names[id(self.blocks[0])].rsplit(".", 2)[0]
        parent = self.model.get_submodule(owner)
        norms = (name for name in FINAL_NORM if isinstance(getattr(parent, name, None), nn.Module))
        return next((f"{owner}.{name}" for name in norms), None)

    def _modules_to_probe(self, norm: str | None) -> dict[str, nn.Module]:
        modules = {"": self.model}
        if norm is not None:
            modules[norm] = self.model.get_submodule(norm)
        for block in self.blocks:
            prefix = self.names[id(block)]
            modules[prefix] = block
            modules |= {f"{prefix}.{name}": module for name, module in block.named_modules() if name}
        return modules

    def _value(self, tap: Tap) -> Tensor:
        return tap.take((self.probe.inputs if tap.end == "input" else self.probe.outputs)[tap.module])

    def _find_residual(self, layer: int, norm: str | None) -> None:
        """resid_post is read where the next part receives it, so that edits between blocks are seen."""
        here = self.names[id(self.blocks[layer])]
        last = layer == len(self.blocks) - 1
        after = norm if last else self.names[id(self.blocks[layer + 1])]
        if after is not None and self.probe.n_fired.get(after, 0) != 1:
            after = None  # a norm that is used in several places does not say where the stream is
        tap = Tap(here, "output") if after is None else Tap(after, "input")
        if not is_sum(self._value(tap), self.probe.outputs[here]):
            raise UnsupportedModel(
                f"{type(self.model).__name__}: what {after} receives is not what block {layer} returns (or it is NaN), so "
                "the residual stream cannot be named. If a hook of yours edits the stream, run once without it first."
            )
        self.taps[Site("resid_pre", layer)] = Tap(here, "input")
        self.taps[Site("resid_post", layer)] = tap

    def _named(self, parent: str, names: Iterable[str]) -> Iterator[str]:
        """Probed modules below a path whose last name is one of names, in the order of names."""
        for name in names:
            yield from (
                path for path in self.probe.outputs if path.startswith(f"{parent}.") and path.endswith(f".{name}")
            )

    def _children(self, block: str, names: Iterable[str]) -> list[str]:
        return [f"{block}.{name}" for name in names if f"{block}.{name}" in self.probe.outputs]

    def _branches(self, layer: int) -> list[_Branch]:
        """Candidates for what attention and the MLP add, the plainest first, as paths below the block."""
        block = self.names[id(self.blocks[layer])]
        attention, mlp = self._children(block, ATTENTION), self._children(block, MLP)
        attn = [*attention, *self._children(block, POST_ATTENTION_NORM)]
        attn += [path for parent in attention for path in self._named(parent, OUT_PROJECTION)]
        down = [path for parent in mlp or [block] for path in self._named(parent, DOWN_PROJECTION)]
        branch = [*mlp, *self._children(block, POST_MLP_NORM), *down]
        scale = float(getattr(self.config, "residual_multiplier", None) or 1.0)
        below = len(block) + 1
        return [_Branch(one[below:], other[below:], scale) for one in attn for other in branch]

    def _find_branches(self) -> None:
        """One choice for all blocks that are built alike: the one that the identity holds for best."""
        alike: dict[tuple[_Branch, ...], list[int]] = {}
        for layer in range(len(self.blocks)):
            alike.setdefault(tuple(self._branches(layer)), []).append(layer)
        for candidates, layers in alike.items():
            errors = {branch: self._error(branch, layers) for branch in candidates}
            best = min(errors, key=lambda branch: errors[branch], default=None)
            if best is None or errors[best] > 0.25:
                for kind in ("attn_out", "mlp_out"):
                    self.missing[kind] = (
                        f"resid_pre + attn_out + mlp_out = resid_post does not hold in block {layers[0]}, or is lost in the "
                        f"rounding of {str(self.model.dtype).removeprefix('torch.')}"
                    )
                continue
            for layer in layers:
                attn, mlp = self._branch_taps(best, layer)
                self.taps[Site("attn_out", layer)], self.taps[Site("mlp_out", layer)] = attn, mlp

    def _branch_taps(self, branch: _Branch, layer: int) -> tuple[Tap, Tap]:
        block = self.names[id(self.blocks[layer])]
        return (
            Tap(f"{block}.{branch.attn}", "output", branch.scale),
            Tap(f"{block}.{branch.mlp}", "output", branch.scale),
        )

    def _error(self, branch: _Branch, layers: list[int]) -> float:
        """Mean error of the identity over layers, in units of what is added; infinite where it does not hold at all."""
        wrong = added = 0.0
        for layer in layers:
            before = self._value(self.taps[Site("resid_pre", layer)])
            after = self._value(self.taps[Site("resid_post", layer)])
            terms = [self._value(tap) for tap in self._branch_taps(branch, layer)]
            if any(term.numel() != before.numel() for term in terms):
                return float("inf")
            terms = [term.reshape(before.shape).to(after.device) for term in terms]
            if not is_sum(after, before, *terms):
                return float("inf")
            total = sum(term.double() for term in terms)
            wrong += (after.double() - before.double().to(after.device) - total).abs().mean().item()
            added += sum(term.double().abs().mean().item() for term in terms)
        return wrong / added if added else float("inf")

    def _find_attention(self, layer: int, block: nn.Module) -> None:
        path = self.names[id(block)]
        attention = next(iter(self._children(path, ATTENTION)), None)
        if attention is None:
            self.missing |= dict.fromkeys(
                ("z", "head_result_norm", "q", "k", "v"), f"no attention module was found in block {layer}"
            )
            return
        self._find_z(layer, attention)
        self._find_qkv(layer, attention)

    def _find_z(self, layer: int, attention: str) -> None:
        """The output projection is the module whose output is what attention adds (before any norm of it)."""
        added = self.taps.get(Site("attn_out", layer))
        for path in self._named(attention, OUT_PROJECTION):
            out = self.probe.outputs[path]
            ends = [self.probe.outputs[attention], *([self.probe.outputs[added.module]] if added else [])]
            width = self.probe.inputs[path].shape[-1]
            if width == self.n_heads * self.d_head and any(is_sum(out, end) for end in ends):
                self.taps[Site("z", layer)] = Tap(path, "input")
                norms = HeadResultNorms(self.n_heads)
                self.taps[Site("head_result_norm", layer)] = Tap(path, "input", then=norms)
                return
        self.missing["z"] = self.missing["head_result_norm"] = (
            f"no output projection of {self.n_heads} heads was found in {attention}"
        )

    def _find_qkv(self, layer: int, attention: str) -> None:
        """v is checked against the KV cache; q and k are cut by the same rule."""
        cached = self.probe.values[layer] if layer < len(self.probe.values) else None
        if cached is None:
            self.missing |= dict.fromkeys("qkv", f"block {layer} keeps no values in its cache to check them against")
            return
        expected = cached.transpose(1, 2).flatten(2)  # [1, pos, n_kv_heads * d_head]
        for taps in self._qkv_candidates(attention):
            if is_sum(self._value(taps[2]), expected):
                for kind, tap in zip("qkv", taps, strict=True):
                    self.taps[Site(kind, layer)] = tap
                return
        self.missing |= dict.fromkeys("qkv", f"no projection in {attention} gives the values in the cache")

    def _qkv_candidates(self, attention: str) -> Iterator[list[Tap]]:
        separate = [next(self._named(attention, [name]), None) for name in QUERY_KEY_VALUE]
        if all(separate):
            yield [Tap(str(path), "output") for path in separate]
        wide, narrow = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        for path in self._named(attention, FUSED):
            whole = Tap(path, "output")
            if self.probe.outputs[path].shape[-1] != wide + 2 * narrow:
                continue
            ends = [0, wide, wide + narrow, wide + 2 * narrow]  # query, key, value one after the other
            yield [replace(whole, columns=tuple(range(ends[i], ends[i + 1]))) for i in range(3)]
            if wide == narrow:  # head after head: its query, key and value together
                columns = torch.arange(3 * wide).view(self.n_heads, 3, self.d_head)
                yield [replace(whole, columns=tuple(columns[:, i].flatten().tolist())) for i in range(3)]

    def _find_mlp(self, layer: int, block: nn.Module) -> None:
        path = self.names[id(block)]
        added = self.taps.get(Site("mlp_out", layer))
        for parent in self._children(path, MLP) or [path]:
            ends = [self.probe.outputs[name] for name in (parent, added.module if added else parent)]
            for down in self._named(parent, DOWN_PROJECTION):
                if any(is_sum(self.probe.outputs[down], end) for end in ends):
                    self.taps[Site("mlp_post", layer)] = Tap(down, "input")
                    return
        self.missing["mlp_post"] = (
            f"no single down projection was found in block {layer} (mixtures of experts have many)"
        )

    def _find_resid_mid(self, layer: int, block: nn.Module) -> None:
        """The input of the first part of the block that receives resid_pre + attn_out."""
        attn = self.taps.get(Site("attn_out", layer))
        if attn is None:
            self.missing["resid_mid"] = self.missing["attn_out"]
            return
        before, added = self._value(self.taps[Site("resid_pre", layer)]), self._value(attn)
        path = self.names[id(block)]
        for name, _ in block.named_children():
            value = self.probe.inputs.get(f"{path}.{name}")
            if value is None or value.numel() != before.numel():
                continue
            value = value.reshape(before.shape)
            moved = (value - before).double().abs().mean() > 0.5 * added.double().abs().mean()  # not resid_pre itself
            if moved and is_sum(value, before, added):
                self.taps[Site("resid_mid", layer)] = Tap(f"{path}.{name}", "input")
                return
        self.missing["resid_mid"] = f"nothing in block {layer} receives resid_pre + attn_out (parallel block)"
