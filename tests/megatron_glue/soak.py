"""Random layers on random grids: each equals float64 as well as Megatron does, or is refused with a reason.

    python -m tests.megatron_glue.soak --count 1000    the first thousand; exit code 1 on a failure
    python -m tests.megatron_glue.soak --share 3/20 --out a.jsonl    the third twentieth of --total (10,000)
    python -m tests.megatron_glue.soak --count 0 --out a.jsonl    the table of what is there

soak_draw.py says what is drawn and what must be refused, soak_worker.py when a layer is equal. What is drawn
is a function of (seed, number), so any share can be run again, by anyone. With --out every configuration
appends one JSON line with its verdict, and what has a line is not run again: a soak that was stopped goes
on. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from helix_megatron.host.launcher import RankError, run_ranks
from tests.megatron_glue.soak_draw import WORLDS, Job, draw, why_illegal
from tests.megatron_glue.soak_worker import rank_outcomes


def verdict(job: Job, outcomes: list[dict]) -> dict:
    """The line of one configuration, from what its ranks found: equal, refused or failed."""
    line = {
        "number": job.number, "world": _world(job), "threads": max(o.get("threads", 0) for o in outcomes),
        "features": job.features(),
    }  # fmt: skip
    illegal = why_illegal(job)
    if all("refused" in outcome for outcome in outcomes):
        reason = outcomes[0]["refused"]
        if illegal is None:
            return {**line, "verdict": "failed", "reason": f"refused though it can work: {reason}; {job}"}
        return {**line, "verdict": "refused", "why": illegal, "reason": reason}
    if illegal is not None:
        return {**line, "verdict": "failed", "reason": f"not refused, but {illegal}: {job}: {outcomes}"}
    errors = [outcome.get("error", float("inf")) for outcome in outcomes]
    worst = outcomes[errors.index(max(errors))]
    line |= {name: worst.get(name) for name in ("grid", "error", "of", "relative")}
    if all(error < 1 for error in errors):
        return {**line, "verdict": "equal", "reason": ""}
    return {**line, "verdict": "failed", "reason": f"{job}: {outcomes}"}


def run(jobs: list[Job]) -> Iterator[dict]:
    """Lines of jobs of one world, in the same ranks. A rank that fails is run again with fewer jobs."""
    tp, cp = jobs[0].tp, jobs[0].cp
    try:
        ranks = run_ranks(rank_outcomes, tp * cp, tp, cp, jobs, timeout_s=60 + 2 * len(jobs) * tp * cp)
    except RankError as error:
        if len(jobs) > 1:
            half = len(jobs) // 2
            yield from run(jobs[:half])
            yield from run(jobs[half:])
        else:
            job = jobs[0]
            line = {"number": job.number, "world": _world(job), "features": job.features()}
            yield {**line, "verdict": "failed", "reason": f"{job}: {error}"}
        return
    for job, outcomes in zip(jobs, zip(*ranks, strict=True), strict=True):
        yield verdict(job, list(outcomes))


def _world(job: Job) -> str:
    return f"TP {job.tp}" + (f" CP {job.cp}" if job.cp > 1 else "")


def soak(seed: int, numbers: Iterable[int], worlds: tuple[tuple[int, int], ...] = WORLDS) -> Iterator[dict]:
    """One line each: number, world, features, verdict, reason, and where it ran its grid and error."""
    by_world: dict[tuple[int, int], list[Job]] = {}
    for number in numbers:
        job = draw(seed, number, worlds)
        by_world.setdefault((job.tp, job.cp), []).append(job)
    for _, jobs in sorted(by_world.items()):
        for line in run(jobs):
            yield {"seed": seed, **line}


def summary(lines: list[dict]) -> dict:
    """Counts of verdicts, of refusals by reason, of grids and features; the largest error; the failures."""
    ran = [line for line in lines if line["verdict"] == "equal"]
    return {
        "ran": len(lines), "equal": len(ran),
        "refused": _counts(line["why"] for line in lines if line["verdict"] == "refused"),
        "worlds": _counts(line["world"] for line in ran),
        "grids": _counts(line["grid"] for line in ran),
        "features": _counts(feature for line in ran for feature in line["features"]),
        "worst": max((line["error"] for line in ran), default=0.0),
        "threads": max((line.get("threads", 0) for line in lines), default=0),
        "failures": [line["reason"] for line in lines if line["verdict"] == "failed"],
    }  # fmt: skip


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def table(found: dict) -> str:
    """A summary as Markdown."""
    refused = found["refused"]
    rows = [("equal to float64", found["equal"]), ("failed", len(found["failures"]))]
    rows += [(f"refused: {reason}", count) for reason, count in refused.items()]
    return "\n".join(
        ["| verdict | configurations |", "| --- | --- |", *(f"| {a} | {b:,} |" for a, b in rows)]
    )


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
    add("--batch", type=int, default=500, help="configurations between two starts of the ranks")
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
    from tests.megatron_glue import soak as by_name  # ranks import it by name

    sys.exit(by_name.main())
