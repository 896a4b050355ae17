"""Bytes that one rank holds: parameters, gradients, optimizer state, and activations kept for backward.

Measured by adding up the storages of the live tensors, each once; nothing here is derived from shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def state_bytes(model: list[torch.nn.Module], optimizer: Any) -> dict[str, int]:
    """Bytes of parameters, their gradients and the optimizer's state.

    Optimizer state is what its inner optimizers keep per parameter, and main parameters that are not the
    model's own (fp32 copies of bf16 weights).
    """
    parameters = [p for chunk in model for p in chunk.parameters()]
    seen: set[int] = set()
    sizes = {"parameters": storage_bytes(parameters, seen)}
    gradients = [getattr(p, "main_grad", None) for p in parameters] + [p.grad for p in parameters]
    sizes["gradients"] = storage_bytes([g for g in gradients if g is not None], seen)
    state: list[torch.Tensor] = []
    for wrapper in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(wrapper, "optimizer", wrapper)
        state += [p for group in inner.param_groups for p in group["params"]]
        state += [v for values in inner.state.values() for v in values.values() if torch.is_tensor(v)]
    sizes["optimizer"] = storage_bytes(state, seen)
    return sizes


def estimate_bytes() -> dict[str, float]:
    """Megatron's own theoretical bytes of the fullest rank, of one micro-batch in flight.

    Its formula is for bf16 training (18 bytes a parameter with its gradient and Adam's state), whatever runs.
    """
    from megatron.training import get_args, theoretical_memory_usage

    args = get_args()
    with_sequence_parallel = args.sequence_parallel and args.recompute_granularity == "selective"
    activations = (
        theoretical_memory_usage.compute_activation_memory
        if with_sequence_parallel
        else theoretical_memory_usage.compute_activation_memory_without_sp
    )
    return {
        "weights_and_optimizer": theoretical_memory_usage.compute_weight_and_optimizer_memory(args),
        "activations": activations(args, num_microbatches=1),
    }


def activation_bytes(
    model: list[torch.nn.Module], one_pass: Callable[[], None], microbatches: int = 1
) -> int:
    """Bytes that autograd keeps for backward of one of the micro-batches that `one_pass` runs forward.

    Storages are counted once and parameters not at all. A pipeline stage holds this for each micro-batch
    in flight.
    """
    seen = {p.untyped_storage().data_ptr() for chunk in model for p in chunk.parameters()}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)  # holds the storage, so that its address stays its own
        return tensor

    for chunk in model:
        chunk.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        one_pass()
    return storage_bytes(kept, seen) // microbatches


def storage_bytes(tensors: list[torch.Tensor], seen: set[int]) -> int:
    """Bytes of the storages of `tensors` that are not in `seen`, each once; adds their addresses to it."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
