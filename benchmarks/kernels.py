"""Paged decode attention of one rank on one GPU: predicted floor, then measured, then one JSON line.

    python benchmarks/kernels.py [--turns 5] [--out kernels.json]

Eight shapes of the sharded cache (bf16, heads of 128, one KV head a rank). The floor is the time to read the
cache at the copy bandwidth measured first. Each kernel is replayed from a CUDA graph, so that launches by the
host count for nothing; of ours there are also the time of a first layer, which plans the step, and that of a
call without a graph. FlashAttention 3 or 2 is measured where it is installed and takes the pages.
Before it is timed a kernel is compared with the formula in fp32.
Then steps of several new tokens of each request (speculative ones, chunks of a prompt): what a rank computes
and writes for the exchange, by our kernel and by FlashAttention over cached and new keys apart.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helix_megatron.kernels import flash, selection
from helix_megatron.kernels.known_case import known_case_error
from helix_megatron.kernels.merge import plain_attention
from helix_megatron.kernels.paged_attention import Requests, VisibleSlots
from helix_megatron.partition.kv_layout import KvInterleave

DIM = 128
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """Query heads and requests of a rank, slots that it keeps of each, slots of a page, ranks that share, new
    tokens of each request."""

    heads: int
    batch: int
    slots: int
    page: int
    ranks: int
    new: int = 1

    @property
    def bytes(self) -> int:
        """Of the keys and values that are read."""
        return 2 * self.batch * self.slots * DIM * DTYPE.itemsize


SHAPES = [
    Shape(8, 1, 4096, 128, 2),
    Shape(8, 1, 65536, 128, 2),
    Shape(16, 1, 16384, 32, 8),
    Shape(8, 8, 65536, 128, 2),
    Shape(16, 8, 16384, 32, 8),
    Shape(8, 64, 4096, 128, 2),
    Shape(8, 64, 65536, 128, 2),
    Shape(16, 64, 16384, 32, 8),
]
SEVERAL = [
    Shape(8, 8, 4096, 128, 2, 4),
    Shape(8, 8, 65536, 128, 2, 4),
    Shape(16, 8, 16384, 32, 8, 4),
    Shape(8, 1, 16384, 128, 2, 2048),
    Shape(16, 1, 16384, 32, 8, 8192),
    Shape(8, 1, 16384, 256, 2, 2048),
]


def copy_bandwidth() -> float:
    """Bytes read and written a second."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), 5)


