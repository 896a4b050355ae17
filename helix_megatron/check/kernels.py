"""Attention over a rank's part of a paged cache: every backend against the formula, its speed on a GPU.

On a host the Triton kernel runs under Triton's interpreter, which says whether it is right and nothing about
its time. On a GPU it is timed in a CUDA graph, beside FlashAttention where that is installed, and against the
bandwidth of a copy: bytes of the cache over seconds.
"""

from __future__ import annotations

import importlib
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
from helix_megatron.inference.partial_exchange import piece_elements, piece_views
from helix_megatron.kernels import backend, flash, selection
from helix_megatron.kernels.flash import FLASH
from helix_megatron.kernels.known_case import known_case_error
from helix_megatron.kernels.merge import combine_partials, merge_partials, triton_obstacle
from helix_megatron.kernels.paged_attention import Requests, VisibleSlots
from helix_megatron.partition.kv_layout import KvInterleave

STEPS = {  # tokens of each request, how many of them are new
    "decode": ([1, 9, 150, 33], [1, 1, 1, 1]),
    "prompts": ([5, 40, 1, 17], [5, 40, 1, 17]),
    "mixed": ([70, 0, 12, 80, 1], [1, 0, 12, 23, 1]),
}
LONG = {  # on a GPU: pages of the size that engines use, and more steps than programs take alone
    "long decode": ([4000, 1, 700, 2300], [1, 1, 1, 1]),
    "long mixed": ([3000, 900, 400, 1], [1, 300, 400, 1]),
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
COPIED = 2**30  # bytes


def check(rows: Rows, place: Place) -> None:
    """Right first; then, on a GPU, how fast."""
    if place.on_host:
        check_exactness(rows, "torch", "cpu", place.quick)
        check_interpreted(rows, place)
        rows.add("speed", "skipped", "no GPU: a host's times say nothing about kernels")
        return
    if triton_obstacle():
        rows.add("triton", "skipped", triton_obstacle())
    for name in ("torch", *(() if triton_obstacle() else ("triton",)), ""):
        check_apart(rows, place, "cuda", name)
    check_speed(rows, place)


def check_interpreted(rows: Rows, place: Place) -> None:
    """The Triton kernel in a process that imports Triton with its interpreter on."""
    if triton_obstacle():
        rows.add("triton", "skipped", triton_obstacle())
        return
    check_apart(rows, place, "cpu", "triton", TRITON_INTERPRET="1")


def check_apart(rows: Rows, place: Place, device: str, *names: str, **environment: str) -> None:
    """check_exactness of backends in a process of their own: a fault there leaves the device to others."""
    command = [sys.executable, "-m", "helix_megatron.check.kernels", rows.path, str(int(place.quick)), device]
    how: dict[str, Any] = dict(env={**os.environ, **environment}, stdin=subprocess.DEVNULL)
    try:
        ended = subprocess.run([*command, *names], timeout=place.left_s / 2, **how)
    except subprocess.TimeoutExpired as error:
        rows.add(f"attention on {device}", "failed", f"killed after {error.timeout:.0f} s")
        return
    if ended.returncode:
        told = f"its process ended with {ended.returncode} before all cases were done"
        rows.add(f"attention on {device}", "failed", told)


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
                 size=size, left=WINDOWS[number // 2 % 2], seed=number, cycles=3)
        )  # fmt: skip
    if device == "cpu":
        return found[:: 3 if quick else 1]
    if quick:  # every step, shape of heads and dtype all the same
        found = [case for number, case in enumerate(found) if (number + number // 4) % 2 == 0]
    long = dict(dim=128, dtype=torch.bfloat16, ranks=2, size=32, cycles=4, seed=0)
    kinds = itertools.product(LONG.items(), ((8, 1), (16, 2)), (None, 300))
    return found + [
        dict(step=step, lengths=lengths, new=new, heads=heads, left=left, **long)
        for (step, (lengths, new)), heads, left in kinds
        if not quick or (heads == (8, 1)) == (left is None)
    ]


def check_exactness(rows: Rows, name: str, device: str, quick: bool) -> None:
    """One row for each case, by the backend `name`, or by the one chosen when it is empty."""
    for case in draw_cases(device, quick):
        dtype, taken = case["dtype"], name or f"as chosen, {chosen(device, case)}"
        label = (
            f"{taken}, {case['step']}, {str(dtype)[6:]}, heads {case['heads'][0]}/{case['heads'][1]} of "
            f"{case['dim']}, window {case['left']}, pages of {case['size'] * case['cycles']}"
        )
        try:
            error = measure_error(name, device, case)
        except Exception as failure:
            rows.add(label, "failed", first_line(failure))
            continue
        right = error <= TOLERANCES[dtype]
        allowed = "" if right else f", allowed {TOLERANCES[dtype]:g}"
        told = f"at most {error:.1e} off the formula{allowed}, {case['ranks']} ranks and their merge"
        rows.add(label, "ok" if right else "failed", told, error=error, device=device)


def chosen(device: str, case: dict[str, Any]) -> str:
    """The backend that attention chooses for a case."""
    singles = all(new == 1 for new in case["new"])
    choice = selection.choose(
        device, case["dtype"], case["size"] * case["cycles"], case["left"] is not None,
        os.environ.get(selection.OVERRIDE), dim=case["dim"], major=_major(device),
    )  # fmt: skip
    return choice.singles if singles else choice.others


def _major(device: str) -> int | None:
    return torch.cuda.get_device_capability()[0] if device == "cuda" else None


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
    scale, ranks, dtype = case["dim"] ** -0.5, case["ranks"], case["dtype"]
    shape = (case["lengths"], case["new"], ranks, case["size"])
    how = dict(dtype=dtype, cycles=case["cycles"], unwritten=torch.nan if name else 100.0)
    singles = sum(case["new"]) if all(new == 1 for new in case["new"]) else 0
    outs, lses, wants, errors = [], [], [], []
    for rank in range(ranks):
        drawn = draw(*shape, rank, case["heads"], case["dim"], "scattered", case["seed"], **how)
        query, keys, values, requests, kept = drawn
        visible = VisibleSlots(scale, case["left"], KvInterleave(ranks, case["size"]), rank)
        tensors = [x.to(device) for x in (query, keys, values)]
        moved = Requests(*(x.to(device) for x in requests.tensors))
        want = expected(query, requests, kept, scale, case["left"])
        found = attend(name, *tensors, moved, visible, singles)
        assert found is not None
        written = attend_into_pieces(name, *tensors, moved, visible, singles)
        errors += [_largest_difference(*pair) for given in (found, *written) for pair in zip(given, want)]
        outs.append(found[0]), lses.append(found[1]), wants.append(want)
    exact, stacked = [torch.stack(parts) for parts in zip(*wants)], (torch.stack(outs), torch.stack(lses))
    sinks = torch.randn(case["heads"][0], generator=torch.Generator().manual_seed(case["seed"]))
    for own, given in ((None, None), (sinks, sinks.to(device))):
        merged = combine_partials(*stacked, dtype, given)
        errors.append(_largest_difference(merged, merge_partials(*exact, own)[0]))
    return max(errors)


def attend_into_pieces(
    name: str, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, requests: Requests,
    visible: VisibleSlots, singles: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """The same by kernels that write what ranks are sent, as whole again: whole heads of each, and slices."""
    (tokens, heads, dim), m, found = query.shape, visible.interleave.ranks, []
    for of_heads, of_dim in ((heads // m, dim), (heads, dim // m)):
        if m == 1 or of_heads * of_dim * m != heads * dim:
            continue
        elements = piece_elements(tokens, of_heads, of_dim, query.element_size())[1]
        outs, lses = piece_views(query.new_full((m, elements), torch.nan), (tokens,), of_heads, of_dim)
        attend(name, query, keys, values, requests, visible, singles, (outs, lses))
        if of_heads < heads:
            found.append((outs.movedim(0, 1).flatten(1, 2), lses.movedim(0, 1).flatten(1, 2)))
        else:  # all have the log-sum-exps of all heads
            found += [(outs.movedim(0, 2).flatten(2), lse) for lse in lses]
    return found


def attend(
    name: str, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, requests: Requests,
    visible: VisibleSlots, singles: int, into: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:  # fmt: skip
    """backend.attend by the backend `name`."""
    before = os.environ.pop(selection.OVERRIDE, None)
    if name:
        os.environ[selection.OVERRIDE] = name
    try:
        return backend.attend(query, keys, values, requests, visible, singles, into=into)
    finally:
        os.environ.pop(selection.OVERRIDE, None)
        if before is not None:
            os.environ[selection.OVERRIDE] = before


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
    x = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
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
    asked = os.environ.get(selection.OVERRIDE)
    choice = selection.choose("cuda", dtype, page, False, asked, dim=dim, major=_major("cuda"), graph=True)
    found: dict[str, Any] = {
        "backend": choice.singles,
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
    try:
        theirs = capture_graph(lambda: flash(q, *whole, cache_seqlens=filled, causal=False))
        return {**found, "flash_attention": why, "flash_microseconds": 1e6 * measure_seconds(theirs)}
    except Exception as error:  # of a yardstick, not of ours
        return {**found, "flash_attention": f"{why} fails: {first_line(error)}"}


def flash_attention() -> tuple[Callable[..., Any] | None, str]:
    """The decode kernel of the newest FlashAttention installed, and what it is."""
    for module in (*FLASH["flash-attn-3"].modules, "fa3_fwd_interface", *FLASH["flash-attn-2"].modules):
        try:
            found = importlib.import_module(module).flash_attn_with_kvcache
        except Exception:  # a library built for another torch fails with anything
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
    from helix_megatron.host.processes import die_with_parent

    die_with_parent()
    for name in sys.argv[4:]:
        check_exactness(Rows(sys.argv[1]), name, sys.argv[3], bool(int(sys.argv[2])))
    if sys.argv[3:] == ["cuda", ""]:
        check_flash(Rows(sys.argv[1]))
