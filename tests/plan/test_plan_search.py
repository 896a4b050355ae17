"""Search, timing, inputs and the command of the planner: everything that needs no ranks."""

import itertools
import json
import time
from dataclasses import replace

import pytest
import yaml

from helix_megatron import cli
from helix_megatron.models.presets import PRESETS, find
from helix_megatron.partition import choice
from helix_megatron.partition.grid import HelixGrid, legal_grids
from helix_megatron.plan import clusters, compute, inputs, machine, search
from helix_megatron.plan.layout import Layout, Problem, Workload, illegal_reason, indivisible_reason
from helix_megatron.plan.timing import predict

H100 = replace(clusters.find("dgx-h100"), nodes=2)
DECODE, TRAIN = Workload("decode", 8, 4096), Workload("train", 64, 4096, distributed_optimizer=True)
MODELS = ["qwen2-7b", "llama-3-8b", "phi-3-medium", "smollm2-135m", "paper-gpt"]


def everything(shape, devices, work):
    """Every legal layout of all devices with sliced heads or Megatron's own, nothing pruned."""
    for tp, pp in itertools.product(range(1, devices + 1), repeat=2):
        if devices % (tp * pp) or shape.num_layers % pp:
            continue
        dp = devices // tp // pp
        if work.batch % dp:
            continue
        replica = work.batch // dp
        sizes = [k for k in search.MICRO_BATCHES if replica % k == 0] if work.kind == "train" else [replica]
        same = [Layout(tp)]
        for grid in legal_grids(shape.attention, tp, even=True):
            if grid.dim_parallel_size == 1:
                continue
            for comm, place, cache in itertools.product(
                ("a2a", "all_reduce"), ("dims", "heads"), ("sequence", "dim")
            ):
                whole = shape.num_attention_heads // grid.head_parallel_size % grid.dim_parallel_size == 0
                if place == "dims" or whole:
                    same.append(Layout(tp, helix=True, grid=grid, comm_type=comm, placement=place,
                                       kv_cache=cache))  # fmt: skip
        experts = shape.num_moe_experts
        sp = tp > 1 and work.length % tp == 0 and (bool(experts) or (work.kind == "train" and work.fused))
        groups = [(1, 1)] if not experts else itertools.product(range(1, tp * dp + 1), (1, tp))
        for layout, size, (ep, etp) in itertools.product(same, sizes, groups):
            layout = replace(layout, pp=pp, dp=dp, micro_batch=size, sequence_parallel=sp, ep=ep, etp=etp)
            if illegal_reason(shape, layout, work) is None:
                yield layout


def assert_nothing_left_out_is_faster(shape, cluster, work):
    """The search's first layout is the fastest of all legal ones, memory apart."""
    cluster = replace(cluster, memory=1e15)
    problems = [Problem(shape, layout, work) for layout in everything(shape, cluster.devices, work)]
    plan = search.search(shape, cluster, work)
    assert len(problems) > plan.tried
    fastest = min(problems, key=lambda problem: predict(problem, cluster).seconds)
    missed = f"{shape.name} on {cluster.name}, {work}: {fastest.layout}"
    assert plan.candidates[0].seconds == pytest.approx(predict(fastest, cluster).seconds, rel=1e-12), missed


@pytest.mark.parametrize("work", [DECODE, TRAIN], ids=["decode", "train"])
@pytest.mark.parametrize("name", [*MODELS, "qwen3-30b-a3b", "gpt-oss-20b", "qwen3.5-397b-a17b"])
def test_pruning_never_loses_the_best_layout(name, work):
    shape = find(name)
    nodes = 1 if shape.num_moe_experts else 2  # experts multiply the layouts
    assert_nothing_left_out_is_faster(shape, replace(H100, nodes=nodes), work)


LENGTHS = (64, 600, 2000, 6000, 131072)
SOME_WORKS = [Workload(*rest) for rest in itertools.product(("decode", "prefill"), (1, 16), LENGTHS)]
SOME_WORKS += [Workload("train", 16, s, distributed_optimizer=True) for s in LENGTHS[:3]]


@pytest.mark.parametrize(
    ("cluster", "nodes", "name"),
    [
        *(("dgx-h100", 2, name) for name in MODELS),
        *(("pcie-l40s", 2, name) for name in ("qwen2-7b", "phi-3-medium")),
        ("dgx-a100", 4, "smollm2-135m"),
        ("dgx-h100", 3, "smollm2-135m"),
        ("dgx-h100", 2, "qwen3-8b"),  # QK norm
        ("host", 4, "llama-3-8b"),
    ],
)
def test_pruning_never_loses_the_best_layout_of_any_context(cluster, nodes, name):
    cluster = replace(clusters.find(cluster), nodes=nodes)
    for work in SOME_WORKS:
        if not cluster.fused:
            work = replace(work, dtype="fp32", distributed_optimizer=False, fused=False)
        assert_nothing_left_out_is_faster(find(name), cluster, work)


