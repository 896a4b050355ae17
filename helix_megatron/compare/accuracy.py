"""How far a variant's logits are from the same weights on one rank in fp32.

The initial weights are drawn in fp32 from the seed alone (start.py), so a single rank can hold the whole of
what 16 ranks hold in pieces. A model that runs in bf16 or fp16 has rounded weights: the reference rounds its
own alike, and computes in fp32. Before training starts, both run the same random tokens forward.

Per-slice softmax is another model: Megatron's with H m heads of d / m. Its reference is that model on one
rank, the rows of the same drawn weights put in the order of those heads (`as_smaller_heads`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

TOKENS = 128
"""At most so many positions are compared."""


_CONTEXT_PARALLEL = "with context parallelism each rank has the logits of a part of the positions only"


class ReferenceDone(Exception):
    """Ends the reference run once its logits are written: it needs no optimizer and no training step."""


def initial_logits(models: list[torch.nn.Module], tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits [b, s, V] (fp32, on the host) of tokens [b, s] from this moment's weights, in evaluation mode.

    None on ranks that have none.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model
    from megatron.training import get_args

    from helix_megatron.compare.decode import through_pipeline

    chunks, pp = unwrap_model(models), parallel_state.get_pipeline_model_parallel_group()
    for model in chunks:
        model.eval()
    with torch.no_grad():
        output = through_pipeline(chunks, tokens, None, 0, pp, get_args())
    for model in chunks:
        model.train()
    return output.float().cpu() if pp.rank() == pp.size() - 1 else None


def round_weights(models: list[torch.nn.Module], dtype: torch.dtype) -> None:
    """Give every parameter the value that it has in `dtype`, in its own dtype."""
    with torch.no_grad():
        for parameter in (p for model in models for p in model.parameters()):
            parameter.copy_(parameter.to(dtype))


def as_smaller_heads(models: list[torch.nn.Module], n: int, m: int) -> None:
    """Weights drawn for H heads of d, in a model of H m heads of d / m: order them as a grid n x m does."""
    from megatron.core.transformer.attention import SelfAttention
    from megatron.training import get_args

    from helix_megatron.grid import AttentionShape, HelixGrid
    from helix_megatron.layout import HelixLayout

    args = get_args()
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    shape = AttentionShape(args.num_attention_heads // m, groups // m, args.kv_channels * m)
    layout = HelixLayout(shape, HelixGrid(n, m), "dims", per_slice=True)
    rows, columns = layout.qkv_permutation(), layout.proj_permutation()
    with torch.no_grad():
        for layer in (module for model in models for module in model.modules()):
            if isinstance(layer, SelfAttention):
                for parameter in layer.linear_qkv.parameters():  # weight, and bias where there is one
                    parameter.copy_(parameter[torch.from_numpy(rows)].clone())
                weight = layer.linear_proj.weight
                weight.copy_(weight[:, torch.from_numpy(columns)].clone())


def error(logits: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """relative: ‖logits - reference‖ / ‖reference‖ (Frobenius); max_abs: of any logit; both in float64."""
    ours, theirs = logits.astype(np.float64), reference.astype(np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"logits {ours.shape} and the reference's {theirs.shape} are of different models.")
    difference = ours - theirs
    norm = float(np.linalg.norm(theirs))
    relative = float(np.linalg.norm(difference)) / norm if norm else float("inf")
    return {"relative": relative, "max_abs": float(np.abs(difference).max())}


@contextmanager
def compared_at_start(task: Any, result: dict[str, Any], tokens: Any) -> Iterator[None]:
    """While entered, Megatron's set-up is followed by the comparison, or by writing the reference.

    Args:
        task: its `reference` is the path of the logits (a .npy), or None; its `reference_of` the dtype to
            round the weights to when this run is the reference itself, else None; its `reference_grid` (n, m)
            when that is the reference of a per-slice model.
        result: gets `error` on the rank that has the logits.
        tokens: a function (rows, columns) → the same random tokens everywhere.
    Raises (inside): ReferenceDone, after the reference has been written.
    """
    from megatron.training import get_args, training

    original = training.setup_model_and_optimizer

    def setup(*args: Any, **kwargs: Any) -> Any:
        built = original(*args, **kwargs)
        if task.reference is None:
            return built
        models, path = built[0], Path(task.reference)
        if get_args().context_parallel_size > 1:
            result["error"] = {"cause": _CONTEXT_PARALLEL}
            return built
        if task.reference_of is not None:
            round_weights(models, getattr(torch, task.reference_of))
            if task.reference_grid is not None:
                as_smaller_heads(models, *task.reference_grid)
        tp, length = get_args().tensor_model_parallel_size, get_args().seq_length
        columns = max(1, min(TOKENS, length) // tp) * tp  # sequence parallelism splits them over tp
        if task.reference_of is not None:
            columns = min(TOKENS, length)
        logits = initial_logits(models, tokens(1, columns).cuda())
        if task.reference_of is not None:
            assert logits is not None, "the reference runs on one rank"
            np.save(path, logits.numpy())
            raise ReferenceDone
        if logits is not None and path.exists():
            reference = np.load(path)[:, :columns]  # causal: the first positions do not see the later ones
            try:
                result["error"] = error(logits.numpy(), reference)
            except ValueError as difference:  # a vocabulary padded for TP, say: the rest still counts
                result["error"] = {"cause": str(difference)}
        return built

    training.setup_model_and_optimizer = setup
    try:
        yield
    finally:
        training.setup_model_and_optimizer = original
