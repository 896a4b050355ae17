"""The launcher: results in rank order, the first failure named, nothing left behind, whatever happens."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helix_megatron.host.launch_command import main
from helix_megatron.host.launcher import RankError, run_ranks

PATIENCE_S = 150  # for what takes a second or two on an idle machine


def pss_mib():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def is_gone(pid):
    """Wait for a killed process to leave; the fork server reaps it."""
    for _ in range(300):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":  # dead; only its parent has not asked yet
            return True
        time.sleep(0.1)
    return False


def record(folder):
    """Leave this rank's process id and that of a child it starts, which would run on for long."""
    child = subprocess.Popen(["sleep", "600"])
    Path(folder, f"pids_{os.environ['RANK']}").write_text(f"{os.getpid()} {child.pid}")


def recorded(folder):
    return [int(pid) for file in Path(folder).glob("pids_*") for pid in file.read_text().split()]


def rank_environment(*args):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "EXTRA", "HOME")
    return [os.environ.get(name) for name in names], os.getcwd(), args


def test_results_environment_and_arguments(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    results = run_ranks(rank_environment, 3, 1, "a", env={"EXTRA": 5, "HOME": None}, host_mode=False)
    for rank, (values, folder, args) in enumerate(results):
        assert values == [str(rank), "3", str(rank), "3", "127.0.0.1", "5", None]
        assert (folder, args) == (str(tmp_path), (1, "a"))
    monkeypatch.setenv("EXTRA", "changed after the fork server started")
    assert run_ranks(rank_environment, 1, host_mode=False)[0][0][5].startswith("changed")


def rank_memory():
    import torch
    from megatron.core import parallel_state

    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel(16)
    x = torch.ones(1, device="cuda")
    torch.distributed.all_reduce(x)
    mine = pss_mib()
    torch.distributed.barrier()  # nobody leaves, and gives up shared pages, before all have looked
    return x.item(), mine


def test_sixteen_ranks_are_small():
    run_ranks(rank_environment, 1, host_mode=False)  # the fork server is up
    start = time.monotonic()
    results = run_ranks(rank_memory, 16, timeout_s=PATIENCE_S)
    took = time.monotonic() - start
    assert [total for total, _ in results] == [16.0] * 16
    mean = sum(pss for _, pss in results) / 16
    print(f"16 ranks: {took:.1f} s, {mean:.0f} MiB PSS each")
    assert mean < 180


def rank_exchanges_tensors(x):
    import torch

    return x + torch.ones(2), {"host": torch.cuda.is_available()}


def test_tensors_travel_by_value():
    import torch

    (value, state), _ = run_ranks(rank_exchanges_tensors, 2, torch.zeros(2))
    assert value.tolist() == [1.0, 1.0] and state == {"host": True}


def rank_fails(folder, guilty, delay):
    import torch

    record(folder)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    if rank == guilty:
        time.sleep(delay)
        print("about to fail")
        raise ArithmeticError("one plus one")
    torch.distributed.all_reduce(torch.ones(1))


@pytest.mark.parametrize("guilty", [0, 2])
def test_the_first_failing_rank_is_named(tmp_path, guilty):
    with pytest.raises(RankError) as caught:
        run_ranks(rank_fails, 4, str(tmp_path), guilty, 1.0, host_mode=False, timeout_s=PATIENCE_S)
    assert caught.value.rank == guilty and caught.value.exit_code == 1
    assert f"rank {guilty} failed" in str(caught.value) and "rank_fails" in str(caught.value)
    assert "ArithmeticError: one plus one" in str(caught.value)
    assert "about to fail" in caught.value.log_tail
    assert len(recorded(tmp_path)) == 8 and all(is_gone(pid) for pid in recorded(tmp_path))


def rank_dies(folder, guilty):
    import torch

    record(folder)
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == guilty:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(1))


def test_a_killed_rank_is_named(tmp_path):
    with pytest.raises(RankError, match="rank 1 was killed by SIGKILL") as caught:
        run_ranks(rank_dies, 3, str(tmp_path), 1, host_mode=False, timeout_s=PATIENCE_S)
    assert caught.value.exit_code == 128 + signal.SIGKILL
    assert len(recorded(tmp_path)) == 6 and all(is_gone(pid) for pid in recorded(tmp_path))


def rank_dies_with_workers(folder):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    worker.start()  # inherits the rank's connection to the caller
    Path(folder, "pids_0").write_text(f"{os.getpid()} {worker.pid}")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_rank_with_forked_workers_is_noticed(tmp_path):
    with pytest.raises(RankError, match="rank 0 was killed by SIGKILL"):
        run_ranks(rank_dies_with_workers, 1, str(tmp_path), host_mode=False, timeout_s=60)
    assert len(recorded(tmp_path)) == 2 and all(is_gone(pid) for pid in recorded(tmp_path))


