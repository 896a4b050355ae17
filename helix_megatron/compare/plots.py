"""The figures of a comparison, drawn by matplotlib: results in, a Figure out, or None when there is no data.

Each is drawn twice: wide for a screen, paper and PNG, narrow for a phone, so that its letters stay readable.
Names stand beside what they name, not in a legend, wherever there are more than three.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helix_megatron.compare.comparisons import WORKLOADS
from helix_megatron.compare.drawing import (
    LINES,
    Plot,
    bars_height,
    colour_of,
    name_rows,
    names_beside,
    new_figure,
    number,
    wrapped,
)
from helix_megatron.compare.scaling import study

PARTS = {"compute": "#0072b2", "communication": "#e69f00", "idle": "#d9d9d9"}
MEMORY = {
    "parameters": ("parameters", "#0072b2"),
    "gradients": ("gradients", "#56b4e9"),
    "optimizer": ("optimizer", "#009e73"),
    "saved_for_backward": ("activations", "#e69f00"),
    "kv_cache": ("KV cache", "#cc79a7"),
    "communication": ("communication buffers", "#d55e00"),
}


def _measured(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What has a bar: variants with numbers, the first on top; a scaling study has a figure of its own."""
    return [v for v in results["variants"] if "measured" in v and not v["family"]]


def throughput(results: dict[str, Any], narrow: bool) -> Figure | None:
    """Tokens per second of each workload, ± 2 standard deviations over the runs, and each run."""
    variants = _measured(results)
    names = [w for w in WORKLOADS if w != "first_token" and any(w in _works(v) for v in variants)]
    if not names:
        return None
    columns = 1 if narrow or len(names) == 1 else 2
    rows = -(-len(names) // columns)
    figure, axes = new_figure(narrow, rows * bars_height(len(variants), narrow), columns, rows)
    for ax in axes[len(names) :]:
        ax.remove()
    for index, (ax, name) in enumerate(zip(axes, names)):
        _throughput_panel(ax, name, variants)
        name_rows(ax, variants, narrow)
        if columns == 2 and index % 2:
            ax.set_yticklabels([])
    return figure


def _works(variant: dict[str, Any]) -> dict[str, Any]:
    return variant["measured"]["workloads"]


def _throughput_panel(ax: Axes, name: str, variants: list[dict[str, Any]]) -> None:
    right = 0.0
    for y, variant in enumerate(variants):
        work = _works(variant).get(name)
        if work is None:
            ax.text(0, y, " not measured", va="center", color="#777777")
            continue
        speed, spread = work["tokens_per_s"]["mean"], 2 * (work["tokens_per_s"]["sd"] or 0)
        ax.barh(y, speed, height=0.62, color=colour_of(variant), alpha=0.85)
        ax.errorbar(speed, y, xerr=spread, color="#222222", capsize=2.5, lw=1) if spread else None
        runs = [work["tokens_per_iteration"] * len(s) / sum(s) for s in work["samples_seconds"]]
        ax.plot(runs, [y] * len(runs), "o", ms=2.6, mfc="white", mec="#222222", mew=0.6)
        end = max(speed + spread, *runs)
        ax.annotate(number(speed), (end, y), (4, 0), textcoords="offset points", va="center")
        right = max(right, end)
    ax.set_xlim(0, right * 1.22)
    ax.set_title(f"{WORKLOADS[name][0].upper()}{WORKLOADS[name][1:]}")
    ax.set_xlabel("tokens/s")
    ax.locator_params(axis="x", nbins=4)


def ratios(results: dict[str, Any], narrow: bool) -> Figure | None:
    """Speed of each variant over that of the first Megatron variant of its model, with the 95 % interval."""
    entries, first = [], {}
    for entry in results["comparisons"]:
        if first.setdefault(entry["variant"], entry["baseline"]) == entry["baseline"]:
            entries.append(entry)
    names = [w for w in ("train", "prefill", "decode", "mixed") if any(e["workload"] == w for e in entries)]
    if not names:
        return None
    figure, axes = new_figure(narrow, 0, 1)
    shown = [
        (v, b)
        for v, b in first.items()
        if any((e["variant"], e["workload"]) == (v, names[0]) for e in entries)
    ]
    figure.set_size_inches(3.45 if narrow else 7.3, 0.9 + len(shown) * (0.62 if narrow else 0.5))
    (ax,) = axes
    step = 0.8 / len(names)
    for index, name in enumerate(names):
        for y, (variant, baseline) in enumerate(shown):
            one = [
                e
                for e in entries
                if (e["variant"], e["baseline"], e["workload"]) == (variant, baseline, name)
            ]
            if one:
                _ratio(ax, one[0], y - 0.4 + step * (index + 0.5), LINES[index], name if y == 0 else None)
    ax.axvline(1, color="#222222", lw=1)
    ax.set_xscale("log")
    ax.set_xlim(_LOW, _HIGH)
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10)
    ax.set_xticks(ticks, [f"{tick:g}×" for tick in ticks], minor=False)  # noqa: RUF001
    ax.set_xticks([], minor=True)
    several = len({baseline for _, baseline in shown}) > 1
    labels = [wrapped(v, narrow) + (f"\n/ {wrapped(b, narrow)}" if several else "") for v, b in shown]
    ax.set_yticks(range(len(shown)), labels, fontsize=7.5 if several else None)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    against = "the baseline" if several else shown[0][1]
    ax.set_xlabel(wrapped(f"speed / speed of {against}", narrow) if narrow else f"speed / speed of {against}")
    figure.legend(loc="outside upper left", ncols=2 if narrow else 4, frameon=False)
    return figure


