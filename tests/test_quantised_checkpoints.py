"""Checkpoints whose weights are quantised already: they load where their library is, and what is read of them is what they compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import build
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GptOssConfig, LlamaConfig

from AutomaticEval import Edit, editing, generate_inference_with_activations, load_model
from AutomaticEval.analysis.parts.direct_effect import _unembedding_rows
from AutomaticEval.errors import ModelError, ModelUnavailable
from AutomaticEval.models import loading
from AutomaticEval.models.checkpoint import quantised
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel, quantization_of
from AutomaticEval.models.head_weights import head_results
from AutomaticEval.store.disk.json_text import as_json

SIZES = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 128}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
NEEDS = {"ao": "torchao", "ct": "compressed-tensors"}
KINDS = {
    "fp8": 1e-5,
    "mxfp4": 1e-5,
    "bnb-8": 2e-2,
    "bnb-4": 1e-2,
    "ao-int8": 1e-5,
    "ao-int8-dynamic": 2e-2,
    "ct-int4": 1e-5,
    "ct-int8-dynamic": 2e-2,
}
"""Kind -> how far the results of heads may be from those of the projection itself: further where it rounds what it is given."""


def needs(kind: str) -> None:
    package = NEEDS.get(kind.split("-")[0])
    try:
        version(package or "torch")
    except PackageNotFoundError:
        pytest.skip(f"{kind} needs {package}: pip install 'AutomaticEval[quantised]'")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], Path]:
    """Kind -> the folder of a tiny checkpoint that is quantised so, made when it is first asked for."""
    root = tmp_path_factory.mktemp("quantised")
    build(LlamaConfig(intermediate_size=128, **SIZES)).save_pretrained(root / "plain")
    tokenizer.save_pretrained(root / "plain")

    def made(kind: str) -> Path:
        needs(kind)
        if not (root / kind).is_dir():
            MAKERS[kind.split("-")[0]](root, kind)
            tokenizer.save_pretrained(root / kind)
        return root / kind

    return made


def written(root: Path, kind: str, weights: dict[str, Tensor], about: dict[str, Any], like: str = "plain") -> None:
    """A checkpoint of these weights, whose config says how they are quantised."""
    (root / kind).mkdir()
    save_file(weights, root / kind / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / like / "config.json").read_text())
    (root / kind / "config.json").write_text(json.dumps({**config, "quantization_config": about}))


def changed(root: Path, change: Callable[[str, Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The plain weights, with those of the projections in the blocks in another form."""
    weights: dict[str, Tensor] = {}
    for name, weight in load_file(root / "plain" / "model.safetensors").items():
        weights |= change(name, weight) if "proj" in name else {name: weight}
    return weights


