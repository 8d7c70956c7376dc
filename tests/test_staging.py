"""Rows from a GPU: what a hook saw arrives, in its place, whatever is overwritten meanwhile and however it is cut on the way.

Without a GPU the CPU stands in for one, with a ring that copies as late as it may (`helpers/staged.py`).
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import pytest
import torch
from helpers.models import CONFIGS, build
from helpers.raw_hooks import raw_residuals
from helpers.samples import same
from helpers.staged import CPU, stage_the_cpu
from torch import Tensor

from AutomaticEval.capture.generation import respond
from AutomaticEval.capture.sampling import Sampling
from AutomaticEval.errors import CaptureError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.recording import Kept, capturing
from AutomaticEval.models.transfer import kept_rows, references
from AutomaticEval.models.transfer.ring import SIZE_VARIABLE, Ring, Sending, wait_until_sent
from AutomaticEval.selection import Selection

PROMPTS = [[5, 7, 11, 13, 17, 19, 23], [3, 4], [9, 8, 7, 6, 5]]
EVERY_KIND = "embed,resid_post,attn_out,z,mlp_post,head_result_norm,final_norm,logits"


# The ring.


def test_all_bytes_land_once_and_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    late = stage_the_cpu(monkeypatch, 4096, 1024)
    sendings = [Sending(late) for _ in range(3)]
    sent = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in (0, 1, 1023, 1024, 1025, 9000)]
    landed = {(s, n): torch.zeros_like(values) for s in range(3) for n, values in enumerate(sent)}
    counts = {each: torch.zeros_like(values) for each, values in landed.items()}

    def send(number: int) -> None:
        for n, values in enumerate(sent):

            def land(part: Tensor, first: int, n: int = n) -> None:
                landed[number, n][first : first + len(part)] = part
                counts[number, n][first : first + len(part)] += 1

            sendings[number].send(values, land)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for sending in sendings:
        sending.wait()
    for (_, n), values in landed.items():
        assert torch.equal(values, sent[n])
    assert all(bool((each == 1).all()) for each in counts.values())
    assert late.n_made == 4  # of 1 KiB, however much was sent


def test_a_chunk_holds_whole_units(monkeypatch: pytest.MonkeyPatch) -> None:
    late = stage_the_cpu(monkeypatch, 4096, 1024)
    lengths: list[int] = []
    sending = Sending(late)
    sending.send(torch.zeros(3000, dtype=torch.uint8), lambda part, first: lengths.append(len(part)), 300)
    sending.wait()
    assert sorted(lengths) == [300, 900, 900, 900]


def test_a_landing_that_fails_raises_in_its_sender_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    late = stage_the_cpu(monkeypatch)
    bad, good = Sending(late), Sending(late)

    def fail(part: Tensor, first: int) -> None:
        raise MemoryError("no room")

    for _ in range(9):  # more chunks than there are
        with suppress(CaptureError):
            bad.send(torch.zeros(100, dtype=torch.uint8), fail)
    with pytest.raises(CaptureError, match="could not be copied from cpu to memory: MemoryError"):
        bad.wait()
    with pytest.raises(CaptureError, match="no room"):
        bad.send(torch.zeros(1, dtype=torch.uint8), fail)
    landed = torch.zeros(5000, dtype=torch.uint8)
    values = torch.ones(5000, dtype=torch.uint8)

    def land(part: Tensor, first: int) -> None:
        landed[first : first + len(part)] = part

    good.send(values, land)
    wait_until_sent()
    assert torch.equal(landed, values)
    assert late.n_made == 4


def test_an_interrupt_while_a_chunk_is_handed_on_leaves_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    late = stage_the_cpu(monkeypatch)
    sending = Sending(late)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(late._threads, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sending.send(torch.zeros(10, dtype=torch.uint8), lambda *_: None)
    wait_until_sent()
    with pytest.raises(CaptureError, match="KeyboardInterrupt"):
        sending.wait()
    landed = torch.zeros(9000, dtype=torch.uint8)
    again = Sending(late)

    def land(part: Tensor, first: int) -> None:
        landed[first : first + len(part)] = part

    again.send(torch.ones(9000, dtype=torch.uint8), land)
    again.wait()
    assert bool(landed.all())


def test_the_size_of_a_ring_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIZE_VARIABLE, "3")
    assert len(Ring(CPU, chunk_bytes=1 << 20)._free) == 3
    monkeypatch.setenv(SIZE_VARIABLE, "much")
    with pytest.raises(CaptureError, match="AUTOMATICEVAL_PINNED_MB is 'much'"):
        Ring(CPU)


# Recordings.


def kept_of(loaded: LoadedModel, selection: Selection, n_new: int = 6) -> list[dict[str, Any]]:
    answers = respond(loaded, PROMPTS, Sampling(max_new_tokens=n_new), selection)
    return [answer.sample.activation_data("m", {}) for answer in answers if answer.sample is not None]


def first_prompt_of(loaded: LoadedModel) -> tuple[Any, ...]:
    """The arguments of `capturing` for one forward of the first prompt, of which every position is kept."""
    layout, n = loaded.layout, len(PROMPTS[0])
    kept = Kept(torch.zeros(n, dtype=torch.long), torch.arange(n))
    taps = layout.pick(Selection.parse().sites(layout.n_layers))
    return loaded.model, taps, layout.embedding, lambda *_: kept, 1


LIMITS = {
    "as it is": {},
    "layer by layer": {"MOST_REFERENCED": 1},
    "each step alone": {"MOST_PACKED": 1},
    "little room": {"FEWEST_STEPS": 1, "MOST_STEPS": 2},
}


@pytest.mark.parametrize("limits", list(LIMITS))
@pytest.mark.parametrize("positions", ["all", "response", "scored", "prompt[-2:]", "all[3:]"])
def test_staged_rows_are_the_same_bit_for_bit(
    limits: str, positions: str, tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = EVERY_KIND if positions in ("response", "scored") else EVERY_KIND.replace(",logits", "")
    selection = Selection.parse(kinds, positions=positions)
    plain = kept_of(tiny_llama, selection)
    stage_the_cpu(monkeypatch)
    for name, value in LIMITS[limits].items():
        monkeypatch.setattr(kept_rows, name, value)
    for _ in range(2):  # first with copies at the hooks, then with references
        for one, other in zip(kept_of(tiny_llama, selection), plain, strict=True):
            assert one["positions"].tolist() == other["positions"].tolist()
            assert same(one["activations"], other["activations"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_staged_rows_of_every_family_and_dtype(dtype: str, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = Selection.parse("embed,resid_post,z,mlp_out", store_dtype=dtype)
    plain = kept_of(tiny, selection)
    stage_the_cpu(monkeypatch)
    for _ in range(2):
        for one, other in zip(kept_of(tiny, selection), plain, strict=True):
            assert same(one["activations"], other["activations"])


def test_no_chunk_is_made_while_a_model_runs(tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    late = stage_the_cpu(monkeypatch)
    for n_new in (3, 40):
        kept_of(tiny_llama, Selection.parse(EVERY_KIND.replace(",logits", "")), n_new)
    assert late.n_made == 4


def test_what_a_device_keeps_alive_is_bounded(tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The references of a forward never hold more than the bound and one value more."""
    stage_the_cpu(monkeypatch)
    kept_of(tiny_llama, Selection.parse())
    sizes: list[int] = []
    see = references.References.see

    def noted(self: references.References, *args: Any, **how: Any) -> None:
        see(self, *args, **how)
        sizes.append(self.n_bytes)

    monkeypatch.setattr(references.References, "see", noted)
    largest = 3 * 7 * 64 * 4  # of one value: 3 rows, 7 columns, d_model 64, float32
    monkeypatch.setattr(kept_rows, "MOST_REFERENCED", largest)
    kept_of(tiny_llama, Selection.parse())
    assert 0 < max(sizes) <= 2 * largest


