"""Training CUDA graphs around sliced heads: what a layer computes can be recorded, and replayed."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import CudaGraphModule

from helix_megatron.check.reference import Case
from helix_megatron.host.launcher import run_ranks
from helix_megatron.megatron.refusals import refuse_graphs_of_training, refuse_unsupported
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixConfigError
from tests.megatron_glue.capture import Capture, NotCapturable
from tests.megatron_glue.capture_worker import rank_replays
from tests.megatron_glue.te_environment import environment

FREEZES = {
    "a value": lambda x: x * float(x.sum()),
    "a decision": lambda x: x if x.sum() > 0 else -x,
    "a list": lambda x: x * x.tolist()[0],
    "NumPy": lambda x: x * float(x.numpy()[0]),
    "the host's memory": lambda x: x * x.cpu(),
    "a shape": lambda x: x[x > 0],
    "positions": lambda x: x.nonzero(),
    "numbers of Python's": lambda x: x * torch.tensor([1.0, 2.0, 3.0]),
    "indices of Python's": lambda x: x[[0, 2]],
    "comparison": lambda x: x * torch.equal(x, x),
}


@pytest.mark.parametrize("what", FREEZES)
def test_what_a_graph_cannot_hold_is_noticed(what):
    with pytest.raises(NotCapturable), Capture().recording():
        FREEZES[what](torch.tensor([1.0, 2.0, 3.0]))


def test_a_replay_computes_anew_but_for_what_python_kept():
    x, kept = torch.ones(3), {}

    def step():
        kept.setdefault("doubled", x * 2)  # made before the recording: no kernel of it
        return torch.cat([kept["doubled"], (x + 1).view(-1)[:2].mul_(3)])

    step()
    capture = Capture()
    with capture.recording():
        out = step()
    x.fill_(5)
    capture.replay()
    assert out.tolist() == [2, 2, 2, 18, 18]  # doubled would be 10


EVEN, NORMED = Case(8, 4, 16, seq=12), Case(8, 4, 16, qk_norm="RMSNorm", gate=True, seq=12)
ODD = Case(12, 3, 16, seq=12)  # of four ranks two need two KV heads, unevenly often
ODD_HEADS = Case(6, 2, 16, qk_norm="RMSNorm", seq=12)  # of each group two ranks share three
HEADS, DIMS = HelixConfig(2, 2, query_placement="heads"), HelixConfig(2, 2, query_placement="dims")
SEQUENCE = dict(sequence_parallel=True)
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
JOBS = {  # and the collectives of a pass: two of Megatron's (with sequence parallelism five), and Helix's
    "heads": (EVEN, HEADS, {}, 4),
    "dims": (EVEN, DIMS, {}, 6),
    "heads, QK norm, gate, sequence parallel": (NORMED, HEADS, SEQUENCE, 7),
    "dims, uneven slices, QK norm, gate": (NORMED, replace(DIMS, slice_weights=(3, 1)), {}, 6),
    "exchanged again": (NORMED, replace(DIMS, recompute_exchange=True), SELECTIVE, 6),
    "by level, sequence parallel": (EVEN, replace(HEADS, hierarchical_allreduce=True), SEQUENCE, 12),
    "sinks in a window": (replace(EVEN, sinks=True, window=(4, 0)), HEADS, {}, 4),
    "per-slice": (EVEN, HelixConfig(2, 2, softmax="per-slice"), {}, 2),
    "shared positions": (ODD_HEADS, HelixConfig(2, 2, core_attention="spec"), {}, 6),
    "uneven KV heads": (ODD, HelixConfig(1, 4, query_placement="heads"), {}, 4),
}
REPLAYED = {"same": True, "moved": True, "finite": True}
OF_TE = (
    "heads", "dims, uneven slices, QK norm, gate", "heads, QK norm, gate, sequence parallel",
    "shared positions",
)  # fmt: skip


@pytest.fixture(scope="module")
def replays() -> dict[str, list[dict]]:
    """{job: what every rank found}"""
    jobs = {"summed": (EVEN, replace(HEADS, comm_type="all_reduce"), {}), **JOBS}
    found = run_ranks(rank_replays, 4, 4, [job[:3] for job in jobs.values()])
    return dict(zip(jobs, zip(*found, strict=True), strict=True))


@pytest.mark.parametrize("job", JOBS)
def test_a_recorded_layer_computes_with_new_inputs_and_weights(replays, job):
    for rank in replays[job]:
        assert rank == {**REPLAYED, "collectives": JOBS[job][3]}


def test_a_recorded_layer_of_transformer_engines():
    """Its Python code, on torch versions of its kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.megatron_glue.capture_worker", *OF_TE],
        env={**environment(), "NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in json.loads(done.stdout.splitlines()[-1]):
        assert rank == [{**REPLAYED, "collectives": JOBS[name][3]} for name in OF_TE]


SUMMED = HelixConfig(2, 2, comm_type="all_reduce").resolve(8, 4, 16, 4)
SCALED = HelixConfig(2, 2, softmax="per-slice", adaptive_grad_scaling=True).resolve(8, 4, 16, 4)
PLANS = [helix.resolve(8, 4, 16, 4) for helix in (HEADS, DIMS, HelixConfig(2, 2, softmax="per-slice"))]
PLANS.append(HelixConfig(2, 2).resolve(6, 2, 16, 4))  # positions are shared


def _refuse_training(impl, plan, **settings):
    """As layers are built, and as one trains: inference has local graphs too."""
    config = SimpleNamespace(cuda_graph_impl=impl, **settings)
    refuse_unsupported(config, plan)
    refuse_graphs_of_training(config, plan)


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_what_is_recorded_and_what_stands_in_the_way(impl):
    for plan in PLANS:
        _refuse_training(impl, plan)
    for plan, more, reason in (
        (SUMMED, {}, "all_reduce, which copies index tables to the device"),
        (SCALED, {}, "--helix-adaptive-grad-scaling, whose hooks"),
        (PLANS[0], dict(context_parallel_size=2), "--context-parallel-size > 1"),
        (PLANS[0], dict(sft=True), "packed sequences, whose lengths change"),
    ):
        with pytest.raises(HelixConfigError, match=f"--cuda-graph-impl {impl}.*{reason}"):
            _refuse_training(impl, plan, **more)
    refuse_unsupported(SimpleNamespace(cuda_graph_impl="local"), SUMMED)  # of inference steps
    _refuse_training(impl, SUMMED, cuda_graph_modules=[CudaGraphModule.mlp, CudaGraphModule.moe_router])
    for modules in ([CudaGraphModule.mlp, CudaGraphModule.attn], ["attn"], "full", []):
        with pytest.raises(HelixConfigError, match="all_reduce, which copies"):
            _refuse_training(impl, SUMMED, cuda_graph_modules=modules)


def test_graphs_of_more_than_layers_are_refused():
    with pytest.raises(HelixConfigError, match=r"full_iteration\) of more than layers; local and"):
        refuse_unsupported(SimpleNamespace(cuda_graph_impl="full_iteration"), PLANS[0])


def test_summed_scores_copy_index_tables(replays):
    """The reason that the refusal gives."""
    for rank in replays["summed"]:
        assert rank == {"refused": "a tensor made of Python's own numbers is copied to the device"}
