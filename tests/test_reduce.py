"""Less than whole rows: norms, projections, and one mean or maximum a sample.

Each is compared with what numpy makes, in float64, of raw hooks on one unpadded row.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers.commands import within
from helpers.models import CONFIGS, FAMILIES, build
from helpers.places import ROOT
from helpers.raw_hooks import raw_residuals
from helpers.runs import TEXTS, assert_honest
from helpers.samples import SETTINGS, assert_same_data, make_sample, same
from helpers.staged import stage_the_cpu
from safetensors.torch import save_file

from AutomaticEval import (
    HFActivations,
    evaluate_with_activations,
    generate_inference_with_activations,
    load_activations,
    open_run,
    recompute,
    score_continuations,
)
from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.capture.texts.extraction import extract
from AutomaticEval.capture.texts.feeding import Feeding
from AutomaticEval.capture.texts.text_set import TextSet
from AutomaticEval.capture.tree import walk as walking
from AutomaticEval.capture.tree.score import TOKENS_A_FORWARD
from AutomaticEval.errors import DamagedFile, NotFinite, OtherSettings, SelectionError, StoreError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.reducing.projection import Projection
from AutomaticEval.samples import Line, Part, Rows, Sample
from AutomaticEval.selection import Selection
from AutomaticEval.store.export.formats import export
from AutomaticEval.store.hdf5.write import write_shard
from AutomaticEval.store.run import Run
from AutomaticEval.store.upkeep.convert import convert
from AutomaticEval.store.upkeep.merge import merge
from AutomaticEval.store.upkeep.prune import prune
from AutomaticEval.store.upkeep.rebuild import rebuild_index
from AutomaticEval.store.upkeep.verify import verify
from AutomaticEval.store.writer import RunWriter

DATA = ROOT / "tests" / "data"
WIDTH = 32
"""Of the tiny models."""
K = 5
WAYS: dict[str, dict[str, Any]] = {
    "norm": {"reduce": "norm"},
    "project": {"project": np.random.default_rng(0).normal(size=(WIDTH, K))},
    "mean": {"reduce": "mean"},
    "max": {"reduce": "max"},
}
BY_SAMPLE = ("mean", "max")
PAIRS = [
    ("The capital of Fenland is", " a city"),
    ("The capital of Fenland is", " a large city by the sea"),
    ("The capital of Fenland was", " never a city"),
    ("Otters", " swim"),
]


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def expected(way: str, rows: torch.Tensor, matrix: Any = None) -> np.ndarray[Any, Any]:
    """What numpy makes of whole rows, in float64."""
    wide = rows.double().numpy()
    if way == "norm":
        return np.sqrt((wide**2).sum(1, keepdims=True))
    if way == "project":
        return wide @ np.asarray(WAYS["project"]["project"] if matrix is None else matrix, np.float64)
    return wide.mean(0) if way == "mean" else wide.max(0)


def assert_reduced(data: Mapping[str, Any], way: str, family: str, model: Any, positions: list[int]) -> None:
    """Compare every site of a sample with raw hooks over its own tokens. positions: those that are kept."""
    ids = [*data["input_ids"][0].tolist(), *data["generated_ids"].tolist()[:-1]]
    residuals = raw_residuals(model, family, ids)
    held = data["reduced"] if way in BY_SAMPLE else data["activations"]
    assert held.keys() == residuals.keys()
    if way in BY_SAMPLE:
        assert data["activations"] == {}
        assert data["tokens"] == []
        assert not len(data["positions"])
    else:
        assert data["positions"].tolist() == positions
    for key, whole in residuals.items():
        wanted = expected(way, whole[positions])
        assert held[key].dtype == torch.float32
        assert held[key].shape == wanted.shape
        size = max(1.0, float(whole.abs().max()))
        np.testing.assert_allclose(held[key].numpy(), wanted, rtol=2e-5, atol=2e-5 * size)


# what is computed, in every way of capturing


def test_generated_answers(tiny: LoadedModel, family: str, way: str) -> None:
    """In a left-padded batch, whose responses end at different places."""
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [21]]
    chosen = Selection.parse(positions="prompt[-2:]" if way == "max" else "all", **WAYS[way])
    for each in respond(tiny, prompts, Sampling(max_new_tokens=5), chosen):
        assert each.sample is not None
        data = each.sample.activation_data("m", chosen.as_dict())
        n_prompt, n_fed = len(each.sample.input_ids), len(each.sample.input_ids) + len(each.generated_ids) - 1
        kept = list(range(n_fed)) if way != "max" else list(range(max(0, n_prompt - 2), n_prompt))
        assert_reduced(data, way, family, tiny.model, kept)


def test_continuations_over_the_tree(tiny: LoadedModel, family: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their positions lie in several blocks of rows, which they share, over forwards of 7 tokens."""
    monkeypatch.setitem(TOKENS_A_FORWARD, "cpu", 7)
    for positions in ("all", "scored"):
        scored = score_continuations(
            PAIRS, tiny.model, tokenizer=tiny.tokenizer, capture_activations=True, positions=positions, **WAYS[way]
        )
        for each in scored:
            assert each.activation_data is not None
            n_fed = len(each.context_ids) + len(each.continuation_ids) - 1
            first = 0 if positions == "all" else len(each.context_ids) - 1
            assert_reduced(each.activation_data, way, family, tiny.model, list(range(first, n_fed)))


