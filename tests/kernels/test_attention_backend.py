"""The choice of a kernel, and what kernels that are not installed here would be given."""

import functools
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helix_megatron.host import kernels as host_kernels
from helix_megatron.inference.position_cache import Attention, SequenceStep
from helix_megatron.kernels import backend, flash, known_case, merge, selection
from helix_megatron.kernels.paged_attention import Requests, VisibleSlots
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.kv_layout import KvInterleave
from tests.kernels import flash_standin
from tests.kernels.test_paged_attention import check, draw


@pytest.fixture
def fresh():
    """What is installed is found out again, before and after; call it to do so in between."""

    known = flash._installed, known_case.known_case_error, selection.choose, merge.triton_obstacle

    def forget():
        for function in known:
            function.cache_clear()

    forget()
    yield forget
    forget()


def flash_attn(kernel):
    """The package, with this decode kernel, as flash-attn 2 has it."""
    return SimpleNamespace(flash_attn_with_kvcache=kernel, __version__="2.8.9")


third = flash_standin.third(strict=False).flash_attn_with_kvcache


def install(monkeypatch, name, kernel):
    """A package of FlashAttention 3, in one of the places where it may be."""
    module = SimpleNamespace(flash_attn_with_kvcache=kernel, __version__="3.0.0")
    if "." in name:
        package = name.split(".")[0]
        monkeypatch.setitem(sys.modules, package, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, name, module)


HALF, PAGES = torch.bfloat16, 256


def test_the_choice_has_a_reason(monkeypatch, fresh):
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn(host_kernels.flash_attn_with_kvcache))
    choice = selection.choose("cuda", HALF, PAGES, False)
    assert choice.singles == "flash-attn-2" and choice.others == "triton"
    assert "not flash-attn-3: flash-attn-3 is not installed" in choice.reason and "2.8.9" in choice.reason
    for given, reason in [
        (dict(device="cpu"), "on the cpu"),
        (dict(dtype=torch.float32), "float32"),
        (dict(page=32), "a rank's have 32"),
        (dict(windowed=True), "window"),
        (dict(dim=260), "these are of 260"),
        (dict(major=7), "compute capability 7"),
        (dict(graph=True), "waits for the device"),
        (dict(flash_version=3), "--flash-attention-version is 3"),
    ]:
        given = dict(device="cuda", dtype=HALF, page=PAGES, windowed=False) | given
        choice = selection.choose(**given)
        assert choice.singles == choice.others == ("torch" if given["device"] == "cpu" else "triton")
        assert reason in choice.reason
    monkeypatch.setitem(sys.modules, "triton.language", None)
    fresh()
    choice = selection.choose("cuda", HALF, PAGES, False)
    assert choice.others == "torch" and "Triton is not installed" in choice.reason


@pytest.mark.parametrize("version, there", [("3.2.0", False), ("3.3.1", True), ("3.10.0+git1", True)])
def test_a_triton_that_cannot_compile_the_kernels_is_left_out(monkeypatch, fresh, version, there):
    import triton

    gpu, said = SimpleNamespace(type="cuda"), f"Triton {version} cannot compile these kernels; 3.3 or newer"
    monkeypatch.setattr(triton, "__version__", version)
    choice = selection.choose("cuda", HALF, PAGES, False)
    assert choice.others == ("triton" if there else "torch") and (said in choice.reason) != there
    assert merge.runs_triton(gpu) == there
    if not there:
        with pytest.raises(HelixConfigError, match=f"HELIX_PAGED_ATTENTION=triton: {said}"):
            selection.choose("cuda", HALF, PAGES, False, "triton")
        with pytest.raises(HelixConfigError, match=r"attention by torch, .*install Triton 3\.3"):
            selection.choose("cuda", HALF, PAGES, False, graph=True)


