"""`main.py sites --model gpt2`: the sites of a model, with their widths, and why one is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from AutomaticEval.cli import options
from AutomaticEval.cli.options import command, takes
from AutomaticEval.cli.printing import print_table, say
from AutomaticEval.models.checkpoint.load_options import LoadOptions

if TYPE_CHECKING:
    from AutomaticEval.models.layout import Layout
    from AutomaticEval.sites import Site


@command
@takes(load=LoadOptions)
def sites(
    load: LoadOptions,
    model: options.Model = "demo",
) -> None:
    """List the sites of a model that can be captured."""
    options.quiet_libraries()
    from AutomaticEval.models.loading import load_model
    from AutomaticEval.sites import KINDS

    layout = load_model(model, options=load).layout
    rows = []
    for name, kind in KINDS.items():
        present = [site for site in layout.sites(name) if site in layout.taps]
        widths = dict.fromkeys(str(layout.widths[site]) for site in present)
        rows.append((name, ", ".join(widths) or "–", _keys(present), f"{kind.described}{_lacking(layout, name)}"))
    say(f"{model}: {layout.n_layers} layers, {layout.n_heads} heads of {layout.d_head}, d_model {layout.d_model}")
    if layout.unlike_most():
        say(f"Other heads: {_other_heads(layout)}")
    print_table("", ("Site", "Width", "Keys", "What it is"), rows, n_words=4)


def _keys(present: Sequence[Site]) -> str:
    """The first key and the last one; all keys when layers between them lack the site."""
    keys = [site.key for site in present]
    if len(keys) > 2 and present[-1].layer == (present[0].layer or 0) + len(present) - 1:
        return f"{keys[0]} … {keys[-1]}"
    return ", ".join(keys) or "–"


def _other_heads(layout: Layout) -> str:
    """The sites whose heads have other numbers or widths than `n_heads`, `n_kv_heads` and `d_head` say: kind after kind, with its layers."""
    from AutomaticEval.models.layout import layers_text
    from AutomaticEval.sites import site_of

    layers: dict[tuple[str, int, int], list[int]] = {}
    for key, n in layout.unlike_most().items():
        site = site_of(key)
        layers.setdefault((site.kind, n, layout.widths[site] // n), []).append(site.layer or 0)
    return "; ".join(
        f"{kind} {n} of {width} in {layers_text(sorted(some))}" for (kind, n, width), some in layers.items()
    )


def _lacking(layout: Layout, kind: str) -> str:
    """Which layers lack a kind, and why: a line for each reason."""
    from AutomaticEval.models.layout import layers_text

    text = ""
    for reason, sites in layout.lacking(kind).items():
        layers = [site.layer for site in sites if site.layer is not None]
        where = "in this model" if len(layers) in (0, layout.n_layers) else f"in {layers_text(layers)}"
        text += f"\nnot {where}: {reason}"
    return text
