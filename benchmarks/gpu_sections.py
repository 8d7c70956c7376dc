"""The sections of gpu.py. Each yields the lines of its table one by one, so that a section that is cut short still gives its first lines."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from gauges import quiet
from gpu_made import Setting, alternated, named, peaks, ratio, waited
from scoring import Sides, requests_of, shapes
from store_made import WORDS, Workload, bits_of, rows_bytes, seconds_in, write, write_raw
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

from AutomaticEval.capture.generation import Response, respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.evaluation.results.captured_run import made_with
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.loading import load_model
from AutomaticEval.models.recording import Kept, capturing
from AutomaticEval.selection import Selection
from AutomaticEval.store.bits import bits
from AutomaticEval.store.writer import RunWriter

Line = dict[str, Any]
EVERYTHING = Selection.parse()


def truth(setting: Setting) -> Iterator[Line]:
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
    for kind, config in kinds.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            loaded = setting.made(config, dtype, kind)
            yield {"model": kind, "dtype": str(dtype)[6:], **_compared(setting, loaded, n_new)}
    yield {"model": "3B shape", "dtype": "bfloat16", **_compared(setting, setting.loaded, n_new)}


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
            responses = respond(loaded, prompts, Sampling(max_new_tokens=n_new), EVERYTHING)
        plain = {key: torch.cat(parts, 1).cpu() for key, parts in raw.items()}  # [batch, columns, width]
        n_forwards += len(next(iter(raw.values())))
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            assert response.sample is not None
            rows = response.sample.parts[0].rows
            assert set(rows.activations) == set(plain), (sorted(rows.activations), sorted(plain))
            pad, n_rows = max(lengths) - len(prompt), len(prompt) + n_new - 1
            for key, found in rows.activations.items():
                n_tensors += 1
                n_equal += bool((bits(found) == bits(plain[key][row, pad : pad + n_rows])).all())
    return {"forwards": n_forwards, "tensors": n_tensors, "equal": n_equal, "holds": n_equal == n_tensors}


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


def generate(setting: Setting) -> Iterator[Line]:
    """Generate 128 greedy tokens after 512 prompt tokens. A warm-up of each side, with few new tokens, comes first."""
    n_tokens, n_new, batches = (16, 6, (1, 2)) if setting.is_tiny else (512, 128, (1, 16, 64))
    began, shares = time.perf_counter(), (0.2, 0.5, 1.0)
    for n_prompts, share in zip(batches, shares, strict=False):
        ends = began + share * (setting.ends - began)
        prompts = setting.prompts(n_prompts, n_tokens)
        yield from _generated(setting, setting.loaded, prompts, n_new, ends)


def _generated(
    setting: Setting, loaded: LoadedModel, prompts: list[list[int]], n_new: int, ends: float
) -> Iterator[Line]:
    settings = made_with(loaded, EVERYTHING).as_dict()  # once a run
    known: dict[str, Line] = {}

    def on_disk(n: int) -> list[Response]:
        with (
            tempfile.TemporaryDirectory(dir=setting.folder) as folder,
            RunWriter(Path(folder), loaded.name, settings) as writer,
        ):
            found = respond(loaded, prompts, Sampling(max_new_tokens=n), EVERYTHING)
            writer.add([each.sample for each in found if each.sample is not None])
            writer.finish()
        return found

    response = Selection.parse(positions="response")
    states = {"output_hidden_states": True, "return_dict_in_generate": True}
    ways: dict[str, Callable[[int], Any]] = {
        "plain": lambda n: _plainly(loaded, prompts, n),
        "HF output_hidden_states": lambda n: _plainly(setting.for_states, prompts, n, **states),
        "ours, in memory": lambda n: respond(loaded, prompts, Sampling(max_new_tokens=n), EVERYTHING),
        "ours, response only": lambda n: respond(loaded, prompts, Sampling(max_new_tokens=n), response),
        "ours, on the disk": on_disk,
    }

    def clock(name: str, n: int) -> float:
        def work() -> None:
            found = ways[name](n)
            known[name]["GB of rows"] = round(_rows_bytes(found) / 1e9, 3)

        known.setdefault(name, {})
        with peaks() as peak:
            taken = waited(work)
        known[name].update(peak)
        return taken

    failed: dict[str, str] = {}
    alternated({name: lambda name=name: clock(name, 4) for name in ways}, 1, ends, failed)
    rounds = 2 if len(prompts) >= 64 else 3
    sides = {name: lambda name=name: clock(name, n_new) for name in ways}
    taken = alternated(sides, rounds, ends, failed)
    for name in ways:
        line: Line = {"batch": len(prompts), "side": name}
        if name in failed:
            yield line | {"error": failed[name]}
            continue
        middle = statistics.median(taken[name])
        line |= {"seconds": round(middle, 3), "of plain": None if "plain" in failed else ratio(taken, name, "plain")}
        yield line | {"tokens/s": round(len(prompts) * n_new / middle, 1), **known[name], "rounds": len(taken[name])}


def _plainly(loaded: LoadedModel, prompts: list[list[int]], n_new: int, **more: Any) -> Any:
    ids = torch.tensor(prompts, device=loaded.model.device)
    with torch.no_grad():
        return loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=0,
            **(Sampling(max_new_tokens=n_new).kwargs() | more),
        )


def _rows_bytes(found: Any) -> int:
    """Bytes of the rows that one way of generating gave."""
    if isinstance(found, list):
        return rows_bytes([each.sample for each in found if each.sample is not None])
    states = getattr(found, "hidden_states", None) or ()
    return sum(state.numel() * state.element_size() for step in states for state in step)


def prompt(setting: Setting) -> Iterator[Line]:
    """Compare one prompt, every layer copied to the host, with a bare forward."""
    n_tokens, rounds = (16, 3) if setting.is_tiny else (512, 20)
    loaded = setting.loaded
    ids = torch.tensor(setting.prompts(1, n_tokens), device=loaded.model.device)
    layout = loaded.layout
    taps = layout.pick(EVERYTHING.sites(layout.n_layers))
    where = torch.ones(1, n_tokens).nonzero(as_tuple=True)

    def bare(of: LoadedModel = loaded, **more: Any) -> Any:
        with torch.no_grad():
            return of.model(ids, use_cache=False, logits_to_keep=1, **more)

    def ours() -> None:
        with capturing(loaded.model, taps, layout.embedding, lambda *_: Kept(*where), 1) as kept:
            bare()
        kept.take(0, range(n_tokens))

    ways: dict[str, Callable[[], Any]] = {
        "bare": bare,
        "HF output_hidden_states": lambda: bare(setting.for_states, output_hidden_states=True),
        "ours, in memory": ours,
    }
    sides = {name: lambda work=work: waited(work) for name, work in ways.items()}
    alternated(sides, 2, setting.ends)  # warm-up
    taken = alternated(sides, rounds, setting.ends)
    for name, each in taken.items():
        line = {"side": name, "ms": round(1e3 * statistics.median(each), 2), "of bare": ratio(taken, name, "bare")}
        yield line | {"rounds": len(each)}


def score(setting: Setting) -> Iterator[Line]:
    """Score 5-shot questions with four choices of one token, six subjects of 60 questions, from lm-eval's requests to their answers."""
    n_docs = 2 if setting.is_tiny else 60
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = Path(setting.mmlu) if setting.mmlu else made_up(folder / "data")
        subjects = sorted({each.stem for each in (data / "test").glob("*.jsonl")})[:6]
        asked = shapes(str(data), ",".join(subjects), folder)
        name = next(each for each in asked if "5-shot" in each)
        sides = Sides(setting.loaded, requests_of(setting.loaded, *asked[name], n_docs, folder), 16)
        counts = sides.counts  # a warm-up of the tree
        about = {"text": "MMLU" if setting.mmlu else "made up", "requests": len(sides.requests)}
        yield {**about, "fed": counts.fed, "distinct": counts.distinct, "computed": counts.computed}
        ways: dict[str, Callable[[], Any]] = {
            "plain lm-eval hf, batch 16": sides.plain,
            "tree, not captured": sides.tree,
            "tree, positions=scored, on the disk": sides.scored,
            "tree, positions=all, on the disk": sides.captured,
            "floor": sides.floor,
        }
        with quiet():
            expected, found = sides.plain(), sides.captured()  # a warm-up, too
        off = max(abs(a[0] - b[0]) for a, b in zip(expected, found, strict=True))
        failed: dict[str, str] = {}
        clocks = {side: lambda work=work: waited(work) for side, work in ways.items()}
        taken = alternated(clocks, 3, setting.ends, failed)
    for side in ways:
        if side in failed:
            yield {"side": side, "error": failed[side]}
            continue
        plain = None if "plain lm-eval hf, batch 16" in failed else ratio(taken, side, "plain lm-eval hf, batch 16")
        middle = round(statistics.median(taken[side]), 3)
        yield {"side": side, "seconds": middle, "of plain": plain, "rounds": len(taken[side])}
    yield {"side": "log-likelihoods, tree and plain, differ by at most", "nats": off}


