"""What was found: check.json (all rows), check.md (tables of them), and one screen of at most 100 columns."""

from __future__ import annotations

import datetime
import json
import textwrap
from pathlib import Path
from typing import Any

from helix_megatron.check.rows import Place
from helix_megatron.check.runner import Outcome
from helix_megatron.check.sections import Section

FORMAT = "helix check 1"
WIDTH = 100
_LINES = 6  # of a section's figures
_SHOWN = 4  # warnings and skips of a section that the screen shows; all are in the files


class Results:
    """The sections so far; the files are written anew after each.

    Args:
        folder: of check.json and check.md.
        command: what the user typed.
        world: ranks of torchrun; 0 without it.
    """

    def __init__(self, folder: Path, command: str, place: Place, world: int, sections: tuple[Section, ...]):
        from helix_megatron.measure import machine

        self.folder, found = folder, machine.identity()
        gpus = found["hardware"]["gpus"]
        self.where = f"{len(gpus)} x {gpus[0]}" if gpus else f"host mode, {found['hardware']['cores']} cores"
        if world:
            self.where += f", {world} ranks of torchrun"
        self.document: dict[str, Any] = {
            "format": FORMAT,
            "command": command,
            "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "selection": "quick" if place.quick else "full",
            "where": self.where,
            **found,
            "sections": {section.name: {"status": "not run yet"} for section in sections},
        }
        self._write()

    def add(self, section: Section, ended: Outcome) -> None:
        """Take one section and write both files."""
        self.document["sections"][section.name] = {
            "status": ended.status,
            "reason": ended.reason,
            "proves": section.proves,
            "seconds": round(ended.seconds, 1),
            "limit_s": ended.limit_s,
            "rows": ended.rows,
            "output": ended.output,
        }
        self._write()

    @property
    def failed(self) -> bool:
        return any(
            found["status"] not in ("passed", "skipped") for found in self.document["sections"].values()
        )

    def _write(self) -> None:
        for name, text in (
            ("check.json", json.dumps(self.document, indent=1) + "\n"),
            ("check.md", render_page(self.document)),
        ):
            partial = self.folder / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.folder / name)

    def render_screen(self) -> str:
        """See render_screen()."""
        return render_screen(self.document, self.folder)


def render_screen(document: dict[str, Any], folder: Path) -> str:
    """What a user reads: a line a section, then what failed, what to look at, what was skipped and why."""
    lines = ["", f"helix check --{document['selection']}: {document['where']}", _provenance(document), ""]
    notes: dict[str, list[str]] = {"failed": [], "warning": [], "skipped": []}
    for name, section in document["sections"].items():
        rows = section.get("rows", [])
        counts = {
            status: sum(row["status"] == status for row in rows)
            for status in ("ok", "measured", "failed", "skipped")
        }
        told = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "nothing"
        lines.append(f"{name:12} {section['status']:8} {told:34} {section.get('seconds', 0):5.0f} s")
        told_lines = highlights(name, rows)
        lines += [f"{'':13}{line}" for line in told_lines[:_LINES]]
        if len(told_lines) > _LINES:
            lines.append(f"{'':13}{len(told_lines) - _LINES} more in check.md")
        if section["status"] == "failed":
            notes["failed"].append(f"{name}: {section['reason']}")
        for kind in ("warning", "skipped"):
            found = list(
                dict.fromkeys(f"{row['case']}: {row['detail']}" for row in rows if row["status"] == kind)
            )
            notes[kind] += [f"{name}: {text}" for text in found[:_SHOWN]]
            if len(found) > _SHOWN:
                notes[kind].append(f"{name}: {len(found) - _SHOWN} more of these in check.md")
    cores = sorted({core for section in document["sections"].values() for core in _cores(section)})
    if cores:
        lines += ["", f"attention cores that ran: {', '.join(cores)}"]
    for kind, title in (("failed", "FAILED"), ("warning", "look at"), ("skipped", "skipped")):
        lines += [f"{title:9}{note}" for note in notes[kind]]
    verdict = "something FAILED" if notes["failed"] else "nothing failed"
    lines += ["", f"helix check: {verdict}; all of it in {folder}/check.json and {folder}/check.md"]
    return "\n".join(wrapped for line in lines for wrapped in _wrap(line))


def _wrap(line: str) -> list[str]:
    if len(line) <= WIDTH:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 9)
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, drop_whitespace=True, break_on_hyphens=False)


