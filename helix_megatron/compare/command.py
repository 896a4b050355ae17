"""`helix compare`: its flags, and what they make of the file: fewer variants, other runs, a scaling study.

Weak and strong scaling run every variant at several numbers of ranks:

    strong    the same problem on more ranks      efficiency = speed(N) / (N / N0 x speed(N0))
    weak      a global batch that grows with N    the same formula: speeds are in tokens/s

What grows with the ranks is the tensor-parallel size, where the number of heads stops Megatron and not Helix;
pipeline, data and context parallelism stay as the variant has them. Helix chooses its grid at each size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from helix_megatron.compare import config as configuration
from helix_megatron.compare.config import CompareConfig
from helix_megatron.compare.variants import PP, TP, Variant
from helix_megatron.megatron import yaml_config

HOST_RANKS, GPU_RANKS = (1, 2, 4, 8), (8, 16, 32)


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
    add("config", help="the comparison, for example configs/paper_host.yaml")
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
    disk.add_argument("--report", action="store_true", help="run nothing, write the reports of --out anew",
                      dest="report_only")  # fmt: skip
    add("--retry", action="store_true", help="with --resume: run again what failed")
    add("--allow-mixed", action="store_true", help="put runs of other machines, versions, settings together")
    add("--node-rank", type=int, default=0, help="this machine's number among nnodes")
    add("--rdzv-endpoint", help="HOST:PORT where the machines meet, when nnodes > 1")
    parser.set_defaults(run=run_compare)


def run_compare(options: argparse.Namespace) -> int:
    """`helix compare` with these flags; returns the exit code."""
    from rich.console import Console

    from helix_megatron.compare import harness  # the flags of `helix` must not wait for torch

    given = {key: getattr(options, key) for key in ("runs", "preset", "scale", "cluster")}
    changes = {key: value for key, value in given.items() if value is not None}
    config = select_variants(configuration.load(options.config, changes), options.only or [], options.config)
    name = Path(options.config).stem
    if options.scaling:
        config = scale_ranks(config, options.scaling, _parse_sizes(options.sizes))
        name += f"_{options.scaling}_scaling"
    elif options.sizes:
        raise ValueError("--sizes goes with --scaling weak or --scaling strong.")
    keys = ("resume", "retry", "overwrite", "allow_mixed", "report_only", "node_rank", "rdzv_endpoint")
    chosen = harness.Options(**{key: getattr(options, key) for key in keys})
    console = Console(width=None if sys.stdout.isatty() else 100 if config.overview else 200)
    return harness.compare(config, Path(options.out or Path("runs") / name), console, chosen)


def _parse_sizes(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--sizes is {text!r}; it is numbers of ranks such as 1,2,4,8.") from error


def select_variants(config: CompareConfig, names: list[str], where: str) -> CompareConfig:
    """The comparison with the named variants alone. ValueError with the nearest name for an unknown one."""
    known = [variant.name for variant in config.variants]
    for name in names:
        if name not in known:
            close = yaml_config.nearest(name, known)
            raise ValueError(f"{where} has no variant {name!r}{close} It has: {known}.")
    return replace(config, variants=tuple(v for v in config.variants if v.name in names)) if names else config


def scale_ranks(config: CompareConfig, kind: str, sizes: Sequence[int] | None = None) -> CompareConfig:
    """The same comparison with every variant at every size (by default HOST_RANKS or GPU_RANKS).

    kind: "weak" or "strong". ValueError when the file's world_size is no base to scale from, or for weak
    scaling without a global batch.
    """
    sizes = tuple(sizes or (HOST_RANKS if config.host else GPU_RANKS))
    if any(size < 1 for size in sizes):
        raise ValueError(f"scaling over {list(sizes)} ranks: a size is at least 1.")
    variants: dict[str, Variant] = {}  # one of those that are the same now that Helix chooses the grid
    for variant in (_at_size(config, v, size, kind) for size in sizes for v in config.variants):
        variants.setdefault(repr((variant.attention_impl, variant.args, variant.ranks)), variant)
    largest = max(config.world_size, *sizes)
    per_node = config.world_size // config.nnodes
    nodes = config.nnodes if largest == config.world_size else -(-largest // per_node)
    world = per_node * nodes if config.nnodes > 1 or not config.host else largest
    title, kept = f"{config.name}: {kind} scaling", tuple(variants.values())
    return replace(config, name=title, variants=kept, world_size=world, nnodes=nodes)


def _at_size(config: CompareConfig, variant: Variant, ranks: int, kind: str) -> Variant:
    """One variant on `ranks` ranks: its tensor-parallel size times ranks / base.

    A size that its other degrees do not divide becomes a variant that Megatron refuses, and so a row.
    """
    flags = {**config.model_args, **variant.args}
    others = config.ranks(variant) // flags.get(TP, 1)
    grid = ("--helix-head-parallel-size", "--helix-dim-parallel-size")
    args = {k: v for k, v in variant.args.items() if k not in grid} | {TP: max(1, ranks // others)}
    if kind == "weak":
        batch = flags.get("--global-batch-size")
        if not batch:
            raise ValueError("weak scaling grows the global batch: MODEL_ARGS needs global-batch-size.")
        least = flags.get("--micro-batch-size", 1) * (ranks // (args[TP] * flags.get(PP, 1)) or 1)
        args["--global-batch-size"] = max(least, round(batch * ranks / config.ranks(variant)))
    return replace(variant, name=f"{variant.name} on {ranks}", family=variant.name, args=args, ranks=ranks,
                   may_fail=True)  # fmt: skip
