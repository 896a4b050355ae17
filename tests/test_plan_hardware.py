"""What the planner is told of machines: NVML's readings, groups over domains, measured lines, the probe."""

import itertools
import sys
import time
import types
from dataclasses import replace

import pytest

from helix_megatron.plan import clusters, inputs, nvml, search
from helix_megatron.plan.hardware import Line
from helix_megatron.plan.layout import Workload
from helix_megatron.plan.placement import placements
from helix_megatron.presets import find

GB = 10**9


# ---- NVML, by stand-in readings ----
def machine(name, *sets, memory=80 * GB):
    """A machine whose GPUs NVLink joins in these sets."""
    found = [(f"NVIDIA {name}", memory, tuple(joined)) for joined in sets for _ in joined]
    return nvml.of_gpus([found[k] for k in sorted(range(len(found)), key=[i for s in sets for i in s].index)])


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
    cluster = machine(name, (0, 1), memory=41 * GB)
    rate = cluster.rates["pass"]
    assert (rate.flops, rate.bandwidth) == (pytest.approx(tflops * 1e12), pytest.approx(0.8 * tbs * 1e12))
    assert cluster.fast == pytest.approx(0.8 * linked * GB) and cluster.slow == clusters.find(preset).slow
    assert machine(name, (0,), (1,)).fast == pytest.approx(0.8 * alone * GB)
    assert (cluster.memory, cluster.gpus_per_node, cluster.domain) == (41 * GB, 2, 2)


def test_a_domain_is_what_nvlink_joins():
    full, split = machine("A100-SXM4-80GB", range(8)), machine("A100-SXM4-80GB", range(6), (6, 7))
    assert (full.domain, split.domain, split.fast) == (8, 2, full.fast)
    assert "NVLink joins all" in full.sources[-1] and "0+1+2+3+4+5, 6+7: domains of 2" in split.sources[-1]
    crossed = machine("H100 PCIe", (0, 2), (1, 3))
    assert crossed.domain == 2 and "CUDA_VISIBLE_DEVICES=0,2,1,3" in crossed.sources[-1]
    lonely = machine("H100 PCIe", (0, 1), (2,))  # one of them has no partner: PCIe joins all three
    assert (lonely.domain, lonely.fast) == (3, clusters.find("pcie-h100").fast)
    assert "NVLink joins 0+1: PCIe" in lonely.sources[-1]


def test_nvlink_of_gb200_leaves_the_machine():
    tray = machine("GB200", range(4), memory=186 * GB)
    assert (tray.gpus_per_node, tray.domain, tray.fast) == (4, 72, clusters.find("gb200-nvl72").fast)
    assert "assumed: 72 over several machines (--domain 4: not so)" in tray.sources[-1]
    assert machine("B200", range(4)).domain == 4


@pytest.mark.parametrize("name", ["H100 SXM", "GB300", "A100X", "H20"])
def test_an_unknown_gpu_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"GPUs \({name}\); known, .*GB200, B200, .*A100-PCIE-40GB"):
        machine(name, (0, 1))
    with pytest.raises(ValueError, match=r"GPUs \(B200, H200\)"):
        nvml.of_gpus([("NVIDIA B200", 1, (0,)), ("NVIDIA H200", 1, (1,))])


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
    assert [joined for _, _, joined in nvml.gpus()] == [ring, pair, pair, ring, ring]
    assert nvml.gpus()[4][:2] == ("NVIDIA H100 PCIe", 80 * GB + 4) and module.shut == 2
    assert inputs.cluster("this").domain == 2
    fake_nvml(monkeypatch, ["L40S"] * 2, [])
    assert inputs.cluster("this").name == "this machine (2 x L40S)"


