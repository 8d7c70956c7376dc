"""`main.py sites --model gpt2`: the sites of a model, with their shapes, and why any is missing."""

from __future__ import annotations

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.options import one_line_errors, with_load


@one_line_errors
@with_load
def sites(
    load: options.Load,
    model: options.Model = "demo",
) -> None:
    """List the sites of a model that can be captured."""
    options.quiet_libraries()
    from rich.markup import escape
    from rich.table import Table

    from AutomaticEval.models.loading import load_model
    from AutomaticEval.sites import KINDS, PER_LAYER, Site

    layout = load_model(model, options=load()).layout
    table = Table("Site", "Width", "Keys", "What it is")
    for kind, meaning in KINDS.items():
        found = [site for site in layout.taps if site.kind == kind]
        if kind in layout.missing or not found:
            table.add_row(kind, "–", "–", f"not in this model: {layout.missing.get(kind, 'not found')}")
        else:
            last = Site(kind, layout.n_layers - 1).key if kind in PER_LAYER else ""
            keys = found[0].key + (f" … {last}" if last and last != found[0].key else "")
            table.add_row(kind, str(layout.widths[found[0]]), keys, escape(meaning))
    typer.echo(
        f"{model}: {layout.n_layers} layers, {layout.n_heads} heads of {layout.d_head}, d_model {layout.d_model}"
    )
    options.console().print(table)
