"""helix compare: what it counts, what it refuses, what becomes a row, and a comparison from end to end."""

import copy
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from helix_megatron.compare import config as configuration
from helix_megatron.compare import findings, harness, launching, report
from helix_megatron.launch import run_ranks

DOCUMENT = {
    "name": "tiny",
    "host": True,
    "world_size": 2,
    "steps": 2,
    "warmup_steps": 1,
    "forward_iterations": 2,
    "prompt_length": 4,
    "decode_tokens": 2,
    "variant_timeout_s": 60,
    "MODEL_ARGS": {
        "num-layers": 2,
        "hidden-size": 32,
        "num-attention-heads": 4,
        "seq-length": 16,
        "max-position-embeddings": 16,
        "micro-batch-size": 1,
        "global-batch-size": 2,
        "lr": 1e-3,
        "min-lr": 1e-3,
        "lr-decay-style": "constant",
        "padded-vocab-size": 272,
        "transformer-impl": "local",
        "position-embedding-type": "rope",
        "no-gradient-accumulation-fusion": True,
        "no-masked-softmax-fusion": True,
        "no-rope-fusion": True,
        "no-bias-dropout-fusion": True,
        "no-bias-gelu-fusion": True,
        "no-persist-layer-norm": True,
        "no-create-attention-mask-in-dataloader": True,
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
        "num-workers": 0,
    },
    "variants": [{"name": "one"}],
}


def document(**changes):
    return {**copy.deepcopy(DOCUMENT), **changes}


# ---- what is counted


def collectives():
    """Run each collective once in a group of two, some through names taken before counting began."""
    import torch
    import torch.distributed as dist

    from helix_megatron.compare.comm import CommMeter

    taken_before = dist.all_gather_into_tensor
    dist.init_process_group("gloo")
    rank, meter = dist.get_rank(), CommMeter()
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    with meter.counting():
        dist.all_reduce(torch.ones(64))
        dist.all_reduce(torch.ones(8), async_op=True).wait()
        dist.all_reduce(torch.ones(64), group=alone)  # no communication
        taken_before(torch.empty(20), torch.ones(10))
        dist.reduce_scatter_tensor(torch.empty(10), torch.ones(20))
        dist.all_to_all_single(torch.empty(12), torch.ones(12))
        # rank 0 keeps 1 and sends 3; rank 1 sends 2 and keeps 4
        sent = [[1, 3], [2, 4]][rank]
        received = [[1, 2], [3, 4]][rank]
        dist.all_to_all_single(torch.empty(sum(received)), torch.ones(sum(sent)), received, sent)
        dist.broadcast(torch.ones(16, dtype=torch.int64), 0)
        if rank == 0:
            dist.send(torch.ones(5), 1)
        else:
            dist.recv(torch.ones(5), 0)
    counted = meter.as_json()
    dist.all_reduce(torch.ones(64))  # after counting: works as before, and is not counted
    return counted, meter.as_json() == counted


def test_collectives_are_counted_exactly():
    (first, first_stopped), (second, second_stopped) = run_ranks(collectives, 2, timeout_s=60)
    assert first_stopped
    assert second_stopped

    def bytes_of(counted):
        return {name: (tally["calls"], tally["bytes"]) for name, tally in counted.items()}

    common = {
        "all_reduce x2": (2, 2 * 0.5 * 4 * (64 + 8)),
        "all_gather x2": (1, 0.5 * 4 * 20),
        "reduce_scatter x2": (1, 0.5 * 4 * 20),
    }
    assert bytes_of(first) == {
        **common,
        "all_to_all x2": (2, 0.5 * 4 * 12 + 4 * 2),
        "broadcast x2": (1, 0.0),
        "send x2": (1, 0.0),
    }
    assert bytes_of(second) == {
        **common,
        "all_to_all x2": (2, 0.5 * 4 * 12 + 4 * 3),
        "broadcast x2": (1, 8.0 * 16),
        "recv x2": (1, 4.0 * 5),
    }
    assert all(tally["seconds"] > 0 for tally in first.values())


