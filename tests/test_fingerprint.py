"""What a model is: every number of it, its adapters' state, and what decides its numbers besides; and the one rule that compares runs."""

from __future__ import annotations

import copy
import hashlib
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import within
from helpers.models import CONFIGS, build, save_with_code
from torch import Tensor, nn

from AutomaticEval import Edit, editing, evaluate_with_activations, open_run
from AutomaticEval.errors import ModelError, OtherSettings, StoreError
from AutomaticEval.evaluation.harness.model import CapturingHFLM
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER
from AutomaticEval.models.loading import load_model
from AutomaticEval.models.weights import fingerprint as of
from AutomaticEval.models.weights.fingerprint import fingerprint, hash_of_tensor, sampled_fingerprint
from AutomaticEval.models.weights.provenance import provenance
from AutomaticEval.settings import Difference, RunSettings
from AutomaticEval.store.upkeep.merge import merge
from AutomaticEval.store.writer import RunWriter

MASK = 2**64 - 1
BLOCK = 32768


def splitmix(number: int) -> int:
    mixed = number * 0x9E3779B97F4A7C15 & MASK
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & MASK
    return (mixed ^ (mixed >> 31)) | 1


def by_hand(tensor: Tensor) -> str:
    """The same hash by Python's own integers."""
    octets = bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())
    octets += bytes(-len(octets) % 8)
    words = [int.from_bytes(octets[at : at + 8], "little", signed=True) for at in range(0, len(octets), 8)]
    sums = b""
    for start in range(0, len(words) // BLOCK * BLOCK + 1, BLOCK):
        block = words[start : start + BLOCK]
        for each in (
            sum(splitmix(place + 1) * word for place, word in enumerate(block)),
            sum(splitmix(place + 1 + BLOCK) * (word >> 32) for place, word in enumerate(block)),
        ):
            sums += (each & MASK).to_bytes(8, "little")
    text = f"{tensor.dtype} {tuple(tensor.shape)}\n{hashlib.blake2b(sums).hexdigest()}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.bool])
@pytest.mark.parametrize("n", [0, 1, 3, 8, 1001])
def test_hash_is_what_integers_give(dtype: torch.dtype, n: int) -> None:
    tensor = (torch.randn(n, generator=torch.Generator().manual_seed(n)) * 50).to(dtype)
    assert hash_of_tensor(tensor) == by_hand(tensor)


def test_hash_over_blocks_is_what_integers_give(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(
        3 * 2 * BLOCK + 77, generator=torch.Generator().manual_seed(1)
    )  # 4 blocks, of which 3 are whole
    expected = by_hand(tensor)
    assert hash_of_tensor(tensor) == expected
    monkeypatch.setitem(of.BLOCKS_AT_ONCE, "cpu", 2)  # how the work is divided decides nothing
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert hash_of_tensor(tensor) == expected
    monkeypatch.setattr(of, "_summed_by_block", of._summed)  # as on a GPU
    assert hash_of_tensor(tensor) == expected


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8, torch.float8_e4m3fn]
)
def test_every_flipped_bit_is_seen(dtype: torch.dtype) -> None:
    tensor = torch.randn(67, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    octets = tensor.view(torch.uint8).flatten()
    found = {hash_of_tensor(tensor)}
    for place in range(len(octets)):
        for bit in range(8):
            octets[place] ^= 1 << bit
            found.add(hash_of_tensor(tensor))
            octets[place] ^= 1 << bit
    assert len(found) == 1 + 8 * len(octets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_signs_flipped_in_pairs_are_seen(dtype: torch.dtype) -> None:
    """The highest bit of a word is all that a sum modulo 2**64 has of it."""
    tensor = torch.randn(64, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = {hash_of_tensor(tensor)}
    every = 8 // dtype.itemsize
    for one in range(every - 1, 64, every):
        for other in range(one + every, 64, every):
            changed = tensor.clone()
            changed[[one, other]] *= -1
            found.add(hash_of_tensor(changed))
    n_words = 64 // every
    assert len(found) == 1 + n_words * (n_words - 1) // 2


def test_order_shape_and_dtype_are_seen() -> None:
    weight = torch.randn(300, 500)  # more than a block
    rows, blocks = weight.clone(), weight.clone().flatten()
    rows[[7, 200]] = rows[[200, 7]]
    blocks[: 4 * BLOCK] = weight.flatten()[: 4 * BLOCK].view(2, -1).flip(0).flatten()
    swapped = weight.clone()
    swapped[0, 0], swapped[0, 1] = weight[0, 1], weight[0, 0]
    other = [rows, blocks.view(300, 500), swapped, weight.view(500, 300), weight.view(torch.int32), weight.T]
    assert len({hash_of_tensor(each) for each in [weight, *other]}) == 7
    assert hash_of_tensor(weight.T.contiguous().T) == hash_of_tensor(weight)  # how it lies in memory is not


def test_numbers_that_lie_anywhere_in_memory() -> None:
    numbers = torch.randn(1000).to(torch.bfloat16)
    for start in range(4):
        memory = torch.zeros(1010, dtype=torch.bfloat16)
        memory[start : start + 1000] = numbers
        assert hash_of_tensor(memory[start : start + 1000]) == hash_of_tensor(numbers)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_a_gpu_gives_the_same(dtype: torch.dtype) -> None:
    for n in (5, BLOCK * 8 + 3, 40_000_000):
        tensor = (torch.randn(n) * 50).to(dtype)
        assert hash_of_tensor(tensor.cuda()) == hash_of_tensor(tensor)
    model = build(CONFIGS["llama"](), torch.bfloat16)
    before = fingerprint(model)
    assert fingerprint(model.cuda()) == before


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("kept", torch.randn(3))
        self.register_buffer("rewritten", torch.randn(3), persistent=False)


def test_buffers_that_a_checkpoint_holds_are_seen_and_others_not() -> None:
    model = WithBuffers()
    before = fingerprint(model)
    model.get_buffer("rewritten").mul_(2)
    assert fingerprint(model) == before
    model.get_buffer("kept")[2] += 1
    assert fingerprint(model) != before


def change(model: Any) -> list[Callable[[], Any]]:
    """Edits of a Llama, each of few numbers that the older fingerprint did not read."""
    blocks = model.model.layers
    return [
        lambda: blocks[0].self_attn.v_proj.weight.data[8:].zero_(),
        lambda: model.model.embed_tokens.weight.data[300].mul_(1.5),
        lambda: blocks[2].mlp.down_proj.weight.data.__setitem__((-1, -1), 3.0),
        lambda: blocks[1].mlp.up_proj.weight.data.copy_(
            blocks[1].mlp.up_proj.weight.data[torch.arange(64).roll(-10) % 64]
        ),
    ]


@pytest.mark.parametrize("number", range(4))
def test_an_edit_through_data_is_another_model(number: int) -> None:
    model = build(CONFIGS["llama"]())
    before, versions = fingerprint(model), [each._version for each in model.parameters()]
    change(model)[number]()
    assert [each._version for each in model.parameters()] == versions  # nothing but the numbers tells
    assert fingerprint(model) != before


def test_a_tied_weight_is_hashed_once_and_no_other_than_an_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = True
    model = build(config)
    hashed: list[Tensor] = []
    stock = hash_of_tensor
    monkeypatch.setattr(of, "hash_of_tensor", lambda tensor: hashed.append(tensor) or stock(tensor))
    tied = fingerprint(model)
    assert len(hashed) == len(list(model.parameters()))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert fingerprint(model) == tied
    model.lm_head.weight.data[5, 5] += 1
    assert fingerprint(model) != tied


def adapted() -> Any:
    peft = pytest.importorskip("peft", reason="pip install 'AutomaticEval[peft]'")
    model = build(CONFIGS["llama"]())
    how: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    torch.manual_seed(5)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **how))
    model.add_adapter("second", peft.LoraConfig(r=2, **how))
    return model.eval()


def lora(model: Any) -> Any:
    return model.base_model.model.model.layers[1].self_attn.v_proj


@pytest.mark.parametrize(
    "act",
    [
        lambda model: lora(model).scaling.__setitem__("default", 0.3),
        lambda model: lora(model).set_scale("default", 7),
        lambda model: model.set_adapter("second"),
        lambda model: model.base_model.set_adapter(["default", "second"]),
        lambda model: lora(model).set_adapter("second"),  # of one layer
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: lora(model).enable_adapters(False),
        lambda model: model.merge_adapter(),
        lambda model: lora(model).lora_B["default"].weight.data[3, 1].neg_(),
        lambda model: model.delete_adapter("second"),
    ],
)
def test_what_adapters_do_is_seen(act: Callable[[Any], Any]) -> None:
    model = adapted()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = fingerprint(model)
        model(ids)
        model.generate(ids, max_new_tokens=2)
        assert fingerprint(model) == before == fingerprint(copy.deepcopy(model))  # running it changes nothing
        act(model)
        assert fingerprint(model) != before


def test_a_soft_prompt_is_seen() -> None:
    peft = pytest.importorskip("peft", reason="pip install 'AutomaticEval[peft]'")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build(CONFIGS["llama"]()), config).eval()
    before = fingerprint(model)
    with model.disable_adapter():
        assert fingerprint(model) != before
    assert fingerprint(model) == before
    model.prompt_encoder["default"].embedding.weight.data[1, 1] += 1
    assert fingerprint(model) != before


