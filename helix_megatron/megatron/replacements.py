"""Attributes of Megatron that are replaced, and put back in reverse order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Replacements:
    """What one feature has replaced; true while there is anything to put back."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._undo)

    def replace(self, target: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        """target.name = wrap(what it was)."""
        original = getattr(target, name)
        self._undo.append((target, name, original))
        setattr(target, name, wrap(original))

    def restore(self) -> None:
        """Put everything back."""
        while self._undo:
            target, name, original = self._undo.pop()
            setattr(target, name, original)
