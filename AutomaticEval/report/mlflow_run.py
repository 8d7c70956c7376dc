"""Logs a run in MLflow: its parameters, metrics, summary and log. MLflow is an optional extra and is imported only here."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from AutomaticEval.errors import TrackingUnavailable, first_line

LOCAL = "local"
"""What `--mlflow` without a URI means: MLflow's default store, in this folder."""


def require_mlflow() -> Any:
    """The module mlflow. Raises TrackingUnavailable when it is not installed."""
    try:
        import mlflow
    except ImportError:
        raise TrackingUnavailable("--mlflow needs MLflow: pip install 'AutomaticEval[mlflow]'.") from None
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return mlflow


def track(
    uri: str,
    name: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float | None],
    files: Sequence[Path],
    log: str,
) -> str:
    """Log one finished run. Returns MLflow's id of it.

    uri: a tracking server or store; LOCAL for MLflow's default. params: parameters within parameters get dotted names.
    metrics: those that are None are left out. Raises TrackingUnavailable when MLflow is absent or does not take the run.
    """
    mlflow = require_mlflow()
    try:
        if uri != LOCAL:
            mlflow.set_tracking_uri(uri)
        mlflow.set_experiment("AutomaticEval")
        with mlflow.start_run(run_name=name) as run:
            mlflow.log_params({key: str(value)[:500] for key, value in _flat(params).items()})
            mlflow.log_metrics({_plain(key): float(value) for key, value in metrics.items() if value is not None})
            for file in files:
                mlflow.log_artifact(str(file))
            mlflow.log_text(log, "log.txt")
            return str(run.info.run_id)
    except (mlflow.exceptions.MlflowException, OSError) as failure:
        raise TrackingUnavailable(f"MLflow ({uri}) did not take the run: {first_line(failure)}") from failure


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in params.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {_plain(prefix + name): value}
    return flat


def _plain(name: str) -> str:
    """The name with only those characters that MLflow accepts."""
    return "".join(each if each.isalnum() or each in "_-./ " else "_" for each in name)
