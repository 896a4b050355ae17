"""The paper's own numbers, checked by arithmetic. Pure: nothing here is measured.

"Helix: Two-Level Attention Partitioning for Large-Scale Transformer Deployment": 16 layers, 32 heads of 128,
MLP 16384, batch 128, sequence 10000, fp16, on 16 H100 of 80 GB in DGX H100 machines joined by InfiniBand NDR;
TP=8 PP=2 against m x n = 16. What it states is in `PUBLISHED`; `checks` says which statements can hold
together, with the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
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
SHAPE = presets.find("paper-gpt")


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
BASE, NEW = PUBLISHED.values()
RUNS, COHENS_D, SPEEDUP_INTERVAL = 5, 2.85, (31.2, 32.1)
CONSISTENT, INCONSISTENT, POSSIBLE = "consistent", "not consistent", "possible, barely"
Check = tuple[str, str, bool | str]
"""claim, arithmetic, and the verdict or whether it is consistent."""


def checks() -> list[dict[str, str]]:
    """claim, arithmetic, verdict (one of the three above): one for each statement that arithmetic reaches."""
    found = [*_check_memory(), *_check_speed(), *_check_communication(), *_check_statistics()]
    verdicts = {True: CONSISTENT, False: INCONSISTENT, POSSIBLE: POSSIBLE}
    return [{"claim": claim, "arithmetic": said, "verdict": verdicts[how]} for claim, said, how in found]


def parameters_per_gpu() -> float:
    """Of the paper's model, split 16 ways, whichever way."""
    return SHAPE.num_parameters / GPUS


def flops_per_token() -> float:
    """Of a causal forward pass at the paper's length, mean over positions; the vocabulary left out."""
    matrices = SHAPE.hidden_size * (4 * SHAPE.hidden_size + 2 * SHAPE.ffn_hidden_size)
    attention = 2 * LENGTH * SHAPE.hidden_size  # scores and values, half of each causal
    return SHAPE.num_layers * (2 * matrices + attention)


def kv_cache_bytes() -> float:
    """K and V of the whole batch at full length, in fp16."""
    return 2 * SHAPE.num_layers * SHAPE.hidden_size * BYTES * BATCH * LENGTH


def received_per_token(tp: int, pp: int) -> float:
    """Bytes that a GPU receives for each token of a forward pass: two all-reduces a layer, after attention
    and after the MLP (Megatron and the two-level split alike), each 2 (T-1)/T of a hidden state."""
    return 2 * SHAPE.num_layers / pp * 2 * (tp - 1) / tp * SHAPE.hidden_size * BYTES


