"""What NVML says of a rank's GPU while it works. Where there is no NVML, there is no such number."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_PERIOD_S = 0.2
_ALL_LINKS = 0xFFFFFFFF


@contextmanager
def watched(result: dict[str, Any], host: bool) -> Iterator[None]:
    """Sample this rank's GPU while entered; at the end result["gpu"] holds what `Watch.summary` gives.

    Nothing is added in host mode, without nvidia-ml-py, or where NVML does not start.
    """
    try:
        watch = None if host else Watch(int(os.environ.get("LOCAL_RANK", "0")))
    except Exception:  # NVML's own errors have no common base before it is imported
        watch = None
    if watch is None:
        yield
        return
    thread = threading.Thread(target=watch.run, daemon=True, name="nvml")
    thread.start()
    try:
        yield
    finally:
        watch.stop.set()
        thread.join()
        result["gpu"] = watch.summary()


class Watch:
    """Samples of one GPU."""

    def __init__(self, index: int) -> None:
        import pynvml

        pynvml.nvmlInit()
        self.nvml, self.stop = pynvml, threading.Event()
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        name = visible[index] if index < len(visible) else str(index)
        by_uuid = pynvml.nvmlDeviceGetHandleByUUID
        self.gpu = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.strip().isdigit() else by_uuid(name)
        self.busy: list[float] = []
        self.memory_busy: list[float] = []
        self.watts: list[float] = []
        self.link_start = self._link_bytes()

    def run(self) -> None:
        """Sample until stopped."""
        while not self.stop.wait(_PERIOD_S):
            rates = self.nvml.nvmlDeviceGetUtilizationRates(self.gpu)
            self.busy.append(rates.gpu)
            self.memory_busy.append(rates.memory)
            self.watts.append(self.nvml.nvmlDeviceGetPowerUsage(self.gpu) / 1e3)

    def _link_bytes(self) -> dict[str, int] | None:
        """Bytes that all NVLinks have sent and received since the driver started; None where not counted."""
        ids = {
            "sent": self.nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
            "received": self.nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
        }
        counted = {}
        for direction, field in ids.items():
            try:
                value = self.nvml.nvmlDeviceGetFieldValues(self.gpu, [(field, _ALL_LINKS)])[0]
            except self.nvml.NVMLError:
                return None
            if value.nvmlReturn != self.nvml.NVML_SUCCESS:
                return None
            counted[direction] = value.value.ullVal * 1024  # NVML counts KiB
        return counted

    def summary(self) -> dict[str, Any]:
        """Means over the samples; what NVML did not give is absent.

        gpu_busy_percent, memory_busy_percent: share of time with a kernel, with memory traffic (NVML's
        "utilization"; not the bandwidth reached); watts; nvlink_bytes sent and received meanwhile.
        """
        found: dict[str, Any] = {"samples": len(self.busy)}
        series = {"gpu_busy_percent": self.busy, "memory_busy_percent": self.memory_busy, "watts": self.watts}
        found |= {name: sum(values) / len(values) for name, values in series.items() if values}
        end = self._link_bytes()
        if end is not None and self.link_start is not None:
            found["nvlink_bytes"] = {key: end[key] - self.link_start[key] for key in end}
        return found
