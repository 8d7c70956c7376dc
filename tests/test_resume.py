"""Runs that are cut short and go on: nothing is computed twice, and the scores are those of a run that was never cut."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import chdir, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families.configs import FAMILIES as SMALL
from families.configs import build as small
from helpers.commands import within
from helpers.forked import Forked
from helpers.models import CONFIGS, build
from helpers.plain_lm_eval import as_json, plain
from helpers.tasks import MIXED
from lm_eval.models.huggingface import HFLM

from AutomaticEval import evaluate_with_activations, open_run
from AutomaticEval.capture.tree import shared_prompt as prefill
from AutomaticEval.capture.tree import walk as walking
from AutomaticEval.capture.tree.score import TOKENS_A_FORWARD
from AutomaticEval.errors import FolderInUse, OtherSettings, StoreError
from AutomaticEval.evaluation.benchmark_options import Benchmark
from AutomaticEval.evaluation.harness import tree_scores
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.store import writer
from AutomaticEval.store.local_paths import ASKED
from AutomaticEval.store.upkeep.verify import verify
from AutomaticEval.store.writer import RunWriter

evaluate = partial(evaluate_with_activations, scoring="stock")


class Stopped(KeyboardInterrupt):
    """Where a test cuts a run short."""


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[int]]:
    """forwards(n): a list that grows with each forward or generation, of which the n-th is stopped."""
    made: list[int] = []
    limit = [float("inf")]

    def counted(real: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not getattr(self, "_is_probing", False):
                if len(made) >= limit[0]:
                    raise Stopped
                made.append(1)
            return real(self, *args, **kwargs)

        return call

    for name in ("_model_call", "_model_generate"):
        monkeypatch.setattr(HFLM, name, counted(getattr(HFLM, name)))
    monkeypatch.setattr(walking, "tree_forward", counted(walking.tree_forward))

    def start(n: float) -> list[int]:
        made.clear()
        limit[0] = n
        return made

    return start


def test_a_resumed_run_takes_the_measured_tokens_of_the_run(
    demo: LoadedModel, tmp_path: Path, forwards: Callable[[float], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured differs from time to time; the forwards of a resumed run are those of a run that was never cut."""
    measured = iter([24, 24, 40])
    monkeypatch.setattr(tree_scores, "measured_tokens", lambda loaded, n_past: next(measured))
    monkeypatch.setattr(writer, "SHARD_BYTES", 1)
    how: dict[str, Any] = {"batch_size": "auto", "limit": 12, "scoring": "tree", "positions": "all"}
    whole = evaluate_with_activations(demo, "demo_facts", activation_save_dir=tmp_path / "whole", **how)
    forwards(7)
    with pytest.raises(Stopped):
        evaluate_with_activations(demo, "demo_facts", activation_save_dir=tmp_path / "cut", **how)
    (folder,) = (tmp_path / "cut").iterdir()
    forwards(float("inf"))
    rest = evaluate_with_activations(demo, "demo_facts", resume=folder, **how)
    assert as_json(rest.samples) == as_json(whole.samples)
    assert set(open_run(folder).column("batch_columns")) == {24}
    assert next(measured) == 40


