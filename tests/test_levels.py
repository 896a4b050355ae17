"""Tensor-parallel collectives level by level on a 3x2 grid: the flat results, fewer bytes between groups."""

import torch
from layer_worker import Groups, load, make_layer, run, start
from reference import Case

from helix_megatron import integrate, levels
from helix_megatron.compare.comm import CommMeter
from helix_megatron.config import HelixConfig
from helix_megatron.grid import HelixGrid
from helix_megatron.launch import run_ranks

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


def _layer(sequence_parallel, by_level, groups):
    """What an attention layer computes, forward and backward, and the collectives it makes."""
    case = Case(9, 3, 16, seq=12)
    case.draw()
    helix = HelixConfig(N, M, hierarchical_allreduce=by_level)
    layer = make_layer(case, helix, T, groups, sequence_parallel=sequence_parallel)
    layout, rank = layer.helix_plan.layout, torch.distributed.get_rank()
    load(layer, case, layout.qkv_rows(rank), layout.proj_columns(rank), torch.float32)
    integrate.enable(helix)  # make_layer has switched it off again
    meter = CommMeter()
    with meter.counting():
        found = run(layer, case, T, sequence_parallel=sequence_parallel)
    integrate.disable()
    return found, {name: (entry["calls"], entry["bytes"]) for name, entry in meter.as_json().items()}


def _rank():
    start(T)
    groups = Groups().of(HelixGrid(N, M))
    worst, comm, difference = _collectives(groups), {}, 0.0
    for sequence_parallel in (False, True):
        flat, comm[sequence_parallel, "flat"] = _layer(sequence_parallel, False, groups)
        ours, comm[sequence_parallel, "by level"] = _layer(sequence_parallel, True, groups)
        for name, value in flat.items():
            difference = max(difference, ((ours[name] - value).norm() / value.norm()).item())
    return worst, difference, comm


def test_results_of_the_flat_collectives_and_bytes_of_the_slow_level():
    case = Case(9, 3, 16, seq=12)
    whole = 12 * 2 * case.hidden * 4  # bytes of the layer's input and output, batch 2
    for worst, difference, comm in run_ranks(_rank, T):
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
