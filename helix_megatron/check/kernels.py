"""Attention over a rank's part of a paged cache: every backend against the formula, its speed on a GPU.

On a host the Triton kernel runs under Triton's interpreter, which says whether it is right and nothing about
its time. On a GPU it is timed in a CUDA graph, beside FlashAttention where that is installed, and against the
bandwidth of a copy: bytes of the cache over seconds.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from helix_megatron.check.paged import draw, expected
from helix_megatron.check.rows import Place, Rows, first_line
from helix_megatron.kernels import backend, flash
from helix_megatron.kernels.known_case import known_case_error
from helix_megatron.kernels.merge import merge_partials
from helix_megatron.kernels.paged_attention import Requests, VisibleSlots
from helix_megatron.partition.kv_layout import KvInterleave

STEPS = {  # tokens of each request, how many of them are new
    "decode": ([1, 9, 150, 33], [1, 1, 1, 1]),
    "prompts": ([5, 40, 1, 17], [5, 40, 1, 17]),
    "mixed": ([70, 0, 12, 80, 1], [1, 0, 12, 23, 1]),
}
HEADS = ((4, 4), (4, 2), (9, 3), (8, 1))
INTERLEAVES = ((1, 4), (3, 2), (4, 5))
WINDOWS = (None, 6)
KINDS = (
    (torch.float32, 128),
    (torch.bfloat16, 128),
    (torch.float16, 64),
    (torch.bfloat16, 80),
    (torch.bfloat16, 256),
)
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# name, query heads, ranks of the dim group; KV head 1, dimension 128: what a rank of a decode step attends
SPEEDS = (("64/8 heads, 8x2", 8, 2), ("16/1 heads, 1x8", 16, 8), ("16/2 heads, 2x4", 8, 4))
BATCHES, CONTEXTS = (1, 8, 64), (8192, 131072)


def check(rows: Rows, place: Place) -> None:
    """Right first; then, on a GPU, how fast."""
    if place.on_host:
        check_exactness(rows, "torch", "cpu", place.quick)
        check_interpreted(rows, place)
        rows.add("speed", "skipped", "no GPU: a host's times say nothing about kernels")
        return
    for name in ("triton", "torch", ""):
        check_exactness(rows, name, "cuda", place.quick)
    check_flash(rows)
    check_speed(rows, place)


def check_interpreted(rows: Rows, place: Place) -> None:
    """The Triton kernel in a process that imports Triton with its interpreter on."""
    try:
        import triton  # noqa: F401
    except ImportError:
        rows.add("triton", "skipped", "Triton is not installed")
        return
    command = [sys.executable, "-m", "helix_megatron.check.kernels", rows.path, str(int(place.quick))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL)


def draw_cases(device: str, quick: bool) -> list[dict[str, Any]]:
    """What is drawn: every step with every head shape in turn, the other choices in rotation."""
    found = []
    for number, ((step, (lengths, new)), heads) in enumerate(itertools.product(STEPS.items(), HEADS)):
        dtype, dim = KINDS[number % len(KINDS)]
        ranks, size = INTERLEAVES[number // 2 % len(INTERLEAVES)]
        if device == "cpu":
            dim = 12 + 4 * (number % 2)
        found.append(
            dict(step=step, lengths=lengths, new=new, heads=heads, dim=dim, dtype=dtype, ranks=ranks,
                 size=size, left=WINDOWS[number // 2 % 2], seed=number)
        )  # fmt: skip
    return found[:: 3 if quick and device == "cpu" else 1]


def check_exactness(rows: Rows, name: str, device: str, quick: bool) -> None:
    """One row for each dtype: all cases by the backend `name`, or by the one chosen when it is empty."""
    worst: dict[str, float] = {}
    for case in draw_cases(device, quick):
        label = f"{name or 'as chosen'}, {str(case['dtype'])[6:]}"
        what = (
            f"{case['step']} {case['heads']} d={case['dim']} window {case['left']} of {case['ranks']} ranks"
        )
        try:
            error = measure_error(name, device, case)
        except Exception as failure:
            rows.add(label, "failed", f"{what}: {type(failure).__name__}: {str(failure)[:200]}")
            return
        if not error <= TOLERANCES[case["dtype"]]:
            rows.add(
                label, "failed", f"{what}: {error:.1e} off the formula, allowed {TOLERANCES[case['dtype']]:g}"
            )
            return
        worst[label] = max(worst.get(label, 0.0), error)
    for label, error in worst.items():
        rows.add(label, "ok", f"at most {error:.1e} off the formula", error=error, device=device)


def check_flash(rows: Rows) -> None:
    """Every FlashAttention that is installed, by its small known cases: single tokens, and several of a
    request, cached and new keys apart."""
    for (name, kind), several in itertools.product(flash.FLASH.items(), (False, True)):
        label = f"{name}, {'several tokens' if several else 'single tokens'}"
        kernel, reason = (flash.find_varlen if several else flash.find)(name)
        if kernel is None:
            rows.add(label, "skipped", reason)
            continue
        pages = (kind.page, 2 * kind.page) if kind.page > 1 else (24, 256)
        kinds = [(dtype, dim) for dtype, dim in KINDS if dtype != torch.float32]
        found = (
            known_case_error(name, "cuda", dtype, page, dim, several)
            for page, (dtype, dim) in itertools.product(pages, kinds)
        )
        fault = next(filter(None, found), None)
        rows.add(label, "failed" if fault else "ok", fault or f"{reason}: as the formula")


def measure_error(name: str, device: str, case: dict[str, Any]) -> float:
    """The greatest difference of outputs and log-sum-exp over all shards, and of the merged whole."""
    scale, dim = case["dim"] ** -0.5, case["dim"]
    outs, lses, wants = [], [], []
    errors = []
    for rank in range(case["ranks"]):
        given = (
            case["lengths"],
            case["new"],
            case["ranks"],
            case["size"],
            rank,
            case["heads"],
            dim,
            "scattered",
        )
        query, keys, values, requests, kept = draw(*given, case["seed"], dtype=case["dtype"], cycles=3)
        visible = VisibleSlots(scale, case["left"], KvInterleave(case["ranks"], case["size"]), rank)
        moved = Requests(*(x.to(device) for x in (requests.query_ends, requests.lengths, requests.table)))
        singles = len(query) if all(new == 1 for new in case["new"]) else 0
        out, lse = attend(name, *(x.to(device) for x in (query, keys, values)), moved, visible, singles)
        want, want_lse = expected(query, requests, kept, scale, case["left"])
        errors += [_largest_difference(out, want), _largest_difference(lse, want_lse)]
        outs.append(out), lses.append(lse), wants.append((want, want_lse))
    merged = merge_partials(torch.stack(outs), torch.stack(lses))
    exact = merge_partials(*(torch.stack(parts) for parts in zip(*wants)))  # in float64
    return max(*errors, *(_largest_difference(mine, want) for mine, want in zip(merged, exact)))


def attend(
    name: str, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, requests: Requests,
    visible: VisibleSlots, singles: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """backend.attend by the backend `name`."""
    before = os.environ.pop(backend.OVERRIDE, None)
    if name:
        os.environ[backend.OVERRIDE] = name
    try:
        return backend.attend(query, keys, values, requests, visible, singles)
    finally:
        os.environ.pop(backend.OVERRIDE, None)
        if before is not None:
            os.environ[backend.OVERRIDE] = before


def _largest_difference(mine: torch.Tensor, want: torch.Tensor) -> float:
    """inf where one is finite and the other is not."""
    mine, want = mine.double().cpu(), want.double()
    if not torch.equal(torch.isfinite(mine), torch.isfinite(want)):
        return float("inf")
    seen = torch.isfinite(want)
    return (mine[seen] - want[seen]).abs().max().item() if seen.any() else 0.0


# ---- on a GPU ----
def check_speed(rows: Rows, place: Place) -> None:
    """Decode at the shapes of real ranks: the backend chosen, beside FlashAttention."""
    bandwidth = copy_bandwidth()
    rows.add("copy", "measured", f"{bandwidth / 1e9:.0f} GB/s", copy_gb_per_s=bandwidth / 1e9)
    for (name, heads, ranks), batch, context in itertools.product(SPEEDS, BATCHES, CONTEXTS):
        if place.quick and (name != SPEEDS[0][0] or batch == 64):
            continue
        try:
            found = time_decode_step(heads, ranks, batch, context // ranks, bandwidth)
        except torch.cuda.OutOfMemoryError:
            rows.add(f"{name}, batch {batch}, context {context}", "skipped", "not enough memory")
            continue
        except Exception as error:
            rows.add(f"{name}, batch {batch}, context {context}", "failed", first_line(error))
            continue
        rows.add(f"{name}, batch {batch}, context {context}", "measured", **found)


def copy_bandwidth() -> float:
    """Bytes/s of a copy, read and written."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / measure_seconds(lambda: y.copy_(x))


