"""`helix doctor`: what is installed on this machine, what that enables, and what is wrong.

Nothing here is measured and nothing is run on a GPU: `helix check` does that. Versions are read without
importing the packages, except torch and megatron.core: those must import, and a broken Transformer Engine
shows as a megatron.core that does not.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from typing import Any

from helix_megatron import compat
from helix_megatron.measure.machine import installed_version

# What the report calls it → names of the distribution that brings it (a container's may differ).
PACKAGES = {
    "helix-megatron": ("helix-megatron",),
    "torch": ("torch",),
    "megatron-core": ("megatron-core",),
    "transformer-engine": ("transformer-engine", "transformer-engine-torch"),
    "apex": ("apex",),
    "flash-attn": ("flash-attn",),
    "flash-attn-3": ("flash-attn-3", "flashattn-hopper"),
    "flash-attn-4": ("flash-attn-4",),
    "triton": ("triton", "pytorch-triton"),
}


def examine() -> dict[str, Any]:
    """The whole report, of plain JSON types; `fit` is the verdict and `mode` says for what."""
    problems: list[str] = []
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {name: installed_version(*distributions) for name, distributions in PACKAGES.items()}
    versions["nccl"] = None
    cuda = gpus_usable = 0
    works = sys.version_info >= (3, 12)
    if not works:
        problems.append(f"Python {versions['python']} is too old; Helix needs 3.12 or later")
    try:
        import torch

        versions["torch"] = torch.__version__
        cuda = torch.version.cuda
        gpus_usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if torch.distributed.is_available() and torch.distributed.is_nccl_available():
            versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception as error:  # a half-installed torch raises anything
        works = False
        problems.append(f"torch cannot be imported ({_one_line(error)}); install torch >= 2.7")
    else:
        works &= _check_megatron(versions, problems)
    gpus, topology = find_gpus(problems)
    if gpus and not gpus_usable:
        built = f"was built for CUDA {cuda}" if cuda else "was built without CUDA"
        problems.append(
            f"the driver shows {len(gpus)} GPUs and torch sees none: torch {versions['torch']} {built}, the "
            f"driver is {gpus[0]['driver']}; install a torch for that driver, or look at CUDA_VISIBLE_DEVICES"
        )
    hopper = any("H100" in gpu["name"] or "H200" in gpu["name"] for gpu in gpus)
    if hopper and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1":
        problems.append("on Hopper with tensor parallelism set CUDA_DEVICE_MAX_CONNECTIONS=1")
    mode = ("gpu" if gpus_usable else "host") if works else "none"
    return {
        "fit": works,
        "mode": mode,
        "versions": versions,
        "gpus": gpus,
        "topology": topology,
        "features": _features(mode, versions, gpus_usable),
        "problems": problems,
    }


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _check_megatron(versions: dict[str, str | None], problems: list[str]) -> bool:
    """Whether the megatron.core that would be imported is one Helix knows, and imports."""
    try:
        versions["megatron-core"] = compat.version()
        compat.megatron()
        if compat.has_training():
            from megatron.training import arguments  # noqa: F401
    except ValueError as error:
        problems.append(" ".join(str(error).split()))
        return False
    except Exception as error:
        te = versions["transformer-engine"]
        hint = f"; Transformer Engine {te} may not fit torch" if te else ""
        problems.append(f"megatron-core cannot be imported ({_one_line(error)}){hint}")
        return False
    return True


def _features(mode: str, versions: dict[str, str | None], gpus: int) -> dict[str, str]:
    te, apex = (versions[name] for name in ("transformer-engine", "apex"))
    flash = next((versions[n] for n in ("flash-attn", "flash-attn-3", "flash-attn-4") if versions[n]), None)
    on_gpus = mode == "gpu"
    runs = {
        "gpu": f"yes, on {gpus} GPUs",
        "host": "no: no GPU that torch can use; fit for host mode only (--helix-host-mode)",
        "none": "no: see what is wrong",
    }
    trains = "no"
    if mode != "none":
        trains = "yes" if compat.has_training() else "no: this megatron-core has none that Helix serves"
    return {
        "Megatron's flags and training loop": trains,
        "training on GPUs": runs[mode],
        "host mode": {"gpu": "refused where a GPU is", "host": "yes", "none": "no"}[mode],
        "Transformer Engine's attention and fp8": "yes"
        if on_gpus and te
        else _lacks("transformer-engine", te),
        "fused attention without it": "yes, PyTorch's" if mode != "none" else "no",
        "fused Adam": "yes" if on_gpus and (te or apex) else "no: PyTorch's Adam serves",
        "Megatron's dynamic inference engine": "yes, with m = 1"
        if on_gpus and flash
        else _lacks("flash-attn", flash),
        "attention over a cache of positions shared by ranks": _cache_attention(on_gpus)
        if mode != "none"
        else "no",
    }


def _cache_attention(on_gpus: bool) -> str:
    """The kernel for a usual cache (bf16, heads of 128, 256 slots of a page on a rank), and why that one."""
    import torch

    from helix_megatron.kernels import flash, selection

    device, major = ("cuda", torch.cuda.get_device_capability()[0]) if on_gpus else ("cpu", None)
    override = os.environ.get(selection.OVERRIDE)
    try:
        choice = selection.choose(
            device, torch.bfloat16, 256, False, override, major=major, compare=False
        )  # nothing runs on the GPU here
    except ValueError as error:
        return f"no: {_one_line(error)}"
    later = "; compared with a known answer before its first use" if choice.singles in flash.FLASH else ""
    return choice.reason + later


def _lacks(name: str, version: str | None) -> str:
    return f"no: needs a GPU ({name} {version} is installed)" if version else f"no: needs {name}"


def find_gpus(problems: list[str]) -> tuple[list[dict[str, Any]], list[list[str]] | None]:
    """Every GPU of the machine and how each pair is connected: from NVML if importable, else nvidia-smi."""
    try:
        if importlib.util.find_spec("pynvml") is not None:
            return _from_nvml()
        if shutil.which("nvidia-smi"):
            return _from_nvidia_smi()
    except Exception as error:  # a driver that does not answer is a finding, not the end of the report
        problems.append(f"the NVIDIA driver does not answer: {_one_line(error)}")
    return [], None


def _from_nvml() -> tuple[list[dict[str, Any]], list[list[str]]]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return [], []  # no driver: a machine without GPUs
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]

        def link(a: Any, b: Any) -> str:
            if a == b:
                return "X"
            if pynvml.nvmlDeviceGetP2PStatus(a, b, pynvml.NVML_P2P_CAPS_INDEX_NVLINK) == 0:
                return "NV"
            level = pynvml.nvmlDeviceGetTopologyCommonAncestor(a, b)
            return {10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}.get(level, "PIX")

        gpus = [
            {
                "name": _text(pynvml.nvmlDeviceGetName(handle)),
                "memory_gib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
                "driver": driver,
            }
            for handle in handles
        ]
        return gpus, [[link(a, b) for b in handles] for a in handles]
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _from_nvidia_smi() -> tuple[list[dict[str, Any]], list[list[str]]]:
    def ask(*arguments: str) -> list[str]:
        run = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60)
        if run.returncode:
            raise RuntimeError(
                (run.stderr or run.stdout).strip() or f"nvidia-smi exited with {run.returncode}"
            )
        return run.stdout.splitlines()

    gpus = []
    for line in ask("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"):
        name, mebibytes, driver = (field.strip() for field in line.split(","))
        gpus.append({"name": name, "memory_gib": round(float(mebibytes) / 1024, 1), "driver": driver})
    # GPU0  X  NV18 … and then affinities; the line of the columns' names does not begin with one
    rows = [line.split() for line in ask("topo", "-m") if line.startswith("GPU")]
    return gpus, [row[1 : 1 + len(gpus)] for row in rows]


def show(report: dict[str, Any], console: Any) -> None:
    """The report as tables."""
    from rich.table import Table

    def table(title: str, rows: Any, *columns: str) -> None:
        printed = Table(*columns, title=title, title_justify="left", show_header=bool(columns))
        for row in rows:
            printed.add_row(*row)
        console.print(printed)

    table("Versions", ((name, version or "-") for name, version in report["versions"].items()))
    if report["gpus"]:
        rows = (
            (str(i), gpu["name"], f"{gpu['memory_gib']} GiB", gpu["driver"], " ".join(links))
            for i, (gpu, links) in enumerate(
                zip(report["gpus"], report["topology"] or [[]] * len(report["gpus"]))
            )
        )
        table(
            "GPUs",
            rows,
            "GPU",
            "name",
            "memory",
            "driver",
            "links (NV: NVLink, PIX … SYS: farther and farther)",
        )
    table("What this enables", report["features"].items())
    for problem in report["problems"]:
        console.print(f"wrong: {problem}", style="red", markup=False)
    verdict = {"gpu": "fit for GPUs", "host": "fit for host mode only: no usable GPU here", "none": "not fit"}
    console.print(f"helix doctor: {verdict[report['mode']]}", style="green" if report["fit"] else "red")
    if report["fit"]:
        console.print("Whether it computes the right numbers here: helix check --quick", markup=False)


def main(as_json: bool) -> int:
    """Print the report; 0 when fit, else 1."""
    with warnings.catch_warnings():  # Megatron's, of what is not installed: the report says that better
        warnings.simplefilter("ignore")
        report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        from rich.console import Console

        show(report, Console(width=None if sys.stdout.isatty() else 120))
    return 0 if report["fit"] else 1
