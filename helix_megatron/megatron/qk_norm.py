"""QK normalisation of slices: the norm runs over the whole head, so moments are summed over the dim group.

A rank keeps the whole weight [d], as Megatron does, and uses its slice's entries; Megatron already sums
the gradients of `q_layernorm` and `k_layernorm` over the tensor-parallel group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from helix_megatron.exchange.collectives import all_reduce_sum
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.layout import Indices


class SliceNorm(torch.nn.Module):
    """RMSNorm, LayerNorm or L2 norm over heads of which each rank of `group` holds a slice.

    Args:
        norm: the whole-head norm Megatron would use; its parameters are taken over under their own names.
        config: TransformerConfig; says which norm it is.
        dims: dimensions of the head in this rank's slice, [d_s].
        head_dim: d.
        group: dim group.
    """

    def __init__(
        self, norm: torch.nn.Module, config: Any, dims: Indices, head_dim: int, group: dist.ProcessGroup
    ):
        super().__init__()
        self.kind = "L2Norm" if config.qk_l2_norm else config.normalization
        if self.kind not in ("L2Norm", "RMSNorm", "LayerNorm"):
            raise HelixConfigError(
                f"Helix cannot slice a QK norm of kind {self.kind!r}; RMSNorm, LayerNorm and L2Norm work"
            )
        self.eps, self.head_dim, self.group = norm.eps, head_dim, group
        self.zero_centered = bool(config.layernorm_zero_centered_gamma)
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name, None))
        index = torch.from_numpy(dims).to(torch.cuda.current_device())
        self.register_buffer("_dims", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, heads, d_s] -> the same, normalised over the whole head.

        One fp32 all-reduce of [s, b, heads]; LayerNorm takes two, as its variance needs the mean first.
        """
        values = x.float()
        if self.kind == "LayerNorm":
            values = values - self._mean_over_head(values)
        values = values * torch.rsqrt(self._mean_over_head(values.square()) + self.eps)
        if self.weight is not None:
            weight = self.weight.index_select(0, self._dims).float()
            values = values * (weight + 1 if self.zero_centered else weight)
        if self.bias is not None:
            values = values + self.bias.index_select(0, self._dims).float()
        return values.to(x.dtype)

    def _mean_over_head(self, values: Tensor) -> Tensor:
        return all_reduce_sum(values.sum(-1, keepdim=True), self.group) / self.head_dim