def test_candidates_are_ranked_fit_and_use_every_device():
    plan = search.search(find("llama-3.1-70b"), H100, replace(DECODE, length=131072))
    seconds = [candidate.seconds for candidate in plan.candidates]
    assert seconds == sorted(seconds)
    assert all(c.layout.world == 16 and c.memory.total <= H100.capacity for c in plan.candidates)
    assert all(sum(c.prediction.parts.values()) == c.seconds for c in plan.candidates)
    assert plan.too_big > 0  # 71 GB of weights and the cache of one sequence


def test_what_does_not_fit_is_recomputed_or_refused():
    plan = search.search(find("llama-3.1-70b"), H100, TRAIN)
    assert not plan.candidates and plan.smallest > H100.capacity
    some = search.search(find("llama-3.1-70b"), replace(H100, nodes=8), replace(TRAIN, length=32768))
    assert any(c.layout.recompute for c in some.candidates)


@pytest.mark.parametrize(
    ("name", "nodes", "batch"), [("llama-3.1-70b", 512, 2048), ("gpt-1t", 1280, 5120)], ids=["4096", "10240"]
)
def test_thousands_of_gpus_are_planned_in_two_seconds(name, nodes, batch):
    start = time.process_time()
    plan = search.search(find(name), replace(H100, nodes=nodes), replace(TRAIN, batch=batch, length=2048))
    assert time.process_time() - start < 2
    assert plan.candidates[0].layout.world == 8 * nodes


@pytest.mark.parametrize("name", ["llama-3.1-70b", "gpt-1t", "qwen2-7b"])
def test_a_training_step_costs_six_flops_a_parameter_and_token(name):
    shape, work = find(name), Workload("train", 8, 512)
    problem = Problem(shape, Layout(8 if name != "qwen2-7b" else 4, 2), work)
    matrices = shape.num_parameters - (0 if shape.tied_embeddings else shape.vocab_size * shape.hidden_size)
    tokens, s = 8 * 512, 512
    attention = 3.5 * 4 * shape.num_layers * shape.num_attention_heads * shape.kv_channels * s / 2 * tokens
    assert compute.flops_of_step(problem) == pytest.approx(6 * matrices * tokens + attention, rel=0.01)


@pytest.mark.parametrize(
    ("name", "fused", "grid", "kind", "heads_read"),
    [
        ("llama-3-8b", True, None, "cached attention", 4),
        ("llama-3-8b", False, None, "repeated attention", 4 + 2 * 16),  # 16 copies written and read
        ("llama-3-8b", False, (1, 2), "cached attention", 8 / 2),
        ("paper-gpt", False, None, "cached attention", 16),
    ],
)
def test_a_new_token_reads_the_cache_as_its_core_does(name, fused, grid, kind, heads_read):
    shape, work = find(name), Workload("decode", 8, 1023, "fp32", fused=fused)
    layout = Layout(2, micro_batch=8)
    if grid:
        layout = Layout(2, helix=True, grid=HelixGrid(*grid), comm_type="a2a", placement="heads",
                        kv_cache="sequence", micro_batch=8)  # fmt: skip
    attention = compute.attention(Problem(shape, layout, work))
    assert attention.kind == kind
    assert attention.bytes.value == 2 * 8 * 1024 * heads_read * 128 * 4


def test_a_step_ends_with_passes_over_gradients_and_weights():
    shape = find("smollm2-135m")
    for fused, dtype, accumulated in ((False, "fp32", 12), (False, "bf16", 10), (True, "bf16", 0)):
        problem = Problem(shape, Layout(1, 1, 2), Workload("train", 8, 64, dtype, fused=fused))
        assert compute.accumulation_bytes(problem, 0).value == accumulated * shape.num_parameters
    host = clusters.find("host")
    lines = {
        line.name: line.seconds for line in predict(Problem(shape, Layout(1, 1, 2), work_of(8)), host).lines
    }
    assert lines["update"] == pytest.approx(28 * shape.num_parameters / host.rates["update"].bandwidth)
    assert lines["norm, clipping, zeroing"] == pytest.approx(
        16 * shape.num_parameters / host.rates["pass"].bandwidth
    )
    few, many = (predict(Problem(shape, Layout(1, 1, 2), work_of(b)), host).parts for b in (2, 8))
    assert many["optimizer"] == few["optimizer"]  # once a step, gradients are added once a micro-batch
    passes = 12 * shape.num_parameters / host.rates["pass"].bandwidth
    assert many["compute"] == pytest.approx(4 * few["compute"]) and few["compute"] > passes


