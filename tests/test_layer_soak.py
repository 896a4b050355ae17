"""A fixed hundred of tests/soak.py: random layers equal the float64 formula or are refused."""

import soak
from reference import Case

from helix_megatron.config import HelixConfig


def test_a_hundred_random_layers():
    found = soak.soak(seed=0, first=0, count=100)
    assert found["failures"] == [], found
    assert found["equal"] >= 40 and len(found["grids"]) >= 5 and found["refused"], found
    assert sum(count for grid, count in found["grids"].items() if "uneven" in grid) >= 15, found


def test_a_wrong_layer_and_a_rank_that_alone_refuses_are_failures(monkeypatch):
    job = soak.Job(0, 2, Case(4, 2, 8), HelixConfig(), {})
    monkeypatch.setattr(soak, "draw", lambda *args: job)
    for outcomes in (
        [{"grid": "1x2", "error": 1e-3}] * 2,
        [{"grid": "1x2", "error": 0.0}, {"refused": "why"}],
    ):
        monkeypatch.setattr(soak, "run_ranks", lambda *args, found=outcomes, **kwargs: [[o] for o in found])
        assert len(soak.soak(0, 0, 1)["failures"]) == 1
