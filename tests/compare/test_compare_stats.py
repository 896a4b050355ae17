"""The statistics of a comparison against values computed by hand, scipy's own tests, and simulation."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from helix_megatron.compare import stats

# Student's t, 97.5 %, from the printed table
T4, T2 = 2.776445, 4.302653


def test_summary_by_hand():
    found = stats.summary([10.0, 12.0, 11.0, 13.0, 14.0])
    assert found["n"] == 5
    assert found["mean"] == 12.0
    assert found["sd"] == pytest.approx(math.sqrt(10 / 4))
    assert found["cv"] == pytest.approx(math.sqrt(2.5) / 12)
    half = T4 * math.sqrt(2.5) / math.sqrt(5)
    assert found["ci95"] == pytest.approx([12 - half, 12 + half], rel=1e-6)


def test_one_run_has_a_mean_and_nothing_else():
    assert stats.summary([3.0]) == {"n": 1, "mean": 3.0, "sd": None, "cv": None, "ci95": None}
    found = stats.compare([2.0], [1.0])
    assert found["ratio"] == 2.0
    assert found["differs"] is None
    assert found["ci95"] is found["p_value"] is found["bootstrap_ci95"] is None


def test_comparison_by_hand():
    own, other = [2.0, 2.0, 2.0 * math.e**0.3], [1.0, 1.0, 1.0]
    mean, sd = math.log(2) + 0.1, math.sqrt((0.01 + 0.01 + 0.04) / 2)
    found = stats.compare(own, other)
    assert found["ratio"] == pytest.approx(2 * math.e**0.1)
    half = T2 * sd / math.sqrt(3)
    assert found["ci95"] == pytest.approx([math.exp(mean - half), math.exp(mean + half)], rel=1e-6)
    t = mean / (sd / math.sqrt(3))
    assert found["p_value"] == pytest.approx(2 * scipy_stats.t.sf(t, 2))
    assert found["differs"] is True
    assert found["bootstrap_ci95"] is None  # three pairs


def test_p_value_and_cohens_d_against_scipy():
    rng = np.random.default_rng(5)
    own, other = rng.lognormal(0.1, 0.2, 8), rng.lognormal(0.0, 0.2, 8)
    found = stats.compare(own, other)
    assert found["p_value"] == pytest.approx(scipy_stats.ttest_rel(np.log(own), np.log(other)).pvalue)
    n = len(own)
    t = scipy_stats.ttest_ind(own, other).statistic  # pooled: t = d sqrt(n / 2) for equal groups
    assert found["cohens_d"] == pytest.approx(t / math.sqrt(n / 2))
    assert (found["p_value"] < 0.05) == found["differs"]


def test_equal_values_are_equal_and_a_constant_ratio_is_a_difference():
    same = stats.compare([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (same["ratio"], same["p_value"], same["differs"]) == (1.0, 1.0, False)
    assert same["bootstrap_ci95"] == [1.0, 1.0]
    twice = stats.compare([2.0] * 5, [1.0] * 5)
    assert (twice["p_value"], twice["differs"], twice["cohens_d"]) == (0.0, True, None)


def test_a_drift_that_hits_both_sides_cancels():
    drift = np.array([1.0, 1.3, 1.7, 2.2, 3.0])
    found = stats.compare(1.05 * drift, drift)
    assert found["ratio"] == pytest.approx(1.05)
    assert found["differs"] is True
    assert abs(found["cohens_d"]) < 0.2  # unpaired, it would be lost


def test_bootstrap_against_every_resample():
    """Five pairs have 5**5 equally likely resamples: the percentiles of all of them."""
    own, other = np.array([2.0, 2.2, 1.9, 2.4, 2.1]), np.array([1.0, 1.05, 1.0, 1.1, 0.9])
    picks = np.stack(np.meshgrid(*[range(5)] * 5)).reshape(5, -1)
    ratios = own[picks].mean(axis=0) / other[picks].mean(axis=0)
    tail = (1 - stats.expanded_confidence(5)) / 2
    assert stats.bootstrap_ratio(own, other) == pytest.approx(np.quantile(ratios, [tail, 1 - tail]), rel=0.01)
    assert stats.bootstrap_ratio(own, other) == stats.bootstrap_ratio(own, other)


def test_expanded_confidence_by_hand():
    # n = 5: sqrt(5/4) * 2.776445 = 3.10416; the normal's tail beyond it is 0.000954
    assert stats.expanded_confidence(5) == pytest.approx(1 - 2 * 0.000954, abs=2e-6)
    assert stats.expanded_confidence(100_000) == pytest.approx(0.95, abs=1e-4)


def test_intervals_cover_as_often_as_they_say():
    """Equal variants, five runs each: both intervals hold 1 about 19 times in 20; 5 % is found."""
    rng = np.random.default_rng(11)
    tries, t_covers, bootstrap_covers, found = 300, 0, 0, 0
    for _ in range(tries):
        own, other = rng.normal(1, 0.02, 5), rng.normal(1, 0.02, 5)
        result = stats.compare(own, other)
        t_covers += not result["differs"]
        low, high = result["bootstrap_ci95"]
        bootstrap_covers += low <= 1 <= high
        found += stats.compare(rng.normal(1.05, 0.01, 5), rng.normal(1, 0.01, 5))["differs"]
    assert 0.92 <= t_covers / tries <= 0.98
    assert 0.87 <= bootstrap_covers / tries <= 0.98
    assert found / tries >= 0.98


@pytest.mark.parametrize(("own", "other"), [([1.0], [1.0, 2.0]), ([], []), ([0.0], [1.0]), ([1.0], [-1.0])])
def test_what_cannot_be_compared(own, other):
    with pytest.raises(ValueError, match="as many positive values"):
        stats.compare(own, other)


def test_what_cannot_be_summarised():
    for values in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="finite values"):
            stats.summary(values)
