"""The paper's own numbers, checked by arithmetic. Pure: nothing here is measured.

"Helix: Two-Level Attention Partitioning for Large-Scale Transformer Deployment": 16 layers, 32 heads of 128,
MLP 16384, batch 128, sequence 10000, fp16, on 16 H100 of 80 GB in DGX H100 machines joined by InfiniBand NDR;
TP=8 PP=2 against m x n = 16. What it states is in `PUBLISHED`; `checks` says which statements can hold
together, with the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

from scipy import stats

from helix_megatron.models import presets

GPUS, GPUS_PER_MACHINE = 16, 8
BATCH, LENGTH = 128, 10_000
BYTES = 2  # fp16
PEAK = 989e12  # FLOP/s of one H100 SXM, dense fp16 or bf16
HBM = 3.35e12  # bytes/s of its memory
NVLINK = 450e9  # bytes/s in one direction of NVLink 4
INFINIBAND = 50e9  # bytes/s in one direction of NDR, a port for each GPU


@dataclass(frozen=True)
class Row:
    """One line of the paper's tables."""

    name: str
    tps: float
    """Tokens per second."""
    tpot_ms: float
    """"Average synchronisation and communication overhead time per token"."""
    tps_half_width: float
    """Half of the 95 % interval, from 5 runs."""
    parameters_gb: float
    """Per GPU, as activations_gb and buffers_gb."""
    activations_gb: float
    buffers_gb: float
    total_gb: float


PUBLISHED = {
    "baseline": Row("Baseline (TP=8, PP=2)", 1.20e6, 0.35, 5e3, 45, 25, 2, 72),
    "proposed": Row("Proposed (m x n = 16)", 1.58e6, 0.22, 5e3, 11, 6, 1, 18),
}
RUNS, COHENS_D, SPEEDUP_INTERVAL = 5, 2.85, (31.2, 32.1)
CONSISTENT, INCONSISTENT, POSSIBLE = "consistent", "not consistent", "possible, barely"


def checks() -> list[dict[str, str]]:
    """claim, arithmetic, verdict (one of the three above): one for each statement that arithmetic reaches."""
    found = [
        *_percentages(),
        *_parameters(),
        *_operations(),
        *_decode(),
        *_time_per_token(),
        *_volume(),
        *_statistics(),
    ]
    return [{"claim": claim, "arithmetic": said, "verdict": verdict} for claim, said, verdict in found]


Check = tuple[str, str, str]


def _percentages() -> list[Check]:
    base, new = PUBLISHED["baseline"], PUBLISHED["proposed"]
    faster, less = 100 * (new.tps / base.tps - 1), 100 * (1 - new.tpot_ms / base.tpot_ms)
    good = round(faster, 1) == 31.7 and round(less, 1) == 37.1
    found = [
        (
            "31.7 % more throughput, 37.1 % less TPOT",
            f"{faster:.1f} % and {less:.1f} % follow from the table",
            CONSISTENT if good else INCONSISTENT,
        )
    ]
    for row in (base, new):
        total = row.parameters_gb + row.activations_gb + row.buffers_gb
        parts = f"{row.parameters_gb:g} + {row.activations_gb:g} + {row.buffers_gb:g} = {total:g} GB"
        same = CONSISTENT if total == row.total_gb else INCONSISTENT
        found.append((f"{row.name}: {row.total_gb:g} GB per GPU", parts, same))
    return found


def parameters_per_gpu() -> float:
    """Of the paper's model, split 16 ways, whichever way."""
    return presets.find("paper-gpt").num_parameters / GPUS


