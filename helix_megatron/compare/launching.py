"""Starts the ranks of one run: on this machine's CPU cores, or on GPUs through torch.distributed.run.

Both return (status, cause): status is ok, failed or timeout, cause is one line and empty when it is ok.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from helix_megatron.compare.config import CompareConfig
from helix_megatron.compare.measure import Task, run
from helix_megatron.host.processes import die_with_parent


def on_host(config: CompareConfig, task: Task, ranks: int) -> tuple[str, str]:
    """Ranks as processes of this machine; their output goes to the task's folder."""
    from helix_megatron.host.launcher import RankError, run_ranks

    limit = config.run_timeout_s
    try:
        run_ranks(run, ranks, task, timeout_s=limit, env=config.env_vars, log_dir=task.folder)
    except RankError as error:
        if error.exit_code == 124:
            return "timeout", _too_late(config)
        return "failed", first_error(Path(task.folder)) or str(error).splitlines()[0]
    except (OSError, ValueError) as error:  # the machine has no more processes, or does not let one go
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "ok", ""


def on_gpus(
    config: CompareConfig, task: Task, ranks: int, rendezvous: list[str], log: Path
) -> tuple[str, str]:
    """Ranks on this machine's GPUs, by torch.distributed.run; its output goes to `log`.

    With several machines each runs this with its own `rendezvous` flags; they meet in torchrun. A run that
    fits on one machine uses the first alone: the others must not call this (see `nodes_of`).
    """
    nodes = nodes_of(config, ranks)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}"]
    command += rendezvous if nodes > 1 else ["--standalone"]
    command += [f"--nproc-per-node={ranks // nodes}"]
    command += ["-m", "helix_megatron.compare.measure", json.dumps(asdict(task))]
    environment = {**os.environ, **config.env_vars}
    with open(log, "w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            code = process.wait(config.run_timeout_s)
        except subprocess.TimeoutExpired:
            return "timeout", _too_late(config)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        return "failed", first_error(Path(task.folder)) or f"exit code {code}; its output is in {log}"
    return "ok", ""


def nodes_of(config: CompareConfig, ranks: int) -> int:
    """How many machines a run of `ranks` needs. ValueError when it would not fill them."""
    per_node = config.world_size // config.nnodes
    nodes = -(-ranks // per_node)
    if nodes > config.nnodes or ranks % nodes:
        raise ValueError(f"{ranks} ranks do not fit {config.nnodes} machines of {per_node}.")
    return nodes


def _too_late(config: CompareConfig) -> str:
    return f"not done after {config.run_timeout_s:g} s and killed"


def first_error(folder: Path) -> str | None:
    """The cause that the first rank to fail wrote down, or None."""
    reports = [json.loads(path.read_text()) for path in folder.glob("error-*.json")]
    if not reports:
        return None
    first = min(reports, key=lambda item: item["time"])
    return f"rank {first['rank']}: {first['cause']}"
