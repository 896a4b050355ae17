"""Every feature of Megatron's training beside sliced heads: what works, what is refused; docs/features.md.

    python tests/feature_table.py --write        test_features.py compares the file with the outcomes

A feature trains the same few steps twice: with vanilla Megatron, on one rank unless said otherwise, and with
Helix on four ranks, from the same weights. It works when every loss and gradient norm agrees.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from feature_worker import in_batches
from te_environment import environment
from training import LOOP

PAGE = Path(__file__).parents[1] / "docs/features.md"
MODEL = [
    *LOOP,
    *"""--num-layers 2 --hidden-size 48 --num-attention-heads 6 --group-query-attention --num-query-groups 2
    --kv-channels 16 --ffn-hidden-size 96 --seq-length 32 --max-position-embeddings 32 --train-iters 3
    --attention-dropout 0 --hidden-dropout 0 --vocab-size 264 --make-vocab-size-divisible-by 1""".split(),
]
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
EXPERTS_2 = "--sequence-parallel --expert-model-parallel-size 2"
WINDOW = "--window-size 8,0"
DOCUMENTS = "--reset-position-ids --reset-attention-mask --eod-mask-loss"
SLICED = ("2x2", "1x2", "1x3")  # grids
WEIGHTS = "--helix-slice-weights 3,1"
ALL_ROWS = "--qk-layernorm --add-qkv-bias --attention-output-gate"
UNEVEN = "--tensor-model-parallel-size 3"  # 1x3: m divides neither the 16 dimensions nor the 8 rotary pairs
PER_SLICE = "--helix-softmax per-slice"
ADAPTIVE = "--helix-adaptive-grad-scaling"
FUSED_WGRAD = ("--no-gradient-accumulation-fusion",)


@dataclass(frozen=True)
class Feature:
    """One row of the table.

    Args:
        name: what the row says.
        flags: of the Helix run only: its layout, and what must not change the losses.
        model: flags of both runs.
        reference: layout of the vanilla run, which then has four ranks.
        without: flags of MODEL that the Helix run leaves out.
        te: both runs have Transformer Engine's layers, on torch versions of its kernels.
        ranks: of the Helix run.
    """

    name: str
    flags: str
    model: str = ""
    reference: str = ""
    without: tuple[str, ...] = ()
    te: bool = False
    ranks: int = 4

    def ranks_of(self, helix: bool) -> int:
        """Of the Helix run, or of the vanilla one."""
        return self.ranks if helix else 4 if self.reference else 1


def arguments(feature: Feature, helix: bool) -> list[str]:
    """Megatron's command line for one of the two runs."""
    impl = "transformer_engine" if feature.te else "local"
    base = [flag for flag in MODEL if not (helix and flag in feature.without)]
    layout = f"{feature.flags} --attention-impl helix" if helix else feature.reference
    return [*base, "--transformer-impl", impl, *feature.model.split(), *layout.split()]


