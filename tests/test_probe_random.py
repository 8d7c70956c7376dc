"""The baseline of random weights: its rows are transformers' own, and it tells what is in the tokens from what is in trained weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import within
from helpers.models import CONFIGS
from helpers.probed import run_of_tokens
from helpers.raw_hooks import n_hooks, raw_residuals
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from AutomaticEval import probe
from AutomaticEval.analysis.probes.asked import Asked, judge_of
from AutomaticEval.analysis.probes.grid.spots import spots_of
from AutomaticEval.analysis.probes.leaks.random_weights import ready_random_model, with_random_weights
from AutomaticEval.analysis.probes.target import target_of
from AutomaticEval.capture.recompute.rows_on_disk import rows_on_disk
from AutomaticEval.errors import ModelUnavailable, OtherSettings, SelectionError
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.random_weights import random_model
from AutomaticEval.store.local_paths import write_local_paths
from AutomaticEval.store.run import Run

N = 120
LABELS = np.random.default_rng(9).integers(0, 2, N)
IDS = {f"w{number}": number for number in range(400)}
SEED = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder that holds its configuration, and no weights."""
    made = tmp_path_factory.mktemp("llama")
    CONFIGS["llama"]().save_pretrained(made)
    return made


def drawn(family: str, dtype: torch.dtype = torch.float32, seed: int = SEED) -> Any:
    """transformers' own model of the configuration."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype).eval()


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("gpt2", "float32"), ("llama", "bfloat16")])
def test_rows_are_those_of_transformers_own_model_with_the_seed(family: str, dtype: str, tmp_path: Path) -> None:
    CONFIGS[family]().save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    made = random_model(str(tmp_path), LoadOptions(dtype=dtype, device="cpu"), SEED)
    assert torch.equal(torch.random.get_rng_state(), before)
    source, model = np.random.default_rng(1), drawn(family, getattr(torch, dtype))
    sequences = [source.integers(1, 400, n) for n in (3, 9, 5)]
    sequences.append(sequences[1].copy())
    places = np.array([[0, 2], [8, 4], [4, 4], [8, 4]])
    advanced: list[int] = []
    keys = ["embeddings", "layer_0", "layer_2"]
    with rows_on_disk(made, sequences.__getitem__, places, keys, advanced.append) as stored:
        for place in (0, 1):
            for key in keys:
                raw = [
                    raw_residuals(model, family, ids)[key][at]
                    for ids, at in zip(sequences, places[:, place], strict=True)
                ]
                torch.testing.assert_close(stored.read(key, place), torch.stack(raw), atol=1e-6, rtol=1e-5)
    assert sum(advanced) == 4
    assert n_hooks(made.model) == 0


def test_dtype_and_quantisation_are_the_runs_dtype_and_none(folder: Path, tmp_path: Path) -> None:
    """Of a checkpoint whose configuration says that it is quantised, plain weights are made."""
    made = random_model(str(folder), LoadOptions(dtype="bfloat16", device="cpu"), SEED)
    model = drawn("llama", torch.bfloat16)
    for one, other in zip(made.model.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
        assert one.dtype == torch.bfloat16
    config = CONFIGS["llama"]()
    config.quantization_config = BitsAndBytesConfig(load_in_8bit=True).to_dict()
    config.save_pretrained(tmp_path)
    plain = random_model(str(tmp_path), LoadOptions(device="cpu"), SEED)
    assert {type(each).__name__ for each in plain.model.modules() if hasattr(each, "weight")} == {
        type(each).__name__ for each in model.modules() if hasattr(each, "weight")
    }


@pytest.mark.parametrize("broken", [KeyboardInterrupt, RuntimeError])
def test_the_temporary_folder_is_gone_after_ctrl_c(folder: Path, broken: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = random_model(str(folder), LoadOptions(device="cpu"), SEED)

    def stop(_: int) -> None:
        assert len(list(tmp_path.iterdir())) == 1
        raise broken

    with pytest.raises(broken), rows_on_disk(made, lambda _: np.arange(4), np.array([[3]]), ["layer_0"], stop):
        pass
    assert list(tmp_path.iterdir()) == []


def asked(run: Path, model: Path, prompts: Any, rows: Any, labels: Any = LABELS, **how: Any) -> Run:
    """A run of the model in a folder."""
    tokens = [([f"w{each}" for each in prompt], ["w1", "w2", "w3"]) for prompt in prompts]
    columns = [{"correct": bool(each), "prompt": f"question {number}"} for number, each in enumerate(labels)]
    made = run_of_tokens(run, tokens, rows, columns, model=model.name, ids=IDS, **how)
    write_local_paths(run, {"model": str(model)})
    return made


def baseline(result: Any) -> Any:
    (found,) = (each for each in result.measured["baselines"] if each.name == "random_model")
    return found


def test_a_label_that_is_a_token_of_the_prompt_is_named(folder: Path, tmp_path: Path) -> None:
    """The stored rows know the label, and so do rows of random weights: it is the last token but one."""
    source = np.random.default_rng(2)
    prompts = source.integers(20, 400, (N, 5))
    prompts[:, 3] = 10 + LABELS
    rows = source.normal(size=(N, 7, 8))
    rows[:, :, 2] += 2 * LABELS[:, None]
    run = asked(tmp_path / "run", folder, prompts, {"layer_1": rows, "layer_2": rows})
    result = probe(run, random_model=True, position=["prompt[-2]", "prompt[-1]"], seed=SEED, n_folds=3)
    found = baseline(result)
    assert found.told == f"the same model with random weights (seed {SEED})"
    assert found.judged.auroc.interval[0] > 0.9
    assert found.judged.below_best is not None
    told = {each.name: each.text for each in result.measured["findings"]}
    assert told["as_good_as_probe:random_model"].startswith(f"{found.told} tells the classes apart better than")
    names = [each.name for each in probe(run, keys=["layer_1"], n_folds=3).measured["baselines"]]
    assert "random_model" not in names


def test_a_label_that_only_trained_weights_know_is_not_named(folder: Path, tmp_path: Path) -> None:
    """Each prompt has a token of its own, drawn into a class; a model that learned the classes has them in its embeddings, and a random one cannot."""
    source = np.random.default_rng(3)
    trained = drawn("llama", seed=1)
    own = 20 + source.permutation(300)[:N]
    with torch.no_grad():
        trained.get_input_embeddings().weight[own, 0] += torch.tensor(0.2 * LABELS, dtype=torch.float32)
    prompts = [[*source.integers(1, 20, 3), token, 5] for token in own]
    raw = [raw_residuals(trained, "llama", [*prompt, 1, 2]) for prompt in prompts]
    rows = {key: [each[key].numpy() for each in raw] for key in ("layer_0", "layer_1")}
    run = asked(tmp_path / "run", folder, prompts, rows)
    result = probe(run, random_model=True, position="prompt[-2]", seed=SEED, n_folds=3)
    assert result.measured["best"]["judged"].auroc.interval[0] > 0.9
    found = baseline(result).judged
    assert found.auroc.interval[0] < 0.5 < found.auroc.interval[1]
    assert [each.name for each in result.measured["findings"]] == []


def test_the_place_is_chosen_inside_the_training_folds_on_the_probes_folds(folder: Path, tmp_path: Path) -> None:
    """The same numbers as a run that holds the random model's own rows gives at its best place; tokens of the answer are fed, too."""
    source, model = np.random.default_rng(4), drawn("llama")
    prompts = source.integers(20, 400, (N, 4))
    labels = (prompts[:, 2] + source.normal(0, 60, N) > 210).astype(int)
    raw = [raw_residuals(model, "llama", [*prompt, 1, 2]) for prompt in prompts.tolist()]
    rows = {key: [each[key].numpy() for each in raw] for key in ("layer_0", "layer_1")}
    run = asked(tmp_path / "run", folder, prompts, rows, labels)
    positions = ["prompt[-2]", "prompt[-1]", "response[0]", "last"]
    expected: list[int] = []
    done: list[int] = []
    told = {"advance": done.append, "expect": expected.append}
    result = probe(run, random_model=True, position=positions, seed=SEED, n_folds=3, **told)
    assert expected == [sum(done)] == [N + 2 * 2 * len(positions)]
    best, found = result.measured["best"]["judged"], baseline(result).judged
    assert found.auroc.mean == pytest.approx(best.auroc.mean, abs=1e-4)
    assert found.brier.mean == pytest.approx(best.brier.mean, abs=1e-4)
    of = target_of(run.questions())
    judge = judge_of(of, Asked("correct", "prompt[-1]", "question", 3, 1, SEED))
    own = with_random_weights(
        ready_random_model(run, ["layer_0"], SEED), of, judge, spots_of(["layer_0"], positions[:1]), lambda _: None
    )
    assert judge(own).auroc.mean == pytest.approx(
        np.mean([roc_auc_score(labels[fold.test], own.log_odds[0, fold.test]) for fold in judge.repeats[0]])
    )


