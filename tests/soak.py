"""Random attention layers on random grids: each equals the float64 formula or is refused with a reason.

    python tests/soak.py --count 1000                        the first thousand; exit code 1 on a failure
    python tests/soak.py --share 3/20 --out soak.jsonl       the third twentieth of --total (10,000)
    python tests/soak.py --count 0 --out soak.jsonl          the table of what is there

A configuration is a function of (seed, number), so any share can be run again, by anyone. With --out every
configuration appends one JSON line with its verdict, and what has a line is not run again: a soak that was
stopped goes on. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from layer_worker import Groups, check, start
from reference import Case

from helix_megatron.config import COMM_TYPES, CORE_ATTENTIONS, QUERY_PLACEMENTS, HelixConfig, HelixPlan
from helix_megatron.grid import AttentionShape, HelixConfigError, legal_grids
from helix_megatron.launch import RankError, run_ranks

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
    if m is not None and m > 1 and chance.random() < 0.2 and not per_slice:
        helix = replace(helix, slice_weights=tuple(pick((0.5, 1.0, 1.0, 3.0)) for _ in range(m)))
    return Job(number, tp, case, helix, overrides)


def rank_outcomes(tp: int, jobs: list[Job]) -> list[dict]:
    """For each job {"grid", and "error": the largest one, or "refused": why}; "threads" of this process.

    The groups of every grid are made once, at first: gloo keeps threads for each that is made.
    """
    start(tp)
    groups, found = Groups(), []
    plans = {}
    for job in jobs:
        case = job.case
        try:
            plans[job.number] = job.helix.resolve(case.heads, case.groups, case.dim, tp, case.interleaved)
        except HelixConfigError as refusal:
            plans[job.number] = refusal
    for grid in dict.fromkeys(plan.grid for plan in plans.values() if isinstance(plan, HelixPlan)):
        if grid.dim_parallel_size > 1:
            groups.of(grid)
    for job in jobs:
        case, plan = replace(job.case), plans[job.number]
        try:
            if isinstance(plan, HelixConfigError):
                raise plan
            whole = plan.grid.dim_parallel_size == 1
            errors = check(case, job.helix, tp, None if whole else groups.of(plan.grid), **job.overrides)
            grid = f"{plan.grid}" if plan.layout.is_even else f"{plan.grid} uneven"
            found.append({"grid": grid, "error": max(errors.values()), "of": max(errors, key=errors.get)})
        except HelixConfigError as refusal:
            found.append({"refused": str(refusal)})
        found[-1]["threads"] = len(os.listdir("/proc/self/task"))
    return found


def verdict(job: Job, outcomes: list[dict]) -> dict:
    """The line of one configuration, from what its ranks found: equal, refused or failed."""
    line = {"number": job.number, "tp": job.tp, "threads": max(o.get("threads", 0) for o in outcomes)}
    if all("refused" in outcome for outcome in outcomes):
        return {**line, "verdict": "refused", "reason": outcomes[0]["refused"]}
    errors = [outcome.get("error", float("inf")) for outcome in outcomes]
    line |= {"grid": outcomes[0].get("grid"), "error": max(errors)}
    if all(error < LIMIT for error in errors):
        return {**line, "verdict": "equal", "reason": ""}
    return {**line, "verdict": "failed", "reason": f"{job}: {outcomes}"}


def run(jobs: list[Job]) -> Iterator[dict]:
    """Lines of jobs of one size, in the same ranks. A rank that fails is run again with fewer jobs."""
    tp = jobs[0].tp
    try:
        ranks = run_ranks(rank_outcomes, tp, tp, jobs, timeout_s=60 + 2 * len(jobs) * tp)
    except RankError as error:
        if len(jobs) > 1:
            half = len(jobs) // 2
            yield from run(jobs[:half])
            yield from run(jobs[half:])
        else:
            yield {"number": jobs[0].number, "tp": tp, "verdict": "failed", "reason": f"{jobs[0]}: {error}"}
        return
    for job, outcomes in zip(jobs, zip(*ranks, strict=True), strict=True):
        yield verdict(job, list(outcomes))


def soak(seed: int, numbers: list[int], sizes: tuple[int, ...] = SIZES) -> Iterator[dict]:
    """One line for each configuration: number, tp, verdict, reason, and where it ran grid and error."""
    by_size: dict[int, list[Job]] = {}
    for number in numbers:
        job = draw(seed, number, sizes)
        by_size.setdefault(job.tp, []).append(job)
    for _, jobs in sorted(by_size.items()):
        for line in run(jobs):
            yield {"seed": seed, **line}


def summary(lines: list[dict]) -> dict:
    """Counts of verdicts, of refusals by reason and of grids; the largest error; the failures."""
    ran = [line for line in lines if line["verdict"] == "equal"]
    refused = Counter(_reason(line["reason"]) for line in lines if line["verdict"] == "refused")
    return {
        "ran": len(lines), "equal": len(ran), "refused": dict(refused.most_common()),
        "grids": dict(Counter(line["grid"] for line in ran).most_common()),
        "worst": max((line["error"] for line in ran), default=0.0),
        "threads": max((line.get("threads", 0) for line in lines), default=0),
        "failures": [line["reason"] for line in lines if line["verdict"] == "failed"],
    }  # fmt: skip


def table(found: dict) -> str:
    """A summary as Markdown."""
    refused = found["refused"]
    rows = [("equal to float64", found["equal"]), ("failed", len(found["failures"]))]
    rows += [(f"refused: {reason}", count) for reason, count in refused.items()]
    return "\n".join(
        ["| verdict | configurations |", "| --- | --- |", *(f"| {a} | {b:,} |" for a, b in rows)]
    )


def _reason(message: str) -> str:
    """A refusal without its numbers."""
    text = message.split("; ")[0].rsplit(": ", 1)[-1]
    return " ".join("#" if word.strip("(),:").replace("x", "").isdigit() else word for word in text.split())[
        :90
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--from", dest="first", type=int, default=0, help="number of the first configuration")
    add("--count", type=int, default=100)
    add("--share", metavar="K/N", help="instead of --from and --count: part K of N of --total")
    add("--total", type=int, default=10_000)
    add(
        "--out",
        type=Path,
        help="file of one JSON line for each configuration; what is there is not run again",
    )
    add("--batch", type=int, default=250, help="configurations between two starts of the ranks")
    add("--seconds", type=float, default=float("inf"), help="start no batch after so long")
    options = parser.parse_args()
    if options.share:
        part, parts = map(int, options.share.split("/"))
        if not 1 <= part <= parts:
            parser.error(f"--share {options.share}: part {part} of {parts} is none; parts are 1 to {parts}")
        bounds = [options.total * k // parts for k in (part - 1, part)]
        options.first, options.count = bounds[0], bounds[1] - bounds[0]
    return options


def read_lines(out: Path | None, seed: int) -> list[dict]:
    """The lines of this seed in a file of an earlier run; what was cut off in mid-line is taken away."""
    if out is None or not out.exists():
        return []
    text = out.read_text()
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        out.write_text(text)
    return [line for line in map(json.loads, text.splitlines()) if line["seed"] == seed]


def main() -> int:
    options = _options()
    begin = time.time()
    lines = read_lines(options.out, options.seed)
    done = {line["number"] for line in lines}
    wanted = [n for n in range(options.first, options.first + options.count) if n not in done]
    for first in range(0, len(wanted), options.batch):
        if time.time() - begin > options.seconds:
            break
        for line in soak(options.seed, wanted[first : first + options.batch]):
            lines.append(line)
            if options.out is not None:
                with options.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        print(f"{len(lines)} lines, {time.time() - begin:.0f} s", file=sys.stderr, flush=True)
    found = summary(lines)
    print(table(found))
    print(json.dumps({"seed": options.seed, **found, "seconds": round(time.time() - begin)}))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    import soak as by_name  # ranks import it by name

    sys.exit(by_name.main())