def quantised(bits: str, folder: Path, tokenizer: Any, dtype: str = "bfloat16") -> LoadedModel:
    config = CONFIGS["gpt2"]()  # with biases
    build(type(config)(**{**config.to_dict(), "n_embd": 128})).save_pretrained(folder)
    options = LoadOptions(load_in_8bit=bits == "8bit", load_in_4bit=bits == "4bit", dtype=dtype, device="cpu")
    return load_model(str(folder), tokenizer=tokenizer, options=options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_weights_are_seen_and_running_them_changes_nothing(
    bits: str, dtype: str, tmp_path: Path, tokenizer: Any
) -> None:
    model = quantised(bits, tmp_path, tokenizer, dtype).model
    before = fingerprint(model)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    assert fingerprint(model) == before
    linear = model.transformer.h[1].mlp.c_fc
    codes = linear.weight.data.view(torch.uint8).flatten()
    for bit in range(8):
        codes[-3] ^= 1 << bit
        assert fingerprint(model) != before
        codes[-3] ^= 1 << bit
    scales = linear.weight.quant_state.absmax if bits == "4bit" else linear.state.SCB
    scales[-1] *= 1.01
    assert fingerprint(model) != before


@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_survive_repacking(nested: bool) -> None:
    """As bitsandbytes does it at the first forward on CPUs with bfloat16 instructions."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(1)
    linear = Linear4bit(256, 96, bias=True, compress_statistics=nested, quant_type="nf4", compute_dtype=torch.bfloat16)
    model = nn.Sequential(linear.to("cpu"))
    state = linear.weight.quant_state
    assert bool(state.nested) == nested
    before = fingerprint(model)
    packed = copy.deepcopy(model)
    weight = packed[0].weight
    plain = weight.data.clone()
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert not torch.equal(weight.data.flatten(), plain.flatten())  # the order is another
    assert fingerprint(packed) == before
    octets = weight.data.view(torch.uint8).flatten()
    found = {before}
    for place in random.Random(1).sample(range(len(octets)), 40):
        for bit in range(8):
            octets[place] ^= 1 << bit
            found.add(fingerprint(packed))
            octets[place] ^= 1 << bit
    assert len(found) == 321
    assert fingerprint(packed) == before


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_weights_that_are_offloaded_are_read(where: str, tied: bool, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    config = CONFIGS["llama"]()
    config.tie_word_embeddings = tied
    whole = build(config)
    split = copy.deepcopy(whole)
    other = copy.deepcopy(whole)
    other.model.layers[2].mlp.down_proj.weight.data[-1, -1] += 1
    for model in (split, other):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if where == "cpu":
                cpu_offload(model, "cpu")
            else:
                disk_offload(model, tmp_path / str(model is other), "cpu")
        assert any(each.is_meta for each in model.parameters())
    assert fingerprint(split) == fingerprint(whole)
    with torch.no_grad():
        split(torch.tensor([[5, 6]]))
    assert fingerprint(split) == fingerprint(whole)
    assert fingerprint(other) != fingerprint(whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # the checkpoint's own, and another
@pytest.mark.parametrize("parts", ["some", "all"])
def test_a_checkpoint_that_is_loaded_to_the_disk_is_read(parts: str, dtype: str, tmp_path: Path) -> None:
    whole = load_model("demo", options=LoadOptions(device="cpu", dtype=dtype)).fingerprint()
    blocks = {f"model.layers.{number}": "disk" if number else "cpu" for number in range(4)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map = {"": "disk"} if parts == "all" else {**blocks, **rest}
    spread = load_model("demo", options=LoadOptions(device_map=device_map, offload_folder=str(tmp_path), dtype=dtype))
    assert any(each.is_meta for each in spread.model.parameters())
    assert spread.fingerprint() == whole


def test_a_weight_that_is_nowhere_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"weight weight has no numbers"):
        fingerprint(model)


def test_long_rope_may_be_rewritten_by_forwards() -> None:
    from transformers import Phi3Config

    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    config = Phi3Config(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        original_max_position_embeddings=8, max_position_embeddings=64, rope_parameters=factors,
    )  # fmt: skip
    model = build(config)
    before, older = fingerprint(model), sampled_fingerprint(model)
    with torch.no_grad():
        model(torch.randint(1, 400, (1, 20)))
    assert sampled_fingerprint(model) != older
    assert fingerprint(model) == before


# The rule


OLD = {"dtype": "float32", "fingerprint": "a", "sites": "embed", "benchmark": {"seed": 1}, "versions": {"torch": "1"}}
NEW = {
    **OLD,
    "model_hash": "x",
    "config": {"rope": {"factor": 2}},
    "tokenizer": {"vocabulary": "v"},
    "generation_config": {},
}


def changed(settings: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {**settings, **others}


def differences(where: str, before: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    return RunSettings.from_dict(before).differences(RunSettings.from_dict(now), where)


@pytest.mark.parametrize(
    ("before", "now", "apart"),
    [
        (NEW, NEW, []),
        (NEW, changed(NEW, fingerprint="b"), []),  # the hash of all numbers tells more
        (NEW, changed(NEW, model_hash="y"), ["model_hash"]),
        (NEW, changed(NEW, config={"rope": {"factor": 4}}), ["config.rope.factor"]),
        (NEW, changed(NEW, generation_config={"top_k": 5}), ["generation_config", "generation_config.top_k"]),
        (NEW, changed(NEW, adapters={"default": {"type": "LORA"}}), ["adapters.default.type"]),
        (changed(NEW, edits=["one"]), NEW, ["edits"]),
    ],
)
def test_runs_of_now_are_compared_by_everything(before: Any, now: Any, apart: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [each.name for each in differences("r", before, now)] == apart


@pytest.mark.parametrize("turned", [False, True])
def test_an_older_run_is_compared_by_what_it_holds_which_is_said(turned: bool) -> None:
    for now, apart in [
        (NEW, []),
        (changed(NEW, fingerprint="b"), ["fingerprint"]),
        (changed(NEW, dtype="bfloat16"), ["dtype"]),
        (changed(NEW, benchmark={"seed": 2}), ["benchmark.seed"]),
        (changed(NEW, edits=["one"]), ["edits"]),  # it would say so, had there been some
    ]:
        pair = (now, OLD) if turned else (OLD, now)
        with pytest.warns(UserWarning, match="64 numbers of each weight") as said:
            assert [each.name for each in differences("runs/old", *pair)] == apart
        (line,) = (str(each.message) for each in said)
        assert line.startswith("runs/old: model_hash, config, tokenizer, generation_config were not written down")


class Stopped(BaseException): ...


@pytest.fixture
def cut_short(demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A run of the demo that ends in its middle."""

    def cut(loaded: LoadedModel = demo, older: bool = False) -> Path:
        stock, n = CapturingHFLM._model_generate, []

        def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
            n.append(1)
            if len(n) > 2:
                raise Stopped
            return stock(self, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(CapturingHFLM, "_model_generate", stop)
            if older:
                made = LoadedModel.made_with
                names = ("model_hash", "config", "generation_config", "tokenizer", "arithmetic")
                patched.setattr(
                    LoadedModel,
                    "made_with",
                    lambda self: RunSettings.from_dict(
                        {name: value for name, value in made(self).as_dict().items() if name not in names}
                    ),
                )
            with pytest.raises(Stopped):
                evaluate(loaded, activation_save_dir=tmp_path / "out")
        (folder,) = (tmp_path / "out").iterdir()
        return folder

    return cut


def evaluate(loaded: Any, **how: Any) -> Any:
    return evaluate_with_activations(loaded, "demo_arithmetic", limit=30, positions="last", layers_to_capture=0, **how)


def test_a_model_of_which_little_differs_does_not_go_on(demo: LoadedModel, cut_short: Callable[..., Path]) -> None:
    folder = cut_short()
    other = copy.deepcopy(demo.model)
    other.model.layers[1].self_attn.v_proj.weight.data[-1, -1] += 1e-3
    with pytest.raises(OtherSettings, match="model_hash was"):
        evaluate(LoadedModel(other, demo.tokenizer, "demo"), resume=folder)
    evaluate(demo, resume=folder)
    assert open_run(folder).finished


def test_an_older_run_goes_on_with_a_word(demo: LoadedModel, cut_short: Callable[..., Path]) -> None:
    folder = cut_short(older=True)
    assert "model_hash" not in open_run(folder).settings
    other = copy.deepcopy(demo.model)
    other.model.norm.weight.data[0] += 1  # among the 64 numbers
    with pytest.warns(UserWarning, match="64 numbers"), pytest.raises(OtherSettings, match="fingerprint was"):
        evaluate(LoadedModel(other, demo.tokenizer, "demo"), resume=folder)
    with pytest.warns(UserWarning, match=r"model_hash, config, tokenizer, .*64 numbers"):
        evaluate(demo, resume=folder)
    assert open_run(folder).finished


def reroped(loaded: LoadedModel) -> LoadedModel:
    model = copy.deepcopy(loaded.model)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5e5}
    return LoadedModel(model, loaded.tokenizer, loaded.name)


def with_another_token(loaded: LoadedModel) -> LoadedModel:
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.add_tokens(["wholly new"])
    return LoadedModel(loaded.model, tokenizer, loaded.name)


def with_another_template(loaded: LoadedModel) -> LoadedModel:
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    return LoadedModel(loaded.model, tokenizer, loaded.name)


def that_penalises(loaded: LoadedModel) -> LoadedModel:
    model = copy.deepcopy(loaded.model)
    model.generation_config.repetition_penalty = 1.3
    return LoadedModel(model, loaded.tokenizer, loaded.name)


@pytest.mark.parametrize(
    ("otherwise", "says"),
    [
        (reroped, r"config.rope_parameters.rope_theta was .* and is 500000.0"),
        (with_another_token, "tokenizer.vocabulary"),
        (with_another_template, "tokenizer.chat_template"),
        (that_penalises, r"generation_config.repetition_penalty was .* and is 1.3"),
    ],
)
def test_what_decides_numbers_besides_the_weights_is_compared(
    otherwise: Callable[[LoadedModel], LoadedModel], says: str, demo: LoadedModel, cut_short: Callable[..., Path]
) -> None:
    folder = cut_short()
    with pytest.raises(OtherSettings, match=says):
        evaluate(otherwise(demo), resume=folder)


def test_how_torch_computes_is_compared(demo: LoadedModel, cut_short: Callable[..., Path]) -> None:
    folder = cut_short()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(OtherSettings, match=r"arithmetic.matmul_precision was 'highest' and is 'medium'"):
            evaluate(demo, resume=folder)
    finally:
        torch.set_float32_matmul_precision(before)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(OtherSettings, match=r"autocast was None and is 'bfloat16'"),
    ):
        evaluate(demo, resume=folder)


