"""Twenty steps of Megatron's own training loop: every Helix layout trains as vanilla Megatron on one rank."""

import re

import pytest

from helix_megatron.launch import RankError, run_ranks

MODEL = """--num-layers 2 --hidden-size 72 --num-attention-heads 9 --group-query-attention
    --num-query-groups 3 --kv-channels 16 --ffn-hidden-size 192 --seq-length 48 --max-position-embeddings 48
    --micro-batch-size 2 --global-batch-size 4 --position-embedding-type rope --swiglu
    --normalization RMSNorm --disable-bias-linear --train-iters 20 --lr 2e-3 --min-lr 1e-3
    --lr-decay-style constant --clip-grad 1.0 --seed 7 --use-cpu-initialization --transformer-impl local
    --attention-backend unfused --no-masked-softmax-fusion --no-rope-fusion --no-bias-dropout-fusion
    --no-bias-swiglu-fusion --no-gradient-accumulation-fusion --no-persist-layer-norm
    --attention-dropout 0 --hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 264
    --make-vocab-size-divisible-by 1 --mock-data --num-workers 0 --eval-iters 0 --eval-interval 100
    --log-interval 1""".split()
HELIX = "--attention-impl helix"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def rank_train(arguments):
    from helix_megatron import entry, integrate, pretrain_gpt
    from helix_megatron.compare.start import same_weights_at_any_layout

    entry.use_built_helpers()
    integrate.install()
    with same_weights_at_any_layout(seed=7):
        pretrain_gpt.train(arguments)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(ranks, flags) returns the losses that Megatron printed, one a step."""
    cache = tmp_path_factory.mktemp("index")

    def run(ranks, flags):
        logs = tmp_path_factory.mktemp("logs")
        arguments = [*MODEL, "--data-cache-path", str(cache), *flags.split()]
        run_ranks(rank_train, ranks, arguments, timeout_s=240, log_dir=logs)
        text = (logs / f"rank_{ranks - 1}.log").read_text()
        return [float(loss) for loss in re.findall(r"lm loss: (\S+) ", text)]

    return run


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
        ("1x4 summed scores", 4, f"--tensor-model-parallel-size 4 {HELIX} --helix-comm-type all_reduce"),
        ("pipeline", 8, f"--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 {HELIX}"),
        ("data", 8, f"--tensor-model-parallel-size 4 --use-distributed-optimizer {HELIX}"),
        ("sequence parallel", 4, f"--tensor-model-parallel-size 4 --sequence-parallel {HELIX}"),
        ("full recompute", 4, f"--tensor-model-parallel-size 4 {RECOMPUTE} {HELIX}"),
        ("selective recompute", 2, f"--tensor-model-parallel-size 2 --recompute-activations {HELIX}"),
    ],
)
def test_losses_of_one_vanilla_rank(train, one_rank, name, ranks, flags):
    assert train(ranks, flags) == pytest.approx(one_rank, abs=1e-4), name


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
