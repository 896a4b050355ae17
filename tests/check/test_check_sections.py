"""Each section of `helix check` can fail: a broken layer, a wrong kernel, a NaN loss, another token."""

import contextlib
import math
import re
import time
from dataclasses import replace
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
from helix_megatron.check.rows import Place, Rows, first_line, read_rows
from helix_megatron.host.launcher import RankError, run_ranks
from helix_megatron.kernels import backend
from helix_megatron.kernels.paged_attention import paged_attention
from helix_megatron.kernels.triton_tiles import tile_shape
from tests.inference.graph_worker import TRITON, check_replays

HOST = Place(0, 0, True, 300.0)


@pytest.fixture
def rows(tmp_path):
    return Rows(tmp_path / "rows")


def statuses(rows):
    return {row["case"]: row["status"] for row in read_rows(rows.path)}


# ---- exactness ----
def rank_with_another_scale(path, names):
    """rank_jobs with a layer that scales its scores by 1 % too much."""
    from helix_megatron.megatron.sdpa import ScaledDotProductAttention as Core

    right = Core.forward
    Core.forward = lambda self, query, *rest, **named: right(self, 1.01 * query, *rest, **named)
    exactness.rank_jobs(path, names, HOST)


def test_a_layer_with_another_scale_fails(tmp_path):
    """Beside vanilla Megatron's own error; alone and with context parallelism."""
    names = ["no RoPE", "context parallel 2, 1x2, dims"]
    right, broken = tmp_path / "right", tmp_path / "broken"
    run_ranks(exactness.rank_jobs, 4, str(right), [exactness.VANILLA, *names], HOST)
    run_ranks(rank_with_another_scale, 4, str(broken), names)
    why, *found = read_rows(right)
    assert (why["status"], why["detail"]) == ("skipped", "no GPU; Megatron's local layers ran")
    assert [row["status"] for row in found] == ["ok", "ok"]
    for row in found:
        assert 1e-8 < row["vanilla"] < 2e-5 and row["core"] == "ScaledDotProductAttention"
    for row in read_rows(broken):
        assert row["status"] == "failed" and "off float64, allowed 2.0e-05" in row["detail"]


def dies_in(path, jobs, place, bad, log):
    """Ranks that die in a job, with others behind it."""
    for job in jobs:
        Rows(path).begin(job)
        with open(log, "a") as file:
            file.write(f"{job} ")
        if job == bad:
            raise KeyError("in this job")
        Rows(path).add(job, "ok")


class Here(Place):
    """Ranks are a call."""

    def run(self, function, ranks, *args):
        try:
            function(*args)
        except Exception as error:
            text = f"rank 1 failed:\nTraceback\nKeyError: {error}\n--- end of its output ---\nnoise"
            raise RankError(text, 1) from None


def test_ranks_that_die_lose_one_job_and_do_those_behind_it(rows, tmp_path):
    jobs, log = ["one", "two", "three"], tmp_path / "log"
    place = Here(1, 0, True, 300.0, time.monotonic() + 300)
    place.run_each(dies_in, 2, rows, jobs, place, "two", log)
    assert statuses(rows) == {"one": "ok", "two": "failed", "three": "ok"}
    assert [row["detail"] for row in read_rows(rows.path)][1] == "KeyError: 'in this job'"
    assert log.read_text() == "one two three "


def test_without_time_the_jobs_behind_are_named(rows, tmp_path):
    place = Here(1, 0, True, 300.0, time.monotonic() + 20)  # ranks need longer to start
    place.run_each(dies_in, 2, rows, ["one", "two", "three"], place, "one", tmp_path / "log")
    assert statuses(rows) == {"one": "failed", "two": "skipped", "three": "skipped"}


def test_ranks_end_before_their_section_does():
    assert Place(1, 0, True, 100.0).left_s == 100.0
    assert 90 < Place(1, 0, True, 100.0, time.monotonic() + 100).left_s <= 95
    assert Place(1, 0, True, 100.0, time.monotonic() - 1).left_s == 1.0


