"""CUDA graphs of steps: a replay gives what the eager step gives, whatever changed since the capture.

Every step draws how many requests there are, their lengths and their blocks; every other one has prompts too,
with history or without, as Megatron's engine captures such steps. A step is run twice from the same cache:
eagerly, on tokens, requests and plans of its own (prompts without history by the core that trains), and as
the replay of the graph captured for its sizes, which reads what Megatron's context and StepTokens have
filled. Outputs and caches are compared.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from helix_megatron.check.decode_step import new_context, set_step
from helix_megatron.check.reference import Case
from helix_megatron.check.rows import Place, Rows
from helix_megatron.partition.config import HelixConfig


@dataclass(frozen=True)
class Sizes:
    """Of a layer's context.

    Args:
        batch: requests that it has room for.
        block: tokens of a block.
        length: of the longest request.
        graph_tokens: of the largest step with prompts that has a graph.
    """

    batch: int
    block: int
    length: int
    graph_tokens: int


STEPS, SIZES, DIM, HIDDEN = 200, Sizes(12, 256, 1024, 512), 128, 512
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
    place.run_each(rank_replays, 2, rows, names, place)


def rank_replays(path: str, names: Sequence[str], place: Place) -> None:
    """In a rank: these jobs; rank 0 writes the rows. What one raises ends all: the others may wait for it."""
    from helix_megatron.check import layer as layers

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    layers.start(2)
    rows, groups, first = Rows(path), layers.Groups(), torch.distributed.get_rank() == 0
    for name in names:
        if first:
            rows.begin(name)
        (heads, kv_heads), features, settings, _ = JOBS[name]
        case = Case(heads, kv_heads, DIM, hidden=HIDDEN, seq=SIZES.length, batch=1, **features)
        replays = Replays(case, HelixConfig(1, 2, **settings), groups, SIZES, captured)
        apart = [replays.apart(step) for step in range(STEPS)]
        everywhere: list[Any] = [None, None]
        torch.distributed.all_gather_object(everywhere, max(apart))
        if first:
            worst, kinds = max(everywhere), replays.kinds
            told = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
            rows.add(
                f"replay equals eager, {name}", "ok" if worst <= TOLERANCE else "failed",
                f"{worst:.1e} off the eager step in {STEPS} steps ({told}) of {len(replays.graphs)} graphs; "
                f"{place.words(2)}", error=worst, steps=dict(kinds), graphs=len(replays.graphs),
            )  # fmt: skip
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
        case: its shape.
        helix: grid 1 x T.
        groups: Helix's process groups.
        sizes: of the context.
        capture: how a step becomes a graph.
    """

    def __init__(self, case: Case, helix: HelixConfig, groups: Any, sizes: Sizes, capture: Capture):
        from helix_megatron.check import layer as layers
        from helix_megatron.megatron import integrate

        tp = torch.distributed.get_world_size()
        self._capture, self._sizes, self._rope = capture, sizes, case.rope_table()
        dtype = torch.get_default_dtype() if layers.host_mode_enabled() else torch.bfloat16
        half = dtype is torch.bfloat16
        config: dict[str, Any] = dict(cuda_graph_impl="local", params_dtype=dtype, bf16=half)
        plan = helix.resolve(case.heads, case.groups, case.dim, tp, case.interleaved)
        self._layer = layers.make_layer(case, helix, tp, groups.of(plan.grid), **config).eval()
        integrate.enable(helix)
        try:
            blocks = sizes.batch * -(-sizes.length // sizes.block)
            block_bytes = 2 * sizes.block * case.groups * case.dim * dtype.itemsize // tp
            self._context, self._table = new_context(
                layers.make_config(case, tp, **config), blocks, block_bytes, sizes.length, sizes.batch,
                sizes.block, graphs=2, graph_tokens=sizes.graph_tokens,
            )  # fmt: skip
        finally:
            integrate.disable()
        device = torch.cuda.current_device()
        self._rope = None if self._rope is None else self._rope.to(device)
        self._hidden = torch.zeros(sizes.graph_tokens, 1, case.hidden, device=device, dtype=dtype)
        self._context.memory_buffer.normal_()
        self.graphs: dict[Any, tuple[Callable[[], None], torch.Tensor]] = {}
        self.kinds: Counter[str] = Counter()

    def apart(self, step: int) -> float:
        """How far outputs and caches are apart, beside their size, in a step drawn by its number."""
        context, memory, sizes = self._context, self._context.memory_buffer, self._sizes
        generator = torch.Generator("cpu").manual_seed(step)
        new, lengths, prompts = draw_step(generator, sizes, with_prompts=step % 2 == 1)
        self.kinds["with prompts" if prompts else "of single tokens"] += 1
        tokens = sum(new)
        order = torch.randperm(self._table.numel(), generator=generator).view(self._table.shape)
        table = self._table.flatten()[order.to(self._table.device)]
        with torch.inference_mode(), _inferring():
            set_step(context, table, new, lengths, prompts, sizes.block)
            assert context.helix_step.in_graph, context.padded_batch_dimensions
            assert context.is_decode_only() == (not prompts), context.padded_batch_dimensions
            self._hidden[:tokens] = torch.randn(tokens, *self._hidden.shape[1:], generator=generator)
            before = memory.clone()
            expected, written = self._eager().clone(), memory.clone()
            key = context.padded_batch_dimensions
            if key not in self.graphs:
                self.graphs[key] = self._capture(self._run)
            memory.copy_(before)
            replay, out = self.graphs[key]
            replay()
        spare = context.kv_block_allocator.dummy_block_idx
        memory[:, :, spare] = written[:, :, spare]  # where other ranks' tokens go, in any order
        return max(_apart(out[:tokens], expected[:tokens]), _apart(memory, written))

    def _run(self) -> torch.Tensor:
        hidden = self._hidden[: self._context.padded_active_token_count]
        return self._layer(hidden, None, inference_context=self._context, rotary_pos_emb=self._rope)[0]

    def _eager(self) -> torch.Tensor:
        """The step with tokens, requests and plans that nobody had before."""
        from helix_megatron.inference.step_tokens import StepTokens

        shared = self._context.helix_step
        self._context.helix_step = StepTokens(shared.interleave, shared.rank, graphs=False)
        try:
            self._context.helix_step.begin(self._context)
            return self._run()
        finally:
            self._context.helix_step = shared


def draw_step(
    generator: torch.Generator, sizes: Sizes, with_prompts: bool
) -> tuple[list[int], list[int], int]:
    """New tokens and lengths of each request, and how many of the last ones are prompts.

    A prompt is whole, or the rest of one, every other time; all new tokens fit a graph.
    """

    def draw(most: int, least: int = 1) -> int:
        return int(torch.randint(least, most + 1, (1,), generator=generator))

    batch = draw(sizes.batch)
    lengths, new = [draw(sizes.length) for _ in range(batch)], [1] * batch
    prompts = draw(batch) if with_prompts else 0
    room = sizes.graph_tokens - batch
    for request in range(batch - prompts, batch):
        new[request] = draw(min(lengths[request], room + 1))
        room -= new[request] - 1
        if draw(2) == 1:
            lengths[request] = new[request]
    return new, lengths, prompts


def _apart(mine: torch.Tensor, want: torch.Tensor) -> float:
    """The greatest difference, beside the greatest value; infinite where one is NaN, which `max` may lose."""
    apart = ((mine.float() - want.float()).abs().max() / want.float().abs().max()).item()
    return apart if math.isfinite(apart) else math.inf


def _inferring() -> Any:
    from megatron.core.inference.utils import InferenceMode

    return InferenceMode.active()
