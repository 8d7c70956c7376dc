"""The sections of gpu.py, but for the two large ones. Each yields the lines of its table one by one, so that a section that is cut short still gives its
first lines, and its numbers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gauges import quiet
from gpu_generate import EVERYTHING, refuse_other, sampled
from gpu_made import Setting, Sides, briefly, named, waited
from gpu_targets import EQUAL, FORWARDS, PROMPT, SAME_TEXT, WRITE, Number
from store_made import Workload, bits_of, write, write_raw
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

from AutomaticEval.capture.generation import Response, respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.loading import load_model
from AutomaticEval.models.recording import Kept, capturing
from AutomaticEval.selection import Selection
from AutomaticEval.store.bits import bits

Line = dict[str, Any]


def truth(setting: Setting) -> Iterator[Line | Number]:
    """Compare capture in generation with plain hooks in the same forwards, bit for bit; left-padded batches of eight.

    Plain hooks either copy to the host at once, which waits for the GPU, or keep a clone on the GPU, which hides no race.
    """
    width, n_layers, n_new = (64, 2, 6) if setting.is_tiny else (768, 8, 48)
    n_ids = max(1000, len(AutoTokenizer.from_pretrained(setting.tokenizer)))
    kinds: dict[str, Any] = {
        "Llama": LlamaConfig(
            vocab_size=n_ids,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=n_layers,
            num_attention_heads=8,
            num_key_value_heads=4,
        ),
        "GPT-2": GPT2Config(vocab_size=n_ids, n_embd=width, n_layer=n_layers, n_head=8),
    }
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    models: list[tuple[str, Callable[[], LoadedModel]]] = [
        (kind, partial(setting.made, config, dtype, kind)) for kind, config in kinds.items() for dtype in dtypes
    ]
    n_forwards = n_tensors = n_equal = 0
    for kind, make in [*models, ("3B shape", lambda: setting.loaded)]:
        loaded = make()
        line = _compared(setting, loaded, n_new)
        n_forwards, n_tensors, n_equal = (
            n_forwards + line["forwards"],
            n_tensors + line["tensors"],
            n_equal + line["equal"],
        )
        yield {"model": kind, "dtype": str(loaded.model.dtype)[6:], **line}
    yield Number(EQUAL, n_equal / n_tensors)
    yield Number(FORWARDS, n_forwards)
    yield from _graphed(setting, setting.loaded, n_new)


def _compared(setting: Setting, loaded: LoadedModel, n_new: int) -> Line:
    assert loaded.layout.n_layers  # find the layout now, so that the plain hooks do not see the forwards that find it
    n_tensors = n_equal = n_forwards = 0
    for number, on_host in enumerate((True, False, False)):
        lengths = [3 + 7 * row + number for row in range(8)]
        prompts = [setting.prompts(8, 64)[row][:length] for row, length in enumerate(lengths)]
        raw: dict[str, list[torch.Tensor]] = {}
        with ExitStack() as hooks, quiet():
            for key, module, is_input in _places(loaded):
                hooks.callback(_hooked(module, raw.setdefault(key, []), is_input=is_input, on_host=on_host))
            responses = respond(loaded, prompts, sampled(n_new, "eager"), EVERYTHING)
        plain = {key: torch.cat(parts, 1).cpu() for key, parts in raw.items()}  # [batch, columns, width]
        n_forwards += len(next(iter(raw.values())))
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            rows = _rows_of(response)
            assert set(rows) == set(plain), (sorted(rows), sorted(plain))
            pad, n_rows = max(lengths) - len(prompt), len(prompt) + n_new - 1
            for key, found in rows.items():
                n_tensors += 1
                n_equal += bool((bits(found) == bits(plain[key][row, pad : pad + n_rows])).all())
    return {"forwards": n_forwards, "tensors": n_tensors, "equal": n_equal, "holds": n_equal == n_tensors}


def _graphed(setting: Setting, loaded: LoadedModel, n_new: int) -> Iterator[Line | Number]:
    """Compare generation from a graph with and without capture, and its rows with one plain forward over the same tokens."""
    prompts = [ids[: 3 + 7 * row] for row, ids in enumerate(setting.prompts(8, 64))]
    line: Line = {"model": "3B shape", "dtype": "bfloat16", "way": "graph"}
    try:
        with quiet():
            refuse_other(loaded, "graph")
            bare = respond(loaded, prompts, sampled(n_new, "graph"))
            found = [respond(loaded, prompts, sampled(n_new, "graph"), EVERYTHING) for _ in range(2)]
    except Exception as error:  # what was compared before still counts
        yield line | {"error": named(error)}
        return
    same = _equal([each.generated_ids for each in found[1]], [each.generated_ids for each in bare])
    first, again = ([_rows_of(each) for each in responses] for responses in found)
    is_same = [bool((bits(a[key]) == bits(b[key])).all()) for a, b in zip(first, again, strict=True) for key in a]
    off = max(
        _off(setting, prompt, response, rows) for prompt, response, rows in zip(prompts, found[1], again, strict=True)
    )
    yield line | {
        "tensors": len(is_same),
        "equal to another run's": sum(is_same),
        "off by, of the largest": round(off, 5),
    }
    yield Number(SAME_TEXT, same)


def _off(setting: Setting, prompt: list[int], response: Response, rows: dict[str, torch.Tensor]) -> float:
    """The largest difference of a row's number from that of a plain forward, as a part of the site's largest number."""
    model = setting.for_states.model  # with the same weights
    ids = torch.tensor([[*prompt, *response.generated_ids][:-1]], device=model.device)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    plain = {"embeddings" if n == 0 else f"layer_{n - 1}": each[0].float().cpu() for n, each in enumerate(states[:-1])}
    return max(float((rows[key].float() - each).abs().max() / each.abs().max()) for key, each in plain.items())


def _rows_of(response: Response) -> dict[str, torch.Tensor]:
    """Key -> [n_rows, d_model]: the rows of all parts of a response."""
    assert response.sample is not None
    parts = [part.rows.activations for part in response.sample.parts]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _places(loaded: LoadedModel) -> list[tuple[str, torch.nn.Module, bool]]:
    """Key, module, and whether the module's input is meant. Modules are named by the two families' own names, not by our layout."""
    model = loaded.model
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    return [("embeddings", blocks[0], True), *((f"layer_{layer}", block, False) for layer, block in enumerate(blocks))]


def _hooked(module: torch.nn.Module, into: list[torch.Tensor], *, is_input: bool, on_host: bool) -> Callable[[], None]:
    def take(value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        into.append(tensor.detach().cpu().clone() if on_host else tensor.detach().clone())

    if is_input:
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: take(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        ).remove
    return module.register_forward_hook(lambda _, args, output: take(output)).remove


def prompt(setting: Setting) -> Iterator[Line | Number]:
    """Compare one prompt, every layer copied to the host, with a bare forward."""
    n_tokens, rounds = (16, 3) if setting.is_tiny else (512, 40)
    loaded = setting.loaded
    ids = torch.tensor(setting.prompts(1, n_tokens), device=loaded.model.device)
    layout = loaded.layout
    taps = layout.pick(EVERYTHING.sites(layout.n_layers))
    where = torch.ones(1, n_tokens).nonzero(as_tuple=True)

    def bare(of: LoadedModel = loaded, **more: Any) -> Any:
        with torch.no_grad():
            return of.model(ids, use_cache=False, logits_to_keep=1, **more)

    def ours() -> None:
        how = {"n_columns": n_tokens}
        with capturing(loaded.model, taps, layout.embedding, lambda *_: Kept(*where), 1, **how) as kept:
            bare()
        kept.take(0, range(n_tokens))

    ways: dict[str, Callable[[], Any]] = {
        "bare": bare,
        "HF output_hidden_states": lambda: bare(setting.for_states, output_hidden_states=True),
        "ours, in memory": ours,
    }
    clocks = {name: lambda work=work: briefly(work) for name, work in ways.items()}
    sides = Sides(clocks, setting.ends, gauged=False)
    sides.warm_up().warm_up().run(rounds)
    yield from (sides.line(name, "bare") for name in ways)
    of_bare = sides.ratio("ours, in memory", "bare")
    if of_bare is not None:
        yield Number(PROMPT, of_bare)


def written(setting: Setting) -> Iterator[Line | Number]:
    """Compare a run of 4 GB of rows with `tofile` and fsync of the same bytes in files as large as a shard."""
    samples = Workload(*((4, 30, 5, 64) if setting.is_tiny else (107, 210, 29, 3072))).samples()
    plain = bits_of(samples)
    ways: dict[str, Callable[[Path], None]] = {
        "our run": lambda path: write(path, samples),
        **{
            f"tofile, {n} thread{'s' * (n > 1)}": lambda path, n=n: write_raw(path, plain, n)  # type: ignore[misc]
            for n in (1, 4, 8)
        },
    }
    sides = Sides(
        {name: lambda work=work: setting.seconds_in_folder(work) for name, work in ways.items()}, setting.ends
    )
    sides.warm_up({"our run": lambda: setting.seconds_in_folder(ways["our run"])}).run(3)
    for name in ways:
        middle = sides.median(name)
        rate = None if middle is None else round(plain.nbytes / 1e9 / middle, 3)
        yield sides.line(name, "tofile, 4 threads") | {"GB": round(plain.nbytes / 1e9, 3), "GB/s": rate}
    ratios = [sides.ratio(f"tofile, {n} threads", "our run") for n in (4, 8)]
    known = [each for each in ratios if each is not None]
    if known:
        yield Number(WRITE, min(known))


def eight(setting: Setting) -> Iterator[Line]:
    """Generate in 8 and 4 bits: eight layers, which are quickly saved and quantised; 512 + 64 tokens, batch 16."""
    try:
        import bitsandbytes
    except ImportError as error:
        yield {"error": f"not measured: {named(error)}"}
        return
    n_layers, n_tokens, n_new, n_prompts = (2, 16, 4, 2) if setting.is_tiny else (8, 512, 64, 16)
    prompts = setting.prompts(n_prompts, n_tokens)
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        whole = setting.made(setting.config(n_layers), torch.bfloat16, "whole")
        with quiet():
            whole.model.save_pretrained(folder), whole.tokenizer.save_pretrained(folder)
        del whole
        for n_bits in (8, 4):
            line: Line = {"bits": n_bits, "layers": n_layers, "bitsandbytes": bitsandbytes.__version__}
            try:
                how = {f"load_in_{n_bits}bit": True, "device": setting.device}
                with quiet():
                    loaded = load_model(folder, options=LoadOptions(**how))
                loaded.model.generation_config.eos_token_id = None
                yield line | _eight(setting, loaded, prompts, n_new)
            except Exception as error:  # the other may still work
                yield line | {"error": named(error)}


def _eight(setting: Setting, loaded: LoadedModel, prompts: list[list[int]], n_new: int) -> Line:
    found: dict[str, list[list[int]]] = {}

    def answer(name: str, selection: Selection | None) -> None:
        responses = respond(loaded, prompts, Sampling(max_new_tokens=n_new), selection)
        found[name] = [each.generated_ids for each in responses]

    clocks = {
        "uncaptured": lambda: waited(lambda: answer("uncaptured", None)),
        "captured": lambda: waited(lambda: answer("captured", EVERYTHING)),
    }
    sides = Sides(clocks, setting.ends).warm_up()
    again = found.get("uncaptured")
    sides.run(2)
    for error in sides.failed.values():
        return {"error": error}
    line: Line = {f"{name}, seconds": round(sides.median(name) or 0, 4) for name in clocks}
    same = {
        "tokens equal": _equal(found["captured"], found["uncaptured"]),
        "uncaptured twice": _equal(again, found["uncaptured"]),
    }
    return line | {"captured / uncaptured": sides.ratio("captured", "uncaptured"), **same}


def _equal(a: list[list[int]], b: list[list[int]]) -> float:
    """The share of tokens that are equal."""
    return round(float((torch.tensor(a) == torch.tensor(b)).float().mean()), 4)


def fingerprint(setting: Setting) -> Iterator[Line]:
    """Time the hash of every number of the model."""
    loaded = setting.loaded
    n_bytes = sum(each.numel() * each.element_size() for each in loaded.model.parameters())
    for name in ("first", "again", "again"):
        taken = waited(loaded.fingerprint)
        yield {"which": name, "seconds": round(taken, 4), "GB": round(n_bytes / 1e9, 3)}