def work_of(batch):
    return Workload("train", batch, 64, "fp32", fused=False)


def test_a_cluster_that_lacks_a_rate_is_refused():
    rates = {kind: rate for kind, rate in clusters.find("host").rates.items() if kind != "update"}
    with pytest.raises(ValueError, match=r"no rate of 'update'.*helix plan --probe"):
        predict(
            Problem(find("smollm2-135m"), Layout(1), work_of(2)), replace(clusters.find("host"), rates=rates)
        )


def test_collectives_between_nodes_wait_for_the_adapters():
    big = 1e9
    inside = H100.collective_seconds("all_reduce", 8, 1, big, 8)
    across = H100.collective_seconds("all_reduce", 16, 1, big, 16)
    single_rows = H100.collective_seconds("all_reduce", 2, 8, big, 16)
    assert inside == pytest.approx(8.4e-6 + 14 * 3.4e-6 + big / 360e9)
    assert across == pytest.approx(
        8.4e-6 + 28 * 3.4e-6 + 2 * 14e-6 + big / 320e9
    )  # eight adapters of 40 GB/s
    assert single_rows == pytest.approx(8.4e-6 + 2 * 14e-6 + big / 40e9)
    small = H100.collective_seconds("all_gather", 8, 1, 1000, 8)
    assert small == pytest.approx(6.6e-6 + 7 * 0.6e-6 + 4 * 1000 / 360e9)
    assert H100.collective_seconds("all_to_all", 16, 1, big, 16) == pytest.approx(
        8.4e-6 + 14 * 3.4e-6 + 14e-6 + big * 8 / 15 / 40e9
    )


def test_pipeline_bubbles_and_shared_cores():
    shape = find("llama-3-8b").scaled(1 / 16, num_layers=4)
    host = replace(clusters.find("host"), slots=4, gpus_per_node=4)
    parts = {}
    for batch in (1, 64):
        work = Workload("train", batch, 64, "fp32", fused=False)
        parts[batch] = predict(Problem(shape, Layout(1, 4), work), host).parts
    assert parts[1]["pipeline"] > 2.5 * parts[1]["compute"]  # three of four stages idle
    assert parts[64]["pipeline"] < 0.3 * parts[64]["compute"]
    one_core = predict(Problem(shape, Layout(1, 4), work), replace(host, slots=1)).seconds
    assert one_core > 3 * predict(Problem(shape, Layout(1, 4), work), host).seconds


# ---- inputs ----
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "paper-gpt"])
def test_flags_and_yaml_describe_the_same_model(name, tmp_path):
    shape = find(name)
    flags = {**shape.model_args(), "--vocab-size": shape.vocab_size}
    same = replace(shape, notes=())
    if shape.position_embedding_type != "rope":
        same = replace(same, rotary_base=10000)
    assert inputs.shape_from_flags(flags, name, "test") == same
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"MODEL_ARGS": {k.removeprefix("--"): v for k, v in flags.items()}}))
    assert inputs.load_model(str(path)) == same
    words = [w for k, v in flags.items() for w in ([k] if v is True else [k, str(v)])]
    assert inputs.shape_from_flags(inputs.parse_flags(words), name, "test") == same


@pytest.mark.parametrize("name", clusters.CLUSTERS)
def test_a_cluster_survives_its_file(name, tmp_path):
    cluster = clusters.find(name)
    assert cluster.sources and cluster.memory >= 8e9
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(clusters.to_dict(cluster)))
    assert inputs.load_cluster(str(path)) == cluster


def test_a_cluster_file_may_start_from_a_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "{base: dgx-h100, name: mine, slow: 2.5e+10, rates: {gemm: {flops: 5.0e+14, bandwidth: 2.0e+12}}}"
    )
    mine = inputs.load_cluster(str(path))
    assert (mine.slow, mine.rates["gemm"].flops, mine.fast) == (2.5e10, 5e14, H100.fast)
    path.write_text("{base: dgx-h100, slov: 1}")
    with pytest.raises(ValueError, match="unknown key 'slov'; did you mean slow"):
        inputs.load_cluster(str(path))
    path.write_text("{base: dgx-h100, rates: {gemm: {flops: 0, bandwidth: 1}}}")
    with pytest.raises(ValueError, match="rates: gemm: flops is 0"):
        inputs.load_cluster(str(path))