def test_activations_are_counted_once_and_without_parameters():
    import torch

    from helix_megatron.compare import memory

    layer = torch.nn.Linear(8, 8, bias=False)
    x = torch.ones(4, 8, requires_grad=True)
    # exp saves its output y; y * y saves y twice more; the linear layer saves y again, and its weight
    kept = memory.saved_for_backward([layer], lambda: (y := x.exp(), layer(y * 1.0 + 0 * y), y * y))
    assert kept == 2 * 4 * 8 * 4  # y, and the sum that enters the layer


def decoded_with_and_without_cache(argv):
    """Greedy tokens [b, 1 + new] of decode.decode, and of running all tokens anew for each next one."""
    import torch
    from megatron.core.utils import unwrap_model

    from helix_megatron import entry, pretrain_gpt
    from helix_megatron.compare import decode, measure

    recorder = measure.Recorder()
    task = measure.Task(argv, "", True, 1, 0, 1, 0, 0, 0)
    argv = entry.prepare(argv)
    with measure.recorded_training(recorder, measure.CommMeter(), task, lambda stage: None):
        pretrain_gpt.train(argv)
    prompt = measure.random_tokens(2, 5)
    cached = decode.decode(recorder.model, prompt, 6, None)["tokens"]
    model, tokens = unwrap_model(recorder.model)[0].eval(), prompt
    for _ in range(7):
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            logits = model(tokens, positions, None, runtime_gather_output=True)  # [b, s, V]
        tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
    return cached, tokens[:, 5:].tolist()


