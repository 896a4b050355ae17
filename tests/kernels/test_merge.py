"""Pure mathematics of the sharded KV cache: partial attention and its merge, and the interleaving."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_megatron.kernels.merge import merge_partials, partial_attention
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.kv_layout import KvInterleave, interleave_of_block, interleave_of_sequence

# ---- merge ----


def whole_attention(query, key, value, visible, scale):
    # float64, straight from the formula; a query that sees nothing gives 0 and -inf
    ratio = query.shape[2] // key.shape[2]
    key, value = (x.double().repeat_interleave(ratio, dim=2) for x in (key, value))
    scores = torch.einsum("sbnd,lbnd->sbnl", query.double(), key) * scale
    scores = scores.masked_fill(~visible[:, None, None, :], -torch.inf)
    lse = scores.logsumexp(-1)
    probs = torch.exp(scores - lse.nan_to_num(neginf=0.0).unsqueeze(-1))
    return torch.einsum("sbnl,lbnd->sbnd", probs, value), lse


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 9), st.integers(1, 4), st.sampled_from([(1, 1), (4, 2), (6, 1)]), st.integers(1, 5),
    st.sampled_from([0.1, 1.0, 60.0]), st.integers(0, 10**6),
)  # fmt: skip
def test_merged_parts_are_whole_attention(length, queries, heads, parts, magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(queries, 2, heads[0], 4, generator=generator) * magnitude
    key, value = (torch.randn(length, 2, heads[1], 4, generator=generator) for _ in range(2))
    visible = torch.rand(queries, length, generator=generator) < 0.7
    owner = torch.randint(0, parts, (length,), generator=generator)  # some parts are empty
    partials = [
        partial_attention(query, key[owner == part], value[owner == part], visible[:, owner == part], 0.5)
        for part in range(parts)
    ]
    out, lse = merge_partials(*(torch.stack(tensors) for tensors in zip(*partials, strict=True)))
    expected_out, expected_lse = whole_attention(query, key, value, visible, 0.5)
    assert out.dtype == lse.dtype == torch.float32
    scale = max(1.0, magnitude)
    torch.testing.assert_close(out.double(), expected_out, rtol=2e-5, atol=3e-6 * scale)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5 * scale)


def test_log_sum_exps_far_apart_do_not_overflow():
    outs = torch.tensor([[1.0], [2.0], [0.0]])
    for lses in ([3e4, -3e4], [-3e4, 3e4]):
        out, lse = merge_partials(outs, torch.tensor([*lses, -torch.inf]))
        assert lse == 3e4 and out == outs[int(lses[1] > 0)]
    out, lse = merge_partials(outs[:2], torch.tensor([-5e4, -5e4]))
    assert out == 1.5 and lse == pytest.approx(-5e4 + math.log(2))


def test_all_parts_empty():
    out, lse = merge_partials(torch.zeros(3, 2, 4), torch.full((3, 2), -torch.inf))
    assert torch.equal(out, torch.zeros(2, 4)) and lse.isneginf().all()
    sinks = torch.tensor([-3.0, 5.0])
    out, lse = merge_partials(torch.zeros(3, 2, 4), torch.full((3, 2), -torch.inf), sinks)
    assert torch.equal(out, torch.zeros(2, 4)) and torch.equal(lse, sinks)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("magnitude", [0.3, 30.0])
def test_a_sink_counts_once_however_many_parts_there_are(parts, magnitude):
    """A column of scores of which nothing is read, as models with sinks are written down."""
    generator = torch.Generator().manual_seed(parts)
    query, key, value = (
        torch.randn(length, 2, heads, 4, generator=generator) for length, heads in ((3, 6), (7, 2), (7, 2))
    )
    sinks = torch.randn(6, generator=generator) * magnitude
    partials = [
        partial_attention(query, key[part::parts], value[part::parts], None, 0.5) for part in range(parts)
    ]
    given = [torch.stack(tensors) for tensors in zip(*partials, strict=True)]
    out, lse = merge_partials(*given, sinks)
    key, value = (x.double().repeat_interleave(3, dim=2) for x in (key, value))
    scores = torch.einsum("sbnd,lbnd->sbnl", query.double(), key) * 0.5
    scores = torch.cat([scores, sinks.double()[:, None].expand(3, 2, 6, 1)], dim=-1)
    expected = torch.einsum("sbnl,lbnd->sbnd", scores.softmax(-1)[..., :-1], value)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=3e-6)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    rounded = (merge_partials(*given, sinks) for sinks in (sinks.bfloat16(), sinks.bfloat16().float()))
    for found, expected in zip(*rounded, strict=True):  # a layer has them in its dtype
        assert found.dtype is torch.float32 and torch.equal(found, expected)


def test_long_queries_are_cut_without_a_difference(monkeypatch):
    query, key = torch.randn(7, 1, 2, 4), torch.randn(5, 1, 2, 4)
    visible = torch.ones(7, 5, dtype=torch.bool).tril()
    whole = partial_attention(query, key, key, visible, 0.5)
    monkeypatch.setattr("helix_megatron.kernels.merge._SCORE_BYTES", 2 * 4 * 2 * 5)  # two queries at a time
    for cut, expected in zip(partial_attention(query, key, key, visible, 0.5), whole, strict=True):
        torch.testing.assert_close(cut, expected)


# ---- interleaving ----


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 400))
def test_every_position_is_kept_once_without_gaps(ranks, size, length):
    interleave = KvInterleave(ranks, size)
    positions = np.arange(length)
    kept = []
    for rank in range(ranks):
        count = interleave.count(rank, length)
        own = interleave.position(rank, np.arange(count))
        assert (np.diff(own) > 0).all()
        assert (interleave.owner(own) == rank).all() and (interleave.slot(own) == np.arange(count)).all()
        kept.append(own)
    assert sorted(np.concatenate(kept)) == positions.tolist()
    lengths = torch.arange(length + 1)
    for rank in range(ranks):  # tensors count as integers do
        counts = [interleave.count(rank, n) for n in range(length + 1)]
        assert interleave.count(rank, lengths).tolist() == counts
    assert max(map(len, kept)) - min(map(len, kept)) <= size


@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 32), st.integers(0, 1000))
def test_a_block_keeps_an_equal_share_on_every_rank(ranks, wanted, share, position):
    block = ranks * share
    interleave = interleave_of_block(ranks, wanted, block)
    assert interleave.size <= wanted and block % interleave.cycle == 0
    within = position % block  # what an engine knows of a token: its block, and its place in it
    assert interleave.owner(within) == interleave.owner(position)
    assert position // block * share + interleave.slot(within) == interleave.slot(position)
    assert interleave.slot(within) < share
    for rank in range(ranks):
        assert interleave.count(rank, position // block * block) == position // block * share


def test_effective_sizes():
    assert interleave_of_block(4, 32, 256).size == 32
    assert interleave_of_block(4, 32, 64).size == 16
    assert interleave_of_block(2, 32, 96).size == 24
    assert interleave_of_sequence(4, 32, 1000).size == 32
    assert interleave_of_sequence(4, 32, 64).size == 16
    assert interleave_of_sequence(4, 32, 2).size == 1


def test_a_block_that_cannot_be_shared_is_refused():
    with pytest.raises(HelixConfigError, match=r"block of 10 tokens.*m = 4.*multiple of 4"):
        interleave_of_block(4, 32, 10)