def _provenance(document: dict[str, Any]) -> str:
    versions = {name: version for name, version in document["versions"].items() if version != "not installed"}
    told = ", ".join(
        f"{name} {versions[name]}"
        for name in ("torch", "megatron-core", "transformer-engine")
        if name in versions
    )
    return (
        f"{told}; revision {document['revision'][:12]}{' with changes' * ('changes' in document['revision'])}"
    )


def _cores(section: dict[str, Any]) -> set[str]:
    return {row["core"] for row in section.get("rows", []) if row.get("core")}


def highlights(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """The figures of a section that its screen shows: one or a few lines."""
    ok = [row for row in rows if row["status"] in ("ok", "measured")]
    if name == "exactness":
        worst: dict[str, float] = {}
        for row in ok:
            if "error" in row:
                worst[row["variant"]] = max(worst.get(row["variant"], 0.0), row["error"])
        return [f"furthest from float64: {variant} {error:.1e}" for variant, error in worst.items()]
    if name == "training":
        return [
            f"{row['case']}: at most {row['difference']:.1e} from vanilla"
            for row in ok
            if "difference" in row
        ]
    if name == "kernels":
        return [_kernel_line(row) for row in ok if "gb_per_s" in row]
    if name == "layers":
        return [_layer_line(row) for row in ok if "us" in row or "operations" in row]
    if name == "collectives":
        lines = [row for row in ok if "bandwidth" in row]
        return [
            f"{row['case']}: {row['latency'] * 1e6:.0f} us + {row['bandwidth'] / 1e9:.2f} GB/s"
            for row in lines[:3]
        ]
    return [f"{row['case']}: {row['detail']}" for row in ok[:3]]


def _kernel_line(row: dict[str, Any]) -> str:
    flash = row.get("flash_microseconds")
    beside = "" if flash is None else f"; {row['flash_attention']} {flash:.1f} us"
    rate = f"{row['gb_per_s']:.0f} GB/s, {row['share_of_copy']:.0%} of a copy"
    return f"{row['case']}: {row['backend']} {row['microseconds']:.1f} us, {rate}{beside}"


def _layer_line(row: dict[str, Any]) -> str:
    if row.get("us") and "context" in row:
        launches, us = sum(row["launches"].values()), sum(row["us"].values())
        return f"{row['case']}: {us:.0f} us in {launches} launches, {1e3 * row['step_ms']:.0f} us a step"
    if row.get("us"):
        parts = " ".join(f"{kind} {value:.0f}" for kind, value in row["us"].items())
        return f"{row['case']}: {sum(row['us'].values()):.0f} us ({parts}), {row['peak_mib']:.0f} MiB"
    return f"{row['case']}: {row['operations']} operations"


def render_page(document: dict[str, Any]) -> str:
    """check.md."""
    hardware, revision = document["hardware"], document["revision"]
    text = [
        "# helix check",
        "",
        f"{document['where']}; {hardware['cpu']}, {hardware['memory_bytes'] / 2**30:.0f} GiB  ",
        f"{document['when']}  ",
        f"command `{document['command']}`; revision {revision}, source {document['source']}  ",
        ", ".join(f"{name} {version}" for name, version in document["versions"].items()),
    ]
    for name, section in document["sections"].items():
        text += ["", f"## {name}: {section['status']}", ""]
        if "rows" not in section:
            continue
        text += [f"{section['proves']}; {section['seconds']} s of at most {section['limit_s']:g}.", ""]
        if section["reason"]:
            text += [section["reason"], ""]
        if section["rows"]:
            text += ["| case | | |", "| --- | --- | --- |"]
            text += [
                f"| {_cell(row['case'])} | {row['status']} | {_cell(_describe_row(row))} |"
                for row in section["rows"]
            ]
        if section["output"]:
            text += ["", "```", section["output"].replace("```", "'''"), "```"]
    return "\n".join(text) + "\n"


def _describe_row(row: dict[str, Any]) -> str:
    """A row's detail, and what was measured but for long lists."""
    rest = {k: v for k, v in row.items() if k not in ("case", "status", "detail")}
    found = [
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
        for k, v in rest.items()
        if not isinstance(v, list) or len(v) < 13
    ]
    return "; ".join(filter(None, [row["detail"], *found]))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
