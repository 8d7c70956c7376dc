"""`keeping_parallelism`: tokenizers keep the number of cores that they had, whatever transformers sets meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "TOKENIZERS_PARALLELISM"
"""The environment variable that says whether tokenizers encode many texts on all cores. Unset means that they do."""


@contextmanager
def keeping_parallelism() -> Iterator[None]:
    """Inside the with, transformers may set VARIABLE; afterwards it is what it was.

    transformers sets it to "0", for the rest of the process, in `GenerationMixin._valid_auto_compile_criteria`, which `generate` asks
    before it takes a compiled decode step.
    """
    before = os.environ.get(VARIABLE)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before
