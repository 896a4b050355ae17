"""The job scripts: on a real Slurm of two nodes on this machine, without Slurm, and their reading of logs."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from helix_megatron.check import tiny_model
from tests.compare.compare_fakes import document
from tests.ports import free_port

ROOT = Path(__file__).parents[1]
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
CONF = """
ClusterName=helixtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=bf_interval=1,batch_sched_delay=1,sched_interval=2
KillWait=20
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES State=UP
"""
MODEL = (ROOT / "tests/megatron_glue/test_pretrain.py").read_text().split('"""')[3]
ENVIRONMENT = {"HELIX_HOST_MODE": "1", "RANKS_PER_NODE": "2", "PYTHON": sys.executable}


def wait_until(condition, seconds, what):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.3)
    pytest.fail(f"after {seconds} s: {what}")


def read(path):
    return path.read_text(errors="replace") if path.exists() else ""


class Cluster:
    """munge, one controller and two slurmd, everything in `folder`."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "SLURM_TIME_FORMAT": "standard",
        }
        self.daemons = []
        (folder / "munge").mkdir()
        (folder / "state").mkdir()
        (folder / "munge/key").write_bytes(os.urandom(128))
        (folder / "munge/key").chmod(0o600)
        ports = {name: free_port() for name in ("port", "port1", "port2")}
        host, user = socket.gethostname().split(".")[0], self._output("id", "-un").strip()
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, user=user, **ports))
        munge = [
            f"--{name}={folder}/munge/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")
        ]
        self._start("munged", "--foreground", "--force", f"--key-file={folder}/munge/key", *munge)
        wait_until(lambda: (folder / "munge/socket").exists(), 10, "munged made no socket")
        self._start("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._start("slurmd", "-D", "-N", node)
        wait_until(
            lambda: self._output("sinfo", "-h", "-o", "%D %t", check=False).strip() == "2 idle",
            20,
            "the nodes did not come up; see slurmctld.log",
        )

    def _start(self, *command):
        with open(self.folder / f"{command[0]}.out", "ab") as out:
            self.daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=out, stderr=subprocess.STDOUT)
            )

    def _output(self, *command, check=True):
        run = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30)
        assert not check or run.returncode == 0, f"{command}: {run.stdout}{run.stderr}"
        return run.stdout

    def submit(self, folder, *command, **variables):
        """Job number of sbatch with `command`; logs and checkpoints in `folder`."""
        environment = {**self.environment, **ENVIRONMENT, "LOG_DIR": str(folder / "logs")}
        environment |= {"SAVE_DIR": str(folder / "checkpoints"), "MASTER_PORT": str(free_port()), **variables}
        command = ["sbatch", "--parsable", f"--output={folder}/job.log", "--time=10", *map(str, command)]
        return subprocess.run(
            command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()

    def state(self, job):
        return re.search(r"JobState=(\w+)", self._output("scontrol", "show", "job", job))[1]

    def wait(self, job, *states, seconds=180):
        wait_until(lambda: self.state(job) in states, seconds, f"job {job} is not {' or '.join(states)}")

    def start_again(self, job):
        """Have a requeued job start now; Slurm would wait two minutes."""
        self.wait(job, "PENDING")
        time.sleep(4)  # the first start's credential is still revoked
        self.control("scontrol", "update", f"JobId={job}", "StartTime=now")

    def control(self, *command):
        return self._output(*command)

    def processes(self):
        """Process numbers of what the jobs of this cluster have started."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"SLURM_CONF={self.folder}".encode() in (entry / "environ").read_bytes():
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    started = ("pretrain_gpt", "node.sh", "helix_megatron", "multiprocessing")
                    found += [int(entry.name)] if any(name in line for name in started) else []
            except OSError:
                continue
        return found

    def stop(self):
        for process in self.processes():  # none, unless a test failed
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [name for name in NEEDED if not shutil.which(name)]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs as root only")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    subprocess.run(["scancel", "-u", "root", "-s", "KILL"], env=cluster.environment)
    cluster.stop()


