"""Draw the pictures of the documentation from the code's own layout: they cannot say something else.

python docs/make_picture.py      layout.svg: who holds which rows of linear_qkv
                                 exchange.svg: what one exchange inside attention moves
"""

from collections.abc import Iterator
from pathlib import Path

from helix_megatron.partition.grid import AttentionShape, HelixGrid
from helix_megatron.partition.layout import HelixLayout
from helix_megatron.show import COLOURS, svg

SHAPE = AttentionShape(num_attention_heads=4, num_query_groups=2, kv_channels=8, rotary_dim=8)
CASES = [
    ("Megatron, TP = 2", "TP = 4 would copy K and V", HelixLayout(SHAPE, HelixGrid(2, 1))),
    ("Helix 2 x 2, dims", "every head sliced: no copies", HelixLayout(SHAPE, HelixGrid(2, 2))),
    ("Helix 2 x 2, heads", "whole query heads, sliced K and V", HelixLayout(SHAPE, HelixGrid(2, 2), "heads")),
]
EXCHANGE = HelixLayout(AttentionShape(4, 1, 8, rotary_dim=8), HelixGrid(1, 4))
CELL, RANK, LEFT, TOP = 15, 208, 220, 86  # pixels: a dimension, a rank's column, the margins
Row = tuple[str, dict[int, int]]
"""A head's name, and the rank that its dimensions come from: {dimension: rank}."""


def layout_picture() -> str:
    """layout.svg as text."""
    return svg(CASES)


def stages(layout: HelixLayout, rank: int) -> Iterator[tuple[str, str, list[Row]]]:
    """What a rank of the dim group holds, step by step: (title, what happened before it, rows).

    "dims" placement, and m divides the query heads of the group: every rank attends with whole heads.
    """
    m, heads = layout.grid.dim_parallel_size, layout.query_heads
    mine = heads // m  # query heads that a rank attends with
    own = range(rank * mine, (rank + 1) * mine)
    key = {int(d): j for j in range(m) for d in layout.key_dims(j)}
    value = {int(d): j for j in range(m) for d in layout.value_dims(j)}
    moved = layout.exchanged_elements()
    keys, queries = moved["K and V"], moved["queries"]

    def of(rank_only: bool, owners: dict[int, int]) -> dict[int, int]:
        return {d: j for d, j in owners.items() if j == rank or not rank_only}

    kv: list[Row] = [(f"{n}{g}", o) for g in range(layout.kv_heads) for n, o in (("k", key), ("v", value))]
    sliced = [(f"q{h}", of(True, key)) for h in range(heads)] + [(n, of(True, o)) for n, o in kv]
    yield "Slices", "linear_qkv: a slice of every head", sliced
    first, stop = layout.kv_ranges[rank]
    whole = [(f"q{h}", key) for h in own] + kv[2 * first : 2 * stop]
    yield "Whole heads", f"one all-to-all: {queries:g} of queries, {keys:g} of K and V", whole
    out = [(f"o{h}", dict.fromkeys(value, rank)) for h in own]
    yield "Attention", "an ordinary core; nothing is sent", out
    back = [(f"o{h}", {d: h // mine for d in of(True, value)}) for h in range(heads)]
    yield "Slices again", f"output all-to-all: {moved['outputs']:g}", back


def exchange_picture(layout: HelixLayout = EXCHANGE) -> str:
    """exchange.svg as text: a column for each rank of the dim group, a row of boxes for each stage."""
    m, d = layout.grid.dim_parallel_size, layout.shape.kv_channels
    columns = [list(stages(layout, rank)) for rank in range(m)]
    width, y, out = LEFT + m * RANK, TOP, []
    for rank in range(m):
        x = LEFT + rank * RANK
        out.append(f'<rect x="{x}" y="{TOP - 26}" width="14" height="14" fill="{COLOURS[rank]}"/>')
        name = f"rank {rank} of the dim group"
        out.append(f'<text x="{x + 20}" y="{TOP - 14}" font-weight="bold">{name}</text>')
    for number, (title, before, rows) in enumerate(columns[0]):
        out.append(f'<text x="12" y="{y + 13}" font-weight="bold">{number + 1}. {title}</text>')
        for line, part in enumerate(before.split("; ")):
            out.append(f'<text x="12" y="{y + 31 + 16 * line}" font-size="12">{part}</text>')
        for rank in range(m):
            for line, (name, owners) in enumerate(columns[rank][number][2]):
                x, top = LEFT + rank * RANK, y + line * (CELL + 4)
                out.append(f'<text x="{x}" y="{top + 12}" font-size="12">{name}</text>')
                for dim in range(d):
                    fill = COLOURS[owners[dim]] if dim in owners else "none"
                    out.append(
                        f'<rect x="{x + 22 + dim * CELL}" y="{top}" width="{CELL}" height="{CELL}" '
                        f'fill="{fill}" stroke="#999" stroke-width="0.6"/>'
                    )
        y += max(len(rows), 3) * (CELL + 4) + 26
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14">',
        f'<rect width="{width}" height="{y}" fill="white"/>',
        f'<text x="12" y="20" font-size="17">One exchange: {layout.query_heads} query heads and '
        f"{layout.kv_heads} KV head of dimension {d}, m = {m}</text>",
        '<text x="12" y="40" font-size="12">Colour: the rank that computed a dimension. Numbers: elements '
        "that a rank receives for each token and layer.</text>",
    ]
    return "\n".join([*head, *out, "</svg>"]) + "\n"


PICTURES = {"layout.svg": layout_picture, "exchange.svg": exchange_picture}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        Path(__file__).with_name(name).write_text(draw(), encoding="utf-8")
