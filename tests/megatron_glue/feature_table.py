"""Every feature of Megatron's training beside sliced heads: what works, what is refused; docs/features.md.

    python -m tests.megatron_glue.feature_table --write    compared with the file by a test
    python -m tests.megatron_glue.feature_table --only YaRN    some rows

A feature trains the same few steps twice: with vanilla Megatron, on one rank unless said otherwise, and with
Helix on four ranks, from the same weights. It works when every loss and gradient norm agrees, and when it was
really on: either vanilla computes something else without it, or a function of its own was counted.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.megatron_glue.feature_worker import PACKED, in_batches
from tests.megatron_glue.te_environment import available, environment
from tests.training import LOOP

PAGE = Path(__file__).parents[2] / "docs/features.md"
MODEL = [
    *LOOP,
    *"""--num-layers 2 --hidden-size 48 --num-attention-heads 6 --group-query-attention --num-query-groups 2
    --kv-channels 16 --ffn-hidden-size 96 --seq-length 32 --max-position-embeddings 32 --train-iters 3
    --attention-dropout 0 --hidden-dropout 0 --vocab-size 264 --make-vocab-size-divisible-by 1
    --init-method-std 0.2""".split(),  # with 0.02 scores are nearly nothing, and so is what RoPE does to them
]
LOSS, NORM = 1e-4, 1e-4  # what may differ: absolute, relative
OTHER = 20  # times that is another computation
SHARED = "--tensor-model-parallel-size 4"  # 2x2: m does not divide 3 query heads: positions are shared
WHOLE = "--tensor-model-parallel-size 2 --helix-head-parallel-size 1"  # 1x2: whole query heads, 2 data ranks
STAGES = f"{WHOLE} --pipeline-model-parallel-size 2"
DIMS = "--helix-query-placement dims"
ODD = "--num-attention-heads 3 --num-query-groups 1"  # in 1x2, positions are shared
EVEN = "--num-attention-heads 8 --num-query-groups 2"
SELECTIVE = "--recompute-granularity selective --recompute-modules"
FULL = "--recompute-granularity full --recompute-num-layers 1 --recompute-method"
BY_LEVEL = "--helix-hierarchical-allreduce"
MOE = "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none --moe-ffn-hidden-size 48"
FP8 = "--bf16 --fp8-format hybrid"
BUFFERS = "--hidden-size 64"  # four parts of whole groups of 8 columns
EXPERTS_2 = "--sequence-parallel --expert-model-parallel-size 2"
SHARED_EXPERT = "--moe-shared-expert-intermediate-size 48"
CP = "--context-parallel-size 2"
REDUCED = ("reduced by level",)
GATHERED = ("whole sequence gathered",)
FAST = "--lr 2e-2 --min-lr 2e-2"  # or sinks hardly move in three steps
LEARNABLE = "--softmax-type learnable"
WINDOW = "--window-size 8,0"
DOCUMENTS = "--reset-position-ids --reset-attention-mask --eod-mask-loss"
WEIGHTS = "--helix-slice-weights 3,1"
WEIGHTED = "slices of 12, 4"
ALL_ROWS = "--qk-layernorm --add-qkv-bias --attention-output-gate"
UNEVEN = "--tensor-model-parallel-size 3"  # 1x3: m divides neither the 16 dimensions nor the 8 rotary pairs
PER_SLICE = "--helix-softmax per-slice"
ADAPTIVE = "--helix-adaptive-grad-scaling"
FUSED_WGRAD = ("--no-gradient-accumulation-fusion",)
YARN = (
    "--position-embedding-type yarn --rotary-scaling-factor 4 --yarn-original-max-position-embeddings 8 "
    "--mscale 1 --mscale-all-dim 0"
)
SLICES_AS_HEADS = "--num-attention-heads 12 --num-query-groups 4 --kv-channels 8"  # its vanilla model, m = 2
ROUNDED = 0.01
FP16 = "--fp16 --initial-loss-scale 1024"
ONE = "--micro-batch-size 1"
NO_ROPE = "--position-embedding-type none"
HYBRID = "--hybrid-layer-pattern"
MAMBA = "--mamba-num-heads 4 --mamba-head-dim 16 --mamba-state-dim 16 --mamba-num-groups"
GDN = (
    "--linear-key-head-dim 8 --linear-value-head-dim 8 --linear-conv-kernel-dim 2 "
    "--linear-num-value-heads 8 --linear-num-key-heads"
)
SQUARE = "--tensor-model-parallel-size 4 --helix-dim-parallel-size 2"
# A gated delta net draws its weights rank by rank: both runs have four.
OF_FOUR_RANKS = {
    "reference": "--tensor-model-parallel-size 4",
    "shape": "--deterministic-mode --num-attention-heads 12 --num-query-groups 4",
    "te": True,
}
SPECS = "--spec helix_megatron.megatron.specs"


@dataclass(frozen=True)
class Feature:
    """One row of the table.

    Args:
        name: what the row says.
        flags: of the Helix run only: its layout, and what must not change the losses.
        model: flags of both runs that do change them: vanilla must compute something else without them.
        reference: layout of the vanilla run, which then has four ranks.
        shape: more flags of both runs, which are not the feature.
        vanilla: flags of the vanilla run only, which make it Helix's model.
        without: flags of MODEL that the Helix run leaves out.
        te: both runs have Transformer Engine's layers, on torch versions of its kernels.
        ranks: of the Helix run.
        ran: names in feature_worker.COUNTED that must be called in the Helix run, and are not in the
            first row of these layers.
        says: part of what Helix prints of its plan.
        loss, norm: what may differ.
    """

    name: str
    flags: str
    model: str = ""
    reference: str = ""
    shape: str = ""
    vanilla: str = ""
    without: tuple[str, ...] = ()
    te: bool = False
    ranks: int = 4
    ran: tuple[str, ...] = ()
    says: str = ""
    loss: float = LOSS
    norm: float = NORM

    @property
    def title(self) -> str:
        """The row's name on the page."""
        return f"{self.name} (Transformer Engine's layers on torch kernels)" if self.te else self.name

    def runs(self) -> dict[str, Run]:
        """{which: its run}: "helix", "vanilla", and "off", vanilla without the feature."""
        impl = "transformer_engine" if self.te else "local"
        both = ["--transformer-impl", impl, *self.shape.split()]
        ranks, off = 4 if self.reference else 1, [*MODEL, *both, *self.reference.split()]
        helix = [*(flag for flag in MODEL if flag not in self.without), *both, *self.model.split()]
        found = {
            "helix": Run(self.te, self.ranks, (*helix, *self.flags.split(), "--attention-impl", "helix")),
            "vanilla": Run(self.te, ranks, (*off, *self.model.split(), *self.vanilla.split())),
        }
        if self.model or self.vanilla:
            found["off"] = Run(self.te, ranks, tuple(off))
        return found


