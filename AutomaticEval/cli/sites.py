"""`main.py sites --model gpt2`: the sites of a model, with their widths, and why one is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.options import command, takes
from AutomaticEval.cli.printing import print_table, say
from AutomaticEval.models.checkpoint.load_options import LoadOptions

if TYPE_CHECKING:
    from AutomaticEval.models.layout import Layout


Verify = Annotated[
    bool,
    typer.Option("--verify", help="Load the weights, and check each site by a forward.", rich_help_panel=options.MODEL),
]
VERIFIED = "Verified: one forward of the loaded model has shown that each site is what its name says."
UNVERIFIED = (
    "Not verified: seen in its config and code, without weights. --verify loads the model and checks each site."
)


@command
@takes(load=LoadOptions)
def sites(
    load: LoadOptions,
    model: options.Model = "demo",
    verify: Verify = False,
) -> None:
    """List the sites of a model that can be captured. Of a large model only the config is read, and its code run without weights."""
    options.quiet_libraries()
    from AutomaticEval.models.checkpoint.unloaded_model import has_small_weights, unloaded_layout, unloaded_model
    from AutomaticEval.models.described.offered import to_complete
    from AutomaticEval.sites import KINDS, keys_text

    if verify or has_small_weights(model, load):
        from AutomaticEval.models.loading import load_model

        loaded = load_model(model, options=load)
        whole, layout, how = loaded.model, loaded.layout, VERIFIED
    else:
        whole = unloaded_model(model, load)
        layout, how = unloaded_layout(whole), UNVERIFIED
    rows = []
    for name, kind in KINDS.items():
        present = [site for site in layout.sites(name) if site in layout.taps]
        if not present:
            continue
        widths = dict.fromkeys(str(layout.widths[site]) for site in present)
        rows.append(
            (
                name,
                ", ".join(widths),
                keys_text(site.key for site in present),
                f"{kind.described}{_noted(layout, name)}",
            )
        )
    heads = f"{layout.n_heads} heads of {layout.d_head}" if layout.n_heads else "no heads of attention"
    say(f"{model}: {layout.n_layers} layers, {heads}, d_model {layout.d_model}")
    say(how)
    if layout.unlike_most():
        say(f"Heads of other numbers or widths: {_other_heads(layout)}")
    print_table("", ("Site", "Width", "Keys", "What it is"), rows, n_words=4)
    missing = _missing(layout)
    if missing:
        print_table("Not in this model, or not in all of its layers", ("Sites", "Not in", "Why"), missing, n_words=3)
    if load.model_description is None and _has_unnamed_parts(layout):
        say(f"Parts of its blocks have names that are not known here. They can be described:\n\n{to_complete(whole)}")


def _has_unnamed_parts(layout: Layout) -> bool:
    """Whether in no layer the two branches of the block were found by their names."""
    reasons = [layout.missing.get(site, "") for site in layout.sites("attn_out")]
    return all(" was found in its block, whose parts are " in reason for reason in reasons)


def _noted(layout: Layout, kind: str) -> str:
    """What has to be said of a kind in this model, in a line of its own."""
    return f"\n{layout.notes[kind]}" if kind in layout.notes else ""


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


def _missing(layout: Layout) -> list[tuple[str, str, str]]:
    """What a model lacks: the kinds, in which layers, and why. Kinds that the same layers lack for the same reason share a row."""
    from AutomaticEval.models.layout import layers_text
    from AutomaticEval.sites import KINDS

    kinds: dict[tuple[str, str], list[str]] = {}
    for kind in KINDS:
        for reason, sites in layout.lacking(kind).items():
            layers = [site.layer for site in sites if site.layer is not None]
            where = "any layer" if len(layers) in (0, layout.n_layers) else layers_text(layers)
            kinds.setdefault((where, reason), []).append(kind)
    return [(", ".join(some), where, reason) for (where, reason), some in kinds.items()]
