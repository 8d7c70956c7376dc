"""Every stored row is the value the model computed for that token: held against raw hooks, HF and an oracle in C."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.places import STORIES, needs_real
from helpers.raw_hooks import FINAL_NORM, n_hooks, raw_residuals

from AutomaticEval.capture.generation import Response, respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.errors import CaptureError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.loading import load_model
from AutomaticEval.selection import Selection

PROMPTS = [[5, 17, 99, 3, 250, 41, 7], [12, 13], [300, 8, 8, 120, 77], [64]]
FP32 = {"atol": 1e-5, "rtol": 1e-5}
ALL = Selection.parse()


def sample_of(response: Response) -> Any:
    assert response.sample is not None
    return response.sample


def rows_of(response: Response) -> dict[str, torch.Tensor]:
    return sample_of(response).activation_data("m", {})["activations"]


def assert_equals_raw_hooks(loaded: LoadedModel, family: str, response: Response) -> None:
    sample = sample_of(response)
    sequence = [*sample.input_ids, *sample.generated_ids]
    raw = raw_residuals(loaded.model, family, sequence[:-1])
    kept = rows_of(response)
    assert kept.keys() == raw.keys()
    for key in raw:
        assert kept[key].shape == (len(sequence) - 1, loaded.model.config.hidden_size)
        torch.testing.assert_close(kept[key], raw[key], **FP32)


def test_one_prompt_equals_raw_hooks(tiny: LoadedModel, family: str) -> None:
    (response,) = respond(tiny, [PROMPTS[0]], Sampling(max_new_tokens=9), ALL)
    assert_equals_raw_hooks(tiny, family, response)


def test_left_padded_batch_equals_raw_hooks_row_by_row(tiny: LoadedModel, family: str) -> None:
    for response in respond(tiny, PROMPTS, Sampling(max_new_tokens=9), ALL):
        assert_equals_raw_hooks(tiny, family, response)


def test_rows_are_cut_at_their_own_early_stop(tiny: LoadedModel, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row stops early because one of its tokens is made an end token; the other goes on."""
    free = respond(tiny, PROMPTS, Sampling(max_new_tokens=12), ALL)
    for end in {token for response in free for token in sample_of(response).generated_ids[1:-2]}:
        monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", end)
        stopped = respond(tiny, PROMPTS, Sampling(max_new_tokens=12), ALL)
        lengths = [len(sample_of(response).generated_ids) for response in stopped]
        if len(set(lengths)) > 1:
            break
    assert min(lengths) < max(lengths), "no end token stops one row before another"
    for response, unstopped in zip(stopped, free, strict=True):
        own = sample_of(response).generated_ids
        assert list(own) == list(sample_of(unstopped).generated_ids[: len(own)])
        assert end not in own[:-1]
        assert_equals_raw_hooks(tiny, family, response)


