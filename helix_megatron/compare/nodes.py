"""Several machines, one schedule: machine 0 says what runs next, the others follow.

Each machine starts torch.distributed.run by itself, so all must start the same run at the same time, also
after a failure or a resumption that only machine 0 knows of. They meet in a TCPStore beside torchrun's own
rendezvous, at the next port.
"""

from __future__ import annotations

import datetime
import json
from typing import Any

_LONG = datetime.timedelta(days=30)


class Nodes:
    """Machine `node_rank` of `nnodes`; with one machine nothing is opened and nothing waits."""

    def __init__(self, nnodes: int, node_rank: int, endpoint: str | None) -> None:
        """endpoint: HOST:PORT of torchrun's rendezvous. ValueError when it is missing or no address."""
        self.nnodes, self.node_rank, self.store, self.number = nnodes, node_rank, None, 0
        if nnodes == 1:
            return
        host, colon, port = (endpoint or "").rpartition(":")
        if not colon or not port.isdigit():
            given = f"; it is {endpoint!r}" if endpoint else ""
            raise ValueError(
                f"nnodes is {nnodes}: say where the machines meet, --rdzv-endpoint HOST:PORT{given}."
            )
        if not 0 <= node_rank < nnodes:
            raise ValueError(f"--node-rank is {node_rank}; with nnodes {nnodes} it is 0 to {nnodes - 1}.")
        from torch.distributed import TCPStore

        self.store = TCPStore(
            host, int(port) + 1, is_master=node_rank == 0, wait_for_workers=False, timeout=_LONG
        )

    @property
    def leads(self) -> bool:
        """Whether this machine decides, records and reports."""
        return self.node_rank == 0

    def tell(self, order: Any) -> None:
        """Machine 0: what all do next, as JSON types; None when there is nothing more."""
        if self.store is not None:
            self.store.set(f"order-{self.number}", json.dumps(order))
            self.number += 1

    def hear(self) -> Any:
        """The others: wait for the next order."""
        assert self.store is not None
        order = json.loads(self.store.get(f"order-{self.number}"))
        self.number += 1
        return order

    def done(self) -> None:
        """All: return when every machine has finished the last order."""
        if self.store is None:
            return
        self.store.set(f"done-{self.number}-{self.node_rank}", "")
        self.store.wait([f"done-{self.number}-{rank}" for rank in range(self.nnodes)], _LONG)
        if self.leads:  # the store lives here: the others must have read it before it goes
            self.store.wait([f"left-{self.number}-{rank}" for rank in range(1, self.nnodes)], _LONG)
        else:
            self.store.set(f"left-{self.number}-{self.node_rank}", "")
