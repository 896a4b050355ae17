"""How the figures of a comparison look, whatever they show: style, sizes, colours, names, SVG and PNG."""

from __future__ import annotations

import inspect
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
    "font.family": "DejaVu Sans", "font.size": 8.5,
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#ececec",
    "xtick.color": "#444444", "ytick.color": "#222222",
    "svg.fonttype": "none",  # letters stay letters: small files, and a test can measure them
    "axes.formatter.useoffset": False,
}  # fmt: skip
Record = dict[str, Any]


@dataclass(frozen=True)
class Plot:
    """One figure of the report."""

    title: str
    figure: Callable[[Record, bool], Figure | None]
    tag: str = "measured"
    """What its numbers are."""

    @property
    def key(self) -> str:
        """Its id in the page and the name of its PNG."""
        return self.figure.__name__

    @property
    def caption(self) -> str:
        return " ".join((inspect.getdoc(self.figure) or "").split())

    def draw(self, results: Record, narrow: bool) -> Figure | None:
        """In the report's style, wide or narrow; None where the results have no data for it."""
        with matplotlib.rc_context(_STYLE):
            return self.figure(results, narrow)


def format_number(value: float) -> str:
    """Four digits, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def svg(figure: Figure, prefix: str) -> str:
    """The figure as an <svg> element for a page that holds several: its ids begin with `prefix`."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": prefix}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r'\bid="', f'id="{prefix}-', text[text.index("<svg") :])
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
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def wrap(name: str, narrow: bool) -> str:
    return "\n".join(textwrap.wrap(name, 16 if narrow else 24))


def colour_of(variant: Record) -> str:
    return HELIX if variant["attention_impl"] == "helix" else MEGATRON


def name_rows(ax: Axes, labels: list[str], size: float | None = None) -> None:
    """One row for each label, which stands on the left, the first on top."""
    ax.set_yticks(range(len(labels)), labels, fontsize=size)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)


def row_panels(
    variants: list[Record], titles: list[str | None], narrow: bool, columns: int, extra: float, unit: str
) -> tuple[Figure, list[Axes]]:
    """Axes with a row for each variant, one for each title; `extra` inches are left for a legend."""
    rows = -(-len(titles) // columns)
    height = extra + rows * (0.75 + len(variants) * (0.42 if narrow else 0.3))
    figure, axes = new_figure(narrow, height, columns, rows)
    for index, (ax, title) in enumerate(zip(axes, titles)):
        name_rows(ax, [wrap(variant["name"], narrow) for variant in variants])
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(unit)
        if title:
            ax.set_title(title[0].upper() + title[1:])
            ax.locator_params(axis="x", nbins=4)
        if index % columns:
            ax.set_yticklabels([])
    for ax in axes[len(titles) :]:
        ax.remove()
    return figure, axes[: len(titles)]


def stack(ax: Axes, y: float, sizes: dict[str, float], colours: dict[str, str], label: bool) -> float:
    """A bar of `sizes` one after the other; returns where it ends."""
    left = 0.0
    for part, colour in colours.items():
        size = sizes.get(part, 0.0)
        ax.barh(y, size, left=left, height=0.62, color=colour, label=part if label else None)
        left += size
    return left


def stack_bytes(
    variants: list[Record], sizes: list[dict[str, float]], colours: dict[str, str], words: str, narrow: bool
) -> Figure:
    """A bar for each variant, of its sizes in bytes by part; the sum stands at its end."""
    scale, unit = (1e9, "GB") if max(sum(one.values()) for one in sizes) > 3e9 else (1e6, "MB")
    figure, (ax,) = row_panels(variants, [None], narrow, 1, 0.75, f"{unit} {words}")
    for y, one in enumerate(sizes):
        end = stack(ax, y, {part: size / scale for part, size in one.items()}, colours, y == 0)
        ax.annotate(f"{end:.3g}", (end, y), (4, 0), textcoords="offset points", va="center")
    ax.margins(x=0.1)
    figure.legend(loc="outside upper left", ncols=2 if narrow else 3, frameon=False)
    return figure


def name_points(ax: Axes, points: list[tuple[float, float, str, str]], narrow: bool) -> None:
    """Names of (x, y, name, colour) in a column right of the axes, each with a line to its point.

    They keep the points' order and stand evenly apart, so that they never touch.
    """
    (low, high), ordered = ax.get_ylim(), sorted(points, key=lambda point: -point[1])
    for index, (x, y, name, colour) in enumerate(ordered):
        place = (1.06, 1 - (index + 0.5) / len(ordered))
        arrow = {"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6}
        ax.annotate(wrap(name, narrow), (x, y), place, xycoords="data", textcoords="axes fraction",
                    va="center", ha="left", fontsize=7.5, color=colour, arrowprops=arrow)  # fmt: skip
    ax.set_ylim(low, high)