_LOW, _HIGH = 0.08, 12.5


def _ratio(ax: Axes, entry: dict[str, Any], y: float, colour: str, label: str | None) -> None:
    inside = min(max(entry["ratio"], _LOW), _HIGH)
    ax.plot(inside, y, "o", ms=4.5, color=colour, label=label)
    if entry["ci95"]:
        low, high = (min(max(bound, _LOW), _HIGH) for bound in entry["ci95"])
        ax.plot([low, high], [y, y], "-", lw=1.4, color=colour)
        for bound, edge, marker in ((entry["ci95"][0], _LOW, "<"), (entry["ci95"][1], _HIGH, ">")):
            if not _LOW <= bound <= _HIGH:  # it goes on
                ax.plot(edge, y, marker, ms=4, color=colour, clip_on=False)


def _one_for_each(names: list[str], variants: list[Any], narrow: bool) -> tuple[Figure, list[Any]]:
    """Axes for each workload, side by side or, on a phone, one below another; with room for a legend."""
    columns = 1 if narrow else len(names)
    rows = len(names) // columns
    return new_figure(narrow, 0.3 + rows * bars_height(len(variants), narrow), columns, rows)


def time_split(results: dict[str, Any], narrow: bool) -> Figure | None:
    """Where the time of an iteration goes: compute, communication, idle."""
    variants = _measured(results)
    names = [w for w in ("train", "decode") if any("split_seconds" in _works(v).get(w, {}) for v in variants)]
    if not names:
        return None
    figure, axes = _one_for_each(names, variants, narrow)
    for index, (ax, name) in enumerate(zip(axes, names)):
        for y, variant in enumerate(variants):
            left = 0.0
            for part, seconds in _works(variant).get(name, {}).get("split_seconds", {}).items():
                label = part if index == y == 0 else None
                ax.barh(y, 1e3 * seconds, left=left, height=0.62, color=PARTS[part], label=label)
                left += 1e3 * seconds
        name_rows(ax, variants, narrow)
        if index and not narrow:
            ax.set_yticklabels([])
        ax.set_title(f"{WORKLOADS[name][0].upper()}{WORKLOADS[name][1:]}")
        ax.set_xlabel("ms per iteration, mean rank")
        ax.locator_params(axis="x", nbins=4)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


def memory(results: dict[str, Any], narrow: bool) -> Figure | None:
    """What the fullest rank holds."""
    variants = _measured(results)
    if not variants:
        return None
    held = [{name: _held(v).get(key, 0) for key, (name, _) in MEMORY.items()} for v in variants]
    return _stacked(variants, held, dict(MEMORY.values()), "on the fullest rank", narrow)