@pytest.mark.parametrize(
    "module",
    ["flash_attn_3.flash_attn_interface", "flashattn_hopper.flash_attn_interface", "flash_attn_interface"],
)
def test_flash_attention_3_comes_first(monkeypatch, fresh, module):
    """For pages of any size, wherever it is; unless another version is asked for or the GPU is newer."""
    install(monkeypatch, module, third)
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn(host_kernels.flash_attn_with_kvcache))
    choose = functools.partial(selection.choose, "cuda", HALF)
    choice = choose(24, False, major=9)
    assert choice.singles == "flash-attn-3" and choice.others == "triton" and module in choice.reason
    assert choose(PAGES, False, major=9, graph=True).singles == "flash-attn-3"
    assert choose(PAGES, False, flash_version=2).singles == "flash-attn-2"
    assert choose(PAGES, False, major=10).singles == "flash-attn-2"
    assert choose(PAGES, True).singles == choose(PAGES, False, dim=100).singles == "triton"
    four = choose(PAGES, False, major=9, flash_version=4)  # never for single tokens
    assert four.singles == "flash-attn-3" and "not FlashAttention 4: with split KV" in four.reason
    monkeypatch.setenv(selection.OVERRIDE, "flash-attn")
    drawn = draw([1, 8, 21, 3, 0], [1, 1, 1, 1, 0], 3, 2, 1, (4, 2), 4, "scattered")
    attend = functools.partial(backend.attend, singles=len(drawn[0]))
    check(attend, *drawn, VisibleSlots(0.5, None, KvInterleave(3, 2), 1))


def without_last(**given):
    """A kernel that loses the last key."""
    return host_kernels.flash_attn_with_kvcache(
        **given | dict(cache_seqlens=(given["cache_seqlens"] - 1).clamp(min=0))
    )


def in_base_2(**given):
    """A kernel whose log-sum-exps are of another base."""
    out, lse = host_kernels.flash_attn_with_kvcache(**given)
    return out, lse * 1.4427


def one_page(**given):
    """A kernel that goes on in memory where it should look a page up."""
    first = given["block_table"][:, :1] + torch.arange(given["block_table"].shape[1])
    return host_kernels.flash_attn_with_kvcache(
        **given | dict(block_table=first.clamp(max=len(given["k_cache"]) - 1))
    )


def broken(**given):
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize("fault", [without_last, in_base_2, one_page, broken])
def test_a_wrong_kernel_is_left_out_by_name(monkeypatch, fresh, caplog, fault):
    """It computes a small case once; the next takes its place, or the error names it where it was forced."""
    calls = []

    def kernel(
        q, k_cache, v_cache, cache_seqlens=None, block_table=None, softmax_scale=None, causal=False,
        return_softmax_lse=False,
    ):  # fmt: skip
        given = dict(locals())
        calls.append(given.pop("calls"))
        given.pop("fault")
        return fault(**given)

    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn(kernel))
    choices = [selection.choose("cuda", HALF, PAGES, windowed) for windowed in (False, True)]
    choices += [selection.choose("cuda", HALF, PAGES, False, graph=True)]
    assert [choice.singles for choice in choices] == ["triton"] * 3
    said = "fails: RuntimeError: no kernel image is" if fault is broken else "computes a wrong answer"
    assert f"flash-attn-2 2.8.9 (flash_attn) {said}" in choices[0].reason
    assert [record.levelname for record in caplog.records] == ["WARNING"] and said in caplog.text
    with pytest.raises(HelixConfigError, match=rf"HELIX_PAGED_ATTENTION=flash-attn-2: .*{said}"):
        selection.choose("cuda", HALF, PAGES, False, "flash-attn-2")
    assert len(calls) == 1


def test_flash_attn_is_there_when_its_decode_kernel_is(monkeypatch, fresh, tmp_path):
    """Not when there is a folder of that name (flash-attn 4 alone), nor when the kernel is an old one."""

    def old(q, k_cache, v_cache, cache_seqlens=None, block_table=None):
        raise AssertionError("called")

    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # what is imported below goes with it
    monkeypatch.delitem(sys.modules, "flash_attn")
    choose = functools.partial(selection.choose, "cuda", torch.bfloat16, 256, False)
    if importlib.util.find_spec("flash_attn") is None:
        assert choose().reason.endswith("not flash-attn-2: flash-attn-2 is not installed")
    monkeypatch.syspath_prepend(tmp_path)
    fresh()
    assert importlib.util.find_spec("flash_attn") is not None
    assert choose().singles == "triton" and "of flash_attn cannot be imported" in choose().reason
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn(old))
    fresh()
    assert choose().singles == "triton" and "its kernel has no return_softmax_lse" in choose().reason
    monkeypatch.setenv(selection.OVERRIDE, "flash-attn")
    drawn = draw([9], [1], 1, 4, 0, (4, 2), 4, "in order")
    with pytest.raises(HelixConfigError, match=r"=flash-attn: .*flash_attn is of another"):
        backend.attend(*drawn[:4], VisibleSlots(0.5, None, KvInterleave(1, 4), 0), 3)


