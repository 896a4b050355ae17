"""When the layer exchanges, and what it keeps: the same numbers whatever is overlapped or computed again."""

import dataclasses
import functools

import pytest
import torch

from helix_megatron.check.reference import Case
from helix_megatron.host.launcher import run_ranks
from helix_megatron.measure.comm import CommMeter
from helix_megatron.measure.memory import activation_bytes
from helix_megatron.megatron.refusals import refuse_unsupported
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.derived import plan_for
from helix_megatron.partition.grid import HelixConfigError
from tests.exchange.late import late_collectives
from tests.megatron_glue.layer_worker import Groups, load, make_config, make_layer, run, start
from tests.megatron_glue.rank_alone import passes

SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
CASES = [
    (Case(8, 4, 16, qk_norm="RMSNorm", seq=12), HelixConfig(1, 2)),  # whole query heads
    (Case(8, 4, 16, qk_norm="L2Norm", interleaved=True, seq=12), HelixConfig(1, 2, query_placement="dims")),
    (Case(3, 3, 16, qk_norm="LayerNorm", gate=True, seq=12), HelixConfig(1, 2)),  # positions are shared
]


def rank_runs(tp: int, variants: list[tuple[dict, dict]]) -> list[list[dict]]:
    """For every case, what each variant (of HelixConfig, of the configuration) gives, exchanges and keeps."""
    start(tp)
    groups, rank, found = Groups(), torch.distributed.get_rank(), []
    for case, helix in CASES:
        case.draw()
        results = []
        for settings, overrides in variants:
            helix = dataclasses.replace(helix, **settings)
            plan = helix.resolve(case.heads, case.groups, case.dim, tp, case.interleaved, case.gate)
            layout = plan.layout
            layer = make_layer(case, helix, tp, groups.of(layout.grid), **overrides).train()
            load(layer, case, layout.qkv_rows(rank), layout.proj_columns(rank), torch.float32)
            result, meter = {}, CommMeter()
            with meter.counting(), late_collectives():
                result["numbers"] = run(layer, case, tp)
            result["calls"] = {k: v.calls for k, v in meter.tallies.items() if "all_reduce" not in k}
            hidden = case.tensors["hidden"].float().requires_grad_()
            forward = functools.partial(layer, hidden, None, rotary_pos_emb=case.rope_table())
            result["kept"] = activation_bytes([layer], forward)
            results.append(result)
        found.append(results)
    return found


def assert_same_numbers(first: dict, second: dict) -> None:
    assert first.keys() == second.keys() and len(first) >= 4
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_overlap_changes_no_bit():
    variants = [(dict(overlap_exchange=on), {}) for on in (True, False)]
    for cases in run_ranks(rank_runs, 2, 2, variants):
        for on, off in cases:
            assert_same_numbers(on["numbers"], off["numbers"])
            assert on["calls"] == off["calls"]


def rank_overlapped(tp: int, overlap: bool) -> list[str]:
    """In which order the layer starts collectives, waits for them, and norms its queries."""
    import torch.distributed as dist

    start(tp)
    case, helix = CASES[0][0], dataclasses.replace(CASES[0][1], overlap_exchange=overlap)
    case.draw()
    layout = helix.resolve(case.heads, case.groups, case.dim, tp).layout
    layer = make_layer(case, helix, tp, Groups().of(layout.grid)).train()
    rank, events, original = torch.distributed.get_rank(), [], dist.all_to_all_single
    load(layer, case, layout.qkv_rows(rank), layout.proj_columns(rank), torch.float32)

    class Seen:
        def __init__(self, work):
            self.work = work

        def wait(self):
            events.append("arrived")
            return self.work.wait()

    def counted(*args, async_op=False, **kwargs):
        events.append("sent")
        work = original(*args, async_op=async_op, **kwargs)
        return Seen(work) if async_op else events.append("arrived")

    norm = layer.q_layernorm
    norm.register_forward_hook(lambda *_: events.append("query normed"))
    norm.register_full_backward_hook(lambda *_: events.append("query's gradient"))
    dist.all_to_all_single = counted
    try:
        run(layer, case, tp)
    finally:
        dist.all_to_all_single = original
    return events


@pytest.mark.parametrize("overlap", [True, False])
def test_the_query_is_normed_while_keys_and_values_travel(overlap):
    forward, backward = ["sent", "query normed", "arrived"], ["sent", "query's gradient", "arrived"]
    if not overlap:
        forward, backward = (["sent", "arrived", there[1]] for there in (forward, backward))
    assert run_ranks(rank_overlapped, 2, 2, overlap) == [forward + backward] * 2


def test_recompute_keeps_whole_heads_or_slices():
    again = dict(recompute_exchange=True)
    variants = [({}, {}), ({}, SELECTIVE), (again, SELECTIVE)]
    for cases in run_ranks(rank_runs, 2, 2, variants):
        for (case, helix), (everything, kept, slices) in zip(CASES, cases, strict=True):
            for other in (kept, slices):
                assert_same_numbers(everything["numbers"], other["numbers"])
            assert kept["calls"] == everything["calls"]
            name = "all_to_all x2"
            assert slices["calls"][name] == everything["calls"][name] + 1  # before attention, once more
            assert slices["kept"] < kept["kept"] < everything["kept"], (case, helix)


KEPT = [
    (Case(8, 4, 16, seq=12), HelixConfig(1, 2)),
    (Case(8, 1, 16, seq=12), HelixConfig(1, 2)),
    (Case(8, 2, 16, seq=12, rotary_percent=0.0), HelixConfig(1, 2, rotary_percent=0.0)),
    (Case(8, 1, 16, seq=12), HelixConfig(1, 2, query_placement="dims")),
    (Case(8, 4, 16, seq=12), HelixConfig(1, 2, query_placement="dims")),
]


