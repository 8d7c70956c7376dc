"""Which part of a text each token spells, told from the strings of the tokens alone: no tokenizer is needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from AutomaticEval.thinking.where import Span

_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
"""Letter -> the byte that it stands for in byte-level tokenizers (GPT-2's table): `Ġ` is a blank."""
_ONE_BYTE, _SPECIAL = re.compile(r"<0x([0-9A-F]{2})>"), re.compile(r"<[^<>]+>|\[/?[A-Z_]+\]")


def spelled(text: str, tokens: Sequence[str | None]) -> list[Span] | None:
    """The part of the text that each token spells: half-open, in bytes of UTF-8. None when these tokens do not spell this text.

    tokens: their strings, as tokenizers of bytes and SentencePiece name them. Those from the first unknown one (None) on have no part in the list. Special tokens
    spell nothing, and neither do tokens after the text's end; blanks may lack at its beginning.
    """
    whole = text.encode("utf-8", "surrogatepass")
    return next(
        (found for each in (_of_bytes, _of_pieces) if (found := _aligned(whole, tokens, each)) is not None), None
    )


def in_bytes(text: str, span: Span) -> Span:
    """A part of a text, in characters, in bytes of UTF-8."""
    start, stop = (len(text[:at].encode("utf-8", "surrogatepass")) for at in span)
    return start, stop


def _aligned(text: bytes, tokens: Sequence[str | None], bytes_of: Callable[[str], bytes]) -> list[Span] | None:
    at, parts = 0, list[Span]()
    for token in tokens:
        if token is None:
            return parts
        piece, start = bytes_of(token), at
        while at == 0 and piece[:1].isspace() and not text.startswith(piece):
            piece = piece[1:]
        rest = text[at : at + len(piece)]
        if piece.startswith(rest) and (rest == piece or at + len(piece) > len(text)):
            at += len(rest)  # a stop string may have cut the text within a token
        elif not _SPECIAL.fullmatch(token):
            return None
        parts.append((start, at))
    return parts if at == len(text) else None


def _of_bytes(token: str) -> bytes:
    return bytes(_BYTE_OF[letter] for letter in token) if all(letter in _BYTE_OF for letter in token) else b"\xff"


def _of_pieces(token: str) -> bytes:
    one = _ONE_BYTE.fullmatch(token)
    return bytes([int(one[1], 16)]) if one else token.replace("▁", " ").encode("utf-8", "surrogatepass")
