"""The house: modules import from lower floors or from their own folder, and each heavy library has one owner."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from itertools import takewhile
from pathlib import Path

import pytest
from helpers.places import ROOT

PACKAGE = ROOT / "AutomaticEval"
FLOORS = (
    (
        "errors",
        "sites",
        "processes",
        "public_names",
        "safe_text",
        "tested_versions",
        "options",
        "file_states",
        "moved",
        "demo",
    ),
    ("reducing", "thinking"),
    ("selection", "samples", "settings"),
    ("models",),
    ("store",),
    ("capture", "report"),
    ("analysis", "evaluation"),
    ("pages",),
    ("cli",),
)
"""From the lowest to the highest: folders, and the files of the root. A folder within a folder is on its floor."""
ABOVE = {"demo.train": "cli"}
"""Scripts that stand on another floor than their folder."""
MOST_FILES = 12
"""In a folder; commands aside."""
OWNERS = {
    "h5py": ("store.hdf5",),
    "lm_eval": ("evaluation",),
    "typer": ("cli",),
    "rich": ("cli.printing",),
    "matplotlib": ("report",),
    "bitsandbytes": ("models.checkpoint",),
    "peft": ("models.weights.adapters",),
    "datasets": ("evaluation", "store.export.arrow", "capture.texts.sources"),
    "pyarrow": ("store.export.arrow", "store.disk.parquet_files", "capture.texts.item_files"),
    "vl_convert": ("report.page.charts",),
    "huggingface_hub": ("store.export.hub", "models.checkpoint"),
    "pandas": ("store",),
    "scipy": ("analysis",),
    "vaderSentiment": ("analysis.words.metrics",),
    "mlflow": ("report.mlflow_run",),
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


def inside(path: Path) -> set[str]:
    """The modules of ours that a file imports."""
    known = modules()
    return {name for each in imports(path) if (name := each.removeprefix("AutomaticEval.")) in known and name != each}


def unit(name: str) -> str:
    """The folder of the root that a module is in, or its own name."""
    return ABOVE.get(name, name.split(".")[0])


def floor(name: str) -> int:
    known = [number for number, units in enumerate(FLOORS, 1) if unit(name) in units]
    assert known, f"{name} has no floor: it is in no folder of FLOORS"
    return known[0]


def may_import(name: str, other: str) -> bool:
    is_together = unit(name) == unit(other) or (floor(name) == floor(other) and "." not in name + other)
    return floor(other) < floor(name) or is_together


def test_modules_import_from_lower_floors_or_their_own_folder() -> None:
    broken = {
        (name, other) for name, path in modules().items() for other in inside(path) if not may_import(name, other)
    }
    assert broken == set()


def test_no_imports_go_in_a_circle() -> None:
    try:
        TopologicalSorter({name: inside(path) for name, path in modules().items()}).prepare()
    except CycleError as circle:
        pytest.fail(f"these import each other: {' -> '.join(circle.args[1])}")


def test_folders_have_a_dozen_files_at_most() -> None:
    counted = Counter(name.rpartition(".")[0] for name in modules())
    assert {folder: n for folder, n in counted.items() if n > MOST_FILES and folder != "cli"} == {}


def test_each_heavy_library_has_one_owner() -> None:
    for name, path in modules().items():
        for imported in imports(path):
            owners = OWNERS.get(imported.split(".")[0])
            assert owners is None or name.startswith(owners), f"{name} imports {imported}, which {owners} own"


def test_the_tree_in_the_docs_names_each_file_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    _, _, after = text.partition("\nAutomaticEval/\n")
    named, folder = set(), ""
    for line in takewhile(lambda line: line.startswith("  "), after.splitlines()):
        first = line.split()[0]
        if first.endswith("/"):
            folder = first
        elif line.startswith("    "):
            named.add(folder + first)
        else:
            named.add(first)
    assert named == {str(path.relative_to(PACKAGE)) for path in modules().values()}


def test_no_test_file_imports_from_another() -> None:
    """What several share is in `tests/helpers/`; the programs that tests write as text count, too."""
    importing = re.compile(r"^\s*(from|import) (conftest|test_\w+)", re.MULTILINE)
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    assert {path.name: match[0] for path, text in texts.items() if (match := importing.search(text))} == {}


def test_the_docs_name_files_that_are_there() -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    written = {"summary.md"}  # by commands
    for page in pages:
        for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|md|c))`", page.read_text(encoding="utf-8")):
            places = [ROOT / name, PACKAGE / name, PACKAGE / "models" / name]
            assert name in written or any(place.exists() for place in places), f"{page.name} names {name}"


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
        "demo/capitals/model.safetensors",
        "demo/capitals/tokenizer.json",
        "evaluation/tasks/demo/capitals_test.jsonl",
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