@pytest.mark.parametrize("layout", ["rope", "learned_absolute", "helix"])
def test_decode_chooses_what_the_whole_sequence_chooses(layout):
    flags = {
        **DOCUMENT["MODEL_ARGS"],
        **{"mock-data": True, "tokenizer-type": "NullTokenizer", "vocab-size": 257, "train-iters": 1},
        **{"eval-iters": 0, "eval-interval": 100, "init-method-std": 0.3, "tensor-model-parallel-size": 2},
        "position-embedding-type": "rope" if layout == "helix" else layout,
        "attention-impl": "helix" if layout == "helix" else "megatron",
    }
    if layout == "helix":
        flags |= {"helix-head-parallel-size": 1, "helix-dim-parallel-size": 2}
    argv = [word for k, v in flags.items() for word in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]
    for cached, whole in run_ranks(decoded_with_and_without_cache, 2, argv, timeout_s=100):
        assert cached == whole
        assert len({token for line in whole for token in line}) > 3  # the model says more than one thing


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": 3}, ["unknown key 'step'", "did you mean steps?"]),
        ({"steps": 0}, ["steps is 0", "at least 1"]),
        ({"steps": 1.5}, ["steps is 1.5", "whole number"]),
        ({"loss_tolerance": "1e-4"}, ["loss_tolerance", "1.0e-4 in YAML"]),
        ({"variants": []}, ["variants is []"]),
        ({"variants": [{"attention_impl": "helix"}]}, ["variant 1", "with a name"]),
        ({"variants": [{"name": "a", "arg": {}}]}, ["variant 1 (a)", "did you mean args?"]),
        ({"variants": [{"name": "a", "attention_impl": "other"}]}, ["'other'", "megatron or helix"]),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, ["variant 2 (a)", "names must differ"]),
        ({"variants": [{"name": "a", "args": {"train-iters": 2}}]}, ["--train-iters", "steps"]),
        ({"world_size": 3, "nnodes": 2}, ["world_size 3", "nnodes=2"]),
        ({"host": "yes"}, ["host is 'yes'"]),
    ],
)
def test_refused_files(changes, words):
    with pytest.raises(ValueError) as refusal:
        configuration.parse(document(**changes), "file.yaml")
    message = str(refusal.value)
    assert message.startswith("file.yaml: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_which_variants_are_the_same_model():
    helix = {"tensor-model-parallel-size": 2, "helix-dim-parallel-size": 2}
    per_slice = {**helix, "helix-softmax": "per-slice"}
    config = configuration.parse(
        document(
            variants=[
                {"name": "a", "args": {"tensor-model-parallel-size": 2}},
                {"name": "b", "args": helix, "attention_impl": "helix"},
                {"name": "c", "args": {**helix, "num-query-groups": 2}, "attention_impl": "helix"},
                {"name": "d", "args": per_slice, "attention_impl": "helix"},
                {"name": "e", "args": {**per_slice, "helix-dim-parallel-size": 4}, "attention_impl": "helix"},
            ]
        ),
        "file.yaml",
    )
    keys = [config.model_key(variant) for variant in config.variants]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def test_the_shipped_configurations_are_valid():
    for path in sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")):
        if "variants:" in path.read_text():
            config = configuration.load(path)
            for variant in config.variants:
                flags = config.flags(variant)
                ranks = flags["--tensor-model-parallel-size"] * flags.get("--pipeline-model-parallel-size", 1)
                assert config.world_size % ranks == 0


# ---- what becomes a row: the harness with ranks that do what their name says


def stand_in(task):
    """In place of measure.run: as the variant's --seed says, finish, fail, die or hang."""
    rank, seed = int(os.environ["RANK"]), task.argv[task.argv.index("--seed") + 1]
    if seed == "1" and rank == 1:
        error = {"time": time.time(), "rank": rank, "cause": "ValueError: no such grid", "traceback": ""}
        Path(task.folder, f"error-{rank}.json").write_text(json.dumps(error))
        raise ValueError("no such grid")
    if seed == "2":
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == "3":
        time.sleep(60)
    Path(task.folder, f"rank-{rank}.json").write_text(json.dumps(samples(rank, shift=1e-3 * (seed == "4"))))


def samples(rank, shift=0.0):
    tally = {"all_reduce x2": {"calls": 4, "bytes": 100.0 + rank, "seconds": 0.5}}
    return {
        "layers": 2,
        "args": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1},
        "helix": None,
        "losses": [5.0, 4.0 + shift, 3.0] if rank == 1 else [],
        "train_step_seconds": [9.0, 1.0 + rank, 2.0 + rank],
        "train_step_comm": [{}, tally, tally],
        "tokens_per_step": 30,
        "memory_bytes": {"parameters": 1e6 * (rank + 1), "saved_for_backward": 1e6},
        "forward_seconds": [1.0, 1.0],
        "forward_comm": {},
    }


def compare(tmp_path, monkeypatch, variants):
    monkeypatch.setattr(launching, "run", stand_in)
    monkeypatch.setattr(harness, "megatron_flags", lambda: None)
    monkeypatch.setattr(
        harness, "argv_of", lambda config, variant, out, known: ["--seed", variant.args["--seed"]]
    )
    config = configuration.parse(document(variant_timeout_s=8.0, variants=variants), "file.yaml")
    console = Console(file=io.StringIO(), width=250)
    code = harness.compare(config, tmp_path, console, [])
    results = json.loads((tmp_path / "results.json").read_text())
    return code, results, (tmp_path / "report.md").read_text(), console.file.getvalue()


def variant(name, seed, **more):
    return {"name": name, "args": {"seed": seed}, **more}


def test_a_variant_that_does_not_finish_is_a_row_and_the_rest_go_on(tmp_path, monkeypatch):
    names = ["good", "refused", "dies", "hangs", "good too"]
    variants = [variant(name, seed) for name, seed in zip(names, "01230")]
    code, results, text, shown = compare(tmp_path, monkeypatch, variants)
    assert code == 3
    assert [v["status"] for v in results["variants"]] == ["ok", "failed", "failed", "timeout", "ok"]
    causes = [v.get("cause", "") for v in results["variants"]]
    assert causes[1] == "rank 1: ValueError: no such grid"
    assert "was killed by SIGKILL" in causes[2]
    assert causes[3] == "not done after 8 s and killed"
    for output in (text, shown):
        for name, cause in zip(names, causes):
            assert name in output
            assert cause in output
    assert "hangs" in text.split("## How to read it")[0]


