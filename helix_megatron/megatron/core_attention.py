"""Attention over slices: exchange within the dim group around an ordinary attention core.

`HelixCoreAttention` takes the place of Megatron's `core_attention` module, so everything before it
(projections, QK-norm, RoPE) and after it (output projection) stays Megatron's code on slices.

Note [Exact attention over slices]
    a2a         all-gather K and V, all-to-all Q: whole heads (and, when m does not divide the query heads
                of a group, a zigzag share of the query positions), then any attention core, then the
                output goes back by all-to-all. With "heads" placement the queries are whole already.
                Context parallelism: K and V are then gathered over its group too (whatever cp_comm_type
                says); the queries of a rank are a zigzag share already.
    all_reduce  the partial scores of the slices are summed in fp32; softmax; times the local slice of V.
                The two-level formula taken literally and made exact; needs S^2 memory.
    A cache of slices (KV cache "dim"; fewer queries than keys) always sums partial scores: B N L scores are
    less to move than the cache. A cache of positions ("sequence") does not come here, see inference/.

S sequence, L keys, B batch, N query heads (hq), K KV heads (hk) of the head group, D head, d_s = D/m (the
rank's own, where slices are uneven).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, sharded_state_dict_default
from torch import Tensor

from helix_megatron.exchange.collectives import all_reduce_sum, gather_slices
from helix_megatron.exchange.groups import HelixGroups, seed_of_dim_group
from helix_megatron.exchange.slices import (
    gather_keys_values,
    output_slices,
    query_slices,
    restore_positions,
    select_positions,
    whole_outputs,
    whole_queries,
)
from helix_megatron.megatron.masks import hidden_from_scores, rows_of_chunk
from helix_megatron.megatron.sdpa import CAUSAL_TYPES, ScaledDotProductAttention, bottom_right_causal_mask
from helix_megatron.partition.config import HelixPlan
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.layout import global_chunks, position_chunks

DIM_GROUP_RNG = "helix-dim-group-rng"


class HelixCoreAttention(torch.nn.Module):
    """Exact attention for query, key and value slices.

    Args:
        core_builder: the layer spec's own core attention (local, Transformer Engine, ...).
        config: the model's own TransformerConfig (H, G, d).
        plan: settled Helix choices; comm type a2a or all_reduce.
        groups: this rank's process groups.
        core_kwargs: what Megatron passes to a core attention besides the config.
    """

    def __init__(
        self,
        core_builder: Any,
        config: TransformerConfig,
        plan: HelixPlan,
        groups: HelixGroups,
        *,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        **core_kwargs: Any,
    ):
        super().__init__()
        self.layout, self.comm_type, self.group = plan.layout, plan.comm_type, groups.dim_group
        self.attn_mask_type = attn_mask_type
        self.whole_query_heads = self.layout.query_placement == "heads"
        scale = core_kwargs.get("softmax_scale") or config.softmax_scale
        self.softmax_scale = scale if scale is not None else config.kv_channels**-0.5
        self.attention_dropout = torch.nn.Dropout(config.attention_dropout)  # of summed scores
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window_size = config.window_size if windowed else None

        parts, part = self.layout.head_parts, groups.dim_rank // self.layout.position_parts
        self.position_parts = self.layout.position_parts
        self.position_part = groups.dim_rank % self.layout.position_parts
        if self.whole_query_heads:
            parts, part, self.position_parts, self.position_part = self.group.size(), groups.dim_rank, 1, 0
        self.cp_group = core_kwargs["pg_collection"].cp if config.context_parallel_size > 1 else None
        self.shares_positions = self.position_parts > 1 or self.cp_group is not None
        self.has_sinks = getattr(config, "softmax_type", "vanilla") != "vanilla"
        if self.shares_positions and self.window_size is not None and self.window_size[1] != 0:
            raise HelixConfigError(
                f"sliding window {self.window_size} looks ahead, which a share of the query positions (grid "
                f"{self.layout.grid} for {self.layout.shape}, context-parallel size "
                f"{config.context_parallel_size}) does not serve; use a window (left, 0)"
            )
        self.kv_slice, self.kv_repeat = _kv_heads_needed(self.layout.kv_head_of(part, parts))
        self.core = None
        if self.comm_type == "a2a":
            core_config = copy.copy(config)  # this rank's whole heads, as Megatron's core counts them
            core_config.context_parallel_size = 1  # the core is given all keys
            core_config.num_attention_heads = self.layout.query_heads // parts * self.layout.grid.size
            kv_heads = len(range(*self.kv_slice.indices(self.layout.kv_heads)))
            core_config.num_query_groups = (sum(self.kv_repeat) if self.kv_repeat else kv_heads) * (
                self.layout.grid.size
            )
            local = _is_local(core_builder)
            self.core = (ScaledDotProductAttention if local and plan.fused_core else core_builder)(
                config=core_config,
                layer_number=layer_number,
                # A share of the positions needs an explicit mask, which a "causal" local core ignores.
                attn_mask_type=AttnMaskType.padding if self.shares_positions and local else attn_mask_type,
                **core_kwargs,
            )
            self.core_is_local = isinstance(self.core, DotProductAttention)
            self.core_needs_mask = self.core_is_local and not isinstance(self.core, ScaledDotProductAttention)
            if self.shares_positions and not (self.core_is_local or _is_te(self.core)):
                raise HelixConfigError(
                    f"core attention {type(self.core).__name__} cannot be given a share of the query "
                    f"positions, which grid {self.layout.grid} needs for {self.layout.shape} with context-"
                    f"parallel size {config.context_parallel_size}; use a grid whose m divides the query "
                    f"heads of a group without context parallelism, or the local or Transformer Engine core"
                )
        else:
            self.core_is_local = _is_local(core_builder)
            if config.attention_dropout > 0:
                _add_dim_group_rng(groups)
        self.register_state_dict_post_hook(_without_core_prefix)
        self.register_load_state_dict_pre_hook(_with_core_prefix)

    @property
    def is_causal(self) -> bool:
        """Whether a query sees the keys up to its own position."""
        return self.attn_mask_type in CAUSAL_TYPES

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The core's, under the name it has without Helix."""
        if self.core is None:
            return {}
        return sharded_state_dict_default(self.core, prefix, sharded_offsets, metadata)

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
        """
        Args:
            query: [S, B, N, d_s], or [S, B, N/m, D] with "heads" placement; rotated.
            key, value: [L, B, K, d_s].
            attention_mask: True where a query must not look, [B or 1, 1, S or 1, L]; or None.
        Returns:
            [S, B, N * d_s], as `linear_proj` of this rank expects it.
        """
        if attention_bias is not None:
            raise NotImplementedError("Helix: attention_bias is not supported when heads are sliced (m > 1)")
        if packed_seq_params is not None:
            return self._packed(query, key, value, attn_mask_type, packed_seq_params)
        mask_type = attn_mask_type if attn_mask_type is not None else self.attn_mask_type
        cached = query.shape[0] != key.shape[0]
        if self.comm_type == "all_reduce" or cached:
            own = not self.core_is_local and mask_type in (AttnMaskType.causal, AttnMaskType.no_mask)
            mask = None if cached and own else attention_mask
            mask_type = self.attn_mask_type if cached else mask_type  # a step of one query comes as no_mask
            out = self._summed_scores(query, key, value, mask, mask_type)
        else:
            out = self._whole_heads(query, key, value, attention_mask, mask_type)
        return out.flatten(-2)

    def _packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask_type: AttnMaskType | None,
        packed: PackedSeqParams,
    ) -> Tensor:
        """Sequences one after another, without a batch dimension: [S, N, d_s] -> [S, N * d_s].

        The exchange does not look at positions: it is that of one long sequence. The core tells them apart.
        """
        if self.comm_type != "a2a" or self.shares_positions or query.shape[0] != key.shape[0]:
            raise NotImplementedError(
                f"Helix grid {self.layout.grid}: packed sequences (thd) need --helix-comm-type a2a, no "
                "context parallelism, no cache of slices, and an m that divides the query heads of a group; "
                "use a grid with such an m, or m = 1"
            )
        mask_type = mask_type if mask_type is not None else self.attn_mask_type
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        return self._whole_heads(query, key, value, None, mask_type, packed).flatten(-2).squeeze(1)

    # ---- a2a ----
    def _whole_heads(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        mask_type: AttnMaskType,
        packed: PackedSeqParams | None = None,
    ) -> Tensor:
        length = query.shape[0]
        key, value = gather_keys_values(key, value, self.kv_slice, self.layout, self.group)
        if self.cp_group is not None:
            key, value = (
                restore_positions(list(shares), length * self.cp_group.size())
                for shares in gather_slices([key, value], self.cp_group)
            )
        if self.kv_repeat:
            repeats = torch.tensor(self.kv_repeat, device=key.device)
            key = key.repeat_interleave(repeats, dim=2)
            value = value.repeat_interleave(repeats, dim=2)
        if not self.whole_query_heads:
            query = whole_queries(query, self.layout, self.group)  # [S_p, B, N/a, D]
        heads, dim = query.shape[2:]
        if packed is not None:
            out = self.core(*(x.squeeze(1) for x in (query, key, value)), None, attn_mask_type=mask_type,
                            attention_bias=None, packed_seq_params=packed).unsqueeze(1)  # fmt: skip
        elif not self.shares_positions:
            out = self.core(query, key, value, mask, attn_mask_type=mask_type, attention_bias=None,
                            packed_seq_params=None)  # fmt: skip
        else:
            out = self._share_of_positions(query, key, value, mask, mask_type, length)
        out = out.unflatten(-1, (heads, dim))
        if self.whole_query_heads:
            return out
        return output_slices(out, length, self.layout, self.group)

    def _share_of_positions(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        mask_type: AttnMaskType,
        length: int,
    ) -> Tensor:
        """Attention of this rank's query positions over all keys: [S_p, B, N/a * D].

        Causal positions look at their prefix only, so each zigzag chunk runs on its own with a causal
        mask aligned to the bottom right, and its rows of the tensor (Note [Masks and Transformer Engine]).
        """
        if self.window_size is not None and self.core_is_local:  # it looks at the window alone
            mask, mask_type = None, AttnMaskType.causal
        causal = mask_type in CAUSAL_TYPES
        if not self.core_is_local:
            self._refuse_masks_of_shares(mask, mask_type)
        if not causal or (mask is not None and self.core_is_local):
            if mask is not None and mask.shape[2] != 1:
                mask = select_positions(mask, self.position_part, self.position_parts, dim=2)
            return self._core_or_empty(query, key, value, mask, mask_type)
        cp = self.cp_group
        owner, owners = (cp.rank(), cp.size()) if cp is not None else (0, 1)
        shares = position_chunks(length * owners, owner, owners)
        chunks = global_chunks(length, self.position_part, self.position_parts, owner, owners)
        queries = query.split([stop - start for start, stop in chunks])
        outs = []
        for (start, stop), chunk in zip(chunks, queries, strict=True):
            rows = None
            if mask is not None:
                rows = rows_of_chunk(mask, (start, stop), shares, stop)
            elif self.core_needs_mask and self.window_size is None and stop > start:
                rows = bottom_right_causal_mask(stop - start, stop, key.device)
            outs.append(
                self._core_or_empty(chunk, key[:stop], value[:stop], rows, AttnMaskType.causal_bottom_right)
            )
        return torch.cat(outs)

    def _refuse_masks_of_shares(self, mask: Tensor | None, mask_type: AttnMaskType) -> None:
        """Transformer Engine reads these of a whole sequence, not of some rows of it."""
        padding = mask_type in (AttnMaskType.padding, AttnMaskType.padding_causal)
        reasons = {
            "padding masks": mask is not None and padding,
            f"sliding windows with {mask_type.name} attention": (
                self.window_size is not None and mask_type not in CAUSAL_TYPES
            ),
        }
        for what, used in reasons.items():
            if used:
                raise NotImplementedError(
                    f"Helix: Transformer Engine's {what} are not supported for a share of the query "
                    f"positions, which grid {self.layout.grid} needs for {self.layout.shape}; use a grid "
                    "whose m divides the query heads of a group"
                )

    def _core_or_empty(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, mask_type: AttnMaskType
    ) -> Tensor:
        if query.shape[0]:
            return self.core(query, key, value, mask, attn_mask_type=mask_type, attention_bias=None,
                             packed_seq_params=None)  # fmt: skip
        # No position falls to this rank. Stay in the graph of Q, K and V all the same: the other ranks
        # wait for this rank's part of the backward exchanges.
        ratio = query.shape[2] // key.shape[2]
        scores = torch.einsum("sbnd,lbnd->bnsl", query, key.repeat_interleave(ratio, dim=2))
        out = torch.einsum("bnsl,lbnd->sbnd", scores, value.repeat_interleave(ratio, dim=2))
        return out.flatten(-2)

    # ---- all_reduce ----
    def _summed_scores(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, mask_type: AttnMaskType
    ) -> Tensor:
        if self.has_sinks or self.cp_group is not None:
            raise NotImplementedError(
                "Helix: attention sinks (--softmax-type) and context parallelism are not served by summed "
                "scores, which a cache of slices needs (m > 1)"
            )
        if self.whole_query_heads:
            query = query_slices(query, self.layout, self.group)
        s, length, heads = query.shape[0], key.shape[0], query.shape[2]
        ratio = heads // key.shape[2]
        scaled = (query.float() * self.softmax_scale).unflatten(2, (key.shape[2], ratio))
        scores = torch.einsum("sbkrd,lbkd->bkrsl", scaled, key.float()).flatten(1, 2)  # [B, N, S, L]
        scores = all_reduce_sum(scores, self.group)
        te = None if self.core_is_local else value.dtype
        hidden = hidden_from_scores(mask, mask_type, self.window_size, (s, length), scores.device, te)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -10000.0)  # Megatron's value for a forbidden position
        probs = torch.softmax(scores, dim=-1)
        if self.training and self.attention_dropout.p > 0:
            # The ranks of a dim group hold the same probabilities and must drop the same of them.
            with tensor_parallel.get_cuda_rng_tracker().fork(DIM_GROUP_RNG):
                probs = self.attention_dropout(probs)
        probs = probs.unflatten(1, (key.shape[2], ratio))
        out = torch.einsum("bkrsl,lbkd->sbkrd", probs, value.float()).flatten(2, 3).to(value.dtype)
        return whole_outputs(out, self.layout, self.group) if self.whole_query_heads else out


