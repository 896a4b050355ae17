"""Inference with a KV cache spread over the dim group: exact, two collectives, 1/T of the bytes.

Layers are compared with the float64 reference, Megatron's dynamic engine with itself at T = 1.
"""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_megatron.check.reference import Case
from helix_megatron.host import kernels as host_kernels
from helix_megatron.host.launcher import run_ranks
from helix_megatron.inference import slice_cache as kv_slices
from helix_megatron.inference.position_cache import Attention, PagedStep, SequenceStep
from helix_megatron.inference.step_tokens import StepTokens
from helix_megatron.kernels.merge import merge_partials
from helix_megatron.kernels.paged_attention import Requests
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.kv_layout import interleave_of_block, interleave_of_sequence
from tests.inference.kv_cache_worker import (
    context_refused,
    count,
    decode_all,
    generate,
    generate_by_the_static_engine,
    generate_without_cache,
    refused,
    warmed_up,
)

# ---- layers, against float64 ----
GRIDS = [(1, 2), (1, 4), (2, 2), (3, 2), (1, 3), (2, 3)]  # 16 dimensions, 8 rotary pairs: m = 3 is uneven


def _jobs(n: int, m: int) -> list[tuple[Case, HelixConfig, list[int]]]:
    """Every shape and placement a grid takes, with prompts that leave shards empty, fill them, or more."""
    jobs = []
    for heads, groups in {(12, 12), (12, 6), (12, 3), (4, 1), (8, 2), (9, 3)}:
        if groups % n:
            continue
        for placement in ("dims", "heads"):
            if placement == "heads" and heads // n % m:
                continue
            options = [
                (dict(seq=6, batch=1), 4, [1], 2),  # fewer positions than one block: empty shards
                (dict(seq=13, batch=3), 2, [2], 2),  # a prompt of one block
                (dict(seq=14, qk_norm="RMSNorm", window=(3, 0)), 1, [5], 1),
                (dict(seq=17, rotary_percent=0.5, interleaved=True), 3, [3, 7], 5),  # a prompt in chunks
                (dict(seq=6, batch=1, sinks=True, window=(3, 0)), 4, [1], 2),
                (dict(seq=11, gate=True, sinks=True, rotary_percent=0.5, qk_norm="RMSNorm"), 2, [4], 1),
            ]
            for features, interleave, prompt, chunks in options:
                helix = HelixConfig(
                    n, m, query_placement=placement, kv_interleave_size=interleave, overlap_chunks=chunks,
                    rotary_percent=features.get("rotary_percent", 1.0),
                )  # fmt: skip
                jobs.append((Case(heads, groups, 16, **features), helix, prompt))
    return jobs


@pytest.mark.parametrize("n, m", GRIDS)
def test_prompts_and_tokens_are_exact_and_nothing_is_cached_twice(n, m):
    jobs = _jobs(n, m)
    assert {helix.query_placement for _, helix, _ in jobs} == {"dims", "heads"}
    ranks = run_ranks(decode_all, n * m, n * m, jobs)
    for index, (case, _, _) in enumerate(jobs):
        name = ranks[0][index][0]
        assert max(rank[index][1] for rank in ranks) < 2e-6, name
        cached = [rank[index][2] for rank in ranks]
        assert sum(cached) == 2 * case.seq * case.batch * case.groups * case.dim * 4, name


