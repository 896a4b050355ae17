"""The choice of a kernel, and what kernels that are not installed here would be given."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from helix_megatron.host import kernels as host_kernels
from helix_megatron.kernels import backend
from helix_megatron.kernels.paged_attention import Sight
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.kv_layout import KvInterleave
from tests.kernels.test_paged_attention import check, draw


def test_the_choice_has_a_reason(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    half, pages = torch.bfloat16, 256
    assert backend.choose("cuda", half, pages, False).singles == "flash-attn"
    for given, reason in [
        (("cpu", half, pages, False), "on the cpu"),
        (("cuda", torch.float32, pages, False), "float32"),
        (("cuda", half, 32, False), "a rank's have 32"),
        (("cuda", half, pages, True), "window"),
    ]:
        choice = backend.choose(*given)
        assert choice.singles == choice.others == ("torch" if given[0] == "cpu" else "triton")
        assert reason in choice.reason
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    backend.choose.cache_clear()
    choice = backend.choose("cuda", half, pages, False)
    assert choice.others == "torch" and "Triton is not installed" in choice.reason
    backend.choose.cache_clear()


def test_an_override_is_used_and_an_unknown_one_refused(monkeypatch):
    drawn = draw([9], [1], 1, 4, 0, (4, 2), 4, "in order")
    seen = []
    monkeypatch.setitem(backend._BACKENDS, "flash-attn", lambda *given: seen.append(given))
    monkeypatch.setenv(backend.OVERRIDE, "flash-attn")
    backend.attend(*drawn[:4], Sight(0.5, None, KvInterleave(1, 4), 0), False)
    assert len(seen) == 1
    monkeypatch.setenv(backend.OVERRIDE, "fast")
    with pytest.raises(HelixConfigError, match="HELIX_PAGED_ATTENTION=fast: choose from torch, "):
        backend.attend(*drawn[:4], Sight(0.5, None, KvInterleave(1, 4), 0), False)


def test_flash_attention_is_given_what_it_needs(monkeypatch):
    """With a stand-in for its kernel, on ranks that keep much, little and nothing."""

    def kernel(**arguments):  # as flash-attn: +inf where there are no keys
        out, lse = host_kernels.flash_attn_with_kvcache(**arguments)
        empty = lse.isneginf()
        return out.masked_fill(empty.transpose(1, 2).unsqueeze(-1), torch.nan), lse.masked_fill(
            empty, torch.inf
        )

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_with_kvcache=kernel))
    for rank in range(3):
        drawn = draw([1, 8, 21, 3, 0], [1, 1, 1, 1, 0], 3, 2, rank, (4, 2), 4, "scattered")
        check(backend.flash_attention, *drawn, Sight(0.5, None, KvInterleave(3, 2), rank))


def test_the_triton_kernel_under_its_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", backend.OVERRIDE: "triton"}
    command = [sys.executable, "-m", "tests.kernels.triton_worker"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "24 cases"


def test_the_triton_kernel_compiles_for_a_gpu():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from helix_megatron.kernels.paged_attention_triton import _kernel

    pointers = dict.fromkeys(("query", "keys", "values", "out"), "*bf16") | {"lse": "*fp32", "scale": "fp32"}
    pointers |= dict.fromkeys(("ends", "lengths", "table"), "*i32")
    kinds = {n: "constexpr" if n.isupper() else pointers.get(n, "i32") for n in _kernel.arg_names}
    constants = dict(
        N=16, R=8, D=128, PAGE=32, RANKS=8, SIZE=32, WINDOW=True, SPLITS=4, TOKENS=2, R_PAD=8, D_PAD=128,
        SLOTS=64, UPCAST=False,
    )  # fmt: skip
    numbered = {(_kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = compile(ASTSource(_kernel, kinds, numbered), target=GPUTarget("cuda", 90, 32))
    assert "mma" in compiled.asm["ptx"]  # on tensor cores
