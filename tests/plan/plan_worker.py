"""What a rank does in the planner's tests: builds layouts with Megatron and measures them."""

from __future__ import annotations

from dataclasses import replace

import torch

from helix_megatron import cli
from helix_megatron.plan import machine, probe_collectives, probe_rates, trial
from helix_megatron.plan.layout import Problem


def measure(problems: list[Problem]) -> list[trial.Measured]:
    torch.distributed.init_process_group("nccl")
    return [trial.measure(problem, steps=1, warmup=0) for problem in problems]


def probe(path: str, gpus: int) -> int:
    """`helix plan --probe` as on a machine of `gpus` H100, with sizes for a core."""
    joined = tuple(range(gpus))
    machine.read_gpus = lambda: [("NVIDIA H100 80GB HBM3", 80 * 10**9, joined)] * gpus
    probe_collectives.SMALL, probe_collectives.LARGE = (4096, 1 << 16), (1 << 18, 1 << 20)
    probe_rates.GPU = replace(
        probe_rates.HOST, rows=64, width=256, read=512, positions=128, keys=256, passed=1 << 20, ring=8 << 20
    )
    return cli.main(["plan", "--probe", path])
