"""Which domains of the fast link the ranks of a group lie in. Pure arithmetic on rank numbers.

A domain is `domain` neighbours of a node, or as many whole nodes as fit in it. Groups of `size` ranks,
`stride` apart, fill the devices one after another, so they need not begin where a domain does:

    tp = 6, nodes of 8    0 1 2 3 4 5 | 6 7 . 8 9 10 11 | 12 13 14 15 . 16 17 | 18 ... 23
                          (1, 6, 6)     (2, 2, 4)         (2, 2, 4)             (1, 6, 6)
"""

from __future__ import annotations

from collections import Counter
from functools import cache

Placement = tuple[int, int, int]
"""Domains that a group touches, ranks in the one with fewest and in the one with most."""


def reach(node: int, domain: int) -> int:
    """Devices that the fast link really joins: part of a node, or whole nodes."""
    return domain if domain < node else domain // node * node


@cache
def placements(size: int, stride: int, devices: int, node: int, domain: int) -> frozenset[Placement]:
    """How the groups of this size and stride lie, each way once.

    Args:
        size: ranks of a group.
        stride: distance between neighbours.
        devices: of all nodes; a group that needs more lies at their beginning.
        node: devices of a node.
        domain: devices that the fast link joins.
    """
    joined = reach(node, domain)
    if size == 1 or stride >= joined:  # neighbours are never in one domain
        return frozenset({(size, 1, 1)})
    node = max(node, joined)
    last = (size - 1) * stride
    devices = max(devices, last + 1)
    starts = {
        start % node
        for block in range(0, devices, size * stride)
        for start in range(block, min(block + stride, devices - last))
    }
    found = set()
    for start in starts:
        ranks = range(start, start + last + 1, stride)
        counts = Counter((rank // node, rank % node // joined) for rank in ranks).values()
        found.add((len(counts), min(counts), max(counts)))
    return frozenset(found)
