"""Draw docs/layout.svg with helix_megatron.show: who holds which rows of linear_qkv.

    python docs/make_picture.py
"""

from pathlib import Path

from helix_megatron.grid import AttentionShape, HelixGrid
from helix_megatron.layout import HelixLayout
from helix_megatron.show import svg

SHAPE = AttentionShape(num_attention_heads=4, num_query_groups=2, kv_channels=8, rotary_dim=8)
CASES = [
    ("Megatron, TP = 2", "TP = 4 would copy K and V", HelixLayout(SHAPE, HelixGrid(2, 1))),
    ("Helix 2 x 2, dims", "every head sliced: no copies", HelixLayout(SHAPE, HelixGrid(2, 2))),
    ("Helix 2 x 2, heads", "whole query heads, sliced K and V", HelixLayout(SHAPE, HelixGrid(2, 2), "heads")),
]


def picture() -> str:
    """The SVG as text."""
    return svg(CASES)


if __name__ == "__main__":
    Path(__file__).with_name("layout.svg").write_text(picture(), encoding="utf-8")