# ---- command ----
def run(capsys, *words):
    code = cli.main(["plan", *words])
    out = capsys.readouterr()
    return code, out.out, out.err


PASTED = ("--model", "llama-3.1-70b", "--cluster", "dgx-h100", "--nodes", "2", "--workload", "decode",
          "--context", "131072", "--batch", "8")  # fmt: skip


def test_the_command_says_leave_helix_off_and_gives_flags(capsys):
    code, out, _ = run(capsys, *PASTED, "--explain")
    assert code == 0
    assert "Leave Helix off" in out and "PREDICTED" in out
    assert "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 --attention-impl megatron" in out
    assert "1 before 2" in out and "whole heads: K and V 2 x layers 80" in out.replace("bytes 2 x ", "")


def test_json_is_one_document_of_predictions(capsys):
    code, out, _ = run(capsys, *PASTED, "--json")
    document = json.loads(out)
    assert code == 0 and document["kind"] == "predicted"
    first = document["candidates"][0]
    assert first["predicted_bytes"]["weights"] == pytest.approx(70.55e9 * 2 / 8, rel=0.001)
    assert first["predicted_seconds"] == pytest.approx(sum(first["predicted_parts"].values()))


def test_helix_is_recommended_where_megatron_cannot_split(capsys):
    code, out, _ = run(capsys, "--model", "qwen2-7b", "--nodes", "1", "--workload", "decode", "--batch", "1",
                       "--context", "131072")  # fmt: skip
    assert code == 0 and "Use Helix: Megatron's best layout (tp=4 pp=2 dp=1)" in out
    assert "--helix-head-parallel-size 4 --helix-dim-parallel-size 2" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "llama-9"), "no model preset is called 'llama-9'"),
        (("--model", "qwen2-7b", "--cluster", "dgx-h10"), "did you mean dgx-h100"),
        ((), "give the model either as --model or as Megatron's flags after --"),
        (("--model", "qwen2-7b", "--batch", "0"), "batch is 0"),
        (("--model", "qwen2-7b", "--nodes", "-1"), "--nodes is -1"),
        (("--", "--num-layers", "2"), "the flags after -- has no --hidden-size"),
        (
            ("--", "--num-layers", "x", "--hidden-size", "8", "--num-attention-heads", "2"),
            "--num-layers is 'x'",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys, words, message):
    code, _, err = run(capsys, *words)
    assert code == 2 and message in err and err.count("\n") == 1


def test_no_layout_is_an_answer_too(capsys):
    code, out, _ = run(capsys, "--model", "llama-3.1-70b", "--nodes", "2", "--workload", "train")
    assert code == 1 and "none of" in out and "GB are there" in out
    code, out, _ = run(capsys, "--model", "gpt-1t", "--gpus", "11", "--workload", "train", "--nodes", "11")
    assert code == 1 and "uses exactly 11 ranks" in out


# ---- the rule ----
@pytest.mark.parametrize("work", [DECODE, TRAIN], ids=["decode", "train"])
@pytest.mark.parametrize("cache", ["sequence", "dim"])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_rule_is_the_fastest_grid_of_its_size(name, cache, work):
    shape = find(name)
    for tp in (2, 4, 8, 16, 32):
        grids = legal_grids(shape.attention, tp, even=True)
        if not grids:
            continue
        grid, reason = choice.choose_grid_with_reason(shape.attention, tp)
        least = min(choice.exchanged_elements(shape.attention, other) for other in grids)
        assert choice.exchanged_elements(shape.attention, grid) == least
        if grid.dim_parallel_size == 1:
            assert "nothing is exchanged" in reason
            continue
        whole = shape.num_attention_heads % tp == 0 and cache == "sequence"
        layout = Layout(tp, helix=True, comm_type="a2a", placement="heads" if whole else "dims",
                        kv_cache=cache, micro_batch=8,
                        sequence_parallel=bool(shape.num_moe_experts))  # fmt: skip
        if indivisible_reason(shape, tp):
            continue
        times = {
            g: predict(Problem(shape, replace(layout, grid=g), replace(work, batch=8)), H100).seconds
            for g in grids
        }
        assert times[grid] == pytest.approx(min(times.values()), rel=1e-9)  # hosts may be waited for as long


