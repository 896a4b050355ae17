"""Starts the ranks of one variant: on this machine's CPU cores, or on GPUs through torch.distributed.run.

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


def on_host(config: CompareConfig, task: Task) -> tuple[str, str]:
    """Ranks as processes of this machine; their output goes to the task's folder."""
    from helix_megatron.launch import RankError, run_ranks

    limit = config.variant_timeout_s
    try:
        run_ranks(run, config.world_size, task, timeout_s=limit, env=config.env_vars, log_dir=task.folder)
    except RankError as error:
        if error.exit_code == 124:
            return "timeout", _too_late(config)
        return "failed", first_error(Path(task.folder)) or str(error).splitlines()[0]
    return "ok", ""


def on_gpus(config: CompareConfig, task: Task, torchrun: list[str], log: Path) -> tuple[str, str]:
    """Ranks on this machine's GPUs, by torch.distributed.run with the further flags `torchrun`.

    Output goes to `log`. With several machines each runs this with its own flags; they meet in torchrun.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={config.nnodes}", *torchrun]
    command += [f"--nproc-per-node={config.world_size // config.nnodes}"]
    command += ["-m", "helix_megatron.compare.measure", json.dumps(asdict(task))]
    environment = {**os.environ, **config.env_vars}
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            code = process.wait(config.variant_timeout_s)
        except subprocess.TimeoutExpired:
            return "timeout", _too_late(config)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        return "failed", first_error(Path(task.folder)) or f"exit code {code}; its output is in {log}"
    return "ok", ""


def _too_late(config: CompareConfig) -> str:
    return f"not done after {config.variant_timeout_s:g} s and killed"


def first_error(folder: Path) -> str | None:
    """The cause that the first rank to fail wrote down, or None."""
    reports = [json.loads(path.read_text()) for path in folder.glob("error-*.json")]
    if not reports:
        return None
    first = min(reports, key=lambda item: item["time"])
    return f"rank {first['rank']}: {first['cause']}"
