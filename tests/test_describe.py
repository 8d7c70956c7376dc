"""A family that is not known: described by a person, checked by the identities, and seen without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import ALL, SIZES, build
from helpers.odd_decoder import PARTS, Plain, save_odd
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from typer.testing import CliRunner

from AutomaticEval import (
    Edit,
    FromHuggingFace,
    describe_model,
    editing,
    evaluate,
    evaluate_with_activations,
    generate_inference_with_activations,
    load_model,
    open_run,
    recompute,
)
from AutomaticEval.capture.texts.forward import padded, read
from AutomaticEval.cli.app import app
from AutomaticEval.errors import ModelError, SiteUnavailable, UnsupportedModel
from AutomaticEval.evaluation.asked import asked_for
from AutomaticEval.models.architecture.description import KEYS, Description
from AutomaticEval.models.attention import reading_patterns
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.unloaded_model import unloaded_layout, unloaded_model
from AutomaticEval.models.described.describe_model import DescriptionKeywords
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.loading import n_layers_of
from AutomaticEval.sites import Site, expand

IDS = [7, 3, 9, 250, 31, 3, 77]
STORED = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "mlp_post")
TEXTS = ["The capital of France is Paris.", "A cat.", "The river of the city is long, and it is cold."]


def plain(**sizes: int) -> Plain:
    torch.manual_seed(0)
    model = Plain(**sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def by_hand(model: Any, ids: list[int]) -> dict[str, Tensor]:
    """Key -> [pos, width], from hooks on modules that are named here."""
    seen: dict[str, Tensor] = {}

    def given(key: str) -> Any:
        return lambda module, args: seen.__setitem__(key, args[0][0].detach())

    def gave(key: str) -> Any:
        return lambda module, args, out: seen.__setitem__(key, out[0].detach())

    handles = [
        model.decoder.last.register_forward_hook(gave("final_norm")),
        model.unembed.register_forward_hook(gave("logits")),
        model.decoder.stack[0].register_forward_pre_hook(given("embeddings")),
    ]
    for layer, block in enumerate(model.decoder.stack):
        handles += [
            block.register_forward_pre_hook(given(f"layer_{layer}.resid_pre")),
            block.register_forward_hook(gave(f"layer_{layer}")),
            block.pre_b.register_forward_pre_hook(given(f"layer_{layer}.resid_mid")),
            block.mix.register_forward_hook(gave(f"layer_{layer}.attn_out")),
            block.ff.register_forward_hook(gave(f"layer_{layer}.mlp_out")),
            block.mix.ask.register_forward_hook(gave(f"layer_{layer}.q")),
            block.mix.label.register_forward_hook(gave(f"layer_{layer}.k")),
            block.mix.carry.register_forward_hook(gave(f"layer_{layer}.v")),
            block.mix.proj.register_forward_pre_hook(given(f"layer_{layer}.z")),
            block.ff.w_b.register_forward_pre_hook(given(f"layer_{layer}.mlp_post")),
        ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def assert_same(rows: Any, expected: dict[str, Tensor]) -> None:
    for key, value in rows.items():
        off = (torch.as_tensor(value).float() - expected[key]).abs().max().item()
        assert off <= 1e-5 * max(1, expected[key].abs().max().item()), key


def test_rows_of_a_plain_module_are_those_of_raw_hooks(tokenizer: Any) -> None:
    model = plain()
    described = describe_model(model, **PARTS)
    assert not described.missing
    loaded = load_model(model, tokenizer=tokenizer)
    assert loaded.name == "Plain"
    layout = loaded.layout
    sites = expand([*STORED, "final_norm", "logits"], None, layout.n_layers)
    rows = read(loaded.model, layout, layout.pick(sites), padded([IDS]))
    assert len(rows) == len(sites)
    assert_same(rows, by_hand(model, IDS))
    assert (layout.n_heads, layout.n_kv_heads, layout.d_head) == (4, 2, 8)


class Returns(nn.Module):
    """A plain module that returns its logits in another way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how = plain(), how

    def forward(self, tokens: Tensor) -> Any:
        logits = self.body(tokens)[0]
        ways = {
            "alone": logits,
            "dict": {"logits": logits},
            "loss first": (logits.mean(), logits),
            "probabilities": logits.softmax(-1),
        }
        return ways[self.how]


