"""The planner's predictions against models that Megatron builds in host mode: exact bytes, close memory."""

from dataclasses import replace

import pytest

from helix_megatron.host.launcher import run_ranks
from helix_megatron.models.presets import PRESETS, find
from helix_megatron.partition.grid import HelixConfigError, HelixGrid
from helix_megatron.plan import clusters, memory, parameters, probe, probe_collectives, probe_rates, traffic
from helix_megatron.plan.layout import Layout, Problem, Workload
from helix_megatron.plan.terms import Term, total
from tests.plan import plan_worker

LLAMA = find("llama-3-8b").scaled(1 / 16, num_layers=2)  # 32 heads, 8 KV heads of 8
KV2 = replace(LLAMA, num_query_groups=2)
GPT = replace(find("paper-gpt").scaled(1 / 16, num_layers=2), vocab_size=512)  # tied, LayerNorm, biases
QWEN3 = find("qwen3-8b").scaled(1 / 16, num_layers=2)  # QK norm
QWEN25 = find("qwen2.5-0.5b").scaled(1 / 4, num_layers=2)  # 14 heads, 2 KV heads; tied, QKV bias
# Every expert gets every token: balanced whatever the router says. 32 heads, 4 KV heads of 8; QK norm.
MOE = replace(find("qwen3-30b-a3b").scaled(1 / 16, num_layers=2), num_moe_experts=4, moe_router_topk=4)
SHARED = replace(MOE, moe_shared_expert_intermediate_size=64, moe_shared_expert_gate=True)
MIXTRAL = replace(find("mixtral-8x7b").scaled(1 / 16, num_layers=2), num_moe_experts=2)
GPT_OSS = replace(find("gpt-oss-20b").scaled(1 / 16, num_layers=2), num_moe_experts=4)
QWEN35 = find("qwen3.5-397b-a17b").scaled(1 / 16, num_layers=8)
RANKS = 4


def sliced(
    n: int, m: int, comm: str = "a2a", placement: str = "dims", cache: str = "sequence", **more
) -> Layout:
    return Layout(n * m, helix=True, grid=HelixGrid(n, m), comm_type=comm, placement=placement,
                  kv_cache=cache, **more)  # fmt: skip


def work(kind: str, dtype: str = "fp32", **more) -> Workload:
    return Workload(kind, batch=4, length=70 if kind == "decode" else 64, dtype=dtype, fused=False, **more)


TRAIN, ZERO = work("train"), work("train", "bf16", distributed_optimizer=True)
PROBLEMS = {
    "tp": Problem(LLAMA, Layout(4, micro_batch=2), TRAIN),
    "tp pp": Problem(LLAMA, Layout(2, 2, micro_batch=2), TRAIN),
    "tp dp": Problem(LLAMA, Layout(2, 1, 2), TRAIN),
    "tied over two stages": Problem(GPT, Layout(1, 2, 2), TRAIN),
    "sequence parallel": Problem(GPT, Layout(2, 2, micro_batch=2, sequence_parallel=True), TRAIN),
    "full recompute": Problem(LLAMA, Layout(2, 2, micro_batch=2, recompute=True), TRAIN),
    "distributed optimizer": Problem(GPT, Layout(1, 2, 2), ZERO),
    "Megatron gathers QKV": Problem(KV2, Layout(4, micro_batch=2), TRAIN),
    "2x2 heads": Problem(LLAMA, sliced(2, 2, placement="heads", micro_batch=2), TRAIN),
    "2x2 dims, bf16": Problem(QWEN25, sliced(2, 2, micro_batch=2), work("train", "bf16")),
    "1x4 dims, uneven positions": Problem(QWEN25, sliced(1, 4), replace(TRAIN, length=61)),
    "2x2 summed scores": Problem(LLAMA, sliced(2, 2, "all_reduce", "heads", "dim"), TRAIN),
    "QK norm of slices": Problem(QWEN3, sliced(2, 2, micro_batch=2, sequence_parallel=True), TRAIN),
    "experts": Problem(MOE, Layout(1, 2, 2, ep=2), TRAIN),
    "experts beside tp": Problem(SHARED, Layout(2, 1, 2, ep=4, sequence_parallel=True), TRAIN),
    "experts over tp": Problem(MOE, Layout(2, 1, 2, ep=2, etp=2, sequence_parallel=True), TRAIN),
    "experts, distributed optimizer": Problem(MIXTRAL, Layout(1, 1, 4, ep=2), ZERO),
    "experts, 2x2 heads": Problem(
        SHARED, sliced(2, 2, placement="heads", ep=2, etp=1, sequence_parallel=True), TRAIN
    ),
    "gpt-oss": Problem(GPT_OSS, Layout(2, 1, 2, ep=4, sequence_parallel=True), TRAIN),
    "decode with experts": Problem(MOE, Layout(1, 2, 2, ep=2, micro_batch=2), work("decode")),
    "prefill": Problem(GPT, Layout(2, 2, micro_batch=4), work("prefill")),
    "prefill 2x2": Problem(QWEN3, sliced(2, 2, placement="heads", micro_batch=4), work("prefill")),
    "decode": Problem(LLAMA, Layout(2, 1, 2, micro_batch=2), work("decode")),
    "decode, KV duplicated": Problem(KV2, Layout(4, micro_batch=4), work("decode")),
    "decode 1x4 dims": Problem(QWEN25, sliced(1, 4, micro_batch=4), work("decode")),
    "decode, QK norm": Problem(QWEN3, sliced(2, 2, placement="heads", micro_batch=4), work("decode")),
    "decode 2x2 heads": Problem(LLAMA, sliced(2, 2, placement="heads", micro_batch=4), work("decode")),
    "decode, slices cached": Problem(LLAMA, sliced(2, 2, placement="heads", cache="dim", micro_batch=4),
                                     work("decode")),
}  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    """For each problem, what every rank measured."""
    ranks = run_ranks(plan_worker.measure, RANKS, list(PROBLEMS.values()), timeout_s=500)
    return {name: [rank[number] for rank in ranks] for number, name in enumerate(PROBLEMS)}


