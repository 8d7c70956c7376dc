"""The newest versions of the libraries that this version was tested with, and a warning when a newer one is installed."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from AutomaticEval.errors import warn

NEWEST = {
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "lm_eval": "0.4.13",
    "h5py": "3.16.0",
    "datasets": "5.2.0",
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
    "peft": "0.21.2",
}
"""The newest tested version of each library whose inner workings decide numbers or files."""


def newer() -> list[str]:
    """The installed libraries that are newer than what was tested, each as "transformers 6.0.0 (5.24.0)"."""
    libraries = []
    for name, tested in NEWEST.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if Version(installed).release > Version(tested).release:
            libraries.append(f"{name} {installed} ({tested})")
    return libraries


@functools.cache
def tell_newer() -> None:
    """Warn once a process, in one line, of libraries that are newer than what was tested."""
    libraries = newer()
    if libraries:
        warn(
            f"Newer than what this version was tested with (in brackets): {', '.join(libraries)}. What is captured is checked all the same; "
            "`verify RUN --recompute N` checks it once more."
        )
