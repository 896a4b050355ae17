"""`helix check`: parse, run the sections one after another, write and print what was found."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

KEPT_S = 45.0  # for each section to come: what most need on one GPU to be of use
_EPILOG = """Examples:
  helix check --quick                                       minutes; on a host, on one GPU, on eight
  helix check --full --out check/                           everything; check/check.json, check/check.md
  helix check --full --within 540                           as much of it as nine minutes have room for
  helix check --quick --only exactness --only kernels
  torchrun --nnodes 2 --nproc-per-node 8 … -m helix_megatron.cli check --full --out check/
"""


def add_check(subparsers: Any) -> None:
    """`helix check`."""
    from helix_megatron.check.sections import SECTIONS

    parser = subparsers.add_parser(
        "check",
        help="prove that Helix is exact on this machine, and measure what it costs there",
        description="Sections, each in fresh processes with a time limit of its own; a failure does not stop "
        "the next. Exit code 0: nothing failed.",
        epilog="Sections:\n" + "".join(f"  {s.name:12} {s.proves}\n" for s in SECTIONS) + "\n" + _EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="a small selection (the default)")
    how.add_argument("--full", action="store_true", help="everything")
    add = parser.add_argument
    add("--only", action="append", metavar="NAME", help="this section alone; may be given again")
    add("--out", type=Path, default=Path("helix_check"), metavar="DIR", help="default: helix_check")
    add("--time-limit", type=float, metavar="S", help="seconds of each section, in place of its own limit")
    add("--within", type=float, metavar="S",
        help="seconds of all sections together; a section is cut short before it takes all")  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """What the options ask for; returns the exit code."""
    from helix_megatron.check import results, runner
    from helix_megatron.check.rows import Place
    from helix_megatron.check.sections import select_sections

    sections, quick = select_sections(options.only), not options.full
    for name in ("time_limit", "within"):
        seconds = getattr(options, name)
        if seconds is not None and not 0 < seconds < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} is {seconds}; seconds, more than 0.")
    place = Place(_usable_gpus(), 0, quick, 0.0)
    supervisor = runner.make_supervisor()
    with tempfile.TemporaryDirectory(prefix="helix-check-") as private:
        folder = options.out if supervisor.first else Path(private)
        document = None
        if supervisor.first:
            _make(folder)
            document = results.Results(folder, _command(), place, supervisor.world, sections)
            print(f"helix check, {document.where}; rows as they come: {folder}/NAME.jsonl", flush=True)
        begun = time.monotonic()
        for number, section in enumerate(sections):
            started = time.monotonic()
            limit = options.time_limit or section.limit(quick)
            if options.within is not None:
                limit = limit_within(limit, options.within - started + begun, len(sections) - number - 1)
            here = replace(place, seconds=limit, world=supervisor.world if section.spans else 0)
            ended = supervisor.run(section, here, folder)
            if document is not None and ended is not None:
                document.add(section, ended)
                seconds = time.monotonic() - started
                print(f"  {section.name}: {ended.status}, {seconds:.0f} s", flush=True)
        supervisor.end()
    if document is None:
        return 0
    print(document.render_screen())
    return 1 if document.failed else 0


def limit_within(limit: float, left: float, later: int) -> float:
    """A section's seconds of the `left` ones: its own limit, or what leaves KEPT_S for each later one."""
    return max(1.0, min(limit, left - KEPT_S * later))


def _usable_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _make(folder: Path) -> None:
    """The folder of --out; ValueError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "check.json").touch()
    except OSError as error:
        raise ValueError(
            f"--out {folder} cannot be written ({error.strerror}); give another folder."
        ) from error


def _command() -> str:
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    ranks = f"torchrun ({os.environ['WORLD_SIZE']} ranks): " if "TORCHELASTIC_RUN_ID" in os.environ else ""
    return ranks + shlex.join(words)
