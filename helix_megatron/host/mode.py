"""Host mode: the unmodified Megatron training loop on a machine without a GPU.

Megatron assumes CUDA everywhere. `enable_host_mode()` makes the part of the CUDA surface that Megatron uses
act on host memory, with gloo and shared memory in place of NCCL. It is one explicit call, never made by an
import, and it cannot be undone: use it in processes that do nothing else (tests, `python -m
helix_megatron.launch`). The random streams and the meaning of `device='cuda'` are in `rng`, the changes
inside Megatron's own modules in `megatron`.
"""

import contextlib
import datetime
import os
import time
import types
from collections import defaultdict

import torch

from helix_megatron.host import collectives, rng

_ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",  # megatron.core.jit compiles: minutes on the host, for nothing
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # megatron.training.arguments asks for it when TP > 1
    "OMP_NUM_THREADS": "1",
}
_enabled = False


def host_mode_enabled() -> bool:
    """Whether `enable_host_mode()` has been called in this process (or in the one it was forked from)."""
    return _enabled


def enable_host_mode() -> None:
    """Make Megatron run on host memory and gloo, in this process, for good. A second call does nothing.

    Also sets TORCHDYNAMO_DISABLE, CUDA_DEVICE_MAX_CONNECTIONS and OMP_NUM_THREADS where they are not set, and
    one intra-op thread. Collectives time out after HELIX_HOST_TIMEOUT_S seconds (default 300).

    Raises:
        RuntimeError: a real GPU is available.
    """
    global _enabled
    if _enabled:
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            f"host mode was asked for, but this process has {torch.cuda.device_count()} usable CUDA devices, "
            "and host mode puts every tensor that Megatron wants on the GPU in host memory. Leave "
            "--helix-host-mode out, or hide the GPUs with CUDA_VISIBLE_DEVICES= before Python starts."
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(1)
    # Megatron first: it imports dynamo, which indexes torch's functions and refuses to see one twice
    from helix_megatron.host.megatron import patch_megatron

    torch.compiler.set_stance("force_eager")  # Megatron may have been imported, and compiled, before
    _enabled = True
    _patch_queries()
    _patch_streams()
    _patch_tensors()
    rng.patch_placement()
    _patch_groups()
    patch_megatron()


def _set(owner, **attributes) -> None:
    for name, value in attributes.items():
        setattr(owner, name, value)


def _nothing(*args, **kwargs) -> None:
    return None


def _always(value):
    return lambda *args, **kwargs: value


def _memory() -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")


def _patch_queries() -> None:
    # arguments.py, initialize.py, training.py, dynamic_context.py: one device, index 0. Compute capability
    # 8.0 has bf16 and none of the paths that are written for Hopper alone.
    _, total = _memory()
    properties = types.SimpleNamespace(
        name="host", major=8, minor=0, total_memory=total, multi_processor_count=os.cpu_count(), warp_size=32,
        max_threads_per_multi_processor=2048, shared_memory_per_block_optin=166912, L2_cache_size=40 * 2**20,
        uuid="host", is_integrated=1,
    )  # fmt: skip
    stats = defaultdict(int)  # training.py indexes memory_stats() with keys of the caching allocator
    shared = dict(  # asked of torch.cuda and, the device-neutral way, of torch.accelerator
        is_available=_always(True), device_count=_always(1), synchronize=_nothing, empty_cache=_nothing,
        set_stream=_nothing, memory_stats=lambda *args: stats.copy(), memory_allocated=_always(0),
        max_memory_allocated=_always(0), memory_reserved=_always(0), max_memory_reserved=_always(0),
        reset_peak_memory_stats=_nothing, get_device_capability=_always((8, 0)),
    )  # fmt: skip
    queries = shared | dict(
        is_initialized=_always(True), current_device=_always(0), set_device=_nothing, init=_nothing,
        get_device_name=_always("host"), get_device_properties=_always(properties), check_error=_nothing,
        is_bf16_supported=_always(True), _lazy_init=_nothing, _lazy_call=lambda call, **kwargs: call(),
        ipc_collect=_nothing, is_current_stream_capturing=_always(False), memory_summary=_always(""),
        default_generators=(rng.device_generator,), mem_get_info=lambda *args: _memory(),
        memory_snapshot=_always([]), utilization=_always(0), temperature=_always(0), power_draw=_always(0),
        clock_rate=_always(0), device_memory_used=_always(0), set_per_process_memory_fraction=_nothing,
        cudart=_always(types.SimpleNamespace(cudaProfilerStart=_always(0), cudaProfilerStop=_always(0))),
    )  # fmt: skip
    for module in (torch.cuda, torch.cuda.random, torch.cuda.memory, torch.cuda.graphs):
        for name, value in queries.items():
            if hasattr(module, name):  # the submodules bind the names they use
                setattr(module, name, value)
    _set(torch.cuda.nvtx, range_push=_nothing, range_pop=_nothing, mark=_nothing,
         range=lambda *args, **kwargs: contextlib.nullcontext())  # fmt: skip
    accelerator = shared | dict(  # torch itself (DataLoader, checkpoint) and Megatron-FSDP
        current_accelerator=_always(torch.device("cuda")), current_device_index=_always(0),
        current_device_idx=_always(0), set_device_index=_nothing, set_device_idx=_nothing,
        get_memory_info=lambda *args: _memory(), current_stream=lambda *args: HostStream.default,
    )  # fmt: skip
    for name, value in accelerator.items():
        if hasattr(torch.accelerator, name):
            setattr(torch.accelerator, name, value)