def flags(folder, iterations, *more):
    path = folder / "model.yaml"
    path.write_text(MODEL.replace("host: true\n", "").replace("train-iters: 4", f"train-iters: {iterations}"))
    helix = ["--attention-impl", "helix", "--helix-dim-parallel-size", "2"]
    return ["--helix-config", path, "--mock-data", "--tensor-model-parallel-size", "4", *helix, *more]


def iterations(log):
    return [int(number) for number in re.findall(r"iteration +(\d+)/", read(log))]


@pytest.mark.timeout(1500)
def test_the_warning_before_the_time_limit_saves_and_the_requeued_job_goes_on(cluster, tmp_path):
    """The warning as Slurm sends it: USR1 to the processes of the steps, on both nodes of eight ranks."""
    more = "--tensor-model-parallel-size 16 --num-attention-heads 16 --kv-channels 8".split()
    script = ["scripts/slurm/train.sbatch", *flags(tmp_path, 20, *more)]
    job = cluster.submit(tmp_path, "--nodes=2", *script, RANKS_PER_NODE="8")
    first, second = tmp_path / "logs/0", tmp_path / "logs/1"
    wait_until(lambda: iterations(first / "node_1.log"), 500, "no iteration")
    cluster.control("scancel", "--signal=USR1", job)
    wait_until(lambda: read(first / "state"), 180, "the warning did not end the run")
    assert read(first / "state").strip() == "helix-train: time limit, saved"
    saved = int(read(tmp_path / "checkpoints/latest_checkpointed_iteration.txt"))
    assert 1 <= saved < 20
    cluster.start_again(job)
    cluster.wait(job, "COMPLETED", "FAILED", seconds=500)
    assert read(second / "state").strip() == "helix-train: completed", read(second / "node_1.log")[-2000:]
    assert iterations(second / "node_1.log") == list(range(saved + 1, 21))
    assert read(tmp_path / "checkpoints/latest_checkpointed_iteration.txt") == "20"
    assert not cluster.processes()


@pytest.mark.timeout(1000)
def test_a_cancelled_job_saves_and_leaves_nothing(cluster, tmp_path):
    more = ["--tensor-model-parallel-size", "2"]
    job = cluster.submit(tmp_path, "--nodes=1", "scripts/slurm/train.sbatch", *flags(tmp_path, 400, *more))
    wait_until(lambda: iterations(tmp_path / "logs/0/node_0.log"), 500, "no iteration")
    assert len(cluster.processes()) >= 4  # a shell, torchrun and two ranks
    cluster.control("scancel", job)
    wait_until(lambda: read(tmp_path / "logs/0/state"), 180, "the job did not end in order")
    assert read(tmp_path / "logs/0/state").strip() == "helix-train: cancelled, saved"
    wait_until(lambda: not cluster.processes(), 30, "processes are left")
    cluster.wait(job, "CANCELLED")


@pytest.mark.timeout(1000)
def test_a_requeued_comparison_goes_on_after_its_finished_runs(cluster, tmp_path):
    """Taken off its node by the administrator while the second of two variants runs."""
    variants = [{"name": "first"}, {"name": "second", "attention_impl": "helix"}]
    small = {"warmup_iterations": 0, "iterations": 1, "workloads": {"train": {}}, "run_timeout_s": 300}
    text = yaml.safe_dump(document(variants=variants, **small))
    (tmp_path / "compare.yaml").write_text(text)
    script = ["scripts/slurm/compare.sbatch", tmp_path / "compare.yaml", "--overwrite"]
    job = cluster.submit(tmp_path, "--nodes=1", *script, OUT=str(tmp_path / "out"))
    first = wait_until(lambda: [*tmp_path.glob("out/runs/first-*.json")], 500, "no finished run")[0]
    measured = first.read_bytes()
    assert not [*tmp_path.glob("out/runs/second-*.json")]
    cluster.control("scontrol", "requeue", job)
    cluster.start_again(job)
    cluster.wait(job, "COMPLETED", "FAILED", seconds=500)
    assert read(tmp_path / "logs/1/state").strip() == "helix-compare: completed", read(tmp_path / "job.log")
    results = json.loads(read(tmp_path / "out/results.json"))
    assert [variant["status"] for variant in results["variants"]] == ["ok", "ok"]
    assert first.read_bytes() == measured
    assert not re.search(r"^first, run 1:", read(tmp_path / "logs/1/node_0.log"), re.MULTILINE)
    assert re.search(r"^second, run 1:", read(tmp_path / "logs/1/node_0.log"), re.MULTILINE)
    wait_until(lambda: not cluster.processes(), 30, "processes are left")


