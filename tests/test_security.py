"""What `docs/security.md` says of code that runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.commands import within

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}
test_split: test
process_docs: !function code_{name}.mark
output_type: multiple_choice
doc_to_text: '{{{{q}}}}'
doc_to_choice: '{{{{c}}}}'
doc_to_target: '{{{{a}}}}'
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks, each with code that leaves a file behind when it is imported."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.jsonl").write_text('{"q": "Q", "c": ["a", "b"], "a": 0}\n')
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder))
        code = f"open({str(tmp_path / f'ran_{name}')!r}, 'w').close()\ndef mark(docs): return docs\n"
        (folder / f"code_{name}.py").write_text(code)
    return folder


def test_code_of_a_task_runs_when_that_task_is_asked_for_and_the_run_says_so(tasks: Path, tmp_path: Path) -> None:
    done = within("--benchmark", "one", "--include_path", str(tasks), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ran_one").exists()
    assert not (tmp_path / "ran_two").exists()
    assert done.stderr.count("may run Python (!function") == 1
    done = within("--benchmark", str(tasks / "two.yaml"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ran_two").exists()
    assert done.stderr.count("may run Python (!function") == 1


def test_a_run_without_tasks_of_ones_own_says_nothing(tmp_path: Path) -> None:
    done = within("--benchmark", "demo_facts", "--limit", "1", cwd=tmp_path)
    assert "may run Python" not in done.stderr


def test_include_path_says_so_in_its_help(tmp_path: Path) -> None:
    text = " ".join(within("--help", cwd=tmp_path).stdout.replace("│", " ").split())
    assert "(!function) runs when such a task is asked for" in text
    assert "code which the model wrote" in text
