"""Where a text may be cut so that its tokens are those of its two parts, one after the other. Only for tokenizers of which this is proven.

A cut stands before a space (U+0020) that follows a printable ASCII character. A fast tokenizer encodes in five steps; `around` gives None
unless each of them works on the two parts as it works on the whole text:

1. Added tokens are found, the leftmost and longest first. None spans the cut, since none has a space after such a character. None looks at
   what is beside it (`single_word`), nor takes the spaces after it (`rstrip`). One that takes the spaces before it (`lstrip`) stops at the cut.
2. The normalizer is none, or NFC: a space never joins what stands before it, and such a character joins only what stands before it.
3. The text is split by one of PATTERNS. No alternative of theirs matches a space after another character, except after white space; none
   looks behind; and `(?!\\S)`, the only look ahead, stands after white space, which ends before the cut or begins at it. Splits by numerals
   may come before or after, since a space is none. `ByteLevel` then adds nothing in front.
4. BPE without dropout encodes each piece by itself.
5. Special tokens are put around the whole, always the same.
"""

from __future__ import annotations

import json
from itertools import chain
from typing import Any, NamedTuple

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WHITE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
PATTERNS = frozenset(
    [
        # GPT-2; ByteLevel has it built in
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # Llama 3, and Qwen 2 and later
        *(
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WHITE}"
            for numbers in (r"\p{N}{1,3}", r"\p{N}")
        ),
        # GPT-4o and gpt-oss, and Mistral's tekken
        rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_WHITE}",
        rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_WHITE}",
    ]
)
"""Regular expressions that split a text at every cut."""
NUMERALS = frozenset([r"\d", r"\p{N}", r"\p{N}{1,3}"])
"""Regular expressions that match numerals alone, one after the other."""
_METHODS = ("__call__", "_encode_plus")


class Around(NamedTuple):
    """The special tokens before and after a text."""

    before: list[int]
    after: list[int]


def last_cut(text: str, most: int) -> int:
    """The last place, `most` at most, at which a text may be cut; 0 when there is none."""
    at = text.rfind(" ", 0, most + 1)
    while at > 0 and not "!" <= text[at - 1] <= "~":
        at = text.rfind(" ", 0, at)
    return max(at, 0)


def around(tokenizer: Any) -> Around | None:
    """The special tokens that a tokenizer puts around a text, when texts may be cut; None when that is not proven of the tokenizer."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    if any(getattr(type(tokenizer), name) is not getattr(PreTrainedTokenizerFast, name) for name in _METHODS):
        return None
    inner = tokenizer.backend_tokenizer
    is_proven = (
        all(map(_is_cut_apart, inner.get_added_tokens_decoder().values()))
        and _state(inner.normalizer) in (None, {"type": "NFC"})
        and _splits(_state(inner.pre_tokenizer))
        and isinstance(inner.model, BPE)
        and not inner.model.dropout
    )
    return _around(_state(inner.post_processor)) if is_proven else None


def _state(step: Any) -> Any:
    """A step as `tokenizer.json` has it."""
    return None if step is None else json.loads(step.__getstate__())


def _is_cut_apart(token: Any) -> bool:
    """Whether an added token is found in the parts of a text just where it is found in the text."""
    text = str(token.content)
    spans = any("!" <= text[at - 1] <= "~" for at in range(1, len(text)) if text[at] == " ")
    return not (spans or token.single_word or token.rstrip)


def _splits(step: Any) -> bool:
    """Whether a pre-tokenizer splits a text at every cut."""
    steps = [] if step is None else step["pretokenizers"] if step["type"] == "Sequence" else [step]
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return False
    *earlier, last = steps
    patterns = [None if each["type"] == "Digits" else _pattern(each) for each in earlier]
    others = [each for each in patterns if each is not None and each not in NUMERALS]
    return all(each in PATTERNS for each in others) and (bool(others) or bool(last["use_regex"]))


def _pattern(step: Any) -> str:
    """The regular expression whose matches a step makes pieces of their own; an empty one for another step."""
    is_split = (step["type"], step.get("behavior"), step.get("invert")) == ("Split", "Isolated", False)
    return str(step["pattern"].get("Regex", "")) if is_split else ""


def _around(step: Any) -> Around | None:
    """The special tokens that a post-processor puts around one text; None for one that is not known."""
    steps = [] if step is None else step["processors"] if step["type"] == "Sequence" else [step]
    found = Around([], [])
    for each in steps:
        if each["type"] == "ByteLevel":  # which changes offsets alone
            continue
        if each["type"] != "TemplateProcessing":
            return None
        names = [next(iter(part.items())) for part in each["single"]]
        if [part["id"] for kind, part in names if kind == "Sequence"] != ["A"]:
            return None
        at = [kind for kind, _ in names].index("Sequence")
        ids = [[] if kind == "Sequence" else each["special_tokens"][part["id"]]["ids"] for kind, part in names]
        found = Around([*chain(*ids[:at]), *found.before], [*found.after, *chain(*ids[at:])])
    return found