@pytest.mark.parametrize("scoring", ["tree", "stock"])
def test_benchmarks(way: str, scoring: str, tokenizer: Any, own_tasks: str, tmp_path: Path) -> None:
    """Choices, generated answers and whole texts, over the tree and in lm-eval's own batches."""
    loaded = LoadedModel(build(CONFIGS["llama"]()), tokenizer, "llama")
    how: dict[str, Any] = {"limit": 4, "scoring": scoring, "batch_size": 3, "positions": "all"}
    whole = evaluate_with_activations(loaded, "demo", output=tmp_path / "whole", **how)
    done = evaluate_with_activations(loaded, "demo", output=tmp_path / "run", **how, **WAYS[way])
    assert done.results["results"] == whole.results["results"]
    run = open_run(tmp_path / "run")
    assert len(run) == len(open_run(tmp_path / "whole"))
    assert verify(tmp_path / "run") == []
    for data in run:
        n_fed = data["input_ids"].shape[1] + len(data["generated_ids"]) - 1
        assert_reduced(data, way, "llama", loaded.model, list(range(n_fed)))
    assert_honest(tmp_path / "run", loaded)


@pytest.mark.parametrize("packing", [False, True])
def test_texts(way: str, packing: bool, tiny_llama: LoadedModel, tmp_path: Path) -> None:
    feeding = Feeding(seq_length=24, packing=packing)
    chosen = Selection.parse("embed,resid_post", **WAYS[way])
    extract(tiny_llama, TextSet("texts", TEXTS), chosen, tmp_path / "run", feeding)
    run = open_run(tmp_path / "run")
    assert verify(tmp_path / "run") == []
    for data in run:
        assert_reduced(data, way, "llama", tiny_llama.model, list(range(data["input_ids"].shape[1])))


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "granite", "mixtral", "phi"])
def test_every_kind_of_site(name: str, way: str, tokenizer: Any) -> None:
    """Also sites that are computed of others, multiplied, or a part of a module's output: what is reduced is the site's own row."""
    loaded = LoadedModel(build(FAMILIES[name]()), tokenizer, name)
    kinds = ("embed", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "head_result_norm", "final_norm")
    kinds = tuple(kind for kind in kinds if not loaded.layout.lacking(kind))
    sites = Selection.parse(kinds).sites(loaded.layout.n_layers)
    matrices = {site.key: np.random.default_rng(1).normal(size=(loaded.layout.widths[site], 3)) for site in sites}
    how = {"project": matrices} if way == "project" else WAYS[way]
    (plain,), (reduced,) = (
        respond(loaded, [[5, 6, 7, 8]], Sampling(max_new_tokens=4), Selection.parse(kinds, **each))
        for each in ({}, how)
    )
    assert plain.sample is not None
    assert reduced.sample is not None
    rows = plain.sample.activation_data("m", {})["activations"]
    data = reduced.sample.activation_data("m", {})
    for key, whole in rows.items():
        got = data["reduced" if way in BY_SAMPLE else "activations"][key]
        size = max(1.0, float(whole.abs().max()))
        np.testing.assert_allclose(
            got.numpy(), expected(way, whole, matrices[key]), rtol=2e-5, atol=2e-5 * size, err_msg=key
        )


def test_bfloat16_is_added_up_in_float32(tokenizer: Any) -> None:
    loaded = LoadedModel(build(CONFIGS["llama"](), torch.bfloat16), tokenizer, "llama")
    (plain,) = respond(loaded, [[5, 6, 7, 8] * 20], Sampling(max_new_tokens=4), Selection.parse())
    assert plain.sample is not None
    rows = plain.sample.activation_data("m", {})["activations"]["layer_1"]
    for way, how in WAYS.items():
        (reduced,) = respond(loaded, [[5, 6, 7, 8] * 20], Sampling(max_new_tokens=4), Selection.parse(**how))
        assert reduced.sample is not None
        data = reduced.sample.activation_data("m", {})
        got = data["reduced" if way in BY_SAMPLE else "activations"]["layer_1"]
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), expected(way, rows), rtol=1e-5, atol=2e-5)
        (narrow,) = respond(
            loaded, [[5, 6, 7, 8] * 20], Sampling(max_new_tokens=4), Selection.parse(store_dtype="float16", **how)
        )
        assert narrow.sample is not None
        data = narrow.sample.activation_data("m", {})
        stored = data["reduced" if way in BY_SAMPLE else "activations"]["layer_1"]
        assert same(stored, got.half())  # of the unrounded mean: rows that go into it are not narrowed


