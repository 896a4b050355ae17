"""The Triton kernels under Triton's interpreter (TRITON_INTERPRET=1, before Triton is imported)."""

import functools
import itertools
import os
import sys
from types import SimpleNamespace
from unittest import mock

import torch

from helix_megatron.inference.partial_exchange import piece_elements, piece_views
from helix_megatron.kernels import backend as attention_backend
from helix_megatron.kernels import flash, merge, triton_merge, triton_plan
from helix_megatron.kernels import paged_attention_triton as kernels
from helix_megatron.kernels.merge import merge_partials
from helix_megatron.kernels.new_tokens import OfHeads
from helix_megatron.kernels.paged_attention import Requests, VisibleSlots
from helix_megatron.partition.kv_layout import KvInterleave
from tests.inference.allocations import Allocations
from tests.kernels import flash_standin
from tests.kernels.test_attention_backend import third
from tests.kernels.test_paged_attention import check, draw

paged_attention = kernels.paged_attention
STEPS = {  # tokens of each request, how many of them are new
    "decode": ([1, 9, 150, 33], [1, 1, 1, 1]),
    "prompts": ([5, 18, 1], [5, 18, 1]),
    "both, chunks, padding": ([70, 0, 4, 80, 1], [1, 0, 4, 19, 1]),
}
DEALS = [(1, 4, 3), (3, 2, 24), (4, 5, 3), (2, 16, 1), (1, 1, 5)]  # ranks, size, cycles


def attention() -> int:
    """Every kind of step, by few and by many programs, on pages that hold whole steps and on others."""
    number = 0
    kinds = itertools.product(STEPS.items(), ((4, 2), (5, 1), (3, 3)), (None, 6))
    for (name, (lengths, new)), heads, left in kinds:
        ranks, size, cycles = DEALS[number % len(DEALS)]
        visible = VisibleSlots(0.4, left, KvInterleave(ranks, size), number % ranks)
        drawn = draw(lengths, new, ranks, size, visible.rank, heads, 12, "scattered", number, cycles=cycles)
        programs = (1, 3, 8, 64)[number % 4]
        try:
            check(lambda *g, n=name, p=programs: paged_attention(*g, n == "decode", p), *drawn, visible)
        except AssertionError as error:
            raise AssertionError(f"{name} {heads} {visible} programs {programs}") from error
        number += 1
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        drawn = draw([50, 7], [1, 7], 2, 4, 0, (4, 2), 16, "scattered", dtype=dtype)
        check(paged_attention, *drawn, VisibleSlots(0.25, None, KvInterleave(2, 4), 0), tolerance)
    for new in ([20, 12], [1, 1]):  # tiles that wide heads leave
        drawn = draw([80, 12], new, 2, 4, 1, (4, 2), 256, "scattered", cycles=4)
        check(paged_attention, *drawn, VisibleSlots(0.06, None, KvInterleave(2, 4), 1))
        number += 1
    drawn = draw([9], [1], 1, 4, 0, (4, 2), 16, "in order")  # as the engine would reach it
    as_backend = lambda *given: attention_backend.attend(*given, singles=len(given[0]))  # noqa: E731
    check(as_backend, *drawn, VisibleSlots(0.5, None, KvInterleave(1, 4), 0))
    wide_window()
    as_many_as_few()
    # one request in more parts than are merged at a time, beside one that one program does alone
    drawn = draw([4200, 10], [1, 1], 1, 16, 0, (2, 1), 4, "scattered")
    check(lambda *g: paged_attention(*g, True, 131), *drawn, VisibleSlots(0.5, None, KvInterleave(1, 16), 0))
    return number + 4


def wide_window() -> None:
    """A prompt's tile of which all tokens see some steps entirely, and others in part at both ends."""
    drawn = draw([100, 90], [24, 1], 1, 16, 0, (2, 1), 4, "scattered")
    check(lambda *g: paged_attention(*g, False, 2), *drawn, VisibleSlots(0.5, 60, KvInterleave(1, 16), 0))


