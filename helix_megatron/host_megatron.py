"""Changes inside Megatron's modules that host mode needs. Applied by `host.enable_host_mode()` only."""

import functools

from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from helix_megatron import host_rng


def patch_megatron() -> None:
    """Apply every patch of this file."""
    _patch_rng_tracker()
    _patch_norm()


def _patch_rng_tracker() -> None:
    CudaRNGStatesTracker.fork = host_rng.wrap_tracker_fork(CudaRNGStatesTracker.fork)


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
