"""Writes and shows what a comparison found: results.json, report.md, the terminal's table, the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from helix_megatron.compare import comparisons, html, markdown, tables
from helix_megatron.compare.findings import findings
from helix_megatron.compare.records import write_atomically


def write_data(results: dict[str, Any], out: Path) -> None:
    """Complete `results` with the comparisons and write results.json: after every run."""
    results["comparisons"] = comparisons.compare(results)
    write_atomically(out / "results.json", json.dumps(results, indent=1))


def write(results: dict[str, Any], out: Path) -> None:
    """results.json and the reports, each complete or as it was."""
    write_data(results, out)
    write_atomically(out / "report.md", markdown.report(results))
    page, pictures = html.report(results)
    write_atomically(out / "report.html", page)
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture)


def show(results: dict[str, Any], out: Path, console: Console) -> None:
    """The table and the findings in the terminal."""
    title = f"{results['title']} (measured, {results['where']})"
    for columns, caption in ((tables.SPEED, title), (tables.DETAILS, "per rank and per layer")):
        kept = tables.used(results, columns)
        shown = Table(title=caption, show_lines=False)
        for heading in tables.headings(kept):
            left = heading == "variant"
            shown.add_column(heading, justify="left" if left else "right", no_wrap=left)
        for row, variant in zip(tables.rows(results, kept), results["variants"]):
            shown.add_row(*row, style=None if variant["status"] == "ok" else "red")
        console.print(shown)
    headings, rows = tables.speeds(results)
    if rows:
        shown = Table(*headings, title="speed ratio (measured): above 1 the variant is faster; 95 % interval")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    for line in findings(results):
        console.print(f"- {line}", highlight=False, markup=False)
    names = sorted(path.name for path in out.glob("re*.*") if path.is_file())
    console.print(f"Everything is in {out}: {', '.join(names)}, figures/*.png", highlight=False)


def exit_code(results: dict[str, Any]) -> int:
    """0; 1 when losses disagree; 3 when a variant did not finish although it may not fail."""
    if any(not v["loss_check"]["agrees"] for v in results["variants"] if "loss_check" in v):
        return 1
    return 3 if any(v["status"] != "ok" and not v["may_fail"] for v in results["variants"]) else 0
