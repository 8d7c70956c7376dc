"""The table of kinds is the only place that knows them; one function reads all spellings of a site."""

from __future__ import annotations

import random
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import CONFIGS, build
from helpers.places import ROOT

from AutomaticEval.errors import EditError, SelectionError, StoreError, UnknownLayer, UnknownSite
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.edit import Edit
from AutomaticEval.models.editing import editing
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.selection import Selection
from AutomaticEval.sites import (
    KINDS,
    ONCE,
    PER_LAYER,
    TABLE,
    Kind,
    Site,
    docs_table,
    expand,
    key_among,
    key_order,
    keys_text,
    parse_site,
    parse_sites,
    site_of,
)
from AutomaticEval.store.export.transformer_lens import transformer_lens_name
from AutomaticEval.store.reader import open_run
from AutomaticEval.store.upkeep.prune import kept_keys

SPELLINGS = {
    "embeddings": ["embed", "embeddings", " embed "],
    "layer_3": ["layer_3", "layer_3.resid_post", "resid_post.3"],
    "layer_3.mlp_out": ["layer_3.mlp_out", "mlp_out.3", "layer_03.mlp_out"],
    "layer_3.pattern": ["layer_3.pattern", "pattern.3"],
    "final_norm": ["final_norm"],
    "logits": ["logits"],
}
"""Key -> what people may write for it."""


@pytest.mark.parametrize("is_per_layer", [False, True], ids=["once", "per layer"])
def test_a_kind_that_is_added_is_a_kind_everywhere(is_per_layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownSite):
        parse_sites("embed,new_kind")
    row = Kind("new_kind", "as a newcomer adds it", ("n_kv_heads", "d_head"), "new.{layer}", is_per_layer=is_per_layer)
    for table in (TABLE, KINDS, PER_LAYER if is_per_layer else ONCE):
        monkeypatch.setitem(table, "new_kind", row)
    assert parse_sites("embed,new_kind") == (Site("embed"), Site("new_kind"))
    sites = Selection.parse("new_kind,logits,embed,resid_post", "1-2").sites(4)
    if not is_per_layer:
        own = [Site("new_kind")]
        assert sites == (Site("embed"), Site("resid_post", 1), Site("resid_post", 2), Site("logits"), *own)
    else:
        own = [Site("new_kind", 1), Site("new_kind", 2)]
        assert sites == (Site("embed"), Site("resid_post", 1), own[0], Site("resid_post", 2), own[1], Site("logits"))
    for site in own:
        assert site_of(site.key) == site
        assert transformer_lens_name(site.key) == f"new.{site.layer}"
    assert [site for site in sites if site.kind == "new_kind"] == own
    assert "| `new_kind` |" in docs_table()


def test_every_kind_is_expanded_keyed_and_ordered() -> None:
    """Keys in any order are sorted as they are expanded, those that nobody knows last."""
    sites = expand(KINDS, None, 12)
    assert len(sites) == len(ONCE) + 12 * len(PER_LAYER)
    assert [site_of(site.key) for site in sites] == list(sites)
    keys = [*(site.key for site in sites), "zebra"]
    shuffled = random.Random(0).sample(keys, len(keys))
    assert sorted(shuffled, key=key_order) == keys
    assert sorted(["layer_0.zebra", "layer_1", "layer_0.pattern", "layer_0.mlp_post"], key=key_order) == [
        "layer_0.mlp_post",
        "layer_0.pattern",
        "layer_0.zebra",
        "layer_1",
    ]


def test_the_table_in_the_docs_is_made_of_the_rows() -> None:
    """To write it anew: python -c "from AutomaticEval.sites import docs_table; print(docs_table())"."""
    text = (ROOT / "docs" / "sites.md").read_text(encoding="utf-8")
    assert f"\n\n{docs_table()}\n" in text