def seconds(run: Callable[[], Any], turns: int) -> float:
    """Median of the turns; before each one the second-level cache is overwritten."""
    sweep = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    run()
    times = []
    for _ in range(turns):
        sweep.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a CUDA graph of `run`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def draw(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Requests, VisibleSlots]:
    """Requests of equal length on scattered pages."""
    of_request = -(-shape.slots // shape.page) + (-(-shape.new // shape.page) if shape.new > 1 else 0)
    pages = shape.batch * of_request
    keys = torch.randn(pages, shape.page, 1, DIM, device="cuda", dtype=DTYPE)
    values = torch.randn_like(keys)
    query = torch.randn(shape.batch * shape.new, shape.heads, DIM, device="cuda", dtype=DTYPE)
    integers = dict(device="cuda", dtype=torch.int32)
    table = torch.randperm(pages, device="cuda").to(torch.int32).view(shape.batch, -1)
    before = shape.slots * shape.ranks
    lengths = torch.full((shape.batch,), before + shape.new * (shape.new > 1), **integers)
    ends = torch.arange(shape.batch + 1, **integers) * shape.new
    requests = Requests(ends, lengths, table, longest=shape.new)
    visible = VisibleSlots(DIM**-0.5, None, KvInterleave(shape.ranks, min(32, shape.page)), 0)
    return query, keys, values, requests, visible


def check(name: str, shape: Shape, out: Tensor, lse: Tensor, drawn: tuple) -> None:
    """The first and the last request against the formula."""
    query, keys, values, requests, visible = drawn
    for row in {0, shape.batch - 1}:
        key, value = (x[requests.table[row].long()].flatten(0, 1)[:, None] for x in (keys, values))
        want, want_lse = plain_attention(query[row][None, None], key, value, None, visible.softmax_scale)
        torch.testing.assert_close(out[row], want[0, 0], rtol=2e-2, atol=2e-2, msg=lambda m: f"{name}: {m}")
        torch.testing.assert_close(lse[row], want_lse[0, 0], rtol=1e-3, atol=1e-3)


def measure(shape: Shape, turns: int) -> dict[str, Any]:
    """Microseconds of every kernel that takes this shape."""
    from helix_megatron.kernels.paged_attention_triton import paged_attention

    drawn = draw(shape)
    query, keys, values, requests, visible = drawn

    def layer() -> tuple[Tensor, Tensor]:
        return paged_attention(query, keys, values, requests, visible, singles=True)

    def first_layer() -> tuple[Tensor, Tensor]:
        requests.refill()
        return layer()

    check("triton", shape, *layer(), drawn)
    row: dict[str, Any] = asdict(shape) | {"triton": 1e6 * seconds(captured(layer), turns)}
    row["triton_first_layer"] = 1e6 * seconds(captured(first_layer), turns)
    row["triton_no_graph"] = 1e6 * seconds(layer, turns)
    for name, kind in flash.FLASH.items():
        fault = flash.find(name)[1] if flash.find(name)[0] is None else None
        if shape.page % kind.page:
            fault = f"wants pages of {kind.page}"
        fault = fault or known_case_error(name, "cuda", DTYPE, shape.page, DIM)
        if fault:
            print(f"  {name}: {fault}", file=sys.stderr)
            continue
        run = lambda n=name: flash.attend(n, query, keys, values, requests, visible)  # noqa: E731
        check(name, shape, *run(), drawn)
        row[name] = 1e6 * seconds(run if kind.waits else captured(run), turns)
    return row


def measure_several(shape: Shape, turns: int) -> dict[str, Any]:
    """Microseconds of every kernel that takes several new tokens, eager and, where it can be, in a graph."""
    from helix_megatron.kernels.paged_attention_triton import attend_into

    query, keys, values, requests, visible = draw(shape)
    new = torch.randn(2, len(query), 1, DIM, device="cuda", dtype=DTYPE)
    outs = torch.empty(shape.ranks, len(query), shape.heads // shape.ranks, DIM, device="cuda", dtype=DTYPE)
    into = outs, torch.empty(outs.shape[:3], device="cuda", dtype=torch.float32)
    ways = {"triton": lambda: attend_into(*into, query, keys, values, requests, visible)}
    for name, kind in flash.FLASH.items():
        fault = None if flash.find_varlen(name)[0] else flash.find_varlen(name)[1]
        if shape.page % kind.page:
            fault = f"wants pages of {kind.page}"
        fault = fault or known_case_error(name, "cuda", DTYPE, shape.page, DIM, several=True)
        if fault:
            print(f"  {name}: {fault}", file=sys.stderr)
            continue
        ways[name] = functools.partial(
            flash.attend, name, query, keys, values, requests, visible, (new[0], new[1]), into
        )
    row: dict[str, Any] = asdict(shape)
    for name, run in ways.items():
        row[name] = 1e6 * seconds(captured(run), turns)
        row[f"{name}_no_graph"] = 1e6 * seconds(run, turns)
    return row


def main() -> None:
    """See above."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--turns", type=int, default=31, help="of each measurement; the median counts")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file as well")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use")
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy bandwidth {bandwidth / 1e12:.2f} TB/s, measured")
    print("predicted: microseconds to read the cache at that bandwidth")
    for shape in SHAPES:
        print(f"  {shape}: {1e6 * shape.bytes / bandwidth:.1f}")
    print("measured: microseconds, medians, in a CUDA graph unless it says otherwise")
    rows = []
    with torch.inference_mode():
        for shape in SHAPES:
            row = measure(shape, options.turns) | {"floor": 1e6 * shape.bytes / bandwidth}
            rows.append(row)
            times = {k: round(v, 1) for k, v in row.items() if isinstance(v, float)}
            share = row["flash-attn-3"] / row["triton"] if "flash-attn-3" in row else None
            print(f"  {shape}: {times}" + (f", FlashAttention 3's time / ours {share:.2f}" if share else ""))
        several = [measure_several(shape, options.turns) for shape in SEVERAL]
        for shape, row in zip(SEVERAL, several):
            print(f"  {shape}: { {k: round(v, 1) for k, v in row.items() if isinstance(v, float)} }")
    choice = selection.choose("cuda", DTYPE, 128, False, major=torch.cuda.get_device_capability()[0])
    document = json.dumps(
        {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "bandwidth": bandwidth,
            "choice": choice.reason,
            "rows": rows,
            "several": several,
        }
    )
    if options.out:
        options.out.write_text(document + "\n", encoding="utf-8")
    print(document)


if __name__ == "__main__":
    main()
