"""Grid and layout arithmetic: properties over random shapes."""

from dataclasses import replace
from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_megatron.partition.config import HelixConfig, parse_weights
from helix_megatron.partition.grid import (
    AttentionShape,
    HelixConfigError,
    HelixGrid,
    check_grid,
    choose_grid,
    even_slices,
    illegal_reason,
    legal_grids,
)
from helix_megatron.partition.layout import HelixLayout, global_chunks, part_length, position_chunks


@st.composite
def layouts(draw, even=None):
    """A legal layout of any kind; `even` slices or not, or either."""
    n, m = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    hk, ratio = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    weights = None
    if draw(st.booleans()) if even is None else even:
        rotary, rest = draw(st.integers(0, 3)) * 2 * m, draw(st.integers(0, 2)) * m
    else:
        rotary, rest = draw(st.sampled_from([0, m, m + 1, 2 * m + 1, 16])) * 2, draw(st.integers(0, 9))
        rotary = rotary if rotary >= 2 * m else 0
        if draw(st.booleans()):
            weights = tuple(draw(st.lists(st.floats(0.01, 100), min_size=m, max_size=m)))
    if rotary == 0:
        rest = max(rest, m)
    shape = AttentionShape(n * hk * ratio, n * hk, rotary + rest, rotary, draw(st.booleans()))
    per_slice = weights is None and even_slices(shape, m) and draw(st.booleans())
    heads = not per_slice and (hk * ratio) % m == 0 and draw(st.booleans())
    gate = draw(st.booleans())
    placement = "heads" if heads else "dims"
    return HelixLayout(shape, HelixGrid(n, m), placement, per_slice, gate, weights)


def rows_per_kv_head(layout):
    ratio = layout.shape.num_attention_heads // layout.shape.num_query_groups
    return ((2 if layout.output_gate else 1) * ratio + 2) * layout.shape.kv_channels


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_ranks_tile_the_weights_exactly_once(layout):
    shape = layout.shape
    rows = shape.num_query_groups * rows_per_kv_head(layout)
    assert np.array_equal(np.sort(layout.qkv_permutation()), np.arange(rows))
    columns = shape.num_attention_heads * shape.kv_channels
    assert np.array_equal(np.sort(layout.proj_permutation()), np.arange(columns))
    for rank in range(layout.grid.size):
        d_s = layout.slice_dims(rank % layout.grid.dim_parallel_size)
        assert len(layout.key_dims(rank % layout.grid.dim_parallel_size)) == d_s
        if layout.is_even:
            assert len(layout.qkv_rows(rank)) == rows // layout.grid.size
            assert len(layout.proj_columns(rank)) == columns // layout.grid.size
        elif layout.query_placement == "dims":
            assert (
                len(layout.qkv_rows(rank))
                == rows // shape.kv_channels // layout.grid.head_parallel_size * d_s
            )
            assert len(layout.proj_columns(rank)) == layout.query_heads * d_s


@given(layouts(even=False))
@settings(max_examples=300, deadline=None)
def test_slices_are_as_equal_as_their_units_allow_or_follow_their_weights(layout):
    """Of no slice could a unit go to another without making the longest, for its weight, longer."""
    shape, m = layout.shape, layout.grid.dim_parallel_size
    weights = layout.slice_weights or (1.0,) * m
    pairs = [layout.slice_pairs(j) for j in range(m)]
    assert sum(layout.all_slice_dims) == shape.kv_channels and sum(pairs) == shape.rotary_dim // 2
    units = pairs if shape.rotary_dim else layout.all_slice_dims
    assert min(units) >= 1
    for giver in range(m):
        if units[giver] > 1:
            assert all(
                units[giver] / weights[giver] <= (units[j] + 1) / weights[j] * (1 + 1e-12) for j in range(m)
            )
    if layout.slice_weights is None:
        assert max(units) - min(units) <= 1
        assert max(layout.all_slice_dims) - min(layout.all_slice_dims) <= 2
        assert units == sorted(units, reverse=True)


