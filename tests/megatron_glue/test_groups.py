"""Process groups as Megatron makes its own, and ranks that must agree on their settings. No ranks are run."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from helix_megatron.exchange import groups
from helix_megatron.megatron import integrate, process_groups
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixConfigError, HelixGrid


# ---- process groups ----
@pytest.fixture
def made(monkeypatch):
    """(ranks, arguments) of every group that rank 5 of 8, in tensor-parallel groups of 4, has made."""
    found = []
    monkeypatch.setattr(process_groups, "_registered", None)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 5 if group is None else 1)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 8 if group is None else 4)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [4, 5, 6, 7])
    monkeypatch.setattr(dist, "new_group", lambda **given: found.append(given) or given["ranks"])
    monkeypatch.setattr(parallel_state, "_global_process_group_list", None)
    return found


def test_all_groups_of_the_grid_are_made(made):
    ours = process_groups.initialize_helix_parallel(HelixGrid(2, 2), "tensor-parallel")
    assert [given["ranks"] for given in made] == [
        *([0, 1], [2, 3], [4, 5], [6, 7]),
        *([0, 2], [1, 3], [4, 6], [5, 7]),
    ]
    assert (ours.dim_group, ours.head_group) == ([4, 5], [5, 7]) and (ours.head_rank, ours.dim_rank) == (0, 1)
    assert {(given["timeout"], given["pg_options"]) for given in made} == {(None, None)}
    # Megatron changes the timeout of what is in its list after the first step.
    assert parallel_state._global_process_group_list == [None, [4, 5], [5, 7]]


@pytest.mark.skipif(not dist.is_nccl_available(), reason="torch was built without NCCL")
def test_groups_have_megatrons_timeout_and_nccl_options(made, monkeypatch, tmp_path):
    """Those given to initialize_model_parallel, by position or name; the groups' own, or else those of tp."""
    config = tmp_path / "nccl.yaml"
    config.write_text("tp: {max_ctas: 7}\nhelix_head: {min_ctas: 3, max_ctas: 5}\n")

    def initialize_model_parallel(
        tensor_model_parallel_size=1, nccl_communicator_config_path=None, distributed_timeout_minutes=30,
        high_priority_stream_groups=None,
    ):  # fmt: skip
        pass

    monkeypatch.setattr(parallel_state, "initialize_model_parallel", initialize_model_parallel)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_group", lambda: "tensor-parallel")
    integrate.enable(HelixConfig(2, 2), HelixGrid(2, 2))
    try:
        parallel_state.initialize_model_parallel(
            4, str(config), distributed_timeout_minutes=90, high_priority_stream_groups=["helix_dim"]
        )
        wanted = {"HELIX_DIM_GROUP": (True, None), "HELIX_HEAD_GROUP": (False, 5)}
        check_options(made, timedelta(minutes=90), wanted)
        made.clear()
        process_groups.destroy_helix_parallel()
        parallel_state.initialize_model_parallel(4, str(config))
        check_options(made, timedelta(minutes=30), wanted | {"HELIX_DIM_GROUP": (False, 7)})
    finally:
        integrate.disable()


def check_options(made, timeout, wanted):
    """wanted: {description: (high priority, the most thread blocks or None for NCCL's default)}."""
    default = dist.ProcessGroupNCCL.Options().config.max_ctas
    assert len(made) == 8
    for given in made:
        assert given["timeout"] == timeout
        high, most = wanted[given["group_desc"]]
        assert given["pg_options"].is_high_priority_stream is high
        assert given["pg_options"].config.max_ctas == (default if most is None else most)


# ---- settings ----
class Counted:
    """A store, and how many operations it was asked for."""

    def __init__(self, store):
        self.store, self.operations = store, 0

    def __getattr__(self, name):
        self.operations += 1
        return getattr(self.store, name)


def all_agree(settings, timeout_s=5.0):
    """What each rank raises (None: nothing), and the operations of all; settings None: it never comes."""
    shared = dist.HashStore()
    stores, raised = [], [None] * len(settings)

    def run(rank, store):
        try:
            groups.agree(settings[rank], store, rank, len(settings), timeout_s)
        except HelixConfigError as error:
            raised[rank] = str(error)

    threads = []
    for rank in range(len(settings)):
        if settings[rank] is not None:
            stores.append(Counted(shared))
            threads.append(threading.Thread(target=run, args=(rank, stores[-1])))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised, sum(store.operations for store in stores)


def test_equal_settings_in_few_operations():
    raised, operations = all_agree([dict(grid="2x2", heads=8)] * 24)
    assert raised == [None] * 24
    assert operations <= 5 * 24


def test_every_rank_is_told_what_differs():
    settings = [dict(grid="2x2", heads=8), dict(grid="2x2", heads=8), dict(grid="1x4", extra=1)]
    (first, *others), _ = all_agree(settings)
    assert "give all of them the same flags: extra is 1 on rank 2 and None on rank 0" in first
    assert "(and 2 more differences)" in first and others == [first, first]


@pytest.mark.parametrize("absent", [0, 2])
def test_a_rank_that_never_comes_is_named(absent):
    settings = [dict(grid="2x2")] * 4
    settings[absent] = None
    raised, _ = all_agree(settings, timeout_s=0.5)
    waited = "1" if absent == 0 else "0.5"
    wanted = f"rank {absent} of 4 did not report its settings within {waited} s; it never started"
    assert [message.startswith(wanted) for r, message in enumerate(raised) if r != absent] == [True] * 3
