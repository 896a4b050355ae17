"""What a section says while it runs, row by row into a file, and where its ranks run.

A row is a dict of JSON types: `case`, `status` (one of STATUSES), `detail` (one line), and what was measured.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATUSES = ("ok", "failed", "skipped", "warning", "measured")
NO_TIME = "no time was left"
_TO_TELL_S, _TO_START_S = 5.0, 30.0  # that a section keeps to say how ranks ended; that ranks need to start


class Rows:
    """Appends rows to a file; one that is written stays when the process dies.

    Args:
        path: JSON lines. Several processes may append, one after another.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)

    def add(self, case: str, status: str, detail: str = "", **measured: Any) -> None:
        """Write one row."""
        assert status in STATUSES, status
        row = {"case": case, "status": status, "detail": " ".join(detail.split()), **measured}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def begin(self, job: str) -> None:
        """Say which job the ranks work at from now on; see Place.run_each."""
        self._job.write_text(job, encoding="utf-8")

    def take_job(self) -> str:
        """The job that was begun last, once; empty: none was."""
        job = self._job.read_text(encoding="utf-8") if self._job.exists() else ""
        self._job.unlink(missing_ok=True)
        return job

    @property
    def _job(self) -> Path:
        return Path(f"{self.path}.job")


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file, without the last line if its writer died in it."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def first_line(error: BaseException) -> str:
    """What went wrong, in one line: of a rank's traceback the exception, without what it printed."""
    text = str(error).split("\n--- end of ")[0].strip()
    last = text.splitlines()[-1][:300] if text else ""
    return last if "Traceback" in text else f"{type(error).__name__}: {last}"


@dataclass(frozen=True)
class Place:
    """Where a section runs.

    Args:
        gpus: usable on this machine; 0: a host, in host mode.
        world: ranks of torchrun, of which this process is one; 0 where a section starts its own.
        quick: the small selection.
        seconds: that the section may take.
        until: when it is killed, on time.monotonic()'s clock, which a machine's processes share.
    """

    gpus: int
    world: int
    quick: bool
    seconds: float
    until: float = math.inf

    @property
    def on_host(self) -> bool:
        return not self.gpus

    def shares(self, ranks: int) -> bool:
        """Whether so many ranks take turns on one GPU."""
        return 0 < self.gpus < ranks

    def words(self, ranks: int) -> str:
        """How so many ranks run, in words."""
        if self.on_host:
            return f"{ranks} ranks in host mode"
        if ranks == 1:
            return "one rank on one GPU"
        return f"{ranks} ranks " + ("share one GPU" if self.shares(ranks) else "with a GPU each")

    @property
    def left_s(self) -> float:
        """Seconds for ranks that start now: they end before the section, which then says what they did."""
        return max(1.0, min(self.seconds, self.until - _TO_TELL_S - time.monotonic()))

    @property
    def has_time(self) -> bool:
        """Whether ranks that start now can do something before the section is killed."""
        return time.monotonic() + _TO_START_S < self.until

    def run_each(
        self, function: Callable[..., Any], ranks: int, rows: Rows, jobs: Sequence[str], *args: Any
    ) -> None:
        """`function(rows.path, jobs, *args)` on `ranks` ranks; where they die, again with the jobs behind.

        The job that ran, which `function` says on rank 0 by Rows.begin, is a failed row.
        """
        from helix_megatron.host.launcher import RankError

        left = list(jobs)
        while left:
            rows.take_job()
            try:
                self.run(function, ranks, rows.path, left, *args)
                return
            except RankError as error:
                print(error, flush=True)
                job = rows.take_job()
                rows.add(job or f"{ranks} ranks", "failed", first_line(error))
                behind = left[left.index(job) + 1 :] if job in left else []
                left = behind if self.has_time else []
                for name in behind[len(left) :]:
                    rows.add(name, "skipped", NO_TIME)

    def run(self, function: Callable[..., Any], ranks: int, *args: Any, **how: Any) -> list[Any]:
        """What `function(*args)` gives on each of `ranks` ranks; in torchrun, on this one alone.

        RankError as run_ranks.
        """
        if self.world:
            assert ranks == self.world
            if self.on_host:
                from helix_megatron.host.mode import enable_host_mode

                enable_host_mode()
            return [function(*args)]
        from helix_megatron.host.launcher import run_ranks

        how.setdefault("timeout_s", self.left_s)
        if not self.on_host:
            how.setdefault("env", {}).setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's wish, T > 1
        return run_ranks(
            function,
            ranks,
            *args,
            host_mode=self.on_host,
            share_gpu=self.shares(ranks),
            fresh=not self.on_host,
            **how,
        )