def fp8(root: Path, kind: str) -> None:
    def change(name: str, weight: Tensor) -> dict[str, Tensor]:
        blocks = weight.view(len(weight) // 32, 32, -1, 32)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale_inv": scales}

    about = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    written(root, kind, changed(root, change), about)


def mxfp4(root: Path, kind: str) -> None:
    build(GptOssConfig(intermediate_size=64, **SIZES, **EXPERTS)).save_pretrained(root / "experts")
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, weight in load_file(root / "experts" / "model.safetensors").items():
        if "experts" not in name or name.endswith("bias"):
            weights[name] = weight
            continue
        n_experts, n_in, n_out = weight.shape
        shape = (n_experts, n_out, n_in // 32)
        weights[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.randint(121, 125, shape, generator=generator, dtype=torch.uint8)
    written(root, kind, weights, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "experts")


def bitsandbytes(root: Path, kind: str) -> None:
    how = BitsAndBytesConfig(load_in_8bit=kind == "bnb-8", load_in_4bit=kind == "bnb-4", bnb_4bit_quant_type="nf4")
    load = AutoModelForCausalLM.from_pretrained
    load(root / "plain", quantization_config=how, device_map="cpu").save_pretrained(root / kind)


def torchao(root: Path, kind: str) -> None:
    import torchao.quantization as ways
    from transformers import TorchAoConfig

    way = ways.Int8WeightOnlyConfig if kind == "ao-int8" else ways.Int8DynamicActivationInt8WeightConfig
    load = AutoModelForCausalLM.from_pretrained
    load(root / "plain", quantization_config=TorchAoConfig(way()), device_map="cpu").save_pretrained(root / kind)


def compressed_tensors(root: Path, kind: str) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    def four_bits(name: str, weight: Tensor) -> dict[str, Tensor]:
        groups = weight.view(len(weight), -1, 32)
        scales = groups.abs().amax(2) / 7
        codes = (groups / scales[..., None]).round().clamp(-8, 7).to(torch.int8).reshape(weight.shape)
        shape = torch.tensor(weight.shape)
        return {f"{name}_packed": pack_to_int32(codes, 4), f"{name}_scale": scales, f"{name}_shape": shape}

    def eight_bits(name: str, weight: Tensor) -> dict[str, Tensor]:
        scales = weight.abs().amax(1, keepdim=True) / 127
        return {name: (weight / scales).round().to(torch.int8), f"{name}_scale": scales}

    is_four = kind == "ct-int4"
    own = {"num_bits": 4, "strategy": "group", "group_size": 32} if is_four else {"num_bits": 8, "strategy": "channel"}
    weights = {"type": "int", "symmetric": True, "dynamic": False, **own}
    given = None if is_four else {**weights, "strategy": "token", "dynamic": True}
    about = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if is_four else "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"all": {"targets": ["Linear"], "weights": weights, "input_activations": given}},
    }
    written(root, kind, changed(root, four_bits if is_four else eight_bits), about)


MAKERS = {"fp8": fp8, "mxfp4": mxfp4, "bnb": bitsandbytes, "ao": torchao, "ct": compressed_tensors}


def loaded_anew(folder: Path, **how: Any) -> LoadedModel:
    loading._loaded.clear()
    return load_model(folder, device="cpu", **how)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_its_own_hooks_see(kind: str, folders: Callable[[str], Path]) -> None:
    """In the very forwards that generate: dynamic quantisation rounds otherwise in others."""
    loaded = loaded_anew(folders(kind))
    hash_before, seen, handles = loaded.fingerprint(), {}, []

    def note(key: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        seen.setdefault(key, []).append(value.reshape(-1, value.shape[-1]).clone())

    blocks = loaded.model.model.layers
    assert not [site for site in loaded.layout.missing if site.kind != "mlp_post"]
    for layer, block in enumerate(blocks):
        handles += [
            block.register_forward_hook(lambda m, args, out, key=f"layer_{layer}": note(key, out)),
            block.self_attn.register_forward_hook(lambda m, args, out, key=f"layer_{layer}.attn_out": note(key, out)),
            block.mlp.register_forward_hook(lambda m, args, out, key=f"layer_{layer}.mlp_out": note(key, out)),
            block.self_attn.o_proj.register_forward_pre_hook(
                lambda m, args, key=f"layer_{layer}.z": note(key, args[0])
            ),
        ]
    sites = "resid_post,attn_out,mlp_out,z,head_result_norm"
    _, found = generate_inference_with_activations(
        "Who is it?", loaded, max_new_tokens=3, apply_chat_template=False, sites=sites
    )
    for handle in handles:
        handle.remove()
    rows = found["activations"]
    for key, parts in seen.items():
        assert torch.equal(rows[key], torch.cat(parts)[-len(rows[key]) :]), key
    for layer, block in enumerate(blocks):
        check_heads(block.self_attn.o_proj, rows, f"layer_{layer}", KINDS[kind])
    assert loaded.fingerprint() == hash_before
    assert _unembedding_rows(loaded.model, [3, 5], 64).shape == (2, 64)
    made = json.loads(as_json(loaded.made_with().as_dict()))
    assert made == json.loads(as_json(loaded_anew(folders(kind)).made_with().as_dict()))


def check_heads(projection: Any, rows: Any, layer: str, tolerance: float) -> None:
    """The norms and the sum of what heads give, against the projection itself, given one head at a time."""
    z, norms = rows[f"{layer}.z"], []
    with torch.no_grad():
        bias = projection(torch.zeros_like(z[:1]))
        for head in range(4):
            alone = torch.zeros_like(z)
            alone[:, 16 * head : 16 * head + 16] = z[:, 16 * head : 16 * head + 16]
            norms.append((projection(alone) - bias).norm(dim=-1))
        whole = projection(z)
    expected, found = torch.stack(norms, -1), rows[f"{layer}.head_result_norm"]
    assert (found - expected).abs().max() <= tolerance * expected.max()
    sums = head_results(z, projection, 4).sum(-2) + bias
    assert (sums - whole).abs().max() <= tolerance * whole.abs().max()


@pytest.mark.parametrize("kind", ["fp8", "ao-int8", "ct-int4"])
def test_weights_are_those_of_the_checkpoint(kind: str, folders: Callable[[str], Path]) -> None:
    """The output projection is within half a step of the plain one, and an edit of its input is made."""
    folder = folders(kind)
    loaded, plain = loaded_anew(folder), load_file(folder.parent / "plain" / "model.safetensors")
    weight = plain["model.layers.1.self_attn.o_proj.weight"]
    projection = loaded.model.model.layers[1].self_attn.o_proj
    with torch.no_grad():
        found = projection(torch.eye(64)).T
    step = {"fp8": 2**-3, "ao-int8": 1 / 127, "ct-int4": 1 / 7}[kind]
    assert (found - weight).abs().max() <= 0.51 * step * weight.abs().max()
    assert not torch.equal(found, weight)
    assert quantization_of(loaded.model) == {"ao-int8": "torchao", "ct-int4": "compressed-tensors"}.get(kind)

    def without_head(module: Any, args: Any) -> Any:
        z = args[0].clone()
        z[..., 16:32] = 0
        return (z, *args[1:])

    ids = torch.tensor([[5, 17, 99, 3]])
    handle = projection.register_forward_pre_hook(without_head)
    with torch.no_grad():
        expected = loaded.model(ids).logits
        handle.remove()
        with editing(loaded.model, Edit.scale("layer_1.z", 0.0, heads=[1])):
            assert torch.equal(loaded.model(ids).logits, expected)


@pytest.mark.parametrize(("kind", "name"), [("ao", "int8"), ("ct", "int8")])
def test_the_hash_tells_what_is_quantised_besides_weights(
    kind: str, name: str, folders: Callable[[str], Path], tokenizer: Any
) -> None:
    """The same codes and scales, with inputs that are quantised and with inputs that are not."""
    folder = folders(f"{kind}-{name}-dynamic")
    dynamic = loaded_anew(folder)
    first = dynamic.fingerprint()
    if kind == "ao":
        assert first != loaded_anew(folders("ao-int8")).fingerprint()
        return
    for module in dynamic.model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.quantization_scheme.input_activations = None
    assert dynamic.fingerprint() != first


@pytest.mark.parametrize(
    ("about", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantised by gptq, which needs gptqmodel.*pip install gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, r"quantised by awq, which needs gptqmodel"),
        ({"quant_method": "torchao"}, r"needs torchao, not installed here: pip install 'AutomaticEval\[quantised\]'"),
        ({"quant_method": "own"}, r"quantised by 'own', which this transformers does not know; it knows .*torchao"),
        ({"quant_method": "vptq"}, r"quantised by vptq, which needs vptq"),
    ],
    ids=["gptq", "awq", "torchao", "unknown", "vptq"],
)
def test_what_cannot_be_run_is_said_in_one_line(
    about: dict[str, Any],
    told: str,
    folders: Callable[[str], Path],
    tmp_path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = folders("fp8").parent / "plain"
    tokenizer.save_pretrained(tmp_path / "own")
    (tmp_path / "plain").symlink_to(plain)
    (tmp_path / "own" / "config.json").write_text(
        json.dumps({**json.loads((plain / "config.json").read_text()), "quantization_config": about})
    )
    (tmp_path / "own" / "model.safetensors").symlink_to(plain / "model.safetensors")
    monkeypatch.setattr(quantised, "_is_installed", lambda package: False)
    with pytest.raises(ModelUnavailable, match=told) as failure:
        loaded_anew(tmp_path / "own")
    assert "\n" not in str(failure.value)


def test_what_the_library_fails_over_is_one_line(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **how: Any) -> None:
        raise RuntimeError("No kernel here.\nAnd more.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(
        ModelUnavailable, match=r"quantised by fp8, cannot be loaded here: RuntimeError: No kernel here\."
    ) as told:
        loaded_anew(folders("fp8"))
    assert "And more" not in str(told.value)


def test_options_that_a_quantised_checkpoint_excludes(folders: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match=r"quantised already \(fp8\); leave load_in_8bit out"):
        loaded_anew(folders("fp8"), load_in_8bit=True)
    with pytest.raises(ModelError, match=r"quantised already \(bitsandbytes_4bit\); leave load_in_8bit out"):
        loaded_anew(folders("bnb-4"), load_in_8bit=True)
    with pytest.raises(ModelError, match="delta cannot be added"):
        loaded_anew(folders("fp8"), delta=str(folders("fp8")))
    own = loaded_anew(folders("bnb-8")).fingerprint()
    assert loaded_anew(folders("bnb-8"), load_in_8bit=True).fingerprint() == own  # as verify --recompute asks for it


def test_four_bits_of_matrices_that_bitsandbytes_cannot_repack(tmp_path: Path, tokenizer: Any) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes would fail over them at the first forward."""
    build(LlamaConfig(intermediate_size=172, **SIZES)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = loaded_anew(tmp_path, load_in_4bit=True)
    assert not loaded.model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu
    first = loaded.fingerprint()
    with torch.no_grad():
        assert loaded.model(torch.tensor([[5, 17, 99, 3]])).logits.isfinite().all()
    assert loaded.fingerprint() == first
