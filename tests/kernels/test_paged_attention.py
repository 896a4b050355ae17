"""Attention over one rank's pages, every backend, against the formula in float64.

The reference is check/paged.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_megatron.check.paged import draw, expected
from helix_megatron.kernels import flash, merge, paged_attention
from helix_megatron.kernels.paged_attention import Requests, VisibleSlots
from helix_megatron.partition.kv_layout import KvInterleave

HEADS = [(4, 4), (4, 2), (6, 1), (9, 3)]


def check(attend, query, keys, values, requests, kept, visible, tolerance=2e-5):
    out, lse = attend(query, keys, values, requests, visible)
    assert out.dtype is query.dtype and lse.dtype is torch.float32
    want, want_lse = expected(query, requests, kept, visible.softmax_scale, visible.left)
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=tolerance, atol=tolerance)


@st.composite
def cases(draw_from):
    """Requests of a mixed step; lengths of 0 are padding, many shards are empty."""
    lengths = draw_from(st.lists(st.integers(0, 50), min_size=1, max_size=5))
    new = [draw_from(st.sampled_from([min(1, length), length // 2, length])) for length in lengths]
    ranks = draw_from(st.integers(1, 4))
    return dict(
        lengths=lengths, new=new, ranks=ranks, size=draw_from(st.integers(1, 5)),
        rank=draw_from(st.integers(0, ranks - 1)), heads=draw_from(st.sampled_from(HEADS)), dim=4,
        order=draw_from(st.sampled_from(["in order", "scattered"])), cycles=draw_from(st.integers(1, 3)),
        seed=draw_from(st.integers(0, 99)),
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([None, 0, 3, 20]), st.sampled_from([(256, 2**20, 2**18), (3, 200, 150)]))
def test_every_token_sees_its_slots(case, left, sizes):
    """With sizes as they are, and so small that blocks of tokens, copies and batches are many."""
    query, keys, values, requests, kept = draw(**case)
    visible = VisibleSlots(0.4, left, KvInterleave(case["ranks"], case["size"]), case["rank"])
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(("_ROWS", "_COPY_BYTES", "_SMALL_BYTES"), sizes, strict=True):
            patch.setattr(paged_attention, name, size)
        check(paged_attention.paged_attention, query, keys, values, requests, kept, visible)


def test_a_cache_that_is_in_order_is_not_copied(monkeypatch):
    """One request of a decode step reads its pages where they are; scattered ones are copied."""
    monkeypatch.setattr(paged_attention, "_SMALL_BYTES", 0)
    read, plain = [], merge.partial_attention
    monkeypatch.setattr(
        paged_attention, "partial_attention", lambda q, k, *rest: read.append(k) or plain(q, k, *rest)
    )
    for order, copies in (("in order", 0), ("scattered", 1)):
        drawn = draw([60, 33], [1, 1], 2, 4, 1, (4, 2), 4, order)
        read.clear()
        check(paged_attention.paged_attention, *drawn, VisibleSlots(0.5, None, KvInterleave(2, 4), 1))
        begin, end = drawn[1].data_ptr(), drawn[1].data_ptr() + drawn[1].nbytes
        assert [not begin <= key.data_ptr() < end for key in read] == [bool(copies)] * 2


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision(dtype, tolerance):
    drawn = draw([50, 7], [1, 7], 2, 4, 0, (4, 2), 16, "scattered", dtype=dtype)
    check(paged_attention.paged_attention, *drawn, VisibleSlots(0.25, None, KvInterleave(2, 4), 0), tolerance)


def test_rows_are_the_last_of_requests_that_are_no_longer():
    """Requests that have ended keep their lengths, those that come later have what is before them."""
    ends, lengths = torch.tensor([0, 1, 2, 5, 9]), torch.tensor([8, 9, 20, 30])
    requests = Requests(ends, lengths, torch.arange(8).view(4, 2), longest=4)
    part = requests.rows(4, 7)
    assert part.query_ends.tolist() == [0, 0, 0, 1, 3] and part.lengths.tolist() == [8, 9, 20, 28]
    part = requests.rows(4, 7, without=2)
    assert part.query_ends.tolist() == [0, 1, 3] and part.lengths.tolist() == [20, 28] and part.longest == 3
    assert part.table.tolist() == [[4, 5], [6, 7]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_a_step_kept_follows_the_next_step_where_it_is(dtype):
    """As a CUDA graph needs it: the same memory, with what requests of their own would be given."""

    def kept(requests: Requests) -> list[torch.Tensor]:
        visible = VisibleSlots(1.0, None, KvInterleave(2, 3), 1)
        parts = requests, requests.rows(1, 4), requests.single_rows(1, 3), requests.rows(1, 4).rows(0, 2)
        of_flash = [flash._of_step(requests, visible, 4, singles) for singles in (True, False)]
        of_flash.append(flash._of_step(requests.single_rows(1, 3), visible, 2, True))
        tensors = [x for of in of_flash for x in of if isinstance(x, torch.Tensor)]
        return [x for part in parts for x in part.for_kernels().tensors] + tensors

    def step(*values: list) -> Requests:
        return Requests(*(torch.tensor(value).to(dtype) for value in values))

    requests = step([0, 1, 2, 3, 4], [5, 9, 1, 20], [[1, 2], [3, 4], [5, 0], [6, 7]])
    before = kept(requests)
    assert requests.host_ends_and_lengths == ([0, 1, 2, 3, 4], [5, 9, 1, 20])
    following = step([0, 1, 2, 3, 3], [6, 3, 1, 0], [[1, 2], [9, 0], [5, 0], [0, 0]])
    for mine, theirs in zip(requests.tensors, following.tensors, strict=True):
        mine.copy_(theirs)
    requests.refill()
    for mine, again, wanted in zip(before, kept(requests), kept(following), strict=True):
        assert mine.data_ptr() == again.data_ptr() and torch.equal(mine, wanted)
    assert requests.host_ends_and_lengths == ([0, 1, 2, 3, 3], [6, 3, 1, 0])