def _stacked(
    variants: list[dict[str, Any]],
    sizes: list[dict[str, float]],
    colours: dict[str, str],
    words: str,
    narrow: bool,
) -> Figure:
    """A bar for each variant, of its sizes in bytes by part; the sum stands at its end."""
    scale, unit = (1e9, "GB") if max(sum(one.values()) for one in sizes) > 3e9 else (1e6, "MB")
    figure, (ax,) = new_figure(narrow, 0.75 + bars_height(len(variants), narrow))
    for y, one in enumerate(sizes):
        left = 0.0
        for part, colour in colours.items():
            size = one.get(part, 0.0) / scale
            ax.barh(y, size, left=left, height=0.62, color=colour, label=part if y == 0 else None)
            left += size
        ax.annotate(f"{left:.3g}", (left, y), (4, 0), textcoords="offset points", va="center")
    ax.margins(x=0.1)
    name_rows(ax, variants, narrow)
    ax.set_xlabel(f"{unit} {words}")
    figure.legend(loc="outside upper left", ncols=2 if narrow else 3, frameon=False)
    return figure


def _held(variant: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in variant["measured"]["memory_bytes_of_fullest_rank"].items() if k in MEMORY}


def communication(results: dict[str, Any], narrow: bool) -> Figure | None:
    """Bytes that a rank receives for a layer in a training step, by operation."""
    variants = [v for v in _measured(results) if v["measured"].get("communication_per_layer")]
    if not variants:
        return None
    received = [_by_operation(v) for v in variants]
    sums = {name: sum(one.get(name, 0) for one in received) for one in received for name in one}
    operations = sorted((name for name, size in sums.items() if size), key=lambda name: -sums[name])
    colours = dict(zip(operations, LINES))
    return _stacked(variants, received, colours, "received per rank and layer", narrow)


