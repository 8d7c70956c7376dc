"""Ways of running a model: each gives the numbers of the plain model, or is refused by name at every door."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.models import ALL, CONFIGS, build
from helpers.places import ROOT
from helpers.tasks import loglikelihoods
from lm_eval.api.instance import Instance

import AutomaticEval as package
from AutomaticEval import (
    Edit,
    HFActivations,
    editing,
    evaluate_with_activations,
    generate_inference,
    generate_inference_with_activations,
    score_continuations,
)
from AutomaticEval.analysis.heads.strength import ActivationExtractor
from AutomaticEval.capture.texts.feeding import Feeding
from AutomaticEval.capture.texts.piece_forwards import PieceForwards
from AutomaticEval.errors import AutomaticEvalError, ModelError, ModelUnavailable, UnsupportedModel
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.models.loading import load_model
from AutomaticEval.selection import Selection

PROMPTS = ["What is the capital of France", "Who"]
PAIRS = [("The capital of", " France"), ("Tell me", " more of it")]
SITES: dict[str, Any] = {"sites": "embed,resid_post,z,mlp_post,logits", "positions": "scored"}


@pytest.fixture(scope="module")
def plain() -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(DEMO_FOLDER).eval()


def answered(lm: Any) -> tuple[list[Any], list[Any]]:
    """Answers and scores that lm-eval's calls give, each in one batch."""
    scores = lm.loglikelihood(loglikelihoods(PAIRS), disable_tqdm=True)
    how = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    asked = [Instance("generate_until", {}, (each, how), 0, metadata=("g", at, 1)) for at, each in enumerate(PROMPTS)]
    answers = lm.generate_until(asked, disable_tqdm=True)
    lm._open.close()
    return answers, [score for score, _ in scores]


def assert_rows_are_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found["generated_ids"]) == list(expected["generated_ids"])
    for key, rows in expected["activations"].items():
        slack = 1e-5 * max(1.0, float(rows.abs().max()))
        torch.testing.assert_close(found["activations"][key], rows, atol=slack, rtol=0)


# Offloaded weights


def test_all_weights_on_the_disk(plain: Any, tokenizer: Any, tmp_path: Path) -> None:
    placing: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")}
    on_disk = load_model("demo", **placing)
    assert {weight.device.type for weight in on_disk.model.parameters()} == {"meta"}
    _, expected = generate_inference_with_activations(PROMPTS[0], plain, tokenizer=tokenizer, max_new_tokens=4, **SITES)
    _, found = generate_inference_with_activations(PROMPTS[0], on_disk, max_new_tokens=4, **SITES)
    assert_rows_are_alike(found, expected)
    for scoring in ("tree", "stock"):
        how: dict[str, Any] = {"scoring": scoring, "batch_size": 2, "activation_save_dir": tmp_path / scoring}
        theirs = answered(HFActivations(plain, tokenizer=tokenizer, **how))
        ours = answered(HFActivations("demo", **placing, **how))
        assert ours[0] == theirs[0]
        assert ours[1] == pytest.approx(theirs[1], abs=1e-4)


# Compiled models and models in training mode


def extracted(model: Any, tokenizer: Any) -> Any:
    return PieceForwards(LoadedModel(model, tokenizer, "m"), Selection.parse("resid_post", "0", "all"), Feeding())


def edited(model: Any) -> None:
    with editing(model, Edit.scale("layer_0", 0.5)):
        pass


CAPTURING: dict[str, Callable[[Any, Any, Path], Any]] = {
    "generate": lambda model, tokenizer, folder: generate_inference_with_activations(
        "Who?", model, tokenizer=tokenizer, max_new_tokens=2
    ),
    "scores": lambda model, tokenizer, folder: score_continuations(
        PAIRS, model, tokenizer=tokenizer, capture_activations=True
    ),
    "benchmark": lambda model, tokenizer, folder: evaluate_with_activations(
        model, "demo", tokenizer=tokenizer, limit=1, activation_save_dir=folder
    ),
    "lm-eval": lambda model, tokenizer, folder: HFActivations(model, tokenizer=tokenizer, activation_save_dir=folder),
    "extract": lambda model, tokenizer, folder: extracted(model, tokenizer),
    "editing": lambda model, tokenizer, folder: edited(model),
    "heads": lambda model, tokenizer, folder: ActivationExtractor(
        LoadedModel(model, tokenizer, "m")
    ).extract_activations(["Who?"]),
}
PLAIN: dict[str, Callable[[Any, Any, Path], Any]] = {
    "plain generate": lambda model, tokenizer, folder: generate_inference(
        "Who?", model, tokenizer=tokenizer, max_new_tokens=3
    ),
    "plain scores": lambda model, tokenizer, folder: score_continuations(PAIRS, model, tokenizer=tokenizer),
}


