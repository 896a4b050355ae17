"""report.html: one file with everything in it, for a screen, a phone and paper; and the figures as PNG."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jinja2

from helix_megatron.compare import drawing, markdown, paper, plots, predicted, scaling, tables
from helix_megatron.compare.comparisons import finished
from helix_megatron.compare.findings import findings, tiny

_BAD = ("LOSSES DISAGREE", "MIXED RUNS")


def report(results: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The page, and file name → PNG of every figure that has data."""
    drawn, pictures = [], {}
    for plot in plots.PLOTS:
        wide, narrow = (drawing.draw(plot, results, narrow) for narrow in (False, True))
        if wide is None or narrow is None:
            continue
        drawn.append(
            {
                "key": plot.key,
                "title": plot.title,
                "caption": plot.caption,
                "tag": plot.tag,
                "wide": drawing.svg(wide, f"{plot.key}-wide"),
                "narrow": drawing.svg(narrow, f"{plot.key}-narrow"),
            }
        )
        pictures[f"{plot.key}.png"] = drawing.png(wide, f"{plot.tag}; {results['where']}")
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
        contents=contents(results, drawn),
        causes={
            v["name"]: f"{v['status']}: {v.get('cause', '')}" for v in results["variants"] if _none_of(v)
        },
        failed={v["name"] for v in results["variants"] if v["status"] not in ("ok", "not run")},
        tables=[_kept(results, columns) for columns in (tables.SPEED, tables.DETAILS)],
        figures=drawn,
        speeds=tables.speeds(results),
        more=_more(results),
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


def _none_of(variant: dict[str, Any]) -> bool:
    """Whether a variant was tried and nothing was measured of it."""
    return "measured" not in variant and variant["status"] != "not run"


@dataclass(frozen=True)
class Section:
    """A table below the figures."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    tag: str = "measured"
    """What its numbers are."""
    words: str = ""
    """Said above it."""

    @property
    def key(self) -> str:
        """Its id in the page."""
        return re.sub(r"[^a-z]+", "-", self.title.lower()).strip("-") + "-table"


def _more(results: dict[str, Any]) -> list[Section]:
    """Those that have rows."""
    both = "measured and predicted"
    memory = _kept(results, tables.MEMORY)
    planned = predicted.rows(results)
    found = [
        Section("Beside the planner's predictions", predicted.ROWS, planned, both, predicted.said(results)),
        Section("Memory beside estimates, MB", tables.ESTIMATE, tables.estimate(results), both),
        Section("Memory of the fullest rank, MB", *memory),
        Section("GPU, by NVML", tables.GPU, tables.gpu(results)),
        Section("Scaling", scaling.ROWS, scaling.rows(results)),
        Section("Spread over the runs", tables.SPREAD, tables.spread(results)),
        Section("Comparisons in full", tables.COMPARISONS, tables.comparisons(results)),
        Section("Collectives of one iteration, mean rank", tables.COLLECTIVES, tables.collectives(results)),
    ]
    return [section for section in found if section.rows]


def contents(results: dict[str, Any], drawn: list[dict[str, str]]) -> list[tuple[str, str]]:
    """(id, title) of every section, in the order of the page."""
    found = [("findings", "What the numbers say"), ("results", "Results")]
    found += [("speeds", "Speed ratios")] if tables.speeds(results)[1] else []
    found += [(figure["key"], figure["title"]) for figure in drawn]
    found += [("paper", "The paper"), ("arithmetic", "Its arithmetic")] if results["config"]["paper"] else []
    return [*found, *((s.key, s.title) for s in _more(results)), ("method", "How it was measured")]


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
            found.append((f"{drawing.number(means[best])} tok/s", f"fastest {words}: {best}"))
    return found