def test_running_changes_nothing_of_what_is_compared(demo: LoadedModel, tmp_path: Path) -> None:
    """lm-eval gives tokenizers a token to pad with, or adds one."""
    tokenizer = copy.deepcopy(demo.tokenizer)
    tokenizer.pad_token = None
    loaded = LoadedModel(copy.deepcopy(demo.model), tokenizer, "demo")
    before = loaded.made_with()
    evaluate(loaded, activation_save_dir=tmp_path)
    assert tokenizer.pad_token is not None
    tokenizer("padded", padding="max_length", max_length=9, truncation=True)  # fast tokenizers remember both
    assert loaded.made_with() == before
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert provenance(loaded.model, tokenizer)["tokenizer"] == before.tokenizer


def test_runs_of_other_models_or_edits_are_not_merged(demo: LoadedModel, tmp_path: Path) -> None:
    how: dict[str, Any] = {"activation_save_dir": tmp_path, "layers_to_capture": 0, "positions": "last"}
    one = evaluate_with_activations(demo, "demo_arithmetic", limit=2, **how).folder
    other = copy.deepcopy(demo.model)
    other.lm_head.weight.data[-1, -1] += 1
    two = evaluate_with_activations(LoadedModel(other, demo.tokenizer, "demo"), "demo_facts", limit=2, **how).folder
    with editing(demo.model, Edit.scale("layer_3.z", 0.0, heads=[1])):
        three = evaluate_with_activations(demo, "demo_facts", limit=2, **how).folder
    four = evaluate_with_activations(demo, "demo_facts", limit=2, **how).folder
    with pytest.raises(OtherSettings, match="model_hash '"):
        merge([one, two], tmp_path / "all.h5")
    with pytest.raises(OtherSettings, match="edits None and"):
        merge([one, three], tmp_path / "all.h5")
    assert len(open_run(merge([one, four], tmp_path / "all.h5"))) == 2 + 8


