"""Start the ranks of a distributed run as real processes on this machine: import once, then fork.

`run_ranks` is for tests and scripts, `python -m helix_megatron.launch` is the host counterpart of torchrun:

    python -m helix_megatron.launch --nproc-per-node 4 pretrain.py --helix-host-mode <Megatron flags>
    python -m helix_megatron.launch --share-gpu --nproc-per-node 4 pretrain.py <Megatron flags>

A fork server imports torch and Megatron and ranks are forked from it: neither the caller's threads nor its
autograd state reach them, and they share the imported pages. Who ends whom: the caller kills its ranks, with
what they have started (each rank leads a process group); a rank whose caller is gone kills its own group.
SIGTERM is for the caller, and the fork server ignores it: batch systems and service managers send it to every
process of a job at once, and ranks die with the server that they are forked from.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import types

from helix_megatron.host.rank import run_rank

_PRELOAD = ["helix_megatron.host.preload", "helix_megatron.host.rank"]
_GRACE_S = 1.0  # how long, after one failure, reports of earlier ones may still arrive
_LOOK_S = 0.5  # how often it is asked whether to stop
_TAIL_BYTES = 4000


class RankError(RuntimeError):
    """A rank failed, died, or did not finish in time.

    Attributes:
        rank: the first one to fail, or the lowest one still running at a time-out.
        exit_code: what a launcher should exit with.
        message: the text of a `SystemExit("text")`, else None.
        log_tail: the end of the rank's output.
    """

    def __init__(self, text, rank, exit_code=1, message=None, log_tail=""):
        super().__init__(text)
        self.rank, self.exit_code, self.message, self.log_tail = rank, exit_code, message, log_tail


def run_ranks(
    function,
    world_size,
    *args,
    timeout_s=300,
    env=None,
    host_mode=True,
    log_dir=None,
    show_rank0=False,
    share_gpu=False,
    stop=None,
    fresh=False,
) -> list:
    """Run `function(*args)` in `world_size` processes and return what each returned, in rank order.

    Args:
        function: a top-level function (pickled by name). It finds RANK, WORLD_SIZE, LOCAL_RANK,
            LOCAL_WORLD_SIZE, MASTER_ADDR and a free MASTER_PORT in the environment, and calls
            init_process_group itself.
        world_size: number of ranks.
        args: pickled; so are the results (tensors by value).
        timeout_s: seconds until every rank is killed.
        env: variables to set in the ranks, besides the caller's; a value of None unsets one.
        host_mode: call `enable_host_mode()` in every rank first.
        log_dir: folder for rank_k.log, the output of rank k. Default: kept only until the ranks are done.
        show_rank0: leave rank 0's output on this terminal instead.
        share_gpu: all ranks use device 0 with real NCCL; see Note [Several ranks on one GPU] in rank.py.
        stop: a threading.Event; when another thread sets it, the time is out.
        fresh: ranks are fresh interpreters, as they are with a shared GPU; slower, and safe with CUDA.

    Raises:
        RankError: a rank raised, exited non-zero, was killed, or was still running after `timeout_s`; the
            other ranks are killed. The rank named is the first by time, not by index.
        ValueError: world_size < 1, or host mode with a shared GPU.
    """
    if share_gpu and host_mode:
        raise ValueError("share_gpu was given with host mode, which has no GPU: choose one of the two")
    if world_size < 1:
        raise ValueError(f"run_ranks was given world_size={world_size}: at least one rank is needed")
    folder = str(log_dir) if log_dir is not None else tempfile.mkdtemp(prefix="helix_ranks_")
    os.makedirs(folder, exist_ok=True)
    payload = pickle.dumps((function, args))
    reserved = _reserved_port()
    environment = _rank_environment(world_size, reserved.getsockname()[1], env)
    context = multiprocessing.get_context("spawn" if share_gpu or fresh else "forkserver")
    if not (share_gpu or fresh):
        context.set_forkserver_preload(_PRELOAD)
    ranks = []
    with _terminate_as_exception():
        try:
            with _main_hidden(function):
                for rank in range(world_size):
                    log = None if rank == 0 and show_rank0 else os.path.join(folder, f"rank_{rank}.log")
                    ranks.append(_Rank(context, rank, log, (payload, environment, host_mode, share_gpu)))
            return _collect(ranks, timeout_s, stop)
        finally:
            _end(ranks)
            reserved.close()
            if log_dir is None:
                shutil.rmtree(folder, ignore_errors=True)


class _Rank:
    """One started process, its connection, and what is known of it."""

    def __init__(self, context, rank, log, job):
        self.rank, self.log = rank, log
        self.connection, theirs = context.Pipe()
        self.report = None  # ("ok", pickled value) or ("error", time, traceback or None, exit code, message)
        self.died = False
        self.process = context.Process(target=run_rank, args=(rank, theirs, log, *job), name=f"rank {rank}")
        self.process.start()
        theirs.close()

    def read(self) -> None:
        """Take the report, or note that there will be none."""
        if self.report is not None or self.died:
            return
        ended = multiprocessing.connection.wait([self.process.sentinel], timeout=0)  # asked before the report
        try:
            if self.connection.poll():
                self.report = self.connection.recv()
            elif ended:  # what it has started may keep its end of the connection open
                self.died = True
        except (EOFError, ConnectionError):
            self.died = True

    @property
    def signs(self) -> list:
        """What `multiprocessing.connection.wait` waits for: a report, or the end of the process."""
        return [self.connection, self.process.sentinel]

    @property
    def failed(self) -> bool:
        return self.died or (self.report is not None and self.report[0] == "error")

    def tail(self) -> str:
        if self.log is None or not os.path.exists(self.log):
            return ""
        with open(self.log, "rb") as file:
            file.seek(max(0, os.path.getsize(self.log) - _TAIL_BYTES))
            return file.read().decode(errors="replace")

    def error(self) -> RankError:
        """The exception for a failed rank."""
        tail = self.tail()
        shown = f"\n--- end of its output ---\n{tail}" if tail else ""
        if self.died:
            self.process.join(5)
            code = self.process.exitcode
            killed = code is not None and code < 0
            how = f"was killed by {signal.Signals(-code).name}" if killed else f"exited with code {code}"
            text = f"rank {self.rank} {how} without returning{shown}"
            return RankError(text, self.rank, exit_code=128 - code if killed else code or 1, log_tail=tail)
        _, _, trace, code, message = self.report
        text = f"rank {self.rank} failed:\n{trace}{shown}"
        if trace is None:
            text = message or f"rank {self.rank} exited with code {code}{shown}"
        return RankError(text, self.rank, code, message, tail)


def _collect(ranks, timeout_s, stop=None) -> list:
    start = time.monotonic()
    while True:
        waiting = [rank for rank in ranks if rank.report is None and not rank.died]
        if any(rank.failed for rank in ranks):
            raise _first_failure(ranks).error()
        if not waiting:
            break
        spent = time.monotonic() - start
        if spent >= timeout_s or (stop is not None and stop.is_set()):
            after = timeout_s if spent >= timeout_s else round(spent, 1)
            names = ", ".join(str(rank.rank) for rank in waiting)
            shown = [rank for rank in waiting[:2] if rank.log]
            tails = "".join(f"\n--- end of rank {rank.rank}'s output ---\n{rank.tail()}" for rank in shown)
            raise RankError(
                f"after {after} s, still running of {len(ranks)} ranks: {names}; all were killed{tails}",
                waiting[0].rank,
                exit_code=124,
            )
        left = timeout_s - spent if stop is None else min(timeout_s - spent, _LOOK_S)
        multiprocessing.connection.wait([sign for rank in waiting for sign in rank.signs], timeout=left)
        for rank in waiting:
            rank.read()
    return [pickle.loads(rank.report[1]) for rank in ranks]


def _first_failure(ranks) -> _Rank:
    # A rank that dies makes its peers fail at their next collective, within milliseconds. Errors carry the
    # time they were raised; a rank that died without a word was not made to by the others: it comes first.
    end = time.monotonic() + _GRACE_S
    while (left := end - time.monotonic()) > 0:
        waiting = [rank for rank in ranks if rank.report is None and not rank.died]
        signs = [sign for rank in waiting for sign in rank.signs]
        if not signs or not multiprocessing.connection.wait(signs, timeout=left):
            break
        for rank in waiting:
            rank.read()
    failed = [rank for rank in ranks if rank.failed]
    first = min(failed, key=lambda rank: (not rank.died, 0 if rank.died else rank.report[1]))
    if not first.died and first.report[2] is None:  # all exit together: the lowest speaks
        same = [rank for rank in failed if not rank.died and rank.report[2:] == first.report[2:]]
        return min(same, key=lambda rank: rank.rank)
    return first


def _end(ranks) -> None:
    for rank in ranks:
        if rank.report is None or rank.report[0] != "ok":
            _kill_group(rank.process.pid)
        rank.connection.close()  # a rank that has returned waits for this
    for rank in ranks:
        rank.process.join(10)
        _kill_group(rank.process.pid)  # what the rank has started, and the rank if it would not leave
        rank.process.join(10)
        if not rank.process.is_alive():  # a killed one may take its time: not worth hiding the report
            rank.process.close()


def _kill_group(pid) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _terminate_as_exception():
    # SIGTERM would end this process without the finally clause that kills the ranks
    def stop(number, frame):
        raise SystemExit(128 + number)

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _main_hidden(function):
    # multiprocessing runs the caller's main file in every child (pytest, or a script without a main guard);
    # only a function that lives there needs that
    if function.__module__ == "__main__":
        yield
        return
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _reserved_port() -> socket.socket:
    # While this is bound, and as it does not listen, rank 0 can listen there and the kernel gives the port to
    # nobody who asks for any: a port that is merely free now may be another program's when rank 0 is ready.
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def _rank_environment(world_size, port, env) -> dict:
    variables = dict(os.environ)
    size = str(world_size)
    variables.update(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for name, value in (env or {}).items():
        if value is None:
            variables.pop(name, None)
        else:
            variables[name] = str(value)
    return variables