# ---- the probe ----
def test_the_probe_recovers_what_a_layer_and_a_step_cost():
    from helix_megatron.plan import probe

    bare = replace(clusters.find("host"), layer_overhead={}, step_overhead={})
    true_layer, true_step = {"megatron": 2e-3, "heads": 3e-3, "dims": 4e-3}, 5e-3

    def seconds(name, problem):
        per_layer = next(cost for key, cost in true_layer.items() if key in name)
        step = true_step if "megatron" in name else 0.0
        layers = problem.layers * problem.micro_batches
        return predict(problem, bare).seconds + layers * per_layer + step

    trials = {name: (p, seconds(name, p)) for name, p in probe.software_problems().items()}
    found = probe.with_software(bare, trials)
    assert found.layer_overhead["train megatron"] == pytest.approx(2e-3)
    assert found.layer_overhead["train a2a dims"] == pytest.approx(4e-3)
    assert found.layer_overhead["decode heads sequence"] == pytest.approx(3e-3)
    assert found.step_overhead["prefill"] == pytest.approx(5e-3)
    for name, (problem, measured) in trials.items():  # and so the trials are predicted
        extra = 0 if "megatron" in name else true_step
        assert predict(problem, found).seconds == pytest.approx(measured + extra)


def test_a_machine_without_a_known_gpu_is_refused_and_known_ones_are_read():
    eight = machine.gpu_cluster([("NVIDIA H100 80GB HBM3", 85_000_000_000, tuple(range(8)))] * 8)
    assert (eight.gpus_per_node, eight.memory, eight.fast) == (8, 85e9, H100.fast)
    alone = [("NVIDIA A100-SXM4-80GB", 85_000_000_000, (index,)) for index in range(2)]
    assert machine.gpu_cluster(alone).fast < clusters.find("dgx-a100").fast
    with pytest.raises(ValueError, match=r"no preset fits this machine's GPUs \(Tesla V100\)"):
        machine.gpu_cluster([("Tesla V100", 16_000_000_000, (0,))])


# ---- experts ----
def test_the_groups_of_experts_are_searched_fixed_and_shown(capsys):
    words = ["plan", "--model", "mixtral-8x7b", "--tp", "4", "--workload", "decode", "--batch", "8"]
    plan = search.search(find("mixtral-8x7b"), clusters.find("dgx-h100"), replace(DECODE, batch=8), tp=4)
    groups = {(c.layout.ep, c.layout.etp) for c in plan.candidates if c.layout.pp == 1}
    assert groups == {(2, 1), (4, 1), (8, 1), (1, 4), (2, 4)}  # all experts whole on a rank do not fit
    assert all(c.layout.sequence_parallel for c in plan.candidates)
    assert cli.main([*words, "--ep", "2", "--etp", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["candidates"]
    assert {(c["layout"]["ep"], c["layout"]["etp"]) for c in found} == {(2, 4)}
    flags = found[0]["flags"]
    assert (flags["--expert-model-parallel-size"], flags["--expert-tensor-parallel-size"]) == (2, 4)
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "12.9 B active" in out and " ep  etp " in out and "balanced routing" in out
    assert cli.main(["plan", "--model", "llama-3-8b", "--ep", "2"]) == 2
    assert "--ep and --etp lay out experts, and llama-3-8b has none" in capsys.readouterr().err
    assert cli.main([*words, "--ep", "3"]) == 1  # divides neither the ranks nor the experts
    assert "with --tp 4, --ep 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "layout", "reason"),
    [
        ("gpt-oss-20b", Layout(2, etp=2, ep=2, dp=2), "experts with biases have no tensor parallelism"),
        ("mixtral-8x7b", Layout(1, 1, 8, ep=3), "expert parallelism 3 x 1 does not divide 8 ranks"),
        ("mixtral-8x7b", Layout(1, 1, 16, ep=16), "16 expert-parallel ranks do not divide 8 experts"),
        ("mixtral-8x7b", Layout(2, 1, 8), "need sequence parallelism in training"),
        ("llama-3-8b", Layout(1, 1, 8, ep=2), "2 expert-parallel ranks do not divide 0 experts"),
        ("gpt-oss-20b", Layout(1, 8), "stages of 3 layers are unlike one another"),
        ("qwen3.5-397b-a17b", Layout(32), "does not divide the GDN layers' 16 key heads"),
    ],
)
def test_layouts_of_experts_and_hybrid_models_that_cannot_be(name, layout, reason):
    assert reason in illegal_reason(find(name), layout, replace(TRAIN, batch=64))
