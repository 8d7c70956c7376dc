"""No option is taken and dropped: each changes what comes out, or is refused by its name; adapters and deltas as lm-eval's `hf` has them."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import json
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from helpers.commands import within
from helpers.models import CONFIGS, build, save_with_code
from helpers.tasks import loglikelihoods
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import AutomaticEval as package
from AutomaticEval import (
    Direction,
    HFActivations,
    answer_benchmark_question,
    answer_benchmark_question_with_activations,
    editing,
    evaluate,
    evaluate_with_activations,
    generate_inference,
    generate_inference_with_activations,
    load_activations,
    open_run,
    score_continuations,
)
from AutomaticEval.analysis.probes.saved.saved_probe import SavedProbe
from AutomaticEval.capture.generate_arguments import GenerateKeywords
from AutomaticEval.capture.prompt import AskOptions
from AutomaticEval.cli.app import app
from AutomaticEval.errors import AutomaticEvalError, ModelError, ModelUnavailable, UnknownLayer
from AutomaticEval.evaluation.evaluating import EvaluateOptions
from AutomaticEval.models import loading
from AutomaticEval.models.checkpoint.load_options import LoadKeywords, LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.models.described.remembered import description_of
from AutomaticEval.models.loading import load_model, n_layers_of

PAIRS = [("What is the capital of", " France"), ("Tell me", " more of it"), ("", "One")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, its adapter, one that lies by itself beside it, and a delta."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    base = build(CONFIGS["llama"]())
    delta = copy.deepcopy(base)
    with torch.no_grad():
        for weight in delta.parameters():
            weight.copy_(0.1 * torch.randn_like(weight))
    for name, model in (("base", base), ("delta", delta)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "nested").mkdir()
    base.save_pretrained(folder / "nested" / "inside")
    tokenizer.save_pretrained(folder / "nested" / "inside")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    config.base_model_name_or_path = "../base"
    adapted = get_peft_model(copy.deepcopy(base), config)
    adapted.peft_config["default"].base_model_name_or_path = "../base"
    adapted.save_pretrained(folder / "adapter")
    return folder


def scores(lm: Any) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = lm.loglikelihood(loglikelihoods(PAIRS), disable_tqdm=True)
    return found


def ours(folder: Path, name: Path, **options: Any) -> list[tuple[float, bool]]:
    lm = HFActivations(str(name), device="cpu", activation_save_dir=folder, scoring="stock", **options)
    found = scores(lm)
    lm._open.close()
    return found


@pytest.mark.parametrize("option", ["peft", "delta", "subfolder", "add_bos_token", "tokenizer", "max_length", "dtype"])
def test_scores_are_those_of_lm_evals_hf(option: str, folders: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "peft": str(folders / "adapter"),
        "delta": str(folders / "delta"),
        "subfolder": "inside",
        "add_bos_token": True,
        "tokenizer": str(folders / "base"),
        "max_length": 8,
        "dtype": "bfloat16",
    }
    base = folders / ("nested" if option == "subfolder" else "base")
    theirs = scores(HFLM(str(base), device="cpu", **{option: given[option]}))
    assert ours(tmp_path, base, **{option: given[option]}) == theirs
    if option not in ("subfolder", "tokenizer"):  # which are the base's
        assert theirs != scores(HFLM(str(folders / "base"), device="cpu"))


def test_a_delta_of_tied_weights_is_lm_evals_and_says_so(tmp_path: Path, tokenizer: Any) -> None:
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = True
    for name in ("base", "delta"):
        build(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    theirs = scores(HFLM(str(tmp_path / "base"), device="cpu", delta=str(tmp_path / "delta")))
    with pytest.warns(UserWarning, match=r"lm_head.weight is tied to model.embed_tokens.weight.*twice"):
        assert ours(tmp_path, tmp_path / "base", delta=str(tmp_path / "delta")) == theirs


def test_an_adapter_with_tokens_of_its_own(folders: Path, tmp_path: Path) -> None:
    """lm-eval gives the embeddings a row for each token of the tokenizer; the adapter was saved with these rows."""
    from peft import LoraConfig, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    tokenizer.add_tokens(["<one>", "<two>"])
    model = AutoModelForCausalLM.from_pretrained(folders / "base")
    model.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(
        target_modules=["q_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        modules_to_save=["embed_tokens", "lm_head"],
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "words")
    given = {"peft": str(tmp_path / "adapter"), "tokenizer": str(tmp_path / "words")}
    theirs = scores(HFLM(str(folders / "base"), device="cpu", **given))
    assert ours(tmp_path, folders / "base", **given) == theirs
    with pytest.raises(ModelUnavailable, match="does not fit the model"):  # its tokenizer has fewer
        load_model(folders / "base", options=LoadOptions(peft=given["peft"]))


def test_new_rows_are_the_same_each_time(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    tokenizer.add_tokens(["<one>", "<two>"])
    found = []
    for _ in range(2):
        monkeypatch.setattr(loading, "_loaded", type(loading._loaded)())
        torch.rand(1)
        options = LoadOptions(peft=str(folders / "adapter"))
        found.append(load_model(folders / "base", tokenizer=tokenizer, options=options))
    assert found[0].model is not found[1].model
    assert found[0].model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert found[0].fingerprint() == found[1].fingerprint()


def with_adapter(folders: Path) -> LoadedModel:
    """Made by peft itself."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(folders / "base")
    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    return LoadedModel(PeftModel.from_pretrained(model, folders / "adapter").eval(), tokenizer, "by peft")


