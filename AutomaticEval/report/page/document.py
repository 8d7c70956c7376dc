"""A page as one HTML file: the template, its style sheet, its script and its data. Nothing in it comes from outside, and nothing in its data is mark-up."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

HERE = "AutomaticEval.report.page"


def document(view: Mapping[str, Any], questions: Mapping[str, Any]) -> str:
    """The HTML. view: what the template shows, as text and `Chart`; every text is escaped. questions: what the script shows, as JSON."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    style, script, template = _file("page.css"), _file("page.js"), _file("page.html.jinja")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["drawn"] = Markup  # of charts, which `charts` makes itself
    return environment.from_string(template).render(
        view,
        policy=policy(style, script),
        style=Markup(style),
        script=Markup(script),
        questions=Markup(json_block(questions)),
    )


def policy(style: str, script: str) -> str:
    """The content security policy: only this style sheet and this script, and nothing from outside."""
    return f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; base-uri 'none'; form-action 'none'"


def json_block(value: Any) -> str:
    """JSON that can stand in a `<script type="application/json">`: no character of it can end the block or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _file(name: str) -> str:
    return resources.files(HERE).joinpath(name).read_text(encoding="utf-8")
