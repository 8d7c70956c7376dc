"""`recompute` finds every planted fault, and nothing in honest runs: faults are written by the project's own writer, so that checksums hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.commands import within
from helpers.models import FAMILIES, build
from helpers.places import STORIES, needs_real
from helpers.raw_hooks import n_hooks
from helpers.runs import SOME_KINDS, assert_honest, evaluated, every_kind, extracted, generated
from torch import Tensor

from AutomaticEval import Edit, editing, load_model, open_run, recompute
from AutomaticEval.capture.recompute import plain_forward as plain_module
from AutomaticEval.capture.recompute import recomputed_sample as sample_module
from AutomaticEval.capture.recompute.plain_forward import plain_forward
from AutomaticEval.capture.recompute.tolerance import LIMITS, Judged, judged, measured
from AutomaticEval.capture.texts.feeding import Feeding
from AutomaticEval.errors import OtherSettings, SelectionError, SiteUnavailable
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.transfer.kept_positions import Forward
from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.sites import Site
from AutomaticEval.store.hdf5.write import write_shard
from AutomaticEval.store.upkeep.convert import convert
from AutomaticEval.store.upkeep.merge import merge
from AutomaticEval.store.upkeep.prune import prune
from AutomaticEval.store.upkeep.verify import verify as verify_checksums
from AutomaticEval.store.writer import RunWriter

# Honest runs


@pytest.mark.parametrize("family", list(FAMILIES))
def test_honest_runs_of_every_kind(family: str, tmp_path: Path, tokenizer: Any) -> None:
    loaded = LoadedModel(build(FAMILIES[family]()), tokenizer, family)
    for _, path in every_kind(
        loaded, tmp_path, "embed,resid_mid,resid_post,attn_out,q,v,z,head_result_norm,mlp_post,final_norm"
    ):
        assert_honest(path, loaded)
    assert not n_hooks(loaded.model)


@needs_real
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_honest_runs_of_a_trained_model(dtype: str, tmp_path: Path) -> None:
    loaded = load_model(str(STORIES), options=LoadOptions(dtype=dtype))
    for _, path in every_kind(loaded, tmp_path, "resid_post,attn_out,mlp_post,z,head_result_norm"):
        assert_honest(path, loaded, 6)


@pytest.mark.parametrize(
    ("dtype", "store_dtype"),
    [
        (torch.float32, "float16"),
        (torch.float32, "bfloat16"),
        (torch.float32, "int8"),
        (torch.bfloat16, "int8"),
        (torch.float16, "bfloat16"),
    ],
)
def test_honest_runs_in_narrower_numbers(dtype: torch.dtype, store_dtype: str, tmp_path: Path, tokenizer: Any) -> None:
    loaded = LoadedModel(build(FAMILIES["llama"](), dtype), tokenizer, "llama")
    kinds = SOME_KINDS + ",head_result_norm"
    patterns = extracted(loaded, tmp_path / "texts", kinds, Feeding(patterns=True), store_dtype=store_dtype)
    for path in (patterns, evaluated(loaded, tmp_path, kinds, store_dtype=store_dtype)):
        assert_honest(path, loaded, 6)


@pytest.mark.parametrize("how", [{"load_in_8bit": True}, {"load_in_4bit": True}, {"dtype": "bfloat16"}])
def test_the_model_is_loaded_as_the_run_was_made(how: dict[str, Any], tmp_path: Path) -> None:
    loaded = load_model("demo", options=LoadOptions(**how))
    for path in (evaluated(loaded, tmp_path), evaluated(loaded, tmp_path, scoring="stock")):
        assert_honest(path, None)
        assert_honest(path, "demo", options=LoadOptions(**how))
    with pytest.raises(OtherSettings, match=r"another model .*(model_hash|dtype|quantization)"):
        recompute(path, "demo", options=LoadOptions(dtype="float16"))


@pytest.mark.parametrize("positions", ["last", "scored", "prompt[-3:]", "response", "::4"])
def test_honest_runs_of_chosen_positions(positions: str, tiny_llama: LoadedModel, tmp_path: Path) -> None:
    kinds = "resid_post,z,logits" if positions == "scored" else SOME_KINDS
    assert_honest(evaluated(tiny_llama, tmp_path, kinds, positions=positions), tiny_llama, 9)


def test_copies_of_honest_runs(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    """Merged, pruned (also of what was chosen before), in other dtypes, and a part of a run."""
    run = extracted(tiny_llama, tmp_path / "one", SOME_KINDS, positions="2:")
    assert_honest(prune(run, tmp_path / "pruned.h5", layers="0", positions="last"), tiny_llama)
    for dtype in ("float16", "float64", "bfloat16"):
        assert_honest(convert(run, tmp_path / f"{dtype}.h5", dtype=dtype), tiny_llama)
    assert_honest(convert(tmp_path / "float16.h5", tmp_path / "wide.h5", dtype="float32"), tiny_llama)
    merged = merge([evaluated(tiny_llama, tmp_path, SOME_KINDS)], tmp_path / "merged.h5")
    assert_honest(merged, tiny_llama)
    part = open_run(run).where(doc_id=[1, 5])
    assert [each.name for each in recompute(part, tiny_llama, 9).samples] == [
        "texts document 1",
        "texts document 5",
    ]


def test_rows_are_compared_in_pieces_of_any_size(
    tiny_llama: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = planted(extracted(tiny_llama, tmp_path / "run", "resid_post"), tmp_path / "x.h5", one_number, 3)
    whole = [str(each) for each in recompute(path, tiny_llama, 6).samples]
    monkeypatch.setattr(sample_module, "NUMBERS", 70)
    assert [str(each) for each in recompute(path, tiny_llama, 6).samples] == whole


def test_equal_says_bit_for_bit(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    """Of texts alone in forwards as plain as ours; and of int8, whose steps are those that are stored."""
    for store_dtype in (None, "float16", "int8"):
        feeding = Feeding(batch_size=1)
        path = extracted(tiny_llama, tmp_path / str(store_dtype), SOME_KINDS, feeding, store_dtype=store_dtype)
        done = assert_honest(path, tiny_llama, 6)
        assert all(each.is_equal for each in done.samples)
        assert str(done.samples[0]) == "sample 0 (texts document 0): equal"
        assert "6 equal, 0 within rounding, 0 DIFFERENT" in str(done)


# Planted faults

Change = Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]


def sample_of(data: dict[str, Any], fields: Any, rows: dict[str, Tensor], generated: list[int] | None = None) -> Sample:
    """A sample that was read, with other rows or another answer, to be written again."""
    own = Rows(data["token_ids"].tolist(), data["tokens"], data["positions"].tolist(), rows)
    answer = data["generated_ids"].tolist() if generated is None else generated
    return Sample(fields, data["input_ids"][0].tolist(), answer, [Part(own, range(len(own.positions)))])


def planted(path: Path, file: Path, change: Change, which: int = 0, **fields: Any) -> Path:
    """A run written again as one file, the rows of one of its samples changed."""
    run = open_run(path)
    samples = []
    for number, data in enumerate(run):
        rows = dict(data["activations"])
        given = {**run.records()[number], **(fields if number == which else {})}
        if number == which:
            rows = change({key: each.clone() for key, each in rows.items()}, data)
        samples.append(sample_of(data, given, rows))
    write_shard(file, samples, run.model, run.settings)
    assert not verify_checksums(file)
    return file


def one_number(rows: dict[str, Tensor], data: dict[str, Any]) -> dict[str, Tensor]:
    rows["layer_1"][5, 3] += rows["layer_1"][5].abs().max() / 2
    return rows


def whole_row(rows: dict[str, Tensor], data: dict[str, Any]) -> dict[str, Tensor]:
    rows["layer_1"][5] = rows["layer_1"][5].flip(0)
    return rows


def wrong_layer(rows: dict[str, Tensor], data: dict[str, Any]) -> dict[str, Tensor]:
    return {**rows, "layer_1": rows["layer_0"]}


def shifted(rows: dict[str, Tensor], data: dict[str, Any]) -> dict[str, Tensor]:
    """Rows of position p + 1 stored at p."""
    return {**rows, "layer_1": torch.cat([rows["layer_1"][1:], rows["layer_1"][-1:]])}


def swapped_heads(rows: dict[str, Tensor], data: dict[str, Any]) -> dict[str, Tensor]:
    z = rows["layer_1.z"].unflatten(
        1, (rows["layer_1.head_result_norm"].shape[1] if "layer_1.head_result_norm" in rows else 4, -1)
    )
    return {**rows, "layer_1.z": z[:, [1, 0, *range(2, z.shape[1])]].flatten(1)}


def swapped_norms(rows: dict[str, Tensor], data: dict[str, Any]) -> dict[str, Tensor]:
    norms = rows["layer_1.head_result_norm"]
    return {**rows, "layer_1.head_result_norm": norms[:, [1, 0, *range(2, norms.shape[1])]]}


def five_percent(rows: dict[str, Tensor], data: dict[str, Any]) -> dict[str, Tensor]:
    """A multiplier that was forgotten: too little for a single row of a bfloat16 model, enough for half of them."""
    return {**rows, "layer_1.mlp_out": rows["layer_1.mlp_out"] * 1.05}


ROW_FAULTS = {
    one_number: r"at layer_1, position 5 \(token '.*'\): off by .*; 1 of \d+ rows differ",
    whole_row: r"at layer_1, position 5 .*; 1 of \d+ rows differ",
    wrong_layer: r"at layer_1, .*nearer to layer_0",
    shifted: r"at layer_1, .*nearer to the position after it",
    swapped_heads: r"at layer_1\.z: head (0 has the values of head 1|1 has the values of head 0)",
    swapped_norms: r"at layer_1\.head_result_norm: head (0 has the values of head 1|1 has the values of head 0)",
    five_percent: r"at layer_1\.mlp_out, position",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_planted_rows_are_found(family: str, dtype: torch.dtype, tmp_path: Path, tokenizer: Any) -> None:
    loaded = LoadedModel(build(FAMILIES[family](), dtype), tokenizer, family)
    path = extracted(loaded, tmp_path / "run", "resid_post,mlp_out,z,head_result_norm")
    for fault, expected in ROW_FAULTS.items():
        done = recompute(planted(path, tmp_path / f"{fault.__name__}.h5", fault, 3), loaded, 6)
        assert [each.number for each in done.different] == [3], fault
        line = str(done.different[0])
        key = re.search(rf"^sample 3 \(texts document 3\): DIFFERENT ({expected})", line)
        assert key is not None, line
        assert all(each.startswith(key[1].split(",")[0].split(":")[0]) for each in done.different[0].problems)
        assert "1 DIFFERENT" in str(done)


@needs_real
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_planted_rows_of_a_trained_model_are_found(dtype: str, tmp_path: Path) -> None:
    loaded = load_model(str(STORIES), options=LoadOptions(dtype=dtype))
    path = extracted(loaded, tmp_path / "run", "resid_post,mlp_out,z,head_result_norm")
    for fault in ROW_FAULTS:
        done = recompute(planted(path, tmp_path / f"{fault.__name__}.h5", fault, 3), loaded, 6)
        assert [each.number for each in done.different] == [3], fault


def test_planted_rows_in_8_bits_are_found(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    """What is stored in steps is known to half a step."""
    kinds = "resid_post,z"
    wide = open_run(extracted(tiny_llama, tmp_path / "wide", kinds))
    narrow = open_run(extracted(tiny_llama, tmp_path / "narrow", kinds, store_dtype="int8"))
    settings = {name: value for name, value in narrow.settings.items() if name != "run_id"}
    for fault in (one_number, whole_row, wrong_layer, shifted, swapped_heads):
        folder = tmp_path / fault.__name__
        with RunWriter(folder, narrow.model, settings) as made:
            for number, data in enumerate(wide):
                rows = {key: each.clone() for key, each in data["activations"].items()}
                made.add([sample_of(data, wide.records()[number], fault(rows, data) if number == 3 else rows)])
            made.finish()
        assert [each.number for each in recompute(folder, tiny_llama, 6).different] == [3], fault


def test_rows_of_another_sample(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    path = extracted(tiny_llama, tmp_path / "run", SOME_KINDS)
    other = open_run(path)[1]["activations"]
    done = recompute(
        planted(
            path, tmp_path / "x.h5", lambda rows, data: {key: other[key][: len(each)] for key, each in rows.items()}
        ),
        tiny_llama,
        6,
    )
    assert [each.number for each in done.different] == [0]
    assert "at embeddings, position" in str(done.different[0])


def test_rows_beside_padding_that_is_attended_to(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    """A left-padded batch without its mask: the padding takes part, and positions are its columns."""
    path = extracted(tiny_llama, tmp_path / "run", "embed,resid_post")

    def padded(rows: dict[str, Tensor], data: dict[str, Any]) -> dict[str, Tensor]:
        ids = data["input_ids"][0].tolist()
        found = plain_forward(tiny_llama, [0] * 5 + ids, list(rows), range(5, 5 + len(ids))).rows
        return {key: found[key] for key in rows}

    done = recompute(planted(path, tmp_path / "x.h5", padded, 1), tiny_llama, 6)
    assert [each.number for each in done.different] == [1]
    assert "at layer_0, position" in str(done.different[0])


@pytest.mark.parametrize(
    ("model_dtype", "narrow"),
    [(torch.float32, torch.float16), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_numbers_that_were_narrowed_without_a_word(
    model_dtype: torch.dtype, narrow: torch.dtype, tmp_path: Path, tokenizer: Any
) -> None:
    """Too little for the tolerance of a float16 model, yet every number tells."""
    loaded = LoadedModel(build(FAMILIES["llama"](), model_dtype), tokenizer, "llama")
    path = extracted(loaded, tmp_path / "run", "resid_post")

    def narrowed(rows: dict[str, Tensor], data: dict[str, Any]) -> dict[str, Tensor]:
        return {**rows, "layer_2": rows["layer_2"].to(narrow).to(model_dtype)}

    done = recompute(planted(path, tmp_path / "x.h5", narrowed, 2), loaded, 6)
    assert [each.number for each in done.different] == [2]
    names = [str(each).removeprefix("torch.") for each in (narrow, model_dtype)]
    assert f"at layer_2: every number is one of {names[0]}, where {names[1]} was promised" in str(done.different[0])


def test_numbers_that_are_stored_narrower_than_promised(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    run = open_run(extracted(tiny_llama, tmp_path / "run", "resid_post", store_dtype="float16"))
    data = run[0]
    sample = sample_of(data, run.records()[0], data["activations"])
    promised = {name: value for name, value in run.settings.items() if name != "store_dtype"}
    write_shard(tmp_path / "x.h5", [sample], run.model, promised)
    assert "at layer_0: stored as float16, where float32 was promised" in str(
        recompute(tmp_path / "x.h5", tiny_llama).samples[0]
    )


def test_a_pattern_of_other_heads(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    path = extracted(tiny_llama, tmp_path / "run", "z", Feeding(patterns=True))

    def swapped(rows: dict[str, Tensor], data: dict[str, Any]) -> dict[str, Tensor]:
        pattern = rows["layer_2.pattern"].unflatten(1, (4, -1))
        return {**rows, "layer_2.pattern": pattern[:, [2, 1, 0, 3]].flatten(1)}

    def beyond(rows: dict[str, Tensor], data: dict[str, Any]) -> dict[str, Tensor]:
        """Attention to a position that the text does not have."""
        rows["layer_2.pattern"].unflatten(1, (4, -1))[3, 1, len(data["positions"]) + 2] = 0.5
        return rows

    for fault, expected in ((swapped, "at layer_2.pattern: head"), (beyond, "at layer_2.pattern, position 3")):
        done = recompute(planted(path, tmp_path / f"{fault.__name__}.h5", fault, 1), tiny_llama, 6)
        assert [each.number for each in done.different] == [1]
        assert expected in str(done.different[0])


def test_positions_that_are_not_those_the_run_kept(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    run = open_run(extracted(tiny_llama, tmp_path / "run", "resid_post"))
    data = run[1]
    own = Rows(data["token_ids"].tolist(), data["tokens"], data["positions"].tolist(), data["activations"])
    sample = Sample(run.records()[1], data["input_ids"][0].tolist(), [], [Part(own, range(1, len(own.positions)))])
    write_shard(tmp_path / "x.h5", [sample], run.model, run.settings)
    (found,) = recompute(tmp_path / "x.h5", tiny_llama).samples
    n_ids = len(data["positions"])
    assert f"DIFFERENT positions: {n_ids - 1} are stored, and the run kept {n_ids}; the first that differs is 0" in str(
        found
    )


def test_a_capture_that_lies_is_seen(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    """Hooks that cut one column beside: what is recomputed does not share them."""
    cut = Forward.cut

    def beside(self: Forward, key: str, value: Tensor) -> Tensor:
        return cut(self, key, value.roll(1, 1) if key == "layer_1" else value)

    with patch.object(Forward, "cut", beside):
        paths = [
            extracted(tiny_llama, tmp_path / "run", "resid_post"),
            generated(tiny_llama, tmp_path / "x.h5", "resid_post"),
        ]
        done = [recompute(path, tiny_llama, 6) for path in paths]
    for each in done:
        assert len(each.different) == len(each.samples)
        assert all("nearer to the position before it" in str(sample) for sample in each.different)


# Scores and answers


def test_scores_that_are_not_the_continuations(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    path = evaluated(tiny_llama, tmp_path, "resid_post")
    record = open_run(path).records()[2]
    same = lambda rows, data: rows  # noqa: E731
    for name, value in (
        ("logprob", record["logprob"] - 0.01),
        ("logprob", float("inf")),
        ("is_greedy", not record["is_greedy"]),
    ):
        file = planted(path, tmp_path / f"{name} {value}.h5", same, 2, **{name: value})
        done = recompute(file, tiny_llama, 99)
        assert [each.number for each in done.different] == [2]
        assert f"DIFFERENT at {name}: " in str(done.different[0])


@pytest.mark.parametrize("kind", ["one prompt", "benchmark"])
def test_greedy_answers_are_the_likeliest(kind: str, demo: LoadedModel, tmp_path: Path) -> None:
    path = generated(demo, tmp_path / "one.h5") if kind == "one prompt" else evaluated(demo, tmp_path, "resid_post")
    run = open_run(path)
    which = next(number for number, each in enumerate(run.records()) if each.get("logprob") is None)
    data = run[which]
    other = [*data["generated_ids"].tolist()[:-1], 77]  # the last one is never fed
    record = {**run.records()[which], "token_logprobs": None}  # they would tell that the last token is another one
    sample = sample_of(data, record, data["activations"], other)
    folder = tmp_path / "x"
    folder.mkdir()
    write_shard(folder / "shard-00000.h5", [sample], run.model, run.settings)
    if kind == "benchmark":
        (told,) = path.rglob("results_*.json")
        (folder / told.name).write_text(told.read_text())
    (found,) = recompute(folder, demo).samples
    assert f"DIFFERENT at token {len(other) - 1} of the response: greedy decoding takes another than 77" in str(found)
    if kind == "benchmark":  # how it was generated is not known any more
        (folder / told.name).unlink()
        assert not recompute(folder, demo).different


@pytest.mark.parametrize("how", [{"temperature": 1.5, "seed": 3}, {"temperature": 0.0, "processor": True}])
def test_answers_that_are_not_greedy_are_no_faults(
    how: dict[str, Any], demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = dict(how)
    if how.pop("processor", False):
        monkeypatch.setattr(demo.model.generation_config, "repetition_penalty", 5.0)
    path = generated(demo, tmp_path / "one.h5", **how)
    plain = plain_forward(demo, open_run(path)[0]["token_ids"].tolist(), [], [], 12)
    assert plain.logits.argmax(-1).tolist() != open_run(path)[0]["generated_ids"].tolist()
    assert_honest(path, demo)


def test_a_mixture_of_experts_in_half_precision_is_said(tmp_path: Path, tokenizer: Any) -> None:
    """Of two experts that are nearly tied either may be taken, which no tolerance explains."""
    for family, dtype in (("mixtral", torch.bfloat16), ("mixtral", torch.float32), ("llama", torch.bfloat16)):
        loaded = LoadedModel(build(FAMILIES[family](), dtype), tokenizer, family)
        done = assert_honest(extracted(loaded, tmp_path / f"{family} {dtype}", "resid_post"), loaded)
        is_said = "in bfloat16 near ties fall either way" in str(done)
        assert is_said == ((family, dtype) == ("mixtral", torch.bfloat16))


# Near and far


def nearness(stored: Tensor, right: Tensor, limits: Any, **others: Tensor) -> Judged:
    return judged(
        [
            measured(stored[at], right[at], others={k: v[at] for k, v in others.items()})
            for at in (slice(0, 9), slice(9, None))
        ],
        limits,
    )


def test_a_few_huge_numbers_hide_nothing() -> None:
    right = torch.randn(20, 512, generator=torch.Generator().manual_seed(0))
    right[:, 7] = 3000
    wrong = torch.randn(20, 512, generator=torch.Generator().manual_seed(1))
    wrong[:, 7] = 3000
    limits = LIMITS[torch.bfloat16]
    assert float((right - wrong).abs().max()) < limits.largest * 3000 / 50
    assert nearness(wrong, right, limits).wrong.all()
    assert not nearness(right * (1 + 2**-9), right, limits).wrong.any()


def test_rows_that_hardly_differ_are_told_apart() -> None:
    """Every number near 100: a neighbour's row is within any tolerance of a bfloat16 model, and still not this one."""
    right = 100 + torch.randn(20, 64, generator=torch.Generator().manual_seed(0)) / 10
    after = torch.cat([right[1:], right[-1:]])
    limits = LIMITS[torch.bfloat16]
    assert not nearness(after, right, limits).wrong.any()
    found = nearness(after, right, limits, after=after)
    assert found.wrong[:-1].all()
    assert found.measured.nearer["after"][:-1].all()
    assert not nearness(right + 0.03, right, limits, after=after).wrong.any()


