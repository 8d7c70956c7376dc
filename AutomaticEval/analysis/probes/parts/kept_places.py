"""`KeptPlaces`: the places of a probe that are done, in a folder, so that a probe that was cut short goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import sklearn
import xxhash

from AutomaticEval import __version__
from AutomaticEval.analysis.heads.sweep_folder import SweepFolder
from AutomaticEval.analysis.probes.asked import Asked
from AutomaticEval.analysis.probes.grid.spots import Spot
from AutomaticEval.analysis.probes.out_of_fold import OutOfFold
from AutomaticEval.analysis.probes.parts.place_arrays import arrays_of, arrays_of_place, found_of, place_of
from AutomaticEval.analysis.probes.places import Place
from AutomaticEval.analysis.probes.target import Target
from AutomaticEval.errors import SelectionError
from AutomaticEval.file_states import file_states
from AutomaticEval.store.disk.file_names import own_name

PREFIX = "place_"
LONGEST = 150
"""Of the names of parts, in bytes."""
LIBRARIES = {"numpy": np, "scikit-learn": sklearn, "scipy": scipy}


@dataclass(frozen=True)
class KeptPlaces:
    """The parts of one probe."""

    folder: SweepFolder | None
    """None where nothing is kept."""

    mark: str = ""
    """In the names of parts: a hash of the settings. Two probes that begin together in one folder do not take each other's places."""

    @classmethod
    def of(cls, folder: str | Path | None, asked: Asked, runs: Sequence[Target], places: Sequence[str]) -> KeptPlaces:
        """runs: the run, and those of a transfer. places: their names. Raises OtherSettings for a folder with parts of something else, SelectionError for a run."""
        if folder is None:
            return cls(None)
        path = Path(folder).expanduser()
        if any(path.glob("*.h5")):
            raise SelectionError(
                f"{path} is a run, and places are kept in no run; write the result elsewhere (-o/--output, folder=)."
            )
        settings = {
            **asdict(asked),
            "classes": list(runs[0].classes),
            "places": list(places),
            "runs": {str(number): _about(each) for number, each in enumerate(runs, 1)},
            "versions": {"AutomaticEval": __version__, **{name: each.__version__ for name, each in LIBRARIES.items()}},
        }
        kept = SweepFolder(path, settings)
        kept.check_settings()
        return cls(kept, xxhash.xxh3_64_hexdigest(json.dumps(settings).encode())[:8])

    def place(self, spot: Spot, compute: Callable[[], Place]) -> Place:
        """A place of the run, read from its file, or computed and written. Raises StoreError for a damaged file."""
        if self.folder is None:
            return compute()
        return place_of(spot, self.folder.arrays(self._name(spot.name), lambda: arrays_of_place(compute())))

    def found(self, run: int, place: str, compute: Callable[[], OutOfFold]) -> OutOfFold:
        """What probes of a further run said at a place. run: its number, from 2. Raises as `place`."""
        if self.folder is None:
            return compute()
        return found_of(self.folder.arrays(self._name(f"{run}_{place}"), lambda: arrays_of(compute())))

    def _name(self, place: str) -> str:
        return own_name(f"{PREFIX}{self.mark}_{place}", LONGEST)


def _about(of: Target) -> dict[str, Any]:
    """Which run it is, and which of its questions: both are told by what changes when they change."""
    source = of.questions.source
    states = _states(source.path)
    whole = xxhash.xxh3_64()
    for each in (of.labels, of.questions.groups, of.questions.first_samples):
        whole.update(np.ascontiguousarray(each, np.int64).tobytes())
    return {
        "path": source.path.name,
        "model_hash": source.contents.settings.get("model_hash"),
        "files": f"{len(states)}, xxh3_64 {xxhash.xxh3_64_hexdigest(repr(states).encode())}",
        "questions": f"{len(of.labels)}, xxh3_64 {whole.hexdigest()}",
    }


def _states(path: Path) -> list[tuple[str, int, int]]:
    """Of the files that hold a run's rows and columns."""
    if path.is_dir():
        return [each for each in file_states(path, with_subfolders=True) if each[0].endswith(".h5")]
    status = path.stat()
    return [(path.name, status.st_size, status.st_mtime_ns)]


def n_kept(folder: Path) -> int:
    """How many places are there."""
    return len([*SweepFolder(folder, {}).arrays_there(PREFIX)])


def remove_places(folder: Path) -> None:
    """Take the places and their settings away, and the folder, when nothing else is in it."""
    SweepFolder(folder, {}).remove(PREFIX)
