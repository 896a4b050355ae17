"""`processes: kept`: ranks that are started once and measure in turns; stand-ins first, then real ranks."""

import json
import re
import threading
import time
from pathlib import Path

import pytest

from helix_megatron.compare import config as configuration
from helix_megatron.compare import harness, kept, launch
from helix_megatron.compare.rank import folder_of_turn
from helix_megatron.compare.turns import TurnClient
from helix_megatron.host.launcher import RankError, run_ranks
from tests.compare import compare_fakes as fakes
from tests.compare.test_compare_end_to_end import check_bytes, run_cli

KEPT = {"processes": "kept", "repeat_seconds": 600, "interval": 0.1, "run_timeout_s": 60}
PAIR = [fakes.variant("A", 1), fakes.variant("B", 2, attention_impl="helix")]


class Ranks:
    """In place of launch.run_on_host: both ranks of a variant, which answer as `answer(seed, turn)` says.

    The answer is the samples; ("failed", cause): die in this turn; "hang": never finish it.
    """

    def __init__(self, monkeypatch, answer):
        fakes.install(monkeypatch)
        monkeypatch.setattr(launch, "run_on_host", self)
        self.answer, self.turns, self.ended = answer, [], []
        """(seed, turn) in the order of their ends, and seeds whose ranks have returned."""

    def __call__(self, config, task, ranks, stop):
        seed = task.argv[1]
        try:
            return self.take_turns(seed, task, ranks, stop)
        finally:
            self.ended.append(seed)

    def take_turns(self, seed, task, ranks, stop):
        client = TurnClient(**task.turns)
        number = 1
        while True:
            written = self.answer(seed, client.number)
            if written == "hang":
                assert stop.wait(60)
                return "timeout", "not done and killed"
            if isinstance(written, tuple):
                return written
            for rank, sample in enumerate(written[:ranks]):
                folder = folder_of_turn(Path(task.folder), number)
                folder.joinpath(f"rank-{rank}.json").write_text(json.dumps(sample))
            self.turns.append((seed, client.number))
            for _ in range(ranks):
                client.finish_turn()
            if not client.await_turn():
                return "ok", ""
            number = client.number


def both(slower=1.0):
    return [fakes.samples(0, slower=slower), fakes.samples(1, slower=slower)]


def test_turns_are_interleaved_and_end_when_the_intervals_are_narrow(tmp_path, monkeypatch):
    ranks = Ranks(monkeypatch, lambda seed, turn: both(2.0 if seed == "2" else 1.0))
    code, results, _, _ = fakes.compare(tmp_path, variants=PAIR, runs=30, **KEPT)
    assert code == 0
    turns = [("1", 0), ("2", 0), *((seed, k) for k in range(1, kept.MIN_TURNS + 1) for seed in "12")]
    assert ranks.turns == turns
    assert sorted(ranks.ended) == ["1", "2"]
    (entry,) = results["comparisons"]
    assert entry["n"] == kept.MIN_TURNS and entry["ratio"] == pytest.approx(0.5)


def test_turns_go_on_while_an_interval_is_wide(tmp_path, monkeypatch):
    ranks = Ranks(monkeypatch, lambda seed, turn: both(1.5 if seed == "2" and turn % 2 else 1.0))
    _, results, _, _ = fakes.compare(tmp_path, variants=PAIR, runs=9, **KEPT)
    assert ranks.turns[-1] == ("2", 9)
    assert results["comparisons"][0]["n"] == 9


def test_no_turn_begins_after_the_time(tmp_path, monkeypatch):
    ranks = Ranks(monkeypatch, lambda seed, turn: both(1.5 if seed == "2" and turn % 2 else 1.0))
    fakes.compare(tmp_path, variants=PAIR, runs=9, **{**KEPT, "repeat_seconds": 0.0})
    assert ranks.turns[-1] == ("2", 1)


def test_variants_that_nothing_is_compared_with_take_no_turns(tmp_path, monkeypatch):
    ranks = Ranks(monkeypatch, lambda seed, turn: both() if seed != "1" else ("failed", "rank 0: no"))
    code, results, report, _ = fakes.compare(tmp_path, variants=PAIR, runs=9, **KEPT)
    assert ranks.turns == [("2", 0)] and code == 3
    failed, alone = results["variants"]
    assert (failed["status"], failed["cause"]) == ("failed", "rank 0: no")
    assert len(alone["runs"]) == 1 and alone["status"] == "ok"
    assert "processes that were started once" in report and "in fresh processes" not in report


