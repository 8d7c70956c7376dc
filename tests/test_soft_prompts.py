"""Models with soft prompts: the rows of real tokens are those of hooks written by hand, and no virtual token has one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.models import CONFIGS, build
from helpers.plain_lm_eval import plain
from helpers.raw_hooks import BLOCKS, n_hooks, raw_residuals
from torch import Tensor

from AutomaticEval import evaluate_with_activations, open_run, recompute, score_continuations
from AutomaticEval.capture.generate_arguments import GenerateArguments
from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.capture.texts.forward import padded, read
from AutomaticEval.errors import CaptureError, UnsupportedModel
from AutomaticEval.models.attention import check_patterns
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.edit import Edit
from AutomaticEval.models.editing import editing
from AutomaticEval.models.find_layout import find_layout
from AutomaticEval.models.recording import Kept, capturing
from AutomaticEval.models.weights.active_adapters import using_adapter
from AutomaticEval.selection import Selection
from AutomaticEval.sites import Site

peft = pytest.importorskip("peft", reason="models with adapters need peft: pip install peft")

KINDS = {"prompt": "PromptTuningConfig", "prefix": "PrefixTuningConfig", "p": "PromptEncoderConfig"}
PROMPTS = [[5, 17, 99, 3, 250, 41], [7, 8, 9], [5, 17, 99]]
N_VIRTUAL = 3


def tuned(kind: str, family: str = "llama") -> Any:
    """A tiny model with a random soft prompt."""
    config = getattr(peft, KINDS[kind])(task_type="CAUSAL_LM", num_virtual_tokens=N_VIRTUAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(build(CONFIGS[family]()), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "prompt_encoder" in path:
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return model


@contextmanager
def by_hand(model: Any, family: str) -> Iterator[dict[str, list[Tensor]]]:
    """Key -> what the test's own hooks see in each forward [batch, columns, width], with the columns of virtual tokens."""
    seen: dict[str, list[Tensor]] = {"embeddings": []}
    blocks = model.get_base_model().get_submodule(BLOCKS[family])

    def enters(module: Any, args: Any, kwargs: Any) -> None:
        seen["embeddings"].append((args[0] if args else kwargs["hidden_states"]).clone())

    handles = [blocks[0].register_forward_pre_hook(enters, with_kwargs=True)]
    for layer, block in enumerate(blocks):
        own = seen.setdefault(f"layer_{layer}", [])
        handles.append(
            block.register_forward_hook(
                lambda module, args, out, own=own: own.append((out[0] if isinstance(out, tuple) else out).clone())
            )
        )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def rows_alone(model: Any, family: str, ids: list[int]) -> dict[str, Tensor]:
    """The rows of the real tokens in one forward over one row, with its logits: [pos, width]."""
    with by_hand(model, family) as seen, torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return {**{key: each[0][0, -len(ids) :] for key, each in seen.items()}, "logits": logits[-len(ids) :]}


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_are_those_of_each_prompt_alone(kind: str, family: str, tokenizer: Any) -> None:
    """Prompts of different lengths: padding on the left would move them away from a soft prompt."""
    model = tuned(kind, family)
    before = n_hooks(model)
    for sites, positions, more in (
        ("embed,resid_post", "all", {}),
        ("embed,resid_post,logits", "scored", {}),
        # without a cache peft's prefix tuning fails by itself
        *([("embed,resid_post", "all", {"use_cache": False})] if kind != "prefix" else []),
    ):
        how: Any = GenerateArguments(max_new_tokens=3, more=more) if more else Sampling(max_new_tokens=3)
        loaded = LoadedModel(model, tokenizer, "tuned")
        answers = respond(loaded, PROMPTS, how, Selection.parse(sites, None, positions))
        for ids, answer in zip(PROMPTS, answers, strict=True):
            fed = [*ids, *answer.generated_ids][:-1]
            assert answer.sample is not None
            found = answer.sample.activation_data("m", {})
            assert [fed[each] for each in found["positions"]] == found["token_ids"].tolist()
            expected = rows_alone(model, family, fed)
            for key, rows in found["activations"].items():
                assert_near(rows, expected[key][found["positions"]])
    assert n_hooks(model) == before
    without = raw_residuals(model.get_base_model(), family, PROMPTS[0])["layer_1"]
    assert (rows_alone(model, family, PROMPTS[0])["layer_1"] - without).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_every_site_is_read_and_virtual_columns_are_not(kind: str) -> None:
    """Projections within the blocks, in one forward of two rows, against hooks on these modules."""
    model, ids = tuned(kind), torch.tensor([PROMPTS[1], PROMPTS[2]])
    layout = find_layout(model)
    assert not layout.missing
    sites = {
        Site("z", 1): ("self_attn.o_proj", "in"),
        Site("q", 1): ("self_attn.q_proj", "out"),
        Site("mlp_post", 1): ("mlp.down_proj", "in"),
        Site("mlp_out", 1): ("mlp", "out"),
    }
    seen: dict[str, Tensor] = {}
    handles = []
    for site, (path, end) in sites.items():
        module = model.get_base_model().model.layers[1].get_submodule(path)
        handles.append(
            module.register_forward_hook(
                lambda m, args, out, key=site.key, end=end: seen.update({key: args[0] if end == "in" else out})
            )
        )
    every = lambda first, n: Kept(  # noqa: E731
        torch.arange(2).repeat_interleave(n), torch.arange(first, first + n).repeat(2)
    )
    with torch.no_grad(), capturing(model, layout.pick(sites), layout.embedding, every, 2) as found:
        model(ids)
    for handle in handles:
        handle.remove()
    assert found.fed_ids().tolist() == ids.tolist()
    for key, value in seen.items():
        assert torch.equal(found.rows[key], value[:, -3:].flatten(0, 1)), key


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.filterwarnings("ignore:Position ids are not supported", "ignore:.*is not finished")
def test_a_benchmark_falls_back_to_stock_scores_and_says_so(
    kind: str, tokenizer: Any, own_tasks: str, tmp_path: Any
) -> None:
    """Scores are plain lm-eval's. Rows are those of a forward alone; those of a padded batch that generates are that batch's."""
    model = tuned(kind)
    loaded = LoadedModel(model, tokenizer, "tuned")
    how: Any = {"tokenizer": tokenizer, "include_path": own_tasks, "activation_save_dir": tmp_path, "batch_size": 2}
    how |= {"positions": "all", "sites": "embed,resid_post"}
    expected = plain(loaded, ("twice",), own_tasks, batch_size=2, bootstrap_iters=0)["samples"]["twice"]
    with pytest.warns(UserWarning, match=r"request by request.*tokens of its own"):
        outcome = evaluate_with_activations(model, "twice", **how)
    assert [each["resps"] for each in outcome.samples["twice"]] == [each["resps"] for each in expected]
    run = open_run(outcome.folder)
    for number in range(0, len(run), 3):
        sample = run[number]
        fed = torch.cat([sample["input_ids"].flatten(), sample["generated_ids"].flatten()]).tolist()[:-1]
        alone = rows_alone(model, "llama", fed)
        for key, rows in sample["activations"].items():
            assert_near(torch.as_tensor(rows), alone[key])
    assert not recompute(run, model, 3, tokenizer=tokenizer).different

    with by_hand(model, "llama") as seen:
        outcome = evaluate_with_activations(model, "greedy", scoring="stock", **how)
    run, n_found = open_run(outcome.folder), 0
    batches: list[list[Tensor]] = []
    for value in seen["layer_1"]:  # a forward of more than one real column begins a batch
        batches.append([value]) if value.shape[1] > 1 else batches[-1].append(value)
    assert {len(batch[0]) for batch in batches} == {2, 1}
    joined = [torch.cat(batch, 1) for batch in batches]
    n_before = 0 if kind == "prefix" else N_VIRTUAL
    for number in range(len(run)):
        sample = run[number]
        rows, n_prompt = torch.as_tensor(sample["activations"]["layer_1"]), sample["input_ids"].numel()
        places = [
            value[row, batch[0].shape[1] - n_prompt :][: len(rows)]
            for batch, value in zip(batches, joined, strict=True)
            for row in range(len(value))
            if batch[0].shape[1] - n_before >= n_prompt
        ]
        n_found += any(torch.equal(place, rows) for place in places)
    assert n_found == len(run)


