"""Known clusters, and clusters in files.

Figures are the vendors' (dense, without sparsity; links per direction), and what is assumed of them is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from helix_megatron.megatron.yaml_config import check_keys, nearest
from helix_megatron.plan import cluster_fields
from helix_megatron.plan.hardware import Cluster, Line, Rate

GB = 1e9

_ASSUMED = "assumed: GEMM reaches 70 % of the peak, attention 50 %, memory and links 80 %; 2 to 8 us a launch"


def gpus(
    name: str,
    *,
    tflops: float,
    tf32: float,
    memory_gb: float,
    memory_tbs: float,
    domain: int,
    fast_gbs: float,
    slow_gbs: float,
    gpus_per_node: int = 8,
    sources: tuple[str, ...],
) -> Cluster:
    """GPUs with a data sheet's figures: dense bf16 and TF32, per device, links per direction."""
    bandwidth = 0.8 * memory_tbs * 1e12
    peak = tflops * 1e12
    attention = Rate(0.5 * peak, bandwidth)
    return Cluster(
        name,
        memory=memory_gb * GB,
        rates={
            "gemm": Rate(0.7 * peak, bandwidth, 2e-6),
            "gemm fp32": Rate(0.7 * tf32 * 1e12, bandwidth, 2e-6),
            "fused attention": attention,
            "unfused attention": attention,
            "cached attention": Rate(0.25 * peak, bandwidth, 4e-6),
            "repeated attention": Rate(0.25 * peak, bandwidth, 8e-6),
            "pass": Rate(peak, bandwidth, 8e-6),
            "update": Rate(peak, bandwidth, 8e-6),
        },
        gpus_per_node=gpus_per_node,
        domain=domain,
        fast=0.8 * fast_gbs * GB,
        slow=0.8 * slow_gbs * GB,
        reserve=4 * GB,
        sources=(*sources, _ASSUMED),
    )


_H100 = "NVIDIA H100 SXM data sheet (989 TFLOP/s bf16 dense, 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways)"
_CLUSTERS = (
    gpus("dgx-h100", tflops=989, tf32=494, memory_gb=80, memory_tbs=3.35, domain=8, fast_gbs=450,
         slow_gbs=50, sources=(_H100, "DGX H100 data sheet: one 400 Gb/s adapter per GPU")),
    gpus("dgx-h200", tflops=989, tf32=494, memory_gb=141, memory_tbs=4.8, domain=8, fast_gbs=450,
         slow_gbs=50, sources=("NVIDIA H200 data sheet (as H100, 141 GB, 4.8 TB/s)", "400 Gb/s per GPU")),
    gpus("dgx-a100", tflops=312, tf32=156, memory_gb=80, memory_tbs=2.039, domain=8, fast_gbs=300,
         slow_gbs=25,
         sources=("NVIDIA A100 80GB SXM data sheet (312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s both ways)",
                  "DGX A100: one 200 Gb/s adapter per GPU")),
    gpus("dgx-b200", tflops=2250, tf32=1125, memory_gb=180, memory_tbs=8, domain=8, fast_gbs=900,
         slow_gbs=50,
         sources=("DGX B200 data sheet (8 GPUs: 1,440 GB, 64 TB/s; 36 PFLOP/s bf16 with sparsity, half "
                  "dense: 2.25 each; NVLink 1.8 TB/s both ways)", "400 Gb/s per GPU")),
    gpus("gb200-nvl72", tflops=2500, tf32=1250, memory_gb=186, memory_tbs=8, domain=72, fast_gbs=900,
         slow_gbs=50, gpus_per_node=72,
         sources=("GB200 NVL72 data sheet (72 GPUs in one NVLink domain: 13.4 TB, 576 TB/s, 360 PFLOP/s "
                  "bf16 with sparsity, half dense)", "one 400 Gb/s adapter per GPU")),
    gpus("pcie-h100", tflops=756, tf32=378, memory_gb=80, memory_tbs=2.0, domain=8, fast_gbs=55,
         slow_gbs=12.5,
         sources=("NVIDIA H100 PCIe data sheet (756 TFLOP/s bf16 dense, 80 GB, 2 TB/s)",
                  "PCIe 5.0 x16 (64 GB/s, about 55 reached); assumed: one 400 Gb/s adapter per four GPUs")),
    gpus("pcie-l40s", tflops=362, tf32=183, memory_gb=48, memory_tbs=0.864, domain=8, fast_gbs=26,
         slow_gbs=12.5,
         sources=("NVIDIA L40S data sheet (362 TFLOP/s bf16 dense, 48 GB, 864 GB/s)",
                  "PCIe 4.0 x16 (32 GB/s, about 26 reached); assumed: one 400 Gb/s adapter per four GPUs")),
)  # fmt: skip

