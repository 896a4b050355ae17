"""Changes inside Megatron's modules that host mode needs. Applied by `host.enable_host_mode()` only."""

import functools
import multiprocessing
import multiprocessing.managers
import types

import megatron.core.optimizer as megatron_optimizer
import megatron.core.utils as megatron_utils
import torch
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.core.inference.contexts import dynamic_context
from megatron.core.optimizer import distrib_optimizer
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import attention
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from packaging.version import Version

from helix_megatron import compat
from helix_megatron.host import kernels, rng
from helix_megatron.host.processes import die_with_parent


def patch_megatron() -> None:
    """Apply every patch of this file."""
    CudaRNGStatesTracker.fork = rng.wrap_tracker_fork(CudaRNGStatesTracker.fork)
    _patch_norm()
    _patch_optimizer()
    _patch_checkpoint_writers()
    _patch_kernels()


def _patch_norm() -> None:
    # WrappedTorchNorm refuses sequence parallel because nobody would reduce its gradients over the TP group.
    # finalize_model_grads reduces those of parameters marked `sequence_parallel`, so mark them.
    build = WrappedTorchNorm.__new__

    @functools.wraps(build)
    def build_sequence_parallel(cls, config, *args, **kwargs):
        if not config.sequence_parallel:
            return build(cls, config, *args, **kwargs)
        config.sequence_parallel = False
        try:
            norm = build(cls, config, *args, **kwargs)
        finally:
            config.sequence_parallel = True
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    WrappedTorchNorm.__new__ = build_sequence_parallel


class HostFusedAdam(torch.optim.Adam):
    """torch's Adam with the semantics of apex's and Transformer Engine's FusedAdam.

    The step count is one integer in each parameter group, not a tensor per parameter; `adam_w_mode` asks
    for decoupled weight decay. Without it the distributed optimizer cannot build the state it loads into.
    """

    def __init__(self, params, adam_w_mode=True, **kwargs):
        super().__init__(params, decoupled_weight_decay=adam_w_mode, **kwargs)

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)  # Adam's own looks for a step in every state

    @torch.no_grad()
    def step(self, closure=None):
        """One step; a group without parameters does not count it, as in FusedAdam."""
        active = [group for group in self.param_groups if group["params"]]
        for group in active:
            for parameter in group["params"]:
                state = self.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    if name not in state:
                        state[name] = torch.zeros_like(parameter)
                state["step"] = torch.tensor(float(group.get("step", 0)))
        loss = super().step(closure)
        for group in active:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                del self.state[parameter]["step"]
        return loss


def _patch_optimizer() -> None:
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    megatron_optimizer.Adam = HostFusedAdam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def _patch_checkpoint_writers() -> None:
    # torch_dist saving keeps a queue in a manager process per rank, and an optional writer process. Megatron
    # spawns them: they would import Megatron again, without host mode, and outlive a rank that is killed.
    def get_write_results_queue(mp_mode="fork"):
        if filesystem_async._results_queue is None:
            manager = multiprocessing.managers.SyncManager(ctx=multiprocessing.get_context("fork"))
            manager.start(initializer=die_with_parent)
            filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    setattr(filesystem_async, compat.megatron().writer_queue, get_write_results_queue)
    if not compat.megatron().forked_writer:  # it asks multiprocessing for a context by name
        always = {"get_context": lambda method=None: multiprocessing.get_context("fork")}
        async_utils.mp = types.SimpleNamespace(**{**vars(async_utils.mp), **always})
        return
    get_process = PersistentAsyncCaller._get_process.__func__

    @functools.wraps(get_process)
    def get_forked_process(cls, rank, mp_mode="fork", *args, **kwargs):
        return get_process(cls, rank, "fork", *args, **kwargs)

    PersistentAsyncCaller._get_process = classmethod(get_forked_process)


def _patch_kernels() -> None:
    # The dynamic engine calls flash-attn and a triton kernel; the context has a torch path for the latter
    attention.flash_attn_varlen_func = kernels.flash_attn_varlen_func
    attention.flash_attn_with_kvcache = kernels.flash_attn_with_kvcache
    megatron_utils._fa_version = Version("2.8.0")  # attention.py asks for 2.7.3 or newer
    dynamic_context.triton_append_key_value_cache = None
    if compat.megatron().dynamic_engine:
        _patch_speculation()

    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        # all-to-all takes split sizes as lists or arrays; Megatron converts those that are `is_cuda`
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _patch_speculation() -> None:
    # Megatron verifies speculative tokens by Triton kernels, and has their torch versions beside them
    from megatron.core.inference.text_generation_controllers import (
        mtp_utils_pytorch,
        text_generation_controller,
    )

    for name in ("mamba_state_selective_copy", "prepare_next_forward_pass", "verify_speculative_tokens"):
        setattr(text_generation_controller, name, getattr(mtp_utils_pytorch, name))
