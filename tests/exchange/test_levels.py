"""Tensor-parallel collectives level by level on a 3x2 grid: the flat results, fewer bytes between groups."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helix_megatron.check.reference import Case
from helix_megatron.exchange import levels
from helix_megatron.host.launcher import run_ranks
from helix_megatron.measure.comm import CommMeter
from helix_megatron.megatron import integrate
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixGrid
from tests.exchange.levels_worker import rank_count
from tests.megatron_glue.layer_worker import Groups, load, make_layer, run, start
from tests.megatron_glue.te_environment import environment

N, M, T = 3, 2, 6


def _collectives(groups):
    """Largest difference to a flat sum or gather in fp64, for several shapes."""
    rank, worst = torch.distributed.get_rank(), 0.0
    for shape in ((12, 2, 5), (18, 7), (6, 1)):  # 120, 126 and 6 elements
        everyone = [torch.randn(shape, generator=torch.Generator().manual_seed(r)).double() for r in range(T)]
        own, total = everyone[rank].float(), sum(everyone)
        worst = max(worst, (levels.all_reduce(own.clone(), groups) - total).abs().max().item())
        transposed = levels.all_reduce(own.clone().transpose(0, 1), groups)  # strides of its own
        worst = max(worst, (transposed - total.transpose(0, 1)).abs().max().item())
        chunk = torch.empty(shape[0] // T, *shape[1:])
        levels.reduce_scatter(chunk, own, groups).wait()
        worst = max(worst, (chunk - total.chunk(T)[rank]).abs().max().item())
        whole = torch.empty(T * shape[0], *shape[1:])
        levels.all_gather(whole, own, groups).wait()
        worst = max(worst, (whole - torch.cat(everyone)).abs().max().item())
    odd = torch.arange(5.0) + rank  # 2 does not divide it
    return max(worst, (levels.all_reduce(odd, groups) - (torch.arange(5) * T + 15)).abs().max().item())


def _layer(sequence_parallel, by_level, groups, te=False):
    """What an attention layer computes, forward and backward, and the collectives it makes."""
    case = Case(9, 3, 16, seq=12)
    case.draw()
    helix = HelixConfig(N, M, hierarchical_allreduce=by_level)
    layer = make_layer(case, helix, T, groups, te=te, sequence_parallel=sequence_parallel)
    layout, rank = layer.helix_plan.layout, torch.distributed.get_rank()
    load(layer, case, layout.qkv_rows(rank), layout.proj_columns(rank), torch.float32)
    integrate.enable(helix)  # make_layer has switched it off again
    meter = CommMeter()
    with meter.counting():
        found = run(layer, case, T, sequence_parallel=sequence_parallel)
    integrate.disable()
    return found, {name: (entry["calls"], entry["bytes"]) for name, entry in meter.as_json().items()}


def rank_layers(te):
    """Largest relative difference between a layer's numbers by level and flat; the collectives of both."""
    start(T)
    groups = Groups().of(HelixGrid(N, M))
    worst, comm, difference = _collectives(groups), {}, 0.0
    for sequence_parallel in (False, True):
        flat, comm[sequence_parallel, "flat"] = _layer(sequence_parallel, False, groups, te)
        ours, comm[sequence_parallel, "by level"] = _layer(sequence_parallel, True, groups, te)
        for name, value in flat.items():
            difference = max(difference, ((ours[name] - value).norm() / value.norm()).item())
    return worst, difference, list(comm.items())


