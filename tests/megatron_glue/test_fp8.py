"""FP8 attention with sliced heads is as near to float64 as Megatron in FP8, and FP8 where it should be."""

import json
import math
import subprocess
import sys

import pytest
import torch

from tests.megatron_glue.fp8_noise import to_fp8
from tests.megatron_glue.te_environment import environment

CASE = dict(heads=4, groups=1, dim=32, hidden=64, seq=32, bias=False)
EVEN = dict(heads=8, groups=2, dim=32, hidden=64, seq=32, bias=False)
DIMS = dict(blockwise=128)  # a slice is blocks
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
GRIDS = {  # ranks, case, settings
    "1x2 heads": (2, CASE, dict(query_placement="heads")),
    "1x2 dims": (2, CASE, dict(query_placement="dims")),
    "1x2 all_reduce": (2, CASE, dict(comm_type="all_reduce")),
    "2x2": (4, EVEN, dict(head_parallel_size=2, dim_parallel_size=2)),
}


AS_GOOD = 1.3
E4M3 = torch.float8_e4m3fn
# A rounded mantissa m in [1, 2) is off by 2^-3 / sqrt(12). Over all scales m is uniform on a logarithmic
# scale, where the mean of 1/m^2 is 3/8 / log(2).
ROUNDING = 2**-3 / math.sqrt(12) * math.sqrt(3 / 8 / math.log(2))


def error_of_product(slices: int, fault: str = "", phase: float = 0.0) -> float:
    """|y - y'| / |y| of y = x w^T in float64; x and w rounded to E4M3, each slice of w's rows with a scale.

    phase: binades by which scales are less than the largest.
    """
    generator = torch.Generator().manual_seed(5)
    x, w = (torch.randn(96, 128, generator=generator, dtype=torch.float64) for _ in range(2))

    def rounded(part: torch.Tensor) -> torch.Tensor:
        scale = torch.finfo(E4M3).max / part.abs().amax() / 2**phase
        return to_fp8(part * scale, E4M3) / scale

    parts = [rounded(part) for part in w.chunk(slices)]
    if fault == "a scale":
        parts[0] = parts[0] * 1.19
    if fault == "order":
        parts = parts[::-1]
    exact = x @ w.t()
    return ((rounded(x) @ torch.cat(parts).t() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("slices", [1, 2, 4, 8])
def test_rounding_is_as_large_with_any_scale(slices):
    """Whole tensors and slices alike: what E4M3 says, for both factors of a product."""
    errors = [error_of_product(slices, phase=phase / 16) for phase in range(16)]
    expected = math.sqrt(2) * ROUNDING
    assert math.sqrt(sum(e * e for e in errors) / 16) == pytest.approx(expected, rel=0.02)
    assert errors == pytest.approx([expected] * 16, rel=0.1)  # a third of what AS_GOOD allows


@pytest.mark.parametrize("fault", ["a scale", "order"])
@pytest.mark.parametrize("slices", [2, 4])
def test_what_is_wrong_is_further_away_than_the_bound(slices, fault):
    assert error_of_product(slices, fault) > AS_GOOD * error_of_product(1)


@pytest.fixture(scope="module")
def found():
    """{(grid, recipe): what each rank found}; recipe None is bf16."""
    lists: dict[int, list] = {}
    for recipe in (None, *RECIPES):
        for case in (CASE, EVEN):
            for dim in {32, 128} if recipe is None else {DIMS.get(recipe, 32)}:
                key = "vanilla", case["heads"], dim, recipe
                lists.setdefault(1, []).append((key, {**case, "dim": dim}, None))
    for recipe in RECIPES:
        for name, (ranks, case, settings) in GRIDS.items():
            case = {**case, "dim": DIMS.get(recipe, 32)}
            lists.setdefault(ranks, []).append(((name, recipe), case, settings))
    jobs = [
        [ranks, [dict(case=case, helix=helix, recipe=key[-1]) for key, case, helix in some]]
        for ranks, some in lists.items()
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.megatron_glue.fp8_worker"],
        input=json.dumps(jobs),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    everyones = json.loads(done.stdout.splitlines()[-1])
    return {
        key: [rank[number] for rank in by_rank]
        for some, by_rank in zip(lists.values(), everyones, strict=True)
        for number, (key, _, _) in enumerate(some)
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", GRIDS)
def test_output_and_gradients_are_as_good_as_megatrons(found, name, recipe):
    model = GRIDS[name][1]["heads"], DIMS.get(recipe, 32)
    (half,), (whole,) = found[("vanilla", *model, None)], found[("vanilla", *model, recipe)]
    for part, error in whole["errors"].items():
        assert 3 * half["errors"][part] < error < 0.15, (part, error)  # FP8's own, and small
        ours = max(rank["errors"][part] for rank in found[name, recipe])
        assert ours < AS_GOOD * error, f"{part}: {ours} against {error}"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", GRIDS)
def test_slices_are_what_is_quantised(found, name, recipe):
    """Both weights, and the gradients of what they give, as this rank holds them."""
    for rank in found[name, recipe]:
        (qkv, hidden), (_, columns) = rank["weights"]
        model = GRIDS[name][1]["heads"], DIMS.get(recipe, 32)
        assert qkv < found[("vanilla", *model, recipe)][0]["weights"][0][0]
        shapes = {
            (dtype, shape[0] if dtype.endswith("E4M3") else 0, shape[-1])
            for shape, dtype in rank["quantised"]
        }
        assert {("kFloat8E4M3", qkv, hidden), ("kFloat8E4M3", hidden, columns)} <= shapes
        assert {("kFloat8E5M2", 0, qkv), ("kFloat8E5M2", 0, hidden)} <= shapes
