"""What a rank does in the tests of launches and CUDA graphs: Triton kernels under the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from helix_megatron.check.graphs import Sizes
from helix_megatron.check.reference import Case
from helix_megatron.check.rows import Place
from helix_megatron.partition.config import HelixConfig
from tests.inference.host_graph import HostGraph, in_place_of_cuda_graphs
from tests.megatron_glue.layer_worker import Groups, inferring, load, make_config, make_layer, start

BLOCK, LENGTH, BATCH = 8, 48, 6
SIZES = Sizes(BATCH, BLOCK, LENGTH, 24)
TRITON = {"TRITON_INTERPRET": "1", "HELIX_PAGED_ATTENTION": "triton"}


def layer_and_context(case: Case, helix: HelixConfig, tp: int, groups: Groups, graphs: bool = False):
    """A Helix layer with the case's weights and a dynamic context for BATCH requests; their blocks."""
    from helix_megatron.check.decode_step import new_context
    from helix_megatron.megatron import integrate

    case.draw()
    plan = helix.resolve(case.heads, case.groups, case.dim, tp, case.interleaved, case.gate)
    overrides = {"cuda_graph_impl": "local"} if graphs else {}
    layer = make_layer(case, helix, tp, groups.of(plan.grid), **overrides).eval()
    rank = torch.distributed.get_rank() % tp
    load(layer, case, plan.layout.qkv_rows(rank), plan.layout.proj_columns(rank), torch.float32)
    blocks = BATCH * -(-LENGTH // BLOCK)
    block_bytes = 2 * BLOCK * case.groups * case.dim * 4 // tp
    integrate.enable(helix)
    try:
        config = make_config(case, tp, **overrides)
        return layer, *new_context(config, blocks, block_bytes, LENGTH, BATCH, BLOCK)
    finally:
        integrate.disable()


def count_launches(tp: int, jobs: list[tuple[Case, HelixConfig]]) -> list[tuple[dict, dict]]:
    """Of a decode step, past its first layer: launches and collectives, in the dynamic engine's context, then
    in Megatron's static one. RoPE, norms and the output gate are one launch each, as Megatron fuses them."""
    start(tp)
    groups = Groups()
    return [found for case, helix in jobs for found in _count(case, helix, tp, groups)]


def _count(case: Case, helix: HelixConfig, tp: int, groups: Groups) -> list[tuple[dict, dict]]:
    from megatron.core.inference.contexts import StaticInferenceContext

    from helix_megatron.check.decode_step import set_decode_step
    from helix_megatron.megatron import self_attention

    layer, context, table = layer_and_context(case, helix, tp, groups)
    rope, hidden, found = case.rope_table(), case.tensors["hidden"].float()[:, :1], []
    norms = [norm for norm in (layer.q_layernorm, layer.k_layernorm) if norm is not None]
    fused = (
        (self_attention, "apply_rotary_pos_emb"),
        (layer, "_apply_output_gate"),
        *((norm, "forward") for norm in norms),
    )

    def run(of_step, rows):
        return layer(rows, None, inference_context=of_step, rotary_pos_emb=rope)

    set_decode_step(context, table, BATCH, [5, 17, 1, 33, 8, 16], BLOCK)
    static = StaticInferenceContext(BATCH, LENGTH)
    with inferring():
        run(static, hidden[:9].repeat(1, BATCH, 1))
        static.sequence_len_offset = 9
        static.enable_decode_mode()
        packed = hidden[:1].repeat(context.padded_active_token_count, 1, 1)
        for of_step, rows in ((context, packed), (static, hidden[:1].repeat(1, BATCH, 1))):
            run(of_step, rows)
            graph = HostGraph(fused)
            with graph.recording():
                run(of_step, rows)
            found.append((dict(graph.names), dict(graph.collectives)))
    return found


def capture(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """A step as a graph on the host, after one that does what is done once."""
    step()
    graph = HostGraph()
    with graph.recording():
        out = step()
    return graph.replay, out


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """Code that leaves a graph what an earlier step was given."""
    from helix_megatron.inference.step_tokens import StepTokens
    from helix_megatron.kernels.paged_attention import Requests

    begin = StepTokens.begin

    def elsewhere(self, context):
        self._memory, self._of_graphs = None, {}
        begin(self, context)

    with contextlib.ExitStack() as stack:
        patch = lambda *given: stack.enter_context(mock.patch.object(*given))  # noqa: E731
        if fault == "slots elsewhere every step":
            patch(StepTokens, "begin", elsewhere)
        elif fault == "a plan that stays":
            patch(Requests, "refill", lambda self: None)
        elif fault == "requests of every step":
            patch(StepTokens, "_that_stay", lambda self, sizes, requests: requests)
        yield


def replays(tp: int, jobs: list[tuple[Case, HelixConfig, str, range]]) -> list[tuple[float, int]]:
    """How far replays are from eager steps, of these numbers, and the number of graphs; with a fault, or
    without ("")."""
    from helix_megatron.check.graphs import Replays

    start(tp)
    groups, found = Groups(), []
    for case, helix, fault, steps in jobs:
        replayed = Replays(case, helix, groups, SIZES, capture)
        with planted(fault):
            worst = max(replayed.apart(step) for step in steps)
        found.append((worst, len(replayed.graphs)))
    return found


def check_replays(fault: str, path: str, names: list[str], place: Place) -> None:
    """graphs.rank_replays at sizes for the host, with a fault, or without ("")."""
    from helix_megatron.check import graphs

    small = dict(STEPS=4, SIZES=SIZES, DIM=8, HIDDEN=24, captured=capture)
    with mock.patch.multiple(graphs, **small), planted(fault):
        graphs.rank_replays(path, names, place)


def compiled_after_warm_up(tp: int, jobs: list[tuple[Case, HelixConfig]]) -> list[tuple[int, list]]:
    """Kinds of kernels compiled when an engine starts, and those that decode steps ask for besides."""
    from megatron.core.inference.contexts import DynamicInferenceContext

    from helix_megatron.check.decode_step import set_decode_step
    from helix_megatron.inference.warm_up import warm_up
    from helix_megatron.kernels import triton_merge
    from tests.inference.specialisations import recorded

    triton_merge.MANY_ROWS = 16  # of tokens times heads
    DynamicInferenceContext.TOKEN_ROUNDER = 1  # so that steps differ in size

    start(tp)
    groups, found = Groups(), []
    for case, helix in jobs:
        layer, context, table = layer_and_context(case, helix, tp, groups)
        rope = case.rope_table()
        with inferring():
            with recorded() as warm:
                warm_up(layer, context)
            with recorded() as asked:
                for lengths in ([5], [5, 17, 1], [5, 17, 1, 33, 8, 16]):
                    set_decode_step(context, table, len(lengths), lengths, BLOCK)
                    hidden = torch.randn(context.padded_active_token_count, 1, case.hidden)
                    layer(hidden, None, inference_context=context, rotary_pos_emb=rope)
        found.append((len(warm), sorted(map(str, asked - warm))))
    return found


@contextlib.contextmanager
def graphs_on_the_host() -> Iterator[tuple[list[HostGraph], list[HostGraph]]]:
    """Graphs that Megatron captures, and those that it replays, once for each time.

    Attention is one launch that reads requests when it is replayed, as a kernel does.
    """
    from megatron.core.transformer import attention

    from helix_megatron.inference import position_cache
    from helix_megatron.kernels.merge import write_partials
    from helix_megatron.kernels.paged_attention import Requests, paged_attention

    def attend(query, keys, values, requests, visible, singles, flash_version, graph, into, new):
        found = paged_attention(query, keys, values, Requests(*requests.tensors), visible)
        write_partials(*found, *into)

    kernels = (
        (position_cache, "attend"),
        (attention, "flash_attn_varlen_func"),
        (attention, "flash_attn_with_kvcache"),
    )
    replayed, replay = [], HostGraph.replay
    with (
        mock.patch.object(position_cache, "attend", attend),
        mock.patch.object(HostGraph, "replay", lambda graph: (replayed.append(graph), replay(graph))),
        in_place_of_cuda_graphs(kernels) as captured,
    ):
        yield captured, replayed


def generate_with_graphs(tp: int, helix: HelixConfig, model: dict, settings: dict) -> dict:
    """kv_cache_worker.generate by an engine that captures graphs, with their number, how many there were at
    each warm-up, and their replays."""
    from helix_megatron.inference import warm_up
    from tests.inference import kv_cache_worker

    before, warm = [], warm_up.warm_up
    with (
        graphs_on_the_host() as (captured, replayed),
        mock.patch.object(warm_up, "warm_up", lambda *given: (before.append(len(captured)), warm(*given))),
    ):
        found = kv_cache_worker.generate(tp, helix, {"cuda_graph_impl": "local", **model}, settings)
    return {**found, "graphs": len(captured), "replays": len(replayed), "before": before}
