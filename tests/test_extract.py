"""`main.py extract`: profiles over several models, files and data sets, what fails, what is there already, several processes."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import time
from collections import OrderedDict
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import process, within
from helpers.forked import MAIN, Forked, ended_together, forked, two_ranks
from helpers.models import CONFIGS, build
from helpers.places import ROOT

from AutomaticEval import open_run
from AutomaticEval.analysis.words.profiles import load_profile
from AutomaticEval.capture.texts.feeding import Feeding
from AutomaticEval.capture.texts.many_runs import Plan, extract_sets, folder_names
from AutomaticEval.capture.texts.text_set import TextSet
from AutomaticEval.errors import SelectionError
from AutomaticEval.models import loading
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.processes import Ranks
from AutomaticEval.selection import Selection
from AutomaticEval.store.upkeep.verify import verify

command = partial(within, "extract")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> list[str]:
    """Small models of the profile's three families, in folders."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("gpt2", "gpt_neox", "gpt_neo"):
        build(CONFIGS[name]()).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return [str(folder / name) for name in ("gpt2", "gpt_neox", "gpt_neo")]


class Cells(HTMLParser):
    """The text of a page's table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self._is_cell = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._is_cell = tag == "td"

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self.cells.append(data)
            self._is_cell = False


def made(folder: Path, name: str) -> Path:
    """The only default folder of an extraction with this name, which ends in the time."""
    (path,) = (folder / "activations").glob(f"{name}_[0-9]*_[0-9]*")
    return path


def test_a_profile_over_three_families(three: list[str], tmp_path: Path, tokenizer: Any) -> None:
    asked = ["--profile", "baseline", "--num_samples", "6", "--model", ",".join([three[0], "/no/model", *three[1:]])]
    done = forked("extract", *asked, cwd=tmp_path)
    assert done.returncode == 1, done.stderr  # one model is not there; the others are
    root = made(tmp_path, "baseline")
    profile = load_profile("baseline")
    names = [f"{Path(model).name}_{category}" for model in three for category in profile.prompts]
    assert sorted(path.name for path in root.iterdir()) == sorted([*names, "summary.html", "summary.md"])
    for name in names:
        run = open_run(root / name)
        category = name.rpartition("_")[2]
        assert run.column("prompt") == profile.prompts[category][:6]
        assert run.column("task") == [category] * 6
        n_layers = run.settings["shape"]["n_layers"]
        assert run.keys == ["embeddings", *(f"layer_{n}{kind}" for n in range(n_layers) for kind in ("", ".mlp_out"))]
        assert [len(rows) for rows in run.layers()[1]] == [
            len(tokenizer(text)["input_ids"]) for text in run.column("prompt")
        ]
        assert not verify(root / name)
    summary = (root / "summary.md").read_text()
    for part in ("## Tokenisation", "## Structure", "## Lengths", "## Problems", "model, anger: ModelUnavailable"):
        assert part in summary
    page = Cells()
    page.feed((root / "summary.html").read_text())
    line = next(
        line for line in summary.splitlines() if line.startswith(f"| {Path(three[1]).name} | apology | captured")
    )
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3] == "6"
    at = page.cells.index("apology", page.cells.index(Path(three[1]).name))
    assert page.cells[at - 1 : at + 8] == cells

    stamps = {name: (root / name / "run.h5").stat().st_mtime_ns for name in names}
    (root / names[0] / "run.h5").unlink()  # one that was cut short
    for shard in (root / names[0]).glob("shard*"):
        shard.unlink()
    there = ["--output", str(root)]
    again = command(*[*asked[:-1], ",".join(three)], *there, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("is there already") == len(names) - 1
    now = {name: (root / name / "run.h5").stat().st_mtime_ns for name in names}
    assert [name for name in names if now[name] != stamps[name]] == [names[0]]
    assert "- None." in (root / "summary.md").read_text()
    other = command(*[*asked[:-1], three[0]], "--layers", "0", *there, cwd=tmp_path)
    assert (other.returncode, "layers was 'all' and is '0'. Name another folder with --output" in other.stderr) == (
        2,
        True,
    )


def test_a_file_of_texts_and_what_is_wrong(demo: LoadedModel, tmp_path: Path) -> None:
    texts = ["What is red?", "The bus is late, and so are we, and so is everybody else here.", "A"]
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts))
    asked = ["--texts", "mine.jsonl", "--model", "demo", "--text_field", "body", "--sites", "mlp_post,pattern"]
    done = command(*asked, "--layers", "2", "--seq_length", "16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{(384 * 4 + 4 * 16 * 4) / 1024:.1f} KB a token" in done.stderr
    run = open_run(made(tmp_path, "mine_demo"))
    assert run.keys == ["layer_2.mlp_post", "layer_2.pattern"]
    assert [count > 0 for count in run.column("n_truncated")] == [False, True, False]
    assert run.pattern(2, 2).shape == (4, 1, 1)
    assert "1 texts were cut to fit" in (made(tmp_path, "mine_demo") / "summary.md").read_text()
    (tmp_path / "notes.md").write_text("A text.")
    wrong: list[tuple[list[str], str]] = [
        (["--profile", "basline"], "no profile 'basline'. Did you mean 'baseline'?"),
        (["--profile", "baseline", "--category", "joy"], "no category 'joy'"),
        (["--texts", "mine.jsonl", "--model", "demo"], "line 1: none of the fields text, input, question, prompt"),
        (["--texts", "none.jsonl", "--model", "demo"], "no file none.jsonl"),
        (
            ["--texts", "notes.md", "--model", "demo"],
            "notes.md ends in '.md'; give a JSONL, JSON, CSV, TSV, parquet or txt file",
        ),
        (["--dataset", "mine.jsonl", "--model", "demo"], "mine.jsonl is a file; give it as texts"),
        ([*asked[:2], "--model", "/no/model", *asked[4:], "--positions", "response"], "texts have no response"),
        ([*asked[:2], "--model", "/no/model", *asked[4:]], "ModelUnavailable"),
        ([*asked, "--seq_length", "9000", "--output", "x"], "demo can be fed 512"),
        ([*asked, "--seq_length", "4", "--strict", "--output", "x"], "PromptTooLong"),
        ([*asked, "--layers", "9", "--output", "x"], "UnknownLayer"),
        ([*asked, "--sites", "mlp_pots", "--output", "x"], "UnknownSite"),
        ([*asked, "--batch_size", "many", "--output", "x"], "write a number, or auto"),
        ([*asked, "--positions", "scored", "--output", "x"], "texts have no response"),
        (["--texts", "mine.jsonl"], "take a --model"),
        ([], "which texts?"),
    ]
    for arguments, says in wrong:
        refused = command(*arguments, cwd=tmp_path)
        assert (refused.returncode, says in refused.stderr) == (2, True), (arguments, refused.stderr[-2000:])
        assert "Traceback" not in refused.stderr
    absent = process("extract", "--dataset", "no/such", "--model", "demo", cwd=tmp_path)  # offline from its start
    assert (absent.returncode, "DatasetUnavailable: the data set 'no/such'" in absent.stderr) == (2, True)
    assert not (tmp_path / "x").exists()
    assert list((tmp_path / "activations").iterdir()) == [made(tmp_path, "mine_demo")]


def test_names_of_folders() -> None:
    assert folder_names(["gpt2", "EleutherAI/pythia-160m"]) == {"gpt2": "gpt2", "EleutherAI/pythia-160m": "pythia-160m"}
    assert folder_names(["/a/x/", "b/x", "ä: ?"]) == {"/a/x/": "a-x", "b/x": "b-x", "ä: ?": "ä-"}
    with pytest.raises(SelectionError, match="gpt2 was named twice"):
        folder_names(["gpt2", "b", "gpt2"])


def test_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    lines = [json.dumps({"text": f"What is {number} + 1?" if number % 3 else ""}) for number in range(30)]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines))
    asked = ["--dataset", "set", "--model", "demo", "--num_samples", "12", "--layers", "-1", "--sites", "resid_post"]
    done = command(*asked, "--seq_length", "32", "--packing", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = open_run(made(tmp_path, "set_demo"))
    assert run.column("prompt") == [f"What is {number} + 1?" for number in range(18) if number % 3]


def test_what_changed_is_not_taken_for_what_is_there(three: list[str], tmp_path: Path) -> None:
    """Texts, how they are fed, how the model is loaded, and its weights."""
    (tmp_path / "set").mkdir()
    data = tmp_path / "set" / "train.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in ("one", None, "two", 3)))
    model = tmp_path / "model"
    shutil.copytree(three[0], model)
    asked = ["--dataset", "set", "--model", "model", "--layers", "0", "--sites", "embed", "--batch_size", "1"]
    broken = command(*asked, cwd=tmp_path)
    assert (broken.returncode, "item 3, field 'text': int, not a text" in broken.stderr) == (2, True)
    data.write_text("\n".join(json.dumps({"text": text}) for text in ("one", None, "two", "three")))
    mended = command(*asked, cwd=tmp_path)  # nothing was on the disk
    assert mended.returncode == 0, mended.stderr
    done = command(*asked, "--output", "done", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 texts were empty, and left out" in done.stderr
    assert "1 texts were empty" in (tmp_path / "done" / "summary.md").read_text()
    assert open_run(tmp_path / "done").column("prompt") == ["one", "two", "three"]
    same = command(*asked, "--output", "done", cwd=tmp_path)
    assert (same.returncode, "is there already" in same.stderr) == (0, True)
    for changed in (["--dtype", "bfloat16"], ["--strict"], ["--seq_length", "9"]):
        refused = command(*asked, "--output", "done", *changed, cwd=tmp_path)
        assert (refused.returncode, "was made with other settings" in refused.stderr) == (2, True), refused.stderr
    data.write_text("\n".join(json.dumps({"text": text}) for text in ("one", None, "two", "four")))
    assert "files was" in command(*asked, "--output", "done", cwd=tmp_path).stderr
    data.write_text("\n".join(json.dumps({"text": text}) for text in ("one", None, "two", "three")))
    again = command("--texts", "set/train.jsonl", *asked[2:], "--output", "weights", cwd=tmp_path)
    assert "not a text" in again.stderr  # null in a file is an error
    (tmp_path / "a.txt").write_text("one\ntwo")
    for stderr in ("captured", "is there already"):
        assert command("--texts", "a.txt", *asked[2:], "--output", "weights", cwd=tmp_path).returncode == 0, stderr
    (model / "model.safetensors").touch()
    refused = command("--texts", "a.txt", *asked[2:], "--output", "weights", cwd=tmp_path)
    assert (refused.returncode, "model_files was" in refused.stderr) == (2, True)


def test_a_model_that_breaks_does_not_lose_the_others(tmp_path: Path, tokenizer: Any) -> None:
    """One whose tokenizer has tokens that it has not; and categories with names that figures and tables could stumble over."""
    small = CONFIGS["gpt2"]()
    small.vocab_size = 50
    build(small).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    lines = [
        {"category": category, "text": text} for category in (r"$\frac$", "<b>日本|x") for text in ("What", "The bus")
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "mine.toml").write_text('neutral = "<b>日本|x"\nprompts = "mine.jsonl"\nmodels = ["small", "demo"]')
    done = command("--profile", "mine.toml", "--layers", "0", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("IndexError") == 2
    summary = (made(tmp_path, "mine") / "summary.md").read_text()
    assert r"| demo | \$\\frac\$ | captured | 2 |" in summary
    assert r"| demo | &lt;b&gt;日本\|x | captured | 2 |" in summary


def test_a_killed_extraction_goes_on(tmp_path: Path) -> None:
    """SIGTERM in the middle; the printed command makes the rest, and the run is that of one that was never stopped."""
    (tmp_path / "texts.txt").write_text("\n".join(f"What is {number} + {number % 50}?" for number in range(6000)))
    asked = ["--texts", "texts.txt", "--model", "demo", "--layers", "0", "--sites", "embed", "--batch_size", "4"]
    process = Forked([MAIN, "extract", *asked], tmp_path)
    while "2048/6000" not in process.said()[1]:
        assert process.poll() is None, process.said()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed = shlex.split(process.wait().stderr.partition("To go on:\n")[2].splitlines()[0])
    folder = made(tmp_path, "texts_demo")
    left = open_run(folder)
    assert 2048 <= len(left) < 6000
    assert not left.finished
    time.sleep(1)  # timestamps have whole seconds
    started = time.time()
    assert printed[:2] == ["python", str(ROOT / "main.py")]
    done = within(*printed[2:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = open_run(folder)
    assert run.finished
    assert run.column("doc_id") == list(range(6000))
    stamps = run.column("timestamp")
    assert sum(stamp < time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(started)) for stamp in stamps) >= 2048
    once = command(*asked, "--output", "once", cwd=tmp_path)
    assert once.returncode == 0, once.stderr
    other = open_run(tmp_path / "once")
    for number in range(0, 6000, 371):
        assert torch.equal(run.read(number, "embeddings"), other.read(number, "embeddings"))
    assert not verify(folder)


def test_two_processes_share_the_texts(tmp_path: Path) -> None:
    texts = [f"What is {number} + {number % 5}? It is {number * 3}." for number in range(40)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    asked = ["--texts", "texts.txt", "--model", "demo", "--layers", "1", "--sites", "resid_post,z"]
    for done in ended_together(two_ranks(MAIN, "extract", *asked, "--output", "two", cwd=tmp_path)):
        assert done.returncode == 0, done.stderr
    done = within("extract", *asked, "--output", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    two, one = open_run(tmp_path / "two"), open_run(tmp_path / "one")
    assert two.column("prompt") == one.column("prompt") == texts
    for number in range(40):
        for key in two.keys:
            torch.testing.assert_close(two.read(number, key), one.read(number, key), atol=1e-5, rtol=1e-5)
    numbers = json.loads((tmp_path / "two" / "extraction.json").read_text())
    assert (numbers["n_texts"], numbers["n_samples"]) == (40, 40)
    assert numbers["n_tokens"] == json.loads((tmp_path / "one" / "extraction.json").read_text())["n_tokens"]
    assert not verify(tmp_path / "two")


def test_a_model_that_is_not_there_does_not_lose_the_others_of_two_processes(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('neutral = "a"\nprompts = "mine.jsonl"\nmodels = ["/no/model", "demo"]')
    lines = [json.dumps({"category": name, "text": f"{name} {number}"}) for name in "ab" for number in range(3)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    asked = ["extract", "--profile", "mine.toml", "--layers", "0", "--sites", "embed"]
    done = ended_together(two_ranks(MAIN, *asked, cwd=tmp_path))
    assert 1 in [each.returncode for each in done], done
    assert (
        "".join(each.stderr for each in done).count("/no/model, a: ModelUnavailable") == 1
    )  # the first process says so
    for name in "ab":
        prompts = open_run(made(tmp_path, "mine") / f"demo_{name}").column("prompt")
        assert prompts == [f"{name} {number}" for number in range(3)]


def test_each_model_is_loaded_once(demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that cannot be: a name that is not there may take half a minute to be told."""
    asked: list[str] = []

    def load(sources: Any, *how: Any) -> Any:
        asked.append(sources.name)
        return really(sources, *how)

    really = loading.load_weights
    monkeypatch.setattr(loading, "load_weights", load)
    monkeypatch.setattr(loading, "_loaded", OrderedDict())  # nothing is kept from other tests
    every = [TextSet.of(name, [f"{name} is here."]) for name in ("anger", "joy")]
    plan = Plan(Selection.parse("embed", "0"), Feeding(), LoadOptions(), None, Ranks())
    units = extract_sets(["/no/model", "demo"], every, plan, lambda model, name: tmp_path / Path(model).name / name)
    assert asked == ["/no/model", "demo"]
    assert [unit.status for unit in units] == ["failed", "failed", "captured", "captured"]
    assert all("ModelUnavailable" in unit.error for unit in units[:2])
    assert units[3].run().column("prompt") == ["joy is here."]
