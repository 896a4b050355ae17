"""CUDA graphs of decode steps: a replay gives what the eager step gives, whatever changed since the capture.

Every step draws how many requests there are, their lengths and their blocks. The step is run twice from the
same cache: eagerly, on tokens, requests and plans of its own, and as the replay of the graph captured for its
sizes, which reads what Megatron's context and StepTokens have filled. Outputs and caches are compared.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch

from helix_megatron.check.decode_step import new_context, set_decode_step
from helix_megatron.check.reference import Case
from helix_megatron.check.rows import Place, Rows
from helix_megatron.inference.step_tokens import StepTokens
from helix_megatron.megatron import integrate
from helix_megatron.partition.config import HelixConfig

STEPS, BATCH, BLOCK, LENGTH = 200, 12, 256, 1024
HEADS, DIMS = dict(query_placement="heads"), dict(query_placement="dims")
JOBS: dict[str, tuple[tuple[int, int], dict[str, Any], dict[str, Any], bool]] = {
    # query and KV heads and more of the case, settings of Helix; whether `--quick` has it
    "1x2, heads": ((8, 2), {}, HEADS, True),
    "1x2, dims": ((8, 2), {}, DIMS, True),
    "1x2, two chunks": ((8, 2), {}, dict(overlap_chunks=2), False),
    "1x2, window": ((8, 2), dict(window=(300, 0)), {}, False),
    "1x2, QK norm, half of RoPE": (
        (8, 2), dict(qk_norm="RMSNorm", rotary_percent=0.5), dict(rotary_percent=0.5), False,
    ),
}  # fmt: skip
TOLERANCE = 2e-2  # of bf16; what is stale is off by the size of the outputs

Capture = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]
"""A step to its replay, and to the memory where that leaves the output."""


def check(rows: Rows, place: Place) -> None:
    """Replay beside eager over STEPS random steps, in two ranks."""
    if place.on_host:
        rows.add("replay equals eager", "skipped", "no GPU: CUDA graphs are captured on GPUs only")
        return
    names = [name for name, job in JOBS.items() if job[3] or not place.quick]
    place.run(rank_replays, 2, rows.path, names, place)


def rank_replays(path: str, names: list[str], place: Place) -> None:
    """In a rank: every job; rank 0 writes the rows."""
    from helix_megatron.check import layer as layers

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    layers.start(2)
    rows, groups = Rows(path), layers.Groups()
    for name in names:
        worst, failure = 0.0, ""
        try:
            (heads, kv_heads), features, settings, _ = JOBS[name]
            case = Case(heads, kv_heads, 128, hidden=512, seq=LENGTH, batch=1, **features)
            replays = Replays(case, HelixConfig(1, 2, **settings), groups, (BATCH, BLOCK), captured)
            for step in range(STEPS):
                worst = max(worst, replays.apart(step))
        except Exception as error:
            failure = f"{type(error).__name__}: {str(error)[:300]}"
        everywhere: list[Any] = [None, None]
        torch.distributed.all_gather_object(everywhere, (worst, failure))
        if torch.distributed.get_rank() == 0:
            failures = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(everywhere) if failure]
            worst = max(apart for apart, _ in everywhere)
            status = "ok" if worst <= TOLERANCE and not failures else "failed"
            detail = failures[0] if failures else f"{worst:.1e} off the eager step in {STEPS} steps"
            rows.add(f"replay equals eager, {name}", status, f"{detail}; {place.words(2)}", error=worst)
        if failure:
            break  # the other rank may wait in a collective
    torch.distributed.destroy_process_group()


def captured(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """As Megatron captures: after steps on a side stream, with checks of this thread alone."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = step()
    return graph.replay, out