class Writing:
    """Puts a module into a model that adds 1 to the residual stream in place, when it is told to."""

    def __init__(self, model: Any) -> None:
        self.is_writing = True
        block = model.model.layers[1]
        forward = block.forward

        def writing(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.is_writing:
                hidden += 1.0
            return forward(hidden, *args, **kwargs)

        block.forward = writing


@pytest.fixture
def writing(tokenizer: Any) -> tuple[LoadedModel, Writing]:
    loaded = LoadedModel(build(CONFIGS["llama"]()), tokenizer, "llama")
    _ = loaded.layout
    return loaded, Writing(loaded.model)


def test_a_model_that_writes_in_place_is_read_as_the_hook_saw_it(
    writing: tuple[LoadedModel, Writing], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, _ = writing
    stage_the_cpu(monkeypatch)
    for _ in range(3):
        for data in kept_of(loaded, Selection.parse()):
            ids = [*data["input_ids"][0].tolist(), *data["generated_ids"].tolist()][:-1]
            for key, rows in raw_residuals(loaded.model, "llama", ids).items():
                torch.testing.assert_close(data["activations"][key], rows, atol=2e-5, rtol=2e-5)


def test_what_is_gathered_before_the_end_of_a_forward_proves_nothing(
    writing: tuple[LoadedModel, Writing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first recording gathers layer by layer, so that nothing was written yet when it compares; the second one gathers at the end."""
    loaded, _ = writing
    stage_the_cpu(monkeypatch)
    with monkeypatch.context() as little:
        little.setattr(kept_rows, "MOST_REFERENCED", 1)
        first = kept_of(loaded, Selection.parse())
    for one, other in zip(first, kept_of(loaded, Selection.parse()), strict=True):
        assert same(one["activations"], other["activations"])


def test_a_model_that_begins_to_write_in_place_is_found_out(
    writing: tuple[LoadedModel, Writing], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, writer = writing
    writer.is_writing = False
    stage_the_cpu(monkeypatch)
    kept_of(loaded, Selection.parse())
    writer.is_writing = True
    with pytest.raises(CaptureError, match=r"changed the input of model\.layers\.1 in place after layer_0 was read"):
        kept_of(loaded, Selection.parse())
    plain = kept_of(loaded, Selection.parse(), 1)  # its prefill is copied at the hook from now on
    ids = plain[0]["input_ids"][0].tolist()
    torch.testing.assert_close(
        plain[0]["activations"]["layer_0"], raw_residuals(loaded.model, "llama", ids)["layer_0"], atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("is_staged", [False, True])
@pytest.mark.parametrize("positions", ["last", "all", "response[:1]"])
def test_samples_keep_about_as_much_memory_as_they_count(
    is_staged: bool, positions: str, tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when one answer of a batch is long and the others end early, and when few of many rows are kept."""
    if is_staged:
        stage_the_cpu(monkeypatch)
    prompts = [[each] * 12 for each in (5, 7, 11, 13, 17, 19)]
    selection = Selection.parse("resid_post", positions=positions)
    for ends in (None, respond(tiny_llama, prompts, Sampling(max_new_tokens=3))[1].generated_ids[:1]):
        monkeypatch.setattr(tiny_llama.model.generation_config, "eos_token_id", ends)
        answers = respond(tiny_llama, prompts, Sampling(max_new_tokens=60), selection)
        rows = [part.rows for answer in answers if answer.sample is not None for part in answer.sample.parts]
        tensors = [tensor for each in rows for tensor in each.activations.values()]
        alive = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        assert sum(alive.values()) <= 2.1 * sum(each.size_bytes for each in rows)


def test_values_of_inference_mode_are_copied_at_the_hook(
    writing: tuple[LoadedModel, Writing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not count their changes, so that a reference would prove nothing."""
    loaded, writer = writing
    writer.is_writing = False
    stage_the_cpu(monkeypatch)
    kept_of(loaded, Selection.parse())
    writer.is_writing = True
    with torch.inference_mode(), capturing(*first_prompt_of(loaded)) as recording:
        loaded.model(torch.tensor([PROMPTS[0]]))
    expected = raw_residuals(loaded.model, "llama", PROMPTS[0])
    torch.testing.assert_close(recording.rows["layer_0"], expected["layer_0"], atol=2e-5, rtol=2e-5)


def test_a_recording_that_does_not_wait_is_waited_for_by_its_reader(
    tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = stage_the_cpu(monkeypatch)
    may_copy = threading.Event()
    monkeypatch.setattr(late, "_wait", lambda copy: (may_copy.wait(20), copy()))
    monkeypatch.setattr(late, "chunk_bytes", 1 << 20)
    late._free = [torch.full((1 << 20,), 0xAB, dtype=torch.uint8) for _ in range(4)]
    with torch.no_grad(), capturing(*first_prompt_of(tiny_llama), waits=False) as recording:
        tiny_llama.model(torch.tensor([PROMPTS[0]]))
    assert late._n_used  # nothing has landed
    may_copy.set()
    expected = raw_residuals(tiny_llama.model, "llama", PROMPTS[0])
    assert torch.equal(recording.take(0, range(7))["layer_1"], expected["layer_1"])


# Steps that are replayed.


@pytest.mark.parametrize("is_staged", [False, True])
@pytest.mark.parametrize("positions", ["all", "response", "all[5:]"])
def test_replayed_steps_land_as_forwards_do(
    is_staged: bool, positions: str, tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward of one column stands in for a replay: its rows are put into a step, and handed over as a replay's are."""
    from AutomaticEval.capture.keeping import keep_of

    if is_staged:
        stage_the_cpu(monkeypatch)
    layout, ids = tiny_llama.layout, torch.randint(1, 400, (2, 9))
    taps = layout.pick(Selection.parse("embed,resid_post,z").sites(layout.n_layers))
    keep = keep_of(Selection.parse(positions=positions).positions, ids[:, :4].tolist(), [0, 0])

    def run(*, replays: bool) -> tuple[Any, int]:
        with torch.no_grad(), capturing(tiny_llama.model, taps, layout.embedding, keep, 2) as recording:
            cache = tiny_llama.model(ids[:, :4], use_cache=True).past_key_values
            for column in range(4, 9):
                one = ids[:, column : column + 1]
                if not replays:
                    tiny_llama.model(one, past_key_values=cache, use_cache=True)
                    continue
                with recording.taping(CPU) as step:
                    tiny_llama.model(one, past_key_values=cache, use_cache=True)
                recording.replayed(step, one)
                for flat in step.flat.values():
                    flat.fill_(float("nan"))  # as the next replay may
            with recording.ignoring():
                tiny_llama.model(ids[:, :3])
        return recording, recording.n_forwards

    (one, n_one), (other, n_other) = run(replays=False), run(replays=True)
    assert n_one == n_other == 6
    assert one.fed_ids().tolist() == other.fed_ids().tolist() == ids.tolist()
    assert same(dict(one.rows), dict(other.rows))
    for row in range(2):
        columns = [4, 5, 6, 7, 8] if positions != "all[5:]" else [5, 6, 7, 8]
        assert same(one.take(row, columns), other.take(row, columns))


def test_a_step_without_a_hook_is_refused(tiny_llama: LoadedModel) -> None:
    layout = tiny_llama.layout
    taps = layout.pick(Selection.parse().sites(layout.n_layers))
    keep = lambda first, n: Kept(torch.zeros(n, dtype=torch.long), torch.arange(first, first + n))  # noqa: E731
    with torch.no_grad(), capturing(tiny_llama.model, taps, layout.embedding, keep, 1) as recording:
        tiny_llama.model(torch.tensor([[1, 2, 3]]))
        with pytest.raises(CaptureError, match="the hook of embeddings was not called"), recording.taping(CPU):
            pass
        with recording.taping(CPU):
            tiny_llama.model(torch.tensor([[4]]))
            with pytest.raises(CaptureError, match="fired twice in one step"):
                tiny_llama.model(torch.tensor([[4]]))


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capture_on_a_gpu_holds_what_its_own_forward_computed(tokenizer: Any, dtype: torch.dtype) -> None:
    """Against transformers' hidden states of the same prompt on the same device."""
    model = build(CONFIGS["llama"](), dtype).to("cuda")
    loaded = LoadedModel(model, tokenizer, "llama")
    ids = tokenizer("The capital of France is a city, and its name is")["input_ids"]
    for _ in range(2):  # first with copies at the hooks, then with references
        (response,) = respond(
            loaded, [ids], Sampling(max_new_tokens=12, generation="eager"), Selection.parse(positions="prompt")
        )
        assert response.sample is not None
        with torch.no_grad():
            states = model(torch.tensor([ids], device="cuda"), output_hidden_states=True).hidden_states
        kept = response.sample.parts[0].rows.activations
        for number, key in enumerate(("embeddings", "layer_0", "layer_1")):
            assert torch.equal(kept[key], states[number][0].cpu()), key


@pytest.mark.gpu
def test_no_pinned_memory_is_made_while_a_model_runs_on_a_gpu(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedModel(build(CONFIGS["llama"]()).to("cuda"), tokenizer, "llama")
    kept_of(loaded, Selection.parse())
    before = torch.cuda.host_memory_stats()["num_host_alloc"]
    for n_new in (3, 40):
        kept_of(loaded, Selection.parse(EVERY_KIND.replace(",logits", "")), n_new)
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == before


@pytest.mark.gpu
@pytest.mark.parametrize("positions", ["all", "scored"])
def test_hooks_and_gathers_never_wait_for_the_gpu(positions: str, tokenizer: Any) -> None:
    """In forwards of prompts and of decode steps, after the first recording of the model, whose comparison waits once at its end."""
    model = build(CONFIGS["llama"]()).to("cuda")
    loaded = LoadedModel(model, tokenizer, "llama")
    kept_of(loaded, Selection.parse(positions=positions))
    layout, ids = loaded.layout, torch.randint(1, 400, (3, 9), device="cuda")
    taps = layout.pick(Selection.parse().sites(layout.n_layers))
    from AutomaticEval.capture.keeping import keep_of

    keep = keep_of(Selection.parse(positions=positions).positions, [[1] * 6] * 3, [0, 0, 0])
    with torch.no_grad():
        model(ids[:, :6])
        recorder = capturing(model, taps, layout.embedding, keep, 3, waits=False)
        with recorder as recording:
            torch.cuda.set_sync_debug_mode("error")
            try:
                cache = model(ids[:, :6], use_cache=True).past_key_values
                for column in range(6, 9):
                    model(ids[:, column : column + 1], past_key_values=cache)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert recording.n_forwards == 4
