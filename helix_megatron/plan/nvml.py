"""This machine's GPUs as NVML tells them: what they are, and which of them NVLink joins.

Note [Boards]
    One chip is sold on boards of different memory and links: an A100 with 40 GB has 1.6 TB/s, with 80 GB 2.0;
    an H100 NVL or PCIe has no NVSwitch. So names are looked up whole, and an unknown one is refused.

    NVLink joins     the fast link is                     a domain is
    all GPUs         NVLink                               the machine (GB200: the preset's 72)
    sets of them     NVLink; adapters between sets        the smallest set
    not every one    PCIe                                 the machine
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from helix_megatron.plan import clusters
from helix_megatron.plan.hardware import Cluster

Reading = tuple[str, int, tuple[int, ...]]
"""Name, bytes of memory, and the GPUs that NVLink joins, itself among them, of one GPU."""


@dataclass(frozen=True)
class Board:
    """A GPU as sold.

    Args:
        cluster: its rates, and the adapters assumed between machines.
        nvlink: GB/s per direction where NVLink joins it with others; 0: it has none.
        pcie: the preset whose fast link is its PCIe.
    """

    cluster: Cluster
    nvlink: float
    pcie: str = "pcie-h100"


def _board(like: str, tflops: float, tf32: float, memory_tbs: float, nvlink: float, source: str) -> Board:
    """A board that no preset describes; adapters as `like` has them."""
    base = clusters.find(like)
    made = clusters.gpus(
        like, tflops=tflops, tf32=tf32, memory_gb=0, memory_tbs=memory_tbs, domain=8, fast_gbs=nvlink,
        slow_gbs=0, sources=(source, f"assumed: the adapters of {like}"),
    )  # fmt: skip
    pcie = "pcie-l40s" if "a100" in like else "pcie-h100"
    return Board(replace(made, slow=base.slow), nvlink, pcie)


_A100, _NVL = "NVIDIA A100 data sheet", "data sheet (1,671 TFLOP/s bf16 with sparsity, half dense)"
BOARDS = {  # as NVML names them, without "NVIDIA"
    "GB200": Board(clusters.find("gb200-nvl72"), 900),
    "B200": Board(clusters.find("dgx-b200"), 900),
    "H200": Board(clusters.find("dgx-h200"), 450),
    "H200 NVL": _board("pcie-h100", 835, 417, 4.8, 450, f"NVIDIA H200 NVL {_NVL}"),
    "GH200 480GB": _board("dgx-h100", 989, 494, 4.0, 450, "NVIDIA GH200 data sheet (H100, 96 GB, 4 TB/s)"),
    "GH200 144G HBM3e": _board("dgx-h100", 989, 494, 4.9, 450, "NVIDIA GH200 data sheet (144 GB, 4.9 TB/s)"),
    "H100 80GB HBM3": Board(clusters.find("dgx-h100"), 450),
    "H100 NVL": _board("pcie-h100", 835, 417, 3.9, 300, f"NVIDIA H100 NVL {_NVL}"),
    "H100 PCIe": Board(clusters.find("pcie-h100"), 300),
    "A100-SXM4-80GB": Board(clusters.find("dgx-a100"), 300, "pcie-l40s"),
    "A100-SXM4-40GB": _board("dgx-a100", 312, 156, 1.555, 300, f"{_A100} (40 GB: 1,555 GB/s)"),
    "A100 80GB PCIe": _board("dgx-a100", 312, 156, 1.935, 300, f"{_A100} (80 GB PCIe: 1,935 GB/s)"),
    "A100-PCIE-40GB": _board("dgx-a100", 312, 156, 1.555, 300, f"{_A100} (40 GB PCIe: 1,555 GB/s)"),
    "L40S": Board(clusters.find("pcie-l40s"), 0, "pcie-l40s"),
}
_ACROSS_MACHINES = ("gb200-nvl72",)  # NVLink leaves the machine


def of_gpus(found: Sequence[Reading]) -> Cluster:
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
    board, count = BOARDS[names[0]], len(found)
    sets = sorted({joined for _, _, joined in found})
    smallest = min(len(joined) for joined in sets)
    nvlink, domain = board.nvlink > 0, count
    if nvlink and smallest == count and board.cluster.name in _ACROSS_MACHINES:
        domain = max(count, board.cluster.domain)
        said = f"NVLink joins all; assumed: {domain} over several machines (--domain {count}: not so)"
    elif nvlink and 1 < smallest == count:
        said = "NVLink joins all"
    elif nvlink and smallest > 1:
        domain = smallest
        said = f"NVLink joins {_shown(sets)}: domains of {domain}, links between them as slow as adapters"
        order = list(chain(*sets))
        if order != sorted(order):
            said += f"; start ranks with CUDA_VISIBLE_DEVICES={','.join(map(str, order))}"
    else:
        nvlink = False
        said = f"NVLink joins {_shown(sets) or 'none'}: PCIe"
    return replace(
        board.cluster,
        name=f"this machine ({count} x {names[0]})",
        memory=float(min(memory for _, memory, _ in found)),
        gpus_per_node=count,
        domain=domain,
        fast=0.8 * board.nvlink * clusters.GB if nvlink else clusters.find(board.pcie).fast,
        sources=(*board.cluster.sources, f"NVML: {count} GPUs, {said}"),
    )


def _shown(sets: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("+".join(map(str, joined)) for joined in sets if len(joined) > 1)


def gpus() -> list[Reading]:
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

    def linked(a: int, b: int) -> bool:
        try:
            index = nvml.NVML_P2P_CAPS_INDEX_NVLINK
            return nvml.nvmlDeviceGetP2PStatus(handles[a], handles[b], index) == nvml.NVML_P2P_STATUS_OK
        except nvml.NVMLError:  # boards that have none
            return False

    joined = [{index} for index in range(len(handles))]
    for a in range(len(handles)):
        for b in range(a):
            if joined[a] is not joined[b] and linked(a, b):
                joined[a] |= joined[b]
                for index in joined[a]:
                    joined[index] = joined[a]
    found = []
    for handle, group in zip(handles, joined):
        name = nvml.nvmlDeviceGetName(handle)
        name = name if isinstance(name, str) else name.decode()
        found.append((name, int(nvml.nvmlDeviceGetMemoryInfo(handle).total), tuple(sorted(group))))
    return found
