"""Prompts -> responses, with the activations of the very forwards that produced them.

`respond` runs a batch of token sequences; the drop-in functions ask one prompt of one model and may save
what happened. Knows nothing of benchmarks.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor

from AutomaticEval.errors import CaptureError, EmptyPrompt, PromptError, PromptTooLong, SelectionError, did_you_mean
from AutomaticEval.models.hooks import Keep, Kept, Recording, capturing
from AutomaticEval.models.loading import LoadedModel, LoadOptions, load_model, n_layers_of
from AutomaticEval.selection import Positions, Selection
from AutomaticEval.sites import LayersLike
from AutomaticEval.store.format import Rows, Sample
from AutomaticEval.store.writer import ensure_space, hdf5_path, prepare_file, write_shard


@dataclass(frozen=True)
class Sampling:
    """How the response is chosen."""

    max_new_tokens: int = 256
    """The most tokens to generate; fewer when the context ends first."""

    temperature: float = 0.0
    """0 is greedy decoding."""

    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""

    seed: int | None = None
    """Of the sampling. None draws one; the one used is in the settings."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise PromptError(f"max_new_tokens is {self.max_new_tokens}; at least 1 is needed.")
        if self.temperature < 0:
            raise PromptError(f"temperature is {self.temperature}; 0 is greedy, higher is more random.")

    def kwargs(self) -> dict[str, Any]:
        """For transformers' generate. What the checkpoint's own generation config says of sampling does not count."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": 1, "use_cache": True}
        if self.temperature == 0:
            return {**chosen, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {**chosen, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


class AskOptions(TypedDict, total=False):
    """The keyword options of every drop-in function."""

    tokenizer: Any
    """With a loaded model: its tokenizer."""
    sites: str | Iterable[str] | None
    """Kinds of sites: "resid_post,mlp_out". Default embed and resid_post."""
    positions: str | slice | Positions
    """all (default), prompt, response, scored, last, or a slice such as prompt[-1:]."""
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    system_prompt: str | None
    apply_chat_template: bool
    """True (default): the model's own chat template, when it has one."""
    dtype: str
    device: str
    device_map: str | None
    load_in_8bit: bool
    load_in_4bit: bool
    revision: str | None
    overwrite: bool
    """Replace an existing file at save_path."""


class Response(NamedTuple):
    """One prompt's response."""

    text: str
    sample: Sample | None
    """With its rows, when activations were captured."""


@dataclass(frozen=True)
class Request:
    """One question, parsed and checked as far as it can be before the model is loaded."""

    prompt: str
    load: LoadOptions
    sampling: Sampling
    selection: Selection
    tokenizer: Any = None
    system_prompt: str | None = None
    apply_chat_template: bool = True
    overwrite: bool = False

    @classmethod
    def parse(cls, prompt: str, model: Any, layers: LayersLike, options: AskOptions) -> Request:
        """Raises SelectionError, PromptError, ModelError; TypeError for an option there is not."""
        given: dict[str, Any] = dict(options)
        selection = Selection.parse(given.pop("sites", None), layers, given.pop("positions", "all"))
        check_prompt(prompt)
        load = LoadOptions(**_take(given, LoadOptions))
        sampling = Sampling(**_take(given, Sampling))
        rest = _take(given, cls)
        for name in given:
            known = AskOptions.__annotations__
            raise TypeError(f"no option {name!r}.{did_you_mean(name, known)} Options: {', '.join(known)}.")
        if layers is not None:
            selection.sites(n_layers_of(model, load))  # a wrong layer is refused before the weights load
        return cls(prompt, load, sampling, selection, **rest)


def _take(given: dict[str, Any], kind: type) -> dict[str, Any]:
    """Remove from given, and return, what is a field of a dataclass."""
    names = {field.name for field in fields(kind)} & set(AskOptions.__annotations__)
    return {name: given.pop(name) for name in list(given) if name in names}


def check_prompt(prompt: object) -> None:
    """Raises EmptyPrompt, PromptError."""
    if not isinstance(prompt, str):
        raise PromptError(f"a prompt is a string; found {type(prompt).__name__}.")
    if not prompt.strip():
        raise EmptyPrompt("the prompt is empty; give it some text.")


