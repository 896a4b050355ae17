"""A layer's step with a sharded KV cache, in Megatron's static context and dynamic engine."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from helix_megatron import compat
from helix_megatron.exchange.slices import query_slices, share_of_sinks, whole_outputs
from helix_megatron.inference.position_cache import (
    Attention,
    PagedStep,
    Prepare,
    SequenceStep,
    Step,
    attend_with_shards,
)
from helix_megatron.inference.prompts import attend_among_themselves
from helix_megatron.inference.slice_cache import SlicedPages, attend_over_slices
from helix_megatron.partition.kv_layout import interleave_of_sequence

Heads = tuple[Tensor, Tensor, Tensor]
"""Query, key and value."""


def forward_with_shards(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    context: Any,
    rope: Any,
    rotary_pos_cos: Tensor | None = None,
    rotary_pos_sin: Tensor | None = None,
    rotary_pos_cos_sin: Tensor | None = None,
    attention_bias: Tensor | None = None,
    packed_seq_params: Any = None,
    sequence_len_offset: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """A HelixParallelSelfAttention layer with an inference context and KV cache "sequence"; with the dynamic
    engine, "dim" as well.

    Args:
        layer: the layer.
        hidden_states: [s, b, h]; with the dynamic engine, packed tokens [s, 1, h].
        attention_mask: a causal one, or None.
        context: Megatron's static or dynamic inference context.
        rope: RoPE tables of queries and keys, those of a "dim" cache cut to this rank's dimensions; or None.
        (others): None. Megatron's attention has them, this cache does not serve them.
    Returns:
        what Megatron's attention returns: output [s, b, h] and the bias of linear_proj.

    Raises:
        NotImplementedError: attention that is not causal, a window that looks ahead, a CUDA graph, or one of
            the arguments that must be None.
    """
    del sequence_len_offset  # of CUDA graphs; the context says where the new tokens are
    others = {
        "rotary_pos_cos": rotary_pos_cos,
        "rotary_pos_sin": rotary_pos_sin,
        "rotary_pos_cos_sin": rotary_pos_cos_sin,
        "attention_bias": attention_bias,
        "packed_seq_params": packed_seq_params,
    }
    if layer.config.context_parallel_size > 1:
        others["context parallelism"] = True
    if layer.config.cuda_graph_impl == "local" and context.is_static_batching():
        others["CUDA graphs (--cuda-graph-impl local) of the static context"] = True
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise NotImplementedError(
            f"Helix grid {layer.helix_plan.grid}: attention with a sharded KV cache was given "
            f"{', '.join(given)}, which it does not serve; leave that out, or use a grid with m = 1"
        )
    plan, core = layer.helix_plan, layer.core_attention
    attention = attention_of(layer)
    if layer.config.no_rope_freq and layer.config.no_rope_freq[layer.layer_number - 1]:
        rope = None
    gated = getattr(layer.config, "attention_output_gate", False)
    if plan.kv_cache == "dim":
        out, *gate = _over_slices(layer, context, attention, hidden_states, rope, gated)
        return _projected(layer, out.flatten(-2), *gate)
    query, key, value, *gate = layer.project(hidden_states, gated)
    heads, rows = (query, key, value), _rows_of(rope, context, query.shape[0])
    if context.is_static_batching():
        start, new = context.sequence_len_offset, query.shape[0]
        _check_mask(core, attention_mask, start, new)
        step = _static_step(layer, context, attention, key)
        if start == 0 and new > 1 and core.serves_prompts(packed=False):
            out = attend_among_themselves(layer, *heads, rows, step, None)
        else:
            out = _with_shards(layer, heads, rows, step)
    else:
        out = _dynamic_attention(layer, context, attention, heads, rows)
    return _projected(layer, out, *gate)


def _dynamic_attention(layer: Any, context: Any, attention: Attention, heads: Heads, rows: Any) -> Tensor:
    """Whole prompts among themselves, other tokens over the cache: [tokens, 1, N * d_s]."""
    step, core = _dynamic_step(layer, context, attention), layer.core_attention
    prompts = context.helix_step.prompts
    if prompts is None or not core.serves_prompts(packed=len(prompts.host_ends) > 2):
        return _with_shards(layer, heads, rows, step)

    def part(start: int, stop: int, **changed: Any) -> tuple[Heads, Any, PagedStep]:
        query, key, value = (x[start:stop] for x in heads)
        q_rows = None if rows[0] is None else rows[0][start:stop]
        k_rows = q_rows if rows[0] is rows[1] else rows[1][start:stop]
        places = dict(blocks=step.blocks[start:stop], slots=step.slots[start:stop])
        return (query, key, value), (q_rows, k_rows), replace(step, **places, **changed)

    outs = []
    if prompts.first:
        mine = part(0, prompts.first, requests=prompts.others, singles=prompts.singles)
        outs.append(_with_shards(layer, *mine))
    own, own_rows, kept = part(prompts.first, prompts.stop)
    packed = prompts.packed(on_host=core.core_is_local)
    outs.append(attend_among_themselves(layer, *own, own_rows, kept, packed))
    padding = heads[0].shape[0] - prompts.stop
    if padding:
        outs.append(outs[-1].new_zeros(padding, *outs[-1].shape[1:]))
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def _with_shards(layer: Any, heads: Heads, rows: Any, step: Step) -> Tensor:
    """Attention of new tokens over what all ranks keep: [S, B, N * d_s]."""
    plan, groups, sinks = layer.helix_plan, layer.helix_groups, layer.core_attention.sinks
    prepare, chunks = _prepare(layer, rows), plan.overlap_chunks
    return attend_with_shards(*heads, plan.layout, groups.dim_group, prepare, step, chunks, sinks).flatten(-2)


def _projected(layer: Any, out: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """linear_proj of the output, gated where there is a gate of its elements."""
    return layer.linear_proj(out if gate is None else layer._apply_output_gate(out, gate))


def _rows_of(rope: Any, context: Any, new: int) -> Any:
    """The rows of RoPE's tables that belong to the step's tokens; of one table one selection."""
    if rope is None:
        return None, None
    if context.is_static_batching():
        start = context.sequence_len_offset
        rows = [table[start : start + new] for table in rope]
    else:
        positions = context.gpu_view.token_to_position_in_request[:new]
        rows = [table.index_select(0, positions) for table in rope[: 1 if rope[0] is rope[1] else 2]]
    return rows[0], rows[0] if rope[0] is rope[1] else rows[1]


def _prepare(layer: Any, rows: Any) -> Prepare:
    plain = layer.q_layernorm is None and layer.k_layernorm is None
    return Prepare(
        functools.partial(layer.prepare_new_tokens, tables=rows), together=plain and rows[0] is rows[1]
    )


def attention_of(layer: Any) -> Attention:
    """What a layer's attention over a cache needs to know. NotImplementedError where it is not causal."""
    core, plan = layer.core_attention, layer.helix_plan
    if not core.is_causal:
        raise NotImplementedError(
            f"Helix grid {plan.grid}: KV cache '{plan.kv_cache}' holds for causal attention, and this "
            f"layer's is {core.attn_mask_type.name}; use --helix-kv-cache dim with the static context"
        )
    left, right = core.window_size or (-1, 0)
    if right > 0:
        raise NotImplementedError(
            f"Helix grid {plan.grid}: sliding window {core.window_size} looks {right} positions ahead; an "
            "inference cache holds for windows that end at the query, (left, 0)"
        )
    flash_version = getattr(layer.config, "flash_attention_version", None)
    return Attention(core.softmax_scale, left if left >= 0 else None, flash_version)


