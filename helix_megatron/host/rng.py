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
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._device import DeviceContext, _device_constructors

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
    "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_",
    "geometric_", "log_normal_",
})  # fmt: skip
_FACTORY_DRAWS = frozenset({"rand", "randn", "randint", "randperm"})
_LIKE = frozenset({"rand_like", "randn_like", "randint_like"})


class DeviceGenerator(torch.Generator):
    """The generator behind `torch.cuda.default_generators[0]` (host memory, its own Mersenne state)."""

    def manual_seed(self, seed):
        """Seed so that equal seeds give different host and device streams."""
        return super().manual_seed((int(seed) ^ _DEVICE_SEED_SALT) & 0xFFFF_FFFF_FFFF_FFFF)


device_generator = DeviceGenerator()


@contextlib.contextmanager
def device_stream():
    """Draws without a generator take from the device stream; the host stream is as before afterwards."""
    if getattr(_state, "on_device", False):  # a draw that is made of draws
        yield
        return
    host = torch.default_generator
    saved = host.get_state()
    host.set_state(device_generator.get_state())
    _state.on_device = True
    try:
        yield
    finally:
        _state.on_device = False
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


def patch_placement() -> None:
    """Replace torch's factory functions, random draws and `Tensor.to` by ones that know what 'cuda' is here.

    Replaced are the few functions of which it depends on the call, so that all others cost what they cost
    (a TorchFunctionMode sees every call, some microseconds each, and is off inside autograd and in threads).
    """
    constructors = _device_constructors()  # torch keeps what it finds at its first call
    tensor, functional = torch.Tensor, torch.nn.functional
    for owner in (torch, torch.fft):
        for name, function in list(vars(owner).items()):
            if name.endswith("_like") or (callable(function) and function in constructors):
                setattr(owner, name, _placed(function))
    for name in ("new_tensor", "new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"):
        setattr(tensor, name, _placed(getattr(tensor, name)))
    for owner in (torch, functional, tensor):
        for name in _DEVICE_DRAWS - _LIKE:
            if hasattr(owner, name):
                setattr(owner, name, _drawn(getattr(owner, name), lambda: True))
    for name in _INPLACE_DRAWS:
        setattr(tensor, name, _drawn(getattr(tensor, name), lambda: getattr(_state, "forks", 0) > 0))
    tensor.to = _moved(tensor.to)
    initialize = DeviceContext.__init__
    DeviceContext.__init__ = lambda self, device: initialize(self, CPU if is_device(device) else device)


def _placed(factory: Callable) -> Callable:
    name = factory.__name__
    always, on_request = name in _LIKE, name in _FACTORY_DRAWS

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        on_device = "device" in kwargs and is_device(kwargs["device"])
        if on_device:
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):  # dynamic_context.py: torch.full(..., device='cpu', pin_memory=True)
            kwargs["pin_memory"] = False
        if (always or (on_request and on_device)) and kwargs.get("generator") is None:
            with device_stream():
                return factory(*args, **kwargs)
        return factory(*args, **kwargs)

    return call


def _drawn(draw: Callable, on_device: Callable[[], bool]) -> Callable:
    @functools.wraps(draw)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and is_device(kwargs["device"]):  # torch.normal has one
            kwargs["device"] = CPU
        given = (*args, *kwargs.values())
        if has_torch_function(given):  # torch's causal masks know scaled_dot_product_attention by its name
            return handle_torch_function(call, given, *args, **kwargs)
        if kwargs.get("generator") is None and on_device():
            with device_stream():
                return draw(*args, **kwargs)
        return draw(*args, **kwargs)

    return call


def _moved(to: Callable) -> Callable:
    @functools.wraps(to)
    def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        where = args[0] if args else kwargs.get("device")
        if isinstance(where, torch.dtype | torch.Tensor) or where is None:
            return to(self, *args, **kwargs)
        rest = args[1:]
        if _names_host(where):
            kwargs = _with_copy(rest, kwargs)
        elif not is_device(where):
            return to(self, *args, **kwargs)
        if args:
            return to(self, CPU, *rest, **kwargs)
        return to(self, **{**kwargs, "device": CPU})

    return call


def _names_host(device) -> bool:
    return isinstance(device, (str, torch.device)) and str(device) == "cpu"


def _with_copy(rest, kwargs):
    # x.to('cpu') of a device tensor is a snapshot: Megatron goes on to change x (async save, staging).
    # The positional form (device, dtype, non_blocking, copy) with four arguments has said what it wants.
    return kwargs if len(rest) >= 3 else {**kwargs, "copy": True}
