"""Texts without generation: each row against a raw forward of the text alone, whatever it shared a forward with."""

from __future__ import annotations

import copy
import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import FAMILIES, SIZES, build
from helpers.places import REAL, STORIES, needs_real
from helpers.raw_hooks import n_hooks
from helpers.runs import SOME_KINDS as KINDS
from helpers.runs import TEXTS
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Gemma2Config, MistralConfig

from AutomaticEval import ExtractSingleSample, FromHuggingFace, open_run
from AutomaticEval.capture.texts import extraction
from AutomaticEval.capture.texts import forward as text_forward
from AutomaticEval.capture.texts import piece_forwards as corpus
from AutomaticEval.capture.texts.batching import Piece, batches_of
from AutomaticEval.capture.texts.extraction import Extracted, Writing
from AutomaticEval.capture.texts.feeding import Feeding
from AutomaticEval.capture.texts.text_set import TextSet
from AutomaticEval.errors import (
    EmptyPrompt,
    OtherSettings,
    PromptError,
    PromptTooLong,
    SelectionError,
    StoreError,
    TreeUnsuitable,
)
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.loading import load_model
from AutomaticEval.selection import Selection
from AutomaticEval.store.upkeep.verify import verify

FEEDINGS = {
    "plain": Feeding(),
    "cut": Feeding(seq_length=9),
    "three at once": Feeding(batch_size=3),
    "one by one": Feeding(batch_size=1),
    "packed": Feeding(seq_length=24, packing=True),
}


@pytest.fixture(params=list(FAMILIES))
def loaded(request: pytest.FixtureRequest, tokenizer: Any) -> LoadedModel:
    return LoadedModel(build(FAMILIES[request.param]()), tokenizer, request.param)


def selection(loaded: LoadedModel, kinds: str = KINDS, layers: Any = None, **how: Any) -> Selection:
    chosen = [kind for kind in kinds.split(",") if not loaded.layout.lacking(kind)]
    return Selection.parse(chosen, layers, **how)


def extract(
    loaded: LoadedModel,
    texts: Any,
    selection: Selection,
    folder: Path,
    feeding: Feeding = Feeding(),
    about: dict[str, Any] | None = None,
    **writing: Any,
) -> Extracted:
    """Of texts without a name of their own."""
    named = TextSet("texts", texts, about or {})
    return extraction.extract(loaded, named, selection, folder, feeding, Writing(**writing))


def raw(loaded: LoadedModel, keys: list[str], ids: list[int]) -> dict[str, Tensor]:
    """Key -> [pos, width], by hooks of the test's own in one whole forward over one unpadded row."""
    layout, found, handles = loaded.layout, {}, []
    from AutomaticEval.sites import site_of

    for key in keys:
        tap = layout.taps[site_of(key)]

        def before(module: Any, args: Any, kwargs: Any, key: str = key, tap: Any = tap) -> None:
            found[key] = tap.take(args[0] if args else kwargs["hidden_states"]).reshape(len(ids), -1).clone()

        def after(module: Any, args: Any, out: Any, key: str = key, tap: Any = tap) -> None:
            found[key] = tap.take(out[0] if isinstance(out, tuple) else out).reshape(len(ids), -1).clone()

        module = loaded.model.get_submodule(tap.module)
        on_input = tap.end == "input"
        handles.append(
            module.register_forward_pre_hook(before, with_kwargs=True)
            if on_input
            else module.register_forward_hook(after)
        )
    with torch.no_grad():
        loaded.model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("feeding", FEEDINGS.values(), ids=list(FEEDINGS))