def _of_transformer_engines():
    """rank_layers where Transformer Engine's Python code is, on torch versions of its kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.exchange.levels_worker"],
        env={**environment(), "NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return ast.literal_eval(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("te", [False, True])
def test_results_of_the_flat_collectives_and_bytes_of_the_slow_level(te):
    case = Case(9, 3, 16, seq=12)
    whole = 12 * 2 * case.hidden * 4  # bytes of the layer's input and output, batch 2
    for worst, difference, found in _of_transformer_engines() if te else run_ranks(rank_layers, T, False):
        comm = dict(found)
        assert worst < 2e-6 and difference < 2e-6
        # The test itself gathers the output and the input gradient with sequence parallelism: all_gather x6.
        assert comm[False, "flat"][f"all_reduce x{T}"][0] == 2  # output, input gradient
        assert f"all_reduce x{N}" not in comm[False, "flat"]
        by_level = comm[False, "by level"]
        assert f"all_reduce x{T}" not in by_level
        assert by_level[f"all_reduce x{N}"] == (2, 2 * 2 * (N - 1) / N * whole / M)
        flat, by_level = comm[True, "flat"], comm[True, "by level"]
        assert flat[f"reduce_scatter x{T}"][0] == 2
        assert f"reduce_scatter x{T}" not in by_level
        assert by_level[f"all_gather x{T}"][0] == 2  # the test's own
        assert flat[f"all_gather x{T}"][0] == 2 + by_level[f"all_gather x{N}"][0]
        # Gathered: the input, once more for the weight's gradient, and the output's gradient.
        for kind, calls in (("reduce_scatter", 2), ("all_gather", 3)):
            assert by_level[f"{kind} x{N}"] == (calls, calls * (N - 1) / N * whole / M)


# ---- bytes on the slow level, of gloo's own messages ----
ELEMENTS = 60 * 4096  # fp32


def crossing(ranks, key, host_of):
    """Bytes from host to host, all ranks together, in sizes of the tensor."""
    pairs = [(r, s) for r in range(len(ranks)) for s in range(len(ranks)) if host_of(r) != host_of(s)]
    return sum(ranks[r][key][s] for r, s in pairs) / (4 * ELEMENTS)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 2), (2, 3)])
def test_bytes_between_hosts_beside_the_flat_ones(n, m):
    """By level: (n-1) N for a gather, 1/m of an exchange in which every rank sends to every other. A flat
    ring sums on its way: n of its T hops cross if it visits host after host, and then (T-m)/(T-1) is left;
    all of them if it changes host at every hop, and then (n-1)/(T-1), which is less than 1/m."""
    size = n * m
    ranks = run_ranks(rank_count, size, n, m, ELEMENTS, host_mode=False, timeout_s=100)
    for kind in ("all_gather", "reduce_scatter", "all_reduce"):
        gathers = 1 if kind == "all_gather" else 2
        # gloo scatters by an all-reduce of which a rank keeps its part: twice the bytes, by level as well.
        sums = 1 if kind == "reduce_scatter" else gathers
        by_level = crossing(ranks, (kind, "by level"), lambda rank: rank // m)
        in_order = crossing(ranks, (kind, "flat"), lambda rank: rank // m)
        changing = crossing(ranks, (kind, "flat"), lambda rank: rank % n)
        direct = crossing(ranks, (kind, "direct"), lambda rank: rank // m)
        assert by_level == pytest.approx(gathers * (n - 1), rel=0.01), kind
        assert in_order == pytest.approx(gathers * n * (size - 1) / size, rel=0.01), kind
        assert changing == pytest.approx(gathers * (size - 1), rel=0.01), kind
        assert direct == pytest.approx(sums * (size - m), rel=0.01), kind
        assert by_level / in_order == pytest.approx((size - m) / (size - 1), rel=0.02), kind
        assert by_level / changing == pytest.approx((n - 1) / (size - 1), rel=0.02), kind
        assert by_level / changing < 1 / m, kind
        assert by_level / direct * sums / gathers == pytest.approx(1 / m, rel=0.02), kind


def test_the_page_has_the_measured_table(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(root / "benchmarks")
    two_hosts = importlib.import_module("two_hosts")
    rows = json.loads((root / "benchmarks/results/two_hosts.json").read_text())["rows"]
    assert len(rows) == 12
    assert two_hosts.table(rows) in (root / "docs/levels.md").read_text()
