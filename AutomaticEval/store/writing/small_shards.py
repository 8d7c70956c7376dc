"""Which small shards of a run are written again as one when the run closes."""

from __future__ import annotations

from collections.abc import Sequence

from AutomaticEval.store.hdf5.writing.activations import Source

SMALL = 1 / 8
"""The part of a shard's size up to which it is merged with its neighbours."""


def groups_to_merge(sources: Sequence[Source], shard_bytes: int, free_bytes: int) -> list[list[Source]]:
    """The shards in groups, in order. A group of several is small neighbours that together are no larger than a shard.

    The disk has room for each group beside its old shards.
    """
    room = min(shard_bytes, free_bytes / 4)
    groups: list[list[Source]] = []
    is_open = False
    for source in sources:
        is_small = source.size_bytes <= shard_bytes * SMALL
        if is_open and is_small and sum(each.size_bytes for each in groups[-1]) + source.size_bytes <= room:
            groups[-1].append(source)
        else:
            groups.append([source])
        is_open = is_small
    return groups
