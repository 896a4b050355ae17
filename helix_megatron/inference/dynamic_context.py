"""Megatron's dynamic inference context, made and checked for sliced heads.

Note [The dynamic engine's cache is re-read, not re-made]
    Megatron's context is built for the derived model (H*m heads, G*m KV heads, d/m channels). It then sizes
    its buffer, hence its number of blocks, for G/n heads of d/m channels: exactly 1/T of the KV cache. A
    block's memory [B tokens, G/n, d/m] has as many elements as [B/m tokens, G/n, d], which is what a rank
    keeps of the block when positions are sharded. So the buffer is viewed that way, and allocator, block
    tables, scheduling, suspension and offloading remain Megatron's and identical on all ranks.
    Per-slice softmax needs no more than that: its slices are heads of the derived model.
    Uneven slices: the context counts d/m rounded up ("dim": the longest slice) on every rank, so that all
    have equally many blocks, and the view leaves the few elements over at the end of each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state

from helix_megatron import compat
from helix_megatron.inference.step_tokens import StepTokens
from helix_megatron.partition.config import HelixConfig, HelixPlan
from helix_megatron.partition.derived import derived_config, plan_for, slices_for
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.kv_layout import KvInterleave, interleave_of_block


def sliced_context(original: Callable, helix: HelixConfig) -> Callable:
    """Wrap DynamicInferenceContext.__init__: with sliced heads, build it for the derived model.

    Raises:
        HelixConfigError: the inference settings cannot work with this grid.
    """

    @functools.wraps(original)
    def __init__(self: Any, model_config: Any, inference_config: Any) -> None:
        tp = compat.tensor_parallel_size(inference_config.pg_collection, model_config)
        sliced = slices_for(helix, model_config, tp) > 1
        if sliced:
            plan = plan_for(helix, model_config, tp)
            refuse_dynamic(plan, model_config, inference_config)
            if inference_config.use_flashinfer_fused_rope is None:  # where it is installed; it has no slices
                inference_config.use_flashinfer_fused_rope = False
            model_config = derived_config(model_config, plan, plan.paged_dim)
            self._allocate_memory_buffer = _zeroed_memory(self, self._allocate_memory_buffer)
            self.reinitialize_inference_state_buffers = _zeroed_when_resumed(
                self, self.reinitialize_inference_state_buffers
            )
        original(self, model_config, inference_config)
        if sliced:
            self.helix_step = _step_tokens(plan, model_config, inference_config)
        if sliced and self.helix_step is not None:
            self.transfer_bookkeeping_to_gpu = _then_begin(self, self.transfer_bookkeeping_to_gpu)

    return __init__


def no_handoff(original: Callable) -> Callable:
    """Wrap the engine's setup_kv_transfer: pages of sliced heads are not those that it describes to others.

    Raises:
        HelixConfigError: the engine's context has sliced heads.
    """

    @functools.wraps(original)
    def setup_kv_transfer(self: Any, role: str, *args: Any, **kwargs: Any) -> None:
        if hasattr(self.context, "helix_step"):
            raise HelixConfigError(
                f"an engine that hands KV caches over (prefill and decode apart; this one's role: {role}) is "
                "not supported with sliced heads (m > 1): a rank's pages hold positions or slices of heads, "
                "where the other engine takes them for whole heads. Let one engine do both, or choose a grid "
                "with m = 1"
            )
        original(self, role, *args, **kwargs)

    return setup_kv_transfer


def _zeroed_memory(context: Any, original: Callable) -> Callable:
    """_allocate_memory_buffer, after which the cache holds zeros.

    A kernel may read what nobody wrote of a page in use, with a weight of 0 (flash.py); 0 times NaN is NaN.
    """

    @functools.wraps(original)
    def _allocate_memory_buffer() -> None:
        original()
        context.memory_buffer.zero_()

    return _allocate_memory_buffer


def _zeroed_when_resumed(context: Any, original: Callable) -> Callable:
    """reinitialize_inference_state_buffers, where memory may come back without being allocated, or kept."""

    @functools.wraps(original)
    def reinitialize_inference_state_buffers() -> None:
        recomputes = context.kv_cache_management_mode.value == "recompute"
        lost = recomputes and not context.is_tensor_state_allocated
        original()
        if lost:
            context.memory_buffer.zero_()

    return reinitialize_inference_state_buffers


def _step_tokens(plan: HelixPlan, model_config: Any, inference_config: Any) -> StepTokens | None:
    """None where the cache is Megatron's own, of slices that are heads of the derived model."""
    if plan.kv_cache == "none":
        return None
    m, interleave = plan.grid.dim_parallel_size, KvInterleave(1, 1)
    if plan.kv_cache == "dim":
        return StepTokens(interleave, 0, graphs=False)
    interleave = interleave_of_block(m, plan.kv_interleave_size, inference_config.block_size_tokens)
    groups = inference_config.pg_collection
    tp_rank = groups.tp.rank() if groups is not None else parallel_state.get_tensor_model_parallel_rank()
    return StepTokens(interleave, tp_rank % m, graphs=model_config.cuda_graph_impl == "local")


