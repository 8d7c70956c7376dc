"""Names, folders and instances; what stays loaded; and one clear line for what cannot be had."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import typing
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import transformers
from helpers.models import CONFIGS, build
from helpers.places import ROOT

from AutomaticEval import generate_inference_with_activations, load_activations
from AutomaticEval.errors import DeviceUnavailable, ModelError, ModelUnavailable, UnsupportedModel
from AutomaticEval.models import loading
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.models.loading import load_model, n_layers_of


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_loaded", type(loading._loaded)())


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = [tmp_path / name for name in ("one", "two", "three")]
    for folder in made:
        shutil.copytree(DEMO_FOLDER, folder)
    return made


def test_a_model_stays_loaded_and_the_least_recently_used_goes_first(folders: list[Path]) -> None:
    one, two, three = folders
    first = load_model(one)
    second = load_model(two)
    assert load_model(one).model is first.model
    assert load_model(one).tokenizer is first.tokenizer
    load_model(three)  # two was used least recently
    assert load_model(one).model is first.model
    assert load_model(two).model is not second.model


def test_names_settings_and_states_never_share_an_entry(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, _ = folders
    assert load_model(one).model is not load_model(two).model
    plain = load_model(one)
    narrow = load_model(one, options=LoadOptions(dtype="bfloat16"))
    assert (plain.model.dtype, narrow.model.dtype) == (torch.float32, torch.bfloat16)
    monkeypatch.chdir(one.parent)
    assert load_model("one").model is load_model(one).model  # the same folder by another spelling


def test_checkpoint_that_was_trained_further_is_loaded_anew(folders: list[Path]) -> None:
    one = folders[0]
    before = load_model(one).model
    changed = build(before.config)
    changed.save_pretrained(one)
    after = load_model(one).model
    assert after is not before
    assert not torch.equal(after.lm_head.weight, before.lm_head.weight)


def test_folder_named_like_a_hub_model_is_the_folder(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folders[0].rename(folders[0].parent / "gpt2")
    monkeypatch.chdir(folders[0].parent)
    assert load_model("gpt2").model.config.model_type == "llama"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./nowhere", "no folder"),
        ("/no/such/folder", "no folder"),
        ("a b c", "check the name"),
    ],
)
def test_missing_model_is_one_clear_line(name: str, says: str) -> None:
    with pytest.raises(ModelUnavailable, match=says) as raised:
        load_model(name)
    assert "\n" not in str(raised.value)


def test_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="holds no model"):
        load_model(tmp_path)


def hub_failure(kind: str) -> Exception:
    """What transformers raises: an OSError caused by the hub's own error."""
    from huggingface_hub import errors

    class Response:
        headers: typing.ClassVar[dict[str, str]] = {}
        request = None
        status_code = 403
        text = ""

    made = getattr(errors, kind)
    try:
        cause = made("the hub said no", response=Response())
    except TypeError:
        cause = made("the hub said no")
    failure = OSError("transformers' words")
    failure.__cause__ = cause
    return failure


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("GatedRepoError", "gated.*hf auth login"),
        ("RepositoryNotFoundError", "no model.*check the name"),
        ("RevisionNotFoundError", "check the name and revision"),
        ("LocalEntryNotFoundError", "cannot be reached.*local folder"),
        ("OfflineModeIsEnabled", "cannot be reached.*local folder"),
    ],
)
def test_hub_failures_say_what_to_do(kind: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise hub_failure(kind)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelUnavailable, match=says):
        load_model("meta-llama/Llama-3.2-3B-Instruct")
    with pytest.raises(ModelUnavailable, match=says):
        n_layers_of("meta-llama/Llama-3.2-3B-Instruct")


def test_offline_name_says_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real libraries, told to stay offline."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match=r"connect once.*local folder"):
        load_model("somebody/not-downloaded")


def test_instance_needs_its_tokenizer_and_must_be_a_model() -> None:
    with pytest.raises(ModelError, match="tokenizer="):
        load_model(build(CONFIGS["llama"]()))
    with pytest.raises(UnsupportedModel, match="found int"):
        load_model(5)


def test_unknown_device_is_refused() -> None:
    with pytest.raises(DeviceUnavailable, match="no device"):
        load_model("demo", options=LoadOptions(device="toaster"))
    if not torch.cuda.is_available():
        with pytest.raises(DeviceUnavailable, match="no cuda"):
            load_model("demo", options=LoadOptions(device="cuda"))


