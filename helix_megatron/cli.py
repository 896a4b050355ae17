"""The `helix` command: one subcommand per tool.

    helix check --quick          prove and measure Helix on this machine: a host, one GPU, several, many
    helix compare CONFIG.yaml    the same model by several layouts, side by side
    helix convert --from …       Hugging Face models into Megatron checkpoints, and back
    helix data PREFIX            a small real English text as byte tokens
    helix doctor                 what is installed here, what that enables, what is wrong
    helix generate --model …     text from a model on any number of ranks
    helix plan --model …         which layout to run a model in, predicted
    helix serve --model …        Megatron's text-generation server on any number of ranks
    helix show --heads …         who holds which heads and dimensions, and what is exchanged

A subcommand is a function that takes the subparsers, adds its own, and sets `run`, a function from the
parsed arguments to the exit code. Refusals (ValueError) are one line and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from helix_megatron.check.command import add_check
from helix_megatron.convert.cli import add_convert
from helix_megatron.generate.cli import add_generate, add_serve
from helix_megatron.plan.command import add_plan
from helix_megatron.show import add_show


def add_compare(subparsers: Any) -> None:
    """`helix compare`."""
    from helix_megatron.compare.command import add_compare as add

    add(subparsers)


def add_data(subparsers: Any) -> None:
    """`helix data`."""
    parser = subparsers.add_parser("data", help="write a small real English text as a Megatron data set")
    parser.add_argument("prefix", help="path of the data set without .bin and .idx")
    parser.set_defaults(run=_data)


def _data(options: argparse.Namespace) -> int:
    from helix_megatron.models import data

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


COMMANDS = (
    add_check, add_compare, add_data, add_doctor, add_convert, add_generate, add_plan, add_serve, add_show,
)  # fmt: skip


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
