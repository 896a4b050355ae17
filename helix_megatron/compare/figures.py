"""The figures of a comparison: results in, a matplotlib Figure out, or None when there is no data.

Each is drawn twice: wide for a screen, paper and PNG, narrow for a phone, so that its letters stay readable.
Names stand beside what they name, not in a legend, wherever there are more than three. What a function of
`PLOTS` has as its docstring is the caption under its figure.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helix_megatron.compare import drawing
from helix_megatron.compare.comparisons import MEMORY_PARTS, WORKLOADS, scaling_points
from helix_megatron.compare.drawing import LINES, Plot, Record

PARTS = {"compute": "#0072b2", "communication": "#e69f00", "idle": "#d9d9d9"}
_MEMORY_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#d55e00")
_LOW, _HIGH = 0.08, 12.5  # the ratios that are shown


def _measured(results: Record) -> list[Record]:
    """What has a bar: variants with numbers, the first on top; a scaling study has a figure of its own."""
    return [v for v in results["variants"] if "measured" in v and not v["family"]]


def _works(variant: Record) -> Record:
    return variant["measured"]["workloads"]


# ---- the figures


def ratios(results: Record, narrow: bool) -> Figure | None:
    """Dot: ratio of speeds, variant / baseline. Line: 95 % t-interval over paired runs; an arrow where it
    goes on. An interval that crosses 1 shows no difference."""
    first: dict[str, str] = {}
    entries = [
        e for e in results["comparisons"] if first.setdefault(e["variant"], e["baseline"]) == e["baseline"]
    ]
    names = [w for w in ("train", "prefill", "decode", "mixed") if any(e["workload"] == w for e in entries)]
    if not names:
        return None
    shown = [v for v in first if any((e["variant"], e["workload"]) == (v, names[0]) for e in entries)]
    figure, (ax,) = drawing.new_figure(narrow, 0.9 + len(shown) * (0.62 if narrow else 0.5))
    step = 0.8 / len(names)
    for index, name in enumerate(names):
        for entry in (e for e in entries if e["workload"] == name and e["variant"] in shown):
            y = shown.index(entry["variant"])
            _draw_ratio(ax, entry, y - 0.4 + step * (index + 0.5), LINES[index], name if y == 0 else None)
    ax.axvline(1, color="#222222", lw=1)
    ax.set_xscale("log")
    ax.set_xlim(_LOW, _HIGH)
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10)
    ax.set_xticks(ticks, [f"{tick:g}×" for tick in ticks], minor=False)  # noqa: RUF001
    ax.set_xticks([], minor=True)
    several = len({first[v] for v in shown}) > 1
    against = {v: f"\n/ {drawing.wrap(first[v], narrow)}" if several else "" for v in shown}
    labels = [drawing.wrap(v, narrow) + against[v] for v in shown]
    drawing.name_rows(ax, labels, 7.5 if several else None)
    unit = f"speed / speed of {'the baseline' if several else first[shown[0]]}"
    ax.set_xlabel(drawing.wrap(unit, narrow) if narrow else unit)
    figure.legend(loc="outside upper left", ncols=2 if narrow else 4, frameon=False)
    return figure


def _draw_ratio(ax: Axes, entry: Record, y: float, colour: str, label: str | None) -> None:
    ax.plot(min(max(entry["ratio"], _LOW), _HIGH), y, "o", ms=4.5, color=colour, label=label)
    if entry["ci95"]:
        ax.plot([min(max(end, _LOW), _HIGH) for end in entry["ci95"]], [y, y], "-", lw=1.4, color=colour)
        for end, edge, marker in zip(entry["ci95"], (_LOW, _HIGH), "<>"):
            if not _LOW <= end <= _HIGH:  # it goes on
                ax.plot(edge, y, marker, ms=4, color=colour, clip_on=False)


def throughput(results: Record, narrow: bool) -> Figure | None:
    """Bar: mean over the runs. Error bar: ± 2 standard deviations. Small circles: single runs. Blue: Helix,
    grey: Megatron."""
    variants = _measured(results)
    names = [w for w in WORKLOADS if w != "first_token" and any(w in _works(v) for v in variants)]
    if not names:
        return None
    columns = 1 if narrow or len(names) == 1 else 2
    figure, axes = drawing.row_panels(variants, [WORKLOADS[w] for w in names], narrow, columns, 0, "tokens/s")
    for ax, name in zip(axes, names):
        right = 0.0
        for y, variant in enumerate(variants):
            work = _works(variant).get(name)
            if work is None:
                ax.text(0, y, " not measured", va="center", color="#777777")
                continue
            speed, spread = work["tokens_per_s"]["mean"], 2 * (work["tokens_per_s"]["sd"] or 0)
            ax.barh(y, speed, height=0.62, color=drawing.colour_of(variant), alpha=0.85)
            ax.errorbar(speed, y, xerr=spread, color="#222222", capsize=2.5, lw=1) if spread else None
            runs = [work["tokens_per_iteration"] * len(s) / sum(s) for s in work["samples_seconds"]]
            ax.plot(runs, [y] * len(runs), "o", ms=2.6, mfc="white", mec="#222222", mew=0.6)
            end = max(speed + spread, *runs)
            words = drawing.format_number(speed)
            ax.annotate(words, (end, y), (4, 0), textcoords="offset points", va="center")
            right = max(right, end)
        ax.set_xlim(0, right * 1.22)
    return figure


def split(results: Record, narrow: bool) -> Figure | None:
    """Compute; communication: what the rank that waits for nobody spends in collectives; idle: waiting for
    other ranks."""
    variants = _measured(results)
    names = [w for w in ("train", "decode") if any("split_seconds" in _works(v).get(w, {}) for v in variants)]
    if not names:
        return None
    titles, columns = [WORKLOADS[w] for w in names], 1 if narrow else len(names)
    figure, axes = drawing.row_panels(variants, titles, narrow, columns, 0.3, "ms per iteration, mean rank")
    for index, (ax, name) in enumerate(zip(axes, names)):
        for y, variant in enumerate(variants):
            seconds = _works(variant).get(name, {}).get("split_seconds", {})
            drawing.stack(ax, y, {part: 1e3 * s for part, s in seconds.items()}, PARTS, index == y == 0)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


def communication(results: Record, narrow: bool) -> Figure | None:
    """Bytes that a rank receives in a training step for the model, its data and its optimizer, divided by the
    layers; sends are not counted."""
    variants = [v for v in _measured(results) if v["measured"].get("communication_per_layer")]
    if not variants:
        return None
    received: list[dict[str, float]] = []
    for variant in variants:
        received.append({})
        for kind, cost in variant["measured"]["communication_per_layer"].items():
            operation = kind.partition(" x")[0]
            received[-1][operation] = received[-1].get(operation, 0.0) + cost["bytes"]
    sums = {name: sum(one.get(name, 0) for one in received) for one in received for name in one}
    operations = sorted((name for name, size in sums.items() if size), key=lambda name: -sums[name])
    colours = dict(zip(operations, LINES))
    return drawing.stack_bytes(variants, received, colours, "received per rank and layer", narrow)


def memory(results: Record, narrow: bool) -> Figure | None:
    """Storages of live tensors on the fullest rank, each counted once; activations of one micro-batch."""
    variants = _measured(results)
    if not variants:
        return None
    held = [v["measured"]["memory_bytes_of_fullest_rank"] for v in variants]
    sizes = [{name: one.get(key, 0) for key, name in MEMORY_PARTS.items()} for one in held]
    colours = dict(zip(MEMORY_PARTS.values(), _MEMORY_COLOURS))
    return drawing.stack_bytes(variants, sizes, colours, "on the fullest rank", narrow)


def scaling(results: Record, narrow: bool) -> Figure | None:
    """Training throughput of a rank, over that at the smallest size."""
    lines = {f: points for f, points in scaling_points(results, "train").items() if len(points) > 1}
    if not lines:
        return None
    figure, (ax,) = drawing.new_figure(narrow, max(2.6, 1.2 + 0.3 * len(lines)))
    ends = []
    for colour, (family, points) in zip(LINES, lines.items()):
        efficiency = [100 * point["efficiency"] for point in points]
        ax.plot([point["ranks"] for point in points], efficiency, "o-", ms=4, color=colour)
        ends.append((points[-1]["ranks"], efficiency[-1], family, colour))
    sizes = sorted({point["ranks"] for points in lines.values() for point in points})
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set_xticks([], minor=True)
    ax.set_ylim(0, 1.08 * max(100 * p["efficiency"] for points in lines.values() for p in points))
    drawing.name_points(ax, ends, narrow)
    ax.set_xlabel("ranks")
    ax.set_ylabel("efficiency, %")
    return figure


def prediction(results: Record, narrow: bool) -> Figure | None:
    """Dot: mean over the runs, blue Helix, grey Megatron. Diamond: what the planner predicts."""
    variants = [v for v in _measured(results) if v.get("predicted", {}).get("workloads")]
    names = [w for w in WORKLOADS if any(w in v["predicted"]["workloads"] for v in variants)]
    if not names:
        return None
    titles, columns = [WORKLOADS[w] for w in names], 1 if narrow else len(names)
    figure, axes = drawing.row_panels(variants, titles, narrow, columns, 0.3, "ms per iteration")
    for ax, name in zip(axes, names):
        for y, variant in ((y, v) for y, v in enumerate(variants) if name in v["predicted"]["workloads"]):
            measured = 1e3 * _works(variant)[name]["iteration_seconds"]["mean"]
            predicted = 1e3 * variant["predicted"]["workloads"][name]
            labels = ("measured", "predicted") if ax is axes[0] and y == 0 else (None, None)
            ax.plot([measured, predicted], [y, y], "-", lw=0.8, color="#bbbbbb")
            ax.plot(measured, y, "o", ms=5, color=drawing.colour_of(variant), label=labels[0])
            ax.plot(predicted, y, "D", ms=4.5, mfc="white", mec="#d55e00", label=labels[1])
        ax.set_xlim(left=0)
        ax.margins(x=0.08)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return figure


PLOTS = (
    Plot("Speed against the baseline", ratios),
    Plot("Throughput", throughput),
    Plot("Where the time goes", split),
    Plot("Communication", communication),
    Plot("Memory", memory),
    Plot("Scaling", scaling),
    Plot("Measured and predicted times", prediction, tag="measured and predicted"),
)