def with_compiled_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def with_own_compile(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def with_compiled_body(model: Any) -> Any:
    model.model.forward = torch.compile(model.model.forward, backend="eager")
    return model


COMPILED: dict[str, Callable[[Any], Any]] = {
    "torch.compile(model)": lambda model: torch.compile(model, backend="eager"),
    "model.compile()": with_own_compile,
    "model.forward = torch.compile(model.forward)": with_compiled_forward,
    "model.model.forward = torch.compile(…)": with_compiled_body,
}


@pytest.mark.parametrize("way", COMPILED)
def test_compiled_models_are_refused_by_every_door_that_hooks(
    way: str, plain: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = COMPILED[way](copy.deepcopy(plain))
    for door in CAPTURING.values():
        with pytest.raises(UnsupportedModel, match=r"is compiled: hooks .*Pass the model before torch.compile"):
            door(model, tokenizer, tmp_path)


def test_blocks_that_are_compiled_one_by_one_have_their_residual_stream(tokenizer: Any) -> None:
    plain = build(CONFIGS["llama"]())
    model = copy.deepcopy(plain)
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, backend="eager")
    how: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 2, "sites": "resid_pre,resid_post"}
    expected = generate_inference_with_activations(PROMPTS[0], plain, **how)[1]
    for _ in range(2):  # the second time with code that is compiled
        assert_rows_are_alike(generate_inference_with_activations(PROMPTS[0], model, **how)[1], expected)
    with pytest.raises(
        package.errors.SiteUnavailable, match="is compiled, and hooks within what is compiled fire only"
    ):
        generate_inference_with_activations("Who?", model, **{**how, "sites": "z"})