def _by_operation(variant: dict[str, Any]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for kind, cost in variant["measured"]["communication_per_layer"].items():
        operation = kind.partition(" x")[0]
        sums[operation] = sums.get(operation, 0.0) + cost["bytes"]
    return sums


def prediction(results: dict[str, Any], narrow: bool) -> Figure | None:
    """Seconds of an iteration, measured and predicted by the planner."""
    variants = [v for v in _measured(results) if v.get("predicted", {}).get("workloads")]
    names = [w for w in WORKLOADS if any(w in v["predicted"]["workloads"] for v in variants)]
    if not names:
        return None
    figure, axes = _one_for_each(names, variants, narrow)
    for index, (ax, name) in enumerate(zip(axes, names)):
        for y, variant in enumerate(variants):
            if name not in variant["predicted"]["workloads"]:
                continue
            measured = 1e3 * _works(variant)[name]["iteration_seconds"]["mean"]
            predicted = 1e3 * variant["predicted"]["workloads"][name]
            first = index == y == 0
            ax.plot([measured, predicted], [y, y], "-", lw=0.8, color="#bbbbbb")
            ax.plot(measured, y, "o", ms=5, color=colour_of(variant), label="measured" if first else None)
            ax.plot(
                predicted, y, "D", ms=4.5, mfc="white", mec="#d55e00", label="predicted" if first else None
            )
        name_rows(ax, variants, narrow)
        if index and not narrow:
            ax.set_yticklabels([])
        ax.set_xlim(left=0)
        ax.margins(x=0.08)
        ax.set_title(f"{WORKLOADS[name][0].upper()}{WORKLOADS[name][1:]}")
        ax.set_xlabel("ms per iteration")
        ax.locator_params(axis="x", nbins=4)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return figure


def latency(results: dict[str, Any], narrow: bool) -> Figure | None:
    """Prefill throughput of a rank against the time per output token of decode: up and left is better."""
    points = []
    for variant in _measured(results):
        works = _works(variant)
        if "prefill" in works and "decode" in works:
            x = 1e3 * works["decode"]["iteration_seconds"]["mean"]
            points.append((x, works["prefill"]["tokens_per_s"]["mean"] / variant["world_size"], variant))
    if len(points) < 2:
        return None
    figure, (ax,) = new_figure(narrow, max(2.6, 1.0 + len(points) * (0.36 if narrow else 0.26)))
    for x, y, variant in points:
        ax.plot(x, y, "o", ms=6, color=colour_of(variant))
    left, right = min(x for x, _, _ in points), max(x for x, _, _ in points)
    ax.set_xlim(left - 0.12 * (right - left), right + 0.08 * (right - left))
    ax.set_ylim(0, 1.08 * max(y for _, y, _ in points))
    names_beside(ax, [(x, y, v["name"], colour_of(v)) for x, y, v in points], narrow)
    ax.set_xlabel("ms per output token (decode)")
    ax.set_ylabel("prefill tokens/s per rank")
    ax.locator_params(axis="x", nbins=4)
    return figure


def losses(results: dict[str, Any], narrow: bool) -> Figure | None:
    """The loss series; equal ones of one model lie on one line."""
    series = [v for v in _measured(results) if len(v["measured"].get("losses", [])) > 1]
    if not series:
        return None
    figure, (ax,) = new_figure(narrow, 2.4)
    models: dict[str, list[dict[str, Any]]] = {}
    for variant in series:
        models.setdefault(variant["model"], []).append(variant)
    ends = []
    for colour, variants in zip(LINES, models.values()):
        steps = range(1, 1 + len(variants[0]["measured"]["losses"]))
        for variant in variants:
            ax.plot(steps, variant["measured"]["losses"], "o-", ms=3, lw=1.2, color=colour, alpha=0.7)
        name = (
            f"{len(variants)} variants like {variants[0]['name']}"
            if len(variants) > 1
            else variants[0]["name"]
        )
        ends.append((steps[-1], variants[0]["measured"]["losses"][-1], name, colour))
    names_beside(ax, ends, narrow)
    ax.set_xlabel("training step, warm-up included")
    ax.set_ylabel("loss")
    ax.xaxis.get_major_locator().set_params(integer=True)
    return figure


def scaling(results: dict[str, Any], narrow: bool) -> Figure | None:
    """Efficiency of training over the number of ranks."""
    found = study(results, "train")
    lines = {family: points for family, points in found.items() if len(points) > 1}
    if not lines:
        return None
    figure, (ax,) = new_figure(narrow, max(2.6, 1.2 + 0.3 * len(lines)))
    ends = []
    for colour, (family, points) in zip(LINES, lines.items()):
        sizes = [point["ranks"] for point in points]
        efficiency = [100 * point["efficiency"] for point in points]
        ax.plot(sizes, efficiency, "o-", ms=4, color=colour)
        ends.append((sizes[-1], efficiency[-1], family, colour))
    sizes = sorted({point["ranks"] for points in lines.values() for point in points})
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set_xticks([], minor=True)
    ax.set_ylim(0, 1.08 * max(100 * p["efficiency"] for points in lines.values() for p in points))
    names_beside(ax, ends, narrow)
    ax.set_xlabel("ranks")
    ax.set_ylabel("efficiency, %")
    return figure


PLOTS = (
    Plot(
        "ratios",
        "Speed against the baseline",
        "Dot: ratio of speeds, variant / baseline. Line: 95 % t-interval over paired runs; an arrow where it "
        "goes on. An interval that crosses 1 shows no difference.",
        ratios,
    ),
    Plot(
        "throughput",
        "Throughput",
        "Bar: mean over the runs. Error bar: ± 2 standard deviations. Small circles: single runs. Blue: "
        "Helix, grey: Megatron.",
        throughput,
    ),
    Plot(
        "split",
        "Where the time goes",
        "Compute; communication: what the rank that waits for nobody spends in collectives; idle: "
        "waiting for other ranks.",
        time_split,
    ),
    Plot(
        "communication",
        "Communication",
        "Bytes that a rank receives in a training step for the model, its data and its optimizer, divided by "
        "the layers; sends are not counted.",
        communication,
    ),
    Plot("latency", "Throughput against latency", "Up and left is better.", latency),
    Plot(
        "memory",
        "Memory",
        "Storages of live tensors on the fullest rank, each counted once; activations of one micro-batch.",
        memory,
    ),
    Plot("scaling", "Scaling", "Training throughput of a rank, over that at the smallest size.", scaling),
    Plot("losses", "Losses", "Variants of one model lie on one line when they agree.", losses),
    Plot(
        "prediction",
        "Measured and predicted times",
        "Dot: mean over the runs, blue Helix, grey Megatron. Diamond: what the planner predicts.",
        prediction,
        tag="measured and predicted",
    ),
)
