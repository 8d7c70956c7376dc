"""What a new user typed that was nearly right: each message names the thing, what was found, what was expected, and what to do."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import within
from helpers.places import ROOT

from AutomaticEval import (
    Edit,
    FromHuggingFace,
    HFActivations,
    editing,
    evaluate,
    evaluate_with_activations,
    generate_inference,
    generate_inference_with_activations,
    load_activations,
    open_run,
    score_continuations,
)
from AutomaticEval.errors import EditError, PromptError, StoreError, unknown_option, warn
from AutomaticEval.store.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("messages") / "run"
    evaluate_with_activations("demo", "demo_facts", limit=2, layers_to_capture=[1, 2], output=folder)
    return open_run(folder)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: generate_inference_with_activations("Hi", "demo", layers=0), "layers_to_capture"),
        (lambda: generate_inference("Hi", "demo", stop="."), "stop_strings"),
        (lambda: generate_inference("Hi", "demo", max_tokens=3), "max_new_tokens"),
        (lambda: evaluate_with_activations("demo", "demo_facts", layer=0), "layers_to_capture"),
        (lambda: evaluate_with_activations("demo", "demo_facts", max_new_tokens=9), "gen_kwargs"),
        (lambda: evaluate("demo", "demo_facts", num_samples=3), "limit"),
        (lambda: evaluate("demo", "demo_facts", n_shots=3), "num_fewshot"),
        (lambda: score_continuations([("a", "b")], "demo", layers=0), "layers_to_capture"),
        (lambda: Edit.add("resid_post", torch.zeros(128), layers_to_capture=2), "layers"),
        (lambda: HFActivations("demo", layers=0), "layers_to_capture"),
        (lambda: editing("demo", [], torch_dtype="float32"), "dtype"),
        (lambda: generate_inference("Hi", "demo", temprature=1.0), "temperature"),
    ],
)
def test_a_keyword_of_another_function_leads_to_the_one_here(call: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^no option '\w+'\. Did you mean '{name}'\? Options: "):
        call()


def test_a_word_without_a_counterpart_is_left_to_its_spelling() -> None:
    assert "Did you mean" not in str(unknown_option("layers", ["dtype", "seed"]))
    assert "Did you mean 'stopp'?" in str(unknown_option("stop", ["stopp"]))


def test_a_field_that_texts_lack_is_named_with_text_field(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"Found review\. .* name it with text_field"):
        FromHuggingFace("demo", 0, [{"review": "x"}]).extract_features()
    (tmp_path / "a.tsv").write_text("review\tscore\nGood.\t1\n")
    told = within("extract", "--model", "demo", "--texts", "a.tsv", cwd=tmp_path).stderr
    assert "--text_field" in told
    named = within("extract", "--model", "demo", "--texts", "a.tsv", "--text_field", "review", cwd=tmp_path)
    assert named.returncode == 0


def test_sites_that_a_run_lacks_and_several_sites(run: Run) -> None:
    for ask in (run.questions().activations, run.activations, run.rows):
        for site in ("layer_2.mlp_out", "mlp_out.2", "logits"):
            with pytest.raises(StoreError, match=rf"holds no '{site}'\. It has .*layer_1, layer_2\.$"):
                ask(site)
        with pytest.raises(StoreError, match="Did you mean 'layer_2' or 'layer_1'"):
            ask("layer2")
    with pytest.raises(StoreError, match=r"several with keys=: run\.batches\(keys=\['layer_1', 'layer_2'\]\)"):
        run.batches(["layer_1", "layer_2"])
    for wrong in ({}, {"keys": []}, {"keys": "layer_1"}, {"key": "layer_1", "keys": ["layer_2"]}):
        with pytest.raises(StoreError, match="several with keys="):
            run.batches(**wrong)
    assert set(next(iter(run.batches(keys=["layer_1", "layer_2"])))) == {"layer_1", "layer_2"}


def test_the_activations_of_a_sample_answer_to_each_spelling(run: Run, tmp_path: Path) -> None:
    _, data = generate_inference_with_activations(
        "Hi", "demo", tmp_path / "x.h5", sites="resid_post,mlp_out", max_new_tokens=2
    )
    _, line = generate_inference_with_activations("Hi", "demo", sites="resid_post", reduce="mean", max_new_tokens=2)
    some = [data["activations"], load_activations(tmp_path / "x.h5")["activations"], copy.deepcopy(data)["activations"]]
    for activations in (*some, copy.copy(data["activations"]), line["reduced"], run[0]["activations"]):
        assert activations["resid_post.2"] is activations["layer_2"] is activations.get("resid_post.2")
        assert "resid_post.2" in activations
        assert "resid_post.9" not in activations
        assert activations.get("resid_post.9", 3) == 3
        assert "resid_post.2" not in list(activations)
        with pytest.raises(KeyError, match=r"'layer_9'; there are .*layer_2"):
            activations["layer_9"]
    assert torch.equal(some[0]["mlp_out.1"], some[0]["layer_1.mlp_out"])
    torch.save(data["activations"], tmp_path / "x.pth")
    again = torch.load(tmp_path / "x.pth", weights_only=True)
    assert list(again) == list(data["activations"])
    assert torch.equal(again["layer_2"], data["activations"]["layer_2"])


def test_a_vector_of_another_width_is_refused_before_the_model_runs() -> None:
    for edit in (
        Edit.add("layer_1", torch.zeros(64)),
        Edit.add("resid_post", torch.zeros(64), layers="0-2", positions="response"),
        Edit.replace("layer_1", torch.zeros(3, 64)),
        Edit.project_out("layer_1", torch.ones(64)),
    ):
        with (
            pytest.raises(EditError, match=r"\[(3, )?64\]; expected \[128\], the d_model of this model"),
            editing("demo", edit),
        ):
            pytest.fail("the edit was taken")
    for fits in (
        Edit.add("layer_1", torch.zeros(1)),
        Edit.add("layer_1", torch.zeros(128)),
        Edit.add("layer_1", torch.tensor(0.0)),
    ):
        with editing("demo", fits) as model:
            generate_inference("Hi", model, max_new_tokens=1)


@pytest.mark.parametrize("name", ["x.npz", "x.NPY", "x.safetensors", "a/x.json", "x.parquet", "x.csv.gz"])
def test_names_of_other_formats_are_refused(name: str, run: Run, tmp_path: Path) -> None:
    says = re.escape(
        f"{Path(name).suffix} is the ending of another format; name it {Path(name).with_suffix('.h5').name}"
    )
    with pytest.raises(StoreError, match=says):
        generate_inference_with_activations("Hi", "no-such-model", tmp_path / name)
    done = within("prune", str(run.path), "--layers", "1", "-o", name, cwd=tmp_path)
    assert re.search(says, " ".join(done.stderr.split()))
    assert not list(tmp_path.iterdir())


def test_names_without_another_format_are_taken(tmp_path: Path) -> None:
    for name in ("x.h5", "x.hdf5", "x", "gpt2-v1.5"):
        generate_inference_with_activations("Hi", "demo", tmp_path / name, max_new_tokens=1)
        assert len(open_run(tmp_path / name)) == 1


def test_a_warning_is_a_sentence_without_a_line_of_code() -> None:
    edit = Edit.add("layer_1", torch.zeros(128), positions="last")
    with editing("demo", edit) as model, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluate(model, "demo_facts", limit=1)
    (told,) = [each for each in caught if "Scoring" in str(each.message)]
    assert "it is edited at some tokens only (positions or where)" in str(told.message)
    shown = warnings.formatwarning(told.message, told.category, told.filename, told.lineno)
    assert shown == f"<AutomaticEval>:1: UserWarning: {told.message}\n"


def test_warnings_are_shown_once_and_in_one_way() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for sentence in ("One.", "Two.", "One."):
            warn(sentence)
    assert [str(each.message) for each in caught] == ["One.", "Two."]
    others = [
        path.name
        for path in (ROOT / "AutomaticEval").rglob("*.py")
        if "warnings.warn(" in path.read_text()
        and path.name != "moved.py"  # a DeprecationWarning shows whose import it is
    ]
    assert not others
