"""PyTorch's fused attention in place of Megatron's unfused local core."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

CAUSAL_TYPES = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)


def bottom_right_causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """True where query i, at position keys - queries + i, must not look: [1, 1, queries, keys]."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries + 1)
    return mask[None, None]


class ScaledDotProductAttention(DotProductAttention):
    """Megatron's local core, computed by `scaled_dot_product_attention` wherever that means the same.

    It does for causal and unmasked attention without active dropout, window, sinks or query-key layer
    scaling; everything else is Megatron's own code. Memory is linear in the sequence instead of quadratic.
    """

    @property
    def is_fused(self) -> bool:
        """Whether PyTorch computes it, without a mask and dropout: no window, sinks or layer scaling."""
        softmax = self.scale_mask_softmax
        return softmax.window_size is None and softmax.scale is None and self.softmax_offset is None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [sq, b, heads, d], key and value [sk, b, kv_heads, d] -> [sq, b, heads * d].

        With packed sequences, query [s, heads, d], key and value [s, kv_heads, d] -> [s, heads * d].
        A causal query i of fewer queries than keys is the one at position sk - sq + i (bottom right).
        """
        if packed_seq_params is not None:
            return self._each_sequence(query, key, value, attn_mask_type, packed_seq_params)
        plain = (
            attention_mask is None
            and attention_bias is None
            and self.is_fused
            and not (self.training and self.attention_dropout.p > 0)
        )
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        causal = mask_type in CAUSAL_TYPES
        sq, sk = query.shape[0], key.shape[0]
        if not plain:
            # Megatron makes square masks only, and those only where it was built as causal.
            if attention_mask is None and causal and 1 < sq <= sk:
                attention_mask = bottom_right_causal_mask(sq, sk, query.device)
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, None)
        bias = causal_lower_right(sq, sk) if causal and 1 < sq < sk else None
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.permute(1, 2, 0, 3) for x in (query, key, value)),  # [b, heads, s, d]
            attn_mask=bias,
            is_causal=causal and sq == sk,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out.permute(2, 0, 1, 3).flatten(-2).contiguous()

    def _each_sequence(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask_type: AttnMaskType | None,
        packed: PackedSeqParams,
    ) -> Tensor:
        """Attention of packed sequences, one call each. No sequence sees what pads another."""
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        if mask_type not in CAUSAL_TYPES:
            raise NotImplementedError(
                f"packed sequences with {mask_type.name} attention: the local core serves causal "
                "attention; use Transformer Engine's layers"
            )
        padded = packed.cu_seqlens_q_padded
        bounds = (packed.cu_seqlens_q if padded is None else padded).tolist()
        outs = [
            self(*(x[start:stop, None] for x in (query, key, value)), None, AttnMaskType.causal).squeeze(1)
            for start, stop in pairwise(bounds)
            if stop > start
        ]
        rest = query[bounds[-1] :]  # padding behind the last sequence
        return torch.cat([*outs, torch.zeros_like(rest).flatten(-2)])
