"""Which position of a sequence the KV cache keeps on which rank of a dim group, and where.

Pure arithmetic on integers, numpy arrays or torch tensors of integers alike.

Note [Round-robin interleaving]                                     m = 2 ranks, blocks of size 3
    position   0  1  2 | 3  4  5 | 6  7  8 | 9 10 11 | 12 13 ...
    rank       0  0  0 | 1  1  1 | 0  0  0 | 1  1  1 |  0  0 ...
    slot       0  1  2 | 0  1  2 | 3  4  5 | 3  4  5 |  6  7 ...
    Every position is kept once. Slots have no gaps and grow with the position, so the part of a sequence of
    any length that a rank keeps is a prefix of its slots.

    In a paged cache a logical block of B positions keeps B/m of them on each rank. When a whole number of
    cycles (m * size positions) fills a block, the slots of logical block k are k * B/m ... (k+1) * B/m - 1:
    the block table of the unsharded cache addresses the shard as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from helix_megatron.partition.grid import HelixConfigError

Integers = Any  # int, or numpy or torch integers of any shape


@dataclass(frozen=True)
class KvInterleave:
    """Positions dealt to `ranks` ranks in blocks of `size`.

    Args:
        ranks: m, at least 1.
        size: positions of a block, at least 1.
    """

    ranks: int
    size: int

    @property
    def cycle(self) -> int:
        """Positions after which the dealing begins again."""
        return self.ranks * self.size

    def owner(self, position: Integers) -> Integers:
        """Rank of the dim group that keeps `position`."""
        return position // self.size % self.ranks

    def slot(self, position: Integers) -> Integers:
        """Where its owner keeps `position`."""
        return position // self.cycle * self.size + position % self.size

    def position(self, rank: int, slot: Integers) -> Integers:
        """The position in a rank's slot: inverse of owner and slot."""
        return (slot // self.size * self.ranks + rank) * self.size + slot % self.size

    def count(self, rank: int, length: Integers) -> Integers:
        """How many of the first `length` positions `rank` keeps."""
        rest = length % self.cycle - rank * self.size  # of the last cycle, from this rank's block on
        clamped = (abs(rest) + self.size - abs(rest - self.size)) // 2  # to 0 ... size
        return length // self.cycle * self.size + clamped


def interleave_of_sequence(ranks: int, wanted: int, max_length: int) -> KvInterleave:
    """The interleaving of a cache for sequences of at most `max_length`: blocks of `wanted` positions, or
    smaller ones where those would leave ranks without work even at full length."""
    return KvInterleave(ranks, max(1, min(wanted, -(-max_length // ranks))))


def interleave_of_block(ranks: int, wanted: int, block_size: int) -> KvInterleave:
    """The interleaving inside a paged cache's blocks: the largest size up to `wanted` of which whole cycles
    fill a block.

    Raises:
        HelixConfigError: the ranks cannot share a block evenly.
    """
    if block_size % ranks:
        raise HelixConfigError(
            f"a KV cache block of {block_size} tokens cannot be shared evenly by the m = {ranks} ranks of a "
            f"dim group; use a block size that is a multiple of {ranks}, or a grid with another m"
        )
    share = block_size // ranks
    size = next(size for size in range(min(wanted, share), 0, -1) if share % size == 0)
    return KvInterleave(ranks, size)
