"""Collectives that are under way until they are waited for, as on a GPU; host mode's are over at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor


class _UnderWay:
    """Reads what is sent and writes what is received as late as may be. It keeps neither alive."""

    def __init__(self, run: Callable[[Tensor, Tensor], Any], received: Tensor, sent: Tensor):
        self._run = run
        received.fill_(float("nan"))  # what is read too early
        self._buffers = [weakref.ref(x if x._base is None else x._base) for x in (received, sent)]

    def wait(self) -> bool:
        received, sent = (buffer() for buffer in self._buffers)
        assert received is not None, "what is received has been freed before it has arrived"
        assert sent is not None, "what is sent has been freed before it has arrived"
        with torch.no_grad():
            self._run(received.view(-1), sent.view(-1))
        return True


@contextmanager
def late_collectives() -> Iterator[list[int]]:
    """The exchange's collectives with `async_op` are late ones while entered; one entry for each."""
    started: list[int] = []

    def late(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(received: Tensor, sent: Tensor, *more: Any, async_op: bool = False, **group: Any) -> Any:
            if not async_op:
                return collective(received, sent, *more, **group)
            started.append(received.numel())
            return _UnderWay(lambda out, flat: collective(out, flat, *more, **group), received, sent)

        return call

    names = ("all_to_all_single", "all_gather_into_tensor")
    with mock.patch.multiple(dist, **{name: late(getattr(dist, name)) for name in names}):
        yield started