def time_decode_step(heads: int, ranks: int, batch: int, slots: int, bandwidth: float) -> dict[str, Any]:
    """A decode step of `batch` requests, of each of which this rank keeps `slots` slots."""
    page, dim, dtype = max(32, 256 // ranks), 128, torch.bfloat16
    pages = batch * slots // page
    keys, values = torch.randn(2, pages, page, 1, dim, device="cuda", dtype=dtype)
    query = torch.randn(batch, heads, dim, device="cuda", dtype=dtype)
    table = torch.randperm(pages, device="cuda").to(torch.int32).view(batch, -1)
    lengths = torch.full((batch,), slots * ranks, device="cuda", dtype=torch.int32)
    requests = Requests(torch.arange(batch + 1, device="cuda", dtype=torch.int32), lengths, table)
    visible = VisibleSlots(dim**-0.5, None, KvInterleave(ranks, min(32, page)), 0)
    once = lambda: backend.attend(query, keys, values, requests, visible, batch)  # noqa: E731
    eager, graph = measure_seconds(once), measure_seconds(capture_graph(once))
    moved = 2 * keys.nbytes
    found: dict[str, Any] = {
        "backend": backend.choose("cuda", dtype, page, False, os.environ.get(backend.OVERRIDE)).singles,
        "microseconds": 1e6 * graph,
        "eager_microseconds": 1e6 * eager,
        "gb_per_s": moved / graph / 1e9,
        "share_of_copy": moved / graph / bandwidth,
    }
    flash, why = flash_attention()
    if flash is None:
        return {**found, "flash_attention": why}
    whole = [x.reshape(batch, slots, 1, dim) for x in (keys, values)]
    filled = torch.full((batch,), slots, device="cuda", dtype=torch.int32)
    q = query[:, None]
    theirs = capture_graph(lambda: flash(q, *whole, cache_seqlens=filled, causal=False))
    return {**found, "flash_attention": why, "flash_microseconds": 1e6 * measure_seconds(theirs)}


def flash_attention() -> tuple[Callable[..., Any] | None, str]:
    """The decode kernel of the newest FlashAttention installed, and what it is."""
    for module in ("flash_attn_interface", "fa3_fwd_interface", "flash_attn"):
        try:
            found = __import__(module).flash_attn_with_kvcache
        except (ImportError, AttributeError):
            continue
        return found, "FlashAttention 2" if module == "flash_attn" else "FlashAttention 3"
    return None, "not installed"


def capture_graph(once: Callable[[], Any]) -> Callable[[], None]:
    """The replay of a CUDA graph of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once(), once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return graph.replay


def measure_seconds(once: Callable[[], Any], calls: int = 20, turns: int = 7) -> float:
    """Median seconds of one call, on the GPU."""
    for _ in range(3):
        once()
    found = []
    for _ in range(turns):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            once()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(found)


if __name__ == "__main__":
    check_exactness(Rows(sys.argv[1]), "triton", "cpu", bool(int(sys.argv[2])))