def test_equal_weights_are_no_weights():
    shape = AttentionShape(4, 2, 24, 16)
    weighted = HelixLayout(shape, HelixGrid(2, 4), slice_weights=(3.0,) * 4)
    assert weighted.is_even and np.array_equal(
        weighted.qkv_permutation(), HelixLayout(shape, HelixGrid(2, 4)).qkv_permutation()
    )


def test_dimensions_of_the_documented_uneven_slices():
    layout = HelixLayout(AttentionShape(1, 1, 10, 10), HelixGrid(1, 3))
    assert [layout.key_dims(j).tolist() for j in range(3)] == [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9]]
    assert [layout.value_dims(j).tolist() for j in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    weighted = HelixLayout(AttentionShape(1, 1, 10, 10), HelixGrid(1, 3), slice_weights=(2, 1, 1))
    assert weighted.all_slice_dims == [6, 2, 2]


@given(layouts())
@settings(max_examples=200, deadline=None)
def test_slices_hold_whole_rotary_pairs(layout):
    shape, rotary = layout.shape, layout.shape.rotary_dim
    if layout.per_slice or not rotary:
        return
    for j in range(layout.grid.dim_parallel_size):
        dims = set(layout.rotary_dims(j).tolist())
        for x in dims:
            partner = x ^ 1 if shape.rotary_interleaved else (x + rotary // 2) % rotary
            assert partner in dims
        assert layout.key_dims(j)[: len(dims)].tolist() == layout.rotary_dims(j).tolist()


@given(layouts())
@settings(max_examples=200, deadline=None)
def test_a_rank_holds_only_its_head_group(layout):
    block = rows_per_kv_head(layout)
    for rank in range(layout.grid.size):
        i, _ = layout.grid.coordinate(rank)
        groups = set((layout.qkv_rows(rank) // block).tolist())
        assert groups <= set(range(i * layout.kv_heads, (i + 1) * layout.kv_heads))


@pytest.mark.parametrize("placement", ["dims", "heads"])
def test_one_slice_is_megatrons_own_layout(placement):
    layout = HelixLayout(AttentionShape(8, 4, 6, 4), HelixGrid(4, 1), placement)
    assert np.array_equal(layout.qkv_permutation(), np.arange(16 * 6))
    assert np.array_equal(layout.proj_permutation(), np.arange(8 * 6))


def test_whole_heads_keep_megatrons_projection():
    layout = HelixLayout(AttentionShape(8, 2, 4, 4), HelixGrid(2, 2), "heads")
    assert np.array_equal(layout.proj_permutation(), np.arange(8 * 4))


def test_rows_of_the_documented_example():
    layout = HelixLayout(AttentionShape(1, 1, 12, 8), HelixGrid(1, 2))
    assert layout.key_dims(0).tolist() == [0, 1, 4, 5, 8, 9]
    assert layout.key_dims(1).tolist() == [2, 3, 6, 7, 10, 11]
    assert layout.qkv_rows(1).tolist() == [
        *[2, 3, 6, 7, 10, 11],
        *[12 + x for x in (2, 3, 6, 7, 10, 11)],
        *range(24 + 6, 36),
    ]


@given(st.integers(0, 200), st.integers(1, 9))
def test_position_parts_tile_the_sequence_and_balance_causal_work(length, parts):
    covered = [x for p in range(parts) for a, b in position_chunks(length, p, parts) for x in range(a, b)]
    assert sorted(covered) == list(range(length))
    assert sum(part_length(length, p, parts) for p in range(parts)) == length
    work = [
        sum(x + 1 for a, b in position_chunks(length, p, parts) for x in range(a, b)) for p in range(parts)
    ]
    if length >= 2 * parts:
        assert max(work) - min(work) <= 2 * length  # two positions more or less


@pytest.mark.parametrize(
    "heads, groups, dim, tp, grid",
    [
        (9, 3, 64, 2, (1, 2)),
        (9, 3, 64, 4, (1, 4)),
        (9, 3, 64, 6, (3, 2)),
        (9, 3, 64, 8, (1, 8)),
        (9, 3, 64, 12, (3, 4)),
        (28, 4, 128, 8, (4, 2)),
        (14, 2, 64, 4, (2, 2)),
        (40, 10, 128, 4, (2, 2)),
        (32, 32, 128, 16, (16, 1)),
        (9, 3, 64, 5, (1, 5)),
        (9, 3, 64, 7, (1, 7)),
        (14, 2, 64, 6, (2, 3)),
    ],
)
def test_chosen_grids(heads, groups, dim, tp, grid):
    assert choose_grid(AttentionShape(heads, groups, dim, dim), tp) == HelixGrid(*grid)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 64), st.integers(1, 32))
def test_the_chosen_grid_is_legal_and_slices_least(ratio, groups, dim, tp):
    shape = AttentionShape(groups * ratio, groups, dim, dim // 2 * 2)
    legal = legal_grids(shape, tp)
    if not legal:
        with pytest.raises(HelixConfigError, match="tensor-parallel sizes that work"):
            choose_grid(shape, tp)
        return
    chosen = choose_grid(shape, tp)
    assert chosen in legal
    assert chosen.dim_parallel_size == min(g.dim_parallel_size for g in legal)
    assert chosen.head_parallel_size <= gcd(groups, tp)


@pytest.mark.parametrize(
    "n, m, reason",
    [
        (2, 2, "n\\*m = 4, but the tensor-parallel size is 8"),
        (8, 1, "n = 8 does not divide the 4 KV heads"),
        (None, 3, "n\\*m = 6"),
        (0, 8, "at least 1"),
    ],
)
def test_refusals_name_the_reason_and_the_legal_grids(n, m, reason):
    shape = AttentionShape(28, 4, 128, 128)
    with pytest.raises(HelixConfigError, match=reason) as caught:
        check_grid(shape, 8, n, m)
    if n != 0:
        assert "legal grids: " in str(caught.value)
        assert "n=4 m=2" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_odd_rotary_pairs_and_indivisible_dimensions_are_refused_where_slices_are_heads():
    assert "the 3 rotary pairs" in illegal_reason(AttentionShape(8, 1, 12, 6), 2, 1, 2, even=True)
    assert "the 12 dimensions" in illegal_reason(AttentionShape(8, 1, 12, 0), 8, 1, 8, even=True)
    assert illegal_reason(AttentionShape(8, 1, 12, 6), 2, 1, 2) is None
    with pytest.raises(
        HelixConfigError, match=r"m = 5 does not divide .* must be equal; legal grids"
    ) as caught:
        HelixConfig(softmax="per-slice", dim_parallel_size=5).resolve(20, 10, 64, 10)
    assert "n=5 m=2" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(HelixConfigError, match="must be equal"):
        HelixLayout(AttentionShape(4, 1, 16, 16), HelixGrid(1, 3), per_slice=True)


@pytest.mark.parametrize("rotary", [5, 14, -2])
def test_rotary_dimensions_that_are_no_pairs_are_refused_where_heads_are_sliced(rotary):
    shape = AttentionShape(8, 2, 12, rotary)
    assert choose_grid(shape, 2) == HelixGrid(2, 1)
    layout = HelixLayout(AttentionShape(8, 2, 13, 13), HelixGrid(2, 1))
    assert layout.qkv_permutation().tolist() == list(range(12 * 13))  # Megatron's order
    assert layout.all_slice_dims == [13]
    with pytest.raises(HelixConfigError, match=f"{rotary} rotary dimensions of the 12 .* rotary_percent 0"):
        choose_grid(shape, 4)
    with pytest.raises(HelixConfigError, match="legal grids: n=2 m=1"):
        check_grid(shape, 2, 1, 2)


def test_more_slices_than_units_are_refused():
    assert "more than the 3 rotary pairs" in illegal_reason(AttentionShape(8, 1, 12, 6), 4, 1, 4)
    assert "more than the 12 dimensions" in illegal_reason(AttentionShape(8, 1, 12, 0), 13, 1, 13)
    with pytest.raises(
        HelixConfigError, match=r"more than the 4 rotary pairs .* sizes that work: 1, 2, 3, 4"
    ):
        choose_grid(AttentionShape(8, 1, 8, 8), 5)
    with pytest.raises(HelixConfigError, match="not a multiple"):
        AttentionShape(9, 2, 12)


@pytest.mark.parametrize(
    "settings_, message",
    [
        (dict(softmax="paper"), "softmax 'paper' is unknown"),
        (dict(comm_type="ring"), "choose from auto, a2a, all_reduce"),
        (dict(softmax="per-slice", comm_type="a2a"), "exchanges nothing"),
    ],
)
def test_unknown_settings_are_refused(settings_, message):
    with pytest.raises(HelixConfigError, match=message):
        HelixConfig(**settings_)


@pytest.mark.parametrize(
    "settings_, message",
    [
        (dict(slice_weights=(2.0, 0.0, 1.0)), "2,0,1: 0 is not a positive number"),
        (dict(slice_weights=(2.0, float("nan"))), "nan is not a positive number"),
        (dict(slice_weights=(2.0, float("inf"))), "inf is not a positive number"),
        (dict(slice_weights=()), "one positive number for each slice"),
        (dict(slice_weights=(2.0, 1.0), softmax="per-slice"), "2,1 were given with per-slice"),
        (dict(slice_weights=(2.0, 1.0)), r"2 slice weights \(2,1\) .* grid 1x3 has 3 slices; give 3 weights"),
        (dict(slice_weights=(2.0, 1.0), head_parallel_size=3), r"grid 3x1 does not slice heads; .*size 2"),
    ],
)
def test_weights_that_cannot_work_are_refused(settings_, message):
    with pytest.raises(HelixConfigError, match=message) as caught:
        HelixConfig(
            **{"dim_parallel_size": None if "head_parallel_size" in settings_ else 3, **settings_}
        ).resolve(9, 3, 64, 3)
    assert "\n" not in str(caught.value)


def test_weights_are_read_from_the_command_line():
    assert parse_weights("2,1,1") == (2.0, 1.0, 1.0) and parse_weights("0.5, 1e1") == (0.5, 10.0)
    for text, word in (("2,x", "'x'"), ("2,,1", "''"), ("2;1", "'2;1'"), ("", "''")):
        with pytest.raises(HelixConfigError, match=f"--helix-slice-weights {text}: {word} is not a number"):
            parse_weights(text)
    with pytest.raises(HelixConfigError, match="-1 is not a positive"):
        parse_weights("2,-1")


def test_placement_is_settled_by_what_is_legal():
    assert HelixConfig().resolve(64, 8, 128, 16).layout.query_placement == "heads"
    assert HelixConfig().resolve(9, 3, 64, 8).layout.query_placement == "dims"
    assert HelixConfig(comm_type="all_reduce").resolve(64, 8, 128, 16).layout.query_placement == "dims"
    weighted = HelixConfig(slice_weights=(2, 1))
    assert weighted.resolve(64, 8, 128, 16).layout.query_placement == "dims"  # all projections follow weights
    assert replace(weighted, query_placement="heads").resolve(64, 8, 128, 16).layout.all_slice_dims == [
        86,
        42,
    ]
    with pytest.raises(HelixConfigError, match="needs whole heads"):
        HelixConfig(query_placement="heads").resolve(9, 3, 64, 8)
    with pytest.raises(HelixConfigError, match="per-slice softmax works on slices"):
        HelixConfig(query_placement="heads", softmax="per-slice").resolve(64, 8, 128, 16)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_global_chunks_are_the_positions_of_a_share_of_a_share(half, owners, parts):
    length, seen = 2 * half, []
    for owner in range(owners):
        share = [x for a, b in position_chunks(length * owners, owner, owners) for x in range(a, b)]
        for part in range(parts):
            local = [share[x] for a, b in position_chunks(length, part, parts) for x in range(a, b)]
            chunks = global_chunks(length, part, parts, owner, owners)
            assert [x for a, b in chunks for x in range(a, b)] == local
            seen += local
    assert sorted(seen) == list(range(length * owners))


@pytest.mark.parametrize(
    "host_mode, length, cache",
    [(True, 6144, "dim"), (True, 6145, "sequence"), (True, None, "sequence"), (False, 16, "sequence")],
)
def test_the_cache_is_chosen_by_the_device(host_mode, length, cache):
    helix = HelixConfig(host_mode=host_mode, context_length=length)
    assert helix.resolve(16, 2, 64, 8).kv_cache == cache