@pytest.mark.timeout(1000)
def test_scaling_tells_the_time_of_each_size(cluster, tmp_path):
    points = "1x1 --tensor-model-parallel-size 1; 2x1 --attention-impl helix --helix-dim-parallel-size 2 "
    points += "--tensor-model-parallel-size 2"
    path = flags(tmp_path, 3)[1]
    script = ["scripts/slurm/scaling.sbatch", "--helix-config", path, "--mock-data"]
    job = cluster.submit(tmp_path, "--nodes=2", *script, POINTS=points, SKIP="1")
    cluster.wait(job, "COMPLETED", "FAILED", seconds=500)
    rows = [line.split() for line in read(tmp_path / "logs/0/scaling.txt").splitlines()]
    assert rows[0] == ["size", "state", "ms/iteration", "flags"], read(tmp_path / "job.log")
    assert [row[:2] for row in rows[1:]] == [["1x1", "completed"], ["2x1", "completed"]]
    for row, log in zip(rows[1:], ("1x1-1/node_0.log", "2x1-2/node_1.log")):
        text = read(tmp_path / "logs/0" / log)
        times = re.findall(r"elapsed time per iteration \(ms\): ([0-9.]+)", text)
        assert len(times) == 3 and row[2] == min(times[1:], key=float)
    assert not cluster.processes()