def layer_2(loaded: LoadedModel, ids: Any) -> torch.Tensor:
    """By a plain forward."""
    with torch.no_grad():
        out = loaded.model(torch.tensor([list(map(int, ids))]), output_hidden_states=True, use_cache=False)
    return torch.as_tensor(out.hidden_states[2][0])  # before the last block, whose output is normed


def test_every_door_takes_an_adapter(folders: Path, tmp_path: Path) -> None:
    expected = with_adapter(folders)
    how: dict[str, Any] = {"peft": str(folders / "adapter"), "layers_to_capture": [1], "device": "cpu"}
    base = str(folders / "base")
    _, data = generate_inference_with_activations("Tell me.", base, tmp_path / "x.h5", max_new_tokens=3, **how)
    torch.testing.assert_close(
        data["activations"]["layer_1"], layer_2(expected, data["token_ids"]), atol=1e-5, rtol=1e-5
    )
    assert load_activations(tmp_path / "x.h5")["settings"]["loaded_with"] == {"peft": "adapter"}
    assert data["settings"]["adapters"]["default"] == {"type": "LORA", "base": "base", "active": True}

    (scored,) = score_continuations([("Tell me", " more")], base, capture_activations=True, positions="all", **how)
    kept = scored.activation_data or {}
    torch.testing.assert_close(
        kept["activations"]["layer_1"], layer_2(expected, kept["token_ids"]), atol=1e-5, rtol=1e-5
    )

    outcome = evaluate_with_activations(
        base, "demo_facts", limit=1, positions="all", activation_save_dir=tmp_path, **how
    )
    run = open_run(outcome.folder or "")
    assert run.settings["loaded_with"] == {"peft": "adapter"}
    assert run.settings["model_hash"] == expected.fingerprint()
    for sample in run:
        found = layer_2(expected, sample["token_ids"])
        torch.testing.assert_close(sample["activations"]["layer_1"], found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("command", ["generate", "benchmark", "extract", "heads strength"])
def test_the_command_line_takes_an_adapter(command: str, folders: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "Tell me."}\n')
    own = {
        "generate": ["generate", "Tell me.", "--save_path", "x.h5", "--max_new_tokens", "2"],
        "benchmark": ["--capture_activations", "--benchmark", "demo_facts", "--limit", "1"],
        "extract": ["extract", "--texts", "texts.jsonl", "--output", "out"],
        "heads strength": ["heads", "strength", "--data_path", "texts.jsonl"],
    }[command]
    told = []
    for peft in ([], ["--peft", str(folders / "adapter")]):
        (tmp_path / str(len(peft))).mkdir()
        (tmp_path / str(len(peft)) / "texts.jsonl").write_text('{"text": "Tell me."}\n')
        done = within(*own, "--model", str(folders / "base"), *peft, cwd=tmp_path / str(len(peft)))
        assert done.returncode == 0, done.stderr
        if command == "heads strength":
            told.append((tmp_path / str(len(peft)) / "results" / "head_strength.json").read_text())
            continue
        found = [*(tmp_path / str(len(peft))).rglob("run.h5"), *(tmp_path / str(len(peft))).glob("x.h5")]
        run = open_run(found[0].parent if found[0].name == "run.h5" else found[0])
        told.append(run[0]["activations"]["layer_1"])
        assert run.settings.get("loaded_with") == ({"peft": "adapter"} if peft else None)
    same = told[0] == told[1] if isinstance(told[0], str) else told[0].shape == told[1].shape and torch.equal(*told)
    assert not same


@pytest.mark.parametrize("place", ["beside", "where it was trained", "on the hub"])
def test_an_adapter_by_itself_loads_its_base(
    place: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name: str | Path = folders / "adapter"
    if place == "where it was trained":
        monkeypatch.chdir(folders)
        name = copied(folders / "adapter", tmp_path / "adapter", "base")
    if place == "on the hub":  # kept from before, as it is found without a network
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path), raising=False)
        for whole, source in (("me/adapter", folders / "adapter"), ("me/base", folders / "base")):
            held = tmp_path / f"models--{whole.replace('/', '--')}"
            copied(source, held / "snapshots" / "0123", "me/base")
            (held / "refs").mkdir()
            (held / "refs" / "main").write_text("0123")
        name = "me/adapter"
    assert n_layers_of(name) == 3
    loaded = load_model(name)
    assert loaded.fingerprint() == with_adapter(folders).fingerprint()
    prefix = "me/" if place == "on the hub" else ""
    assert (loaded.name, loaded.loaded_with) == (f"{prefix}adapter", {"base": f"{prefix}base"})
    assert loaded.tokenizer("Tell me.")["input_ids"]
    with pytest.raises(UnknownLayer):
        generate_inference_with_activations("Tell me.", str(name), layers_to_capture=7)


