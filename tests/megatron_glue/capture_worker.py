"""Ranks of test_cuda_graphs.py: a layer's forward and backward recorded, and replayed with other numbers.

As a program, in a process with Transformer Engine, it is given names of that test's JOBS; its last line is
what rank_replays returns on each of four ranks, for layers of Transformer Engine's.
"""

from __future__ import annotations

import contextlib
import json
import sys
from unittest import mock

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import cuda_graphs

from helix_megatron.check.reference import Case
from helix_megatron.host.launcher import run_ranks
from helix_megatron.megatron import integrate, rope_tables
from helix_megatron.partition.config import HelixConfig
from tests.megatron_glue.capture import Capture, NotCapturable
from tests.megatron_glue.layer_worker import Groups, make_layer, start


def rank_replays(tp: int, jobs: list[tuple[Case, HelixConfig, dict]]) -> list[dict]:
    """For each layer what _replayed says of it, or {"refused": why nothing can be recorded}."""
    start(tp)
    groups, found = Groups(), []
    for case, helix, overrides in jobs:
        plan = helix.resolve(case.heads, case.groups, case.dim, tp, case.interleaved, case.gate)
        layers = [make_layer(case, helix, tp, groups.of(plan.grid), **overrides).train() for _ in range(2)]
        if helix.hierarchical_allreduce:
            integrate.enable(helix)  # make_layer has switched it off again
        try:
            found.append(_replayed(*layers, case, tp, overrides.get("sequence_parallel", False)))
        except NotCapturable as why:
            found.append({"refused": str(why)})
        finally:
            cuda_graphs._set_capture_end()
            integrate.disable()
    return found


def _replayed(layer, other, case: Case, tp: int, sequence_parallel: bool) -> dict:
    """{"same": a replay with new inputs and weights equals, bit for bit, another layer that never saw the old
    ones; "moved": what the first ones gave is something else; "collectives": recorded}."""
    own = case.seq // tp if sequence_parallel else case.seq
    hidden, gradient = (torch.zeros(own, 2, case.hidden) for _ in range(2))
    hidden.requires_grad_()
    weights, others = ([x for x in each.parameters() if x.requires_grad] for each in (layer, other))
    table = case.rope_table()

    def redraw(seed: int) -> None:
        """Inputs of all ranks alike, weights of each its own."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in (hidden, gradient, table):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            generator.manual_seed(seed + torch.distributed.get_rank())
            for weight in weights:
                weight.copy_(torch.randn(weight.shape, generator=generator) / 4)

    def step(layer, weights, hidden, gradient, table) -> tuple[torch.Tensor, ...]:
        """As Megatron's graphs do it, which know no .backward()."""
        out, _ = layer(hidden, None, rotary_pos_emb=table)
        return out, *torch.autograd.grad(out, [hidden, *weights], gradient)

    static = (layer, weights, hidden, gradient, table)

    redraw(1)
    cuda_graphs._set_capture_start()  # Megatron recomputes nothing then
    step(*static)  # warm-up
    capture = Capture()
    # It compares the state of the host's own generator; nothing here is random.
    fork = mock.patch.object(get_cuda_rng_tracker(), "fork", contextlib.nullcontext)
    with fork, mock.patch.object(rope_tables, "is_capturing", lambda table: True), capture.recording():
        recorded = [tensor.detach() for tensor in step(*static)]
    first = [tensor.clone() for tensor in recorded]
    redraw(2)
    capture.replay()
    again = [tensor.clone() for tensor in recorded]
    with torch.no_grad():
        for mine, drawn in zip(others, weights, strict=True):
            mine.copy_(drawn)
    fresh = step(other, others, hidden.detach().clone().requires_grad_(), gradient.clone(), table.clone())
    pairs = list(zip(again, fresh, first, strict=True))
    return {
        "same": all(torch.equal(replayed, eager) for replayed, eager, _ in pairs),
        "moved": not any(torch.equal(replayed, before) for replayed, _, before in pairs),
        "finite": all(bool(torch.isfinite(replayed).all()) for replayed, _, _ in pairs),
        "collectives": sum(not hasattr(step[0], "_schema") for step in capture.steps),
    }


if __name__ == "__main__":
    from tests.megatron_glue.capture_worker import rank_replays as by_name  # ranks import it by name
    from tests.megatron_glue.test_cuda_graphs import JOBS

    given = [(*JOBS[name][:2], {**JOBS[name][2], "te": True}) for name in sys.argv[1:]]
    print(json.dumps(run_ranks(by_name, 4, 4, given, timeout_s=150)))
