"""Whether a file that was just written is all there: read back and parsed, by the ending of its name.

Knows nothing of HDF5, whose files carry a trailer and checksums.
"""

from __future__ import annotations

from pathlib import Path

from AutomaticEval.errors import StoreError
from AutomaticEval.store.disk.json_text import parse_json

_PNG_BEGINS, _PNG_ENDS = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def read_back(path: Path) -> None:
    """Parse a .json, .jsonl or .png file; others are as their writer left them. Raises StoreError."""
    try:
        if path.suffix == ".json":
            parse_json(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    parse_json(line)
        elif path.suffix == ".png":
            whole = path.read_bytes()
            if not (whole.startswith(_PNG_BEGINS) and whole.endswith(_PNG_ENDS)):
                raise ValueError("it is no whole PNG")
    except ValueError as broken:
        raise StoreError(f"{path.name} was not written whole ({broken}); it was removed.") from None
