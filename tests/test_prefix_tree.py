"""The walk over a prefix tree, against sets of prefixes made by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from AutomaticEval.capture.tree.prefix_tree import PrefixTree
from AutomaticEval.capture.tree.walk import attended


def drawn(seed: int) -> list[list[int]]:
    """Sequences of few letters: many share beginnings, some are equal, or the beginning of another."""
    rng = random.Random(seed)
    return [[rng.randrange(3) for _ in range(rng.randrange(1, 9))] for _ in range(rng.randrange(1, 60))]


@pytest.mark.parametrize("seed", range(20))
def test_every_distinct_prefix_is_one_node_on_the_right_paths(seed: int) -> None:
    sequences = drawn(seed)
    tree = PrefixTree(sequences)
    prefixes = {tuple(each[:n]) for each in sequences for n in range(1, len(each) + 1)}
    assert tree.n_nodes == len(prefixes)
    node_of: dict[tuple[int, ...], int] = {}
    seen: list[int] = []
    for branch in tree.branches():
        seen += branch.members
        for index in branch.members:
            sequence = sequences[index]
            assert tree.token_ids[branch.path].tolist() == sequence
            assert tree.depths[branch.path].tolist() == list(range(len(sequence)))
            for length, node in enumerate(branch.path.tolist(), 1):
                assert node_of.setdefault(tuple(sequence[:length]), node) == node
            assert tree.path_to(branch.path[-1]).tolist() == branch.path[:-1].tolist()
    assert sorted(seen) == list(range(len(sequences)))
    assert len(set(node_of.values())) == len(prefixes)
    for prefix, node in node_of.items():
        others = [other for other in prefixes if len(other) == len(prefix) and other[:-1] == prefix[:-1]]
        if len(others) > 1:  # where paths part, stored pieces are cut
            assert tree.forks[node]


@pytest.mark.parametrize("seed", range(8))
def test_any_stretch_attends_to_ancestors_and_itself_only(seed: int) -> None:
    tree = PrefixTree(drawn(seed))
    rng = random.Random(seed)
    for _ in range(30):
        start = rng.randrange(tree.n_nodes)
        stop = rng.randrange(start + 1, tree.n_nodes + 1)
        columns = [*tree.path_to(start), *range(start, stop)]
        nodes = np.array(columns)
        mask = attended(torch.from_numpy(nodes), torch.from_numpy(tree.ends[nodes]), stop - start).numpy()
        assert mask.shape == (stop - start, len(columns))
        for line, node in zip(mask, range(start, stop), strict=True):
            assert nodes[line].tolist() == [*tree.path_to(node), node]


def test_marked_nodes_are_those_that_some_sequence_wants() -> None:
    sequences = [[1, 2, 3], [1, 2], [1, 5], [1, 2, 3]]
    tree = PrefixTree(sequences)
    wanted = [[2], [1], [0, 1], []]
    expected = {
        tuple(sequence[: place + 1]) for sequence, places in zip(sequences, wanted, strict=True) for place in places
    }
    marked = tree.marked(wanted.__getitem__)
    found = {tuple(tree.token_ids[[*tree.path_to(node), node]].tolist()) for node in np.flatnonzero(marked)}
    assert found == expected
