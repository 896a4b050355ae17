"""Decode steps: launches and CUDA graphs, measured constants, and the batch from which sharding pays."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from helix_megatron import cli
from helix_megatron.models.presets import find
from helix_megatron.partition.grid import HelixGrid
from helix_megatron.plan import clusters, crossover, decode_launches, memory, search
from helix_megatron.plan.layout import Layout, Problem, Workload
from helix_megatron.plan.timing import predict

RESULTS = Path(__file__).parents[2] / "benchmarks/results/h200"
H200 = replace(clusters.find("dgx-h200"), nodes=2)
LLAMA = find("llama-3.1-70b")
SHARDED = Layout(16, helix=True, grid=HelixGrid(8, 2), comm_type="a2a", placement="heads",
                 kv_cache="sequence", micro_batch=8)  # fmt: skip
LAYOUTS = {"none": Layout(16, micro_batch=8), "sequence": SHARDED, "dim": replace(SHARDED, kv_cache="dim")}


def step(cache, **work):
    return Problem(LLAMA, LAYOUTS[cache], Workload("decode", 8, 32768, **work))


def test_the_constants_are_those_of_the_stored_h200_measurements():
    steps = json.loads((RESULTS / "decode_step_h200.json").read_text())
    sharded = [row for row in steps if row["cache"] == "sequence"]
    short = [row for row in sharded if row["context"] == 2048]
    host = 1e-6 * median(row["step_us"] / row["launches"] for row in sharded)
    kernel = 1e-6 * median(row["gpu_us"] / row["launches"] for row in short)
    assert (host, kernel) == pytest.approx((decode_launches.HOST, decode_launches.KERNEL), rel=0.05)
    assert {row["launches"] for row in steps if row["cache"] == "dim" and row["batch"] == 1} == {
        decode_launches.ATTENTION["dim"]
    }
    kernels = [row for row in json.loads((RESULTS / "kernel_h200.json").read_text())["rows"] if row["fa3_us"]]
    few = [row["fa3_us"] - row["floor_us"] for row in kernels if row["floor_us"] < 5]
    assert 1e-6 * median(few) == pytest.approx(decode_launches.FLASH_START, rel=0.2)


def test_a_replayed_step_adds_the_kernels_of_the_exchange_and_an_eager_one_waits_for_the_host():
    for cache in LAYOUTS:
        replayed, eager = (predict(step(cache, cuda_graph=graph), H200) for graph in (True, False))
        names = [line.name for line in replayed.lines]
        assert ("kernels of the exchange" in names) == (cache != "none")
        assert ("waiting for the host" in names) == (cache == "dim")  # which has no graph
        launches = 80 * (decode_launches.ATTENTION[cache] + decode_launches.REST)
        assert eager.seconds == pytest.approx(launches * decode_launches.HOST)
        assert replayed.seconds < eager.seconds or cache == "dim"
    added = next(line for line in predict(step("sequence"), H200).lines if line.name.startswith("kernels of"))
    assert added.seconds == pytest.approx(80 * (14 - 11) * 1.5e-6)


def test_long_eager_steps_do_not_wait_for_the_host():
    layout, work = replace(SHARDED, micro_batch=256), Workload("decode", 256, 262144, cuda_graph=False)
    lines = predict(Problem(LLAMA, layout, work), H200).lines
    assert all(line.name != "waiting for the host" for line in lines)


@pytest.mark.parametrize("name", ["llama-3.1-70b", "gpt-oss-120b", "qwen3-30b-a3b"])
def test_the_crossover_is_the_first_batch_from_which_all_are_faster(name):
    plan = search.search(find(name), H200, Workload("decode", 16, 65536), tp=16)
    found = crossover.find_crossover(plan)
    assert set(found.batches) == {32768, 65536, 131072, 262144} and not found.refusal
    assert sorted(found.batches.values(), reverse=True) == list(found.batches.values())  # longer: sooner
    for length, first in found.batches.items():
        for batch in crossover.BATCHES:
            work = Workload("decode", batch * found.layout.dp, length)
            ours = replace(found.layout, micro_batch=batch)
            theirs = Layout(16, dp=ours.dp, micro_batch=batch, ep=ours.ep, etp=ours.etp,
                            sequence_parallel=ours.sequence_parallel)  # fmt: skip
            problems = [Problem(plan.shape, layout, work) for layout in (ours, theirs)]
            fits = [memory.fullest_stage(problem)[1].total <= H200.capacity for problem in problems]
            seconds = [predict(problem, H200).seconds for problem in problems]
            wins = fits[0] and (not fits[1] or seconds[0] < seconds[1])
            if batch >= first and fits[0]:
                assert wins, (length, batch)
            if batch == first // 2 and batch:
                assert not wins, (length, batch)


def test_the_command_names_the_crossover_and_plans_eager_steps(capsys):
    words = ["plan", "--model", "qwen2-7b", "--tp", "8", "--workload", "decode", "--batch", "8"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "Megatron has no layout to compare with: tensor-parallel size 8 does not divide 28 heads." in out
    assert "--cuda-graph-impl local" in out
    words[2] = "llama-3.1-70b"
    assert cli.main([*words, "--nodes", "2", "--tp", "16", "--json"]) == 0
    graph = json.loads(capsys.readouterr().out)
    pays = graph["sharded_cache_pays_from_batch"]
    assert pays["tp"] == 16 and pays["grid"] == "8x2" and set(pays) > {"32768", "262144"}
    assert cli.main([*words, "--nodes", "2", "--tp", "16", "--json", "--eager"]) == 0
    eager = json.loads(capsys.readouterr().out)
    assert "--cuda-graph-impl" not in eager["candidates"][0]["flags"]
    assert eager["candidates"][0]["predicted_seconds"] > 1.2 * graph["candidates"][0]["predicted_seconds"]