F = Feature
FEATURES = [
    F("nothing else, 2x2", SHARED),
    F("nothing else, 1x2, data parallel", WHOLE),
    F("pipeline stages", STAGES),
    F("virtual pipeline stages", f"{STAGES} --num-layers-per-virtual-pipeline-stage 1", "--num-layers 4"),
    F("sequence parallel", f"{SHARED} --sequence-parallel"),
    F("distributed optimizer", f"{WHOLE} --use-distributed-optimizer"),
    F("overlapped gradient reduction", f"{WHOLE} --overlap-grad-reduce"),
    F(
        "distributed optimizer, overlapped reduction and gather",
        f"{WHOLE} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    F("gradient-accumulation fusion (torch kernel)", SHARED, without=FUSED_WGRAD),
    F(
        "GEMM overlap (`--tp-comm-overlap`)",
        f"{SHARED} --sequence-parallel --tp-comm-overlap",
        reference="--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap",
    ),
    F("hierarchical all-reduce", f"{SHARED} {BY_LEVEL}"),
    F("hierarchical all-reduce, sequence parallel", f"{SHARED} {BY_LEVEL} --sequence-parallel"),
    F(
        "hierarchical all-reduce, GEMM overlap",
        f"{SHARED} {BY_LEVEL} --sequence-parallel --tp-comm-overlap",
    ),
    F("hierarchical all-reduce, default layers", f"{SHARED} {BY_LEVEL}", te=True),
    F("full recompute, uniform", f"{SHARED} {FULL} uniform"),
    F("full recompute, block", f"{SHARED} {FULL} block"),
    F("recompute, distributed saved activations", f"{SHARED} {FULL} uniform --distribute-saved-activations"),
    F("recompute of core_attn", f"{SHARED} {SELECTIVE} core_attn"),
    F("recompute of layernorm, mlp, core_attn", f"{SHARED} {SELECTIVE} layernorm mlp core_attn", te=True),
    F("recompute of moe", f"{WHOLE} --sequence-parallel {SELECTIVE} moe", MOE),
    F(
        "activation offload, by module",
        SHARED,
        "--fine-grained-activation-offloading --offload-modules core_attn attn_proj",
        te=True,
    ),
    F("activation offload, by layer", f"{SHARED} --cpu-offloading-num-layers 1", te=True),
    F("context parallel 2, 1x2", f"{WHOLE} --context-parallel-size 2"),
    F("context parallel 2, 1x2, `dims`", f"{WHOLE} {DIMS} --context-parallel-size 2"),
    F("context parallel 2, shared positions", f"{WHOLE} --context-parallel-size 2", ODD),
    F("context parallel 2, window", f"{WHOLE} --context-parallel-size 2", WINDOW),
    F("context parallel 2, all_reduce", f"{WHOLE} --context-parallel-size 2 --helix-comm-type all_reduce"),
    F("masks of documents", SHARED, DOCUMENTS),
    F("mixture of experts", f"{SHARED} --sequence-parallel", MOE),
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
        f"{MOE} --moe-shared-expert-intermediate-size 48",
    ),
    F("dense and expert layers", f"{SHARED} --sequence-parallel", f"{MOE} --moe-layer-freq [0,1]"),
    F("multi-token prediction", SHARED, "--mtp-num-layers 1"),
    F(
        "multi-token prediction, stages",
        STAGES,
        "--mtp-num-layers 1",
        "--pipeline-model-parallel-size 2",
    ),
    F("untied embeddings", SHARED, "--untie-embeddings-and-output-weights"),
    F("untied embeddings, stages", STAGES, "--untie-embeddings-and-output-weights"),
    F("sliding window", SHARED, WINDOW),
    F("sliding window in every second layer", SHARED, f"{WINDOW} --window-attn-skip-freq 2"),
    F("sliding window in every second layer, 1x2", WHOLE, f"{WINDOW} --window-attn-skip-freq 2"),
    F("attention sinks, off-by-one", SHARED, "--softmax-type off-by-one"),
    F("attention sinks, learnable", WHOLE, "--softmax-type learnable"),
    F("attention sinks, learnable, `dims`", f"{SHARED} {DIMS}", f"{EVEN} --softmax-type learnable"),
    F("attention sinks, learnable, shared positions", SHARED, "--softmax-type learnable"),
    F("output gate", SHARED, "--attention-output-gate"),
    F("output gate, 1x2", WHOLE, "--attention-output-gate"),
    F("QK-norm", SHARED, "--qk-layernorm"),
    F("QKV bias", WHOLE, "--add-qkv-bias"),
    F("no RoPE", SHARED, "--position-embedding-type none"),
    F("learned positions", WHOLE, "--position-embedding-type learned_absolute"),
    F("RoPE of half a head", SHARED, "--rotary-percent 0.5"),
    F("YaRN", SHARED, "--position-embedding-type yarn"),
    F("deterministic mode", f"{SHARED} --deterministic-mode"),
    F("fused cross entropy", SHARED, "--cross-entropy-loss-fusion"),
    F("SGD", SHARED, "--optimizer sgd"),
    F("Muon", f"{SHARED} --optimizer muon"),
    F("uneven slices, 1x3", UNEVEN, ranks=3),
    F("uneven slices, 1x3, shared positions", UNEVEN, "--num-attention-heads 4", ranks=3),
    F("uneven slices, 1x3, per-slice", f"{UNEVEN} {PER_SLICE}", ranks=3),
    F("uneven slices, 1x3, all_reduce", f"{UNEVEN} --helix-comm-type all_reduce", ranks=3),
    F(
        "uneven slices, 1x3, sequence parallel, full recompute",
        f"{UNEVEN} --sequence-parallel {FULL} uniform",
        "--seq-length 33 --max-position-embeddings 33",
        ranks=3,
    ),
    F("slice weights 2,1,1", f"{UNEVEN} --helix-slice-weights 2,1,1", ranks=3),
    F("slice weights, 2x2, sequence parallel", f"{SHARED} {WEIGHTS} --sequence-parallel"),
    F("slice weights, hierarchical all-reduce", f"{SHARED} {WEIGHTS} {BY_LEVEL}"),
    F("slice weights, stages, distributed optimizer", f"{STAGES} {WEIGHTS} --use-distributed-optimizer"),
    F("slice weights, context parallel 2", f"{WHOLE} {WEIGHTS} --context-parallel-size 2"),
    F("slice weights, QK-norm, QKV bias, output gate", f"{SHARED} {WEIGHTS}", ALL_ROWS),
    F("slice weights, RoPE of half a head", f"{SHARED} {WEIGHTS}", "--rotary-percent 0.5"),
    F("slice weights, no RoPE", f"{SHARED} {WEIGHTS}", "--position-embedding-type none"),
    F("slice weights", f"{SHARED} {WEIGHTS}", te=True),
    F("slice weights, per-slice", f"{UNEVEN} --helix-slice-weights 2,1,1 {PER_SLICE}", ranks=3),
    F("adaptive gradient scaling, exact softmax", f"{SHARED} {ADAPTIVE}"),
    F(
        "adaptive gradient scaling, attention sinks, learnable",
        f"{WHOLE} {PER_SLICE} {ADAPTIVE}",
        "--softmax-type learnable",
    ),
    F("QK clipping", f"{SHARED} --qk-clip", te=True),
    F("CUDA graphs", f"{SHARED} --cuda-graph-impl local"),
    F("multi-latent attention", f"{SHARED} --multi-latent-attention"),
]