def test_rows_say_all_that_is_asked_of_a_kind() -> None:
    assert list(TABLE) == [row.name for row in TABLE.values()]
    assert "pattern" in TABLE
    for row in TABLE.values():
        assert row.width, row
        assert row.meaning.rstrip(".") == row.meaning != ""
        for reason in (row.not_stored, row.not_edited):
            assert reason is None or (reason and not reason.endswith(".")), row
        if row.transformer_lens is not None:
            assert ("{layer}" in row.transformer_lens) == row.is_per_layer
    names = [row.transformer_lens for row in TABLE.values() if row.transformer_lens is not None]
    assert len({name.format(layer=1) for name in names}) == len(names)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_widths_are_those_that_the_table_says(name: str) -> None:
    """The layout's widths come from a forward, the table's from the sizes in the config."""
    model = build(CONFIGS[name]())
    config = model.config
    layout = find_layout(model)
    d_mlp = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * layout.d_model
    sizes = {
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "d_head": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "d_mlp": d_mlp,
        "d_vocab": config.vocab_size,
    }
    assert len(layout.widths) > 3 * len(PER_LAYER) // 2
    for site, width in layout.widths.items():
        assert width == prod(sizes[size] for size in TABLE[site.kind].width), site
        assert layout.heads_at(site) in (0, sizes["n_heads"], sizes["n_kv_heads"])
    assert (layout.heads_at(Site("pattern", 0)), layout.heads_at(Site("k", 0))) == (
        sizes["n_heads"],
        sizes["n_kv_heads"],
    )
    assert layout.heads_at(Site("mlp_out", 0)) == 0


@pytest.mark.parametrize(("key", "given"), [(key, each) for key, texts in SPELLINGS.items() for each in texts])
def test_spellings_of_a_site_mean_the_same_everywhere(key: str, given: str) -> None:
    site = site_of(given)
    assert site.key == key
    assert site_of(site) == site
    assert key_among([key, "layer_0"], given) == key
    assert key_among(["layer_0"], given) is None
    if site.kind != "pattern":
        assert transformer_lens_name(given) == transformer_lens_name(key)
        assert Selection.parse(given).sites(5) == (site,)
        assert Selection.parse([given, site]).as_dict() == Selection.parse(key).as_dict()


def test_a_key_that_nobody_knows_is_found_by_its_own_text() -> None:
    assert key_among(["zebra", "resid_post"], "zebra") == "zebra"
    assert key_among(["zebra", "resid_post"], "resid_post") == "resid_post"
    assert key_among(["layer_3"], "resid_post") is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("resid_past", "no site 'resid_past'. Did you mean 'resid_post'"),
        ("layer_3.mpl_out", "no site 'layer_3.mpl_out'. Did you mean 'layer_3.mlp_out'"),
        ("mpl_out.3", "no site 'mpl_out.3'. Did you mean 'layer_3.mlp_out'"),
        ("embed.3", "a model has embed once, not in each layer; write embed"),
        ("layer_3.logits", "a model has logits once"),
        ("layer_-1", "One layer's site is written layer_3.mlp_out or mlp_out.3"),
        ("layer_" + "9" * 5000, "no site"),
        ("", "no site ''"),
        ("layer_3.", "no site"),
    ],
)
def test_what_is_no_site_is_refused_with_near_names(given: str, says: str) -> None:
    for reads in (parse_site, site_of, Selection.parse):
        with pytest.raises(UnknownSite) as refused:
            reads(given)
        assert says in str(refused.value)


def test_a_kind_of_each_layer_is_no_single_place() -> None:
    with pytest.raises(
        UnknownSite, match=r"mlp_out is in each layer; say in which one: layer_3\.mlp_out or mlp_out\.3"
    ):
        site_of("mlp_out")


@pytest.mark.parametrize("kind", [name for name, row in TABLE.items() if row.not_stored is not None])
def test_kinds_that_are_not_stored_are_refused_with_what_to_do(kind: str) -> None:
    for given in (kind, f"layer_1.{kind}"):
        with pytest.raises(UnknownSite, match=f"the site '{given}' is not captured: .*(capture|keep) '"):
            Selection.parse(given)


