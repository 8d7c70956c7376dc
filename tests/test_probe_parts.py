"""A probe that is cut short goes on: places that are done come from the disk, to the last bit, and never from another probe."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import within
from helpers.forked import MAIN, Forked
from helpers.probed import run_of

from AutomaticEval import open_run, probe
from AutomaticEval.analysis.probes import places
from AutomaticEval.analysis.probes.baselines import baselines
from AutomaticEval.analysis.probes.out_of_fold import out_of_fold
from AutomaticEval.errors import OtherSettings, SelectionError, StoreError
from AutomaticEval.store.run import Run

N, WIDTH = 100, 8


def made(folder: Path, n_layers: int, seed: int = 0, n: int = N) -> Run:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 4, n)
    sites = {f"layer_{layer}": draw.normal(size=(n, WIDTH)) for layer in range(n_layers)}
    sites["layer_1"][np.arange(n), labels] += 2
    columns = [
        {
            "correct": bool(each > 1),
            "target": int(each),
            "choices": list("ABCD"),
            "doc_id": n + 1000 * seed,
            "task": f"task{n % 6}",
        }
        for n, each in enumerate(labels)
    ]
    return run_of(folder, {"embeddings": draw.normal(size=(n, WIDTH)), **sites}, columns)


@pytest.fixture(autouse=True)
def _with_one_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Baselines are made anew each time, and take longer than these places."""
    monkeypatch.setattr("AutomaticEval.analysis.probes.probe.baselines", lambda *given: baselines(*given)[:1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(tmp_path_factory.mktemp("asked") / "run", 4)


def states(folder: Path) -> dict[str, int]:
    return {each.name: each.stat().st_mtime_ns for each in folder.glob("place_*.safetensors")}


def stopping_after(n: int) -> Callable[[int], None]:
    done: list[int] = []

    def advance(_: int) -> None:
        done.append(1)
        if len(done) == n:
            raise KeyboardInterrupt

    return advance


@pytest.mark.parametrize("asked", [{"n_repeats": 2}, {"target": "answer", "n_folds": 3}, {"transfer": True}])
def test_what_goes_on_is_what_nothing_cut_short_to_the_last_bit(
    run: Run, tmp_path: Path, asked: dict[str, Any]
) -> None:
    if "transfer" in asked:
        asked = {"transfer": [made(tmp_path / "other", 4, 1)]}
    stop = 6 if "transfer" in asked else 2
    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        probe(run, **asked, folder=parts, advance=stopping_after(stop))
    for each in sorted(parts.glob("place_*.safetensors"))[stop:]:  # other threads may have gone on, to the last place
        each.unlink()
    there = states(parts)
    assert len(there) == stop
    whole = probe(run, **asked, folder=parts)
    assert whole.as_json() == probe(run, **asked).as_json()
    assert whole.as_json() == probe(run, **asked, folder=parts).as_json()  # all of it from the disk
    assert {name: states(parts)[name] for name in there} == there
    assert len(states(parts)) == (9 if "transfer" in asked else 5)


@pytest.fixture(scope="module")
def cut(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of a probe that was cut short."""
    parts = tmp_path_factory.mktemp("cut") / "parts"
    with pytest.raises(KeyboardInterrupt):
        probe(run, folder=parts, advance=stopping_after(1))
    return parts


def test_probes_that_begin_together_in_one_folder_do_not_take_each_others_places(run: Run, tmp_path: Path) -> None:
    """Each finds no place there, and may write its settings over those of the other."""
    parts, others = tmp_path / "parts", list[Any]()
    asked = {"keys": ["layer_0"]}
    found = probe(run, **asked, folder=parts, expect=lambda _: others.append(probe(run, **asked, seed=7, folder=parts)))
    assert found.as_json() == probe(run, **asked).as_json()
    assert others[0].as_json() == probe(run, **asked, seed=7).as_json()


def test_no_place_is_kept_within_a_run(run: Run) -> None:
    """Who deletes the folder, to begin anew, would delete the run."""
    before = sorted(each.name for each in run.path.iterdir())
    with pytest.raises(SelectionError, match=r"is a run, and places are kept in no run; .*--output"):
        probe(run, folder=run.path)
    assert sorted(each.name for each in run.path.iterdir()) == before


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"seed": 7}, "seed was 42 and is 7"),
        ({"n_folds": 4}, "n_folds was 5 and is 4"),
        ({"n_repeats": 2}, "n_repeats was 1 and is 2"),
        ({"split": "task"}, "split was 'question' and is 'task'"),
        ({"position": "last"}, r"position was 'prompt\[-1\]' and is 'last'"),
        ({"keys": ["layer_0"]}, "places was "),
        ({"positive": "false"}, "classes was "),
        ({"target": "answer"}, "classes was "),
    ],
)
def test_parts_of_another_probe_are_refused(run: Run, cut: Path, other: dict[str, Any], why: str) -> None:
    there = states(cut)
    with pytest.raises(OtherSettings, match=f"parts was made with other settings: {why}"):
        probe(run, **other, folder=cut)
    assert states(cut) == there


def test_parts_of_other_files_questions_or_versions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made(tmp_path / "run", 2)
    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        probe(one, folder=parts, advance=stopping_after(1))
    with pytest.raises(OtherSettings, match=r"runs\.1\.questions was '100, xxh3_64"):
        probe(one.where(doc_id=range(95)), folder=parts)
    with monkeypatch.context() as patched:
        patched.setattr("AutomaticEval.analysis.probes.parts.kept_places.__version__", "0.0.1")
        with pytest.raises(OtherSettings, match=r"versions\.AutomaticEval was .* and is '0\.0\.1'"):
            probe(one, folder=parts)
    file = next((tmp_path / "run").glob("*.h5"))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    with pytest.raises(OtherSettings, match=r"runs\.1\.files was"):
        probe(open_run(tmp_path / "run"), folder=parts)


def test_a_damaged_part_is_named(run: Run, tmp_path: Path) -> None:
    probe(run, keys=["layer_0", "layer_1"], folder=tmp_path)
    (file,) = tmp_path.glob("place_*_layer_1.safetensors")
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 1
    file.write_bytes(whole)
    with pytest.raises(
        StoreError, match=r"place_\w+_layer_1\.safetensors is damaged: .* Delete it, and the same command"
    ):
        probe(run, keys=["layer_0", "layer_1"], folder=tmp_path)


def test_ctrl_c_says_how_to_go_on_and_a_result_takes_the_parts_away(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def interrupted(*given: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return whole(*given)

    whole, command = places.along_means, ("probe", str(run.path), "-o", "out/few.json")
    monkeypatch.setattr(places, "along_means", interrupted)
    done = within(*command, cwd=tmp_path)
    monkeypatch.setattr(places, "along_means", whole)
    assert done.returncode != 0
    assert "Cut short; places that are done, in out/few.parts: 3. To go on:" in done.stderr
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["few.parts"]
    mine = tmp_path / "out" / "few.parts" / "mine.safetensors"
    mine.write_bytes(b"of a person")
    done = within(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Places that are there already, in out/few.parts: 3" in done.stderr
    assert [each.name for each in mine.parent.iterdir()] == ["mine.safetensors"]
    assert json.loads((tmp_path / "out" / "few.json").read_text()) == json.loads(json.dumps(probe(run).as_json()))


def test_a_probe_that_fails_before_any_place_leaves_nothing(run: Run, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(60, 4))
    rows[3, 2] = np.inf
    run_of(tmp_path / "run", {"layer_0": rows}, [{"correct": bool(n % 2)} for n in range(60)])
    done = within("probe", "run", "-o", "out", cwd=tmp_path)
    assert "infinite or NaN" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_killed_probe_goes_on_and_computes_only_what_is_missing(tmp_path: Path) -> None:
    """SIGKILL in a real process, after some of 13 places."""
    one, command = made(tmp_path / "run", 12, n=200), ("probe", "run")
    killed = Forked([MAIN, *command], tmp_path)
    folder = tmp_path / "results" / "probe"
    end = time.monotonic() + 120
    while len(states(folder)) < 3 and killed.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait().returncode == -signal.SIGKILL
    there = states(folder)
    assert 3 <= len(there) < 13
    computed: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(places, "out_of_fold", lambda *given: computed.append("") or out_of_fold(*given))
        done = within(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Places that are there already, in results/probe: {len(there)}" in done.stderr
    assert len(computed) == 13 - len(there)
    assert not folder.exists()
    written = json.loads((tmp_path / "results" / "probe.json").read_text())
    assert written == json.loads(json.dumps(probe(one).as_json()))
