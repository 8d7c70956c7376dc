"""Experts to drop, as people write them: 3:0,5:2-4."""

from __future__ import annotations

import re

from AutomaticEval.errors import EditError
from AutomaticEval.models.edit import Edit


def dropped_experts(spec: str) -> list[Edit]:
    """The edits that drop experts: "3:0,5:2-4" is expert 0 of layer 3, and experts 2 to 4 of layer 5.

    Raises EditError for text that names no expert.
    """
    experts: dict[int, set[int]] = {}
    for item in spec.split(","):
        match = re.fullmatch(r"\s*(\d{1,6}):(\d{1,6})(?:-(\d{1,6}))?\s*", item)
        if match is None or int(match[3] or match[2]) < int(match[2]):
            raise EditError(f"{item.strip()!r} is no expert: write layer:expert, such as 3:0,5:2-4.")
        experts.setdefault(int(match[1]), set()).update(range(int(match[2]), int(match[3] or match[2]) + 1))
    return [Edit.drop_experts(layer, sorted(own)) for layer, own in sorted(experts.items())]
