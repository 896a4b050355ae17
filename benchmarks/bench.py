"""What the benchmarks of an attention layer share: ranks, the layer of either side, and how it is timed."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rows_of(worker: Callable[..., list[dict]], ranks: int, *given: Any, timeout_s: float) -> list[dict]:
    """What `worker` returns: in this process under torchrun, else on so many ranks on this host."""
    if "RANK" in os.environ:
        return worker(*given)
    from helix_megatron.host.launcher import run_ranks

    return run_ranks(worker, ranks, *given, timeout_s=timeout_s)[0]


def initialize(tp: int, fake: Any | None = None) -> None:
    """Process groups, device and random streams of this rank.

    Args:
        tp: tensor-parallel size.
        fake: torch's FakeStore: this process is rank 0 of groups whose collectives move nothing.
    """
    from megatron.core import parallel_state, tensor_parallel

    from helix_megatron.host.mode import host_mode_enabled

    if not host_mode_enabled():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if fake is not None:
        torch.distributed.init_process_group(backend="fake", store=fake, rank=0, world_size=tp)
    else:
        torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)


@contextmanager
def attention_layer(
    shape: tuple[int, int, int, int],
    tp: int,
    dtype: torch.dtype,
    helix: Any | None,
    transformer_engine: bool = False,
    qk_norm: bool = False,
    graphs: bool = False,
    flash: int | None = None,
    rope_fusion: bool = False,
) -> Iterator[tuple[torch.nn.Module, Any]]:
    """A self-attention layer and its TransformerConfig, of the same weights every time.

    Args:
        shape: query heads, KV heads, their dimension, hidden size.
        tp: tensor-parallel size.
        dtype: of the weights.
        helix: a HelixConfig, which stays switched on while entered; None for Megatron's own layer.
        transformer_engine: build its layer, not the local one.
        qk_norm: RMSNorm of query and key heads.
        graphs: decode steps are captured (--cuda-graph-impl local).
        flash: version of FlashAttention; None for the newest.
        rope_fusion: Transformer Engine rotates, by one kernel.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from helix_megatron.megatron import integrate
    from helix_megatron.megatron.process_groups import destroy_helix_parallel, initialize_helix_parallel

    heads, groups, dim, hidden = shape
    if helix is not None:
        destroy_helix_parallel()
        grid = helix.resolve(heads, groups, dim, tp).grid
        initialize_helix_parallel(grid, parallel_state.get_tensor_model_parallel_group())
        integrate.enable(helix)
    try:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=dim,
            tensor_model_parallel_size=tp,
            add_bias_linear=False,
            attention_dropout=0.0,
            use_cpu_initialization=True,
            params_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            apply_rope_fusion=rope_fusion,
            qk_layernorm=qk_norm,
            cuda_graph_impl="local" if graphs else "none",
            **({} if flash is None else {"flash_attention_version": flash}),
            normalization="RMSNorm" if qk_norm else "LayerNorm",
            persist_layer_norm=False,
            init_method=torch.nn.init.xavier_normal_,
            output_layer_init_method=torch.nn.init.xavier_normal_,
        )
        whole = get_gpt_layer_with_transformer_engine_spec if transformer_engine else get_gpt_layer_local_spec
        norm = {} if transformer_engine or not qk_norm else {"normalization": "RMSNorm"}
        torch.manual_seed(1)  # the same master weights for every layer
        layer = build_module(
            whole(qk_layernorm=qk_norm, **norm).submodules.self_attention,
            config=config,
            layer_number=1,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"]),
        )
        yield layer.to(torch.cuda.current_device()), config
    finally:
        integrate.disable()


def rotary(length: int, dim: int) -> torch.Tensor:
    """Angles [length, 1, 1, dim] of rotary positions, on the device."""
    angles = torch.outer(torch.arange(length).float(), 1e4 ** -(torch.arange(0, dim, 2).float() / dim))
    return torch.cat((angles, angles), -1)[:, None, None].to(torch.cuda.current_device())


def hardware() -> str:
    """What this runs on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"host, {os.cpu_count()} cores, {platform.processor() or platform.machine()}, shared memory"
