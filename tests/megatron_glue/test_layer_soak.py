"""A fixed hundred of tests/megatron_glue/soak.py: random layers equal the float64 formula or are refused."""

import json

import pytest

from helix_megatron.check.reference import Case
from helix_megatron.host.launcher import RankError
from helix_megatron.partition.config import HelixConfig
from tests.megatron_glue import soak
from tests.megatron_glue.soak_draw import Job, draw, why_illegal


def test_a_hundred_random_layers():
    lines = list(soak.soak(seed=0, numbers=range(100)))
    found = soak.summary(lines)
    assert found["failures"] == [], found
    assert found["equal"] >= 85 and len(found["grids"]) >= 8 and found["refused"], found
    assert sum(count for grid, count in found["grids"].items() if "uneven" in grid) >= 15, found
    drawn = {feature for number in range(1000) for feature in draw(0, number).features()}
    assert drawn == set(found["features"]), drawn - set(found["features"])
    for world in found["worlds"]:  # process groups have threads: none are made from one layer to the next
        threads = [line["threads"] for line in lines if line["world"] == world]
        assert threads[-1] <= threads[0] + 1, (world, threads)


def test_what_is_drawn_can_mostly_work():
    reasons = [why_illegal(draw(0, number)) for number in range(1000)]
    assert 20 <= sum(reason is not None for reason in reasons) <= 100
    assert len(set(reasons)) >= 6


JOB = Job(0, 2, Case(4, 2, 8), HelixConfig())
ILLEGAL = Job(0, 2, Case(4, 2, 8), HelixConfig(3))


@pytest.mark.parametrize(
    "outcomes",
    [
        [{"grid": "1x2", "error": 1.5}, {"grid": "1x2", "error": 0.0}],
        [{"grid": "1x2", "error": 0.0}, {"grid": "1x2", "error": float("nan")}],
        [{"grid": "1x2", "error": 0.0}, {"refused": "why"}],
        [{"refused": "why"}, {"grid": "1x2", "error": 0.0}],
    ],
)
def test_a_wrong_layer_and_a_rank_that_alone_refuses_are_failures(outcomes):
    assert soak.verdict(JOB, outcomes)["verdict"] == "failed"


def test_verdicts_of_right_layers_and_refusals():
    equal, refused = [{"grid": "1x2", "error": 0.2}] * 2, [{"refused": "why"}] * 2
    assert soak.verdict(JOB, equal)["verdict"] == "equal"
    assert soak.verdict(ILLEGAL, refused)["verdict"] == "refused"
    assert soak.verdict(JOB, refused)["verdict"] == "failed"  # it can work
    assert soak.verdict(ILLEGAL, equal)["verdict"] == "failed"  # it cannot


def test_a_rank_that_fails_is_a_failure_of_its_configuration_alone(monkeypatch):
    def run_ranks(_function, world, _tp, _cp, jobs, **_kwargs):
        if any(job.number == 3 for job in jobs):
            raise RankError("it died", 1)
        return [[{"grid": "1x2", "error": 0.0} for _ in jobs]] * world

    monkeypatch.setattr(soak, "run_ranks", run_ranks)
    monkeypatch.setattr(soak, "why_illegal", lambda job: None)
    verdicts = {line["number"]: line["verdict"] for line in soak.soak(0, range(8))}
    assert verdicts == {number: "failed" if number == 3 else "equal" for number in range(8)}


def test_a_soak_goes_on_where_it_was_stopped(monkeypatch, tmp_path, capsys):
    out, asked = tmp_path / "soak.jsonl", []

    def run_ranks(_function, world, _tp, _cp, jobs, **_kwargs):
        asked.extend(job.number for job in jobs)
        return [
            [{"refused": "why"} if job.number % 2 else {"grid": "1x2", "error": 1e-7} for job in jobs]
        ] * world

    def main(*flags):
        asked.clear()
        monkeypatch.setattr("sys.argv", ["soak.py", "--out", str(out), *flags])
        assert soak.main() == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(soak, "run_ranks", run_ranks)
    monkeypatch.setattr(soak, "why_illegal", lambda job: "why" if job.number % 2 else None)
    assert main("--share", "2/5", "--total", "20")["ran"] == 4
    assert sorted(asked) == [4, 5, 6, 7]
    out.write_text(out.read_text() + '{"seed": 0, "numb')  # stopped in mid-line
    found = main("--from", "2", "--count", "6")
    assert sorted(asked) == [2, 3]
    assert (found["ran"], found["equal"], found["refused"]) == (6, 3, {"why": 3})
    assert main("--from", "2", "--count", "6", "--seed", "1")["ran"] == 6  # another seed is another soak
    assert main("--from", "2", "--count", "6", "--seconds", "-1")["ran"] == 6
    assert asked == []
