"""`HelixParallelSelfAttention`: Megatron's SelfAttention on slices of heads.

Note [What is Megatron's and what is ours]
    A derived TransformerConfig with H*m heads, G*m KV heads and d/m channels (a rank's own d_s where slices
    are uneven) makes Megatron's own SelfAttention project SLICES: its modules (ColumnParallelLinear,
    TELayerNormColumnParallelLinear, RowParallelLinear ...) are untouched, so fp8, sequence parallelism,
    wgrad fusion and communication overlap keep working. We change four things:
      1. which rows and columns of the standard weights a rank initialises (layout.py);
      2. slices become whole heads before QK norm and RoPE, both then Megatron's own (exchange/heads.py);
      3. the core attention is given the heads, positions and masks of this rank (core_attention.py), and
         its output becomes slices again;
      4. per-slice softmax exchanges nothing: there the derived model IS the model.

Note [Slices that stay slices]
    Summed scores (comm type all_reduce, KV cache "dim") take slices that are normed and rotated: squares are
    then summed over the dim group (qk_norm.py), and the RoPE table is cut to the slice's dimensions.
    Inference with a cache of positions ("sequence") takes a way of its own (inference/): its gather makes
    whole heads, which are normed and rotated here. With m = 1 the class is SelfAttention, bit for bit.

Note [Out of the way]
    With whole query heads, K and V travel while the query is normed and rotated; in the backward dK and dV
    travel while the query's part runs, for autograd runs what was computed last first: K's part ends in the
    collective, then comes the query's, and the start of the exchange, which waits, was computed before it.
    Collectives pair up in any case: the query's part makes none, and of any two others in a backward one
    needs the other's result, so that their order is not for autograd to choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import deprecate_inference_params
from torch import Tensor

from helix_megatron import compat
from helix_megatron.checkpoint.layout import standard_layout
from helix_megatron.exchange.groups import HelixGroups
from helix_megatron.exchange.heads import WholeHeads
from helix_megatron.inference import contexts, dynamic_context
from helix_megatron.megatron import rope_tables
from helix_megatron.megatron.core_attention import Heads, Prepare
from helix_megatron.megatron.gradient_range import keep_in_range
from helix_megatron.megatron.process_groups import get_helix_groups
from helix_megatron.megatron.refusals import refuse_graphs_of_training, refuse_unsupported
from helix_megatron.megatron.rope_tables import Tables
from helix_megatron.megatron.sliced_modules import slice_submodules
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.derived import derived_config, plan_for
from helix_megatron.partition.grid import HelixConfigError


class HelixParallelSelfAttention(SelfAttention):
    """Self-attention split over n head groups and m slices of the head dimension.

    Args:
        config: the model's TransformerConfig, with its true H, G and d.
        submodules: those of the layer spec, unchanged.
        helix: the user's settings.
        helix_groups: process groups of the grid; the registered ones by default.
        (others): as in Megatron's SelfAttention.

    Raises:
        HelixConfigError: the grid does not fit, or the model uses a feature that cannot work when heads
            are sliced; the message names it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.padding,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
        *,
        helix: HelixConfig,
        helix_groups: HelixGroups | None = None,
    ):
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        plan = plan_for(helix, config, compat.tensor_parallel_group(pg_collection).size())
        layer = {
            "layer_number": layer_number,
            "attn_mask_type": attn_mask_type,
            "cp_comm_type": cp_comm_type,
            "pg_collection": pg_collection,
        }
        newer = {"pp_layer_offset": pp_layer_offset, "name": name}
        layer |= {argument: newer[argument] for argument in compat.megatron().layer_arguments}
        if plan.is_megatron:
            super().__init__(config, submodules, **layer)
            self.helix_plan = plan
            return
        refuse_unsupported(config, plan)
        groups = helix_groups if helix_groups is not None else get_helix_groups()
        if groups.grid != plan.grid:
            raise HelixConfigError(
                f"the layer needs grid {plan.grid}, but the process groups are those of {groups.grid}"
            )
        super().__init__(
            derived_config(config, plan, plan.layout.slice_dims(groups.dim_rank)),
            slice_submodules(submodules, config, plan, groups),
            **layer,
        )
        self.helix_plan, self.helix_groups = plan, groups
        self._prepare: Prepare | None = None  # of the forward pass that runs
        if plan.adaptive_grad_scaling:
            self._scale_gradients()
        layout, dim_rank = plan.layout, groups.dim_rank
        self._whole_query_heads = layout.query_placement == "heads"
        if plan.comm_type == "a2a":  # its core attention knows what to compute again
            self.core_attention.recomputes = self.checkpoint_core_attention
            self.checkpoint_core_attention = False
        rotary_dims = torch.from_numpy(layout.rotary_dims(dim_rank))
        self.register_buffer("_rotary_dims", rotary_dims.to(torch.cuda.current_device()), persistent=False)

    def _scale_gradients(self) -> None:
        config = self.config
        layer_scaling = self.layer_number if config.apply_query_key_layer_scaling else 1
        scale = config.softmax_scale or config.kv_channels**-0.5
        keep_in_range(self.core_attention, scale, config.attention_dropout, layer_scaling)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | Tables | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's, [s, b, h] -> [s, b, h]."""
        if self.helix_plan.is_megatron:
            return super().forward(
                hidden_states, attention_mask, key_value_states, inference_context, rotary_pos_emb,
                *args, **kwargs,
            )  # fmt: skip
        inference_context = deprecate_inference_params(
            inference_context, kwargs.pop("inference_params", None)
        )
        if inference_context is None and self.training:
            packed = bool(args) or kwargs.get("packed_seq_params") is not None
            given = (*args, kwargs.get("packed_seq_params"))
            if self.helix_plan.comm_type != "none" and any(isinstance(x, PackedSeqParams) for x in given):
                self.core_attention.check_packed()  # before RoPE is given a share of the positions
            refuse_graphs_of_training(self.config, self.helix_plan, packed)
        tables: Tables | None = None
        if rotary_pos_emb is not None:
            tables = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb,) * 2
            rope_tables.check(tables, self.helix_plan.layout.shape.rotary_dim)
        if inference_context is not None and self._has_shards(inference_context):
            if tables is not None and self.helix_plan.kv_cache == "dim":
                tables = self._tables_of_slices(tables)
            return contexts.forward_with_shards(
                self, hidden_states, attention_mask, inference_context, tables, *args, **kwargs
            )
        if inference_context is None and self.helix_plan.comm_type == "a2a":
            packed = bool(args) or kwargs.get("packed_seq_params") is not None
            tables = self._begin(tables, hidden_states, packed)
        elif tables is not None:
            tables = self._tables_of_slices(tables)
        try:
            return super().forward(
                hidden_states, attention_mask, key_value_states, inference_context, tables, *args, **kwargs
            )
        finally:
            if self._prepare is not None:
                self._prepare = self.core_attention.prepare = None

    def _has_shards(self, context: Any) -> bool:
        """Whether Helix, not Megatron, keeps the KV cache of this context."""
        plan = self.helix_plan
        dynamic = context.is_dynamic_batching()
        if dynamic:
            dynamic_context.check_dynamic(context, plan)
        return plan.kv_cache == "sequence" or (plan.kv_cache == "dim" and dynamic)

    def _begin(self, tables: Tables | None, hidden_states: Tensor, packed: bool) -> Tables | None:
        """Settle who makes whole heads of slices in this pass, and where; the tables left to Megatron."""
        skipped = self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]
        q_table, k_table = tables if tables is not None and not skipped else (None, None)
        if not self._whole_query_heads:
            length = hidden_states.shape[0] * (self.world_size if self.config.sequence_parallel else 1)
            q_table = rope_tables.of_positions(
                q_table, length, self.helix_plan.layout, self.helix_groups.dim_rank
            )
        core = self.core_attention
        if core.recomputes and core.recomputes_exchange and self.training and not packed:
            core.prepare = partial(self._whole_heads, tables=(q_table, k_table))
            self._prepare = _as_they_are
            return None
        early = q_table if self._whole_query_heads and not packed else None
        self._prepare = partial(self._whole_heads, tables=(early, None))
        return (None if early is not None else q_table), k_table

    def _tables_of_slices(self, tables: Tables) -> Tables:
        """Columns of the tables that belong to this rank's slice."""
        q_table, k_table = tables
        layout, rank = self.helix_plan.layout, self.helix_groups.dim_rank
        if not self._whole_query_heads:
            q_table = rope_tables.of_slice(q_table, layout, rank, self._rotary_dims)
        return q_table, rope_tables.of_slice(k_table, layout, rank, self._rotary_dims)

    # ---- query, key and value ----
    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, ...]:
        """Query, key and value of this rank, normed (slices that the core will exchange are not).

        Returns:
            query, key, value of the heads (and positions) that this rank attends with, whole: as
            WholeHeads.wait. Where slices stay slices (see the note above), or the core exchanges them:
            query [s, b, hq, d_s] ("dims") or [s, b, hq/m, d] ("heads"), key and value [s, b, hk, d_s].
            With `output_gate` the gate too, shaped as linear_proj's input, in heads.
        """
        if self.helix_plan.is_megatron or self.helix_plan.layout.per_slice:
            return super().get_query_key_value_tensors(
                hidden_states, key_value_states, output_gate, split_qkv
            )
        query, key, value, *gate = self.project(hidden_states, output_gate)
        if self._prepare is not None:
            return *self._prepare(query, key, value), *gate
        return _normed(self.q_layernorm, query), _normed(self.k_layernorm, key), value, *gate

    def _whole_heads(self, query: Tensor, key: Tensor, value: Tensor, *, tables: Tables) -> Heads:
        """Whole heads of the slices, normed, and rotated where a table is given."""
        exchange, (q_table, k_table) = self.core_attention.exchange, tables
        arriving = WholeHeads(exchange, None if self._whole_query_heads else query, key, value)
        if self._whole_query_heads:
            query = self._rotated(_normed(self.q_layernorm, query), q_table)
        whole, key, value = arriving.wait()
        if whole is not None:
            query = self._rotated(_normed(self.q_layernorm, whole), q_table)
        return query, self._rotated(_normed(self.k_layernorm, key), k_table), value

    def prepare_new_tokens(self, heads: Sequence[Tensor], tables: Tables) -> tuple[Tensor, Tensor]:
        """Norm and rotate the whole heads that a cache of positions gathers for an inference step.

        Args:
            heads: query [s, b, hq, d] and key [s, b, hk, d]; or both in one tensor [s, b, hq + hk, d], where
                nothing tells them apart: a launch less.
            tables: of these tokens.
        Returns:
            query and key.
        """
        q_table, k_table = tables
        if len(heads) == 1:
            layout = self.helix_plan.layout
            query, key = self._rotated(heads[0], q_table).split([layout.query_heads, layout.kv_heads], dim=2)
            return query, key
        query, key = _normed(self.q_layernorm, heads[0]), _normed(self.k_layernorm, heads[1])
        return self._rotated(query, q_table), self._rotated(key, k_table)

    def prompt_heads(self, query: Tensor, key: Tensor, value: Tensor, tables: Tables) -> Heads:
        """Whole heads of the slices of a prompt without history, normed and rotated, as in training.

        Args:
            query, key, value: as `project` gives them.
            tables: of these tokens.
        Returns:
            as WholeHeads.wait, the query as get_query_key_value_tensors says.
        """
        q_table, k_table = tables
        if not self._whole_query_heads:
            layout, rank = self.helix_plan.layout, self.helix_groups.dim_rank
            q_table = rope_tables.of_positions(q_table, key.shape[0], layout, rank)
        return self._whole_heads(query, key, value, tables=(q_table, k_table))

    def _rotated(self, heads: Tensor, table: Tensor | None) -> Tensor:
        if table is None:
            return heads
        return apply_rotary_pos_emb(
            heads,
            table,
            config=self.config,
            mscale=compat.yarn_scale(self.config),
            cp_group=self.pg_collection.cp,
        )

    def project(self, hidden_states: Tensor, output_gate: bool = False) -> list[Tensor]:
        """Query, key, value (and gate) as `linear_qkv` gives them, in heads or slices of heads."""
        layout = self.helix_plan.layout
        d_s = layout.slice_dims(self.helix_groups.dim_rank)
        mixed, _ = self.linear_qkv(hidden_states)
        if self._whole_query_heads:
            heads, dim = layout.query_heads // layout.grid.dim_parallel_size, layout.shape.kv_channels
            sizes = [heads * dim] * (1 + output_gate) + [layout.kv_heads * d_s] * 2
        else:
            mixed, dim = mixed.unflatten(-1, (layout.kv_heads, -1)), d_s
            sizes = [layout.query_heads // layout.kv_heads * d_s] * (1 + output_gate) + [d_s] * 2
        query, *gate, key, value = mixed.split(sizes, dim=-1)
        s, b = mixed.shape[:2]
        in_heads = [x.reshape(s, b, -1, dim) for x in (query, *gate)]
        key, value = (x.reshape(s, b, -1, d_s) for x in (key, value))
        return [in_heads[0], key, value, *in_heads[1:]]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's standard layout, whatever the grid; see checkpoint/layout.py.

        Per-slice softmax is another model, that of `derived_config`: its standard layout is that model's.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.helix_plan.is_megatron or self.helix_plan.layout.per_slice:
            return state
        layout, rank = self.helix_plan.layout, self.pg_collection.tp.rank()
        rows, columns = layout.qkv_rows(rank), layout.proj_columns(rank)
        all_rows, all_columns = len(layout.qkv_permutation()), len(layout.proj_permutation())
        for name, local, whole, dim in (
            ("linear_qkv.weight", rows, all_rows, 0),
            ("linear_qkv.bias", rows, all_rows, 0),
            ("linear_proj.weight", columns, all_columns, 1),
        ):
            key = prefix + name
            if key in state:
                state[key] = standard_layout(state[key], local, whole, dim, len(sharded_offsets))
        return state


def _as_they_are(query: Tensor, key: Tensor, value: Tensor) -> Heads:
    return query, key, value


def _normed(norm: torch.nn.Module | None, heads: Tensor) -> Tensor:
    """QK norm, where there is one. No kernel is given no position, and the weight stays in the graph."""
    if norm is None:
        return heads
    if heads.shape[0]:
        return norm(heads)
    return norm(torch.cat([heads, heads.new_zeros(1, *heads.shape[1:])]))[:0]
