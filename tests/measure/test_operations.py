"""Operations and bytes are counted as a list of kernels by hand would have them."""

import json
import sys
from pathlib import Path

import pytest
import torch

from helix_megatron.host.launcher import run_ranks
from helix_megatron.measure.operations import ATTENTION, MATRIX, OTHER, OperationMeter, Operations

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


def committed() -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / "operations.json").read_text(encoding="utf-8"))


def test_the_layers_counts_are_those_of_the_table(monkeypatch):
    """What is committed is what the layer does; fewer operations must be counted anew, more are a fault."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import operations

    document = committed()
    assert document["cases"].keys() == operations.CASES.keys()
    for case in ("64/8 TP=16 8x2 heads", "40/8 TP=16 8x2 dims, QK norm"):
        found = run_ranks(operations.count, 1, case, timeout_s=100)[0]
        assert found == document["cases"][case]
    sys.modules.pop("operations"), sys.modules.pop("bench")