def test_norms_are_of_the_model_that_made_the_run(demo: LoadedModel, tmp_path: Path) -> None:
    from AutomaticEval import strength_of_run

    outcome = evaluate_with_activations(demo, "demo_arithmetic", limit=2, sites="z", activation_save_dir=tmp_path)
    other = copy.deepcopy(demo.model)
    other.model.layers[2].mlp.up_proj.weight.data[-1, -1] += 1
    strength_of_run(open_run(outcome.folder), demo)
    with pytest.raises(StoreError, match="other weights"):
        strength_of_run(open_run(outcome.folder), LoadedModel(other, demo.tokenizer, "demo"))


def test_an_older_sweep_goes_on_with_a_word(demo: LoadedModel, tmp_path: Path) -> None:
    from AutomaticEval.analysis.heads.sweep_folder import SweepFolder
    from AutomaticEval.store.disk.json_files import write_json

    older = {"model": "demo", "weights": sampled_fingerprint(demo.model), "dtype": "torch.float32", "site": "z"}
    write_json(tmp_path / "settings.json", older)
    write_json(tmp_path / "heads_layer_000.json", {})  # a layer that it has computed
    now = {"model": "demo", **demo.made_with().as_dict(), "dtype": "torch.float32", "site": "z"}
    with pytest.warns(UserWarning, match="64 numbers"):
        SweepFolder(tmp_path, now).check_settings()
    with pytest.warns(UserWarning, match="64 numbers"), pytest.raises(OtherSettings, match="fingerprint was"):
        SweepFolder(tmp_path, {**now, "fingerprint": "0"}).check_settings()