@pytest.mark.parametrize("how", ["alone", "dict", "loss first", "probabilities"])
def test_logits_are_what_the_module_returns(how: str, tokenizer: Any) -> None:
    model = Returns(how).eval()
    paths = {part: f"body.{PARTS[part]}" for part in ("blocks", "embedding", "final_norm")}
    head: dict[str, Any] = {}
    if how == "loss first":
        with pytest.raises(UnsupportedModel, match=r"its forward gives a tensor of shape \[\] first, not logits"):
            describe_model(model, **PARTS | paths)
        head = {"lm_head": "body.unembed"}
    if how == "probabilities":
        with pytest.raises(
            UnsupportedModel, match=r"body.unembed \(lm_head\) gives is not among what the model returns"
        ):
            describe_model(model, **PARTS | paths, lm_head="body.unembed")
        return
    describe_model(model, **PARTS | paths, **head)
    loaded = load_model(model, tokenizer=tokenizer)
    rows = read(loaded.model, loaded.layout, loaded.layout.pick([Site("logits")]), padded([IDS]))
    assert_same(rows, by_hand(model.body, IDS))


class Named(nn.Module):
    """A plain module that takes its ids by name, and has a config of its own."""

    def __init__(self, *, needs: bool = False) -> None:
        super().__init__()
        self.body, self.config = plain(), {"ways": 4, "shared": 2}
        if needs:
            self.forward = self.with_places  # type: ignore[method-assign]

    def forward(self, *, tokens: Tensor) -> Any:
        return self.body(tokens)

    def with_places(self, tokens: Tensor, places: Tensor) -> Any:
        return self.body(tokens)


def test_ids_are_given_by_name_and_numbers_read_from_a_config_of_its_own() -> None:
    paths = {part: f"body.{PARTS[part]}" for part in ("blocks", "embedding", "final_norm")}
    own = PARTS | paths | {"n_heads": "ways", "n_kv_heads": "shared"}
    assert not describe_model(Named().eval(), **own).missing
    with pytest.raises(
        UnsupportedModel, match="the forward of Named needs tokens, places; a plain module is given the token ids alone"
    ):
        describe_model(Named(needs=True).eval(), **own)


class Fused(nn.Module):
    """The mixer of `Plain` with one projection, whose parts stand in an order."""

    def __init__(self, mixer: Any, order: str) -> None:
        super().__init__()
        self.order, self.heads, self.proj = order, mixer.heads, mixer.proj
        self.all = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        parts = dict(zip(self.order, self.all(x).unflatten(-1, (3, self.heads, -1)).unbind(-3), strict=True))
        q, k, v = (parts[kind].transpose(1, 2) for kind in "qkv")
        z = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(z.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("order", ["qkv", "kqv", "vqk"])
def test_one_projection_is_cut_as_its_forward_cuts_it_or_not_at_all(order: str) -> None:
    model = plain(shared=4)
    for block in model.decoder.stack:
        block.mix = Fused(block.mix, order)
    own = {part: name for part, name in PARTS.items() if part not in ("q", "k", "v", "n_kv_heads")}
    layout = describe_model(model.eval(), **own, qkv="all").layout
    found = {kind for kind in "qkvz" if Site(kind, 1) in layout.taps}
    assert found == {"qkv": set("qkvz"), "kqv": set("vz"), "vqk": set()}[order]


def test_texts_are_captured_and_edited_in_a_plain_module_and_nothing_is_generated(tokenizer: Any) -> None:
    model = plain()
    with pytest.raises(
        UnsupportedModel, match=r"Plain is no transformers model \(it has no config .*describe_model\(model, blocks"
    ):
        load_model(model, tokenizer=tokenizer)
    describe_model(model, **PARTS)
    features = FromHuggingFace(model, 1, TEXTS, tokenizer=tokenizer).extract_features()
    expected = [by_hand(model, tokenizer(text)["input_ids"])["layer_1.mlp_post"] for text in TEXTS]
    torch.testing.assert_close(features, torch.cat(expected))
    ids = torch.tensor([IDS])
    with editing(model, Edit.scale("layer_2.mlp_out", 0.0)) as edited:
        changed = edited(ids)[0]
    block = model.decoder.stack[2]
    x = by_hand(model, IDS)["layer_2.resid_mid"]
    torch.testing.assert_close(changed[0], model.unembed(model.decoder.last(x)))
    assert torch.equal(model(ids)[0], model(ids)[0])
    assert not block._forward_hooks
    with pytest.raises(UnsupportedModel, match=r"edits with positions .* and Plain is a plain module"):
        editing(model, Edit.scale("layer_1.z", 0.0, positions="last")).__enter__()
    with pytest.raises(UnsupportedModel, match="pattern needs attention of transformers"):
        reading_patterns(model, find_layout(model)).__enter__()
    for door in (generate_inference_with_activations, lambda *given, **how: evaluate(given[1], "demo_facts", **how)):
        with pytest.raises(
            UnsupportedModel, match=r"and Plain is a plain module \(no config, .* on texts can be captured"
        ):
            door("Hi", model, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"blocks": "decoder.stak"}, r"no module decoder.stak \(blocks\). Did you mean 'decoder.stack'.*decoder.stack: 3 Layer \(pre_a, mix, pre_b, ff\)"),
        ({"blocks": ["decoder.stack.1", "decoder.stack.2"]}, "2 blocks are described, and decoder.stack.0 is built like them"),
        ({"blocks": "decoder.last"}, "holds no modules"),
        ({"embedding": "decoder.places"}, "not the ids"),
        ({"embedding": "decoder"}, r"decoder of Plain \(embedding\) has no weight"),
        ({"final_norm": "decoder.stack.0.pre_a"}, "is not what block 2 returns"),
        ({"attention": "ff", "mlp": "mix"}, "ff is described as attention, but what it gives at a token depends on that token alone"),
        ({"attention": "mixx"}, r"no block has a module mixx \(attention\); decoder.stack.0 holds pre_a \(Scale\), mix \(Mixer\)"),
        ({"post_mlp_norm": "pre_c"}, r"no block has a module pre_c \(post_mlp_norm\)"),
        ({"lm_head": "decoder.last"}, r"decoder.last \(lm_head\) gives is not among what the model returns"),
        ({"n_heads": "heads"}, "n_heads is described as the config's 'heads', and the model has no config; give a number"),
    ],
)  # fmt: skip
def test_a_wrong_description_is_refused(wrong: dict[str, Any], says: str) -> None:
    model = plain()
    with pytest.raises(UnsupportedModel, match=says):
        describe_model(model, **PARTS | wrong)
    with pytest.raises(UnsupportedModel, match="its config says no number of layers"):
        find_layout(model)  # what was wrong is not remembered