def _parameters() -> list[Check]:
    weights, training = parameters_per_gpu() * BYTES / 1e9, parameters_per_gpu() * 18 / 1e9
    found = []
    for row in PUBLISHED.values():
        said = (
            f"{parameters_per_gpu() * GPUS / 1e9:.2f}e9 parameters / 16 x 2 bytes = {weights:.2f} GB; with "
            f"gradients and Adam in fp32 {training:.1f} GB. That is "
            f"{row.parameters_gb / weights:.0f} times the weights"
        )
        near = weights / 1.5 < row.parameters_gb < training * 1.5
        claim = f"{row.name}: {row.parameters_gb:g} GB of parameters per GPU"
        found.append((claim, said, CONSISTENT if near else INCONSISTENT))
    base, new = (row.parameters_gb for row in PUBLISHED.values())
    said = (
        f"both split every weight 16 ways: the parameters per GPU are equal, not {base / new:.1f} times fewer"
    )
    found.append((f"{base:g} GB become {new:g} GB", said, CONSISTENT if base == new else INCONSISTENT))
    shape = presets.find("paper-gpt")
    block = (shape.hidden_size // GPUS) ** 2
    said = (
        f"16 blocks of (d_s h_g)^2 = {block:,} are {GPUS * block / shape.hidden_size**2:.4f} of a "
        f"{shape.hidden_size} x {shape.hidden_size} matrix; a part has {shape.hidden_size} x "
        f"{shape.hidden_size // GPUS}"
    )
    found.append(("W is cut into 16 blocks of (d_s h_g) x (d_s h_g)", said, INCONSISTENT))
    return found


def flops_per_token() -> float:
    """Of a causal forward pass at the paper's length, mean over positions; the vocabulary left out."""
    shape = presets.find("paper-gpt")
    matrices = shape.hidden_size * (4 * shape.hidden_size + 2 * shape.ffn_hidden_size)
    attention = 2 * LENGTH * shape.hidden_size  # scores and values, half of each causal
    return shape.num_layers * (2 * matrices + attention)


def _operations() -> list[Check]:
    found = []
    for row in PUBLISHED.values():
        share = row.tps * flops_per_token() / (GPUS * PEAK)
        said = (
            f"{flops_per_token() / 1e9:.2f} GFLOP per token x {row.tps / 1e6:.2f}e6 = "
            f"{row.tps * flops_per_token() / 1e15:.1f} PFLOP/s, {100 * share:.0f} % of the "
            f"{GPUS * PEAK / 1e15:.1f} PFLOP/s that 16 H100 have: as prefill"
        )
        verdict = INCONSISTENT if share > 1 else POSSIBLE if share > 0.65 else CONSISTENT
        found.append((f"{row.name}: {row.tps / 1e6:.2f}e6 tokens/s", said, verdict))
    return found


def kv_cache_bytes() -> float:
    """K and V of the whole batch at full length, in fp16."""
    shape = presets.find("paper-gpt")
    return 2 * shape.num_layers * shape.hidden_size * BYTES * BATCH * LENGTH


def _decode() -> list[Check]:
    per_gpu = kv_cache_bytes() / GPUS
    read = per_gpu + parameters_per_gpu() * BYTES
    fastest = BATCH / (read / HBM)
    new = PUBLISHED["proposed"]
    room = new.total_gb * 1e9
    return [
        (
            f"{new.tps / 1e6:.2f}e6 tokens/s, if it were decode",
            f"a step of {BATCH} tokens reads {read / 1e9:.1f} GB per GPU, at 3.35 TB/s "
            f"{1e3 * read / HBM:.1f} ms: at most {fastest:,.0f} tokens/s. It can only be prefill",
            CONSISTENT if fastest >= new.tps else INCONSISTENT,
        ),
        (
            f"{new.name}: {new.total_gb:g} GB in all per GPU",
            f"the KV cache of {BATCH} x {LENGTH} tokens alone is {per_gpu / 1e9:.1f} GB per GPU, if kept",
            CONSISTENT if per_gpu <= room else INCONSISTENT,
        ),
    ]


def _time_per_token() -> list[Check]:
    found = []
    for row in PUBLISHED.values():
        seconds = row.tps * row.tpot_ms / 1e3  # GPU-seconds of communication in each second
        steps = seconds / BATCH
        said = (
            f"{row.tps / 1e6:.2f}e6/s x {row.tpot_ms} ms = {seconds:.0f} s of communication in each second, "
            f"and 16 GPUs have 16; per step of {BATCH} tokens it is {steps:.1f} s in each second"
        )
        fits = seconds <= GPUS or steps <= 1
        claim = f"{row.name}: {row.tpot_ms} ms of communication per token at that throughput"
        found.append((claim, said, CONSISTENT if fits else INCONSISTENT))
    return found


def received_per_token(tp: int, pp: int) -> float:
    """Bytes that a GPU receives for each token of a forward pass: two all-reduces a layer, after attention
    and after the MLP (Megatron and the two-level split alike), each 2 (T-1)/T of a hidden state."""
    shape = presets.find("paper-gpt")
    all_reduces = 2 * shape.num_layers / pp
    return all_reduces * 2 * (tp - 1) / tp * shape.hidden_size * BYTES


def _volume() -> list[Check]:
    base, new = PUBLISHED["baseline"], PUBLISHED["proposed"]
    own, other = received_per_token(16, 1), received_per_token(8, 2)
    shape = presets.find("paper-gpt")
    across = 2 * shape.num_layers * shape.hidden_size * BYTES / GPUS_PER_MACHINE * new.tps
    return [
        (
            f"{base.name}: fits NVLink at its throughput",
            f"{other / 1e3:.0f} kB received per token x {base.tps / 1e6:.2f}e6 = "
            f"{other * base.tps / 1e9:.0f} GB/s of 450 ({100 * other * base.tps / NVLINK:.0f} %; "
            "the paper says 70 %)",
            CONSISTENT if other * base.tps <= NVLINK else INCONSISTENT,
        ),
        (
            f"{new.name}: fits NVLink at its throughput",
            f"{own / 1e3:.0f} kB x {new.tps / 1e6:.2f}e6 = {own * new.tps / 1e9:.0f} GB/s of 450, without "
            "reduction in the switches",
            CONSISTENT if own * new.tps <= NVLINK else INCONSISTENT,
        ),
        (
            f"{new.name}: 16 ranks over two machines of 8",
            f"the best hierarchical all-reduces still bring {across / 1e9:.0f} GB/s to each GPU over "
            "InfiniBand, which has 50",
            CONSISTENT if across <= INFINIBAND else INCONSISTENT,
        ),
        (
            "less communication than TP=8 PP=2",
            f"{own / other:.1f} times the bytes per GPU and token, before any exchange inside attention",
            CONSISTENT if own <= other else INCONSISTENT,
        ),
    ]


def _statistics() -> list[Check]:
    base, new = PUBLISHED["baseline"], PUBLISHED["proposed"]
    t = float(stats.t.ppf(0.975, RUNS - 1))
    sd = new.tps_half_width * sqrt(RUNS) / t
    d = (new.tps - base.tps) / sd
    statistic = d * sqrt(RUNS / 2)
    p = 2 * float(stats.t.sf(statistic, RUNS - 1))
    ratio = new.tps / base.tps
    relative = sqrt(sum((row.tps_half_width / row.tps) ** 2 for row in (base, new)))
    low, high = (100 * (ratio * (1 + side * relative) - 1) for side in (-1, 1))
    stated = SPEEDUP_INTERVAL
    return [
        (
            "coefficient of variation below 1 %",
            f"intervals of ± 5,000 from 5 runs mean sd = {sd:,.0f}: {100 * sd / new.tps:.2f} %",
            CONSISTENT if sd / base.tps < 0.01 else INCONSISTENT,
        ),
        ("p < 0.001", f"t = {statistic:.0f}, p = {p:.0e}", CONSISTENT if p < 0.001 else INCONSISTENT),
        (
            f"Cohen's d = {COHENS_D}",
            f"({new.tps:,.0f} - {base.tps:,.0f}) / {sd:,.0f} = {d:.0f}",
            CONSISTENT if d / 2 < COHENS_D < 2 * d else INCONSISTENT,
        ),
        (
            f"speed-up within [{stated[0]} %, {stated[1]} %]",
            f"from the two intervals: [{low:.1f} %, {high:.1f} %]; paired runs can be narrower",
            CONSISTENT if low <= stated[0] and stated[1] <= high else INCONSISTENT,
        ),
    ]


def beside(results: dict[str, Any]) -> list[list[str]]:
    """The paper's table with what was measured here in the same layouts: TP=8 PP=2, and every 16-way grid.

    configuration, published tokens/s and TPOT, then measured prefill tokens/s and the paper's TPOT.
    """
    found = []
    for variant in (v for v in results["variants"] if "measured" in v and v["world_size"] == GPUS):
        layout, grid = variant["measured"]["layout"], variant["measured"]["grid"]
        tp, pp = layout["tensor_model_parallel_size"], layout["pipeline_model_parallel_size"]
        if (tp, pp) == (8, 2) and not grid:
            row = PUBLISHED["baseline"]
        elif grid and tp == GPUS and grid["m"] > 1:
            row = PUBLISHED["proposed"]
        else:
            continue
        prefill = variant["measured"]["workloads"].get("prefill")
        here = ["-", "-"]
        if prefill:
            tpot = prefill.get("paper_tpot_ms")
            here = [f"{prefill['tokens_per_s']['mean']:,.1f}", f"{tpot['mean']:.3g}" if tpot else "-"]
        found.append([row.name, f"{row.tps:,.0f}", f"{row.tpot_ms}", variant["name"], *here])
    return found


BESIDE = [
    *("paper's configuration", "tokens/s (published)", "TPOT ms (published)"),
    *("variant here", "prefill tokens/s (measured)", "paper's TPOT ms (measured)"),
]
