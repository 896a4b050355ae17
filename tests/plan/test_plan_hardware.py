"""What the planner is told of machines: NVML's readings, groups over domains, measured lines, the probe."""

import itertools
import sys
import time
import types
from dataclasses import replace

import pytest
import torch

from helix_megatron import cli
from helix_megatron.host.launcher import run_ranks
from helix_megatron.models.presets import find
from helix_megatron.plan import clusters, inputs, machine, probe, probe_collectives, search
from helix_megatron.plan.hardware import Line, placements
from helix_megatron.plan.layout import Workload
from tests.plan import plan_worker

GB = 10**9


# ---- NVML, by stand-in readings ----
def cluster_of(name, *sets, memory=80 * GB):
    """A machine whose GPUs NVLink joins in these sets."""
    found = [(f"NVIDIA {name}", memory, tuple(joined)) for joined in sets for _ in joined]
    order = sorted(range(len(found)), key=[i for s in sets for i in s].index)
    return machine.gpu_cluster([found[k] for k in order])


@pytest.mark.parametrize(
    ("name", "preset", "tflops", "tbs", "linked", "alone"),
    [
        ("H100 80GB HBM3", "dgx-h100", 989, 3.35, 450, 55),
        ("H100 NVL", "pcie-h100", 835, 3.9, 300, 55),
        ("H100 PCIe", "pcie-h100", 756, 2.0, 300, 55),
        ("H200", "dgx-h200", 989, 4.8, 450, 55),
        ("H200 NVL", "pcie-h100", 835, 4.8, 450, 55),
        ("GH200 480GB", "dgx-h100", 989, 4.0, 450, 55),
        ("A100-SXM4-80GB", "dgx-a100", 312, 2.039, 300, 26),
        ("A100-SXM4-40GB", "dgx-a100", 312, 1.555, 300, 26),
        ("A100-PCIE-40GB", "dgx-a100", 312, 1.555, 300, 26),
        ("A100 80GB PCIe", "dgx-a100", 312, 1.935, 300, 26),
        ("B200", "dgx-b200", 2250, 8, 900, 55),
        ("L40S", "pcie-l40s", 362, 0.864, 26, 26),
    ],
)
def test_a_gpu_has_the_rates_of_its_board(name, preset, tflops, tbs, linked, alone):
    cluster = cluster_of(name, (0, 1), memory=41 * GB)
    rate = cluster.rates["pass"]
    assert (rate.flops, rate.bandwidth) == (pytest.approx(tflops * 1e12), pytest.approx(0.8 * tbs * 1e12))
    assert cluster.fast == pytest.approx(0.8 * linked * GB) and cluster.slow == clusters.find(preset).slow
    assert cluster_of(name, (0,), (1,)).fast == pytest.approx(0.8 * alone * GB)
    assert (cluster.memory, cluster.gpus_per_node, cluster.domain) == (41 * GB, 2, 2)


def test_a_domain_is_what_nvlink_joins():
    full, split = cluster_of("A100-SXM4-80GB", range(8)), cluster_of("A100-SXM4-80GB", range(6), (6, 7))
    assert (full.domain, split.domain, split.fast) == (8, 2, full.fast)
    assert "NVLink joins all" in full.sources[-1] and "0+1+2+3+4+5, 6+7: domains of 2" in split.sources[-1]
    crossed = cluster_of("H100 PCIe", (0, 2), (1, 3))
    assert crossed.domain == 2 and "CUDA_VISIBLE_DEVICES=0,2,1,3" in crossed.sources[-1]
    lonely = cluster_of("H100 PCIe", (0, 1), (2,))  # one of them has no partner: PCIe joins all three
    assert (lonely.domain, lonely.fast) == (3, clusters.find("pcie-h100").fast)
    assert "NVLink joins 0+1: PCIe" in lonely.sources[-1]


def test_nvlink_of_gb200_leaves_the_machine():
    tray = cluster_of("GB200", range(4), memory=186 * GB)
    assert (tray.gpus_per_node, tray.domain, tray.fast) == (4, 72, clusters.find("gb200-nvl72").fast)
    assert "assumed: 72 over several machines (--domain 4: not so)" in tray.sources[-1]
    assert cluster_of("B200", range(4)).domain == 4


