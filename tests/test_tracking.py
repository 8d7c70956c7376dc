"""Runs in MLflow, read back by its own client (extra `mlflow`); without it, a clear refusal."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.commands import process

from AutomaticEval.cli.reading import _with_values

needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason="pip install '.[mlflow]' to log into MLflow")


def test_a_flag_without_a_value() -> None:
    assert _with_values(["--mlflow"]) == ["--mlflow=local"]
    assert _with_values(["a", "--mlflow", "--limit", "2"]) == ["a", "--mlflow=local", "--limit", "2"]
    assert _with_values(["--mlflow", "http://server"]) == ["--mlflow", "http://server"]


@pytest.mark.skipif(find_spec("mlflow") is not None, reason="MLflow is installed")
def test_without_mlflow_nothing_is_run(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a")
    for arguments in (["extract", "--texts", "texts.txt", "--model", "demo"], ["--limit", "1"]):
        done = process(*arguments, "--mlflow", cwd=tmp_path)
        assert (done.returncode, "pip install 'AutomaticEval[mlflow]'" in done.stderr) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


@needs_mlflow
def test_extractions_and_benchmarks_are_logged(tmp_path: Path) -> None:
    import mlflow

    (tmp_path / "texts.txt").write_text("What is red?\nThe bus")
    store = f"sqlite:///{tmp_path}/runs.db"
    done = process(
        "extract", "--texts", "texts.txt", "--model", "demo", "--layers", "1", "--mlflow", store, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    asked = ["--benchmark", "demo", "--limit", "2", "--capture_activations", "--layers", "0"]
    done = process(*asked, "--mlflow", store, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    client = mlflow.MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("AutomaticEval")
    assert experiment is not None
    by_name = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    extracted, scored = by_name["extract texts"], by_name["demo on demo"]
    assert extracted.data.metrics["n_samples"] == extracted.data.metrics["demo/texts/n_samples"] == 2
    assert extracted.data.metrics["tokens_per_second"] > 0
    assert extracted.data.params["layers"] == "1"
    assert scored.data.params["benchmark.limit"] == "2.0"
    assert scored.data.params["selection.layers"] == "0"
    assert 0 <= scored.data.metrics["demo_facts/acc"] <= 1
    files = {
        run.info.run_name: {file.path for file in client.list_artifacts(run.info.run_id)} for run in by_name.values()
    }
    assert files["extract texts"] == {"summary.md", "summary.html", "log.txt"}
    assert "log.txt" in files["demo on demo"]
    assert any(name.startswith("results_") for name in files["demo on demo"])
    bad = process(
        "extract", "--texts", "texts.txt", "--model", "demo", "--layers", "1", "--mlflow", "nonsense://x", cwd=tmp_path
    )
    assert (bad.returncode, "TrackingUnavailable: MLflow (nonsense://x)" in bad.stderr) == (2, True)
