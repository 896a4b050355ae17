"""`helix show`: who holds which heads and dimensions, and what one exchange moves; a table, or an SVG.

Everything is read off `HelixLayout`: the picture cannot say something else than the code does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from helix_megatron.partition.config import HelixConfig, HelixPlan, parse_weights
from helix_megatron.partition.layout import HelixLayout, Indices

COLOURS = ["#1f77b4", "#9ecae1", "#d95f0e", "#fdbe85", "#31a354", "#a1d99b", "#756bb1", "#bcbddc"]
_LEFT, _TOP, _HEIGHT, _WIDTH, _GAP = 250, 66, 32, 960, 56


def ranges(numbers: Indices) -> list[tuple[int, int]]:
    """Half-open ranges of the sorted numbers: 4 5 6 0 1 -> (0, 2), (4, 7)."""
    numbers = np.sort(numbers)
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts if len(part)]


def _words(numbers: Indices) -> str:
    return ", ".join(f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in ranges(numbers))


def table(plan: HelixPlan) -> Table:
    """One line per tensor-parallel rank."""
    layout = plan.layout
    whole = layout.query_placement == "heads"
    found = Table(title=f"{layout.shape}; {plan.describe()}")
    for name in "rank|group i|slice j|query heads|of each|KV heads|K: of each|V: of each".split("|"):
        found.add_column(name)
    for rank in range(layout.grid.size):
        i, j = layout.grid.coordinate(rank)
        kv_heads = np.arange(i * layout.kv_heads, (i + 1) * layout.kv_heads)
        dims = np.arange(layout.shape.kv_channels) if whole else layout.key_dims(j)
        cells = [layout.local_query_heads(rank), dims, kv_heads, layout.key_dims(j), layout.value_dims(j)]
        last = j == plan.grid.dim_parallel_size - 1
        found.add_row(str(rank), str(i), str(j), *map(_words, cells), end_section=last)
    return found


def exchange_lines(plan: HelixPlan) -> list[str]:
    """The exchange inside the first dim group, in words."""
    layout, m = plan.layout, plan.grid.dim_parallel_size
    if m == 1:
        return ["Heads are not sliced: nothing is exchanged inside attention."]
    if layout.per_slice:
        return ["Per-slice softmax exchanges nothing; it is another model."]
    if plan.comm_type == "all_reduce":
        return [f"Ranks 0-{m - 1} sum their partial scores: s x s of each query head."]
    lines = [f"Ranks 0-{m - 1} (and every other head group alike), per token, layer and forward pass:"]
    mean = "" if layout.is_even else ", mean of the ranks"
    moved = layout.exchanged_elements()
    lines += [f"  {name}: {count:g} elements received{mean}" for name, count in moved.items()]
    shape, tp = layout.shape, layout.grid.size
    total = sum(moved.values())
    if tp > shape.num_query_groups:
        theirs = (tp - 1) / tp * (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.kv_channels
        lines.append(f"  together {total:g}; Megatron would gather the mixed QKV: {theirs:g}")
    return lines


# ---- SVG ----
def _head_names(layout: HelixLayout) -> list[str]:
    """q0 q1 k0 v0 ...: the heads of linear_qkv in the order of its rows."""
    ratio, names = layout.shape.num_attention_heads // layout.shape.num_query_groups, []
    for group in range(layout.shape.num_query_groups):
        names += [f"q{group * ratio + head}" for head in range(ratio)] + [f"k{group}", f"v{group}"]
    return names


def svg(cases: list[tuple[str, str, HelixLayout]]) -> str:
    """Rows of `linear_qkv`, coloured by the rank that holds them: one bar for each (title, note, layout).

    All layouts have the same shape.
    """
    shape, names = cases[0][2].shape, _head_names(cases[0][2])
    rows, ranks = len(names) * shape.kv_channels, max(layout.grid.size for _, _, layout in cases)
    scale = _WIDTH / rows
    width, lines = _LEFT + _WIDTH + 20, -(-ranks // 4)
    height = _TOP + len(cases) * _GAP + 24 + 24 * lines
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="12" y="24" font-size="17">Rows of linear_qkv: {shape.num_attention_heads} query heads, '
        f"{shape.num_query_groups} KV heads of dimension {shape.kv_channels}</text>",
    ]
    size = min(14.0, 0.45 * _WIDTH / len(names))
    for index, name in enumerate(names):
        x = _LEFT + (index + 0.5) * shape.kv_channels * scale
        out.append(
            f'<text x="{x:.1f}" y="{_TOP - 12}" text-anchor="middle" font-size="{size:.1f}">{name}</text>'
        )
    for line, (title, note, layout) in enumerate(cases):
        y = _TOP + line * _GAP
        out.append(f'<text x="12" y="{y + 15}" font-weight="bold">{title}</text>')
        out.append(f'<text x="12" y="{y + _HEIGHT + 1}" font-size="11">{note}</text>')
        for rank in range(layout.grid.size):
            for start, stop in ranges(layout.qkv_rows(rank)):
                out.append(
                    f'<rect x="{_LEFT + start * scale:.1f}" y="{y}" width="{(stop - start) * scale:.1f}" '
                    f'height="{_HEIGHT}" fill="{COLOURS[rank * ranks // layout.grid.size % len(COLOURS)]}"/>'
                )
        for head in range(len(names) + 1):
            x = _LEFT + head * shape.kv_channels * scale
            ends = f'x1="{x:.1f}" y1="{y - 3}" x2="{x:.1f}" y2="{y + _HEIGHT + 3}"'
            out.append(f'<line {ends} stroke="black"/>')
    last = max((layout for _, _, layout in cases), key=lambda layout: layout.grid.size)
    for rank in range(ranks):
        i, j = last.grid.coordinate(rank)
        x, y = _LEFT + rank % 4 * 238, _TOP + len(cases) * _GAP + 10 + 24 * (rank // 4)
        out.append(f'<rect x="{x}" y="{y}" width="16" height="16" fill="{COLOURS[rank % len(COLOURS)]}"/>')
        out.append(f'<text x="{x + 22}" y="{y + 13}">rank {rank}: head group {i}, slice {j}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


# ---- the command ----
def add_show(subparsers: Any) -> None:
    """`helix show`."""
    parser = subparsers.add_parser("show", help="who holds which heads and dimensions, and what is exchanged")
    add = parser.add_argument
    add("--heads", type=int, required=True, metavar="H", help="query heads")
    add("--kv-heads", type=int, required=True, metavar="G", help="KV heads")
    add("--head-dim", type=int, default=128, metavar="D", help="dimension of a head (default %(default)s)")
    add("--rotary-percent", type=float, default=1.0, help="share of it that RoPE rotates, 0 to 1")
    add("--tensor-model-parallel-size", type=int, required=True, metavar="T", help="ranks")
    add("--helix-head-parallel-size", type=int, metavar="N", help="head groups (default: chosen)")
    add("--helix-dim-parallel-size", type=int, metavar="M", help="slices (default: chosen)")
    add("--helix-slice-weights", metavar="W,W,...", help="sizes of the slices, M numbers (default: equal)")
    add("--helix-query-placement", choices=["auto", "dims", "heads"], default="auto")
    add("--svg", type=Path, metavar="FILE", help="write a picture too")
    parser.set_defaults(run=_show)


def _show(options: argparse.Namespace) -> int:
    weights = options.helix_slice_weights
    helix = HelixConfig(
        options.helix_head_parallel_size,
        options.helix_dim_parallel_size,
        slice_weights=parse_weights(weights) if weights is not None else None,
        query_placement=options.helix_query_placement,
        rotary_percent=options.rotary_percent,
    )
    ranks = options.tensor_model_parallel_size
    plan = helix.resolve(options.heads, options.kv_heads, options.head_dim, ranks)
    console = Console()
    console.print(table(plan))
    for line in exchange_lines(plan):
        console.print(line, highlight=False)
    if options.svg is not None:
        title = f"Helix {plan.grid}, {plan.layout.query_placement}"
        options.svg.write_text(svg([(title, "each rank its colour", plan.layout)]), encoding="utf-8")
        console.print(f"written: {options.svg}", highlight=False)
    return 0
