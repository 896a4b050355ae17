"""Several new tokens of a request by FlashAttention: cached and new keys apart, on ranks in one process.

The reference is the formula in float64 over whole requests.
"""

import contextlib
import functools
import itertools
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_megatron.check.kernels import check_flash
from helix_megatron.check.paged import expected
from helix_megatron.check.rows import Rows, read_rows
from helix_megatron.host.launcher import run_ranks
from helix_megatron.inference.partial_exchange import piece_elements, piece_views
from helix_megatron.inference.position_cache import Attention, PagedStep
from helix_megatron.kernels import backend, flash, known_case, selection
from helix_megatron.kernels.merge import combine_partials
from helix_megatron.kernels.new_tokens import kv_heads_for, share_of_heads
from helix_megatron.kernels.paged_attention import Requests
from helix_megatron.kernels.placement import place_tokens
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.kv_layout import interleave_of_block
from tests.inference.kv_cache_worker import generate_by_flash
from tests.kernels import flash_standin

SPARE = 0  # block


@contextlib.contextmanager
def installed(name: str, calls: list, strict: bool = False):
    """A stand-in for FlashAttention `name`, taken wherever it can be."""
    known = flash._installed, known_case.known_case_error, selection.choose
    module = "flash_attn_interface" if name == "flash-attn-3" else "flash_attn"
    make = flash_standin.third if name == "flash-attn-3" else flash_standin.second
    with pytest.MonkeyPatch.context() as patch:
        for function in known:
            function.cache_clear()
        patch.setitem(sys.modules, module, make(strict, calls))
        patch.setitem(flash.FLASH, name, replace(flash.FLASH[name], several=2))
        patch.setenv(selection.OVERRIDE, name)
        yield
    for function in known:
        function.cache_clear()


