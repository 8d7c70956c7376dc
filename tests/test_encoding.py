"""Tokens of prompts and continuations are lm-eval's own, whatever the tokenizer adds, joins or takes apart."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from helpers.models import CONFIGS, build
from helpers.tasks import loglikelihoods
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from AutomaticEval import score_continuations
from AutomaticEval.errors import PromptError
from AutomaticEval.evaluation.harness.model import CapturingHFLM
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.samples import Sample
from AutomaticEval.selection import Selection

TEXTS = [
    "The capital of France is Paris, of course.",
    "x = 1000 apples",
    'He said "no" and left; http://x.org',
    "aaaa bbbb",
]
PAIRS = [
    ("The capital is", " Paris"),
    ("The capital is Par", "is, of course"),
    ("x = 1", "000 apples"),
    ('He said "', '" and left'),
    ("http:", "//x.org"),
    ("ends with spaces  ", "Paris"),
    ("ends with a line\n", "Paris"),
    ("", "Paris is"),
    ("", "<s>Paris"),
    ("<s>The capital is", " Paris"),
    ("</s>The capital is", " Paris"),
    ("aa", "aa"),
    ("naïve caf", "é 東京"),
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def trained(kind: str) -> Tokenizer:
    """byte-level BPE, or pieces that begin with ▁, with bytes for what is in none."""
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=390, max_token_length=5, special_tokens=SPECIAL, initial_alphabet=alphabet
        )
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=390, max_token_length=5, special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
        )
    made.train_from_iterator([*TEXTS, *TEXTS], trainer)
    return made


def tokenizer_of(kind: str, adds: str) -> Any:
    """adds: which of BOS and EOS it puts around a text."""
    made = trained(kind)
    around = {"": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>", "neither": "$A"}[adds]
    if around != "$A":
        ids = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(single=around, pair=f"{around} $B", special_tokens=ids)
    named = {} if adds == "neither" else {"bos_token": "<s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", unk_token="<unk>", pad_token="</s>", **named
    )


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["", "bos", "eos", "both", "neither"])
def loaded(request: pytest.FixtureRequest, kind: str) -> LoadedModel:
    """neither: no special tokens are added, and there is no BOS at all."""
    return LoadedModel(build(CONFIGS["llama"]()), tokenizer_of(kind, request.param), f"{kind} {request.param}")


def test_pairs_have_lm_evals_tokens_and_scores(loaded: LoadedModel) -> None:
    lm = HFLM(loaded.model, tokenizer=loaded.tokenizer)
    handed: list[tuple[list[int], list[int]]] = []
    stock: Callable[..., Any] = lm._loglikelihood_tokens

    def listen(requests: Any, *args: Any, **kwargs: Any) -> Any:
        handed.extend((context, continuation) for _, context, continuation in requests)
        return stock(requests, *args, **kwargs)

    lm._loglikelihood_tokens = listen
    compared = 0
    for pair in PAIRS:
        handed.clear()
        try:
            ((logprob, is_greedy),) = lm.loglikelihood(loglikelihoods([pair]), disable_tqdm=True)
        except (AssertionError, IndexError):  # nothing is left to be scored
            with pytest.raises(PromptError, match="no token of its own"):
                score_continuations([pair], loaded)
            continue
        (found,) = score_continuations([pair], loaded)
        assert (found.context_ids, found.continuation_ids) == handed[0]
        assert (found.logprob, found.is_greedy) == (pytest.approx(logprob, abs=2e-4), is_greedy)
        compared += 1
    assert compared >= len(PAIRS) - 3


def test_random_joins(loaded: LoadedModel) -> None:
    """Texts cut at random places, so that tokens span the join."""
    drawn = random.Random(1)
    lm = HFLM(loaded.model, tokenizer=loaded.tokenizer)
    pairs = []
    for text in TEXTS * 10:
        at = drawn.randrange(1, len(text) - 1)
        pairs.append((text[:at], text[at:]))
    spanned = 0
    for pair in pairs:
        context, continuation = lm._encode_pair(*pair)
        if not continuation:
            continue
        (found,) = score_continuations([pair], loaded)
        assert (found.context_ids, found.continuation_ids) == (context, continuation)
        spanned += lm.tok_encode("".join(pair))[: len(context)] != context
    assert spanned


@pytest.mark.parametrize("scoring", ["tree", "stock"])
def test_prompts_of_a_batch_of_which_some_write_their_bos(loaded: LoadedModel, scoring: str) -> None:
    """lm-eval adds special tokens to all prompts of a batch or to none, as the first has it; over the tree each has what it has alone."""
    prompts = ["<s>The capital is", "x = 1", "<s>He said", "http:", "aaaa bbbb aaaa bbbb aaaa bbbb"]
    how = {"until": ["zebra"], "max_gen_toks": 3}

    def answered(asked: list[str], lm: HFLM) -> list[str]:
        requests = [
            Instance("generate_until", {}, (text, copy.deepcopy(how)), 0, metadata=("t", number, 1))
            for number, text in enumerate(asked)
        ]
        return list(lm.generate_until(requests, disable_tqdm=True))

    def ours(sink: list[Sample]) -> CapturingHFLM:
        return CapturingHFLM(loaded, Selection.parse(None, None, "all"), sink.extend, scoring=scoring, batch_size=5)

    found: list[Sample] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answers = answered(prompts, ours(found))
        if scoring == "stock":
            assert answers == answered(prompts, HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=5))
            return
        for sample in found:
            alone: list[Sample] = []
            assert answered([sample.fields["prompt"]], ours(alone)) == [sample.fields["response"]]
            assert alone[0].input_ids == sample.input_ids
            assert (
                alone[0].input_ids
                == HFLM(loaded.model, tokenizer=loaded.tokenizer)
                .tok_batch_encode([sample.fields["prompt"]])[0][0]
                .tolist()
            )
