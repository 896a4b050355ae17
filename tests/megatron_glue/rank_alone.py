"""What ranks of test_layer_exchange.py do in one pass: which collectives, in which order, and what they keep.

A process stands for one rank after another, in groups whose collectives move nothing: an order that differs
between ranks is a list that differs, and no rank waits for another.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from torch.distributed import ProcessGroup, destroy_process_group, init_process_group
from torch.testing._internal.distributed.fake_pg import FakeStore

from helix_megatron.check.reference import Case
from helix_megatron.exchange.levels import CompletedWork
from helix_megatron.measure.comm import _METHODS
from helix_megatron.measure.memory import activation_bytes
from helix_megatron.partition.config import HelixConfig
from tests.megatron_glue.layer_worker import Groups, make_layer

Job = tuple[Case, HelixConfig, dict[str, Any]]


def passes(tp: int, cp: int, jobs: list[Job]) -> list[list[dict]]:
    """For each job what `_one_pass` says of every rank."""
    found: list[list[dict]] = [[] for _ in jobs]
    for rank in range(tp * cp):
        init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp * cp)
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
        tensor_parallel.model_parallel_cuda_manual_seed(123)
        groups = Groups()
        for of_ranks, (case, helix, overrides) in zip(found, jobs, strict=True):
            plan = helix.resolve(case.heads, case.groups, case.dim, tp, case.interleaved, case.gate)
            layer = make_layer(case, helix, tp, groups.of(plan.grid), context_parallel_size=cp, **overrides)
            of_ranks.append(_one_pass(layer.train(), case, tp))
        parallel_state.destroy_model_parallel()
        destroy_process_group()
    return found


def _one_pass(layer: torch.nn.Module, case: Case, tp: int) -> dict:
    """{"made": collectives with the size and stride of their groups, forward and backward; "exchanges": nodes
    of the backward that make or await them (what is computed again has its own); "open": pairs of these of
    which neither needs the other's result; "kept": bytes for the backward}."""
    made: list[tuple[str, tuple[int, ...]]] = []
    own = case.seq // tp if layer.config.sequence_parallel else case.seq
    hidden = torch.randn(own, case.batch, case.hidden, requires_grad=True)
    packed = None
    if case.documents:
        ends = torch.tensor([0, *case.documents], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=case.seq, max_seqlen_kv=case.seq)
    with ExitStack() as patches:
        for name in (name for name in _METHODS if name in vars(ProcessGroup)):
            patches.enter_context(mock.patch.object(ProcessGroup, name, _noted(_METHODS[name][0], made)))
        outs: list[torch.Tensor] = []

        def forward() -> None:
            outs.append(layer(hidden, None, rotary_pos_emb=case.rope_table(), packed_seq_params=packed)[0])

        kept = activation_bytes([layer], forward)
        exchanges, unordered = _unordered(outs[0].grad_fn)
        outs[0].sum().backward()
    return {"made": made, "exchanges": exchanges, "open": unordered, "kept": kept}


def _noted(kind: str, made: list) -> Any:
    def collective(group: ProcessGroup, *_: Any, **__: Any) -> CompletedWork:
        if group.size() > 1:
            ranks = torch.distributed.get_process_group_ranks(group)
            made.append((kind, (len(ranks), ranks[1] - ranks[0])))
        return CompletedWork()

    return collective


def _unordered(last: Any) -> tuple[int, list[tuple[str, str]]]:
    """How many nodes of an autograd graph are the exchange's, and pairs of them that no path connects."""
    behind: dict[Any, set] = {}  # every node, and the exchanges that need its gradient first
    order, stack = [], [(last, False)]
    while stack:  # depth first: what a node leads to comes before it
        node, done = stack.pop()
        if done:
            order.append(node)
            following = [then for then, _ in node.next_functions if then is not None]
            exchanges = {then for then in following if _exchanges(then)}
            behind[node] = exchanges.union(*(behind[then] for then in following))
        elif node not in behind:
            behind[node] = set()
            stack.append((node, True))
            stack += [(then, False) for then, _ in node.next_functions if then is not None]
    all_of_them = [node for node in order if _exchanges(node)]
    return len(all_of_them), [
        (type(one).__name__, type(other).__name__)
        for number, one in enumerate(all_of_them)
        for other in all_of_them[:number]
        if other not in behind[one] and one not in behind[other]
    ]


def _exchanges(node: Any) -> bool:
    forward = getattr(type(node), "_forward_cls", None)
    return forward is not None and forward.__module__.startswith("helix_megatron.exchange")
