"""What sections do on a GPU alone runs to its end in host mode (gpu_branches.py), and says what it must."""

import pytest

from helix_megatron.check import generation, layers, results
from helix_megatron.check.rows import Rows, read_rows
from helix_megatron.host.launcher import run_ranks
from tests.check import gpu_branches

pytestmark = pytest.mark.dynamic_engine


def test_kernels_are_timed(tmp_path):
    path = tmp_path / "rows"
    run_ranks(gpu_branches.time_kernels, 1, str(path))
    copied, *rows = read_rows(path)
    assert copied["copy_gb_per_s"] > 0 and len(rows) == 12
    for row in rows:
        assert row["status"] == "measured" and row["backend"] == "triton", row
        assert min(row[name] for name in ("microseconds", "eager_microseconds", "share_of_copy")) > 0
        assert row["flash_attention"] == "not installed"
    assert "of a copy" in results.highlights("kernels", rows)[0]


def test_a_yardstick_that_fails_takes_nothing_with_it(tmp_path):
    path = tmp_path / "rows"
    run_ranks(gpu_branches.time_kernels_beside_broken_flash, 1, str(path))
    for row in read_rows(path)[1:]:
        assert row["status"] == "measured" and row["microseconds"] > 0
        assert row["flash_attention"] == "FlashAttention 3 fails: RuntimeError: built for another torch"


def test_text_in_bf16(tmp_path, monkeypatch):
    """Most tokens are no ties of bf16. Graphs are recorded on a GPU alone."""
    path = tmp_path / "rows"
    monkeypatch.setattr(generation, "SIZES", [size for size in generation.SIZES if not size[2]])
    generation.check(Rows(path), gpu_branches.OnHost(1, 0, True, 300.0))
    (row,) = read_rows(path)
    assert row["status"] == "ok" and int(row["detail"].split()[0]) > 24, row


def test_layers_and_decode_steps_are_measured_beside_megatron(tmp_path):
    path = tmp_path / "rows"
    alone = {"HELIX_HOST_SHARED_MEMORY": "0"}
    run_ranks(gpu_branches.measure_layers, 1, str(path), host_mode=False, env=alone, timeout_s=200)
    rows = [row for row in read_rows(path) if row["status"] != "warning"]
    assert len(rows) == 6
    for row in rows:
        assert row["status"] in ("measured", "skipped"), row
        if row["status"] == "measured":
            assert row["us"].keys() == row["launches"].keys() == {"gemm", "attention", "norm", "packing"}
            assert row["step_ms"] > 0 and row["detail"] == "collectives skipped"
    skipped = {row["case"]: row["detail"] for row in rows if row["status"] == "skipped"}
    assert skipped == {}


def test_the_decode_steps_have_megatrons_beside_them():
    for decode in layers.DECODES:
        if decode.cache != "dim" and decode.graph:
            other = [one for one in layers.DECODES if (one.kv_heads, one.context, one.batch, one.graph)
                     == (decode.kv_heads, decode.context, decode.batch, True)]  # fmt: skip
            assert {bool(one.cache) for one in other} == {True, False}, decode
    assert len({decode.name for decode in layers.DECODES}) == len(layers.DECODES)