def copied(source: Path, folder: Path, base: str) -> Path:
    """A copy, of an adapter with another base."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if (folder / "adapter_config.json").exists():
        about = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**about, "base_model_name_or_path": base}))
    return folder


def test_an_adapter_by_itself_brings_its_tokenizer(folders: Path, tmp_path: Path) -> None:
    name = copied(folders / "adapter", tmp_path / "adapter", str(folders / "base"))
    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    tokenizer.add_tokens(["<one>"])
    tokenizer.save_pretrained(name)
    loaded = load_model(name)
    assert len(loaded.tokenizer) == len(tokenizer) == loaded.model.get_input_embeddings().weight.shape[0]


def test_an_adapter_that_was_trained_further_is_loaded_anew(folders: Path, tmp_path: Path) -> None:
    name = copied(folders / "adapter", tmp_path / "adapter", str(folders / "base"))
    options = LoadOptions(peft=str(name))
    states = [loading.state_of(folders / "base", options)]
    first = load_model(folders / "base", options=options).model
    assert load_model(folders / "base", options=options).model is first
    (name / "adapter_model.safetensors").touch()
    states.append(loading.state_of(folders / "base", options))
    assert load_model(folders / "base", options=options).model is not first
    assert states[0] != states[1]
    assert loading.state_of(folders / "base") not in states


def test_what_adapters_lack_is_refused(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    name = copied(folders / "adapter", tmp_path / "adapter", "")
    with pytest.raises(ModelUnavailable, match="does not say what it was made for"):
        load_model(name)
    with pytest.raises(ModelError, match=r"is an adapter for .*base; name that, and give peft="):
        load_model(folders / "adapter", options=LoadOptions(peft=str(folders / "adapter")))
    weights = load_file(name / "adapter_model.safetensors")
    save_file(
        {key: each for number, (key, each) in enumerate(weights.items()) if number}, name / "adapter_model.safetensors"
    )
    with pytest.raises(ModelUnavailable, match="missing adapter keys"):  # peft would leave them random
        load_model(folders / "base", options=LoadOptions(peft=str(name)))
    with pytest.raises(ModelUnavailable, match=r"no folder '\./nowhere'"):
        load_model(folders / "base", options=LoadOptions(peft="./nowhere"))
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ModelError, match=r"not installed: pip install 'AutomaticEval\[peft\]'"):
        load_model(folders / "base", options=LoadOptions(peft=str(folders / "adapter"), dtype="float16"))


def test_deltas_of_other_models_are_refused(folders: Path, tmp_path: Path, tokenizer: Any) -> None:
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 4
    build(config).save_pretrained(tmp_path / "deeper")
    build(type(config)(**{**CONFIGS["llama"]().to_dict(), "intermediate_size": 32})).save_pretrained(
        tmp_path / "narrower"
    )
    with pytest.raises(ModelUnavailable, match=r"9 weights are in one alone, first model.layers.3"):
        load_model(folders / "base", options=LoadOptions(delta=str(tmp_path / "deeper")))
    with pytest.raises(ModelUnavailable, match=r"its model.layers.0.mlp.gate_proj.weight is \[32, 32\]"):
        load_model(folders / "base", options=LoadOptions(delta=str(tmp_path / "narrower")))


def test_what_is_put_on_weights_that_are_offloaded_is_refused(folders: Path, tmp_path: Path) -> None:
    parts: dict[str, Any] = {f"model.layers.{number}": "disk" if number == 1 else "cpu" for number in range(3)}
    parts |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for option, source in (("peft", "adapter"), ("delta", "delta")):
        options = LoadOptions(
            **{option: str(folders / source)}, device_map=parts, offload_folder=str(tmp_path / "offload")
        )
        with pytest.raises(ModelError, match=rf"{option}: .* weights that are offloaded"):
            load_model(folders / "base", options=options)


def test_code_runs_when_it_is_trusted(tmp_path: Path, tokenizer: Any) -> None:
    save_with_code(tmp_path / "own", tokenizer, 2.0)
    with pytest.raises(ModelUnavailable, match="trust_remote_code"):
        load_model(tmp_path / "own")
    loaded = load_model(tmp_path / "own", options=LoadOptions(trust_remote_code=True))
    assert type(loaded.model).__name__ == "OwnForCausalLM"
    assert n_layers_of(tmp_path / "own", LoadOptions(trust_remote_code=True)) == 3


def test_options_that_exclude_each_other_or_need_another() -> None:
    for given, says in [
        ({"peft": "a", "delta": "b"}, "peft and delta"),
        ({"delta": "b", "load_in_8bit": True}, "8 or 4 bits"),
        ({"max_memory": {"cpu": "1GiB"}}, "max_memory need"),
        ({"offload_folder": "x"}, "offload_folder need"),
        ({"tp_plan": "auto", "peft": "a"}, "tp_plan .* peft cannot be divided"),
        ({"tp_plan": "colwise"}, "tp_plan is 'colwise'; write 'auto'"),
    ]:
        with pytest.raises(ModelError, match=says):
            LoadOptions(**given)
    with pytest.raises(ModelError, match="use_fast_tokenizer=False: transformers has no tokenizer in Python"):
        load_model("demo", options=LoadOptions(use_fast_tokenizer=False))
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    for name, value in (("use_fast_tokenizer", False), ("add_bos_token", True)):
        with pytest.raises(ModelError, match=f"{name} were given with a tokenizer"):
            load_model("demo", tokenizer=tokenizer, options=LoadOptions(**{name: value}))


# Every option of every door


LOADING: dict[str, Any] = {
    "dtype": "bfloat16",
    "device": "cpu",
    "device_map": "auto",
    "load_in_8bit": True,
    "load_in_4bit": True,
    "revision": "abc",
    "peft": "an/adapter",
    "adapter": "base",
    "delta": "a/delta",
    "subfolder": "inside",
    "trust_remote_code": True,
    "model_description": 'attention = "self_attn"',
    "use_fast_tokenizer": False,
    "add_bos_token": True,
    "max_memory": {"cpu": "3GiB"},
    "offload_folder": "elsewhere",
    "attn_implementation": "eager",
    "tp_plan": "auto",
}
WITH = {"max_memory": {"device_map": "auto"}, "offload_folder": {"device_map": "auto"}}


class Loading(Exception):
    """The model is about to be loaded."""


def asking(door: Callable[..., Any], *given: Any) -> Callable[..., Any]:
    return lambda **options: door(*given, **options)


DOORS: dict[str, Callable[..., Any]] = {
    "generate_inference": asking(generate_inference, "Hi", "demo"),
    "generate_inference_with_activations": asking(generate_inference_with_activations, "Hi", "demo"),
    "answer_benchmark_question": asking(answer_benchmark_question, "Who?", "demo"),
    "answer_benchmark_question_with_activations": asking(
        answer_benchmark_question_with_activations, "Who?", "demo", False
    ),
    "evaluate": asking(evaluate, "demo", "demo"),
    "evaluate_with_activations": asking(evaluate_with_activations, "demo", "demo"),
    "score_continuations": asking(score_continuations, [], "demo"),
    "HFActivations": asking(HFActivations, "demo"),
    "editing": lambda **options: editing("demo", [], **options).__enter__(),
}
BENCHMARKS = ("evaluate", "evaluate_with_activations", "HFActivations")
COMMANDS = {
    "generate": ["generate", "Hi"],
    "benchmark": ["--benchmark", "demo"],
    "sites": ["sites", "--verify"],
    "heads strength": ["heads", "strength", "--data_path", "t.jsonl"],
    "heads compare": [
        "heads",
        "compare",
        "--data_path",
        "t.jsonl",
        "--pre_tuned_model",
        "demo",
        "--fine_tuned_model",
        "demo",
    ],
    "heads ablate": ["heads", "ablate", "--head-spec", "0:0", "--data_path", "t.jsonl"],
    "heads patch": ["heads", "patch", "--head-spec", "0:0", "--profile", "baseline", "--emotion", "gratitude"],
    "heads sweep": ["heads", "sweep", "--emotion", "gratitude"],
    "heads screen": ["heads", "screen"],
    "probe_score": ["probe_score", "p.safetensors", "Who?"],
    "steer": ["steer", "--direction", "d.safetensors", "--scale", "1", "--data_path", "t.jsonl"],
    "extract": ["extract", "--texts", "t.jsonl", "--model", "demo"],
}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[LoadOptions]:
    """The options with which a model would have been loaded."""
    found: list[LoadOptions] = []

    def load(model: Any, *, tokenizer: Any = None, options: LoadOptions = LoadOptions(), **more: Any) -> Any:
        found.append(dataclasses.replace(options, **more))
        raise Loading

    for module in (
        "models.loading",
        "models.editing",
        "capture.prompt",
        "capture.tree.continuations",
        "capture.texts.many_runs",
        "evaluation.question",
        "evaluation.evaluating",
        "evaluation.for_simple_evaluate",
        "analysis.heads.compare",
    ):
        monkeypatch.setattr(f"AutomaticEval.{module}.load_model", load)
    return found


def test_the_keywords_are_the_options() -> None:
    assert [each.name for each in dataclasses.fields(LoadOptions)] == [*LoadKeywords.__annotations__] == [*LOADING]
    for door in (AskOptions, EvaluateOptions):
        assert set(LoadKeywords.__annotations__) <= set(door.__annotations__)


@pytest.mark.parametrize("door", DOORS)
def test_every_door_hands_on_how_the_model_is_loaded(door: str, loads: list[LoadOptions]) -> None:
    for name, value in LOADING.items():
        if name == "tp_plan" and door in BENCHMARKS:
            with pytest.raises(AutomaticEvalError, match="tp_plan: the processes of a benchmark share its questions"):
                DOORS[door](**{name: value})
            continue
        with pytest.raises(Loading):
            DOORS[door](**{name: value}, **WITH.get(name, {}))
        assert getattr(loads.pop(), name) == value, name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_hands_on_how_the_model_is_loaded(command: str, loads: list[LoadOptions], tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "Hi"}\n')
    Direction(torch.ones(128), "layer_1").save(tmp_path / "d.safetensors")
    vectors = [torch.ones(128)] * 3
    about = ("embeddings", "prompt[-1]", "correct", "true", "false", 1.0, 9, "demo", None)
    SavedProbe(*vectors, torch.zeros(1), torch.zeros(0, dtype=torch.int64), *about).save(tmp_path / "p.safetensors")
    root: Any = typer.main.get_command(app)
    for part in command.split() if command != "benchmark" else ():
        root = root.commands[part]
    offered = {each.name for each in root.params} & set(LOADING)
    assert {"peft", "delta", "subfolder", "trust_remote_code", "device", "revision"} <= offered
    for name in offered:
        value = LOADING[name]
        flags = [f"--{name}"] if value is True else [f"--{name}", value]
        flags += ["--device_map", "auto"] if name in WITH else []
        with pytest.raises(Loading):
            within(*COMMANDS[command], *flags, cwd=tmp_path)
        assert getattr(loads.pop(), name) == value, name


def test_loading_uses_every_option(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers is told; peft, delta, subfolder, add_bos_token and trust_remote_code are scored above."""
    told: dict[str, Any] = {}
    for kind in ("AutoModelForCausalLM", "AutoConfig", "AutoTokenizer"):
        stock = getattr(transformers, kind).from_pretrained

        def spy(*args: Any, _stock: Any = stock, **kwargs: Any) -> Any:
            told.update(kwargs)
            return _stock(*args, **kwargs)

        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", spy)
    for name, value in LOADING.items():
        monkeypatch.setattr(loading, "_loaded", type(loading._loaded)())
        told.clear()
        value = {"peft": str(folders / "adapter"), "delta": str(folders / "delta")}.get(name, value)
        also = {"peft": str(folders / "adapter")} if name == "adapter" else WITH.get(name, {})
        options = LoadOptions(**{name: value}, **also)
        if name in ("use_fast_tokenizer", "subfolder", "tp_plan"):
            with pytest.raises(ModelError, match=r"use_fast_tokenizer|no model|this process is alone"):
                load_model(folders / "base", options=options)
        else:
            loaded = load_model(folders / "base", options=options)
        seen = {
            "device": told.get("device_map") == {"": "cpu"},
            "load_in_8bit": name == "load_in_8bit" and told["quantization_config"].load_in_8bit,
            "load_in_4bit": name == "load_in_4bit" and told["quantization_config"].load_in_4bit,
            "peft": name == "peft" and "default" in loaded.model.peft_config,
            "adapter": name == "adapter" and not hasattr(loaded.model, "peft_config"),
            "delta": name == "delta" and loaded.loaded_with == {"delta": "delta"},
            "use_fast_tokenizer": told.get("use_fast") is False,
            "model_description": name == "model_description" and description_of(loaded.model).given == ("attention",),
            "tp_plan": not told.get("device_map"),  # no weights were asked for
        }
        assert seen[name] if name in seen else told.get(name) == value, name


