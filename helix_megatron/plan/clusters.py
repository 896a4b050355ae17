"""Known clusters, and clusters in YAML files.

Figures are the vendors' (dense, without sparsity; links per direction), and what is assumed of them is said.
A file has the fields of `hardware.Cluster`; every error names file, field, value and unit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from itertools import product
from math import isfinite
from typing import Any

from helix_megatron.megatron.yaml_config import check_keys, nearest
from helix_megatron.plan.decode_launches import FLASH_START
from helix_megatron.plan.hardware import Cluster, Line, Rate, overhead_key
from helix_megatron.plan.layout import ELEMENT_BYTES, KINDS

GB = 1e9
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "recv")
_ASSUMED = ("assumed: GEMM reaches 70 % of the peak, attention 50 %, memory and links 80 %; 2 to 8 us a "
            "launch; measured on an H200: launches of a decode step (decode_launches.py)")  # fmt: skip


def gpu_preset(
    name: str, sources: tuple[str, ...], *, tflops: float, tf32: float, memory_gb: float, memory_tbs: float,
    fast_gbs: float, slow_gbs: float, domain: int = 8, gpus_per_node: int = 8,
) -> Cluster:  # fmt: skip
    """GPUs with a data sheet's figures: dense bf16 and TF32, per device, links per direction."""
    bandwidth, peak = 0.8 * memory_tbs * 1e12, tflops * 1e12
    attention = Rate(0.5 * peak, bandwidth)
    return Cluster(
        name,
        memory=memory_gb * GB,
        rates={
            "gemm": Rate(0.7 * peak, bandwidth, 2e-6),
            "gemm fp32": Rate(0.7 * tf32 * 1e12, bandwidth, 2e-6),
            "fused attention": attention,
            "unfused attention": attention,
            "cached attention": Rate(0.25 * peak, bandwidth, FLASH_START),
            "repeated attention": Rate(0.25 * peak, bandwidth, 2 * FLASH_START),
            "pass": Rate(peak, bandwidth, 8e-6),
            "norm": Rate(peak, bandwidth, 2e-6),
            "packing": Rate(peak, bandwidth, 2e-6),
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
_QUARTER = "assumed: one 400 Gb/s adapter per four GPUs"
_GPUS = (
    gpu_preset("dgx-h100", (_H100, "DGX H100 data sheet: one 400 Gb/s adapter per GPU"),
               tflops=989, tf32=494, memory_gb=80, memory_tbs=3.35, fast_gbs=450, slow_gbs=50),
    gpu_preset("dgx-h200", ("NVIDIA H200 data sheet (as H100, 141 GB, 4.8 TB/s)", "400 Gb/s per GPU"),
               tflops=989, tf32=494, memory_gb=141, memory_tbs=4.8, fast_gbs=450, slow_gbs=50),
    gpu_preset("dgx-a100",
               ("NVIDIA A100 80GB SXM data sheet (312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s both ways)",
                "DGX A100: one 200 Gb/s adapter per GPU"),
               tflops=312, tf32=156, memory_gb=80, memory_tbs=2.039, fast_gbs=300, slow_gbs=25),
    gpu_preset("dgx-b200",
               ("DGX B200 data sheet (8 GPUs: 1,440 GB, 64 TB/s; 36 PFLOP/s bf16 with sparsity, half "
                "dense: 2.25 each; NVLink 1.8 TB/s both ways)", "400 Gb/s per GPU"),
               tflops=2250, tf32=1125, memory_gb=180, memory_tbs=8, fast_gbs=900, slow_gbs=50),
    gpu_preset("gb200-nvl72",
               ("GB200 NVL72 data sheet (72 GPUs in one NVLink domain: 13.4 TB, 576 TB/s, 360 PFLOP/s "
                "bf16 with sparsity, half dense)", "one 400 Gb/s adapter per GPU"),
               tflops=2500, tf32=1250, memory_gb=186, memory_tbs=8, fast_gbs=900, slow_gbs=50,
               domain=72, gpus_per_node=72),
    gpu_preset("pcie-h100",
               ("NVIDIA H100 PCIe data sheet (756 TFLOP/s bf16 dense, 80 GB, 2 TB/s)",
                f"PCIe 5.0 x16 (64 GB/s, about 55 reached); {_QUARTER}"),
               tflops=756, tf32=378, memory_gb=80, memory_tbs=2.0, fast_gbs=55, slow_gbs=12.5),
    gpu_preset("pcie-l40s",
               ("NVIDIA L40S data sheet (362 TFLOP/s bf16 dense, 48 GB, 864 GB/s)",
                f"PCIe 4.0 x16 (32 GB/s, about 26 reached); {_QUARTER}"),
               tflops=362, tf32=183, memory_gb=48, memory_tbs=0.864, fast_gbs=26, slow_gbs=12.5),
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
    # Two cores: latency grows with the number of ranks, which take turns; bandwidth is a memory copy's.
    lines={f"{kind} x{p} @{p}": Line((0.3e-3 if kind == "all_reduce" else 0.2e-3) * p * p / 4, 1e9 / p)
           for kind in COLLECTIVES for p in (2, 4, 8, 16)},
    fused=False,
    sources=("rough constants of two cores and gloo; measure yours: helix plan --probe FILE",),
)  # fmt: skip
CLUSTERS: dict[str, Cluster] = {cluster.name: cluster for cluster in (*_GPUS, _HOST)}
_RATES = sorted({kind for cluster in CLUSTERS.values() for kind in cluster.rates})


def find(name: str) -> Cluster:
    """A preset by its name. ValueError with the nearest name, and all of them."""
    cluster = CLUSTERS.get(name.lower())
    if cluster is None:
        close = nearest(name.lower(), CLUSTERS) or "."
        raise ValueError(
            f"no cluster preset or file is called {name!r}{close} Presets: {', '.join(CLUSTERS)}."
        )
    return cluster


def resize(cluster: Cluster, gpus_per_node: int, nodes: int | None = None) -> Cluster:
    """`cluster` with other nodes: the fast link joins as many machines as before, and no more."""
    joined, inside = divmod(cluster.domain, cluster.gpus_per_node)
    domain = joined * gpus_per_node if joined else min(inside, gpus_per_node)
    if cluster.lines:  # lines are of any group
        domain = cluster.domain
    return replace(cluster, gpus_per_node=gpus_per_node, nodes=nodes or cluster.nodes, domain=domain)


def check_cluster(cluster: Cluster, where: str) -> Cluster:
    """`cluster`, where its fields go together. ValueError that names those that do not."""
    if cluster.reserve >= cluster.memory:
        raise ValueError(
            f"{where}: a device has {cluster.memory / GB:g} GB of memory, and {cluster.reserve / GB:g} GB of "
            "them are kept for context and communicators (reserve): nothing is left for a model."
        )
    needed = {"fast": cluster.devices > 1, "slow": cluster.devices > cluster.domain}
    for name in [] if cluster.lines else [name for name in needed if needed[name]]:
        if not getattr(cluster, name):
            raise ValueError(
                f"{where}: {name} is 0 bytes/s for {cluster.devices} devices, {cluster.domain} in a "
                "domain; give it, or start from a preset with base: NAME."
            )
    return cluster


# ---- files ----
_CHOICES = (KINDS, (False, True), ("a2a", "all_reduce"), ("heads", "dims"), ("sequence", "dim"))
_OVERHEADS = sorted({overhead_key(*chosen) for chosen in product(*_CHOICES)})
# (unit, least, most); zero is allowed where the last is true.
_NUMBERS: dict[str, tuple[str, float, float, bool]] = {
    "memory": ("bytes", 1e8, 1e15, False),
    "reserve": ("bytes", 1e6, 1e15, True),
    "fast": ("bytes/s", 1e6, 1e15, True),
    "slow": ("bytes/s", 1e6, 1e15, True),
    "flops": ("FLOP/s", 1e6, 1e18, False),
    "bandwidth": ("bytes/s", 1e3, 1e15, False),
    "launch": ("seconds", 0.0, 1.0, True),
    "latency": ("seconds", 1e-9, 100.0, False),
    "overhead": ("seconds", 0.0, 1e4, True),
}
_COUNTS = {"gpus_per_node": 1, "nodes": 1, "domain": 1, "slots": 0}
_LINE = re.compile(rf"({'|'.join(COLLECTIVES)}) x(\d+) @(\d+)")
_LINK = re.compile(rf"({'|'.join(COLLECTIVES)}) (\d+)x(\d+)( small)?")


def to_dict(cluster: Cluster) -> dict[str, Any]:
    """Plain types, for YAML and JSON."""
    return {**asdict(cluster), "sources": list(cluster.sources)}


def from_dict(document: Mapping[str, Any], where: str) -> Cluster:
    """Inverse of to_dict; `base: PRESET` starts from a preset.

    Without a `domain` the fast link joins as many nodes as the preset's does (see `resize`).

    Raises:
        ValueError: naming the file, the field, its value and its unit.
    """
    check_keys(document, [*(f.name for f in fields(Cluster)), "base"], where)
    values = {key: _field(key, value, f"{where}: {key}") for key, value in document.items() if key != "base"}
    if "base" in document:
        base = find(str(document["base"]))
        if "rates" in values:
            values["rates"] = {**base.rates, **values["rates"]}
        sized = resize(base, values.get("gpus_per_node", base.gpus_per_node))
        return check_cluster(replace(sized, **values), where)
    for key in ("name", "memory", "rates"):
        if key not in values:
            raise ValueError(f"{where} has no {key}; give it, or start from a preset with base: NAME.")
    values.setdefault("domain", values.get("gpus_per_node", Cluster.gpus_per_node))
    return check_cluster(Cluster(**values), where)


def _field(name: str, value: Any, where: str) -> Any:
    """The value of a field as Cluster has it. ValueError for a wrong type or value, or an unknown key."""
    need = ""
    if name in _COUNTS and (isinstance(value, bool) or not isinstance(value, int) or value < _COUNTS[name]):
        need = f"a whole number of at least {_COUNTS[name]}"
    elif name in ("rates", "lines", "links", "layer_overhead", "step_overhead"):
        if isinstance(value, dict):
            return _entries(name, value, where)
        need = "it is a mapping"
    elif name == "fused" and not isinstance(value, bool):
        need = "it is true (Transformer Engine's layers) or false"
    elif name == "name" and not (isinstance(value, str) and value):
        need = "a text"
    elif name == "sources":
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        need = "a list of texts"
    elif name in _NUMBERS:
        return _number(name, value, where)
    if need:
        raise ValueError(f"{where} is {value!r}; {need}.")
    return value


def _number(name: str, value: Any, where: str) -> float:
    """A finite number of the field's unit, within its limits; YAML reads 5e10 as text, which is taken too."""
    unit, least, most, zero = _NUMBERS[name]
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        number = float("nan")
    if not isfinite(number):
        raise ValueError(f"{where} is {value!r}; a number of {unit}.")
    if least <= number <= most or (zero and number == 0):
        return number
    small = 0 < number < least and unit != "seconds"
    hint = f"; {number:g} G{unit[0].upper()} is {number * 1e9:.1e}" if small else ""
    raise ValueError(f"{where} is {value!r} {unit}; it is between {least:g} and {most:g} {unit}{hint}.")


def _entries(name: str, value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The entries of a mapping: Rate, Line, or seconds of software."""
    if name.endswith("overhead"):
        check_keys(value, _OVERHEADS if name == "layer_overhead" else KINDS, where)
        return {key: _number("overhead", seconds, f"{where}: {key}") for key, seconds in value.items()}
    if name == "rates":
        of_dtype = (f"{rate} {dtype}" for rate in _RATES for dtype in ELEMENT_BYTES)
        check_keys(value, {*_RATES, *of_dtype}, where)
    kind = Rate if name == "rates" else Line
    all_keys = [f.name for f in fields(kind)]  # the first two are needed
    found = {}
    for key, entry in value.items():
        here = f"{where}: {key}"
        _check_entry_name(name, str(key), here)
        if not isinstance(entry, dict):
            raise ValueError(f"{here} is {entry!r}; it is a mapping of {', '.join(all_keys)}.")
        check_keys(entry, all_keys, here)
        for part in all_keys[:2]:
            if part not in entry:
                raise ValueError(f"{here} has no {part}, a number of {_NUMBERS[part][0]}.")
        found[key] = kind(**{part: _number(part, given, f"{here}: {part}") for part, given in entry.items()})
    if name == "lines" and value and not any(key.startswith("all_reduce ") for key in value):
        raise ValueError(f"{where} has no all_reduce, which stands in for what was not measured.")
    return found


def _check_entry_name(name: str, key: str, where: str) -> None:
    """ValueError where `key` is no name of a measured collective."""
    kinds = ", ".join(COLLECTIVES)
    if name == "lines":
        line = _LINE.fullmatch(key)
        if not line:
            raise ValueError(f'{where}: a line is called "KIND xSIZE @BUSY"; kinds: {kinds}.')
        if not 2 <= int(line[2]) <= int(line[3]):
            raise ValueError(f"{where}: a group has 2 ranks or more, at most the {line[3]} that are busy.")
    if name == "links":
        link = _LINK.fullmatch(key)
        if not link or int(link[2]) * int(link[3]) < 2:
            raise ValueError(
                f'{where}: a link is called "KIND DOMAINSxRANKS", ranks of each domain, two or more in all, '
                f"and for small messages the same with small behind it; kinds: {kinds}."
            )
