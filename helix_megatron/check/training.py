"""Megatron's own training loop: the loss of every step, Helix against vanilla on one rank.

In fp32 the losses agree to rounding. In bf16 and FP8 a step amplifies rounding, so vanilla at T = 3, which
may split the model (9 query and 3 KV heads), says how much two exact layouts differ anyway; the quick form
does without.
"""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from helix_megatron.check.rows import NO_TIME, Place, Rows, first_line
from helix_megatron.host.launcher import RankError

LOOP = """--micro-batch-size 2 --global-batch-size 4 --position-embedding-type rope --swiglu --normalization
    RMSNorm --disable-bias-linear --lr 1e-3 --min-lr 1e-3 --lr-decay-style constant --clip-grad 1.0 --seed 7
    --use-cpu-initialization --num-layers 2 --num-attention-heads 9 --group-query-attention
    --num-query-groups 3 --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 1
    --tokenizer-type NullTokenizer --mock-data --num-workers 0 --eval-iters 0 --eval-interval 1000
    --log-interval 1 --no-gradient-accumulation-fusion""".split()
LOCAL = """--transformer-impl local --attention-backend unfused --no-masked-softmax-fusion --no-rope-fusion
    --no-bias-dropout-fusion --no-bias-swiglu-fusion --no-persist-layer-norm""".split()
SMALL = """--hidden-size 72 --kv-channels 16 --ffn-hidden-size 192 --seq-length 48
    --max-position-embeddings 48 --vocab-size 264""".split()
LARGE = """--hidden-size 1152 --kv-channels 128 --ffn-hidden-size 3072 --seq-length 1152
    --max-position-embeddings 1152 --vocab-size 2304""".split()
"""2, 3 and 6 divide the vocabulary, which then has no padding, and the sequence, which is shared."""
PRECISIONS = {
    "fp32": [],
    "bf16": ["--bf16"],
    "fp8": "--bf16 --fp8-format hybrid --fp8-recipe delayed".split(),
}
LIMITS = {"fp32": 1e-4, "bf16": 0.03, "fp8": 0.1}
TIMES_VANILLA = 3.0
"""How many times the difference of two vanilla layouts is allowed, where that is more than the limit."""
HELIX = "--attention-impl helix"


@dataclass(frozen=True)
class Run:
    """A row of the table.

    Args:
        flags: beside the model's; SAVE and LOAD stand for a folder that runs of one precision share.
        steps: up to which it trains.
        against: the run whose losses it must have; empty: none, it is vanilla's.
    """

    name: str
    ranks: int
    flags: str = ""
    against: str = "vanilla"
    quick: bool = True
    noise: bool = False
    """Its difference from vanilla is no fault but the yardstick of the others."""


STEPS, SAVED = 6, 4
MOVES = (
    "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"  # the optimizer's state, to any grid
)
T2, RECOMPUTE = "--tensor-model-parallel-size 2", "--recompute-granularity full --recompute-method uniform"
OVERLAPPED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
SAVES = f"{MOVES} --save SAVE --save-interval {SAVED} --exit-interval {SAVED}"
T6 = f"--tensor-model-parallel-size 6 --sequence-parallel {HELIX}"
RUNS = (
    Run("vanilla", 1, against=""),
    Run("vanilla T=3", 3, "--tensor-model-parallel-size 3", quick=False, noise=True),
    Run("1x2, saves", 2, f"{T2} {HELIX} {SAVES}"),
    Run("3x2 loads, sequence parallel", 6, f"{T6} {MOVES} --load SAVE", quick=False),
    Run("vanilla loads", 1, f"{MOVES} --load SAVE"),
    Run("1x2, sequence parallel", 2, f"{T2} --sequence-parallel {HELIX}", quick=False),
    Run("1x2, full recompute", 2, f"{T2} {RECOMPUTE} --recompute-num-layers 1 {HELIX}", quick=False),
    Run("1x2, context parallel 2", 4, f"{T2} --context-parallel-size 2 {HELIX}", quick=False),
    Run("1x2, distributed optimizer, overlapped", 4, f"{T2} {OVERLAPPED} {HELIX}", quick=False),
)


def check(rows: Rows, place: Place) -> None:
    """Every precision that runs here: vanilla, then the others against it; what `--quick` has comes first."""
    from helix_megatron import compat

    if not compat.has_training():
        rows.add("all", "skipped", "this megatron-core has no training loop that Helix serves")
        return
    te = not place.on_host and find_spec("transformer_engine") is not None
    wanted = precisions(te, place.quick)
    if "fp8" not in wanted:
        rows.add("FP8", "skipped", "--quick leaves it out" if te else "needs a GPU and Transformer Engine")
    with tempfile.TemporaryDirectory(prefix="helix-check-") as folder:
        series = [Series(precision, te, Path(folder, precision)) for precision in wanted]
        for first in (True,) if place.quick else (True, False):
            for one in series:
                for run in RUNS:
                    if (run.quick or (run.noise and not place.quick)) == first:
                        one.add(run, rows, place)


