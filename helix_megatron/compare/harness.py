"""Launches the variants of a comparison one after the other and keeps what each of them gave.

A variant that Megatron refuses, that fails, or that is not done in time is an entry with its cause; the
rest go on. `results.json` and `report.md` are written anew after every variant.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from helix_megatron import data, yaml_config
from helix_megatron.compare import findings, launching, report
from helix_megatron.compare.config import CompareConfig, Variant, as_json
from helix_megatron.compare.measure import Task

_DATA_FLAGS = (
    "--data-path",
    "--mock-data",
    "--data-args-path",
    "--train-data-path",
    "--per-split-data-args-path",
)


def compare(
    config: CompareConfig, out: Path, console: Console, torchrun: list[str], node_rank: int = 0
) -> int:
    """Run every variant, print and write the report; returns the exit code.

    Args:
        config: the comparison.
        out: folder for results.json, report.md and a folder per variant with the output of its ranks.
        console: where progress and the table go.
        torchrun: further flags for torch.distributed.run (GPU runs).
        node_rank: this machine's number; only machine 0 reports.

    Returns 0; 1 when losses of the same model disagree; 3 when a variant did not finish (and may not fail).
    """
    out.mkdir(parents=True, exist_ok=True)
    known = megatron_flags()
    flags = {
        v.name: argv_of(config, v, out, known) for v in config.variants
    }  # refuse before running anything
    results: dict[str, Any] = {
        "title": config.name,
        "kind": "measured",
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "where": "CPU cores, gloo" if config.host else "GPUs, NCCL",
        "versions": versions(),
        "hardware": hardware(),
        "git_revision": git_revision(),
        "config": as_json(config),
        "bytes_mean": report.BYTES_MEAN,
        "variants": [],
    }
    for number, variant in enumerate(config.variants, 1):
        folder = out / f"{number:02d}"
        task = Task(
            argv=flags[variant.name],
            folder=str(folder),
            host=config.host,
            **{
                key: getattr(config, key)
                for key in Task.__dataclass_fields__
                if hasattr(config, key) and key != "host"
            },
        )
        label = f"[{number}/{len(config.variants)}] {variant.name}"
        entry = run_variant(config, task, label, console, torchrun, node_rank)
        if node_rank:
            continue
        entry |= {"name": variant.name, "attention_impl": variant.attention_impl, "argv": task.argv}
        entry |= {"model": config.model_key(variant), "may_fail": variant.may_fail}
        results["variants"].append(entry)
        report.complete(results)
        write(results, out)
        console.print(report.one_line(entry, label), highlight=False)
    if node_rank:
        return 0
    console.print(report.table(results))
    for line in findings.findings(results):
        console.print(line, highlight=False)
    console.print(f"Everything: {out / 'results.json'}, {out / 'report.md'}", highlight=False)
    return report.exit_code(results)


def megatron_flags() -> list[str]:
    """Every flag that Megatron's parser knows with Helix in it."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA on a host, it says
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron names the optional packages that are missing
        from helix_megatron import integrate

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


def run_variant(
    config: CompareConfig, task: Task, label: str, console: Console, torchrun: list[str], node_rank: int
) -> dict[str, Any]:
    """Launch one variant and read what its ranks wrote: status, cause, seconds, and their raw samples.

    Machine 0 alone touches the variant's folder: ranks start only when all machines have met.
    """
    folder = Path(task.folder)
    if node_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    start = time.monotonic()
    with shown_progress(folder, label, console):
        if config.host:
            status, cause = launching.on_host(config, task)
        else:
            log = folder.with_name(f"{folder.name}-node-{node_rank}.log")
            status, cause = launching.on_gpus(config, task, torchrun, log)
    entry: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 2)}
    if status != "ok":
        return entry | {"cause": cause}
    if node_rank:
        return entry
    paths = [folder / f"rank-{rank}.json" for rank in range(config.world_size)]
    return entry | {"ranks": [json.loads(path.read_text()) for path in paths]}


@contextmanager
def shown_progress(folder: Path, label: str, console: Console) -> Iterator[None]:
    """A line with the variant, the stage its rank 0 is in, and the time, while entered."""
    stop, quiet = threading.Event(), not console.is_terminal
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[stage]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=quiet) as progress:
        line = progress.add_task(label, total=None, stage="launching")

        def follow() -> None:
            while not stop.wait(0.2):
                stage = folder / "progress"
                if stage.exists():
                    progress.update(line, stage=stage.read_text())

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def write(results: dict[str, Any], out: Path) -> None:
    """results.json and report.md, each written beside its place and renamed."""
    for name, text in (
        ("results.json", json.dumps(results, indent=1)),
        ("report.md", report.markdown(results)),
    ):
        new = out / f".{name}.new"
        new.write_text(text, encoding="utf-8")
        os.replace(new, out / name)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for name in ("helix-megatron", "megatron-core", "torch", "numpy", "transformer-engine"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores and memory of this machine, and its GPUs."""
    import psutil
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "memory_bytes": psutil.virtual_memory().total, "gpus": gpus}


def git_revision() -> str:
    """Commit of the source, marked when the tree has changes; 'unknown' outside a checkout."""
    here = Path(__file__).parent
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision + (" with local changes" if changed.strip() else "")