def test_scores_of_continuations_are_those_of_the_last_columns(tokenizer: Any) -> None:
    model, pairs = tuned("prompt"), [([5, 17], [99, 3]), ([5, 17], [250])]
    with pytest.warns(UserWarning, match="tokens of its own"):
        found = score_continuations(pairs, model, tokenizer=tokenizer)
    for (context, continuation), score in zip(pairs, found, strict=True):
        logits = rows_alone(model, "llama", [*context, *continuation[:-1]])["logits"][-len(continuation) :]
        expected = logits.log_softmax(-1)[range(len(continuation)), continuation].sum()
        assert score.logprob == pytest.approx(float(expected), abs=1e-4)


def test_without_its_soft_prompt_the_model_is_its_base(tokenizer: Any) -> None:
    model, ids = tuned("prompt"), torch.tensor(PROMPTS[:1])
    with using_adapter(model, "base") as base, torch.no_grad():
        assert torch.equal(base(ids).logits, model.get_base_model()(ids).logits)
        with editing(base, Edit.scale("layer_0", 2.0)):
            pass
    assert LoadedModel(model, tokenizer, "tuned").context == 128 - N_VIRTUAL
    assert LoadedModel(model.get_base_model(), tokenizer, "base").context == 128


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_read_with_padding_behind_them_only(kind: str) -> None:
    model, layout = tuned(kind), find_layout(tuned(kind))
    rows = read(model, layout, layout.pick([Site("resid_post", 1)]), padded(PROMPTS[:2]))["layer_1"]
    assert_near(rows, torch.cat([rows_alone(model, "llama", ids)["layer_1"] for ids in PROMPTS[:2]]))
    with pytest.raises(UnsupportedModel, match="padded on the left"):
        read(model, layout, layout.pick([Site("embed")]), padded(PROMPTS[:2], "left"))


def test_what_is_not_known_to_be_right_is_refused_by_name() -> None:
    model = tuned("prefix")
    with pytest.raises(UnsupportedModel, match=r"PREFIX_TUNING.*editing"), editing(model, Edit.scale("layer_0", 2.0)):
        pass
    with pytest.raises(UnsupportedModel, match="'pattern'"):
        check_patterns(model, find_layout(model))
    other = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2)
    with pytest.raises(UnsupportedModel, match="MULTITASK_PROMPT_TUNING"):
        find_layout(peft.get_peft_model(build(CONFIGS["llama"]()), other).eval())
    every = lambda first, n: Kept(torch.zeros(n, dtype=torch.long), torch.arange(first, first + n))  # noqa: E731
    model = tuned("prompt")
    layout = find_layout(model)
    recording = capturing(model, layout.pick([Site("embed")]), layout.embedding, every, 1)
    with torch.no_grad(), pytest.raises(CaptureError, match="0 columns of virtual tokens"), recording:
        model.get_base_model()(torch.tensor(PROMPTS[:1]))  # which is no forward of the model that is captured
