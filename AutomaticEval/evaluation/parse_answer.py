"""Takes the answer out of what a model wrote. RULES are tried in order; the last match of the first rule that gives an answer counts.

Models write in more ways than any list holds: for a new habit add a line to RULES and a row to `tests/test_extraction.py`. This module
knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from AutomaticEval.thinking.text import split_thinking

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_END = r"(?=\.\s|\.?\s*$|\n|$)"
"""The end of an answer within a sentence: the sentence's end. The point in 3.5 ends no sentence."""


class Rule(NamedTuple):
    """A habit of answering; the pattern's group 1 is the answer."""

    habit: str
    pattern: re.Pattern[str]


def _rule(habit: str, pattern: str) -> Rule:
    return Rule(habit, re.compile(pattern, re.IGNORECASE | re.MULTILINE))


RULES = (
    _rule("FINAL ANSWER: B", r"final\s+answer[\s*_`]*(?:is)?[\s*_`]*[:：=][\s*_`]*([^\n]+)"),
    _rule("the final answer is B.", rf"final\s+answer\s+(?:is|would\s+be)\s+(?!not\b)([^\n]+?){_END}"),
    _rule(r"\boxed{C}", r"(\\boxed\s*\{[^\n]*\})"),
    _rule("#### 42", r"^\s*####\s*([^\n]+)"),
    _rule(
        "The answer is D.",
        r"\b(?:answer|option|choice)\b[\s*_`]*(?:is|would\s+be|must\s+be|should\s+be)(?:\s*[:：])?[\s*_`]+"
        rf"(?:definitely\s+|probably\s+|clearly\s+)?(?!not\b|<)((?:option|choice)?\s*[^\n]+?){_END}",
    ),
    _rule(
        "Answer: D", r"^[\s*_`#>]*(?:my\s+|the\s+)?(?:correct\s+|best\s+|right\s+)?answer[\s*_`]*[:：][\s*_`]*([^\n]+)"
    ),
    _rule("Answer - C", r"^[\s*_`#>]*(?:my\s+|final\s+)?answer\s*[-–—]\s*([^\n]+)"),
    _rule("I'd go with C.", r"\bI(?:'d|\s+would|'ll|\s+will)?\s+(?:go\s+with|choose|pick|select)\s+([^\n]+?)" + _END),
    _rule("D is correct", r"(?:\boption\s+|\bchoice\s+|\()?\b([A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|best)\b"),
)
_LONE_LETTER = re.compile(r"[\s*_`(\[\"']*([A-Z])[\s*_`)\].:\"']*")
_ALONE = re.compile(r"[\s*_`(\[\"']*([A-Za-z])[\s*_`)\].:\"']*")
_SEVERAL = re.compile(r"[(\[]?[A-Z][)\]]?\s*(?:,|/|&|\bor\b|\band\b)\s*[(\[]?[A-Z]\b[)\]]?\s*$")
_NEXT_QUESTION = re.compile(r"\n\s*(?:Question|Q|User|Human)\s*\d*\s*[:.]")
_LETTER_FIRST = re.compile(r"(?:option\s+|choice\s+)?[(\[]?([A-Za-z])(?:[)\].:,]|\s*[-–—]\s|\s*$)", re.IGNORECASE)
_BARE_CAPITAL = re.compile(r"(?:option\s+|choice\s+)?[(\[]?([B-HJ-Z])\b")
_PLACEHOLDER = re.compile(r"^[<\[{(]\s*(?:letter|answer|your answer|x)\s*[>\]})]?\W*$", re.IGNORECASE)


def extract_answer(text: str, choices: Sequence[str] | None = None) -> str | None:
    """The answer that a response gives, or None when it gives none: it is unfinished, or has none of the known habits.

    With choices the answer is the letter of one of them, "A" for the first. Without choices it is the answer's text, without markdown,
    LaTeX and quotes.
    """
    said = split_thinking(text).answer  # thinking is not answering
    if said is None:
        return None
    said = _until_next_question(said)
    for rule in RULES:
        for match in reversed(rule.pattern.findall(said)):
            answer = _unadorned(match)
            if answer and not _PLACEHOLDER.match(answer):
                settled = answer if choices is None else letter_of(answer, choices)
                if settled is not None:
                    return settled
    return _last_line(said, choices)


def _until_next_question(said: str) -> str:
    """A response up to where a base model asks itself the next question, whose answer is none to ours."""
    after = next((match for match in _NEXT_QUESTION.finditer(said) if said[: match.start()].strip()), None)
    return said if after is None else said[: after.start()]


def letter_of(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that an answer names, by letter or by text; None when it names none."""
    letters = LETTERS[: len(choices)]
    texts = [_plain(choice) for choice in choices]
    if _SEVERAL.match(answer):
        return None
    if answer in letters:  # a letter was asked for, even where some choice's text is a letter
        return answer
    if _plain(answer) in texts:
        return letters[texts.index(_plain(answer))]
    for pattern in (_LETTER_FIRST, _BARE_CAPITAL):
        match = pattern.match(answer)
        if match and match.group(1).upper() in letters:
            return match.group(1).upper()
    named = [letter for letter, choice in zip(letters, texts, strict=True) if _names(_plain(answer), choice)]
    return named[0] if len(named) == 1 else None


def _last_line(said: str, choices: Sequence[str] | None) -> str | None:
    """The answer on a last line that holds a lone letter, or a choice and nothing else."""
    lines = [line for line in said.strip().splitlines() if line.strip()]
    if not lines:
        return None
    alone = _ALONE if len(lines) == 1 and choices is not None else _LONE_LETTER  # a whole response may be "d)"
    match = alone.fullmatch(lines[-1].strip())
    if match and (choices is None or match.group(1).upper() in LETTERS[: len(choices)]):
        return match.group(1).upper()
    if choices is None:
        return None
    line = _unadorned(lines[-1])
    lettered = re.fullmatch(r"\(?([A-Z])[).:]\s+(.+)", line)
    if lettered and lettered.group(1) in LETTERS[: len(choices)]:
        return lettered.group(1)
    texts = [_plain(choice) for choice in choices]
    return LETTERS[texts.index(_plain(line))] if texts.count(_plain(line)) == 1 else None


def _unadorned(answer: str) -> str:
    """An answer without markdown, LaTeX, quotes, and the full stop at its end."""
    boxed = _boxed(answer)
    answer = boxed if boxed else answer
    answer = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\*\*|__|`|\\[()\[\]]|<\|[^|>]*\|>|</\w+>", "", answer)
    inside = re.fullmatch(r"\s*<([^<>]+)>\W*", answer)  # the template's own brackets: <B>
    answer = inside.group(1) if inside and not _PLACEHOLDER.match(answer.strip()) else answer
    answer = answer.strip().strip("*_$\"'“”‘’ ").rstrip(" .,;!*_")
    lone = re.fullmatch(r"[(\[]([A-Za-z0-9]+)[)\]]", answer)
    return lone.group(1) if lone else answer


def _boxed(text: str) -> str | None:
    r"""The content of the last \boxed{…}, with braces within it; None when there is none."""
    start = text.rfind("\\boxed")
    inner = text[start:].partition("{")[2] if start >= 0 else ""
    depth = 1
    for at, character in enumerate(inner):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return inner[:at]
    return None


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", _unadorned(text)).casefold()


def _names(answer: str, choice: str) -> bool:
    return bool(choice) and re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", answer) is not None
