"""What a command says of the places that it keeps: those that are there already, and, when it is cut short, how to go on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from AutomaticEval.cli.printing import say


@contextmanager
def going_on(folder: Path) -> Iterator[None]:
    """folder: of the places of a probe. When the with fails before there is any place, it is taken away."""
    from AutomaticEval.analysis.probes.parts.kept_places import n_kept, remove_places
    from AutomaticEval.processes import command_line

    is_there = folder.exists()
    if n_kept(folder):
        say(f"Places that are there already, in {folder}: {n_kept(folder)}", err=True)
    try:
        yield
    except BaseException as failure:
        n = n_kept(folder)
        if not n and not is_there:
            remove_places(folder)
        if isinstance(failure, KeyboardInterrupt | SystemExit):
            how = f"To go on:\n  {command_line(*sys.argv[1:])}"
            say(f"\nCut short; places that are done, in {folder}: {n}. {how}", err=True)
        raise
