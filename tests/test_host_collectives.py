"""Small all-reduces and all-gathers of host mode: one round, the same numbers on every rank."""

import torch

from helix_megatron.compare.comm import CommMeter
from helix_megatron.host_collectives import LIMIT_BYTES
from helix_megatron.launch import run_ranks

RANKS = 3
LARGE = LIMIT_BYTES // 4 + 1


def drawn(rank, dtype, elements):
    generator = torch.Generator().manual_seed(rank)
    return (100 * torch.randn(elements, generator=generator)).to(dtype)


def rank_collectives():
    """What is wrong, by name; the collectives that were counted."""
    import torch.distributed as dist

    dist.init_process_group("nccl")
    rank, wrong, ops = dist.get_rank(), [], dist.ReduceOp
    expected = {ops.SUM: lambda x: x.sum(0), ops.MAX: lambda x: x.amax(0), ops.MIN: lambda x: x.amin(0)}
    cases = [(dtype, 500) for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64)]
    for dtype, elements in [*cases, (torch.float32, LARGE)]:
        parts = torch.stack([drawn(other, dtype, elements) for other in range(RANKS)])
        for op, combine in expected.items():
            mine = drawn(rank, dtype, elements).view(-1, 1).clone()
            version = mine._version
            dist.all_reduce(mine, op=op)
            found, right = mine[:, 0], combine(parts).to(dtype)
            if not torch.allclose(found, right, atol=1e-4) or (
                elements < LARGE and not torch.equal(found, right)
            ):
                wrong.append(("all_reduce", dtype, elements, op))
            if mine._version != version:  # what autograd has saved would count as changed
                wrong.append(("version", dtype, elements, op))
        for later in (False, True):
            whole = torch.empty(RANKS * elements, dtype=dtype)
            work = dist.all_gather_into_tensor(whole, drawn(rank, dtype, elements), async_op=later)
            if later:
                work.wait()
            if not torch.equal(whole.view(RANKS, -1), parts):
                wrong.append(("all_gather", dtype, elements, later))
    later = torch.full((4,), float(rank))
    dist.all_reduce(later, async_op=True).wait()
    if not (later == 3).all():
        wrong.append("all_reduce, later")
    with torch.inference_mode():
        inside = torch.full((4,), float(rank))
        dist.all_reduce(inside)
    dist.all_reduce(inside)  # torch refuses to write to it here
    if not (inside == 9).all():
        wrong.append("inference tensors")
    meter = CommMeter()
    with meter.counting():
        dist.all_reduce(torch.ones(5))
        dist.all_gather_into_tensor(torch.empty(RANKS), torch.ones(1))
    return wrong, {name: (tally.calls, round(tally.bytes, 3)) for name, tally in meter.tallies.items()}


def test_they_give_what_gloo_gives_and_count_as_what_they_are():
    for wrong, counted in run_ranks(rank_collectives, RANKS):
        assert not wrong
        assert counted == {"all_reduce x3": (1, 26.667), "all_gather x3": (1, 8)}