@pytest.mark.parametrize(("scoring", "batch_size", "step"), [("stock", 2, 4), ("stock", "auto", 1), ("tree", 2, 16)])
@pytest.mark.usefixtures("small_probes")
def test_resumed_run_computes_the_rest_and_scores_the_same(
    scoring: str,
    batch_size: Any,
    step: int,
    tokenizer: Any,
    own_tasks: str,
    tmp_path: Path,
    forwards: Callable[[float], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cut short again and again, in every kind of task: sampled answers go on with the random state of their batch."""
    loaded = LoadedModel(build(CONFIGS["llama"]()), tokenizer, "llama")
    names = (*MIXED, "demo")
    how: dict[str, Any] = {"include_path": own_tasks, "batch_size": batch_size, "limit": 6, "scoring": scoring}
    monkeypatch.setitem(TOKENS_A_FORWARD, "cpu", 24)
    monkeypatch.setattr(prefill, "CHUNK", 8)  # so that answers, sampled ones too, go on from a shared prefill
    expected = plain(loaded, names, own_tasks, batch_size, limit=6)
    made = forwards(float("inf"))
    whole = evaluate_with_activations(loaded, names, activation_save_dir=tmp_path / "whole", **how)
    n_whole, n_cut, folder, outcome = len(made), 0, None, None
    while outcome is None:
        made = forwards(step)
        try:
            outcome = evaluate_with_activations(
                loaded, names, activation_save_dir=tmp_path / "cut", resume=folder, **how
            )
        except Stopped:
            (folder,) = (tmp_path / "cut").iterdir()
        n_cut += len(made)
    assert n_whole > 2 * step
    if scoring == "stock":
        assert n_cut == n_whole
    else:  # the paths to what was not answered are computed again
        assert n_whole <= n_cut < 2 * n_whole
        expected = {"results": whole.results["results"], "samples": whole.samples}
    assert as_json(outcome.results["results"]) == as_json(expected["results"])
    assert as_json(outcome.samples) == as_json(expected["samples"])
    one, other = open_run(outcome.folder or ""), open_run(whole.folder or "")
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert [first[name] for name in ("task", "doc_id", "choice", "repeat", "window", "response")] == [
            second[name] for name in ("task", "doc_id", "choice", "repeat", "window", "response")
        ]
        assert all(torch.equal(rows, second["activations"][key]) for key, rows in first["activations"].items())
    assert "random_state" not in one.table().columns


def cut(folder: Path, forwards: Callable[[float], list[int]], **how: Any) -> Path:
    """A demo run that was stopped in its middle."""
    forwards(3)
    with pytest.raises(Stopped):
        evaluate("demo", "demo", limit=20, activation_save_dir=folder, **how)
    forwards(float("inf"))
    (cut_short,) = folder.iterdir()
    return cut_short


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_fewshot": 2}, r"benchmark.num_fewshot was None and is 2"),
        ({"seed": 3}, r"benchmark.seed was None and is 3"),
        ({"positions": "all"}, r"positions was 'scored' and is 'all'"),
        ({"layers_to_capture": [1]}, r"layers"),
        ({"batch_size": 4}, r"benchmark.batch_size was 8 and is 4"),
        ({"dtype": "bfloat16"}, r"dtype was 'float32' and is 'bfloat16'"),
        ({"revision": "main"}, None),
    ],
)
def test_changed_setting_is_refused_with_the_difference(
    changed: dict[str, Any], says: str | None, tmp_path: Path, forwards: Callable[[float], list[int]]
) -> None:
    folder = cut(tmp_path, forwards)
    before = sorted(folder.rglob("*"))
    how = {"limit": 20, **changed}
    if says is None:  # a folder has one revision alone: nothing changed
        assert evaluate("demo", "demo", resume=folder, **how).folder == folder
        return
    with pytest.raises(OtherSettings, match=says):
        evaluate("demo", "demo", resume=folder, **how)
    assert sorted(folder.rglob("*")) == before


def test_another_compression_goes_on_and_the_scoring_line_says_which_part_it_counts(
    tmp_path: Path, forwards: Callable[[float], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"limit": 12, "layers_to_capture": [0], "scoring": "tree"}
    monkeypatch.setitem(TOKENS_A_FORWARD, "cpu", 24)
    monkeypatch.setattr(writer, "SHARD_BYTES", 1)
    whole = evaluate("demo", "demo_facts", output=tmp_path / "whole", **how)
    forwards(7)
    with pytest.raises(Stopped):
        evaluate("demo", "demo_facts", output=tmp_path / "cut", **how)
    forwards(float("inf"))
    folder = tmp_path / "cut"
    n_before = len(open_run(folder))
    done = within("--resume", str(folder), "--compression", "gzip", "--strict", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Scoring in this part ({n_before} samples were there already): " in " ".join(done.stdout.split())
    assert (whole.n_before, n_before > 0) == (0, True)
    one, other = open_run(folder), open_run(tmp_path / "whole")
    assert torch.equal(one.activations("layer_0"), other.activations("layer_0"))
    assert not verify(folder)


def printed_command(said: str) -> list[str]:
    """The arguments of the command that a run printed when it was cut short, as a shell reads them."""
    line = said.partition("o on:\n")[2].splitlines()[0]
    return shlex.split(line)[shlex.split(line).index("--resume") :]


@pytest.mark.parametrize("from_code", [False, True], ids=["command", "code"])
def test_the_printed_command_goes_on_alone_from_any_folder(
    from_code: bool, own_tasks: str, tmp_path: Path, forwards: Callable[[float], list[int]]
) -> None:
    """Relative paths, quotes and spaces, a projection and all options come back from the run."""
    here, other = tmp_path / "it's here", tmp_path / "other"
    here.mkdir()
    other.mkdir()
    shutil.copytree(own_tasks, here / "my tasks")
    shutil.copytree(DEMO_FOLDER, here / "my model")
    np.save(here / "half.npy", np.eye(128, 64, dtype=np.float32))
    options = ["--model", "my model", "--benchmark", "demo_facts,last_word", "--include_path", "my tasks"]
    options += ["--limit", "6", "--scoring", "stock", "--layers", "-1", "--project", "half.npy", "--seed", "3"]
    options += ["--positions", "last", "--compression", "gzip", "--batch_size", "2"]
    whole = within("--capture_activations", *options, "-o", "whole", cwd=here)
    assert whole.returncode == 0, whole.stderr
    forwards(3)
    cut_short = within("--capture_activations", *options, "-o", "my run", cwd=here)
    assert cut_short.returncode not in (0, 2)
    again = printed_command(cut_short.stderr)
    assert again == ["--resume", "my run"]
    with pytest.warns(UserWarning, match=r"my run is not finished: .*--resume '.*my run'"):
        assert repr(open_run(here / "my run")).endswith("not finished>")
    forwards(float("inf"))
    refused = within("--resume", str(here / "my run"), "--layers", "0", cwd=other)
    assert refused.returncode == 2
    assert "layers was '-1' and is '0'" in refused.stderr
    made = forwards(float("inf"))
    if from_code:
        with chdir(other):
            assert evaluate_with_activations(resume=here / "my run").folder == here / "my run"
    else:
        done = within("--resume", str(here / "my run"), cwd=other)
        assert done.returncode == 0, done.stderr
        assert "Task" in done.stdout
    assert made
    one, expected = open_run(here / "my run"), open_run(here / "whole")
    assert one.finished
    assert one.records()[0]["task"] == expected.records()[0]["task"]
    assert [each["logprob"] for each in one.records()] == [each["logprob"] for each in expected.records()]
    assert one.settings | {"run_id": None} == expected.settings | {"run_id": None}
    assert not (here / "my run" / ASKED).exists()


def test_a_run_from_code_says_how_it_goes_on_in_its_error(
    demo: LoadedModel, tmp_path: Path, forwards: Callable[[float], list[int]]
) -> None:
    """By name the folder is enough, for the command, too; of an object the run cannot say what it was."""
    forwards(3)
    with pytest.raises(Stopped) as named:
        evaluate("demo", ["demo_facts"], limit=20, layers_to_capture=[0], output=tmp_path / "named")
    assert f"evaluate_with_activations(resume='{tmp_path}/named')" in named.value.__notes__[0]
    forwards(3)
    with pytest.raises(Stopped) as held:
        evaluate(demo, "demo_facts", limit=20, output=tmp_path / "held")
    assert "the same call, with resume=" in held.value.__notes__[0]
    forwards(float("inf"))
    assert within("--resume", "named", cwd=tmp_path).returncode == 0
    assert open_run(tmp_path / "named").keys == ["embeddings", "layer_0"]
    refused = within("--resume", "held", cwd=tmp_path)
    assert refused.returncode == 2
    assert "held does not say what it was asked for" in refused.stderr
    with pytest.raises(StoreError, match="does not say what it was asked for"):
        evaluate_with_activations(resume=tmp_path / "held")


def test_other_weights_under_the_same_name_are_refused(
    demo: LoadedModel, tmp_path: Path, forwards: Callable[[float], list[int]]
) -> None:
    import copy

    folder = cut(tmp_path, forwards)
    trained = copy.deepcopy(demo.model)
    with torch.no_grad():
        trained.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(OtherSettings, match="model_hash was"):
        evaluate(LoadedModel(trained, demo.tokenizer, "demo"), "demo", limit=20, resume=folder)


def test_other_questions_under_the_same_name_are_refused(
    demo: LoadedModel, own_tasks: str, tmp_path: Path, forwards: Callable[[float], list[int]]
) -> None:
    """The task's file is the same, its data are not."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    text = "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\noutput_type: loglikelihood\n"
    text += "doc_to_text: '{{q}}'\ndoc_to_target: ' {{a}}'\nmetric_list: [{metric: acc}]\n"
    (tasks / "t.yaml").write_text(text % (tmp_path / "t.jsonl"))
    how: dict[str, Any] = {"include_path": tasks, "batch_size": 1, "activation_save_dir": tmp_path / "out"}
    for question in ("What is", "Where is"):
        docs = [{"q": f"{question} {n}?", "a": n} for n in range(8)]
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, docs)))
        if question == "What is":
            forwards(5)
            with pytest.raises(Stopped):
                evaluate(demo, "t", **how)
            forwards(float("inf"))
    (folder,) = (tmp_path / "out").iterdir()
    with pytest.raises(OtherSettings, match="another text"):
        evaluate(demo, "t", resume=folder, **how)