def test_an_override_is_used_and_an_unknown_one_refused(monkeypatch, fresh):
    drawn = draw([9], [1], 1, 4, 0, (4, 2), 4, "in order")
    visible, window = (VisibleSlots(0.5, left, KvInterleave(1, 4), 0) for left in (None, 3))
    seen = []
    monkeypatch.setitem(backend._BACKENDS, "triton", lambda *given: seen.append(given))
    monkeypatch.setenv(selection.OVERRIDE, "triton")
    backend.attend(*drawn[:4], visible, 0)
    assert len(seen) == 1
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn(host_kernels.flash_attn_with_kvcache))
    monkeypatch.setenv(selection.OVERRIDE, "flash-attn-2")
    check(functools.partial(backend.attend, singles=0), *drawn, visible)  # prompts: by the device's own
    with pytest.raises(HelixConfigError, match="flash-attn-2: it has one window for all requests"):
        backend.attend(*drawn[:4], window, 3)
    monkeypatch.setenv(selection.OVERRIDE, "fast")
    with pytest.raises(HelixConfigError, match="HELIX_PAGED_ATTENTION=fast: choose from torch, "):
        backend.attend(*drawn[:4], visible, 0)


def test_warm_up_compares_before_a_graph_is_captured(monkeypatch, fresh):
    """The kernel that a CUDA graph would take was asked before; what could not be compared there says so."""
    calls = []
    monkeypatch.setitem(
        sys.modules, "flash_attn", flash_attn(lambda **given: host_kernels.flash_attn_with_kvcache(**given))
    )
    keys = torch.zeros(2, 8, 2, 16)
    monkeypatch.setattr(selection, "choose", lambda *given, **named: calls.append((given, named)) or CHOICE)
    visible = VisibleSlots(0.5, 7, KvInterleave(1, 4), 0)
    assert backend.warm_up(keys, keys, 4, HALF, visible, 3, graph=True) is CHOICE
    assert calls == [(("cpu", HALF, 8, True, None), dict(dim=16, major=None, flash_version=3, graph=True))]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(HelixConfigError, match=r"first time while a CUDA graph is captured.*warm_up"):
        known_case.known_case_error("flash-attn-3", "cuda", HALF, 64, 128)


