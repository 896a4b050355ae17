"""Several ranks on one GPU: what the launcher sets in them. No GPU is needed to see that."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch

from helix_megatron.check import tiny_model
from helix_megatron.host import launch_command, launcher
from helix_megatron.host.launch_command import main
from helix_megatron.host.launcher import RankError, run_ranks

ROOT = Path(__file__).parents[2]


def environment():
    return dict(os.environ)


def test_every_rank_is_a_host_of_its_own_on_device_0(monkeypatch):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    ranks = run_ranks(environment, 2, host_mode=False, share_gpu=True, timeout_s=120)
    assert [rank["RANK"] for rank in ranks] == ["0", "1"]
    assert all(rank["WORLD_SIZE"] == "2" and rank["LOCAL_RANK"] == "0" for rank in ranks)
    assert len({rank["NCCL_HOSTID"] for rank in ranks}) == 2
    for rank in ranks:  # over loopback, and by no way that would see that the host is one
        assert (rank["NCCL_NET"], rank["NCCL_SOCKET_IFNAME"]) == ("Socket", "lo")
        assert all(rank[f"NCCL_{way}_DISABLE"] == "1" for way in ("IB", "P2P", "SHM"))
        assert rank["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def test_fresh_ranks_are_no_forks_and_share_nothing():
    (variables,) = run_ranks(environment, 1, host_mode=False, fresh=True, timeout_s=120)
    assert variables["LOCAL_WORLD_SIZE"] == "1" and "NCCL_HOSTID" not in variables


def fails_on_rank_1():
    assert "torch" in sys.modules  # a fresh interpreter has it too
    if os.environ["RANK"] == "1":
        raise KeyError("what went wrong")
    import time

    time.sleep(600)


def test_the_first_traceback_is_shown_and_the_others_end():
    with pytest.raises(RankError, match="what went wrong") as caught:
        run_ranks(fails_on_rank_1, 2, host_mode=False, share_gpu=True, timeout_s=120)
    assert caught.value.rank == 1


def test_a_shared_gpu_is_no_host_mode(capsys, tmp_path):
    with pytest.raises(ValueError, match="host mode"):
        run_ranks(environment, 1, share_gpu=True)
    script = tmp_path / "train.py"
    script.write_text("")
    with pytest.raises(SystemExit):
        main(["--share-gpu", "--nproc-per-node", "2", str(script), "--helix-host-mode"])
    assert "--share-gpu and --helix-host-mode" in capsys.readouterr().err


def test_it_says_that_times_mean_nothing(monkeypatch, capsys, tmp_path):
    asked = {}
    monkeypatch.setattr(launch_command, "run_ranks", lambda *args, **kwargs: asked.update(kwargs))
    script = tmp_path / "train.py"
    script.write_text("")
    assert main(["--share-gpu", "--nproc-per-node", "2", str(script)]) == 0
    assert asked["share_gpu"] and "their times mean nothing" in capsys.readouterr().err


def as_on_a_gpu(arguments):
    """What a rank of the launcher runs, in host mode for a GPU that is not here; True: Helix's layers ran."""
    from helix_megatron.host.mode import enable_host_mode
    from helix_megatron.megatron.self_attention import HelixParallelSelfAttention

    assert os.environ["NCCL_HOSTID"] and os.environ["LOCAL_RANK"] == "0"
    enable_host_mode()
    seen = []
    torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append(isinstance(module, HelixParallelSelfAttention))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_command, "run_ranks", lambda function, ranks, *args, **how: function(*args))
        status = 0
        try:
            status = main(["--share-gpu", "--nproc-per-node", "2", *arguments])
        except SystemExit as stop:
            status = stop.code or 0
    assert status == 0
    return any(seen)


def test_every_entry_runs_in_ranks_that_share_a_gpu(tmp_path, monkeypatch):
    """`pretrain_gpt`, `run` and `generate`; `serve` starts its ranks as `generate` does. They may be forked
    here, without a GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(launcher._PRELOAD)
    monkeypatch.setattr(launcher.multiprocessing, "get_context", lambda kind: context)
    model = tiny_model.make(tmp_path / "llama")
    script = tmp_path / "pretrain_gpt.py"
    script.write_text("from helix_megatron import pretrain_gpt\npretrain_gpt.main()\n")
    train = ["--helix-config", str(ROOT / "configs/tiny.yaml"), "--data-cache-path", str(tmp_path / "index")]
    generate = ["generate", "--model", str(model), "--cache-dir", str(tmp_path), "--max-new-tokens", "2"]
    generate += ["--tensor-model-parallel-size", "2", "--megatron-args", "--helix-head-parallel-size 1", "a"]
    generate += ["--cuda-graph-impl", "none"]  # there is no GPU to record on
    entries = (
        ["-m", "helix_megatron.pretrain_gpt", *train],
        ["-m", "helix_megatron.run", str(script), *train],
        ["-m", "helix_megatron.cli", *generate],
    )
    for entry in entries:
        found = run_ranks(as_on_a_gpu, 2, entry, host_mode=False, share_gpu=True, timeout_s=200)
        assert found == [True, True], entry
