"""One rank's share of real models at full size, alone: collectives are skipped (torch's fake process group).

On a GPU: microseconds of kernels by class, forward and backward, launches and peak memory of an attention
layer, Helix beside Megatron, and a decode step likewise, eager and replayed from a CUDA graph. On a host, at
small sizes: the operations, counted; its times say nothing about kernels.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any

import torch

from helix_megatron.check.kernel_times import (
    count_operations,
    measure_seconds,
    profile_kernels,
    sum_by_class,
)
from helix_megatron.check.rows import Place, Rows, first_line
from helix_megatron.models import presets
from helix_megatron.partition.config import HelixConfig

WORLD = 16


@dataclass(frozen=True)
class Layout:
    """A row of the table: an attention layer of a preset on `tp` ranks; grid None: Megatron's own."""

    model: str
    tp: int
    grid: tuple[int, int] | None = None
    placement: str = "auto"
    quick: bool = True

    @property
    def name(self) -> str:
        what = "Megatron" if self.grid is None else f"Helix {self.grid[0]}x{self.grid[1]} {self.placement}"
        return f"{self.model}, {what} TP={self.tp}"


LAYOUTS = (
    Layout("llama-3.1-70b", 8),
    Layout("llama-3.1-70b", 16),
    Layout("llama-3.1-70b", 16, (8, 2), "heads"),
    Layout("llama-3.1-70b", 16, (8, 2), "dims"),
    Layout("llama-3.1-70b", 16, (4, 4), "heads", quick=False),
    Layout("qwen2-7b", 4, quick=False),
    Layout("qwen2-7b", 8, (4, 2), "dims", quick=False),
    Layout("llama-2-7b", 8, quick=False),
    Layout("llama-2-7b", 16, (8, 2), "heads", quick=False),
    Layout("llama-2-7b", 16, (4, 4), "heads", quick=False),
)
SEQUENCE = 8192


@dataclass(frozen=True)
class Decode:
    """A decode step of one layer of 16 query heads of 128 at TP = 8.

    Args:
        cache: Helix's; empty: Megatron's own layer, whose ranks hold copies of KV heads.
        graph: replayed from a CUDA graph.
    """

    kv_heads: int
    cache: str
    context: int
    batch: int
    quick: bool = False
    graph: bool = False

    @property
    def name(self) -> str:
        whose = f"Helix {self.cache}" if self.cache else "Megatron"
        return (
            f"decode, 16/{self.kv_heads} heads TP=8, {whose}, context {self.context}, batch {self.batch}"
            + ", CUDA graph" * self.graph
        )


DECODES = (
    Decode(2, "sequence", 2048, 1, quick=True, graph=True),
    Decode(2, "sequence", 2048, 1, quick=True),
    Decode(2, "", 2048, 1, quick=True, graph=True),
    Decode(2, "", 2048, 1, quick=True),
    Decode(2, "sequence", 131072, 8, graph=True),
    Decode(2, "", 131072, 8, graph=True),
    Decode(1, "sequence", 131072, 8, graph=True),
    Decode(1, "", 131072, 8, graph=True),
    Decode(2, "sequence", 131072, 8),
    Decode(2, "dim", 2048, 1),
    Decode(2, "dim", 131072, 8),
)
BLOCK = 256


def check(rows: Rows, place: Place) -> None:
    """All layouts in one process, all decode steps in another."""
    from helix_megatron.host.launcher import RankError, run_ranks

    for function, share in ((rank_layouts, 0.5), (rank_decodes, 1.0)):  # of the time that is left
        # host mode is switched on in the rank: the fake process group comes from what it replaces,
        # and has no peer to share memory with
        alone = {"HELIX_HOST_SHARED_MEMORY": "0"}
        how: dict[str, Any] = {"env": alone, "timeout_s": place.left_s * share, "fresh": not place.on_host}
        try:
            run_ranks(function, 1, rows.path, place, host_mode=False, **how)
        except RankError as error:  # the decode steps may do all the same
            print(error, flush=True)
            rows.add(f"the process of {function.__name__}", "failed", first_line(error))


