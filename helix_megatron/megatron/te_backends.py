"""Transformer Engine's choice of an attention kernel, remembered for every shape and window.

It keeps its last choice alone, and looks through all its kernels anew when a call differs from the last one.
The chunks of a share of the positions differ at every call, the same ones in every layer and step. A choice
is put back only as the last one: Transformer Engine still compares all that it was made for with the call,
and chooses anew where anything differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

_MODULE = "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention"
_MOST = 256  # shapes; then they are forgotten
_kept: dict[Hashable, dict[str, Any]] = {}


def last_choice() -> dict[str, Any] | None:
    """Transformer Engine's last choice, which it reads before it chooses; None where none is found."""
    found = getattr(sys.modules.get(_MODULE), "_attention_backends", None)
    return found if isinstance(found, dict) and "backend_selection_requires_update" in found else None


def with_choice_of(shape: Hashable, attend: Callable[[], Tensor]) -> Tensor:
    """A call of Transformer Engine's attention, with what it chose for this shape put back before."""
    choice = last_choice()
    if choice is None:
        return attend()
    if choice["backend_selection_requires_update"] or len(_kept) > _MOST:  # the environment has changed
        _kept.clear()
    elif shape in _kept:
        choice.update(_kept[shape])
    out = attend()
    _kept[shape] = dict(choice)
    return out