@dataclass(frozen=True)
class Run:
    """Whether it has Transformer Engine's layers, its ranks, Megatron's command line."""

    te: bool
    ranks: int
    line: tuple[str, ...]


F = Feature
FEATURES = [
    F("nothing else, 2x2", SHARED),
    F("nothing else, 1x2, data parallel", WHOLE),
    F("nothing else, 2x2", SHARED, te=True),
    F("nothing else, 2x2, summed scores", f"{SHARED} --helix-comm-type all_reduce", ran=("summed scores",)),
    F("pipeline stages", STAGES, ran=("stages",)),
    F(
        "virtual pipeline stages",
        f"{STAGES} --num-layers-per-virtual-pipeline-stage 1",
        shape="--num-layers 4",
        ran=("virtual stages",),
    ),
    F("sequence parallel", f"{SHARED} --sequence-parallel", ran=("sequence shared",)),
    F("distributed optimizer", f"{WHOLE} --use-distributed-optimizer", ran=("distributed step",)),
    F("overlapped gradient reduction", f"{WHOLE} --overlap-grad-reduce", ran=("reduced in backward",)),
    F(
        "distributed optimizer, overlapped reduction and gather",
        f"{WHOLE} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        ran=("distributed step", "reduced in backward", "gathered in forward"),
    ),
    F("gradient-accumulation fusion (torch kernel)", SHARED, without=FUSED_WGRAD, ran=("fused wgrad",)),
    F(
        "GEMM overlap (`--tp-comm-overlap`), bf16",
        f"{SHARED} --sequence-parallel --tp-comm-overlap",
        shape=f"--bf16 {BUFFERS}",
        te=True,
        ran=("GEMM overlapped",),
        loss=ROUNDED,
        norm=ROUNDED,
    ),
    F(
        "GEMM overlap, slice weights, bf16",
        f"{WHOLE} {WEIGHTS} --sequence-parallel --tp-comm-overlap",
        shape=f"--bf16 {BUFFERS}",
        te=True,
        ran=("GEMM overlapped",),
        says=WEIGHTED,
        loss=ROUNDED,
        norm=ROUNDED,
    ),
    F("GEMM overlap, parts of 12 columns", f"{SHARED} --sequence-parallel --tp-comm-overlap", te=True),
    F("hierarchical all-reduce", f"{SHARED} {BY_LEVEL}", ran=REDUCED),
    F("hierarchical all-reduce, sequence parallel", f"{SHARED} {BY_LEVEL} --sequence-parallel"),
    F(
        "hierarchical all-reduce, GEMM overlap",
        f"{SHARED} {BY_LEVEL} --sequence-parallel --tp-comm-overlap",
    ),
    F("hierarchical all-reduce", f"{SHARED} {BY_LEVEL}", te=True, ran=REDUCED),
    F("hierarchical all-reduce, FP8", f"{SHARED} {BY_LEVEL}", shape=f"{EVEN} {FP8}", te=True),
    F("full recompute, uniform", f"{SHARED} {FULL} uniform", ran=("recomputed",)),
    F("full recompute, block", f"{SHARED} {FULL} block", ran=("recomputed",)),
    F(
        "recompute, distributed saved activations",
        f"{SHARED} {FULL} uniform --distribute-saved-activations",
        ran=("recomputed", "gathered saved activations"),
    ),
    F("recompute of core_attn", f"{SHARED} {SELECTIVE} core_attn", ran=("recomputed",)),
    F("recompute of mlp, core_attn", f"{SHARED} {SELECTIVE} mlp core_attn", te=True, ran=("recomputed",)),
    F(
        "recompute of layernorm, mixture of experts",
        f"{SHARED} --sequence-parallel {SELECTIVE} layernorm",
        MOE,
        te=True,
        ran=("output recomputed",),
    ),
    F("recompute of moe", f"{WHOLE} --sequence-parallel {SELECTIVE} moe", MOE, ran=("recomputed",)),
    F(
        "recompute of shared_experts",
        f"{SHARED} --sequence-parallel {SELECTIVE} shared_experts",
        SHARED_EXPERT,
        shape=MOE,
        ran=("recomputed",),
    ),
    F(
        "activation offload, by module",
        f"{SHARED} --fine-grained-activation-offloading --offload-modules core_attn attn_proj "
        "--min-offloaded-tensor-size 1",
        te=True,
        ran=("offloaded by module",),
    ),
    F(
        "activation offload, by layer",
        f"{SHARED} --cpu-offloading-num-layers 1",
        te=True,
        ran=("offloaded by layer",),
    ),
    F("context parallel 2, 1x2", f"{WHOLE} {CP}", ran=GATHERED),
    F("context parallel 2, 1x2", f"{WHOLE} {CP}", te=True, ran=GATHERED),
    F("context parallel 2, 1x2, `dims`", f"{WHOLE} {DIMS} {CP}", ran=GATHERED, says="placement dims"),
    F("context parallel 2, shared positions", f"{WHOLE} {CP}", shape=ODD, ran=GATHERED),
    F("context parallel 2, window", f"{WHOLE} {CP}", WINDOW, ran=GATHERED),
    F("context parallel 2, all_reduce", f"{WHOLE} {CP} --helix-comm-type all_reduce"),
    F("masks of documents", SHARED, DOCUMENTS),
    F("masks of documents", SHARED, DOCUMENTS, te=True),
    F("mixture of experts", f"{SHARED} --sequence-parallel", MOE),
    F("mixture of experts", f"{SHARED} --sequence-parallel", MOE, te=True),
    F(
        "expert parallel 2, expert tensor parallel 2",
        f"{WHOLE} {EXPERTS_2} --expert-tensor-parallel-size 2",
        MOE,
        f"--tensor-model-parallel-size 2 {EXPERTS_2} --expert-tensor-parallel-size 2",
    ),
    F(
        "expert parallel 2, expert tensor parallel 1",
        f"{SHARED} {EXPERTS_2} --expert-tensor-parallel-size 1",
        MOE,
        "--expert-model-parallel-size 2 --micro-batch-size 1",
    ),
    F(
        "shared expert, all-to-all dispatcher",
        f"{SHARED} --sequence-parallel --moe-token-dispatcher-type alltoall",
        SHARED_EXPERT,
        shape=MOE,
    ),
    F("dense and expert layers", f"{SHARED} --sequence-parallel", "--moe-layer-freq [0,1]", shape=MOE),
    F("multi-token prediction", SHARED, "--mtp-num-layers 1"),
    F("multi-token prediction", SHARED, "--mtp-num-layers 1", te=True),
    F(
        "multi-token prediction, stages",
        STAGES,
        "--mtp-num-layers 1",
        "--pipeline-model-parallel-size 2",
    ),
    F("untied embeddings", SHARED, "--untie-embeddings-and-output-weights"),
    F("untied embeddings, stages", STAGES, "--untie-embeddings-and-output-weights"),
    F("sliding window", SHARED, WINDOW),
    F("sliding window", SHARED, WINDOW, te=True),
    F("sliding window, 1x2", WHOLE, WINDOW, te=True),
    F("sliding window in every second layer", SHARED, "--window-attn-skip-freq 2", shape=WINDOW),
    F("sliding window in every second layer, 1x2", WHOLE, "--window-attn-skip-freq 2", shape=WINDOW),
    F("attention sinks, off-by-one", SHARED, "--softmax-type off-by-one"),
    F("attention sinks, off-by-one", SHARED, "--softmax-type off-by-one", te=True),
    F("attention sinks, learnable", WHOLE, LEARNABLE, shape=FAST),
    F("attention sinks, learnable", WHOLE, LEARNABLE, shape=FAST, te=True),
    F(
        "attention sinks, learnable, `dims`",
        f"{SHARED} {DIMS}",
        LEARNABLE,
        shape=f"{EVEN} {FAST}",
        says="placement dims",
    ),
    F("attention sinks, learnable, shared positions", SHARED, LEARNABLE),
    F("output gate", SHARED, "--attention-output-gate"),
    F("output gate, 1x2", WHOLE, "--attention-output-gate"),
    F("output gate, QK-norm", SHARED, "--attention-output-gate --qk-layernorm", te=True),
    F("QK-norm", SHARED, "--qk-layernorm"),
    F("QKV bias", WHOLE, "--add-qkv-bias"),
    F("no RoPE", SHARED, NO_ROPE),
    F("learned positions", WHOLE, "--position-embedding-type learned_absolute"),
    F("RoPE of half a head", SHARED, "--rotary-percent 0.5"),
    F("YaRN", SHARED, YARN),
    F("YaRN, 1x2", WHOLE, YARN),
    F("YaRN", SHARED, YARN, te=True),
    F("slice weights, YaRN", f"{SHARED} {WEIGHTS}", YARN, says=WEIGHTED),
    F("deterministic mode", f"{SHARED} --deterministic-mode", ran=("deterministic",)),
    F("fused cross entropy", SHARED, shape="--cross-entropy-loss-fusion", ran=("fused cross entropy",)),
    F("SGD", SHARED, "--optimizer sgd"),
    F("Muon", f"{SHARED} --optimizer muon"),
    F("uneven slices, 1x3", UNEVEN, ranks=3),
    F("uneven slices, 1x3, shared positions", UNEVEN, shape="--num-attention-heads 4", ranks=3),
    F("uneven slices, 1x3, per-slice", f"{UNEVEN} {PER_SLICE}", ranks=3),
    F(
        "uneven slices, 1x3, all_reduce",
        f"{UNEVEN} --helix-comm-type all_reduce",
        ranks=3,
        ran=("summed scores",),
    ),
    F(
        "uneven slices, 1x3, sequence parallel, full recompute",
        f"{UNEVEN} --sequence-parallel {FULL} uniform",
        shape="--seq-length 33 --max-position-embeddings 33",
        ranks=3,
        ran=("recomputed", "sequence shared"),
    ),
    F("slice weights 2,1,1", f"{UNEVEN} --helix-slice-weights 2,1,1", ranks=3, says="slices of 8, 4, 4"),
    F("slice weights, 2x2, sequence parallel", f"{SHARED} {WEIGHTS} --sequence-parallel", says=WEIGHTED),
    F("slice weights, hierarchical all-reduce", f"{SHARED} {WEIGHTS} {BY_LEVEL}", says=WEIGHTED),
    F(
        "slice weights, stages, distributed optimizer",
        f"{STAGES} {WEIGHTS} --use-distributed-optimizer",
        says=WEIGHTED,
    ),
    F("slice weights, context parallel 2", f"{WHOLE} {WEIGHTS} {CP}", says=WEIGHTED),
    F("slice weights, QK-norm, QKV bias, output gate", f"{SHARED} {WEIGHTS}", ALL_ROWS, says=WEIGHTED),
    F("slice weights, RoPE of half a head", f"{SHARED} {WEIGHTS}", "--rotary-percent 0.5", says=WEIGHTED),
    F("slice weights, no RoPE", f"{SHARED} {WEIGHTS}", NO_ROPE, says=WEIGHTED),
    F("slice weights", f"{SHARED} {WEIGHTS}", te=True, says=WEIGHTED),
    F("slice weights, per-slice", f"{UNEVEN} --helix-slice-weights 2,1,1 {PER_SLICE}", ranks=3),
    F("adaptive gradient scaling, exact softmax", f"{SHARED} {ADAPTIVE}"),
    F("adaptive gradient scaling, attention sinks, learnable", f"{WHOLE} {PER_SLICE} {ADAPTIVE}", LEARNABLE),
    F("QK clipping", f"{SHARED} --qk-clip", te=True),
    F("per-slice softmax", f"{SHARED} {PER_SLICE}", NO_ROPE, vanilla=SLICES_AS_HEADS, says="per-slice"),
    F(
        "per-slice softmax, 1x2, sliding window",
        f"{WHOLE} {PER_SLICE}",
        WINDOW,
        shape=NO_ROPE,
        vanilla=SLICES_AS_HEADS,
        says="per-slice",
    ),
    F("bf16", SHARED, shape="--bf16", ran=("half precision",), loss=ROUNDED, norm=ROUNDED),
    F("fp16", SHARED, shape=FP16, ran=("half precision",), loss=ROUNDED, norm=ROUNDED),
    F("packed sequences", f"{WHOLE} {PACKED}", DOCUMENTS, shape=ONE, ran=("packed",)),
    F("packed sequences", f"{WHOLE} {PACKED}", DOCUMENTS, shape=ONE, ran=("packed",), te=True),
    F("packed sequences, shared positions", f"{SHARED} {PACKED}", DOCUMENTS, shape=ONE),
    F("packed sequences, context parallel 2", f"{WHOLE} {PACKED} {CP}", DOCUMENTS, shape=ONE),
    F(
        "packed sequences, summed scores",
        f"{WHOLE} {PACKED} --helix-comm-type all_reduce",
        DOCUMENTS,
        shape=ONE,
    ),
    F("packed sequences, per-slice softmax", f"{WHOLE} {PACKED} {PER_SLICE}", DOCUMENTS, shape=ONE),
    F(
        "packed sequences, per-slice softmax",
        f"{WHOLE} {PACKED} {PER_SLICE}",
        DOCUMENTS,
        shape=f"{ONE} {NO_ROPE}",
        vanilla=SLICES_AS_HEADS,
        says="per-slice",
        te=True,
    ),
    F("named layer spec", f"{SHARED} {SPECS} gpt_layer_spec"),
    F(
        "named layer spec, mixture of experts, stages",
        f"{STAGES} --sequence-parallel {SPECS} gpt_layer_spec",
        MOE,
    ),
    F(
        "another layer spec",
        f"{SHARED} --spec megatron.core.models.gpt.gpt_layer_specs get_gpt_layer_local_spec",
    ),
    F("hybrid `*-*-`", SHARED, f"{HYBRID} *-*-", te=True),
    F(
        "hybrid `*-*-`, 1x2, named stack spec",
        f"{WHOLE} {SPECS} hybrid_stack_spec",
        f"{HYBRID} *-*-",
        te=True,
    ),
    F(
        "hybrid `*-*E`, sequence parallel",
        f"{WHOLE} --sequence-parallel",
        f"{MOE} {HYBRID} *-*E",
        "--tensor-model-parallel-size 2 --sequence-parallel",
        te=True,
    ),
    F("hybrid `*-*-`, stages", f"{STAGES} {HYBRID} *-|*-", f"{HYBRID} *-*-", te=True),
    F("hybrid `*-/*-`, multi-token prediction", SHARED, f"{HYBRID} *-/*-", te=True),
    F("hybrid `*-*-`, by level", f"{SHARED} {BY_LEVEL}", f"{HYBRID} *-*-", te=True, ran=REDUCED),
    F("hybrid `M*-`", SHARED, f"{MAMBA} 4 {HYBRID} M*-", te=True),
    F("hybrid `M*-`, Mamba of 2 groups", SHARED, f"{MAMBA} 2 {HYBRID} M*-", te=True),
    F("hybrid `G*-`, 2x2, deterministic", SQUARE, f"{GDN} 4 {HYBRID} G*-", **OF_FOUR_RANKS),
    F(
        "gated delta nets in every other layer, 2x2, deterministic",
        SQUARE,
        f"{GDN} 4 --experimental-attention-variant gated_delta_net --linear-attention-freq 2",
        **OF_FOUR_RANKS,
    ),
    F("hybrid `G*-`, GDN of 2 key heads", SHARED, f"{GDN} 2 {HYBRID} G*-", te=True),
    F("hybrid `+-`", SHARED, f"{HYBRID} +-", te=True),
    F("CUDA graphs, no GPU", f"{WHOLE} --cuda-graph-impl local"),
    F("CUDA graphs, all_reduce", f"{WHOLE} --cuda-graph-impl local --helix-comm-type all_reduce"),
    F("CUDA graphs, context parallel 2", f"{WHOLE} {CP} --cuda-graph-impl local"),
    F("multi-latent attention", f"{SHARED} --multi-latent-attention"),
]


