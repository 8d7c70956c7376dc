"""Image-text models are loaded by their folder and asked by text alone: their rows are those of hooks that the tests put on the language model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.models import CONFIGS, build
from helpers.tasks import loglikelihoods
from lm_eval.models.huggingface import HFLM
from safetensors.torch import save_file

from AutomaticEval import HFActivations, generate_inference_with_activations, score_continuations
from AutomaticEval.capture.prompt import encode
from AutomaticEval.errors import ModelUnavailable, SiteUnavailable, UnsupportedModel
from AutomaticEval.evaluation.harness.tokens import EncodingHFLM
from AutomaticEval.models.checkpoint.load_options import LoadOptions
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.random_weights import random_model
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.loading import load_model

TEXT: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
QWEN_TEXT = {**TEXT, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
QWEN: dict[str, Any] = {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
QWEN_IDS = {"image_token_id": 399, "video_token_id": 398, "vision_start_token_id": 397, "vision_end_token_id": 396}
IMAGE_IDS = {"image_token_index": 399, "boi_token_index": 398, "eoi_token_index": 397}
SQUARE = {"image_size": [28, 28], "patch_size": [14, 14]}
LLAMA4_TEXT = {
    **TEXT,
    "intermediate_size_mlp": 64,
    "num_local_experts": 2,
    "moe_layers": [1],
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 64,
    "rope_parameters": ROPE,
}
LLAMA4_VISION = {
    **VISION,
    "intermediate_size": 64,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "pixel_shuffle_ratio": 0.5,
    "rope_parameters": ROPE,
}
MLLAMA_TEXT = {**TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1], "rope_parameters": ROPE}
MLLAMA_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_global_layers": 1,
    "attention_heads": 2,
    "max_num_tiles": 1,
    "intermediate_size": 32,
    "vision_output_dim": 32,
    "image_size": 28,
    "patch_size": 14,
    "intermediate_layers_indices": [0],
    "supported_aspect_ratios": [[1, 1]],
}
FAMILIES: dict[str, tuple[Callable[[], Any], str, str]] = {
    # name: (config, the path of the language model that hooks are put on, the class that is loaded)
    "llava": (
        lambda: hf.LlavaConfig(
            text_config=hf.LlamaConfig(**TEXT),
            vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=16),
            image_token_index=399,
        ),
        *("model.language_model", "LlavaForConditionalGeneration"),
    ),
    "qwen2-vl": (
        lambda: hf.Qwen2VLConfig(
            text_config=QWEN_TEXT,
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
            **QWEN_IDS,
        ),
        *("model.language_model", "Qwen2VLForConditionalGeneration"),
    ),
    "qwen2.5-vl": (
        lambda: hf.Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=QWEN, **QWEN_IDS),
        *("model.language_model", "Qwen2_5_VLForConditionalGeneration"),
    ),
    "qwen3-vl": (
        lambda: hf.Qwen3VLConfig(
            text_config=QWEN_TEXT,
            vision_config={**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **QWEN_IDS,
        ),
        *("model.language_model", "Qwen3VLForConditionalGeneration"),
    ),
    "gemma3": (
        lambda: hf.Gemma3Config(
            text_config={**TEXT, "sliding_window": 64}, vision_config=VISION, mm_tokens_per_image=4, **IMAGE_IDS
        ),
        *("model.language_model", "Gemma3ForConditionalGeneration"),
    ),
    "mistral3": (
        lambda: hf.Mistral3Config(
            vision_config=hf.PixtralVisionConfig(**VISION), text_config=hf.MistralConfig(**TEXT), image_token_index=399
        ),
        *("model.language_model", "Mistral3ForConditionalGeneration"),
    ),
    "smolvlm": (
        lambda: hf.SmolVLMConfig(image_token_id=399, vision_config=VISION, text_config=hf.LlamaConfig(**TEXT)),
        *("model.text_model", "SmolVLMForConditionalGeneration"),
    ),
    "internvl": (
        lambda: hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(**{**VISION, **SQUARE}),
            text_config=hf.Qwen2Config(**TEXT),
            image_token_id=399,
        ),
        *("model.language_model", "InternVLForConditionalGeneration"),
    ),
    "llama4": (
        lambda: hf.Llama4Config(vision_config=LLAMA4_VISION, text_config=LLAMA4_TEXT, **IMAGE_IDS),
        *("language_model.model", "Llama4ForCausalLM"),
    ),
    "mllama": (
        lambda: hf.MllamaConfig(vision_config=MLLAMA_VISION, text_config=MLLAMA_TEXT, image_token_index=399),
        *("model.language_model", "MllamaForCausalLM"),
    ),
}
PROMPT, N_NEW = "What is the capital of France", 4


def saved(config: Any, folder: Path, tokenizer: Any) -> Any:
    """A random image-text model, written into a folder with a tokenizer."""
    torch.manual_seed(0)
    for each in (config, config.get_text_config()):
        each.bos_token_id = each.eos_token_id = each.pad_token_id = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hf.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """(name, model as it was made, its folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, saved(FAMILIES[request.param][0](), folder, tokenizer), folder


def by_hand(model: Any, path: str, ids: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What enters and leaves each block of the language model that runs, and the logits: one unpadded forward without a cache."""
    rows: dict[str, torch.Tensor] = {}
    handles = []
    for number, block in enumerate(model.get_submodule(path).layers):

        def hook(module: Any, args: Any, kwargs: Any, out: Any, number: int = number) -> None:
            rows[f"layer_{number}.resid_pre"] = (args[0] if args else kwargs["hidden_states"])[0].clone()
            rows[f"layer_{number}"] = (out[0] if isinstance(out, tuple) else out).reshape(1, len(ids), -1)[0].clone()

        handles.append(block.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return rows, logits


def assert_same(found: Any, expected: Any) -> None:
    size = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, atol=1e-5 * size, rtol=0)


def test_rows_of_a_folder_are_those_of_hooks_by_hand(checkpoint: Any) -> None:
    name, made, folder = checkpoint
    loaded = load_model(str(folder))
    assert type(loaded.model).__name__ == FAMILIES[name][2]
    assert loaded.context == 128
    crossing = [1] if name == "mllama" else []
    running = [layer for layer in range(loaded.layout.n_layers) if layer not in crossing]
    with_layers: dict[str, Any] = {"sites": "resid_pre,resid_post", "layers_to_capture": running}
    _, data = generate_inference_with_activations(
        PROMPT, str(folder), max_new_tokens=N_NEW, apply_chat_template=False, positions="all", **with_layers
    )
    fed = list(data["token_ids"])
    expected, logits = by_hand(made, FAMILIES[name][1], fed)
    assert set(data["activations"]) == set(expected)
    for key, rows in expected.items():
        assert_same(data["activations"][key], rows)
    answer = list(data["generated_ids"])
    assert answer == logits[-len(answer) :].argmax(-1).tolist()
    if crossing:
        with pytest.warns(
            UserWarning, match=r"the other layers have none \(its block does not run in a forward over text"
        ):
            _, data = generate_inference_with_activations(PROMPT, str(folder), max_new_tokens=2)
        assert "layer_1" not in data["activations"]
        with pytest.raises(SiteUnavailable, match=r"layer_1: its block does not run in a forward over text"):
            generate_inference_with_activations(PROMPT, str(folder), max_new_tokens=2, layers_to_capture=[1])


def test_scores_of_a_folder_are_those_of_lm_eval_and_by_hand(checkpoint: Any, tmp_path: Path, tokenizer: Any) -> None:
    name, made, folder = checkpoint
    pairs = [("The capital of", " France is Paris"), ("Tell me", " more")]
    sites: dict[str, Any] = {"layers_to_capture": "0", "sites": "resid_post"}
    lm = HFActivations(str(folder), activation_save_dir=tmp_path, batch_size=2, **sites)
    ours = [score for score, _ in lm.loglikelihood(loglikelihoods(pairs), disable_tqdm=True)]
    lm._open.close()
    theirs = HFLM(made, tokenizer=tokenizer, backend="causal", batch_size=2).loglikelihood(loglikelihoods(pairs))
    assert ours == pytest.approx([score for score, _ in theirs], abs=1e-4)
    scored = score_continuations(pairs, str(folder), capture_activations=True, positions="all", **sites)
    for each, score in zip(scored, ours, strict=True):
        rows, logits = by_hand(made, FAMILIES[name][1], [*each.context_ids, *each.continuation_ids][:-1])
        logprobs = logits.log_softmax(-1)[-len(each.continuation_ids) :]
        by_token = logprobs.gather(1, torch.tensor(each.continuation_ids)[:, None])
        assert each.logprob == pytest.approx(score, abs=1e-4) == pytest.approx(float(by_token.sum()), abs=1e-4)
        assert each.activation_data is not None
        assert_same(each.activation_data["activations"]["layer_0"], rows["layer_0"])


# What cannot be asked by text


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            lambda: hf.PaliGemmaConfig(
                vision_config={**VISION, "projection_dim": 32, "vision_use_head": False},
                text_config=hf.GemmaConfig(**TEXT),
                image_token_index=399,
                projection_dim=32,
            ),
            r"a token of PaliGemma.* attends to the tokens behind it \(use_bidirectional_attention=True\)",
        ),
        (
            lambda: hf.Blip2Config(
                vision_config=VISION,
                qformer_config={"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
                | {"intermediate_size": 32, "encoder_hidden_size": 16},
                text_config={
                    "model_type": "opt",
                    "vocab_size": 400,
                    "hidden_size": 32,
                    "word_embed_proj_dim": 32,
                    "ffn_dim": 64,
                }
                | {"num_hidden_layers": 2, "num_attention_heads": 4},
                image_token_index=399,
            ),
            "Blip2.* needs pixel_values in every forward",
        ),
    ],
    ids=["paligemma", "blip2"],
)
def test_models_that_need_more_than_text_are_refused(config: Any, says: str, tmp_path: Path, tokenizer: Any) -> None:
    model = saved(config(), tmp_path, tokenizer)
    for door in (lambda: load_model(tmp_path), lambda: load_model(model, tokenizer=tokenizer)):
        with pytest.raises(UnsupportedModel, match=says):
            door()
    with pytest.raises(UnsupportedModel, match=says):
        find_layout(model)


def test_classes_that_write_no_text_are_refused_before_weights_load(tmp_path: Path) -> None:
    hf.ViTConfig(**VISION).save_pretrained(tmp_path / "vit")
    hf.T5Config(d_model=16).save_pretrained(tmp_path / "t5")
    for door in (load_model, lambda name: random_model(name, LoadOptions(), 0)):
        with pytest.raises(
            UnsupportedModel, match=r"model type 'vit'.*neither AutoModelForCausalLM nor AutoModelForIm"
        ):
            door(str(tmp_path / "vit"))
        with pytest.raises(UnsupportedModel, match="encoder-decoder"):
            door(str(tmp_path / "t5"))


def test_encoders_that_are_made_a_decoder_by_their_class_alone_are_refused(tokenizer: Any) -> None:
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    encoder, decoder = (
        hf.AutoModelForCausalLM.from_config(hf.BertConfig(**sizes, intermediate_size=32, is_decoder=is_decoder)).eval()
        for is_decoder in (False, True)
    )
    with pytest.raises(UnsupportedModel, match=r"a token of BertLMHeadModel attends .*\(is_decoder=False\)"):
        load_model(encoder, tokenizer=tokenizer)
    assert load_model(decoder, tokenizer=tokenizer).model is decoder


def test_random_weights_of_an_image_text_folder(tmp_path: Path) -> None:
    FAMILIES["llava"][0]().save_pretrained(tmp_path)
    assert type(random_model(str(tmp_path), LoadOptions(), 0).model).__name__ == "LlavaForConditionalGeneration"


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed, so that Gemma 3n does not lack it")
def test_a_library_that_is_missing_is_named(tmp_path: Path) -> None:
    hf.Gemma3nConfig(architectures=["Gemma3nForConditionalGeneration"]).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelUnavailable, match="needs a library that is not here: TimmWrapperModel requires the timm"):
        load_model(tmp_path)


# Chat templates


def test_chat_templates_that_want_parts_get_them(tokenizer: Any) -> None:
    """The template of image-text models goes over the parts of a content; of a text it would find none, and say nothing."""
    own = hf.AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    own.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
        "{{ part.text }}{% endfor %} {% endfor %}"
    )
    loaded = LoadedModel(build(CONFIGS["llama"]()), own, "own")
    assert own.decode(encode(loaded, "Who?", "Be brief.")) == "system:Be brief. user:Who? "
    lm = EncodingHFLM(loaded, has_stock_batches=False)
    assert lm.apply_chat_template([{"role": "user", "content": "Who?"}]) == "user:Who? "
    own.chat_template = "{% for m in messages %}{{ m.content.upper() }}{% endfor %}"
    assert own.decode(encode(loaded, "Who?", None)) == "WHO?"  # it takes no parts