@pytest.mark.parametrize(("answer", "status"), [(("failed", "rank 1: gone"), "failed"), ("hang", "timeout")])
def test_ranks_that_die_or_hang_in_a_turn_are_a_row_and_nobody_waits(tmp_path, monkeypatch, answer, status):
    Ranks(monkeypatch, lambda seed, turn: answer if (seed, turn) == ("2", 2) else both())
    began = time.monotonic()
    changes = {**KEPT, "run_timeout_s": 2}
    code, results, _, _ = fakes.compare(tmp_path, variants=PAIR, runs=9, **changes)
    assert code == 3 and time.monotonic() - began < 30
    well, badly = results["variants"]
    assert well["status"] == "ok" and badly["status"] == status
    assert "(run 2)" in badly["cause"]
    assert not any(isinstance(t, threading.Thread) and "run-1" in t.name for t in threading.enumerate())


def test_kept_runs_are_not_resumed(tmp_path, monkeypatch):
    Ranks(monkeypatch, lambda seed, turn: both())
    fakes.compare(tmp_path, variants=PAIR, runs=1, **KEPT)
    with pytest.raises(ValueError, match="nothing to resume"):
        fakes.compare(tmp_path, harness.Options(resume=True), variants=PAIR, runs=1, **KEPT)
    assert fakes.compare(tmp_path, harness.Options(report_only=True), variants=PAIR, runs=1, **KEPT)[0] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"processes": "kept", "host": False}, "needs host: true"), ({"processes": "some"}, "fresh or kept"),
     ({"interval": -1}, "interval is -1"), ({"overview": "yes"}, "overview is 'yes'")],
)  # fmt: skip
def test_keys_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        configuration.parse(fakes.document(**changes), "file.yaml")


def test_narrow_is_judged_by_every_workload_of_every_pair():
    """With logs +-a in turn, half the 95 % interval of 6 values is 2.571 a / sqrt(5)."""
    def turns(a, n=6):
        return [{"train": 1.0 + a * (k % 2), "decode": 1.0} for k in range(n)]

    still = [{"train": 1.0, "decode": 1.0}] * 6
    for step, narrow in ((0.2, True), (0.3, False)):  # 0.1823 / 2 * 1.150 = 0.105; 0.2624 / 2 * 1.150 = 0.151
        assert kept.is_narrow([("a", "b")], {"a": turns(step), "b": still}, 0.15) is narrow
    assert not kept.is_narrow([("a", "b")], {"a": turns(0, 4), "b": still[:4]}, 0.15)  # too few
    assert not kept.is_narrow([("b", "b"), ("a", "b")], {"a": turns(0.3), "b": still}, 0.15)


def sleep_for_ever():
    time.sleep(600)


def test_ranks_are_stopped_from_another_thread():
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(sleep_for_ever, 2, timeout_s=300, host_mode=False, stop=stop)
    assert caught.value.exit_code == 124 and time.monotonic() - began < 120


VARIANTS = [
    {"name": "TP=2", "args": {"tensor-model-parallel-size": 2}},
    {"name": "PP=2", "args": {"pipeline-model-parallel-size": 2}},
    {"name": "1x2", "attention_impl": "helix", "args": {
        "tensor-model-parallel-size": 2, "helix-head-parallel-size": 1, "helix-dim-parallel-size": 2,
        "helix-query-placement": "dims"}},
    {"name": "three heads", "may_fail": True, "args": {
        "tensor-model-parallel-size": 2, "num-attention-heads": 3, "kv-channels": 8}},
    {"name": "three heads, 1x2", "attention_impl": "helix", "args": {
        "tensor-model-parallel-size": 2, "num-attention-heads": 3, "kv-channels": 8}},
]  # fmt: skip


def test_real_ranks_in_turns(tmp_path):
    import yaml

    changes = {"runs": 2, "variants": VARIANTS, "overview": True, "world_size": 2}
    comparison = fakes.document(**{**KEPT, "run_timeout_s": 240}, **changes)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(comparison))
    run = run_cli(tmp_path, "compare", "small.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "runs" / "small" / "results.json").read_text())
    vanilla, stages, helix, refused, sliced = results["variants"]
    for variant in (vanilla, stages, helix):
        assert [r["status"] for r in variant["runs"]] == ["ok", "ok"]
        for name, work in variant["measured"]["workloads"].items():
            first, second = work["samples_seconds"]
            assert len(first) == len(second) == 2 and first != second, name
        assert len(variant["measured"]["losses"]) == 3 and variant["loss_check"]["agrees"]
        assert variant["measured"]["decoded_tokens"] == vanilla["measured"]["decoded_tokens"]
    assert len(sliced["runs"]) == len(refused["runs"]) == 1
    assert sliced["measured"]["losses"][-1] < sliced["measured"]["losses"][0]
    assert len(sliced["measured"]["decoded_tokens"][0]) == 4
    words = megatrons_refusal()
    assert words in refused["cause"]
    assert f'(1) "{words}"' in " ".join(run.stdout.split())
    check_bytes(vanilla, helix)  # a turn's training step moves what one of Megatron's own loop does


def megatrons_refusal():
    """What Megatron says to three heads on two ranks, asked here."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    with pytest.raises(ValueError) as refusal:
        TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=3, kv_channels=8,
                          tensor_model_parallel_size=2)  # fmt: skip
    return str(refusal.value)
