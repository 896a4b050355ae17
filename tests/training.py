"""Megatron's own training loop in ranks of this machine, and what it prints; the fixture is `trainer`."""

import re
from dataclasses import dataclass

from helix_megatron.host.launcher import run_ranks

HELIX = "--attention-impl helix"
# Everything but the shape: what a host run of a tiny model needs.
LOOP = """--micro-batch-size 2 --global-batch-size 4 --position-embedding-type rope --swiglu
    --normalization RMSNorm --disable-bias-linear --lr 2e-3 --min-lr 1e-3
    --lr-decay-style constant --clip-grad 1.0 --seed 7 --use-cpu-initialization --transformer-impl local
    --attention-backend unfused --no-masked-softmax-fusion --no-rope-fusion --no-bias-dropout-fusion
    --no-bias-swiglu-fusion --no-gradient-accumulation-fusion --no-persist-layer-norm
    --tokenizer-type NullTokenizer --mock-data --num-workers 0 --eval-iters 0 --eval-interval 100
    --log-interval 1""".split()
# 9 query and 3 KV heads: Megatron refuses them at every T but 1 and 3.
MODEL = [
    *LOOP,
    *"""--num-layers 2 --hidden-size 72 --num-attention-heads 9 --group-query-attention --num-query-groups 3
    --kv-channels 16 --ffn-hidden-size 192 --seq-length 48 --max-position-embeddings 48 --train-iters 20
    --attention-dropout 0 --hidden-dropout 0 --vocab-size 264 --make-vocab-size-divisible-by 1""".split(),
]


def rank_train(arguments):
    """Train in this rank, from the same weights whatever the layout."""
    from helix_megatron import pretrain_gpt
    from helix_megatron.compare.start import same_weights_at_any_layout
    from helix_megatron.megatron import entry, integrate

    entry.use_built_helpers()
    integrate.install()
    with same_weights_at_any_layout(seed=7):
        pretrain_gpt.train(arguments)


@dataclass
class Printed:
    """What the last rank printed: {iteration: lm loss} and {iteration: gradient norm}."""

    steps: dict[int, float]
    norms: dict[int, float]

    @property
    def losses(self) -> list[float]:
        return list(self.steps.values())


class Trainer:
    """trainer(ranks, arguments) -> Printed. Mock data's index is made once for all runs.

    Args:
        new_folder: makes a folder for logs.
        index: folder of Megatron's data index.
    """

    def __init__(self, new_folder, index):
        self.new_folder, self.index = new_folder, index

    def __call__(self, ranks, arguments, function=rank_train, args=(), timeout_s=240) -> Printed:
        logs = self.new_folder()
        arguments = [*arguments, "--data-cache-path", str(self.index)]
        run_ranks(function, ranks, arguments, *args, timeout_s=timeout_s, log_dir=logs)
        text = (logs / f"rank_{ranks - 1}.log").read_text()
        found = re.findall(r"iteration +(\d+)/.*lm loss: (\S+) .*grad norm: (\S+) ", text)
        steps = {int(iteration): float(loss) for iteration, loss, _ in found}
        return Printed(steps, {int(iteration): float(norm) for iteration, _, norm in found})
