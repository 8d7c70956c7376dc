"""One prompt asked of one model: the drop-in functions, their options, and the file they may save."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, Unpack, overload

from AutomaticEval.capture.generate_arguments import GenerateArguments, GenerateKeywords, take_generate_arguments
from AutomaticEval.capture.generation import generation_setting, refuse_uncomputed_logits, respond
from AutomaticEval.capture.reduced_rows import bytes_per_row, n_kept
from AutomaticEval.capture.sampling import Sampling, SamplingKeywords
from AutomaticEval.errors import EmptyPrompt, PromptError, PromptTooLong, SelectionError, unknown_option
from AutomaticEval.models.checkpoint.load_options import LoadKeywords, LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.described.plain_module import refuse_plain
from AutomaticEval.models.divided.division import by_first, check_alike, ranks_of
from AutomaticEval.models.loading import adapter_chosen, load_model, n_layers_of
from AutomaticEval.models.tokens.chat import rendered
from AutomaticEval.options import take_fields
from AutomaticEval.samples import ActivationData, Sample
from AutomaticEval.selection import Positions, Selection
from AutomaticEval.sites import LayersLike
from AutomaticEval.store.disk.file_names import hdf5_path, numbered
from AutomaticEval.store.disk.json_text import as_json
from AutomaticEval.store.disk.overwriting import VERSION, Overwrite, overwriting, parse_overwrite
from AutomaticEval.store.disk.whole_files import ensure_space, prepare_file
from AutomaticEval.store.hdf5.write import write_named, write_shard

S = TypeVar("S", bound=Sampling)


class AskOptions(LoadKeywords, SamplingKeywords, GenerateKeywords, total=False):
    """The keyword options of every drop-in function."""

    tokenizer: Any
    """With a loaded model: its tokenizer. With a name: another one, or the name of one."""
    sites: str | Iterable[str] | None
    """Kinds of sites: "resid_post,mlp_out". Default embed and resid_post."""
    positions: str | slice | Positions | None
    """all (default; with the site logits: scored), prompt, response, scored, thinking, answer, last, or a slice such as prompt[-1:]."""
    think_tokens: str | Iterable[str] | None
    """The texts that open and close the model's thinking: "<think>,</think>". None: those of its tokenizer."""
    store_dtype: str | None
    """float16 or bfloat16: narrower numbers than the model's own."""
    reduce: str | None
    """norm: the L2 norm of each row. mean, max: one line over the kept positions, under "reduced"."""
    project: Any
    """A matrix [width, k] by which each row is multiplied: a file, an array, or one for each site."""
    system_prompt: str | None
    apply_chat_template: bool
    """True (default): the model's own chat template, when it has one."""
    overwrite: Overwrite
    """True: replace an existing file at save_path. "version": write beside it, france-2.h5."""
    strict: bool
    """Raise NotFinite for infinite numbers and NaN, when the file is written; without it, warn."""


@dataclass(frozen=True)
class CheckedPrompt:
    """One prompt with its options, parsed, and checked as far as they can be before the model is loaded."""

    prompt: str
    load: LoadOptions
    sampling: GenerateArguments
    selection: Selection
    tokenizer: Any = None
    system_prompt: str | None = None
    apply_chat_template: bool = True
    overwrite: Overwrite = False
    strict: bool = False

    @classmethod
    def parse(cls, prompt: str, model: Any, layers: LayersLike, options: AskOptions) -> CheckedPrompt:
        """Raises SelectionError, PromptError, ModelError; TypeError for an unknown option."""
        given: dict[str, Any] = dict(options)
        sites, positions = given.pop("sites", None), given.pop("positions", None)
        others = [given.pop(name, None) for name in ("store_dtype", "reduce", "project", "think_tokens")]
        selection = Selection.parse(sites, layers, "all" if positions is None else positions, *others)
        if positions is None and "logits" in selection.kinds:  # a model that generates computes no others
            selection = replace(selection, positions=Positions.parse("scored"))
        if selection.store_dtype == "int8":
            raise SelectionError("store_dtype int8 needs the rows of many samples together; use float16 or bfloat16.")
        overwrite = parse_overwrite(given.pop("overwrite", False))
        check_prompt(prompt)
        load = LoadOptions(**take_fields(given, LoadOptions))
        sampling = take_generate_arguments(given)
        for name in given:
            if name not in AskOptions.__annotations__:
                raise unknown_option(name, [*AskOptions.__annotations__, "layers_to_capture"])
        if layers is not None or selection.single_sites:
            selection.sites(n_layers_of(model, load))  # refuses a wrong layer before the weights load
        return cls(prompt, load, sampling, selection, overwrite=overwrite, **given)


