"""How many bytes of KV cache a rank holds for a token (pure arithmetic).

Note [Three ways to hold the keys and values of G heads on T ranks]      SmolLM2, G = 3, at T = 6
    the whole model       2 L G d          elements a token                         6 slices of d/2
    Helix                 2 L G d / T      on every rank, nothing twice             1 slice each
    Megatron              2 L ceil(G/T) d  whole heads only: with T > G each head   1 head each: twice
                                           is on T/G ranks                          what Helix holds
    Where m does not divide d, Helix holds d/m rounded up: 11 of 64 dimensions at 1x6, 3 % more.
    Megatron itself refuses the sizes where G and T do not divide one another; the formula is what whole heads
    on every rank would need at least.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KvBytes:
    """Bytes of keys and values.

    Args:
        layers: L, with attention.
        kv_heads: G.
        head_dim: d.
        itemsize: bytes of an element.
    """

    layers: int
    kv_heads: int
    head_dim: int
    itemsize: int

    def total_bytes(self, tokens: int = 1) -> int:
        """Of the model: every key and value once."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize * tokens

    def replicated_bytes(self, ranks: int, tokens: int = 1) -> int:
        """Of a rank that holds whole heads, as Megatron's do."""
        heads = -(-self.kv_heads // ranks)
        return self.total_bytes(tokens) // self.kv_heads * heads


def readable(count: float) -> str:
    """Bytes with a unit: '1.50 MiB'."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