@pytest.mark.parametrize("name", package.__all__)
def test_an_option_that_there_is_not_is_refused_by_name(name: str) -> None:
    door = DOORS.get(name)
    if door is None:
        public = getattr(package, name)
        needed = [
            each
            for each in inspect.signature(public).parameters.values()
            if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
        ]
        door = asking(public, *["demo" for _ in needed])
    with pytest.raises(TypeError, match="no_such_option"):
        door(no_such_option=1)


THEIRS: dict[str, tuple[Any, Callable[[Any], Any] | str]] = {
    "backend": ("seq2seq", "backend: 'seq2seq'"),
    "truncation": (True, lambda lm: lm.truncation),
    "logits_cache": (False, lambda lm: not lm.logits_cache),
    "max_length": (64, lambda lm: lm.max_length == 64),
    "softmax_dtype": ("float64", lambda lm: lm.softmax_dtype is torch.float64),
    "mixed_precision_dtype": ("bfloat16", lambda lm: lm.mixed_precision_dtype is torch.bfloat16),
    "batch_size": (3, lambda lm: lm.batch_size == 3),
    "max_batch_size": (5, lambda lm: lm.max_batch_size == 5),
    "prefix_token_id": (7, lambda lm: lm.prefix_token_id == 7),
    "max_memory_per_gpu": ("1GiB", "max_memory_per_gpu is for parallelize=True"),
    "max_cpu_memory": ("1GiB", "max_cpu_memory is for parallelize=True"),
    "autogptq": (True, "autogptq: transformers loads GPTQ"),
    "gptqmodel": (True, "gptqmodel: transformers loads GPTQ"),
    "gguf_file": ("x.gguf", "gguf_file: GGUF files are not loaded"),
    "think_end_token": ("</think>", lambda lm: lm.think_end_token == "</think>"),
    "enable_thinking": (True, "enable_thinking"),
    "chat_template_args": ({"own": 1}, lambda lm: lm.chat_template_args == {"own": 1}),
}
"""Of lm-eval's `hf`: a value, and what shows that it is used, or what the refusal says."""


