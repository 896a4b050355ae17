"""Exact Helix attention against a float64 reference in one process: output and every gradient."""

import pytest

from helix_megatron.check.reference import Case
from helix_megatron.host.launcher import run_ranks
from helix_megatron.partition.config import HelixConfig
from tests.megatron_glue.layer_worker import all_settings, check_all

TOLERANCE = 2e-6  # relative, fp32 against float64
SHAPES = [(32, 32), (16, 2), (8, 1), (9, 3), (28, 4), (14, 2)]


def assert_exact(world: int, jobs: list, tp: int | None = None, tolerance: float = TOLERANCE) -> None:
    assert jobs
    results = run_ranks(check_all, world, tp or world, jobs, timeout_s=500)
    wrong = [
        f"rank {rank}: {label}: {errors}"
        for rank, checked in enumerate(results)
        for label, errors in checked
        if max(errors.values()) > tolerance
    ]
    assert not wrong, "\n".join(wrong[:10])


@pytest.mark.parametrize("tp", [2, 4, 6, 8])
def test_every_grid_comm_type_and_placement(tp):
    jobs = []
    for heads, groups in SHAPES:
        case = Case(heads, groups, dim=48, seq=13)
        jobs += [(case, helix, {}) for helix in all_settings(case, tp)]
    assert_exact(tp, jobs)


FEATURES = [
    dict(rotary_percent=0.0),
    dict(rotary_percent=0.5),
    dict(interleaved=True),
    dict(interleaved=True, rotary_percent=0.5),
    dict(bias=False),
    dict(qk_norm="RMSNorm"),
    dict(qk_norm="LayerNorm"),
    dict(qk_norm="L2Norm"),
    dict(window=(5, 0)),
    dict(mask="padding"),
    dict(mask="arbitrary"),
    dict(mask="none"),
    dict(seq=1),
    dict(seq=3, qk_norm="RMSNorm"),  # ranks without a query
    dict(seq=2),
    dict(seq=3),
    dict(seq=7, batch=1),
]


@pytest.mark.parametrize("tp", [4])
def test_features(tp):
    jobs = []
    for feature in FEATURES:
        for heads, groups in [(8, 4), (6, 2), (9, 3), (12, 4)]:
            case = Case(heads, groups, dim=16, **feature)
            jobs += [(case, helix, {}) for helix in all_settings(case, tp)]
    assert_exact(tp, jobs)


def test_sequence_parallel_and_recompute():
    jobs = []
    for overrides in (
        dict(sequence_parallel=True),
        dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
    ):
        for heads, groups, norm in [(8, 4, None), (9, 3, None), (8, 4, "LayerNorm"), (9, 3, "RMSNorm")]:
            case = Case(heads, groups, dim=16, qk_norm=norm)
            jobs += [(case, helix, overrides) for helix in all_settings(case, 4)]
    assert_exact(4, jobs)


def test_per_slice_is_the_papers_formula():
    jobs = []
    for heads, groups in [(8, 4), (9, 3), (4, 4)]:
        for feature in (dict(), dict(rotary_percent=0.0), dict(rotary_percent=0.5), dict(interleaved=True)):
            case = Case(heads, groups, dim=16, **feature)
            jobs += [
                (case, HelixConfig(n, 4 // n, softmax="per-slice", rotary_percent=case.rotary_percent), {})
                for n in (1, 2)
                if groups % n == 0
            ]
    assert_exact(4, jobs)


def test_a_core_that_makes_its_own_masks():
    """As Transformer Engine's: it is told the kind of mask, also for a share of the positions."""
    jobs = []
    for feature in (dict(), dict(mask="arbitrary"), dict(mask="none"), dict(window=(5, 0)), dict(seq=3)):
        for heads, groups in [(8, 4), (9, 3), (12, 4)]:
            case = Case(heads, groups, dim=16, **feature)
            jobs += [(case, helix, dict(te_core=True)) for helix in all_settings(case, 4, cores=("spec",))]
    assert_exact(4, jobs)


def test_queries_that_nothing_rotates():
    """A model without RoPE, and a layer without it in a model that has it."""
    jobs = []
    for heads, groups in [(8, 4), (9, 3)]:
        for percent, unrotated in ((0.0, {}), (1.0, dict(no_rope_freq=[1]))):
            case = Case(heads, groups, dim=16, rotary_percent=percent)
            for core in (dict(), dict(te_core=True)):
                settings = all_settings(case, 4, cores=("spec",))
                jobs += [(case, helix, {**core, **unrotated}) for helix in settings]
    assert_exact(4, jobs)