def test_a_failure_that_is_expected_is_no_error(tmp_path, monkeypatch):
    variants = [variant("good", "0"), variant("refused", "1", may_fail=True)]
    assert compare(tmp_path, monkeypatch, variants)[0] == 0


def test_losses_that_disagree_are_said_and_are_an_error(tmp_path, monkeypatch):
    # the stand-in's seeds differ, but "--seed" makes another model: so let both have the same key
    monkeypatch.setattr(configuration.CompareConfig, "model_key", lambda self, variant: "one")
    code, results, text, shown = compare(tmp_path, monkeypatch, [variant("good", "0"), variant("off", "4")])
    assert code == 1
    assert results["variants"][1]["loss_check"]["max_abs_difference"] == pytest.approx(1e-3)
    for output in (text, shown):
        assert "LOSSES DISAGREE: off is up to 0.001 away from good; at most 0.0001 is allowed." in output


def test_the_statistics(tmp_path, monkeypatch):
    code, results, _, shown = compare(tmp_path, monkeypatch, [variant("good", "0")])
    measured, row = results["variants"][0]["measured"], results["variants"][0]["row"]
    assert code == 0
    assert measured["train_step_seconds"] == [2.0, 3.0]  # the slowest rank, without the warm-up
    assert row["train_tokens_per_s"] == 30 / 2.5
    assert row["comm_mb_per_layer"] == pytest.approx((100 + 101) / 4 / 1e6)
    assert row["comm_ms_per_layer"] == pytest.approx(1e3 * 2 * 0.5 / 4)
    assert row["parameters_mb"] == 2.0
    assert row["loss_last"] == 3.0
    assert "not compared" in shown
    assert results["kind"] == "measured"
    assert results["versions"]["megatron-core"].startswith("0.19")


def test_a_missing_or_nan_loss_never_agrees():
    assert report.loss_difference([1.0, 2.0], [1.0, 2.5]) == 0.5
    assert report.loss_difference([], []) == math.inf
    assert report.loss_difference([1.0], [1.0, 2.0]) == math.inf
    assert report.loss_difference([math.nan], [1.0]) == math.inf


def test_speeds_are_said_plainly_and_noise_is_not_a_difference():
    def entry(name, impl, seconds, m=None):
        row = {"tp": 2, "pp": 1, "m": m}
        return {
            "name": name,
            "model": "one",
            "attention_impl": impl,
            "row": row,
            "measured": {"train_step_seconds": seconds},
        }

    slow, near, unsure = [2.0, 2.2], [1.2, 1.3], [0.9, 2.1]
    megatron = entry("Megatron", "megatron", [1.0, 1.1])
    helix = [entry("A", "helix", slow, 2), entry("B", "helix", near, 2), entry("C", "helix", unsure, 2)]
    said = findings.speeds([megatron, *helix])
    assert said == [
        "A against Megatron, measured: training 0.50x (SLOWER).",
        "B against Megatron, measured: training 0.84x (SLOWER).",
        "C against Megatron, measured: training 0.70x (no difference shown: the samples overlap).",
    ]
    said = findings.speeds([megatron, *helix, entry("2x1", "helix", [1.25, 1.35], 1)])
    assert "2x1 computes what Megatron computes, and its training ran at 0.81x" in said[0]
    assert said[1].endswith("training 0.50x (SLOWER).")
    assert said[2].endswith("training 0.84x (no difference shown: within the noise).")


# ---- from end to end


