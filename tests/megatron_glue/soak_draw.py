"""What tests/megatron_glue/soak.py draws: one random layer on one random grid, and whether that can work.

`why_illegal` says it from the documented rules alone, without the package: a layer that is refused although
it can work, or computed although it cannot, is a failure of the soak.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from itertools import pairwise

from helix_megatron.check.reference import Case
from helix_megatron.partition.config import COMM_TYPES, CORE_ATTENTIONS, QUERY_PLACEMENTS, HelixConfig

WORLDS = ((2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (2, 2), (3, 2))
"""(tensor-parallel, context-parallel) sizes."""
EXPERTS, FFN = 4, 60  # FFN: every tensor-parallel size divides it
NOT_OURS = "packed sequences or context parallelism in Megatron's local core"  # m = 1, per-slice: it asserts
FLAG_OF = {"core_attn": dict(recompute_granularity="selective", recompute_modules=["core_attn"])}


@dataclass(frozen=True)
class Job:
    """One random configuration.

    Args:
        tp, cp: tensor- and context-parallel size.
        block: what follows attention in a whole Transformer layer, "mlp" or "moe"; None: attention alone.
        half: bf16 throughout; else fp32.
        recompute: None, "core_attn" (selective) or "full" (the whole layer, by Megatron's checkpointing).
        te_core: a stand-in for Transformer Engine's core, which makes its own masks.
        overrides: further fields of TransformerConfig.
    """

    number: int
    tp: int
    case: Case
    helix: HelixConfig
    cp: int = 1
    block: str | None = None
    half: bool = False
    recompute: str | None = None
    te_core: bool = False
    overrides: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return repr(replace(self, case=replace(self.case, tensors={})))

    @property
    def sequence_parallel(self) -> bool:
        return self.overrides.get("sequence_parallel", False)

    @property
    def off_by_one(self) -> bool:
        return "softmax_type" in self.overrides

    def features(self) -> list[str]:
        """Names of what this configuration uses, for counting."""
        case, helix = self.case, self.helix
        found = {
            f"comm type {helix.comm_type}": helix.softmax == "exact",
            f"query placement {helix.query_placement}": True,
            "per-slice softmax": helix.softmax == "per-slice",
            "slice weights": helix.slice_weights is not None,
            "hierarchical reductions": helix.hierarchical_allreduce,
            "context parallel": self.cp > 1,
            "sequence parallel": self.sequence_parallel,
            "packed sequences": bool(case.documents),
            "bf16": self.half,
            f"recompute {self.recompute}": self.recompute is not None,
            f"Transformer layer with {self.block}": self.block is not None,
            "Transformer Engine's core (stand-in)": self.te_core,
            "no RoPE": not case.rotary_dim,
            "RoPE of half a head": 0 < case.rotary_dim < case.dim,
            "RoPE interleaved": case.interleaved and case.rotary_dim > 0,
            "QKV bias": case.bias,
            f"QK-norm {case.qk_norm}": case.qk_norm is not None,
            "sliding window": case.window is not None,
            "output gate": case.gate,
            "sinks, learnable": case.sinks and not self.off_by_one,
            "sinks, off-by-one": self.off_by_one,
            f"mask {case.mask}": case.window is None,
        }
        return [name for name, used in found.items() if used]


def draw(seed: int, number: int, worlds: tuple[tuple[int, int], ...] = WORLDS) -> Job:
    """Configuration `number` of a soak: one that can work, but for a share that may be anything."""
    chance = random.Random(f"{seed} {number}")
    tp, cp = chance.choice(worlds)
    anything = chance.random() < 0.12
    while True:
        job = _candidate(chance, number, tp, cp)
        why = why_illegal(job)
        if why is None or (anything and why != NOT_OURS):
            return job


def _candidate(chance: random.Random, number: int, tp: int, cp: int) -> Job:
    pick = chance.choice

    def now_and_then(share: float) -> bool:
        return chance.random() < share

    per_slice = now_and_then(0.25)
    window = (chance.randrange(1, 9), pick((0, 0, 0, 2))) if now_and_then(0.25) else None
    groups = pick((1, 2, 3, 4, 6))
    case = Case(
        heads=groups * pick((1, 2, 3, 4)),
        groups=groups,
        dim=pick((8, 12, 16, 24, 48, 20)),
        hidden=24,
        seq=pick((1, 5, 12, 24)) if window is None and cp == 1 else pick((12, 24)),
        batch=pick((1, 2)),
        rotary_percent=pick((1.0, 1.0, 0.5, 0.0)),
        interleaved=now_and_then(0.3),
        bias=now_and_then(0.5),
        qk_norm=None if per_slice else pick((None, None, "RMSNorm", "LayerNorm", "L2Norm")),
        window=window,
        gate=now_and_then(0.2),
        sinks=not per_slice and now_and_then(0.2),
        mask=pick(("causal", "causal", "padding", "arbitrary", "none")),
        seed=number,
    )
    n, m = pick([(tp // m, m) for m in range(2, tp + 1) if tp % m == 0])
    if now_and_then(0.15):
        n, m = pick((n, None)), pick((m, None))
    if now_and_then(0.05):
        n, m = pick((1, 2, 3)), pick((1, 2, tp))
    helix = HelixConfig(
        head_parallel_size=n,
        dim_parallel_size=m,
        softmax="per-slice" if per_slice else "exact",
        comm_type="auto" if per_slice else pick(("a2a", *COMM_TYPES)),
        query_placement=pick(("auto", *QUERY_PLACEMENTS)),
        core_attention=pick(CORE_ATTENTIONS),
        hierarchical_allreduce=now_and_then(0.4) and tp in (4, 6),
        rotary_percent=case.rotary_percent,
    )
    if m is not None and m > 1 and now_and_then(0.2) and not per_slice:
        helix = replace(helix, slice_weights=tuple(pick((0.5, 1.0, 1.0, 3.0)) for _ in range(m)))
    recompute = pick(("core_attn", "full", "full")) if now_and_then(0.25) else None
    job = Job(number, tp, case, helix, cp, recompute=recompute, overrides=dict(FLAG_OF.get(recompute, {})))
    if case.seq // cp % tp == 0 and now_and_then(0.4):
        job.overrides["sequence_parallel"] = True
    if case.sinks and now_and_then(0.5):
        job.overrides["softmax_type"] = "off-by-one"  # sinks that stay 0
    block = pick(("mlp", "moe")) if now_and_then(0.4) else None
    if block == "mlp" or job.sequence_parallel:  # Megatron trains MoE over T > 1 with sequence parallelism
        job = replace(job, block=block)
    if now_and_then(0.15) and job.block != "moe":  # which experts are taken is not continuous
        job = replace(job, half=True)
    if cp == 1 and window is None and case.seq > 1 and now_and_then(0.3):
        cuts = sorted({0, case.seq, *(chance.randrange(case.seq) for _ in range(pick((1, 2, 3))))})
        lengths = tuple(b - a for a, b in pairwise(cuts))
        case = replace(case, batch=1, mask="causal", documents=lengths)
        return replace(job, case=case, helix=replace(helix, core_attention="auto"))
    own_masks = case.mask != "padding" and not case.sinks and not job.half
    if own_masks and now_and_then(0.1) and (window is None or (window[1] == 0 and case.mask == "causal")):
        job = replace(job, te_core=True, helix=replace(helix, core_attention="spec"))
    return job


def why_illegal(job: Job) -> str | None:
    """Why a configuration must be refused; None when it must work."""
    case, helix, tp = job.case, job.helix, job.tp
    per_slice, pairs = helix.softmax == "per-slice", case.rotary_dim // 2

    def splits(n: int, m: int) -> bool:
        even = case.dim % m == 0 and pairs % m == 0
        return n * m == tp and case.groups % n == 0 and m <= (pairs or case.dim) and (even or not per_slice)

    n, m = helix.head_parallel_size, helix.dim_parallel_size
    if n is None and m is None:  # the most head groups that work
        grids = [(k, tp // k) for k in range(tp, 0, -1) if tp % k == 0 and splits(k, tp // k)]
        n, m = grids[0] if grids else (0, 0)
    n, m = n if n is not None else tp // m, m if m is not None else tp // n
    if n * m != tp or not splits(n, m):
        return "grid"
    weights, whole = helix.slice_weights, case.heads // n % m == 0
    summed, placed = helix.comm_type == "all_reduce", helix.query_placement == "heads"
    reasons = {
        "number of weights": weights is not None and (len(weights) != m or m == 1),
        "one level": helix.hierarchical_allreduce and 1 in (n, m),
        "placement": placed and (per_slice or not whole),
    }
    if m > 1:
        reasons |= {
            "sinks of summed scores": case.sinks and summed,
            "sinks of shared positions": case.sinks and not whole and not job.off_by_one,
            "gate of slices": case.gate and per_slice,
            "context parallel": job.cp > 1 and (per_slice or summed),
            "window ahead": not per_slice
            and case.window is not None
            and case.window[1] > 0
            and (not whole or job.cp > 1),
            NOT_OURS: bool(case.documents) and per_slice,
            "packed": bool(case.documents) and (summed or not whole),
        }
    elif case.documents or job.cp > 1:
        reasons[NOT_OURS] = True
    return next((reason for reason, applies in reasons.items() if applies), None)
