"""Placement and random streams of host mode: what `device='cuda'` means, and which stream a draw uses.

Megatron draws from two streams, which on a GPU machine are two devices: the *host* stream
(`torch.manual_seed`, `--use-cpu-initialization`) is the same on every tensor-parallel rank, the *device*
stream (`torch.cuda.manual_seed`, the model-parallel tracker, dropout) is not. On the host all tensors look
alike, so the call decides:

    call                                                        stream
    factory (torch.rand, randn, randperm, ...), device='cuda'    device
    factory without a device, or device='cpu'                    host
    dropout, multinomial, bernoulli(x), rand_like(x), ...        device (its inputs are activations)
    x.normal_(), nn.init.*_(x), ...  inside tracker.fork()       device (Megatron's GPU initialisation)
    x.normal_(), nn.init.*_(x), ...  elsewhere                   host   (Megatron's CPU initialisation)
    anything given a `generator`                                 that generator

With one stream for both, the draws of `--use-cpu-initialization` would be interleaved with per-rank device
draws and the weights would differ between tensor-parallel sizes.
"""

import contextlib
import threading

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

CPU = torch.device("cpu")
_DEVICE_SEED_SALT = 0x5DEECE66D  # the two streams must differ even when both are given the same seed
_state = threading.local()

_DEVICE_DRAWS = frozenset({
    "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "alpha_dropout_",
    "feature_dropout", "feature_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_",
    "native_dropout", "rrelu", "rrelu_", "gumbel_softmax", "bernoulli", "multinomial", "poisson",
    "binomial", "normal", "rand_like", "randn_like", "randint_like", "scaled_dot_product_attention",
    "multi_head_attention_forward",
})  # fmt: skip
_INPLACE_DRAWS = frozenset({
    "normal_", "uniform_", "trunc_normal_", "random_", "bernoulli_", "exponential_", "cauchy_",
    "geometric_", "log_normal_", "orthogonal_", "sparse_", "xavier_uniform_", "xavier_normal_",
    "kaiming_uniform_", "kaiming_normal_",
})  # fmt: skip
_FACTORY_DRAWS = frozenset({"rand", "randn", "randint", "randperm"})
_LOOKED_AT = frozenset({"to"}) | _DEVICE_DRAWS | _INPLACE_DRAWS  # whatever their keywords


class DeviceGenerator(torch.Generator):
    """The generator behind `torch.cuda.default_generators[0]` (host memory, its own Mersenne state)."""

    def manual_seed(self, seed):
        """Seed so that equal seeds give different host and device streams."""
        return super().manual_seed((int(seed) ^ _DEVICE_SEED_SALT) & 0xFFFF_FFFF_FFFF_FFFF)


device_generator = DeviceGenerator()


@contextlib.contextmanager
def device_stream():
    """Draws without a generator take from the device stream; the host stream is as before afterwards."""
    host = torch.default_generator
    saved = host.get_state()
    host.set_state(device_generator.get_state())
    try:
        yield
    finally:
        device_generator.set_state(host.get_state())
        host.set_state(saved)


def wrap_tracker_fork(fork):
    """`CudaRNGStatesTracker.fork` that counts its depth: in-place draws inside it use the device stream."""

    @contextlib.contextmanager
    def counted_fork(self, *args, **kwargs):
        with fork(self, *args, **kwargs):
            _state.forks = getattr(_state, "forks", 0) + 1
            try:
                yield
            finally:
                _state.forks -= 1

    return counted_fork


def is_device(device) -> bool:
    """Whether `device` (string, torch.device, integer or None) names the accelerator."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.split(":")[0] == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


class HostPlacement(TorchFunctionMode):
    """Puts every tensor asked for on 'cuda' in host memory and picks the stream of every random draw."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in _LOOKED_AT and "device" not in kwargs and "pin_memory" not in kwargs:
            return func(*args, **kwargs)  # nearly every call of a step, in a few hundred nanoseconds
        on_device = False
        if "device" in kwargs and is_device(kwargs["device"]):
            kwargs = {**kwargs, "device": CPU}
            on_device = True
        if kwargs.get("pin_memory"):  # dynamic_context.py: torch.full(..., device='cpu', pin_memory=True)
            kwargs = {**kwargs, "pin_memory": False}
        if name == "to" and len(args) > 1:
            if is_device(args[1]):
                args = (args[0], CPU, *args[2:])
            elif _names_host(args[1]):
                args, kwargs = (args[0], CPU, *args[2:]), _with_copy(args[2:], kwargs)
        elif name == "to" and _names_host(kwargs.get("device")) and not on_device:
            kwargs = _with_copy(args[1:], kwargs)
        if kwargs.get("generator") is None and _draws_on_device(name, on_device):
            with device_stream():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _names_host(device) -> bool:
    return isinstance(device, (str, torch.device)) and str(device) == "cpu"


def _with_copy(rest, kwargs):
    # x.to('cpu') of a device tensor is a snapshot: Megatron goes on to change x (async save, staging).
    # The positional form (device, dtype, non_blocking, copy) with four arguments has said what it wants.
    return kwargs if len(rest) >= 3 else {**kwargs, "copy": True}


def _draws_on_device(name: str, on_device: bool) -> bool:
    if name in _DEVICE_DRAWS:
        return True
    if name in _INPLACE_DRAWS:
        return getattr(_state, "forks", 0) > 0
    return on_device and name in _FACTORY_DRAWS


@contextlib.contextmanager
def placement():
    """Enter `HostPlacement` in this thread unless it is active already.

    Needed wherever torch has left it: new threads, and all that autograd's engine calls (a mode is off inside
    its own handler, and `loss.backward()` passes through the handler).
    """
    if any(isinstance(mode, HostPlacement) for mode in _get_current_function_mode_stack()):
        yield
        return
    with HostPlacement():
        yield
