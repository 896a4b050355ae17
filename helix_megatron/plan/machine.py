"""This machine as a cluster: its GPUs as NVML tells them and which of them NVLink joins, else its cores.

Note [Boards]
    One chip is sold on boards of different memory and links: an A100 with 40 GB has 1.6 TB/s, with 80 GB 2.0;
    an H100 NVL or PCIe has no NVSwitch. So names are looked up whole, and an unknown one is refused.

    NVLink joins     the fast link is                     a domain is
    all GPUs         NVLink                               the machine (GB200: the preset's 72)
    sets of them     NVLink; adapters between sets        the smallest set
    not every one    PCIe                                 the machine
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from helix_megatron.plan.clusters import GB, find, gpu_preset
from helix_megatron.plan.hardware import Cluster

Reading = tuple[str, int, tuple[int, ...]]
"""Name, bytes of memory, and the GPUs that NVLink joins, itself among them, of one GPU."""

_A100, _NVL = "NVIDIA A100 data sheet", "data sheet (1,671 TFLOP/s bf16 with sparsity, half dense)"
# As NVML names them, without "NVIDIA": the preset with its adapters, GB/s of NVLink per direction (0: none),
# and where the preset has other rates bf16 and TF32 TFLOP/s, TB/s of memory, and their source.
BOARDS: dict[str, tuple[Any, ...]] = {
    "GB200": ("gb200-nvl72", 900),
    "B200": ("dgx-b200", 900),
    "H200": ("dgx-h200", 450),
    "H200 NVL": ("pcie-h100", 450, 835, 417, 4.8, f"NVIDIA H200 NVL {_NVL}"),
    "GH200 480GB": ("dgx-h100", 450, 989, 494, 4.0, "NVIDIA GH200 data sheet (H100, 96 GB, 4 TB/s)"),
    "GH200 144G HBM3e": ("dgx-h100", 450, 989, 494, 4.9, "NVIDIA GH200 data sheet (144 GB, 4.9 TB/s)"),
    "H100 80GB HBM3": ("dgx-h100", 450),
    "H100 NVL": ("pcie-h100", 300, 835, 417, 3.9, f"NVIDIA H100 NVL {_NVL}"),
    "H100 PCIe": ("pcie-h100", 300),
    "A100-SXM4-80GB": ("dgx-a100", 300),
    "A100-SXM4-40GB": ("dgx-a100", 300, 312, 156, 1.555, f"{_A100} (40 GB: 1,555 GB/s)"),
    "A100 80GB PCIe": ("dgx-a100", 300, 312, 156, 1.935, f"{_A100} (80 GB PCIe: 1,935 GB/s)"),
    "A100-PCIE-40GB": ("dgx-a100", 300, 312, 156, 1.555, f"{_A100} (40 GB PCIe: 1,555 GB/s)"),
    "L40S": ("pcie-l40s", 0),
}
_ACROSS_MACHINES = ("gb200-nvl72",)  # NVLink leaves the machine
_PCIE_4 = ("dgx-a100", "pcie-l40s")


def detect_machine() -> Cluster:
    """This machine's devices: GPUs as NVML names and counts them, with a preset's rates; else its cores."""
    found = read_gpus()
    return gpu_cluster(found) if found else host_cluster()


def host_cluster() -> Cluster:
    """The host preset with this machine's cores and memory."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return replace(
        find("host"),
        name=f"this machine ({cores} cores)",
        memory=psutil.virtual_memory().total / cores,  # a core's share
        gpus_per_node=cores,
        slots=cores,
    )


def gpu_cluster(found: Sequence[Reading]) -> Cluster:
    """The cluster that the GPUs of one machine make.

    Raises:
        ValueError: different GPUs, or some that are not known.
    """
    names = sorted({name.removeprefix("NVIDIA ") for name, _, _ in found})
    if len(names) > 1 or names[0] not in BOARDS:
        raise ValueError(
            f"no preset fits this machine's GPUs ({', '.join(names)}); known, all of one kind: "
            f"{', '.join(BOARDS)}. Describe others in a YAML file, for example {{base: dgx-h100, ...}}."
        )
    like, nvlink, *rates = BOARDS[names[0]]
    preset, count = find(like), len(found)
    if rates:
        tflops, tf32, memory_tbs, source = rates
        board = gpu_preset(like, (source, f"assumed: the adapters of {like}"), tflops=tflops, tf32=tf32,
                           memory_gb=0, memory_tbs=memory_tbs, fast_gbs=nvlink, slow_gbs=0)  # fmt: skip
        preset = replace(board, slow=preset.slow)
    joined, domain, said = _fast_link(sorted({joined for *_, joined in found}), count, nvlink, preset)
    pcie = find("pcie-l40s" if like in _PCIE_4 else "pcie-h100")
    return replace(
        preset,
        name=f"this machine ({count} x {names[0]})",
        memory=float(min(memory for _, memory, _ in found)),
        gpus_per_node=count,
        domain=domain,
        fast=0.8 * nvlink * GB if joined else pcie.fast,
        sources=(*preset.sources, f"NVML: {count} GPUs, {said}"),
    )


def _fast_link(
    sets: Sequence[tuple[int, ...]], count: int, nvlink: float, preset: Cluster
) -> tuple[bool, int, str]:
    """(whether the fast link is NVLink, devices of its domain, in words); see Note [Boards]."""
    smallest = min(len(joined) for joined in sets)
    shown = ", ".join("+".join(map(str, joined)) for joined in sets if len(joined) > 1)
    if nvlink and smallest == count and preset.name in _ACROSS_MACHINES:
        domain = max(count, preset.domain)
        words = f"assumed: {domain} over several machines (--domain {count}: not so)"
        return True, domain, f"NVLink joins all; {words}"
    if nvlink and 1 < smallest == count:
        return True, count, "NVLink joins all"
    if nvlink and smallest > 1:
        said = f"NVLink joins {shown}: domains of {smallest}, links between them as slow as adapters"
        order = list(chain(*sets))
        if order != sorted(order):
            said += f"; start ranks with CUDA_VISIBLE_DEVICES={','.join(map(str, order))}"
        return True, smallest, said
    return False, count, f"NVLink joins {shown or 'none'}: PCIe"


def read_gpus() -> list[Reading]:
    """This machine's GPUs; none where there is no driver.

    Raises:
        ValueError: there are GPUs, but NVML does not tell them.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # not installed, or no driver
        if any(Path("/dev").glob("nvidia[0-9]*")):
            raise ValueError(
                f"this machine's GPUs cannot be read by NVML ({error}); pip install nvidia-ml-py, see helix "
                "doctor, or name a preset."
            ) from error
        return []
    try:
        return _readings(pynvml)
    finally:
        pynvml.nvmlShutdown()


def _readings(nvml: Any) -> list[Reading]:
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    joined = [{index} for index in range(len(handles))]
    for a, b in combinations(range(len(handles)), 2):
        try:
            status = nvml.nvmlDeviceGetP2PStatus(handles[a], handles[b], nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        except nvml.NVMLError:  # boards that have none
            continue
        if status == nvml.NVML_P2P_STATUS_OK and joined[a] is not joined[b]:
            joined[a] |= joined[b]
            for index in joined[b]:
                joined[index] = joined[a]
    found = []
    for handle, group in zip(handles, joined):
        name = nvml.nvmlDeviceGetName(handle)
        name = name if isinstance(name, str) else name.decode()
        found.append((name, int(nvml.nvmlDeviceGetMemoryInfo(handle).total), tuple(sorted(group))))
    return found
