"""What the first request would wait for, done when an engine starts, and before it captures CUDA graphs.

Kernels of a KV cache "sequence" are chosen, compared with a known answer, and compiled on the cache that they
will read, with what the layers will give them: Triton compiles anew for other types, constants, strides and
alignments. So all of a step's kernels that are Helix's are launched once, on memory of their own, but for the
cache, which is read.

    where new tokens are kept       place_tokens
    who attends over what, attention, its programs merged       backend.warm_up
    outputs to where they travel, where attention does not write there itself; what arrives merged
                                    partial_exchange.warm_up
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from helix_megatron.inference import partial_exchange
from helix_megatron.inference.contexts import attention_of, paged_memory
from helix_megatron.inference.partial_exchange import piece_shapes
from helix_megatron.kernels import backend
from helix_megatron.kernels.merge import runs_triton
from helix_megatron.kernels.placement import place_tokens


def then_warm_up(original: Callable) -> Callable:
    """Wrap __init__ of what Megatron's engines hold a model and its context in, made before the engine is."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not self.inference_context.is_static_batching():
            warm_up(self.model, self.inference_context)

    return __init__


@torch.no_grad()
def warm_up(model: torch.nn.Module, context: Any) -> None:
    """Choose, compare and compile what steps of the dynamic engine will need; on a host nothing is.

    Args:
        model: its layers with KV cache "sequence"; others are left alone.
        context: Megatron's dynamic context, its memory allocated.
    """
    if getattr(context, "helix_step", None) is None:
        return
    device = context.memory_buffer.device
    if device.type != "cuda" and not runs_triton(device):
        return
    done = set()
    for layer in model.modules():
        plan = getattr(layer, "helix_plan", None)
        if plan is None or plan.is_megatron or plan.kv_cache != "sequence":
            continue
        memory = paged_memory(layer, context)
        if memory is None:  # a layer of multi-token prediction
            continue
        core, attention = layer.core_attention, attention_of(layer)
        kind = attention, core.sinks is None, *(cache.data_ptr() % 16 for cache in memory)
        if kind not in done:
            _warm_up_layer(layer, context, attention, memory)
            if not done:
                _place_a_token(context)
            done.add(kind)


def _warm_up_layer(layer: Any, context: Any, attention: Any, memory: tuple[torch.Tensor, ...]) -> None:
    step, layout, sinks = context.helix_step, layer.helix_plan.layout, layer.core_attention.sinks
    shapes, rank = set(piece_shapes(layout)), layer.helix_groups.dim_rank
    by_heads, plain = layout.query_placement == "heads", layer.q_layernorm is layer.k_layernorm is None
    adds_sinks = sinks is not None and not by_heads
    like = memory[0].new_empty(0, dtype=layer.config.params_dtype)
    for graph in sorted({False, layer.config.cuda_graph_impl == "local"}):
        backend.warm_up(
            *memory,
            layout.query_heads,
            like.dtype,
            attention.over(step.interleave, step.rank),
            attention.flash_version,
            graph,
            None if adds_sinks or len(shapes) > 1 else next(iter(shapes)),
            layout.query_heads + layout.kv_heads if plain else None,
        )
    partial_exchange.warm_up(like, layout, rank, sinks if by_heads else None)


def _place_a_token(context: Any) -> None:
    view, step = context.gpu_view, context.helix_step
    kept = torch.zeros(2, 1, dtype=torch.int64, device=view.token_to_block_idx.device)
    place_tokens(
        *kept,
        view.token_to_block_idx[:1],
        view.token_to_local_position_within_kv_block[:1],
        step.interleave,
        step.rank,
        context.kv_block_allocator.dummy_block_idx,
    )