def test_device_map_auto_loads() -> None:
    loaded = load_model("demo", options=LoadOptions(device_map="auto"))
    assert loaded.layout.n_layers == 4


def test_model_in_two_parts_gives_the_same_rows(tmp_path: Path, tokenizer: Any) -> None:
    """Half of the model is offloaded to the disk by accelerate, whose hooks move weights in and out."""
    from accelerate import dispatch_model

    whole = build(CONFIGS["llama"]())
    split = build(CONFIGS["llama"]())
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    split = dispatch_model(split, places, main_device="cpu", offload_dir=str(tmp_path))
    given: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 5, "sites": "embed,resid_post,z,mlp_out"}
    text, data = generate_inference_with_activations("Tell me.", whole, **given)
    text_split, data_split = generate_inference_with_activations("Tell me.", split, **given)
    assert text_split == text
    for key, rows in data["activations"].items():
        torch.testing.assert_close(data_split["activations"][key], rows, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantised_model_is_captured_on_every_site(bits: str, family: str, tmp_path: Path, tokenizer: Any) -> None:
    config = CONFIGS[family]()
    wider = {"hidden_size": 128, "intermediate_size": 256} if family == "llama" else {"n_embd": 128}
    model = build(type(config)(**{**config.to_dict(), **wider, "head_dim": 32}))  # 4 bits want widths of whole blocks
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given: dict[str, Any] = {f"load_in_{bits}": True, "max_new_tokens": 4}
    sites = "embed,resid_pre,resid_mid,resid_post,attn_out,mlp_out,q,k,v,z,mlp_post,final_norm"
    response, data = generate_inference_with_activations(
        "Tell me.", str(tmp_path / "model"), tmp_path / "x.h5", sites=sites, **given
    )
    assert data["settings"]["quantization"] == bits
    kept = data["activations"]
    for layer in range(3):
        total = kept[f"layer_{layer}.resid_pre"] + kept[f"layer_{layer}.attn_out"] + kept[f"layer_{layer}.mlp_out"]
        torch.testing.assert_close(total, kept[f"layer_{layer}"], atol=1e-4, rtol=1e-4)
    assert torch.equal(load_activations(tmp_path / "x.h5")["activations"]["layer_2"], kept["layer_2"])
    loaded = load_model(
        str(tmp_path / "model"), options=LoadOptions(load_in_8bit=bits == "8bit", load_in_4bit=bits == "4bit")
    )
    assert any("bit" in type(module).__name__ for module in loaded.model.modules())
    from AutomaticEval import generate_inference

    assert generate_inference("Tell me.", str(tmp_path / "model"), **given) == response


def test_folder_without_a_tokenizer_takes_the_one_that_is_given(tmp_path: Path, tokenizer: Any) -> None:
    build(CONFIGS["llama"]()).save_pretrained(tmp_path)
    assert load_model(tmp_path, tokenizer=tokenizer).tokenizer is tokenizer
    with pytest.raises(ModelUnavailable):
        load_model(tmp_path)


def test_checkpoint_that_lacks_weights_is_refused(folders: list[Path]) -> None:
    """transformers fills what is missing with random numbers and only warns."""
    import json

    config = folders[0] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 6}))
    with pytest.raises(ModelUnavailable, match=r"lacks 18 .*layers\.4"):
        load_model(folders[0])


def test_loaded_model_passes_through() -> None:
    loaded = LoadedModel(build(CONFIGS["llama"]()), object(), "x")
    assert load_model(loaded) is loaded


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path) -> None:
    """Two models and two categories: one line says it, and each model fails at once, with a line of its own."""
    connections: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:

        def take() -> None:
            with suppress(OSError):  # closed below
                while True:
                    connections.append(silent.accept())

        Thread(target=take, daemon=True).start()
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        del environment["HF_HUB_OFFLINE"]
        asked = ["extract", "--profile", "baseline", "--category", "anger,apology", "--model", "some/one,some/other"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "main.py"), *asked],
            env={**environment, "HF_HOME": str(tmp_path / "empty")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        n_asked = len(connections)
    assert done.returncode == 2
    assert n_asked == 1
    lines = done.stderr.splitlines()
    assert len([line for line in lines if "cannot be reached: what is in the local cache is used" in line]) == 1
    assert [line.partition(":")[0] for line in lines if "ModelUnavailable" in line] == [
        "some/one, anger",
        "some/other, anger",
    ]
    assert not (tmp_path / "activations").exists()