def test_bytes_of_a_cache_of_whole_cycles_are_one_part_in_t():
    jobs = [
        (Case(8, 2, 16, seq=24), HelixConfig(n, m, kv_interleave_size=3), [4]) for n, m in [(1, 4), (2, 2)]
    ]
    for rank in run_ranks(decode_all, 4, 4, jobs):
        assert [cached for _, _, cached in rank] == [2 * 24 * 2 * 2 * 16 * 4 // 4] * 2


def test_the_cache_of_slices_is_still_there():
    kept = dict(kv_cache="dim")
    jobs = [
        (Case(8, 2, 16, seq=10), HelixConfig(1, 2, **kept), [4]),
        (Case(8, 2, 16, seq=10, gate=True), HelixConfig(1, 2, query_placement="dims", **kept), [4]),
        (Case(8, 2, 16, seq=10, sinks=True, window=(3, 0)), HelixConfig(1, 2, **kept), [4]),
        (Case(9, 3, 16, seq=10, sinks=True), HelixConfig(1, 2, comm_type="a2a", **kept), [4]),
    ]
    for rank in run_ranks(decode_all, 2, 2, jobs):
        for (case, _, _), (_, error, cached) in zip(jobs, rank, strict=True):
            assert error < 2e-6 and cached == 2 * 10 * 2 * case.groups * 16 * 4 // 2


@pytest.mark.parametrize("cache", ["sequence", "dim"])
def test_weighted_slices_are_cached(cache):
    """Positions are dealt equally whatever the slices; slices are cached as they are."""
    weights = (4.0, 1.0, 1.0)
    jobs = [
        (
            Case(heads, 3, 16, seq=12, sinks=True, gate=True),
            HelixConfig(1, 3, kv_cache=cache, slice_weights=weights, **more),
            [4],
        )
        for heads, more in ((9, dict(kv_interleave_size=2)), (3, dict(query_placement="heads")), (6, {}))
    ]
    dims = [12, 2, 2] if cache == "dim" else [16 / 3] * 3
    for rank, d_s in zip(run_ranks(decode_all, 3, 3, jobs), dims, strict=True):
        for _, error, cached in rank:
            assert error < 2e-6 and cached == 2 * 12 * 2 * 3 * d_s * 4


def test_slices_that_are_heads_of_their_own_are_cached_as_such():
    jobs = [(Case(8, 2, 16, seq=10), HelixConfig(1, 2, softmax="per-slice"), [4])]
    for rank in run_ranks(decode_all, 2, 2, jobs):
        assert rank[0][1] < 2e-6 and rank[0][2] == 2 * 10 * 2 * 2 * 16 * 4 // 2


# ---- collectives ----
def _piece(tokens: int, heads: int, dim: int) -> int:
    """Bytes of partial outputs in fp32 and of their log-sum-exps, each padded to 16."""
    return sum(-(-size // 16) * 16 for size in (4 * tokens * heads * dim, 4 * tokens * heads))


@pytest.mark.parametrize("placement", ["dims", "heads"])
def test_a_step_has_two_collectives_whose_bytes_do_not_know_the_context(placement):
    n, m, hq, hk, d, batch, prompt = 2, 2, 4, 1, 16, 3, 5
    case = Case(8, 2, d, seq=30, batch=batch)
    helix = HelixConfig(n, m, query_placement=placement, kv_interleave_size=4)
    steps = run_ranks(count, 4, 4, case, helix, prompt, 64)[0]
    assert len(steps) == 1 + 25
    t, d_s = prompt * batch, d // m  # the prompt: as in training, its queries and outputs hardly move
    whole = {name: (x["calls"], x["bytes"] // 4) for name, x in steps.pop(0).items() if name.endswith("x2")}
    if placement == "heads":
        assert whole == {"all_gather x2": (1, (m - 1) * t * 2 * hk * d_s)}
    else:
        moved = t * 2 * hk * (d - d_s) + t * hq // m * (d - d_s) + (m - 1) * t * hq // m * d_s
        assert whole == {"all_to_all x2": (2, moved)}
    for step in steps:
        t = batch
        share = _piece(t, hq, d_s) if placement == "dims" else _piece(t, hq // m, d)
        inside = {name: entry for name, entry in step.items() if name.endswith(f"x{m}")}
        assert {name: entry["calls"] for name, entry in inside.items()} == {
            "all_gather x2": 1,
            "all_to_all x2": 1,
        }
        assert inside["all_gather x2"]["bytes"] == (m - 1) * t * (hq + 2 * hk) * d_s * 4
        assert inside["all_to_all x2"]["bytes"] == (m - 1) * share
        assert {name: entry["calls"] for name, entry in step.items() if name not in inside} == {
            "all_reduce x4": 1  # of linear_proj, as Megatron
        }


@pytest.mark.parametrize("placement", ["dims", "heads"])
def test_a_step_with_uneven_slices_receives_what_a_rank_lacks(placement):
    n, m, hq, hk, d, batch, prompt = 2, 2, 4, 1, 16, 3, 5
    weights, sizes = (3.0, 1.0), (12, 4)
    helix = HelixConfig(n, m, query_placement=placement, slice_weights=weights)
    ranks = run_ranks(count, 4, 4, Case(8, 2, d, seq=9, batch=batch), helix, prompt, 64)
    for rank, steps in enumerate(ranks):
        d_s = sizes[rank % 2]
        t, whole = prompt * batch, steps.pop(0)["all_to_all x2"]
        moved = t * 2 * hk * (d - d_s)
        if placement == "dims":
            moved += t * hq // m * (d - d_s) + (m - 1) * t * hq // m * d_s
        assert (whole["calls"], whole["bytes"] // 4) == (2 if placement == "dims" else 1, moved)
        assert len(steps) == 4
        for step in steps:
            t = batch
            if placement == "dims":
                gathered, share = (hq + 2 * hk) * (d - d_s), _piece(t, hq, d_s)
            else:
                gathered, share = (m - 1) * hq // m * d + 2 * hk * (d - d_s), _piece(t, hq // m, d)
            received = 4 * t * gathered + (m - 1) * share
            assert {name: entry for name, entry in step.items() if name.endswith("x2")} == {
                "all_to_all x2": {**step["all_to_all x2"], "calls": 2, "bytes": received}
            }


def test_a_step_over_the_cache_of_slices_has_one_collective_that_grows_with_the_context():
    case = Case(8, 2, 16, seq=9, batch=3)
    steps = run_ranks(count, 2, 2, case, HelixConfig(1, 2, kv_cache="dim"), 4, 64)[0][1:]
    for length, step in enumerate(steps, start=5):  # and that of linear_proj
        assert {name: entry["calls"] for name, entry in step.items()} == {"all_reduce x2": 2}
        scores, projected = 3 * 8 * length, 3 * case.hidden
        assert step["all_reduce x2"]["bytes"] == (scores + projected) * 4  # 2 (m-1)/m = 1


def test_overlap_cuts_the_second_collective_and_sends_no_more():
    case = Case(8, 2, 16, seq=12, batch=5)
    whole, cut = (
        run_ranks(count, 2, 2, case, HelixConfig(1, 2, overlap_chunks=chunks), 4, 64)[0] for chunks in (1, 3)
    )
    for one, three in zip(whole, cut, strict=True):
        assert (one["all_to_all x2"]["calls"], three["all_to_all x2"]["calls"]) == (1, 3)
        for name in ("all_gather x2", "all_to_all x2"):
            assert one[name]["bytes"] == three[name]["bytes"]


# ---- shards, in one process ----
SPARE = 0  # block


def _context(blocks: torch.Tensor, places: torch.Tensor, requests: Requests) -> SimpleNamespace:
    """What StepTokens reads of Megatron's context."""
    names = "cu_query_seq_lengths", "kv_seq_lengths", "block_table"
    view = dict(token_to_block_idx=blocks, token_to_local_position_within_kv_block=places)
    metadata = SimpleNamespace(state_data=dict(zip(names, requests.tensors, strict=True)))
    return SimpleNamespace(
        gpu_view=SimpleNamespace(**view), padded_active_token_count=len(blocks),
        kv_block_allocator=SimpleNamespace(dummy_block_idx=SPARE),
        active_attn_metadata={"mha_metadata": metadata}, is_decode_only=lambda: False,
        num_prefill_requests=0,
    )  # fmt: skip


def _pages(lengths: list[int], ranks: int, block: int, wanted: int, seed: int = 0):
    """Requests in a paged cache of every rank, and their keys and values; unwritten memory is NaN.

    Returns: a PagedStep for each rank, that of the prompts; keys; block table.
    """
    generator = torch.Generator().manual_seed(seed)
    total = sum(-(-length // block) for length in lengths)
    numbers = torch.randperm(total, generator=generator) + 1
    table = torch.full((len(lengths), 9), -1, dtype=torch.int32)
    interleave = interleave_of_block(ranks, wanted, block)
    memory = torch.full((ranks, 2, total + 1, block // ranks, 2, 4), torch.nan)
    keys = [torch.randn(length, 2, 4, generator=generator) for length in lengths]
    ends, blocks, places = torch.tensor([0, *lengths]).cumsum(0), [], []
    for request, length in enumerate(lengths):
        needed = -(-length // block)
        table[request, :needed], numbers = numbers[:needed], numbers[needed:]
        positions = torch.arange(length)
        blocks.append(table[request][positions // block])
        places.append(positions % block)
    tokens = torch.cat(blocks), torch.cat(places)
    requests = Requests(ends, torch.tensor(lengths), table)
    steps = []
    for rank in range(ranks):
        step = StepTokens(interleave, rank, graphs=False)
        step.begin(_context(*tokens, requests))
        steps.append(
            PagedStep(
                *memory[rank], interleave, rank, Attention(0.5), step.blocks, step.slots, step.requests, 0
            )
        )
    for step in steps:
        step.write_new_tokens(torch.cat(keys)[:, None], -torch.cat(keys)[:, None])
    return steps, keys, table


def test_the_spare_block_takes_the_tokens_of_other_ranks_and_no_other_block_does():
    lengths, block = [13, 30, 3], 8
    steps, keys, table = _pages(lengths, 2, block, 2)
    for step in steps:
        written = ~step.keys.isnan().all(dim=(-2, -1))  # [blocks, slots]
        assert written[SPARE].tolist() == [True, False, False, False]  # one slot of it, again and again
        for request, length in enumerate(lengths):
            own = [p for p in range(length) if p // 2 % 2 == step.rank]
            slots = torch.cat([torch.arange(4) + 4 * k for k in range(-(-length // block))]) < len(own)
            used = table[request, : -(-length // block)].long()
            assert torch.equal(written[used].flatten(), slots)
            assert torch.equal(step.keys[used].flatten(0, 1)[: len(own)], keys[request][own])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4), st.sampled_from([(2, 8), (4, 8), (2, 6), (3, 12)]),
    st.integers(1, 9), st.sampled_from([None, 0, 5]), st.integers(0, 1000),
)  # fmt: skip
def test_paged_shards_merge_to_attention_over_the_request(lengths, sizes, wanted, left, seed):
    ranks, block = sizes
    steps, keys, table = _pages(lengths, ranks, block, wanted, seed)
    new = [1 + seed % length for length in lengths]  # the last tokens of each request are queries
    ends = torch.tensor([0, *new]).cumsum(0)
    query = torch.randn(int(ends[-1]) + 2, 1, 4, 4)  # two rows of padding
    padded_table = torch.cat([table, table[:1] * 0 - 1])
    requests = Requests(torch.cat([ends, ends[-1:]]), torch.tensor([*lengths, 0]), padded_table)
    steps = [replace(step, attention=Attention(0.5, left), requests=requests) for step in steps]
    rows = len(query)
    parts = [step.attend(query, 0, rows) for step in steps]
    cuts = [0, rows // 3, rows // 2, rows]
    for step, part in zip(steps, parts, strict=True):  # cut anywhere, it is the same
        pieces = [step.attend(query[a:b], a, b) for a, b in pairwise(cuts)]
        for cut, whole in zip(zip(*pieces, strict=True), part, strict=True):
            torch.testing.assert_close(torch.cat(cut), whole, rtol=1e-5, atol=1e-5)
    out, lse = merge_partials(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))
    assert out[-2:].abs().max() == 0 and lse[-2:].isneginf().all()
    for request, key in enumerate(keys):
        rows = slice(int(ends[request]), int(ends[request + 1]))
        window = (-1 if left is None else left, 0)
        expected, expected_lse = host_kernels.attend(query[rows, 0], key, -key, 0.5, True, window)
        torch.testing.assert_close(out[rows, 0], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[rows, 0].T, expected_lse, rtol=1e-5, atol=1e-5)


def test_sequence_shards_in_half_precision_keep_their_log_sum_exps():
    torch.manual_seed(0)
    query, key = torch.randn(9, 2, 4, 8).bfloat16(), torch.randn(9, 2, 2, 8).bfloat16()
    interleave, parts = interleave_of_sequence(2, 2, 9), []
    for rank in range(2):
        slots = interleave.count(rank, 9)
        cache = torch.full((2, slots, 2, 2, 8), torch.nan, dtype=torch.bfloat16)
        step = SequenceStep(*cache, interleave, rank, Attention(0.3), 0)
        step.write_new_tokens(key, key)
        parts.append(step.attend(query, 0, 2))
    assert parts[0][0].dtype is torch.bfloat16 and parts[0][1].dtype is torch.float32
    out, lse = merge_partials(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))
    for b in range(2):
        expected, expected_lse = host_kernels.attend(query[:, b].float(), key[:, b], key[:, b], 0.3, True)
        torch.testing.assert_close(lse[:, b].T, expected_lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out[:, b], expected, rtol=1e-2, atol=1e-2)


# ---- Megatron's dynamic engine ----
@pytest.mark.dynamic_engine
def test_the_dynamic_engine_chooses_the_same_tokens():
    """Prefill, decode and both at once; requests end and start mid-batch."""
    vanilla = run_ranks(generate, 1, 1, None, timeout_s=100)[0]
    assert [len(vanilla["tokens"][r]) for r in (0, 1, 2, 3, 4, 14, 17)] == [12, 3, 9, 20, 6, 5, 8]
    assert len({tuple(tokens) for tokens in vanilla["tokens"].values()}) == 7
    assert vanilla["kinds of steps"] == [(False, True), (True, False), (True, True)]
    found_prompts = sum(map(len, vanilla["prompts"].values()))
    runs = [
        (2, HelixConfig(1, 2, overlap_chunks=3)),
        (4, HelixConfig(2, 2, kv_interleave_size=2, query_placement="dims")),
    ]
    for ranks, helix in runs:
        whole = found_prompts * (helix.head_parallel_size == 2)  # else a rank attends with one KV head of two
        for found in run_ranks(generate, ranks, ranks, helix, timeout_s=150):
            assert found["tokens"] == vanilla["tokens"], helix
            assert found["kinds of steps"] == vanilla["kinds of steps"]
            assert found["prompt tokens by the core"] == whole
            for name in ("block bytes", "bytes of a token"):  # hence T times the blocks in the same buffer
                assert found[name] == vanilla[name] / ranks, name
    inside = [  # of all decode steps, from 18 to 37 tokens of context: two layers, 12 padded requests, 2x2
        {name: (calls, received) for name, calls, received in step if name.endswith("x2")}
        for step in found["collectives of decode steps"]
    ]
    gathered, returned = 12 * (2 + 2 * 1) * 4 * 4, 12 * 2 * (4 + 1) * 4
    assert inside[0] == {"all_gather x2": (2, 2 * gathered), "all_to_all x2": (2, 2 * returned)}
    assert all(step == inside[0] for step in inside)


@pytest.mark.dynamic_engine
@pytest.mark.parametrize(
    "helix, dims",
    [
        pytest.param(HelixConfig(1, 3, overlap_chunks=2), 3, id="uneven"),  # 8/3, rounded up
        pytest.param(HelixConfig(1, 3, slice_weights=(2, 1, 1), query_placement="dims"), 3, id="weights"),
        pytest.param(HelixConfig(1, 3, kv_cache="dim"), 4, id="uneven, a cache of slices"),
    ],
)
def test_the_dynamic_engine_with_uneven_slices(helix, dims):
    """All ranks have equally many blocks and bytes: those of the longest slice, or of 1/m rounded up."""
    vanilla = run_ranks(generate, 1, 1, None, timeout_s=100)[0]
    sizes = dict(block_size_tokens=12, token_rounder=66)
    for found in run_ranks(generate, 3, 3, helix, {}, sizes, timeout_s=150):
        assert found["tokens"] == vanilla["tokens"]
        assert found["bytes of a token"] == vanilla["bytes of a token"] * dims / 8


@pytest.mark.dynamic_engine
@pytest.mark.parametrize(
    "model, inference",
    [
        pytest.param(
            dict(num_attention_heads=6, num_query_groups=1, window_size=(9, 0)), dict(), id="window, MQA"
        ),
        pytest.param(
            dict(num_query_groups=1, qk_layernorm=True, rotary_interleaved=True, normalization="RMSNorm"),
            dict(enable_chunked_prefill=True, max_tokens=16, token_rounder=4),
            id="QK norm, prompts in chunks",
        ),
        pytest.param(dict(hybrid_layer_pattern="*-*-"), dict(), id="hybrid model"),
        pytest.param(
            dict(num_query_groups=1),
            dict(enable_prefix_caching=True, async_sched_mode="async"),
            id="shared prefixes, async",
        ),
    ],
)
def test_the_dynamic_engine_with(model, inference):
    vanilla = run_ranks(generate, 1, 1, None, model, inference, timeout_s=100)[0]
    helix, windowed = HelixConfig(1, 2, kv_interleave_size=3), "window_size" in model
    for found in run_ranks(generate, 2, 2, helix, model, inference, timeout_s=150):
        assert found["tokens"] == vanilla["tokens"]
        assert found["cached prompt tokens"] == (16 if "enable_prefix_caching" in inference else 0)
        # with one KV head; first chunks and prompts that share no prefix
        assert (found["prompt tokens by the core"] > 30) == (model.get("num_query_groups") == 1) or windowed


@pytest.mark.dynamic_engine
def test_what_attention_needs_is_compiled_once_for_each_kind_of_layer():
    windows = dict(window_size=(5, 0), window_attn_skip_freq=2)
    ways = (("heads", (2, 8), windows, [5, None]), ("dims", (4, 4), {}, [None]))
    for placement, piece, model, kinds in ways:
        helix = HelixConfig(1, 2, query_placement=placement)
        for rank, found in enumerate(run_ranks(warmed_up, 2, 2, helix, model)):
            expected = dict(page=(4, 2, 8), heads=4, rank=rank, piece=piece)
            assert found == [expected | {"left": left} for left in kinds]
    assert run_ranks(warmed_up, 2, 2, HelixConfig(2, 1), {}) == [[], []]  # Megatron's own


@pytest.mark.dynamic_engine
def test_the_dynamic_engine_with_a_cache_of_slices():
    """The same prompts, in parts of few scores, with one collective a layer where they fit in one."""
    vanilla = run_ranks(generate, 1, 1, None, timeout_s=100)[0]
    runs = [
        (2, HelixConfig(1, 2, kv_cache="dim")),
        (4, HelixConfig(2, 2, kv_cache="dim")),
        (4, HelixConfig(2, 2, kv_cache="dim", query_placement="heads")),
    ]
    for ranks, helix in runs:
        exchanged = {"all_to_all x2": 4} if helix.query_placement == "heads" else {}
        for found in run_ranks(generate, ranks, ranks, helix, timeout_s=150):
            assert found["tokens"] == vanilla["tokens"], helix
            for name in ("block bytes", "bytes of a token"):
                assert found[name] == vanilla[name] / ranks, name
            for step in found["collectives of decode steps"]:  # of two layers
                inside = {name: calls for name, calls, _ in step if name.endswith("x2")}
                if ranks == 4:  # at 2 ranks linear_proj and the MLP reduce in the same group
                    assert inside == {"all_reduce x2": 2} | exchanged
    windowed = dict(num_attention_heads=6, num_query_groups=1, window_size=(9, 0))
    chunked = dict(enable_chunked_prefill=True, max_tokens=16, token_rounder=4)
    whole = run_ranks(generate, 1, 1, None, windowed, chunked, timeout_s=100)[0]
    for found in run_ranks(generate, 2, 2, runs[0][1], windowed, chunked, timeout_s=100):
        assert found["tokens"] == whole["tokens"]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4), st.sampled_from([None, 0, 5]),
    st.sampled_from([2**9, 2**12, 2**26]), st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_pages_of_slices_give_attention_over_the_request(lengths, left, score_bytes, with_sinks, seed):
    """One rank with whole heads, whose all-reduce is nothing; scores in parts of any size."""
    generator = torch.Generator().manual_seed(seed)
    block, new = 8, [1 + seed % length for length in lengths]
    table, total = torch.full((len(lengths) + 1, 9), -1, dtype=torch.int32), 0
    cache = torch.full((2, sum(-(-n // block) for n in lengths) + 1, block, 2, 4), torch.nan)
    keys = [torch.randn(length, 2, 4, generator=generator) for length in lengths]
    blocks, places = [], []
    for request, (length, key) in enumerate(zip(lengths, keys, strict=True)):
        needed = -(-length // block)
        table[request, :needed] = torch.arange(total + 1, total + 1 + needed)
        total += needed
        positions = torch.arange(length)
        where = table[request][positions // block].long(), positions % block
        old = slice(0, length - new[request])
        cache[0, where[0][old], where[1][old]], cache[1, where[0][old], where[1][old]] = key[old], -key[old]
        blocks.append(where[0][old.stop :])
        places.append(where[1][old.stop :])
    pad = torch.zeros(2, dtype=torch.long)
    ends = torch.tensor([0, *new, 0]).cumsum(0)
    requests = Requests(ends, torch.tensor([*lengths, 0]), table)
    fresh = torch.cat([*(key[-n:] for key, n in zip(keys, new, strict=True)), torch.ones(2, 2, 4)])[:, None]
    query = torch.randn(len(fresh), 1, 4, 4, generator=generator)
    pages = kv_slices.SlicedPages(
        *cache, Attention(0.5, left), torch.cat([*blocks, pad]), torch.cat([*places, pad]), requests
    )
    sums = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_slices, "SCORE_BYTES", score_bytes)
        patch.setattr(kv_slices, "all_reduce_sum", lambda scores, group: sums.append(scores) or scores)
        sinks = torch.randn(4, generator=generator) if with_sinks else None
        out = kv_slices.attend_over_slices(query, fresh, -fresh, pages, None, sinks)
    if score_bytes == 2**26:
        assert len(sums) == 1
    one_row = max(lengths)  # a part is one row at least
    assert all(scores.nbytes <= max(score_bytes, 4 * 4 * one_row) + 4 * 4 * with_sinks for scores in sums)
    assert out[-2:].abs().max() == 0
    for request, key in enumerate(keys):
        rows = slice(int(ends[request]), int(ends[request + 1]))
        window = (-1 if left is None else left, 0)
        expected, lse = host_kernels.attend(query[rows, 0], key, -key, 0.5, True, window)
        if with_sinks:  # an output of 0 beside
            expected = expected * torch.sigmoid(lse.T - sinks).unsqueeze(-1)
        torch.testing.assert_close(out[rows, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.dynamic_engine
def test_the_dynamic_engine_with_speculative_tokens():
    """Several new tokens of a request in a step, some of them rejected: the tokens without speculation."""
    mtp, ahead = dict(mtp_num_layers=2, num_query_groups=1), dict(num_speculative_tokens=2)
    plain = run_ranks(generate, 1, 1, None, mtp, timeout_s=100)[0]
    proposals = {r: plain["prompts"][r] + tokens for r, tokens in plain["tokens"].items()}
    vanilla = run_ranks(generate, 1, 1, None, mtp, ahead, proposals, timeout_s=100)[0]
    assert vanilla["tokens"] == plain["tokens"] and vanilla["steps"] < plain["steps"]
    windowed = mtp | dict(num_attention_heads=6, window_size=(9, 0))
    short = run_ranks(generate, 1, 1, None, windowed, timeout_s=100)[0]
    for kept in (dict(kv_interleave_size=2, overlap_chunks=3), dict(kv_cache="dim")):
        helix = HelixConfig(1, 2, **kept)
        for found in run_ranks(generate, 2, 2, helix, mtp, ahead, proposals, timeout_s=100):
            assert found["tokens"] == plain["tokens"] and found["steps"] == vanilla["steps"]
    for found in run_ranks(generate, 2, 2, HelixConfig(1, 2), windowed, ahead, proposals, timeout_s=100):
        assert found["tokens"] == short["tokens"]


@pytest.mark.dynamic_engine
def test_requests_that_wait_for_blocks_go_on_as_if_they_had_not():
    vanilla = run_ranks(generate, 1, 1, None, timeout_s=100)[0]
    assert vanilla["paused"] == 0
    few = {name: (blocks + 0.5) * 1024 / 2**30 for name, blocks in [("buffer_size_gb", 12), ("paused", 4)]}
    few["paused_buffer_size_gb"] = few.pop("paused")
    for found in run_ranks(generate, 2, 2, HelixConfig(1, 2), {}, few, timeout_s=100):
        assert found["paused"] > 0 and found["tokens"] == vanilla["tokens"]


@pytest.mark.dynamic_engine
@pytest.mark.parametrize("softmax", ["exact", "per-slice"])
def test_the_dynamic_engine_chooses_what_the_whole_sequence_chooses(softmax):
    for cached, whole in run_ranks(generate_without_cache, 2, 2, HelixConfig(1, 2, softmax=softmax)):
        assert cached == whole


@pytest.mark.dynamic_engine
@pytest.mark.parametrize("cache", ["sequence", "dim"])
def test_megatrons_static_engine_as_it_is_by_default(cache):
    """A dynamic engine inside, whose context is sized for a CUDA graph that nobody captures."""
    ((expected, plain),) = run_ranks(generate_by_the_static_engine, 1, 1, None, timeout_s=100)
    assert plain == "SelfAttention" and [len(tokens) for tokens in expected] == [12, 12, 12]
    assert len(set(map(tuple, expected))) == 3
    helix = HelixConfig(1, 2, kv_cache=cache)
    for tokens, kind in run_ranks(generate_by_the_static_engine, 2, 2, helix, timeout_s=100):
        assert kind == "ConfiguredHelixAttention" and tokens == expected


# ---- refusals ----
def test_what_the_cache_does_not_serve_is_refused():
    ways = {
        "causal mask": "ran",
        "padding mask": "not the causal one",
        "window ahead": "looks 1 positions ahead",
        "not causal": "no_mask",
        "too long": "do not fit an inference context of 2 sequences of 4 positions",
        "bias": "attention_bias",
        "graphs": "CUDA graphs (--cuda-graph-impl local) of the static context",
        "context parallelism": "context parallelism",
    }
    for messages in run_ranks(refused, 2, 2, list(ways)):
        for message, part in zip(messages, ways.values(), strict=True):
            assert part in message


@pytest.mark.dynamic_engine
def test_what_the_dynamic_engine_cannot_do_is_refused_when_its_context_is_built():
    ways = [
        (dict(kv_cache="dim"), {}, dict(block_size_tokens=9), "built"),
        ({}, dict(cuda_graph_impl="local"), {}, "built"),
        (dict(kv_cache="dim"), dict(cuda_graph_impl="local"), {}, "(sequence has graphs)"),
        ({}, dict(cuda_graph_impl="local", cuda_graph_warmup_steps=0), {}, "--cuda-graph-warmup-steps 0"),
        ({}, dict(cuda_graph_impl="local"), dict(num_speculative_tokens=2), "replays were never compared"),
        ({}, {}, dict(num_speculative_tokens=2), "built"),
        ({}, {}, dict(use_flashinfer_fused_rope=True), "use_flashinfer_fused_rope"),
        ({}, {}, dict(use_flashinfer_fused_rope=None), "built"),  # None: where FlashInfer is installed
        ({}, {}, dict(use_flashinfer_fused_rope=None, flashinfer=True), "built"),
        ({}, dict(batch_invariant_mode=True), {}, "--batch-invariant-mode"),
        ({}, dict(context_parallel_size=2), {}, "--context-parallel-size"),
        ({}, {}, dict(mamba_inference_state_config=True), "the states of Mamba layers"),
        ({}, {}, dict(block_size_tokens=9), "block of 9 tokens"),
        ({}, {}, {}, "built"),
    ]
    for messages in run_ranks(context_refused, 2, 2, [way[:3] for way in ways]):
        for message, way in zip(messages, ways, strict=True):
            assert way[3] in message, message


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(HelixConfigError, match="per-slice"):
        HelixConfig(softmax="per-slice", kv_cache="sequence")
    with pytest.raises(HelixConfigError, match="at least 1 position"):
        HelixConfig(kv_interleave_size=0)
    with pytest.raises(HelixConfigError, match="1 part at least"):
        HelixConfig(overlap_chunks=0)
    for settings_ in (dict(softmax="per-slice"), dict(kv_cache="dim")):
        with pytest.raises(HelixConfigError, match="no exchange to overlap"):
            HelixConfig(overlap_chunks=2, **settings_)
    with pytest.raises(HelixConfigError, match="auto, sequence, dim"):
        HelixConfig(kv_cache="paged")
