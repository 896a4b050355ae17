"""A small share of benchmarks/soak_inference.py: random requests, cancellations, too small a cache."""

import sys
from pathlib import Path

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


def test_random_requests_and_cancellations(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("PYTHONPATH", BENCHMARKS)
    import soak_inference

    found = soak_inference.run(60, 1, longest=300, blocks=24)
    assert found["failures"] == [], found
    assert found["cancelled"] > 2 and found["paused"] > 0 and found["ties"] <= 2, found
    assert found["tokens"] > 600


def test_a_wrong_answer_is_noticed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    sys.modules.pop("soak_inference", None)
    from soak_inference import Request, differences

    wanted = [Request([1], 2, 0, None), Request([1], 3, 0, 1)]
    alone = {"answers": {0: [4, 5], 1: [6]}, "cancelled": [1], "margins": {0: [0.5, 0.5], 1: [0.5]}}
    same = {"answers": {0: [4, 5], 1: [6, 7]}, "cancelled": [1]}
    assert differences(alone, same, wanted) == ([], 0)
    assert differences(alone, {**same, "answers": {0: [4, 6], 1: [6]}}, wanted) == ([0], 0)
    assert differences(alone, {**same, "answers": {0: [4], 1: [6]}}, wanted) == ([0], 0)
    assert differences(alone, {**same, "answers": {0: [4, 5], 1: [9]}}, wanted) == ([1], 0)
    alone["margins"][0][1] = 1e-4
    assert differences(alone, {**same, "answers": {0: [4, 6], 1: [6]}}, wanted) == ([], 1)
