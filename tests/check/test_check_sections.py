"""Each section of `helix check` can fail: a broken layer, a wrong kernel, a NaN loss, another token."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

from helix_megatron.check import (
    collectives,
    exactness,
    generation,
    graphs,
    kernel_times,
    kernels,
    layers,
    training,
)
from helix_megatron.check.rows import Place, Rows, read_rows
from helix_megatron.host.launcher import run_ranks
from helix_megatron.kernels import backend
from helix_megatron.kernels.paged_attention import paged_attention

HOST = Place(0, 0, True, 300.0)


@pytest.fixture
def rows(tmp_path):
    return Rows(tmp_path / "rows")


def statuses(rows):
    return {row["case"]: row["status"] for row in read_rows(rows.path)}


# ---- exactness ----
def rank_with_another_scale(path, numbers):
    """rank_jobs with a layer that scales its scores by 1 % too much."""
    from helix_megatron.megatron.sdpa import ScaledDotProductAttention as Core

    right = Core.forward
    Core.forward = lambda self, query, *rest, **named: right(self, 1.01 * query, *rest, **named)
    exactness.rank_jobs(path, numbers, HOST, False, {})


def test_a_layer_with_another_scale_fails(tmp_path):
    number = next(i for i, job in enumerate(exactness.JOBS) if job.name == "no RoPE")
    right, broken = tmp_path / "right", tmp_path / "broken"
    run_ranks(exactness.rank_jobs, 2, str(right), [number], HOST, False, {})
    run_ranks(rank_with_another_scale, 2, str(broken), [number])
    assert [row["status"] for row in read_rows(right)] == ["ok"]
    (row,) = read_rows(broken)
    assert row["status"] == "failed" and "off float64, allowed 2.0e-05" in row["detail"]


@pytest.mark.parametrize(
    ("errors", "kind", "dtype", "vanilla", "status"),
    [
        ({"output": 1e-6}, "local", "fp32", 1e-6, "ok"),
        ({"output": 3e-5}, "local", "fp32", 3e-5, "failed"),  # not even where vanilla is as bad
        ({"output": 1.2e-2}, "te", "bf16", 1.2e-2, "ok"),
        ({"output": 3e-2}, "te", "bf16", 1.2e-2, "failed"),
        ({"output": math.nan}, "te", "bf16", 1.2e-2, "failed"),
        ({"output": 7e-4}, "te", "fp32", 7e-4, "ok"),  # TF32 on both sides
        ({"output": 1e-6, "bits": 0.0}, "local", "fp32", None, "ok"),
        ({"output": 1e-6, "bits": 1e-9}, "local", "fp32", None, "failed"),
    ],
)
def test_how_near_is_near_enough(errors, kind, dtype, vanilla, status):
    assert exactness.judge(errors, kind, dtype, vanilla)[0] == status


def test_an_unfused_core_is_a_warning_where_fused_ones_exist():
    assert exactness.unexpected_core("Transformer Engine's unfused", "te", "bf16", {})
    assert not exactness.unexpected_core("Transformer Engine's fused", "te", "bf16", {})
    assert not exactness.unexpected_core("Transformer Engine's unfused", "te", "fp32", {})
    assert not exactness.unexpected_core("Transformer Engine's unfused", "te", "bf16", {"sinks": True})


# ---- kernels ----
def test_a_wrong_kernel_fails(rows, monkeypatch):
    def right(query, keys, values, requests, visible, singles):
        return paged_attention(query, keys, values, requests, visible)

    def forgets_the_scale(query, keys, values, requests, visible, singles):
        return paged_attention(1.1 * query, keys, values, requests, visible)

    def forgets_what_is_empty(query, keys, values, requests, visible, singles):
        out, lse = paged_attention(query, keys, values, requests, visible)
        return out, lse.nan_to_num(neginf=0.0)

    for number, wrong in enumerate((right, forgets_the_scale, forgets_what_is_empty)):
        found = Rows(f"{rows.path}{number}")
        monkeypatch.setitem(backend._BACKENDS, "torch", wrong)
        kernels.check_exactness(found, "torch", "cpu", True)
        assert set(statuses(found).values()) == {"ok" if number == 0 else "failed"}, wrong


# ---- training ----
GOOD = {step: 5.0 - step / 10 for step in range(1, training.STEPS + 1)}


def series(run):
    first = training.SAVED + 1 if "--load" in run.flags else 1
    last = training.SAVED if "--exit-interval" in run.flags else training.STEPS
    return {step: GOOD[step] for step in range(first, last + 1)}


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (lambda losses: losses, "ok", "at most 0.0e+00 from vanilla"),
        (lambda losses: losses | {1: math.nan}, "failed", "a loss is not finite"),
        (
            lambda losses: losses | {2: losses[2] + 1e-3},
            "failed",
            "at most 1.0e-03 from vanilla, allowed 1.0e-04",
        ),
        (lambda losses: {k: v for k, v in losses.items() if k > 1}, "failed", "losses of steps [2, 3, 4]"),
    ],
)
def test_a_training_that_differs_fails(rows, monkeypatch, change, status, words):
    def train(run, *rest):
        return change(series(run)) if "saves" in run.name else series(run)

    monkeypatch.setattr(training, "train", train)
    training.check(rows, HOST)
    found = {row["case"]: row for row in read_rows(rows.path)}
    assert found["1x2, saves, fp32"]["status"] == status and words in found["1x2, saves, fp32"]["detail"]
    assert found["vanilla, fp32"]["status"] == found["vanilla loads, fp32"]["status"] == "ok"


def test_fp8_may_differ_as_two_vanilla_layouts_do():
    assert training.judge(0.5, "fp8", 0.2, False)[0] == "ok"
    assert training.judge(0.7, "fp8", 0.2, False)[0] == "failed"
    assert training.judge(0.7, "fp32", 0.0, False)[0] == "failed"
    assert training.judge(math.nan, "fp8", 0.2, False)[0] == "failed"


def test_the_second_printed_loss_is_a_mean_of_two():
    line = "iteration  {}/ 3 | lm loss: {} |\n"
    found = training.read_losses(line.format(1, "5.0E+00") + line.format(2, 4.5) + line.format(3, "nan"))
    assert (found[1], found[2]) == (5.0, 4.0) and math.isnan(found[3])


# ---- generation ----
@pytest.mark.parametrize(
    ("found", "tie", "status"),
    [
        ([[7, 8, 9], [4, 5, 6]], 0.0, "ok"),
        ([[7, 8, 9], [4, 5, 1]], 0.0, "failed"),  # another token
        ([[7, 8, 9], [4, 5]], 0.0, "failed"),
        ([[7, 8, 9], [4, 1, 1]], 0.5, "ok"),  # after a tie the texts are different ones
        ([[7, 1, 9], [4, 5, 6]], 0.5, "failed"),
        ([[1, 1, 1], [1, 1, 1]], 9.0, "failed"),  # nothing was compared
    ],
)
def test_another_token_fails(found, tie, status):
    margins = [[1.0, 1.0, 1.0], [1.0, 0.2, 1.0]]
    assert generation.judge(found, [[7, 8, 9], [4, 5, 6]], margins, tie)[0] == status


# ---- layers and collectives ----
def test_a_layout_that_cannot_be_built_fails_and_the_next_is_measured(rows, monkeypatch):
    def measure(layout, on_host):
        if layout.grid is None:
            raise torch.cuda.OutOfMemoryError("no room")
        return {"core": "a core", "operations": 1}

    monkeypatch.setattr(layers, "start_fake_world", lambda on_host: None)
    monkeypatch.setattr(layers, "measure_layout", measure)
    layers.rank_layouts(rows.path, HOST)
    quick = [layout for layout in layers.LAYOUTS if layout.quick]
    assert statuses(rows) == {layout.name: "measured" if layout.grid else "failed" for layout in quick}


def test_a_fall_back_is_a_warning(rows, monkeypatch):
    measured = {"core": "Transformer Engine's unfused", "us": {}, "launches": {}}
    monkeypatch.setattr(layers, "start_fake_world", lambda on_host: None)
    monkeypatch.setattr(layers, "measure_layout", lambda layout, on_host: measured)
    layers.rank_layouts(rows.path, Place(1, 0, True, 1.0))
    assert [row["status"] for row in read_rows(rows.path)][:2] == ["measured", "warning"]


def test_a_layer_that_fails_with_its_communication_is_named(rows, monkeypatch):
    def fails(*given):
        raise RuntimeError("NCCL error")

    monkeypatch.setattr(layers, "measure_layout", fails)
    for layout in collectives.make_layouts(16):
        collectives.measure_with_communication(rows, layout, HOST)
    assert set(statuses(rows).values()) == {"failed"} and len(statuses(rows)) == 3


def test_kernels_are_told_apart_by_name():
    names = {
        "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT": "gemm",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128": "attention",
        "void flash_fwd_splitkv_kernel<cutlass::bfloat16_t>": "attention",
        "void transformer_engine::normalization::rmsnorm_fwd_general_kernel": "norm",
        "void at::native::elementwise_kernel<128, 4>": "packing",
        "Memcpy DtoD (Device -> Device)": "packing",
    }
    assert {name: kernel_times.classify_kernel(name) for name in names} == names
    found = kernel_times.sum_by_class([(name, 10.0, 2) for name in names])
    assert found["attention"] == (20.0, 4) and found["norm"] == (10.0, 2)


def test_ranges_that_were_marked_are_no_kernels(monkeypatch):
    """Every optimizer's step and NCCL's calls are shown on the GPU as well, from first kernel to last."""
    mean = dict(device_type=torch.autograd.DeviceType.CUDA, is_user_annotation=False, count=6)
    means = [
        SimpleNamespace(**mean, key="gemm", self_device_time_total=30.0),
        SimpleNamespace(**mean | {"is_user_annotation": True}, key="gemm", self_device_time_total=900.0),
        SimpleNamespace(**mean | {"device_type": torch.autograd.DeviceType.CPU}, key="aten::mm"),
    ]
    profile = SimpleNamespace(key_averages=lambda: means)
    monkeypatch.setattr(torch.profiler, "profile", lambda **given: contextlib.nullcontext(profile))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    steps = []
    assert kernel_times.profile_kernels(lambda: steps.append(1)) == [("gemm", 10.0, 2)]
    assert len(steps) == 3


def test_ranks_share_a_gpu_only_where_there_are_too_few():
    assert Place(1, 0, True, 1.0).shares(2) and not Place(8, 0, True, 1.0).shares(8)
    assert not Place(0, 0, True, 1.0).shares(4)  # a host


def test_a_replay_of_nan_is_no_replay():
    """`max` keeps what it has beside NaN."""
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert graphs._apart(good, good) == 0.0
    assert graphs._apart(bad, good) == graphs._apart(good, bad) == float("inf")
