"""Builds one layout of a model with Megatron itself and measures it: what predictions are checked against.

Runs inside the ranks of an initialised process group (host mode or GPUs); nothing here predicts anything. The
model is a GPTModel of the local layer spec, wrapped in Megatron's DDP, run by Megatron's own schedules, and
stepped by Megatron's optimizer; data are random tokens, made on every rank.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from helix_megatron.measure import memory
from helix_megatron.measure.comm import CommMeter
from helix_megatron.plan.layout import Problem

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Measured:
    """What a trial gave on this rank."""

    seconds: list[float] = field(default_factory=list)
    """Of each step, of the slowest rank."""
    comm: dict[str, Any] = field(default_factory=dict)
    """CommMeter's tallies of one step."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes: parameters, gradients, optimizer, activations (of one micro-batch), kv_cache."""


_AS_MEGATRON = """num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size
    normalization qk_layernorm add_bias_linear add_qkv_bias""".split()
_OF_EXPERTS = """num_moe_experts moe_router_topk moe_ffn_hidden_size moe_shared_expert_intermediate_size
    moe_shared_expert_gate""".split()
_FUSIONS = """masked_softmax_fusion apply_rope_fusion gradient_accumulation_fusion bias_activation_fusion
    bias_dropout_fusion persist_layer_norm variable_seq_lengths""".split()


def core_config(problem: Problem) -> Any:
    """Megatron's TransformerConfig of the model in this layout, every fusion off."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape, layout, work = problem.shape, problem.layout, problem.workload
    experts = {name: getattr(shape, name) or None for name in _OF_EXPERTS} if shape.num_moe_experts else {}
    recompute = {"granularity": "full", "method": "uniform", "num_layers": 1} if layout.recompute else {}
    return TransformerConfig(
        **{name: getattr(shape, name) for name in _AS_MEGATRON},
        **dict.fromkeys(_FUSIONS, False),
        **experts,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        moe_token_dispatcher_type="alltoall",
        moe_aux_loss_coeff=0.0,
        attention_output_gate=shape.attention_output_gate,
        softmax_type=shape.softmax_type,
        window_size=(shape.window_size, 0) if shape.window_size else None,
        window_attn_skip_freq=shape.window_attn_skip_freq or None,
        **{f"recompute_{name}": value for name, value in recompute.items()},
        gated_linear_unit=shape.gated,
        activation_func=torch.nn.functional.silu if shape.gated else torch.nn.functional.gelu,
        layernorm_epsilon=shape.norm_epsilon,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=DTYPES[work.dtype],
        params_dtype=DTYPES[work.dtype],
        bf16=work.dtype == "bf16",
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )


@contextmanager
def parallel(problem: Problem) -> Iterator[None]:
    """Process groups of the layout, and Helix switched on if it uses it, while entered.

    The groups made meanwhile are destroyed, which Megatron leaves to the end of the process: a layout has
    about 30, each of gloo's keeps two threads, and a process that tries many layouts would drown in them.
    """
    from megatron.core import parallel_state, tensor_parallel

    from helix_megatron.megatron import integrate

    layout = problem.layout
    groups = torch.distributed.distributed_c10d._world.pg_map  # torch has no public list of them
    before = set(groups)
    helix = layout.helix_config(problem.shape)
    if helix is not None:
        integrate.enable(helix, layout.grid)
    try:
        parallel_state.initialize_model_parallel(
            layout.tp, layout.pp, expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=layout.etp
        )
        tensor_parallel.model_parallel_cuda_manual_seed(123)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        integrate.disable()
        for group in set(groups) - before:
            torch.distributed.destroy_process_group(group)
        gc.collect()  # models hold their groups, and hold each other


def build(problem: Problem) -> torch.nn.Module:
    """This rank's part of the GPT, not wrapped."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    shape, layout = problem.shape, problem.layout
    norms = {"normalization": shape.normalization, "qk_layernorm": shape.qk_layernorm}
    spec = get_gpt_layer_local_spec(shape.num_moe_experts or None, **norms)
    model = GPTModel(
        core_config(problem),
        spec,
        vocab_size=shape.padded_vocab_size(layout.tp),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type=shape.position_embedding_type,
        rotary_percent=shape.rotary_percent,
        rotary_base=shape.rotary_base,
    )
    model = model.to(torch.cuda.current_device())
    if problem.workload.dtype == "fp32":
        return model
    from megatron.core.transformer.module import Float16Module

    return Float16Module(model.config, model)


def measure(problem: Problem, steps: int, warmup: int = 1, held: bool = True) -> Measured:
    """Build the layout, run `warmup` + `steps` steps of its work, and tear it down.

    Args:
        problem: the layout takes the whole world.
        held: measure memory and count collectives too.
    """
    with parallel(problem):
        if problem.workload.kind == "train":
            return _train(problem, steps, warmup, held)
        return _infer(problem, steps, warmup, held)