def test_what_ranks_printed_is_not_what_went_wrong():
    text = "after 5 s, still running of 2 ranks: 0, 1; all were killed\n--- end of rank 0's output ---\nnoise"
    assert first_line(RankError(text, 0)).endswith("still running of 2 ranks: 0, 1; all were killed")


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
        assert ("failed" in statuses(found).values()) == bool(number), wrong
        assert len(statuses(found)) == 4  # a case that fails does not stop the next


def test_a_process_of_kernels_that_dies_is_a_failure(rows):
    kernels.check_apart(rows, HOST, "cpu", "torch", PYTHONPATH="/nowhere", PYTHONHOME="/nowhere")
    assert statuses(rows) == {"attention on cpu": "failed"}


def test_a_process_of_kernels_that_hangs_leaves_time_for_the_rest(rows):
    kernels.check_apart(rows, replace(HOST, seconds=1.0), "cpu", "torch")
    (row,) = read_rows(rows.path)
    assert (row["status"], row["detail"]) == ("failed", "killed after 0 s")


def test_a_wrong_merge_and_a_wrong_place_fail(rows, monkeypatch):
    merge, write = kernels.combine_partials, backend.write_partials

    def forgets_sinks(outs, lses, dtype, sinks=None):
        return merge(outs, lses, dtype)

    def of_another_rank(out, lse, outs, lses):
        write(out, lse, outs.flip(0), lses)

    for number, (owner, name, wrong) in enumerate(
        ((kernels, "combine_partials", forgets_sinks), (backend, "write_partials", of_another_rank))
    ):
        found = Rows(f"{rows.path}{number}")
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, wrong)
            kernels.check_exactness(found, "torch", "cpu", False)
        assert "failed" in statuses(found).values(), name


def test_what_a_gpu_is_asked_has_every_dtype_and_pages_that_hold_whole_steps():
    quick, full = (kernels.draw_cases("cuda", quick) for quick in (True, False))
    assert all(case in full for case in quick) and len(quick) < len(full)
    for name, of_which in (("dtype", full), ("heads", full), ("step", full), ("left", full)):
        assert {case[name] for case in quick} == {case[name] for case in of_which}
    pages = [case["size"] * case["cycles"] for case in quick]
    assert {tile_shape(16, 8, 128, 2, page).paged for page in pages} == {True, False}
    for case in quick[-4:]:
        assert kernels.measure_error("torch", "cpu", case) <= kernels.TOLERANCES[torch.bfloat16]


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


def test_a_vanilla_that_is_no_number_is_no_yardstick(rows, monkeypatch):
    monkeypatch.setattr(
        training, "train", lambda run, *rest: series(run) if run.against else dict.fromkeys(GOOD, math.nan)
    )
    training.check(rows, HOST)
    found = {row["case"]: row for row in read_rows(rows.path)}
    assert found["vanilla, fp32"]["status"] == "failed"
    assert found["1x2, saves, fp32"]["detail"] == "vanilla has no losses to compare with"


def test_what_quick_has_comes_first_in_every_precision(rows, monkeypatch):
    monkeypatch.setattr(training, "train", lambda run, *rest: series(run))
    monkeypatch.setattr(training, "find_spec", lambda name: True)
    training.check(rows, Place(1, 0, False, 300.0))
    names = [row["case"] for row in read_rows(rows.path)]
    first = ("vanilla", "vanilla T=3", "1x2, saves", "vanilla loads")
    assert names[:8] == [f"{name}, {precision}" for precision in ("bf16", "fp8") for name in first]
    assert len(names) == len(set(names)) == 2 * len(training.RUNS)


def test_ranks_that_would_be_killed_at_once_are_not_started(rows, monkeypatch):
    monkeypatch.setattr(training, "train", lambda run, *rest: pytest.fail("started"))
    late = replace(HOST, until=time.monotonic() + 20)
    training.check(rows, late)
    found = [(row["status"], row["detail"]) for row in read_rows(rows.path)]
    assert ("skipped", "no time was left") in found and {status for status, _ in found} == {"skipped"}


