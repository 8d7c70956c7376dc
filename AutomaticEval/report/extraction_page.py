"""The summary of an extraction: the runs that it made, as Markdown and as one HTML page."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from matplotlib.figure import Figure

from AutomaticEval.public_names import public_name
from AutomaticEval.report.labels import label, save
from AutomaticEval.safe_text import shown
from AutomaticEval.store.disk.whole_files import new_file, size_text
from AutomaticEval.store.reader import open_run

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}th,td{border:1px solid #ccc;padding:.25em .6em;text-align:left}"
    "th{background:#f3f3f3}img{max-width:100%}"
)


class ExtractedRun(Protocol):
    """What the page needs to know of one run: one model on one set of texts."""

    @property
    def model(self) -> str: ...
    @property
    def name(self) -> str:
        """The name of the set of texts."""

    @property
    def folder(self) -> Path:
        """The run folder; nothing is read from it when the run failed."""

    @property
    def status(self) -> str:
        """ "captured", "was there" or "failed"."""

    @property
    def error(self) -> str:
        """Why it failed."""

    @property
    def numbers(self) -> Mapping[str, Any]:
        """What `extraction.json` in the run folder holds."""


class Section(NamedTuple):
    """A heading, and a table or lines below it."""

    title: str
    columns: tuple[str, ...] = ()
    rows: Sequence[Sequence[str]] = ()
    lines: Sequence[str] = ()


def write_summary(runs: Sequence[ExtractedRun], title: str, folder: Path) -> list[Path]:
    """Write summary.md and summary.html about the runs into a folder, in place of earlier ones. Returns the two files."""
    sections = _sections(runs, folder)
    files = [folder / "summary.md", folder / "summary.html"]
    for file, text in zip(files, (_markdown(title, sections), _html(title, sections, _lengths(runs))), strict=True):
        with new_file(file, overwrite=True) as partial:
            partial.write_text(text, encoding="utf-8")
    return files


def _sections(runs: Sequence[ExtractedRun], folder: Path) -> list[Section]:
    done = [run for run in runs if run.status != "failed"]
    by_model = {run.model: run for run in done}
    return [
        Section(
            "What was kept",
            ("Model", "Texts", "Status", "Samples", "Rows", "Sites", "Size", "Tokens a second", "Folder"),
            [_kept(run, os.path.relpath(run.folder, folder)) for run in runs],
        ),
        Section(
            "Tokenisation",
            ("Model", "Tokenizer", "Tokens it has", "First token it adds", "Context"),
            [_tokenizer(public_name(model), run.numbers.get("tokenizer", {})) for model, run in by_model.items()],
        ),
        Section(
            "Structure",
            ("Model", "Layers", "Heads", "Key-value heads", "Width", "Keys and widths", "dtype"),
            [_structure(public_name(model), run) for model, run in by_model.items()],
        ),
        Section(
            "Lengths, in tokens",
            ("Model", "Texts", "Number", "Shortest", "Median", "Mean", "Longest", "Cut to fit", "Tokens cut"),
            [_length(run) for run in done],
        ),
        Section("Problems", lines=_problems(runs) or ["None."]),
    ]


def _kept(run: ExtractedRun, folder: str) -> tuple[str, ...]:
    if run.status == "failed":
        return (public_name(run.model), run.name, "failed", *[""] * 5, folder)
    stored, numbers = open_run(run.folder), run.numbers
    rate = numbers["n_tokens"] / max(numbers["seconds"], 1e-9) if numbers.get("n_tokens") else None
    return (
        public_name(run.model),
        run.name,
        run.status,
        str(len(stored)),
        str(sum(shard.n_rows for shard in stored.shards)),
        f"{stored.made_with.sites}; layers {stored.made_with.layers}; positions {stored.made_with.positions}"
        + (f"; reduce {stored.made_with.reduce}" if stored.made_with.reduce else ""),
        size_text(numbers.get("size_bytes", 0)),
        "" if rate is None else f"{rate:.0f}",
        folder,
    )


def _tokenizer(model: str, tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    first = tokenizer.get("first_token_added")
    return (
        model,
        str(tokenizer.get("class", "")),
        str(tokenizer.get("n_tokens", "")),
        first or "none",
        str(tokenizer.get("context", "")),
    )


def _structure(model: str, run: ExtractedRun) -> tuple[str, ...]:
    stored = open_run(run.folder)
    shape = stored.made_with.shape or {}
    widths: dict[int, list[str]] = {}
    for key, each in stored.contents.activations.items():
        widths.setdefault(each.width, []).append(key)
    keys = "; ".join(f"{names[0]} … {names[-1]} ({len(names)}): {width}" for width, names in widths.items())
    sizes = [str(shape[name]) for name in ("n_layers", "n_heads", "n_kv_heads", "d_model")]
    return (model, *sizes, keys, str(stored.made_with.store_dtype or stored.made_with.dtype))


def _length(run: ExtractedRun) -> tuple[str, ...]:
    numbers = run.numbers
    lengths = numbers.get("lengths", {})
    spread = [_number(lengths.get(name)) for name in ("shortest", "median", "mean", "longest")]
    cut = [str(numbers.get(name, "")) for name in ("n_truncated", "n_tokens_cut")]
    return (public_name(run.model), run.name, str(numbers.get("n_texts", "")), *spread, *cut)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}".removesuffix(".0")


def _problems(runs: Sequence[ExtractedRun]) -> list[str]:
    problems = [f"{public_name(run.model)}, {run.name}: {run.error}" for run in runs if run.status == "failed"]
    for run in runs:
        if run.numbers.get("n_truncated"):
            problems.append(
                f"{public_name(run.model)}, {run.name}: {run.numbers['n_truncated']} texts were cut to fit."
            )
        if run.numbers.get("n_empty"):
            problems.append(
                f"{public_name(run.model)}, {run.name}: {run.numbers['n_empty']} texts were empty, and left out."
            )
    return problems


def _lengths(runs: Sequence[ExtractedRun]) -> str:
    """A box plot of the samples' lengths: a PNG in base64, or an empty text when every run failed."""
    done = [run for run in runs if run.status != "failed"]
    if not done:
        return ""
    figure = Figure(figsize=(7, 0.35 * len(done) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    labels = [label(f"{Path(public_name(run.model)).name}, {run.name}") for run in done]
    axes.boxplot([open_run(run.folder).column("n_prompt_tokens") for run in done], vert=False, tick_labels=labels)
    axes.set(xlabel="tokens a sample")
    axes.invert_yaxis()
    kept = io.BytesIO()
    save(figure, kept, 120)
    return base64.b64encode(kept.getvalue()).decode()


def _cell(text: str) -> str:
    """The text as one cell of a Markdown table: on one line, with everything escaped that could act as HTML, link, picture, code or the end of the cell."""
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