def places(problem: Problem):
    """(rank, pipeline stage, rank in its tensor-parallel group) of every rank."""
    layout = problem.layout
    return [(rank, rank // (layout.tp * layout.dp), rank % layout.tp) for rank in range(RANKS)]


@pytest.mark.parametrize("name", PROBLEMS)
def test_calls_and_bytes_of_every_collective_are_exact(name, measured):
    for rank, stage, tp_rank in places(PROBLEMS[name]):
        comm = measured[name][rank].comm
        counted = {key: (v["calls"], v["bytes"]) for key, v in comm.items() if not key.startswith("send")}
        predicted = traffic.received_by_kind(traffic.collectives(PROBLEMS[name], stage, tp_rank))
        assert predicted.keys() == counted.keys()
        for key, (calls, received) in counted.items():
            assert predicted[key] == (calls, pytest.approx(received, abs=0.5)), (key, rank)


@pytest.mark.parametrize("name", PROBLEMS)
def test_memory_is_as_predicted(name, measured):
    problem = PROBLEMS[name]
    for rank, stage, tp_rank in places(problem):
        held = measured[name][rank].memory
        predicted = memory.stage_memory(problem, stage).bytes()
        assert predicted["weights"] == pytest.approx(held["parameters"], rel=0.01)
        if problem.workload.kind == "train":
            assert predicted["gradients"] == pytest.approx(held["gradients"], rel=0.01)
            assert predicted["optimizer"] == pytest.approx(held["optimizer"], rel=0.01)
            activations = total(memory.activations(problem, stage))
            assert activations == pytest.approx(held["activations"], rel=0.10)
        else:
            cache = total(memory.kv_cache(problem, tp_rank % problem.layout.m))
            assert cache == pytest.approx(held["kv_cache"], rel=0.01)


def test_a_hybrid_model_has_as_many_parameters_on_a_rank():
    layout = Layout(2, 2, ep=2, sequence_parallel=True)
    problem = Problem(QWEN35, layout, TRAIN)
    counted = run_ranks(plan_worker.hybrid_parameters, RANKS, problem)
    for rank, stage, _ in places(problem):
        assert total(parameters.parameters(problem, stage)) == counted[rank]


def test_a_hybrid_model_caches_its_attention_layers_and_states_of_a_fixed_size():
    def held(length):
        layout, work = Layout(2, micro_batch=3), Workload("decode", 3, length)
        return [term.value for term in memory.kv_cache(Problem(find("qwen3.5-397b-a17b"), layout, work))]

    states = [45 * 3 * 32 * 128 * 128 * 4, 45 * 3 * 12288 // 2 * 3 * 2]
    for length in (999, 1999):  # 15 layers of attention, a KV head on each rank, bf16
        assert held(length) == [2 * 15 * 3 * 2 * (length + 1) * 256, *states]


@pytest.mark.parametrize("name", PRESETS)
def test_on_one_rank_the_parameters_are_the_models(name):
    shape = replace(find(name), make_vocab_size_divisible_by=1)
    assert (
        total(parameters.parameters(Problem(shape, Layout(1), Workload("train", 1, 8)), 0))
        == shape.num_parameters
    )


def test_a_factor_given_twice_is_refused():
    with pytest.raises(ValueError, match="factor layers is given twice"):
        Term("weights", {"layers": 2, "h": 3}).times({"layers": 4})


@pytest.mark.parametrize(
    ("shape", "layout", "reason"),
    [
        (LLAMA, Layout(1, 4), "4 pipeline stages do not divide 2 layers"),
        (QWEN25, Layout(4), "tensor-parallel size 4 does not divide 14 heads"),
        (LLAMA, Layout(1, 1, 3), "3 replicas do not divide a batch of 4"),
        (LLAMA, Layout(1, 1, 2, micro_batch=4), "micro-batches of 4 do not divide a replica's 2"),
    ],
)
def test_a_layout_that_cannot_run_is_refused(shape, layout, reason):
    with pytest.raises(HelixConfigError, match=reason):
        Problem(shape, layout, TRAIN)


def test_the_probe_measures_every_collective_and_rate():
    lines = run_ranks(probe.in_host_rank, 2, probe_collectives.host_lines, timeout_s=200)[0]
    assert set(lines) == {f"{kind} x2 @2" for kind in clusters.COLLECTIVES}
    assert all(1e-6 <= latency < 1 and bandwidth > 1e5 for latency, bandwidth in lines.values())
    reached = run_ranks(probe.in_host_rank, 2, probe_rates.host_rates, timeout_s=200)[0]
    assert set(reached) == set(clusters.find("host").rates)
    assert 1e8 < reached["gemm"][0] < 1e13 and all(bandwidth > 1e7 for _, bandwidth, _ in reached.values())
