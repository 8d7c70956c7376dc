"""Texts as lm-eval feeds them: encoded many at a time, shortly before lm-eval asks for them one by one; cut into windows.

Tokenizers work on all cores when they are given many texts. lm-eval encodes each request as a whole, and its context once for each
choice; here texts that begin alike share the encoding of their beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from AutomaticEval.evaluation.harness.speedups import FOR_LM_EVAL
from AutomaticEval.evaluation.screen import hushed
from AutomaticEval.models.architecture.forward_call import input_device
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.described.plain_module import refuse_plain
from AutomaticEval.models.tokens.chat import rendered
from AutomaticEval.models.tokens.parts import PartEncoder, n_chars_alike

MANY = 512
"""Texts that are encoded together."""


class EncodedAhead:
    """Encodes texts many at a time. texts: in about the order in which they will be asked for."""

    def __init__(self, texts: Iterable[str], encode: Callable[[Sequence[str]], Sequence[list[int]]]) -> None:
        self._coming, self._encode = iter(texts), encode
        self._ready: dict[str, list[int]] = {}

    def get(self, text: str) -> list[int] | None:
        """The tokens of a text, or None when it is not among the next texts."""
        if text not in self._ready:
            coming = list(dict.fromkeys(islice(self._coming, MANY)))
            if coming:
                self._ready = dict(zip(coming, self._encode(coming), strict=True))
        return self._ready.get(text)


class EncodingHFLM(HFLM):  # type: ignore[misc]
    """lm-eval's `hf` model of a model that is loaded, which encodes texts many at a time.

    has_stock_batches: add special tokens to all prompts of a batch or to none, as the first prompt needs them, which is lm-eval's way.
    False: each prompt gets its own. kwargs: HFLM's own.
    """

    def __init__(self, loaded: LoadedModel, *, has_stock_batches: bool, **kwargs: Any) -> None:
        refuse_plain(loaded.model, FOR_LM_EVAL)
        self._ahead = EncodedAhead((), self._encode_many)
        if kwargs.get("backend", "default") == "default":  # lm-eval would warn of image-text models
            kwargs["backend"] = "causal"
        with hushed():
            super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, **kwargs)
        self._parts = PartEncoder(self.tokenizer)
        self._device = input_device(loaded.model)  # lm-eval takes the first weight's, which may be offloaded
        self._has_stock_batches = has_stock_batches

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return rendered(
            chat_history, lambda each: super(EncodingHFLM, self).apply_chat_template(each, add_generation_prompt)
        )

    def _encode_ahead(self, texts: Iterable[str]) -> None:
        """Name the texts that will be encoded next."""
        self._ahead = EncodedAhead(texts, self._encode_many)
        self._parts = PartEncoder(self.tokenizer)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        encoded = None if args or kwargs else self._ahead.get(string)
        return list(super().tok_encode(string, *args, **kwargs)) if encoded is None else encoded

    def _encode_many(self, texts: Sequence[str]) -> Sequence[list[int]]:
        """What tok_encode gives for each text."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        if self.add_bos_token is not None or any(has_bos_prefix(text, bos) for text in texts):
            return [super(EncodingHFLM, self).tok_encode(text) for text in texts]
        return self._parts.encode(texts)

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The prompts of a batch, left-padded: (token ids, mask), [n_prompts, width] each."""
        if self._has_stock_batches or len({self._begins_with_bos(text) for text in strings}) == 1:
            encoded: tuple[Tensor, Tensor] = super().tok_batch_encode(strings, *args, **kwargs)
            return encoded
        each = [super(EncodingHFLM, self).tok_batch_encode([text], *args, **kwargs) for text in strings]
        width = max(ids.shape[1] for ids, _ in each)
        ids = torch.cat([_padded(ids, width, self.tokenizer.pad_token_id) for ids, _ in each])
        return ids, torch.cat([_padded(mask, width, 0) for _, mask in each])

    def _prompt_ids(self, text: str, first: str) -> list[int]:
        """The tokens that tok_batch_encode gives for a prompt, before they are cut. first: the first prompt of its batch."""
        decides = first if self._has_stock_batches else text
        with_special = False if self._begins_with_bos(decides) else self.add_bos_token
        special = {} if with_special is None else {"add_special_tokens": with_special}
        return list(self.tokenizer.encode(text, truncation=self.truncation, **special))

    def _begins_with_bos(self, text: str) -> bool:
        """Whether a text begins with the special token that the tokenizer may add before it."""
        return bool(has_bos_prefix(text, getattr(self.tokenizer, "bos_token", None)))

    def _text(self, ids: list[int]) -> str:
        return str(self.tok_decode(ids, skip_special_tokens=False))


def _padded(row: Tensor, width: int, filler: int) -> Tensor:
    """One row [1, n] with filler on its left: [1, width]."""
    return torch.nn.functional.pad(row, (width - row.shape[1], 0), value=filler)


def rolling_windows(lm: HFLM, text: str) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) of each window in which lm-eval scores a whole text.

    The context is one token, in the first window the prefix token. The last window is filled up with as much context as fits.
    """
    windows = get_rolling_token_windows(
        token_list=lm.tok_encode(text), prefix_token=lm.prefix_token_id, max_seq_len=lm.max_length, context_len=1
    )
    return [(list(context), list(continuation)) for context, continuation in map(make_disjoint_window, windows)]


def shared_beginnings(texts: Sequence[str]) -> tuple[list[float], list[int]]:
    """(for each text the part of it that another text begins with, too; the group of each text).

    Texts of one group share at least half of their beginning with their neighbour. Group 0 has the texts that share less.
    """
    order = sorted(range(len(texts)), key=texts.__getitem__)
    shares, groups, group = [0.0] * len(texts), [0] * len(texts), 1
    for before, index in pairwise(order):
        n_alike = n_chars_alike(texts[before], texts[index])
        for each in (before, index):
            shares[each] = max(shares[each], n_alike / max(1, len(texts[each])))
        if 2 * n_alike < min(len(texts[before]), len(texts[index])):
            group += 1
            continue
        groups[before] = groups[index] = group
    return shares, groups


def texts_of(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The texts that lm-eval encodes of (context, continuation): both as one text, and the context without spaces at its end."""
    for context, continuation in pairs:
        if context:
            yield context + continuation
            yield context.rstrip()
