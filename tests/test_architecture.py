"""The house: modules import from lower floors only, and each heavy library has one owner."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "AutomaticEval"
FLOORS = {
    "errors": 0,
    "moved": 0,
    "safe_text": 0,
    "public_names": 0,
    "sites": 0,
    "selection": 0,
    "settings": 1,
    "tested_versions": 0,
    "demo.world": 0,
    "models.head_weights": 1,
    "models.architecture.inner_model": 0,
    "models.hook_handles": 0,
    "models.edited_models": 1,
    "models.weights.fingerprint": 1,
    "models.weights.provenance": 3,
    "models.weights.adapters": 1,
    "models.layout": 2,
    "store.hdf5.contract": 1,
    "store.disk.parsing": 0,
    "store.hdf5.room": 1,
    "store.hdf5.attributes": 2,
    "store.hdf5.checksums": 2,
    "store.ragged": 1,
    "store.hdf5.extents": 2,
    "store.hdf5.open": 4,
    "store.hdf5.blocks": 3,
    "store.int8": 1,
    "store.disk.whole_files": 2,
    "store.disk.system": 1,
    "store.disk.read_back": 1,
    "store.disk.partial_folders": 1,
    "store.hdf5.trailer": 1,
    "store.finite": 2,
    "models.transfer": 1,
    "models.architecture.identities": 3,
    "models.frozen_norm": 1,
    "models.attention": 6,
    "store.contents": 2,
    "models.architecture.module_names": 4,
    "models.architecture.branches": 4,
    "models.architecture.projections": 4,
    "models.find_layout": 4,
    "store.hdf5.read": 5,
    "store.hdf5.damage": 5,
    "store.run_folder": 5,
    "models.recording": 5,
    "models.loading": 5,
    "models.editing": 6,
    "store.row_array": 5,
    "store.shuffled": 6,
    "store.hdf5.write": 4,
    "capture.vocabulary": 1,
    "capture.generation": 6,
    "capture.texts.forward": 6,
    "capture.texts.batching": 2,
    "capture.texts.extraction": 8,
    "capture.texts.features": 9,
    "capture.texts.many_runs": 9,
    "capture.tree.prefix_tree": 1,
    "capture.batch_independence": 3,
    "capture.tree.suitability": 4,
    "capture.tree.walk": 7,
    "capture.tree.rows": 8,
    "capture.tree.forward_size": 8,
    "capture.tree.shared_prompt": 8,
    "capture.tree.score": 9,
    "capture.tree.continuations": 10,
    "capture.recompute.tolerance": 1,
    "capture.recompute.plain_forward": 6,
    "capture.recompute.recomputed_sample": 8,
    "capture.recompute.recomputed_run": 9,
    "evaluation.parse_answer": 6,
    "evaluation.tasks.demo.data": 6,
    "store.writer": 6,
    "capture.prompt": 7,
    "evaluation.harness.batches": 6,
    "evaluation.harness.tokens": 6,
    "evaluation.harness.speedups": 6,
    "evaluation.local_files": 6,
    "processes": 0,
    "evaluation.results.requests": 6,
    "evaluation.harness.generated": 7,
    "evaluation.harness.refusals": 7,
    "evaluation.benchmark": 10,
    "evaluation.forecast": 11,
    "evaluation.harness.call": 7,
    "evaluation.results.repeats": 7,
    "evaluation.results.join": 8,
    "evaluation.harness.tree_scores": 10,
    "evaluation.harness.model": 11,
    "evaluation.results.captured_run": 10,
    "store.reader": 7,
    "store.shared": 7,
    "evaluation.question": 8,
    "evaluation.run": 12,
    "evaluation.results.lm_eval_files": 11,
    "evaluation.for_simple_evaluate": 12,
    "evaluation.evaluating": 13,
    "analysis.numbers.moments": 1,
    "capture.texts.sources": 1,
    "store.disk.json_files": 3,
    "analysis.parts.input_batches": 7,
    "analysis.words.profiles": 2,
    "analysis.numbers.estimate": 0,
    "analysis.words.metrics": 1,
    "analysis.heads.strength": 8,
    "analysis.heads.compare": 12,
    "analysis.parts.before_after": 11,
    "analysis.heads.ablate": 12,
    "analysis.heads.patch": 12,
    "analysis.words.targets": 1,
    "analysis.numbers.permutation": 0,
    "analysis.parts.direct_effect": 8,
    "analysis.heads.screen": 9,
    "analysis.parts.later_blocks": 8,
    "analysis.heads.sweep": 13,
    "analysis.heads.sweep_files": 14,
    "report": 2,
    "report.figures": 4,
    "report.labels": 1,
    "report.extraction_page": 10,
    "store.upkeep.rewrite": 8,
    "store.export.transformer_lens": 2,
    "store.local_paths": 3,
    "store.export.hub": 4,
    "store.export.outgoing": 8,
    "store.export.arrow": 9,
    "store.export.formats": 10,
    "demo.train": 9,
    "cli": 15,
}
OWNERS = {
    "h5py": ("store",),
    "lm_eval": ("evaluation",),
    "typer": ("cli",),
    "rich": ("cli.printing",),
    "matplotlib": ("report",),
    "bitsandbytes": ("models.loading",),
    "peft": ("models.weights.adapters",),
    "datasets": ("evaluation", "store.export.arrow", "capture.texts.sources"),
    "pyarrow": ("store.export.arrow",),
    "huggingface_hub": ("store.export.hub", "models.loading"),
    "pandas": ("store",),
    "scipy": ("analysis",),
    "vaderSentiment": ("analysis.words.metrics",),
    "mlflow": ("report.mlflow_run",),
}
WITHIN_A_FLOOR = {
    ("store.row_array", "store.hdf5.read"),
    ("store.hdf5.damage", "store.hdf5.read"),
    ("store.run_folder", "store.hdf5.read"),
    ("selection", "sites"),
    ("sites", "errors"),
    ("selection", "errors"),
    ("models.architecture.branches", "models.architecture.module_names"),
    ("models.architecture.projections", "models.architecture.module_names"),
    ("models.find_layout", "models.architecture.module_names"),
    ("models.find_layout", "models.architecture.branches"),
    ("models.find_layout", "models.architecture.projections"),
}


def modules() -> dict[str, Path]:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def floor(name: str) -> int:
    known = [FLOORS[part] for part in (name, name.split(".")[0]) if part in FLOORS]
    assert known, f"{name} has no floor: add it to FLOORS"
    return known[0]


def test_modules_import_from_lower_floors_only() -> None:
    known = modules()
    for name, path in known.items():
        for imported in imports(path):
            other = imported.removeprefix("AutomaticEval.")
            if imported.startswith("AutomaticEval.") and other in known and floor(name) < FLOORS["cli"]:
                lower = floor(other) < floor(name) or (name, other) in WITHIN_A_FLOOR
                assert lower, f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})"


def test_each_heavy_library_has_one_owner() -> None:
    for name, path in modules().items():
        for imported in imports(path):
            owners = OWNERS.get(imported.split(".")[0])
            assert owners is None or name.startswith(owners), f"{name} imports {imported}, which {owners} own"


def test_utils_is_a_door_without_code() -> None:
    tree = ast.parse((ROOT / "utils" / "__init__.py").read_text())
    assert {type(node) for node in tree.body} == {ast.Expr, ast.ImportFrom, ast.Assign}
    assert [path.name for path in (ROOT / "utils").glob("*.py")] == ["__init__.py"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_wheel_holds_the_package_alone_and_all_it_needs(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"AutomaticEval"}
    for needed in (
        "py.typed",
        "demo/model/model.safetensors",
        "demo/model/tokenizer.json",
        "evaluation/tasks/demo/demo.yaml",
        "evaluation/tasks/demo/data.py",
        "evaluation/tasks/demo/facts_test.jsonl",
    ):
        assert f"AutomaticEval/{needed}" in wheel


def test_demo_model_is_small() -> None:
    assert sum(path.stat().st_size for path in (PACKAGE / "demo" / "model").iterdir()) <= 6 * 2**20


def test_all_that_commands_print_goes_through_one_door() -> None:
    """There text is made harmless; the `print` of the demo's training is no command."""
    for name, path in modules().items():
        if name.startswith(("cli.printing", "demo.")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "typer.echo", "typer.secho", "tqdm.write", "sys.stdout.write"), name
