"""Draw docs/layout.svg from helix_megatron.layout: who holds which rows of linear_qkv.

    python docs/make_picture.py
"""

from pathlib import Path

from helix_megatron.grid import AttentionShape, HelixGrid
from helix_megatron.layout import HelixLayout

SHAPE = AttentionShape(num_attention_heads=4, num_query_groups=2, kv_channels=8, rotary_dim=8)
COLOURS = ["#1f77b4", "#9ecae1", "#d95f0e", "#fdbe85"]
CELL, LEFT, TOP, ROW = 15, 250, 66, 56
CASES = [
    ("Megatron, TP = 2", "TP = 4 would copy K and V", HelixLayout(SHAPE, HelixGrid(2, 1))),
    ("Helix 2 x 2, dims", "every head sliced: no copies", HelixLayout(SHAPE, HelixGrid(2, 2))),
    ("Helix 2 x 2, heads", "whole query heads, sliced K and V", HelixLayout(SHAPE, HelixGrid(2, 2), "heads")),
]


def picture() -> str:
    """The SVG as text."""
    rows = (SHAPE.num_attention_heads + 2 * SHAPE.num_query_groups) * SHAPE.kv_channels
    width, height = LEFT + rows * CELL + 20, TOP + len(CASES) * ROW + 50
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="12" y="24" font-size="17">Rows of linear_qkv: {SHAPE.num_attention_heads} query heads, '
        f"{SHAPE.num_query_groups} KV heads of dimension {SHAPE.kv_channels}</text>",
    ]
    names = ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
    for index, name in enumerate(names):
        x = LEFT + (index + 0.5) * SHAPE.kv_channels * CELL
        out.append(f'<text x="{x}" y="{TOP - 12}" text-anchor="middle">{name}</text>')
    for line, (title, note, layout) in enumerate(CASES):
        y = TOP + line * ROW
        out.append(f'<text x="12" y="{y + 15}" font-weight="bold">{title}</text>')
        out.append(f'<text x="12" y="{y + 33}" font-size="11">{note}</text>')
        step = len(COLOURS) // layout.grid.size
        for rank in range(layout.grid.size):
            for row in layout.qkv_rows(rank):
                out.append(
                    f'<rect x="{LEFT + int(row) * CELL}" y="{y}" width="{CELL}" height="32" '
                    f'fill="{COLOURS[rank * step]}" stroke="white" stroke-width="0.5"/>'
                )
        for head in range(len(names) + 1):
            x = LEFT + head * SHAPE.kv_channels * CELL
            out.append(f'<line x1="{x}" y1="{y - 3}" x2="{x}" y2="{y + 35}" stroke="black"/>')
    y = TOP + len(CASES) * ROW + 10
    for rank in range(4):
        i, j = HelixGrid(2, 2).coordinate(rank)
        x = LEFT + rank * 238
        out.append(f'<rect x="{x}" y="{y}" width="16" height="16" fill="{COLOURS[rank]}"/>')
        out.append(f'<text x="{x + 22}" y="{y + 13}">rank {rank}: head group {i}, slice {j}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("layout.svg").write_text(picture(), encoding="utf-8")