def test_rows_are_those_of_each_text_alone(feeding: Feeding, loaded: LoadedModel, tmp_path: Path) -> None:
    done = extract(loaded, TEXTS, selection(loaded), tmp_path / "run", feeding=feeding)
    run = open_run(tmp_path / "run")
    assert not n_hooks(loaded.model)
    assert run.finished
    whole = [loaded.tokenizer(text)["input_ids"] for text in TEXTS]
    assert (done.n_texts, done.n_samples, done.lengths) == (6, len(run), [len(ids) for ids in whole])
    fed: list[list[int]] = [[] for _ in TEXTS]
    for number, sample in enumerate(run):
        ids = sample["input_ids"][0].tolist()
        assert sample["token_ids"].tolist() == ids  # the last one is fed, too
        assert sample["tokens"] == loaded.tokenizer.convert_ids_to_tokens(ids)
        assert sample["positions"].tolist() == list(range(len(ids)))
        expected = raw(loaded, run.keys, ids)
        for key, rows in sample["activations"].items():
            torch.testing.assert_close(rows, expected[key], atol=1e-5, rtol=1e-5)
            assert torch.equal(run.read(number, key), rows)
        fed[sample["doc_id"]] += ids
    longest = feeding.seq_length or 10**6
    assert fed == (whole if feeding.packing else [ids[:longest] for ids in whole])
    n_cut = sum(len(ids) > longest for ids in whole)
    if not feeding.packing:
        assert (done.n_truncated, sum(count > 0 for count in run.column("n_truncated"))) == (n_cut, n_cut)
        twice = [index for index, doc in enumerate(run.column("doc_id")) if doc in (0, 4)]
        assert all(torch.equal(run.read(twice[0], key), run.read(twice[1], key)) for key in run.keys)
    assert not verify(tmp_path / "run")


def test_nothing_above_the_deepest_site_is_computed(loaded: LoadedModel, tmp_path: Path) -> None:
    layout, ran = loaded.layout, []
    blocks = [loaded.model.get_submodule(tap.module) for site, tap in layout.taps.items() if site.kind == "resid_pre"]
    above = [*blocks[1:], loaded.model.get_output_embeddings()]
    handles = [module.register_forward_hook(lambda module, *_: ran.append(module)) for module in above]
    down = loaded.model.get_submodule(layout.taps[next(s for s in layout.taps if s.kind == "z")].module)
    handles.append(down.register_forward_hook(lambda module, *_: ran.append(module)))
    for kinds, is_stopped_at_z in (("resid_post", False), ("z", True)):
        extract(loaded, TEXTS, selection(loaded, kinds, 0), tmp_path / kinds)
        assert ran == ([] if is_stopped_at_z else [down] * len(ran))
        ran.clear()
    for handle in handles:
        handle.remove()


def test_no_text_sees_another(loaded: LoadedModel, tmp_path: Path) -> None:
    """What shares a row with a text changes nothing of it, bit for bit."""
    others = ["What is 8 + 9?", *TEXTS[1:]]  # as long, so that the rows are shared alike
    feeding = Feeding(seq_length=40, packing=True)
    for name, texts in (("one", TEXTS), ("other", others)):
        extract(loaded, texts, selection(loaded), tmp_path / name, feeding=feeding)
    one, other = open_run(tmp_path / "one"), open_run(tmp_path / "other")
    changed = [doc == 0 for doc in one.column("doc_id")]
    assert any(changed)
    for number, is_changed in enumerate(changed):
        if one.column("doc_id")[number] == 4:
            continue  # equal to text 0 before, fed once with it
        same = all(torch.equal(one.read(number, key), other.read(number, key)) for key in one.keys)
        assert same != is_changed


def test_packed_rows_have_a_width_of_their_own(tiny_llama: LoadedModel) -> None:
    """However long the context is: the mask of a row is as wide as it is high."""
    pieces = [Piece(number, 0, [number] * 100, "", 0) for number in range(1, 300)]
    batch = next(batches_of(pieces, Feeding(packing=True), 131072, 10**9))
    assert max(place.column for place in batch) < 2048
    (long,) = batches_of([Piece(0, 0, [1] * 5000, "", 0)], Feeding(packing=True), 131072, 2048)
    assert len(long) == 1  # one that is longer has a row to itself


def test_packed_rows_wider_than_a_local_window(tokenizer: Any, tmp_path: Path) -> None:
    """GPT-Neo's window goes by columns, which within a piece are positions."""
    config = FAMILIES["gpt_neo"]()
    config.window_size = 6
    loaded = LoadedModel(build(config), tokenizer, "local")
    feeding = Feeding(seq_length=24, packing=True)
    extract(loaded, TEXTS, selection(loaded, "resid_post"), tmp_path / "run", feeding=feeding)
    run = open_run(tmp_path / "run")
    keys = [f"layer_{layer}" for layer in range(4)]
    for number in range(len(run)):
        alone = raw(loaded, keys, run[number]["input_ids"][0].tolist())
        for key in keys:
            torch.testing.assert_close(run[number]["activations"][key], alone[key], atol=1e-5, rtol=1e-5)
    assert max(run.column("n_prompt_tokens")) == 24