class HostStream:
    """A CUDA stream on the host: work is done when the call returns, so waiting for it is free."""

    default: "HostStream"
    device = torch.device("cuda", 0)
    device_index, device_type, stream_id, cuda_stream, priority = 0, 1, 0, 0, 0

    def __init__(self, *args, **kwargs):
        pass

    def record_event(self, event=None):
        """Record and return `event` (a new one by default)."""
        event = event or HostEvent()
        event.record()
        return event

    def query(self) -> bool:
        """All work is done."""
        return True

    def is_capturing(self) -> bool:
        """There are no CUDA graphs here (torch's optimizers ask)."""
        return False

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """One priority only."""
        return 0, 0

    synchronize = wait_stream = wait_event = _nothing

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


HostStream.default = HostStream()


class HostEvent:
    """A CUDA event on the host, with the time of its record (Megatron's timers subtract two of them)."""

    def __init__(self, *args, **kwargs):
        self._recorded_s = None

    def record(self, stream=None) -> None:
        """Take the time."""
        self._recorded_s = time.perf_counter()

    def elapsed_time(self, end: "HostEvent") -> float:
        """Milliseconds from this event to `end`."""
        return (end._recorded_s - self._recorded_s) * 1e3

    def query(self) -> bool:
        """The event has happened."""
        return True

    synchronize = wait = _nothing


def _patch_streams() -> None:
    # param_and_grad_buffer.py, p2p_communication.py, timers.py, dynamic_engine.py, the offloading code
    def null_context(*args, **kwargs):
        return contextlib.nullcontext()

    _set(torch.cuda, Stream=HostStream, ExternalStream=HostStream, Event=HostEvent, stream=null_context,
         current_stream=lambda *args: HostStream.default, default_stream=lambda *args: HostStream.default,
         set_stream=_nothing, device=null_context, device_of=null_context)  # fmt: skip
    for kind in ("Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool"):
        setattr(torch.cuda, kind + "Tensor", getattr(torch, kind + "Tensor"))


def _patch_tensors() -> None:
    tensor = torch.Tensor
    tensor_type = tensor.type

    def type_name(self, dtype=None, *args, **kwargs):
        # optimizer.py, distrib_optimizer.py and clip_grads.py branch on 'torch.cuda.HalfTensor'
        if dtype is None:
            return tensor_type(self).replace("torch.cuda.", "torch.").replace("torch.", "torch.cuda.")
        dtype = dtype.replace("torch.cuda.", "torch.") if isinstance(dtype, str) else dtype
        return tensor_type(self, dtype, *args, **kwargs)

    _set(
        tensor,
        cuda=lambda self, *args, **kwargs: self,
        cpu=lambda self, *args, **kwargs: self.clone(),  # a snapshot, as from a device (async save, staging)
        pin_memory=lambda self, *args, **kwargs: self,
        is_pinned=_always(True),
        record_stream=_nothing,
        get_device=_always(0),  # -1 for host tensors, which Megatron would use as an index
        type=type_name,
    )

    class AnyGenerator(type(torch.Generator)):
        def __instancecheck__(cls, instance):
            return isinstance(instance, generator)

    generator = torch.Generator

    class Generator(generator, metaclass=AnyGenerator):  # text_generation_controller.py: device='cuda'
        def __new__(cls, device="cpu"):
            return generator("cpu" if rng.is_device(device) else device)

    torch.Generator = Generator


def _patch_groups() -> None:
    c10d = torch.distributed.distributed_c10d
    limit = datetime.timedelta(seconds=float(os.environ.get("HELIX_HOST_TIMEOUT_S", "300")))

    def on_gloo(function, takes_backend_first=False):
        # parallel_state.py, initialize.py, hyper_comm_grid.py ask for nccl, a device, NCCL's options; a rank
        # that waits in vain should not wait gloo's 30 minutes
        def call(*args, **kwargs):
            if takes_backend_first and args:
                kwargs["backend"], args = args[0], args[1:]
            fake = c10d.is_initialized() and c10d.get_backend() == "fake"
            kwargs["backend"] = "fake" if fake or kwargs.get("backend") == "fake" else "gloo"
            for name in ("device_id", "pg_options"):
                kwargs.pop(name, None)
            given = kwargs.get("timeout")
            kwargs["timeout"] = limit if given is None else min(given, limit)
            return function(*args, **kwargs)

        return call

    barrier = c10d.barrier

    def host_barrier(group=None, async_op=False, device_ids=None):  # gloo refuses device_ids
        return barrier(group=group, async_op=async_op)

    patched = dict(
        init_process_group=on_gloo(c10d.init_process_group, takes_backend_first=True),
        new_group=on_gloo(c10d.new_group),
        new_subgroups_by_enumeration=on_gloo(c10d.new_subgroups_by_enumeration),
        barrier=host_barrier,
    )
    for module in (torch.distributed, c10d):
        _set(module, **patched)
    collectives.patch_collectives()
