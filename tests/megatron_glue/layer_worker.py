"""What a rank does in the layer tests: build a Helix attention layer, run it, compare with the reference."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from helix_megatron.exchange.groups import destroy_helix_parallel, initialize_helix_parallel
from helix_megatron.megatron import integrate
from helix_megatron.partition.config import HelixConfig
from tests.reference import Case, reference

MASK_TYPES = {
    "causal": "causal",
    "padding": "padding",
    "arbitrary": "arbitrary",
    "none": "no_mask",
    "documents": "causal",
}


def start(tp: int, cp: int = 1) -> None:
    """Process groups of tensor-parallel groups, and of context-parallel ones, over the world."""
    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    tensor_parallel.model_parallel_cuda_manual_seed(123)


@contextlib.contextmanager
def inferring():
    """No gradients, and Megatron's inference mode where it has one (core 0.18 and newer)."""
    from megatron.core.inference import utils

    mode = utils.InferenceMode.active() if hasattr(utils, "InferenceMode") else contextlib.nullcontext()
    with torch.no_grad(), mode:
        yield


def make_config(case: Case, tp: int, **overrides) -> TransformerConfig:
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


class TEDotProductAttention(torch.nn.Module):
    """Transformer Engine's core as Helix must call it: mask types by name, own masks, whole heads.

    Like its flash and fused kernels it ignores a tensor under a causal type; `reads_masks`: like the unfused.
    """

    reads_masks = False

    def __init__(self, config, layer_number, attn_mask_type, attention_type, pg_collection, **kwargs):
        super().__init__()
        self.mask_type, self.scale = attn_mask_type, kwargs["softmax_scale"] or config.kv_channels**-0.5
        self.heads = config.num_attention_heads // pg_collection.tp.size()
        self.kv_heads = config.num_query_groups // pg_collection.tp.size()
        self.window = config.window_size

    def forward(self, query, key, value, attention_mask, *, attn_mask_type, **unused):
        s, _, heads, _ = query.shape
        assert (heads, key.shape[2]) == (self.heads, self.kv_heads)
        length = key.shape[0]
        row, column = torch.arange(s)[:, None], torch.arange(length)[None, :]
        name = attn_mask_type.name
        if name == "causal":
            assert s == length  # top left and bottom right are the same here only
            mask = column > row
        elif name == "causal_bottom_right":
            mask = column > row + length - s
        else:
            mask = attention_mask if name in ("arbitrary", "padding") else torch.zeros(s, length).bool()
        if self.reads_masks and attention_mask is not None and name != "no_mask":
            assert attention_mask.shape[2:] == (s, length)
            mask = mask | attention_mask
        if self.window is not None:
            mask = mask | (column < row + length - s - self.window[0])
        ratio = heads // key.shape[2]
        key, value = key.repeat_interleave(ratio, 2), value.repeat_interleave(ratio, 2)
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) * self.scale
        probs = scores.masked_fill(mask, float("-inf")).softmax(-1)
        return torch.einsum("bhst,tbhd->sbhd", probs, value).flatten(-2)


class UnfusedTEDotProductAttention(TEDotProductAttention):
    """Transformer Engine's unfused kernel."""

    reads_masks = True


def make_layer(
    case: Case, helix: HelixConfig | None, tp: int, groups=None, te_core=False, te=False, **overrides
):
    """Helix's layer, or Megatron's own when helix is None. Integration is what puts Helix in the spec.

    te: the whole of Transformer Engine's spec, whose linear_qkv starts with a norm of its input.
    """
    if helix is not None:
        integrate.enable(helix)
    try:
        config = make_config(case, tp, **overrides)
        spec = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, qk_l2_norm=config.qk_l2_norm, normalization="RMSNorm"
        ).submodules.self_attention
        if te:
            spec = get_gpt_layer_with_transformer_engine_spec().submodules.self_attention
        from megatron.core.transformer.enums import AttnMaskType

        spec.params = {"attn_mask_type": AttnMaskType[MASK_TYPES[case.mask]]}
        if te_core:
            spec.submodules.core_attention = (
                UnfusedTEDotProductAttention if te_core == "unfused" else TEDotProductAttention
            )
        if groups is not None:
            spec.params["helix_groups"] = groups
        pgs = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        return build_module(spec, config=config, layer_number=1, pg_collection=pgs)
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
            _sinks(layer).copy_(_own_heads(layer, case.tensors["sinks"]))


def _sinks(layer) -> torch.nn.Parameter:
    """With m = 1 the core attention is Megatron's own."""
    return getattr(layer.core_attention, "core", layer.core_attention).softmax_offset