def check_prompt(prompt: object) -> None:
    """Raises EmptyPrompt for a prompt without text, PromptError for one that is no string or cannot be encoded."""
    if not isinstance(prompt, str):
        raise PromptError(f"a prompt is one string; found {type(prompt).__name__}.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as failure:
        raise PromptError(f"the prompt is not text that a tokenizer can read: {failure}.") from None
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
    save_path: the HDF5 file to write; None writes nothing. An existing file is refused, unless overwrite=True replaces it or
    overwrite="version" writes beside it: france-2.h5.
    layers_to_capture: 3, -1, "0-2,-1", range(4), [0, 1, -1]; None for all.
    options: see `AskOptions`.
    Returns (response, activation_data). activation_data["activations"] maps `embeddings`, `layer_0`, … to CPU
    tensors [n_positions, d_model] in the model's dtype; P prompt and R response tokens give P + R - 1 positions
    (the last token is never fed). `token_ids`, `tokens` and `positions` are aligned with the rows. `token_logprobs` [R]
    are the log-probabilities of the response's tokens (nats), before temperature, top-p and penalties. With reduce="mean" or "max" there
    are no rows, and activation_data["reduced"] maps the same keys to [d_model], float32.
    Raises SelectionError, PromptError, ModelError, StoreError, CaptureError.
    """
    file = None if save_path is None else hdf5_path(save_path)
    checked = CheckedPrompt.parse(prompt, model, layers_to_capture, options)
    if file is not None:
        prepare_file(file, overwrite=bool(checked.overwrite), offer=overwriting(numbered(file, 2).name))
    with adapter_chosen(model, checked.load) as load:
        loaded = load_model(model, tokenizer=checked.tokenizer, options=load)
        response = ask(loaded, checked, capture=True, folder=None if file is None else file.parent)
    assert response.sample is not None
    if file is not None:
        file = by_first(loaded.model, partial(_written, file, response, checked))
    return response.text, response.activation_data(file)


def _written(file: Path, response: PromptResponse, checked: CheckedPrompt) -> Path:
    """Write the sample of a response. Returns the file, which is another one when versions stand beside each other."""
    sample = response.sample
    how: dict[str, Any] = {"strict": checked.strict, "matrices": response.matrices}
    assert sample is not None
    if checked.overwrite == VERSION:
        return write_named(file, sample, response.model, response.settings, **how)
    write_shard(file, [sample], response.model, response.settings, overwrite=bool(checked.overwrite), **how)
    return file


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
    if save_path is not None:  # whoever names a file expects it to be written
        raise SelectionError("save_path was given, but nothing is captured; pass capture_activations=True.")
    checked = CheckedPrompt.parse(prompt, model, layers_to_capture, options)
    with adapter_chosen(model, checked.load) as load:
        return ask(load_model(model, tokenizer=checked.tokenizer, options=load), checked, capture=False).text


@dataclass(frozen=True)
class PromptResponse:
    """The response to one prompt, with the settings with which it was made."""

    text: str
    answer: str | None
    """The text without the thinking; None when the thinking was not finished."""
    sample: Sample | None
    """The sample with its rows, when activations were captured."""
    model: str
    settings: dict[str, Any]
    matrices: dict[str, Any]
    """Those of the projection, and the values that the model was edited with; files keep them beside the rows."""

    def activation_data(self, file: Path | None) -> ActivationData:
        """The dict that the drop-in functions return. file: where the sample was written; None when it was not."""
        assert self.sample is not None
        path = None if file is None else str(file.resolve())
        return ActivationData({**self.sample.activation_data(self.model, self.settings), "path": path})


def ask(loaded: LoadedModel, prompt: CheckedPrompt, *, capture: bool, folder: Path | None = None) -> PromptResponse:
    """Ask one prompt. folder: where the rows will be written; it is checked first that they have room there.

    Raises PromptTooLong, DiskFull, SiteUnavailable, CaptureError; PromptError for a value that transformers refuses.
    """
    refuse_plain(loaded.model, "an answer needs generate of transformers")
    ids = encode(loaded, prompt.prompt, prompt.system_prompt, apply_chat_template=prompt.apply_chat_template)
    sampling = fit(prompt.sampling.settled(loaded.model.generation_config), loaded.context, len(ids))
    if sampling.temperature > 0 and sampling.seed is None:
        sampling = replace(sampling, seed=ranks_of(loaded.model).from_first(secrets.randbits(31)))
    if capture:
        refuse_uncomputed_logits(loaded.model, prompt.selection, len(ids), sampling.max_new_tokens)
    if capture and folder is not None:
        n_positions = len(prompt.selection.positions.most(len(ids), sampling.max_new_tokens))
        n_bytes = n_kept(prompt.selection, n_positions) * bytes_per_row(loaded, prompt.selection)
        ensure_space(folder, n_bytes + prompt.selection.matrix_bytes + 2**16)
    try:
        selection, marks = prompt.selection if capture else None, prompt.selection.think_tokens
        (response,) = respond(loaded, [ids], sampling, selection, [prompt.prompt], think_tokens=marks)
    except (TypeError, ValueError) as failure:  # transformers looks at a value when it uses it
        if not sampling.more:
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in sampling.more.items())
        raise PromptError(f"transformers' generate refused one of {given}: {failure}") from failure
    check_alike(loaded.model, response.generated_ids, "answers")
    made = loaded.numbers().changed(
        **(loaded.sizes() if capture else {}),
        **prompt.selection.as_dict(),
        **sampling.settings(),
        **generation_setting(loaded.model, sampling),
        generation_config=loaded.model.generation_config.to_diff_dict(),
        system_prompt=prompt.system_prompt,
        chat_template=prompt.apply_chat_template and bool(loaded.tokenizer.chat_template),
    )
    settings = json.loads(as_json(made.as_dict()))  # exactly what reading the file gives
    matrices = {**prompt.selection.matrices, **loaded.edit_values()} if capture else {}
    return PromptResponse(response.text, response.answer, response.sample, loaded.name, settings, matrices)


def encode(
    loaded: LoadedModel, prompt: str, system_prompt: str | None, *, apply_chat_template: bool = True
) -> list[int]:
    """The token ids of a prompt, in the model's chat template when it has one. They never begin with two BOS tokens."""
    tokenizer = loaded.tokenizer
    if not (apply_chat_template and tokenizer.chat_template):
        text = prompt if system_prompt is None else f"{system_prompt}\n\n{prompt}"
        bos = tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    messages = [*system, {"role": "user", "content": prompt}]
    try:
        text = rendered(
            messages, lambda each: tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True)
        )
    except Exception as failure:  # a template is a program of its own and may raise anything
        raise PromptError(
            f"the chat template of {loaded.name} refused the messages ({failure}); put the system prompt into the "
            "prompt, or pass apply_chat_template=False."
        ) from failure
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has written BOS itself


def fit(sampling: S, context: int | None, n_prompt: int) -> S:
    """The sampling, with no more new tokens than fit into the context. Raises PromptTooLong, EmptyPrompt.

    context: the most tokens that the model can be fed; None when that is not known.
    """
    if n_prompt == 0:
        raise EmptyPrompt("the prompt has no tokens; give it some text.")
    if context is None:
        return sampling
    if n_prompt > context:
        raise PromptTooLong(f"the prompt has {n_prompt} tokens and the model's context is {context}; shorten it.")
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, context - n_prompt + 1))
