"""Any id that a model writes has a string and is stored; odd text loses nothing that was captured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build
from transformers import ByT5Tokenizer, CanineTokenizer, LlamaConfig

from AutomaticEval import (
    evaluate_with_activations,
    generate_inference_with_activations,
    load_activations,
    open_run,
)
from AutomaticEval.capture.vocabulary import text_of, token_strings
from AutomaticEval.samples import Part, Rows, Sample
from AutomaticEval.store.disk.json_text import as_json
from AutomaticEval.store.hdf5.write import write_shard
from AutomaticEval.store.upkeep.verify import verify
from AutomaticEval.store.writer import RunWriter

PADDED = """
task: padded
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["zz"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def padded(n_tokens: int, n_more: int = 64) -> Any:
    """A model that writes only ids beyond a tokenizer of n_tokens."""
    config = LlamaConfig(
        vocab_size=n_tokens + n_more,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    model = build(config)
    ends = torch.nn.Linear(32, n_tokens + n_more, bias=True)  # the bias leaves nothing but the padded ids
    ends.weight.data = model.lm_head.weight.data
    ends.bias.data = torch.where(torch.arange(n_tokens + n_more) < n_tokens, -1e4, 0.0)
    model.lm_head = ends.eval()
    return model


class BytesTokens:
    """Names its tokens by their bytes, as tokenizers over tiktoken do, and is asked one id after the other."""

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        names = [b"Paris", " é".encode(), b"\xe2\x80", b"a\0"]
        return [names[each] for each in ids] if isinstance(ids, list) else names[ids]


@pytest.mark.parametrize(
    ("made", "ids", "strings"),
    [
        (BytesTokens, [0, 1, 2, 3], ["Paris", " é", "\\xe2\\x80", "a\0"]),
        (BytesTokens, [2, 4], ["\\xe2\\x80", "<|id:4|>"]),  # raises IndexError for the whole list
        (CanineTokenizer, [97, 0xD800, 0x110000], ["a", "\ud800", "<|id:1114112|>"]),
        (ByT5Tokenizer, [100, -1], ["a", "<|id:-1|>"]),
    ],
)
def test_every_id_has_a_string_in_every_tokenizer(made: Any, ids: list[int], strings: list[str]) -> None:
    assert token_strings(made(), ids) == strings


def test_ids_outside_a_fast_tokenizer_are_named_by_their_number(tokenizer: Any) -> None:
    beyond, huge = len(tokenizer), 2**40
    assert token_strings(tokenizer, [5, beyond, -1, huge]) == [
        tokenizer.convert_ids_to_tokens(5),
        f"<|id:{beyond}|>",
        "<|id:-1|>",
        f"<|id:{huge}|>",
    ]
    assert token_strings(tokenizer, []) == []


def test_text_leaves_out_ids_that_a_tokenizer_fails_over() -> None:
    letters = ByT5Tokenizer()
    with pytest.raises(ValueError, match="bytes"):
        letters.decode([100, 500, 101])
    assert text_of(letters, [100, 500, 101, -7]) == letters.decode([100, 101])


def test_padded_ids_are_answered_saved_and_read(tokenizer: Any, tmp_path: Path) -> None:
    model = padded(len(tokenizer))
    text, data = generate_inference_with_activations(
        "What is red?", model, tmp_path / "a.h5", tokenizer=tokenizer, max_new_tokens=4
    )
    assert text == ""
    written = data["generated_ids"].tolist()
    assert min(written) >= len(tokenizer)
    assert data["tokens"][-3:] == [f"<|id:{each}|>" for each in written[:-1]]
    saved = load_activations(tmp_path / "a.h5")
    assert saved["tokens"] == data["tokens"]
    for key, rows in data["activations"].items():
        assert torch.equal(saved["activations"][key], rows)


def test_padded_ids_are_answered_where_the_tokenizer_cannot_decode_them(tmp_path: Path) -> None:
    letters = ByT5Tokenizer()
    text, data = generate_inference_with_activations(
        "What is red?", padded(len(letters)), tmp_path / "a.h5", tokenizer=letters, max_new_tokens=4
    )
    assert text == ""
    assert load_activations(tmp_path / "a.h5")["tokens"] == data["tokens"]


def test_padded_ids_in_a_benchmark_finish_it(tokenizer: Any, tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join(json.dumps({"q": f"What is {n}?", "a": "x"}) for n in range(6)))
    (tmp_path / "padded.yaml").write_text(PADDED.replace("FILE", str(asked)))
    outcome = evaluate_with_activations(
        padded(len(tokenizer)),
        "padded",
        tokenizer=tokenizer,
        include_path=tmp_path,
        activation_save_dir=tmp_path / "to",
    )
    run = open_run(outcome.folder or "")
    assert len(run) == 6
    for sample in run:
        assert sample["tokens"][-1] == f"<|id:{int(sample['generated_ids'][-2])}|>"
    assert verify(outcome.folder or tmp_path) == []


def sample(**fields: Any) -> Sample:
    rows = Rows([1, 2], ["\ud800", "a\0"], [0, 1], {"layer_0": torch.ones(2, 4)})
    columns = {
        "prompt": "p",
        "response": "r",
        "timestamp": "t",
        "n_prompt_tokens": 2,
        "batch_rows": 1,
        "batch_columns": 2,
    }
    return Sample({**columns, **fields}, [1, 2], [], [Part(rows, [0, 1])])


@pytest.mark.parametrize(
    ("field", "given", "read"),
    [
        ("prompt", "\ud83d half a pair, and \0", "\ud83d half a pair, and \0"),
        ("task", 7, "7"),
        ("task", np.str_("of numpy"), "of numpy"),
        ("target", np.arange(3), [0, 1, 2]),
        ("target", torch.tensor([0.5, 1.0]), [0.5, 1.0]),
        ("prediction", {("a", 1): {2: "x"}}, {"('a', 1)": {"2": "x"}}),
        ("metrics", {"none": {"acc": np.float64(0.5), "seen": {1}}}, {"none": {"acc": 0.5, "seen": "{1}"}}),
    ],
)
def test_odd_values_of_a_column_are_stored(field: str, given: Any, read: Any, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.h5", [sample(**{field: given})], "m", {})
    found = load_activations(tmp_path / "a.h5")
    assert found[field] == read
    assert found["tokens"] == ["\ud800", "a\0"]
    assert verify(tmp_path / "a.h5") == []


def test_value_that_holds_itself_is_its_text() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert json.loads(as_json(loop)) == "[[...]]"


def test_model_and_settings_of_any_name_are_stored_and_resumed(tmp_path: Path) -> None:
    name = os.fsdecode(b"/models/\xe9t\xe9")  # a file name that is no UTF-8
    settings = {"generation_config": {"sequence_bias": {(5, 6): -1.0}}}
    with RunWriter(tmp_path / "run", name, settings) as writer:
        writer.add([sample()])
    with RunWriter(tmp_path / "run", name, settings, resume=True) as writer:
        writer.finish()
    run = open_run(tmp_path / "run")
    assert run.model == "\\udce9t\\udce9"
    assert run.settings["generation_config"] == {"sequence_bias": {"(5, 6)": -1.0}}
    assert verify(tmp_path / "run") == []