def test_every_option_of_lm_evals_hf_is_used_or_refused(tmp_path: Path) -> None:
    names = {each.name for each in inspect.signature(HFLM).parameters.values() if each.kind is not each.VAR_KEYWORD}
    assert names - {"pretrained", "tokenizer", "parallelize"} - set(LOADING) == set(THEIRS)
    for name, (value, shown) in THEIRS.items():
        if isinstance(shown, str):
            with pytest.raises((AutomaticEvalError, ValueError), match=shown):
                HFActivations("demo", activation_save_dir=tmp_path, device="cpu", **{name: value})
            continue
        lm = HFActivations("demo", activation_save_dir=tmp_path, device="cpu", **{name: value})
        lm._open.close()
        assert shown(lm), name


def test_parallelize_spreads_the_model(loads: list[LoadOptions], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AutomaticEvalError, match="max_memory_per_gpu was given, but torch sees no GPU"):
        HFActivations("demo", parallelize=True, max_memory_per_gpu="1GiB")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for given, most in [
        ({}, None),
        ({"max_memory_per_gpu": "1GiB"}, {0: "1GiB", 1: "1GiB"}),
        ({"max_memory_per_gpu": 5, "max_cpu_memory": "9GiB"}, {0: 5, 1: 5, "cpu": "9GiB"}),
        ({"max_cpu_memory": "9GiB", "offload_folder": "there"}, {"cpu": "9GiB"}),
    ]:
        with pytest.raises(Loading):
            HFActivations("demo", parallelize=True, **given)
        options = loads.pop()
        assert (options.device_map, options.max_memory) == ("auto", most)
        assert options.offload_folder == given.get("offload_folder")


