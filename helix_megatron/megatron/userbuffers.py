"""Shapes that Transformer Engine's overlap of communication and GEMM asks for (--tp-comm-overlap).

Its userbuffers hold the input or output of a linear layer for all ranks, [tokens, h]: neither heads nor
slices are in them, and ranks may hold unequal rows of linear_qkv. Transformer Engine checks nothing of what
follows: where it has no kernel for a number of ranks it launches none, and what a division leaves over is not
sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from helix_megatron.partition.grid import HelixConfigError

RANKS = (2, 4, 8, 16, 32)
"""Tensor-parallel sizes that its all-gathers and reduce-scatters have kernels for, in version 2.20."""
LINE = 8
"""Elements of two bytes that a thread moves at once."""
_PIPELINED = {"proj_fprop": 4, "fc2_fprop": 4}
"""GEMMs whose output is scattered in parts, and how many by default."""


def refuse_userbuffers(
    tokens: int, hidden_size: int, tp: int, layers: Mapping[str, Any] | Sequence[Mapping[str, Any]]
) -> None:
    """Refuse, before the first step, a shape that userbuffers would not carry whole.

    Args:
        tokens: of a micro-batch on all tensor-parallel ranks, s * b / context-parallel size.
        hidden_size: h.
        tp: tensor-parallel size.
        layers: what --tp-comm-overlap-cfg says, {GEMM: {"method", "num_splits", ...}}; a list of such has one
            for each precision.

    Raises:
        HelixConfigError: naming the number and what would do.
    """
    if not isinstance(layers, Mapping):
        for of_precision in layers:
            refuse_userbuffers(tokens, hidden_size, tp, of_precision)
        return
    why = None
    if tp not in RANKS:
        sizes = ", ".join(map(str, RANKS))
        why = f"has kernels for {sizes} tensor-parallel ranks, and would send nothing among {tp}"
    elif tokens % tp:
        why = f"gives every rank tokens/T of a micro-batch's {tokens} tokens, which {tp} does not divide"
    elif hidden_size % LINE:
        why = f"moves {LINE} numbers at once, which do not divide --hidden-size {hidden_size}"
    for gemm in (*_PIPELINED, *(name for name in layers if name not in _PIPELINED)):
        settings = layers.get(gemm) or {}
        default = "pipeline" if gemm in _PIPELINED else ""
        splits = settings.get("num_splits", _PIPELINED.get(gemm, 4))
        if why is None and settings.get("method", default) == "pipeline" and hidden_size % (LINE * splits):
            why = (
                f"scatters the output of {gemm} in {splits} parts of --hidden-size {hidden_size}, of which "
                f"each must be whole groups of {LINE}: set num_splits in --tp-comm-overlap-cfg"
            )
    if why is not None:
        raise HelixConfigError(
            f"--tp-comm-overlap: Transformer Engine {why}. Change that, or leave --tp-comm-overlap out"
        )
