"""Whole heads from slices and back, against one process that holds everything; forward and every gradient."""

import itertools

import pytest
import torch

from helix_megatron.exchange.heads import HeadExchange, WholeHeads, output_slices
from helix_megatron.exchange.sums import rounds_once, sum_copies
from helix_megatron.exchange.views import aligned_views, merge_slices
from helix_megatron.host.launcher import run_ranks
from helix_megatron.partition.grid import AttentionShape, HelixGrid
from helix_megatron.partition.layout import HelixLayout, position_chunks
from tests.exchange.late import late_collectives

S, B = 9, 2  # 9: chunks of unequal length


def layouts(m):
    """KV heads that are shared, dealt in blocks, or straddle; every kind of rotary pairs; uneven slices."""
    shapes = [
        AttentionShape(12, 1, 24, 24),
        AttentionShape(12, 6, 24, 16),
        AttentionShape(12, 12, 24, 24, True),
        AttentionShape(6, 2, 24, 0),
        AttentionShape(5, 5, 22, 10),
        AttentionShape(8, 2, 30, 24),
    ]
    for shape, placement in itertools.product(shapes, ("dims", "heads")):
        if placement == "heads" and shape.num_attention_heads % m:
            continue
        yield HelixLayout(shape, HelixGrid(1, m), placement)


def rows(tensor, dims):
    return tensor.index_select(-1, torch.from_numpy(dims))


def positions(layout, rank, length=S):
    c = layout.position_parts
    chunks = position_chunks(length, rank % c, c)
    return torch.cat([torch.arange(start, stop) for start, stop in chunks])


def rank_exchanges(overlap):
    torch.distributed.init_process_group("gloo")
    with late_collectives() as started:
        number = exchange_all(overlap)
    alone = sum(layout.query_placement == "heads" for layout in layouts(torch.distributed.get_world_size()))
    assert len(started) == (2 * alone if overlap else 0)  # K and V without the query, there and back
    return number