@pytest.mark.parametrize("name", ["autogptq", "gptqmodel", "gguf_file", "subfolder", "peft", "delta", "parallelize"])
def test_lm_evals_own_defaults_are_no_wish(name: str, tmp_path: Path) -> None:
    """Code that passes all of them goes on."""
    default = inspect.signature(HFLM).parameters[name].default
    HFActivations("demo", device="cpu", activation_save_dir=tmp_path, **{name: default})._open.close()


ASKED: dict[str, Any] = {
    "sites": "mlp_out",
    "positions": "last",
    "store_dtype": "float16",
    "reduce": "max",
    "project": [[1.0, 2.0]] * 128,
    "think_tokens": ("<a>", "</a>"),
    "max_new_tokens": 2,
    "temperature": 0.7,
    "top_p": 0.5,
    "top_k": 3,
    "seed": 4,
    "system_prompt": "Be brief.",
    "apply_chat_template": False,
    "tokenizer": None,
    "overwrite": True,
    "strict": True,  # `test_finite.py`
    "generation": "eager",  # `test_graph_runs.py`
}


def test_every_option_of_a_question_is_used(tmp_path: Path) -> None:
    of_transformers = set(GenerateKeywords.__annotations__)  # `test_generate_arguments.py`
    assert set(AskOptions.__annotations__) == {*ASKED, *LOADING, *of_transformers}
    tokenizer = copy.deepcopy(load_model("demo").tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }} now"

    def told(file: Path | None = None, **options: Any) -> Any:
        sampled = {"temperature": 1.0, "seed": 3}  # top_p and top_k are refused without a temperature
        given = {"tokenizer": tokenizer, "max_new_tokens": 4, "layers_to_capture": 0, **sampled, **options}
        text, data = generate_inference_with_activations("Tell me.", "demo", file, **given)
        shapes = {key: (tuple(each.shape), each.dtype) for key, each in data["activations"].items()}
        return text, list(data["token_ids"]), shapes, data["settings"]

    plain = told()
    for name, value in ASKED.items():
        if name not in ("overwrite", "strict", "generation"):
            assert told(**{name: value}) != plain, name
    assert told(generation="eager") == plain  # without a GPU
    with pytest.raises(AutomaticEvalError, match="generation graph needs a CUDA GPU"):
        told(generation="graph")
    told(tmp_path / "x.h5")
    with pytest.raises(AutomaticEvalError, match="overwrite"):
        told(tmp_path / "x.h5")
    told(tmp_path / "x.h5", overwrite=True)


