"""report.html: one file with everything in it, for a screen, a phone and paper; and the figures as PNG."""

from __future__ import annotations

from typing import Any

import jinja2

from helix_megatron.compare import markdown, paper, plots, predicted, scaling, tables
from helix_megatron.compare.comparisons import finished
from helix_megatron.compare.findings import findings, tiny

_BAD = ("LOSSES DISAGREE", "MIXED RUNS")


def report(results: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The page, and file name → PNG of every figure that has data."""
    drawn, pictures = [], {}
    for plot in plots.PLOTS:
        wide, narrow = (plots.draw(plot, results, narrow) for narrow in (False, True))
        if wide is None or narrow is None:
            continue
        pictures[f"{plot.key}.png"] = plots.png(wide)
        drawn.append(
            {
                "key": plot.key,
                "title": plot.title,
                "caption": plot.caption,
                "wide": plots.svg(wide, f"{plot.key}-wide"),
                "narrow": plots.svg(narrow, f"{plot.key}-narrow"),
            }
        )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("helix_megatron.compare", ""), autoescape=True, trim_blocks=True
    )
    environment.tests["bad"] = lambda line: line.startswith(_BAD)
    environment.filters["kind"] = kind
    page = environment.get_template("report.html.j2").render(
        results=results,
        where=markdown.where(results),
        host_warning=markdown.HOST_WARNING,
        cards=cards(results),
        findings=findings(results),
        failed={v["name"] for v in results["variants"] if v["status"] not in ("ok", "not run")},
        tables=[_kept(results, columns) for columns in (tables.SPEED, tables.DETAILS)],
        figures=drawn,
        speeds=tables.speeds(results),
        more=_more(results),
        predicted=predicted.said(results),
        paper=[list(check.values()) for check in paper.checks()] if results["config"]["paper"] else None,
        beside=paper.beside(results),
        beside_headings=paper.BESIDE,
        method=markdown.method(results),
    )
    return page, pictures


def kind(cell: str) -> str:
    """The class of a table cell that carries a verdict; empty for others."""
    for words, name in _KINDS.items():
        if cell.endswith(words):
            return name
    return ""


_KINDS = {
    paper.INCONSISTENT: "bad",
    paper.CONSISTENT: "good",
    "faster": "good",
    "SLOWER": "bad",
    "slower": "bad",
    "unclear": "even",
    "within the noise": "even",
}


def _kept(results: dict[str, Any], columns: tuple) -> tuple[list[str], list[list[str]]]:
    kept = tables.used(results, columns)
    return tables.headings(kept), tables.rows(results, kept)


def _more(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]], str]]:
    """Title, headings, rows, what the numbers are, of the tables below the figures; none without rows."""
    both = "measured and predicted"
    memory_headings, memory_rows = _kept(results, tables.MEMORY)
    found = [
        ("Comparisons in full", tables.COMPARISONS, tables.comparisons(results)),
        ("Scaling", scaling.ROWS, scaling.rows(results)),
        ("Spread over the runs", tables.SPREAD, tables.spread(results)),
        ("Memory of the fullest rank, MB", memory_headings, memory_rows),
        ("Beside the planner's predictions", predicted.ROWS, predicted.rows(results), both),
        ("Memory beside estimates, MB", tables.ESTIMATE, tables.estimate(results), both),
        ("Collectives of one iteration, mean rank", tables.COLLECTIVES, tables.collectives(results)),
        ("GPU, by NVML", tables.GPU, tables.gpu(results)),
    ]
    return [(*entry, "measured")[:4] for entry in found if entry[2]]


def cards(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The four or five numbers to read first: value, words."""
    done = finished(results)
    found = [(f"{len(done)} of {len(results['variants'])}", "variants finished all their runs")]
    checked = [v["loss_check"] for v in results["variants"] if "loss_check" in v]
    if checked:
        worst = max((check["max_abs_difference"] or 0.0) for check in checked)
        agree = all(check["agrees"] for check in checked)
        found.append((tiny(worst) if agree else "LOSSES DISAGREE", "largest difference of losses"))
    errors = [v["measured"]["error"].get("relative") for v in done if "error" in v["measured"]]
    errors = [error for error in errors if error is not None]
    if errors:
        found.append((tiny(max(errors)), "largest relative error against fp32 on one rank"))
    for workload, words in (("train", "training"), ("decode", "decode")):
        speeds = {v["name"]: v["measured"]["workloads"].get(workload) for v in done}
        means = {name: w["tokens_per_s"]["mean"] for name, w in speeds.items() if w}
        if len(means) > 1:
            best = max(means, key=means.__getitem__)
            found.append((f"{plots.number(means[best])} tok/s", f"fastest {words}: {best}"))
    return found
