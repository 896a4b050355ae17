"""Trains many configurations of Megatron's loop one after another in the same ranks (feature_table.py).

As a program it reads [[ranks, [arguments, ...]], ...] from stdin: for a process with Transformer Engine.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import sys
import traceback
import types

import torch

BATCH = 16


def rank_runs(runs: list[list[str]]) -> list[dict]:
    """Train each list of arguments; {"losses", "norms"} as printed, or {"error"}: what refused it; "grid".

    All of Megatron's state is new for each run, its process groups too: gloo's have threads of their own.
    """
    from helix_megatron import entry, integrate

    store, rank, world_size = next(iter(torch.distributed.rendezvous("env://")))
    del os.environ["MASTER_ADDR"]  # or each run would let the ranks agree on their settings, in one store
    entry.use_built_helpers()
    integrate.install()
    _stand_in_for_fused_wgrad()
    found = []
    for number, arguments in enumerate(runs):
        own = torch.distributed.PrefixStore(f"run {number}", store)
        torch.distributed.init_process_group("nccl", store=own, rank=rank, world_size=world_size)
        found.append(_run(arguments))
        gc.collect()
        torch.distributed.destroy_process_group()
    return found


def _run(arguments: list[str]) -> dict:
    from helix_megatron import pretrain_gpt
    from helix_megatron.compare.start import same_weights_at_any_layout

    printed = io.StringIO()
    error = {}
    try:
        with contextlib.redirect_stdout(printed), same_weights_at_any_layout(seed=7), _equal_sinks():
            pretrain_gpt.train(arguments)
    except Exception as fault:
        error = {"error": f"{type(fault).__name__}: {fault}", "trace": traceback.format_exc()[-1500:]}
    finally:
        _forget()
    found = re.findall(r"lm loss: (\S+) .*grad norm: (\S+) ", printed.getvalue())
    grid = re.search(r"Helix attention: grid (\d+x\d+)", printed.getvalue())  # rank 0 prints it
    losses, norms = [float(loss) for loss, _ in found], [float(norm) for _, norm in found]
    return {"losses": losses, "norms": norms, "grid": grid and grid[1], **error}


def _forget() -> None:
    """Undo what a run leaves in Megatron's modules."""
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.training import global_vars

    from helix_megatron import integrate

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    global_vars.destroy_global_vars()
    integrate.disable()


@contextlib.contextmanager
def _equal_sinks():
    """Learnable sinks start at 0.5 and draw nothing: a layout's ranks would draw other numbers of them."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    original = DotProductAttention.__init__

    def __init__(self, *args, **kwargs):
        states = torch.get_rng_state(), torch.cuda.get_rng_state()
        original(self, *args, **kwargs)
        torch.set_rng_state(states[0])
        torch.cuda.set_rng_state(states[1])
        if isinstance(self.softmax_offset, torch.nn.Parameter):
            torch.nn.init.constant_(self.softmax_offset, 0.5)

    DotProductAttention.__init__ = __init__
    try:
        yield
    finally:
        DotProductAttention.__init__ = original


def _stand_in_for_fused_wgrad() -> None:
    """The one kernel of --gradient-accumulation-fusion: add a weight's gradient to main_grad."""
    from megatron.core.tensor_parallel import layers

    def accumulate(inputs, grad_output, main_grad):
        main_grad.add_(grad_output.t().to(main_grad.dtype) @ inputs.to(main_grad.dtype))

    kernels = types.SimpleNamespace(wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate)
    layers.fused_weight_gradient_mlp_cuda, layers._grad_accum_fusion_available = kernels, True


def in_batches(ranks: int, runs: list[list[str]]) -> list[list[dict]]:
    """rank_runs in new ranks for every few runs, since some leave threads behind: each rank's results."""
    from helix_megatron.launch import run_ranks

    found: list[list[dict]] = [[] for _ in range(ranks)]
    for start in range(0, len(runs), BATCH):
        for mine, more in zip(found, run_ranks(rank_runs, ranks, runs[start : start + BATCH]), strict=True):
            mine += more
    return found


if __name__ == "__main__":
    from feature_worker import in_batches as by_name  # ranks import rank_runs by name

    print(json.dumps([by_name(ranks, runs) for ranks, runs in json.load(sys.stdin)]))
