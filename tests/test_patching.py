"""Values of one run in another: a run's own change nothing, all of another's make it that run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import within
from helpers.forked import forked
from helpers.models import CONFIGS, build
from helpers.raw_hooks import n_hooks

from AutomaticEval.analysis.heads.patch import Patching, matched, recovered
from AutomaticEval.analysis.parts.before_after import answers_with
from AutomaticEval.analysis.words.pairs import Pair, read_pairs
from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.errors import EditError, PromptError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.editing import editing

ONE, OTHER = "What is red?", "What is big?"
EVERY = {0: None, 1: None, 2: None}


@pytest.fixture(params=list(CONFIGS))
def loaded(request: pytest.FixtureRequest, tokenizer: Any) -> LoadedModel:
    return LoadedModel(build(CONFIGS[request.param]()), tokenizer, request.param)


def logits(loaded: LoadedModel, text: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = loaded.model(torch.tensor([loaded.tokenizer(text)["input_ids"]]), use_cache=False).logits
    return found


def test_prompts_of_equal_length(tokenizer: Any) -> None:
    """What the tests below stand on."""
    one, other = (tokenizer(text)["input_ids"] for text in (ONE, OTHER))
    assert len(one) == len(other)
    assert one != other


@pytest.mark.parametrize("site", ["z", "mlp_out", "resid_post"])
@pytest.mark.parametrize("positions", ["last", "all", "aligned"])
def test_a_runs_own_values_change_nothing(site: str, positions: str, loaded: LoadedModel) -> None:
    expected = logits(loaded, ONE)
    places = {0: [0, 2], 2: [1]} if site == "z" else {0: None, 2: None}
    with Patching(loaded, [ONE], [ONE], places, positions, site).applied([0], [0]):
        assert torch.equal(logits(loaded, ONE), expected)
    assert not n_hooks(loaded.model)


def test_every_head_and_every_mlp_with_the_embedding_make_the_source_run(loaded: LoadedModel) -> None:
    n_layers = loaded.layout.n_layers
    every = dict.fromkeys(range(n_layers))
    heads = Patching(loaded, [ONE], [OTHER], {layer: range(loaded.layout.n_heads) for layer in every}, "all")
    mlps = Patching(loaded, [ONE], [OTHER], every, "all", "mlp_out")
    from AutomaticEval import Edit

    seen: list[torch.Tensor] = []
    catch = Edit("embeddings", lambda found: seen.append(found) or found)
    with editing(loaded.model, [catch]):
        expected = logits(loaded, ONE)
    with heads.applied([0], [0]), mlps.applied([0], [0]), editing(loaded.model, [Edit.replace("embeddings", seen[0])]):
        found = logits(loaded, OTHER)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with heads.applied([0], [0]), mlps.applied([0], [0]):
        assert not torch.allclose(logits(loaded, OTHER), expected, atol=1e-2)


def test_the_streams_last_layer_is_the_answer(loaded: LoadedModel) -> None:
    """After the last block nothing but norm and unembedding is left: the last position's logits are the source's."""
    last = loaded.layout.n_layers - 1
    with Patching(loaded, ["What is it that is red, then?"], [ONE], {last: None}, "last", "resid_post").applied(
        [0], [0]
    ):
        found = logits(loaded, ONE)
    expected = logits(loaded, "What is it that is red, then?")
    torch.testing.assert_close(found[0, -1], expected[0, -1], atol=1e-5, rtol=1e-5)


def test_answers_over_left_padded_batches(loaded: LoadedModel) -> None:
    """Each row has its own source; a batch gives what single rows give."""
    sources = ["Is a dog an animal?", "1 + 1 is", "The sky is blue and the grass"]
    destinations = ["A table has four legs and", "The bus", "Stir the soup, then"]
    patching = Patching(loaded, sources, destinations, {1: [0, 3], 2: [2]}, "last")
    together = answers_with(patching, destinations, [], Sampling(max_new_tokens=6), batch_size=3).as_json()["samples"]
    for row, text in enumerate(destinations):
        ids = loaded.tokenizer(text)["input_ids"]
        with Patching(loaded, [sources[row]], [text], {1: [0, 3], 2: [2]}, "last").applied([0], [0]):
            alone = respond(loaded, [ids], Sampling(max_new_tokens=6))[0].text
        assert together[row]["after"]["text"] == alone
    assert any(each["after"]["logprob"] != pytest.approx(each["before"]["logprob"], abs=1e-4) for each in together)


def test_logit_difference_recovered(loaded: LoadedModel) -> None:
    """Nothing of it by no head's values, all of it by the whole stream."""
    tokens = [" the", " is"]
    pairs = [Pair(ONE, OTHER, *tokens), Pair(OTHER, ONE, *tokens)]
    ids = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in tokens]
    assert [len(each) for each in ids] == [1, 1]
    whole = recovered(loaded, pairs, {0: None}, "all", "resid_post").as_json()
    for name in ("denoising", "noising"):
        assert [each[name] for each in whole["samples"]] == pytest.approx([1.0, 1.0], abs=1e-4)
        assert whole["summary"][name]["mean"] == pytest.approx(1.0, abs=1e-4)
    first, second = whole["samples"]
    difference = logits(loaded, ONE)[0, -1, ids[0][0]] - logits(loaded, ONE)[0, -1, ids[1][0]]
    assert first["clean"] == pytest.approx(difference.item(), abs=1e-5)
    assert first["clean"] == pytest.approx(second["corrupted"], abs=1e-5)
    some = recovered(loaded, pairs, {1: [0]}, "last").as_json()["samples"]
    assert some[0]["denoising"] == pytest.approx(some[1]["noising"], abs=1e-5)  # the same patch, named from either side
    assert some[0]["denoising"] != pytest.approx(1.0, abs=1e-4)
    same = recovered(loaded, [Pair(ONE, ONE, *tokens)], {1: [0]}, "all").as_json()
    assert same["samples"][0]["denoising"] is None
    assert same["summary"]["denoising"]["n"] == 0


