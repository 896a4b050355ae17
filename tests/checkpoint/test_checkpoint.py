"""Checkpoints are Megatron's standard layout: any grid, vanilla at any TP and PP, in both directions."""

import re
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helix_megatron.checkpoint.integrity import read_shards
from helix_megatron.checkpoint.layout import contiguous_runs
from helix_megatron.host.launcher import RankError
from tests.training import HELIX, MODEL

# 48 query and 24 KV heads: vanilla runs at TP 1, 2 and 8, Helix on every grid below. Untied embeddings: with
# tied ones, PP > 1 and fully reshardable optimizer state, vanilla Megatron 0.19 does not read back its own.
SHAPE = "--num-attention-heads 48 --num-query-groups 24 --kv-channels 8 --qk-layernorm --add-qkv-bias".split()
SHAPE += ["--untie-embeddings-and-output-weights"]
LAYOUTS = {
    "vanilla TP1": (1, ""),
    "vanilla TP2": (2, "--tensor-model-parallel-size 2"),
    "vanilla TP2 PP2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "Helix 1x2": (2, f"--tensor-model-parallel-size 2 {HELIX} --helix-dim-parallel-size 2"),
    "Helix 3x2": (6, f"--tensor-model-parallel-size 6 {HELIX} --helix-dim-parallel-size 2"),
    "Helix 2x4": (8, f"--tensor-model-parallel-size 8 {HELIX} --helix-dim-parallel-size 4"),
    "Helix 8x1": (8, f"--tensor-model-parallel-size 8 {HELIX} --helix-dim-parallel-size 1"),
    "Helix 1x3, uneven slices": (3, f"--tensor-model-parallel-size 3 {HELIX} --helix-head-parallel-size 1"),
    "Helix 3x2, weights, whole heads": (
        6,
        f"--tensor-model-parallel-size 6 {HELIX} --helix-dim-parallel-size 2 --helix-slice-weights 3,1 "
        "--helix-query-placement heads",
    ),
    "Helix 1x4, whole heads": (
        4,
        f"--tensor-model-parallel-size 4 {HELIX} --helix-dim-parallel-size 4 --helix-query-placement heads",
    ),
}


@given(st.lists(st.integers(0, 30), min_size=1, unique=True))
def test_contiguous_runs(numbers):
    runs = contiguous_runs(np.array(numbers))
    assert [x for start, length in runs for x in range(start, start + length)] == numbers
    assert all(a + n != b for (a, n), (b, _) in pairwise(runs))


def assert_resumed(losses, straight):
    """The losses after five steps. Megatron logs the second loss of a resumed run averaged with the first."""
    expected = straight[5:]
    expected = [expected[0], (expected[0] + expected[1]) / 2, *expected[2:]]
    assert losses == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def train(trainer):
    """train(ranks, flags) -> the losses printed."""
    common = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
    common += " --override-opt-param-scheduler --train-iters 10 "
    return lambda ranks, flags: trainer(ranks, [*MODEL, *SHAPE, *(common + flags).split()]).losses


@pytest.fixture(scope="module")
def ten_steps(train):
    return train(1, "")


@pytest.fixture(scope="module")
def saved(train, folder, ten_steps):
    """saved(layout) -> the folder of a checkpoint written by it after five steps."""
    made = {}

    def save(name):
        if name not in made:
            ranks, flags = LAYOUTS[name]
            made[name] = folder / re.sub(r"\W+", "_", name)
            losses = train(ranks, f"{flags} --save {made[name]} --save-interval 5 --exit-interval 5")
            assert losses == pytest.approx(ten_steps[:5], abs=1e-4)
        return made[name]

    return save


def tensors(checkpoint, iteration=5, *, verified=False, metadata=None, names=None):
    """Whole tensors of a torch_dist checkpoint, as torch itself reads them, or as Helix does.

    Args:
        metadata: its index, where it has been read already.
        names: of the tensors; all by default.
    """
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(checkpoint / f"iter_{iteration:07d}")
    metadata = metadata or reader.read_metadata()
    reader.read_metadata = lambda: metadata
    whole = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("rng_state")
        if names is None or name in names
    }
    if verified:
        reader.read_data = partial(read_shards, reader, verify=True)
    load(whole, storage_reader=reader, no_dist=True)
    return whole


