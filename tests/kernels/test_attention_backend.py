"""The choice of a kernel, and what kernels that are not installed here would be given."""

import functools
import importlib.util
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from helix_megatron.host import kernels as host_kernels
from helix_megatron.inference.position_cache import Attention, SequenceStep
from helix_megatron.kernels import backend
from helix_megatron.kernels.paged_attention import Requests, Sight
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.kv_layout import KvInterleave
from tests.kernels.test_paged_attention import check, draw


@pytest.fixture
def fresh():
    """What is installed is found out again, before and after; call it to do so in between."""

    def forget():
        backend._flash_attn.cache_clear()
        backend.choose.cache_clear()

    forget()
    yield forget
    forget()


def flash_attn(kernel):
    """The package, with this decode kernel, as flash-attn 2 has it."""
    return SimpleNamespace(flash_attn_with_kvcache=kernel)


def test_the_choice_has_a_reason(monkeypatch, fresh):
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn(host_kernels.flash_attn_with_kvcache))
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
    monkeypatch.setitem(sys.modules, "triton.language", None)
    fresh()
    choice = backend.choose("cuda", half, pages, False)
    assert choice.others == "torch" and "Triton is not installed" in choice.reason


def test_flash_attn_is_there_when_its_decode_kernel_is(monkeypatch, fresh, tmp_path):
    """Not when there is a folder of that name (flash-attn 4 alone), nor when the kernel is an old one."""

    def old(q, k_cache, v_cache, cache_seqlens=None, block_table=None):
        raise AssertionError("called")

    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    choose = functools.partial(backend.choose, "cuda", torch.bfloat16, 256, False)
    if importlib.util.find_spec("flash_attn") is None:
        assert choose().reason.endswith("not flash-attn: flash-attn is not installed")
    monkeypatch.syspath_prepend(tmp_path)
    fresh()
    assert importlib.util.find_spec("flash_attn") is not None
    assert choose().singles == "triton" and "of flash-attn 2 cannot be imported" in choose().reason
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn(old))
    fresh()
    assert choose().singles == "triton" and "its kernel has no return_softmax_lse" in choose().reason
    monkeypatch.setenv(backend.OVERRIDE, "flash-attn")
    drawn = draw([9], [1], 1, 4, 0, (4, 2), 4, "in order")
    with pytest.raises(HelixConfigError, match="HELIX_PAGED_ATTENTION=flash-attn: this flash-attn is too"):
        backend.attend(*drawn[:4], Sight(0.5, None, KvInterleave(1, 4), 0), True)


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


def checked_kernel(**arguments):
    """flash-attn's decode kernel, with its checks; +inf where there are no keys."""
    for name in ("cache_seqlens", "block_table"):
        assert arguments[name].dtype is torch.int32, name
        assert arguments[name].stride(-1) == 1, name
    assert all(arguments[name].stride(-1) == 1 for name in ("q", "k_cache", "v_cache"))
    out, lse = host_kernels.flash_attn_with_kvcache(**arguments)
    empty = lse.isneginf()
    return out.masked_fill(empty.transpose(1, 2).unsqueeze(-1), torch.nan), lse.masked_fill(empty, torch.inf)


checked_kernel.__wrapped__ = host_kernels.flash_attn_with_kvcache  # its signature


