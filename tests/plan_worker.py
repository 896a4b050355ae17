"""What a rank does in the planner's tests: builds layouts with Megatron and measures them."""

from __future__ import annotations

import torch

from helix_megatron.plan import trial
from helix_megatron.plan.layout import Problem


def measure(problems: list[Problem]) -> list[trial.Measured]:
    torch.distributed.init_process_group("nccl")
    return [trial.measure(problem, steps=1, warmup=0) for problem in problems]
