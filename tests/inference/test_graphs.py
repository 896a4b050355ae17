"""Launches of a decode step, and CUDA graphs of it, on the host (host_graph.py says what stands for what)."""

from dataclasses import replace

import pytest
import torch

from helix_megatron.check.reference import Case
from helix_megatron.host.launcher import run_ranks
from helix_megatron.inference import position_cache
from helix_megatron.kernels import selection
from helix_megatron.kernels.paged_attention import Requests
from helix_megatron.megatron import rope_tables
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.kv_layout import KvInterleave
from tests.inference.graph_worker import (
    TRITON,
    compiled_after_warm_up,
    count_launches,
    generate_with_graphs,
    replays,
)
from tests.inference.host_graph import HostGraph, WaitsForDeviceError
from tests.inference.kv_cache_worker import generate

pytestmark = pytest.mark.dynamic_engine


# ---- the instrument ----
ASKS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "a number in Python": lambda x: int(x[0]),
    "a branch": lambda x: x + 1 if x[0] > 0 else x,
    "a mask": lambda x: x[x > 0],
    "assigning by a mask": lambda x: x.__setitem__(x > 0, torch.zeros(4)),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: torch.unique(x),
    "a copy to the host": lambda x: x.cpu(),
    "a list to the device": lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "repeats": lambda x: torch.repeat_interleave(x, torch.ones_like(x).long()),
}


@pytest.mark.parametrize("way", ASKS)
@pytest.mark.parametrize("inference", [False, True])
def test_a_graph_refuses_what_waits_for_the_device(way, inference):
    x = torch.arange(1.0, 5.0)
    with torch.inference_mode(inference), HostGraph().recording(), pytest.raises(WaitsForDeviceError):
        ASKS[way](x)


@pytest.mark.parametrize("inference", [False, True])
def test_a_graph_repeats_launches_with_what_memory_holds(inference):
    graph, x, weight = HostGraph(), torch.randn(3, 4), torch.randn(5, 4)
    with torch.inference_mode(inference), torch.no_grad():
        with graph.recording():
            y = torch.nn.functional.linear(x, weight).relu_()
            z = torch.empty(3, 2).copy_(y[:, :2]) * len(x)
        x.copy_(torch.randn(3, 4))
        graph.replay()
        torch.testing.assert_close(z, torch.relu(x @ weight.T)[:, :2] * 3)
    assert graph.names.total() == graph.launches == 4 and not graph.collectives



def test_a_layer_of_a_decode_step_takes_25_launches_at_most_and_3_collectives():
    normed = Case(8, 2, 16, seq=48, batch=1, qk_norm="RMSNorm", rotary_percent=0.5)
    jobs = [
        (normed, HelixConfig(1, 2, query_placement="dims", rotary_percent=0.5)),
        (Case(8, 2, 16, seq=48, batch=1), HelixConfig(1, 2, query_placement="heads")),
        (Case(8, 2, 16, seq=48, batch=1, gate=True, sinks=True), HelixConfig(1, 2, query_placement="heads")),
        (Case(8, 2, 16, seq=48, batch=1, gate=True, sinks=True), HelixConfig(1, 2, query_placement="dims")),
    ]
    most = (20, 14, 15, 22)  # launches, and three collectives; gates and norms as one kernel
    for found in run_ranks(count_launches, 2, 2, jobs, env=TRITON, fresh=True):
        for job, (dynamic, static) in enumerate(zip(found[::2], found[1::2], strict=True)):
            for names, collectives in (dynamic, static):
                assert sum(names.values()) <= most[job], names
                assert collectives == {"all_gather": 1, "all_to_all": 1, "all_reduce": 1}


def test_a_replay_gives_what_the_eager_step_gives_and_faults_are_seen():
    """Lengths, owners, block tables, finished and new requests change from step to step; in steps of odd
    numbers there are prompts, with history and without."""
    case = Case(4, 2, 8, seq=48, batch=1)
    faults = "slots elsewhere every step", "a plan that stays", "requests of every step"
    single, mixed = range(0, 8, 2), range(1, 9, 2)
    odd = replace(case, window=(13, 0), gate=True, sinks=True)
    jobs = [
        (case, HelixConfig(1, 2, query_placement="heads"), "", range(12)),
        (odd, HelixConfig(1, 2, overlap_chunks=2), "", range(8)),
        *((case, HelixConfig(1, 2), fault, steps) for fault in faults for steps in (single, mixed)),
    ]
    for found in run_ranks(replays, 2, 2, jobs, env=TRITON, fresh=True):
        apart, graphs = zip(*found, strict=True)
        assert max(apart[:2]) < 1e-5 and min(apart[2:]) > 1e-2, apart
        assert min(graphs[:2]) > 3  # their sizes are Megatron's


