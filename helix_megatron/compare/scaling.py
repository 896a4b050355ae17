"""Weak and strong scaling: every variant at several numbers of ranks, and how well it uses them. Pure.

    strong    the same problem on more ranks      efficiency = speed(N) / (N / N0 x speed(N0))
    weak      a global batch that grows with N    the same formula: speeds are in tokens/s

What grows with the ranks is the tensor-parallel size, where the number of heads stops Megatron and not Helix;
pipeline, data and context parallelism stay as the variant has them. Helix chooses its grid at each size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from helix_megatron.compare.config import CompareConfig
from helix_megatron.compare.variants import PP, TP, Variant

HOST_RANKS, GPU_RANKS = (1, 2, 4, 8), (8, 16, 32)
_BATCH, _MICRO_BATCH = "--global-batch-size", "--micro-batch-size"


def at_sizes(config: CompareConfig, kind: str, sizes: Sequence[int] | None = None) -> CompareConfig:
    """The same comparison with every variant at every size (by default HOST_RANKS or GPU_RANKS).

    kind: "weak" or "strong". ValueError when the file's world_size is no base to scale from, or for weak
    scaling without a global batch.
    """
    sizes = tuple(sizes or (HOST_RANKS if config.host else GPU_RANKS))
    if any(size < 1 for size in sizes):
        raise ValueError(f"scaling over {list(sizes)} ranks: a size is at least 1.")
    variants: list[Variant] = []
    for variant in (_at(config, variant, size, kind) for size in sizes for variant in config.variants):
        if not any(_alike(variant, other) for other in variants):
            variants.append(variant)
    largest = max(config.world_size, *sizes)
    per_node = config.world_size // config.nnodes
    nodes = config.nnodes if largest == config.world_size else -(-largest // per_node)
    title = f"{config.name}: {kind} scaling"
    world = per_node * nodes if config.nnodes > 1 or not config.host else largest
    return replace(config, name=title, variants=tuple(variants), world_size=world, nnodes=nodes)


def _at(config: CompareConfig, variant: Variant, ranks: int, kind: str) -> Variant:
    """One variant on `ranks` ranks: its tensor-parallel size times ranks / base.

    A size that its other degrees do not divide becomes a variant that Megatron refuses, and so a row.
    """
    flags = {**config.model_args, **variant.args}
    others = config.ranks(variant) // flags.get(TP, 1)
    args = {k: v for k, v in variant.args.items() if k not in _GRID} | {TP: max(1, ranks // others)}
    if kind == "weak":
        batch = flags.get(_BATCH)
        if not batch:
            raise ValueError("weak scaling grows the global batch: MODEL_ARGS needs global-batch-size.")
        grown = batch * ranks / config.ranks(variant)
        least = flags.get(_MICRO_BATCH, 1) * (ranks // (args[TP] * flags.get(PP, 1)) or 1)
        args[_BATCH] = max(least, round(grown))
    return replace(variant, name=f"{variant.name} on {ranks}", family=variant.name, args=args, ranks=ranks,
                   may_fail=True)  # fmt: skip


def _alike(one: Variant, other: Variant) -> bool:
    """Whether two variants of one size are the same now that Helix chooses the grid."""
    return all(getattr(one, k) == getattr(other, k) for k in ("attention_impl", "args", "ranks"))


_GRID = ("--helix-head-parallel-size", "--helix-dim-parallel-size")


def study(results: dict[str, Any], workload: str) -> dict[str, list[dict[str, Any]]]:
    """family → its sizes that finished, smallest first: ranks, tokens_per_s, efficiency, and the grid.

    Efficiency is relative to the family's own smallest size.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for variant in results["variants"]:
        if variant["family"] and variant["status"] == "ok" and workload in variant["measured"]["workloads"]:
            speed = variant["measured"]["workloads"][workload]["tokens_per_s"]["mean"]
            point = {
                "ranks": variant["world_size"],
                "tokens_per_s": speed,
                "grid": variant["measured"]["grid"],
            }
            found.setdefault(variant["family"], []).append(point)
    for points in found.values():
        points.sort(key=lambda point: point["ranks"])
        base = points[0]["tokens_per_s"] / points[0]["ranks"]
        for point in points:
            point["efficiency"] = point["tokens_per_s"] / point["ranks"] / base
    return found


def rows(results: dict[str, Any]) -> list[list[str]]:
    """variant, workload, ranks, grid, tokens/s, efficiency."""
    found = []
    for workload in ("train", "prefill", "decode"):
        for family, points in study(results, workload).items():
            for point in points:
                grid = f"{point['grid']['n']}x{point['grid']['m']}" if point["grid"] else "-"
                speed, share = f"{point['tokens_per_s']:,.4g}", f"{100 * point['efficiency']:.0f} %"
                found.append([family, workload, str(point["ranks"]), grid, speed, share])
    return found


ROWS = ["variant", "workload", "ranks", "grid", "tokens/s", "efficiency"]
