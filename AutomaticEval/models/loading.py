"""A model's name, path or instance -> model and tokenizer, ready to run.

A few models stay loaded between calls. Two names never share an entry, nor do two states of one folder.
Quantisation lives here and nowhere else.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from AutomaticEval import __version__
from AutomaticEval.errors import DeviceUnavailable, ModelError, ModelUnavailable, UnsupportedModel, first_line
from AutomaticEval.models.edited import names_of
from AutomaticEval.models.layout import find_layout
from AutomaticEval.models.taps import Layout

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "model"
MAX_LOADED = 2
SHAPE = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head")
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded."""

    dtype: str = "auto"
    """auto (the checkpoint's own), float32, bfloat16 or float16; a torch dtype is taken by its name."""

    device: str = "auto"
    """auto (cuda, then mps, then cpu), or a torch device such as cuda:1."""

    device_map: str | dict[str, Any] | None = None
    """"auto" spreads a model that is larger than one device, also over CPU and disk; or part -> device. It takes the place
    of `device`."""

    load_in_8bit: bool = False
    """LLM.int8 through bitsandbytes."""

    load_in_4bit: bool = False
    """NF4 through bitsandbytes."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        object.__setattr__(self, "device", str(self.device))
        if self.load_in_8bit and self.load_in_4bit:
            raise ModelError("load_in_8bit and load_in_4bit were both asked for; choose one.")
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ModelError(f"no dtype {self.dtype!r}; write auto, float32, bfloat16 or float16.")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its tokenizer and the name it goes by in files."""

    model: Any
    tokenizer: Any
    name: str

    @property
    def layout(self) -> Layout:
        """Where its sites are, verified. Raises UnsupportedModel."""
        return find_layout(self.model)

    @property
    def context(self) -> int | None:
        """The most tokens it can be fed, or None when its config does not say."""
        config = self.model.config.get_text_config()
        found = (getattr(config, name, None) for name in _CONTEXT_FIELDS)
        return next((int(number) for number in found if number), None)

    @property
    def shape(self) -> dict[str, int]:
        """n_layers, d_model and the heads, for files: q, k, v and z are split into heads by them."""
        return {name: getattr(self.layout, name) for name in SHAPE}

    def fingerprint(self) -> str:
        """Hash of the shapes and first numbers of all weights: a checkpoint that was trained further is another model."""
        found = hashlib.blake2b(digest_size=8)
        # not state_dict(): it ruins the 4-bit weights of a model that has run on a CPU (bitsandbytes 0.50)
        for name, weight in sorted([*self.model.named_parameters(), *self.model.named_buffers()]):
            state = getattr(weight, "quant_state", None)
            shape = tuple(weight.shape if state is None else state.shape)
            found.update(f"{name} {shape} {weight.dtype}".encode())
            if weight.device.type != "meta":  # offloaded to the disk
                numbers = weight.detach().flatten()[:64] if state is None else _counted_codes(weight, shape[-1])
                found.update(numbers.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def made_with(self) -> dict[str, Any]:
        """`numbers`, and which model it is, for the settings of runs."""
        return {**self.numbers(), "fingerprint": self.fingerprint(), "shape": self.shape}

    def numbers(self) -> dict[str, Any]:
        """The settings of the model that decide its numbers, for files."""
        model = self.model
        edits = names_of(model)
        method = getattr(model, "quantization_method", None)
        return {
            **({"edits": edits} if edits else {}),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": getattr(model.config, "_attn_implementation", None),
            "device": str(model.device),
            "quantization": None
            if method is None
            else "8bit"
            if getattr(model, "is_loaded_in_8bit", False)
            else "4bit"
            if getattr(model, "is_loaded_in_4bit", False)
            else str(method),
            "revision": getattr(model.config, "_commit_hash", None),
            "versions": {
                "AutomaticEval": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


def _counted_codes(weight: torch.Tensor, width: int) -> torch.Tensor:
    """How often each 4-bit code is in the first 32 rows, within which running on a CPU reorders them. Returns [16]."""
    codes = weight.detach().flatten().view(torch.uint8)[: 16 * width]
    return torch.bincount(torch.cat([codes & 15, codes >> 4]), minlength=16)


@dataclass
class _Entry:
    """What stays loaded: a model and, once a call needed it, its own tokenizer."""

    model: Any
    tokenizer: Any = None


_loaded: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
_loading = threading.Lock()


def load_model(model: Any, *, tokenizer: Any = None, options: LoadOptions = LoadOptions()) -> LoadedModel:
    """The model of a hub name, a folder, "demo", or a loaded instance (then with its tokenizer).

    At most MAX_LOADED stay in memory, the least recently used goes first.
    Raises ModelUnavailable, DeviceUnavailable, UnsupportedModel.
    """
    if not isinstance(model, str | Path):
        ignored = [name for name, value in asdict(options).items() if value != getattr(LoadOptions, name)]
        if ignored:
            raise ModelError(
                f"{', '.join(ignored)} were given with a model that is loaded already; load it that way, or pass its name."
            )
        return model if isinstance(model, LoadedModel) else _from_instance(model, tokenizer)
    if isinstance(tokenizer, str | Path):
        folder = _source(tokenizer)
        tokenizer = _reading(str(tokenizer), lambda: AutoTokenizer.from_pretrained(folder))
    source = _source(model)
    key = (source, _state(source), repr(options))
    with _loading:
        if key not in _loaded:
            while len(_loaded) >= MAX_LOADED:
                _loaded.popitem(last=False)
            _loaded[key] = _Entry(_load(str(model), source, options))
        _loaded.move_to_end(key)
        entry = _loaded[key]
        if tokenizer is None and entry.tokenizer is None:
            entry.tokenizer = _tokenizer(str(model), source, options)
    return LoadedModel(entry.model, entry.tokenizer if tokenizer is None else tokenizer, str(model))


def n_layers_of(model: Any, options: LoadOptions = LoadOptions()) -> int:
    """The number of layers, from the config alone, so that a wrong layer is refused before the weights load."""
    if isinstance(model, LoadedModel):
        model = model.model
    if isinstance(model, str | Path):
        config = _reading(str(model), lambda: AutoConfig.from_pretrained(_source(model), revision=options.revision))
    else:
        config = model.config
    return int(config.get_text_config().num_hidden_layers)


def pick_device(device: str) -> str:
    """The torch device that `device` means here. Raises DeviceUnavailable."""
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise DeviceUnavailable(f"no device {device!r}; write auto, cpu, mps, cuda or cuda:1.") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, True):
        raise DeviceUnavailable(
            f"the device {device!r} was asked for, but torch sees no {kind} here; use --device auto."
        )
    return device


def _source(model: str | Path) -> str:
    """What from_pretrained is given: a folder's absolute path, or a hub name."""
    if str(model) == DEMO:
        return str(DEMO_FOLDER)
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else str(model)


def state_of(model: str | Path) -> str | None:
    """A hash of names, sizes and times of a folder's files; None of a hub name, whose revision tells its state."""
    found = _state(_source(model))
    return hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest() if found else None


def _state(source: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a folder's files: a checkpoint that was trained further is another model."""
    if not Path(source).is_dir():
        return ()
    found = sorted(path for path in Path(source).iterdir() if path.is_file())
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found)


def _from_instance(model: Any, tokenizer: Any) -> LoadedModel:
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "generate"):
        raise UnsupportedModel(
            f"a model is a name, a folder, or a loaded transformers model; found {type(model).__name__}."
        )
    if tokenizer is None:
        raise ModelError("a loaded model was passed without its tokenizer; pass tokenizer= too.")
    return LoadedModel(model, tokenizer, getattr(model, "name_or_path", "") or type(model).__name__)


def _tokenizer(name: str, source: str, options: LoadOptions) -> Any:
    return _reading(name, lambda: AutoTokenizer.from_pretrained(source, revision=options.revision))


def _load(name: str, source: str, options: LoadOptions) -> Any:
    kwargs: dict[str, Any] = {"dtype": options.dtype, "revision": options.revision}
    device = None if options.device_map else pick_device(options.device)
    if options.load_in_8bit or options.load_in_4bit:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # fp32 inputs log a line a matrix product
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=options.load_in_8bit, load_in_4bit=options.load_in_4bit, bnb_4bit_quant_type="nf4"
        )
    kwargs["device_map"] = options.device_map or {"": device}

    def load() -> Any:
        config = AutoConfig.from_pretrained(source, revision=options.revision)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModel(f"{name} is an encoder-decoder; only decoders are captured.")
        loaded, found = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **kwargs)
        lacking = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
        if lacking:  # transformers would fill them with random numbers
            raise ModelUnavailable(
                f"the checkpoint of {name!r} lacks {len(lacking)} of the model's weights (first {lacking[0]}): its config and "
                "its weights do not belong together."
            )
        return loaded.eval()

    return _reading(name, load)


