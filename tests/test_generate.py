"""The drop-in functions for one prompt: same text with and without capture, same dict from the file, no surprises."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.places import needs_real
from helpers.raw_hooks import raw_residuals
from helpers.samples import assert_same_data

import AutomaticEval
import utils
from AutomaticEval import generate_inference, generate_inference_with_activations, load_activations
from AutomaticEval.capture import prompt as asking
from AutomaticEval.errors import (
    DiskFull,
    EmptyPrompt,
    FolderNotWritable,
    ModelError,
    PathExists,
    PromptError,
    PromptTooLong,
    SelectionError,
    SiteUnavailable,
    UnknownLayer,
    UnknownPositions,
    UnknownSite,
)
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

PROMPT = "Question: What is 12 + 30?\nAnswer:"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_utils_and_the_package_are_the_same_objects() -> None:
    for name in utils.__all__:
        assert getattr(utils, name) is getattr(AutomaticEval, name)
    for name in AutomaticEval.__all__:
        assert callable(getattr(AutomaticEval, name))
    with pytest.raises(AttributeError):
        AutomaticEval.nothing  # noqa: B018


def test_demo_model_answers_and_the_data_say_how() -> None:
    response, data = generate_inference_with_activations(PROMPT, "demo")
    assert response.strip() == "42"
    assert (data["prompt"], data["response"], data["model"]) == (PROMPT, response, "demo")
    assert datetime.fromisoformat(data["timestamp"]).tzinfo is not None
    n_prompt, n_response = data["n_prompt_tokens"], len(data["generated_ids"])
    assert data["input_ids"].shape == (1, n_prompt)
    assert data["input_ids"].dtype == torch.int64
    assert list(data["activations"]) == ["embeddings", "layer_0", "layer_1", "layer_2", "layer_3"]
    for rows in data["activations"].values():
        assert rows.shape == (n_prompt + n_response - 1, 128)
        assert rows.dtype == torch.float32
        assert rows.device.type == "cpu"
    settings = data["settings"]
    assert settings["dtype"] == "float32"
    assert settings["attention"] == "sdpa"
    assert settings["batch_shape"] == [1, n_prompt]
    assert settings["versions"]["torch"] == torch.__version__
    assert data["path"] is None


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.3, "seed": 7}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 1}]
)
def test_text_is_the_same_with_and_without_capture(tiny: LoadedModel, sampling: dict[str, Any]) -> None:
    given: dict[str, Any] = {"tokenizer": tiny.tokenizer, "max_new_tokens": 24, **sampling}
    plain = generate_inference("Tell me.", tiny.model, **given)
    captured, data = generate_inference("Tell me.", tiny.model, capture_activations=True, **given)
    assert captured == plain
    again, _ = generate_inference_with_activations("Tell me.", tiny.model, **given)
    assert again == plain
    raw = raw_residuals(tiny.model, tiny.name, data["token_ids"].tolist())
    for key, rows in data["activations"].items():
        torch.testing.assert_close(rows, raw[key], atol=1e-5, rtol=1e-5)


def test_seed_decides_the_sample_and_leaves_the_callers_random_state(tiny_llama: LoadedModel) -> None:
    def ask(seed: int | None) -> tuple[str, dict[str, Any]]:
        return generate_inference_with_activations(
            "Tell me.", tiny_llama.model, tokenizer=tiny_llama.tokenizer, temperature=1.5, seed=seed, max_new_tokens=16
        )

    torch.manual_seed(3)
    before = torch.get_rng_state()
    texts = {ask(seed)[0] for seed in range(4)}
    assert len(texts) == 4
    assert ask(2)[0] == ask(2)[0]
    assert torch.equal(torch.get_rng_state(), before)
    text, data = ask(None)
    assert ask(data["settings"]["seed"])[0] == text  # a drawn seed is told


def test_greedy_does_not_read_the_checkpoints_sampling(
    tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"tokenizer": tiny_llama.tokenizer, "max_new_tokens": 12}
    plain = generate_inference("Tell me.", tiny_llama.model, **given)
    for name, value in (("do_sample", True), ("temperature", 9.0), ("top_k", 3)):
        monkeypatch.setattr(tiny_llama.model.generation_config, name, value)
    assert {generate_inference("Tell me.", tiny_llama.model, **given) for _ in range(3)} == {plain}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_saved_file_gives_the_returned_dict(tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "new" / "folders" / "x.h5"
    _, data = generate_inference_with_activations(
        PROMPT,
        "demo",
        file,
        sites="embed,resid_post,z,mlp_post,final_norm",
        dtype=dtype,
        max_new_tokens=np.int64(6),
        temperature=np.float32(0.5),
        seed=np.int64(3),
    )
    assert {rows.dtype for rows in data["activations"].values()} == {getattr(torch, dtype)}
    assert_same_data(load_activations(file), data)
    assert (data["settings"]["seed"], data["settings"]["temperature"]) == (3, 0.5)
    assert os.listdir(file.parent) == ["x.h5"]


def test_bare_file_name_is_written_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, data = generate_inference_with_activations(PROMPT, "demo", "bare.h5", max_new_tokens=2)
    assert data["path"] == str(tmp_path / "bare.h5")
    assert load_activations("bare.h5")["prompt"] == PROMPT


def test_pickle_name_is_written_as_hdf5_and_found_by_it(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"france\.h5"):
        _, data = generate_inference_with_activations(PROMPT, "demo", tmp_path / "france.pkl", max_new_tokens=2)
    assert os.listdir(tmp_path) == ["france.h5"]
    assert_same_data(load_activations(tmp_path / "france.pkl"), data)


def test_existing_file_is_refused_before_the_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.h5"
    generate_inference_with_activations(PROMPT, "demo", file, max_new_tokens=2)
    with monkeypatch.context() as patched:
        patched.setattr(asking, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
        with pytest.raises(PathExists, match="overwrite=True"):
            generate_inference_with_activations("Other", "demo", file)
        with pytest.raises(PathExists, match="folder"):
            generate_inference_with_activations("Other", "demo", tmp_path)
    assert load_activations(file)["prompt"] == PROMPT
    generate_inference_with_activations("Other", "demo", file, overwrite=True, max_new_tokens=2)
    assert load_activations(file)["prompt"] == "Other"


def test_a_cell_that_is_run_again_writes_a_version_beside_the_file(tmp_path: Path) -> None:
    """The message offers both ways; versions that processes write at once each get a name of their own."""
    file = tmp_path / "my.france.h5"

    def cell(**options: Any) -> str:
        return str(generate_inference_with_activations(PROMPT, "demo", file, max_new_tokens=2, **options)[1]["path"])

    assert cell(overwrite="version") == str(file)
    with pytest.raises(PathExists, match=r'overwrite=True.* or overwrite="version", which writes my.france-2.h5'):
        cell()
    with ThreadPoolExecutor(4) as threads:
        written = set(threads.map(lambda _: cell(overwrite="version"), range(4)))
    assert written == {str(tmp_path / f"my.france-{number}.h5") for number in (2, 3, 4, 5)}
    assert all(load_activations(each)["prompt"] == PROMPT for each in written)
    with pytest.raises(SelectionError, match='"version"'):
        cell(overwrite="versions")


@pytest.mark.parametrize(
    ("layers", "keys"),
    [
        (0, ["layer_0"]),
        (-1, ["layer_3"]),
        ([0, -1], ["layer_0", "layer_3"]),
        (range(1, 3), ["layer_1", "layer_2"]),
        ("0-1,-1", ["layer_0", "layer_1", "layer_3"]),
        ([range(2), "3"], ["layer_0", "layer_1", "layer_3"]),
        (None, ["layer_0", "layer_1", "layer_2", "layer_3"]),
        (np.int64(2), ["layer_2"]),
        (np.arange(2), ["layer_0", "layer_1"]),
        ([np.int64(1)], ["layer_1"]),
        (torch.tensor([0, -1]), ["layer_0", "layer_3"]),
    ],
)
def test_layers_choose_the_keys(layers: Any, keys: list[str]) -> None:
    _, data = generate_inference_with_activations(PROMPT, "demo", None, layers, max_new_tokens=2)
    assert list(data["activations"]) == ["embeddings", *keys]


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"sites": "resid_past"}, UnknownSite, "resid_post"),
        ({"sites": "head_result"}, UnknownSite, "capture 'z'"),
        ({"sites": ""}, UnknownSite, "Sites:"),
        ({"positions": "lst"}, UnknownPositions, "last"),
        ({"positions": "::-1"}, UnknownPositions, "step"),
        ({"positions": "1:2:3:4"}, UnknownPositions, "slice"),
        ({"layers_to_capture": [99]}, UnknownLayer, "4 layers"),
        ({"layers_to_capture": [-5]}, UnknownLayer, "4 layers"),
        ({"layers_to_capture": "three"}, UnknownLayer, "three"),
        ({"layers_to_capture": [True]}, UnknownLayer, "True"),
        ({"layers_to_capture": []}, UnknownLayer, "no layers"),
        ({"layers_to_capture": "3-1"}, UnknownLayer, "backwards"),
        ({"layers_to_capture": slice(0, 2)}, UnknownLayer, "slice"),
        ({"layers_to_capture": 1.5}, UnknownLayer, "1.5"),
        ({"max_new_tokens": 0}, PromptError, "at least 1"),
        ({"max_new_tokens": 2.5}, PromptError, "whole number"),
        ({"max_new_tokens": "5"}, PromptError, "whole number"),
        ({"top_p": 2}, PromptError, "at most 1"),
        ({"top_p": 0}, PromptError, "above 0"),
        ({"top_k": -1}, PromptError, "0 .no limit. or more"),
        ({"seed": "x"}, PromptError, "seed"),
        ({"temperature": -1.0}, PromptError, "temperature"),
        ({"dtype": "float33"}, ModelError, "float33"),
        ({"load_in_8bit": True, "load_in_4bit": True}, ModelError, "choose one"),
        ({"max_tokens": 3}, TypeError, "max_new_tokens"),
    ],
)
def test_wrong_wishes_are_refused_before_the_weights_load(
    given: dict[str, Any], error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(asking, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(error, match=says):
        generate_inference_with_activations(PROMPT, "demo", tmp_path / "x.h5", **given)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("prompt", ["", "   \n"])
def test_empty_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(EmptyPrompt):
        generate_inference(prompt, "demo")


def test_prompt_that_is_no_string_is_refused() -> None:
    with pytest.raises(PromptError, match="int"):
        generate_inference(5, "demo")  # type: ignore[call-overload]


def test_prompt_longer_than_the_context_is_refused_and_one_that_fills_it_gives_one_token(
    demo: LoadedModel, same_hooks_after: Callable[[Any], None], tmp_path: Path
) -> None:
    same_hooks_after(demo.model)
    n_tokens = len(demo.tokenizer("a" * 600)["input_ids"])
    text = "a" * 600
    assert n_tokens > 512
    with pytest.raises(PromptTooLong, match=f"{n_tokens} tokens.*512"):
        generate_inference_with_activations(text, demo, tmp_path / "x.h5")
    assert os.listdir(tmp_path) == []
    while len(demo.tokenizer(text)["input_ids"]) > 512:
        text = text[:-1]
    assert len(demo.tokenizer(text)["input_ids"]) == 512
    _, data = generate_inference_with_activations(text, demo)
    assert len(data["generated_ids"]) == 1
    assert data["activations"]["layer_0"].shape[0] == 512


def test_site_the_model_lacks_leaves_no_hook_and_no_file(
    tokenizer: Any, same_hooks_after: Callable[[Any], None], tmp_path: Path
) -> None:
    from helpers.models import CONFIGS, build

    model = build(CONFIGS["gpt_neox"]())
    same_hooks_after(model)
    with pytest.raises(SiteUnavailable, match=r"resid_mid.*parallel"):
        generate_inference_with_activations("Hi", model, tmp_path / "x.h5", tokenizer=tokenizer, sites="resid_mid")
    assert os.listdir(tmp_path) == []


def test_disk_without_room_is_refused_before_generating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    monkeypatch.setattr(asking, "respond", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(DiskFull, match="free"):
        generate_inference_with_activations(PROMPT, "demo", tmp_path / "x.h5")
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_be_written_is_refused_before_generating(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderNotWritable):
        generate_inference_with_activations(PROMPT, "demo", tmp_path / "file" / "x.h5")


def test_save_path_without_capture_is_refused() -> None:
    with pytest.raises(SelectionError, match="capture_activations=True"):
        generate_inference(PROMPT, "demo", save_path="x.h5")  # type: ignore[call-overload]


def with_template(loaded: LoadedModel, template: str) -> Any:
    import copy

    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_chat_template_is_used_with_one_bos(tiny_llama: LoadedModel) -> None:
    tokenizer = with_template(tiny_llama, TEMPLATE)
    _, data = generate_inference_with_activations(
        "Hi", tiny_llama.model, tokenizer=tokenizer, system_prompt="Be brief.", max_new_tokens=2
    )
    ids = data["input_ids"][0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[1:]) == "<system>Be brief.\n<user>Hi\n<assistant>"
    assert data["prompt"] == "Hi"
    assert data["settings"]["chat_template"] is True
    assert data["settings"]["system_prompt"] == "Be brief."
    _, raw = generate_inference_with_activations(
        "Hi", tiny_llama.model, tokenizer=tokenizer, apply_chat_template=False, max_new_tokens=2
    )
    assert tokenizer.decode(raw["input_ids"][0]) == "Hi"


def test_template_that_writes_bos_and_tokenizer_that_adds_it_give_one(tiny_llama: LoadedModel) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = with_template(tiny_llama, TEMPLATE)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert tokenizer("Hi")["input_ids"][0] == tokenizer.bos_token_id
    for chat in (True, False):
        for prompt in ("Hi", f"{bos}Hi") if not chat else ("Hi",):
            _, data = generate_inference_with_activations(
                prompt, tiny_llama.model, tokenizer=tokenizer, apply_chat_template=chat, max_new_tokens=2
            )
            assert data["input_ids"][0].tolist().count(tokenizer.bos_token_id) == 1


def test_checkpoints_own_generation_config_is_in_the_settings(
    tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_llama.model.generation_config, "repetition_penalty", 7.0)
    monkeypatch.setattr(tiny_llama.model.generation_config, "stop_strings", ["zzz"])
    _, data = generate_inference_with_activations(
        "Tell me.", tiny_llama.model, tokenizer=tiny_llama.tokenizer, max_new_tokens=4
    )
    assert data["settings"]["generation_config"]["repetition_penalty"] == 7.0


def test_template_without_system_role_says_so(tiny_llama: LoadedModel) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    with pytest.raises(PromptError, match="no system role"):
        generate_inference(
            "Hi", tiny_llama.model, tokenizer=with_template(tiny_llama, refusing), system_prompt="Be brief."
        )


@needs_real
def test_tokenizer_that_adds_bos_adds_one() -> None:
    from helpers.places import STORIES

    for prompt in ("Once upon a time", "<s>Once upon a time"):
        _, data = generate_inference_with_activations(prompt, str(STORIES), max_new_tokens=2)
        assert data["input_ids"][0].tolist().count(1) == 1


def test_threads_that_share_a_model_take_turns(tiny_llama: LoadedModel) -> None:
    from concurrent.futures import ThreadPoolExecutor

    given: dict[str, Any] = {"tokenizer": tiny_llama.tokenizer, "max_new_tokens": 5}
    another = copy.deepcopy(tiny_llama.model)  # raw hooks of the test must not see the other threads
    alone = threading.Lock()  # nor one another

    def ask(number: int) -> str:
        if number % 3 == 0:
            return generate_inference(f"Tell me {number}.", tiny_llama.model, **given)
        text, data = generate_inference_with_activations(f"Tell me {number}.", tiny_llama.model, **given)
        with alone:
            raw = raw_residuals(another, "llama", data["token_ids"].tolist())
        torch.testing.assert_close(data["activations"]["layer_2"], raw["layer_2"], atol=1e-5, rtol=1e-5)
        return text

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(ask, range(24)))
    assert texts == [generate_inference(f"Tell me {number}.", tiny_llama.model, **given) for number in range(24)]


def test_dtype_may_be_torchs_and_tokenizer_a_name() -> None:
    _, data = generate_inference_with_activations(
        PROMPT, "demo", dtype=torch.bfloat16, device=torch.device("cpu"), tokenizer="demo", max_new_tokens=2
    )
    assert data["activations"]["layer_0"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"device": "cuda"}, {"load_in_8bit": True}, {"revision": "x"}, {"device_map": "auto"}],
)
def test_load_options_with_a_loaded_model_are_refused(tiny_llama: LoadedModel, options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=f"{next(iter(options))}.*loaded already"):
        generate_inference("Hi", tiny_llama.model, tokenizer=tiny_llama.tokenizer, **options)


def test_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(PromptError, match="not text"):
        generate_inference("\ud800", "demo")


def test_two_threads_capture_their_own_rows(tokenizer: Any) -> None:
    """Each its own model: hooks and files of one do not touch the other."""
    from helpers.models import CONFIGS, build

    models = [build(CONFIGS["llama"]()), build(CONFIGS["gpt2"]())]
    found: dict[int, dict[str, Any]] = {}

    def ask(number: int) -> None:
        found[number] = generate_inference_with_activations(
            "Tell me.", models[number], tokenizer=tokenizer, max_new_tokens=20
        )[1]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, family in enumerate(("llama", "gpt2")):
        raw = raw_residuals(models[number], family, found[number]["token_ids"].tolist())
        for key, rows in found[number]["activations"].items():
            torch.testing.assert_close(rows, raw[key], atol=1e-5, rtol=1e-5)