def test_code_that_came_with_a_checkpoint_is_seen(tmp_path: Path, tokenizer: Any) -> None:
    found = []
    for number, factor in enumerate((1.0, 1.0, 2.0)):
        folder = tmp_path / f"own_{number}"
        save_with_code(folder, tokenizer, factor)
        loaded = load_model(folder, options=LoadOptions(trust_remote_code=True))
        found.append((loaded.fingerprint(), provenance(loaded.model, None)["code"]))
    assert found[0] == found[1]
    assert found[0][0] == found[2][0]
    assert found[0][1] != found[2][1]


def test_a_run_names_the_hash_of_its_model(tmp_path: Path) -> None:
    loaded = load_model(DEMO_FOLDER)
    with RunWriter(tmp_path, "m", loaded.made_with().as_dict()) as writer:
        assert writer._settings.model_hash == loaded.fingerprint()
        assert writer._settings.fingerprint == sampled_fingerprint(loaded.model)


def test_an_extraction_that_is_there_is_of_the_same_commit_and_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "Tell me."}\n')
    asked = ("extract", "--texts", "t.jsonl", "--model", "demo", "--output", "out", "--layers", "0")
    assert within(*asked, cwd=tmp_path).returncode == 0
    assert "is there already" in within(*asked, cwd=tmp_path).stderr
    done = within(*asked, "--subfolder", "own", cwd=tmp_path)
    assert done.returncode == 2
    assert "load.subfolder was None and is 'own'" in done.stderr
    monkeypatch.setattr("AutomaticEval.capture.texts.many_runs.revision_of", lambda model, load: "abc")
    assert "revision was None and is 'abc'" in within(*asked, cwd=tmp_path).stderr
