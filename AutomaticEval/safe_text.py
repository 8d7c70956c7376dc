"""Text of files, models and tasks as a person is shown it: control characters are spelled out.

Knows nothing of terminals.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and line feed, marks that turn the direction of text, and lone surrogates."""


def shown(text: str) -> str:
    """`\\x1b[31m` as it is written in Python, in place of a colour; what is text stays as it is."""
    return _UNSHOWN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


_SIGNS = str.maketrans({"Ġ": "␣", "▁": "␣", "Ċ": "⏎", "\n": "⏎", "ĉ": "⇥"})


def with_signs(token: str) -> str:
    """The string of a token, as tokenizers of bytes and SentencePiece name it, with a sign for each blank, end of a line and tab: `␣capital`."""
    return token.translate(_SIGNS)


def html_text(text: str) -> str:
    """Text that is no mark-up."""
    return escape(shown(text))


def html_table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values. All text is escaped."""
    lines = [
        f"<tr><th style='text-align:left'>{html_text(name)}</th><td style='text-align:left'>{html_text(text)}</td></tr>"
        for name, text in rows
    ]
    return f"<table><caption>{html_text(title)}</caption>{''.join(lines)}</table>"


def html_lines(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table with a row of column names. All text is escaped."""
    rows = [("th", header), *(("td", line) for line in lines)]
    cells = [
        "".join(f"<{kind} style='text-align:left'>{html_text(text)}</{kind}>" for text in line) for kind, line in rows
    ]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"
