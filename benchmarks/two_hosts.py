"""Two hosts emulated on one: reductions level by level against flat ones over a slow link.

    sudo python benchmarks/two_hosts.py --rates 100 1000 --turns 31 --output benchmarks/results/two_hosts.json

A 2x2 grid: ranks 0 and 1 live in one network namespace, ranks 2 and 3 in another, joined by a virtual cable
whose rate `tc` limits (a token bucket; no delay is added). So a dim group is a host, and head groups cross
the cable. Each size of tensor is reduced flat (gloo's own collective over the four ranks) and by level
(levels.py), in turns; bytes on the cable are those its interfaces count, headers included.

Predicted payload of an all-reduce in each direction, for N bytes: flat ring 2 (T-1)/T N = 1.5 N; by level N
(two pairs of ranks all-reduce N/2 each). A ring that visits hosts in order is thus already good; what is
saved is at most a half, whatever m, against 1/m of a reduction that sums nothing before it crosses. gloo
reduce-scatters by an all-reduce of which a rank keeps its part: twice the bytes, on both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import bench
import torch
import torch.distributed as dist

from helix_megatron.exchange import levels
from helix_megatron.exchange.groups import initialize_helix_parallel
from helix_megatron.host.launcher import run_ranks
from helix_megatron.partition.grid import HelixGrid

SPACES = ("helix_host_0", "helix_host_1")
CABLE = "helixcable"
GRID = HelixGrid(2, 2)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts():
    """The namespaces and the cable between them, gone afterwards; the rate is set by `limit`."""
    try:
        for space in SPACES:
            ip("netns", "add", space)
        ip(
            "link",
            "add",
            CABLE,
            "netns",
            SPACES[0],
            "type",
            "veth",
            "peer",
            "name",
            CABLE,
            "netns",
            SPACES[1],
        )
        for number, space in enumerate(SPACES):
            ip("-n", space, "address", "add", f"10.77.0.{number + 1}/24", "dev", CABLE)
            ip("-n", space, "link", "set", CABLE, "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield
    finally:
        for space in SPACES:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)


def limit(rate_mbit: float) -> None:
    """Both directions of the cable."""
    for space in SPACES:
        command = (
            f"ip netns exec {space} tc qdisc replace dev {CABLE} root tbf rate {rate_mbit}mbit burst 64kb"
        )
        subprocess.run([*command.split(), "latency", "400ms"], check=True, capture_output=True, text=True)


def _enter(space: str) -> None:
    """This thread, and those it starts, see the namespace's network alone."""
    file = os.open(f"/run/netns/{space}", os.O_RDONLY)
    os.setns(file, os.CLONE_NEWNET)
    os.close(file)


def _sent() -> int:
    """Bytes this host has put on the cable."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == CABLE:
            return int(numbers.split()[8])
    raise RuntimeError(f"no interface {CABLE}")


def _collectives(groups) -> dict:
    """{kind: (flat, by level)}, each a function of a tensor whose elements 4 divides."""
    rank, size = dist.get_rank(), GRID.size

    def flat_scatter(tensor):
        out = tensor.new_empty(tensor.numel() // size)
        dist.reduce_scatter_tensor(out, tensor)
        return out

    def level_scatter(tensor):
        out = tensor.new_empty(tensor.numel() // size)
        levels.reduce_scatter(out, tensor, groups)
        return out

    def flat_gather(tensor):
        out = torch.empty_like(tensor)
        dist.all_gather_into_tensor(out, tensor.chunk(size)[rank].contiguous())
        return out

    def level_gather(tensor):
        out = torch.empty_like(tensor)
        levels.all_gather(out, tensor.chunk(size)[rank].contiguous(), groups)
        return out

    def flat_reduce(tensor):
        dist.all_reduce(tensor)
        return tensor

    return {
        "all-reduce": (flat_reduce, lambda tensor: levels.all_reduce(tensor, groups)),
        "reduce-scatter": (flat_scatter, level_scatter),
        "all-gather": (flat_gather, level_gather),
    }


def rank_measure(sizes: list[int], turns: int) -> list[dict]:
    """One row for each collective and size; the same on every rank but for `sent`."""
    rank = int(os.environ["RANK"])
    _enter(SPACES[rank // GRID.dim_parallel_size])
    os.environ.update(MASTER_ADDR="10.77.0.1", GLOO_SOCKET_IFNAME=CABLE)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    groups = initialize_helix_parallel(GRID, dist.group.WORLD)
    rows = []
    for kind, both in _collectives(groups).items():
        for size in sizes:
            tensor = torch.randn(size // 4, generator=torch.Generator().manual_seed(rank))
            results = [function(tensor.clone()) for function in both]  # warm, and checked
            torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
            seconds, sent = ([], []), ([], [])
            for _ in range(turns):
                for which, function in enumerate(both):
                    copy = tensor.clone()
                    dist.barrier()
                    before, start = _sent(), time.perf_counter()
                    function(copy)
                    took = torch.tensor(time.perf_counter() - start)
                    dist.barrier()
                    sent[which].append(_sent() - before)
                    dist.all_reduce(took, dist.ReduceOp.MAX)
                    seconds[which].append(took.item())
            rows.append({"collective": kind, "bytes": size, "seconds": seconds, "sent": sent})
    return rows


def measure(rate: float, options: argparse.Namespace) -> list[dict]:
    """Rows of one rate of the cable."""
    limit(rate)
    ranks = run_ranks(rank_measure, GRID.size, [int(size * 2**20) for size in options.mib], options.turns,
                      host_mode=False, timeout_s=600)  # fmt: skip
    rows = []
    for first, second in zip(ranks[0], ranks[2], strict=True):
        row = {"rate_mbit": rate, "collective": first["collective"], "bytes": first["bytes"]}
        for which, name in enumerate(("flat", "by_level")):
            row[f"{name}_ms"] = [round(1e3 * s, 3) for s in first["seconds"][which]]
            row[f"{name}_sent"] = [statistics.median(host["sent"][which]) for host in (first, second)]
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: medians, and the ratio of the two in a turn with its quartiles."""
    lines = [
        "| Mbit/s | collective | MiB | flat, ms | by level, ms | by level / flat (quartiles) "
        "| bytes on the cable / N: flat | by level |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        flat, level = row["flat_ms"], row["by_level_ms"]
        ratios = [b / a for a, b in zip(flat, level, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        sent = [max(row[f"{name}_sent"]) / row["bytes"] for name in ("flat", "by_level")]
        lines.append(
            f"| {row['rate_mbit']:g} | {row['collective']} | {row['bytes'] / 2**20:g} "
            f"| {statistics.median(flat):.1f} | {statistics.median(level):.1f} "
            f"| {middle:.2f} ({low:.2f} to {high:.2f}) | {sent[0]:.2f} | {sent[1]:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rates", type=float, nargs="+", default=[100, 1000], help="of the cable, Mbit/s")
    add("--mib", type=float, nargs="+", default=[0.25, 4], help="sizes of the tensor")
    add("--turns", type=int, default=7)
    add("--output", type=Path, help="write the samples as JSON")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("two_hosts.py makes network namespaces: run it as root", file=sys.stderr)
        return 2
    with two_hosts():
        rows = [row for rate in options.rates for row in measure(rate, options)]
    print(table(rows))
    document = {"grid": str(GRID), "turns": options.turns, "hardware": bench.hardware(), "rows": rows}
    if options.output:
        options.output.write_text(json.dumps(document) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
