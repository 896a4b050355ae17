"""Runs in turns: ranks are started once, and then measure in turns, A B, A B, …

    start   each variant by itself: it trains, infers, says what it holds; failures and refusals are rows
    turns   variants of the same model on as many ranks, until the intervals of their speed ratios are narrow

Only the variants of one model live at a time: sleeping ranks cost memory, and gloo's threads some time.
A turn is what a run in fresh processes is elsewhere: one record, one value of each measure; the others sleep.
What differs between two starts of the same program is not in an interval over turns.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from helix_megatron.compare import launch, stats, summary
from helix_megatron.compare.comparisons import pair_variants
from helix_megatron.compare.config import CompareConfig
from helix_megatron.compare.rank import Task, folder_of_turn
from helix_megatron.compare.turns import TurnServer
from helix_megatron.compare.variants import Variant

_PATIENCE_S = 30.0
"""How long ranks have to leave by themselves; their samples are on disk by then."""
MIN_TURNS = 5
"""Of fewer no interval is believed, however narrow."""


@dataclass
class KeptRanks:
    """The ranks of one variant, from their start to their end."""

    config: CompareConfig
    task: Task
    ranks: int
    wake: Callable[[], None]
    """Called when they have ended, whatever the outcome."""
    stop: threading.Event = field(default_factory=threading.Event)
    outcome: tuple[str, str] | None = None
    """(status, cause) once they have ended."""

    def start(self) -> None:
        self.thread = threading.Thread(target=self._run, name=self.task.folder)
        self.thread.start()

    def _run(self) -> None:
        self.outcome = launch.run_on_host(self.config, self.task, self.ranks, self.stop)
        self.wake()

    def end(self) -> tuple[str, str]:
        """Kill what still runs; (status, cause)."""
        self.stop.set()
        self.thread.join()
        assert self.outcome is not None
        return self.outcome

    def read(self, number: int) -> list[dict[str, Any]]:
        """What each rank wrote in a turn."""
        folder = folder_of_turn(Path(self.task.folder), number)
        return [summary.read_rank(folder / f"rank-{rank}.json") for rank in range(self.ranks)]


class KeptRuns:
    """The variants of one model after those of another."""

    def __init__(self, config: CompareConfig, save: Callable[..., None]) -> None:
        """save: called when one has ended: (variant's name, run, status, cause, seconds, ranks' samples)."""
        self.config, self.save = config, save
        self.server = TurnServer()
        self.kept: dict[str, KeptRanks] = {}

    @contextmanager
    def ending(self) -> Iterator[None]:
        """While entered, ranks may be started; afterwards none is left."""
        try:
            yield
        finally:
            for name in [*self.kept]:
                self.server.end(name)
            for name in [*self.kept]:
                self._leave(name)

    def start(self, name: str, task_with: Callable[[dict[str, Any]], Task], ranks: int) -> None:
        """Start a variant's ranks, and save their first run when they have done it.

        task_with: makes their task of what `Task.turns` is to be.
        """
        began = time.monotonic()
        task = task_with(self.server.place(name, ranks))
        kept = KeptRanks(self.config, task, ranks, functools.partial(self.server.wake, name))
        kept.start()
        self.kept[name] = kept
        self._save_turn(name, 1, began)

    def take_turns(self, found: Callable[[], dict[str, Any]]) -> None:
        """Turns of what is compared, until the intervals are narrow or the time is up.

        found: results.json as far as it has come.
        """
        pairs = [(a["name"], b["name"]) for a, b in pair_variants(found()) if a["name"] in self.kept]
        self._release({name for pair in pairs for name in pair})
        deadline = time.monotonic() + self.config.repeat_seconds
        seconds: dict[str, list[dict[str, float]]] = {}
        for run in range(1, self.config.runs + 1):
            for name in [*self.kept]:
                began = time.monotonic()
                folder_of_turn(Path(self.kept[name].task.folder), run).mkdir(exist_ok=True)
                self.server.start_turn(name)
                ranks = self._save_turn(name, run, began)
                if ranks is None:
                    return
                seconds.setdefault(name, []).append(iteration_seconds(ranks))
            if time.monotonic() > deadline or is_narrow(pairs, seconds, self.config.interval):
                return

    def _save_turn(self, name: str, run: int, began: float) -> list[dict[str, Any]] | None:
        """Wait for the turn and save it; of ranks that failed, what they died of, and None."""
        kept = self.kept[name]
        # they may die before, in and after the wait
        done = kept.outcome is None and self.server.wait_for_turn(name, self.config.run_timeout_s)
        if done and kept.outcome is None:
            ranks = kept.read(run)
            self.save(name, run, "ok", "", time.monotonic() - began, ranks)
            return ranks
        status, cause = self._leave(name, 0)
        self.save(name, run, status, cause, time.monotonic() - began, None)
        return None

    def _release(self, compared: set[str]) -> None:
        """Ranks that nothing is compared with go."""
        for name in [name for name in self.kept if name not in compared]:
            self.server.end(name)
            self._leave(name)

    def _leave(self, name: str, patience: float = _PATIENCE_S) -> tuple[str, str]:
        kept = self.kept.pop(name)
        kept.thread.join(patience)
        return kept.end()


def group_by_model(config: CompareConfig) -> list[list[Variant]]:
    """The variants that may stand beside each other, in the order of the file."""
    groups: dict[tuple[str, int], list[Variant]] = {}
    for variant in config.variants:
        groups.setdefault((config.model_key(variant), config.ranks(variant)), []).append(variant)
    return list(groups.values())


def iteration_seconds(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Workload → mean seconds of an iteration, of the slowest rank."""
    names = [name for name, work in ranks[0]["workloads"].items() if "cause" not in work]
    return {name: fmean(summary.slowest([r["workloads"][name] for r in ranks], "seconds")) for name in names}


def is_narrow(
    pairs: list[tuple[str, str]], seconds: dict[str, list[dict[str, float]]], interval: float
) -> bool:
    """Whether every ratio of speeds has a 95 % interval within 1 ± `interval` of it.

    seconds: variant → of each turn the seconds of each workload.
    """
    for own, other in pairs:
        turns = list(zip(seconds[own], seconds[other]))
        for workload in turns[0][0]:
            logs = [math.log(b[workload] / a[workload]) for a, b in turns if workload in b]
            if logs and (len(logs) < MIN_TURNS or stats.half_width(logs) > math.log1p(interval)):
                return False
    return True
