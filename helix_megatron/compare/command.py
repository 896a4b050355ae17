"""`helix compare`: its flags, and from flags to a comparison."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_compare(subparsers: Any) -> None:
    """The subcommand."""
    parser = subparsers.add_parser(
        "compare",
        help="train and decode the same model by several layouts, side by side",
        description="Runs every variant of CONFIG.yaml several times in turn and writes results.json and "
        "its reports. Exit code 1: losses of the same model disagree; 3: a variant did not finish.",
        epilog="GPU runs over several machines: set nnodes in the file, a shared --out, and start the same "
        "command on each with --node-rank R --rdzv-endpoint HOST:PORT (the next port is used as well).",
    )
    add = parser.add_argument
    add("config", help="the comparison, for example configs/compare_host.yaml")
    add("--out", help="folder of the results (default: runs/<name of CONFIG>)")
    add("--only", action="append", metavar="NAME", help="run this variant only (repeatable)")
    add("--runs", type=int, metavar="N", help="independent runs of every variant, in place of the file's")
    add("--preset", metavar="MODEL", help="a model's shape in place of the file's, such as llama-3-8b")
    add("--scale", type=float, metavar="F", help="multiply the widths of the preset, to fit the machine")
    add("--cluster", metavar="NAME", help="whose times `helix plan` predicts beside the measured ones: a "
        "preset, or a file of `helix plan --probe` (default: this machine)")  # fmt: skip
    add("--scaling", choices=["weak", "strong"], help="every variant at several numbers of ranks")
    add("--sizes", metavar="N,N,...", help="those numbers (default: 1,2,4,8; on GPUs 8,16,32)")
    disk = parser.add_mutually_exclusive_group()
    disk.add_argument("--resume", action="store_true", help="go on after the finished runs in --out")
    disk.add_argument("--overwrite", action="store_true", help="delete the finished runs in --out")
    disk.add_argument("--report", action="store_true", help="run nothing, write the reports of --out anew")
    add("--retry", action="store_true", help="with --resume: run again what failed")
    add("--allow-mixed", action="store_true", help="put runs of other machines, versions, settings together")
    add("--node-rank", type=int, default=0, help="this machine's number among nnodes")
    add("--rdzv-endpoint", help="HOST:PORT where the machines meet, when nnodes > 1")
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console

    from helix_megatron.compare import config as configuration
    from helix_megatron.compare import harness, scaling

    given = {key: getattr(options, key) for key in ("runs", "preset", "scale", "cluster")}
    changes = {key: value for key, value in given.items() if value is not None}
    config = configuration.load(options.config, changes)
    config = harness.only(config, options.only or [], options.config)
    if options.scaling:
        config = scaling.at_sizes(config, options.scaling, _sizes(options.sizes))
    elif options.sizes:
        raise ValueError("--sizes goes with --scaling weak or --scaling strong.")
    name = Path(options.config).stem + (f"_{options.scaling}_scaling" if options.scaling else "")
    out = Path(options.out or Path("runs") / name)
    chosen = harness.Options(
        resume=options.resume,
        retry=options.retry,
        overwrite=options.overwrite,
        allow_mixed=options.allow_mixed,
        report_only=options.report,
        node_rank=options.node_rank,
        rdzv_endpoint=options.rdzv_endpoint,
    )
    console = Console(width=None if sys.stdout.isatty() else 200)
    return harness.compare(config, out, console, chosen)


def _sizes(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--sizes is {text!r}; it is numbers of ranks such as 1,2,4,8.") from error