@pytest.mark.parametrize(
    ("wrong", "lost", "says"),
    [
        ({"n_heads": 8, "n_kv_heads": 8}, "qkvz", "8 heads are described, and each 2 of them attend alike: it may have 4"),
        ({"n_heads": 2, "n_kv_heads": 2}, "qkvz", "its heads cannot be told: .* mix.carry gives is in no known order what its heads read"),
        ({"n_kv_heads": 2}, "qkvz", "2 heads of keys and values are described, and v has 4"),
        ({"q": "label", "k": "ask"}, "qk", "changing mix.label .q. at the first token changes z anywhere, which queries do not"),
        ({"v": "label"}, "qkvz", "its heads cannot be told: .* mix.label gives is in no known order what its heads read"),
        ({"k": "carry"}, "k", "changing mix.carry .k. at the first token changes z at that token, which keys do not"),
        ({"down_projection": "w_a"}, ["mlp_post"], "ff.w_a gives is not what ff gives"),
        ({"out_projection": "carry"}, "z", "mix.carry gives is not what mix gives"),
    ],
)  # fmt: skip
def test_sites_that_a_description_gets_wrong_are_missing_with_the_reason(
    wrong: dict[str, Any], lost: Any, says: str
) -> None:
    described = describe_model(plain(shared=4), **PARTS | {"n_kv_heads": 4} | wrong)
    for kind in lost:
        assert Site(kind, 1) not in described.layout.taps, kind
    with pytest.raises(SiteUnavailable, match=says):
        described.layout.pick([Site(lost[0], 1)])
    assert says.split(" ")[0] in str(described)
    assert {"resid_mid", "attn_out", "mlp_out"} <= {site.kind for site in described.layout.taps}


def test_a_model_with_a_cache_is_held_against_it() -> None:
    model = build(LlamaConfig(**SIZES | {"num_key_value_heads": 4}))
    true = find_layout(model)
    for wrong, kinds in [
        ({"q": "k_proj", "k": "q_proj"}, "qk"),
        ({"n_heads": 8, "d_head": 4}, "zqkv"),
        ({"k": "v_proj"}, "k"),
    ]:
        layout = describe_model(model, **wrong).layout  # type: ignore[arg-type]
        assert not any(Site(kind, 0) in layout.taps for kind in kinds), wrong
    with pytest.raises(
        UnsupportedModel,
        match="mlp is described as attention, but what it gives at a token depends on that token alone",
    ):
        describe_model(model, attention="mlp")
    again = describe_model(model, attention="self_attn", q="q_proj", k="k_proj", n_heads=4).layout
    assert again.taps.keys() == true.taps.keys()
    assert again.widths == true.widths