def test_not_a_number_is_only_equal_to_itself() -> None:
    right = torch.tensor([[1.0, float("nan"), float("inf")], [1.0, 2.0, 3.0]])
    assert nearness(right, right, LIMITS[torch.float32]).measured.is_equal
    assert not nearness(right, right, LIMITS[torch.float32]).wrong.any()
    for value in (float("nan"), float("inf"), -float("inf")):
        stored = right.clone()
        stored[1, 1] = value
        assert nearness(stored, right, LIMITS[torch.float32]).wrong.tolist() == [False, True]
    for place in (1, 2):
        stored = right.clone()
        stored[0, place] = 1.0
        assert nearness(stored, right, LIMITS[torch.float32]).wrong.tolist() == [True, False]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_head_norms_are_those_of_the_weights(family: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third way: z_h W_O^h by slices of the weights; in pieces of any size."""
    loaded = LoadedModel(build(FAMILIES[family]()), tokenizer, family)
    ids = list(range(3, 20))
    found = plain_forward(loaded, ids, ["layer_1.z", "layer_1.head_result_norm"], range(17)).rows
    tap = loaded.layout.pick([Site("z", 1)])["layer_1.z"]
    weight = loaded.model.get_submodule(tap.module).weight
    by_input = (weight if family == "gpt2" else weight.T).detach().unflatten(0, (4, -1))
    expected = torch.einsum("phd,hdm->phm", found["layer_1.z"].unflatten(1, (4, -1)), by_input).norm(dim=-1)
    torch.testing.assert_close(found["layer_1.head_result_norm"], expected)
    monkeypatch.setattr(plain_module, "MASKED_NUMBERS", 500)
    again = plain_forward(loaded, ids, ["layer_1.head_result_norm"], range(17)).rows
    torch.testing.assert_close(again["layer_1.head_result_norm"], expected)


# Refusals


def test_another_model_is_refused(tiny_llama: LoadedModel, tmp_path: Path, tokenizer: Any) -> None:
    path = extracted(tiny_llama, tmp_path / "run", "resid_post")
    torch.manual_seed(7)
    other = LoadedModel(build(FAMILIES["llama"]()), tokenizer, "other")
    with torch.no_grad():
        other.model.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(
        OtherSettings,
        match=r"made with another model than other: its model_hash is .* Give the model that made it \('llama'\)",
    ):
        recompute(path, other)
    file = generated(tiny_llama, tmp_path / "one.h5", "resid_post")  # holds no fingerprint: its numbers tell
    done = recompute(file, other)
    assert done.different
    assert "The run holds no fingerprint of its model" in str(done)
    with pytest.raises(OtherSettings, match="its shape is"):
        recompute(file, LoadedModel(build(FAMILIES["qwen3"]()), tokenizer, "qwen3"))


def test_edited_runs_are_refused(demo: LoadedModel, tmp_path: Path) -> None:
    with editing(demo, [Edit.scale("layer_1.z", 0.0, heads=[0])]):
        path = extracted(demo, tmp_path / "edited", "resid_post")
    with pytest.raises(OtherSettings, match=r"made while its model was edited \(.*layer_1\.z"):
        recompute(path, demo)
    path = extracted(demo, tmp_path / "plain", "resid_post")
    with (
        editing(demo, [Edit.scale("layer_1.z", 0.0, heads=[0])]),
        pytest.raises(OtherSettings, match="is being edited"),
    ):
        recompute(path, demo)


def test_what_cannot_be_recomputed_is_refused(tiny_llama: LoadedModel, tmp_path: Path, tokenizer: Any) -> None:
    path = extracted(tiny_llama, tmp_path / "run", "resid_post", store_dtype="int8")
    with pytest.raises(OtherSettings, match="converted from int8"):
        recompute(convert(path, tmp_path / "wide.h5", dtype="float32"), tiny_llama)
    with pytest.raises(SelectionError, match="recompute 1 at least"):
        recompute(path, tiny_llama, 0)
    phi = LoadedModel(build(FAMILIES["phi"]()), tokenizer, "phi")  # a parallel block has no resid_mid
    run = open_run(extracted(phi, tmp_path / "phi", "resid_post"))
    data = run[0]
    rows = {"layer_0.resid_mid": data["activations"]["layer_0"]}
    sample = sample_of(data, run.records()[0], rows)
    write_shard(tmp_path / "x.h5", [sample], run.model, run.settings)
    with pytest.raises(SiteUnavailable, match=r"no 'resid_mid' at layer_0\.resid_mid"):
        recompute(tmp_path / "x.h5", phi)


# The command line


def test_command_line(demo: LoadedModel, tmp_path: Path) -> None:
    path = extracted(demo, tmp_path / "run", "resid_post")
    done = within("verify", str(path), "--recompute", "3", "--model", "demo", "--seed", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "all checksums are right" in done.stdout
    assert len(re.findall(r"^sample \d+ \(texts document \d+\): (equal|within rounding)", done.stdout, re.M)) == 3
    assert "3 of 6 samples recomputed (seed 5)" in done.stdout
    again = within("verify", str(path), "--recompute", "3", "--seed", "5", cwd=tmp_path)
    assert again.stdout == done.stdout
    drawn = within("verify", str(path), "--recompute", "3", cwd=tmp_path)
    assert re.search(r"3 of 6 samples recomputed \(seed \d+\)", drawn.stdout)
    bad = planted(path, tmp_path / "x.h5", shifted, 3)
    found = within("verify", str(bad), "--recompute", "6", cwd=tmp_path)
    assert found.returncode == 1
    assert "sample 3 (texts document 3): DIFFERENT at layer_1, position" in found.stdout
    assert "1 DIFFERENT" in found.stdout


@pytest.mark.parametrize("options", [["--model", "demo"], ["--dtype", "float32"], ["--load_in_8bit"], ["--seed", "3"]])
def test_options_that_would_be_ignored(options: list[str], tmp_path: Path) -> None:
    done = within("verify", str(tmp_path), *options, cwd=tmp_path)
    assert done.returncode == 2
    assert "nothing is recomputed; add --recompute N" in done.stderr


def test_damage_is_told_before_anything_is_recomputed(demo: LoadedModel, tmp_path: Path) -> None:
    path = extracted(demo, tmp_path / "run", "resid_post")
    shard = path / "shard-00000.h5"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = within("verify", str(path), "--recompute", "3", cwd=tmp_path)
    assert done.returncode == 1
    assert "DamagedFile" in done.stderr
    assert "recomputed" not in done.stdout