@pytest.mark.parametrize("cp", [1, 2])
def test_recompute_keeps_as_many_bytes_as_the_page_says(cp):
    """docs/how_it_works.md, and besides: the input, that of linear_proj, cosines and sines of two tables."""
    whole = [(case, helix, SELECTIVE) for case, helix in KEPT]
    slices = [(case, dataclasses.replace(helix, recompute_exchange=True), SELECTIVE) for case, helix in KEPT]
    (found,) = run_ranks(passes, 1, 2, cp, whole + slices, timeout_s=120)
    for (case, helix), kept, again in zip(KEPT, found[: len(KEPT)], found[len(KEPT) :], strict=True):
        sb, d, m, hq, hk = case.seq * case.batch, case.dim, 2, case.heads, case.groups
        k, d_s, dims = max(1, hk // m), d // m, helix.query_placement == "dims"
        anyway, tables = sb * (case.hidden + hq * d_s), 4 * case.seq * case.rotary_dim
        of_slices = sb * ((hq if dims else hq // m * m) + 2 * hk) * d_s
        if dims and hk > 1:
            of_slices += sb * hq * d_s
        assert {rank["kept"] for rank in kept} == {4 * (anyway + tables + sb * (hq // m + 2 * k * cp) * d)}
        assert {rank["kept"] for rank in again} == {4 * (anyway + of_slices)}, case


def test_exchanging_again_needs_something_computed_again():
    case, helix = Case(8, 4, 16), HelixConfig(1, 2, recompute_exchange=True)
    config = make_config(case, 2)
    with pytest.raises(HelixConfigError, match="--recompute-granularity selective"):
        refuse_unsupported(config, plan_for(helix, config, 2))
    refuse_unsupported(make_config(case, 2, **SELECTIVE), plan_for(helix, config, 2))
    summed = dataclasses.replace(helix, comm_type="all_reduce")
    with pytest.raises(HelixConfigError, match="which is all_reduce here"):
        refuse_unsupported(make_config(case, 2, **SELECTIVE), plan_for(summed, config, 2))


# ---- order ----
THREE = Case(6, 2, 16, qk_norm="RMSNorm", seq=12)  # query heads of a group: two ranks share positions
ORDERED = [
    (Case(8, 4, 16, qk_norm="RMSNorm", gate=True, seq=12), HelixConfig(2, 2), {}),
    (Case(8, 4, 16, qk_norm="LayerNorm", seq=12), HelixConfig(2, 2), dict(sequence_parallel=True)),
    (Case(8, 4, 16, seq=12), HelixConfig(2, 2, query_placement="dims", slice_weights=(3, 1)), {}),
    (Case(12, 3, 16, seq=12), HelixConfig(1, 4), {}),  # KV heads of ranks are unequal
    (THREE, HelixConfig(2, 2), SELECTIVE),
    (THREE, HelixConfig(2, 2, recompute_exchange=True), SELECTIVE),
    (dataclasses.replace(THREE, seq=1), HelixConfig(2, 2), {}),  # ranks without a query
    (Case(8, 2, 16, qk_norm="RMSNorm", seq=12, batch=1, documents=(5, 7)), HelixConfig(2, 2), {}),
]
OF_POSITIONS = [
    (Case(8, 4, 16, qk_norm="RMSNorm", seq=12), HelixConfig(1, 2), {}),
    (Case(8, 4, 16, seq=12), HelixConfig(1, 2, query_placement="dims"), dict(sequence_parallel=True)),
    (Case(3, 1, 16, seq=12), HelixConfig(1, 2), SELECTIVE),
]


@pytest.mark.parametrize(("tp", "cp", "jobs"), [(4, 1, ORDERED), (2, 2, OF_POSITIONS)])
def test_every_rank_makes_the_same_collectives_in_an_order_that_data_imposes(tp, cp, jobs):
    """Whatever autograd runs first: of any two exchanges of a backward one needs the other's result."""
    (found,) = run_ranks(passes, 1, tp, cp, jobs, timeout_s=120)
    for job, of_ranks in zip(jobs, found, strict=True):
        for rank in of_ranks:
            assert rank["made"] == of_ranks[0]["made"] and rank["made"], job
            assert rank["exchanges"] >= (1 if job[1].recompute_exchange else 2) and not rank["open"], job


def rank_raises(tp: int) -> tuple[str, list[dict]]:
    """A pass that fails while K and V travel; then one of the same layer, and one of another."""
    start(tp)
    case, helix = CASES[0]
    case.draw()
    layout = helix.resolve(case.heads, case.groups, case.dim, tp).layout
    groups, rank, said, found = Groups().of(layout.grid), torch.distributed.get_rank(), "", []
    for fails in (True, False):
        layer = make_layer(case, helix, tp, groups).train()
        load(layer, case, layout.qkv_rows(rank), layout.proj_columns(rank), torch.float32)
        if fails:
            hook = layer.q_layernorm.register_forward_pre_hook(lambda *_: 1 / 0)
            try:
                run(layer, case, tp)
            except ZeroDivisionError as error:
                said = str(error)
            hook.remove()
            assert layer._prepare is None and layer.core_attention.prepare is None
        found.append(run(layer, case, tp))
    return said, found


def test_a_pass_that_fails_meanwhile_leaves_nothing_behind():
    for said, (again, fresh) in run_ranks(rank_raises, 2, 2):
        assert said == "division by zero"
        assert_same_numbers(again, fresh)