class Replays:
    """A layer, its context, and a graph for each size of step (`graphs`).

    Args:
        case: its shape; `seq` is the longest request.
        helix: grid 1 x T.
        groups: Helix's process groups.
        sizes: requests, and tokens of a block.
        capture: how a step becomes a graph.
    """

    def __init__(self, case: Case, helix: HelixConfig, groups: Any, sizes: tuple[int, int], capture: Capture):
        from helix_megatron.check import layer as layers

        tp = torch.distributed.get_world_size()
        self._capture, (self._batch, self._block) = capture, sizes
        self._length, self._rope = case.seq, case.rope_table()
        dtype = torch.get_default_dtype() if layers.host_mode_enabled() else torch.bfloat16
        half = dtype is torch.bfloat16
        config: dict[str, Any] = dict(cuda_graph_impl="local", params_dtype=dtype, bf16=half)
        plan = helix.resolve(case.heads, case.groups, case.dim, tp, case.interleaved)
        self._layer = layers.make_layer(case, helix, tp, groups.of(plan.grid), **config).eval()
        integrate.enable(helix)
        try:
            blocks = self._batch * -(-case.seq // self._block)
            block_bytes = 2 * self._block * case.groups * case.dim * dtype.itemsize // tp
            self._context, self._table = new_context(
                layers.make_config(case, tp, **config), blocks, block_bytes, case.seq, self._batch,
                self._block, graphs=2,
            )  # fmt: skip
        finally:
            integrate.disable()
        device = torch.cuda.current_device()
        self._rope = None if self._rope is None else self._rope.to(device)
        self._hidden = torch.zeros(self._context.max_tokens, 1, case.hidden, device=device, dtype=dtype)
        self._context.memory_buffer.normal_()
        self.graphs: dict[Any, tuple[Callable[[], None], torch.Tensor]] = {}

    def apart(self, step: int) -> float:
        """How far outputs and caches are apart, beside their size, in a step drawn by its number."""
        context, memory = self._context, self._context.memory_buffer
        generator = torch.Generator("cpu").manual_seed(step)
        batch = int(torch.randint(1, self._batch + 1, (1,), generator=generator))
        lengths = torch.randint(1, self._length + 1, (batch,), generator=generator).tolist()
        order = torch.randperm(self._table.numel(), generator=generator).view(self._table.shape)
        table = self._table.flatten()[order.to(self._table.device)]
        with torch.inference_mode(), _inferring():
            set_decode_step(context, table, batch, lengths, self._block)
            assert context.helix_step.in_graph, context.padded_batch_dimensions
            self._hidden.copy_(torch.randn(self._hidden.shape, generator=generator))
            before = memory.clone()
            expected, written = self._eager().clone(), memory.clone()
            sizes = context.padded_batch_dimensions
            if sizes not in self.graphs:
                self.graphs[sizes] = self._capture(self._run)
            memory.copy_(before)
            replay, out = self.graphs[sizes]
            replay()
        spare = context.kv_block_allocator.dummy_block_idx
        memory[:, :, spare] = written[:, :, spare]  # where other ranks' tokens go, in any order
        return max(_apart(out[:batch], expected[:batch]), _apart(memory, written))

    def _run(self) -> torch.Tensor:
        hidden = self._hidden[: self._context.padded_active_token_count]
        return self._layer(hidden, None, inference_context=self._context, rotary_pos_emb=self._rope)[0]

    def _eager(self) -> torch.Tensor:
        """The step with tokens, requests and plans that nobody had before."""
        shared = self._context.helix_step
        self._context.helix_step = StepTokens(shared.interleave, shared.rank, graphs=False)
        try:
            self._context.helix_step.begin(self._context)
            return self._run()
        finally:
            self._context.helix_step = shared


def _apart(mine: torch.Tensor, want: torch.Tensor) -> float:
    """The greatest difference, beside the greatest value; infinite where one is NaN, which `max` may lose."""
    apart = ((mine.float() - want.float()).abs().max() / want.float().abs().max()).item()
    return apart if math.isfinite(apart) else math.inf


def _inferring() -> Any:
    from megatron.core.inference.utils import InferenceMode

    return InferenceMode.active()
