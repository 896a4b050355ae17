"""Launches of a decode step, and CUDA graphs of it, on the host (host_graph.py says what stands for what)."""

import pytest

from helix_megatron.check.reference import Case
from helix_megatron.host.launcher import run_ranks
from helix_megatron.partition.config import HelixConfig
from tests.inference.graph_worker import TRITON, count_launches, generate_with_graphs, replays
from tests.inference.kv_cache_worker import generate

pytestmark = pytest.mark.dynamic_engine


def test_a_layer_of_a_decode_step_takes_25_launches_at_most_and_3_collectives():
    normed = Case(8, 2, 16, seq=48, batch=1, qk_norm="RMSNorm", rotary_percent=0.5)
    jobs = [
        (normed, HelixConfig(1, 2, query_placement="heads", rotary_percent=0.5)),
        (Case(8, 2, 16, seq=48, batch=1), HelixConfig(1, 2, query_placement="dims")),
    ]
    for found in run_ranks(count_launches, 2, 2, jobs, env=TRITON, fresh=True):
        for names, collectives in found:
            print(names, sum(names.values()), collectives)
            assert sum(names.values()) <= 25, names
            assert collectives == {"all_gather": 1, "all_to_all": 1, "all_reduce": 1}


def test_a_replay_gives_what_the_eager_step_gives_and_faults_are_seen():
    """Lengths, owners, block tables, finished and new requests change from step to step."""
    case = Case(4, 2, 8, seq=48, batch=1)
    faults = "slots elsewhere every step", "a plan that stays", "requests of every step"
    jobs = [
        (case, HelixConfig(1, 2, query_placement="heads"), "", 10),
        (Case(4, 2, 8, seq=48, batch=1, window=(13, 0)), HelixConfig(1, 2, overlap_chunks=2), "", 6),
        *((case, HelixConfig(1, 2), fault, 4) for fault in faults),
    ]
    for found in run_ranks(replays, 2, 2, jobs, env=TRITON, fresh=True):
        apart, graphs = zip(*found, strict=True)
        assert max(apart[:2]) < 1e-5 and min(apart[2:]) > 1e-2, apart
        assert min(graphs[:2]) > 1  # their sizes are Megatron's


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