# ---- static context ----
def _check_mask(core: Any, mask: Tensor | None, start: int, new: int) -> None:
    """Positions alone decide what is visible, so a tensor must say the same."""
    if mask is None or not core.core_is_local:  # Transformer Engine ignores the tensor of a causal layer
        return
    stop = start + new
    rows, columns = (torch.arange(a, stop, device=mask.device) for a in (start, 0))
    if mask.shape[-2:] != (new, stop) or not (mask == (columns > rows[:, None])).all():
        raise NotImplementedError(
            f"Helix: the KV cache 'sequence' holds for causal attention, but the attention mask "
            f"{list(mask.shape)} for positions {start} to {stop - 1} is not the causal one; leave the mask "
            "out, or use --helix-kv-cache dim"
        )


def _static_step(layer: Any, context: Any, attention: Attention, key: Tensor) -> SequenceStep:
    layout, rank = layer.helix_plan.layout, layer.helix_groups.dim_rank
    length, start = context.max_sequence_length, context.sequence_len_offset
    first, last = context.batch_size_offset, context.batch_size_offset + key.shape[1]
    if start + key.shape[0] > length or last > context.max_batch_size:
        raise ValueError(
            f"positions {start} to {start + key.shape[0] - 1} of sequences {first} to {last - 1} do not fit "
            f"an inference context of {context.max_batch_size} sequences of {length} positions"
        )
    interleave = interleave_of_sequence(
        layout.grid.dim_parallel_size, layer.helix_plan.kv_interleave_size, length
    )
    caches = context.key_value_memory_dict
    if layer.layer_number not in caches:
        slots = interleave.count(rank, length)
        shape = (slots, context.max_batch_size, layout.kv_heads, layout.shape.kv_channels)
        caches[layer.layer_number] = tuple(key.new_zeros(shape) for _ in range(2))
    keys, values = (cache[:, first:last] for cache in caches[layer.layer_number])
    step = (start, first, *key.shape[:2])
    if getattr(context, "helix_step", (None,))[0] != step:
        context.helix_step = step, {}  # what the step's first layer makes
    return SequenceStep(keys, values, interleave, rank, attention, start, context.helix_step[1])


