"""Every head taken out at once and one by one: the same numbers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import within
from helpers.forked import forked
from helpers.models import FAMILIES, build
from helpers.raw_hooks import n_hooks
from torch import Tensor

from AutomaticEval import score_continuations
from AutomaticEval.analysis.heads import sweep as sweep_module
from AutomaticEval.analysis.heads.ablate import Ablation, reference_z
from AutomaticEval.analysis.heads.patch import recovered
from AutomaticEval.analysis.heads.sweep import sweep_of_answers
from AutomaticEval.analysis.heads.sweep_folder import SweepFolder
from AutomaticEval.analysis.heads.sweep_results import sweep_pairs, sweep_prompts
from AutomaticEval.analysis.numbers import signs
from AutomaticEval.analysis.parts import later_blocks as rest
from AutomaticEval.analysis.words.pairs import Pair, told_apart
from AutomaticEval.analysis.words.profiles import load_profile
from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.errors import EditError, OtherSettings, PromptError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.edit import Edit
from AutomaticEval.models.editing import editing
from AutomaticEval.models.recording import Kept, capturing
from AutomaticEval.sites import Site

PAIRS = [([5, 9, 33, 7], [120, 41]), ([77, 3, 250, 31, 6, 90, 12], [200]), ([8, 19], [20, 21, 22])]


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_a_sweep_is_a_loop_of_ablations(mode: str, name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedModel(build(FAMILIES[name]()), tokenizer, name)
    monkeypatch.setattr(sweep_module, "ROWS", 9)  # three variants of three rows
    layers = range(loaded.layout.n_layers)
    reference = reference_z(loaded, layers, ["What is red?", "The bus"]) if mode == "mean" else None
    means = None if reference is None else {layer: values.mean(0).flatten() for layer, values in reference.items()}
    sweep = sweep_of_answers(loaded, PAIRS, values=means)
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


OF_EQUAL_LENGTH = [
    Pair("What is 3 + 4 + 1?", "What is 7 + 4 + 2?", "a", "b"),
    Pair("3 is", "5 is", "a", "b"),
    Pair("Is 2 less than 8?", "Is 9 less than 8?", "a", "b"),
]
"""Digits are one token each."""


@pytest.mark.parametrize("site", ["z", "mlp_out", "resid_post"])
def test_a_sweep_of_pairs_is_a_loop_of_patches(site: str, tiny: LoadedModel, tmp_path: Path) -> None:
    """Of heads by `recovered`, of positions by an edit of that column in one unpadded forward."""
    pairs, layout = OF_EQUAL_LENGTH, tiny.layout
    found = sweep_pairs(tiny, pairs, SweepFolder(tmp_path / "sweep", {}), site=site).as_json()
    if site == "z":
        for each in found["places"]:
            expected = recovered(tiny, pairs, {each["layer"]: [each["head"]]}, "all").as_json()["summary"]
            for name in ("denoising", "noising"):
                assert each[name]["mean"] == pytest.approx(expected[name]["mean"], abs=1e-4)
                assert each[name]["n"] == 3
        return
    lengths = [len(tiny.tokenizer(pair.clean)["input_ids"]) for pair in pairs]
    assert len(found["places"]) == layout.n_layers * max(lengths)
    answer, wrong = told_apart(tiny, pairs[0])
    for each in found["places"]:
        numbers: dict[str, list[tuple[float, float]]] = {"denoising": [], "noising": []}
        for pair, length in zip(pairs, lengths, strict=True):
            column = length - 1 - each["position"]
            if column < 0:
                continue
            ids = [torch.tensor([tiny.tokenizer(text)["input_ids"]]) for text in (pair.clean, pair.corrupted)]
            values, plain = zip(*(seen(tiny, site, each["layer"], given) for given in ids), strict=True)
            whole = plain[0][answer] - plain[0][wrong] - plain[1][answer] + plain[1][wrong]
            for name, into, sign in (("denoising", 1, 1), ("noising", 0, -1)):
                put = Edit.replace(
                    Site(site, each["layer"]),
                    values[1 - into][column],
                    where=lambda *_, column=column: Kept(torch.tensor([0]), torch.tensor([column])),
                )
                with editing(tiny.model, put):
                    patched = seen(tiny, site, each["layer"], ids[into])[1]
                moved = (patched[answer] - patched[wrong]) - (plain[into][answer] - plain[into][wrong])
                numbers[name].append((float(sign * moved), float(whole)))
        for name, expected in numbers.items():
            assert each[name]["n"] == len(expected) - each[name]["n_left_out"] == len(expected)
            part = sum(moved * whole / abs(whole) for moved, whole in expected) / sum(
                abs(whole) for _, whole in expected
            )
            assert each[name]["mean"] == pytest.approx(part, abs=1e-3)


def seen(loaded: LoadedModel, site: str, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """A site at every position [pos, width], and the last logits [d_vocab], of one forward."""
    keep = Kept(torch.zeros(ids.shape[1], dtype=torch.long), torch.arange(ids.shape[1]))
    taps = loaded.layout.pick([Site(site, layer)])
    with capturing(loaded.model, taps, loaded.layout.embedding, lambda *_: keep, 1) as found, torch.no_grad():
        logits = loaded.model(ids, use_cache=False).logits[0, -1].double()
    return found.rows[Site(site, layer).key], logits


@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("site", ["mlp_out", "resid_post"])
def test_positions_of_prompts_are_taken_out(site: str, mode: str, tiny_llama: LoadedModel) -> None:
    value = {layer: torch.randn(32) for layer in range(3)} if mode == "mean" else None
    sweep = sweep_of_answers(tiny_llama, PAIRS, site, value)
    for layer in range(3):
        found = sweep.layer(layer)
        assert found.shape == (7, 3)
        for place in range(7):
            for row, (prompt, answer) in enumerate(PAIRS):
                if place >= len(prompt):
                    assert found[place, row].isnan()
                    continue
                column = len(prompt) - 1 - place
                instead = 0.0 if value is None else value[layer]
                where = lambda *_, column=column: Kept(torch.tensor([0]), torch.tensor([column]))  # noqa: E731
                with editing(tiny_llama.model, Edit.replace(Site(site, layer), instead, where=where)), torch.no_grad():
                    logits = tiny_llama.model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
                likely = logits[len(prompt) - 1 : -1].log_softmax(-1)[range(len(answer)), answer].sum()
                assert float(found[place, row]) == pytest.approx(float(likely), abs=1e-4)


def test_means_of_other_texts_are_not_mixed(demo: LoadedModel, tmp_path: Path) -> None:
    """A sweep goes on with the same means and answers only."""
    prompts = ["What is red?", "Is a dog an animal?"]
    sweep_prompts(demo, prompts, SweepFolder(tmp_path, {}), neutral=["The bus"], max_new_tokens=2)
    with pytest.raises(OtherSettings, match=r"neutral was \['The bus'\] and is \['The car'\]"):
        sweep_prompts(demo, prompts, SweepFolder(tmp_path, {}), neutral=["The car"], max_new_tokens=2)
    with pytest.raises(OtherSettings, match="answers was"):
        sweep_prompts(demo, prompts, SweepFolder(tmp_path, {}), neutral=["The bus"], max_new_tokens=3)


def test_pairs_and_sites_that_cannot_be_swept(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="pairs of equal length; 'a b c d' has"):
        sweep_pairs(tiny_llama, [Pair("a b c d", "a", "a", "b")], SweepFolder(tmp_path, {}))
    with pytest.raises(EditError, match="'q' is not swept; write z, mlp_out, resid_post"):
        sweep_of_answers(tiny_llama, PAIRS, "q")


def test_blocks_that_cannot_be_skipped_are_refused(tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that does something of its own in the middle of the forward is found by the sweep's own check."""
    monkeypatch.setattr(rest, "_given", lambda hidden, *args, **kwargs: torch.zeros_like(hidden))
    real = rest.Edit.replace
    monkeypatch.setattr(rest.Edit, "replace", lambda site, value: real(site, value * 0.5))
    with pytest.raises(EditError, match="cannot be run from a middle block"):
        sweep_of_answers(tiny_llama, PAIRS)
    assert not n_hooks(tiny_llama.model)


