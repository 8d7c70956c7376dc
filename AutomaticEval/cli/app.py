"""The app: `main.py` without a subcommand runs a benchmark; everything else is a subcommand."""

from __future__ import annotations

import signal
import sys
import warnings

import typer

from AutomaticEval.cli import (
    benchmark,
    compare,
    experts,
    export,
    extract,
    files,
    generate,
    geometry,
    heads,
    lens,
    plot,
    probe,
    probe_score,
    report,
    show,
    sites,
    steer,
)
from AutomaticEval.cli.options import SPELLINGS
from AutomaticEval.cli.printing import never_fail
from AutomaticEval.cli.reading import Commands
from AutomaticEval.safe_text import shown

app = typer.Typer(
    cls=Commands,
    context_settings=SPELLINGS,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run language models on benchmarks and prompts, and keep their activations from the pass that answered.",
)
app.callback(invoke_without_command=True)(benchmark.benchmark)
app.command("generate")(generate.generate)
app.command("extract")(extract.extract)
app.command("show")(show.show)
app.command("probe")(probe.probe)
app.command("probe_score")(probe_score.probe_score)
app.command("lens")(lens.lens)
app.command("geometry")(geometry.geometry)
app.command("experts")(experts.experts)
app.command("report")(report.report)
app.command("plot")(plot.plot)
app.command("steer")(steer.steer)
app.command("compare")(compare.compare)
app.command("sites")(sites.sites)
app.command("verify")(files.verify)
app.command("merge")(files.merge)
app.command("export")(export.export)
app.command("prune")(files.prune)
app.command("index")(files.index)
app.add_typer(heads.app, name="heads")


def main() -> None:
    """The entry point of `main.py` and of the `automatic-eval` script."""
    never_fail(sys.stdout, sys.stderr)
    signal.signal(signal.SIGTERM, _stop)
    warnings.formatwarning = _one_line
    app()


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning in one line for a person at a terminal, without its place in the code."""
    return shown(f"{category.__name__}: {message}\n")


def _stop(*signal_and_frame: object) -> None:
    """End like an exception on SIGTERM (the time of a batch job is up), so that what was captured is sealed."""
    sys.exit(143)