def as_many_as_few() -> None:
    """A request with as many new tokens as a tile of few takes, beside a prompt; several programs do both."""
    drawn = draw([80, 60], [8, 20], 1, 16, 0, (4, 2), 4, "scattered")
    visible = VisibleSlots(0.5, None, KvInterleave(1, 16), 0)
    tiles = kernels._tiles(2, 16, 4, 16, False, 99 * 1024)
    assert tiles[0].rows // 2 == 8
    check(lambda *g: paged_attention(*g, False, 3), *drawn, visible)
    _, (few, many), _ = kernels._plan(drawn[3], visible, len(drawn[0]), tiles, 2)
    assert int(few.starts[-1]) == -(-80 // tiles[0].slots)  # nothing of it is done twice
    steps = many.starts.diff()
    assert steps.sum() > 0 and not steps[many.owners == 0].any()


def deals_what_is_there() -> None:
    """Padding and finished requests take no program; all programs have equal shares of one long request."""
    lengths = torch.zeros(64, dtype=torch.int32)
    lengths[5] = 1001
    ends = torch.zeros(65, dtype=torch.int32)
    ends[6:] = 1
    requests = Requests(ends, lengths, torch.zeros(64, 32, dtype=torch.int32))
    visible = VisibleSlots(1.0, None, KvInterleave(1, 32), 0)
    tiles = kernels._tiles(1, 16, 2, 32, True, 99 * 1024)
    _, (launch,), _ = kernels._plan(requests, visible, 64, tiles, 1)
    steps = (launch.starts[1:] - launch.starts[:-1]).tolist()
    assert launch.tile.slots == 32 and max(steps) == sum(steps) == -(-1001 // 32), steps
    assert int(launch.owners[steps.index(32)]) == 5
    lengths[:40], ends[:41] = 33, torch.arange(41)  # some tiles between those of requests are empty
    ends[40:] = 40
    requests.refill()
    _, (launch,), _ = kernels._plan(requests, visible, 64, tiles, 1)
    assert int(launch.starts[-1]) == 40 * 2


class Asked:
    """Which kernels are launched, and by which constants: what Triton compiles one by one."""

    NAMES = ("attention_kernel", "plan_kernel", "merge_programs_kernel")

    def __enter__(self):
        self.kernels = {name: getattr(kernels, name) for name in self.NAMES}
        self.kinds = []
        for name in self.NAMES:
            setattr(kernels, name, self.Kernel(self, name))
        return self

    def __exit__(self, *error):
        for name, kernel in self.kernels.items():
            setattr(kernels, name, kernel)

    class Kernel:
        def __init__(self, asked, name):
            self.asked, self.name = asked, name

        def __getitem__(self, grid):
            def launch(*given, **constants):
                self.asked.kinds.append((self.name, *sorted(constants.items())))
                self.asked.kernels[self.name][grid](*given, **constants)

            return launch


def launches() -> None:
    """Two a layer for decoding, three with prompts, none for what the step's first layer planned."""
    for lengths, new, expected in (([9, 40], [1, 1], [3, 1, 3]), ([9, 40], [1, 40], [6, 2, 3])):
        drawn = draw(lengths, new, 1, 16, 0, (2, 1), 4, "scattered")
        with Asked() as asked:
            attend = functools.partial(paged_attention, singles=max(new) == 1)
            for _ in range(3):  # layers
                check(attend, *drawn, VisibleSlots(0.5, None, KvInterleave(1, 16), 0))
        names = [kind[0] for kind in asked.kinds]
        assert [names.count(name) for name in Asked.NAMES] == expected, names


def far_apart() -> None:
    """Pages further apart than 32-bit numbers reach; the memory between them is not touched."""
    query, keys, values, requests, kept = draw([30], [1], 1, 16, 0, (2, 1), 4, "in order")
    apart = 2**30
    memory = torch.empty(2 * apart + 2048)
    spread = []
    for offset, cache in ((0, keys), (1024, values)):
        far = memory.as_strided((3, *cache.shape[1:]), (apart, 4, 4, 1), offset)
        far.copy_(cache[[3, 1, 2]])
        spread.append(far)
    assert requests.table[0, :2].tolist() == [1, 2]
    check(lambda *g: paged_attention(*g, True), query, *spread, requests, kept,
          VisibleSlots(0.5, None, KvInterleave(1, 16), 0))  # fmt: skip


def pieces() -> None:
    """What ranks are sent is written where it travels: whole heads, or slices beside all log-sum-exps."""
    half, single = torch.bfloat16, torch.float32
    for dtype, number, dim, by_heads in ((half, 3, 12, True), (half, 2, 16, False), (single, 3, 12, False)):
        for new in ([1, 1], [12, 1]):
            drawn = draw([70, 50], new, 2, 4, 1, (6, 2), dim, "scattered", dtype=dtype)[:4]
            given = *drawn, VisibleSlots(0.3, None, KvInterleave(2, 4), 1), max(new) == 1
            shape = (6 // number, dim) if by_heads else (6, dim // number)
            rows = drawn[0].shape[:1]
            _, size = piece_elements(*rows, *shape, dtype.itemsize)
            mine, wanted = (
                piece_views(torch.full((number, size), torch.nan, dtype=dtype), rows, *shape)
                for _ in range(2)
            )
            kernels.attend_into(*mine, *given)
            merge.write_partials(*paged_attention(*given), *wanted)
            assert all(torch.equal(*pair) for pair in zip(mine, wanted, strict=True)), (dtype, number, new)


def parts_and_pieces() -> int:
    """What another kernel computed, with a part of some heads merged in: one kernel, beside torch's."""
    number, generator = 0, torch.Generator().manual_seed(5)
    merges = ((0, 0), (2, 3), (0, 6), (5, 1))  # first head, heads
    for by_heads, (first, count), dtype in itertools.product(
        (True, False), merges, (torch.bfloat16, torch.float32)
    ):
        m, tokens, heads, dim = (3, 7, 6, 12) if by_heads else (2, 7, 6, 16)
        parts = torch.tensor([2, 1, 0, 2, 1, 2, 0], dtype=torch.uint8)
        draw_ = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        out, lse = draw_(6, heads, dim).to(dtype), (20 * draw_(heads, 6)).T  # the last row is of no request
        out[parts[:6] < 2], lse[parts[:6] < 2] = torch.nan, torch.inf
        added, added_lse = draw_(tokens, count, dim).to(dtype), (20 * draw_(count, tokens)).T
        added[parts < 1], added_lse[parts < 1] = torch.nan, torch.nan
        more = OfHeads(first, added, added_lse) if count else None
        shape = (heads // m, dim) if by_heads else (heads, dim // m)
        size = piece_elements(tokens, *shape, dtype.itemsize)[1]
        mine, wanted = (
            piece_views(torch.full((m, size), torch.nan, dtype=dtype), (tokens,), *shape) for _ in range(2)
        )
        launched = []
        with mock.patch.object(triton_merge, "pack_kernel", Counted(triton_merge.pack_kernel, launched)):
            merge.write_partials(out, lse, *mine, parts, more)
        assert len(launched) == 1
        with mock.patch.object(merge, "runs_triton", lambda device: False):
            merge.write_partials(out, lse, *wanted, parts, more)
        for found, right in zip(mine, wanted, strict=True):
            assert not found.isnan().any() and found[:, 2].float().nan_to_num(neginf=0).count_nonzero() == 0
            near = dict(rtol=1e-2, atol=1e-2) if found.dtype is torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found, right, **near)
        number += 1
    return number


class Counted:
    """A kernel whose launches are noted."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.append(grid)
        return self.kernel[grid]


def cached_and_new_keys_need_no_memory_of_their_own() -> None:
    """Requests with history by FlashAttention: no scores, no copy of the outputs in fp32, three kernels."""
    tokens, heads, dim, cached = 96, 4, 16, 700
    keys, values = torch.zeros(2, 50, 16, 2, dim, dtype=torch.bfloat16)
    table = torch.arange(50, dtype=torch.int32)[None]
    ends, lengths = torch.tensor([0, tokens]).int(), torch.tensor([cached + tokens]).int()
    requests = Requests(ends, lengths, table, longest=tokens)
    query = torch.randn(tokens, heads, dim).bfloat16()
    new = torch.randn(2, tokens, 2, dim).bfloat16()
    visible, calls, launched = VisibleSlots(0.25, None, KvInterleave(2, 8), 1), [], []
    size = piece_elements(tokens, heads, dim // 2, 2)[1]
    into = piece_views(torch.empty(2, size, dtype=torch.bfloat16), (tokens,), heads, dim // 2)
    sys.modules["flash_attn_interface"] = flash_standin.third(True, calls)
    with (
        mock.patch.object(triton_merge, "pack_kernel", Counted(triton_merge.pack_kernel, launched)),
        Allocations() as made,
    ):
        flash.attend("flash-attn-3", query, keys, values, requests, visible, tuple(new), into)
    del sys.modules["flash_attn_interface"]
    assert [kind for kind, *_ in calls] == ["cached", "new"] and len(launched) == 1
    most, half = made.largest(), made.largest(torch.bfloat16)
    assert most == half and half[0] == tokens * heads * dim, made.made  # FlashAttention's own output
    single, allowed = made.largest(torch.float32), tokens * heads  # log-sum-exps
    assert single[0] <= allowed, made.made


def packs() -> None:
    """What another kernel computed, to where it travels: beside torch's, with rows that are padding or see
    nothing, of which it may say anything."""
    for dtype, number, dim, by_heads in ((torch.bfloat16, 3, 12, True), (torch.float32, 2, 16, False)):
        for rows, kept in ((5, None), (4, None), (4, torch.tensor([2, 0, 2, 2, 0], dtype=torch.uint8))):
            out, lse = torch.randn(rows, 6, dim).to(dtype), torch.randn(rows, 6)
            if kept is not None:
                out[1], lse[1] = torch.nan, torch.inf
            shape = (6 // number, dim) if by_heads else (6, dim // number)
            _, size = piece_elements(5, *shape, dtype.itemsize)
            memory = torch.full((2, number, size), torch.nan, dtype=dtype)
            mine, wanted = (piece_views(x, (5,), *shape) for x in memory)
            triton_merge.write_partials(out, lse, *mine, kept, None)
            with mock.patch.object(merge, "runs_triton", lambda device: False):
                merge.write_partials(out, lse, *wanted, kept)
            assert all(torch.equal(*pair) for pair in zip(mine, wanted, strict=True)), (dtype, rows)
            assert not any(x.isnan().any() for x in mine) and (rows == 5 or mine[1][0, 4].isneginf().all())


def of_flash_attention() -> None:
    """FlashAttention's outputs travel after one launch more than ours, whatever rows see."""
    from tests.inference.host_graph import HostGraph

    query, keys, values, requests, _ = draw(
        [9, 40, 1, 0], [1, 1, 1, 0], 2, 4, 1, (4, 2), 16, "scattered", dtype=torch.bfloat16
    )
    visible = VisibleSlots(0.3, None, KvInterleave(2, 4), 1)
    shape, rows = (2, 16), len(query)  # of two ranks; a row more than requests
    _, size = piece_elements(rows, *shape, 2)
    pieces = [piece_views(torch.full((2, size), torch.nan).bfloat16(), (rows,), *shape) for _ in range(2)]
    counted = []
    flash._installed.cache_clear()
    sys.modules["flash_attn_interface"] = SimpleNamespace(flash_attn_with_kvcache=third)
    for name, into in zip(("flash-attn-3", "triton"), pieces, strict=True):
        with mock.patch.dict(os.environ, HELIX_PAGED_ATTENTION=name):
            attend = functools.partial(
                attention_backend.attend, query, keys, values, requests, visible, rows, into=into
            )
            attend()  # the step's first layer
            graph = HostGraph(((flash, "_single_tokens"),))
            with graph.recording():
                attend()
            counted.append(dict(graph.names))
    del sys.modules["flash_attn_interface"]
    assert counted == [
        {"_single_tokens": 1, "pack_kernel": 1},
        {"attention_kernel": 1, "merge_programs_kernel": 1},
    ], counted
    for mine, wanted in zip(*pieces, strict=True):
        torch.testing.assert_close(mine.float(), wanted.float(), rtol=2e-2, atol=2e-2)
    assert pieces[0][1][:, 2:].isneginf().all()  # a token of another rank's, and padding


def placement() -> None:
    """More tokens than one program takes, types as Megatron has them; beside torch's."""
    blocks, places = torch.arange(300), torch.arange(300, dtype=torch.int32) * 7 % 24
    for ranks, size, rank in ((1, 1, 0), (2, 3, 1), (4, 2, 2)):
        dealt = KvInterleave(ranks, size), rank, 999
        mine, wanted = torch.zeros(2, 2, 300, dtype=torch.int64)
        triton_plan.place_tokens(*mine, blocks, places, *dealt)
        for token, place in enumerate(places.tolist()):
            own = place // size % ranks == rank
            wanted[0, token] = token if own else 999
            wanted[1, token] = [p for p in range(24) if p // size % ranks == rank].index(place) if own else 0
        assert torch.equal(mine, wanted), dealt


def merges() -> int:
    """What ranks send: log-sum-exps in a block behind each rank's outputs, empty parts, one part."""
    number = 0
    shapes = [(2, 3, 4, 128, torch.bfloat16), (8, 2, 5, 22, torch.float32), (1, 2, 1, 80, torch.float16),
              (20, 1, 2, 256, torch.float32)]  # fmt: skip
    for m, tokens, heads, dim, dtype in shapes:
        block = tokens * heads * dim
        wide = 4 // dtype.itemsize
        received = torch.zeros(m, block + wide * tokens * heads, dtype=dtype)
        outs = received[:, :block].unflatten(1, (tokens, heads, dim))
        outs.copy_(torch.randn(outs.shape, generator=torch.Generator().manual_seed(number)))
        lses = received[:, block:].view(torch.float32).unflatten(1, (tokens, heads))
        lses.copy_(torch.randn(lses.shape, generator=torch.Generator().manual_seed(9)) * 30)
        lses[0, 0, 0], lses[:, -1, -1] = -torch.inf, -torch.inf
        outs[0, 0, 0], outs[:, -1, -1] = 0, 0
        out, lse = triton_merge.combine_partials(outs, lses, dtype, with_lse=True)
        want, want_lse = merge_partials(outs.double(), lses.double())
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        assert out.dtype is dtype and out.is_contiguous()
        assert out[-1, -1].count_nonzero() == 0 and lse[-1, -1] == -torch.inf
        torch.testing.assert_close(out.double(), want.double(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
        sinks = torch.randn(heads, generator=torch.Generator().manual_seed(3)).to(dtype) * 20
        out, lse = triton_merge.combine_partials(outs, lses, dtype, with_lse=True, sinks=sinks)
        want, want_lse = merge_partials(outs.double(), lses.double(), sinks.double())
        assert out[-1, -1].count_nonzero() == 0 and lse[-1, -1] == sinks[-1]
        torch.testing.assert_close(out.double(), want.double(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
        number += 1
    return number


def warms_up() -> None:
    """On the cache that will be served: every kernel that a later step asks for has been asked for."""
    keys, visible = torch.zeros(3, 32, 1, 16), VisibleSlots(0.25, None, KvInterleave(2, 16), 0)
    triton_merge.MANY_ROWS = 64  # of tokens times heads
    with Asked() as asked:
        kernels.warm_up(keys, keys, 2, torch.float32, visible, (1, 16))
        assert all(dict(kind[1:]).get("OF_N", 1) == 1 for kind in asked.kinds)
        kernels.warm_up(keys, keys, 2, torch.float32, visible)
        compiled = set(asked.kinds)
        for new in ([1, 1], [1] * 33, [1, 12], [40, 3]):
            lengths = [70, 50] if len(new) == 2 else [9] * 33
            drawn = draw(lengths, new, 2, 16, 0, (2, 1), 16, "scattered", cycles=2)
            check(functools.partial(paged_attention, singles=max(new) == 1), *drawn, visible)
        assert set(asked.kinds) == compiled


def main() -> None:
    deals_what_is_there()
    launches()
    far_apart()
    cases = attention()
    pieces()
    cached_and_new_keys_need_no_memory_of_their_own()
    written = parts_and_pieces()
    packs()
    of_flash_attention()
    placement()
    merged = merges()
    warms_up()
    print(f"{cases} cases, {merged} merges, {written} written")


if __name__ == "__main__":
    main()
