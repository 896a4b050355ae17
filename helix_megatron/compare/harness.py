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
import logging
import shutil
import sys
import time
import warnings
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
from helix_megatron.compare.variants import PP, TP, Variant, per_slice_grid, smaller_heads
from helix_megatron.measure import machine
from helix_megatron.megatron import yaml_config
from helix_megatron.models import data

_DATA_FLAGS = (
    *("--data-path", "--mock-data", "--data-args-path", "--train-data-path", "--per-split-data-args-path"),
)
_NOT_ON_ONE_RANK = (
    *("--bf16", "--fp16", "--fp8-format", "--sequence-parallel"),
    *("--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"),
)


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
    known = megatron_flags()
    references = reference_variants(config) if config.reference else {}
    plan = {v.name: v for v in (*references.values(), *config.variants)}
    flags = {name: build_argv(config, v, out, known) for name, v in plan.items()}  # refuse before running
    for variant in plan.values():
        launch.nodes_of(config, config.ranks(variant))
    comparison = Comparison(config, out, console, options, nodes, plan, flags, references)
    if not nodes.leads:
        return comparison.follow()
    keeper = records.Records(out)
    with keeper.locked():
        comparison.lead(keeper)
        results = comparison.results(keeper)
        report.write(results, out)
        report.show(results, out, console)
    return report.exit_code(results)


def reference_variants(config: CompareConfig) -> dict[str, Variant]:
    """model key → the variant that runs it on one rank in fp32.

    Of a per-slice model that is Megatron with m times as many heads of 1/m of the dimension; there is none
    where the flags do not say the heads.
    """
    found: dict[str, Variant] = {}
    off = dict.fromkeys(_NOT_ON_ONE_RANK, False)
    single = {TP: 1, PP: 1, "--context-parallel-size": 1, "--skip-train": True}
    for variant in config.variants:
        given = {**config.model_args, **variant.args}
        grid = per_slice_grid(given, variant.attention_impl)
        heads = smaller_heads(given, grid[1]) if grid else {}
        key = config.model_key(variant)
        if key not in found and heads is not None:
            flags = {k: v for k, v in variant.args.items() if not k.startswith("--helix-")}
            name = f"fp32 reference of {variant.name}"
            found[key] = Variant(name, args={**flags, **off, **single, **heads}, may_fail=True, ranks=1)
    return found


@dataclass
class Comparison:
    """One call of `compare` on one machine."""

    config: CompareConfig
    out: Path
    console: Console
    options: Options
    nodes: launch.Nodes
    plan: dict[str, Variant]
    """Name → what is run: the variants and their references."""
    flags: dict[str, list[str]]
    references: dict[str, Variant]

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
            record |= {"identity": identity, "settings": self._settings(variant)}
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
            variant = self.plan[name]
            record = {"variant": name, "run": run, "status": status, "started": started, "cause": cause}
            record |= {"seconds": round(seconds, 2), "argv": self.flags[name], "identity": identity}
            record |= {"settings": self._settings(variant)} | ({"ranks": ranks} if ranks else {})
            keeper.save(record)
            if run == 1:
                self._say_end(record)

        runs, numbers = kept.KeptRuns(self.config, save), itertools.count(1)
        for group in kept.group_by_model(self.config):
            with runs.ending():
                for variant in group:
                    task = self._task(variant, 1)
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
            self._run(self.plan[name], run)
        self.nodes.wait_for_all()
        return 0

    def _schedule(self, done: dict[tuple[str, int], dict[str, Any]]) -> Iterator[tuple[int, Variant]]:
        """What is to run, in order; looks at `done` again for every run, so failures end their variant."""
        rounds = [(1, list(self.references.values()))]
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
            settings = {} if options.report_only else {v.name: self._settings(v) for v in self.plan.values()}
            here = None if options.report_only else identity
            records.check_comparable(list(found.values()), here, settings, self.out)

    def _work(self, variant: Variant) -> dict[str, Any]:
        """What a rank does in every run of this variant."""
        return {
            "host": self.config.host,
            "workloads": {w.name: [w.warmup_iterations, w.iterations] for w in self.config.workloads},
            "prompt_length": self.config.prompt_length,
            "batch_size": self.config.batch_size,
            "mixed_decode_steps": self.config.mixed_decode_steps,
            "slow_down": variant.slow_down,
        }

    def _settings(self, variant: Variant) -> dict[str, Any]:
        """What decides the numbers of a run of this variant."""
        flags = {k: v for k, v in self.config.flags(variant).items() if v is not False}
        ranks = self.config.ranks(variant)
        return {"flags": flags, "ranks": ranks, "env_vars": self.config.env_vars} | self._work(variant)

    def _task(self, variant: Variant, run: int) -> Task:
        config, of = self.config, variant
        key = next((k for k, v in self.references.items() if v.name == variant.name), None)
        if key is not None:  # this run is a reference itself, of the model of `of`
            of = next(v for v in config.variants if config.model_key(v) == key)
        grid = key and per_slice_grid({**config.model_args, **of.args}, of.attention_impl)
        reference = self.references.get(key or config.model_key(variant))
        path = self.out / "reference" / f"{records.file_name(reference.name)}.npy" if reference else None
        return Task(
            argv=self.flags[variant.name],
            folder=str(self.out / "work" / f"{records.file_name(variant.name)}.run-{run}"),
            reference=str(path) if path else None,
            reference_of=_dtype(config, of) if key is not None else None,
            reference_grid=list(grid) if grid else None,
            **self._work(variant),
        )

    def _run(self, variant: Variant, run: int, which: str = "") -> dict[str, Any]:
        """Launch one run and read what its ranks wrote: status, cause, seconds, and their raw samples.

        Machine 0 alone touches the run's folder: ranks start only when all machines have met.
        """
        task, config = self._task(variant, run), self.config
        ranks, folder = config.ranks(variant), Path(task.folder)
        if self.nodes.leads:
            self._make_folders(folder)
        started, start = _now(), time.monotonic()
        rest = "" if variant in self.references.values() else f", run {run} of {config.runs}"
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
        summary.add_variants(results, self.config, found, self.references)
        predictions.add_predictions(self.config, results)
        return results


def _with_turns(task: Task, turns: dict[str, Any]) -> Task:
    return replace(task, turns=turns)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _dtype(config: CompareConfig, variant: Variant) -> str:
    flags = config.flags(variant)
    return "bfloat16" if flags.get("--bf16") else "float16" if flags.get("--fp16") else "float32"


def megatron_flags() -> list[str]:
    """Every flag that Megatron's parser knows with Helix in it."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA on a host, it says
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron names the optional packages that are missing
        from helix_megatron.megatron import integrate

        integrate.install()
        return yaml_config.known_flags()


def build_argv(config: CompareConfig, variant: Variant, out: Path, known: list[str]) -> list[str]:
    """The variant's command line; writes the byte data set first when the model names no data of its own."""
    flags = config.flags(variant)
    if not any(flags.get(flag) for flag in _DATA_FLAGS):
        prefix = out / "data" / "text"
        data.write(prefix)
        tokens = {f"--{name}": value for name, value in data.TOKENIZER_ARGS.items()}
        flags = {**tokens, "--split": "99,1,0", **flags, "--data-path": str(prefix)}
        flags.setdefault("--data-cache-path", str(out / "data" / "cache"))
    return yaml_config.to_argv(flags, f"variant {variant.name}", known)
