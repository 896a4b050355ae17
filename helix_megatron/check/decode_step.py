"""Megatron's dynamic inference context in a step of any lengths, without computing what came before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def new_context(
    config: Any, blocks: int, block_bytes: int, length: int, batch: int, block: int,
    graphs: int | None = None, requests: int = 0, graph_tokens: int = 512,
) -> tuple[Any, torch.Tensor]:  # fmt: skip
    """A context with room for `batch` requests of `length` tokens, and their blocks [batch, blocks of each].

    Args:
        config: the layer's TransformerConfig.
        blocks: in all; a few more are made, which are Megatron's own.
        block_bytes: of this rank's part of one block of one layer.
        block: tokens of a block.
        requests: that the context has room for, where they are more; a step is padded up to as many tokens.
        graphs: sizes that Megatron would capture CUDA graphs of.
        graph_tokens: of the largest step with prompts that has one.
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
            cuda_graph_max_tokens=graph_tokens,
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
    set_step(context, table, [1] * batch, [length] * batch if isinstance(length, int) else length, 0, block)


def set_step(
    context: Any, table: torch.Tensor, new: Sequence[int], lengths: Sequence[int], prompts: int, block: int
) -> None:
    """Let the next step be one of requests of `lengths` tokens, of which so many are new.

    Args:
        table: [requests, blocks of each].
        prompts: so many of the last requests are prefilled; those before them decode.
    """
    from megatron.core.inference.inference_request import DynamicInferenceRequest
    from megatron.core.inference.sampling_params import SamplingParams

    batch, decoding = len(lengths), len(lengths) - prompts
    count, length = (torch.tensor(list(numbers), device="cpu") for numbers in (new, lengths))
    blocks, before = (length + block - 1) // block, length - count
    context.total_request_count = context.active_token_count = context.num_prefill_requests = 0
    requests = [
        DynamicInferenceRequest(
            request_id=number,
            prompt_tokens=torch.zeros(tokens, dtype=torch.long, device="cpu"),
            sampling_params=SamplingParams(num_tokens_to_generate=1, termination_id=-1),
        )
        for number, tokens in enumerate(new)
    ]
    context.add_dummy_requests_parallel(requests[:decoding], count_as_prefill=False)
    context.add_dummy_requests_parallel(requests[decoding:])
    of_request = torch.arange(batch, device="cpu").repeat_interleave(count)
    tokens = len(of_request)
    within = torch.arange(tokens, device="cpu") - (count.cumsum(0) - count)[of_request]
    positions, numbers = before[of_request] + within, table[:batch].cpu()
    context.request_kv_length_offsets[:batch] = before
    context.request_kv_block_counts[:batch] = blocks
    most = int(blocks.max())
    context.request_to_kv_block_ids[:batch, :most] = numbers[:, :most]
    context.request_last_kv_block_id[:batch] = numbers[torch.arange(batch, device="cpu"), blocks - 1]
    context.request_last_kv_block_offset[:batch] = (length - 1) % block
    context.token_to_block_idx[:tokens] = numbers[of_request, positions // block]
    for places in (context.token_to_pos_ids, context.token_to_position_in_request):
        places[:tokens] = positions
    context.token_to_local_position_within_kv_block[:tokens] = positions % block
    context.initialize_attention_state()