def test_the_command_says_it_and_writes_it(folder: Path, tmp_path: Path) -> None:
    source = np.random.default_rng(5)
    rows = source.normal(size=(40, 7, 8))
    asked(tmp_path / "run", folder, source.integers(20, 400, (40, 5)), {"layer_0": rows}, LABELS[:40])
    done = within("probe", "run", "--random_model", "--folds", "3", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the same model with random weights (seed 42)" in done.stdout
    written = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert [each["name"] for each in written["baselines"]][-2:] == ["random_model", "shuffled"]


def test_what_has_no_random_baseline_is_told_before_any_work(folder: Path, tmp_path: Path) -> None:
    def never(_: int) -> None:
        raise AssertionError("a place was probed")

    def refused(run: Run, **how: Any) -> None:
        probe(run, random_model=True, advance=never, **how)

    source = np.random.default_rng(6)
    prompts, rows = source.integers(20, 400, (N, 5)), source.normal(size=(N, 7, 8))
    run = asked(tmp_path / "patterns", folder, prompts, {"layer_0": rows, "layer_0.pattern": rows})
    with pytest.raises(
        SelectionError, match=r"layer_0\.pattern: attention patterns have no baseline of random weights"
    ):
        refused(run, keys=["layer_0.pattern"])
    run = asked(tmp_path / "norms", folder, prompts, {"layer_0": rows}, settings={"reduce": "norm"})
    with pytest.raises(SelectionError, match="random weights needs whole rows"):
        refused(run)
    shape = {"n_layers": 9, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_head": 8}
    run = asked(tmp_path / "shape", folder, prompts, {"layer_0": rows}, settings={"shape": shape})
    with pytest.raises(OtherSettings, match="a model of another shape"):
        refused(run)
    run = asked(tmp_path / "nowhere", tmp_path / "not-there", prompts, {"layer_0": rows})
    with pytest.raises(ModelUnavailable, match="not-there"):
        refused(run)
    smaller = CONFIGS["llama"]()
    smaller.vocab_size = 200
    smaller.save_pretrained(tmp_path / "small")
    run = asked(tmp_path / "added", tmp_path / "small", prompts, {"layer_0": rows})
    with pytest.raises(SelectionError, match="has 200 tokens: an adapter may have added some"):
        probe(run, random_model=True)
