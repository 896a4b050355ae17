"""Runs a section in a fresh process that is killed at its limit, and says how it ended.

Note [Under torchrun]
    Every process of torchrun is a supervisor like the one without it. They meet in a store of their own: the
    first says which section comes, where its ranks will meet, and waits until all have ended theirs. Sections
    that do not span run under the first supervisor alone. A section's ranks must not use torchrun's own store
    (TORCHELASTIC_USE_AGENT_STORE), which still holds what the section before left there.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from helix_megatron.check.rows import Place, read_rows
from helix_megatron.check.sections import Section

_TORCHRUN = """RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT
    TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_RUN_ID""".split()
_TAIL = 1500  # characters of a dead section's output that are kept


@dataclass
class Outcome:
    """How a section ended: `status` is passed, failed or skipped, `reason` why, empty when it passed."""

    status: str
    reason: str
    seconds: float
    limit_s: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    output: str = ""
    """The end of what it printed, when it failed."""


def run_section(
    section: Section, place: Place, folder: Path, environment: Mapping[str, str] | None = None
) -> Outcome:
    """Run it here.

    Args:
        folder: gets NAME.jsonl, its rows, and NAME.log, what it and its ranks print.
        environment: of the section's process; without it this one's, and not a rank's of torchrun.
    """
    rows, log = folder / f"{section.name}.jsonl", folder / f"{section.name}.log"
    rows.unlink(missing_ok=True)
    if environment is None:
        environment = {name: value for name, value in os.environ.items() if name not in _TORCHRUN}
    command = [sys.executable, "-m", "helix_megatron.check.worker", section.function, str(rows)]
    start = time.monotonic()
    command.append(json.dumps(asdict(replace(place, until=start + place.seconds))))
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=dict(environment),
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(place.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # ranks are in groups of their own, and end when the section's process is gone
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - start
    found = read_rows(rows)
    status, reason = judge(code, found, place.seconds)
    tail = log.read_text(errors="replace")[-_TAIL:] if status == "failed" else ""
    return Outcome(status, reason, seconds, place.seconds, found, tail)


def judge(code: int | None, rows: list[dict[str, Any]], limit_s: float) -> tuple[str, str]:
    """(status, reason) from a section's exit code (None: it was killed at its limit) and its rows."""
    failed = [row for row in rows if row["status"] == "failed"]
    done = [row for row in rows if row["status"] in ("ok", "measured", "failed")]
    if code is None:
        return "failed", f"not done after {limit_s:g} s and killed; {len(rows)} rows are kept"
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return "failed", f"{failed[0]['case']}: {failed[0]['detail']}{more}"
    if code:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return "failed", f"its process {how}; {len(rows)} rows are kept"
    if not done:
        reasons = list(dict.fromkeys(row["detail"] for row in rows if row["status"] == "skipped"))
        return ("skipped", reasons[0]) if reasons else ("failed", "it ended without a result")
    return "passed", ""


class SingleSupervisor:
    """One supervisor, without torchrun."""

    first, world, local = True, 0, 0

    def run(self, section: Section, place: Place, folder: Path) -> Outcome | None:
        return run_section(section, place, folder)

    def end(self) -> None:
        pass


class TorchrunSupervisor:
    """One of torchrun's processes; see Note [Under torchrun]."""

    def __init__(self) -> None:
        from torch.distributed import TCPStore

        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local, self.first = int(os.environ["LOCAL_RANK"]), self.rank == 0
        self.number, long = 0, datetime.timedelta(days=1)
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = TCPStore(
            host, port, is_master=self.first and not agent, timeout=long, wait_for_workers=False
        )

    def run(self, section: Section, place: Place, folder: Path) -> Outcome | None:
        """What the first supervisor found; None in the others."""
        self.number += 1
        key = f"helix-check-{self.number}"
        if not section.spans:
            ended = run_section(section, place, folder) if self.first else None
            return self._meet(key, ended)
        if self.first:
            self._store.set(f"{key}-port", str(_free_port()))
        environment = {**os.environ, "MASTER_PORT": self._store.get(f"{key}-port").decode()}
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        return self._meet(key, run_section(section, place, folder, environment))

    def _meet(self, key: str, ended: Outcome | None) -> Outcome | None:
        """All: wait until every supervisor has ended the section. A failure on any rank is the section's."""
        words = f"{ended.status}\n{ended.reason}" if ended else "\n"
        self._store.set(f"{key}-{self.rank}", words)
        if ended is None or not self.first:
            self._store.wait([f"{key}-0"])
            return None
        for rank in range(1, self.world):
            status, _, reason = self._store.get(f"{key}-{rank}").decode().partition("\n")
            if status == "failed" and ended.status != "failed":
                ended.status, ended.reason = "failed", f"rank {rank}: {reason}"
        return ended

    def end(self) -> None:
        """The first stays until the others have read its last word."""
        self._store.set(f"helix-check-left-{self.rank}", "")
        if self.first:
            self._store.wait([f"helix-check-left-{rank}" for rank in range(self.world)])


def make_supervisor() -> SingleSupervisor | TorchrunSupervisor:
    """This process's part."""
    under_torchrun = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()
    return TorchrunSupervisor() if under_torchrun else SingleSupervisor()


def _free_port() -> int:
    with socket.socket() as holder:
        holder.bind(("", 0))
        return int(holder.getsockname()[1])
