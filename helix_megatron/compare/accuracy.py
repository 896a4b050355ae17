"""How far a variant's logits are from the same weights on one rank in fp32.

The initial weights are drawn in fp32 from the seed alone (start.py), so a single rank can hold the whole of
what 16 ranks hold in pieces. A model that runs in bf16 or fp16 has rounded weights: the reference rounds its
own alike, and computes in fp32. Before training starts, both run the same random tokens forward.

Per-slice softmax is another model: Megatron's with H m heads of d / m. Its reference is that model on one
rank, the rows of the same drawn weights put in the order of those heads (`as_smaller_heads`).

Under context parallelism a rank has the logits of its share of the positions, which Megatron cuts in zigzag;
they are gathered with their positions, and put in order by these.
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
    cp = parallel_state.get_context_parallel_group()
    positions = positions_here(*tokens.shape, cp)
    for model in chunks:
        model.eval()
    with torch.no_grad():
        here = tokens.gather(1, positions)
        output = through_pipeline(chunks, here, positions, None, pp, get_args())
    for model in chunks:
        model.train()
    return in_order(output, positions, cp).float().cpu() if pp.rank() == pp.size() - 1 else None


def positions_here(b: int, s: int, cp: Any) -> torch.Tensor:
    """Positions [b, s / cp] (int64) of this rank's share of b sequences of s, as Megatron cuts them."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    whole = torch.arange(s).repeat(b, 1).cuda()
    return get_batch_on_this_cp_rank({"position_ids": whole}, is_hybrid_cp=False, cp_group=cp)["position_ids"]


def in_order(logits: torch.Tensor, positions: torch.Tensor, cp: Any) -> torch.Tensor:
    """Every rank's logits [b, s / cp, V] of its positions [b, s / cp] → those of all, in order: [b, s, V].

    Two all-gathers over `cp`.
    """

    def of_all(share: torch.Tensor) -> torch.Tensor:
        shares = [torch.empty_like(share, memory_format=torch.contiguous_format) for _ in range(cp.size())]
        torch.distributed.all_gather(shares, share.contiguous(), group=cp)
        return torch.cat(shares, dim=1)

    return of_all(logits)[:, of_all(positions)[0].argsort()] if cp.size() > 1 else logits


def positions_compared(args: Any) -> int:
    """How many positions this layout can compare: a whole share for every rank that splits them.

    ValueError when that is none.
    """
    ranks = args.tensor_model_parallel_size if args.sequence_parallel else 1
    ranks *= 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1
    most = min(TOKENS, args.seq_length)
    if ranks > most:
        raise ValueError(f"{most} positions cannot be split over {ranks} shares of sequence or context.")
    return most // ranks * ranks


def round_weights(models: list[torch.nn.Module], dtype: torch.dtype) -> None:
    """Give every parameter the value that it has in `dtype`, in its own dtype."""
    with torch.no_grad():
        for parameter in (p for model in models for p in model.parameters()):
            parameter.copy_(parameter.to(dtype))


def as_smaller_heads(models: list[torch.nn.Module], n: int, m: int) -> None:
    """Weights drawn for H heads of d, in a model of H m heads of d / m: order them as a grid n x m does."""
    from megatron.core.transformer.attention import SelfAttention
    from megatron.training import get_args

    from helix_megatron.partition.grid import AttentionShape, HelixGrid
    from helix_megatron.partition.layout import HelixLayout

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
        if task.reference_of is not None:
            round_weights(models, getattr(torch, task.reference_of))
            if task.reference_grid is not None:
                as_smaller_heads(models, *task.reference_grid)
        try:  # a vocabulary padded for TP, say, has no error: the rest still counts
            columns = positions_compared(get_args())
            logits = initial_logits(models, tokens(1, columns).cuda())
            if task.reference_of is not None:
                assert logits is not None, "the reference runs on one rank"
                np.save(path, logits.numpy())
                raise ReferenceDone
            if logits is not None and path.exists():
                reference = np.load(path)[:, :columns]  # causal: the first positions do not see the later
                result["error"] = error(logits.numpy(), reference)
        except ValueError as refusal:
            result["error"] = {"cause": str(refusal)}
        return built

    training.setup_model_and_optimizer = setup
    try:
        yield
    finally:
        training.setup_model_and_optimizer = original