# ---- dynamic engine ----
def _dynamic_step(layer: Any, context: Any, attention: Attention) -> PagedStep:
    step, memory = context.helix_step, paged_memory(layer, context)
    assert memory is not None
    keys, values = memory
    return PagedStep(
        keys,
        values,
        step.interleave,
        step.rank,
        attention,
        step.blocks,
        step.slots,
        step.requests,
        step.singles,
        step.in_graph,
    )


def paged_memory(layer: Any, context: Any) -> tuple[Tensor, Tensor] | None:
    """Megatron's [blocks, B, K, paged_dim] as [blocks, B/m, K, D], without a copy: keys and values.

    None for a layer that has no memory there, as those of multi-token prediction.
    """
    if _layer_index(layer) not in context.layer_map:
        return None
    layout = layer.helix_plan.layout
    slots = context.block_size_tokens // layout.grid.dim_parallel_size
    page = (slots, layout.kv_heads, layout.shape.kv_channels)
    keys, values = (x.flatten(1)[:, : math.prod(page)].unflatten(1, page) for x in _memory(layer, context))
    return keys, values


def _over_slices(
    layer: Any, context: Any, attention: Attention, hidden_states: Tensor, rope: Any, gated: bool
) -> list[Tensor]:
    """KV cache "dim": Megatron's pages hold slices as they are; slices are normed and rotated as such.

    Returns:
        the output, and the gate where the layer is `gated`.
    """
    query, key, value, *gate = layer.get_query_key_value_tensors(hidden_states, output_gate=gated)
    if rope is not None:
        cp, mscale = layer.pg_collection.cp, compat.yarn_scale(layer.config)
        query = context.apply_rotary_emb_query(query, rope[0], layer.config, None, cp, mscale=mscale)
        key = context.apply_rotary_emb_key(key, rope[1], layer.config, cp, mscale=mscale)
    layout, group = layer.helix_plan.layout, layer.helix_groups.dim_group
    keys, values = _memory(layer, context)
    sinks = layer.core_attention.sinks
    if sinks is not None:
        sinks = share_of_sinks(sinks, layout, group.rank())
    own, step = layout.slice_dims(layer.helix_groups.dim_rank), context.helix_step
    pages = SlicedPages(
        keys[..., :own], values[..., :own], attention, step.blocks, step.slots, step.requests
    )
    if layout.query_placement == "dims":
        return [attend_over_slices(query, key, value, pages, group, sinks), *gate]
    out = attend_over_slices(query_slices(query, layout, group), key, value, pages, group, sinks)
    return [whole_outputs(out, layout, group), *gate]


def _memory(layer: Any, context: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, [blocks, B, K, paged_dim] each, as Megatron has made them."""
    number = context.layer_map[_layer_index(layer)]
    return context.memory_buffer[0, number], context.memory_buffer[1, number]


def _layer_index(layer: Any) -> int:
    """Of this stage's layers, from 0."""
    return layer.layer_number - layer._get_pp_layer_offset_for_inference() - 1
