"""Every head taken out at once and one by one: the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, ROOT, build, n_hooks

from AutomaticEval import score_continuations
from AutomaticEval.analysis import sweep as sweep_module
from AutomaticEval.analysis.ablation import Ablation, reference_z
from AutomaticEval.analysis.profiles import load_profile
from AutomaticEval.analysis.sweep import Sweep
from AutomaticEval.capture.generation import Sampling, respond
from AutomaticEval.errors import EditError
from AutomaticEval.models.loading import LoadedModel

PAIRS = [([5, 9, 33, 7], [120, 41]), ([77, 3, 250, 31, 6, 90, 12], [200]), ([8, 19], [20, 21, 22])]


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_a_sweep_is_a_loop_of_ablations(mode: str, name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedModel(build(FAMILIES[name]()), tokenizer, name)
    monkeypatch.setattr(sweep_module, "ROWS", 9)  # three variants of three rows
    layers = range(loaded.layout.n_layers)
    reference = reference_z(loaded, layers, ["What is red?", "The bus"]) if mode == "mean" else None
    means = None if reference is None else {layer: values.mean(0) for layer, values in reference.items()}
    sweep = Sweep(loaded, PAIRS, means)
    plainly = [each.logprob for each in score_continuations(PAIRS, loaded)]
    assert sweep.baseline.tolist() == pytest.approx(plainly, abs=1e-5)
    for layer in layers:
        found = sweep.layer(layer)
        assert found.shape == (loaded.layout.n_heads, 3)
        for head in range(loaded.layout.n_heads):
            ablation = Ablation(loaded, {layer: [head]}, mode, reference)
            assert found[head].tolist() == pytest.approx(ablation.logprobs(PAIRS), abs=1e-5)
    assert not n_hooks(loaded.model)
    assert not [module for module in loaded.model.modules() if "forward" in module.__dict__]


def test_blocks_that_cannot_be_skipped_are_refused(tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that does something of its own in the middle of the forward is found by the sweep's own check."""
    monkeypatch.setattr(sweep_module, "_given", lambda hidden, *args, **kwargs: torch.zeros_like(hidden))
    real = sweep_module.Edit.replace
    monkeypatch.setattr(sweep_module.Edit, "replace", lambda site, value: real(site, value * 0.5))
    with pytest.raises(EditError, match="cannot be run from a middle block"):
        Sweep(tiny_llama, PAIRS)
    assert not n_hooks(tiny_llama.model)


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    whole = [sys.executable, str(ROOT / "main.py"), "heads", "sweep", *arguments]
    return subprocess.run(whole, cwd=cwd, env=environment, capture_output=True, text=True)


def test_from_the_command_line_and_cut_short(demo: LoadedModel, tmp_path: Path) -> None:
    """What is on the disk is not computed again, and other settings are refused."""
    asked = ["--emotion", "anger", "--sample_num", "3", "--max-tokens", "3", "--mode", "mean", "--output", "out"]
    done = command(*asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [(each["layer"], each["head"]) for each in found["heads"]] == [(n, h) for n in range(4) for h in range(4)]
    for name in ("head_reaction_heatmap.png", "top_heads.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
        (tmp_path / "out" / name).unlink()
    profile = load_profile("baseline")
    ids = [demo.tokenizer(text)["input_ids"] for text in found["settings"]["prompts"]]
    answers = [respond(demo, [each], Sampling(max_new_tokens=3))[0].generated_ids for each in ids]
    reference = reference_z(demo, [2], profile.category("neutral"))
    pairs = [(prompt, answer) for prompt, answer in zip(ids, answers, strict=True) if answer]
    without = Ablation(demo, {2: [1]}, "mean", reference).logprobs(pairs)
    plainly = [each.logprob for each in score_continuations(pairs, demo)]
    change = [after - before for after, before in zip(without, plainly, strict=True)]
    assert found["heads"][9]["change"]["mean"] == pytest.approx(sum(change) / len(change), abs=1e-4)

    first = tmp_path / "out" / "sweep" / "layer_000.json"
    kept = json.loads(first.read_text())
    first.write_text(json.dumps({"logprobs": [[0.0] * len(each) for each in kept["logprobs"]]}))  # to know it again
    (tmp_path / "out" / "sweep" / "layer_003.json").unlink()
    (tmp_path / "out" / "sweep.json").unlink()
    again = command(*asked, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    resumed = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert resumed["heads"][4:] == found["heads"][4:]
    assert resumed["heads"][0] != found["heads"][0]
    (tmp_path / "out" / "sweep.json").unlink()
    for name in ("head_reaction_heatmap.png", "top_heads.png"):
        (tmp_path / "out" / name).unlink()
    other = command(*asked, "--seed", "1", cwd=tmp_path)
    assert (other.returncode, other.stderr.splitlines()[-1].startswith("OtherSettings")) == (2, True)
    assert command("--emotion", "joy", "--output", "no", cwd=tmp_path).returncode == 2
