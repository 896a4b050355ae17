"""Helix for Megatron: two-level tensor-parallel attention.

The names below are the public ones, loaded when they are used: `import helix_megatron` imports neither torch
nor Megatron.
"""

import importlib
from typing import Any

_PUBLIC = {
    "HelixConfig": "partition.config",
    "HelixConfigError": "partition.grid",
    "HelixGrid": "partition.grid",
    "HelixParallelSelfAttention": "megatron.self_attention",
    "get_helix_layer_local_spec": "megatron.specs",
    "get_helix_layer_with_transformer_engine_spec": "megatron.specs",
    "initialize_helix_parallel": "exchange.groups",
    "with_helix": "megatron.bridge",
    "with_helix_attention": "megatron.specs",
}
_MODULES = {"integrate": "megatron.integrate"}

__all__ = [*_PUBLIC, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"helix_megatron.{_PUBLIC[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"helix_megatron.{_MODULES[name]}")
    raise AttributeError(f"module 'helix_megatron' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