def test_patterns_do_not_depend_on_what_is_not_kept(tokenizer: Any, tmp_path: Path) -> None:
    model = build(FAMILIES["llama"]())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e9)  # a stream that float16 cannot hold
    chosen = Selection.parse("z", 0, store_dtype="float16")
    extract(
        LoadedModel(model, tokenizer, "x"),
        TEXTS,
        chosen,
        tmp_path / "run",
        feeding=Feeding(seq_length=24, patterns=True),
    )
    run = open_run(tmp_path / "run")
    assert run.keys == ["layer_0.z", "layer_0.pattern"]
    assert run.pattern(0, 0).dtype == torch.float16


def test_a_model_that_lets_texts_see_one_another_is_refused(
    tiny_llama: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_forward, "as_mask", lambda model, attended: torch.ones_like(attended).tril())
    with pytest.raises(TreeUnsuitable, match="lets texts see one another"):
        extract(
            tiny_llama, TEXTS, selection(tiny_llama), tmp_path / "run", feeding=Feeding(seq_length=40, packing=True)
        )
    assert not list(tmp_path.rglob("*.h5"))


@pytest.mark.parametrize("packing", [False, True])
def test_patterns(packing: bool, tiny_llama: LoadedModel, tmp_path: Path) -> None:
    """Against transformers' own; the forward still stops, and the model attends as before."""
    ran: list[Any] = []
    handle = tiny_llama.model.model.layers[2].register_forward_hook(lambda *_: ran.append(1))
    feeding = Feeding(seq_length=24, packing=packing, patterns=True)
    extract(tiny_llama, TEXTS, selection(tiny_llama, "mlp_out", "0-1"), tmp_path / "run", feeding=feeding)
    handle.remove()
    assert not ran
    run = open_run(tmp_path / "run")
    assert run.keys == ["layer_0.mlp_out", "layer_0.pattern", "layer_1.mlp_out", "layer_1.pattern"]
    assert tiny_llama.model.config._attn_implementation == "sdpa"
    eager = copy.deepcopy(tiny_llama.model)  # transformers leaves hooks where it was asked for attentions
    eager.set_attn_implementation("eager")
    for number in range(len(run)):
        with torch.no_grad():
            patterns = eager(run[number]["input_ids"], output_attentions=True).attentions
        for layer in (0, 1):
            torch.testing.assert_close(run.pattern(number, layer), patterns[layer][0], atol=1e-6, rtol=1e-5)
    assert not verify(tmp_path / "run")


