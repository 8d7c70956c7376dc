"""On a CUDA device: what is stored is what plain forwards compute there, whatever stands beside it, and the model is known again.

Run with `-m gpu`. What else needs a GPU stands beside the tests of the same thing for a CPU.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import ALL, FAMILIES, build
from helpers.runs import assert_honest, evaluated, every_kind, extracted
from helpers.samples import assert_same_rows

from AutomaticEval import load_model, open_run
from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.weights.fingerprint import fingerprint
from AutomaticEval.selection import Selection

pytestmark = pytest.mark.gpu

KINDS = "embed,resid_mid,resid_post,attn_out,z,mlp_post,final_norm"


def on_gpu(name: str, tokenizer: Any, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return LoadedModel(build(ALL[name](), dtype).to("cuda"), tokenizer, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "qwen3"])
def test_honest_runs_of_every_kind(family: str, dtype: torch.dtype, tmp_path: Path, tokenizer: Any) -> None:
    loaded = on_gpu(family, tokenizer, dtype)
    for _, path in every_kind(loaded, tmp_path, KINDS):
        assert_honest(path, loaded, 6)


@pytest.mark.parametrize("name", [*FAMILIES, "phi3-longrope", "mamba", "gpt-1"])
def test_rows_do_not_depend_on_the_batch(name: str, tokenizer: Any) -> None:
    dtype = torch.float64 if name == "mamba" else torch.float32  # whose recurrence makes the noise of float32 large
    loaded = on_gpu(name, tokenizer, dtype)
    torch.manual_seed(1)
    prompts = [torch.randint(1, 400, (length,)).tolist() for length in (3, 17, 9, 22, 30, 9)]
    how = (Sampling(max_new_tokens=6), Selection.parse("embed,resid_post"))
    together = respond(loaded, prompts, *how)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = respond(loaded, [prompt], *how)
        assert found.sample is not None
        assert alone.sample is not None
        assert_same_rows(found.sample, alone.sample)


def test_a_run_of_one_device_is_recomputed_on_the_other(tmp_path: Path, tokenizer: Any) -> None:
    loaded = on_gpu("llama", tokenizer)
    runs = [extracted(loaded, tmp_path / "texts", KINDS), evaluated(loaded, tmp_path, KINDS)]
    before = fingerprint(loaded.model)
    loaded.model.to("cpu")
    assert fingerprint(loaded.model) == before
    for run in runs:
        assert open_run(run).settings["model_hash"] == before
        assert_honest(run, loaded, 6)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="install bitsandbytes to run this")
@pytest.mark.parametrize("how", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_quantized_models_are_known_again_and_recomputed(how: dict[str, Any], tmp_path: Path) -> None:
    """The demo model on the GPU, quantized, run once; loaded anew, its hash is the same and so are its rows."""
    loaded = load_model("demo", options=LoadOptions(device="cuda", **how))
    run = evaluated(loaded, tmp_path, KINDS)
    again = load_model("demo", options=LoadOptions(device="cuda", **how))
    assert fingerprint(again.model) == fingerprint(loaded.model) == open_run(run).settings["model_hash"]
    assert_honest(run, again, 6)
