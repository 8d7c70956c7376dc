"""`main.py sites --model gpt2`: the sites of a model, with their shapes, and why any is missing."""

from __future__ import annotations

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.options import one_line_errors


@one_line_errors
def sites(
    model: options.Model = "demo",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    load_in_8bit: options.LoadIn8Bit = False,
    load_in_4bit: options.LoadIn4Bit = False,
    revision: options.Revision = None,
) -> None:
    """List the sites of a model that can be captured."""
    options.quiet_libraries()
    from rich.markup import escape
    from rich.table import Table

    from AutomaticEval.models.loading import LoadOptions, load_model
    from AutomaticEval.sites import KINDS, PER_LAYER, Site

    load = LoadOptions(dtype, device, device_map, load_in_8bit, load_in_4bit, revision)
    layout = load_model(model, options=load).layout
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
