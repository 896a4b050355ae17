"""Operations and bytes are counted as a list of kernels by hand would have them."""

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helix_megatron.host.launcher import run_ranks
from helix_megatron.measure.operations import ATTENTION, MATRIX, OTHER, OperationMeter, Operations
from helix_megatron.partition.grid import AttentionShape, HelixGrid
from helix_megatron.partition.layout import HelixLayout

ROOT = Path(__file__).parents[2]


def counted(compute) -> dict[str, Operations]:
    meter = OperationMeter()
    with meter.counting():
        compute()
    return meter.tallies


N = 6 * 4  # bytes of six fp32 numbers


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        (lambda a, b: a + b, (1, 2 * N, N)),
        (lambda a, b: a.add_(b), (1, 2 * N, N)),
        (lambda a, b: a.copy_(b), (1, N, N)),
        (lambda a, b: a.zero_(), (1, 0, N)),
        (lambda a, b: torch.add(a, b, out=torch.empty(2, 3)), (1, 2 * N, N)),
        (lambda a, b: a.t().view(3, 2)[:, 1].unsqueeze(0), (0, 0, 0)),
        (lambda a, b: a.new_empty(5), (0, 0, 0)),
        (lambda a, b: torch.cat([a, b]), (1, 2 * N, 2 * N)),
        (lambda a, b: a[:1].expand(4, 3).clone(), (1, N // 2, 2 * N)),  # a row is read once
        (lambda a, b: a.to(torch.bfloat16), (1, N, N // 2)),
        (lambda a, b: a.sum(0), (1, N, N // 2)),
    ],
)
def test_kernels_are_counted_by_hand(compute, expected):
    a, b = torch.ones(2, 3), torch.ones(2, 3)
    found = counted(lambda: compute(a, b))[OTHER]
    assert (found.count, found.read, found.written) == expected


def test_kinds_and_backward():
    x, w = torch.ones(4, 8, requires_grad=True), torch.ones(8, 8, requires_grad=True)

    def step():
        y = (x @ w).view(1, 1, 4, 8)
        torch.nn.functional.scaled_dot_product_attention(y, y, y).backward(torch.ones(1, 1, 4, 8))

    tallies = counted(step)
    assert tallies[MATRIX].count == 3  # forward, and the gradients of x and w
    assert tallies[MATRIX].read == 4 * (32 + 64 + 2 * 32 + 32 + 64)
    assert tallies[ATTENTION].count == 2
    assert tallies[OTHER].count >= 2  # gradients of q, k and v are summed


def exchange_counts() -> list[Operations]:
    """Before attention, forward and backward, of "heads" and of "dims"."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from helix_megatron.exchange.heads import HeadExchange, WholeHeads
    from helix_megatron.partition.grid import AttentionShape, HelixGrid
    from helix_megatron.partition.layout import HelixLayout

    torch.distributed.init_process_group(backend="fake", store=FakeStore(), rank=0, world_size=2)
    group, found = torch.distributed.group.WORLD, []
    for shape, placement in ((AttentionShape(4, 4, 8), "heads"), (AttentionShape(4, 4, 8), "dims")):
        layout = HelixLayout(shape, HelixGrid(1, 2), placement)
        query, key, value = (torch.ones(3, 1, 4, 4, requires_grad=True) for _ in range(3))

        def exchange(layout=layout, heads=(query if placement == "dims" else None, key, value)):
            whole = WholeHeads(HeadExchange(layout, group), *heads).wait()
            whole = [tensor for tensor in whole if tensor is not None]
            torch.autograd.backward(whole, [torch.ones_like(tensor) for tensor in whole])

        exchange()
        ones = 2 if placement == "heads" else 3
        query.grad = key.grad = value.grad = None
        tally = counted(exchange)[OTHER]
        tally.count -= ones  # ones_like, which is no part of it
        tally.written -= ones * 3 * 1 * 2 * 8 * 4
        found.append(tally)
    return found


def test_the_exchange_walks_every_number_once_each_way():
    """Sent: packed once. Received: merged once. The same in the backward: four copies of each tensor."""
    heads, dims = run_ranks(exchange_counts, 1, timeout_s=60)[0]
    size = 3 * 1 * 4 * 4 * 4  # bytes of a slice of all heads, and of the whole heads of one rank
    assert (heads.count, heads.read, heads.written) == (2 * 4, 2 * 4 * size, 2 * 4 * size)
    assert (dims.count, dims.read, dims.written) == (3 * 4, 3 * 4 * size, 3 * 4 * size)


# ---- of a layer ----
UNFUSED = "64/8 TP=16 8x2 heads"


@pytest.fixture
def operations(monkeypatch):
    """benchmarks/operations.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("operations")
    for name in ("operations", "bench"):
        sys.modules.pop(name, None)


def layer_counts() -> tuple[dict, dict]:
    """Of every case; of one without fused RoPE."""
    import operations

    counts = {case: operations.count(case) for case in operations.CASES}
    return counts, operations.count(UNFUSED, fused_rope=False)


def test_the_layers_counts_are_those_of_the_table(operations):
    """What is committed is what the layer does; fewer operations must be counted anew, more are a fault."""
    page = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    document = json.loads((ROOT / "benchmarks/results/operations.json").read_text(encoding="utf-8"))
    counts, unfused = run_ranks(layer_counts, 1, timeout_s=200)[0]
    assert counts == document["cases"]
    assert operations.table(document) in page
    for case, (heads, groups, dim, _, n, m, placement, _) in operations.CASES.items():
        layout = HelixLayout(AttentionShape(heads, groups, dim, dim), HelixGrid(n, m), placement)
        elements = operations.SEQUENCE * sum(layout.exchanged_elements().values())
        assert counts[case]["received"] == 2 * 2 * elements, case  # of two bytes, there and back
    read, written = (f"{unfused[key] / 1000:,.0f} kB" for key in ("read", "written"))
    assert f"`heads` then reads {read} and writes {written}" in " ".join(page.split())


def _there_and_back(function, given, of, gradient) -> None:
    torch.autograd.grad(function(given), of, gradient)


def key_counts(slices: tuple[int, ...]) -> dict[str, list[int]]:
    """{what is done to the key of one KV head: bytes and operations whole, then as a slice for each m}.

    A norm of whole heads is one kernel each way, RoPE is Megatron's unfused one.
    """
    import operations
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from helix_megatron.megatron.qk_norm import slice_norm

    torch.nn.RMSNorm.forward = operations._norm
    config = SimpleNamespace(qk_l2_norm=False, normalization="RMSNorm", layernorm_zero_centered_gamma=False)
    dim, found = 128, {"norm": [], "kernels of it": [], "RoPE": [], "kernels of RoPE": []}
    for m in (1, *slices):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=m)
        norm = torch.nn.RMSNorm(dim, eps=1e-5, dtype=torch.bfloat16)
        norm = slice_norm(norm, config, np.arange(dim // m), dim, torch.distributed.group.WORLD)
        key = torch.randn(256, 1, 1, dim // m, dtype=torch.bfloat16, requires_grad=True)
        table, gradient = torch.randn(256, 1, 1, dim // m), torch.ones_like(key)
        rotate = partial(_apply_rotary_pos_emb_bshd, freqs=table)
        ways = ((norm, (key, norm.weight)), (rotate, key))
        normed, rotated = (counted(partial(_there_and_back, f, key, of, gradient))[OTHER] for f, of in ways)
        found["norm"].append(normed.read + normed.written)
        found["kernels of it"].append(normed.count)
        found["RoPE"].append(rotated.read + rotated.written)
        found["kernels of RoPE"].append(rotated.count)
        torch.distributed.destroy_process_group()
    return found


def test_what_a_key_costs_whole_and_as_a_slice(operations):
    """Ranks that share a KV head norm and rotate all of it: the norm's bytes are fewer up to 8 slices."""
    found = run_ranks(key_counts, 1, (2, 4, 8, 16), timeout_s=60)[0]
    whole, *of_slices = found["norm"]
    assert [whole < one for one in of_slices] == [True, True, True, False]
    page = " ".join((ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8").split())
    kernels, of_slice, *_ = found["kernels of it"]
    two, four, eight, sixteen = (f"{one / 1000:,.0f}" for one in of_slices)
    assert f"{kernels} kernels and {whole / 1000:,.0f} kB whole" in page
    assert f"{of_slice} and {two}, {four}, {eight} or {sixteen} kB as one of 2, 4, 8 or 16 slices" in page
    assert f"(`--no-rope-fusion`) it is {found['kernels of RoPE'][0]} kernels" in page
    assert f"{(found['RoPE'][0] - found['RoPE'][1]) / 1e6:.1f} MB of it (a tenth)" in page