def generate_inference_with_activations(
    prompt: str,
    model: Any,
    save_path: str | Path | None = None,
    layers_to_capture: LayersLike = None,
    **options: Unpack[AskOptions],
) -> tuple[str, dict[str, Any]]:
    """A model's response to a prompt, and the activations of the pass that produced it.

    model: a hub name, a folder, "demo", or a loaded model (then with tokenizer=).
    save_path: HDF5 file to write; None writes nothing. An existing file is refused unless overwrite=True.
    layers_to_capture: 3, -1, "0-2,-1", range(4), [0, 1, -1]; None for all.
    options: see `AskOptions`.
    Returns (response, activation_data). activation_data["activations"] maps `embeddings`, `layer_0`, … to CPU
    tensors [n_positions, d_model] in the model's dtype; P prompt and R response tokens give P + R - 1 positions
    (the last token is never fed). `token_ids`, `tokens` and `positions` are aligned with the rows.
    Raises SelectionError, PromptError, ModelError, StoreError, CaptureError.
    """
    file = None if save_path is None else hdf5_path(save_path)
    request = Request.parse(prompt, model, layers_to_capture, options)
    if file is not None:
        prepare_file(file, overwrite=request.overwrite)
    loaded = load_model(model, tokenizer=request.tokenizer, options=request.load)
    asked = ask(loaded, request, capture=True, folder=None if file is None else file.parent)
    assert asked.sample is not None
    if file is not None:
        write_shard(file, [asked.sample], loaded.name, asked.settings, overwrite=request.overwrite)
    return asked.text, asked.activation_data(file)


@overload
def generate_inference(
    prompt: str, model: Any, *, capture_activations: Literal[False] = False, **options: Unpack[AskOptions]
) -> str: ...
@overload
def generate_inference(
    prompt: str,
    model: Any,
    *,
    capture_activations: Literal[True],
    save_path: str | Path | None = None,
    layers_to_capture: LayersLike = None,
    **options: Unpack[AskOptions],
) -> tuple[str, dict[str, Any]]: ...
def generate_inference(
    prompt: str,
    model: Any,
    *,
    capture_activations: bool = False,
    save_path: str | Path | None = None,
    layers_to_capture: LayersLike = None,
    **options: Unpack[AskOptions],
) -> str | tuple[str, dict[str, Any]]:
    """A model's response to a prompt; with capture_activations, what `generate_inference_with_activations` returns.

    The text is the same with and without capture, token for token.
    """
    if capture_activations:
        return generate_inference_with_activations(prompt, model, save_path, layers_to_capture, **options)
    if save_path is not None:
        raise SelectionError("save_path was given, but nothing is captured; pass capture_activations=True.")
    request = Request.parse(prompt, model, layers_to_capture, options)
    loaded = load_model(model, tokenizer=request.tokenizer, options=request.load)
    return ask(loaded, request, capture=False).text


@dataclass(frozen=True)
class Asked:
    """The response to one prompt with the settings it was made with."""

    text: str
    sample: Sample | None
    model: str
    settings: dict[str, Any]

    def activation_data(self, file: Path | None) -> dict[str, Any]:
        """The dict of the drop-in functions; `path` is where it was written, or None."""
        assert self.sample is not None
        path = None if file is None else str(file.resolve())
        return {**self.sample.activation_data(self.model, self.settings), "path": path}


def ask(loaded: LoadedModel, request: Request, *, capture: bool, folder: Path | None = None) -> Asked:
    """Ask one prompt. folder: where the rows will be written, whose room is checked first.

    Raises PromptTooLong, DiskFull, SiteUnavailable, CaptureError.
    """
    ids = encode(loaded, request.prompt, request.system_prompt, apply_chat_template=request.apply_chat_template)
    sampling = fit(request.sampling, loaded.context, len(ids))
    if sampling.temperature > 0 and sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbits(31))
    if capture and folder is not None:
        n_rows = len(request.selection.positions.resolve(len(ids), sampling.max_new_tokens))
        ensure_space(folder, n_rows * bytes_per_row(loaded, request.selection) + 2**16)
    (response,) = respond(loaded, [ids], sampling, request.selection if capture else None, [request.prompt])
    settings = {
        **loaded.numbers(),
        **request.selection.as_dict(),
        **asdict(sampling),
        "system_prompt": request.system_prompt,
        "chat_template": request.apply_chat_template and bool(loaded.tokenizer.chat_template),
    }
    return Asked(response.text, response.sample, loaded.name, settings)


def bytes_per_row(loaded: LoadedModel, selection: Selection) -> int:
    """Size of one position over all selected sites. Raises UnknownLayer, SiteUnavailable."""
    layout = loaded.layout
    sites = selection.sites(layout.n_layers)
    layout.pick(sites)
    itemsize: int = torch.empty((), dtype=loaded.model.dtype).element_size()
    return sum(layout.widths[site] for site in sites) * itemsize


def encode(
    loaded: LoadedModel, prompt: str, system_prompt: str | None, *, apply_chat_template: bool = True
) -> list[int]:
    """The token ids of a prompt, in the model's chat template when it has one, with no double BOS."""
    tokenizer = loaded.tokenizer
    if not (apply_chat_template and tokenizer.chat_template):
        text = prompt if system_prompt is None else f"{system_prompt}\n\n{prompt}"
        bos = tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    messages = [*system, {"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as failure:  # templates are programs of their own and raise what they like
        raise PromptError(
            f"the chat template of {loaded.name} refused the messages ({failure}); put the system prompt into the "
            "prompt, or pass apply_chat_template=False."
        ) from failure
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template wrote BOS itself


def fit(sampling: Sampling, context: int | None, n_prompt: int) -> Sampling:
    """The sampling with no more new tokens than the context holds. Raises PromptTooLong, EmptyPrompt."""
    if n_prompt == 0:
        raise EmptyPrompt("the prompt has no tokens; give it some text.")
    if context is None:
        return sampling
    if n_prompt > context:
        raise PromptTooLong(f"the prompt has {n_prompt} tokens and the model's context is {context}; shorten it.")
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, context - n_prompt + 1))


