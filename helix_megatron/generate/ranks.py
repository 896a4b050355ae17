"""The ranks of a command: started here on a machine without a GPU, torchrun's where there are GPUs."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from helix_megatron.megatron import entry

_TAIL = 6000  # characters of a rank's output that are shown when it fails


def silence_warnings() -> None:
    """No warnings of what Megatron would like to be installed, in this process and those it starts."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")


def under_torchrun() -> bool:
    """Whether this process is already a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def on_host() -> bool:
    """Whether there is no usable GPU. Asks the driver; host mode is not on in this process yet."""
    import torch

    return not torch.cuda.is_available()


def run(function: Callable[..., None], ranks: int, host: bool, *args: Any, timeout_s: float = 1e6) -> int:
    """Run `function(terminal, *args)` on every rank, `terminal` being the user's stdout on rank 0.

    Returns:
        The exit code: 0, 2 after a refusal in one line, else what the first failing rank left.

    Raises:
        ValueError: there is a GPU and no torchrun, or torchrun started another number of ranks.
    """
    if under_torchrun():
        return _as_a_rank(function, ranks, host, *args)
    if not host:
        raise ValueError(
            f"this machine has GPUs: start one process on each, torchrun --nproc-per-node {ranks} -m "
            f"helix_megatron.cli {shlex.join(sys.argv[1:])}"
        )
    from helix_megatron.host.launcher import RankError, run_ranks

    try:
        run_ranks(_rank, ranks, function, *args, timeout_s=timeout_s, show_rank0=True)
    except RankError as error:
        if error.message is None:
            print(error, file=sys.stderr)
            return error.exit_code
        print(f"helix: {error.message}", file=sys.stderr)
        return 2
    return 0


def _as_a_rank(function: Callable[..., None], ranks: int, host: bool, *args: Any) -> int:
    world = int(os.environ["WORLD_SIZE"])
    if world != ranks:
        raise ValueError(f"--tensor-model-parallel-size {ranks}, but torchrun started {world} processes.")
    if host:
        from helix_megatron.host.mode import enable_host_mode

        enable_host_mode()
    try:
        _rank(function, *args)
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            raise
        if os.environ["RANK"] == "0":
            print(f"helix: {stop.code}", file=sys.stderr)
        return 2
    return 0


def _rank(function: Callable[..., None], *args: Any) -> None:
    """One rank's work; a refusal becomes SystemExit(message)."""
    with redirect_output() as terminal:
        try:
            function(terminal, *args)
        except (ValueError, AssertionError) as error:
            message = entry.configuration_error(error)
            if message is None:
                raise
            raise SystemExit(message) from None


@contextlib.contextmanager
def redirect_output() -> Iterator[TextIO]:
    """Send what Megatron prints into a file, and give the real stdout; a failure shows the file's end."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as terminal, tempfile.TemporaryFile("w+") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        failed = True
        try:
            yield terminal
            failed = False
        except SystemExit:
            failed = False
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, old in zip((1, 2), kept, strict=True):
                os.dup2(old, fd)
                os.close(old)
            if failed:
                log.seek(0)
                print(log.read()[-_TAIL:], file=sys.stderr, flush=True)