def run_cli(tmp_path, *arguments):
    command = [sys.executable, "-W", "ignore", "-m", "helix_megatron.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)


def test_comparison_of_real_training(tmp_path):
    import yaml

    grid = {"helix-head-parallel-size": 1, "helix-dim-parallel-size": 2}
    variants = [
        {"name": "PP=2", "args": {"pipeline-model-parallel-size": 2}},
        {"name": "TP=2", "args": {"tensor-model-parallel-size": 2}},
        {
            "name": "Helix 1x2",
            "attention_impl": "helix",
            "args": {"tensor-model-parallel-size": 2, "helix-query-placement": "dims", **grid},
        },
        {
            "name": "three heads",
            "args": {"tensor-model-parallel-size": 2, "num-attention-heads": 3, "kv-channels": 8},
            "may_fail": True,
        },
    ]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(document(variants=variants)))
    run = run_cli(tmp_path, "compare", "tiny.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "runs" / "tiny" / "results.json").read_text())
    pipeline, vanilla, helix, refused = results["variants"]
    assert refused["status"] == "failed"
    assert "num_attention_heads (3) must be a multiple of tensor_model_parallel_size (2)" in refused["cause"]
    for finished in (pipeline, vanilla, helix):
        assert len(finished["measured"]["losses"]) == 3
        assert len(finished["measured"]["forward_seconds"]) == 2
        assert len(finished["measured"]["decode_token_seconds"]) == 2
        assert finished["loss_check"] == finished["loss_check"] | {"reference": "PP=2", "agrees": True}
        assert finished["measured"]["decoded_tokens"] == pipeline["measured"]["decoded_tokens"]
    assert (helix["row"]["n"], helix["row"]["m"]) == (1, 2)
    assert (helix["row"]["comm"], helix["row"]["placement"]) == ("a2a", "dims")
    check_bytes(vanilla, helix)
    memory = vanilla["measured"]["memory_bytes_of_fullest_rank"]
    assert memory["gradients"] == memory["parameters"]  # fp32 both
    assert memory["optimizer"] >= 2 * memory["parameters"]  # two moments of Adam
    assert helix["measured"]["memory_bytes_of_fullest_rank"]["parameters"] == memory["parameters"]


def check_bytes(vanilla, helix):
    """Helix moves what the design says, and the rest of the model what it moved before.

    Per layer, forward and backward of two micro-batches: K and V gather 2(m-1) s b hk d_s, and the queries'
    and outputs' all-to-all, each (m-1)/m s b hq d_s, fp32 elements; backward the same again.
    """
    s, heads, slice_dim, m, passes = 16, 4, 4, 2, 2 * 2
    per_layer = helix["measured"]["communication_per_layer"]
    exchanged = sum(
        cost["bytes"] for kind, cost in per_layer.items() if not kind.startswith(("all_reduce", "broadcast"))
    )
    gather = 2 * (m - 1) * s * heads * slice_dim
    all_to_all = 2 * (m - 1) / m * s * heads * slice_dim
    assert exchanged == passes * 4 * (gather + all_to_all)
    for kind in ("all_reduce x2", "broadcast x2"):
        assert per_layer[kind]["bytes"] == vanilla["measured"]["communication_per_layer"][kind]["bytes"]


def test_exit_codes_of_refusals(tmp_path):
    (tmp_path / "bad.yaml").write_text("name: x\nstep: 3\n")
    run = run_cli(tmp_path, "compare", "bad.yaml")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("helix: bad.yaml: unknown key 'step'; did you mean steps?")
    assert run.stderr.count("\n") == 1


def test_only_names_a_variant(capsys):
    from helix_megatron import cli

    path = Path(__file__).parent.parent / "configs" / "compare_host.yaml"
    assert cli.main(["compare", str(path), "--only", "Helix 4x5"]) == 2
    assert "has no variant 'Helix 4x5'; did you mean Helix 4x4?" in capsys.readouterr().err
