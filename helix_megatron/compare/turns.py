"""Turns of ranks that stay alive: the harness says whose turn it is, everybody else sleeps.

Starting a rank costs seconds, an iteration milliseconds. So the ranks of all variants are started once, and
then measure in turns (A B, A B, …). All of it goes through one TCPStore, which lives in the harness:

    KEY/NUMBER        "go" or "end", set by the harness; the ranks of the variant KEY wait for it
    KEY/NUMBER/done   how many of them have finished turn NUMBER; turn 0 is their start
    KEY/NUMBER/ended  set by the last of them, or by the harness when they have died
"""

from __future__ import annotations

import datetime
from typing import Any

_LONG = datetime.timedelta(days=30)


class TurnServer:
    """The harness's side."""

    def __init__(self) -> None:
        from torch.distributed import TCPStore

        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_LONG)
        self.last: dict[str, int] = {}
        """Number of the turn that each variant has begun."""

    def place(self, key: str, ranks: int) -> dict[str, Any]:
        """What the `ranks` ranks of a variant need to take turns (plain JSON types)."""
        self.last[key] = 0
        return {"port": self.store.port, "key": key, "ranks": ranks}

    def start_turn(self, key: str) -> None:
        self.last[key] += 1
        self.store.set(f"{key}/{self.last[key]}", "go")

    def end(self, key: str) -> None:
        """No more turns: the variant's ranks return."""
        self.store.set(f"{key}/{self.last[key] + 1}", "end")

    def wait_for_turn(self, key: str, seconds: float) -> bool:
        """Return when all ranks have finished the turn that they have begun; False after `seconds`."""
        try:
            self.store.wait([f"{key}/{self.last[key]}/ended"], datetime.timedelta(seconds=seconds))
        except RuntimeError:
            return False
        return True

    def wake(self, key: str) -> None:
        """End the wait for a variant whose ranks have died: for another thread than the one that waits.

        It has a connection of its own: the waiting one is locked.
        """
        store = self.store.clone()
        store.set(f"{key}/{self.last[key]}/ended", "")


class TurnClient:
    """One rank's side."""

    def __init__(self, port: int, key: str, ranks: int) -> None:
        """As `TurnServer.place` says."""
        from torch.distributed import TCPStore

        self.store = TCPStore("127.0.0.1", port, is_master=False, timeout=_LONG)
        self.key, self.ranks, self.number = key, ranks, 0

    def finish_turn(self) -> None:
        """This rank is done with the turn."""
        if self.store.add(f"{self.key}/{self.number}/done", 1) == self.ranks:
            self.store.set(f"{self.key}/{self.number}/ended", "")

    def await_turn(self) -> bool:
        """Sleep until the next turn; False when there is none."""
        self.number += 1
        return self.store.get(f"{self.key}/{self.number}") == b"go"