@pytest.mark.parametrize("scope", ["layer", "block"])
def test_the_dynamic_engine_with_graphs_chooses_the_same_tokens(scope):
    """Megatron's own capture, sizes and warm-up; prefill, decode and both at once."""
    vanilla = run_ranks(generate, 1, 1, None, timeout_s=100)[0]
    model = dict(inference_cuda_graph_scope=scope)
    helix, settings = HelixConfig(1, 2, overlap_chunks=2), dict(num_cuda_graphs=2)
    for found in run_ranks(generate_with_graphs, 2, 2, helix, model, settings, timeout_s=200):
        assert found["tokens"] == vanilla["tokens"]
        assert found["kinds of steps"] == vanilla["kinds of steps"]
        assert found["graphs"] > 1 and found["replays"] > 2 * found["graphs"], found
        assert found["before"] == [0]  # kernels are warm before a capture


def test_no_step_waits_for_a_kernel_that_the_start_has_not_compiled():
    """Single tokens in any number, with all that a layer may have: what Triton tells apart is met before."""
    uneven = dict(rotary_percent=0.6)
    jobs = [
        (Case(3, 1, 8, seq=48, batch=1), HelixConfig(1, 2, query_placement="dims")),  # rows of 32 elements
        (Case(3, 1, 8, seq=48, batch=1, qk_norm="RMSNorm"), HelixConfig(1, 2)),  # of 24
        (Case(32, 2, 8, seq=48, batch=1, gate=True, sinks=True), HelixConfig(1, 2)),  # pieces of 576 T bytes
        (
            Case(4, 2, 8, seq=48, batch=1, sinks=True, window=(13, 0)),
            HelixConfig(1, 2, query_placement="dims", overlap_chunks=2),
        ),
        (Case(2, 1, 10, seq=48, batch=1, **uneven), HelixConfig(1, 2, slice_weights=(3.0, 2.0), **uneven)),
    ]
    for found in run_ranks(compiled_after_warm_up, 2, 2, jobs, env=TRITON, fresh=True):
        for job, (warm, new) in zip(jobs, found, strict=True):
            assert not new and warm >= 5, (job, warm, new)


def test_slices_that_are_heads_of_their_own_have_megatrons_graphs():
    helix, model = HelixConfig(1, 2, softmax="per-slice"), dict(inference_cuda_graph_scope="layer")
    (eager, _), settings = run_ranks(generate, 2, 2, helix, timeout_s=100), dict(num_cuda_graphs=2)
    for found in run_ranks(generate_with_graphs, 2, 2, helix, model, settings, timeout_s=200):
        assert found["tokens"] == eager["tokens"] and found["replays"] > 2 * found["graphs"] > 2


# ---- refusals ----
def test_attention_that_waits_for_the_device_is_refused_in_a_graph():
    kind = ("cuda", torch.bfloat16, 256, False)
    for override in ("torch", None):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(HelixConfigError, match="cannot hold"):
            patch.setattr(selection, "_without_flash", lambda device: ("torch", "Triton is not installed"))
            selection.choose.__wrapped__(*kind, override, graph=True, compare=False)
    assert selection.choose(*kind, "triton", graph=True, compare=False).others == "triton"
    assert selection.choose(*kind, "torch", compare=False).others == "torch"


def test_what_is_cut_from_a_table_in_a_graph_is_not_kept(monkeypatch):
    layout = HelixConfig(1, 2).resolve(4, 2, 8, 2).layout
    table, dims = torch.randn(5, 1, 1, 8), torch.arange(4)
    with monkeypatch.context() as patch:
        patch.setattr(rope_tables, "is_capturing", lambda table: True)
        one, other = (rope_tables.of_slice(table, layout, 0, dims) for _ in range(2))
    assert one is not other and torch.equal(one, table[..., :4])
    kept = rope_tables.of_slice(table, layout, 0, dims)
    assert kept is not one and kept is rope_tables.of_slice(table, layout, 0, dims)


def test_a_step_asks_for_megatrons_flash_attention_and_for_kernels_of_graphs(monkeypatch):
    """--flash-attention-version reaches the choice; so does that a graph will be captured."""
    asked, plain = [], selection.Choice("torch", None, "torch", "")
    monkeypatch.setattr(selection, "choose", lambda *given, **named: asked.append(named) or plain)
    cache, query = torch.zeros(2, 3, 4, 1, 8), torch.zeros(2, 1, 1, 8)
    attention, interleave = position_cache.Attention(0.5, None, 3), KvInterleave(1, 4)
    requests = Requests(torch.arange(3), torch.tensor([1, 1]), torch.tensor([[1], [2]]))
    places = torch.tensor([1, 2]), torch.tensor([0, 0])
    for graph in (True, False):
        step = position_cache.PagedStep(*cache, interleave, 0, attention, *places, requests, 2, graph)
        step.attend(query, 0, 2)
    position_cache.SequenceStep(*cache, interleave, 0, attention, 1).attend(query[:1], 0, 1)
    assert [(one["flash_version"], one["graph"]) for one in asked] == [(3, True), (3, False), (3, False)]