def _then_begin(context: Any, original: Callable) -> Callable:
    """transfer_bookkeeping_to_gpu, the last before layers run or are replayed; then StepTokens.begin."""

    @functools.wraps(original)
    def transfer_bookkeeping_to_gpu(*args: Any, **kwargs: Any) -> Any:
        done = original(*args, **kwargs)
        context.helix_step.begin(context)
        return done

    return transfer_bookkeeping_to_gpu


def refuse_dynamic(plan: HelixPlan, model_config: Any, inference_config: Any) -> None:
    """Refuse, by name, what the dynamic engine would compute wrong, or not at all, with sliced heads."""
    exact = not plan.layout.per_slice
    graphs = model_config.cuda_graph_impl == "local"
    speculative = inference_config.num_speculative_tokens > 0
    invariant = getattr(model_config, "batch_invariant_mode", False)
    reasons = {
        "CUDA graphs (--cuda-graph-impl local) with --helix-kv-cache dim, which asks the device for lengths "
        "(sequence has graphs)": graphs and plan.kv_cache == "dim",
        "CUDA graphs without a step before the capture (--cuda-graph-warmup-steps 0), in which kernels are "
        "chosen and compiled and groups meet": graphs and not model_config.cuda_graph_warmup_steps,
        "CUDA graphs (--cuda-graph-impl local) with speculative tokens (num_speculative_tokens > 0), whose "
        "replays were never compared": exact and graphs and speculative,
        "FlashInfer's fused RoPE (use_flashinfer_fused_rope; set it to False, or leave it to None)": (
            inference_config.use_flashinfer_fused_rope
        ),
        "batch-invariant mode (--batch-invariant-mode)": exact and invariant,
        "context parallelism (--context-parallel-size > 1)": exact and model_config.context_parallel_size > 1,
        "the states of Mamba layers, which were never tried beside it": (
            inference_config.mamba_inference_state_config is not None
        ),
    }
    for feature, used in reasons.items():
        if used:
            raise HelixConfigError(
                f"Helix grid {plan.grid} does not support {feature} in the dynamic inference engine: heads "
                "are sliced (m > 1). Turn it off, or choose a grid with m = 1"
            )
    if plan.kv_cache == "sequence":
        interleave_of_block(
            plan.grid.dim_parallel_size, plan.kv_interleave_size, inference_config.block_size_tokens
        )


def check_dynamic(context: Any, plan: HelixPlan) -> None:
    """Refuse a dynamic context that was built for other heads than this plan's slices.

    Raises:
        HelixConfigError: with both shapes; or a Megatron whose dynamic engine was never run with slices.
    """
    if not compat.megatron().dynamic_engine:
        raise HelixConfigError(
            f"Helix grid {plan.grid}: the dynamic inference engine of megatron-core {compat.version()} is "
            f"not served with sliced heads; use the static context, or megatron-core {compat.NEWEST}"
        )
    expected = (plan.layout.kv_heads, plan.paged_dim)
    found = tuple(context.memory_buffer.shape[-2:])
    if found != expected or not hasattr(context, "helix_step"):
        raise HelixConfigError(
            f"the dynamic inference context caches {found[0]} heads of dimension {found[1]} per rank, but "
            f"grid {plan.grid} needs {expected[0]} of {expected[1]}; build the context while Helix is on "
            "(helix_megatron.integrate.enable), with the model's own configuration"
        )