def respond(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    selection: Selection | None = None,
    texts: Sequence[str] | None = None,
) -> list[Response]:
    """Responses to a batch of token sequences, run together, left-padded.

    selection: what to capture; None captures nothing. texts: what was asked, for the samples' `prompt`.
    Raises CaptureError when what the model was fed is not what it answered.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    width = max(map(len, prompts))
    pads = [width - len(ids) for ids in prompts]
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    ids = torch.tensor(
        [[filler] * pad + list(row) for pad, row in zip(pads, prompts, strict=True)], device=model.device
    )
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=model.device)
    kwargs = sampling.kwargs() | {"pad_token_id": filler, "disable_compile": True}
    recorder: Any = nullcontext()
    if selection is not None:
        layout = loaded.layout
        taps = layout.pick(selection.sites(layout.n_layers))
        recorder = capturing(model, taps, layout.embedding, keep_of(selection.positions, prompts, pads))
    with torch.no_grad(), _seeded(sampling), recorder as recording:
        sequences: Tensor = model.generate(input_ids=ids, attention_mask=mask, **kwargs)  # [batch, width + longest]
    made = []
    for row, prompt in enumerate(prompts):
        generated = until_end(sequences[row, width:].tolist(), model.generation_config.eos_token_id)
        text = tokenizer.decode(generated, skip_special_tokens=True)
        sample = None
        if selection is not None:
            rows = sequence_rows(
                recording,
                row,
                pads[row],
                [*prompt, *generated],
                selection.positions.resolve(len(prompt), len(generated)),
                tokenizer,
            )
            columns = {
                "prompt": texts[row] if texts else tokenizer.decode(prompt),
                "response": text,
                "timestamp": datetime.now().astimezone().isoformat(),
                "n_prompt_tokens": len(prompt),
                "batch_rows": len(prompts),
                "batch_columns": width,
            }
            sample = Sample(columns, list(prompt), generated, rows, range(len(rows.positions)))
        made.append(Response(text, sample))
    return made


def _seeded(sampling: Sampling) -> Any:
    """Seeds torch for the sampling and gives the caller's random state back afterwards."""
    if sampling.seed is None or sampling.temperature == 0:
        return nullcontext()
    return _Seed(sampling.seed)


class _Seed:
    def __init__(self, seed: int) -> None:
        self._seed, self._fork = seed, torch.random.fork_rng()

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *failure: Any) -> None:
        self._fork.__exit__(*failure)


def keep_of(positions: Positions, prompts: Sequence[Sequence[int]], pads: Sequence[int]) -> Keep:
    """What to keep of each forward of a left-padded batch: never padding, and what may still be selected."""
    windows = [positions.window(len(prompt)) for prompt in prompts]
    low = torch.tensor([pad + first for pad, (first, _) in zip(pads, windows, strict=True)])
    high = torch.tensor([2**62 if last is None else pad + last for pad, (_, last) in zip(pads, windows, strict=True)])
    low = torch.maximum(low, torch.tensor(list(pads)))

    def keep(first: int, n_columns: int) -> Kept:
        columns = torch.arange(first, first + n_columns)[None]  # [1, columns]
        rows, chosen = torch.nonzero((columns >= low[:, None]) & (columns < high[:, None]), as_tuple=True)
        return Kept(rows, chosen + first)

    return keep


def until_end(generated: Sequence[int], end: int | Sequence[int] | None) -> list[int]:
    """A row's own tokens: up to and including its first end token; what follows is padding of the batch."""
    ends = {end} if isinstance(end, int) else set(end or ())
    stop = next((number + 1 for number, token in enumerate(generated) if token in ends), len(generated))
    return list(generated[:stop])


def sequence_rows(
    recording: Recording, row: int, pad: int, sequence: Sequence[int], positions: range | Sequence[int], tokenizer: Any
) -> Rows:
    """The kept rows of one sequence of a batch, after checking that the model was fed that very sequence.

    sequence: prompt and response, of which the last token is never fed. Raises CaptureError.
    """
    fed = recording.fed(row)[pad : pad + len(sequence) - 1]
    if fed != list(sequence[:-1]):
        raise CaptureError(
            f"batch row {row}: the model was fed {len(fed)} tokens that are not the {len(sequence) - 1} of its sequence "
            "(beam search and assisted decoding cannot be captured). Nothing was stored."
        )
    token_ids = [sequence[position] for position in positions]
    activations: Mapping[str, Tensor] = recording.take(row, [pad + position for position in positions])
    return Rows(token_ids, tokenizer.convert_ids_to_tokens(token_ids), list(positions), activations)