@pytest.mark.parametrize("name", ["H100 SXM", "GB300", "A100X", "H20"])
def test_an_unknown_gpu_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"GPUs \({name}\); known, .*GB200, B200, .*A100-PCIE-40GB"):
        cluster_of(name, (0, 1))
    with pytest.raises(ValueError, match=r"GPUs \(B200, H200\)"):
        machine.gpu_cluster([("NVIDIA B200", 1, (0,)), ("NVIDIA H200", 1, (1,))])


def fake_nvml(monkeypatch, names, linked):
    module = types.ModuleType("pynvml")
    module.NVMLError, module.shut = type("NVMLError", (Exception,), {}), 0
    module.NVML_P2P_CAPS_INDEX_NVLINK, module.NVML_P2P_STATUS_OK = 2, 0

    def status(a, b, index):
        assert index == 2
        if names[a] == "L40S":
            raise module.NVMLError("not supported")
        return 0 if {a, b} in linked else 5

    def shutdown():
        module.shut += 1

    module.nvmlInit, module.nvmlShutdown, module.nvmlDeviceGetP2PStatus = lambda: None, shutdown, status
    module.nvmlDeviceGetCount = lambda: len(names)
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetName = lambda handle: f"NVIDIA {names[handle]}".encode()
    module.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(total=80 * GB + handle)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_nvml_is_asked_which_pairs_have_nvlink(monkeypatch):
    module = fake_nvml(monkeypatch, ["H100 PCIe"] * 5, [{0, 3}, {3, 4}, {1, 2}])  # 0 and 4 by way of 3
    ring, pair = (0, 3, 4), (1, 2)
    assert [joined for _, _, joined in machine.read_gpus()] == [ring, pair, pair, ring, ring]
    assert machine.read_gpus()[4][:2] == ("NVIDIA H100 PCIe", 80 * GB + 4) and module.shut == 2
    assert inputs.load_cluster("this").domain == 2
    fake_nvml(monkeypatch, ["L40S"] * 2, [])
    assert inputs.load_cluster("this").name == "this machine (2 x L40S)"


