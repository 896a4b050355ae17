"""Memory of summed scores in inference: the planner's terms against what torch allocates."""

import weakref

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from helix_megatron.host.launcher import run_ranks
from helix_megatron.models.presets import find
from helix_megatron.partition.grid import HelixGrid
from helix_megatron.plan import memory
from helix_megatron.plan.layout import Layout, Problem, Workload
from helix_megatron.plan.terms import total

SHAPE = find("llama-3-8b").scaled(1 / 16, num_layers=2)  # 32 heads, 8 KV heads of 8


class Peak(TorchDispatchMode):
    """Most bytes that tensors made meanwhile hold at one time."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage):
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.held and size:
            self.held.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key, size):
        self.held.discard(key)
        self.now -= size


def rank_peak(problem: Problem) -> int:
    """Bytes that attention of one step needs besides its arguments, on one rank of two alone."""
    from helix_megatron.megatron.summed_scores import attend_by_sums

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    work, heads, batch = problem.workload, problem.heads, problem.layout.micro_batch
    decodes = work.kind == "decode"
    positions = work.length + decodes
    new = 1 if decodes else positions
    query = torch.randn(new, batch, heads.query_heads, heads.slice_dim)
    key, value = (torch.randn(positions, batch, heads.kv_heads, heads.slice_dim) for _ in range(2))
    with torch.no_grad(), Peak() as peak:
        hidden = None if decodes else torch.ones(1, 1, new, positions, dtype=torch.bool).triu(1)
        attend_by_sums(query, key, value, hidden, 1.0, None, torch.distributed.group.WORLD)
    torch.distributed.destroy_process_group()
    return peak.most


@pytest.mark.parametrize(
    ("kind", "comm", "cache"), [("prefill", "all_reduce", "dim"), ("decode", "a2a", "dim")]
)
def test_scores_are_counted_as_they_are_allocated(kind, comm, cache):
    work = Workload(kind, batch=2, length=512, dtype="bf16", fused=False)
    layout = Layout(4, helix=True, grid=HelixGrid(2, 2), comm_type=comm, placement="dims", kv_cache=cache,
                    micro_batch=2)  # fmt: skip
    problem = Problem(SHAPE, layout, work)
    predicted = total(memory.buffers(problem, 0))
    without = Layout(**{**vars(layout), "comm_type": "a2a", "kv_cache": "sequence"})
    predicted -= total(memory.buffers(Problem(SHAPE, without, work), 0))
    (measured,) = run_ranks(rank_peak, 1, problem)
    assert predicted == pytest.approx(measured, rel=0.1)
