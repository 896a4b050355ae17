"""The harness without ranks: order, resumption, refusal to mix, the numbers it makes of samples, machines."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from helix_megatron.compare import comparisons, findings, launch, records, summary, tables
from helix_megatron.compare.harness import Options
from helix_megatron.measure import machine
from tests.compare.compare_fakes import compare, document, install, samples, variant
from tests.ports import free_port

AB = [variant("A", "0"), variant("B", "1")]


def test_runs_are_interleaved(tmp_path, monkeypatch):
    launcher = install(monkeypatch)
    compare(tmp_path, variants=AB, runs=3)
    assert launcher.launched == [("0", 1), ("1", 1), ("0", 2), ("1", 2), ("0", 3), ("1", 3)]


def test_the_statistics_of_one_variant(tmp_path, monkeypatch):
    install(monkeypatch, lambda seed, run: [samples(0, slower=run), samples(1, slower=run)])
    code, results, _, shown = compare(tmp_path, variants=[variant("good", "0")], runs=2)
    assert code == 0
    measured = results["variants"][0]["measured"]
    train = measured["workloads"]["train"]
    assert train["samples_seconds"] == [[2.0, 3.0], [4.0, 6.0]]  # the slowest rank, without the warm-up
    assert train["iteration_seconds"]["mean"] == (2.5 + 5.0) / 2
    assert train["tokens_per_s"]["mean"] == (30 / 2.5 + 30 / 5) / 2
    assert train["tflops_per_rank"]["mean"] == pytest.approx((6 / 2.5 + 6 / 5) / 2 / 2)
    assert train["mfu"] is None  # nobody said what this machine's peak is
    assert train["paper_tpot_ms"]["mean"] == pytest.approx(1e3 * (0.25 + 0.75) / 2 / 30)
    # run 1, iteration 1: ranks take 1 and 2 s, 0.25 and 0.75 of them in collectives
    split = summary.split_seconds(samples_of(1))
    assert split["communication"] == 0.25
    assert split["compute"] == pytest.approx((0.75 + 1.25 + 1.75 + 2.25) / 4)
    assert split["idle"] == pytest.approx((1.0 + 0.5) / 2)
    kind = train["communication"]["all_reduce x2"]
    assert (kind["calls"], kind["bytes"], kind["seconds"], kind["largest"]) == (4.0, 100.5, 0.5, 50.0)
    assert (kind["algbw"], kind["busbw"]) == (400.0, 400.0)  # two ranks: 2 (p - 1) / p = 1
    per_layer = measured["communication_per_layer"]["all_reduce x2"]
    assert per_layer == {"calls": 2.0, "bytes": pytest.approx(50.25), "seconds": pytest.approx(0.25)}
    assert measured["memory_bytes_of_fullest_rank"]["parameters"] == 2e6
    assert measured["losses"] == [5.0, 4.0, 3.0]
    assert results["kind"] == "measured"
    assert results["versions"]["megatron-core"].startswith("0.19")
    assert "Losses agree" in shown  # of the two runs


def samples_of(slower):
    return [samples(rank, slower=slower)["workloads"]["train"] for rank in (0, 1)]


def test_busbw_as_nccl_tests_defines_it():
    from helix_megatron.measure.comm import bus_factor

    assert bus_factor("all_reduce", 4) == 1.5
    assert (
        bus_factor("all_gather", 4) == bus_factor("reduce_scatter", 4) == bus_factor("all_to_all", 4) == 0.75
    )
    assert bus_factor("broadcast", 4) == bus_factor("recv", 4) == 1.0


def test_peaks_that_are_known():
    assert summary.known_peak(["NVIDIA H100 80GB HBM3"] * 8) == 989
    assert summary.known_peak(["NVIDIA H100 PCIe"]) == 756
    assert summary.known_peak(["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"]) is None
    assert summary.known_peak([]) is None
    assert summary.known_peak(["some GPU"]) is None


def test_losses_that_disagree_are_said_and_are_an_error(tmp_path, monkeypatch):
    install(monkeypatch, lambda seed, run: [samples(0), samples(1, shift=1e-3 * int(seed))])
    code, results, text, shown = compare(tmp_path, variants=AB)
    assert code == 1
    assert results["variants"][1]["loss_check"]["max_abs_difference"] == pytest.approx(1e-3)
    for output in (text, shown):
        assert "LOSSES DISAGREE: B is up to 0.001 away from A; at most 0.0001 is allowed." in output


def test_runs_of_one_variant_must_have_the_same_losses(tmp_path, monkeypatch):
    install(monkeypatch, lambda seed, run: [samples(0), samples(1, shift=1e-3 * (run == 2))])
    code, results, _, _ = compare(tmp_path, variants=AB[:1], runs=2)
    assert code == 1
    assert not results["variants"][0]["loss_check"]["agrees"]


def test_a_missing_or_nan_loss_never_agrees():
    assert summary.loss_difference([1.0, 2.0], [1.0, 2.5]) == 0.5
    assert summary.loss_difference([], []) == math.inf
    assert summary.loss_difference([1.0], [1.0, 2.0]) == math.inf
    assert summary.loss_difference([math.nan], [1.0]) == math.inf


def test_a_failure_that_is_expected_is_no_error(tmp_path, monkeypatch):
    def answer(seed, run):
        return ("failed", "no such grid") if seed == "1" else [samples(0), samples(1)]

    install(monkeypatch, answer)
    refused = [variant("A", "0"), variant("B", "1", may_fail=True)]
    assert compare(tmp_path / "expected", variants=refused)[0] == 0
    assert compare(tmp_path / "unexpected", variants=AB)[0] == 3


def test_a_later_failure_keeps_what_was_measured_and_is_said(tmp_path, monkeypatch):
    def answer(seed, run):
        return ("timeout", "not done") if (seed, run) == ("1", 2) else [samples(0), samples(1)]

    launcher = install(monkeypatch, answer)
    code, results, text, _ = compare(tmp_path, variants=AB, runs=4)
    assert code == 3
    assert launcher.launched.count(("1", 3)) == 0
    assert (results["variants"][1]["status"], results["variants"][1]["cause"]) == (
        "timeout",
        "not done (run 2)",
    )
    assert "B (timeout)" in text
    assert not results["comparisons"]  # a variant that did not finish is no winner and no loser


# ---- speeds


def entry_of(name, impl, seconds, m=None, tp=2):
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": 1, "data_parallel_size": 1}
    return {
        "name": name,
        "model": "one",
        "status": "ok",
        "attention_impl": impl,
        "world_size": 2,
        "runs": [{"run": k, "status": "ok"} for k, _ in enumerate(seconds, 1)],
        "measured": {
            "layout": layout,
            "grid": {"m": m} if m else None,
            "workloads": {"train": {"tokens_per_iteration": 1, "samples_seconds": [[s] for s in seconds]}},
        },
    }


def test_speeds_are_said_plainly_and_noise_is_not_a_difference():
    megatron = entry_of("Megatron", "megatron", [1.0, 1.01, 1.0])
    slow = entry_of("A", "helix", [2.0, 2.01, 2.03], 2)
    near = entry_of("B", "helix", [1.2, 1.2, 1.21], 2)
    unsure = entry_of("C", "helix", [0.9, 1.5, 1.1], 2)
    results = {"variants": [megatron, slow, near, unsure]}
    results["comparisons"] = comparisons.compare(results)
    assert [e["verdict"] for e in results["comparisons"]] == ["slower", "slower", "no difference shown"]
    table = tables.tabulate_speeds(results)
    headings, rows = table.headings, table.rows
    assert headings == ["variant", "against", "training"]
    assert rows[0] == ["A", "Megatron", "0.50x [0.49, 0.51] SLOWER"]
    assert rows[2][2].endswith("] unclear")

    equal = entry_of("2x1", "helix", [1.25, 1.26, 1.25], 1)  # the same program, a quarter slower
    results = {"variants": [megatron, slow, near, unsure, equal]}
    results["comparisons"] = comparisons.compare(results)
    by_name = {e["variant"]: e["verdict"] for e in results["comparisons"]}
    assert by_name["B"] == "within the noise of two equal programs"
    assert by_name["A"] == "slower"
    assert findings.describe_noise(results) == [
        "2x1 computes what Megatron computes. Their ratio is noise, and no smaller difference is shown as "
        "one: training 0.80x."
    ]


def test_runs_are_paired_by_their_number():
    """Run 2 of B is missing: its runs 1 and 3 stand beside runs 1 and 3 of A, not 1 and 2."""
    a = entry_of("A", "megatron", [1.0, 50.0, 3.0])
    b = entry_of("B", "helix", [2.0, 6.0], 2)
    b["runs"] = [{"run": 1, "status": "ok"}, {"run": 3, "status": "ok"}]
    (found,) = comparisons.compare({"variants": [a, b]})
    assert found["n"] == 2
    assert found["ratio"] == pytest.approx(0.5)


def test_variants_of_other_models_or_sizes_are_not_compared():
    a, b, c = entry_of("A", "megatron", [1.0]), entry_of("B", "helix", [1.0]), entry_of("C", "helix", [1.0])
    b["model"], c["world_size"] = "two", 4
    assert comparisons.compare({"variants": [a, b, c]}) == []


# ---- what is on disk


def test_a_folder_with_runs_is_not_overwritten_unasked(tmp_path, monkeypatch):
    launcher = install(monkeypatch)
    compare(tmp_path, variants=AB)
    with pytest.raises(ValueError, match=r"holds 2 finished runs: --resume .* --overwrite"):
        compare(tmp_path, variants=AB)
    assert len(launcher.launched) == 2
    compare(tmp_path, Options(overwrite=True), variants=AB)
    assert len(launcher.launched) == 4


def test_resume_runs_what_is_missing_and_report_only_runs_nothing(tmp_path, monkeypatch):
    launcher = install(monkeypatch)
    compare(tmp_path, variants=AB[:1], runs=1)
    _, results, _, _ = compare(tmp_path, Options(resume=True), variants=AB, runs=2)
    assert launcher.launched == [("0", 1), ("1", 1), ("0", 2), ("1", 2)]
    assert [len(v["runs"]) for v in results["variants"]] == [2, 2]
    (tmp_path / "report.md").unlink()
    compare(tmp_path, Options(report_only=True), variants=AB, runs=9)
    assert len(launcher.launched) == 4


def test_resume_leaves_failures_alone_unless_told(tmp_path, monkeypatch):
    broken = [True]

    def answer(seed, run):
        return ("failed", "broken") if broken[0] and seed == "1" else [samples(0), samples(1)]

    launcher = install(monkeypatch, answer)
    assert compare(tmp_path, variants=AB)[0] == 3
    broken[0] = False
    assert compare(tmp_path, Options(resume=True), variants=AB)[0] == 3
    assert len(launcher.launched) == 2
    assert compare(tmp_path, Options(resume=True, retry=True), variants=AB)[0] == 0
    assert launcher.launched[2:] == [("1", 1)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda identity: identity | {"machine": "elsewhere"}, "machine is"),
        (
            lambda identity: identity | {"hardware": identity["hardware"] | {"gpus": ["H100"]}},
            "hardware: gpus",
        ),
        (
            lambda identity: identity | {"versions": identity["versions"] | {"torch": "2.0"}},
            "versions: torch",
        ),
        (lambda identity: identity | {"revision": "abc"}, "revision is"),
        (lambda identity: identity | {"source": "abc"}, "source is"),
    ],
)
def test_runs_of_another_machine_or_version_are_refused_unless_told(tmp_path, monkeypatch, change, words):
    launcher = install(monkeypatch)
    compare(tmp_path, variants=AB[:1])
    identity = machine.identity()
    monkeypatch.setattr(machine, "identity", lambda: change(identity))
    with pytest.raises(ValueError, match="cannot be compared") as refusal:
        compare(tmp_path, Options(resume=True), variants=AB)
    assert words in str(refusal.value)
    assert "--allow-mixed" in str(refusal.value)
    assert len(launcher.launched) == 1
    _, results, text, _ = compare(tmp_path, Options(resume=True, allow_mixed=True), variants=AB)
    assert len(results["mixed"]) == 1
    assert "MIXED RUNS" in text
    assert words in text


def test_runs_of_another_configuration_are_refused(tmp_path, monkeypatch):
    install(monkeypatch)
    compare(tmp_path, variants=AB)
    with pytest.raises(ValueError, match="configuration: A was run with different flags, workloads"):
        compare(tmp_path, Options(resume=True), variants=AB, iterations=5)
    other = [variant("A", "7"), AB[1]]
    with pytest.raises(ValueError, match="configuration: A was run with different flags"):
        compare(tmp_path, Options(resume=True), variants=other)
    assert compare(tmp_path, Options(resume=True), variants=AB, run_timeout_s=7.0)[0] == 0  # decides nothing


def test_damaged_and_foreign_files_are_named(tmp_path):
    keeper = records.Records(tmp_path)
    keeper.save({"variant": "A", "run": 1, "status": "ok"})
    path = keeper.path("A", 1)
    whole = path.read_text()
    path.write_text(whole[:-9])
    with pytest.raises(ValueError, match="is no record of a run") as refusal:
        keeper.load()
    assert str(path) in str(refusal.value)
    path.write_text(json.dumps({"variant": "A", "run": 1, "schema": 1}))
    with pytest.raises(ValueError, match=f"has schema 1, this program reads {records.SCHEMA}"):
        keeper.load()


def test_names_that_differ_have_files_that_differ(tmp_path):
    keeper = records.Records(tmp_path)
    names = ["Helix 4x4", "helix 4x4", "Helix-4x4", "Helix 4x4 ", "!", "?"]
    assert len({keeper.path(name, 1) for name in names}) == len(names)


def test_one_folder_has_one_comparison_at_a_time(tmp_path):
    again = records.Records(tmp_path).locked()
    with records.Records(tmp_path).locked(), pytest.raises(ValueError, match="another comparison"):
        again.__enter__()
    with records.Records(tmp_path).locked():
        pass


HANGING = """
import sys, time
from pathlib import Path
import pytest
from tests.compare.compare_fakes import compare, install, samples, variant
out = Path(sys.argv[1])
def answer(seed, run):
    if seed == "1" and run == 2:
        (out / "hangs").touch()
        time.sleep(600)
    return [samples(0), samples(1)]