def test_training_mode_is_refused_by_every_door(plain: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(plain).train()
    for door in (*CAPTURING.values(), *PLAIN.values()):
        with pytest.raises(UnsupportedModel, match="is in training mode: dropout changes every value"):
            door(model, tokenizer, tmp_path)


# Caches and kernels of attention


@pytest.mark.parametrize("cache", ["static", "hybrid", "dynamic", None])
def test_caches_that_give_the_same_rows(cache: str | None, plain: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(plain)
    model.generation_config.cache_implementation = cache
    model.generation_config.prefill_chunk_size = None if cache else 4
    how: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 4, **SITES}
    expected, found = (generate_inference_with_activations(PROMPTS[0], each, **how)[1] for each in (plain, model))
    assert_rows_are_alike(found, expected)
    theirs, ours = (
        answered(HFActivations(each, tokenizer=tokenizer, activation_save_dir=tmp_path, batch_size=2))
        for each in (plain, model)
    )
    assert ours[0] == theirs[0]


@pytest.mark.parametrize(
    ("settings", "family", "says"),
    [
        ({"prefill_chunk_size": 4}, "mamba", "prefill_chunk_size=4 keeps the keys and values of each chunk, and Mamba"),
        ({"cache_implementation": "offloaded"}, "llama", "'offloaded' moves keys and values from a GPU"),
        ({"cache_implementation": "offloaded_static"}, "llama", "'offloaded_static' moves keys and values from a GPU"),
        ({"cache_implementation": "quantized"}, "llama", "needs the library optimum-quanto, which is not installed"),
        (
            {"cache_implementation": "quantized", "cache_config": {"backend": "hqq"}},
            "llama",
            "needs the library hqq, which is not installed",
        ),
    ],
)
def test_caches_that_cannot_work_are_refused_at_both_doors(
    settings: dict[str, Any], family: str, says: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("AutomaticEval.models.refused.cache_settings.find_spec", lambda name: None)
    model = build(ALL[family]())
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(AutomaticEvalError, match=says):
        generate_inference("Who?", model, tokenizer=tokenizer)
    lm = HFActivations(model, tokenizer=tokenizer, activation_save_dir=tmp_path)
    with pytest.raises(AutomaticEvalError, match=rf"the task 'g', document 0, .*{says}"):
        answered(lm)


def test_kernels_of_attention_by_name(plain: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"max_new_tokens": 4, **SITES}
    expected = generate_inference_with_activations(PROMPTS[0], plain, tokenizer=tokenizer, **how)[1]
    found = generate_inference_with_activations(PROMPTS[0], "demo", attn_implementation="eager", **how)[1]
    assert_rows_are_alike(found, expected)
    assert (expected["settings"]["attention"], found["settings"]["attention"]) == ("sdpa", "eager")
    with pytest.raises(ModelUnavailable, match=r"cannot be loaded with this kernel of attention: .*nonsense"):
        load_model("demo", attn_implementation="nonsense")
    with pytest.raises(UnsupportedModel, match="flex_attention, which torch cannot compile for batches on a CPU"):
        load_model("demo", attn_implementation="flex_attention", device="cpu")


def test_flash_attention_by_name(plain: Any, tokenizer: Any) -> None:
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        with pytest.raises(ModelUnavailable, match="needs a library that is not here: FlashAttention2"):
            load_model("demo", attn_implementation="flash_attention_2")
        pytest.skip("flash-attn is not installed; with it and a GPU, rows are compared")
    flash = load_model("demo", attn_implementation="flash_attention_2", dtype="bfloat16")
    eager = load_model("demo", attn_implementation="eager", dtype="bfloat16")
    found, expected = (
        generate_inference_with_activations("Who?", each, max_new_tokens=2)[1] for each in (flash, eager)
    )
    for key, rows in expected["activations"].items():
        torch.testing.assert_close(found["activations"][key], rows, atol=5e-2 * float(rows.abs().max()), rtol=0)


# Models that are divided among processes


DIVIDED = """
import json, os, sys
from AutomaticEval import generate_inference, generate_inference_with_activations, load_model, score_continuations
from AutomaticEval import Edit, editing
from AutomaticEval.errors import AutomaticEvalError
folder, out = sys.argv[1:]
rank, said = os.environ["RANK"], {}

def refused(name, ask):
    try:
        said[name] = repr(ask())
    except AutomaticEvalError as failure:
        said[name] = str(failure)

sites = {"sites": "embed,resid_pre,resid_mid,resid_post,attn_out,mlp_out,final_norm,logits", "positions": "scored"}
text, data = generate_inference_with_activations(
    "What is the capital of France", folder, out + "/divided.h5", max_new_tokens=5, tp_plan="auto", **sites
)
loaded = load_model(folder, tp_plan="auto")
said["text"], said["path"] = text, data["path"]
said["sum"] = {key: float(rows.double().sum()) for key, rows in data["activations"].items()}
said["shape"], said["hash"] = data["settings"]["shape"], loaded.fingerprint()
said["sampled"] = generate_inference("Who", loaded, max_new_tokens=8, temperature=1.5)
said["scores"] = [each.logprob for each in score_continuations([("The capital of", " France")], loaded)]
with editing(loaded, Edit.scale("layer_0", 0.5)) as model:
    said["edited"] = generate_inference("Who", model, max_new_tokens=5)
refused("z", lambda: generate_inference_with_activations("Who", loaded, max_new_tokens=2, sites="z"))
refused("mlp_post", lambda: generate_inference_with_activations("Who", loaded, max_new_tokens=2, sites="layer_1.mlp_post"))
refused("q", lambda: generate_inference_with_activations("Who", loaded, max_new_tokens=2, sites="q"))
with open(f"{out}/{rank}.json", "w") as file:
    json.dump(said, file)
"""


def test_a_model_that_two_processes_divide(tmp_path: Path, tokenizer: Any) -> None:
    """Started as people start it. The residual stream is whole, and written once; what is divided is refused by name."""
    model = build(CONFIGS["llama"]())
    model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "divided.py").write_text(DIVIDED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*launcher, tmp_path / "divided.py", tmp_path / "llama", tmp_path],
        check=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    how: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 5}
    sites = "embed,resid_pre,resid_mid,resid_post,attn_out,mlp_out,final_norm,logits"
    text, expected = generate_inference_with_activations(
        "What is the capital of France", model, sites=sites, positions="scored", **how
    )
    stored = package.load_activations(tmp_path / "divided.h5")
    assert (first["text"], first["path"]) == (text, str((tmp_path / "divided.h5").resolve()))
    assert [path.name for path in tmp_path.glob("*.h5")] == ["divided.h5"]
    assert_rows_are_alike(stored, expected)
    assert stored["settings"]["loaded_with"] == {"n_processes": 2}
    assert first["shape"] == LoadedModel(model, tokenizer, "m").shape
    assert first["hash"] == LoadedModel(model, tokenizer, "m").fingerprint()
    (score,) = score_continuations([("The capital of", " France")], model, tokenizer=tokenizer)
    assert first["scores"] == pytest.approx([score.logprob], abs=1e-4)
    with editing(model, Edit.scale("layer_0", 0.5)):
        assert first["edited"] == generate_inference("Who", model, **how)
    for site in ("z", "mlp_post", "q"):
        assert "divided among 2 processes (tensor parallel), and each has a part of it" in first[site]


def test_doors_that_a_divided_model_does_not_go_through(
    plain: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("AutomaticEval.models.divided.division.n_processes", lambda model: 2)
    for name, says in [
        ("benchmark", "a benchmark is not done"),
        ("lm-eval", "a benchmark is not done"),
        ("extract", "an extraction of texts is not done"),
        ("heads", "an analysis of texts is not done"),
    ]:
        with pytest.raises(UnsupportedModel, match=rf"is divided among 2 processes \(tensor parallel\).*{says}"):
            CAPTURING[name](plain, tokenizer, tmp_path)


def test_heads_that_processes_do_not_divide_evenly(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CONFIGS["llama"]())
    monkeypatch.setattr("AutomaticEval.models.divided.division.n_processes", lambda model: 4)
    with pytest.raises(UnsupportedModel, match="num_key_value_heads=2, which 4 processes do not divide evenly"):
        load_model(model, tokenizer=tokenizer)


def test_dividing_needs_processes() -> None:
    with pytest.raises(ModelError, match=r"this process is alone; start several, as with torchrun --nproc_per_node 2"):
        load_model("demo", tp_plan="auto")
