"""Megatron's dynamic inference context in a decode step of any length, without computing a prompt first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def new_context(
    config: Any, blocks: int, block_bytes: int, length: int, batch: int, block: int,
    graphs: int | None = None, requests: int = 0,
) -> tuple[Any, torch.Tensor]:  # fmt: skip
    """A context with room for `batch` requests of `length` tokens, and their blocks [batch, blocks of each].

    Args:
        config: the layer's TransformerConfig.
        blocks: in all; a few more are made, which are Megatron's own.
        block_bytes: of this rank's part of one block of one layer.
        block: tokens of a block.
        requests: that the context has room for, where they are more; a step is padded up to as many tokens.
        graphs: sizes that Megatron would capture CUDA graphs of.
    """
    from megatron.core.inference.config import InferenceConfig
    from megatron.core.inference.contexts import DynamicInferenceContext

    tp = config.tensor_model_parallel_size
    context = DynamicInferenceContext(
        config,
        InferenceConfig(
            max_sequence_length=length,
            max_requests=-(-max(batch, requests) // tp) * tp,  # it must be a multiple
            block_size_tokens=block,
            buffer_size_gb=(blocks + 2.5) * block_bytes / 2**30,
            unified_memory_level=0,
            num_cuda_graphs=graphs,
        ),
    )
    context.initialize_all_tensors()
    return context, context.kv_block_allocator.allocate_memory_blocks(blocks).view(batch, -1)


def set_decode_step(
    context: Any, table: torch.Tensor, batch: int, length: int | Sequence[int], block: int
) -> None:
    """Let the next step be one of `batch` requests, whose new tokens are their `length`-th.

    Args:
        table: [batch, blocks of each].
        length: of all of them, or of each.
    """
    from megatron.core.inference.inference_request import DynamicInferenceRequest
    from megatron.core.inference.sampling_params import SamplingParams

    lengths = torch.tensor([length] * batch if isinstance(length, int) else list(length), device="cpu")
    blocks, rows = (lengths + block - 1) // block, torch.arange(batch, device="cpu")
    last = table[:batch].cpu()[rows, blocks - 1]
    context.total_request_count = context.active_token_count = context.num_prefill_requests = 0
    context.add_dummy_requests_parallel(
        [
            DynamicInferenceRequest(
                request_id=number,
                prompt_tokens=torch.zeros(1, dtype=torch.long, device="cpu"),
                sampling_params=SamplingParams(num_tokens_to_generate=1, termination_id=-1),
            )
            for number in range(batch)
        ],
        count_as_prefill=False,
    )
    context.request_kv_length_offsets[:batch] = lengths - 1
    context.request_kv_block_counts[:batch] = blocks
    most = int(blocks.max())
    context.request_to_kv_block_ids[:batch, :most] = table[:batch, :most]
    context.request_last_kv_block_id[:batch] = last
    context.request_last_kv_block_offset[:batch] = (lengths - 1) % block
    context.token_to_block_idx[:batch] = last
    for positions in (context.token_to_pos_ids, context.token_to_position_in_request):
        positions[:batch] = lengths - 1
    context.token_to_local_position_within_kv_block[:batch] = (lengths - 1) % block
    context.initialize_attention_state()