def test_gpus_that_nvml_does_not_tell_are_no_host(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(machine.Path, "glob", lambda self, pattern: iter(()))
    assert machine.read_gpus() == [] and inputs.load_cluster("this").slots
    monkeypatch.setattr(machine.Path, "glob", lambda self, pattern: iter(["/dev/nvidia0"]))
    with pytest.raises(ValueError, match=r"cannot be read by NVML .*pip install nvidia-ml-py"):
        inputs.load_cluster("this")


# ---- groups over domains ----
def groups(tp, dp, pp, kind):
    """The ranks of every group of a layout, as Megatron numbers them."""
    rank = lambda t, d, p: t + tp * (d + dp * p)  # noqa: E731
    if kind == "tp":
        return [[rank(t, d, p) for t in range(tp)] for d in range(dp) for p in range(pp)]
    if kind == "dp":
        return [[rank(t, d, p) for d in range(dp)] for t in range(tp) for p in range(pp)]
    ends = range(pp) if kind == "pp" else (0, pp - 1)
    return [[rank(t, d, p) for p in ends] for t in range(tp) for d in range(dp)]


def where(rank, node, domain):
    """The domain of a rank: whole nodes of it, or a part of one."""
    if domain >= node:
        return rank // node // (domain // node)
    return rank // node, rank % node // domain


def lie(ranks, node, domain):
    touched = [where(rank, node, domain) for rank in ranks]
    counts = [touched.count(one) for one in set(touched)]
    return len(counts), min(counts), max(counts)


NODES = [(8, 8), (6, 6), (4, 72), (72, 72), (8, 4), (8, 3), (6, 4), (4, 10), (5, 1)]


@pytest.mark.parametrize(("node", "domain"), NODES)
def test_every_group_is_placed_as_its_ranks_are(node, domain):
    tried = 0
    for nodes, tp, dp in itertools.product(
        (1, 2, 3, 4, 18, 36), (1, 2, 3, 4, 6, 8, 12, 16, 24), range(1, 13)
    ):
        devices = node * nodes
        if devices > 144 or devices % (tp * dp):
            continue
        pp = devices // tp // dp
        strides = {"tp": (tp, 1), "dp": (dp, tp), "pp": (pp, tp * dp), "embd": (2, tp * dp * (pp - 1))}
        for kind, (size, stride) in strides.items():
            if size > 1 and stride:
                expected = {lie(ranks, node, domain) for ranks in groups(tp, dp, pp, kind)}
                assert placements(size, stride, devices, node, domain) == expected, (devices, tp, dp, kind)
                tried += 1
    assert tried > 20


def test_a_group_that_straddles_domains_waits_for_the_adapters():
    """tp = 16 in racks of 72: ranks 64 to 79 lie in two of them, eight in each."""
    rack, big = clusters.find("gb200-nvl72"), 1e9
    two = replace(rack, nodes=2)
    inside, across = (c.collective_seconds("all_reduce", 16, 1, big, 144) for c in (rack, two))
    assert inside == pytest.approx(8.4e-6 + 30 * 3.4e-6 + big / rack.fast)
    assert across == pytest.approx(8.4e-6 + 28 * 3.4e-6 + 2 * 14e-6 + big / (8 * rack.slow))
    assert two.collective_seconds("all_reduce", 8, 1, big, 144) < inside  # 8 divides 72
    three = replace(clusters.find("dgx-h100"), nodes=3)  # tp = 6: ranks 6 to 11, two in a node and four
    assert three.collective_seconds("all_reduce", 6, 1, big, 24) == pytest.approx(
        8.4e-6 + 8 * 3.4e-6 + 2 * 14e-6 + big / (2 * three.slow)
    )
    assert three.collective_seconds("all_to_all", 6, 1, big, 24) == pytest.approx(
        8.4e-6 + 4 * 3.4e-6 + 14e-6 + big * 4 / 5 / three.slow  # the two in a node have four elsewhere
    )


def test_some_stage_sends_over_the_slow_link():
    big = 1e9
    for nodes, link in ((1, "fast"), (2, "slow")):
        cluster = replace(clusters.find("dgx-h100"), nodes=nodes)
        rate = getattr(cluster, link)
        assert cluster.collective_seconds("recv", 2, 1, big, 16) == pytest.approx(big / rate, rel=1e-2)
    rack = replace(clusters.find("gb200-nvl72"), gpus_per_node=4, nodes=18)
    assert rack.algorithm("recv", 2, 8, 1, 72).bandwidth == rack.fast


@pytest.mark.parametrize("node", [8, 6, 72])
def test_thousands_of_gpus_in_odd_domains_are_planned_in_two_seconds(node):
    cluster = replace(clusters.find("dgx-h100"), gpus_per_node=node, domain=node, nodes=4608 // node)
    placements.cache_clear()
    start = time.process_time()
    plan = search.search(find("llama-3.1-70b"), cluster, Workload("train", 4608, 2048))
    assert time.process_time() - start < 2
    assert plan.candidates[0].layout.world == 4608


# ---- measured links ----
def linked(**links):
    lines = {key.replace("__", " "): Line(*pair) for key, pair in links.items()}
    return replace(clusters.find("dgx-h100"), nodes=4, links=lines)


def test_measured_links_hold_where_they_were_measured():
    cluster = linked(all_reduce__1x2=(2e-5, 4e11), all_reduce__1x8=(5e-5, 2e11), recv__2x1=(3e-5, 5e10),
                     all_reduce__1x8__small=(1e-5, 1e10), all_reduce__2x8=(1e-4, 1e11),
                     all_gather__2x1=(1e-3, 1e10), all_gather__2x8=(1e-3, 1e10))  # fmt: skip
    model = replace(cluster, links={})
    time_of = lambda *group, **on: on.get("c", cluster).collective_seconds(*group, 32)  # noqa: E731
    assert time_of("all_reduce", 8, 1, 1e9) == pytest.approx(5e-5 + 1e9 / 2e11)
    assert time_of("all_reduce", 8, 1, 1e3) == pytest.approx(1e-5 + 1e3 / 1e10)  # the faster of the two lines
    assert time_of("all_reduce", 2, 4, 1e9) == pytest.approx(2e-5 + 1e9 / 4e11)
    halfway = 2e-5 * 2 / 3 + 5e-5 / 3 + 1e9 * (2 / 3 / 4e11 + 1 / 3 / 2e11)
    assert time_of("all_reduce", 4, 1, 1e9) == pytest.approx(halfway)
    assert time_of("all_reduce", 16, 1, 1e9) == pytest.approx(1e-4 + 1e9 / 1e11)
    assert time_of("recv", 2, 8, 1e9) == time_of("recv", 4, 8, 1e9) == pytest.approx(3e-5 + 1e9 / 5e10)
    for group in (("all_gather", 8, 1), ("all_reduce", 32, 1), ("all_reduce", 2, 8), ("all_gather", 12, 1)):
        assert time_of(*group, 1e9) == time_of(*group, 1e9, c=model), group  # NCCL's model elsewhere
    assert "measured: " in cluster.algorithm("all_reduce", 8, 1, 1e9, 8).formula(1e9)
    assert "measured small: " in cluster.algorithm("all_reduce", 8, 1, 1e3, 8).formula(1e3)
    assert clusters.from_dict(clusters.to_dict(cluster), "test") == cluster


@pytest.mark.parametrize("key", ["all_reduce x8 @8", "all_reduce 1x1", "sum 1x2", "recv 0x2", "recv 2x1 big"])
def test_a_link_by_another_name_is_refused(key):
    document = {"base": "dgx-h100", "links": {key: {"latency": 1e-5, "bandwidth": 1e11}}}
    with pytest.raises(ValueError, match=rf'links: {key}: a link is called "KIND DOMAINSxRANKS"'):
        clusters.from_dict(document, "mine.yaml")


# ---- the probe ----
@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """Two machines of two "GPUs", probed by four ranks in host mode."""
    path = tmp_path_factory.mktemp("probe") / "this.yaml"
    environment = {"LOCAL_WORLD_SIZE": 2}
    codes = run_ranks(plan_worker.probe, 4, str(path), 2, timeout_s=300, env=environment)
    assert codes == [0] * 4
    return path


def test_the_probe_measures_gpus_in_the_ranks_of_torchrun(probed):
    cluster, preset = inputs.load_cluster(str(probed)), clusters.find("dgx-h100")
    assert (cluster.gpus_per_node, cluster.nodes, cluster.domain, cluster.slots) == (2, 2, 2, 0)
    assert cluster.memory == 80 * GB and cluster.fused and cluster.reserve == preset.reserve
    kinds, shapes = clusters.COLLECTIVES, ("1x2", "2x1", "2x2")
    expected = {f"{kind} {shape}" for kind in kinds for shape in shapes} - {"recv 2x2"}
    assert set(cluster.links) == expected | {f"{key} small" for key in expected}
    for key in expected:
        assert cluster.links[key].latency >= cluster.links[f"{key} small"].latency
    assert cluster.fast == cluster.links["all_gather 1x2"].bandwidth
    assert cluster.slow == cluster.links["all_gather 2x1"].bandwidth
    assert set(cluster.rates) == set(preset.rates)
    for kind, rate in cluster.rates.items():
        assert rate != preset.rates[kind] and 1e5 < rate.bandwidth < preset.rates[kind].bandwidth, kind
    assert cluster.rates["gemm"] != cluster.rates["gemm fp32"]
    assert cluster.rates["fused attention"].flops < 1e12
    assert "rates, and links of 4 ranks on 2 machines" in cluster.sources[0]


def test_what_was_probed_is_planned_with(probed, capsys):
    words = ("plan", "--model", "smollm2-135m", "--cluster", str(probed), "--batch", "8", "--explain")
    assert cli.main([*words, "--tp", "2", "--pp", "2"]) == 0
    out = capsys.readouterr().out
    assert "measured" in out and "ring" not in out and "tree" not in out
    assert cli.main([*words, "--nodes", "4", "--tp", "1", "--pp", "1"]) == 0  # dp = 8 was not measured
    assert "ring" in capsys.readouterr().out


def test_lines_pass_through_what_was_timed(monkeypatch):
    asked = []

    def seconds(kind, group, received, calls):
        asked.append((kind, received))
        return 1e-5 + received * (2 if kind == "recv" else 1) / 1e11

    monkeypatch.setattr(probe_collectives, "collective_seconds", seconds)
    for kind in ("all_reduce", "recv"):
        line = probe_collectives.link_line(kind, None, (1000, 5_000_000))
        assert line == (pytest.approx(1e-5), pytest.approx(1e11))
    assert asked == [("all_reduce", 1000), ("all_reduce", 5_000_000), ("recv", 500), ("recv", 2_500_000)]
    noise = {1000: 2e-5, 5_000_000: 1e-5}
    timed = lambda kind, group, received, calls: noise[received]  # noqa: E731
    monkeypatch.setattr(probe_collectives, "collective_seconds", timed)
    latency, bandwidth = probe_collectives.link_line("all_reduce", None, (1000, 5_000_000))
    assert 1e-6 <= latency <= 2e-5 and 0 < bandwidth < 1e15  # which a file may hold


@pytest.mark.parametrize(("world", "joined"), [(2, 2), (16, 8), (32, 8), (12, 6), (18, 6), (4, 1), (144, 72)])
def test_every_rank_is_in_one_group_of_each_shape(world, joined):
    measured = probe_collectives.group_shapes(world, joined)
    assert len(set(measured)) == len(measured) and (1, joined) in {*measured, (1, 1)}
    assert (world // joined, joined) in measured
    for domains, ranks in measured:
        made = probe_collectives.group_members(world, joined, domains, ranks)
        assert sorted(rank for group in made for rank in group) == list(range(world))
        for group in made:
            assert group == sorted(group) and lie(group, joined, joined) == (domains, ranks, ranks)


def in_ranks(monkeypatch, local, world, found):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": local, "WORLD_SIZE": world}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "read_gpus", lambda: found)


def refused(capsys, *words):
    assert cli.main(["plan", *words]) == 2
    return capsys.readouterr().err


def test_ranks_that_are_not_one_on_each_gpu_are_refused(monkeypatch, capsys, tmp_path):
    path = str(tmp_path / "this.yaml")
    h100 = [("NVIDIA H100 80GB HBM3", 80 * GB, tuple(range(8)))] * 8
    in_ranks(monkeypatch, 4, 4, h100)
    assert "started 4 ranks on a machine of 8 GPUs, 4 in all" in refused(capsys, "--probe", path)
    assert "--ranks 4 is for hosts" in refused(capsys, "--probe", path, "--ranks", "4")
    in_ranks(monkeypatch, 4, 76, [("NVIDIA GB200", 186 * GB, (0, 1, 2, 3))] * 4)
    assert "76 ranks do not fill domains of 72 GPUs" in refused(capsys, "--probe", path)
    in_ranks(monkeypatch, 8, 8, [])
    assert "NVML tells of no GPU" in refused(capsys, "--probe", path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert f"a host is probed without torchrun: helix plan --probe {path}" in refused(capsys, "--probe", path)


def test_gpus_without_ranks_are_told_the_command(monkeypatch, capsys, tmp_path):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    path = str(tmp_path / "this.yaml")
    command = f"torchrun --nproc-per-node 8 -m helix_megatron.cli plan --probe {path}"
    assert command in refused(capsys, "--probe", path)


def test_a_path_that_cannot_be_written_is_refused_before_measuring(monkeypatch, capsys, tmp_path):
    def measured(*args):
        raise AssertionError("measured")

    monkeypatch.setattr(probe, "measure_host", measured)
    for path in (tmp_path / "nowhere" / "x.yaml", tmp_path):
        assert f"--probe {path} cannot be written" in refused(capsys, "--probe", str(path))
    probe.check_writable(str(tmp_path / "new.yaml"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "old.yaml").write_text("kept")
    probe.check_writable(str(tmp_path / "old.yaml"))
    assert (tmp_path / "old.yaml").read_text() == "kept"
