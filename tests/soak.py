"""Random attention layers on random grids: each equals the float64 formula or is refused with a reason.

    python tests/soak.py --seed 1 --count 1000    its last line is JSON; exit code 1 on a failure

A configuration is a function of (seed, number), so any share of a soak can be run again: --first says where.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace

from layer_worker import Groups, check, start
from reference import Case

from helix_megatron.config import COMM_TYPES, CORE_ATTENTIONS, QUERY_PLACEMENTS, HelixConfig
from helix_megatron.grid import AttentionShape, HelixConfigError, legal_grids
from helix_megatron.launch import run_ranks

LIMIT = 2e-5  # |found - expected| / |expected| of the output and every gradient, fp32 against float64
SIZES = (2, 3, 4, 5, 6)


@dataclass(frozen=True)
class Job:
    """One random configuration."""

    number: int
    tp: int
    case: Case
    helix: HelixConfig
    overrides: dict

    def __str__(self) -> str:
        return f"{self.number}: tp={self.tp} {replace(self.case, tensors={})} {self.helix} {self.overrides}"


def draw(seed: int, number: int, sizes: tuple[int, ...] = SIZES) -> Job:
    """Configuration `number` of a soak."""
    chance = random.Random(f"{seed} {number}")
    pick = chance.choice
    tp, groups = pick(sizes), pick((1, 2, 3, 4, 6))
    per_slice = chance.random() < 0.15
    window = (chance.randrange(1, 9), pick((0, 0, 0, 2))) if chance.random() < 0.25 else None
    case = Case(
        heads=groups * pick((1, 2, 3, 4)),
        groups=groups,
        dim=pick((8, 12, 16, 24, 48, 20)),
        hidden=24,
        seq=pick((1, 5, 12, 24)) if window is None else pick((12, 24)),
        batch=pick((1, 2)),
        rotary_percent=pick((1.0, 1.0, 0.5, 0.0)),
        interleaved=chance.random() < 0.3,
        bias=chance.random() < 0.5,
        qk_norm=None if per_slice else pick((None, None, "RMSNorm", "LayerNorm", "L2Norm")),
        window=window,
        gate=chance.random() < 0.2,
        sinks=not per_slice and chance.random() < 0.2,
        mask=pick(("causal", "causal", "padding", "arbitrary", "none")),
        seed=number,
    )
    shape = AttentionShape(case.heads, case.groups, case.dim, case.rotary_dim, case.interleaved)
    sliced = [grid for grid in legal_grids(shape, tp, even=per_slice) if grid.dim_parallel_size > 1]
    n, m = pick((1, 2, 3, None)), pick((1, 2, tp, None))
    if sliced and chance.random() < 0.9:  # mostly what can work
        grid = pick(sliced)
        n, m = grid.head_parallel_size, grid.dim_parallel_size
    helix = HelixConfig(
        head_parallel_size=n,
        dim_parallel_size=m,
        softmax="per-slice" if per_slice else "exact",
        comm_type="auto" if per_slice else pick(COMM_TYPES),
        query_placement=pick(("auto", *QUERY_PLACEMENTS)),
        core_attention=pick(CORE_ATTENTIONS),
        rotary_percent=case.rotary_percent,
    )
    overrides = {"sequence_parallel": True} if chance.random() < 0.25 and case.seq % tp == 0 else {}
    if m is not None and m > 1 and chance.random() < 0.2:
        helix = replace(helix, slice_weights=tuple(pick((0.5, 1.0, 1.0, 3.0)) for _ in range(m)))
    return Job(number, tp, case, helix, overrides)


def rank_outcomes(tp: int, jobs: list[Job]) -> list[dict]:
    """For each job {"grid", and "error": the largest one, or "refused": why}."""
    start(tp)
    groups, found = Groups(), []
    for job in jobs:
        case = replace(job.case)
        try:
            plan = job.helix.resolve(case.heads, case.groups, case.dim, tp, case.interleaved)
            whole = plan.grid.dim_parallel_size == 1
            errors = check(case, job.helix, tp, None if whole else groups.of(plan.grid), **job.overrides)
            grid = f"{plan.grid}" if plan.layout.is_even else f"{plan.grid} uneven"
            found.append({"grid": grid, "error": max(errors.values()), "of": max(errors, key=errors.get)})
        except HelixConfigError as refusal:
            found.append({"refused": str(refusal)})
    return found


def soak(seed: int, first: int, count: int, sizes: tuple[int, ...] = SIZES) -> dict:
    """Run `count` configurations from number `first` on; their outcomes, counted, and the failures."""
    by_size: dict[int, list[Job]] = {}
    for number in range(first, first + count):
        job = draw(seed, number, sizes)
        by_size.setdefault(job.tp, []).append(job)
    failures, refusals, grids, worst = [], Counter(), Counter(), 0.0
    for tp, jobs in sorted(by_size.items()):
        ranks = run_ranks(rank_outcomes, tp, tp, jobs, timeout_s=60 + 2 * len(jobs) * tp)
        for job, outcomes in zip(jobs, zip(*ranks, strict=True), strict=True):
            if all("refused" in outcome for outcome in outcomes):
                refusals[_reason(outcomes[0]["refused"])] += 1
                continue
            errors = [outcome.get("error", float("inf")) for outcome in outcomes]
            if not max(errors) < LIMIT:
                failures.append(f"{job}: {outcomes}")
            grids[outcomes[0].get("grid")] += 1
            worst = max(worst, *errors)
    return {
        "seed": seed, "first": first, "count": count, "equal": sum(grids.values()) - len(failures),
        "refused": dict(refusals.most_common()), "grids": dict(grids.most_common()), "worst": worst,
        "failures": failures,
    }  # fmt: skip


def _reason(message: str) -> str:
    """A refusal without its numbers."""
    text = message.split("; ")[0].rsplit(": ", 1)[-1]
    return " ".join("#" if word.strip("(),:").replace("x", "").isdigit() else word for word in text.split())[
        :90
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--first", type=int, default=0, help="number of the first configuration")
    add("--count", type=int, default=100)
    add("--batch", type=int, default=500, help="configurations between two starts of the ranks")
    options = parser.parse_args()
    begin, found = time.time(), []
    for first in range(options.first, options.first + options.count, options.batch):
        count = min(options.batch, options.first + options.count - first)
        found.append(soak(options.seed, first, count))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    total = {
        "seed": options.seed, "first": options.first, "count": options.count,
        "equal": sum(part["equal"] for part in found),
        "refused": sum(sum(part["refused"].values()) for part in found),
        "worst": max(part["worst"] for part in found),
        "failures": [failure for part in found for failure in part["failures"]],
        "seconds": round(time.time() - begin),
    }  # fmt: skip
    print(json.dumps(total))
    return 1 if total["failures"] else 0


if __name__ == "__main__":
    import soak as by_name  # ranks import it by name

    sys.exit(by_name.main())