def test_positions_that_belong_together() -> None:
    assert matched([1, 2, 3], [4, 5], "last") == [(2, 1)]
    assert matched([1, 2], [3, 4], "all") == [(0, 0), (1, 1)]
    assert matched([1, 2, 3, 4], [1, 9, 3, 4], "aligned") == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert matched([1, 2, 3], [1, 8, 9, 3], "aligned") == [(0, 0), (2, 3)]
    with pytest.raises(EditError, match="equal length; these have 1 and 2"):
        matched([1], [1, 2], "all")
    with pytest.raises(EditError, match="last, all, aligned"):
        matched([1], [1], "first")


def test_what_cannot_be_patched(tiny_llama: LoadedModel) -> None:
    with pytest.raises(EditError, match="'q' is not patched"):
        Patching(tiny_llama, [ONE], [OTHER], EVERY, "last", "q")
    with pytest.raises(EditError, match="1 sources and 2 destinations"):
        Patching(tiny_llama, [ONE], [OTHER, ONE], EVERY)
    with pytest.raises(PromptError, match="tokens; a logit difference needs one"):
        recovered(tiny_llama, [Pair(ONE, OTHER, " a colour of its own", " is")], {0: [0]})
    with pytest.raises(PromptError, match="the same token"):
        recovered(tiny_llama, [Pair(ONE, OTHER, " is", " is")], {0: [0]})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not JSON"),
        ('{"clean": "a"}', "line 2: not an object"),
        ('{"clean": "a", "corrupted": "", "answer": "c", "wrong": "d"}', "line 2: clean"),
    ],
)
def test_files_of_pairs(line: str, says: str, tmp_path: Path) -> None:
    good = {"clean": "a", "corrupted": "b", "answer": "c", "wrong": "d"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(good) + "\n")
    assert read_pairs(tmp_path / "pairs.jsonl") == [Pair("a", "b", "c", "d")]
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(PromptError, match=says):
        read_pairs(tmp_path / "pairs.jsonl")


command = partial(within, "heads", "patch")


def test_from_the_command_line(demo: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({"clean": ONE, "corrupted": OTHER, "answer": " the", "wrong": " is"})
    )
    done = forked(
        "heads",
        "patch",
        "--head-spec",
        "0:*,2:1",
        "--pairs",
        "pairs.jsonl",
        "--positions",
        "all",
        "--output",
        "one",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "one" / "patching.json").read_text())
    expected = recovered(demo, [Pair(ONE, OTHER, " the", " is")], {0: range(4), 2: [1]}, "all").as_json()
    assert found["summary"] == expected["summary"]
    assert (tmp_path / "one" / "patching_recovered.png").read_bytes().startswith(b"\x89PNG")
    asked = ["--profile", "baseline", "--emotion", "gratitude", "--sample_num", "3", "--max-tokens", "4"]
    done = command("--head-spec", "1", "--site", "mlp_out", *asked, "--output", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "two" / "patching.json").read_text())
    assert len(found["samples"]) == 3
    assert set(found["summary"]) == {"sentiment", "keywords", "logprob"}
    assert (tmp_path / "two" / "patching_keyword_comparison.png").read_bytes().startswith(b"\x89PNG")
    wrong = command("--head-spec", "1:0", "--site", "mlp_out", "--pairs", "pairs.jsonl", cwd=tmp_path)
    assert (wrong.returncode, "has no heads" in wrong.stderr) == (2, True)
