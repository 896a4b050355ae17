"""Slices of uneven size, and by weights: layers against the float64 reference, bytes, refusals."""

from dataclasses import replace

import pytest
import torch

from helix_megatron.check.reference import Case, reference
from helix_megatron.host.launcher import run_ranks
from helix_megatron.megatron.refusals import refuse_unsupported
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.derived import plan_for
from helix_megatron.partition.grid import HelixConfigError
from tests.megatron_glue.layer_worker import (
    Groups,
    all_settings,
    errors,
    load,
    make_config,
    make_layer,
    run,
    start,
)
from tests.megatron_glue.test_attention_exact import FEATURES, assert_exact


def uneven_settings(case: Case, tp: int, weights: dict | None = None, **chosen) -> list[HelixConfig]:
    """all_settings whose slices are uneven; with `weights`, {m: weights}, those m alone."""
    found = all_settings(case, tp, **chosen)
    if weights is not None:
        found = [
            replace(helix, slice_weights=weights[helix.dim_parallel_size])
            for helix in found
            if helix.dim_parallel_size in weights
        ]
    shape = case.heads, case.groups, case.dim, tp, case.interleaved
    return [helix for helix in found if not helix.resolve(*shape).layout.is_even]


# ---- exact ----
@pytest.mark.parametrize(
    "tp, shapes",
    [
        (3, [(9, 3, 16), (4, 4, 20), (8, 1, 64)]),
        (5, [(9, 3, 64), (10, 2, 16), (16, 16, 24)]),
        (6, [(8, 2, 64), (9, 3, 16), (12, 12, 20)]),
        (7, [(9, 3, 64), (14, 2, 16), (28, 4, 40)]),
    ],
)
def test_every_grid_comm_type_and_placement(tp, shapes):
    jobs = []
    for heads, groups, dim in shapes:
        case = Case(heads, groups, dim, seq=13)
        jobs += [(case, helix, {}) for helix in uneven_settings(case, tp)]
    placements = {helix.query_placement for _, helix, _ in jobs}
    assert placements == {"dims", "heads"} and {h.comm_type for _, h, _ in jobs} == {"a2a", "all_reduce"}
    assert_exact(tp, jobs)


def test_features():
    jobs = []
    for feature in [*FEATURES, dict(gate=True), dict(gate=True, qk_norm="RMSNorm", interleaved=True)]:
        for heads, groups in [(9, 3), (4, 2), (3, 1)]:
            case = Case(heads, groups, dim=16, **feature)
            jobs += [(case, helix, {}) for helix in uneven_settings(case, 3)]
    assert len(jobs) > 150
    assert_exact(3, jobs)


WEIGHTS = {2: (3.0, 1.0), 3: (1.0, 2.0, 1.0), 4: (4.0, 1.0, 1.0, 0.1)}


def test_weights():
    jobs = []
    for tp in (2, 4):
        for feature in (
            dict(),
            dict(rotary_percent=0.5, interleaved=True),
            dict(qk_norm="LayerNorm", gate=True),
        ):
            for heads, groups in [(8, 2), (9, 3)]:
                case = Case(heads, groups, dim=20, **feature)
                jobs += [(tp, case, helix, {}) for helix in uneven_settings(case, tp, WEIGHTS)]
    for tp in (2, 4):
        assert_exact(tp, [job for size, *job in jobs if size == tp])
    sizes = HelixConfig(slice_weights=WEIGHTS[4]).resolve(9, 3, 20, 4).layout.all_slice_dims
    assert sizes == [14, 2, 2, 2]


def test_sequence_parallel_recompute_and_a_core_with_its_own_masks():
    jobs = []
    for overrides, features, chosen in (
        (dict(sequence_parallel=True), dict(seq=15), {}),
        (dict(recompute_granularity="selective", recompute_modules=["core_attn"]), {}, {}),
        (dict(te_core=True), dict(mask="arbitrary"), dict(cores=("spec",))),
        (dict(te_core=True), dict(window=(5, 0)), dict(cores=("spec",))),
    ):
        for heads, groups in [(9, 3), (4, 2), (3, 3)]:
            case = Case(heads, groups, dim=16, **features)
            jobs += [(case, helix, overrides) for helix in uneven_settings(case, 3, **chosen)]
    assert_exact(3, jobs)


def test_sinks():
    jobs = []
    for heads, groups in [(9, 3), (3, 3)]:
        case = Case(heads, groups, dim=16, sinks=True)
        jobs += [(case, helix, {}) for helix in uneven_settings(case, 3) if helix.comm_type == "a2a"]
    assert_exact(3, jobs, tolerance=1e-5)  # one number a head, a sum over all scores: of fp32's rounding


def _half_precision(tp: int, jobs: list) -> list[dict[str, float]]:
    start(tp)
    groups, found, rank = Groups(), [], torch.distributed.get_rank() % tp
    for case, helix in jobs:
        case.draw()
        for name in ("hidden", "qkv_weight", "qkv_bias", "proj_weight"):
            case.tensors[name] = case.tensors[name].bfloat16().double()
        layout = None if helix is None else helix.resolve(case.heads, case.groups, case.dim, tp).layout
        own = groups.of(layout.grid) if layout else None
        layer = make_layer(case, helix, tp, own, params_dtype=torch.bfloat16, bf16=True)
        rows = layout.qkv_rows(rank) if layout else slice(None)
        columns = layout.proj_columns(rank) if layout else slice(None)
        load(layer, case, rows, columns, torch.bfloat16)
        found.append(errors(run(layer, case, tp, torch.bfloat16), reference(case), rows, columns))
    return found


