"""One rank that `run_ranks` has started: its environment, its output, its report, and who ends it.

Note [Several ranks on one GPU]
    NCCL refuses two ranks on one device of one host. With a NCCL_HOSTID of its own every rank is a host of
    its own, and the ranks meet over the loopback interface. What they compute is what several GPUs compute;
    how long it takes means nothing, since they take turns on the device. Such ranks are fresh interpreters:
    a CUDA context does not survive a fork.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback

from helix_megatron.host.processes import die_with_parent


def shared_gpu_environment(rank: int) -> dict[str, str]:
    """What makes NCCL take ranks on one device for ranks of different hosts."""
    return {
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "NCCL_HOSTID": f"helix-rank-{rank}",
        "NCCL_NET": "Socket",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
        "NCCL_MAX_NCHANNELS": "2",  # every channel of every rank takes multiprocessors of the one device
        "NCCL_MAX_CTAS": "2",
    }


def run_rank(rank, connection, log, payload, environment, host_mode, share_gpu) -> None:
    """The whole life of one rank."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which the fork server ignores
    die_with_parent()
    os.setpgid(0, 0)
    released = _watch_caller(connection)
    multiprocessing.set_start_method("fork", force=True)  # what a rank would have without a fork server
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    if share_gpu:
        os.environ.update(shared_gpu_environment(rank))
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it when TP > 1
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
    import torch

    torch.set_num_threads(1)
    try:
        if host_mode:
            from helix_megatron.host.mode import enable_host_mode

            enable_host_mode()
        function, args = pickle.loads(payload)
        report = ("ok", pickle.dumps(function(*args)))
    except SystemExit as stop:
        message = stop.code if isinstance(stop.code, str) else None
        code = 1 if message is not None else int(stop.code or 0)
        report = ("ok", pickle.dumps(None))
        if code:
            report = ("error", time.monotonic(), None, code, message)
    except BaseException:
        report = ("error", time.monotonic(), traceback.format_exc(), 1, None)
    sys.stdout.flush()
    sys.stderr.flush()
    released.expected = True
    with contextlib.suppress(OSError):
        connection.send(report)
        if report[0] == "ok":  # peers may still need this rank's store and connections
            released.wait()


def _watch_caller(connection) -> threading.Event:
    """Kill this process group when the caller is gone, unless `expected` is set on the event returned."""
    released = threading.Event()
    released.expected = False

    def watch():
        with contextlib.suppress(EOFError, OSError):
            connection.recv()  # nothing is ever sent: this ends when the caller closes its end, or dies
        if not released.expected:
            os.killpg(0, signal.SIGKILL)
        released.set()

    threading.Thread(target=watch, daemon=True, name="caller watch").start()
    return released
