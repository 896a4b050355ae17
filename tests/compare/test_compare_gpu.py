"""What a comparison measures on GPUs only, without one: NVML through a stand-in, and the split of kernels."""

import ctypes
import time
import types
from types import SimpleNamespace

import pytest
import torch

from helix_megatron.compare import summary, workloads
from helix_megatron.measure import kernels, nvml
from helix_megatron.measure.comm import CommMeter

# ---- NVML


class NVMLError(Exception):
    """As pynvml's."""


def number(name, kind=ctypes.c_uint):
    return (name, kind)


class Metric(ctypes.Structure):
    _fields_ = [number("metricId"), number("nvmlReturn"), number("value", ctypes.c_double)]


class MetricsGet(ctypes.Structure):
    _fields_ = [
        number("version"),
        number("numMetrics"),
        number("sample1", ctypes.c_void_p),
        number("sample2", ctypes.c_void_p),
        ("metrics", Metric * 4),
    ]


class Value(ctypes.Union):
    _fields_ = [("dVal", ctypes.c_double), ("ullVal", ctypes.c_ulonglong)]


class FieldValue(ctypes.Structure):
    _fields_ = [number("fieldId"), number("scopeId"), number("nvmlReturn"), ("value", Value)]


class FakeNvml(types.ModuleType):
    """nvidia-ml-py's functions that `nvml` calls, with its signatures; a test says the GPU's numbers."""

    NVMLError = NVMLError
    NVML_SUCCESS, NOT_SUPPORTED = 0, 3
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX = 138, 139
    NVML_GPM_METRICS_GET_VERSION, NVML_GPM_METRIC_DRAM_BW_UTIL = 1, 10
    c_nvmlGpmMetricsGet_t = MetricsGet

    def __init__(self):
        super().__init__("pynvml")
        self.kib = {138: 1000, 139: 2000}
        self.links = self.monitor = True
        self.busy, self.memory, self.milliwatts, self.bandwidth = 50, 20, 300_000, 40.0
        self.refuses, self.refused = set(), []
        self.metric_return = self.NVML_SUCCESS
        self.freed, self.allocated, self.asked, self.open = [], 0, [], 0

    def _call(self, name):
        if name in self.refuses:
            self.refused.append(name)
            raise NVMLError("GPU is lost")

    def nvmlInit(self):
        self._call("nvmlInit")
        self.open += 1

    def nvmlShutdown(self):
        self._call("nvmlShutdown")
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index):
        assert isinstance(index, int)
        self.asked.append(index)
        return f"gpu {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.asked.append(uuid)
        return f"gpu {uuid}"

    def nvmlDeviceGetUtilizationRates(self, handle):
        self._call("utilization")
        return SimpleNamespace(gpu=self.busy, memory=self.memory)

    def nvmlDeviceGetPowerUsage(self, handle):
        self._call("power")
        return self.milliwatts

    def nvmlDeviceGetFieldValues(self, handle, fieldIds):
        self._call("fields")
        values = (FieldValue * len(fieldIds))()
        for value, (field, scope) in zip(values, fieldIds, strict=True):
            assert scope == 0xFFFFFFFF
            value.nvmlReturn = self.NVML_SUCCESS if self.links else self.NOT_SUPPORTED
            value.value.ullVal = self.kib[field]
        return values

    def nvmlGpmQueryDeviceSupport(self, device):
        self._call("gpm")
        return SimpleNamespace(isSupportedDevice=int(self.monitor))

    def nvmlGpmSampleAlloc(self):
        self.allocated += 1
        return self.allocated

    def nvmlGpmSampleGet(self, device, gpmSample):
        return gpmSample

    def nvmlGpmSampleFree(self, gpmSample):
        assert gpmSample not in self.freed
        self.freed.append(gpmSample)

    def nvmlGpmMetricsGet(self, metricsGet):
        self._call("metrics")
        assert (metricsGet.version, metricsGet.numMetrics, metricsGet.metrics[0].metricId) == (1, 1, 10)
        assert metricsGet.sample1 < metricsGet.sample2
        metricsGet.metrics[0].value = self.bandwidth
        metricsGet.metrics[0].nvmlReturn = self.metric_return
        return metricsGet


