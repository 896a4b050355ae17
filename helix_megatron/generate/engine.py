"""Megatron's dynamic inference engine around a loaded model: its size, its requests, its end.

Every rank of a tensor-parallel group makes the same calls in the same order; the engine's steps are
collective, its bookkeeping is the same on every rank without asking one another.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from helix_megatron.generate import graphs
from helix_megatron.generate.kv_bytes import KvBytes, readable


@dataclass(frozen=True)
class CacheSize:
    """What the engine is built for.

    Args:
        block_tokens: B, tokens of a block of the paged cache.
        blocks: that requests can use.
        requests: generated for at once.
        sequence: tokens of the longest request, prompt and answer.
        step_tokens: of a step, hence of the longest prompt.
    """

    block_tokens: int
    blocks: int
    requests: int
    sequence: int
    step_tokens: int


def kv_bytes(config: Any) -> KvBytes:
    """Of a model's TransformerConfig."""
    heads = config.num_query_groups or config.num_attention_heads
    return KvBytes(config.num_layers, heads, config.kv_channels, config.params_dtype.itemsize)


def block_bytes(config: Any, helix: bool, block_tokens: int) -> int:
    """Of a block on one rank."""
    kv, ranks = kv_bytes(config), config.tensor_model_parallel_size
    plan = _plan(config) if helix else None
    if plan is None:
        return kv.replicated_bytes(ranks, block_tokens)
    return kv.total_bytes(block_tokens) // kv.head_dim * plan.paged_dim // plan.grid.head_parallel_size


def _plan(config: Any) -> Any:
    """HelixPlan of a loaded model; None without Helix."""
    from helix_megatron.megatron import integrate
    from helix_megatron.partition.derived import plan_for

    if integrate._active is None:
        return None
    return plan_for(integrate._active, config, config.tensor_model_parallel_size)


def dim_parallel_size(config: Any) -> int:
    """m of a loaded model's grid; 1 without Helix."""
    plan = _plan(config)
    return 1 if plan is None else plan.grid.dim_parallel_size


def refuse_without_flash_attention(config: Any) -> None:
    """ValueError where heads are whole (m = 1) and Megatron's dynamic engine lacks its attention.

    That is flash-attn: 2.7.3 or newer, 3, or 4. In host mode kernels of Helix take its place.
    """
    from megatron.core import utils
    from megatron.core.transformer import attention

    if dim_parallel_size(config) > 1 or attention.HAVE_FA3 or attention.HAVE_FA4:
        return
    try:
        found = str(utils.get_fa_version())
    except ImportError:
        found = ""
    if not found or not utils.is_fa_min_version("2.7.3") or attention.flash_attn_with_kvcache is None:
        raise ValueError(
            "with whole heads (m = 1) Megatron's dynamic engine needs flash-attn 2.7.3 or newer, here is "
            f"{found or 'none'}: pip install 'flash-attn>=2.7.3' --no-build-isolation, or take a grid with "
            "m > 1 (more ranks than KV heads, or --helix-dim-parallel-size), which Helix's own kernels serve."
        )