def outcomes(features: list[Feature]) -> dict[str, dict]:
    """{feature: what its runs came to}: kind "works", "refused", "needs a GPU" or "different", and text."""
    first = {f.te: next(g for g in FEATURES if g.te == f.te) for f in features}  # nothing else
    runs = {run for f in [*features, *first.values()] for run in f.runs().values()}
    found = _run_all(sorted(runs, key=str))
    return {f.title: _judged(f, found, found[first[f.te].runs()["helix"]]["ran"]) for f in features}


def _judged(f: Feature, found: dict[Run, dict], always: dict[str, int]) -> dict:
    runs = {which: found[run] for which, run in f.runs().items()}
    return _outcome(f, runs["vanilla"], runs["helix"], runs.get("off"), always)


def _run_all(runs: list[Run]) -> dict[Run, dict]:
    """Each run once; its losses are those of its last rank, its counts the larger of that and rank 0."""
    jobs: dict[tuple[bool, int], list[Run]] = {}
    for run in runs:
        jobs.setdefault((run.te, run.ranks), []).append(run)
    with tempfile.TemporaryDirectory() as index:
        lines = {key: [[*run.line, "--data-cache-path", index] for run in mine] for key, mine in jobs.items()}
        done = {key: in_batches(key[1], mine) for key, mine in lines.items() if not key[0]}
        done |= _with_transformer_engine({key: mine for key, mine in lines.items() if key[0]})
    found = {}
    for key, mine in jobs.items():
        for run, first, last in zip(mine, done[key][0], done[key][-1], strict=True):
            ran = {name: max(first["ran"].get(name, 0), count) for name, count in last["ran"].items()}
            found[run] = last | {"plan": first["plan"], "ran": first["ran"] | ran}
    return found


