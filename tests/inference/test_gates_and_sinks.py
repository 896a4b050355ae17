"""Inference with output gates and attention sinks: layers against float64, models against transformers."""

import pytest
import torch

from helix_megatron.check.reference import Case
from helix_megatron.exchange.slices import share_of_sinks
from helix_megatron.host.launcher import run_ranks
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import AttentionShape, HelixGrid
from helix_megatron.partition.layout import HelixLayout
from tests.inference import known_models
from tests.inference.kv_cache_worker import decode_all, generate_like


@pytest.mark.parametrize(
    "heads, grid, placement", [(8, (1, 4), "dims"), (8, (1, 4), "heads"), (6, (2, 4), "dims")]
)
def test_the_shares_of_a_dim_group_have_each_sink_once(heads, grid, placement):
    """Also where two ranks attend with the same heads."""
    layout = HelixLayout(AttentionShape(heads, 2, 8, 8), HelixGrid(*grid), placement)
    of_heads = torch.randn(layout.query_heads)
    parts = grid[1] if placement == "heads" else layout.head_parts
    own = [of_heads.chunk(parts)[rank * parts // grid[1]] for rank in range(grid[1])]
    shares = [share_of_sinks(sinks.bfloat16(), layout, rank) for rank, sinks in enumerate(own)]
    assert torch.equal(sum(shares), of_heads.bfloat16().float())


@pytest.mark.parametrize("tp, grids", [(1, [(1, 1)]), (8, [(1, 8), (2, 4)])])
def test_gates_and_sinks_whatever_the_number_of_ranks(tp, grids):
    """One rank is Megatron itself; among eight most shards are empty, and a sink still counts once."""
    jobs = [
        (
            Case(heads, 2, 32, seq=7, gate=True, sinks=True, seed=3),
            HelixConfig(n, m, kv_cache=cache, kv_interleave_size=2, query_placement=placement),
            [3],
        )
        for n, m in grids
        for cache in ("sequence", "dim")
        for placement in ("dims", "heads")
        for heads in (16, 6)  # where ranks share a head the sinks are off by one
        if placement == "dims" or heads // n % m == 0
    ]
    for rank in run_ranks(decode_all, tp, tp, jobs):
        for name, error, _ in rank:
            assert error < 2e-6, name


PROMPTS, NEW = [[7], [5, 11, 2, 90, 31], list(range(3, 40, 2))], 12


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Of each model its settings, a file of its weights, and what transformers chooses after PROMPTS."""
    found = {}
    for make in (known_models.qwen, known_models.gpt_oss):
        theirs, config, tables = make()
        weights = tmp_path_factory.mktemp("known") / f"{make.__name__}.pt"
        torch.save(known_models.standard_weights(theirs), weights)
        answers = known_models.greedy(theirs, PROMPTS, NEW)
        assert len({tuple(answer) for answer in answers}) == len(answers)
        assert len({token for answer in answers for token in answer}) > NEW
        shape = dict(
            num_attention_heads=known_models.HEADS, num_query_groups=known_models.GROUPS,
            ffn_hidden_size=known_models.FFN, gated_linear_unit=True, normalization="RMSNorm",
            layernorm_epsilon=1e-5, tables=tables,
        )  # fmt: skip
        found[make.__name__] = shape | config, str(weights), answers
    return found


@pytest.mark.dynamic_engine
@pytest.mark.parametrize(
    "tp, grid, placement",
    [(1, (1, 1), "auto"), (2, (1, 2), "auto"), (4, (2, 2), "dims"), (8, (2, 4), "auto")],
)
def test_gated_models_and_models_with_sinks_choose_the_tokens_of_transformers(known, tp, grid, placement):
    """Prompts together, and then their tokens; beside caches of positions and of slices."""
    runs, expected = [], []
    for settings, weights, answers in known.values():
        for cache in ("sequence", "dim")[: 2 if tp > 1 else 1]:
            helix = HelixConfig(
                *grid, kv_cache=cache, kv_interleave_size=2, query_placement=placement,
                rotary_percent=settings["tables"].get("rotary_percent", 1.0),
            )  # fmt: skip
            runs.append((helix, settings, weights))
            expected.append(answers)
    for found in run_ranks(generate_like, tp, tp, runs, PROMPTS, NEW, timeout_s=150):
        assert found == expected
