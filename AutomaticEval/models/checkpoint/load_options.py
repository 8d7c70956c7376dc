"""How a model is loaded: the options of every command and function that takes a model. Imports no heavy library."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypedDict

from AutomaticEval.errors import ModelError
from AutomaticEval.models.architecture.description import Description, description_text
from AutomaticEval.options import Option
from AutomaticEval.public_names import public_name

DTYPES = ("auto", "float32", "bfloat16", "float16")
ALWAYS_WRITTEN = ("dtype", "device", "device_map", "load_in_8bit", "load_in_4bit", "revision")
"""The options that the first versions had. Settings hold them even at their defaults, as those versions wrote them."""
MAY_BE_PATHS = ("peft", "delta", "offload_folder")
"""Options that may be paths. Files hold their last name, which tells nothing about the machine."""


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded."""

    dtype: Annotated[
        str, Option("auto (the checkpoint's own), float32, bfloat16 or float16; a torch dtype is taken by its name.")
    ] = "auto"
    device: Annotated[str, Option("auto (cuda, then mps, then cpu), or a torch device such as cuda:1.")] = "auto"
    device_map: Annotated[
        str | dict[str, Any] | None,
        Option(
            '"auto" spreads a model that is larger than one device over GPUs, CPU and disk. It takes the place of --device.',
            reads=str | None,
        ),
    ] = None
    load_in_8bit: Annotated[bool, Option("Quantise the weights to 8 bits: LLM.int8 through bitsandbytes.")] = False
    load_in_4bit: Annotated[bool, Option("Quantise the weights to 4 bits: NF4 through bitsandbytes.")] = False
    revision: Annotated[str | None, Option("Branch, tag or commit on the hub.")] = None
    peft: Annotated[str | None, Option("Adapter of peft that the model is run with: its folder or hub name.")] = None
    adapter: Annotated[
        str | None,
        Option("Which of several adapters is active: its name, or base for the model without them."),
    ] = None
    delta: Annotated[str | None, Option("Weights that are added to the model's: their folder or hub name.")] = None
    subfolder: Annotated[str | None, Option("Where in the folder or on the hub the model's files are.")] = None
    trust_remote_code: Annotated[bool, Option("Run code that comes with the checkpoint.")] = False
    model_description: Annotated[
        str | None,
        Option("TOML file that names the parts of a model of an unknown family (docs/describe.md).", metavar="FILE"),
    ] = None
    """The text of the file, once the options are made. A dict of the same names may be given, or the text itself."""

    use_fast_tokenizer: bool = True
    """False: a tokenizer written in Python, where there is one."""

    add_bos_token: bool | None = None
    """Whether the tokenizer begins each text with its first token. None leaves that to the tokenizer."""

    max_memory: Mapping[int | str, int | str] | None = None
    """With device_map: device -> the most it may hold, such as {0: "10GiB", "cpu": "30GiB"}."""

    offload_folder: Annotated[
        str | None, Option("With --device_map: folder for the weights that fit on no device.")
    ] = None

    attn_implementation: Annotated[
        str | None,
        Option("Attention kernel: eager, sdpa, flex_attention, flash_attention_2, … Default: the model's own."),
    ] = None

    tp_plan: str | None = None
    """"auto" divides each layer among the processes that torchrun started (tensor parallel)."""

    @classmethod
    def parse(cls, device: str = "auto", **given: Any) -> LoadOptions:
        """Options from what people type. Where a launcher started several processes, auto is the process's own GPU."""
        if "LOCAL_RANK" in os.environ:
            from AutomaticEval.processes import own_device

            device = own_device(device)
        return cls(device=device, **given)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        object.__setattr__(self, "device", str(self.device))
        for name in ("peft", "adapter", "delta", "subfolder", "offload_folder"):  # lm-eval writes "" for no subfolder
            value = getattr(self, name)
            object.__setattr__(self, name, str(value) if value else None)
        if self.model_description is not None:
            object.__setattr__(self, "model_description", description_text(self.model_description))
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        """Raises ModelError for options that exclude each other, and for an unknown dtype."""
        if self.peft and self.delta:
            raise ModelError("peft and delta were both asked for; choose one.")
        if self.delta and (self.load_in_8bit or self.load_in_4bit):
            raise ModelError(
                "delta cannot be added to weights of 8 or 4 bits; leave load_in_8bit and load_in_4bit out."
            )
        unplaced = [name for name in ("max_memory", "offload_folder") if getattr(self, name) and not self.device_map]
        if unplaced:
            raise ModelError(
                f"{' and '.join(unplaced)} need device_map, such as device_map='auto'; on one device nothing is placed."
            )
        undivided = ("device_map", "load_in_8bit", "load_in_4bit", "peft", "delta")
        if self.tp_plan and self.given(undivided):
            raise ModelError(
                f"tp_plan divides a model among processes, and {' and '.join(self.given(undivided))} cannot be divided; leave one of them out."
            )
        if self.tp_plan not in (None, "auto"):
            raise ModelError(f"tp_plan is {self.tp_plan!r}; write 'auto', the model's own plan.")
        if self.load_in_8bit and self.load_in_4bit:
            raise ModelError("load_in_8bit and load_in_4bit were both asked for; choose one.")
        if self.dtype not in DTYPES and not _is_torch_dtype(self.dtype):
            raise ModelError(f"no dtype {self.dtype!r}; write auto, float32, bfloat16 or float16.")

    def as_dict(self) -> dict[str, Any]:
        """The options for the settings of a run: those in ALWAYS_WRITTEN, and all others that are not at their defaults."""
        return {
            name: public_name(value) if name in MAY_BE_PATHS and value else value
            for name, value in asdict(self).items()
            if name in ALWAYS_WRITTEN or value != getattr(LoadOptions, name)
        }

    @property
    def description(self) -> Description | None:
        """How the parts of the model are described; None when they are found by the names that are known."""
        return None if self.model_description is None else Description.read(self.model_description)

    def given(self, names: Iterable[str]) -> list[str]:
        """Those of the named options that are not at their defaults."""
        return [name for name in names if getattr(self, name) != getattr(LoadOptions, name)]


def _is_torch_dtype(name: str) -> bool:
    import torch

    return isinstance(getattr(torch, name, None), torch.dtype)


class LoadKeywords(TypedDict, total=False):
    """`LoadOptions` as keywords of functions, for editors and type checkers; a test compares the two."""

    dtype: str
    device: str
    device_map: str | dict[str, Any] | None
    load_in_8bit: bool
    load_in_4bit: bool
    revision: str | None
    peft: str | None
    adapter: str | None
    delta: str | None
    subfolder: str | None
    trust_remote_code: bool
    model_description: str | None
    use_fast_tokenizer: bool
    add_bos_token: bool | None
    max_memory: Mapping[int | str, int | str] | None
    offload_folder: str | None
    attn_implementation: str | None
    tp_plan: str | None