def test_half_precision_is_as_good_as_megatrons():
    cases = [Case(*shape, 32, hidden=64, seq=64) for shape in [(9, 3), (8, 2), (8, 8)]]
    megatron = run_ranks(_half_precision, 1, 1, [(case, None) for case in cases])[0]
    for placement in ("dims", "heads"):
        jobs = [
            (case, HelixConfig(1, 3, query_placement=placement))
            for case in cases
            if placement == "dims" or case.heads % 3 == 0
        ]
        for (case, _), *ranks in zip(jobs, *run_ranks(_half_precision, 3, 3, jobs), strict=True):
            base = megatron[cases.index(case)]
            for name, error in base.items():
                assert max(rank[name] for rank in ranks) <= 1.5 * error, (case, placement, name)


# ---- collectives ----
def _count(tp: int, case: Case, helix: HelixConfig) -> dict:
    """Collectives of one layer, forward alone and with its backward, over the dim group of two."""
    from helix_megatron.measure.comm import CommMeter

    start(tp)
    case.draw()
    plan = helix.resolve(case.heads, case.groups, case.dim, tp)
    layer = make_layer(case, helix, tp, Groups().of(plan.grid))
    rank = torch.distributed.get_rank()
    load(layer, case, plan.layout.qkv_rows(rank), plan.layout.proj_columns(rank), torch.float32)
    hidden, meter = case.tensors["hidden"].float().requires_grad_(), CommMeter()
    with meter.counting():
        out, _ = layer(hidden, None, rotary_pos_emb=case.rope_table())
        forward = meter.as_json()
        out.sum().backward()
    tallies = {"forward": forward, "both": meter.as_json()}
    return {
        name: {kind: (entry["calls"], entry["bytes"]) for kind, entry in tally.items() if kind.endswith("x2")}
        for name, tally in tallies.items()
    }


@pytest.mark.parametrize("placement", ["dims", "heads"])
def test_bytes_are_those_of_the_docstring(placement):
    """Nothing is padded: a rank receives what it lacks."""
    s, b, hq, hk, d, m = 12, 2, 8, 1, 16, 2
    case = Case(16, 2, d, seq=s, batch=b)
    helix = HelixConfig(2, m, query_placement=placement, slice_weights=(3.0, 1.0))
    for rank, found in enumerate(run_ranks(_count, 4, 4, case, helix)):
        d_s = (12, 4)[rank % 2]
        kv, back = 2 * s * b * hk * (d - d_s) * 4, 2 * (m - 1) * s * b * hk * d_s * 4
        queries, outputs = (s * b * hq // m * x * 4 for x in (d - d_s, (m - 1) * d_s))
        exchanged = queries + outputs if placement == "dims" else 0
        calls = 2 if placement == "dims" else 1
        assert found["forward"] == {"all_to_all x2": (calls, kv + exchanged)}
        assert found["both"] == {"all_to_all x2": (2 * calls, kv + back + 2 * exchanged)}


def _gathered_gradient() -> list[float]:
    """Slices of 2, 1 and 1 dimensions of one KV head; its gradient is 256 on rank 0 and 1 on the others."""
    from helix_megatron.exchange.heads import HeadExchange, WholeHeads
    from helix_megatron.partition.grid import AttentionShape, HelixGrid
    from helix_megatron.partition.layout import HelixLayout

    torch.distributed.init_process_group("nccl")
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    layout = HelixLayout(AttentionShape(3, 1, 4), HelixGrid(1, 3), "heads")
    own = torch.full((1, 1, 1, layout.slice_dims(rank)), float(rank), dtype=torch.bfloat16)
    key, value = own.clone().requires_grad_(), own.clone().requires_grad_()
    _, keys, values = WholeHeads(HeadExchange(layout, group), None, key, value).wait()
    assert keys.flatten().tolist() == values.flatten().tolist() == [0.0, 0.0, 1.0, 2.0]
    (keys + values).backward(torch.full_like(keys, 256.0 if rank == 0 else 1.0))
    return key.grad.flatten().tolist() + value.grad.flatten().tolist()


def test_gradients_of_gathered_pieces_are_summed_in_fp32():
    """In bfloat16 256 + 1 is 256 again; 258 is a number of it."""
    assert run_ranks(_gathered_gradient, 3) == [[258.0] * 4, [258.0] * 2, [258.0] * 2]


# ---- refusals ----
def test_what_uneven_slices_do_not_serve_is_refused():
    with pytest.raises(HelixConfigError, match="must be equal"):
        HelixConfig(softmax="per-slice", dim_parallel_size=3).resolve(9, 3, 64, 3)
    config = make_config(Case(8, 2, 128, hidden=64), 1)
    config.fp8 = "e4m3"
    with pytest.raises(HelixConfigError, match=r"rank 1 of Helix grid 1x3 holds 504 rows of linear_qkv"):
        refuse_unsupported(config, plan_for(HelixConfig(1, 3), config, 3))  # rank 0's 528 would do
    refuse_unsupported(config, plan_for(HelixConfig(1, 3, slice_weights=(2, 1, 1)), config, 3))
