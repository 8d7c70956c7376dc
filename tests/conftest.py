"""Small models built from their configs, and an independent way to read them: raw hooks on one unpadded row."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any
from unittest.mock import patch

# before torch is there: workers whose threads wait for each other's cores take four times as long
os.environ.setdefault("OMP_NUM_THREADS", "1")
# the tests need no hub; without a network, each request to it would be repeated for a minute and more
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from lm_eval.api.instance import Instance
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
)
from typer.testing import CliRunner

from AutomaticEval.cli import options
from AutomaticEval.cli.app import app
from AutomaticEval.models.loading import DEMO_FOLDER, LoadedModel

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "real"
STORIES = REAL / "models" / "stories260K"

needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"put the real models and data into {REAL} to run this")

VOCABULARY = 400
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Of the configs that name their sizes as Llama's does."""
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    ),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128),
    "gpt_neox": lambda: GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        intermediate_size=64,
        attention_types=[[["global", "local"], 2]],
        window_size=128,
        max_position_embeddings=128,
    ),
}
FAMILIES: dict[str, Callable[[], Any]] = {
    **CONFIGS,
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=16),  # norms after each branch; d_head is not d_model / n_heads
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "granite": lambda: GraniteConfig(**SIZES, residual_multiplier=0.3, attention_multiplier=0.2),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "phi": lambda: PhiConfig(**SIZES),
    "opt": lambda: OPTConfig(
        vocab_size=400, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4
    ),
}
"""And kinds of attention that those have not."""
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "gpt_neo": "transformer.h"}
FINAL_NORM = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "gpt_neo": "transformer.ln_f",
}


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    *(
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ),
]
"""Launchers of two processes."""


def process(
    *arguments: str, cwd: Path, launcher: Sequence[str] = (sys.executable,)
) -> subprocess.CompletedProcess[str]:
    """`main.py` in a process of its own, as users run it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    whole = [*launcher, str(ROOT / "main.py"), *arguments]
    return subprocess.run(whole, cwd=cwd, env=environment, capture_output=True, text=True)


def within(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported everything already."""
    with chdir(cwd), patch.object(options, "quiet_libraries"):
        done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def build(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A random model, its weights scaled up so that layers differ and greedy text is not one token repeated."""
    torch.manual_seed(0)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.to(dtype)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_FOLDER)


@pytest.fixture(scope="session", params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def tiny(family: str, tokenizer: Any) -> LoadedModel:
    return LoadedModel(build(CONFIGS[family]()), tokenizer, family)


@pytest.fixture(scope="session")
def tiny_llama(tokenizer: Any) -> LoadedModel:
    return LoadedModel(build(CONFIGS["llama"]()), tokenizer, "llama")


@pytest.fixture(scope="session")
def demo() -> LoadedModel:
    from AutomaticEval.models.loading import load_model

    return load_model("demo")


def raw_residuals(model: Any, family: str, ids: Sequence[int]) -> dict[str, Tensor]:
    """embeddings and layer_i of one unpadded row in one forward without a cache, by hooks of the test's own."""
    found: dict[str, Tensor] = {}
    blocks = model.get_submodule(BLOCKS[family])
    handles = []

    def output(key: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            found[key] = (out[0] if isinstance(out, tuple) else out)[0].clone()

        return hook

    def entering(module: Any, args: Any, kwargs: Any) -> None:
        found["embeddings"] = (args[0] if args else kwargs["hidden_states"])[0].clone()

    handles.append(blocks[0].register_forward_pre_hook(entering, with_kwargs=True))
    handles += [block.register_forward_hook(output(f"layer_{i}")) for i, block in enumerate(blocks)]
    try:
        with torch.no_grad():
            model(torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def loglikelihoods(pairs: Iterable[tuple[str, str]]) -> list[Instance]:
    """lm-eval's requests for (context, continuation) pairs."""
    return [Instance("loglikelihood", {}, pair, 0, metadata=("t", at, 1)) for at, pair in enumerate(pairs)]


def n_hooks(model: Any) -> int:
    """All hooks on all modules but those that transformers leaves there once it was asked for `output_hidden_states`."""
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return sum(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)


@pytest.fixture(autouse=True)
def no_hook_stays_on_a_shared_model(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that leaves a hook on a model that other tests share fails itself, not they."""
    yield
    for name, value in (getattr(request.node, "funcargs", None) or {}).items():
        if isinstance(value, LoadedModel):
            assert not n_hooks(value.model), f"{n_hooks(value.model)} hooks stay on {name}"


@pytest.fixture
def same_hooks_after() -> Iterator[Callable[[Any], None]]:
    """watch(model): the test fails when it leaves more or fewer hooks than it found."""
    watched: list[tuple[Any, int]] = []
    yield lambda model: watched.append((model, n_hooks(model)))
    for model, before in watched:
        assert n_hooks(model) == before