def test_finished_busy_and_missing_runs_are_refused(tmp_path: Path, forwards: Callable[[float], list[int]]) -> None:
    folder = cut(tmp_path, forwards)
    made = open_run(folder)
    assert not made.finished
    with RunWriter(tmp_path / "other", "demo", {}) as busy, pytest.raises(FolderInUse):
        evaluate("demo", "demo", limit=20, resume=busy.folder)
    evaluate("demo", "demo", limit=20, resume=folder)
    assert open_run(folder).finished
    with pytest.raises(StoreError, match="nothing to resume"):
        evaluate("demo", "demo", limit=20, resume=folder)


def test_run_killed_while_it_finishes_is_joined_again_without_a_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forwards: Callable[[float], list[int]]
) -> None:
    with monkeypatch.context() as patched:

        def stop(*args: Any, **kwargs: Any) -> None:
            raise Stopped

        patched.setattr(writer, "write_index", stop)
        with pytest.raises(Stopped):
            evaluate("demo", "demo", limit=10, activation_save_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    made = forwards(float("inf"))
    outcome = evaluate("demo", "demo", limit=10, resume=folder)
    assert made == []
    assert len(open_run(outcome.folder or "")) == 50


SCRIPT = """
import sys, time
from lm_eval.models.huggingface import HFLM
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.store import writer
from AutomaticEval.store.local_paths import ASKED
writer.SHARD_SECONDS = 0.05
generate = HFLM._model_generate
def slowly(self, *args, **kwargs):  # so that there is time to kill it
    time.sleep(0.1)
    return generate(self, *args, **kwargs)
HFLM._model_generate = slowly
from AutomaticEval.cli.app import main
main()
"""


def command(save_dir: Path, resume: Path | None = None, *options: str) -> list[str]:
    asked = ["--capture_activations", "--batch_size", "2", "--limit", "60", "--positions", "all"]
    more = [] if resume is None else ["--resume", str(resume)]
    return ["-c", SCRIPT, *asked, "--activation_save_dir", str(save_dir), *more, *options]


def shards_of(folder: Path | None) -> set[tuple[str, int]]:
    """Each shard and when it was written: a run that goes on puts small ones together under a name that was there."""
    found = set()
    for path in folder.glob("shard-*.h5") if folder else ():
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


@pytest.mark.parametrize(
    "options", [[], pytest.param(["--reduce", "mean"], marks=pytest.mark.slow)], ids=["rows", "means"]
)
def test_killed_at_random_moments_the_command_goes_on(options: list[str], tmp_path: Path) -> None:
    """SIGKILL in real processes, from before the first shard to the last; then the results of a run that was never killed."""
    rng = random.Random(5)
    runs = tmp_path / "runs"
    folder: Path | None = None
    for _ in range(4):
        process = Forked(command(runs, folder, *options))
        before, wanted = shards_of(folder), rng.randint(0, 5)
        while process.poll() is None and len(shards_of(folder) - before) < wanted:
            folder = folder or next(iter(runs.glob("*")), None)
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None, process.said()
        process.send_signal(signal.SIGKILL)
        process.wait()
        folder = folder or next(iter(runs.glob("*")))
    assert not open_run(folder).finished
    for whole_command in (command(runs, folder, *options), command(tmp_path / "whole", None, *options)):
        done = Forked(whole_command).wait()
        assert done.returncode == 0, done.stderr
    (whole,) = (tmp_path / "whole").iterdir()
    written = [
        json.loads(next(iter(sorted(each.rglob("results_*.json"))[-1:])).read_text()) for each in (folder, whole)
    ]
    assert written[0]["results"] == written[1]["results"]
    one, other = open_run(folder), open_run(whole)
    assert one.finished
    assert len(one) == len(other) == 300
    for first, second in zip(one, other, strict=True):
        assert (first["task"], first["doc_id"], first["choice"]) == (second["task"], second["doc_id"], second["choice"])
        held, wanted = ({**each["activations"], **each.get("reduced", {})} for each in (first, second))
        assert held
        assert all(torch.equal(rows, wanted[key]) for key, rows in held.items())


KILLED = """
import os, signal
from pathlib import Path
import torch
from AutomaticEval import evaluate_with_activations
from AutomaticEval.store import writer

writer.SHARD_BYTES, real = 1, torch.nn.Embedding.forward

def embed(self, ids):
    if len(list(Path("cut").glob("*/shard-*.h5"))) > 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, ids)

torch.nn.Embedding.forward = embed
evaluate_with_activations("tiny", "{task}", activation_save_dir="cut", **{how})
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Scoring request by request")
@pytest.mark.parametrize(("family", "task"), [("lfm2", "demo_facts"), ("deepseek-v3", "demo")])
def test_a_killed_run_of_a_hybrid_or_of_latent_attention_goes_on(
    family: str, task: str, tokenizer: Any, tmp_path: Path
) -> None:
    """SIGKILL in a forward; then rows and scores are those of a run that was never killed, to the last bit."""
    model = small(SMALL[family])
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    how: dict[str, Any] = {"limit": 2, "batch_size": 1, "sites": "resid_post,mlp_out,z,k", "positions": "all"}
    killed = Forked(["-c", KILLED.format(task=task, how=how)], tmp_path).wait()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (folder,) = (tmp_path / "cut").iterdir()
    kept = len(open_run(folder))
    with chdir(tmp_path):
        whole = evaluate_with_activations("tiny", task, activation_save_dir="whole", **how)
        rest = evaluate_with_activations("tiny", task, resume=folder, **how)
    assert 0 < kept < len(open_run(folder))
    assert as_json(rest.samples) == as_json(whole.samples)
    assert as_json(rest.results["results"]) == as_json(whole.results["results"])
    for first, second in zip(open_run(folder), open_run(tmp_path / (whole.folder or "")), strict=True):
        assert list(first["activations"]) == list(second["activations"])
        assert {key.rpartition(".")[2] for key in first["activations"]} >= {"mlp_out", "z", "k"}
        assert all(torch.equal(rows, second["activations"][key]) for key, rows in first["activations"].items())


def test_partly_answered_batches_are_computed_and_stored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forwards: Callable[[float], list[int]]
) -> None:
    """With batch_size=auto a batch may be cut elsewhere than it was; here the size of the batches is changed instead.

    Other batches round otherwise, which is exaggerated: what is on the disk stands.
    """
    monkeypatch.setattr(Benchmark, "as_dict", lambda self: None)
    folder = cut(tmp_path, forwards)
    before = open_run(folder).table().set_index(["task", "doc_id", "choice"]).logprob
    assert len(before) % 5
    model_call = HFLM._model_call
    monkeypatch.setattr(HFLM, "_model_call", lambda *a, **k: model_call(*a, **k) * 1.001)
    outcome = evaluate("demo", "demo", limit=20, resume=folder, batch_size=5)
    run = open_run(outcome.folder or "")
    assert len(run) == 100
    rows = run.column("batch_rows")
    assert 0 < rows.count(5) < 100
    assert rows.count(8) == len(before)  # as it was computed the first time
    after = run.table().set_index(["task", "doc_id", "choice"]).logprob
    assert (after[before.index] == before).all()
