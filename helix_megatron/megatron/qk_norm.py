"""QK normalisation of slices: the norm runs over the whole head, so moments are summed over the dim group.

A rank keeps the whole weight [d], as Megatron does, and uses its slice's entries; Megatron already sums
the gradients of `q_layernorm` and `k_layernorm` over the tensor-parallel group. The module stays Megatron's
(or Transformer Engine's), with the state that it keeps in checkpoints; it takes whole heads as ever, and
slices besides.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from helix_megatron.exchange.collectives import all_reduce_sum
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.layout import Indices


@dataclass(frozen=True)
class _Settings:
    """What the forward of a SliceNorm needs besides the module's weights."""

    kind: str
    eps: float
    zero_centered: bool
    head_dim: int
    group: dist.ProcessGroup


class SliceNorm(torch.nn.Module):
    """RMSNorm, LayerNorm or L2 norm over whole heads, or over heads of which a rank holds a slice.

    Made by `slice_norm`, as a subclass of the whole-head norm's class.
    """

    _helix: _Settings
    _helix_dims: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, heads, d] or [s, b, heads, d_s] -> the same, normalised over the whole head.

        Of slices: one fp32 all-reduce of [s, b, heads]; LayerNorm takes two, for its variance needs the
        mean first.
        """
        settings = self._helix
        if x.shape[-1] == settings.head_dim:
            return super().forward(x)
        values = x.float()
        weight, bias = (getattr(self, name, None) for name in ("weight", "bias"))
        if settings.kind == "LayerNorm":
            values = values - self._mean_over_head(values)
        values = values * torch.rsqrt(self._mean_over_head(values.square()) + settings.eps)
        if weight is not None:
            weight = weight.index_select(0, self._helix_dims).float()
            values = values * (weight + 1 if settings.zero_centered else weight)
        if bias is not None:
            values = values + bias.index_select(0, self._helix_dims).float()
        return values.to(x.dtype)

    def _mean_over_head(self, values: Tensor) -> Tensor:
        return all_reduce_sum(values.sum(-1, keepdim=True), self._helix.group) / self._helix.head_dim


@functools.cache
def _sliced_class(cls: type) -> type:
    return type(SliceNorm.__name__, (SliceNorm, cls), {"__module__": __name__, "__doc__": cls.__doc__})


def slice_norm(
    norm: torch.nn.Module, config: Any, dims: Indices, head_dim: int, group: dist.ProcessGroup
) -> torch.nn.Module:
    """The same module, whose forward takes slices too.

    Args:
        norm: the whole-head norm Megatron would use.
        config: TransformerConfig; says which norm it is.
        dims: dimensions of the head in this rank's slice, [d_s].
        head_dim: d.
        group: dim group.
    """
    kind = "L2Norm" if config.qk_l2_norm else config.normalization
    if kind not in ("L2Norm", "RMSNorm", "LayerNorm"):
        raise HelixConfigError(
            f"Helix cannot slice a QK norm of kind {kind!r}; RMSNorm, LayerNorm and L2Norm work"
        )
    zero_centered = bool(config.layernorm_zero_centered_gamma)
    settings = _Settings(kind, norm.eps, zero_centered, head_dim, group)
    norm.__class__ = _sliced_class(type(norm))
    norm._helix = settings
    index = torch.from_numpy(dims).to(torch.cuda.current_device())
    norm.register_buffer("_helix_dims", index, persistent=False)
    return norm
