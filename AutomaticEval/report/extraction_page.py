"""What an extraction gave, as Markdown and as one HTML page."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from AutomaticEval.capture.texts.many_runs import Unit
from AutomaticEval.public_names import public_name
from AutomaticEval.report.labels import label, save
from AutomaticEval.safe_text import shown
from AutomaticEval.store.disk.whole_files import new_file, size_text

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}th,td{border:1px solid #ccc;padding:.25em .6em;text-align:left}"
    "th{background:#f3f3f3}img{max-width:100%}"
)


class Section(NamedTuple):
    """A heading, and a table or lines below it."""

    title: str
    columns: tuple[str, ...] = ()
    rows: Sequence[Sequence[str]] = ()
    lines: Sequence[str] = ()


def write_summary(units: Sequence[Unit], title: str, folder: Path) -> list[Path]:
    """Write summary.md and summary.html over those that are there. Returns the files."""
    sections = _sections(units, folder)
    files = [folder / "summary.md", folder / "summary.html"]
    for file, text in zip(files, (_markdown(title, sections), _html(title, sections, _lengths(units))), strict=True):
        with new_file(file, overwrite=True) as partial:
            partial.write_text(text, encoding="utf-8")
    return files


def _sections(units: Sequence[Unit], folder: Path) -> list[Section]:
    done = [unit for unit in units if unit.status != "failed"]
    by_model = {unit.model: unit for unit in done}
    return [
        Section(
            "What was kept",
            ("Model", "Texts", "Status", "Samples", "Rows", "Sites", "Size", "Tokens a second", "Folder"),
            [_kept(unit, os.path.relpath(unit.folder, folder)) for unit in units],
        ),
        Section(
            "Tokenisation",
            ("Model", "Tokenizer", "Tokens it has", "First token it adds", "Context"),
            [_tokenizer(public_name(model), unit.numbers.get("tokenizer", {})) for model, unit in by_model.items()],
        ),
        Section(
            "Structure",
            ("Model", "Layers", "Heads", "Key-value heads", "Width", "Keys and widths", "dtype"),
            [_structure(public_name(model), unit) for model, unit in by_model.items()],
        ),
        Section(
            "Lengths, in tokens",
            ("Model", "Texts", "Number", "Shortest", "Median", "Mean", "Longest", "Cut to fit", "Tokens cut"),
            [_length(unit) for unit in done],
        ),
        Section("Problems", lines=_problems(units) or ["None."]),
    ]


def _kept(unit: Unit, folder: str) -> tuple[str, ...]:
    if unit.status == "failed":
        return (public_name(unit.model), unit.name, "failed", *[""] * 5, folder)
    run, numbers = unit.run(), unit.numbers
    rate = numbers["n_tokens"] / max(numbers["seconds"], 1e-9) if numbers.get("n_tokens") else None
    return (
        public_name(unit.model),
        unit.name,
        unit.status,
        str(len(run)),
        str(run.shards and sum(shard.n_rows for shard in run.shards)),
        f"{run.made_with.sites}; layers {run.made_with.layers}; positions {run.made_with.positions}",
        size_text(numbers.get("size_bytes", 0)),
        "" if rate is None else f"{rate:.0f}",
        folder,
    )


def _tokenizer(model: str, found: dict[str, Any]) -> tuple[str, ...]:
    first = found.get("first_token_added")
    return (
        model,
        str(found.get("class", "")),
        str(found.get("n_tokens", "")),
        first or "none",
        str(found.get("context", "")),
    )


def _structure(model: str, unit: Unit) -> tuple[str, ...]:
    run = unit.run()
    shape = run.made_with.shape or {}
    widths: dict[int, list[str]] = {}
    for key in run.keys:
        widths.setdefault(run.rows(key).shape[1], []).append(key)
    keys = "; ".join(f"{names[0]} … {names[-1]} ({len(names)}): {width}" for width, names in widths.items())
    sizes = [str(shape[name]) for name in ("n_layers", "n_heads", "n_kv_heads", "d_model")]
    return (model, *sizes, keys, str(run.made_with.store_dtype or run.made_with.dtype))


def _length(unit: Unit) -> tuple[str, ...]:
    numbers = unit.numbers
    lengths = numbers.get("lengths", {})
    spread = [_number(lengths.get(name)) for name in ("shortest", "median", "mean", "longest")]
    cut = [str(numbers.get(name, "")) for name in ("n_truncated", "n_tokens_cut")]
    return (public_name(unit.model), unit.name, str(numbers.get("n_texts", "")), *spread, *cut)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}".removesuffix(".0")


def _problems(units: Sequence[Unit]) -> list[str]:
    found = [f"{public_name(unit.model)}, {unit.name}: {unit.error}" for unit in units if unit.status == "failed"]
    for unit in units:
        if unit.numbers.get("n_truncated"):
            found.append(
                f"{public_name(unit.model)}, {unit.name}: {unit.numbers['n_truncated']} texts were cut to fit."
            )
        if unit.numbers.get("n_empty"):
            found.append(
                f"{public_name(unit.model)}, {unit.name}: {unit.numbers['n_empty']} texts were empty, and left out."
            )
    return found


def _lengths(units: Sequence[Unit]) -> str:
    """A box plot of the samples' lengths, as the text of a PNG; empty when nothing is there."""
    done = [unit for unit in units if unit.status != "failed"]
    if not done:
        return ""
    figure = Figure(figsize=(7, 0.35 * len(done) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    labels = [label(f"{Path(public_name(unit.model)).name}, {unit.name}") for unit in done]
    axes.boxplot([unit.run().column("n_prompt_tokens") for unit in done], vert=False, tick_labels=labels)
    axes.set(xlabel="tokens a sample")
    axes.invert_yaxis()
    kept = io.BytesIO()
    save(figure, kept, 120)
    return base64.b64encode(kept.getvalue()).decode()


def _cell(text: str) -> str:
    """The text as one cell of a Markdown table: on one line, and no part of it can act as HTML, link, picture, code or the end of the cell."""
    return re.sub(r"([\\`*$\[\]|])", r"\\\1", escape(" ".join(shown(text).split()), quote=False))


def _page(text: str) -> str:
    return escape(shown(text))


def _markdown(title: str, sections: Sequence[Section]) -> str:
    lines = [f"# {_cell(title)}", "", f"{datetime.now().astimezone():%Y-%m-%d %H:%M %z}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.columns:
            table = [section.columns, ["---"] * len(section.columns), *section.rows]
            lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in table]
        lines += [f"- {_cell(line)}" for line in section.lines]
        lines.append("")
    return "\n".join(lines)


def _html(title: str, sections: Sequence[Section], figure: str) -> str:
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{_page(title)}</title><style>{STYLE}</style>"]
    parts.append(f"<h1>{_page(title)}</h1><p>{datetime.now().astimezone():%Y-%m-%d %H:%M %z}</p>")
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        if section.columns:
            rows = [_row(section.columns, "th"), *(_row(row, "td") for row in section.rows)]
            parts.append(f"<table>{''.join(rows)}</table>")
        if section.lines:
            parts.append(f"<ul>{''.join(f'<li>{_page(line)}</li>' for line in section.lines)}</ul>")
        if section.title.startswith("Lengths") and figure:
            parts.append(f'<img alt="Lengths of the samples" src="data:image/png;base64,{figure}">')
    return "\n".join(parts) + "\n"


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{_page(cell)}</{tag}>" for cell in cells) + "</tr>"
