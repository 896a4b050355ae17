"""A section that hangs, dies or finds a fault is named, keeps its rows, and does not stop the next."""

import json
import os
import subprocess
import sys
import time

import pytest

from helix_megatron import cli
from helix_megatron.check import sections
from helix_megatron.check.command import limit_within
from helix_megatron.check.results import WIDTH, Results, render_page, render_screen
from helix_megatron.check.rows import Place, Rows, read_rows
from helix_megatron.check.runner import run_section
from helix_megatron.check.sections import Section
from helix_megatron.host.launcher import RankError
from tests.check.faulty import rank_sleeps


class Faulty(Section):
    @property
    def function(self):
        return f"tests.check.faulty:{self.name}"


def faulty(name, seconds=60.0):
    return Faulty(name, "nothing", seconds, seconds)


def run(name, folder, seconds=60.0):
    return run_section(faulty(name, seconds), Place(0, 0, True, seconds), folder)


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("dies", "failed", "its process was killed by SIGKILL; 1 rows are kept"),
        ("leaves", "failed", "its process ended with exit code 3; 1 rows are kept"),
        ("raises", "failed", "the section itself: KeyError: 'what went wrong'"),
        ("finds_a_fault", "failed", "second: 3e-1 off"),
        ("skips", "skipped", "there is no such thing here"),
        ("says_nothing", "failed", "it ended without a result"),
        ("works", "passed", ""),
    ],
)
def test_how_a_section_ended(tmp_path, name, status, reason):
    ended = run(name, tmp_path)
    assert (ended.status, ended.reason) == (status, reason)
    assert [row["case"] for row in ended.rows][:1] == (["first"] if name not in ("skips", "says_nothing") else
                                                       ["all"] * (name == "skips"))  # fmt: skip
    if name == "raises":
        assert "what it printed before" in ended.output


def test_a_section_over_its_limit_is_killed_with_its_ranks(tmp_path):
    ended = run("sleeps", tmp_path, seconds=20)
    assert (ended.status, ended.reason) == ("failed", "not done after 20 s and killed; 1 rows are kept")
    pid = int((tmp_path / "sleeps.jsonl.pid").read_text())
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.1)
    raise AssertionError(f"rank {pid} is still there")


def test_ranks_that_hang_are_ended_before_their_section(tmp_path):
    (row,) = run("looks_at_the_clock", tmp_path, seconds=60).rows
    assert 1.0 <= row["left"] < 55.0  # seconds in which ranks must end
    place = Place(0, 0, True, 60.0, time.monotonic() + 8)
    with pytest.raises(RankError, match="still running of 1 ranks: 0; all were killed"):
        place.run(rank_sleeps, 1, str(tmp_path / "rows"))


@pytest.mark.parametrize(
    ("limit", "left", "later", "seconds"),
    [(240, 540, 6, 240), (240, 400, 6, 130), (900, 200, 1, 155), (900, 200, 0, 200), (900, 20, 2, 1)],
)
def test_sections_share_what_time_there_is(limit, left, later, seconds):
    assert limit_within(limit, left, later) == seconds


def test_the_next_section_runs_and_one_screen_says_all(tmp_path, monkeypatch, capsys):
    table = tuple(faulty(name) for name in ("dies", "works", "skips"))
    monkeypatch.setattr(sections, "SECTIONS", table)
    monkeypatch.setattr(sections, "BY_NAME", {section.name: section for section in table})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "--out", "out"]) == 1
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "out/check.json").read_text())
    assert {name: found["status"] for name, found in document["sections"].items()} == {
        "dies": "failed", "works": "passed", "skips": "skipped",
    }  # fmt: skip
    assert "FAILED   dies: its process was killed by SIGKILL" in printed
    assert "look at  works: second: attention ran unfused" in printed
    assert "skipped  skips: all: there is no such thing here" in printed
    assert "attention cores that ran: a core" in printed and "something FAILED" in printed
    assert document["revision"][:12] in printed and document["versions"]["torch"] in printed
    assert all(len(line) <= WIDTH for line in printed.splitlines())
    assert len(printed.splitlines()) < 40
    assert "as it should" in (tmp_path / "out/check.md").read_text()


def test_what_is_found_is_on_disk_before_the_next_section(tmp_path):
    place, table = Place(0, 0, True, 60.0), (faulty("works"), faulty("skips"))
    results = Results(tmp_path, "helix check", place, 0, table)
    results.add(table[0], run("works", tmp_path))
    document = json.loads((tmp_path / "check.json").read_text())
    assert document["sections"]["works"]["status"] == "passed"
    assert document["sections"]["skips"] == {"status": "not run yet"}
    assert results.failed  # nobody may call this a success
    assert "not run yet" in render_screen(document, tmp_path) and "not run yet" in render_page(document)


def test_a_half_written_row_is_left_out(tmp_path):
    rows = Rows(tmp_path / "rows")
    rows.add("whole", "ok")
    with open(rows.path, "a") as file:
        file.write('{"case": "half')
    assert [row["case"] for row in read_rows(rows.path)] == ["whole"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "speling"], "--only speling: no such section; there are exactness, kernels, graphs"),
        (["--time-limit", "0"], "--time-limit is 0.0; seconds, more than 0"),
        (["--within", "-3"], "--within is -3.0; seconds, more than 0"),
        (["--out", "/proc/nowhere"], "--out /proc/nowhere cannot be written"),
    ],
)
def test_refusals(capsys, arguments, words):
    assert cli.main(["check", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.dynamic_engine
def test_the_command_on_a_host(tmp_path):
    """The quick form as a user runs it: every section ends well, and one screen says so."""
    command = [sys.executable, "-m", "helix_megatron.cli", "check", "--quick", "--out", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert found.returncode == 0, found.stdout + found.stderr
    screen = found.stdout[found.stdout.index("\nhelix check --quick") :].strip().splitlines()
    assert len(screen) <= 60 and max(map(len, screen)) <= WIDTH
    document = json.loads((tmp_path / "check.json").read_text())
    assert {name: section["status"] for name, section in document["sections"].items()} == {
        name: "skipped" if name == "graphs" else "passed" for name in sections.BY_NAME
    }
    kernels, layers = (document["sections"][name]["rows"] for name in ("kernels", "layers"))
    assert {row["case"].split(",")[0] for row in kernels if row["status"] == "ok"} >= {"torch", "triton"}
    counted = {row["case"]: row["operations"] for row in layers if row["status"] == "measured"}
    megatron, helix = (counted[f"llama-3.1-70b, {name} TP=16"] for name in ("Megatron", "Helix 8x2 heads"))
    assert 20 < helix < megatron  # which gathers the QKV of all ranks and cuts it
    assert not any("us" in row for row in layers)  # nothing of a host is a kernel's time


def test_every_rank_of_torchrun_takes_part(tmp_path):
    """Two supervisors, each with a process of its own for every section that spans; the others run once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "helix_megatron.cli", "check", "--quick", "--out", str(tmp_path)]
    command += ["--only", "collectives", "--time-limit", "200"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert found.returncode == 0, found.stdout + found.stderr
    document = json.loads((tmp_path / "check.json").read_text())
    assert document["where"].endswith("2 ranks of torchrun")
    assert "all_gather x2 @2" in [row["case"] for row in document["sections"]["collectives"]["rows"]]
    assert found.stdout.count("helix check: nothing failed") == 1
