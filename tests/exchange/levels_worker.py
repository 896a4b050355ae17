"""What a rank does in test_levels.py to count bytes: gloo over sockets, and what each of them has received.

The kernel counts (TCP_INFO of the process's own connections; no root needed). As a program, in a process with
Transformer Engine, it prints what rank_layers finds on every rank for a layer of Transformer Engine's.
"""

from __future__ import annotations

import os
import socket
import struct
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from helix_megatron.exchange import levels
from helix_megatron.megatron.process_groups import initialize_helix_parallel
from helix_megatron.partition.grid import HelixGrid

_RECEIVED = 128  # offset of tcpi_bytes_received


def _sockets():
    """(own address, peer's address, bytes received) of every TCP connection of this process."""
    for link in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(link).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as connection:
                peer, own = connection.getpeername()[:2], connection.getsockname()[:2]
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            continue  # closed meanwhile, not TCP, or not connected
        yield own, peer, struct.unpack_from("Q", info, _RECEIVED)[0]


def received(owners: dict) -> list[int]:
    """Bytes of the connections to each rank so far; [T]."""
    sums = [0] * dist.get_world_size()
    for _, peer, count in _sockets():
        if peer in owners:
            sums[owners[peer]] += count
    return sums


def _owners() -> dict:
    """Rank by the address of its end of a connection."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, [own for own, _, _ in _sockets()])
    return {own: rank for rank, ends in enumerate(found) for own in ends}


def _direct_scatter(tensor):
    """Every rank sends its part of every chunk to the chunk's rank: nothing is summed on the way."""
    parts = torch.empty_like(tensor)
    dist.all_to_all_single(parts, tensor)
    return parts.view(dist.get_world_size(), -1).sum(0)


def _direct_gather(chunk):
    size = dist.get_world_size()
    whole = chunk.new_empty(size * chunk.numel())
    dist.all_to_all_single(whole, chunk.repeat(size))
    return whole


def _ways(groups, elements: int) -> dict:
    """{(collective, way): function of a tensor [elements]}; every way of a collective has one result."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def of_chunk(tensor):
        return tensor.new_empty(elements // size)

    def flat_scatter(tensor, out):
        dist.reduce_scatter_tensor(out, tensor)
        return out

    def level_scatter(tensor, out):
        levels.reduce_scatter(out, tensor, groups)
        return out

    def flat_gather(tensor, out):
        dist.all_gather_into_tensor(out, tensor.chunk(size)[rank].contiguous())
        return out

    def level_gather(tensor, out):
        levels.all_gather(out, tensor.chunk(size)[rank].contiguous(), groups)
        return out

    def flat_reduce(tensor):
        dist.all_reduce(tensor)
        return tensor

    return {
        ("all_reduce", "flat"): flat_reduce,
        ("all_reduce", "direct"): lambda x: _direct_gather(_direct_scatter(x)),
        ("all_reduce", "by level"): lambda x: levels.all_reduce(x, groups),
        ("reduce_scatter", "flat"): lambda x: flat_scatter(x, of_chunk(x)),
        ("reduce_scatter", "direct"): _direct_scatter,
        ("reduce_scatter", "by level"): lambda x: level_scatter(x, of_chunk(x)),
        ("all_gather", "flat"): lambda x: flat_gather(x, torch.empty_like(x)),
        ("all_gather", "direct"): lambda x: _direct_gather(x.chunk(size)[rank].contiguous()),
        ("all_gather", "by level"): lambda x: level_gather(x, torch.empty_like(x)),
    }  # fmt: skip


def rank_count(n: int, m: int, elements: int) -> dict:
    """{(collective, way): bytes received from each rank, [T]} of tensors of `elements` fp32."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    groups = initialize_helix_parallel(HelixGrid(n, m), dist.group.WORLD)
    tensor = torch.randn(elements, generator=torch.Generator().manual_seed(dist.get_rank()))
    ways = _ways(groups, elements)
    results = {key: function(tensor.clone()) for key, function in ways.items()}  # connections are made
    for (kind, way), result in results.items():
        torch.testing.assert_close(result, results[kind, "direct"], rtol=1e-5, atol=1e-5, msg=f"{kind} {way}")
    owners, found = _owners(), {}
    for key, function in ways.items():
        dist.barrier()
        before = received(owners)
        function(tensor.clone())
        dist.barrier()
        found[key] = [after - b for after, b in zip(received(owners), before, strict=True)]
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    from helix_megatron.host.launcher import run_ranks
    from tests.exchange.test_levels import T, rank_layers

    print(run_ranks(rank_layers, T, True, timeout_s=150))
