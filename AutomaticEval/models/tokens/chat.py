"""Messages through a chat template that may want their texts as parts, as those of image-text models do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]


def rendered(messages: Messages, render: Callable[[Messages], str]) -> str:
    """What a template makes of messages whose `content` is a text.

    A template that looks for parts of a content finds none in a text, and leaves it out without an error. Then each text is given as one part,
    `{"type": "text", "text": …}`.
    """
    text = render(messages)
    if _is_within(messages, text):
        return text
    try:
        of_parts = render([{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages])
    except (
        Exception
    ):  # a template is a program of its own and may raise anything; this one changes texts, and takes no parts
        return text
    return of_parts if _is_within(messages, of_parts) else text


def _is_within(messages: Messages, text: str) -> bool:
    """Whether a text has what the user says last. Templates may strip it, and may drop what was said before."""
    said = [each["content"] for each in messages if each["role"] == "user"]
    return not said or said[-1].strip() in text