BENCHMARK: dict[str, tuple[Any, str]] = {
    "num_trials": (2, "2"),
    "limit": (3, "3"),
    "num_fewshot": (1, "1"),
    "seed": (9, "9"),
    "batch_size": (5, "5"),
    "scoring": ("stock", "stock"),
    "generation": ("eager", "eager"),
    "include_path": (".", "."),
    "benchmark_data": (".", "."),
    "apply_chat_template": (True, "True"),
    "system_instruction": ("Be brief.", "Be brief."),
    "gen_kwargs": ("max_gen_toks=3", "max_gen_toks=3"),
    "repeats": (2, "2"),
    "think_end_token": ("</think>", "</think>"),
    "enable_thinking": (False, "False"),
    "predict_only": (True, "True"),
    "confirm_run_unsafe_code": (True, "True"),
}


def test_every_option_of_a_benchmark_reaches_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`Benchmark` stands in the settings, and what each of its fields does is tested with benchmarks."""
    from AutomaticEval.evaluation import evaluating

    assert set(EvaluateOptions.__annotations__) == {*BENCHMARK, *LOADING}
    found: list[Any] = []

    def load_tasks(benchmark: Any) -> Any:
        found.append(benchmark)
        raise Loading

    monkeypatch.setattr(evaluating, "load_tasks", load_tasks)
    for name, (value, text) in BENCHMARK.items():
        needed = {"apply_chat_template": True} if name == "enable_thinking" else {}
        with pytest.raises(Loading):
            evaluate_with_activations("demo", "demo", **{**needed, name: value})
        field = {"benchmark_data": "local_files"}.get(name, name)
        given = getattr(found.pop(), field)
        assert str(given[0] if isinstance(given, tuple) else given) == text, name
    for name in ("use_cache", "cache_requests"):
        with pytest.raises(AutomaticEvalError, match=name):
            evaluate_with_activations("demo", "demo", **{name: True})


@pytest.mark.parametrize(
    ("command", "given", "name"),
    [
        (["generate", "Hi"], ["--overwrite"], "overwrite"),
        (["generate", "Hi"], ["--think_tokens", "<a>,</a>"], "think_tokens"),
        (["--benchmark", "demo"], ["--think_tokens", "<a>,</a>"], "think_tokens"),
        (["generate", "Hi"], ["--activation_save_dir", "x"], "activation_save_dir"),
        (["generate", "Hi", "--save_path", "x.h5"], ["--activation_save_dir", "x"], "activation_save_dir"),
        (["--benchmark", "demo"], ["--activation_save_dir", "x"], "activation_save_dir"),
        (COMMANDS["extract"], ["--split", "train"], "split"),  # its default
        (COMMANDS["extract"], ["--dataset_config", "x"], "dataset_config"),
        (COMMANDS["extract"], ["--output", "x", "--activation_save_dir", "y"], "activation_save_dir"),
        (["extract", "--profile", "baseline"], ["--text_field", "x"], "text_field"),
        (COMMANDS["heads compare"], ["--max_new_tokens", "3"], "max_new_tokens"),
        (COMMANDS["heads ablate"], ["--limit", "3"], "limit"),
        (["heads", "ablate", "--head-spec", "0:0", "--benchmark", "demo"], ["--max-tokens", "3"], "max_new_tokens"),
        (["heads", "patch", "--head-spec", "0:0", "--pairs", "t.jsonl"], ["--sentiment", "vader"], "sentiment"),
        (COMMANDS["steer"], ["--gen_kwargs", "max_gen_toks=3"], "gen_kwargs"),
        (["lens", "RUN"], ["--steps", "3"], "steps"),
        (["lens", "RUN"], ["--task", "demo_facts"], "task"),
        (["lens", "RUN", "--doc_id", "3"], ["--limit", "3"], "limit"),
        (["lens", "RUN", "--doc_id", "3"], ["--seed", "42"], "seed"),  # its default
        (["lens", "RUN", "--train_tuned", "t.safetensors"], ["--position", "prompt[-1]"], "position"),
        (["lens", "RUN", "--train_tuned", "t.safetensors"], ["--tuned", "x.safetensors"], "tuned"),
        (["probe", "RUN", "--grid"], ["--position", "prompt[-1]"], "position"),  # its default
        (["report", "RUN"], ["--site", "layer_1"], "site"),
        (["report", "RUN", "--serve"], ["--position", "prompt[-1]"], "position"),  # its default
        (["report", "RUN", "--serve"], ["-o", "report.html"], "output"),  # its default
        (["report", "RUN", "--to", "embedding-atlas"], ["--serve"], "serve"),
        (["report", "RUN", "--to", "embedding-atlas"], ["--results", "results"], "results"),
        (["report", "RUN", "--to", "embedding-atlas"], ["--lens"], "lens"),
    ],
)
def test_options_of_another_way_to_use_a_command_are_refused(
    command: list[str], given: list[str], name: str, loads: list[LoadOptions], tmp_path: Path
) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "Hi"}\n')
    done = within(*command, *given, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"SelectionError: --{name} was given, but ")


def read_names(function: Any) -> set[str]:
    """The names that a function's code reads, those of functions within it too."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def functions_of(public: Any) -> list[Any]:
    if not inspect.isclass(public):
        return [public]
    members = inspect.getmembers(public, lambda each: inspect.isfunction(each) or inspect.ismethod(each))
    own = [each for name, each in members if (not name.startswith("_") or name == "__init__")]
    return [each for each in own if inspect.unwrap(each).__module__.startswith("AutomaticEval")]


