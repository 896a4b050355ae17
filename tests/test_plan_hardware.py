"""What the planner is told of machines: NVML's readings, groups over domains, measured lines, the probe."""

import sys
import types

import pytest

from helix_megatron.plan import clusters, inputs, nvml

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