class Ranks:
    """Requests of which `before` tokens are cached and `new` ones come, in the pages of every rank.

    Unwritten memory is NaN. Behind the last request there is one that is padding, and `padding` rows.
    """

    def __init__(self, before, new, ranks, block, size, heads, dim=8, seed=0, dtype=torch.float32, padding=2):
        generator = torch.Generator().manual_seed(seed)
        self.new, self.ranks, (self.heads, kv_heads), self.dim = new, ranks, heads, dim
        lengths = [old + more for old, more in zip(before, new, strict=True)]
        counts = [-(-length // block) for length in lengths]
        numbers = (torch.randperm(sum(counts), generator=generator) + 1).int()
        table = torch.full((len(lengths) + 1, max([*counts, 1]) + 1), -1, dtype=torch.int32)
        page = (block // ranks, kv_heads, dim)
        memory = torch.full((ranks, 2, sum(counts) + 1, *page), torch.nan, dtype=dtype)
        interleave = interleave_of_block(ranks, size, block)
        self.whole, fresh = [], []
        for request, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            table[request, :count], numbers = numbers[:count], numbers[count:]
            both = torch.randn(2, length, kv_heads, dim, generator=generator).to(dtype)
            positions = torch.arange(length)
            for rank in range(ranks):
                where = torch.zeros(2, length, dtype=torch.int64)
                blocks = table[request][positions // block].long()
                place_tokens(*where, blocks, positions % block, interleave, rank, SPARE)
                memory[rank][:, where[0], where[1]] = both
            memory[:, :, SPARE] = torch.nan
            self.whole.append((positions.tolist(), *both))
            fresh.append(both[:, before[request] :])
        rows = sum(new) + padding
        self.query = torch.randn(rows, heads[0], dim, generator=generator).to(dtype)
        of_none = torch.full((2, padding, kv_heads, dim), torch.nan, dtype=dtype)
        self.key, self.value = torch.cat([*fresh, of_none], 1)
        ends = torch.tensor([0, *new, 0]).cumsum(0).int()
        self.requests = Requests(ends, torch.tensor([*lengths, 0]).int(), table, longest=max([*new, 0]))
        singles = next((number for number, count in enumerate(new) if count != 1), len(new))
        places = torch.zeros(2, rows, dtype=torch.int64)
        self.steps = [
            PagedStep(*memory[rank], interleave, rank, Attention(0.4), *places, self.requests, singles)
            for rank in range(ranks)
        ]

    def attend(self, by_heads: bool, cuts: list[int] = ()) -> torch.Tensor:
        """All heads, exchanged and merged; `cuts` of the rows have exchanges of their own."""
        m, bounds = self.ranks, sorted({0, *(cut for cut in cuts if cut < len(self.query)), len(self.query)})
        shape = (self.heads // m, self.dim) if by_heads else (self.heads, self.dim // m)
        outs = []
        for start, stop in itertools.pairwise(bounds):
            rows, size = (stop - start,), piece_elements(stop - start, *shape, self.query.element_size())[1]
            sent = torch.full((m, m, size), torch.nan, dtype=self.query.dtype)
            for step, pieces in zip(self.steps, sent, strict=True):
                new = self.key[start:stop, None], self.value[start:stop, None]
                given = self.query[start:stop, None], start, stop
                into = piece_views(pieces, rows, *shape)
                assert step.attend(*given, into, new) is None
                self._without_pieces(step.attend(*given, None, new), *into, by_heads)
            mine = [combine_partials(*piece_views(sent[:, j], rows, *shape), sent.dtype) for j in range(m)]
            outs.append(torch.cat(mine, dim=1 if by_heads else 2))
        return torch.cat(outs)

    @staticmethod
    def _without_pieces(partial, outs, lses, by_heads):
        """It is what the pieces hold."""
        out, lse = partial[0][:, 0], partial[1][:, 0]
        torch.testing.assert_close(torch.cat([*outs], dim=1 if by_heads else 2), out, rtol=0, atol=0)
        for piece in [lse] if by_heads else [lse] * len(lses):
            wanted = torch.cat([*lses], dim=1) if by_heads else lses
            torch.testing.assert_close(wanted, piece if by_heads else piece.expand_as(lses), rtol=0, atol=0)

    def check(self, out: torch.Tensor, tolerance: float = 2e-5) -> None:
        want, _ = expected(self.query, self.requests, [*self.whole, ([], None, None)], 0.4, None)
        torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)


SHAPES = [(1, 4, 2), (2, 8, 2), (2, 4, 4), (2, 6, 1), (2, 9, 3), (4, 8, 2), (4, 9, 3), (4, 2, 1), (3, 8, 4)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(0, 3), st.sampled_from(SHAPES), st.integers(1, 9), st.sampled_from(list(flash.FLASH)),
    st.lists(st.integers(1, 12), max_size=2), st.integers(0, 1000),
)  # fmt: skip
def test_parts_of_all_ranks_merge_to_attention_over_the_requests(
    requests, decoding, shape, size, name, cuts, seed
):
    """Chunks, prefixes, first chunks, single tokens before them; heads that m does not divide, or few."""
    ranks, *heads = shape
    singles = [(7 * number + 1, 1) for number in range(decoding)]
    before, new = zip(*singles, *requests, strict=True)
    dim = 24 if ranks == 3 else 8
    drawn = Ranks(before, list(new), ranks, 4 * ranks, size, heads, dim, seed)
    calls: list = []
    with installed(name, calls):
        kind = drawn.steps[0].several()
        assert kind is not None and kind.choice() == name
        drawn.check(drawn.attend(False, cuts))
        if heads[0] % ranks == 0:
            drawn.check(drawn.attend(True, cuts))


def test_who_attends_over_what():
    """The new keys by a share of the heads, the cached ones by all, and single tokens as ever."""
    drawn, calls = Ranks([20, 3, 30, 0], [1, 1, 6, 4], 2, 8, 2, (9, 3)), []
    with installed("flash-attn-3", calls):
        calls.clear()
        drawn.check(drawn.attend(False))
        own_case = ("decode", 6, 3), ("cached", 6, 10), ("new", 3, 10)  # known answers
        assert tuple(calls[:3]) == own_case
        first = [("decode", 9, 2), ("cached", 9, 12), ("new", 4, 12)]
        second = [("decode", 9, 2), ("cached", 9, 12), ("new", 5, 12)]
        assert calls[3:] == [*first, *first, *second, *second]
        calls.clear()
        for step in drawn.steps:  # as ranks that do not agree
            step.attend(drawn.query[:, None], 0, 14)
        assert not calls
    few, calls = Ranks([9, 5], [3, 3], 4, 8, 1, (2, 1)), []
    with installed("flash-attn-3", calls):
        few.check(few.attend(False))
        assert [call for call in calls[3:] if call[0] == "new"] == [("new", 1, 8)] * 4  # two ranks of four


@pytest.mark.parametrize("name, page", [("flash-attn-3", 24), ("flash-attn-2", 256)])
def test_half_precision_on_a_gpus_terms(name, page):
    """The packages' demands in full: what is chosen for a GPU is given to them."""
    drawn, calls = Ranks([600, 20, 30], [1, 5, 70], 2, 2 * page, 8, (6, 2), 16, dtype=torch.bfloat16), []
    with installed(name, calls, strict=True):
        chosen = selection.choose("cuda", torch.bfloat16, page, False, dim=16)
        assert chosen.singles == chosen.several == name and chosen.others == "triton", chosen
        drawn.check(drawn.attend(True), 2e-2)
        drawn.check(drawn.attend(False, [30]), 2e-2)
    assert {call[0] for call in calls} == {"decode", "cached", "new"}


@pytest.mark.parametrize("piece", [None, (3, 16), (6, 8)])
def test_warm_up_asks_for_what_steps_will(piece):
    drawn, calls = Ranks([9], [4], 2, 48, 8, (6, 2), 16, dtype=torch.bfloat16), []
    step = drawn.steps[0]
    with installed("flash-attn-3", calls, strict=True):
        visible = step.attention.over(step.interleave, step.rank)
        choice = backend.warm_up(step.keys, step.values, 6, torch.bfloat16, visible, piece=piece)
        assert calls[3:] == [("decode", 6, 1), ("cached", 6, 4), ("new", 3, 4)]
    assert choice.several == "flash-attn-3"


def test_where_cached_and_new_keys_are_not_apart():
    """Windows, graphs, unknown numbers of tokens, few for FlashAttention 2: as without FlashAttention."""
    before, new = [20, 3], [1, 6]
    choose = functools.partial(selection.choose, "cuda", torch.bfloat16, 256)
    with installed("flash-attn-3", calls := []):
        assert choose(False).several == choose(False, major=9).several == "flash-attn-3"
        assert choose(True).several is choose(False, graph=True).several is None
        assert choose(False, graph=True).singles == "flash-attn-3"
        drawn = Ranks(before, new, 2, 8, 2, (4, 2))
        kind = drawn.steps[0].several()
        assert kind.choice() == "flash-attn-3" and kind == drawn.steps[1].several()
        assert replace(drawn.steps[0], graph=True).several() is None
        unknown = Requests(*drawn.requests.tensors)
        assert replace(drawn.steps[0], requests=unknown).several() is None
        assert replace(drawn.steps[0], singles=len(drawn.query)).several() is None
        calls.clear()
        new = drawn.key[:, None], drawn.value[:, None]
        replace(drawn.steps[0], requests=unknown).attend(drawn.query[:, None], 0, 9, None, new)
        assert not calls
    assert flash.FLASH["flash-attn-2"].several == 64 and flash.FLASH["flash-attn-3"].several == 2
    assert not backend._is_better("flash-attn-2", replace(drawn.requests, longest=63))
    assert backend._is_better("flash-attn-2", replace(drawn.requests, longest=64))


def _not_causal(module):
    varlen = module.flash_attn_varlen_func
    return dict(flash_attn_varlen_func=lambda **given: varlen(**given | dict(causal=False)))


def _with_lse(change):
    def fault(module):
        def kernel(**given):
            out, lse = varlen(**given)
            return out, change(lse)

        varlen = module.flash_attn_varlen_func
        return dict(flash_attn_varlen_func=kernel)

    return fault


_in_base_2 = _with_lse(lambda lse: lse * 1.4427)
_of_an_earlier_layout = _with_lse(lambda lse: lse[None])


def _one_key_less(module):
    decode = module.flash_attn_with_kvcache

    def several_wrong(**given):
        if given.get("cu_seqlens_q") is not None:
            given["cache_seqlens"] = (given["cache_seqlens"] - 1).clamp(min=0)
        return decode(**given)

    return dict(flash_attn_with_kvcache=several_wrong)


def _heads_in_turn(module):
    varlen = module.flash_attn_varlen_func
    return dict(flash_attn_varlen_func=lambda **given: varlen(**given | dict(q=given["q"].roll(1, dims=1))))


FAULTS = [_not_causal, _in_base_2, _of_an_earlier_layout, _one_key_less, _heads_in_turn]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_is_wrong_with_several_tokens_has_single_ones_left(monkeypatch, caplog, fault):
    with installed("flash-attn-3", []):
        module = sys.modules["flash_attn_interface"]
        for name, kernel in fault(module).items():
            kernel.__wrapped__ = getattr(module, name)  # its signature
            monkeypatch.setattr(module, name, kernel)
        chosen = selection.choose("cuda", torch.bfloat16, 24, False, dim=16)
    assert chosen.singles == "flash-attn-3" and chosen.several is None
    said = "of another age" if fault is _of_an_earlier_layout else "computes a wrong answer"
    assert said in chosen.reason and "with several new tokens of a request" in chosen.reason
    assert [record.levelname for record in caplog.records] == ["WARNING"] and said in caplog.text


def test_helix_check_asks_the_packages_that_are_installed(monkeypatch, tmp_path):
    def found():
        rows = Rows(tmp_path / str(len(list(tmp_path.iterdir()))))
        check_flash(rows)
        return [(row["case"], row["status"]) for row in read_rows(rows.path)]

    labels = [f"{name}, {kind} tokens" for name in flash.FLASH for kind in ("single", "several")]
    with installed("flash-attn-3", [], strict=True):
        assert found() == list(zip(labels, ["ok", "ok", "skipped", "skipped"], strict=True))
    with installed("flash-attn-3", [], strict=True):
        module = sys.modules["flash_attn_interface"]
        kernel = _not_causal(module)["flash_attn_varlen_func"]
        kernel.__wrapped__ = module.flash_attn_varlen_func
        monkeypatch.setattr(module, "flash_attn_varlen_func", kernel)
        assert [status for _, status in found()] == ["ok", "failed", "skipped", "skipped"]


def test_a_package_without_the_kernel_for_several_tokens_has_single_ones_left(monkeypatch):
    def older(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        raise AssertionError("called")

    for kernel, said in ((None, "has no such kernel"), (older, "has no return_attn_probs")):
        with installed("flash-attn-3", []):
            monkeypatch.setattr(sys.modules["flash_attn_interface"], "flash_attn_varlen_func", kernel)
            chosen = selection.choose("cuda", torch.bfloat16, 24, False, dim=16)
        assert chosen.singles == "flash-attn-3" and chosen.several is None and said in chosen.reason


SHARED = [(8, 2, 2), (8, 2, 4), (9, 3, 2), (7, 1, 3), (8, 4, 3), (2, 1, 4)]


@pytest.mark.parametrize("heads, kv_heads, ranks", SHARED)
def test_shares_of_heads_make_all_heads_and_find_their_keys(heads, kv_heads, ranks):
    shares = [share_of_heads(heads, ranks, rank) for rank in range(ranks)]
    assert list(itertools.chain(*shares)) == list(range(heads))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    keys, ratio = torch.arange(kv_heads)[None, :, None], heads // kv_heads
    for share in filter(None, shares):
        found = kv_heads_for(keys, share, ratio)
        assert len(share) % found.shape[1] == 0
        own = found[0, :, 0].repeat_interleave(len(share) // found.shape[1]).tolist()
        assert own == [head // ratio for head in share]
        view = found.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
        assert view == (found.shape[1] < len(share) or own == list(range(own[0], own[-1] + 1)))


# ---- Megatron's dynamic engine ----
CHUNKS = dict(enable_chunked_prefill=True, max_tokens=16, token_rounder=4)
ENGINES = [  # model, inference settings, Helix
    (dict(num_query_groups=1), CHUNKS, HelixConfig(1, 2, kv_interleave_size=3)),
    (dict(num_query_groups=1), dict(enable_prefix_caching=True, async_sched_mode="async"), HelixConfig(1, 2)),
    (dict(num_attention_heads=3, num_query_groups=1), CHUNKS, HelixConfig(1, 2, overlap_chunks=2)),
    ({}, {}, HelixConfig(1, 2, query_placement="dims")),  # whole prompts too: a rank needs one KV head of two
]


@pytest.mark.dynamic_engine
def test_the_dynamic_engine_chooses_the_same_tokens():
    """Prompts in chunks, shared prefixes, both beside decoding requests, several tokens at a time."""
    mtp, ahead = dict(mtp_num_layers=2, num_query_groups=1), dict(num_speculative_tokens=2)
    plain = [(None, model, inference, None, 0) for model, inference, _ in [*ENGINES, (mtp, {}, None)]]
    (vanilla,) = run_ranks(generate_by_flash, 1, 1, plain, timeout_s=200)
    proposals = {r: vanilla[-1]["prompts"][r] + tokens for r, tokens in vanilla[-1]["tokens"].items()}
    runs = [(helix, model, inference, None, 2) for model, inference, helix in ENGINES]
    speculative = HelixConfig(1, 2, kv_interleave_size=2, overlap_chunks=3)
    runs.append((speculative, mtp, ahead, proposals, 2))
    runs.append((HelixConfig(1, 2, kv_interleave_size=3), *ENGINES[0][:2], None, 1))  # one rank alone has it
    vanilla.append(vanilla[0])
    for rank, found in enumerate(run_ranks(generate_by_flash, 2, 2, runs, timeout_s=300)):
        for number, (run, wanted) in enumerate(zip(found, vanilla, strict=True)):
            assert run["tokens"] == wanted["tokens"], number
            calls = run["calls"][3:]  # after the known cases
            if number < len(ENGINES) + 1:
                heads = runs[number][1].get("num_attention_heads", 4)
                assert {of for kind, of, _ in calls if kind == "cached"} == {heads}
                assert {of for kind, of, _ in calls if kind == "new"} == {(heads + rank) // 2}
            else:
                assert {kind for kind, *_ in calls} == ({"decode"} if rank == 0 else set())
