"""What sections do on a GPU alone, done in host mode, where `device="cuda"` is a host's memory: that names,
shapes and devices fit. Sizes are small, CUDA graphs HostGraphs; of the figures nothing is meant."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch

from helix_megatron.check import kernels, layers
from helix_megatron.check.rows import Place, Rows
from helix_megatron.host.launcher import run_ranks
from helix_megatron.kernels import backend
from tests.inference.host_graph import in_place_of_cuda_graphs

GPU = Place(1, 0, False, 300.0)


class OnHost(Place):
    """Ranks of a host for those that share a GPU."""

    def run(self, function, ranks, job):
        job = replace(job, layout=replace(job.layout, on_host=True))
        return run_ranks(function, ranks, job)


def time_kernels(path: str) -> None:
    """kernels.check_speed."""
    small = dict(BATCHES=(1, 2), CONTEXTS=(256, 512), COPIED=2**20)
    with mock.patch.multiple(kernels, **small), in_place_of_cuda_graphs(((backend, "attend"),)):
        kernels.check_speed(Rows(path), GPU)


def flash_of_another_age(*args, **kwargs):
    """FlashAttention's decode kernel, which fails."""
    raise RuntimeError("built for another torch")


def time_kernels_beside_broken_flash(path: str) -> None:
    """The same where FlashAttention is installed, and fails."""
    with mock.patch.object(kernels, "flash_attention", lambda: (flash_of_another_age, "FlashAttention 3")):
        time_kernels(path)


def measure_layers(path: str) -> None:
    """layers.rank_layouts and rank_decodes, in one fake world; attention over a cache is one launch."""
    from megatron.core.transformer import attention

    from helix_megatron.inference import position_cache

    layouts = (
        layers.Layout("qwen2.5-0.5b", 2),
        layers.Layout("qwen2.5-0.5b", 4, (2, 2), "dims"),
    )
    decodes = (
        layers.Decode(2, "sequence", 512, 1, graph=True),
        layers.Decode(2, "", 512, 1, graph=True),
        layers.Decode(2, "sequence", 512, 2),
        layers.Decode(2, "dim", 512, 1),
    )
    layers.start_fake_world(True)
    small = dict(LAYOUTS=layouts, DECODES=decodes, SEQUENCE=64, start_fake_world=lambda *given: None)
    launches = (
        (position_cache, "attend"),
        (attention, "flash_attn_varlen_func"),
        (attention, "flash_attn_with_kvcache"),
    )
    profile = torch.profiler.profile

    def without_driver(activities):
        return profile(activities=activities[1:])

    with (
        mock.patch.multiple(layers, **small),
        mock.patch.object(torch.profiler, "profile", without_driver),
        in_place_of_cuda_graphs(launches),
    ):
        for function in (layers.rank_layouts, layers.rank_decodes):
            function(path, GPU)
