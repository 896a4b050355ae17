"""One attention layer as Megatron builds it, vanilla or Helix, with a case's weights: run and compared.

Everything here runs in the ranks of an initialised process group: on GPUs, or on a host in host mode.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from helix_megatron.check.reference import Case
from helix_megatron.exchange.slices import restore_positions, select_positions
from helix_megatron.host.mode import host_mode_enabled
from helix_megatron.megatron import integrate
from helix_megatron.megatron.process_groups import destroy_helix_parallel, initialize_helix_parallel
from helix_megatron.partition.config import HelixConfig

MASK_TYPES = {
    "causal": "causal",
    "padding": "padding",
    "arbitrary": "arbitrary",
    "none": "no_mask",
    "documents": "causal",
}


def start(tp: int, cp: int = 1) -> None:
    """Join the ranks, and their tensor-parallel and context-parallel groups."""
    torch.distributed.init_process_group("nccl")
    make_parallel_groups(tp, cp)


def make_parallel_groups(tp: int, cp: int = 1) -> None:
    """Process groups of tensor-parallel groups, and of context-parallel ones, over the world."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    tensor_parallel.model_parallel_cuda_manual_seed(123)


def make_config(case: Case, tp: int, **overrides: Any) -> TransformerConfig:
    norm = case.qk_norm if case.qk_norm in ("RMSNorm", "LayerNorm") else "RMSNorm"
    settings = dict(
        num_layers=1,
        hidden_size=case.hidden,
        num_attention_heads=case.heads,
        num_query_groups=case.groups,
        kv_channels=case.dim,
        ffn_hidden_size=2 * case.hidden,
        tensor_model_parallel_size=tp,
        add_bias_linear=False,
        add_qkv_bias=case.bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        normalization=norm,
        qk_layernorm=case.qk_norm in ("RMSNorm", "LayerNorm"),
        qk_l2_norm=case.qk_norm == "L2Norm",
        layernorm_epsilon=1e-5,
        rotary_interleaved=case.interleaved,
        window_size=case.window,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        attention_softmax_in_fp32=True,
        attention_output_gate=case.gate,
        softmax_type="learnable" if case.sinks else "vanilla",
    )
    return TransformerConfig(**{**settings, **overrides})


def make_layer(
    case: Case,
    helix: HelixConfig | None,
    tp: int,
    groups: Any = None,
    core: type[torch.nn.Module] | None = None,
    transformer_engine: bool = False,
    **overrides: Any,
) -> torch.nn.Module:
    """Helix's layer, or Megatron's own when helix is None. Integration is what puts Helix in the spec.

    Args:
        groups: Helix's process groups of the grid.
        core: a core attention in place of the spec's.
        transformer_engine: the whole of its spec, whose linear_qkv starts with a norm of its input.
        overrides: of the TransformerConfig.
    """
    if helix is not None:
        integrate.enable(helix)
    try:
        config = make_config(case, tp, **overrides)
        spec = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, qk_l2_norm=config.qk_l2_norm, normalization="RMSNorm"
        ).submodules.self_attention
        if transformer_engine:
            spec = get_gpt_layer_with_transformer_engine_spec(
                qk_layernorm=config.qk_layernorm, qk_l2_norm=config.qk_l2_norm
            ).submodules.self_attention
        spec.params = {"attn_mask_type": AttnMaskType[MASK_TYPES[case.mask]]}
        if core is not None:
            spec.submodules.core_attention = core
        if groups is not None:
            spec.params["helix_groups"] = groups
        pgs = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        layer = build_module(spec, config=config, layer_number=1, pg_collection=pgs)
        return layer if host_mode_enabled() else layer.to(torch.cuda.current_device())
    finally:
        if helix is not None:
            integrate.disable()


def load(layer, case: Case, rows, columns, dtype) -> None:
    """Put this rank's rows and columns of the standard weights into the layer."""
    with torch.no_grad():
        layer.linear_qkv.weight.copy_(case.tensors["qkv_weight"][rows].to(dtype))
        if case.bias:
            layer.linear_qkv.bias.copy_(case.tensors["qkv_bias"][rows].to(dtype))
        layer.linear_proj.weight.copy_(case.tensors["proj_weight"][:, columns].to(dtype))
        if case.qk_norm in ("RMSNorm", "LayerNorm"):
            layer.q_layernorm.weight.copy_(case.tensors["q_norm"].to(dtype))
            layer.k_layernorm.weight.copy_(case.tensors["k_norm"].to(dtype))
        if case.sinks:
            sinks_of(layer).copy_(_own_heads(layer, case.tensors["sinks"]))


