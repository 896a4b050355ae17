"""How the figures of a comparison look, whatever they show: style, sizes, colours, names, SVG and PNG."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart.
MEGATRON, HELIX = "#7d7d7d", "#0072b2"
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7d7d7d", "#000000")
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "xtick.color": "#444444",
    "ytick.color": "#222222",
    "svg.fonttype": "none",  # letters stay letters: small files, and a test can measure them
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Plot:
    """One figure of the report."""

    key: str
    title: str
    caption: str
    figure: Callable[[dict[str, Any], bool], Figure | None]
    tag: str = "measured"
    """What its numbers are."""


def draw(plot: Plot, results: dict[str, Any], narrow: bool) -> Figure | None:
    """The figure in the report's style, wide or narrow; None where the results have no data for it."""
    with matplotlib.rc_context(_STYLE):
        return plot.figure(results, narrow)


def number(value: float) -> str:
    """Four digits, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def svg(figure: Figure, prefix: str) -> str:
    """The figure as an <svg> element for a page that holds several: its ids begin with `prefix`."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": prefix}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    return re.sub(r"(url\(#|href=\"#)", rf"\g<1>{prefix}-", text)


def png(figure: Figure, words: str) -> bytes:
    """The figure for a paper, 200 dots an inch; it says by itself what its numbers are."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.supxlabel(words, x=0.99, ha="right", fontsize=7, color="#777777")
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def new_figure(narrow: bool, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the page or a phone, `height` inches high, and its axes, row by row."""
    figure = Figure(figsize=(3.45 if narrow else 7.3, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [ax for row in axes for ax in row]


def colour_of(variant: dict[str, Any]) -> str:
    """Blue for Helix, grey for Megatron."""
    return HELIX if variant["attention_impl"] == "helix" else MEGATRON


def wrapped(name: str, narrow: bool) -> str:
    """A name in lines that fit beside the axes."""
    return "\n".join(textwrap.wrap(name, 16 if narrow else 24))


def name_rows(ax: Axes, variants: list[dict[str, Any]], narrow: bool) -> None:
    """One row for each variant, its name on the left, the first on top."""
    ax.set_yticks(range(len(variants)), [wrapped(v["name"], narrow) for v in variants])
    ax.set_ylim(len(variants) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)


def bars_height(count: int, narrow: bool) -> float:
    """Inches for so many rows, with their axis and title."""
    return 0.75 + count * (0.42 if narrow else 0.3)


def names_beside(ax: Axes, points: list[tuple[float, float, str, str]], narrow: bool) -> None:
    """Names of (x, y, name, colour) in a column right of the axes, each with a line to its point.

    They keep the points' order and stand evenly apart, so that they never touch.
    """
    (low, high), ordered = ax.get_ylim(), sorted(points, key=lambda point: -point[1])
    for index, (x, y, name, colour) in enumerate(ordered):
        place = (1.06, 1 - (index + 0.5) / len(ordered))
        ax.annotate(
            wrapped(name, narrow),
            (x, y),
            place,
            xycoords="data",
            textcoords="axes fraction",
            va="center",
            ha="left",
            fontsize=7.5,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6},
        )
    ax.set_ylim(low, high)
