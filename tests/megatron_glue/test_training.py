"""Twenty steps of Megatron's own training loop: every Helix layout trains as vanilla Megatron on one rank.

Features (recompute, experts, ...) have their few steps in test_features.py.
"""

import pytest
import torch

from helix_megatron.host.launcher import RankError
from tests.training import HELIX, MODEL, rank_train

BY_LEVEL = "--helix-hierarchical-allreduce"


@pytest.fixture(scope="module")
def train(trainer):
    """train(ranks, flags) returns the losses that Megatron printed, one a step."""
    return lambda ranks, flags: trainer(ranks, [*MODEL, *flags.split()]).losses


@pytest.fixture(scope="module")
def one_rank(train):
    losses = train(1, "")
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5  # it does learn
    return losses


@pytest.mark.parametrize(
    ("name", "ranks", "flags"),
    [
        ("1x2", 2, f"--tensor-model-parallel-size 2 {HELIX}"),
        ("1x4", 4, f"--tensor-model-parallel-size 4 {HELIX}"),
        ("3x2", 6, f"--tensor-model-parallel-size 6 {HELIX}"),
        ("1x8", 8, f"--tensor-model-parallel-size 8 {HELIX}"),
        ("1x3, uneven slices", 3, f"--tensor-model-parallel-size 3 {HELIX} --helix-head-parallel-size 1"),
        ("1x6, uneven slices", 6, f"--tensor-model-parallel-size 6 {HELIX} --helix-head-parallel-size 1"),
        (
            "by level, weights",
            6,
            f"--tensor-model-parallel-size 6 {HELIX} --helix-slice-weights 3,1 {BY_LEVEL}",
        ),
        ("by level", 6, f"--tensor-model-parallel-size 6 {HELIX} {BY_LEVEL}"),
        ("1x4 summed scores", 4, f"--tensor-model-parallel-size 4 {HELIX} --helix-comm-type all_reduce"),
        ("pipeline", 8, f"--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 {HELIX}"),
    ],
)
def test_losses_of_one_vanilla_rank(train, one_rank, name, ranks, flags):
    assert train(ranks, flags) == pytest.approx(one_rank, abs=1e-4), name


def rank_counting_all_tokens(arguments):
    """rank_train, with multi-token prediction dividing by the tokens of the whole context-parallel group."""
    from megatron.core.transformer import multi_token_prediction

    original = multi_token_prediction.roll_tensor

    def roll_tensor(tensor, *args, cp_group=None, **kwargs):
        rolled, total = original(tensor, *args, cp_group=cp_group, **kwargs)
        if total is not None:
            total = total.float()
            torch.distributed.all_reduce(total, group=cp_group)
            total /= cp_group.size()
        return rolled, total

    multi_token_prediction.roll_tensor = roll_tensor
    rank_train(arguments)


def test_multi_token_prediction_differs_under_context_parallelism_by_megatrons_count_alone(trainer):
    """Megatron divides by a context-parallel rank's own count of rolled tokens; one of them has fewer."""
    model = [*MODEL, *"--mtp-num-layers 1 --train-iters 4".split()]
    sliced = [*model, *f"--tensor-model-parallel-size 2 --context-parallel-size 2 {HELIX}".split()]
    one, own = trainer(1, model), trainer(4, sliced)
    together = trainer(4, sliced, rank_counting_all_tokens)
    assert len(one.losses) == 4
    assert together.losses == pytest.approx(one.losses, abs=2e-5)
    assert list(together.norms.values()) == pytest.approx(list(one.norms.values()), abs=1.1e-3)
    assert own.losses[0] == pytest.approx(one.losses[0], abs=2e-5)  # before the first step
    assert 1e-4 < abs(own.losses[-1] - one.losses[-1]) < 1e-2


def test_per_slice_is_another_model(train, one_rank):
    losses = train(2, f"--tensor-model-parallel-size 2 {HELIX} --helix-softmax per-slice")
    assert losses[-1] < losses[0] - 0.5
    assert max(abs(x - y) for x, y in zip(losses, one_rank, strict=True)) > 1e-3


def test_megatron_alone_refuses_this_model(train):
    with pytest.raises(RankError, match=r"num_attention_heads \(9\) must be a multiple"):
        train(2, "--tensor-model-parallel-size 2")


@pytest.mark.parametrize("precision", ["--bf16", "--fp16 --initial-loss-scale 1024"])
def test_half_precision_trains(train, one_rank, precision):
    losses = train(4, f"--tensor-model-parallel-size 4 {HELIX} {precision}")
    assert losses[-1] == pytest.approx(one_rank[-1], abs=0.05)