def commands() -> list[Any]:
    def within_group(group: Any) -> list[Any]:
        own = [each.callback for each in group.registered_commands]
        own += [group.registered_callback.callback] if group.registered_callback else []
        return own + [found for each in group.registered_groups for found in within_group(each.typer_instance)]

    return within_group(app)


@pytest.mark.parametrize(
    "function", [f for name in package.__all__ for f in functions_of(getattr(package, name))] + commands()
)
def test_every_parameter_is_read(function: Any) -> None:
    """None is declared and forgotten."""
    code = inspect.unwrap(function)
    if not hasattr(code, "__code__") or (code.__name__ == "__init__" and "@dataclass" in _source_of_class(code)):
        return  # the fields of a dataclass are its parameters
    body = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0].body  # type: ignore[attr-defined]
    if len(body) == 1 and isinstance(body[0], ast.Raise):
        return  # it is refused
    given = [name for name in inspect.signature(code).parameters if name not in ("self", "cls")]
    assert set(given) <= read_names(code), code.__qualname__


def _source_of_class(function: Any) -> str:
    try:
        inspect.getsource(function)
    except OSError:  # it was generated
        return "@dataclass"
    return ""


def test_options_of_loading_are_refused_with_a_model_that_is_loaded() -> None:
    """lm-eval warns that it may ignore them."""
    loaded = load_model("demo")
    for name, value in LOADING.items():
        options = LoadOptions(**{name: value}, **WITH.get(name, {}))
        with pytest.raises(ModelError, match=name):
            load_model(loaded, options=options)


def test_types_of_the_keywords_are_those_of_the_options() -> None:
    hints = typing.get_type_hints(LoadOptions)
    assert {name: hints[name] for name in LOADING} == typing.get_type_hints(LoadKeywords)