_HOST = Cluster(
    "host",
    memory=8 * GB,
    rates={
        "gemm": Rate(4e10, 8e9, 2e-5),
        "fused attention": Rate(2e10, 8e9, 3e-5),
        "unfused attention": Rate(1e10, 2e9, 1e-4),
        "cached attention": Rate(1e10, 2e9, 1e-4),
        "repeated attention": Rate(1e10, 2e9, 1e-4),
        "pass": Rate(1e10, 4e9, 2e-4),
        "update": Rate(1e10, 4e9, 0.0),
    },
    gpus_per_node=2,
    domain=1 << 20,
    reserve=1 * GB,
    slots=2,
    layer_overhead={"train megatron": 2e-3, "prefill megatron": 1e-3, "decode megatron": 1e-3},
    lines={
        # Two cores: latency grows with the number of ranks, which take turns; bandwidth is a memory copy's.
        **{f"all_reduce x{p} @{p}": Line(0.3e-3 * p * p / 4, 1e9 / p) for p in (2, 4, 8, 16)},
        **{f"{kind} x{p} @{p}": Line(0.2e-3 * p * p / 4, 1e9 / p)
           for kind in ("all_gather", "reduce_scatter", "all_to_all", "recv") for p in (2, 4, 8, 16)},
    },
    fused=False,
    sources=("rough constants of two cores and gloo; measure yours: helix plan --probe FILE",),
)  # fmt: skip
CLUSTERS: dict[str, Cluster] = {cluster.name: cluster for cluster in (*_CLUSTERS, _HOST)}
_RATES = sorted({kind for cluster in CLUSTERS.values() for kind in cluster.rates})


# ---- files ----
def to_dict(cluster: Cluster) -> dict[str, Any]:
    """Plain types, for YAML and JSON."""
    return {**asdict(cluster), "sources": list(cluster.sources)}


def from_dict(document: Mapping[str, Any], where: str) -> Cluster:
    """Inverse of to_dict; `base: PRESET` starts from a preset.

    Without a `domain` the fast link joins as many nodes as the preset's does (see `resized`).

    Raises:
        ValueError: naming the file, the field, its value and its unit.
    """
    check_keys(document, [*(f.name for f in fields(Cluster)), "base"], where)
    values = {
        key: cluster_fields.read(key, value, f"{where}: {key}", _RATES)
        for key, value in document.items()
        if key != "base"
    }
    if "base" in document:
        base = find(str(document["base"]))
        if "rates" in values:
            values["rates"] = {**base.rates, **values["rates"]}
        sized = resized(base, values.get("gpus_per_node", base.gpus_per_node))
        return checked(replace(sized, **values), where)
    for key in ("name", "memory", "rates"):
        if key not in values:
            raise ValueError(f"{where} has no {key}; give it, or start from a preset with base: NAME.")
    values.setdefault("domain", values.get("gpus_per_node", Cluster.gpus_per_node))
    return checked(Cluster(**values), where)


def resized(cluster: Cluster, gpus_per_node: int, nodes: int | None = None) -> Cluster:
    """`cluster` with other nodes: the fast link joins as many machines as before, and no more."""
    joined, inside = divmod(cluster.domain, cluster.gpus_per_node)
    domain = joined * gpus_per_node if joined else min(inside, gpus_per_node)
    return replace(
        cluster,
        gpus_per_node=gpus_per_node,
        nodes=nodes or cluster.nodes,
        domain=cluster.domain if cluster.lines else domain,  # lines are of any group
    )


def checked(cluster: Cluster, where: str) -> Cluster:
    """`cluster`, where its fields go together. ValueError that names those that do not."""
    if cluster.reserve >= cluster.memory:
        raise ValueError(
            f"{where}: a device has {cluster.memory / GB:g} GB of memory, and {cluster.reserve / GB:g} GB of "
            "them are kept for context and communicators (reserve): nothing is left for a model."
        )
    if not cluster.lines:
        for name, needed in (("fast", cluster.devices > 1), ("slow", cluster.devices > cluster.domain)):
            if needed and not getattr(cluster, name):
                raise ValueError(
                    f"{where}: {name} is 0 bytes/s for {cluster.devices} devices, {cluster.domain} in a "
                    "domain; give it, or start from a preset with base: NAME."
                )
    return cluster


def find(name: str) -> Cluster:
    """A preset by its name. ValueError with the nearest name, and all of them."""
    cluster = CLUSTERS.get(name.lower())
    if cluster is None:
        close = nearest(name.lower(), CLUSTERS) or "."
        raise ValueError(
            f"no cluster preset or file is called {name!r}{close} Presets: {', '.join(CLUSTERS)}."
        )
    return cluster