def rank_hangs(folder):
    record(folder)
    print("before the hang", flush=True)
    if os.environ["RANK"] != "0":
        time.sleep(600)


def test_a_hanging_rank_is_ended(tmp_path):
    run_ranks(rank_environment, 1, host_mode=False)
    start = time.monotonic()
    with pytest.raises(RankError, match="after 8 s, still running of 3 ranks: 1, 2") as caught:
        run_ranks(rank_hangs, 3, str(tmp_path), timeout_s=8, host_mode=False)
    assert caught.value.exit_code == 124 and "before the hang" in str(caught.value)
    assert time.monotonic() - start < 60
    assert len(recorded(tmp_path)) == 6 and all(is_gone(pid) for pid in recorded(tmp_path))


def rank_exits(code):
    sys.exit(code)


def test_exit_codes():
    assert run_ranks(rank_exits, 2, None, host_mode=False) == [None, None]
    with pytest.raises(RankError, match="rank 0 exited with code 7") as caught:
        run_ranks(rank_exits, 2, 7, host_mode=False)
    assert (caught.value.exit_code, caught.value.message) == (7, None)
    with pytest.raises(RankError) as caught:
        run_ranks(rank_exits, 2, "the grid does not fit", host_mode=False)
    assert (caught.value.exit_code, caught.value.message) == (1, "the grid does not fit")
    with pytest.raises(ValueError, match="world_size=0"):
        run_ranks(rank_exits, 0, None)


def rank_returns_early(folder):
    import torch

    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 1:
        time.sleep(2)  # rank 0, which has the store, has returned
        torch.distributed.distributed_c10d._get_default_store().add("late", 1)
    return record(folder)


def test_a_rank_that_returns_waits_for_the_others(tmp_path):
    run_ranks(rank_returns_early, 2, str(tmp_path), host_mode=False, timeout_s=PATIENCE_S)
    assert len(recorded(tmp_path)) == 4 and all(is_gone(pid) for pid in recorded(tmp_path))  # children too


CALLER = """
import sys
sys.path.insert(0, {root!r})
from helix_megatron.host.launcher import run_ranks
from tests.host.test_launch import rank_hangs_all
run_ranks(rank_hangs_all, 3, {folder!r}, host_mode=False)
"""


def rank_hangs_all(folder):
    record(folder)
    time.sleep(600)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_their_caller(tmp_path, number):
    code = CALLER.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path))
    # In a background job SIGINT is ignored, and what it starts inherits that.
    caller = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + PATIENCE_S
    while len(recorded(tmp_path)) < 6 and time.monotonic() < deadline:
        time.sleep(0.2)
    pids = recorded(tmp_path)
    assert len(pids) == 6
    caller.send_signal(number)
    assert caller.wait(60) != 0
    assert all(is_gone(pid) for pid in pids)


# --- the command line ---


SCRIPT = """
import os, sys
import torch
assert __name__ == "__main__"
rank = os.environ["RANK"]
print(f"out of rank {rank}:", sys.argv[1:], "cuda", torch.cuda.is_available(), flush=True)
if "--fail" in sys.argv and rank == "1":
    print("cause", flush=True)
    raise KeyError("broken")
if "--refuse" in sys.argv:
    sys.exit("helix: 9 heads do not divide")
if "--code" in sys.argv:
    sys.exit(5)
"""


def launch(*arguments):
    command = [sys.executable, "-m", "helix_megatron.launch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_command_line_runs_a_script(script, tmp_path):
    done = launch("--nproc-per-node", 2, "--log-dir", tmp_path / "logs", script, "--lr", 1, "--timeout", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out of rank 0: ['--lr', '1', '--timeout', '3'] cuda False\n"
    assert "out of rank 1" in (tmp_path / "logs" / "rank_1.log").read_text()


def test_command_line_runs_a_module_in_host_mode(script, monkeypatch):
    monkeypatch.chdir(script.parent)
    done = launch("--nproc-per-node", 1, "-m", "train", "--helix-host-mode")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out of rank 0: ['--helix-host-mode'] cuda True\n"


def test_command_line_reports_failures(script):
    done = launch("--nproc-per-node", 2, script, "--fail")
    assert done.returncode == 1
    assert "rank 1 failed" in done.stderr and "KeyError: 'broken'" in done.stderr and "cause" in done.stderr
    done = launch("--nproc-per-node", 3, script, "--refuse")
    assert done.returncode == 1
    assert done.stderr.count("helix: 9 heads do not divide") == 1 and "Traceback" not in done.stderr
    done = launch("--nproc-per-node", 2, script, "--code")
    assert (done.returncode, done.stderr.strip()) == (5, "rank 0 exited with code 5")


def test_command_line_refuses_a_missing_script(capsys):
    with pytest.raises(SystemExit):
        main(["--nproc-per-node", "2", "no_such.py"])
    assert "there is no script 'no_such.py'" in capsys.readouterr().err
