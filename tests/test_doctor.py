"""`helix doctor` on this machine, and on machines made of a fake driver."""

import json
import subprocess
import sys
import types

import pytest
import torch

from helix_megatron import cli, compat, doctor
from helix_megatron.partition.grid import HelixConfigError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


@pytest.fixture
def no_driver(monkeypatch, tmp_path):
    """Neither NVML nor nvidia-smi; the folder that a fake nvidia-smi may be put into."""
    find_spec = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "pynvml" else find_spec(name, *rest),
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@no_gpu
def test_this_machine():
    run = subprocess.run(
        [sys.executable, "-m", "helix_megatron.cli", "doctor", "--json"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["fit"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["megatron-core"].startswith(tuple(compat.KNOWN))
    if not report["gpus"]:
        assert report["mode"] == "host" and report["problems"] == []


@no_gpu
def test_the_tables_say_host_mode_only(no_driver, capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "fit for host mode only" in printed and "megatron-core" in printed
    assert printed.rstrip().endswith("helix check --quick")


def test_an_unsupported_megatron_is_not_fit(no_driver, monkeypatch, capsys):
    monkeypatch.setattr(compat, "KNOWN", {"0.99": compat.Megatron()})
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["mode"] == "none" and "which knows 0.99" in report["problems"][0]


def test_a_broken_megatron_is_not_fit(no_driver, monkeypatch, capsys):
    def version():
        raise HelixConfigError("megatron.core cannot be imported")

    monkeypatch.setattr(compat, "version", version)
    assert cli.main(["doctor"]) == 1
    assert "megatron.core cannot be imported" in capsys.readouterr().out


def test_a_broken_torch_is_not_fit(no_driver, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["doctor"]) == 1
    assert "torch cannot be imported" in capsys.readouterr().out


SMI = """#!/bin/sh
if [ "$1" = topo ]; then
    printf '\\t\\033[4mGPU0\\tGPU1\\tCPU Affinity\\033[0m\\n'
    printf 'GPU0\\t X \\tNV18\\t0-31\\nGPU1\\tNV18\\t X \\t0-31\\n\\nLegend:\\n\\n  X    = Self\\n'
else
    printf 'NVIDIA H100 80GB HBM3, 81559, 570.1\\nNVIDIA H100 80GB HBM3, 81559, 570.1\\n'
fi
"""


def fake_smi(folder, text):
    (folder / "nvidia-smi").write_text(text)
    (folder / "nvidia-smi").chmod(0o755)


@no_gpu
def test_gpus_by_nvidia_smi(no_driver, monkeypatch, capsys):
    fake_smi(no_driver, SMI)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    report = doctor.examine()
    assert report["gpus"] == [{"name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.6, "driver": "570.1"}] * 2
    assert report["topology"] == [["X", "NV18"], ["NV18", "X"]]
    assert report["mode"] == "host"  # torch sees none of them
    assert "the driver shows 2 GPUs and torch sees none" in report["problems"][0]
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1" in report["problems"][1]
    assert cli.main(["doctor"]) == 0
    assert "H100" in capsys.readouterr().out


def test_a_driver_that_does_not_answer(no_driver):
    fake_smi(no_driver, "#!/bin/sh\necho 'Driver/library version mismatch' >&2\nexit 18\n")
    problems = []
    assert doctor.find_gpus(problems) == ([], None)
    assert "Driver/library version mismatch" in problems[0]


def test_gpus_by_nvml(monkeypatch):
    nvml = types.ModuleType("pynvml")
    nvml.__spec__ = types.SimpleNamespace()
    nvml.NVMLError_LibraryNotFound = nvml.NVMLError_DriverNotLoaded = FileNotFoundError
    nvml.NVML_P2P_CAPS_INDEX_NVLINK = 2
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    nvml.nvmlSystemGetDriverVersion = lambda: b"570.1"  # bytes in old versions, text in new ones
    nvml.nvmlDeviceGetCount = lambda: 3
    nvml.nvmlDeviceGetHandleByIndex = lambda i: f"handle {i}"
    nvml.nvmlDeviceGetName = lambda handle: "NVIDIA A100"
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(total=80 * 2**30)
    nvml.nvmlDeviceGetP2PStatus = lambda a, b, index: 0 if "handle 2" not in (a, b) else 5
    nvml.nvmlDeviceGetTopologyCommonAncestor = lambda a, b: 50
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    gpus, topology = doctor.find_gpus([])
    assert gpus == [{"name": "NVIDIA A100", "memory_gib": 80.0, "driver": "570.1"}] * 3
    assert topology == [["X", "NV", "SYS"], ["NV", "X", "SYS"], ["SYS", "SYS", "X"]]

    def no_library():
        raise FileNotFoundError

    nvml.nvmlInit = no_library
    assert doctor.find_gpus([]) == ([], [])


def test_the_kernel_of_a_shared_cache_and_why(monkeypatch, no_driver):
    """As on an H100 with FlashAttention 3 and 4; nothing is run there, and what is forced is said."""
    from helix_megatron.kernels import flash, selection

    name = "attention over a cache of positions shared by ranks"
    on_host = doctor._features("host", dict.fromkeys(doctor.PACKAGES), 0)
    assert on_host[name] == "torch (the cache is on the cpu)"

    def kernel(cache_seqlens, page_table, pack_gqa, return_softmax_lse):
        raise AssertionError("run")

    flash._installed.cache_clear(), selection.choose.cache_clear()
    module = types.SimpleNamespace(flash_attn_with_kvcache=kernel, __version__="3.0.0")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    installed = {"flash-attn-4": "4.0.0"}
    monkeypatch.setattr(flash, "installed_version", lambda *names: installed.get(names[0]))
    said = doctor._features("gpu", dict.fromkeys(doctor.PACKAGES), 1)[name]
    assert said.startswith("flash-attn-3 3.0.0 (flash_attn_interface) for single tokens, triton for prompts")
    assert "not flash-attn-3 for several tokens of a request: flash_attn_varlen_func of" in said
    assert "not FlashAttention 4: with split KV" in said and said.endswith("before its first use")
    monkeypatch.setenv(selection.OVERRIDE, "flash-attn-2")
    assert "no: HelixConfigError: HELIX_PAGED_ATTENTION=flash-attn-2: flash-attn-2 is not installed" in (
        doctor._features("gpu", dict.fromkeys(doctor.PACKAGES), 1)[name]
    )
    flash._installed.cache_clear(), selection.choose.cache_clear()