def exchange_all(overlap):
    group = torch.distributed.group.WORLD
    m, rank = group.size(), group.rank()
    for number, layout in enumerate(layouts(m)):
        torch.manual_seed(number)
        shape, dims = layout.shape, layout.query_placement == "dims"
        d, heads = shape.kv_channels, shape.num_attention_heads
        whole = [torch.randn(S, B, n, d) for n in (heads, shape.num_query_groups, shape.num_query_groups)]
        grads = [[torch.randn(S, B, n, d) for n in (heads, *[shape.num_query_groups] * 2)] for _ in range(m)]
        key_dims, value_dims = layout.key_dims(rank), layout.value_dims(rank)
        own = [rows(whole[0], key_dims), rows(whole[1], key_dims), rows(whole[2], value_dims)]
        query, key, value = (tensor.requires_grad_() for tensor in own)
        exchange = HeadExchange(layout, group, overlap)
        found = WholeHeads(exchange, query if dims else None, key, value).wait()
        part = m if not dims else layout.head_parts

        def mine(tensor, of, rank=rank, layout=layout, part=part):  # what rank attends with
            if of == 0:
                heads = tensor.chunk(part, dim=2)[rank // layout.position_parts]
                return heads[positions(layout, rank)]
            first, stop = layout.kv_ranges[rank]
            return tensor[:, :, first:stop]

        expected = [mine(tensor, of) for of, tensor in enumerate(whole)]
        for of in (0, 1, 2) if dims else (1, 2):
            assert torch.equal(found[of], expected[of]), (layout, of)
            assert found[of].is_contiguous()
        loss = sum((found[of] * mine(grads[rank][of], of)).sum() for of in ((0, 1, 2) if dims else (1, 2)))
        loss.backward()
        for of, (tensor, cut) in enumerate(((query, key_dims), (key, key_dims), (value, value_dims))):
            if of == 0 and not dims:
                continue
            total = torch.zeros_like(whole[of])
            for other in range(m):
                where = torch.zeros_like(total)
                if of == 0:
                    block = where.chunk(part, dim=2)[other // layout.position_parts]
                    block[positions(layout, other)] = mine(grads[other][0], 0, rank=other)
                else:
                    first, stop = layout.kv_ranges[other]
                    where[:, :, first:stop] = mine(grads[other][of], of, rank=other)
                total += where
            assert torch.allclose(tensor.grad, rows(total, cut), rtol=0, atol=1e-6), (layout, of)
        if not dims:
            continue
        part_out = mine(whole[0], 0).clone().requires_grad_()
        slices = output_slices(exchange, part_out, S)
        assert torch.equal(slices, rows(whole[0], value_dims)), layout
        (slices * rows(grads[0][0], value_dims)).sum().backward()
        assert torch.equal(part_out.grad, mine(grads[0][0], 0)), layout
    return number + 1


@pytest.mark.parametrize(("m", "overlap"), [(2, True), (3, True), (4, False)])
def test_whole_heads_and_back(m, overlap):
    assert set(run_ranks(rank_exchanges, m, overlap, timeout_s=120)) <= set(range(6, 13))


def rank_counts():
    from unittest import mock

    import torch.distributed as dist

    dist.init_process_group("gloo")
    group, received = dist.group.WORLD, []

    def counted(original):
        def call(out, *args, **kwargs):
            received.append((original.__name__, out.numel()))
            return original(out, *args, **kwargs)

        return call

    found = {}
    names = ("all_to_all_single", "all_gather_into_tensor")
    with mock.patch.multiple(dist, **{name: counted(getattr(dist, name)) for name in names}):
        for shape, placement in (((64, 8, 128), "dims"), ((32, 32, 128), "heads"), ((64, 1, 128), "heads")):
            layout = HelixLayout(AttentionShape(*shape, 128), HelixGrid(1, group.size()), placement)
            heads, d_s = layout.query_heads, layout.slice_dim
            query = torch.randn(S, B, heads, d_s, requires_grad=True) if placement == "dims" else None
            key = torch.randn(S, B, layout.kv_heads, d_s, requires_grad=True)
            wait = WholeHeads(HeadExchange(layout, group), query, key, key * 2).wait()
            sum(tensor.sum() for tensor in wait if tensor is not None).backward()
            found[shape] = list(received)
            received.clear()
    return found


def test_one_collective_each_way_of_what_is_needed():
    found = run_ranks(rank_counts, 2, timeout_s=60)[0]
    m, d_s = 2, 64
    # dims: Q, K and V in one; of 8 KV heads 4 are needed for half of the query heads.
    assert found[(64, 8, 128)] == [
        ("all_to_all_single", m * S * B * (32 + 2 * 4) * d_s),  # to the rank itself, too
        ("all_to_all_single", m * S * B * (32 + 2 * 4) * d_s),
    ]
    # heads, as many KV heads as query heads: half of them.
    assert found[(32, 32, 128)] == [("all_to_all_single", m * S * B * 2 * 16 * d_s)] * 2
    # one KV head for all: everyone's slice to everyone.
    assert found[(64, 1, 128)][0] == ("all_gather_into_tensor", m * S * B * 2 * d_s)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_round_once(dtype, monkeypatch):
    eps = torch.finfo(dtype).eps
    copies = torch.tensor([1.0, *[eps / 4] * 4])[:, None].expand(5, 3).to(dtype)
    assert rounds_once(torch.device("cpu"), dtype)
    assert (sum_copies(copies, 0) == 1 + eps).all()

    def rounding(self, dim, dtype=None):  # a device that rounds every partial sum
        total = torch.zeros_like(self.select(dim, 0), dtype=dtype or self.dtype)
        for part in self.unbind(dim):
            total = total + part
        return total

    monkeypatch.setattr(torch.Tensor, "sum", rounding)
    rounds_once.cache_clear()
    assert (copies.sum(dim=0) == 1).all()
    assert not rounds_once(torch.device("cpu"), dtype)
    assert (sum_copies(copies, 0) == 1 + eps).all()
    rounds_once.cache_clear()


def test_slices_of_a_head_tile_it():
    for layout in (*layouts(2), *layouts(3), *layouts(5)):
        m, d = layout.grid.dim_parallel_size, layout.shape.kv_channels
        head = torch.arange(d, dtype=torch.float32)
        for of_keys, dims in ((True, layout.key_dims), (False, layout.value_dims)):
            pieces = [head[torch.from_numpy(dims(j))] for j in range(m)]
            slices = torch.stack(pieces) if layout.is_even else pieces
            assert torch.equal(merge_slices(slices, layout, of_keys), head)
            back = torch.empty_like(slices) if layout.is_even else [torch.empty_like(x) for x in pieces]
            for target, source in aligned_views(back, head, layout, of_keys):
                target.copy_(source)
            assert all(torch.equal(a, b) for a, b in zip(back, pieces, strict=True))
