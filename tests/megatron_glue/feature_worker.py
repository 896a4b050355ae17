"""Trains many configurations of Megatron's loop one after another in the same ranks (feature_table.py).

As a program it reads [[ranks, [arguments, ...]], ...] from stdin: for a process with Transformer Engine.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gc
import importlib
import io
import json
import os
import re
import sys
import traceback
import types
from collections.abc import Iterator

import numpy as np
import torch

BATCH = 16
PACKED = "--sft"  # which Helix's own entry refuses; here each document is a sequence (thd)
PER_SLICE = "per-slice"
_CORE = "megatron.core"
COUNTED = {
    "recomputed": f"{_CORE}.tensor_parallel.random:CheckpointFunction.backward",
    "output recomputed": f"{_CORE}.tensor_parallel.random:CheckpointWithoutOutput._recompute",
    "gathered saved activations": f"{_CORE}.tensor_parallel.random:gather_split_1d_tensor",
    "offloaded by module": (
        f"{_CORE}.pipeline_parallel.fine_grained_activation_offload:ChunkOffloadHandler.bulk_offload_group"
    ),
    "offloaded by layer": (
        "transformer_engine.pytorch.cpu_offload_v1:AsyncDoubleBufferGroupOffloadHandler.bulk_offload_group"
    ),
    "stages": f"{_CORE}.pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving",
    "virtual stages": f"{_CORE}.pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving",
    "sequence shared": f"{_CORE}.tensor_parallel.mappings:_reduce_scatter_along_first_dim",
    "distributed step": f"{_CORE}.optimizer.distrib_optimizer:DistributedOptimizer.step_with_ready_grads",
    "reduced in backward": (
        f"{_CORE}.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.register_grad_ready"
    ),
    "gathered in forward": (
        f"{_CORE}.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.finish_param_sync"
    ),
    "fused wgrad": f"{_CORE}.tensor_parallel.layers:fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32",
    "fused cross entropy": f"{_CORE}.fusions.fused_cross_entropy:calculate_logits_max",
    "deterministic": "torch:use_deterministic_algorithms",
    "half precision": f"{_CORE}.transformer.module:Float16Module.forward",
    "GEMM overlapped": "transformer_engine_torch:overlapped",
    "reduced by level": "helix_megatron.exchange.levels:all_reduce",
    "whole sequence gathered": "helix_megatron.megatron.core_attention:restore_positions",
    "packed": "helix_megatron.megatron.core_attention:HelixCoreAttention._packed",
    "summed scores": "helix_megatron.megatron.core_attention:HelixCoreAttention._summed_scores",
}
"""Functions whose calls a run counts."""


def rank_runs(runs: list[list[str]]) -> list[dict]:
    """Train each list of arguments: what _run returns.

    All of Megatron's state is new for each run, its process groups too: gloo's have threads of their own.
    """
    from helix_megatron.megatron import entry, integrate

    store, rank, world_size = next(iter(torch.distributed.rendezvous("env://")))
    del os.environ["MASTER_ADDR"]  # or each run would let the ranks agree on their settings, in one store
    entry.use_built_helpers()
    integrate.install()
    _stand_in_for_fused_wgrad()
    _stand_in_for_numa_affinity()
    counts: collections.Counter[str] = collections.Counter()
    for name, place in COUNTED.items():
        _count(counts, name, place)
    found = []
    for number, arguments in enumerate(runs):
        own = torch.distributed.PrefixStore(f"run {number}", store)
        torch.distributed.init_process_group("nccl", store=own, rank=rank, world_size=world_size)
        counts.clear()
        found.append(_run(arguments) | {"ran": dict(counts)})
        gc.collect()
        torch.distributed.destroy_process_group()
    return found


def _run(arguments: list[str]) -> dict:
    """{"losses", "norms"}: of each step, on the last rank; "begun": steps; "plan": Helix's line, on rank 0;
    "error", "trace": what ended it."""
    from helix_megatron import pretrain_gpt
    from helix_megatron.measure.start import same_weights_at_any_layout

    printed = io.StringIO()
    result: dict = {"losses": [], "norms": [], "begun": 0}
    try:
        with (
            contextlib.redirect_stdout(printed),
            same_weights_at_any_layout(seed=7),
            _equal_sinks(),
            _logged(result),
            _packed_sequences() if PACKED in arguments else contextlib.nullcontext(),
            _slices_drawn_as_heads() if PER_SLICE in arguments else contextlib.nullcontext(),
        ):
            pretrain_gpt.train(arguments)
    except Exception as fault:
        result["error"] = f"{type(fault).__name__}: {fault}"
        result["trace"] = traceback.format_exc()[-1500:]
    finally:
        _forget()
    plan = re.search(r"Helix attention: (.*)", printed.getvalue())
    return result | {"plan": plan and plan[1]}


@contextlib.contextmanager
def _logged(result: dict) -> Iterator[None]:
    """Have every step's loss and gradient norm put into `result`, in full: printed they have few digits."""
    from megatron.training import training

    log, step = training.training_log, training.train_step

    def training_log(loss_dict, *args, **kwargs):
        if "lm loss" in loss_dict:  # on the last stage
            result["losses"].append(float(loss_dict["lm loss"]))
        result["norms"].append(float(args[6]))  # grad_norm
        return log(loss_dict, *args, **kwargs)

    def train_step(*args, **kwargs):
        result["begun"] += 1
        return step(*args, **kwargs)

    training.training_log, training.train_step = training_log, train_step
    try:
        yield
    finally:
        training.training_log, training.train_step = log, step