with pytest.MonkeyPatch.context() as patch:
    install(patch, answer)
    compare(out, variants=[variant("A", "0"), variant("B", "1")], runs=2)
"""


def test_kill_minus_nine_loses_only_the_run_under_way(tmp_path, monkeypatch):
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "hangs").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [len(v["runs"]) for v in kept["variants"]] == [2, 1]
    launcher = install(monkeypatch)
    code, results, _, _ = compare(tmp_path, Options(resume=True), variants=AB, runs=2)
    assert code == 0
    assert launcher.launched == [("1", 2)]
    assert [len(v["runs"]) for v in results["variants"]] == [2, 2]


# ---- several machines


def test_machines_follow_the_first(tmp_path):
    """Two machines as threads: what one says the other does, in step, however slow either is."""
    port = free_port()
    heard, finished = [], []

    def first():
        lead = launch.Nodes(2, 0, f"127.0.0.1:{port - 1}")
        for order in (["A", 1], ["B", 1], None):
            lead.send_order(order)
            lead.wait_for_all()
            finished.append(len(heard))

    def second():
        follower = launch.Nodes(2, 1, f"127.0.0.1:{port - 1}")
        while (order := follower.receive_order()) is not None:
            time.sleep(0.05)
            heard.append(order)
            follower.wait_for_all()
        follower.wait_for_all()

    threads = [threading.Thread(target=body, daemon=True) for body in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert heard == [["A", 1], ["B", 1]]
    assert finished == [1, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((2, 0, None), "--rdzv-endpoint HOST:PORT"),
        ((2, 0, "host"), "it is 'host'"),
        ((2, 2, "host:1"), "--node-rank is 2"),
    ],
)
def test_machines_that_cannot_meet(arguments, words):
    with pytest.raises(ValueError, match=words):
        launch.Nodes(*arguments)


def test_ranks_that_do_not_fit_the_machines():
    from helix_megatron.compare import config as configuration

    config = replace(configuration.parse(document(), "f"), world_size=16, nnodes=2)
    assert [launch.nodes_of(config, ranks) for ranks in (1, 8, 16)] == [1, 1, 2]
    with pytest.raises(ValueError, match="32 ranks do not fit 2 machines of 8"):
        launch.nodes_of(config, 32)
