"""A hash of everything that a model computes with: every number of its parameters and persistent buffers, and the state of its adapters.

The hash multiplies and adds whole numbers modulo 2**64 on the device of the weights, so that it depends neither on the device, nor on the
number of threads, nor on the order of additions. Buffers that a checkpoint does not hold are left out, because forwards rewrite some of
them. Offloaded weights are read through the hooks of accelerate; 4-bit weights are read in an order that running the model does not change.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from AutomaticEval.errors import ModelError
from AutomaticEval.models.architecture.inner_model import is_passed_by

BLOCK_WORDS = 2**15
"""Words of 8 bytes that are added up to one pair of sums. Torch does not divide so few among threads, which would have to wait for each other."""
BLOCKS_AT_ONCE = {"cpu": 64, "cuda": 512}
"""The blocks of one thread (cpu) or of one kernel (cuda)."""
PACKED_ROWS = 32
"""Rows of 4-bit codes that bitsandbytes interleaves for CPUs with bfloat16 instructions."""
SAMPLED_NUMBERS = 64


def fingerprint(model: nn.Module) -> str:
    """A hash of a model, 32 hexadecimal digits. Two models have the same hash when all their numbers are the same.

    A change within 4 bytes that lie together always changes the hash; any other change is missed with a chance of 2**-32 at most. The scales
    of 4-bit weights count as rounded to bfloat16, because running the model rounds them. Tied weights are hashed once, and give the same hash
    as equal weights that are not tied. Raises ModelError for a weight whose numbers are nowhere.
    """
    seen: dict[Any, str] = {}
    # one tensor after another: all weights of an offloaded model together may not fit into memory
    lines = sorted(f"{name} {_hashed(tensor, seen)}" for name, tensor in _numbers(model))
    lines += _adapter_lines(model) + _scheme_lines(model)
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def sampled_fingerprint(model: nn.Module) -> str:
    """The older hash, of the first 64 numbers of each weight, for the comparison with runs that hold no other hash."""
    digest = hashlib.blake2b(digest_size=8)
    # not state_dict(): it ruins the 4-bit weights of a model that has run on a CPU (bitsandbytes 0.50)
    for name, weight in sorted([*model.named_parameters(), *model.named_buffers()]):
        state = getattr(weight, "quant_state", None)
        shape = tuple(weight.shape if state is None else state.shape)
        digest.update(f"{name} {shape} {weight.dtype}".encode())
        if hasattr(weight, "full_tensor"):  # as in hash_of_tensor
            weight = weight.full_tensor()
        inner = getattr(weight, "__tensor_flatten__", None)
        if inner is not None:  # of torchao: the first of the tensors that it is made of
            weight = getattr(weight, min(inner()[0]))
        if weight.device.type != "meta":  # offloaded to the disk
            numbers = (
                weight.detach().flatten()[:SAMPLED_NUMBERS] if state is None else _counted_codes(weight, shape[-1])
            )
            digest.update(numbers.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _counted_codes(weight: Tensor, width: int) -> Tensor:
    """[16]: how often each 4-bit code stands in the first 32 rows. Running the model on a CPU reorders the codes of these rows."""
    codes = weight.detach().flatten().view(torch.uint8)[: 16 * width]
    return torch.bincount(torch.cat([codes & 15, codes >> 4]), minlength=16)


def hash_of_tensor(tensor: Tensor) -> str:
    """A hash of a tensor's dtype, shape and bits, in the order of its elements. It is computed on the tensor's device, and equal on every device.

    The bytes are read as words x of 64 bits, the last one filled up with zeros. For every `BLOCK_WORDS` words, the sums of k x and of
    l (x >> 32) modulo 2**64 are computed, with odd k and l that differ for each word of the block.
    """
    if hasattr(tensor, "full_tensor"):  # of which each of several processes has a part; all processes must call this
        tensor = tensor.full_tensor()
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is not None:  # a tensor made of several, such as those of torchao
        names, how = inner()  # how: what it holds besides tensors, such as that it quantises its inputs, too
        about = f"{type(tensor).__name__} {tuple(tensor.shape)}"
        told = "" if " at 0x" in repr(how) else _text(how)
        return _digest(about, told, *(hash_of_tensor(getattr(tensor, name)) for name in sorted(names)))
    flat = tensor.detach().reshape(-1)
    if flat.device.type not in BLOCKS_AT_ONCE:
        flat = flat.cpu()
    sums = _block_sums(flat.view(torch.uint8))
    return _digest(f"{tensor.dtype} {tuple(tensor.shape)}", hashlib.blake2b(sums.cpu().numpy().tobytes()).hexdigest())


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _block_sums(octets: Tensor) -> Tensor:
    """[n_blocks, 2], int64: both sums of each block of bytes."""
    block = 8 * BLOCK_WORDS
    whole, step = octets.numel() - octets.numel() % block, block * BLOCKS_AT_ONCE[octets.device.type]
    parts = [octets[start : min(start + step, whole)] for start in range(0, whole, step)]
    is_on_cpu = octets.device.type == "cpu"
    summed = _summed_by_block if is_on_cpu else _summed
    if is_on_cpu and len(parts) > 1:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            sums = [*pool.map(lambda part: summed(_as_words(part).view(-1, BLOCK_WORDS)), parts)]
    else:  # in this thread, because only its stream is waited for
        sums = [summed(_as_words(part).view(-1, BLOCK_WORDS)) for part in parts]
    rest = nn.functional.pad(octets[whole:], (0, -octets.numel() % 8))
    return torch.cat([*sums, summed(_as_words(rest)[None])])


def _as_words(octets: Tensor) -> Tensor:
    """Bytes as words of 8 bytes; copied first when they do not begin at a multiple of 8."""
    return (octets.clone() if octets.storage_offset() % 8 or octets.data_ptr() % 8 else octets).view(torch.int64)


def _summed(words: Tensor) -> Tensor:
    """Both sums of each block. words: [n_blocks, at most BLOCK_WORDS]. Returns [n_blocks, 2].

    The second sum is that of the upper halves of the words, because the first sum hardly depends on their highest bits.
    """
    low, high = (each[: words.shape[1]] for each in _constants(words.device))
    products = words * low
    first = products.sum(1)
    torch.bitwise_right_shift(words, 32, out=products).mul_(high)
    return torch.stack([first, products.sum(1)], 1)


def _summed_by_block(words: Tensor) -> Tensor:
    """What `_summed` gives, computed block by block, so that the numbers stay in the cache of the CPU."""
    low, high = (each[: words.shape[1]] for each in _constants(words.device))
    both, upper = words.new_empty(len(words), 2), torch.empty_like(low)
    for block, sums in zip(words, both, strict=True):
        torch.bitwise_right_shift(block, 32, out=upper)
        torch.dot(block, low, out=sums[0])
        torch.dot(upper, high, out=sums[1])
    return both


@functools.cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """The odd factors of each sum, on a device: two tensors int64 [BLOCK_WORDS]."""
    return tuple(made.to(device) for made in constants().view(2, BLOCK_WORDS))  # type: ignore[return-value]


def constants() -> Tensor:
    """[2 * BLOCK_WORDS], int64: the odd factors of the first sum and then of the second, splitmix64 of 1, 2, 3, … with the lowest bit set."""
    mixed = torch.arange(1, 2 * BLOCK_WORDS + 1) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ ((mixed >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    return (mixed ^ ((mixed >> 31) & (2**33 - 1))) | 1


def _signed(number: int) -> int:
    """The int64 with the same bits as an unsigned number of 64 bits."""
    return number - 2**64 if number >= 2**63 else number


class _Own(NamedTuple):
    """A tensor that lies in the model's own memory. The model may have it under several names."""

    tensor: Tensor


