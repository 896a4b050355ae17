"""The `helix` command: one subcommand per tool.

    helix compare CONFIG.yaml    the same model by several layouts, side by side
    helix convert --from …       Hugging Face models into Megatron checkpoints, and back
    helix data PREFIX            a small real English text as byte tokens
    helix doctor                 what is installed here, what that enables, what is wrong

A subcommand is a function that takes the subparsers, adds its own, and sets `run`, a function from the
parsed arguments to the exit code. Refusals (ValueError) are one line and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from helix_megatron.convert.cli import add_convert


def add_compare(subparsers: Any) -> None:
    """`helix compare`."""
    parser = subparsers.add_parser(
        "compare",
        help="train and decode the same model by several layouts, side by side",
        description="Trains, runs forward and decodes each variant of CONFIG.yaml and writes results.json "
        "and report.md. Exit code 1: losses of the same model disagree; 3: a variant did not finish.",
        epilog="GPU runs over several machines: set nnodes in the file, a shared --out, and start the same "
        "command on each with --node-rank R --rdzv-endpoint HOST:PORT.",
    )
    parser.add_argument("config", help="the comparison, for example configs/compare_host.yaml")
    parser.add_argument("--out", help="folder of the results (default: runs/<name of CONFIG>)")
    parser.add_argument("--only", action="append", metavar="NAME", help="run this variant only (repeatable)")
    parser.add_argument("--node-rank", type=int, default=0, help="this machine's number among nnodes")
    parser.add_argument("--rdzv-endpoint", help="HOST:PORT where the machines meet, when nnodes > 1")
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from rich.console import Console

    from helix_megatron.compare import config as configuration
    from helix_megatron.compare.harness import compare
    from helix_megatron.yaml_config import nearest

    config = configuration.load(options.config)
    names = [variant.name for variant in config.variants]
    for name in options.only or []:
        if name not in names:
            raise ValueError(
                f"{options.config} has no variant {name!r}{nearest(name, names)} It has: {names}."
            )
    if options.only:
        config = replace(config, variants=tuple(v for v in config.variants if v.name in options.only))
    torchrun = []
    if config.nnodes > 1:
        if not options.rdzv_endpoint:
            raise ValueError(
                f"nnodes is {config.nnodes}: say where the machines meet, --rdzv-endpoint HOST:PORT."
            )
        torchrun = [f"--node-rank={options.node_rank}", "--rdzv-backend=c10d"]
        torchrun += [f"--rdzv-endpoint={options.rdzv_endpoint}"]
    out = Path(options.out or Path("runs") / Path(options.config).stem)
    console = Console(width=None if sys.stdout.isatty() else 200)
    return compare(config, out, console, torchrun, options.node_rank)


def add_data(subparsers: Any) -> None:
    """`helix data`."""
    parser = subparsers.add_parser("data", help="write a small real English text as a Megatron data set")
    parser.add_argument("prefix", help="path of the data set without .bin and .idx")
    parser.set_defaults(run=_data)


def _data(options: argparse.Namespace) -> int:
    from helix_megatron import data

    return data.main([options.prefix])


def add_doctor(subparsers: Any) -> None:
    """`helix doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="what is installed here, what that enables, what is wrong",
        description="Exit code 0: fit, without a usable GPU for host mode only; 1: not fit.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from helix_megatron import doctor

    return doctor.main(options.json)


COMMANDS = (add_compare, add_data, add_doctor, add_convert)


def main(argv: list[str] | None = None) -> int:
    """The entry point of `helix`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="helix", description="Tools of Helix for Megatron.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(subparsers)
    options = parser.parse_args(argv)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"helix: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