@pytest.fixture
def fake(monkeypatch):
    module = FakeNvml()
    monkeypatch.setitem(__import__("sys").modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(nvml, "_PERIOD_S", 1000.0)  # a test takes the samples itself
    return module


def test_units_and_means(fake):
    result = {}
    with nvml.watch_gpu(result, host=False) as watch:
        assert fake.asked == [1]
        watch.sample()
        fake.busy = fake.memory = 0  # the warm-up: forgotten
        watch.restart()
        fake.busy, fake.memory, fake.milliwatts, fake.bandwidth = 60, 30, 500_000, 50.0
        watch.sample()
        fake.busy, fake.memory, fake.milliwatts, fake.bandwidth = 80, 50, 700_000, 70.0
        watch.sample()
        fake.kib = {138: 1003, 139: 2005}
    assert result["gpu"] == {
        "samples": 2,
        "gpu_busy_percent": 70,
        "memory_busy_percent": 40,
        "memory_bandwidth_percent": 60,
        "watts": 600,
        "nvlink_bytes": {"sent": 3 * 1024, "received": 5 * 1024},
    }
    assert sorted(fake.freed) == list(range(1, fake.allocated + 1))  # every sample was given back
    assert fake.open == 0


def test_the_visible_gpu_is_the_one_that_is_watched(fake, monkeypatch):
    for visible, handle in (("3,5", 5), ("GPU-aa,GPU-bb", "GPU-bb"), ("4", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        nvml.GpuSampler(1)
        assert fake.asked.pop() == handle


def test_what_there_is_not_is_absent(fake):
    fake.links = fake.monitor = False
    result = {}
    with nvml.watch_gpu(result, host=False) as watch:
        watch.sample()
    assert set(result["gpu"]) == {"samples", "gpu_busy_percent", "memory_busy_percent", "watts"}
    fake.refuses = {"nvmlInit"}
    for host, refuses in ((False, {"nvmlInit"}), (True, set())):
        fake.refuses, result = refuses, {}
        with nvml.watch_gpu(result, host) as watch:
            assert watch is None
        assert result == {}


def test_a_monitor_that_answers_with_an_error(fake):
    """Of a performance monitor that is refused, or has no such metric, there is no bandwidth; all else is."""
    for refuses, answer in (({"gpm"}, fake.NVML_SUCCESS), (set(), fake.NOT_SUPPORTED)):
        fake.refuses, fake.metric_return, result = refuses, answer, {}
        with nvml.watch_gpu(result, host=False) as watch:
            watch.sample()
        assert "memory_bandwidth_percent" not in result["gpu"]
        assert result["gpu"]["watts"] == 300


def test_what_is_refused_is_not_asked_again_and_the_end_harms_nothing(fake):
    result = {}
    with nvml.watch_gpu(result, host=False) as watch:
        fake.refuses = {"power", "nvmlShutdown"}
        watch.sample()
        watch.sample()
    assert fake.refused == ["power", "nvmlShutdown"]
    assert result["gpu"]["samples"] == 2
    assert "watts" not in result["gpu"]


def test_no_nvml_at_all(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    result = {}
    with nvml.watch_gpu(result, host=False):
        pass
    assert result == {}


def test_an_error_in_the_middle_of_a_run(fake, monkeypatch):
    """The run goes on, the other numbers too; what stopped is absent and said, not averaged over a part."""
    monkeypatch.setattr(nvml, "_PERIOD_S", 0.001)
    result = {}
    with nvml.watch_gpu(result, host=False) as watch:

        def wait_for(condition):
            end = time.monotonic() + 20
            while not condition():
                assert time.monotonic() < end
                time.sleep(0.001)

        wait_for(lambda: watch.samples.get("watts"))
        fake.refuses = {"power", "fields"}
        wait_for(lambda: watch.errors)
        seen = len(watch.samples["gpu_busy_percent"])
        wait_for(lambda: len(watch.samples["gpu_busy_percent"]) > seen)  # the thread lives
    found = result["gpu"]
    assert found["errors"] == {"power": "GPU is lost"}
    assert "watts" not in found and "nvlink_bytes" not in found
    assert found["gpu_busy_percent"] == 50 and found["memory_bandwidth_percent"] == 40
    merged = summary.summarise_gpu([found, {**found, "errors": {}}])
    assert merged["errors"] == ["power: GPU is lost"]
    assert merged["memory_bandwidth_percent"] == 40
    some = [{**found, "watts": 300.0}, found]
    assert "watts" not in summary.summarise_gpu(some)  # a mean over some is none


# ---- where a GPU's time goes

CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


def event(name, start, end, device=CUDA, marked=False):
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, device_type=device, time_range=span, is_user_annotation=marked)


WHOLE = event("helix iteration", 100, 1100, CPU)


def test_kernels_that_overlap_are_split_once():
    events = [
        WHOLE,
        event("helix iteration", 150, 1090, marked=True),  # a mark on the GPU is no kernel
        event("Optimizer.step#Adam.step", 400, 1100, marked=True),
        event("nccl:all_reduce", 400, 900, marked=True),
        event("aten::mm", 100, 1000, CPU),
        event("softmax", 300, 450),  # on another stream, and seen before what began before it
        event("gemm", 150, 350),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 400, 650),  # 50 of it behind computing
        event("Memcpy DtoD", 700, 800),
        event("NCCL AllGather", 720, 760),  # all of it behind a copy
        event("gemm", 1050, 1300),  # 50 of it inside
        event("gemm", 10, 90),  # before
    ]
    found = kernels.split_time(events)
    expected = {"compute": 300 + 100 + 50, "communication": 200, "idle": 50 + 50 + 250}
    assert found == pytest.approx({k: 1e-6 * v for k, v in expected.items()})
    assert sum(found.values()) == pytest.approx(1000e-6)


def test_no_kernels_no_split():
    assert kernels.split_time([WHOLE, event("aten::mm", 200, 300, CPU)]) is None
    assert kernels.split_time([event("gemm", 200, 300)]) is None  # no iteration


def test_a_gpu_run_profiles_one_iteration_of_the_warm_up(monkeypatch):
    """With torch's own profiler over an iteration on the CPU, its kernels taken from what it recorded."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    whole = kernels.split_time
    seen = []

    def split(events):
        events = list(events)
        seen.append(events)
        ours = next(e for e in events if e.name == "helix iteration")
        middle = (ours.time_range.start + ours.time_range.end) / 2
        return whole([*events, event("gemm", ours.time_range.start, middle)])

    monkeypatch.setattr(kernels, "split_time", split)
    samples, meter = workloads.Samples(3, host=False), CommMeter()
    results = [samples.iteration(lambda n=n: (torch.ones(64, 64) @ torch.ones(64, 64), n)[1], meter)
               for n in range(5)]  # fmt: skip
    assert results == [0, 1, 2, 3, 4]
    assert len(seen) == 1  # iteration 1: the last of the warm-up is counted, the measured ones run untouched
    assert any(e.name == "aten::mm" and e.device_type == CPU for e in seen[0])
    assert samples.counted == 1
    taken = samples.as_json(1, 1)
    assert taken["split_seconds"]["compute"] == pytest.approx(taken["split_seconds"]["idle"])
    assert taken["split_seconds"]["communication"] == 0
    assert "split_seconds" not in workloads.Samples(1, host=False).as_json(1, 1)
    no_kernels = "a host has no kernels"
    monkeypatch.setattr(workloads.kernels, "profile_iteration", lambda body: pytest.fail(no_kernels))
    on_host = workloads.Samples(3, host=True)
    for _ in range(4):
        on_host.iteration(lambda: None, meter)


def test_the_split_of_ranks_and_runs_is_their_mean():
    def rank(compute):
        parts = {"compute": compute, "communication": 1.0, "idle": 0.5}
        counted = {"comm": {}, "comm_iterations": 1, "comm_seconds": [1.0]}
        return {
            "workloads": {
                "train": {"seconds": [5.0], "tokens": 1, "flops": 1, "split_seconds": parts, **counted}
            }
        }

    runs = [{"ranks": [rank(1.0), rank(2.0)]}, {"ranks": [rank(3.0), rank(6.0)]}]
    found = summary.summarise_workload(runs, "train", 2, False, None)
    assert found["split_seconds"] == {"compute": 3.0, "communication": 1.0, "idle": 0.5}
    del runs[1]["ranks"][1]["workloads"]["train"]["split_seconds"]  # one rank's profiler saw no kernel
    assert "split_seconds" not in summary.summarise_workload(runs, "train", 2, False, None)