def _hashed(numbers: Tensor | _Own, seen: dict[Any, str]) -> str:
    """The hash of a tensor. The model's own memory is hashed once for all its names; a tensor that was made for the hash is always hashed,
    because another one may be made at the same address later.
    """
    if not isinstance(numbers, _Own):
        return hash_of_tensor(numbers)
    tensor = numbers.tensor
    if type(tensor) not in (Tensor, nn.Parameter) or not tensor.numel():
        return hash_of_tensor(tensor)
    key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
    if key not in seen:
        seen[key] = hash_of_tensor(tensor)
    return seen[key]


def _numbers(model: nn.Module) -> Iterator[tuple[str, Tensor | _Own]]:
    """The name and the numbers of every parameter and persistent buffer. Tied ones come under each of their names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        is_quantised = hasattr(weight, "quant_state") or hasattr(weight, "SCB")
        named: list[tuple[str, Any]] = [*module._parameters.items()]
        named += [each for each in module._buffers.items() if each[0] not in module._non_persistent_buffers_set]
        for name, tensor in named:
            full = f"{path}.{name}" if path else name
            if tensor is None:
                continue
            if tensor.device.type == "meta":
                yield full, _offloaded(modules, full)
            elif getattr(tensor, "quant_state", None) is not None:
                yield from _of_four_bits(full, tensor)
            elif is_quantised and name == "bias":
                yield full, _as_added(tensor, getattr(module, "compute_dtype", None))
            else:
                yield full, _Own(tensor)
                scales = _scales(module, tensor) if name == "weight" else None
                if scales is not None:
                    yield f"{full}.SCB", scales


def _scales(module: nn.Module, weight: Tensor) -> Tensor | None:
    """The scales of 8-bit weights; None for other weights. The first forward moves them from the weight to the state of the module."""
    scales = getattr(weight, "SCB", None)
    return getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales


def _as_added(bias: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A bias beside quantised weights, as the first forward will convert it to the dtype in which it computes."""
    return bias.detach().to(dtype or bias.dtype).float()


