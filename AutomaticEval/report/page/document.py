"""A page as one HTML file: the template, its style sheet, its script and its data. Nothing in it comes from outside, and nothing in its data is mark-up."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from AutomaticEval.errors import SelectionError
from AutomaticEval.store.disk.whole_files import new_file, prepare_file

HERE = "AutomaticEval.report.page"
PAGE, ONE_QUESTION = "page.html.jinja", "page.one.html.jinja"
"""The templates: a page of a run, and one question by itself."""


def document(
    view: Mapping[str, Any], questions: Mapping[str, Any], template: str = PAGE, *, is_served: bool = False
) -> str:
    """The HTML. view: what the template shows, as text and `Chart`; every text is escaped. questions: what the script shows, as JSON.

    is_served: the page may ask the server that it came from.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FunctionLoader(_file), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["drawn"] = Markup  # of charts, which `charts` makes itself
    return environment.get_template(template).render(
        view,
        policy=policy(is_served=is_served),
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        questions=Markup(json_block(questions)),
    )


def policy(*, is_served: bool = False) -> str:
    """The content security policy: only this style sheet and this script, and nothing from outside. A served page may ask its own server."""
    asks = "connect-src 'self'; " if is_served else ""
    sources = f"style-src '{_hash(_file('page.css'))}'; script-src '{_hash(_file('page.js'))}'"
    return f"default-src 'none'; {sources}; {asks}img-src data:; base-uri 'none'; form-action 'none'"


def check_html(path: Path) -> None:
    """Refuse now, before any work, a file that a page cannot be written to. Raises SelectionError, PathExists, FolderNotWritable."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise SelectionError(f"{path} is no .html file; the page is one file, such as report.html.")
    prepare_file(path, offer="")


def write_html(path: Path, text: str) -> None:
    """Write a page, whole or not at all."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def json_block(value: Any) -> str:
    """JSON that can stand in a `<script type="application/json">`: no character of it can end the block or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _file(name: str) -> str:
    return resources.files(HERE).joinpath(name).read_text(encoding="utf-8")