def made_up(folder: Path) -> Path:
    """Write six subjects of made-up text in the form of MMLU's files: five few-shot examples and 60 questions each."""
    draw = random.Random(0)
    for split, n_docs in (("dev", 5), ("test", 60)):
        (folder / split).mkdir(parents=True)
        for subject in range(6):
            docs = [
                {
                    "question": " ".join(draw.choices(WORDS, k=36)) + "?",
                    "choices": [" ".join(draw.choices(WORDS, k=6)) for _ in range(4)],
                    "answer": draw.randrange(4),
                }
                for _ in range(n_docs)
            ]
            (folder / split / f"made_up_{subject}.jsonl").write_text("\n".join(map(json.dumps, docs)) + "\n")
    return folder


def written(setting: Setting) -> Iterator[Line]:
    """Compare a run of 4 GB of rows with `tofile` and fsync of the same bytes in files as large as a shard."""
    samples = Workload(*((4, 30, 5, 64) if setting.is_tiny else (107, 210, 29, 3072))).samples()
    plain = bits_of(samples)
    ways: dict[str, Callable[[Path], None]] = {
        "our run": lambda path: write(path, samples),
        "tofile, 1 thread": lambda path: write_raw(path, plain),
        "tofile, 4 threads": lambda path: write_raw(path, plain, 4),
    }
    sides = {name: lambda work=work: seconds_in(setting.folder, work) for name, work in ways.items()}
    alternated(sides, 1, setting.ends)  # warm-up
    taken = alternated(sides, 3, setting.ends)
    for name, each in taken.items():
        middle = statistics.median(each)
        line = {"side": name, "GB": round(plain.nbytes / 1e9, 3), "seconds": round(middle, 3)}
        of_one = ratio(taken, name, "tofile, 1 thread")
        yield line | {"GB/s": round(plain.nbytes / 1e9 / middle, 3), "of 1 thread": of_one, "rounds": len(each)}


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

    sides = {
        "uncaptured": lambda: waited(lambda: answer("uncaptured", None)),
        "captured": lambda: waited(lambda: answer("captured", EVERYTHING)),
    }
    alternated(sides, 1, setting.ends)  # warm-up
    again = found["uncaptured"]
    taken = alternated(sides, 2, setting.ends)
    line: Line = {f"{name}, seconds": round(statistics.median(each), 3) for name, each in taken.items()}
    same = {
        "tokens equal": _equal(found["captured"], found["uncaptured"]),
        "uncaptured twice": _equal(again, found["uncaptured"]),
    }
    return line | {"captured / uncaptured": ratio(taken, "captured", "uncaptured"), **same}


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
