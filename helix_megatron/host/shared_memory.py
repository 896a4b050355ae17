"""Host mode: a piece of memory that the ranks of one group share, and the rounds in which they meet there.

Note [A round]
    Every rank puts its bytes into its own slot, raises its counter, waits until all counters have reached
    the same number, and reads the others' slots. There are two sets of slots in turn: whoever writes round
    k + 2 has seen all ranks arrive in round k + 1, so nobody still reads round k.

                    rank 0   rank 1   rank 2
        arrived        7        6        7       rank 1 has not come to round 7 yet; 0 and 2 sleep on its
        what           .        .        .       counter (a futex), no core is taken meanwhile
        slots, even   [  ]     [  ]     [  ]
        slots, odd    [  ]     [  ]     [  ]

The memory has no name (memfd), so nothing is left behind whatever becomes of the ranks. Counters are plain
stores: x86-64 keeps their order with the data's, other processors may not, so there `connect` gives None.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import secrets
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SLOT_BYTES = 2**20
_PAGE = 4096
_LINE = 64  # a counter has a cache line of its own
_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1  # x86-64
_LOOK_S = 1.0  # after so long, see whether those who are missing still live
_TOKEN = 16
KINDS = 8
Agree = Callable[[list[int]], list[list[int]]]


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def available() -> bool:
    """Whether this machine can do it, and the user has not switched it off (HELIX_HOST_SHARED_MEMORY=0)."""
    return (
        sys.platform == "linux"
        and platform.machine() == "x86_64"
        and os.environ.get("HELIX_HOST_SHARED_MEMORY", "1") != "0"
    )


class SharedMemoryGroup:
    """The shared memory of one group, as one of its ranks sees it.

    Args:
        memory: mapped, of `SharedMemoryGroup.size(ranks)` bytes.
        rank, ranks: of the group.
        limit_s: how long a rank waits for the others.
    """

    def __init__(self, memory: mmap.mmap, rank: int, ranks: int, limit_s: float):
        self.rank, self.ranks, self.limit_s = rank, ranks, limit_s
        self._pids = np.frombuffer(memory, np.uint32, ranks, _TOKEN)
        counters = (ctypes.c_uint32 * (ranks * _LINE // 4)).from_buffer(memory, _PAGE)
        self._counters = counters
        self._addresses = [ctypes.c_void_p(ctypes.addressof(counters) + r * _LINE) for r in range(ranks)]
        notes = np.frombuffer(memory, np.int64, 2 * ranks * (ranks + 1), _PAGE + ranks * _LINE)
        self._notes = notes.reshape(2, ranks, ranks + 1)
        slots = torch.frombuffer(
            memory, dtype=torch.uint8, offset=_data_start(ranks), count=2 * ranks * SLOT_BYTES
        )
        self._slots = {torch.uint8: slots.view(2, ranks, SLOT_BYTES)}
        self._round = 0
        self._futex = ctypes.CDLL(None, use_errno=True).syscall
        self._pids[rank] = os.getpid()

    @staticmethod
    def size(ranks: int) -> int:
        """Bytes of memory that a group of so many ranks shares; the system gives what is touched."""
        return _data_start(ranks) + 2 * ranks * SLOT_BYTES

    def swap(self, mine: Tensor, kind: int, sizes: Sequence[int] = ()) -> tuple[Tensor, Any]:
        """Show `mine` to the others and wait for theirs: ONE round.

        Args:
            mine: flat, contiguous, at most SLOT_BYTES.
            kind: a number for the collective, which must be equal on all ranks.
            sizes: at most `ranks` numbers that the others may want to know.
        Returns:
            [ranks, SLOT_BYTES / itemsize] slots and [ranks, ranks] sizes, views of the shared memory: to be
            read before this rank's next round but one.
        """
        self._round += 1
        turn, slots = self._round % 2, self._slots.get(mine.dtype)
        if slots is None:
            slots = self._slots[mine.dtype] = self._slots[torch.uint8].view(mine.dtype)
        if mine.numel():
            slots[turn, self.rank, : mine.numel()] = mine
        self._notes[turn, self.rank, 0] = kind
        self._notes[turn, self.rank, 1 : 1 + len(sizes)] = sizes
        self._counters[self.rank * _LINE // 4] = self._round
        self._futex(_FUTEX, self._addresses[self.rank], _FUTEX_WAKE, 2**31 - 1, None, None, 0)
        for other in range(self.ranks):
            if self._counters[other * _LINE // 4] < self._round:
                self._wait_for(other)
        notes = self._notes[turn]
        if (notes[:, 0] != kind).any():
            raise RuntimeError(
                "host mode: the ranks of a group do not call the same collective with the same sizes; kind "
                f"and bytes of rank 0, 1, ...: {', '.join(f'{k % KINDS} {k // KINDS}' for k in notes[:, 0])}"
            )
        return slots[turn], notes[:, 1:]

    def _wait_for(self, other: int) -> None:
        word, began = other * _LINE // 4, 0.0
        while (seen := self._counters[word]) < self._round:
            patience = _Timespec(int(_LOOK_S), int(_LOOK_S % 1 * 1e9))
            self._futex(_FUTEX, self._addresses[other], _FUTEX_WAIT, ctypes.c_uint32(seen),
                        ctypes.byref(patience), None, 0)  # fmt: skip
            if self._counters[word] != seen:
                continue
            now = time.monotonic()
            began = began or now
            if now - began > self.limit_s:
                raise RuntimeError(
                    f"host mode: rank {other} of a group of {self.ranks} has not come to a collective within "
                    f"{self.limit_s:.0f} s (HELIX_HOST_TIMEOUT_S)"
                )
            if now - began > _LOOK_S / 2 and not _alive(self._pids[other]):
                raise RuntimeError(
                    f"host mode: rank {other} of a group of {self.ranks} (process {self._pids[other]}) "
                    "has ended"
                )


def _data_start(ranks: int) -> int:
    return _PAGE + -(-ranks * (_LINE + 16 * (ranks + 1)) // _PAGE) * _PAGE


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def connect(rank: int, ranks: int, agree: Agree, limit_s: float) -> SharedMemoryGroup | None:
    """Make the memory of a group on its rank 0 and map it on all; None when one of them cannot.

    Args:
        agree: gathers one int64 vector of each rank, by other means; called alike on all ranks.
        limit_s: as SharedMemoryGroup.
    """
    offer, file = [0] * 4, -1
    if rank == 0 and available():
        file = os.memfd_create("helix-host-mode")
        os.ftruncate(file, SharedMemoryGroup.size(ranks))
        token = secrets.token_bytes(_TOKEN)
        os.pwrite(file, token, 0)
        offer = [os.getpid(), file, *struct.unpack("qq", token)]
    pid, theirs, *token_words = agree(offer)[0]
    memory = None
    if pid and available():
        size, token = SharedMemoryGroup.size(ranks), struct.pack("qq", *token_words)
        memory = _mapped(f"/proc/{pid}/fd/{theirs}", size, token)
    everybody = all(vector[0] for vector in agree([int(memory is not None), 0, 0, 0]))
    if file >= 0:
        os.close(file)
    return SharedMemoryGroup(memory, rank, ranks, limit_s) if everybody and memory is not None else None


def _mapped(path: str, size: int, token: bytes) -> mmap.mmap | None:
    """The file, if it is the one with this token: another machine's process may have the same number."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        if os.fstat(file).st_size != size or os.pread(file, len(token), 0) != token:
            return None
        return mmap.mmap(file, size)
    finally:
        os.close(file)