def test_single_sites_are_kept_exactly_and_beside_kinds() -> None:
    exactly = Selection.parse("layer_3.mlp_out,embed")
    assert exactly.sites(5) == (Site("embed"), Site("mlp_out", 3))
    assert exactly.as_dict() == {"sites": "embed,layer_3.mlp_out", "layers": "all", "positions": "all"}
    assert Selection.parse(exactly.as_dict()["sites"], exactly.as_dict()["layers"]) == exactly
    beside = Selection.parse("z.1,resid_post,layer_2")
    assert beside.sites(3) == (Site("resid_post", 0), Site("resid_post", 1), Site("z", 1), Site("resid_post", 2))
    with pytest.raises(UnknownLayer, match="no layer 5: the model has 5 layers"):
        Selection.parse("layer_5").sites(5)
    for layers in ("0-1", 3, [0]):
        with pytest.raises(
            SelectionError, match=r"layer_3\.mlp_out name their layers, and layers were given, too.*: mlp_out"
        ):
            Selection.parse("embed,mlp_out.3", layers)


def test_what_selections_of_before_write_into_files_is_as_it_was() -> None:
    assert Selection.parse().as_dict() == {"sites": "embed,resid_post", "layers": "all", "positions": "all"}
    chosen = Selection.parse("z, embed,z", [0, -1], "scored", "torch.float16")
    assert chosen.as_dict() == {"sites": "z,embed", "layers": "0,-1", "positions": "scored", "store_dtype": "float16"}


def test_a_run_is_read_and_pruned_in_any_spelling(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    from AutomaticEval import generate_inference_with_activations

    file = tmp_path / "one.h5"
    generate_inference_with_activations(
        "one two", tiny_llama, file, sites=["embed", "mlp_out.1", "layer_0", Site("z", 1)], max_new_tokens=3
    )
    run = open_run(file)
    assert run.keys == ["embeddings", "layer_0", "layer_1.mlp_out", "layer_1.z"]
    assert run.settings["sites"] == "embed,layer_1.mlp_out,layer_0,layer_1.z"
    for key, given in (("embeddings", "embed"), ("layer_0", "resid_post.0"), ("layer_1.mlp_out", "mlp_out.1")):
        expected = run[0]["activations"][key]
        assert torch.equal(run.read(0, given), expected)
        assert torch.equal(run.rows(given)[:], expected)
        assert torch.equal(run.activations(given)[0], expected[-1])
        assert torch.equal(run.dataset(given)[2], expected[2])
    with pytest.raises(StoreError, match=r"holds no 'mlp_out\.0'.*It has embeddings, layer_0, layer_1\.mlp_out"):
        run.read(0, "mlp_out.0")
    assert kept_keys(run, "mlp_out.1,embeddings", None) == ["embeddings", "layer_1.mlp_out"]
    assert kept_keys(run, "resid_post.0,z", None) == ["layer_0", "layer_1.z"]
    with pytest.raises(SelectionError, match=r"holds none of these: layer_0\.z"):
        kept_keys(run, "z.0", None)
    with pytest.raises(SelectionError, match="layers were given, too"):
        kept_keys(run, "z.1", "0")


@pytest.mark.parametrize("given", ["mlp_out.1", "layer_1.mlp_out", Site("mlp_out", 1)])
def test_edits_are_made_at_the_site_that_is_meant(given: Any, tiny_llama: LoadedModel) -> None:
    ids = torch.tensor([[5, 17, 99]])
    with torch.no_grad(), editing(tiny_llama.model, Edit.scale("layer_1.mlp_out", 0.0)):
        expected = tiny_llama.model(ids).logits
    with torch.no_grad(), editing(tiny_llama.model, Edit.scale(given, 0.0)):
        assert torch.equal(tiny_llama.model(ids).logits, expected)


@pytest.mark.parametrize("kind", [name for name, row in TABLE.items() if row.not_edited is not None])
def test_kinds_that_are_not_edited_are_refused_with_what_to_do(kind: str, tiny_llama: LoadedModel) -> None:
    edit = Edit.scale(f"layer_0.{kind}", 0.0)
    with pytest.raises(EditError, match=f"layer_0.{kind} cannot be edited: .*edit "), editing(tiny_llama.model, edit):
        pass


def test_many_keys_are_read_as_the_first_and_the_last() -> None:
    keys = [
        "embeddings",
        "layer_0",
        "layer_1",
        "layer_2",
        "layer_0.z",
        "layer_2.z",
        "layer_3.z",
        "layer_4.q",
        "layer_5.q",
    ]
    assert keys_text(keys) == "embeddings, layer_0 … layer_2, layer_0.z, layer_2.z, layer_3.z, layer_4.q, layer_5.q"
    assert keys_text([]) == ""
