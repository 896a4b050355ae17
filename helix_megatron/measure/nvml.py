"""What NVML says of a rank's GPU while it works. Where there is no NVML, there is no such number.

Units as NVML's API reference has them: utilization in percent of the time between two samples of the
driver; power in milliwatts; NVLink's counters (fields 138 and 139) in KiB since the driver started, all links
together with the scope UINT_MAX; memory bandwidth (GPM, Hopper and later) in percent of the peak between two
samples.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_PERIOD_S = 0.2
_ALL_LINKS = 0xFFFFFFFF
_KIB = 1024
_GIVES = {  # what is asked → what its answer is called
    "utilization": ("gpu_busy_percent", "memory_busy_percent"),
    "power": ("watts",),
    "memory bandwidth": ("memory_bandwidth_percent",),
}


@contextmanager
def watch_gpu(result: dict[str, Any], host: bool) -> Iterator[GpuSampler | None]:
    """Sample this rank's GPU while entered; at the end result["gpu"] holds what `Watch.summary` gives.

    Yields the watch, whose `restart` forgets what was before (set-up, warm-up). Nothing is added in host
    mode, without nvidia-ml-py, or where NVML does not start.
    """
    try:
        watch = None if host else GpuSampler(int(os.environ.get("LOCAL_RANK", "0")))
    except Exception:  # NVML's own errors have no common base before it is imported
        watch = None
    if watch is None:
        yield None
        return
    thread = threading.Thread(target=watch.run, daemon=True, name="nvml")
    thread.start()
    try:
        yield watch
    finally:
        watch.stop.set()
        thread.join()
        result["gpu"] = watch.summary()
        watch.close()


class GpuSampler:
    """Samples of one GPU. A query that NVML refuses is not asked again, and what it had given is dropped."""

    def __init__(self, index: int) -> None:
        """index: this process's GPU among CUDA_VISIBLE_DEVICES (numbers or UUIDs). Raises NVML's errors."""
        import pynvml

        pynvml.nvmlInit()
        self.nvml, self.stop, self.lock = pynvml, threading.Event(), threading.Lock()
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        name = visible[index] if index < len(visible) else str(index)
        by_uuid = pynvml.nvmlDeviceGetHandleByUUID
        self.gpu = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.strip().isdigit() else by_uuid(name)
        self.errors: dict[str, str] = {}
        self.samples: dict[str, list[float]] = {}
        self.link_start: dict[str, int] | None = None
        self.before = self._gpm_sample()
        self.restart()

    def restart(self) -> None:
        """What follows is what counts."""
        with self.lock:
            self.samples = {}
            self.link_start = self._link_bytes()

    def run(self) -> None:
        """Sample until stopped."""
        while not self.stop.wait(_PERIOD_S):
            self.sample()

    def sample(self) -> None:
        """One sample of everything that this GPU gives."""
        queries = (self._utilization, self._power, self._bandwidth)
        with self.lock:
            for what, query in zip(_GIVES, queries):
                if what in self.errors:
                    continue
                try:
                    for name, value in query().items():
                        self.samples.setdefault(name, []).append(value)
                except self.nvml.NVMLError as error:
                    self.errors[what] = str(error)

    def _utilization(self) -> dict[str, float]:
        rates = self.nvml.nvmlDeviceGetUtilizationRates(self.gpu)
        return {"gpu_busy_percent": rates.gpu, "memory_busy_percent": rates.memory}

    def _power(self) -> dict[str, float]:
        return {"watts": self.nvml.nvmlDeviceGetPowerUsage(self.gpu) / 1e3}

    def _gpm_sample(self) -> Any:
        """A sample of the GPU's performance monitor; None where it has none."""
        try:
            if not self.nvml.nvmlGpmQueryDeviceSupport(self.gpu).isSupportedDevice:
                return None
            return self.nvml.nvmlGpmSampleGet(self.gpu, self.nvml.nvmlGpmSampleAlloc())
        except (self.nvml.NVMLError, AttributeError):  # older GPUs, older nvidia-ml-py
            return None

    def _bandwidth(self) -> dict[str, float]:
        """Percent of the memory's peak bandwidth since the sample before."""
        now, before = self._gpm_sample(), self.before
        self.before = now
        if now is None or before is None:
            return {}
        asked = self.nvml.c_nvmlGpmMetricsGet_t()
        asked.version, asked.numMetrics = self.nvml.NVML_GPM_METRICS_GET_VERSION, 1
        asked.sample1, asked.sample2 = before, now
        asked.metrics[0].metricId = self.nvml.NVML_GPM_METRIC_DRAM_BW_UTIL
        try:
            metric = self.nvml.nvmlGpmMetricsGet(asked).metrics[0]
        finally:
            self.nvml.nvmlGpmSampleFree(before)
        good = metric.nvmlReturn == self.nvml.NVML_SUCCESS
        return {"memory_bandwidth_percent": metric.value} if good else {}

    def _link_bytes(self) -> dict[str, int] | None:
        """Bytes that all NVLinks have sent and received since the driver started; None where not counted."""
        tx, rx = "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX"
        asked = [(getattr(self.nvml, field), _ALL_LINKS) for field in (tx, rx)]
        try:
            values = self.nvml.nvmlDeviceGetFieldValues(self.gpu, asked)
        except self.nvml.NVMLError:
            return None
        if any(value.nvmlReturn != self.nvml.NVML_SUCCESS for value in values):
            return None
        return {key: value.value.ullVal * _KIB for key, value in zip(("sent", "received"), values)}

    def summary(self) -> dict[str, Any]:
        """Means over the samples; what NVML did not give, or not to the end, is absent.

        gpu_busy_percent, memory_busy_percent: share of time with a kernel, with memory traffic;
        memory_bandwidth_percent: of the peak; watts; nvlink_bytes sent and received meanwhile; errors: what
        was refused, and NVML's words.
        """
        lost = {name for what in self.errors for name in _GIVES[what]}
        kept = {name: values for name, values in self.samples.items() if name not in lost}
        found: dict[str, Any] = {"samples": max(map(len, kept.values()), default=0)}
        found |= {name: sum(values) / len(values) for name, values in kept.items()}
        end = self._link_bytes()
        if end is not None and self.link_start is not None:
            found["nvlink_bytes"] = {key: end[key] - self.link_start[key] for key in end}
        return found | ({"errors": self.errors} if self.errors else {})

    def close(self) -> None:
        """Give the sample and NVML back."""
        try:
            if self.before is not None:
                self.nvml.nvmlGpmSampleFree(self.before)
            self.nvml.nvmlShutdown()
        except self.nvml.NVMLError:  # the driver has gone; the numbers are taken
            pass