@contextlib.contextmanager
def _packed_sequences() -> Iterator[None]:
    """Have every forward pass take its one sample as packed sequences: its documents.

    A stand-in for the batches of Megatron-LM's own script, of which the wheel has nothing.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.packed_seq_params import PackedSeqParams

    from helix_megatron import pretrain_gpt

    refuse = pretrain_gpt.refuse_unsupported
    forward = GPTModel.forward

    def forward_packed(self, tokens, position_ids, attention_mask, **kwargs):
        assert len(tokens) == 1 and attention_mask is not None
        starts = (position_ids[0] == 0).nonzero().flatten().tolist()
        bounds = torch.tensor([*starts, tokens.shape[1]], dtype=torch.int32)
        longest = int(bounds.diff().max())
        params = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
        return forward(self, tokens, position_ids, None, packed_seq_params=params, **kwargs)

    GPTModel.forward, pretrain_gpt.refuse_unsupported = forward_packed, lambda args: None
    try:
        yield
    finally:
        GPTModel.forward, pretrain_gpt.refuse_unsupported = forward, refuse


@contextlib.contextmanager
def _slices_drawn_as_heads() -> Iterator[None]:
    """Per-slice softmax starts from the weights of the model whose heads are its slices, in its order."""
    from helix_megatron.megatron import sliced_modules

    original = sliced_modules._sliced

    def _sliced(builder, slices, tp):
        held, rank = len(slices.own), slices.rank
        heads = dataclasses.replace(slices)
        vars(heads)["own"] = np.arange(rank * held, (rank + 1) * held)  # in place of what it would compute
        return original(builder, heads, tp)

    sliced_modules._sliced = _sliced
    try:
        yield
    finally:
        sliced_modules._sliced = original


def _count(counts: collections.Counter, name: str, place: str) -> None:
    """Have calls of a function counted, "module:object.attribute"; nothing where the module is not."""
    module, _, path = place.partition(":")
    *owners, attribute = path.split(".")
    try:
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
    except ModuleNotFoundError:
        return
    static = isinstance(vars(owner)[attribute], staticmethod)
    original = getattr(owner, attribute)

    @functools.wraps(original)
    def counted(*args, **kwargs):
        counts[name] += 1
        return original(*args, **kwargs)

    setattr(owner, attribute, staticmethod(counted) if static else counted)


def _forget() -> None:
    """Undo what a run leaves in Megatron's modules."""
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.training import global_vars

    from helix_megatron.megatron import integrate

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    global_vars.destroy_global_vars()
    integrate.disable()
    base = sys.modules.get("transformer_engine.pytorch.module.base")
    if base is not None and base._ub_communicators is not None:
        base.destroy_ub()
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _equal_sinks() -> Iterator[None]:
    """Learnable sinks start at 0.5 and draw nothing: a layout's ranks would draw other numbers of them."""
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    def starting(original):
        def __init__(self, *args, **kwargs):
            states = torch.get_rng_state(), torch.cuda.get_rng_state()
            original(self, *args, **kwargs)
            torch.set_rng_state(states[0])
            torch.cuda.set_rng_state(states[1])
            sinks = getattr(self, "softmax_offset", None)
            if isinstance(sinks, torch.nn.Parameter):
                torch.nn.init.constant_(sinks, 0.5)

        return __init__

    cores = [DotProductAttention, *([te.TEDotProductAttention] if te.HAVE_TE else [])]
    originals = [core.__init__ for core in cores]
    for core in cores:
        core.__init__ = starting(core.__init__)
    try:
        yield
    finally:
        for core, original in zip(cores, originals, strict=True):
            core.__init__ = original


def _stand_in_for_fused_wgrad() -> None:
    """The one kernel of --gradient-accumulation-fusion: add a weight's gradient to main_grad."""
    from megatron.core.tensor_parallel import layers

    def accumulate(inputs, grad_output, main_grad):
        main_grad.add_(grad_output.t().to(main_grad.dtype) @ inputs.to(main_grad.dtype))

    kernels = types.SimpleNamespace(wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate)
    layers.fused_weight_gradient_mlp_cuda, layers._grad_accum_fusion_available = kernels, True


def _stand_in_for_numa_affinity() -> None:
    """Offload by module first binds the process to the cores beside its GPU: nothing to do without one."""
    from megatron.core.pipeline_parallel import utils

    utils.set_ideal_affinity_for_current_gpu = lambda: None


def in_batches(ranks: int, runs: list[list[str]]) -> list[list[dict]]:
    """rank_runs in new ranks for every few runs, since some leave threads behind: each rank's results."""
    from helix_megatron.host.launcher import run_ranks

    found: list[list[dict]] = [[] for _ in range(ranks)]
    for start in range(0, len(runs), BATCH):
        for mine, more in zip(found, run_ranks(rank_runs, ranks, runs[start : start + BATCH]), strict=True):
            mine += more
    return found


if __name__ == "__main__":
    from tests.megatron_glue.feature_worker import in_batches as by_name  # ranks import rank_runs by name

    print(json.dumps([by_name(ranks, runs) for ranks, runs in json.load(sys.stdin)]))