def test_chunked_prefill_changes_nothing(tiny: LoadedModel, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = respond(tiny, PROMPTS[:1], Sampling(max_new_tokens=6), ALL)
    monkeypatch.setattr(tiny.model.generation_config, "prefill_chunk_size", 3)
    chunked = respond(tiny, PROMPTS[:1], Sampling(max_new_tokens=6), ALL)
    assert chunked[0].text == whole[0].text
    assert_equals_raw_hooks(tiny, family, chunked[0])


def test_permuted_batch_gives_permuted_rows(tiny: LoadedModel) -> None:
    order = [2, 0, 3, 1]
    straight = respond(tiny, PROMPTS, Sampling(max_new_tokens=7), ALL)
    permuted = respond(tiny, [PROMPTS[i] for i in order], Sampling(max_new_tokens=7), ALL)
    for place, origin in enumerate(order):
        assert permuted[place].text == straight[origin].text
        for key, rows in rows_of(permuted[place]).items():
            torch.testing.assert_close(rows, rows_of(straight[origin])[key], **FP32)


def test_positions_are_prompt_plus_response_less_one_and_tokens_align(tiny: LoadedModel) -> None:
    for prompt, response in zip(PROMPTS, respond(tiny, PROMPTS, Sampling(max_new_tokens=8), ALL), strict=True):
        data = sample_of(response).activation_data("m", {})
        sequence = [*prompt, *data["generated_ids"].tolist()]
        assert data["input_ids"].tolist() == [prompt]
        assert data["token_ids"].tolist() == sequence[:-1]
        assert data["tokens"] == tiny.tokenizer.convert_ids_to_tokens(sequence[:-1])
        assert data["positions"].tolist() == list(range(len(sequence) - 1))


@pytest.mark.parametrize(
    "positions", ["prompt", "response", "scored", "last", "prompt[-1:]", "2:5", "::2", "response[1:3]"]
)
def test_chosen_positions_are_the_same_rows_of_all(tiny: LoadedModel, positions: str) -> None:
    whole = respond(tiny, PROMPTS, Sampling(max_new_tokens=6), ALL)
    chosen = Selection.parse(positions=positions)
    for full, part in zip(whole, respond(tiny, PROMPTS, Sampling(max_new_tokens=6), chosen), strict=True):
        sample = sample_of(part)
        wanted = list(chosen.positions.resolve(len(sample.input_ids), len(sample.generated_ids)))
        assert sample.activation_data("m", {})["positions"].tolist() == wanted
        for key, rows in rows_of(part).items():
            assert torch.equal(rows, rows_of(full)[key][wanted])


def test_embeddings_and_layers_equal_hidden_states(tiny: LoadedModel) -> None:
    (response,) = respond(tiny, PROMPTS[:1], Sampling(max_new_tokens=5), Selection.parse("embed,resid_post,final_norm"))
    fed = sample_of(response).activation_data("m", {})["token_ids"][None]
    before = n_hooks(tiny.model)
    with torch.no_grad():
        states = tiny.model(fed, output_hidden_states=True).hidden_states
    assert n_hooks(tiny.model) >= before  # HF installs hooks of its own, for good
    kept = rows_of(response)
    torch.testing.assert_close(kept["embeddings"], states[0][0], **FP32)
    last = len(states) - 2
    for layer in range(last):
        torch.testing.assert_close(kept[f"layer_{layer}"], states[layer + 1][0], **FP32)
    torch.testing.assert_close(kept["final_norm"], states[-1][0], **FP32)
    assert not torch.allclose(kept[f"layer_{last}"], states[-1][0], atol=1e-2)


def test_last_layer_is_what_the_final_norm_receives(tiny: LoadedModel, family: str) -> None:
    (response,) = respond(tiny, PROMPTS[:1], Sampling(max_new_tokens=5), Selection.parse("resid_post,final_norm", -1))
    kept = rows_of(response)
    (last,) = (key for key in kept if key.startswith("layer_"))
    with torch.no_grad():
        normed = tiny.model.get_submodule(FINAL_NORM[family])(kept[last])
    torch.testing.assert_close(normed, kept["final_norm"], **FP32)


def test_scored_logits_choose_the_response(tiny: LoadedModel) -> None:
    for response in respond(tiny, PROMPTS, Sampling(max_new_tokens=6), Selection.parse("logits", positions="scored")):
        assert rows_of(response)["logits"].argmax(-1).tolist() == list(sample_of(response).generated_ids)


def test_logits_of_the_prompt_are_refused(tiny: LoadedModel, same_hooks_after: Callable[[Any], None]) -> None:
    same_hooks_after(tiny.model)
    with pytest.raises(CaptureError, match="scored"):
        respond(tiny, PROMPTS, Sampling(max_new_tokens=2), Selection.parse("logits"))


def test_no_hook_is_left_after_capture_or_failure(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, same_hooks_after: Callable[[Any], None]
) -> None:
    same_hooks_after(tiny.model)
    respond(tiny, PROMPTS, Sampling(max_new_tokens=2), Selection.parse("embed,resid_post,z,mlp_post"))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(tiny.model, "_update_model_kwargs_for_generation", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        respond(tiny, PROMPTS, Sampling(max_new_tokens=4), ALL)


def test_beam_search_is_refused(tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams reorder rows, so that what was fed is not the answer's sequence."""
    kwargs = Sampling.kwargs

    def beams(self: Sampling) -> dict[str, Any]:
        return {**kwargs(self), "num_beams": 3}

    monkeypatch.setattr(Sampling, "kwargs", beams)
    with pytest.raises(CaptureError, match="Beam search"):
        respond(tiny_llama, [PROMPTS[0]], Sampling(max_new_tokens=8), ALL)


@pytest.mark.parametrize("positions", ["all", "::2"])
def test_rows_are_copies_of_what_the_model_changes_in_place(tiny_llama: LoadedModel, positions: str) -> None:
    seen: list[torch.Tensor] = []

    def spoil(module: Any, args: Any) -> None:
        seen.append(args[0][0].clone())
        args[0].add_(1)

    handle = tiny_llama.model.model.layers[1].input_layernorm.register_forward_pre_hook(spoil)
    try:
        chosen = Selection.parse("resid_post", 0, positions)
        (response,) = respond(tiny_llama, [PROMPTS[0]], Sampling(max_new_tokens=4), chosen)
    finally:
        handle.remove()
    step = 2 if positions == "::2" else 1
    assert torch.equal(rows_of(response)["layer_0"], torch.cat(seen)[::step])


def test_bfloat16_rows_stay_bfloat16(tiny_llama: LoadedModel) -> None:
    from helpers.models import CONFIGS, build

    loaded = LoadedModel(build(CONFIGS["llama"](), torch.bfloat16), tiny_llama.tokenizer, "bf16")
    (response,) = respond(loaded, PROMPTS[:1], Sampling(max_new_tokens=4), ALL)
    assert {rows.dtype for rows in rows_of(response).values()} == {torch.bfloat16}


@needs_real
def test_logits_rebuilt_from_the_last_layer_equal_an_independent_implementation() -> None:
    """stories260K: the oracle's logits, keys and values come from a C program that shares no code with transformers."""
    loaded = load_model(STORIES)
    oracle = np.load(STORIES / "oracle_runc.npz")
    ids = oracle["input_ids"].tolist()
    selection = Selection.parse("resid_post,v", positions=f":{len(ids)}")
    (response,) = respond(loaded, [ids], Sampling(max_new_tokens=2), selection)
    kept = rows_of(response)
    with torch.no_grad():
        logits = loaded.model.lm_head(loaded.model.model.norm(kept["layer_4"]))
    np.testing.assert_allclose(logits.numpy(), oracle["logits"], atol=5e-5)
    for layer in range(5):
        values = kept[f"layer_{layer}.v"].view(len(ids), 4, 8).transpose(0, 1)  # [kv_head, pos, d_head]
        np.testing.assert_allclose(values.numpy(), oracle["values"][layer], atol=1e-5)


@needs_real
def test_two_hundred_greedy_tokens_are_the_same_with_capture() -> None:
    loaded = load_model(STORIES)
    ids = loaded.tokenizer("Once upon a time, there was a little girl")["input_ids"]
    sampling = Sampling(max_new_tokens=200)
    (plain,), (captured,) = respond(loaded, [ids], sampling), respond(loaded, [ids], sampling, ALL)
    assert captured.text == plain.text
    with torch.no_grad():
        own = loaded.model.generate(torch.tensor([ids]), max_new_tokens=200, do_sample=False)[0, len(ids) :].tolist()
    assert list(sample_of(captured).generated_ids) == own[: len(sample_of(captured).generated_ids)]
    assert len(sample_of(captured).generated_ids) == 200