@pytest.mark.parametrize("config", [MistralConfig, Gemma2Config])
def test_patterns_of_a_window_shorter_than_the_padding(config: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Padding whose whole window is padding attends to anything."""
    sizes = {**SIZES, "sliding_window": 6, **({"head_dim": 16} if config is Gemma2Config else {})}
    loaded = LoadedModel(build(config(**sizes)), tokenizer, "windowed")
    feeding = Feeding(seq_length=24, patterns=True, batch_size=4)
    extract(loaded, TEXTS, selection(loaded, "resid_post", "0-1"), tmp_path / "run", feeding=feeding)
    run = open_run(tmp_path / "run")
    eager = copy.deepcopy(loaded.model)
    eager.set_attn_implementation("eager")
    for number in range(len(run)):
        with torch.no_grad():
            patterns = eager(run[number]["input_ids"], output_attentions=True).attentions
        for layer in (0, -1):
            torch.testing.assert_close(run.pattern(number, layer), patterns[layer][0], atol=1e-6, rtol=1e-5)
    assert max(run.column("n_prompt_tokens")) > 6 + min(run.column("n_prompt_tokens"))


def test_layers_of_samples(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    extract(tiny_llama, TEXTS, selection(tiny_llama, "embed,resid_post,mlp_out"), tmp_path / "run")
    run = open_run(tmp_path / "run")
    for kind, ending in (("resid_post", ""), ("mlp_out", ".mlp_out")):
        layers = run.layers(kind)
        assert list(layers) == [0, 1, 2]
        assert [len(each) for each in layers.values()] == [6, 6, 6]
        assert torch.equal(layers[2][3], run[3]["activations"][f"layer_2{ending}"])
        assert [len(rows) for rows in layers[0][1:3]] == [len(run[1]["tokens"]), len(run[2]["tokens"])]
    with pytest.raises(StoreError, match="holds no 'z'"):
        run.layers("z")


def test_positions_and_narrow_numbers(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    chosen = selection(tiny_llama, "resid_post", positions="last", store_dtype="bfloat16")
    extract(tiny_llama, TEXTS, chosen, tmp_path / "run", compression="gzip")
    run = open_run(tmp_path / "run")
    for sample in run:
        ids = sample["input_ids"][0].tolist()
        assert sample["positions"].tolist() == [len(ids) - 1]
        expected = raw(tiny_llama, ["layer_1"], ids)["layer_1"][-1:]
        torch.testing.assert_close(sample["activations"]["layer_1"], expected.bfloat16(), atol=1e-2, rtol=1e-2)
    with pytest.raises(SelectionError, match="texts have no response"):
        extract(tiny_llama, TEXTS, selection(tiny_llama, positions="scored"), tmp_path / "no")


def test_batches_too_large_for_memory_are_halved(
    tiny_llama: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, shapes = corpus.recorded, []

    def limited(model: Any, layout: Any, taps: Any, batch: Any, *rest: Any) -> Any:
        shapes.append(len(batch.ids))
        if len(batch.ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, layout, taps, batch, *rest)

    monkeypatch.setattr(corpus, "recorded", limited)
    extract(tiny_llama, TEXTS, selection(tiny_llama, "resid_post"), tmp_path / "run")
    assert shapes == [5, 2, 3, 1, 2]  # halves of what did not fit
    run = open_run(tmp_path / "run")
    for sample in run:
        expected = raw(tiny_llama, ["layer_2"], sample["input_ids"][0].tolist())["layer_2"]
        torch.testing.assert_close(sample["activations"]["layer_2"], expected, atol=1e-5, rtol=1e-5)


def test_batches() -> None:
    """Short rows first, each batch within the budget, equal texts once, and every piece in one place."""
    draw = random.Random(0)
    pieces = [Piece(n, 0, [draw.randrange(3) for _ in range(draw.randrange(1, 30))], "", 0) for n in range(200)]
    for feeding in (Feeding(), Feeding(batch_size=7), Feeding(packing=True)):
        batches = list(batches_of(pieces, feeding, 32, 128))
        seen = [piece.key for batch in batches for place in batch for piece in place.pieces]
        assert sorted(seen) == [(n, 0) for n in range(200)]
        for batch in batches:
            taken: dict[int, set[int]] = {}
            for place in batch:
                own = range(place.column, place.column + len(place.pieces[0].ids))
                assert not taken.setdefault(place.row, set()) & set(own)
                taken[place.row] |= set(own)
                assert all(piece.ids == place.pieces[0].ids for piece in place.pieces)
            width = max(max(columns) + 1 for columns in taken.values())
            assert width <= 32
            assert len(taken) <= 7 if feeding.batch_size else (len(taken) * width <= 128 or len(taken) == 1)
    rows = sum(len({place.row for place in batch}) for batch in batches)
    n_tokens = sum(len(ids) for ids in {tuple(piece.ids) for piece in pieces})
    assert rows <= 1.1 * n_tokens / 32 + 1  # packed rows are nearly full


def test_an_extraction_goes_on(
    tiny_llama: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_hooks_after: Any
) -> None:
    """What is on the disk is not computed again; other texts or settings are refused."""
    same_hooks_after(tiny_llama.model)
    chosen, about = selection(tiny_llama, "resid_post"), {"texts": "these"}
    real, n_calls = corpus.recorded, [0]

    def breaks(*given: Any) -> Any:
        n_calls[0] += 1
        if n_calls[0] == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(corpus, "recorded", breaks)
    feeding = Feeding(batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        extract(tiny_llama, TEXTS, chosen, tmp_path / "run", feeding=feeding, about=about)
    left = open_run(tmp_path / "run")
    assert (len(left), left.finished) == (4 + 1, False)  # two batches of two, in which one text is there twice
    with pytest.raises(OtherSettings, match=r"text 0 \('What is 9"):
        extract(
            tiny_llama, ["What is 9?", *TEXTS[1:]], chosen, tmp_path / "run", feeding=feeding, about=about, resume=True
        )
    for wrong in ({"about": {"texts": "others"}}, {"feeding": Feeding(batch_size=2, seq_length=5)}):
        with pytest.raises(OtherSettings):
            extract(
                tiny_llama,
                TEXTS,
                chosen,
                tmp_path / "run",
                **{"feeding": feeding, "about": about, **wrong},
                resume=True,
            )
    n_calls[0] = 10
    done = extract(tiny_llama, TEXTS, chosen, tmp_path / "run", feeding=feeding, about=about, resume=True)
    assert n_calls[0] == 11
    run = open_run(tmp_path / "run")
    assert (done.n_samples, run.column("doc_id"), run.finished) == (6, [0, 1, 2, 3, 4, 5], True)
    for sample in run:
        expected = raw(tiny_llama, ["layer_0"], sample["input_ids"][0].tolist())["layer_0"]
        torch.testing.assert_close(sample["activations"]["layer_0"], expected, atol=1e-5, rtol=1e-5)


def test_texts_that_cannot_be_fed(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    def run(texts: list[Any], **feeding: Any) -> Extracted:
        return extract(tiny_llama, texts, selection(tiny_llama), tmp_path / "run", feeding=Feeding(**feeding))

    with pytest.raises(PromptError, match="an empty text among the texts"):
        run(["a", " "])
    with pytest.raises(PromptError, match="int among the texts"):
        run([3])
    (tmp_path / "run" / ".lock").unlink(missing_ok=True)
    with pytest.raises(PromptError, match="there were no texts"):
        run([])
    with pytest.raises(PromptTooLong, match=r"\d+ tokens, and 4 can be fed"):
        run(TEXTS, seq_length=4, strict=True)
    with pytest.raises(PromptError, match="seq_length is 4000; llama can be fed 128"):
        run(TEXTS, seq_length=4000)
    with pytest.raises(PromptError, match="batch_size is 0"):
        run(TEXTS, batch_size=0)
    assert not list(tmp_path.rglob("shard*"))

    class Nothing:
        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": [[] for _ in texts]}

    with pytest.raises(EmptyPrompt, match="no token for 'a'"):
        extract(LoadedModel(tiny_llama.model, Nothing(), "x"), ["a"], selection(tiny_llama), tmp_path / "other")


def test_features(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    """In memory and on the disk: text after text, the input of the down projection, no padding."""
    how: dict[str, Any] = {"layer": 1, "dataset_name": TEXTS, "num_samples": 5, "seq_length": 20, "device": "cpu"}
    found = FromHuggingFace(tiny_llama, inference_batch_size=2, save_features=False, **how).extract_features()
    whole = [tiny_llama.tokenizer(text)["input_ids"][:20] for text in TEXTS[:5]]
    expected = torch.cat([raw(tiny_llama, ["layer_1.mlp_post"], ids)["layer_1.mlp_post"] for ids in whole])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    kept = FromHuggingFace(tiny_llama, save_features=tmp_path / "kept", **how).extract_features()
    assert kept.shape == (len(expected), 64)
    torch.testing.assert_close(kept[:], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kept[7:9], expected[7:9], atol=1e-5, rtol=1e-5)
    alone = ExtractSingleSample(tiny_llama, 1, 20, "cpu")
    torch.testing.assert_close(alone.get_mlp_acts(TEXTS[1]), expected[len(whole[0]) :][:20], atol=1e-5, rtol=1e-5)
    gate = tiny_llama.model.model.layers[1].mlp
    assert not torch.allclose(expected, gate.act_fn(expected))
    with pytest.raises(PromptError, match="an empty text"):
        alone.get_mlp_acts(" ")
    with pytest.raises(StoreError, match="holds a run, which open_run reads"):
        FromHuggingFace(tiny_llama, save_features=tmp_path / "kept", **how).extract_features()
    with pytest.raises(SelectionError, match="layer is '0,1'; name one"):
        FromHuggingFace(tiny_llama, **{**how, "layer": "0,1"})
    once = FromHuggingFace(tiny_llama, **{**how, "dataset_name": iter(TEXTS)})
    torch.testing.assert_close(once.extract_features(), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(PromptError, match="an iterator, which can be gone through once"):
        once.extract_features()
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    of_file = FromHuggingFace(tiny_llama, **{**how, "dataset_name": tmp_path / "texts.jsonl"})
    for _ in range(2):
        torch.testing.assert_close(of_file.extract_features(), expected, atol=1e-5, rtol=1e-5)


def test_rows_in_random_order(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    """Every row once a pass, mixed from all over the corpus; other passes have other orders; the same seed, the same one."""
    texts = [f"What is {number} + {number + 1}?" for number in range(60)]
    extract(tiny_llama, texts, selection(tiny_llama, "embed"), tmp_path / "run")
    run = open_run(tmp_path / "run")
    rows = run.rows("embeddings")[:]
    n = len(rows)

    def order(found: list[Tensor] | Tensor) -> list[list[float]]:
        return [row.tolist() for row in found]

    every = sorted(order(rows))
    stream = run.dataset("embeddings", shuffle=True, seed=3, buffer_rows=200)
    first, second = order(list(stream)), order(list(stream))
    assert sorted(first) == sorted(second) == every
    assert first != second
    assert order(list(run.dataset("embeddings", shuffle=True, seed=3, buffer_rows=200))) == first
    from_workers = [row for batch in DataLoader(stream, batch_size=16, num_workers=2) for row in batch]
    assert sorted(order(from_workers)) == every
    lasting = DataLoader(stream, batch_size=16, num_workers=2, persistent_workers=True)
    one, other = ([row for batch in lasting for row in order(batch)] for _ in range(2))
    assert sorted(one) == sorted(other) == every
    assert one != other
    tags = torch.arange(n)  # how far rows come from in the first batch

    class Tagged:
        def __getitem__(self, at: slice) -> Tensor:
            return tags[at]

        def __len__(self) -> int:
            return n

    stream.rows = Tagged()  # type: ignore[assignment]
    batch = torch.stack(list(islice(stream, 64))).double()
    assert batch.std() > 0.2 * n
    assert len(batch.unique()) == 64
    for wrong in ({"position": "last"}, {"label": "doc_id"}):
        with pytest.raises(StoreError, match="shuffle streams all rows"):
            run.dataset("embeddings", shuffle=True, **wrong)
    with pytest.raises(StoreError, match="buffer_rows is 0"):
        run.dataset("embeddings", shuffle=True, buffer_rows=0)


@needs_real
def test_real_texts_through_a_trained_model(tmp_path: Path) -> None:
    loaded = load_model(STORIES)
    lines = (REAL / "data" / "goemotions" / "dev.tsv").read_text("utf-8").splitlines()
    texts = [line.split("\t")[0] for line in lines[:300]]
    extract(loaded, texts, Selection.parse("resid_post,mlp_post", "2"), tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.column("prompt") == texts
    for number in random.Random(0).sample(range(300), 20):
        sample = run[number]
        ids = loaded.tokenizer(texts[number])["input_ids"]
        assert sample["token_ids"].tolist() == ids
        expected = raw(loaded, run.keys, ids)
        for key, rows in sample["activations"].items():
            torch.testing.assert_close(rows, expected[key], atol=1e-5, rtol=1e-5)


@needs_real
def test_real_paragraphs_packed_through_a_trained_model(tmp_path: Path) -> None:
    """Long ones go on in the next piece; nothing is lost, and each piece's rows are those of the piece alone."""
    loaded = load_model(STORIES)
    lines = (REAL / "data" / "wikitext2" / "valid.txt").read_text("utf-8").splitlines()
    texts = [line for line in lines if line.strip()][:80]
    feeding = Feeding(seq_length=128, packing=True)
    extract(loaded, texts, Selection.parse("resid_post,mlp_post", "2"), tmp_path / "run", feeding=feeding)
    run = open_run(tmp_path / "run")
    whole = [loaded.tokenizer(text)["input_ids"] for text in texts]
    pieces = [ids[start : start + 128] for ids in whole for start in range(0, len(ids), 128)]
    assert len(pieces) > len(texts)
    assert [sample["token_ids"].tolist() for sample in run] == pieces
    for number in random.Random(0).sample(range(len(pieces)), 20):
        expected = raw(loaded, run.keys, pieces[number])
        for key, rows in run[number]["activations"].items():
            torch.testing.assert_close(rows, expected[key], atol=1e-5, rtol=1e-5)


def test_layouts_are_found_before_anything_is_written(tokenizer: Any, tmp_path: Path) -> None:
    model = build(FAMILIES["llama"]()).train()
    with pytest.raises(Exception, match="training mode"):
        extract(LoadedModel(model, tokenizer, "t"), TEXTS, Selection.parse("resid_post"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    model.eval()
    assert find_layout(model)