def test_a_multiplier_that_is_described_is_the_one_that_is_used() -> None:
    model = build(ALL["granite"]())
    assert describe_model(model, residual_multiplier=0.3).layout.taps[Site("attn_out", 1)].scale == 0.3
    assert "not hold in its block" in str(describe_model(model, residual_multiplier=0.5))
    model.config.residual_multiplier, model.config.own = 1.0, 0.3
    assert not describe_model(model, residual_multiplier="own").missing


def test_norms_behind_the_branches_are_told_apart() -> None:
    model = build(ALL["gemma2"]())
    own = {"post_attention_norm": "post_attention_layernorm", "post_mlp_norm": "post_feedforward_layernorm"}
    assert describe_model(model, **own).layout.taps[Site("attn_out", 0)].module.endswith("post_attention_layernorm")  # type: ignore[arg-type]
    with pytest.raises(
        UnsupportedModel,
        match=r"post_feedforward_layernorm \(post_attention_norm\) is not given what self_attn|is not given what",
    ):
        describe_model(model, post_attention_norm=own["post_mlp_norm"], post_mlp_norm=own["post_attention_norm"])


def test_the_description_that_the_error_prints_is_completed_and_works(tmp_path: Path) -> None:
    model = plain()
    with pytest.raises(UnsupportedModel) as refused:
        find_layout(model)
    (text,) = refused.value.__notes__
    assert len(text.splitlines()) < 40
    for line, completed in [('# q = ""', 'q = "ask"'), ('# k = ""', 'k = "label"'), ('# v = ""', 'v = "carry"'), ("# n_heads = 0", "n_heads = 4\nn_kv_heads = 2")]:  # fmt: skip
        assert line in text
        text = text.replace(line, completed)
    (tmp_path / "model.toml").write_text(text)
    described = describe_model(model, tmp_path / "model.toml")
    assert not described.missing
    assert Description.read(described.as_toml()) == described.description
    assert dict(described.description.said()) == PARTS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('atention = "mix"', "no part 'atention'. Did you mean 'attention'"),
        ("attention = 3", "attention is 3; expected the name of a module, or a list of names"),
        ('n_heads = "4 heads"', "n_heads is '4 heads'; expected a whole number above 0, or the name that the config has for it"),
        ("n_heads = 4.5", "n_heads is 4.5; expected a whole number"),
        ("n_heads = true", "n_heads is True; expected a whole number"),
        ("residual_multiplier = -1", "residual_multiplier is -1; expected a number above 0"),
        ("blocks = []", r"blocks is \[\]; expected"),
        ("blocks = decoder", r"is no TOML: Invalid value \(at line 1"),
        ("[a]\nb = 1", "no part 'a'"),
        ("", "nothing is described"),
    ],
)  # fmt: skip
def test_a_description_that_is_none_is_refused_before_anything_loads(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(ModelError, match=says) as refused:
        LoadOptions(model_description=str(tmp_path / "own.toml"))
    assert "own.toml" in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


def test_keywords_are_all_that_can_be_described() -> None:
    assert set(DescriptionKeywords.__annotations__) == set(KEYS)


def test_a_file_that_is_not_there_is_no_description(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.toml cannot be read"):
        LoadOptions(model_description=str(tmp_path / "nowhere.toml"))
    with pytest.raises(TypeError, match=r"no option 'atention'\. Did you mean 'attention'"):
        describe_model(plain(), atention="mix")
    with pytest.raises(ModelError, match="a description was given, and attention beside it"):
        describe_model(plain(), 'mlp = "ff"', attention="mix")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[Path, Any]:
    """A folder with a model of odd names and code of its own, with its description, and the model that is in it."""
    folder = tmp_path_factory.mktemp("models") / "odd"
    folder.mkdir()
    model = save_odd(folder, tokenizer)
    parts = PARTS | {"n_heads": "n_ways", "n_kv_heads": "n_shared"}
    (folder / "odd.toml").write_text("# a comment\n" + Description.of(parts).as_toml())
    return folder, model


def test_a_checkpoint_of_an_unknown_family_is_served_by_its_description(odd: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = odd
    load: Any = {"trust_remote_code": True, "model_description": str(folder / "odd.toml")}
    text = (folder / "odd.toml").read_text().partition("\n")[2].strip()
    out = generate_inference_with_activations(
        "The capital of France is",
        folder,
        save_path=tmp_path / "a.h5",
        max_new_tokens=4,
        sites=",".join(STORED),
        **load,
    )
    rows = out[1]["activations"]
    fed = [each for name in ("input_ids", "generated_ids") for each in out[1][name].flatten().tolist()][:-1]
    assert len(rows["layer_0"]) == len(fed) > out[1]["input_ids"].shape[1]
    assert_same(rows, by_hand(model, fed))
    outcome = evaluate_with_activations(
        folder, "demo_facts", limit=2, sites="z,resid_post", activation_save_dir=tmp_path, **load
    )
    run = open_run(outcome.folder)
    assert run.made_with.loaded_with == {"model_description": text}
    assert str(folder) not in str(run.made_with.as_dict())
    (tmp_path / "odd.toml").unlink(missing_ok=True)
    again = recompute(run, folder, 3, options=LoadOptions(trust_remote_code=True))
    assert not again.different
    assert again.n_keys == 6
    other = LoadOptions(trust_remote_code=True, model_description=text + "\nd_head = 8")
    differing = load_model(folder, options=other).made_with().differences(run.made_with, "here")
    assert "loaded_with.model_description" in {each.name for each in differing}


def test_layers_are_counted_and_options_are_kept_before_the_weights_load(odd: tuple[Path, Any]) -> None:
    folder, _ = odd
    options = LoadOptions(trust_remote_code=True, model_description=str(folder / "odd.toml"))
    text = (folder / "odd.toml").read_text().partition("\n")[2].strip()
    assert n_layers_of(folder, options) == 3
    seen, true = unloaded_layout(unloaded_model(str(folder), options)), load_model(folder, options=options).layout
    assert seen.widths == true.widths
    assert options.as_dict()["model_description"] == text
    assert asked_for({"model_description": str(folder / "odd.toml")}) == {"model_description": text}
    with pytest.raises(UnsupportedModel, match=r"no number of layers .*decoder.stack: 3 Layer"):
        unloaded_layout(unloaded_model(str(folder), LoadOptions(trust_remote_code=True)))
    with pytest.raises(
        UnsupportedModel, match=r"`python main.py sites .* --trust_remote_code` prints what to complete"
    ):
        n_layers_of(folder, LoadOptions(trust_remote_code=True))


def test_the_command_prints_the_description_to_complete(odd: tuple[Path, Any]) -> None:
    folder, _ = odd
    asked = ["sites", "--model", str(folder), "--trust_remote_code"]
    refused = CliRunner().invoke(app, asked)
    assert refused.exit_code == 2
    assert 'out_projection = "proj"' in refused.output.splitlines()
    assert "# n_heads = 0" in refused.output
    served = CliRunner().invoke(app, [*asked, "--model_description", str(folder / "odd.toml")])
    assert served.exit_code == 0
    assert "3 layers, 4 heads of 8, d_model 32\nVerified:" in served.output


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3", "mixtral", "mamba", "gpt_neox", "granite"])
def test_sites_without_weights_are_the_verified_ones(family: str, tmp_path: Path) -> None:
    config = ALL[family]()
    config.save_pretrained(tmp_path)
    seen, true = unloaded_layout(unloaded_model(str(tmp_path), LoadOptions())), find_layout(build(config))
    assert seen.widths == true.widths
    assert seen.missing == true.missing
    assert (seen.n_heads, seen.n_kv_heads, seen.d_head) == (true.n_heads, true.n_kv_heads, true.d_head)
    for site, tap in true.taps.items():
        own = seen.taps[site]
        assert (own.module, own.end, own.columns, own.scale) == (tap.module, tap.end, tap.columns, tap.scale)


def test_the_command_says_whether_sites_were_verified(tmp_path: Path) -> None:
    ALL["llama"]().save_pretrained(tmp_path)
    seen = CliRunner().invoke(app, ["sites", "--model", str(tmp_path)])
    assert seen.exit_code == 0
    assert "Not verified: seen in its config and code, without weights." in seen.output
    assert "layer_0.z … layer_2.z" in seen.output
    assert "describe" not in seen.output
    refused = CliRunner().invoke(app, ["sites", "--model", str(tmp_path), "--verify"])
    assert refused.exit_code == 2
    assert "ModelUnavailable" in refused.output