def _own_heads(layer, per_head: torch.Tensor) -> torch.Tensor:
    """This rank's share of one number per head, as the ranks hold them in order."""
    return per_head.chunk(layer.helix_plan.grid.size)[layer.pg_collection.tp.rank()]


def run(layer, case: Case, tp: int, dtype=torch.float32, sequence_parallel=False) -> dict[str, torch.Tensor]:
    """Forward and backward; whole output and input gradient, local weight gradients."""
    rank = torch.distributed.get_rank() % tp
    share = slice(rank * case.seq // tp, (rank + 1) * case.seq // tp) if sequence_parallel else slice(None)
    hidden = case.tensors["hidden"][share].to(dtype).requires_grad_()
    table = case.rope_table()
    out, _ = layer(hidden, case.attention_mask(), rotary_pos_emb=table)
    (out.double() * case.tensors["loss"][share]).sum().backward()

    def whole(x: torch.Tensor) -> torch.Tensor:
        if not sequence_parallel:
            return x.detach()
        parts = [torch.empty_like(x) for _ in range(tp)]
        torch.distributed.all_gather(parts, x.detach().contiguous())
        return torch.cat(parts)

    result = {
        "output": whole(out),
        "hidden": whole(hidden.grad),
        "qkv_weight": layer.linear_qkv.weight.grad,
        "proj_weight": layer.linear_proj.weight.grad,
    }
    if case.bias:
        result["qkv_bias"] = layer.linear_qkv.bias.grad
    if case.sinks:
        result["sinks"] = _sinks(layer).grad
    if case.qk_norm in ("RMSNorm", "LayerNorm"):
        for name, norm in (("q_norm", layer.q_layernorm), ("k_norm", layer.k_layernorm)):
            grad = norm.weight.grad.clone()
            torch.distributed.all_reduce(grad)  # Megatron does this in finalize_model_grads
            result[name] = grad
    return result


def errors(found: dict, expected: dict, rows, columns) -> dict[str, float]:
    """|found - expected| / |expected| for every tensor, over this rank's part of it."""
    result = {}
    for name, value in found.items():
        want = expected[name]
        if name in ("qkv_weight", "qkv_bias"):
            want = want[rows]
        if name == "sinks":
            want = want.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
        if name == "proj_weight":
            want = want[:, columns]
        scale = want.norm().item() or 1.0
        result[name] = (value.double() - want).norm().item() / scale
        if not torch.isfinite(value).all():
            result[name] = float("inf")
    return result


def check(case: Case, helix: HelixConfig, tp: int, groups, **overrides) -> dict[str, float]:
    """Errors of one Helix layer against the reference on this rank."""
    case.draw()
    layer = make_layer(case, helix, tp, groups, **overrides)
    layout = layer.helix_plan.layout
    rank = torch.distributed.get_rank() % tp
    rows, columns = layout.qkv_rows(rank), layout.proj_columns(rank)
    load(layer, case, rows, columns, torch.float32)
    slices = layout.grid.dim_parallel_size if layout.per_slice else 1
    found = run(layer, case, tp, sequence_parallel=overrides.get("sequence_parallel", False))
    return errors(found, reference(case, slices), rows, columns)


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


def check_all(tp: int, jobs: list[tuple[Case, HelixConfig, dict]]) -> list[tuple[str, dict[str, float]]]:
    """Errors of many layers, one after another in the same ranks."""
    start(tp)
    groups, results = Groups(), []
    for case, helix, overrides in jobs:
        plan = helix.resolve(case.heads, case.groups, case.dim, tp, case.interleaved)
        label = f"{replace(case, tensors={})} {plan.describe()} {overrides}"
        results.append((label, check(replace(case), helix, tp, groups.of(plan.grid), **overrides)))
    return results


def all_settings(case: Case, tp: int, cores=("auto", "spec")) -> list[HelixConfig]:
    """Every legal grid with m > 1, comm type, placement and core attention for a case."""
    from helix_megatron.partition.grid import AttentionShape, legal_grids

    shape = AttentionShape(case.heads, case.groups, case.dim, case.rotary_dim, case.interleaved)
    found = []
    for grid, comm, placement, core in itertools.product(
        legal_grids(shape, tp), ("a2a", "all_reduce"), ("dims", "heads"), cores
    ):
        if comm == "all_reduce" and core != cores[0]:
            continue  # it has no core
        whole = case.heads // grid.head_parallel_size % grid.dim_parallel_size == 0
        if grid.dim_parallel_size > 1 and (placement == "dims" or whole):
            found.append(
                HelixConfig(
                    grid.head_parallel_size,
                    grid.dim_parallel_size,
                    comm_type=comm,
                    query_placement=placement,
                    core_attention=core,
                    rotary_percent=case.rotary_percent,
                )
            )
    return found