def default_block_tokens(config: Any, on_host: bool) -> int:
    """Tokens of a block: a multiple of m, so that its ranks share a block evenly; flash-attn wants pages of
    256 on each rank."""
    m = dim_parallel_size(config)
    return -(-64 // m) * m if on_host else 256 * m


def size_for(lengths: list[int], new_tokens: int, at_once: int, block_tokens: int) -> CacheSize:
    """A cache in which `at_once` of these prompts always fit.

    Args:
        lengths: tokens of the prompts.
        new_tokens: of each answer.
        at_once: requests generated for at the same time.
        block_tokens: B.
    """
    each = sorted((-(-(length + new_tokens) // block_tokens) for length in lengths), reverse=True)
    requests = min(at_once, len(lengths))
    longest = max(lengths)
    return CacheSize(
        block_tokens, sum(each[:requests]), requests, longest + new_tokens, max(2048, longest, requests)
    )


def inference_config(config: Any, size: CacheSize, **more: Any) -> Any:
    """Megatron's InferenceConfig of that size for a model with this TransformerConfig."""
    from megatron.core.inference.config import InferenceConfig

    from helix_megatron.megatron import integrate

    ranks = config.tensor_model_parallel_size
    multiple = math.lcm(4, ranks)  # Megatron deals requests to its ranks, and pads them to fours
    requests = -(-size.requests // multiple) * multiple
    pad = -(-64 // ranks) * ranks  # Megatron pads a step's tokens to these
    one = block_bytes(config, integrate._active is not None, size.block_tokens)
    _refuse_more_than_memory((size.blocks + 1.5) * one, size)
    settings = {
        "block_size_tokens": size.block_tokens,
        "buffer_size_gb": (size.blocks + 1.5) * one / 2**30,  # one block is Megatron's own
        "max_requests": requests,
        "max_sequence_length": size.sequence,
        "max_tokens": -(-max(size.step_tokens, requests) // pad) * pad,
        "unified_memory_level": 0,
        "use_flashinfer_fused_rope": False,
        **graphs.engine_settings(config),
    }
    return InferenceConfig(**{**settings, **more})


def _refuse_more_than_memory(needed: float, size: CacheSize) -> None:
    """ValueError for a cache of `needed` bytes on each rank that could not be held by an empty machine."""
    import torch

    from helix_megatron.host.mode import host_mode_enabled

    if not torch.cuda.is_available():
        return
    there = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if host_mode_enabled():  # ranks share it
        there //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if needed > there:
        raise ValueError(
            f"a KV cache for {size.requests} sequences of {size.sequence} tokens, in blocks of "
            f"{size.block_tokens}, takes {readable(needed)} on each rank, which has {readable(there)}; give "
            "fewer with --max-batch-size, a smaller --kv-block-size, or shorter sequences."
        )


def build(model: Any, tokenizer: Any, size: CacheSize, watch: Any = None, **more: Any) -> Any:
    """The engine; its cache is `engine.context`. A model whose layers keep CUDA graphs has one engine.

    Args:
        model: in eval mode, with its weights.
        tokenizer: Megatron's.
        size: of the cache.
        watch: called with (request ids, logits [requests, V]) of every step, when given.
        more: further fields of InferenceConfig.
    """
    from megatron.core.inference.contexts import DynamicInferenceContext
    from megatron.core.inference.engines import DynamicInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    class Watched(GPTInferenceWrapper):
        """Shows the logits of every step."""

        def run_one_forward_step(self, *args: Any, **kwargs: Any) -> Any:
            logits = super().run_one_forward_step(*args, **kwargs)
            context = self.inference_context
            if context.is_creating_cuda_graphs:  # of requests that nobody made
                return logits
            ids = context.request_ids[context.paused_request_count : context.total_request_count].tolist()
            watch(ids, logits[0, : len(ids)])
            return logits

    context = DynamicInferenceContext(model.config, inference_config(model.config, size, **more))
    wrapper = (GPTInferenceWrapper if watch is None else Watched)(model, context)
    return DynamicInferenceEngine(TextGenerationController(wrapper, tokenizer), context)


def end_at_tokens(engine: Any, tokens: tuple[int, ...]) -> None:
    """Let requests end at any of these tokens, but those that asked not to end (termination_id -1).

    Megatron's requests have one such token. At another the request ends as at a stop word, and keeps it, as
    it keeps the one.
    """
    if not tokens:
        return
    add, stops = engine._add_request, engine._check_stop_words_for_request_post_append

    def add_request(request: Any) -> Any:
        if request.sampling_params.termination_id is None:
            request.sampling_params.termination_id = tokens[0]
        return add(request)

    def check(request: Any) -> tuple[bool, int]:
        ends = request.sampling_params.termination_id == tokens[0]
        if ends and request.generated_tokens and request.generated_tokens[-1] in tokens:
            return True, 0
        return stops(request)

    engine._add_request, engine._check_stop_words_for_request_post_append = add_request, check


def generated_tokens(record: Any) -> list[int]:
    """The tokens generated so far; a request that was evicted goes on as a new one in its record."""
    return [int(token) for request in record.requests for token in request.generated_tokens]


def cancel(engine: Any, request_id: int) -> None:
    """End a request: what it holds is free after the next step; it comes back with the tokens it has.

    All ranks call it between the same two steps. One that is unknown, or has ended, is left alone.
    """
    if request_id not in engine.requests or request_id in engine.failed_request_ids:
        return
    if request_id in engine.waiting_request_ids and engine.context.chunked_prefill_request_id != request_id:
        engine.waiting_request_ids.remove(request_id)
        entry = engine.requests.pop(request_id)
        entry.future.cancel()
    else:  # as if it had produced a stop word: Megatron's own way out of the batch
        engine.stop_word_finished_request_ids.add(request_id)