def start_fake_world(on_host: bool, world: int = WORLD) -> None:
    """Be rank 0 of `world`: every process group is torch's fake one, whose collectives do nothing."""
    from torch.distributed import distributed_c10d
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group, initialize = distributed_c10d.new_group, distributed_c10d.init_process_group
    if on_host:
        from helix_megatron.host.mode import enable_host_mode

        enable_host_mode()

    def fake(*args: Any, **kwargs: Any) -> Any:
        for name in ("pg_options", "device_id"):
            kwargs.pop(name, None)
        return new_group(*args, **{**kwargs, "backend": "fake"})

    for module in (torch.distributed, distributed_c10d):
        module.new_group = fake
    initialize(backend="fake", store=FakeStore(), rank=0, world_size=world)


def make_tensor_parallel_groups(tp: int) -> None:
    """Tensor-parallel groups of `tp` ranks, in place of those before."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def rank_layouts(path: str, place: Place) -> None:
    """In the one rank: every layout; what fails of one is its row."""
    start_fake_world(place.on_host)
    rows = Rows(path)
    for layout in LAYOUTS:
        if place.quick and not layout.quick:
            continue
        try:
            measured = measure_layout(layout, place.on_host)
        except Exception as error:
            rows.add(layout.name, "failed", f"{type(error).__name__}: {str(error)[:300]}")
        else:
            rows.add(layout.name, "measured", describe_limits(place.on_host), **measured)
            if "unfused" in measured["core"] and not place.on_host:
                rows.add(
                    layout.name, "warning", f"attention ran {measured['core']}: a fused one was expected"
                )
        gc.collect()
        torch.cuda.empty_cache()


def measure_layout(layout: Layout, on_host: bool) -> dict[str, Any]:
    """The layer of one layout: what it is, and what its forward and backward took."""
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

    from helix_megatron.check import layer as layers
    from helix_megatron.check.exactness import attention_core
    from helix_megatron.check.reference import Case

    shape, te = presets.find(layout.model), HAVE_TE and not on_host
    dim, hidden, length = shape.kv_channels, shape.hidden_size, SEQUENCE
    if on_host:
        dim, hidden, length = 16, 256, 64
    case = Case(shape.num_attention_heads, shape.num_query_groups, dim, hidden, length, 1, bias=False)
    helix, groups = None, None
    make_tensor_parallel_groups(layout.tp)
    if layout.grid is not None:
        helix = HelixConfig(*layout.grid, query_placement=layout.placement)
        groups = layers.Groups().of(helix.resolve(case.heads, case.groups, dim, layout.tp).grid)
    dtype = torch.bfloat16
    fused = dict(params_dtype=dtype, bf16=True, attention_softmax_in_fp32=not te, apply_rope_fusion=te)
    layer = layers.make_layer(case, helix, layout.tp, groups, transformer_engine=te, **fused)
    device = torch.cuda.current_device()
    table = case.rope_table()
    assert table is not None
    table, x = table.to(device), torch.randn(length, 1, hidden, device=device).to(dtype)

    def step() -> None:
        given = x.detach().requires_grad_()
        layer(given, None, rotary_pos_emb=table)[0].backward(x)
        for parameter in layer.parameters():
            parameter.grad = None

    found: dict[str, Any] = {
        "model": layout.model, "heads": case.heads, "kv_heads": case.groups, "dim": dim, "hidden": hidden,
        "sequence": length, "batch": 1, "dtype": "bf16", "tp": layout.tp, "grid": layout.grid,
        "placement": layout.placement if layout.grid else None, "rope_fusion": te,
    }  # fmt: skip
    if on_host:
        return {**found, "operations": count_operations(step), "core": attention_core(layer, te)}
    torch.cuda.reset_peak_memory_stats()
    seconds = measure_seconds(step)
    kernels = profile_kernels(step)
    classes = sum_by_class(kernels)
    return {
        **found,
        "us": {name: us for name, (us, _) in classes.items()},
        "launches": {name: count for name, (_, count) in classes.items()},
        "step_ms": 1e3 * seconds,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20,
        "core": attention_core(layer, te),
    }


def rank_decodes(path: str, place: Place) -> None:
    """In the one rank: every decode step."""
    from megatron.core.inference.utils import InferenceMode

    from helix_megatron.generate.engine import refuse_without_flash_attention

    start_fake_world(place.on_host, 8)
    rows = Rows(path)
    for decode in DECODES:
        if (place.quick and not decode.quick) or (place.on_host and decode.graph):
            continue
        if place.on_host:
            decode = replace(decode, context=min(decode.context, 512))
        try:
            if not decode.cache and not place.on_host:
                refuse_without_flash_attention(None)
        except ValueError as error:
            rows.add(decode.name, "skipped", str(error).split(": pip")[0])
            continue
        try:
            with torch.inference_mode(), InferenceMode.active():
                measured = measure_decode(decode, place.on_host)
        except Exception as error:
            status = "failed" if decode.cache else "skipped"  # Megatron's own is a yardstick
            rows.add(decode.name, status, f"{type(error).__name__}: {str(error)[:300]}")
        else:
            rows.add(decode.name, "measured", describe_limits(place.on_host), **measured)
        gc.collect()
        torch.cuda.empty_cache()


def measure_decode(decode: Decode, on_host: bool) -> dict[str, Any]:
    """One decode step of one layer on a cache whose contents are whatever memory held."""
    from helix_megatron.check import layer as layers
    from helix_megatron.check.decode_step import new_context, set_decode_step
    from helix_megatron.check.graphs import captured
    from helix_megatron.check.reference import Case
    from helix_megatron.megatron import integrate

    case = Case(16, decode.kv_heads, 128, 1024, 1, bias=False)
    make_tensor_parallel_groups(8)
    helix = HelixConfig(kv_cache=decode.cache) if decode.cache else None
    groups, kv_share = None, max(1.0, decode.kv_heads / 8)  # heads, or copies of one
    if helix is not None:
        grid, kv_share = helix.resolve(16, decode.kv_heads, 128, 8).grid, decode.kv_heads / 8
        groups = layers.Groups().of(grid)
    half: dict[str, Any] = dict(params_dtype=torch.bfloat16, bf16=True)
    if decode.graph:
        half["cuda_graph_impl"] = "local"
    layer = layers.make_layer(case, helix, 8, groups, **half).eval()
    blocks = decode.batch * -(-decode.context // BLOCK)
    block_bytes = int(2 * BLOCK * kv_share * 128 * 2)
    if helix is not None:
        integrate.enable(helix)  # what the context caches is Helix's
    try:
        config = layers.make_config(case, 8, **half)
        sizes = (blocks, block_bytes, decode.context, decode.batch, BLOCK)
        context, table = new_context(config, *sizes, graphs=1 if decode.graph else None)
    finally:
        if helix is not None:
            integrate.disable()
    set_decode_step(context, table, decode.batch, decode.context, BLOCK)
    rope_case = Case(16, 1, 128, seq=decode.context)
    device = torch.cuda.current_device()
    rope = rope_case.rope_table()
    assert rope is not None
    rope = rope.to(device)
    hidden = torch.randn(context.padded_active_token_count, 1, 1024, device=device).to(torch.bfloat16)

    def forward() -> torch.Tensor:
        return layer(hidden, None, inference_context=context, rotary_pos_emb=rope)[0]

    found: dict[str, Any] = {
        "context": decode.context, "batch": decode.batch, "tokens": context.padded_active_token_count,
        "cache_bytes": decode.batch * decode.context * block_bytes // BLOCK,
    }  # fmt: skip
    if on_host:
        return {**found, "operations": count_operations(forward)}
    torch.cuda.reset_peak_memory_stats()
    step = captured(forward)[0] if decode.graph else forward
    seconds, classes = measure_seconds(step), sum_by_class(profile_kernels(step))
    return {
        **found,
        "us": {name: us for name, (us, _) in classes.items()},
        "launches": {name: count for name, (_, count) in classes.items()},
        "step_ms": 1e3 * seconds,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20,
    }


def describe_limits(on_host: bool) -> str:
    """What is not as in a real run."""
    return "collectives skipped" + ("; small sizes, operations counted, nothing timed" if on_host else "")
