"""Directions: from runs, held against rows that transformers gives by itself; their files, read by safetensors alone; and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import within
from safetensors import safe_open
from safetensors.torch import save_file

from AutomaticEval import (
    Direction,
    Edit,
    difference_of_means,
    editing,
    evaluate_with_activations,
    load_direction,
    open_run,
)
from AutomaticEval.analysis.steering.direction import load_directions, save_directions
from AutomaticEval.analysis.tensor_file import PROBE
from AutomaticEval.errors import AutomaticEvalError, EditError, PathExists, SelectionError, StoreError, UnreadableFile
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel

VECTOR = torch.randn(128, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def runs(demo: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo's facts by the plain model, and by one to whose layer 1 a vector is added; the second asks more questions."""
    folder = tmp_path_factory.mktemp("directions")
    evaluate_with_activations(demo, "demo_facts", limit=16, positions="prompt[-1:]", output=folder / "plain")
    with editing(demo, Edit.add("layer_1", VECTOR)) as edited:
        evaluate_with_activations(edited, "demo_facts", limit=20, positions="prompt[-1:]", output=folder / "edited")
    return folder / "plain", folder / "edited"


def last_rows(demo: LoadedModel, prompts: list[str], layer: int) -> Any:
    """The residual stream after a block at each prompt's last token, from a forward of transformers for each prompt."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([demo.tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            rows.append(demo.model(ids, output_hidden_states=True).hidden_states[layer + 1][0, -1].double().numpy())
    return np.stack(rows)


@pytest.mark.parametrize("key", ["resid_post.1", "layer_1"])
def test_a_difference_of_means_is_that_of_plain_forwards(demo: LoadedModel, runs: tuple[Path, Path], key: str) -> None:
    questions = open_run(runs[0]).questions()
    direction = difference_of_means(questions, key)
    right = np.array(questions.column("correct"))
    rows = last_rows(demo, questions.column("question"), 1)
    expected = rows[right].mean(0) - rows[~right].mean(0)
    assert np.abs(direction.vector.numpy() - expected).max() < 1e-4 * np.abs(expected).max()  # other kernels, float32
    assert (direction.site, direction.layer, direction.vector.dtype) == ("resid_post", 1, torch.float32)
    assert direction.norm == pytest.approx(float(np.linalg.norm(expected)), rel=1e-4)
    told = direction.made_from
    assert (told["n_true"], told["n_false"], told["label"]) == (right.sum(), (~right).sum(), "correct")
    assert told["mean_norm"] == pytest.approx(float(np.linalg.norm(rows, axis=1).mean()), rel=1e-4)
    assert told["models"] == [{"name": "demo", "hash": demo.fingerprint()}]
    assert told["runs"][0]["name"] == "plain"
    assert torch.equal(difference_of_means(open_run(runs[0]), key).vector, direction.vector)


def test_labels_of_ones_own_leave_questions_out(runs: tuple[Path, Path]) -> None:
    questions = open_run(runs[0]).questions()
    labels = [None, True, np.False_, True, *[None] * (len(questions) - 4)]
    direction = difference_of_means(questions, "layer_2", labels)
    rows = questions.activations("layer_2").double()
    assert torch.allclose(direction.vector, ((rows[1] + rows[3]) / 2 - rows[2]).float(), atol=1e-6)
    assert (direction.made_from["n_true"], direction.made_from["n_false"]) == (2, 1)
    for wrong, why in (
        ([True] * len(questions), "needs both"),
        ([True, False], "one for each"),
        ("task", "it must be true, false, or None"),
    ):
        with pytest.raises(StoreError, match=why):
            difference_of_means(questions, "layer_2", wrong)


def test_rows_that_were_reduced_are_no_direction(demo: LoadedModel, tmp_path: Path) -> None:
    evaluate_with_activations(demo, "demo_facts", limit=4, reduce="mean", layers_to_capture=0, output=tmp_path / "run")
    with pytest.raises(SelectionError, match="a direction needs whole rows"):
        difference_of_means(open_run(tmp_path / "run"), "layer_0")


def test_two_runs_give_the_direction_between_them(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """The edited run has the vector in its layer 1: what was added comes back."""
    command = ("compare", *map(str, runs), "--save_direction", str(tmp_path / "d.safetensors"), "-o", str(tmp_path))
    done = within(*command, "--layer", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    direction = load_direction(tmp_path / "d.safetensors")
    assert (direction.vector - VECTOR).abs().max() < 1e-4
    assert (direction.site, direction.layer) == ("resid_post", 1)
    assert direction.made_from["n_true"] == direction.made_from["n_false"] == 16
    assert [each["name"] for each in direction.made_from["runs"]] == ["plain", "edited"]
    assert direction.made_from["edits"]
    assert "mean of edited minus mean of plain" in done.stdout
    done = within(*command, "--layer", "-1,0", cwd=tmp_path / ".")
    assert done.returncode == 2
    assert "compare.json exists" in done.stderr.replace("\n", " ")
    (tmp_path / "compare.json").unlink()
    (tmp_path / "runs_comparison.png").unlink()
    done = within(*command, "--layer", "-1,0", cwd=tmp_path)
    assert "d.safetensors exists" in done.stderr
    assert not (tmp_path / "compare.json").exists()
    (tmp_path / "d.safetensors").unlink()
    assert within(*command, "--layer", "-1,1", cwd=tmp_path).returncode == 0
    assert [each.layer for each in load_directions(tmp_path / "d.safetensors")] == [1, 3]
    for left_out in (("--layer", "1"), ("--save_direction", "x.safetensors")):
        done = within("compare", *map(str, runs), *left_out, cwd=tmp_path)
        assert done.stderr.startswith("SelectionError: --save_direction FILE and --layer N go together")


def test_a_file_is_safetensors_with_its_provenance(tmp_path: Path) -> None:
    made_from = {"models": [{"name": "gpt2", "hash": "ab"}], "n_true": 3}
    direction = Direction(VECTOR.double().numpy(), "layer_2", made_by="hand", made_from=made_from)
    file = tmp_path / "d.safetensors"
    direction.save(file)
    with safe_open(file, framework="np") as held:
        metadata = held.metadata()
        assert list(held.keys()) == ["direction"]
        assert held.get_tensor("direction").tobytes() == VECTOR.numpy().tobytes()
    assert (metadata["format"], metadata["format_version"]) == ("automatic-eval/direction", "1.0")
    told = json.loads(metadata["directions"])["direction"]
    assert told.pop("created") > "2026"
    assert told.pop("version")
    expected = {"site": "resid_post", "layer": 2, "made_by": "hand", "made_from": made_from}
    assert told == {**expected, "norm": pytest.approx(float(VECTOR.norm()))}
    again = load_direction(file)
    assert torch.equal(again.vector, direction.vector)
    assert again.digest == direction.digest
    assert dataclasses.asdict(again).items() >= expected.items()
    with pytest.raises(PathExists):
        direction.save(file)
    direction.save(file, overwrite=True)
    for name in ("d.npy", "d"):
        with pytest.raises(StoreError, match="ending"):
            direction.save(tmp_path / name)
    with pytest.raises(StoreError, match="JSON"):
        Direction(VECTOR, "layer_2", made_from={"rows": VECTOR}).save(tmp_path / "e.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


def test_several_layers_are_one_file(tmp_path: Path) -> None:
    both = [Direction(VECTOR * layer, "resid_post", layer) for layer in (1, 3)]
    save_directions(tmp_path / "d.safetensors", both)
    assert [each.digest for each in load_directions(tmp_path / "d.safetensors")] == [each.digest for each in both]
    assert load_direction(tmp_path / "d.safetensors", layer=3).digest == both[1].digest
    with pytest.raises(SelectionError, match="resid_post in layer 1, resid_post in layer 3; say which one"):
        load_direction(tmp_path / "d.safetensors")
    with pytest.raises(SelectionError, match="layer 2 was asked for"):
        load_direction(tmp_path / "d.safetensors", layer=2)


def test_an_edit_is_the_scale_times_the_vector_as_it_is_stored(demo: LoadedModel) -> None:
    ids = torch.tensor([demo.tokenizer("What is red?")["input_ids"]])
    direction = Direction(VECTOR, "layer_1")
    found = []
    for edit in (direction.edit(-2.5, positions="last"), Edit.add("layer_1", -2.5 * VECTOR, positions="last")):
        with torch.no_grad(), editing(demo, edit):
            found.append(demo.model(ids).logits)
    assert torch.equal(*found)
    assert not torch.equal(found[0], demo.model(ids).logits)


def test_files_of_other_code_need_a_place(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", VECTOR.numpy()[None].astype(np.float16))
    save_file({"steering": VECTOR.bfloat16()}, tmp_path / "v.safetensors")
    save_file({"layer_3": VECTOR, "layer_1.mlp_out": VECTOR + 1}, tmp_path / "named.safetensors")
    for name, dtype in (("v.npy", torch.float16), ("v.safetensors", torch.bfloat16)):
        with pytest.raises(SelectionError, match="does not say where"):
            load_direction(tmp_path / name)
        with pytest.raises(SelectionError, match="in which layer"):
            load_direction(tmp_path / name, site="resid_post")
        for place in ({"site": "resid_post", "layer": 14}, {"site": "layer_14"}):
            direction = load_direction(tmp_path / name, **place)
            assert torch.equal(direction.vector, VECTOR.to(dtype).float())
            assert (direction.site, direction.layer) == ("resid_post", 14)
    assert load_direction(tmp_path / "v.npy", site="embed").layer is None
    assert [each.layer for each in load_directions(tmp_path / "v.npy", site="mlp_out", layers=[1, 2])] == [1, 2]
    assert {each.at.key for each in load_directions(tmp_path / "named.safetensors")} == {"layer_3", "layer_1.mlp_out"}


def saved(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata or None)
    return path


def test_what_is_no_direction_is_told(tmp_path: Path) -> None:
    Direction(VECTOR, "resid_post", 2).save(tmp_path / "good.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    (tmp_path / "text.npy").write_text("no")
    np.save(tmp_path / "matrix.npy", np.ones((4, 128)))
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    saved(tmp_path / "model.safetensors", {f"w{n}": torch.ones(4, 4) for n in range(5)})
    saved(tmp_path / "two.safetensors", {"a": VECTOR, "b": VECTOR + 1})
    saved(tmp_path / "number.safetensors", {"a": torch.tensor(1.0)})
    saved(tmp_path / "nan.safetensors", {"layer_2": VECTOR.where(VECTOR > 0, torch.nan)})
    saved(tmp_path / "large.safetensors", {"layer_2": VECTOR.double() * 1e300})
    saved(tmp_path / "zero.safetensors", {"layer_2": VECTOR * 0})
    ours: dict[str, Any] = {"format": "automatic-eval/direction", "format_version": "1.0"}
    saved(tmp_path / "newer.safetensors", {"direction": VECTOR}, **{**ours, "format_version": "2.0"})
    saved(tmp_path / "silent.safetensors", {"direction": VECTOR}, **ours)
    for number, about in enumerate(
        (
            "no JSON",
            "[]",
            "{}",
            '{"direction": 3}',
            '{"direction": {"site": "resid_post", "layer": "2", "made_by": "x", "made_from": {}}}',
        )
    ):
        saved(tmp_path / f"damaged{number}.safetensors", {"direction": VECTOR}, **ours, directions=about)
    told = {
        "absent.safetensors": (UnreadableFile, "there is no file"),
        "text.safetensors": (UnreadableFile, "is no safetensors file"),
        "text.npy": (UnreadableFile, "holds no array"),
        "words.npy": (UnreadableFile, "a vector of real numbers"),
        "objects.npy": (UnreadableFile, "holds no array"),
        "matrix.npy": (UnreadableFile, r"\[4, 128\]"),
        "model.safetensors": (UnreadableFile, r"w0 \[4, 4\]"),
        "number.safetensors": (UnreadableFile, r"a \[\]"),
        "two.safetensors": (UnreadableFile, "holds 2 vectors"),
        "nan.safetensors": (EditError, "infinite or NaN"),
        "large.safetensors": (EditError, "infinite or NaN"),
        "zero.safetensors": (EditError, "points nowhere"),
        "newer.safetensors": (UnreadableFile, "format 2.0"),
        "silent.safetensors": (UnreadableFile, "do not say the site"),
        **{f"damaged{number}.safetensors": (UnreadableFile, "do not say the site") for number in range(5)},
    }  # fmt: skip
    kind: type[AutomaticEvalError]
    for name, (kind, why) in told.items():
        with pytest.raises(kind, match=why) as refused:
            load_direction(tmp_path / name)
        assert name in str(refused.value)
    for place, why in (({"site": "mlp_out"}, "the site mlp_out was asked for"), ({"layer": 3}, "layer 3 was asked for"), ({"site": "layer_3"}, "layer 3")):  # fmt: skip
        with pytest.raises(SelectionError, match=why):
            load_direction(tmp_path / "good.safetensors", **place)  # type: ignore[arg-type]
    assert load_direction(tmp_path / "good.safetensors", site="resid_post", layer=2).layer == 2


def test_what_cannot_be_a_direction_is_told() -> None:
    for vector, why in (
        (torch.ones(2, 3), "shape"),
        ([], "shape"),
        ("ab", "found str"),
        ([1.0, float("nan")], "1 of the 2 numbers"),
    ):
        with pytest.raises(EditError, match=why):
            Direction(vector, "layer_2")  # type: ignore[arg-type]
    for site, layer in (("resid_post", None), ("layer_2", 3), ("embed", 0), ("resid_post", -1), ("resid_post", True), ("resid_past", 1)):  # fmt: skip
        with pytest.raises(SelectionError):
            Direction(VECTOR, site, layer)
    given = VECTOR.clone()
    direction = Direction(given, "layer_2")
    given.zero_()
    assert direction.vector.any()


def test_a_site_is_there_once_and_its_layer_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    one, other = Direction(VECTOR, "resid_post.1"), Direction(2 * VECTOR, "layer_1")
    with pytest.raises(SelectionError, match="two directions at layer_1"):
        save_directions(tmp_path / "two.safetensors", [one, other])
    save_file({"layer_1": VECTOR, "resid_post.1": 2 * VECTOR}, tmp_path / "theirs.safetensors")
    with pytest.raises(SelectionError, match="two directions at layer_1"):
        load_directions(tmp_path / "theirs.safetensors")
    one.save(tmp_path / "one.safetensors")
    with pytest.raises(SelectionError, match="names its layer, and layer 2 was asked for"):
        load_directions(tmp_path / "one.safetensors", site="resid_post.1", layers=[2])


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04 no zip",
        b"\x93NUMPY\x01\x00\x76\x00" + b"((((".ljust(117) + b"\n",
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117)
        + b"\n",
    ],
)
def test_a_numpy_file_of_anyone_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "v.npy").write_bytes(content)
    with pytest.raises(UnreadableFile, match="holds no array of numbers"):
        load_direction(tmp_path / "v.npy", site="resid_post", layer=1)


@pytest.mark.parametrize(
    "values", [np.array(["1", "2"]), np.array(["2020-01-01"], "datetime64[D]"), np.array([1 + 2j])]
)
def test_a_vector_of_other_things_is_refused(tmp_path: Path, values: Any) -> None:
    np.save(tmp_path / "v.npy", values)
    with pytest.raises(UnreadableFile, match="a direction is a vector of real numbers"):
        load_direction(tmp_path / "v.npy", site="resid_post", layer=1)
    with pytest.raises(EditError):
        Direction(torch.tensor([1 + 2j, 3]), "resid_post.1")


def test_a_probe_is_told_from_a_direction(tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(4), "bias": torch.ones(1)}
    save_file(tensors, tmp_path / "probe.safetensors", {"format": PROBE.name})
    with pytest.raises(UnreadableFile, match=r"is a probe, and no direction; .*--save_direction FILE"):
        load_direction(tmp_path / "probe.safetensors")