def test_autocast_does_not_round_projections(tiny_llama: LoadedModel) -> None:
    chosen = Selection.parse(**WAYS["project"])
    with torch.autocast("cpu", torch.bfloat16):
        (each,) = respond(tiny_llama, [[5, 6, 7]], Sampling(max_new_tokens=2), chosen)
        (plain,) = respond(tiny_llama, [[5, 6, 7]], Sampling(max_new_tokens=2), Selection.parse())
    assert each.sample is not None
    assert plain.sample is not None
    got, rows = (sample.activation_data("m", {})["activations"]["layer_1"] for sample in (each.sample, plain.sample))
    np.testing.assert_allclose(got.numpy(), expected("project", rows), rtol=1e-5, atol=1e-4)


def test_shared_rows_are_added_up_once(tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from AutomaticEval.capture.reduced_samples import SampleReducer

    rows = Rows([1, 2, 3], ["a", "b", "c"], [0, 1, 2], {"layer_0": torch.randn(3, 8)})
    samples = [Sample({}, [1, 2, 3], [4], [Part(rows, [0, 1, 2])]) for _ in range(50)]
    reducer, added = SampleReducer(Selection.parse(reduce="mean")), []
    real = reducer._reduction
    assert real is not None
    counted = type(real)(real.name, real.meaning, lambda part: added.append(1) or real.of_part(part), real.of_parts)
    reducer._reduction = counted
    assert all(isinstance(each.parts[0].rows, Line) for each in reducer(samples))
    assert len(added) == 1


# samples without positions, and numbers that are not finite


def test_a_sample_without_positions_has_nan(tmp_path: Path) -> None:
    """Of the demo's choices, those of one token have no fed response."""
    with pytest.warns(UserWarning, match="are infinite or NaN"):
        evaluate_with_activations(
            "demo", "demo_facts", limit=8, output=tmp_path / "run", positions="response", reduce="max"
        )
    run = open_run(tmp_path / "run")
    lengths = np.array([len(ids) for ids in (data["generated_ids"] for data in run)])
    assert (lengths == 1).any()
    assert (lengths > 1).any()
    np.testing.assert_array_equal(run.finite(), lengths > 1)
    assert run.reduced("layer_0").isnan().all(1).tolist() == (lengths == 1).tolist()
    assert run.where(run.finite()).reduced("layer_0").isfinite().all()
    assert run.non_finite["layer_0"] == int((lengths == 1).sum()) * run.reduced("layer_0").shape[1]
    assert_honest(tmp_path / "run", None, 8)
    with pytest.raises(NotFinite):
        evaluate_with_activations(
            "demo", "demo_facts", limit=8, output=tmp_path / "strict", positions="response", reduce="max", strict=True
        )


def test_nan_in_a_row_is_nan_in_what_is_made_of_it(tokenizer: Any, way: str) -> None:
    loaded = LoadedModel(build(CONFIGS["llama"]()), tokenizer, "llama")

    def spoil(module: Any, args: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        hidden[:, 0, 3] = torch.nan

    assert loaded.layout.n_layers == 3  # it is found before the model is spoilt
    handle = loaded.model.model.layers[2].register_forward_hook(spoil)
    try:
        (each,) = respond(
            loaded, [[5, 6, 7]], Sampling(max_new_tokens=1), Selection.parse(positions="prompt", **WAYS[way])
        )
    finally:
        handle.remove()
    assert each.sample is not None
    data = each.sample.activation_data("m", {})
    got = data["reduced" if way in BY_SAMPLE else "activations"]["layer_2"]
    wrong = got.isnan()
    if way in BY_SAMPLE:
        assert wrong.tolist() == [feature == 3 for feature in range(WIDTH)]
    else:
        assert wrong.all(1).tolist() == [True, False, False]


# what people type


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"reduce": "mena"}, "no reduce 'mena'. Did you mean 'mean'"),
        ({"reduce": "project"}, "no reduce 'project'"),
        ({"reduce": "norm", "project": np.ones((2, 2))}, "both given"),
        ({"reduce": "mean", "store_dtype": "int8"}, "int8 needs the rows of many tokens"),
        ({"project": "directions.csv"}, "a .npy file with one matrix"),
        ({"project": "nowhere.npy"}, "cannot be read"),
        ({"project": np.ones(3)}, r"the shape \[3\], expected \[width, k\]"),
        ({"project": np.ones((3, 0))}, "expected"),
        ({"project": [["a"]]}, "no matrix of numbers"),
        ({"project": np.array([[1.0, np.nan]])}, "infinite or NaN"),
        ({"project": np.array([[1e300]])}, "infinite or NaN, also as float32"),
        ({"project": {}}, "holds no matrix"),
        ({"project": {"layer_3.mpl_out": np.ones((2, 2))}}, "mlp_out"),
    ],
)
def test_selections_that_are_refused(how: dict[str, Any], said: str) -> None:
    with pytest.raises(SelectionError, match=said):
        Selection.parse(**how)


