"""What a rank does in the layer tests: build a Helix attention layer, run it, compare with the reference."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import torch

from helix_megatron.check import layer as layers
from helix_megatron.check.layer import Groups, errors, load, make_config, run, start
from helix_megatron.check.reference import Case, reference
from helix_megatron.partition.config import HelixConfig

__all__ = ["Groups", "errors", "load", "make_config", "run", "start"]


@contextlib.contextmanager
def inferring():
    """No gradients, and Megatron's inference mode where it has one (core 0.18 and newer)."""
    from megatron.core.inference import utils

    mode = utils.InferenceMode.active() if hasattr(utils, "InferenceMode") else contextlib.nullcontext()
    with torch.no_grad(), mode:
        yield


class TEDotProductAttention(torch.nn.Module):
    """Transformer Engine's core as Helix must call it: mask types by name, own masks, whole heads.

    Like its flash and fused kernels it ignores a tensor under a causal type; `reads_masks`: like the unfused.
    Its fused kernel reads tensors as contiguous ones, whatever their strides.
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
        for tensor in (query, key, value):
            assert tensor.is_contiguous(), f"{tensor.shape} with strides {tensor.stride()}"
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
    """Helix's layer, or Megatron's own when helix is None; te: all of Transformer Engine's spec."""
    ignoring, reading = TEDotProductAttention, UnfusedTEDotProductAttention
    cores = {False: None, True: ignoring, "flash": ignoring, "unfused": reading}
    return layers.make_layer(case, helix, tp, groups, cores[te_core], te, **overrides)


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
    if any(overrides.get("no_rope_freq", [])):
        case = replace(case, rotary_percent=0.0)
    return errors(found, reference(case, slices), rows, columns)


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