def _reading(name: str, load: Any) -> Any:
    """Run what reads from the hub or a folder; its failures become one line each that says what to do."""
    try:
        return load()
    except (OSError, ValueError) as failure:
        raise ModelUnavailable(_why(name, failure)) from failure


def _why(name: str, failure: BaseException) -> str:
    causes, cause = [], failure
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    kinds = {kind.__name__ for one in causes for kind in type(one).__mro__}
    text = " ".join(str(one) for one in causes)
    if "GatedRepoError" in kinds or "gated repo" in text:
        return (
            f"the model {name!r} is gated: accept its licence on its page on the hub, log in with `hf auth login`, "
            "and run again."
        )
    if Path(name).is_dir():
        return f"the folder {name!r} holds no model that transformers can load: {first_line(failure)}"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"no folder {name!r}; give a folder with config.json and weights, or a hub name such as gpt2."
    if kinds & {"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"}:
        return f"the hub has no model {name!r} (or it is private: `hf auth login`); check the name and revision."
    if (
        kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError"}
        or "couldn't connect" in text
    ):
        return (
            f"the model {name!r} is not in the local cache and the hub cannot be reached; connect once to download it, "
            "or give a local folder. The bundled model is called demo."
        )
    return f"the model {name!r} cannot be loaded: {first_line(failure)}"
