"""Adaptive gradient scaling: fp16 keeps what it lost, nothing else changes; found-inf is the whole grid's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_megatron.check.reference import Case
from helix_megatron.host.launcher import run_ranks
from helix_megatron.megatron.gradient_range import LARGEST, keep_in_range, power_of_two
from helix_megatron.partition.config import HelixConfig
from tests.megatron_glue.gradient_range_worker import layer_results, rank_steps, train
from tests.training import HELIX, MODEL


# ---- the factor ----
@given(st.floats(1e-30, 1e30))
def test_factors_are_exact_and_the_largest_that_stay_in_range(largest):
    factor = power_of_two(torch.tensor(largest)).item()
    assert (
        torch.tensor(factor).half().item() == factor and torch.tensor(1 / factor).half().item() == 1 / factor
    )
    assert torch.frexp(torch.tensor(factor)).mantissa == 0.5  # a power of two
    if 2.0**-15 < factor < 2.0**15:
        assert LARGEST / 2 * 0.999 < largest * factor <= LARGEST * 1.001


@pytest.mark.parametrize("largest", [0.0, float("inf"), float("nan")])
def test_what_has_no_range_is_not_scaled(largest):
    assert power_of_two(torch.tensor(largest)) == 1


class Core(torch.nn.Module):
    """Unfused attention without a mask; keeps the largest number that its backward makes of scores."""

    def __init__(self, ratio: int):
        super().__init__()
        self.ratio, self.largest = ratio, []

    def forward(self, query, key, value, mask=None):
        key, value = (x.repeat_interleave(self.ratio, 2) for x in (key, value))
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) * query.shape[-1] ** -0.5
        probs = scores.float().softmax(-1).to(query.dtype)
        for x in (scores, probs):
            if x.requires_grad:
                x.register_hook(lambda grad: self.largest.append(grad.abs().max().item()))
        return torch.einsum("bhst,tbhd->sbhd", probs, value).flatten(-2)


def gradients(tensors, dtype, scaled):
    query, key, value, out_grad = (x.detach().to(dtype) for x in tensors)
    core = Core(query.shape[2] // key.shape[2])
    if scaled:
        keep_in_range(core, query.shape[-1] ** -0.5)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    core(*inputs, None).backward(out_grad)
    return [x.grad for x in inputs], core.largest


def drawn(seed, scale_of_values=1.0, scale_of_gradients=1.0, length=64, ratio=2, dim=4):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key, value = normal(length, 1, ratio, dim), normal(length, 1, 1, dim), normal(length, 1, 1, dim)
    out_grad = normal(length, 1, ratio * dim) * scale_of_gradients
    return [x.half().double() for x in (query, key, value * scale_of_values, out_grad)]


def distance(found, expected):
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 999),
    st.integers(-3, 9),
    st.integers(-16, 9),
    st.sampled_from([1, 7, 64]),
    st.integers(1, 3),
)
def test_no_number_of_the_backward_leaves_the_range(seed, values, grads, length, ratio):
    tensors = drawn(seed, 2.0**values, 2.0**grads, length, ratio)
    found, largest = gradients(tensors, torch.float16, True)
    assert max(largest) <= LARGEST * 1.01
    plain, inside = gradients(tensors, torch.float64, False)
    if max(x.abs().max() for x in plain) < 6e4:
        assert all(torch.isfinite(x).all() for x in found)
    assert all(a < 6e4 for a in largest) or max(inside) > 6e4


def test_what_overflows_inside_alone_is_no_overflow():
    """Score gradients beyond fp16 from values of 256, while the gradients of Q, K and V are within it."""
    tensors = drawn(0, scale_of_values=256, scale_of_gradients=128)
    expected, inside = gradients(tensors, torch.float64, False)
    assert max(inside) > 65504 > max(x.abs().max() for x in expected)
    plain, _ = gradients(tensors, torch.float16, False)
    assert not all(torch.isfinite(x).all() for x in plain)
    assert distance(gradients(tensors, torch.float16, True)[0], expected) < 5e-3


# ---- training ----
SLICED = dict(softmax="per-slice", rotary_percent=0.0)


def trained(half, scaled):
    case = Case(2, 1, 8, hidden=8, seq=512, batch=2, rotary_percent=0.0)
    helix = HelixConfig(1, 2, adaptive_grad_scaling=scaled, **SLICED)
    return run_ranks(train, 2, 2, case, helix, 2.0**-8 if half else 1.0, half, 80)


@pytest.fixture(scope="module")
def runs():
    return {"fp32": trained(False, False), "plain": trained(True, False), "adaptive": trained(True, True)}


def test_where_gradients_of_queries_and_keys_underflow_these_do_not(runs):
    """In the first step, from equal weights: what is lost of the gradient, against float32."""
    for rank in range(2):

        def lost(run, part, rank=rank):
            expected = runs["fp32"][rank][part]
            return ((runs[run][rank][part] - expected).norm() / expected.norm()).item()

        found = {
            (run, part): lost(run, part) for run in ("plain", "adaptive") for part in ("query_key", "value")
        }
        assert found["plain", "query_key"] > 0.7, found
        assert found["adaptive", "query_key"] < 0.35, found
        assert max(found["plain", "value"], found["adaptive", "value"]) < 0.25, (
            found
        )  # not the loss scale's fault


def test_where_the_plain_setting_stalls_this_trains(runs):
    last = {name: sum(ranks[0]["losses"][-16:]) / 16 for name, ranks in runs.items()}
    assert runs["fp32"][0]["losses"][0] > 0.4
    assert last["fp32"] < 0.16
    assert abs(last["adaptive"] - last["fp32"]) < 0.005, last
    assert last["plain"] > 0.23, last


# ---- nothing else changes ----
def both(dtype, settings, **overrides):
    case = Case(8, 2, 16, rotary_percent=1.0, seq=24)
    jobs = [
        (case, HelixConfig(2, 2, adaptive_grad_scaling=on, **settings), overrides) for on in (False, True)
    ]
    for without, with_it in run_ranks(layer_results, 4, 4, dtype, jobs):
        yield {name: torch.equal(without[name], with_it[name]) for name in without}


EXACT = [dict(), dict(query_placement="dims"), dict(core_attention="spec"), dict(comm_type="all_reduce")]


@pytest.mark.parametrize("setting", EXACT)
def test_in_exact_mode_nothing_changes_bit_for_bit(setting):
    for same in both(torch.float16, setting):
        assert all(same.values()), same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_per_slice_changes_nothing_where_there_is_range(dtype):
    for same in both(dtype, dict(softmax="per-slice")):
        assert all(same.values()), same


@pytest.mark.parametrize(
    "recompute", [{}, dict(recompute_granularity="selective", recompute_modules=["core_attn"])]
)
def test_per_slice_in_fp16_differs_in_gradients_alone(recompute):
    for same in both(torch.float16, dict(softmax="per-slice"), **recompute):
        assert same["output"] and same["proj_weight"] and not same["qkv_weight"], same


# ---- Megatron's own loop ----
@pytest.mark.training
@pytest.mark.parametrize("scale", ["--initial-loss-scale 65536", "--loss-scale 1024", "--loss-scale 1"])
def test_in_megatrons_loop_both_settings_train_alike(trainer, scale):
    """Its tiny models lose nothing that counts, dynamic scale or fixed: the flag decides nothing there."""
    flags = f"--tensor-model-parallel-size 2 {HELIX} --helix-softmax per-slice --fp16 {scale}".split()
    plain, adaptive = (
        trainer(2, [*MODEL, *flags, *more]).losses for more in ([], ["--helix-adaptive-grad-scaling"])
    )
    assert len(plain) == 20 and plain[-1] < plain[0] - 1
    assert adaptive == pytest.approx(plain, abs=0.02)


# ---- found-inf ----
STEPS, BROKEN = 5, 3


@pytest.mark.training
@pytest.mark.parametrize("agree", [True, False])
@pytest.mark.parametrize("softmax", ["exact", "per-slice --helix-adaptive-grad-scaling"])
def test_an_infinity_in_one_slice_makes_every_rank_skip_the_step(trainer, softmax, agree):
    """Of four ranks, 2x2, one has an infinite entry in its slice. Without the agreement they part ways."""
    flags = f"""--tensor-model-parallel-size 4 {HELIX} --helix-softmax {softmax} --fp16
        --initial-loss-scale 1024 --hysteresis 1 --clip-grad 0 --train-iters {STEPS}
        --num-attention-heads 6 --num-query-groups 2 --data-cache-path {trainer.index}""".split()
    passes = 2 * BROKEN  # two micro-batches a step
    ranks = run_ranks(rank_steps, 4, [*MODEL, *flags], passes, 1, agree)
    broken = {"updated": False, "loss scale": 512.0}
    for rank, steps in enumerate(ranks):
        assert len(steps) == STEPS
        assert all(step == {"updated": True, "loss scale": 1024.0} for step in steps[: BROKEN - 1])
        skips = agree or rank == 1
        assert (steps[BROKEN - 1] == broken) is skips, (rank, steps)
        assert all(step["loss scale"] == (512.0 if skips else 1024.0) for step in steps[BROKEN:])
        assert all(step["updated"] for step in steps[BROKEN:])
