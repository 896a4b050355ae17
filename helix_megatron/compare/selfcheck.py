"""Can the harness tell a difference, and can it tell none?  python -m helix_megatron.compare.selfcheck

Three variants of one tiny model run in turn through the harness itself: A, the same again, and A slowed by a
known share (each iteration sleeps). Every `runs` rounds are one try. In at least 90 % of the tries the 95 %
interval of A against itself must contain 1, and in at least 90 % the slowed one must be found slower. The
overhead is what the harness adds to an iteration: its fixed cost, and what counting adds to each collective
of a run of two ranks.

Note [How many runs find 5 %]
    Fresh processes of one program differ by sd = 3 % (one rank on a quiet host of two cores; 5 % with two
    ranks), however many iterations they run. A paired t-interval of n runs finds a difference of 5 % in 90 %
    of all tries when 0.05 sqrt(n) / sd is at least 4.3 (n = 5), 3.7 (n = 8), 3.6 (n = 10), so when sd is at
    most 2.6 %, 3.8 %, 4.4 %. Hence one rank and eight runs here; and who wants to see 5 % of a noisy machine
    asks for more runs, not for more iterations.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from helix_megatron.compare import stats

SLOW_DOWN = 0.05
_ENOUGH = 0.9
_MODEL = {
    "num-layers": 2, "hidden-size": 128, "num-attention-heads": 4, "seq-length": 128,
    "max-position-embeddings": 128, "micro-batch-size": 2, "global-batch-size": 4, "lr": 1e-3, "min-lr": 1e-3,
    "lr-decay-style": "constant", "padded-vocab-size": 272, "transformer-impl": "local",
    "position-embedding-type": "rope", "no-gradient-accumulation-fusion": True, "no-rope-fusion": True,
    "no-masked-softmax-fusion": True, "no-bias-dropout-fusion": True, "no-bias-gelu-fusion": True,
    "no-persist-layer-norm": True, "no-create-attention-mask-in-dataloader": True, "attention-dropout": 0.0,
    "hidden-dropout": 0.0, "num-workers": 0,
}  # fmt: skip


def judge(same: list[float], again: list[float], slowed: list[float], runs: int) -> dict[str, Any]:
    """Seconds of every run of the three variants, cut into tries of `runs` → what came out.

    false_alarms: tries in which A differed from itself; found: tries in which the slowed one was slower.
    passed: both within the limits above.
    """
    tries = len(same) // runs
    if tries < 1 or not len(same) == len(again) == len(slowed):
        raise ValueError(f"{len(same)}, {len(again)}, {len(slowed)} runs are no tries of {runs}.")
    alarms, found, ratios = 0, 0, []
    for start in range(0, tries * runs, runs):
        part = slice(start, start + runs)
        alarms += bool(stats.compare(again[part], same[part])["differs"])
        slower = stats.compare(slowed[part], same[part])
        found += bool(slower["differs"]) and slower["ratio"] > 1
        ratios.append(slower["ratio"])
    return {
        "tries": tries,
        "runs_per_try": runs,
        "false_alarms": alarms,
        "found": found,
        "slowed_ratios": ratios,
        "passed": alarms <= (1 - _ENOUGH) * tries and found >= _ENOUGH * tries,
    }


def overhead(calls: int, iteration_s: float, repeat: int = 2000) -> dict[str, float]:
    """Seconds that measuring adds to an iteration of `calls` collectives, and their share of it.

    Timed here, without ranks: an iteration that does nothing, and a collective that does nothing.
    """
    import torch

    from helix_megatron.compare.comm import CommMeter
    from helix_megatron.compare.workloads import Samples

    class Group:
        def size(self) -> int:
            return 16

    meter = CommMeter()
    counted = meter._counted("allreduce", lambda group, tensors: None, False)
    group, tensors = Group(), [torch.ones(8)]
    start = time.perf_counter()
    for _ in range(repeat):
        counted(group, tensors)
    per_call = (time.perf_counter() - start) / repeat
    samples = Samples(0, host=True)
    rounds = max(1, repeat // 100)
    start = time.perf_counter()
    for _ in range(rounds):
        samples.iteration(lambda: None, meter)
    fixed = (time.perf_counter() - start) / rounds
    added = fixed + calls * per_call
    return {"per_call_s": per_call, "fixed_s": fixed, "added_s": added, "share": added / iteration_s}


def main(argv: list[str] | None = None) -> int:
    """Run it on this machine; the last line is one JSON document. 0 when it passed, else 1."""
    from rich.console import Console

    from helix_megatron.compare import config as configuration
    from helix_megatron.compare import harness
    from helix_megatron.host.mode import enable_host_mode

    parser = argparse.ArgumentParser(prog="python -m helix_megatron.compare.selfcheck")
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--runs", type=int, default=8, help="runs of each variant in a try")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--out", default="runs/selfcheck")
    parser.add_argument("--resume", action="store_true", help="go on after the runs that are in --out")
    options = parser.parse_args(argv)
    out = Path(options.out)

    def measured(folder: Path, runs: int, ranks: int, variants: list[dict[str, Any]]) -> dict[str, Any]:
        document = {
            "name": "self-check",
            "host": True,
            "world_size": ranks,
            "runs": runs,
            "iterations": options.iterations,
            "warmup_iterations": 3,
            "workloads": {"train": {}},
            "reference": False,
            "MODEL_ARGS": _MODEL | {"tensor-model-parallel-size": ranks},
            "variants": variants,
        }
        how = harness.Options(resume=options.resume, overwrite=not options.resume)
        harness.compare(configuration.parse(document, "selfcheck"), folder, Console(), how)
        return json.loads((folder / "results.json").read_text())

    variants = [{"name": "A"}, {"name": "A again"}, {"name": "slowed", "slow_down": SLOW_DOWN}]
    two = measured(out / "two_ranks", 1, 2, variants[:1])["variants"][0]["measured"]["workloads"]["train"]
    results = measured(out, options.tries * options.runs, 1, variants)
    train = [v["measured"]["workloads"]["train"] for v in results["variants"]]
    seconds = [[sum(s) / len(s) for s in one["samples_seconds"]] for one in train]
    verdict = judge(*seconds, runs=options.runs)
    calls = round(sum(kind["calls"] for kind in two["communication"].values()))
    enable_host_mode()
    verdict["overhead"] = {"calls": calls} | overhead(calls, two["iteration_seconds"]["mean"])
    verdict["passed"] = verdict["passed"] and verdict["overhead"]["share"] <= 0.01
    verdict["run_seconds"] = dict(zip(("A", "A again", "slowed"), seconds))
    names = ("hardware", "versions", "revision", "written")
    print(json.dumps({**{n: results[n] for n in names}, "slow_down": SLOW_DOWN, **verdict}))
    return 0 if verdict["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
