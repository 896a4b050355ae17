"""Attention over slices: an ordinary attention core, and what this rank hands to it.

`HelixCoreAttention` takes the place of Megatron's `core_attention` module, so everything before it and after
it (output projection) stays Megatron's code.

Note [Exact attention over slices]
    a2a         it is given whole heads (and, when m does not divide the query heads of a group, a zigzag
                share of the query positions; self_attention.py and exchange/heads.py), runs any attention
                core on them, and sends the output back as slices. With "heads" placement it stays whole.
                Context parallelism: K and V are gathered over its group too (whatever cp_comm_type
                says); the queries of a rank are a zigzag share already.
    all_reduce  it is given slices, whose partial scores are summed (summed_scores.py). The two-level formula
                taken literally and made exact; needs S^2 memory.
    Selective recompute keeps what the core is given; with --helix-recompute-exchange it keeps slices, and the
    exchange is made again too (of the output never).
    A cache of slices (KV cache "dim", static context) gives slices too: the prompt's become whole heads here,
    and where queries are fewer than keys partial scores are summed: B N L scores are less to move than the
    cache. A cache of positions ("sequence") does not come here, see inference/.

S sequence, L keys, B batch, N query heads (hq), K KV heads (hk) of the head group, K' those that this rank
attends with, D head, d_s = D/m (the rank's own, where slices are uneven), S_p and N/a this rank's share of
query positions and heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, sharded_state_dict_default
from torch import Tensor

from helix_megatron.exchange.collectives import gather_slices
from helix_megatron.exchange.groups import HelixGroups
from helix_megatron.exchange.heads import HeadExchange, WholeHeads, output_slices
from helix_megatron.exchange.slices import (
    query_slices,
    repeat_heads,
    restore_positions,
    share_of_sinks,
    whole_outputs,
)
from helix_megatron.megatron.core_names import hide_inner_core
from helix_megatron.megatron.masks import hidden_from_scores
from helix_megatron.megatron.position_share import PositionShare
from helix_megatron.megatron.sdpa import CAUSAL_TYPES, ScaledDotProductAttention
from helix_megatron.megatron.summed_scores import add_dim_group_rng, attend_by_sums
from helix_megatron.megatron.te_backends import with_choice_of
from helix_megatron.partition.config import HelixPlan
from helix_megatron.partition.grid import HelixConfigError

Heads = tuple[Tensor, Tensor, Tensor]
"""Query, key and value."""
Prepare = Callable[[Tensor, Tensor, Tensor], Heads]


class HelixCoreAttention(torch.nn.Module):
    """Exact attention for whole heads, or slices of them.

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
        self.exchange = HeadExchange(plan.layout, groups.dim_group, plan.overlap_exchange)
        self.attn_mask_type = attn_mask_type
        self.whole_query_heads = self.layout.query_placement == "heads"
        scale = core_kwargs.get("softmax_scale") or config.softmax_scale
        self.softmax_scale = scale if scale is not None else config.kv_channels**-0.5
        self.attention_dropout = torch.nn.Dropout(config.attention_dropout)  # of summed scores
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window_size = config.window_size if windowed else None

        parts, part = self.layout.head_parts, groups.dim_rank // self.layout.position_parts
        position_parts = self.layout.position_parts
        position_part = groups.dim_rank % position_parts
        if self.whole_query_heads:
            parts, part, position_parts, position_part = self.group.size(), groups.dim_rank, 1, 0
        self.cp_group = core_kwargs["pg_collection"].cp if config.context_parallel_size > 1 else None
        self.shares_positions = position_parts > 1 or self.cp_group is not None
        self.softmax_type = getattr(config, "softmax_type", "vanilla")
        self.parts = parts
        if self.softmax_type == "off-by-one":
            zeros = torch.zeros(self.layout.query_heads, device=torch.cuda.current_device())
            self.register_buffer("_zero_sinks", zeros, persistent=False)
        if self.shares_positions and self.window_size is not None and self.window_size[1] != 0:
            raise HelixConfigError(
                f"sliding window {self.window_size} looks ahead, which a share of the query positions (grid "
                f"{self.layout.grid} for {self.layout.shape}, context-parallel size "
                f"{config.context_parallel_size}) does not serve; use a window (left, 0)"
            )
        self.prepare: Prepare | None = None  # of the forward pass that runs
        self.recomputes = False  # attention again in the backward: --recompute-granularity selective
        self.recomputes_exchange = plan.recompute_exchange
        self.kv_repeat = _uneven_repeats(self.layout.kv_head_of(part, parts))
        self.core = None
        if self.comm_type == "a2a":
            core_config = copy.copy(config)  # this rank's whole heads, as Megatron's core counts them
            core_config.context_parallel_size = 1  # the core is given all keys
            core_config.num_attention_heads = self.layout.query_heads // parts * self.layout.grid.size
            first, stop = self.layout.kv_ranges[groups.dim_rank]
            core_config.num_query_groups = (sum(self.kv_repeat) if self.kv_repeat else stop - first) * (
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
            fused = isinstance(self.core, ScaledDotProductAttention)
            self.share = PositionShare(
                self.layout, position_part, position_parts, self.cp_group, self.window_size,
                self.core_is_local, self.core_is_local and not fused,
            )  # fmt: skip
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
                add_dim_group_rng(groups)
        hide_inner_core(self)

    @property
    def sinks(self) -> Tensor | None:
        """[N/a] logit that each head of this rank adds to its softmax, of which nothing is read; or None.

        "off-by-one" is a logit of 0, and Transformer Engine has no tensor for it.
        """
        if self.softmax_type == "off-by-one":
            return self._zero_sinks[: self.layout.query_heads // self.parts]
        return None if self.softmax_type == "vanilla" else self.core.softmax_offset

    def serves_prompts(self, packed: bool) -> bool:
        """Whether it attends over prompts without history, as in training, beside a cache of positions.

        The core needs memory linear in the prompt, and this rank is given every KV head of its head group.

        Args:
            packed: several of them, one after another.
        """
        causal, all_heads = self.attn_mask_type is AttnMaskType.causal, [self.layout.kv_heads]
        if self.core is None or not causal or self.layout.kv_needed != all_heads * self.group.size():
            return False
        core = self.core
        linear = core.is_fused if isinstance(core, ScaledDotProductAttention) else _is_te(core)
        sinks = self.softmax_type != "vanilla"  # for which Transformer Engine may have its unfused kernel
        return linear and not (packed and (self.shares_positions or sinks))

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
            query: [S_p, B, N/a, D], rotated; as slices [S, B, N, d_s] ("dims") or [S, B, N/m, D] ("heads").
            key, value: [S, B, K', D]; as slices [L, B, K, d_s].
            attention_mask: True where a query must not look, [B or 1, 1, S or 1, L]; or None.
        Returns:
            [S, B, N * d_s], as `linear_proj` of this rank expects it.
        """
        if attention_bias is not None:
            raise NotImplementedError("Helix: attention_bias is not supported when heads are sliced (m > 1)")
        mask_type = attn_mask_type if attn_mask_type is not None else self.attn_mask_type
        sliced = key.shape[-1] < self.layout.shape.kv_channels
        if packed_seq_params is not None:
            return self._packed(query, key, value, mask_type, packed_seq_params, sliced)
        cached = sliced and query.shape[0] != key.shape[0]
        if self.comm_type == "all_reduce" or cached:
            own = not self.core_is_local and mask_type in (AttnMaskType.causal, AttnMaskType.no_mask)
            mask = None if cached and own else attention_mask
            mask_type = self.attn_mask_type if cached else mask_type  # a step of one query comes as no_mask
            return self._summed_scores(query, key, value, mask, mask_type).flatten(-2)
        prepare = (self.prepare or self._exchanged) if sliced else None
        return self._whole_heads(query, key, value, attention_mask, mask_type, prepare=prepare)

    def _packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask_type: AttnMaskType,
        packed: PackedSeqParams,
        sliced: bool,
    ) -> Tensor:
        """Sequences one after another, without a batch dimension: [S, N/a, D] -> [S, N * d_s].

        The exchange does not look at positions: it is that of one long sequence. The core tells them apart.
        """
        self.check_packed(sliced)
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        return self._whole_heads(query, key, value, None, mask_type, packed).squeeze(1)

    def check_packed(self, sliced: bool = False) -> None:
        """Refuse packed sequences, by name, that slices or a share of the positions would tear apart."""
        if sliced or self.shares_positions:
            raise NotImplementedError(
                f"Helix grid {self.layout.grid}: packed sequences (thd) need --helix-comm-type a2a, no "
                "context parallelism, no cache of slices, and an m that divides the query heads of a group; "
                "use a grid with such an m, or m = 1"
            )

    # ---- a2a ----
    def _whole_heads(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        mask_type: AttnMaskType,
        packed: PackedSeqParams | None = None,
        prepare: Prepare | None = None,
    ) -> Tensor:
        """Attention with whole heads, which `prepare` makes of slices where it is given: [S, B, N * d_s]."""
        length = key.shape[0]

        def gathered(query: Tensor, key: Tensor, value: Tensor) -> Heads:
            if prepare is not None:
                query, key, value = prepare(query, key, value)
            # A query that nothing rotates is a view, which would keep all of the projection's output.
            return query.contiguous(), *self._all_positions(key, value)

        def attend(*heads: Tensor) -> Tensor:
            return self._attend(*heads, length, mask, mask_type, packed)

        heads = (query, key, value)
        if not (self.recomputes and self.training):
            out = attend(*gathered(*heads))
        elif self.recomputes_exchange:
            out = tensor_parallel.checkpoint(lambda *x: attend(*gathered(*x)), False, *heads)
        else:
            out = tensor_parallel.checkpoint(attend, False, *gathered(*heads))
        if self.whole_query_heads:
            return out
        out = out.unflatten(-1, (-1, self.layout.shape.kv_channels))
        return output_slices(self.exchange, out, length).flatten(-2)

    def _exchanged(self, query: Tensor, key: Tensor, value: Tensor) -> Heads:
        """Whole heads of slices that are normed and rotated."""
        whole, key, value = WholeHeads(
            self.exchange, None if self.whole_query_heads else query, key, value
        ).wait()
        return query if whole is None else whole, key, value

    def _all_positions(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of the whole sequence, in its order."""
        if self.cp_group is None:
            return key, value
        length = key.shape[0] * self.cp_group.size()
        shares = gather_slices([key, value], self.cp_group)
        return restore_positions(list(shares[0]), length), restore_positions(list(shares[1]), length)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        length: int,
        mask: Tensor | None,
        mask_type: AttnMaskType,
        packed: PackedSeqParams | None,
    ) -> Tensor:
        """Attention of this rank's heads and positions: [S_p, B, N/a * D]."""
        if self.kv_repeat:
            key, value = repeat_heads(key, self.kv_repeat), repeat_heads(value, self.kv_repeat)
        if packed is not None:
            tensors = (x.squeeze(1) for x in (query, key, value))
            return self._run_core(*tensors, None, mask_type, packed).unsqueeze(1)
        if not self.shares_positions:
            return self._run_core(query, key, value, mask, mask_type)
        return self.share.attend(self._run_core, query, key, value, mask, mask_type, length)

    def _run_core(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        mask_type: AttnMaskType,
        packed: PackedSeqParams | None = None,
    ) -> Tensor:
        """The core attention, on contiguous tensors.

        Transformer Engine's fused kernels read memory in the order of the layout's name, and its check of the
        layout (get_qkv_layout) looks at no strides of a query whose key and value have memory of their own.
        """
        query, key, value = (x.contiguous() for x in (query, key, value))

        def attend() -> Tensor:
            return self.core(query, key, value, mask, attn_mask_type=mask_type, attention_bias=None,
                             packed_seq_params=packed)  # fmt: skip

        if self.core_is_local or not self.shares_positions:
            return attend()
        sizes = (query.shape, key.shape, query.dtype, self.window_size)
        return with_choice_of((*sizes, mask_type, mask is None, self.training), attend)

    # ---- all_reduce ----
    def _summed_scores(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, mask_type: AttnMaskType
    ) -> Tensor:
        if self.cp_group is not None:
            raise NotImplementedError(
                "Helix: context parallelism is not served by summed scores, which a cache of slices needs "
                "(m > 1)"
            )
        if self.whole_query_heads:
            query = query_slices(query, self.layout, self.group)
        te = None if self.core_is_local else value.dtype
        sizes = (query.shape[0], key.shape[0])
        hidden = hidden_from_scores(mask, mask_type, self.window_size, sizes, query.device, te)
        dropout = self.attention_dropout if self.training and self.attention_dropout.p > 0 else None
        sinks = self.sinks
        if sinks is not None:
            sinks = share_of_sinks(sinks, self.layout, self.group.rank())
        out = attend_by_sums(query, key, value, hidden, self.softmax_scale, dropout, self.group, sinks)
        return whole_outputs(out, self.layout, self.group) if self.whole_query_heads else out


def _uneven_repeats(kv_head_of: list[int]) -> list[int] | None:
    """How often each KV head that a rank needs repeats, when that is uneven.

    [0, 0, 1, 1] -> None (ordinary grouped attention); [0, 0, 0, 1] -> [3, 1].
    """
    counts = [kv_head_of.count(head) for head in range(kv_head_of[0], kv_head_of[-1] + 1)]
    return counts if len(set(counts)) > 1 else None


def _is_local(core_builder: Any) -> bool:
    return isinstance(core_builder, type) and issubclass(core_builder, DotProductAttention)


def _is_te(core: torch.nn.Module) -> bool:
    return any(cls.__name__ == "TEDotProductAttention" for cls in type(core).__mro__)
