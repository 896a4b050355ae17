"""The self-check: its judgement on synthetic runs, the known slowing, and what measuring costs."""

import numpy as np
import pytest

from helix_megatron.compare import selfcheck, workloads
from helix_megatron.compare.comm import CommMeter


def runs_of(seed, slow_down, noise=0.01):
    """100 rounds of A, A again, and slowed: noisy, on a machine that becomes slower all the time."""
    rng = np.random.default_rng(seed)
    drift = np.linspace(1.0, 2.0, 100)
    factors = (1.0, 1.0, 1.0 + slow_down)
    return [(drift * factor * rng.normal(1, noise, 100)).tolist() for factor in factors]


def test_equal_variants_are_equal_and_five_percent_are_found():
    found = selfcheck.judge(*runs_of(1, 0.05), runs=5)
    assert found["tries"] == 20
    assert found["false_alarms"] <= 2
    assert found["found"] >= 18
    assert found["passed"]
    assert np.mean(found["slowed_ratios"]) == pytest.approx(1.05, abs=0.005)


def test_a_harness_that_cannot_tell_does_not_pass():
    blind = selfcheck.judge(*runs_of(2, 0.0), runs=5)  # nothing was slowed
    assert blind["found"] <= 2
    assert not blind["passed"]
    same, again, slowed = runs_of(3, 0.05)
    biased = selfcheck.judge(same, [1.05 * value for value in again], slowed, runs=5)  # A differs from itself
    assert biased["false_alarms"] >= 18
    assert not biased["passed"]
    faster = selfcheck.judge(
        same, again, [0.9 * value for value in same], runs=5
    )  # a difference, not the one
    assert faster["found"] == 0
    late = selfcheck.judge(same, again, same[:50] + slowed[50:], runs=5)  # slowed from the eleventh try on
    assert 8 <= late["found"] <= 12
    for lengths in ((1, 1, 1), (10, 10, 5), (10, 5, 10)):
        with pytest.raises(ValueError, match="no tries of 5"):
            selfcheck.judge(*([1.0] * length for length in lengths), runs=5)


def test_slowing_adds_the_share_it_says(monkeypatch):
    """With a clock of our own: an iteration of 2 s slowed by 5 % is one of 2.1 s."""
    now = [0.0]
    monkeypatch.setattr(workloads.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(workloads.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(workloads.torch.cuda, "synchronize", lambda: None)
    samples = workloads.Samples(1, host=True, slow_down=0.05)
    for _ in range(3):
        samples.iteration(lambda: now.__setitem__(0, now[0] + 2.0), CommMeter())
    taken = samples.as_json(1, 1)
    assert taken["seconds"] == pytest.approx([2.1, 2.1])
    assert taken["warmup_seconds"] == pytest.approx([2.1])


def test_measuring_costs_little(monkeypatch):
    """A step of the host comparison has some hundred collectives and takes a second: far below 1 %."""
    import torch

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cost = min((selfcheck.overhead(100, 1.0) for _ in range(5)), key=lambda found: found["share"])
    assert 0 < cost["per_call_s"] < cost["added_s"]
    assert cost["added_s"] == pytest.approx(cost["fixed_s"] + 100 * cost["per_call_s"])
    assert cost["share"] <= 0.01