@pytest.mark.timeout(1000)
def test_a_server_answers_and_ends_with_scancel(cluster, tmp_path):
    port = free_port()
    model = tiny_model.make(tmp_path / "model")
    script = ["scripts/slurm/serve.sbatch", "--model", model, "--port", port]
    script += ["--cache-dir", tmp_path / "cache", "--max-sequence-length", 128, "--max-batch-size", 1]
    job = cluster.submit(tmp_path, "--nodes=1", *script)
    url, log = f"http://127.0.0.1:{port}/v1/completions", tmp_path / "logs/0/node_0.log"
    wait_until(lambda: url in read(log) or read(tmp_path / "logs/0/state"), 500, "the server is not there")
    assert url in read(log), read(log)
    body = json.dumps({"prompt": "hello there", "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        choice = json.loads(answer.read())["choices"][0]
    assert choice["generation_token_ids"] == tiny_model.greedy(model, ["hello there"], 4)[0]
    cluster.control("scancel", job)
    wait_until(lambda: read(tmp_path / "logs/0/state"), 120, "the server did not end in order")
    assert read(tmp_path / "logs/0/state").strip() == "helix-serve: cancelled"
    assert "has stopped, exit code 0" in read(log), read(log)
    wait_until(lambda: not cluster.processes(), 30, "processes are left")
    cluster.wait(job, "CANCELLED")


def state_of(folder, code, stopped=False, **logs):
    """What state.sh says of a folder with these node logs."""
    for name, text in logs.items():
        (folder / f"{name}.log").write_text(text)
    if code is not None:
        (folder / "exit_code").write_text(str(code))
    if stopped:
        (folder / "stopped").touch()
    command = ["bash", ROOT / "scripts/slurm/state.sh", folder]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


ECHO = """[rank0]: [rank0]: Traceback (most recent call last):
[rank0]: [rank0]:   File "schedules.py", line 1, in forward
[rank0]: [rank0]: RuntimeError: [pair.cc:561] Connection closed by peer [127.0.0.1]:2996.
"""
CAUSE = """[rank3]: [rank3]: Traceback (most recent call last):
[rank2]: a line of another rank
[rank3]: [rank3]:   File "data.py", line 7, in read
[rank3]: [rank3]: KeyError: 'tokens'
[rank3]: [rank3]: after it
slurmstepd-n1: error: *** STEP 3.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***
"""


@pytest.mark.parametrize(
    "code, text, expected",
    [
        (0, "iteration 4/4\n", "completed"),
        (0, "exiting program after receiving SIGTERM\nhelix: node 0 received USR1; its", "time limit, saved"),
        (143, "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 1 DUE TO TIME LIMIT ***\n", "time limit"),
        (143, "slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 1 DUE TO PREEMPTION ***\n", "preempted"),
        (None, "iteration 2/4\n", "running or killed"),
    ],
)
def test_states(tmp_path, code, text, expected):
    assert state_of(tmp_path, code, node_0=text) == expected


def test_the_first_traceback_is_the_cause_not_its_echo(tmp_path):
    said = state_of(tmp_path, 1, node_0=ECHO, node_1=CAUSE)
    assert said.startswith("failed (exit code 1), first failure, rank 3:\nTraceback")
    assert said.endswith("KeyError: 'tokens'")
    assert "another rank" not in said and "closed by peer" not in said


def test_states_with_a_cause(tmp_path):
    memory = CAUSE.replace("KeyError: 'tokens'", "torch.OutOfMemoryError: CUDA out of memory.")
    assert state_of(tmp_path, 1, node_0=memory).startswith("out of memory, first failure, rank 3:")
    hang = CAUSE.replace("KeyError: 'tokens'", "RuntimeError: Timed out waiting 30000ms for recv")
    assert state_of(tmp_path, 1, node_0=hang).startswith("hang, first failure, rank 3:")
    refused = "[rank1]: helix_megatron.pretrain_gpt: [rank 1] Megatron requires x.\n" + ECHO
    assert state_of(tmp_path, 2, node_0=refused).endswith("[rank 1] Megatron requires x.")
    assert state_of(tmp_path, 1, stopped=True, node_0=ECHO) == "cancelled"


def local(tmp_path, *command, **variables):
    environment = {**os.environ, **ENVIRONMENT, "LOG_DIR": str(tmp_path / "logs"), **variables}
    environment["SAVE_DIR"] = str(tmp_path / "checkpoints")
    command = ["scripts/run_local.sh", *map(str, command)]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )


@pytest.mark.timeout(1000)
def test_without_slurm_a_stop_saves(tmp_path):
    run = local(tmp_path, "train", *flags(tmp_path, 400, "--tensor-model-parallel-size", "2"))
    wait_until(lambda: iterations(tmp_path / "logs/0/node_0.log"), 500, "no iteration")
    run.send_signal(signal.SIGINT)
    assert "helix-train: cancelled, saved" in run.communicate(timeout=120)[0]
    assert int(read(tmp_path / "checkpoints/latest_checkpointed_iteration.txt")) >= 1


@pytest.mark.parametrize(
    "command, points, said",
    [
        (["tune"], "", "there are train, compare, scaling and serve"),
        (["scaling"], "1x1; two", "POINTS has ' two'"),
        (["scaling"], "2x8", "needs 2 nodes, the job has 1"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, command, points, said):
    run = local(tmp_path, *command, POINTS=points, ENTRY="-m platform")
    assert said in run.communicate(timeout=120)[0]
    assert run.returncode == 2


def test_scripts_pass_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck: apt-get install shellcheck")
    files = [*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/slurm/*")]
    run = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
