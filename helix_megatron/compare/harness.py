"""Runs the variants of a comparison, again and again in turn, and keeps what each run gave.

    run 1: A B C …   run 2: A B C …   …       fresh processes every time

Interleaved like this, what drifts on the machine hits all variants alike. A variant that Megatron refuses,
that fails, or that is not done in time is a row with its cause, and is not tried again; the rest go on. Each
run is on disk as soon as it has ended (records.py); results.json and the reports are written anew after it.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from helix_megatron.compare import kept, launch, predictions, records, report, summary
from helix_megatron.compare.config import CompareConfig, to_json
from helix_megatron.compare.rank import Task
from helix_megatron.compare.tasks import RunPlan, plan_runs
from helix_megatron.compare.variants import Variant
from helix_megatron.measure import machine


@dataclass(frozen=True)
class Options:
    """What the command line says besides the file."""

    resume: bool = False
    """Go on after the runs that are on disk."""
    retry: bool = False
    """With resume: try failed runs again."""
    overwrite: bool = False
    """Delete the runs that are on disk."""
    allow_mixed: bool = False
    """Put runs of different machines, versions or settings together."""
    report_only: bool = False
    """Run nothing: write the reports of what is on disk."""
    node_rank: int = 0
    rdzv_endpoint: str | None = None


def compare(config: CompareConfig, out: Path, console: Console, options: Options) -> int:
    """Run what is missing, print and write the report; returns the exit code.

    Args:
        config: the comparison.
        out: folder for the reports, the runs, and a folder per run with the output of its ranks.
        console: where progress and the table go.
        options: as above.

    Returns 0; 1 when losses of the same model disagree; 3 when a variant did not finish (and may not fail).
    ValueError for what cannot be run, before anything is.
    """
    if config.host and config.nnodes > 1:
        raise ValueError(f"nnodes is {config.nnodes}: host mode runs on one machine.")
    if config.cluster:
        predictions.find_cluster(config)  # refuse a name that is none
    nodes = launch.Nodes(config.nnodes, options.node_rank, options.rdzv_endpoint)
    plan = plan_runs(config, out)  # which refuses before anything runs
    for variant in plan.variants.values():
        launch.nodes_of(config, config.ranks(variant))
    comparison = Comparison(plan, console, options, nodes)
    if not nodes.leads:
        return comparison.follow()
    keeper = records.Records(out)
    with keeper.locked():
        comparison.lead(keeper)
        results = comparison.results(keeper)
        report.write(results, out)
        report.show(results, out, console)
    return report.exit_code(results)


@dataclass
class Comparison:
    """One call of `compare` on one machine."""

    plan: RunPlan
    console: Console
    options: Options
    nodes: launch.Nodes

    @property
    def config(self) -> CompareConfig:
        return self.plan.config

    @property
    def out(self) -> Path:
        return self.plan.out

    def lead(self, keeper: records.Records) -> None:
        """Check what is on disk against the options, then run what is missing, run by run."""
        try:
            identity = machine.identity()
            self._check_disk(keeper, identity)
            if not self.options.report_only:
                self._run_missing(keeper, identity)
                if self.config.processes == "kept":
                    self._run_in_turns(keeper, identity)
        finally:
            self.nodes.send_order(None)
            self.nodes.wait_for_all()

    def _run_missing(self, keeper: records.Records, identity: dict[str, Any]) -> None:
        done = keeper.load()
        total = len(list(self._schedule(done)))
        for number, (run, variant) in enumerate(self._schedule(done), 1):
            self.nodes.send_order([variant.name, run])
            record = self._run(variant, run, f"{number} of {total}: ")
            record |= {"identity": identity, "settings": self.plan.settings(variant)}
            keeper.save(record)
            done[variant.name, run] = record
            self._say_end(record)
            report.write_results(self.results(keeper), self.out)

    def _run_in_turns(self, keeper: records.Records, identity: dict[str, Any]) -> None:
        """Start the ranks of every variant, then measure in turns (kept.py)."""
        started = _now()

        def save(
            name: str, run: int, status: str, cause: str, seconds: float, ranks: list[Any] | None
        ) -> None:
            variant = self.plan.variants[name]
            record = {"variant": name, "run": run, "status": status, "started": started, "cause": cause}
            record |= {"seconds": round(seconds, 2), "argv": self.plan.flags[name], "identity": identity}
            record |= {"settings": self.plan.settings(variant)} | ({"ranks": ranks} if ranks else {})
            keeper.save(record)
            if run == 1:
                self._say_end(record)

        runs, numbers = kept.KeptRuns(self.config, save), itertools.count(1)
        for group in kept.group_by_model(self.config):
            with runs.ending():
                for variant in group:
                    task = self.plan.task(variant, 1)
                    self._make_folders(Path(task.folder))
                    with self._status(f"{next(numbers)} of {len(self.config.variants)}: {variant.name}"):
                        ranks = self.config.ranks(variant)
                        runs.start(variant.name, functools.partial(_with_turns, task), ranks)
                if len(runs.kept) > 1:
                    with self._status(f"these in turns, at most {self.config.repeat_seconds:g} s"):
                        runs.take_turns(lambda: self.results(keeper))

    def _say_end(self, record: dict[str, Any]) -> None:
        if not self.config.overview:  # which says it all, at the end
            self.console.print(summary.describe_end(record), highlight=False, markup=False)

    @contextmanager
    def _status(self, said: str) -> Iterator[None]:
        """Show what is going on: a line that goes away, or one that stays where there is no terminal."""
        if self.config.overview and not self.console.is_terminal:
            self.console.print(said, highlight=False, markup=False)
        with self.console.status(escape(said)):
            yield

    def follow(self) -> int:
        """Another machine than the first: run what it says until it says no more."""
        while (order := self.nodes.receive_order()) is not None:
            name, run = order
            self._run(self.plan.variants[name], run)
        self.nodes.wait_for_all()
        return 0

    def _schedule(self, done: dict[tuple[str, int], dict[str, Any]]) -> Iterator[tuple[int, Variant]]:
        """What is to run, in order; looks at `done` again for every run, so failures end their variant."""
        rounds = [(1, list(self.plan.references.values()))]
        if self.config.processes == "fresh":
            rounds += [(run, list(self.config.variants)) for run in range(1, self.config.runs + 1)]
        for run, variants in rounds:
            for variant in variants:
                failed = any(d["status"] != "ok" for (name, _), d in done.items() if name == variant.name)
                if (variant.name, run) not in done and not failed:
                    yield run, variant

    def _check_disk(self, keeper: records.Records, identity: dict[str, Any]) -> None:
        """Resume, overwrite or refuse. ValueError as `records.check_comparable`, and for runs unasked."""
        options = self.options
        if options.overwrite:
            for folder in (keeper.folder, self.out / "work", self.out / "reference"):
                shutil.rmtree(folder, ignore_errors=True)
        found = keeper.load()
        if options.resume and self.config.processes == "kept":
            raise ValueError(
                f"{self.out}: with processes: kept there is nothing to resume, as its ranks have ended: "
                "--overwrite starts anew, --report writes the reports of what is there."
            )
        if found and not (options.resume or options.report_only):
            raise ValueError(
                f"{self.out} holds {len(found)} finished runs: --resume goes on after them, --overwrite "
                "deletes them, another --out leaves them alone."
            )
        if options.retry:
            for key in [key for key, record in found.items() if record["status"] != "ok"]:
                keeper.path(*key).unlink()
                del found[key]
        if not options.allow_mixed:
            here, settings = None, {}
            if not options.report_only:
                here = identity
                settings = {name: self.plan.settings(v) for name, v in self.plan.variants.items()}
            records.check_comparable(list(found.values()), here, settings, self.out)

    def _run(self, variant: Variant, run: int, which: str = "") -> dict[str, Any]:
        """Launch one run and read what its ranks wrote: status, cause, seconds, and their raw samples.

        Machine 0 alone touches the run's folder: ranks start only when all machines have met.
        """
        task, config = self.plan.task(variant, run), self.config
        ranks, folder = config.ranks(variant), Path(task.folder)
        if self.nodes.leads:
            self._make_folders(folder)
        started, start = _now(), time.monotonic()
        rest = "" if variant in self.plan.references.values() else f", run {run} of {config.runs}"
        with self._status(f"{which}{variant.name}{rest}"):
            if config.host:
                status, cause = launch.run_on_host(config, task, ranks)
            elif self.options.node_rank < launch.nodes_of(config, ranks):
                log = folder.with_name(f"{folder.name}.node-{self.options.node_rank}.log")
                meet = {"node-rank": self.options.node_rank, "rdzv-backend": "c10d", "rdzv-id": folder.name}
                meet["rdzv-endpoint"] = self.options.rdzv_endpoint
                flags = [f"--{flag}={value}" for flag, value in meet.items()]
                status, cause = launch.run_on_gpus(config, task, ranks, flags, log)
            else:
                status, cause = "ok", ""
        record: dict[str, Any] = {"variant": variant.name, "run": run, "status": status, "started": started}
        record |= {"seconds": round(time.monotonic() - start, 2), "cause": cause, "argv": task.argv}
        self.nodes.wait_for_all()
        if status == "ok" and self.nodes.leads:
            record["ranks"] = [summary.read_rank(folder / f"rank-{rank}.json") for rank in range(ranks)]
        return record

    def _make_folders(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (self.out / "reference").mkdir(exist_ok=True)

    def results(self, keeper: records.Records) -> dict[str, Any]:
        """results.json: everything about this comparison, as far as it has come."""
        found = keeper.load()
        identity = next(iter(found.values()))["identity"] if found else machine.identity()
        results: dict[str, Any] = {
            "schema": records.SCHEMA,
            "title": self.config.name,
            "kind": "measured",
            "written": _now(),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "where": "CPU cores, shared memory" if self.config.host else "GPUs, NCCL",
            **identity,
            "mixed": records.list_differences(list(found.values()), None),
            "config": to_json(self.config),
        }
        summary.add_variants(results, self.config, found, self.plan.references)
        predictions.add_predictions(self.config, results)
        return results


def _with_turns(task: Task, turns: dict[str, Any]) -> Task:
    return replace(task, turns=turns)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