def test_flash_attention_is_given_what_it_needs(monkeypatch, fresh):
    """With a stand-in for its kernel, on ranks that keep much, little and nothing."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn(checked_kernel))
    for rank in range(3):
        drawn = draw([1, 8, 21, 3, 0], [1, 1, 1, 1, 0], 3, 2, rank, (4, 2), 4, "scattered")
        query, keys, values, requests, kept = drawn
        wide = Requests(requests.query_ends.long(), requests.lengths.long(), requests.table.T.long().T)
        for given in (requests, wide):
            check(backend.flash_attention, query, keys, values, given, kept,
                  Sight(0.5, None, KvInterleave(3, 2), rank))  # fmt: skip


def test_a_static_cache_gives_kernels_what_they_need(monkeypatch, fresh):
    """A decode step of two sequences, of which this rank keeps a part: flash-attn and the formula agree."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn(checked_kernel))
    generator = torch.Generator().manual_seed(0)
    interleave = KvInterleave(2, 4)
    keys, values = torch.randn(2, 8, 3, 2, 16, generator=generator)  # [slots, B, K, D], one sequence more
    query = torch.randn(1, 2, 4, 16, generator=generator)
    step = SequenceStep(keys[:, 1:], values[:, 1:], interleave, 1, Attention(0.25), start=13)
    monkeypatch.setenv(backend.OVERRIDE, "flash-attn")
    out, lse = step.attend(query, 0, 2)
    seen = [s for s in range(8) if interleave.position(1, s) <= 13]
    k, v = (x[seen, 1:].double().repeat_interleave(2, dim=2) for x in (keys, values))
    scores = torch.einsum("bnd,lbnd->bnl", query[0].double(), k) * 0.25
    expected = torch.einsum("bnl,lbnd->bnd", scores.softmax(-1), v)
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[0].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_the_triton_kernel_under_its_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", backend.OVERRIDE: "triton"}
    command = [sys.executable, "-m", "tests.kernels.triton_worker"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "26 cases"


def test_the_triton_kernel_is_there_without_knobs(monkeypatch):
    """As with Triton before 3.4, which older torch brings."""
    import triton

    from helix_megatron.kernels import paged_attention_triton as module

    monkeypatch.delattr(triton, "knobs", raising=False)
    spec = importlib.util.spec_from_file_location("again", module.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "again", again)
    spec.loader.exec_module(again)
    assert again._INTERPRETED is False


SMALLEST = 99 * 1024  # bytes a block may have: sm_86, 89 and 120; A100 163 KiB, H100 227 KiB
CORNERS = [  # GPU, elements, D, wanted rows, R, window, splits
    (80, "bf16", 128, 64, 8, False, 1),
    (80, "bf16", 256, 64, 8, True, 4),
    (80, "bf16", 256, 16, 8, False, 4),
    (80, "fp32", 128, 64, 4, True, 1),
    (80, "fp32", 256, 64, 8, True, 4),
    (80, "fp32", 256, 16, 1, False, 4),
    (89, "fp16", 256, 64, 8, False, 1),
    (90, "bf16", 64, 64, 8, True, 1),
    (90, "bf16", 128, 64, 8, True, 4),
    (90, "bf16", 256, 64, 8, False, 4),
    (90, "bf16", 128, 16, 128, False, 1),
    (90, "fp32", 256, 64, 8, False, 1),
    (100, "bf16", 128, 64, 8, True, 4),
    (100, "fp16", 256, 64, 8, True, 4),
]


@pytest.mark.parametrize("gpu, kind, dim, rows, ratio, window, splits", CORNERS)
def test_the_triton_kernel_compiles_for_a_gpu(gpu, kind, dim, rows, ratio, window, splits):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from helix_megatron.kernels.paged_attention_triton import _kernel, tile_shape

    height, slots = tile_shape(rows, ratio, dim, 4 if kind == "fp32" else 2)
    kinds = dict.fromkeys(("query", "keys", "values"), f"*{kind}") | {"lse": "*fp32", "scale": "fp32"}
    kinds |= {"out": f"*{kind}" if splits == 1 else "*fp32"}
    kinds |= dict.fromkeys(("ends", "lengths", "table"), "*i32")
    kinds = {n: "constexpr" if n.isupper() else kinds.get(n, "i32") for n in _kernel.arg_names}
    constants = dict(
        N=2 * ratio, R=ratio, D=dim, PAGE=32, RANKS=8, SIZE=32, WINDOW=window, SPLITS=splits,
        TOKENS=height // ratio, R_PAD=ratio, D_PAD=dim, SLOTS=slots, UPCAST=False,
    )  # fmt: skip
    numbered = {(_kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = [n for n in _kernel.arg_names if "*" in kinds[n] or n[-2:] in ("_t", "_n", "_p", "_s", "_k")]
    sixteens = {(_kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(_kernel, kinds, numbered, sixteens)
    compiled = compile(source, target=GPUTarget("cuda", gpu, 32))
    if kind != "fp32":
        assert "mma" in compiled.asm["ptx"]  # on tensor cores
    assert compiled.metadata.shared <= SMALLEST


def test_tiles_of_the_triton_kernel():
    from helix_megatron.kernels.paged_attention_triton import tile_shape

    assert tile_shape(64, 8, 128, 2) == (64, 64) and tile_shape(16, 8, 256, 2) == (16, 64)
    for rows, ratio, dim, size in itertools.product((16, 64), (1, 8, 128), (16, 64, 256, 512), (2, 4)):
        try:
            height, slots = tile_shape(rows, ratio, dim, size)
        except HelixConfigError as error:
            assert ratio == 128 and dim * size >= 1024 and "128 query heads of dimension" in str(error)
            continue
        assert height >= ratio and height % ratio == 0 and slots >= 16
        assert size * dim * (height + 2 * slots) < SMALLEST