def test_gpus_that_nvml_does_not_tell_are_no_host(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(nvml.Path, "glob", lambda self, pattern: iter(()))
    assert nvml.gpus() == [] and inputs.cluster("this").slots
    monkeypatch.setattr(nvml.Path, "glob", lambda self, pattern: iter(["/dev/nvidia0"]))
    with pytest.raises(ValueError, match=r"cannot be read by NVML .*pip install nvidia-ml-py"):
        inputs.cluster("this")


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
    inside, across = (c.collective("all_reduce", 16, 1, big, 144) for c in (rack, two))
    assert inside == pytest.approx(8.4e-6 + 30 * 3.4e-6 + big / rack.fast)
    assert across == pytest.approx(8.4e-6 + 28 * 3.4e-6 + 2 * 14e-6 + big / (8 * rack.slow))
    assert two.collective("all_reduce", 8, 1, big, 144) < inside  # 8 divides 72
    three = replace(clusters.find("dgx-h100"), nodes=3)  # tp = 6: ranks 6 to 11, two in a node and four
    assert three.collective("all_reduce", 6, 1, big, 24) == pytest.approx(
        8.4e-6 + 8 * 3.4e-6 + 2 * 14e-6 + big / (2 * three.slow)
    )
    assert three.collective("all_to_all", 6, 1, big, 24) == pytest.approx(
        8.4e-6 + 4 * 3.4e-6 + 14e-6 + big * 4 / 5 / three.slow  # the two in a node have four elsewhere
    )


def test_some_stage_sends_over_the_slow_link():
    big = 1e9
    for nodes, link in ((1, "fast"), (2, "slow")):
        cluster = replace(clusters.find("dgx-h100"), nodes=nodes)
        rate = getattr(cluster, link)
        assert cluster.collective("recv", 2, 1, big, 16) == pytest.approx(big / rate, rel=1e-2)
    rack = replace(clusters.find("gb200-nvl72"), gpus_per_node=4, nodes=18)
    assert rack.way("recv", 2, 8, 1, 72).bandwidth == rack.fast


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
    time_of = lambda *group, **on: on.get("c", cluster).collective(*group, 32)  # noqa: E731
    assert time_of("all_reduce", 8, 1, 1e9) == pytest.approx(5e-5 + 1e9 / 2e11)
    assert time_of("all_reduce", 8, 1, 1e3) == pytest.approx(1e-5 + 1e3 / 1e10)  # the faster of the two lines
    assert time_of("all_reduce", 2, 4, 1e9) == pytest.approx(2e-5 + 1e9 / 4e11)
    halfway = 2e-5 * 2 / 3 + 5e-5 / 3 + 1e9 * (2 / 3 / 4e11 + 1 / 3 / 2e11)
    assert time_of("all_reduce", 4, 1, 1e9) == pytest.approx(halfway)
    assert time_of("all_reduce", 16, 1, 1e9) == pytest.approx(1e-4 + 1e9 / 1e11)
    assert time_of("recv", 2, 8, 1e9) == time_of("recv", 4, 8, 1e9) == pytest.approx(3e-5 + 1e9 / 5e10)
    for group in (("all_gather", 8, 1), ("all_reduce", 32, 1), ("all_reduce", 2, 8), ("all_gather", 12, 1)):
        assert time_of(*group, 1e9) == time_of(*group, 1e9, c=model), group  # NCCL's model elsewhere
    assert "measured: " in cluster.way("all_reduce", 8, 1, 1e9, 8).formula(1e9)
    assert "measured small: " in cluster.way("all_reduce", 8, 1, 1e3, 8).formula(1e3)
    assert clusters.from_dict(clusters.to_dict(cluster), "test") == cluster


@pytest.mark.parametrize("key", ["all_reduce x8 @8", "all_reduce 1x1", "sum 1x2", "recv 0x2", "recv 2x1 big"])
def test_a_link_by_another_name_is_refused(key):
    document = {"base": "dgx-h100", "links": {key: {"latency": 1e-5, "bandwidth": 1e11}}}
    with pytest.raises(ValueError, match=rf'links: {key}: a link is called "KIND DOMAINSxRANKS"'):
        clusters.from_dict(document, "mine.yaml")