def _offloaded(modules: Mapping[str, nn.Module], name: str) -> Tensor:
    """An offloaded weight, read from where the hooks of accelerate fetch it. Raises ModelError."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):  # the hook of the module itself, or of a module around it
        hook = getattr(modules.get(".".join(parts[:depth])), "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            weights, key = getattr(each, "weights_map", None), ".".join(parts[depth:])
            if weights is not None and _holds(weights, key):
                return torch.as_tensor(weights[key])
    raise ModelError(
        f"the weight {name} has no numbers here: it is on the meta device, and no hook of accelerate's knows where it is. Load the "
        "model with its weights."
    )


def _holds(weights: Any, key: str) -> bool:
    try:
        weights[key]
    except KeyError:
        return False
    return True


def _of_four_bits(name: str, weight: Any) -> Iterator[tuple[str, Tensor]]:
    """The codes and scales of a 4-bit weight of bitsandbytes. They are the same before and after the weight was repacked for a CPU."""
    state = weight.quant_state
    is_packed = getattr(state, "packing_format_for_cpu", False)
    octets = weight.detach().view(torch.uint8)
    yield (
        f"{name} {tuple(state.shape)} {state.quant_type} {state.blocksize}",
        _unpacked(octets, state) if is_packed else octets.reshape(-1),
    )
    yield f"{name}.code", state.code
    scales = state.absmax
    if state.nested:
        scales = state.state2.code[scales.long()] * _repeated(state.state2.absmax, state.state2.blocksize, len(scales))
        scales = scales + state.offset
    yield f"{name}.absmax", (scales.T if is_packed else scales).to(torch.bfloat16).reshape(-1)


def _repeated(values: Tensor, times: int, n: int) -> Tensor:
    return values.repeat_interleave(times)[:n]


def _unpacked(octets: Tensor, state: Any) -> Tensor:
    """The bytes of a weight as they were before it was repacked: each holds two neighbours of a row, the first in its upper half.

    Repacked bytes hold the codes of 32 rows as [column pair, row, 2], in runs of 64 codes whose first 32 are in the lower halves.
    """
    n_rows, n_columns = state.shape
    runs = octets.reshape(-1, PACKED_ROWS)
    codes = torch.cat([runs & 15, runs >> 4], 1).view(n_rows // PACKED_ROWS, n_columns // 2, PACKED_ROWS, 2)
    return (codes[..., 0] << 4 | codes[..., 1]).transpose(1, 2).reshape(-1)


def _adapter_lines(model: nn.Module) -> list[str]:
    """What the modules of peft hold besides tensors: scales, and which adapters are active, merged or switched off."""
    lines = []
    for path, module in model.named_modules():
        if type(module).__module__.split(".")[0] == "peft":
            own = {name: each for name, each in vars(module).items() if name not in _OF_ANY_MODULE and _is_plain(each)}
            lines += [f"{path}:{name} = {_text(each)}" for name, each in sorted(own.items())]
            lines += [f"{path}: its base runs alone"] * is_passed_by(module)
    return lines


def _scheme_lines(model: nn.Module) -> list[str]:
    """How modules of compressed-tensors quantise what they are given, besides their weights."""
    schemes: dict[str, Any] = {
        path: getattr(module, "quantization_scheme", None) for path, module in model.named_modules()
    }
    return [f"{path}: {each.model_dump_json()}" for path, each in schemes.items() if hasattr(each, "model_dump_json")]


_OF_ANY_MODULE = {*vars(nn.Module()), "training", "_is_hf_initialized"}


def _is_plain(value: Any) -> bool:
    """Whether a value is a number or a text, or a collection of them that is not empty."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return bool(value) and all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return repr(sorted((str(name), _text(each)) for name, each in value.items()))
    return repr(sorted(map(str, value))) if isinstance(value, set | frozenset) else repr(value)