PAIRS = [
    ("vanilla TP1", "Helix 3x2"),
    ("Helix 3x2", "vanilla TP2 PP2"),
    ("vanilla TP2 PP2", "Helix 2x4"),
    ("Helix 2x4", "Helix 1x4, whole heads"),
    ("Helix 1x4, whole heads", "vanilla TP2"),
    ("vanilla TP2", "Helix 1x2"),
    ("Helix 1x2", "Helix 8x1"),
    ("Helix 8x1", "vanilla TP1"),
    ("vanilla TP2", "Helix 1x3, uneven slices"),
    ("Helix 1x3, uneven slices", "Helix 3x2, weights, whole heads"),
    ("Helix 3x2, weights, whole heads", "Helix 2x4"),
    ("Helix 1x3, uneven slices", "vanilla TP1"),
]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_weights_and_optimizer_bit_for_bit_and_the_next_losses(
    train, saved, ten_steps, folder, source, target
):
    ranks, flags = LAYOUTS[target]
    losses = train(ranks, f"{flags} --load {saved(source)}")
    assert_resumed(losses, ten_steps)
    # Loading and saving again moves nothing: a run that has nothing left to train writes what it read.
    copy = folder / re.sub(r"\W+", "_", f"{source} to {target}")
    train(ranks, f"{flags} --train-iters 5 --load {saved(source)} --save {copy} --save-interval 7")
    before, after = tensors(saved(source)), tensors(copy)
    weights = [name for name in before if "linear_qkv" in name or "linear_proj" in name]
    assert any("exp_avg" in name for name in weights) and any("exp_avg" not in name for name in weights)
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_per_slice_and_exact_do_not_load_each_other(train, saved, folder):
    per_slice = f"{HELIX} --helix-softmax per-slice --helix-dim-parallel-size 2"
    per_slice += " --tensor-model-parallel-size 2"
    with pytest.raises(RankError, match="trained with exact attention, this run has per-slice"):
        train(2, f"{per_slice} --load {saved('vanilla TP1')}")
    written = folder / "per_slice"
    losses = train(2, f"{per_slice} --save {written} --save-interval 5 --exit-interval 5")
    with pytest.raises(RankError, match="per-slice softmax over 2 slices, this run has exact attention"):
        train(1, f"--load {written} --finetune")
    other_grid = per_slice.replace("-model-parallel-size 2", "-model-parallel-size 4")
    more = train(4, f"{other_grid} --load {written}")
    straight = train(2, per_slice)
    assert losses == pytest.approx(straight[:5], abs=1e-4)
    assert_resumed(more, straight)


def test_weights_of_another_function_are_refused(train, saved):
    """Another norm epsilon or RoPE base: the weights would load, and compute something else."""
    ranks, flags = LAYOUTS["Helix 1x2"]
    with pytest.raises(RankError, match=r"--norm-epsilon is 0\.01 here and was 1e-05 in training"):
        train(ranks, f"{flags} --load {saved('Helix 1x2')} --norm-epsilon 0.01")
    with pytest.raises(RankError, match="--rotary-base is 500 here and was 10000 in training"):
        train(ranks, f"{flags} --load {saved('Helix 1x2')} --rotary-base 500")
    tuned = train(ranks, f"{flags} --load {saved('Helix 1x2')} --rotary-base 500 --finetune --train-iters 1")
    assert len(tuned) == 1


def test_a_forgotten_yarn_or_layer_without_rope_is_refused(train, folder):
    """By the flags alone, and where --use-checkpoint-args restores YaRN without its numbers."""
    meant = f"{HELIX} --position-embedding-type yarn --rotary-scaling-factor 4 --no-rope-freq 2"
    meant += " --yarn-original-max-position-embeddings 16"
    written = folder / "yarn"
    losses = train(1, f"{meant} --save {written} --save-interval 5 --exit-interval 5")
    with pytest.raises(RankError) as refused:
        train(1, f"{HELIX} --load {written}")
    no_rope = "--no-rope-freq is not given here and was [0, 1] in training"
    for words in ("--position-embedding-type is rope here and was yarn", no_rope):
        assert words in str(refused.value)
    with pytest.raises(RankError) as refused:
        train(1, f"{HELIX} --load {written} --use-checkpoint-args")
    for words in ("--rotary-scaling-factor is 1.0 here and was 4.0", "is 4096 here and was 16", no_rope):
        assert words in str(refused.value)
    more = train(1, f"{meant} --load {written} --micro-batch-size 1 --attention-dropout 0.1")
    assert len(losses) == len(more) == 5


def test_arguments_come_from_the_checkpoint(train, saved, ten_steps):
    ranks, flags = LAYOUTS["Helix 1x2"]
    losses = train(ranks, f"{flags} --load {saved('Helix 3x2')} --use-checkpoint-args")
    assert_resumed(losses, ten_steps)


def test_asynchronous_saving(train, ten_steps, folder):
    ranks, flags = LAYOUTS["Helix 1x2"]
    written = folder / "async"
    train(ranks, f"{flags} --save {written} --save-interval 5 --exit-interval 5 --async-save")
    losses = train(1, f"--load {written}")
    assert_resumed(losses, ten_steps)


def test_a_checkpoint_of_whole_heads_is_not_read_as_slices(train, folder):
    """Megatron's old format: a file for each rank, whose tensors have the shapes of the slices."""
    old = folder / "old_format"
    saving = f"--save {old} --save-interval 5 --exit-interval 5"
    train(2, f"--tensor-model-parallel-size 2 --ckpt-format torch {saving}")
    with pytest.raises(RankError, match="is not a torch_dist checkpoint"):
        train(2, f"{LAYOUTS['Helix 1x2'][1]} --load {old} --auto-detect-ckpt-format")