def test_a_matrix_that_does_not_fit_is_refused_before_the_model_runs(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    for project, said in (
        (np.ones((16, 2)), rf"embeddings has {WIDTH} numbers, so \[{WIDTH}, k\]"),
        ({"layer_0": np.ones((WIDTH, 2))}, "no matrix for embeddings; it has layer_0"),
    ):
        with pytest.raises(SelectionError, match=said):
            evaluate_with_activations(tiny_llama, "demo", limit=1, output=tmp_path / "run", project=project)
        with pytest.raises(SelectionError, match=said):
            generate_inference_with_activations("Hi", tiny_llama.model, tokenizer=tiny_llama.tokenizer, project=project)
        with pytest.raises(SelectionError, match=said):
            extract(tiny_llama, TextSet("t", TEXTS), Selection.parse(project=project), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_files_of_matrices(tmp_path: Path) -> None:
    one = np.random.default_rng(2).normal(size=(6, 2)).astype(np.float32)
    other = one[::-1].copy()
    np.save(tmp_path / "one.npy", one)
    np.savez(tmp_path / "two.npz", **{"layer_0": one, "mlp_out.1": other})
    tensors = {"resid_post.0": torch.from_numpy(one), "layer_1.mlp_out": torch.from_numpy(other)}
    save_file(tensors, tmp_path / "two.safetensors")
    single = Projection.of(tmp_path / "one.npy")
    assert single == Projection.of(torch.from_numpy(one)) == Projection.of(one.astype(np.float64))
    assert same(single.matrix("layer_7", 6), torch.from_numpy(one))
    two = Projection.of(str(tmp_path / "two.npz"))
    assert two == Projection.of(tmp_path / "two.safetensors") != single
    assert same(two.matrix("layer_1.mlp_out", 6), torch.from_numpy(other))
    assert Projection.of(other) != single
    digest = hashlib.sha256(b"every_site [6, 2]\n" + one.tobytes())  # as docs/format.md says it
    assert single.sha256 == digest.hexdigest()


# files


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run of the demo in each way, made when it is first asked for; of small shards, so that it has several."""
    folder = tmp_path_factory.mktemp("runs")
    matrix = np.random.default_rng(3).normal(size=(128, 4)).astype(np.float32)

    def made(way: str) -> Path:
        if not (folder / way).exists():
            how = {"project": matrix} if way == "project" else WAYS.get(way, {})
            evaluate_with_activations("demo", "demo", limit=6, output=folder / way, positions="all", **how)
        return folder / way

    return made


def numbers(run: Run, way: str, key: str) -> list[torch.Tensor]:
    return list(run.reduced(key)) if way in BY_SAMPLE else [run.read(number, key) for number in range(len(run))]


def test_runs_are_read_in_any_part(way: str, runs: Callable[..., Path]) -> None:
    run = open_run(runs(way))
    data = [run[number] for number in range(len(run))]
    key = run.keys[-1]
    group = "reduced" if way in BY_SAMPLE else "activations"
    for got, each in zip(numbers(run, way, key), data, strict=True):
        assert same(got, each[group][key])
        assert each["settings"]["reduce"] == way
    some = run.where(every_other(len(run)))
    for got, each in zip(numbers(some, way, key), [data[n] for n in range(1, len(run), 2)], strict=True):
        assert same(got, each[group][key])
    if way in BY_SAMPLE:
        for refused in (
            lambda: run.activations(key),
            lambda: run.read(0, key),
            lambda: run.rows(key),
            lambda: run.dataset(key),
            lambda: run.steps(0, key),
        ):
            with pytest.raises(
                StoreError, match=rf"holds no rows but the .* positions; read it with reduced\('{key}'\)"
            ):
                refused()
    else:
        with pytest.raises(StoreError, match="holds rows, which were not reduced to one line"):
            run.reduced(key)
    if way == "project":
        assert same(
            run.projection("layer_2"),
            torch.from_numpy(np.random.default_rng(3).normal(size=(128, 4)).astype(np.float32)),
        )
    else:
        with pytest.raises(StoreError, match="holds no projection"):
            run.projection("layer_2")


def said_by(cwd: Path, *arguments: str) -> tuple[int, str]:
    """The exit code of a command, and all that it printed, with single spaces."""
    done = within(*arguments, cwd=cwd)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def every_other(n: int) -> list[bool]:
    return [number % 2 == 1 for number in range(n)]


def test_plain_h5py_finds_what_the_format_says(way: str, runs: Callable[..., Path]) -> None:
    """In run.h5, whose samples are in another order than those of the shards."""
    run = open_run(runs(way))
    with h5py.File(run.path / "run.h5") as file:
        assert json.loads(file.attrs["settings"])["reduce"] == way
        assert file.attrs["format_version"] == "1.6"
        if way in BY_SAMPLE:
            stored = file["reduced/layer_1"][()][file["lines"][()]]
            np.testing.assert_array_equal(stored, run.reduced("layer_1").numpy())
            assert not len(file["activations"])
            assert not len(file["rows/token_id"])
            assert not len(file["segments/start"])
            assert file["segments/offset"][()].tolist() == [0] * (len(run) + 1)
            assert (file["lines"][()] != np.arange(len(run))).any()
        else:
            start, stop = (file[f"segments/{name}"][file["segments/offset"][3]] for name in ("start", "stop"))
            part = file["activations/layer_1"][start:stop]
            np.testing.assert_array_equal(part, run.read(3, "layer_1").numpy()[: stop - start])
        if way == "project":
            matrix = file["projections/every_site"][()]
            digest = hashlib.sha256(f"every_site {list(matrix.shape)}\n".encode() + matrix.tobytes())
            assert json.loads(file.attrs["settings"])["project"] == digest.hexdigest()


def test_one_file_is_what_the_function_returned(way: str, tmp_path: Path) -> None:
    how = {"project": np.ones((128, 2))} if way == "project" else WAYS[way]
    _, data = generate_inference_with_activations("An otter", "demo", tmp_path / "one.h5", max_new_tokens=4, **how)
    assert_same_data(load_activations(tmp_path / "one.h5"), data)
    assert_honest(tmp_path / "one.h5", None)


def test_copies(way: str, runs: Callable[..., Path], tmp_path: Path) -> None:
    """Merged, pruned, converted, compressed and indexed again, a run holds the same numbers and says the same of them."""
    run = open_run(runs(way))
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run" / "run.h5").unlink()
    rebuild_index(tmp_path / "run")
    copies = {
        "rebuilt": tmp_path / "run",
        "merged": merge([run.path], tmp_path / "merged.h5"),
        "compressed": merge([run.path], tmp_path / "compressed.h5", compression="gzip"),
        "pruned": prune(run.path, tmp_path / "pruned.h5", layers="1-2"),
        "converted": convert(run.path, tmp_path / "converted.h5", dtype="float64"),
    }
    whole = dict(zip(identities(run), numbers(run, way, "layer_2"), strict=True))
    for name, path in copies.items():
        assert verify(path) == [], name
        copy = open_run(path)
        assert copy.made_with.reduce == way
        assert copy.made_with.project == run.made_with.project
        for identity, got in zip(identities(copy), numbers(copy, way, "layer_2"), strict=True):
            assert same(got.float(), whole[identity]), name
        if way == "project":
            assert same(copy.projection("layer_2"), run.projection("layer_2"))
        if name != "rebuilt":
            assert_honest(path, None)
    assert open_run(copies["pruned"]).keys == ["embeddings", "layer_1", "layer_2"]


def identities(run: Run) -> list[tuple[Any, ...]]:
    return list(zip(*(run.column(name) for name in ("task", "doc_id", "choice")), strict=True))


def test_two_reductions_are_not_merged(runs: Callable[..., Path], tmp_path: Path) -> None:
    for one, other in (("norm", "mean"), ("mean", "max"), ("project", "norm"), ("whole", "mean"), ("whole", "norm")):
        with pytest.raises(OtherSettings, match="reduce"):
            merge([runs(one), runs(other)], tmp_path / "both.h5")
    evaluate_with_activations(
        "demo", "demo", limit=6, output=tmp_path / "run", positions="all", project=np.ones((128, 4))
    )
    with pytest.raises(OtherSettings, match="project"):
        merge([runs("project"), tmp_path / "run"], tmp_path / "both.h5")


def test_exports(way: str, runs: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = open_run(runs(way))
    for to in ("safetensors", "npz"):
        folder = export(run.path, tmp_path / to, to)
        lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        for line, wanted in zip(lines, numbers(run, way, "layer_1"), strict=True):
            held = [
                (load_file(folder / name) if to == "safetensors" else dict(np.load(folder / name)), start, stop)
                for name, start, stop in line["rows"]
            ]
            got = np.concatenate([np.asarray(file["layer_1"])[start:stop] for file, start, stop in held])
            np.testing.assert_array_equal(got.reshape(wanted.shape), wanted.numpy())
            assert ("position" in held[0][0]) == (way not in BY_SAMPLE)
    with pytest.raises(SelectionError, match="ActivationCache needs whole rows, and this run holds the"):
        export(run.path, tmp_path / "lens", "transformer_lens")
    if way in BY_SAMPLE:
        with pytest.raises(StoreError, match="arrow is written with a list of rows"):
            export(run.path, tmp_path / "arrow", "arrow")
        with pytest.raises(SelectionError, match="cannot be taken for last alone"):
            prune(run.path, tmp_path / "last.h5", positions="last")
    else:
        export(run.path, tmp_path / "arrow", "arrow")
        assert open_run(prune(run.path, tmp_path / "last.h5", positions="last")).activations("layer_1").shape[0] == len(
            run
        )


def test_whole_rows_are_asked_for_by_name(runs: Callable[..., Path]) -> None:
    from AutomaticEval.analysis.heads.strength import strength_of_run
    from AutomaticEval.store.export.transformer_lens import as_activation_cache

    for way in WAYS:
        run = open_run(runs(way))
        with pytest.raises(SelectionError, match=f"the strength of heads needs whole rows.*reduce={way}"):
            strength_of_run(run)
        with pytest.raises(SelectionError, match="ActivationCache needs whole rows"):
            as_activation_cache(run[0])


@pytest.mark.parametrize("name", ["reduced/layer_1", "lines", "projections/every_site"])
def test_damage_is_found(name: str, runs: Callable[..., Path], tmp_path: Path) -> None:
    way = "project" if name.startswith("projections") else "mean"
    shutil.copytree(runs(way), tmp_path / "run")
    shard = tmp_path / "run" / "shard-00000.h5"
    with h5py.File(shard) as file:
        offset = file[name].id.get_offset()
    raw = bytearray(shard.read_bytes())
    raw[offset] ^= 1
    shard.write_bytes(raw)
    assert any(name in problem for problem in verify(tmp_path / "run"))
    with pytest.raises(DamagedFile):
        open_run(shard).reduced("layer_1") if way == "mean" else open_run(shard).projection("layer_1")


def test_lines_outside_the_file_are_refused(runs: Callable[..., Path], tmp_path: Path) -> None:
    from helpers.samples import with_right_checksums

    shutil.copy(runs("mean") / "shard-00000.h5", tmp_path / "one.h5")
    with h5py.File(tmp_path / "one.h5", "r+") as file:
        file["lines"][0] = 10**6
        with_right_checksums(file, "lines")
    assert "point outside" in "".join(verify(tmp_path / "one.h5"))


# runs that are cut short


class Stopped(KeyboardInterrupt):
    """Where a test cuts a run short."""


@pytest.mark.parametrize("scoring", ["tree", "stock"])
def test_a_run_that_was_cut_short_goes_on(
    way: str, scoring: str, tiny_llama: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    how: dict[str, Any] = {"limit": 5, "scoring": scoring, "batch_size": 2, "positions": "all", **WAYS[way]}
    evaluate_with_activations(tiny_llama, "demo", output=tmp_path / "whole", **how)
    left = [7]

    def stopping(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                raise Stopped
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setitem(TOKENS_A_FORWARD, "cpu", 24)
        patch.setattr(HFLM, "_model_generate", stopping(HFLM._model_generate))
        patch.setattr(HFLM, "_model_call", stopping(HFLM._model_call))
        patch.setattr(walking, "tree_forward", stopping(walking.tree_forward))
        with pytest.raises(Stopped):
            evaluate_with_activations(tiny_llama, "demo", output=tmp_path / "cut", **how)
    begun = open_run(tmp_path / "cut")
    assert 0 < len(begun) < len(open_run(tmp_path / "whole"))
    others = {"reduce": "norm" if way != "norm" else "max"}
    apart: dict[str, Any] = {**how, "reduce": None, "project": None, **others}
    with pytest.raises(OtherSettings, match="reduce was"):
        evaluate_with_activations(tiny_llama, "demo", resume=tmp_path / "cut", **apart)
    if way == "project":
        changed = {**how, "project": 2 * how["project"]}
        with pytest.raises(OtherSettings, match="project was"):
            evaluate_with_activations(tiny_llama, "demo", resume=tmp_path / "cut", **changed)
    evaluate_with_activations(tiny_llama, "demo", resume=tmp_path / "cut", **how)
    one, other = open_run(tmp_path / "cut"), open_run(tmp_path / "whole")
    assert identities(one) == identities(other)
    assert verify(one.path) == []
    for got, wanted in zip(numbers(one, way, "layer_1"), numbers(other, way, "layer_1"), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-4)
    if way == "project":
        assert same(one.projection("layer_1"), other.projection("layer_1"))


def test_extractions_in_another_way_are_refused(tmp_path: Path) -> None:
    """Given again, the command takes a finished run for its own only if it was reduced in the same way."""
    (tmp_path / "texts.txt").write_text("One text\nAnother one\n")
    np.save(tmp_path / "one.npy", np.ones((128, 2)))
    np.save(tmp_path / "two.npy", np.zeros((128, 2)))
    base = ["extract", "--model", "demo", "--texts", "texts.txt", "-o", "run", "--sites", "resid_post"]
    code, text = said_by(tmp_path, *base, "--project", "one.npy")
    assert code == 0, text
    assert "is there already" in said_by(tmp_path, *base, "--project", "one.npy")[1]
    for others in (["--project", "two.npy"], ["--reduce", "mean"], []):
        code, text = said_by(tmp_path, *base, *others)
        assert (code, "OtherSettings" in text) == (2, True), text


def test_wrong_lines_are_different(tmp_path: Path, runs: Callable[..., Path]) -> None:
    """recompute finds a mean, a norm and a projection that are not those of the model's rows."""
    from helpers.samples import with_right_checksums

    for way in WAYS:
        shutil.copytree(runs(way), tmp_path / way)
        (tmp_path / way / "run.h5").unlink()
        (shard,) = (tmp_path / way).glob("shard-*.h5")
        with h5py.File(shard, "r+") as file:
            stored = file["reduced/layer_2" if way in BY_SAMPLE else "activations/layer_2"]
            stored[()] = stored[()] * 1.001
            name = stored.name.removeprefix("/")
            with_right_checksums(file, name)
        done = recompute(shard, "demo", 3, seed=1)
        assert len(done.different) == 3, way
        assert all("layer_2" in str(each) for each in done.different)
        assert ("the line of" in str(done.different[0])) == (way in BY_SAMPLE)


# rooms, tables and old files


def test_the_forecast_bounds_what_is_written(way: str, tiny_llama: LoadedModel, tmp_path: Path) -> None:
    said: list[str] = []
    from AutomaticEval.evaluation.benchmark_options import Benchmark
    from AutomaticEval.evaluation.forecast import forecast
    from AutomaticEval.evaluation.run import load_tasks, run_benchmark
    from AutomaticEval.evaluation.run_output import RunOutput

    benchmark, chosen = Benchmark(("demo",), limit=20), Selection.parse(positions="all", **WAYS[way])
    foreseen = forecast(tiny_llama, benchmark, load_tasks(benchmark), chosen)
    done = run_benchmark(tiny_llama, benchmark, chosen, output=RunOutput(tmp_path / "run"), announce=said.append)
    size = sum(file.stat().st_size for file in (tmp_path / "run").glob("*.h5"))
    assert size <= foreseen.room_bytes
    n_keys = 1 + tiny_llama.layout.n_layers
    per = {"norm": 4, "project": 4 * K, "mean": 4 * WIDTH, "max": 4 * WIDTH}[way] * n_keys
    if way in BY_SAMPLE:
        assert foreseen.rows_bytes == done.n_samples * per
    else:
        assert foreseen.rows_bytes % per == 0


def test_int8_of_norms_and_projections(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    for way in ("norm", "project"):
        evaluate_with_activations(
            tiny_llama, "demo", limit=6, output=tmp_path / way, positions="all", store_dtype="int8", **WAYS[way]
        )
        assert verify(tmp_path / way) == []
        assert_honest(tmp_path / way, tiny_llama)


def test_commands_say_what_is_kept(runs: Callable[..., Path], tmp_path: Path) -> None:
    assert "each line is the mean over the sample's kept positions" in said_by(tmp_path, "show", str(runs("mean")))[1]
    code, text = said_by(tmp_path, "generate", "Hi", "--max_new_tokens", "3", "--reduce", "max", "-o", "one.h5")
    assert (code, "the max of its positions" in text) == (0, True), text
    code, text = said_by(tmp_path, "show", "one.h5")
    assert (code, "1x128" in text) == (0, True), text
    for arguments, why in (
        (("generate", "Hi", "--reduce", "max"), "--reduce was given, but nothing is captured"),
        (("--project", "x.npy"), "--project was given, but nothing is captured"),
        (("--head_strength", "--reduce", "norm"), "--head_strength reads whole rows"),
        (("--capture_activations", "--reduce", "norm", "--project", "x.npy"), "x.npy cannot be read"),
    ):
        code, text = said_by(tmp_path, *arguments)
        assert (code, why in text) == (2, True), text


def test_patterns_are_not_reduced(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    for how in WAYS.values():
        with pytest.raises(SelectionError, match="patterns are not reduced"):
            extract(tiny_llama, TextSet("t", TEXTS), Selection.parse(**how), tmp_path / "run", Feeding(patterns=True))


def test_simple_evaluate_reduces(tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from AutomaticEval.evaluation.benchmark import BUNDLED

    lm = HFActivations("demo", activation_save_dir=tmp_path, positions="all", reduce="mean")
    manager = TaskManager(include_path=[str(BUNDLED)], include_defaults=False)
    run = open_run(lm.finish(simple_evaluate(model=lm, tasks=["demo_facts"], limit=3, task_manager=manager)))
    assert run.reduced("layer_1").shape == (12, 128)


def test_files_of_this_version_are_read_for_ever() -> None:
    folder = DATA / "format-1.3"
    kept = json.loads((folder / "expected.json").read_text())
    assert kept.keys() == {"mean", "project", "norm"}
    for name, wanted in kept.items():
        run = open_run(folder / name)
        assert verify(folder / name) == []
        assert run.made_with.reduce == name
        assert [each.tolist() for each in numbers(run, name, "layer_0")] == wanted["layer_0"]
        if name == "project":
            assert run.projection("layer_0").tolist() == wanted["matrix"]


def test_a_reader_of_rows_meets_no_lines() -> None:
    """Whoever knows version 1.2 alone opens `/activations`, `/rows` and `/segments` of a file with lines, and finds nothing there."""
    with h5py.File(DATA / "format-1.3" / "mean" / "shard-00000.h5") as file:
        n_samples = len(file["samples/prompt"])
        assert list(file["activations"]) == []
        assert len(file["rows/position"]) == 0
        assert file["segments/offset"][()].tolist() == [0] * (n_samples + 1)


def test_lines_and_rows_do_not_mix(tmp_path: Path) -> None:
    from AutomaticEval.errors import CaptureError

    whole = make_sample()
    line = Sample(
        whole.fields, whole.input_ids, whole.generated_ids, [Part(Line.of({"layer_0": torch.ones(1, 8)}), [0])]
    )
    with RunWriter(tmp_path / "run", "m", {**SETTINGS, "reduce": "mean"}) as made:
        made.add([line])
        with pytest.raises(CaptureError, match="sites, dtypes or widths"):
            made.add([whole])
    for sample, reduce in ((line, None), (line, "norm"), (whole, "max")):
        with pytest.raises(CaptureError, match="lines of samples go with the setting reduce"):
            write_shard(tmp_path / "one.h5", [sample], "m", {**SETTINGS, "reduce": reduce})


# rows of a GPU


@pytest.mark.parametrize("positions", ["all", "prompt"])
def test_rows_are_reduced_before_they_leave_the_device(
    positions: str, tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a ring that copies as late as a GPU's may, the same numbers arrive, and as many bytes fewer as rows are narrower."""
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [21]]

    def answered(how: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
        found = respond(tiny_llama, prompts, Sampling(max_new_tokens=6), Selection.parse(positions=positions, **how))
        held = [each.sample.activation_data("m", {}) for each in found if each.sample is not None]
        return [{**data["activations"], **data.get("reduced", {})} for data in held]

    directly = {way: answered(how) for way, how in WAYS.items()}
    late, sent = stage_the_cpu(monkeypatch), [0]
    start = late._start_copy

    def counted(part: torch.Tensor, chunk: torch.Tensor) -> Any:
        sent[0] += part.numel()
        return start(part, chunk)

    monkeypatch.setattr(late, "_start_copy", counted)
    n_bytes = {}
    for way, how in {"whole": {}, **WAYS}.items():
        sent[0] = 0
        data = answered(how)
        n_bytes[way] = sent[0]
        for one, other in zip(data, directly.get(way, data), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    assert n_bytes["whole"] > 0
    assert n_bytes["norm"] * WIDTH == n_bytes["whole"]
    assert n_bytes["project"] * WIDTH == n_bytes["whole"] * K
    assert n_bytes["mean"] == n_bytes["max"] == n_bytes["whole"]  # which are computed on the CPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(way: str, dtype: torch.dtype, tokenizer: Any, tmp_path: Path) -> None:
    loaded = LoadedModel(build(CONFIGS["llama"](), dtype).to("cuda"), tokenizer, "llama")
    extract(loaded, TextSet("texts", TEXTS), Selection.parse(**WAYS[way]), tmp_path / "texts")
    evaluate_with_activations(loaded, "demo", limit=6, output=tmp_path / "run", positions="all", **WAYS[way])
    for path in (tmp_path / "texts", tmp_path / "run"):
        assert_honest(path, loaded, 6)


@pytest.mark.gpu
def test_no_forward_waits_for_a_matrix(tokenizer: Any) -> None:
    """The matrix is on the GPU before the first forward: a product of rows there waits for nothing."""
    from AutomaticEval.capture.reduced_rows import taps_of

    loaded = LoadedModel(build(CONFIGS["llama"]()).to("cuda"), tokenizer, "llama")
    for how in (WAYS["norm"], WAYS["project"]):
        rows = torch.randn(2, 3, WIDTH, device="cuda")
        for tap in taps_of(loaded.layout, Selection.parse(**how)).values():
            assert tap.then is not None
            tap.then.refresh(loaded.model.get_submodule(tap.module))
            torch.cuda.set_sync_debug_mode("error")
            try:
                tap.take(rows)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_a_run_without_any_row_is_verified(tmp_path: Path) -> None:
    """As a reader of version 1.2 sees a run of lines: its samples have no segments at all."""
    whole = make_sample()
    none = Sample(whole.fields, whole.input_ids, whole.generated_ids, [Part(whole.parts[0].rows, [])])
    with RunWriter(tmp_path / "run", "m", SETTINGS) as made:
        made.add([none])
        made.finish()
    assert verify(tmp_path / "run") == []
