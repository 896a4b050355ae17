"""The statistics of a comparison. Pure: numbers in, numbers out.

The unit is the independent run: one fresh launch gives one value of a measure (the mean of its iterations).
Iterations of one run share a process placement, a memory layout and the machine's mood; they are no
independent samples, and 1000 of them make no interval honest. So n below is the number of runs.

Two variants are compared run by run: run k of one and run k of the other stand next to each other in time
(A B A B), so what drifts slowly hits both and cancels in their ratio. Ratios are positive and skewed, so the
test and its interval work on their logarithms and agree: p < 0.05 exactly when the interval leaves out 1.

    paired t-interval   exp(mean(x) +- t(0.975, n-1) sd(x) / sqrt(n)),  x_k = log(own_k / other_k)
    bootstrap           the ratio of means over resampled pairs, percentiles widened for small n as by
                        Hesterberg ("What Teachers Should Know About the Bootstrap", 2015); needs
                        MIN_BOOTSTRAP pairs
    Cohen's d           difference of means over the pooled standard deviation of the two groups
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

MIN_BOOTSTRAP = 5
"""Pairs below which resampling cannot reach the tails that a 95 % interval needs."""
_RESAMPLES = 9999


def summarise(values: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """n, mean, sd (n - 1), cv = sd / mean, and the t-interval of the mean; None where n < 2 gives none."""
    x = np.asarray(values, dtype=float)
    if not x.size or not np.isfinite(x).all():
        raise ValueError(f"a summary needs finite values, got {list(values)!r}")
    mean = float(x.mean())
    result: dict[str, Any] = {"n": int(x.size), "mean": mean, "sd": None, "cv": None, "ci95": None}
    if x.size < 2:
        return result
    sd = float(x.std(ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, x.size - 1)) * sd / math.sqrt(x.size)
    return result | {"sd": sd, "cv": sd / abs(mean) if mean else None, "ci95": [mean - half, mean + half]}


def half_width(logs: Sequence[float], confidence: float = 0.95) -> float:
    """Half the t-interval of the mean of logarithms of ratios; infinite for fewer than two."""
    x = np.asarray(logs, dtype=float)
    if x.size < 2:
        return math.inf
    return float(stats.t.ppf((1 + confidence) / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size))


def compare(own: Sequence[float], other: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """Paired comparison of positive values, own_k beside other_k: how many times `other` is `own`?

    Returns n, ratio (geometric mean of own_k / other_k), ci95, p_value (paired t-test of the logarithms),
    cohens_d, bootstrap_ci95, and differs: True or False, or None when n < 2 can show nothing.
    """
    a, b = np.asarray(own, dtype=float), np.asarray(other, dtype=float)
    if a.shape != b.shape or not a.size or not (a > 0).all() or not (b > 0).all():
        raise ValueError(f"a comparison needs as many positive values on both sides: {own}, {other}")
    logs = np.log(a / b)
    result: dict[str, Any] = {"n": int(a.size), "ratio": float(np.exp(logs.mean()))}
    absent = {"ci95": None, "p_value": None, "cohens_d": None, "bootstrap_ci95": None, "differs": None}
    if a.size < 2:
        return result | absent
    if logs.std():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # nearly equal values lose precision, it says
            test = stats.ttest_1samp(logs, 0.0)
        p_value, (low, high) = float(test.pvalue), np.exp(test.confidence_interval(confidence)).tolist()
    else:  # scipy divides by it
        p_value, low, high = 0.0 if logs.mean() else 1.0, result["ratio"], result["ratio"]
    return result | {
        "ci95": [low, high],
        "p_value": p_value,
        "cohens_d": cohens_d(own, other),
        "bootstrap_ci95": bootstrap_ratio(own, other, confidence),
        "differs": not low <= 1 <= high,
    }


def cohens_d(own: Sequence[float], other: Sequence[float]) -> float | None:
    """(mean(own) - mean(other)) / pooled sd; None when neither side varies."""
    a, b = np.asarray(own, dtype=float), np.asarray(other, dtype=float)
    pooled = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)  # equal group sizes
    return float((a.mean() - b.mean()) / pooled) if pooled else None


def expanded_confidence(n: int, confidence: float = 0.95) -> float:
    """The confidence at which percentiles of n resampled values reach as far as a t-interval does."""
    reach = math.sqrt(n / (n - 1)) * float(stats.t.ppf((1 + confidence) / 2, n - 1))
    return 1 - 2 * float(stats.norm.cdf(-reach))


def bootstrap_ratio(
    own: Sequence[float], other: Sequence[float], confidence: float = 0.95
) -> list[float] | None:
    """Percentile interval of mean(own) / mean(other) over resampled pairs, the same at every call.

    None for fewer than MIN_BOOTSTRAP pairs.
    """
    a, b = np.asarray(own, dtype=float), np.asarray(other, dtype=float)
    if a.size < MIN_BOOTSTRAP:
        return None
    if np.ptp(a / b) == 0:
        return [float(a[0] / b[0])] * 2
    interval = stats.bootstrap(
        (a, b),
        lambda x, y, axis=-1: x.mean(axis=axis) / y.mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        confidence_level=expanded_confidence(a.size, confidence),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [float(interval.low), float(interval.high)]