def _with_transformer_engine(jobs: dict) -> dict:
    keys = list(jobs)
    if not keys:
        return {}
    done = subprocess.run(
        [sys.executable, "-m", "tests.megatron_glue.feature_worker"],
        input=json.dumps([[ranks, jobs[te, ranks]] for te, ranks in keys]),
        env={**environment(), "NVTE_CPU_OFFLOAD_V1": "1"},  # as Megatron asks for offload by module
        capture_output=True,
        text=True,
        timeout=900,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return dict(zip(keys, json.loads(done.stdout.splitlines()[-1]), strict=True))


def _outcome(
    f: Feature, vanilla: dict, helix: dict, off: dict | None = None, always: dict | None = None
) -> dict:
    """Judge one row by its runs; `always`: what is counted without any feature."""
    error = helix.get("error")
    if error is not None:
        name, _, text = error.partition(": ")
        text = text or name
        if name == "HelixConfigError" and not helix["begun"]:
            return {"kind": "refused", "text": text}
        if vanilla.get("error") == error:
            return {"kind": "needs a GPU", "text": text, "trace": helix["trace"]}
        text = f"in step {helix['begun']}: {error}; vanilla: {vanilla.get('error')}"
        return {"kind": "different", "text": text, "trace": helix["trace"]}
    if vanilla.get("error"):
        return {"kind": "different", "text": f"vanilla: {vanilla['error']}", "trace": vanilla["trace"]}
    loss, norm = _differences(helix, vanilla)
    wrong = []
    if not (loss <= f.loss and norm <= f.norm):
        wrong.append(f"losses differ by {loss:.1e}, gradient norms by {norm:.1e}")
    if off is not None:
        loss, norm = _differences(off, vanilla)
        if not (loss > OTHER * f.loss or norm > OTHER * f.norm):
            wrong.append(f"without the feature vanilla's differ by {loss:.1e} and {norm:.1e} only")
    plan = helix["plan"] or ""
    if not plan or "not sliced" in plan or f.says not in plan:
        wrong.append(f"Helix's plan is {plan!r}, without {f.says!r}")
    for name in f.ran:
        if not helix["ran"].get(name):
            wrong.append(f"not {name}")
        if (always or {}).get(name):
            wrong.append(f"{name} without the feature too")
    return {"kind": "different" if wrong else "works", "text": "; ".join(wrong)}


def _differences(one: dict, other: dict) -> tuple[float, float]:
    """Largest difference of losses, and largest relative one of gradient norms; inf without three numbers."""
    series = [run[name] for run in (one, other) for name in ("losses", "norms")]
    if any(len(numbers) != 3 or not all(map(math.isfinite, numbers)) for numbers in series):
        return math.inf, math.inf
    pairs = {name: list(zip(one[name], other[name], strict=True)) for name in ("losses", "norms")}
    loss = max(abs(a - b) for a, b in pairs["losses"])
    return loss, max(abs(a / b - 1) for a, b in pairs["norms"])


HEAD = """# Training features

Generated by `python -m tests.megatron_glue.feature_table --write`; a test compares it with what happens.
Every row trains three steps of a model with 6 query and 2 KV heads (some rows: others) on four ranks (1x3:
three) in host mode with sliced heads (m > 1), and the same steps with vanilla Megatron (one rank; its own
layout with expert parallelism, with grouped experts or with stages and multi-token prediction, where its
first weights depend on that).

- **works**: every loss equals vanilla's to 1e-4 and every gradient norm to 0.01 % (in half precision: to 0.01
  and 1 %); and the feature was on: without it vanilla's differ by 20 times that, or, where it changes only
  how they are computed, functions that serve it alone ran.
- **refused**: the message, before the first step.
- **not tried**: vanilla Megatron itself does not run it without a GPU; the message of both.

| feature | beside sliced heads | |
| --- | --- | --- |
"""


def render(f: Feature, found: dict) -> str:
    """The row of the page."""
    kind, text = found["kind"], " ".join(found["text"].split()).replace("|", "/")
    kind = "not tried" if kind == "needs a GPU" else kind
    return f"| {f.title} | {kind} | {text} |\n"


def here() -> list[Feature]:
    """The rows that this machine can try."""
    return [f for f in FEATURES if available() or not f.te]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} instead of printing it")
    parser.add_argument("--only", help="try the rows whose name has this")
    options = parser.parse_args()
    if options.write and (options.only or not available()):
        parser.error("--write needs every row, and Transformer Engine's Python code (scripts/env.sh)")
    features = [f for f in here() if not options.only or options.only in f.name]
    found = outcomes(features)
    for name, outcome in found.items():
        if outcome["kind"] in ("different", "needs a GPU"):
            print(f"{name}: {outcome}", file=sys.stderr)
    page = HEAD + "".join(render(f, found[f.title]) for f in features)
    if options.write:
        PAGE.write_text(page)
    else:
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