def slowest_seconds(body: Callable[[], Any]) -> float:
    """Seconds of `body` on the slowest rank, all of which begin together; the default group's ranks."""
    torch.distributed.barrier()
    torch.cuda.synchronize()
    start = time.perf_counter()
    body()
    torch.cuda.synchronize()
    one, device = time.perf_counter() - start, torch.cuda.current_device()
    elapsed = torch.tensor([one], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(elapsed, op=torch.distributed.ReduceOp.MAX)
    return elapsed.item()


def _run(step: Callable[[], Any], steps: int, warmup: int, held: bool) -> Measured:
    """Seconds of each step and, if `held`, the collectives of one more."""
    measured = Measured([slowest_seconds(step) for _ in range(warmup + steps)][warmup:])
    if held:
        meter = CommMeter()
        with meter.counting():
            step()
        measured.comm = meter.as_json()
    return measured


# ---- training ----
def _batches(problem: Problem) -> Iterator[dict[str, torch.Tensor]]:
    """The same micro-batch of random tokens for ever."""
    tokens = _random_tokens(problem, problem.layout.micro_batch)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    batch = {"tokens": tokens, "labels": tokens.roll(-1, dims=1), "position_ids": positions}
    while True:
        yield batch


def _random_tokens(problem: Problem, sequences: int) -> torch.Tensor:
    """[sequences, length], the same on every rank."""
    generator = torch.Generator().manual_seed(1234)
    size = (sequences, problem.workload.length)
    tokens = torch.randint(0, problem.shape.vocab_size, size, generator=generator)
    return tokens.to(torch.cuda.current_device())


def _forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[Any, Any]:
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return losses.float().mean(), {}

    return output, loss


def _train(problem: Problem, steps: int, warmup: int, held: bool) -> Measured:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    work = problem.workload
    zero = {"use_distributed_optimizer": work.distributed_optimizer}
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=work.dtype == "bf16", **zero)
    module = build(problem)
    model = DistributedDataParallel(module.config, ddp, module)
    model.broadcast_params()
    dtype = {"bf16": work.dtype == "bf16", "params_dtype": DTYPES[work.dtype]}
    adam = OptimizerConfig(optimizer="adam", lr=1e-4, clip_grad=1.0, **dtype, **zero)
    optimizer = get_megatron_optimizer(adam, [model])
    module.config.finalize_model_grads_func = finalize_model_grads
    run = partial(
        get_forward_backward_func(),
        forward_step_func=_forward_step,
        data_iterator=_batches(problem),
        model=[model],
        seq_length=work.length,
        micro_batch_size=problem.layout.micro_batch,
    )

    def step() -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        run(num_microbatches=problem.micro_batches, forward_only=False)
        optimizer.step()

    measured = _run(step, steps, warmup, held)
    if held:
        measured.memory = memory.state_bytes([model], optimizer)
        measured.memory["activations"] = memory.activation_bytes(
            [model], lambda: run(num_microbatches=1, forward_only=True)
        )
    return measured


# ---- inference ----
def _infer(problem: Problem, steps: int, warmup: int, held: bool) -> Measured:
    from megatron.core import parallel_state
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.utils import InferenceMode

    work, batch = problem.workload, problem.replica_batch
    model = build(problem).eval()
    prompt = _random_tokens(problem, batch)
    pp = parallel_state.get_pipeline_model_parallel_group()
    context: Any = None

    def prefill(room: int = 0) -> None:
        nonlocal context
        context = StaticInferenceContext(batch, work.length + room)
        _forward(model, problem, prompt, context, pp)

    def decode() -> None:
        _forward(model, problem, prompt[:, :1], context, pp)
        context.sequence_len_offset = work.length  # every measured token sees the same context

    with torch.no_grad(), InferenceMode.active():
        if work.kind == "decode":
            prefill(room=1)
            context.sequence_len_offset = work.length
            context.enable_decode_mode()
        step = prefill if work.kind == "prefill" else decode
        measured = _run(step, steps, warmup, held)
        if held:
            cached = [tensor for pair in context.key_value_memory_dict.values() for tensor in pair]
            measured.memory = {
                "parameters": memory.storage_bytes(list(model.parameters()), set()),
                "kv_cache": memory.storage_bytes(cached, set()),
            }
    return measured


def _forward(
    model: torch.nn.Module, problem: Problem, tokens: torch.Tensor, context: Any, pp: Any
) -> torch.Tensor | None:
    """tokens [b, s] through all stages; the last one returns the last token's logits [b, 1, V].

    Point to point along `pp`: hidden states [s, b, h].
    """
    b, s = tokens.shape
    start = context.sequence_len_offset
    positions = torch.arange(start, start + s, device=tokens.device).expand(b, s)
    ranks = torch.distributed.get_process_group_ranks(pp)
    stage, last = pp.rank(), pp.size() - 1
    if stage:
        dtype = DTYPES[problem.workload.dtype]
        hidden = torch.empty((s, b, problem.shape.hidden_size), dtype=dtype, device=tokens.device)
        torch.distributed.recv(hidden, ranks[stage - 1], group=pp)
        model.set_input_tensor(hidden)
    output = model(tokens, positions, None, inference_context=context, runtime_gather_output=True)
    if stage < last:
        torch.distributed.send(output.contiguous(), ranks[stage + 1], group=pp)
        return None
    return output