def sinks_of(layer) -> torch.nn.Parameter:
    """With m = 1 the core attention is Megatron's own."""
    return getattr(layer.core_attention, "core", layer.core_attention).softmax_offset


def _own_heads(layer, per_head: torch.Tensor) -> torch.Tensor:
    """This rank's share of one number per head, as the ranks hold them in order."""
    tp = layer.pg_collection.tp
    return per_head.chunk(tp.size())[tp.rank()]


def run(layer, case: Case, tp: int, dtype=torch.float32, sequence_parallel=False) -> dict[str, torch.Tensor]:
    """Forward and backward; whole output and input gradient, local weight gradients."""
    rank, cp = torch.distributed.get_rank() % tp, parallel_state.get_context_parallel_group()
    positions = select_positions(torch.arange(case.seq), cp.rank(), cp.size())
    share = positions.chunk(tp)[rank] if sequence_parallel else positions
    device = torch.cuda.current_device()
    hidden = case.tensors["hidden"][share].to(device, dtype).requires_grad_()
    table, mask = case.rope_table(), case.attention_mask()
    table = None if table is None else table[positions].to(device)
    mask = None if mask is None else mask[:, :, positions].to(device)
    packed = None
    if case.documents:
        ends = torch.tensor([0, *case.documents], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        longest = max(case.documents)
        packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)
    out, _ = layer(hidden, mask, rotary_pos_emb=table, packed_seq_params=packed)
    (out.double() * case.tensors["loss"][share].to(device)).sum().backward()

    def whole(x: torch.Tensor) -> torch.Tensor:
        x = x.detach()
        if sequence_parallel:
            x = _gathered(x, parallel_state.get_tensor_model_parallel_group())
        return x if cp.size() == 1 else restore_positions(_parts(x, cp), case.seq)

    result = {
        "output": whole(out),
        "hidden": whole(hidden.grad),
        "qkv_weight": layer.linear_qkv.weight.grad,
        "proj_weight": layer.linear_proj.weight.grad,
    }
    if case.bias:
        result["qkv_bias"] = layer.linear_qkv.bias.grad
    if case.sinks:
        group = parallel_state.get_tensor_model_parallel_group()  # a rank's few numbers may all be near 0
        result["sinks"] = _gathered(sinks_of(layer).grad, group)
    if case.qk_norm in ("RMSNorm", "LayerNorm"):
        for name, norm in (("q_norm", layer.q_layernorm), ("k_norm", layer.k_layernorm)):
            grad = norm.weight.grad.clone()
            group = parallel_state.get_tensor_model_parallel_group()
            torch.distributed.all_reduce(grad, group=group)  # Megatron's finalize_model_grads does this
            result[name] = grad
    for name in [] if cp.size() == 1 else sorted(result.keys() - {"output", "hidden"}):
        torch.distributed.all_reduce(result[name], group=cp)  # Megatron's data parallelism adds them
    return result


def _gathered(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Those of all ranks of the group, one after another."""
    return torch.cat(_parts(x, group))


def _parts(x: torch.Tensor, group: Any) -> list[torch.Tensor]:
    """That of each rank of the group."""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    torch.distributed.all_gather(parts, x.contiguous(), group=group)
    return parts


def errors(found: dict, expected: dict, rows, columns) -> dict[str, float]:
    """|found - expected| / |expected| for every tensor, over this rank's part of it."""
    result = {}
    for name, value in found.items():
        want = expected[name]
        if name in ("qkv_weight", "qkv_bias"):
            want = want[rows]
        if name == "proj_weight":
            want = want[:, columns]
        scale = want.norm().item() or 1.0
        result[name] = (value.double().cpu() - want).norm().item() / scale
        if not torch.isfinite(value).all():
            result[name] = float("inf")
    return result


class Groups:
    """Process groups of several grids, made once each."""

    def __init__(self) -> None:
        self.made: dict = {}

    def of(self, grid):
        if grid not in self.made:
            destroy_helix_parallel()
            self.made[grid] = initialize_helix_parallel(
                grid, parallel_state.get_tensor_model_parallel_group()
            )
        return self.made[grid]


