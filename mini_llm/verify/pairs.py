"""Which ranks are measured against each other, and which at the same time."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

MOST_FOR_ALL_PAIRS = 8  # that is 28 pairs; of more members, neighbours only
SAME_NODE, BETWEEN_NODES = "same node", "between nodes"

Pair = tuple[int, int]


@dataclass(frozen=True)
class Round:
    """Pairs of ranks of one kind that are measured at once, because they share no connection."""

    kind: str
    pairs: tuple[Pair, ...]


def pairs_of(members: Sequence[int]) -> list[Pair]:
    """All pairs of up to 8 members; of more, a ring, in which each meets two others."""
    if len(members) <= MOST_FOR_ALL_PAIRS:
        return list(itertools.combinations(members, 2))
    return list(itertools.pairwise([*members, members[0]]))


def plan_rounds(node_of_rank: Sequence[int]) -> list[Round]:
    """One pair of nodes after the other, by their first ranks; then inside all nodes at once."""
    nodes: dict[int, list[int]] = {}
    for rank, node in enumerate(node_of_rank):
        nodes.setdefault(node, []).append(rank)
    firsts = [ranks[0] for _, ranks in sorted(nodes.items())]
    rounds = [Round(BETWEEN_NODES, (pair,)) for pair in pairs_of(firsts)]
    inside = [pairs_of(ranks) for ranks in nodes.values()]
    for at_once in itertools.zip_longest(*inside):
        rounds.append(Round(SAME_NODE, tuple(pair for pair in at_once if pair is not None)))
    return rounds


def is_ring(node_of_rank: Sequence[int]) -> bool:
    """Whether only neighbours are measured somewhere, because there are too many pairs."""
    counts = [list(node_of_rank).count(node) for node in set(node_of_rank)]
    return max(len(counts), *counts) > MOST_FOR_ALL_PAIRS