def precisions(te: bool, quick: bool) -> list[str]:
    """Those that are trained in, with Transformer Engine or without."""
    if te:
        return ["bf16"] if quick else ["bf16", "fp8"]
    return ["fp32"] if quick else ["fp32", "bf16"]


@dataclass
class Series:
    """The runs of one precision, and the losses of those that ended.

    Args:
        te: Transformer Engine's layers, else Megatron's local ones.
        folder: of its checkpoint and its logs.
    """

    precision: str
    te: bool
    folder: Path
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    noise: float = 0.0
    """By how much two layouts of vanilla Megatron differ."""

    def add(self, run: Run, rows: Rows, place: Place) -> None:
        """Train, and write the row."""
        name = f"{run.name}, {self.precision}"
        if run.against and run.against not in self.losses:
            rows.add(name, "skipped", f"{run.against} has no losses to compare with")
            return
        if not place.has_time:
            rows.add(name, "skipped", NO_TIME)
            return
        try:
            losses = train(run, place, self.precision, self.te, self.folder)
        except RankError as error:
            print(error, flush=True)
            rows.add(name, "failed", first_line(error))
            return
        detail, every = " ".join(f"{loss:.5f}" for loss in losses.values()), list(losses.values())
        wrong = find_bad_losses(losses, saves="--exit-interval" in run.flags, loads="--load" in run.flags)
        if wrong:
            rows.add(name, "failed", f"{wrong}: {detail}", losses=every)
            return
        self.losses[run.name] = losses
        if not run.against:
            rows.add(name, "ok", detail, losses=every)
            return
        apart = largest_difference(losses, self.losses[run.against])
        self.noise = max(self.noise, apart) if run.noise else self.noise
        status, told = judge(apart, self.precision, self.noise, run.noise)
        given = f"{told}; {place.words(run.ranks)}; {detail}"
        rows.add(name, status, given, difference=apart, losses=every)


def find_bad_losses(losses: dict[int, float], saves: bool = False, loads: bool = False) -> str:
    """What is wrong with a loss series whatever it is compared with; empty: nothing."""
    first, last = SAVED + 1 if loads else 1, SAVED if saves else STEPS
    if list(losses) != list(range(first, last + 1)):
        return f"losses of steps {list(losses)} were printed, those of {first} to {last} were expected"
    if not all(math.isfinite(loss) for loss in losses.values()):
        return "a loss is not finite"
    return ""


def largest_difference(losses: dict[int, float], others: dict[int, float]) -> float:
    """The greatest, over the steps of the first."""
    return max(abs(loss - others[step]) for step, loss in losses.items())


def judge(apart: float, precision: str, noise: float, is_noise: bool) -> tuple[str, str]:
    """(status, detail) of a difference from vanilla; `noise`: of two vanilla layouts."""
    limit = max(LIMITS[precision], TIMES_VANILLA * noise)
    told = f"at most {apart:.1e} from vanilla"
    if is_noise:
        return "measured", f"{told}: what two vanilla layouts differ by"
    if not apart <= limit:
        return "failed", f"{told}, allowed {limit:.1e}"
    return "ok", told


def train(run: Run, place: Place, precision: str, te: bool, folder: Path) -> dict[int, float]:
    """Step to loss, as the last rank printed them."""
    logs = folder / re.sub(r"\W+", "_", run.name)
    flags = [*LOOP, *(LARGE if not place.on_host else SMALL), *([] if te else LOCAL), *PRECISIONS[precision]]
    if not place.on_host:  # weights drawn on the CPU stay there without it
        flags.append("--use-distributed-optimizer")
    flags += run.flags.replace("SAVE", str(folder / "checkpoint")).split()
    flags += ["--train-iters", str(STEPS), "--data-cache-path", str(folder.parent / "index")]
    place.run(rank_train, run.ranks, flags, log_dir=logs)
    return read_losses((logs / f"rank_{run.ranks - 1}.log").read_text(errors="replace"))


def read_losses(text: str) -> dict[int, float]:
    """{step: lm loss} of what Megatron printed.

    It forgets nothing after the first step of a run, so the second line is the mean of two steps.
    """
    found = [
        (int(step), float(loss)) for step, loss in re.findall(r"iteration +(\d+)/.*?lm loss: (\S+)", text)
    ]
    if len(found) > 1:
        found[1] = found[1][0], 2 * found[1][1] - found[0][1]
    return dict(found)


def rank_train(flags: list[str]) -> None:
    """In a rank: train from the same weights whatever the layout."""
    from helix_megatron import pretrain_gpt
    from helix_megatron.measure.start import same_weights_at_any_layout
    from helix_megatron.megatron import entry, integrate

    entry.use_built_helpers()
    integrate.install()
    with same_weights_at_any_layout(seed=7):
        pretrain_gpt.train(flags)