@pytest.mark.parametrize("sizes", ["SMALL", "LARGE"])
@pytest.mark.parametrize("run", training.RUNS, ids=lambda run: run.name)
def test_the_sizes_of_a_model_divide_by_its_ranks(sizes, run):
    """Heads may not: that is what Helix is for. FP8 wants multiples of 16 of a rank."""
    given = dict(re.findall(r"--(\S+) (\d+)", " ".join([*getattr(training, sizes), *run.flags.split()])))
    tp, cp = (int(given.get(f"{kind}-parallel-size", 1)) for kind in ("tensor-model", "context"))
    unit = 16 if sizes == "LARGE" else 1
    positions = tp * (2 * cp if cp > 1 else 1)
    for name, parts in (("vocab-size", tp), ("ffn-hidden-size", tp), ("seq-length", positions)):
        assert int(given[name]) % parts == 0, name
    assert int(given["ffn-hidden-size"]) // tp % unit == 0 and int(given["hidden-size"]) % unit == 0


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


def test_only_megatrons_refusal_without_flash_attention_is_skipped():
    """A kernel's log names flash-attn too."""
    refused = "Traceback\nValueError: with whole heads Megatron's dynamic engine needs flash-attn 2.7.3"
    died = "Traceback\nKeyError: 'x'\n--- end of its output ---\ntriton; not flash-attn-3: not installed"
    assert generation.outcome_of(RankError(refused, 0))[0] == "skipped"
    assert generation.outcome_of(RankError(died, 0)) == ("failed", "KeyError: 'x'")


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
        "attention_kernel": "attention",
        "merge_programs_kernel": "attention",
        "combine_kernel": "packing",
    }
    assert {name: kernel_times.classify_kernel(name) for name in names} == names
    found = kernel_times.sum_by_class([(name, 10.0, 2) for name in names])
    assert found["attention"] == (40.0, 8) and found["norm"] == (10.0, 2)


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


# ---- graphs ----
class OnHost(Place):
    """Two ranks of a host, whose graphs are a stand-in, for those of a GPU."""

    fault = ""

    def run(self, function, ranks, *args):
        return run_ranks(check_replays, ranks, self.fault, *args, env=TRITON, fresh=True)


class Stale(OnHost):
    fault = "a plan that stays"


@pytest.mark.dynamic_engine
def test_replays_with_an_old_plan_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "JOBS", {"1x2, window": graphs.JOBS["1x2, window"]})
    for name, kind in (("right", OnHost), ("broken", Stale)):
        graphs.check(Rows(tmp_path / name), kind(1, 0, False, 300.0))
    right, broken = (read_rows(tmp_path / name) for name in ("right", "broken"))
    assert [row["status"] for row in (*right, *broken)] == ["ok", "failed"]
    assert right[0]["steps"] == {"of single tokens": 2, "with prompts": 2} and right[0]["graphs"] > 1


def test_steps_are_drawn_of_every_kind():
    sizes, kinds = graphs.SIZES, set()
    for step in range(graphs.STEPS):
        generator = torch.Generator().manual_seed(step)
        new, lengths, prompts = graphs.draw_step(generator, sizes, with_prompts=step % 2 == 1)
        assert sum(new) <= sizes.graph_tokens and len(new) <= sizes.batch
        assert all(1 <= count <= length <= sizes.length for count, length in zip(new, lengths, strict=True))
        assert prompts == 0 or (step % 2 and set(new[: len(new) - prompts]) <= {1})
        last = list(zip(new, lengths, strict=True))[len(new) - prompts :]
        kinds |= {(count > 1, count == length) for count, length in last}
    assert kinds == {(many, whole) for many in (True, False) for whole in (True, False)}


def test_a_replay_of_nan_is_no_replay():
    """`max` keeps what it has beside NaN."""
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert graphs._apart(good, good) == 0.0
    assert graphs._apart(bad, good) == graphs._apart(good, bad) == float("inf")
