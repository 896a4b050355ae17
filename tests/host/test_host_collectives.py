"""Collectives of host mode in shared memory: the numbers of a plain computation, equal on every rank."""

import mmap
import os
import subprocess

import pytest
import torch

from helix_megatron.host.launcher import RankError, run_ranks
from helix_megatron.host.shared_memory import SLOT_BYTES, SharedMemoryGroup, _mapped
from helix_megatron.measure.comm import CommMeter

RANKS = 3
LARGE = 2 * SLOT_BYTES // 4 + 3  # in floats: several rounds
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)


def drawn(rank, dtype, elements):
    generator = torch.Generator().manual_seed(rank)
    return (100 * torch.rand(elements, generator=generator)).to(dtype)


def combinations(dtype):
    ops = torch.distributed.ReduceOp
    found = {ops.SUM: lambda x: x.sum(0), ops.MAX: lambda x: x.amax(0), ops.MIN: lambda x: x.amin(0)}
    return found | ({ops.AVG: lambda x: x.sum(0) / RANKS} if dtype.is_floating_point else {})


def rank_collectives():
    """What is wrong, by name; the collectives that were counted; whether they went through shared memory."""
    import torch.distributed as dist

    from helix_megatron.host import collectives as host_collectives

    dist.init_process_group("nccl")
    rank, wrong = dist.get_rank(), []
    for dtype, elements in [*((dtype, 501) for dtype in DTYPES), (torch.float32, LARGE), (torch.float32, 0)]:
        parts = torch.stack([drawn(other, dtype, RANKS * elements) for other in range(RANKS)])
        for op, combine in combinations(dtype).items():
            for later in (False, True):
                mine = drawn(rank, dtype, RANKS * elements).view(-1, 1).clone()
                version = mine._version
                work = dist.all_reduce(mine, op=op, async_op=later)
                share = torch.empty(elements, dtype=dtype)
                other = dist.reduce_scatter_tensor(share, parts[rank].clone(), op=op, async_op=later)
                if later:
                    work.wait(), other.wait()
                right = combine(parts).to(dtype)
                if not torch.equal(mine[:, 0], right):
                    wrong.append(("all_reduce", dtype, elements, op, later))
                if not torch.equal(share, right.view(RANKS, -1)[rank]):
                    wrong.append(("reduce_scatter", dtype, elements, op, later))
                if mine._version != version:  # what autograd has saved would count as changed
                    wrong.append(("version", dtype, elements, op))
        whole = torch.empty(RANKS, RANKS * elements, dtype=dtype)
        dist.all_gather_into_tensor(whole.view(-1), parts[rank].clone())
        if not torch.equal(whole, parts):
            wrong.append(("all_gather", dtype, elements))
        swapped = torch.empty(RANKS * elements, dtype=dtype)
        dist.all_to_all_single(swapped, parts[rank].clone())
        if not torch.equal(swapped, parts.view(RANKS, RANKS, -1)[:, rank].reshape(-1)):
            wrong.append(("all_to_all", dtype, elements))
        rows = torch.arange(RANKS) * (elements // 3)  # rank t is sent t of 3 parts; rows of 2
        sent = [int(n) for n in rows]
        table = drawn(rank, dtype, 2 * sum(sent)).view(-1, 2)
        received = torch.empty(RANKS * sent[rank], 2, dtype=dtype)
        dist.all_to_all_single(received, table, [sent[rank]] * RANKS, sent)
        start = sum(sent[:rank])
        right = torch.cat(
            [
                drawn(other, dtype, 2 * sum(sent)).view(-1, 2)[start : start + sent[rank]]
                for other in range(RANKS)
            ]
        )
        if not torch.equal(received, right):
            wrong.append(("uneven all_to_all", dtype, elements))
    with torch.inference_mode():
        inside = torch.full((4,), float(rank))
        dist.all_reduce(inside)
    dist.all_reduce(inside)  # torch refuses to write to it here, other than in its own way
    if not (inside == 9).all():
        wrong.append("inference tensors")
    pair = dist.new_group([0, 2])
    if rank != 1:
        mine = torch.tensor([float(rank)])
        dist.all_reduce(mine, group=pair)
        if mine.item() != 2:
            wrong.append("a group of some ranks")
    dist.barrier()
    meter = CommMeter()
    with meter.counting():
        dist.all_reduce(torch.ones(5))
        dist.all_gather_into_tensor(torch.empty(RANKS), torch.ones(1))
    counted = {name: (tally.calls, round(tally.bytes, 3)) for name, tally in meter.tallies.items()}
    return wrong, counted, all(host_collectives._shared_groups.values())


@pytest.mark.parametrize("shared", ["1", "0"])
def test_they_give_what_a_plain_sum_gives_and_count_as_what_they_are(shared, monkeypatch):
    monkeypatch.setenv("HELIX_HOST_SHARED_MEMORY", shared)
    for wrong, counted, through_memory in run_ranks(rank_collectives, RANKS):
        if shared == "0":  # gloo sums in an order of its own
            wrong = [one for one in wrong if one[0] not in ("all_reduce", "reduce_scatter", "version")]
        assert not [one for one in wrong if shared == "1" or one != "inference tensors"]
        assert counted == {"all_reduce x3": (1, 26.667), "all_gather x3": (1, 8)}
        assert through_memory == (shared == "1")


def rank_disagrees():
    import torch.distributed as dist

    dist.init_process_group("nccl")
    dist.barrier()
    dist.all_reduce(torch.ones(4 + (dist.get_rank() == 1)))


def test_ranks_that_call_different_collectives_are_told_so():
    with pytest.raises(RankError, match=r"do not call the same collective.*1 16, 1 20, 1 16"):
        run_ranks(rank_disagrees, RANKS)


@pytest.mark.parametrize("alive", [True, False])
def test_a_rank_that_does_not_come_is_not_waited_for_forever(alive):
    memory = mmap.mmap(-1, SharedMemoryGroup.size(2))
    other = subprocess.Popen(["sleep", "60" if alive else "0"])
    if not alive:
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie has ended, too
    SharedMemoryGroup(memory, 1, 2, 1.5)._pids[1] = other.pid
    try:
        with pytest.raises(
            RuntimeError, match="has not come" if alive else f"process {other.pid}. has ended"
        ):
            SharedMemoryGroup(memory, 0, 2, 1.5 if alive else 60).swap(torch.ones(1), 0)
    finally:
        other.kill()
        other.wait()


def test_the_memory_of_another_machines_process_is_not_taken_for_the_groups(tmp_path):
    file = tmp_path / "memory"
    file.write_bytes(b"x" * SharedMemoryGroup.size(2))
    assert _mapped(str(file), SharedMemoryGroup.size(2), b"x" * 16) is not None
    assert _mapped(str(file), SharedMemoryGroup.size(2), b"y" * 16) is None
    assert _mapped(str(file), SharedMemoryGroup.size(3), b"x" * 16) is None
    assert _mapped(str(tmp_path / "none"), SharedMemoryGroup.size(2), b"x" * 16) is None