def outcomes() -> dict[str, dict]:
    """{feature: what its runs came to}: kind "works", "refused", "needs a GPU" or "different", and text."""
    with tempfile.TemporaryDirectory() as index:
        cache = ["--data-cache-path", index]
        runs = [(f, helix) for f in FEATURES for helix in (False, True)]
        jobs: dict[tuple[bool, int], list[list[str]]] = {}
        where = {}
        for f, helix in runs:
            jobs_here = jobs.setdefault((f.te, f.ranks_of(helix)), [])
            line = [*arguments(f, helix), *cache]
            if line not in jobs_here:
                jobs_here.append(line)
            where[f.name, helix] = (f.te, f.ranks_of(helix), jobs_here.index(line))
        plain = {key: in_batches(key[1], lines) for key, lines in jobs.items() if not key[0]}
        plain |= _with_transformer_engine({key: lines for key, lines in jobs.items() if key[0]})

    def result(f: Feature, helix: bool) -> dict:
        te, ranks, number = where[f.name, helix]
        by_rank = plain[te, ranks]
        return by_rank[-1][number] | {"grid": by_rank[0][number]["grid"]}

    return {f.name: _outcome(result(f, False), result(f, True)) for f in FEATURES}


def _with_transformer_engine(jobs: dict) -> dict:
    keys = list(jobs)
    done = subprocess.run(
        [sys.executable, "-m", "feature_worker"],
        input=json.dumps([[ranks, jobs[te, ranks]] for te, ranks in keys]),
        env={**environment(), "NVTE_CPU_OFFLOAD_V1": "1"},  # as Megatron asks for offload by module
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return dict(zip(keys, json.loads(done.stdout.splitlines()[-1]), strict=True))


def _outcome(vanilla: dict, helix: dict) -> dict:
    error = helix.get("error")
    if error is not None:
        name, _, text = error.partition(": ")
        text = text or name
        if name == "HelixConfigError":
            return {"kind": "refused", "text": text}
        if vanilla.get("error"):
            return {"kind": "needs a GPU", "text": text, "trace": helix["trace"]}
        return {"kind": "different", "text": error, "trace": helix["trace"]}
    if vanilla.get("error"):
        return {"kind": "different", "text": f"vanilla: {vanilla['error']}", "trace": vanilla["trace"]}
    loss = max(abs(a - b) for a, b in zip(helix["losses"], vanilla["losses"], strict=True))
    norm = max(abs(a / b - 1) for a, b in zip(helix["norms"], vanilla["norms"], strict=True))
    equal = len(helix["losses"]) == 3 and loss < 1e-4 and norm < 2e-3 and helix["grid"] in SLICED
    text = f"losses differ by {loss:.1e}, gradient norms by {norm:.1e}, grid {helix['grid']}"
    return {"kind": "works" if equal else "different", "text": "" if equal else text}


HEAD = """# Training features

Generated by `python tests/feature_table.py --write`; a test compares it with what happens. Every row trains
three steps of a model with 6 query and 2 KV heads (some rows: others) on four ranks (1x3: three) in host mode
with sliced heads (m > 1), and the same steps with vanilla Megatron (one rank; its own layout with expert
parallelism or with stages and multi-token prediction, where its first weights depend on that).

- **works**: every loss equals vanilla's to 1e-4 and every gradient norm to 0.2 %.
- **refused**: the message, before the first step.
- **not tried**: Megatron itself does not run it without a GPU; its message.

| feature | beside sliced heads | |
| --- | --- | --- |
"""


def render(found: dict[str, dict]) -> str:
    """The page."""
    rows = []
    for f in FEATURES:
        kind, text = found[f.name]["kind"], " ".join(found[f.name]["text"].split())
        kind = "not tried" if kind == "needs a GPU" else kind
        name = f"{f.name} (Transformer Engine's layers on torch kernels)" if f.te else f.name
        rows.append(f"| {name} | {kind} | {text.replace('|', '/')} |\n")
    return HEAD + "".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} instead of printing it")
    options = parser.parse_args()
    found = outcomes()
    for name, outcome in found.items():
        if outcome["kind"] in ("different", "needs a GPU"):
            print(f"{name}: {outcome}", file=sys.stderr)
    page = render(found)
    if options.write:
        PAGE.write_text(page)
    else:
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