def _kv_heads_needed(kv_head_of: list[int]) -> tuple[slice, list[int] | None]:
    """KV heads a rank needs for its query heads, and how often each repeats when that is uneven.

    [0, 0, 1, 1] -> slice(0, 2), None (ordinary grouped attention); [0, 0, 0, 1] -> slice(0, 2), [3, 1].
    """
    first, last = kv_head_of[0], kv_head_of[-1]
    counts = [kv_head_of.count(head) for head in range(first, last + 1)]
    return slice(first, last + 1), (counts if len(set(counts)) > 1 else None)


def _without_core_prefix(module: torch.nn.Module, state: dict, prefix: str, _: Any) -> None:
    """State of the core is saved under the name it has without Helix."""
    for key in [key for key in state if key.startswith(prefix + "core.")]:
        state[prefix + key.removeprefix(prefix + "core.")] = state.pop(key)


def _with_core_prefix(module: HelixCoreAttention, state: dict, prefix: str, *_: Any) -> None:
    """Inverse of _without_core_prefix."""
    if module.core is not None:
        for key in [key for key in state if key.startswith(prefix)]:
            state[f"{prefix}core.{key.removeprefix(prefix)}"] = state.pop(key)


def _is_local(core_builder: Any) -> bool:
    return isinstance(core_builder, type) and issubclass(core_builder, DotProductAttention)


def _is_te(core: torch.nn.Module) -> bool:
    return any(cls.__name__ == "TEDotProductAttention" for cls in type(core).__mro__)


def _add_dim_group_rng(groups: HelixGroups) -> None:
    """Add to Megatron's tracker a random stream that the ranks of a dim group share."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    if DIM_GROUP_RNG in tracker.get_states():
        return
    tracker.add(DIM_GROUP_RNG, seed_of_dim_group(torch.cuda.initial_seed(), groups.head_rank))