def test_warm_up_leaves_triton_alone_where_it_cannot_be_used(monkeypatch, fresh):
    """FlashAttention 2 beside a Triton that is too old, or not there: nothing of ours is imported."""
    module = flash_attn(host_kernels.flash_attn_with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setitem(sys.modules, "helix_megatron.kernels.paged_attention_triton", None)
    choice = selection.Choice("flash-attn-2", None, "torch", "a test")
    monkeypatch.setattr(selection, "choose", lambda *given, **named: choice)
    keys = torch.zeros(2, PAGES, 2, 16, dtype=HALF)
    visible = VisibleSlots(0.5, None, KvInterleave(1, 4), 0)
    assert backend.warm_up(keys, keys, 4, HALF, visible) is choice


CHOICE = selection.Choice("torch", None, "torch", "a test")


def checked_kernel(**arguments):
    """flash-attn's decode kernel, with its checks; +inf where there are no keys."""
    for name in ("cache_seqlens", "block_table"):
        assert arguments[name].dtype is torch.int32, name
        assert arguments[name].stride(-1) == 1, name
    assert all(arguments[name].stride(-1) == 1 for name in ("q", "k_cache", "v_cache"))
    assert len({len(arguments[name]) for name in ("q", "cache_seqlens", "block_table")}) == 1
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
            second = functools.partial(backend.flash_attention, "flash-attn-2")
            check(second, query, keys, values, given, kept, VisibleSlots(0.5, None, KvInterleave(3, 2), rank))


def test_a_static_cache_gives_kernels_what_they_need(monkeypatch, fresh):
    """A decode step of two sequences, of which this rank keeps a part: flash-attn and the formula agree."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn(checked_kernel))
    generator = torch.Generator().manual_seed(0)
    interleave = KvInterleave(2, 4)
    keys, values = torch.randn(2, 8, 3, 2, 16, generator=generator)  # [slots, B, K, D], one sequence more
    query = torch.randn(1, 2, 4, 16, generator=generator)
    step = SequenceStep(keys[:, 1:], values[:, 1:], interleave, 1, Attention(0.25), start=13)
    monkeypatch.setenv(selection.OVERRIDE, "flash-attn")
    out, lse = step.attend(query, 0, 2)
    seen = [s for s in range(8) if interleave.position(1, s) <= 13]
    k, v = (x[seen, 1:].double().repeat_interleave(2, dim=2) for x in (keys, values))
    scores = torch.einsum("bnd,lbnd->bnl", query[0].double(), k) * 0.25
    expected = torch.einsum("bnl,lbnd->bnd", scores.softmax(-1), v)
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[0].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_the_triton_kernel_under_its_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", selection.OVERRIDE: "triton"}
    command = [sys.executable, "-m", "tests.kernels.triton_worker"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "24 cases, 4 merges, 16 written"


def test_the_triton_kernel_is_there_without_knobs(monkeypatch):
    """As with Triton before 3.4, which older torch brings."""
    import triton

    from helix_megatron.kernels import paged_attention_triton as module

    monkeypatch.delattr(triton, "knobs", raising=False)
    spec = importlib.util.spec_from_file_location("again", module.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "again", again)
    spec.loader.exec_module(again)
    assert again.INTERPRETED is False


SHARED = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB that a block may have
CORNERS = [  # GPU, elements, D, new tokens, R, window, slots of a page, bytes of the stack that are let pass
    (80, "bf16", 128, "few", 8, False, 64, 0),
    (80, "bf16", 256, "many", 8, True, 128, 48),
    (80, "fp32", 128, "many", 8, False, 64, 0),
    (89, "fp16", 256, "few", 8, True, 64, 0),
    (90, "bf16", 128, "few", 8, False, 128, 0),
    (90, "bf16", 128, "many", 8, True, 128, 0),
    (90, "bf16", 128, "few", 16, True, 32, 0),
    (90, "bf16", 64, "few", 8, False, 24, 32),
    (90, "bf16", 128, "few", 128, False, 64, 0),
    (90, "fp32", 256, "few", 1, False, 64, 320),
    (100, "bf16", 128, "few", 8, False, 64, 0),
    (100, "fp16", 128, "many", 8, True, 128, 0),
]


def compiled(kernel, kinds, constants, gpu, **options):
    """A kernel's code for a GPU, and the registers and the stack of a thread that its machine code has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kinds = {n: "constexpr" if n.isupper() else kinds.get(n, "i32") for n in kernel.arg_names}
    numbered = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = [n for n in kernel.arg_names if "*" in kinds[n] or n[-2:] in ("_t", "_n", "_p", "_s", "_k")]
    sixteens = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, kinds, numbered, sixteens)
    code = compile(source, target=GPUTarget("cuda", gpu, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return code, int(registers), int(stack)


@pytest.mark.parametrize("gpu, kind, dim, new, ratio, window, page, stack_let_pass", CORNERS)
def test_the_triton_kernel_compiles_for_a_gpu(gpu, kind, dim, new, ratio, window, page, stack_let_pass):
    """On tensor cores, with loads under way while it computes, within the GPU's memory and without spills."""
    from helix_megatron.kernels.paged_attention_triton import _tiles, attention_kernel

    shared = SHARED[gpu] * 1024
    tile = _tiles(ratio, dim, 4 if kind == "fp32" else 2, page, False, shared)[new == "many"]
    kinds = dict.fromkeys(("query", "keys", "values", "out"), f"*{kind}") | {"scale": "fp32"}
    kinds |= dict.fromkeys(("lse", "parts", "logs"), "*fp32")
    kinds |= dict.fromkeys(("starts", "owners", "ends", "lengths", "table"), "*i32")
    constants = dict(
        N=2 * ratio, R=ratio, D=dim, PAGE=page, RANKS=8, SIZE=min(32, page), WINDOW=window,
        TOKENS=tile.rows // ratio, R_PAD=ratio, D_PAD=dim, SLOTS=tile.slots, STAGES=tile.stages,
        LEAST=tile.least, PAGED=tile.paged, UPCAST=False,
        **(dict(OF_N=ratio, OF_D=dim, COPIES=1) if window else dict(OF_N=2 * ratio, OF_D=dim // 2, COPIES=2)),
        UNIT=4 if kind == "fp32" else 8,
    )  # fmt: skip
    code, registers, stack = compiled(attention_kernel, kinds, constants, gpu, num_warps=tile.warps)
    assert tile.paged == (page != 24) and tile.rows >= ratio
    if kind != "fp32":
        assert re.search(r"mma\.sync|wgmma\.mma|tcgen05\.mma", code.asm["ptx"])
    assert "cp.async" in code.asm["ptx"]
    blocks = 2 if new == "few" and tile.warps == 4 else 1  # on a multiprocessor at a time
    assert code.metadata.shared * blocks <= shared
    assert registers * tile.warps * 32 * blocks <= 65536
    assert stack <= stack_let_pass


@pytest.mark.parametrize("gpu", [80, 90, 100])
def test_the_plan_and_the_merges_compile_for_a_gpu(gpu):
    from helix_megatron.kernels.triton_merge import (
        combine_kernel,
        merge_block,
        merge_programs_kernel,
        pack_kernel,
    )
    from helix_megatron.kernels.triton_plan import place_kernel, plan_kernel

    longs = dict.fromkeys(("of_tokens", "blocks", "slots"), "*i64")
    integers = dict.fromkeys(("ends", "lengths", "starts", "owners", "plan"), "*i32")
    floats = dict.fromkeys(("parts", "logs", "lse", "lses"), "*fp32")
    ours = dict(RANKS=8, SIZE=32, WINDOW=True, TOKENS=2, SLOTS=64, FEW=2, MANY=True, BLOCK=256)
    merge = dict(N=8, R=8, R_PAD=8, D=128, FEW=2, MANY=8, LEAST_FEW=2, LEAST_MANY=8, **merge_block(8, 128))
    merge |= dict(OF_N=8, OF_D=64, COPIES=2, UNIT=8)
    halves = dict.fromkeys(("out", "more", "outs"), "*bf16")
    packed = dict.fromkeys(("lse", "more_lse", "lses"), "*fp32") | halves | {"parts": "*u8"}
    pack = dict(N=8, D=128, WITH_PARTS=True, MORE=4, DIMS=128, OF_N=8, OF_D=64, COPIES=2, UNIT=8)
    ranks = dict(N=8, D=128, WITH_SINKS=True, WITH_LSE=False, PARTS=8, DIMS=128, UNIT=8, LSE_UNIT=4)
    for kernel, kinds, constants, warps in [
        (plan_kernel, integers, ours, 4),
        (place_kernel, longs | {"places": "*i32"}, dict(RANKS=8, SIZE=32, BLOCK=256), 4),
        (merge_programs_kernel, integers | floats | {"out": "*bf16"}, merge, 4),
        (pack_kernel, packed, pack, 1),
        (combine_kernel, floats | {"outs": "*bf16", "sinks": "*bf16", "out": "*bf16"}, ranks, 1),
    ]:
        code, registers, stack = compiled(kernel, kinds, constants, gpu, num_warps=warps)
        assert code.metadata.shared <= 16 * 1024 and registers <= 128 and stack == 0


def test_tiles_of_the_triton_kernel():
    from helix_megatron.kernels.triton_tiles import SMALLEST_SHARED, Tile, tile_shape

    hopper = 227 * 1024
    assert tile_shape(16, 8, 128, 2, 128, hopper // 2) == Tile(16, 64, 4, 4, 2, True)
    assert tile_shape(64, 8, 128, 2, 128, hopper) == Tile(64, 64, 4, 8, 8, True)
    assert tile_shape(16, 8, 128, 2, 96, hopper).slots == 32
    assert not tile_shape(16, 8, 128, 2, 24, hopper).paged
    shapes = itertools.product((16, 64), (1, 8, 128), (16, 64, 256, 512), (2, 4), (24, 32, 256))
    for rows, ratio, dim, size, page in shapes:
        try:
            tile = tile_shape(rows, ratio, dim, size, page)
        except HelixConfigError as error:
            assert ratio == 128 and dim * size >= 1024 and "128 query heads of dimension" in str(error)
            continue
        assert tile.rows >= ratio and tile.rows % ratio == 0 and tile.slots >= 16
        assert tile.paged == (page % tile.slots == 0)
        assert size * dim * (tile.rows + 2 * tile.slots) < SMALLEST_SHARED