def _check_memory() -> Iterator[Check]:
    faster, less = 100 * (NEW.tps / BASE.tps - 1), 100 * (1 - NEW.tpot_ms / BASE.tpot_ms)
    said, good = f"{faster:.1f} % and {less:.1f} % follow from the table", (round(faster, 1), round(less, 1))
    yield "31.7 % more throughput, 37.1 % less TPOT", said, good == (31.7, 37.1)
    for row in (BASE, NEW):
        total = row.parameters_gb + row.activations_gb + row.buffers_gb
        parts = f"{row.parameters_gb:g} + {row.activations_gb:g} + {row.buffers_gb:g} = {total:g} GB"
        yield f"{row.name}: {row.total_gb:g} GB per GPU", parts, total == row.total_gb
    weights, training = parameters_per_gpu() * BYTES / 1e9, parameters_per_gpu() * 18 / 1e9
    for row in (BASE, NEW):
        said = (
            f"{parameters_per_gpu() * GPUS / 1e9:.2f}e9 parameters / 16 x 2 bytes = {weights:.2f} GB; with "
            f"gradients and Adam in fp32 {training:.1f} GB. That is "
            f"{row.parameters_gb / weights:.0f} times the weights"
        )
        near = weights / 1.5 < row.parameters_gb < training * 1.5
        yield f"{row.name}: {row.parameters_gb:g} GB of parameters per GPU", said, near
    base, new = BASE.parameters_gb, NEW.parameters_gb
    said = "both split every weight 16 ways: the parameters per GPU are equal"
    yield f"{base:g} GB become {new:g} GB", f"{said}, not {base / new:.1f} times fewer", base == new
    h = SHAPE.hidden_size
    block = (h // GPUS) ** 2
    said = (
        f"16 blocks of (d_s h_g)^2 = {block:,} are {GPUS * block / h**2:.4f} of a {h} x {h} matrix; "
        f"a part has {h} x {h // GPUS}"
    )
    yield "W is cut into 16 blocks of (d_s h_g) x (d_s h_g)", said, False


def _check_speed() -> Iterator[Check]:
    for row in (BASE, NEW):
        share = row.tps * flops_per_token() / (GPUS * PEAK)
        said = (
            f"{flops_per_token() / 1e9:.2f} GFLOP per token x {row.tps / 1e6:.2f}e6 = "
            f"{row.tps * flops_per_token() / 1e15:.1f} PFLOP/s, {100 * share:.0f} % of the "
            f"{GPUS * PEAK / 1e15:.1f} PFLOP/s that 16 H100 have: as prefill"
        )
        verdict = POSSIBLE if 0.65 < share <= 1 else share <= 1
        yield f"{row.name}: {row.tps / 1e6:.2f}e6 tokens/s", said, verdict
    per_gpu = kv_cache_bytes() / GPUS
    read = per_gpu + parameters_per_gpu() * BYTES
    fastest = BATCH / (read / HBM)
    said = (
        f"a step of {BATCH} tokens reads {read / 1e9:.1f} GB per GPU, at 3.35 TB/s "
        f"{1e3 * read / HBM:.1f} ms: at most {fastest:,.0f} tokens/s. It can only be prefill"
    )
    yield f"{NEW.tps / 1e6:.2f}e6 tokens/s, if it were decode", said, fastest >= NEW.tps
    said = f"the KV cache of {BATCH} x {LENGTH} tokens alone is {per_gpu / 1e9:.1f} GB per GPU, if kept"
    yield f"{NEW.name}: {NEW.total_gb:g} GB in all per GPU", said, per_gpu <= NEW.total_gb * 1e9


def _check_communication() -> Iterator[Check]:
    for row in (BASE, NEW):
        seconds = row.tps * row.tpot_ms / 1e3  # GPU-seconds of communication in each second
        steps = seconds / BATCH
        said = (
            f"{row.tps / 1e6:.2f}e6/s x {row.tpot_ms} ms = {seconds:.0f} s of communication in each second, "
            f"and 16 GPUs have 16; per step of {BATCH} tokens it is {steps:.1f} s in each second"
        )
        claim = f"{row.name}: {row.tpot_ms} ms of communication per token at that throughput"
        yield claim, said, seconds <= GPUS or steps <= 1
    own, other = received_per_token(16, 1), received_per_token(8, 2)
    said = (
        f"{other / 1e3:.0f} kB received per token x {BASE.tps / 1e6:.2f}e6 = "
        f"{other * BASE.tps / 1e9:.0f} GB/s of 450 ({100 * other * BASE.tps / NVLINK:.0f} %; the paper says "
        "70 %)"
    )
    yield f"{BASE.name}: fits NVLink at its throughput", said, other * BASE.tps <= NVLINK
    said = (
        f"{own / 1e3:.0f} kB x {NEW.tps / 1e6:.2f}e6 = {own * NEW.tps / 1e9:.0f} GB/s of 450, without "
        "reduction in the switches"
    )
    yield f"{NEW.name}: fits NVLink at its throughput", said, own * NEW.tps <= NVLINK
    across = 2 * SHAPE.num_layers * SHAPE.hidden_size * BYTES / GPUS_PER_MACHINE * NEW.tps
    said = (
        f"the best hierarchical all-reduces still bring {across / 1e9:.0f} GB/s to each GPU over "
        "InfiniBand, which has 50"
    )
    yield f"{NEW.name}: 16 ranks over two machines of 8", said, across <= INFINIBAND
    said = f"{own / other:.1f} times the bytes per GPU and token, before any exchange inside attention"
    yield "less communication than TP=8 PP=2", said, own <= other


def _check_statistics() -> Iterator[Check]:
    sd = NEW.tps_half_width * sqrt(RUNS) / float(stats.t.ppf(0.975, RUNS - 1))
    d = (NEW.tps - BASE.tps) / sd
    t = d * sqrt(RUNS / 2)
    p = 2 * float(stats.t.sf(t, RUNS - 1))
    said = f"intervals of ± 5,000 from 5 runs mean sd = {sd:,.0f}: {100 * sd / NEW.tps:.2f} %"
    yield "coefficient of variation below 1 %", said, sd / BASE.tps < 0.01
    yield "p < 0.001", f"t = {t:.0f}, p = {p:.0e}", p < 0.001
    said = f"({NEW.tps:,.0f} - {BASE.tps:,.0f}) / {sd:,.0f} = {d:.0f}"
    yield f"Cohen's d = {COHENS_D}", said, d / 2 < COHENS_D < 2 * d
    relative = sqrt(sum((row.tps_half_width / row.tps) ** 2 for row in (BASE, NEW)))
    low, high = (100 * (NEW.tps / BASE.tps * (1 + side * relative) - 1) for side in (-1, 1))
    said = f"from the two intervals: [{low:.1f} %, {high:.1f} %]; paired runs can be narrower"
    stated = SPEEDUP_INTERVAL
    yield f"speed-up within [{stated[0]} %, {stated[1]} %]", said, low <= stated[0] and stated[1] <= high


BESIDE = [
    *("paper's configuration", "tokens/s (published)", "TPOT ms (published)"),
    *("variant here", "prefill tokens/s (measured)", "paper's TPOT ms (measured)"),
]


def tabulate_beside(results: dict[str, Any]) -> list[list[str]]:
    """The paper's table with what was measured here in the same layouts: TP=8 PP=2, and every 16-way grid."""
    found = []
    for variant in (v for v in results["variants"] if "measured" in v and v["world_size"] == GPUS):
        layout, grid = variant["measured"]["layout"], variant["measured"]["grid"]
        tp, pp = layout["tensor_model_parallel_size"], layout["pipeline_model_parallel_size"]
        proposed = grid and tp == GPUS and grid["m"] > 1
        if proposed or ((tp, pp) == (8, 2) and not grid):
            row = NEW if proposed else BASE
            prefill = variant["measured"]["workloads"].get("prefill")
            tpot = prefill and prefill.get("paper_tpot_ms")
            here = [f"{prefill['tokens_per_s']['mean']:,.1f}" if prefill else "-"]
            here += [f"{tpot['mean']:.3g}" if tpot else "-"]
            found.append([row.name, f"{row.tps:,.0f}", f"{row.tpot_ms}", variant["name"], *here])
    return found