command = partial(within, "heads", "sweep")


def test_pairs_from_the_command_line(demo: LoadedModel, tmp_path: Path) -> None:
    pairs = OF_EQUAL_LENGTH
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(vars(pair)) for pair in pairs))
    done = forked("heads", "sweep", "--pairs", "pairs.jsonl", "--site", "resid_post", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    expected = sweep_pairs(demo, pairs, SweepFolder(tmp_path / "again", {}), site="resid_post").as_json()
    assert found["places"] == expected["places"]
    # the last layer's stream at the last position is all there is
    last = next(each for each in found["places"] if (each["layer"], each["position"]) == (3, 0))
    assert last["denoising"]["mean"] == pytest.approx(1, abs=1e-4)
    assert last["noising"]["mean"] == pytest.approx(1, abs=1e-4)
    assert (tmp_path / "out" / "sweep_heatmap.png").read_bytes().startswith(b"\x89PNG")
    both = command("--pairs", "pairs.jsonl", "--emotion", "anger", cwd=tmp_path)
    assert (both.returncode, "give --category" in both.stderr) == (2, True)
    ignored = command("--pairs", "pairs.jsonl", "--mode", "mean", cwd=tmp_path)
    assert (ignored.returncode, "are of --category" in ignored.stderr) == (2, True)
    some = command("--pairs", "pairs.jsonl", "--sample_num", "2", "--output", "two", cwd=tmp_path)
    assert some.returncode == 0, some.stderr
    assert len(json.loads((tmp_path / "two" / "sweep.json").read_text())["samples"]) == 2


def test_from_the_command_line_and_cut_short(demo: LoadedModel, tmp_path: Path) -> None:
    """What is on the disk is not computed again, and other settings are refused."""
    asked = ["--emotion", "anger", "--sample_num", "3", "--max-tokens", "3", "--mode", "mean", "--output", "out"]
    done = command(*asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [(each["layer"], each["head"]) for each in found["places"]] == [(n, h) for n in range(4) for h in range(4)]
    for name in ("sweep_heatmap.png", "sweep_top_heads.png"):
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
    assert found["places"][9]["change"]["mean"] == pytest.approx(sum(change) / len(change), abs=1e-4)

    first = tmp_path / "out" / "sweep" / "logprobs_layer_000.json"
    kept = json.loads(first.read_text())
    first.write_text(json.dumps({"logprobs": [[0.0] * len(each) for each in kept["logprobs"]]}))  # to know it again
    (tmp_path / "out" / "sweep" / "logprobs_layer_003.json").unlink()
    (tmp_path / "out" / "sweep.json").unlink()
    again = command(*asked, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    resumed = json.loads((tmp_path / "out" / "sweep.json").read_text())
    for each in (*resumed["places"], *found["places"]):
        assert 0 < each["change"].pop("p") <= 1  # it is of all places together
    assert resumed["places"][4:] == found["places"][4:]
    assert resumed["places"][0] != found["places"][0]
    (tmp_path / "out" / "sweep.json").unlink()
    for name in ("sweep_heatmap.png", "sweep_top_heads.png"):
        (tmp_path / "out" / name).unlink()
    assert [each["prompt"] for each in found["samples"]] == [
        prompt for prompt, each in zip(found["settings"]["prompts"], answers, strict=True) if each
    ]
    assert [each["logprob"] for each in found["samples"]] == pytest.approx(plainly, abs=1e-4)
    other = command(*asked, "--seed", "1", cwd=tmp_path)
    assert (other.returncode, other.stderr.splitlines()[-1].startswith("OtherSettings")) == (2, True)
    assert command("--emotion", "joy", "--output", "no", cwd=tmp_path).returncode == 2
    assert not (tmp_path / "no").exists()


def test_the_seed_draws_the_signs_of_the_p_values(
    tiny_llama: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signs, "N_DRAWN", 5)  # of 8 patterns

    def p_values(seed: int) -> list[float]:
        found = sweep_pairs(tiny_llama, OF_EQUAL_LENGTH, SweepFolder(tmp_path / "sweep", {}), seed=seed).as_json()
        one = recovered(tiny_llama, OF_EQUAL_LENGTH, {0: [0]}, seed=seed).as_json()["summary"]
        return [each["denoising"]["p"] for each in (*found["places"], one)]

    assert p_values(1) == p_values(1)
    assert len({tuple(p_values(seed)) for seed in range(6)}) > 1


def test_what_is_refused_does_not_block_what_is_right(demo: LoadedModel, tmp_path: Path) -> None:
    """Neither settings nor an empty folder is left by a refused pair, and settings without a layer are nobody's."""
    unequal = [Pair("The sky", "The red grass that is", "a", "b")]
    (tmp_path / "wrong.jsonl").write_text("\n".join(json.dumps(vars(pair)) for pair in unequal))
    (tmp_path / "right.jsonl").write_text("\n".join(json.dumps(vars(pair)) for pair in OF_EQUAL_LENGTH))
    refused = command("--pairs", "wrong.jsonl", "--output", "a/b", cwd=tmp_path)
    assert (refused.returncode, "pairs of equal length" in refused.stderr) == (2, True)
    assert not (tmp_path / "a").exists()
    (tmp_path / "a" / "b" / "sweep").mkdir(parents=True)
    (tmp_path / "a" / "b" / "sweep" / "settings.json").write_text('{"model": "of a process that was killed"}')
    done = command("--pairs", "right.jsonl", "--output", "a/b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
