"""Runs the variants of a comparison, again and again in turn, and keeps what each run gave.

    run 1: A B C …   run 2: A B C …   …       fresh processes every time

Interleaved like this, what drifts on the machine hits all variants alike. A variant that Megatron refuses,
that fails, or that is not done in time is a row with its cause, and is not tried again; the rest go on. Each
run is on disk as soon as it has ended (records.py); results.json and the reports are written anew after it.
"""

from __future__ import annotations

import datetime
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from helix_megatron.compare import launching, machine, predicted, records, reporting, summary
from helix_megatron.compare.config import CompareConfig, as_json
from helix_megatron.compare.measure import Task
from helix_megatron.compare.nodes import Nodes
from helix_megatron.compare.progress import Progress
from helix_megatron.compare.variants import PP, TP, Variant, per_slice_grid, smaller_heads
from helix_megatron.megatron import yaml_config
from helix_megatron.models import data

_DATA_FLAGS = (
    "--data-path",
    "--mock-data",
    "--data-args-path",
    "--train-data-path",
    "--per-split-data-args-path",
)


_NOT_ON_ONE_RANK = (
    "--bf16",
    "--fp16",
    "--fp8-format",
    "--sequence-parallel",
    "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank",
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
        predicted.cluster(config)  # refuse a name that is none
    nodes = Nodes(config.nnodes, options.node_rank, options.rdzv_endpoint)
    known = megatron_flags()
    reference_runs = references(config) if config.reference else {}
    plan = {v.name: v for v in (*reference_runs.values(), *config.variants)}
    flags = {name: argv_of(config, v, out, known) for name, v in plan.items()}  # refuse before running
    for variant in plan.values():
        launching.nodes_of(config, config.ranks(variant))
    session = Session(config, out, console, options, nodes, plan, flags, reference_runs)
    if not nodes.leads:
        return session.follow()
    keeper = records.Records(out)
    with keeper.locked():
        session.lead(keeper)
        results = session.results(keeper)
        reporting.write(results, out)
        reporting.show(results, out, console)
    return reporting.exit_code(results)


def references(config: CompareConfig) -> dict[str, Variant]:
    """model key → the variant that runs it on one rank in fp32.

    Of a per-slice model that is Megatron with m times as many heads of 1/m of the dimension; there is none
    where the flags do not say the heads.
    """
    found: dict[str, Variant] = {}
    for variant in config.variants:
        key = config.model_key(variant)
        if key in found:
            continue
        given = {**config.model_args, **variant.args}
        grid = per_slice_grid(given, variant.attention_impl)
        heads = smaller_heads(given, grid[1]) if grid else {}
        if heads is None:
            continue
        flags = {k: v for k, v in variant.args.items() if not k.startswith("--helix-")}
        off = dict.fromkeys(_NOT_ON_ONE_RANK, False)
        single = {TP: 1, PP: 1, "--context-parallel-size": 1, "--skip-train": True}
        name = f"fp32 reference of {variant.name}"
        found[key] = Variant(name, args={**flags, **off, **single, **heads}, may_fail=True, ranks=1)
    return found


@dataclass
class Session:
    """One call of `compare` on one machine."""

    config: CompareConfig
    out: Path
    console: Console
    options: Options
    nodes: Nodes
    plan: dict[str, Variant]
    flags: dict[str, list[str]]
    reference_runs: dict[str, Variant]

    def lead(self, keeper: records.Records) -> None:
        """Check what is on disk against the options, then run what is missing, run by run."""
        try:
            identity = machine.identity()
            self._check_disk(keeper, identity)
            if not self.options.report_only:
                self._run_missing(keeper, identity)
        finally:
            self.nodes.tell(None)
            self.nodes.done()

    def _run_missing(self, keeper: records.Records, identity: dict[str, Any]) -> None:
        done = keeper.load()
        with Progress(self.console, len(list(self._schedule(done)))) as progress:
            for run, variant in self._schedule(done):
                self.nodes.tell([variant.name, run])
                record = self._run(variant, run, progress)
                record |= {"identity": identity, "settings": self.settings(variant)}
                keeper.save(record)
                done[variant.name, run] = record
                progress.ended(record)
                reporting.write_data(self.results(keeper), self.out)

    def follow(self) -> int:
        """Another machine than the first: run what it says until it says no more."""
        with Progress(self.console, None) as progress:
            while (order := self.nodes.hear()) is not None:
                name, run = order
                self._run(self.plan[name], run, progress)
        self.nodes.done()
        return 0

    def _schedule(self, done: dict[tuple[str, int], dict[str, Any]]) -> Iterator[tuple[int, Variant]]:
        """What is to run, in order; looks at `done` again for every run, so failures end their variant."""
        rounds = [(1, list(self.reference_runs.values()))]
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
        if found and not (options.resume or options.report_only):
            raise ValueError(
                f"{self.out} holds {len(found)} finished runs: --resume goes on after them, --overwrite "
                "deletes them, another --out leaves them alone."
            )
        if options.retry:
            for key, record in found.items():
                if record["status"] != "ok":
                    keeper.path(*key).unlink()
            found = keeper.load()
        if not options.allow_mixed:
            settings = {} if options.report_only else {v.name: self.settings(v) for v in self.plan.values()}
            here = None if options.report_only else identity
            records.check_comparable(list(found.values()), here, settings, self.out)

    def settings(self, variant: Variant) -> dict[str, Any]:
        """What decides the numbers of a run of this variant."""
        config = self.config
        return {
            "flags": {k: v for k, v in config.flags(variant).items() if v is not False},
            "ranks": config.ranks(variant),
            "host": config.host,
            "env_vars": config.env_vars,
            "workloads": {w.name: [w.warmup_iterations, w.iterations] for w in config.workloads},
            "prompt_length": config.prompt_length,
            "batch_size": config.batch_size,
            "mixed_decode_steps": config.mixed_decode_steps,
            "slow_down": variant.slow_down,
        }

    def _task(self, variant: Variant, run: int) -> Task:
        config = self.config
        key = config.model_key(variant)
        dtype = grid = None
        if variant.name in {v.name for v in self.reference_runs.values()}:
            key = next(k for k, v in self.reference_runs.items() if v.name == variant.name)
            of = next(v for v in config.variants if config.model_key(v) == key)
            dtype = _dtype(config, of)
            grid = per_slice_grid({**config.model_args, **of.args}, of.attention_impl)
        reference = self.reference_runs.get(key)
        path = self.out / "reference" / f"{records.slug(reference.name)}.npy" if reference else None
        return Task(
            argv=self.flags[variant.name],
            folder=str(self.out / "work" / f"{records.slug(variant.name)}.run-{run}"),
            host=config.host,
            workloads={w.name: [w.warmup_iterations, w.iterations] for w in config.workloads},
            prompt_length=config.prompt_length,
            batch_size=config.batch_size,
            mixed_decode_steps=config.mixed_decode_steps,
            slow_down=variant.slow_down,
            reference=str(path) if path else None,
            reference_of=dtype,
            reference_grid=list(grid) if grid else None,
        )

    def _run(self, variant: Variant, run: int, progress: Progress) -> dict[str, Any]:
        """Launch one run and read what its ranks wrote: status, cause, seconds, and their raw samples.

        Machine 0 alone touches the run's folder: ranks start only when all machines have met.
        """
        task, config = self._task(variant, run), self.config
        ranks, folder = config.ranks(variant), Path(task.folder)
        if self.nodes.leads:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (self.out / "reference").mkdir(exist_ok=True)
        started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        start = time.monotonic()
        with progress.running(variant.name, run, config.runs, folder):
            if config.host:
                status, cause = launching.on_host(config, task, ranks)
            elif self.options.node_rank < launching.nodes_of(config, ranks):
                log = folder.with_name(f"{folder.name}.node-{self.options.node_rank}.log")
                status, cause = launching.on_gpus(config, task, ranks, self._rendezvous(variant, run), log)
            else:
                status, cause = "ok", ""
        record: dict[str, Any] = {"variant": variant.name, "run": run, "status": status, "started": started}
        record |= {"seconds": round(time.monotonic() - start, 2), "cause": cause, "argv": task.argv}
        self.nodes.done()
        if status == "ok" and self.nodes.leads:
            paths = [folder / f"rank-{rank}.json" for rank in range(ranks)]
            record["ranks"] = [summary.read_rank(path) for path in paths]
        return record

    def _rendezvous(self, variant: Variant, run: int) -> list[str]:
        return [
            f"--node-rank={self.options.node_rank}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.options.rdzv_endpoint}",
            f"--rdzv-id={records.slug(variant.name)}.{run}",
        ]

    def results(self, keeper: records.Records) -> dict[str, Any]:
        """results.json: everything about this comparison, as far as it has come."""
        found = keeper.load()
        mixed = records.differences(list(found.values()), None)
        identity = next(iter(found.values()))["identity"] if found else machine.identity()
        results: dict[str, Any] = {
            "schema": records.SCHEMA,
            "title": self.config.name,
            "kind": "measured",
            "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "where": "CPU cores, shared memory" if self.config.host else "GPUs, NCCL",
            **identity,
            "mixed": mixed,
            "config": as_json(self.config),
        }
        summary.complete(results, self.config, found, self.reference_runs)
        predicted.add(self.config, results)
        return results


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


def argv_of(config: CompareConfig, variant: Variant, out: Path, known: list[str]) -> list[str]:
    """The variant's command line; writes the byte data set first when the model names no data of its own."""
    flags = config.flags(variant)
    if not any(flags.get(flag) for flag in _DATA_FLAGS):
        prefix = out / "data" / "text"
        data.write(prefix)
        tokens = {f"--{name}": value for name, value in data.TOKENIZER_ARGS.items()}
        flags = {**tokens, "--split": "99,1,0", **flags, "--data-path": str(prefix)}
        flags.setdefault("--data-cache-path", str(out / "data" / "cache"))
    return yaml_config.to_argv(flags, f"variant {variant.name}", known)


def only(config: CompareConfig, names: list[str], where: str) -> CompareConfig:
    """The comparison with the named variants alone. ValueError with the nearest name for an unknown one."""
    known = [variant.name for variant in config.variants]
    for name in names:
        if name not in known:
            close = yaml_config.nearest(name, known)
            raise ValueError(f"{where} has no variant {name!r}{close} It has: {known}.")
    return replace(config, variants=tuple(v for v in config.variants if v.name in names)) if names else config
