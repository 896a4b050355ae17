"""Starts the ranks of one run, on CPU cores or on GPUs, and keeps several machines in step.

Each machine starts torch.distributed.run by itself, so all must start the same run at the same time, also
after a failure or a resumption that only machine 0 knows of. They meet in a TCPStore beside torchrun's own
rendezvous, at the next port: machine 0 says what runs next, the others follow.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helix_megatron.compare.config import CompareConfig
from helix_megatron.compare.rank import Task, run
from helix_megatron.host.launcher import RankError, run_ranks
from helix_megatron.host.processes import die_with_parent

_LONG = datetime.timedelta(days=30)


def run_on_host(
    config: CompareConfig, task: Task, ranks: int, stop: threading.Event | None = None
) -> tuple[str, str]:
    """Ranks as processes of this machine; their output goes to the task's folder.

    They have `run_timeout_s`, or until `stop` is set, where it is given.

    Returns (status, cause), as `run_on_gpus`: ok, failed or timeout, and one line, empty when it is ok.
    """
    try:
        limit = config.run_timeout_s if stop is None else threading.TIMEOUT_MAX
        run_ranks(
            run, ranks, task, timeout_s=limit, env=config.env_vars, log_dir=task.folder, stop=stop
        )  # fmt: skip
    except RankError as error:
        if error.exit_code == 124:
            return _time_out(config)
        return "failed", first_error(Path(task.folder)) or str(error).splitlines()[0]
    except (OSError, ValueError) as error:  # the machine has no more processes, or does not let one go
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "ok", ""


def run_on_gpus(
    config: CompareConfig, task: Task, ranks: int, rendezvous: list[str], log: Path
) -> tuple[str, str]:
    """Ranks on this machine's GPUs, by torch.distributed.run; its output goes to `log`.

    With several machines each runs this with its own `rendezvous` flags; they meet in torchrun. A run that
    fits on one machine uses the first alone: the others must not call this (see `nodes_of`).
    """
    nodes = nodes_of(config, ranks)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}"]
    command += rendezvous if nodes > 1 else ["--standalone"]
    command += [f"--nproc-per-node={ranks // nodes}", "-m", "helix_megatron.compare.rank"]
    command += [json.dumps(asdict(task))]
    with open(log, "w") as output:
        environment = {**os.environ, **config.env_vars}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment,
                                   start_new_session=True, preexec_fn=die_with_parent)  # fmt: skip
        try:
            code = process.wait(config.run_timeout_s)
        except subprocess.TimeoutExpired:
            return _time_out(config)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        return "failed", first_error(Path(task.folder)) or f"exit code {code}; its output is in {log}"
    return "ok", ""


def _time_out(config: CompareConfig) -> tuple[str, str]:
    return "timeout", f"not done after {config.run_timeout_s:g} s and killed"


def nodes_of(config: CompareConfig, ranks: int) -> int:
    """How many machines a run of `ranks` needs. ValueError when it would not fill them."""
    per_node = config.world_size // config.nnodes
    nodes = -(-ranks // per_node)
    if nodes > config.nnodes or ranks % nodes:
        raise ValueError(f"{ranks} ranks do not fit {config.nnodes} machines of {per_node}.")
    return nodes


def first_error(folder: Path) -> str | None:
    """The cause that the first rank to fail wrote down, or None."""
    reports = [json.loads(path.read_text()) for path in folder.glob("error-*.json")]
    first = min(reports, key=lambda item: item["time"], default=None)
    return first and f"rank {first['rank']}: {first['cause']}"


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

        how: dict[str, Any] = {"is_master": self.leads, "wait_for_workers": False, "timeout": _LONG}
        self.store = TCPStore(host, int(port) + 1, **how)

    @property
    def leads(self) -> bool:
        """Whether this machine decides, records and reports."""
        return self.node_rank == 0

    def send_order(self, order: Any) -> None:
        """Machine 0: what all do next, as JSON types; None when there is nothing more."""
        if self.store is not None:
            self.store.set(f"order-{self.number}", json.dumps(order))
            self.number += 1

    def receive_order(self) -> Any:
        """The others: wait for the next order."""
        assert self.store is not None
        self.number += 1
        return json.loads(self.store.get(f"order-{self.number - 1}"))

    def wait_for_all(self) -> None:
        """All: return when every machine has finished the last order."""
        if self.store is None:
            return
        self.store.set(f"done-{self.number}-{self.node_rank}", "")
        self.store.wait([f"done-{self.number}-{rank}" for rank in range(self.nnodes)], _LONG)
        if self.leads:  # the store lives here: the others must have read it before it goes
            self.store.wait([f"left-{self.number}-{rank}" for rank in range(1, self.nnodes)], _LONG)
        else:
            self.store.set(f"left-{self.number}-{self.node_rank}", "")
