"""helix compare with real ranks: one small comparison of all kinds of layouts, looked at from all sides."""

import json
import subprocess
import sys

import pytest

from tests.compare.compare_fakes import document

GRID = {"helix-head-parallel-size": 1, "helix-dim-parallel-size": 2}
CHOSEN = {"n": 1, "m": 2, "comm": "a2a", "placement": "dims", "cache": "sequence"}
STAGES = {"pipeline-model-parallel-size": 2}
SLICED = {"tensor-model-parallel-size": 2, **GRID}
VARIANTS = [
    {"name": "PP=2", "ranks": 2, "args": STAGES},
    {"name": "TP=2", "ranks": 2, "args": {"tensor-model-parallel-size": 2}},
    {"name": "DP=2", "ranks": 2},
    {
        "name": "1x2",
        "ranks": 2,
        "attention_impl": "helix",
        "args": {"helix-query-placement": "dims", **SLICED},
    },
    {"name": "virtual stages", "ranks": 2, "args": {**STAGES, "num-layers-per-virtual-pipeline-stage": 1}},
    {"name": "CP=2", "ranks": 4, "attention_impl": "helix", "args": {"context-parallel-size": 2, **SLICED}},
    {
        "name": "per-slice",
        "ranks": 2,
        "attention_impl": "helix",
        "args": {"helix-softmax": "per-slice", **SLICED},
    },
    {
        "name": "three heads",
        "ranks": 2,
        "args": {"tensor-model-parallel-size": 2, "num-attention-heads": 3, "kv-channels": 8},
        "may_fail": True,
    },
]
LAYERS = 4  # two stages of two chunks


def run_cli(tmp_path, *arguments):
    command = [sys.executable, "-W", "ignore", "-m", "helix_megatron.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)


def test_comparison_of_real_training(tmp_path):
    import yaml

    workloads = {"train": {}, "prefill": {}, "decode": {}, "mixed": {"iterations": 1}}
    changes = {"variants": VARIANTS, "batch_size": 2, "reference": True, "workloads": workloads}
    comparison = document(world_size=4, **changes)
    comparison["MODEL_ARGS"]["num-layers"] = LAYERS
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(comparison))
    run = run_cli(tmp_path, "compare", "tiny.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "runs" / "tiny" / "results.json").read_text())
    pipeline, vanilla, replicas, helix, virtual, context, per_slice, refused = results["variants"]
    assert refused["status"] == "failed"
    assert "num_attention_heads (3) must be a multiple of tensor_model_parallel_size (2)" in refused["cause"]
    for finished in (pipeline, vanilla, replicas, helix, virtual):
        measured = finished["measured"]
        assert len(measured["losses"]) == 3
        counts = {name: len(w["samples_seconds"][0]) for name, w in measured["workloads"].items()}
        assert counts == {"train": 2, "prefill": 2, "first_token": 2, "decode": 2, "mixed": 1}
        assert finished["loss_check"] == finished["loss_check"] | {"reference": "PP=2", "agrees": True}
        assert measured["decoded_tokens"] == pipeline["measured"]["decoded_tokens"]
        assert 0 <= measured["error"]["relative"] < 1e-6
        for workload in measured["workloads"].values():
            whole = workload["iteration_seconds"]["mean"]
            assert sum(workload["split_seconds"].values()) == pytest.approx(whole)
            assert workload["paper_tpot_ms"]["mean"] >= 0
        check_work(measured["workloads"])
    assert [r["status"] for r in results["references"]] == ["ok"] * 3  # per-slice, three heads: other models
    assert 0 < per_slice["measured"]["error"]["relative"] < 1e-6
    assert per_slice["loss_check"]["reference"] == "per-slice"
    check_context_parallel(context)
    check_predictions(results["prediction"], pipeline, vanilla, replicas, helix)
    for other, name in (
        (virtual, "virtual pipeline stages"),
        (context, "context parallelism"),
        (per_slice, "per-slice softmax"),
    ):
        assert other["predicted"] == {"cause": f"the planner does not model {name}."}
    assert helix["measured"]["grid"] == CHOSEN
    assert per_slice["measured"]["grid"] == CHOSEN | {"comm": None, "cache": None}
    check_bytes(vanilla, helix)
    memory = vanilla["measured"]["memory_bytes_of_fullest_rank"]
    assert memory["gradients"] == memory["parameters"]  # fp32 both
    assert memory["optimizer"] >= 2 * memory["parameters"]  # two moments of Adam
    helix_memory = helix["measured"]["memory_bytes_of_fullest_rank"]
    assert helix_memory["parameters"] == memory["parameters"]
    # each layer K and V, two sequences of 4 + 4 positions, two of four heads of 8, fp32
    assert helix_memory["kv_cache"] == memory["kv_cache"] == LAYERS * 2 * 2 * 8 * 2 * 8 * 4
    stages = [variant["measured"]["memory_bytes_of_fullest_rank"] for variant in (pipeline, virtual)]
    # of one micro-batch, however many the schedule needs; but for what all of them share
    assert stages[1]["saved_for_backward"] == pytest.approx(stages[0]["saved_for_backward"], rel=0.01)
    assert stages[1]["kv_cache"] == stages[0]["kv_cache"]
    assert memory["communication"] >= 16 * 32 * 4  # a hidden state [s, b, h], all-reduced in place


def check_context_parallel(context):
    """Trained alike and its logits in order; Megatron has no inference for it, and each cell says so."""
    measured = context["measured"]
    assert measured["layout"]["context_parallel_size"] == 2
    assert context["loss_check"] == context["loss_check"] | {"reference": "PP=2", "agrees": True}
    assert 0 < measured["error"]["relative"] < 1e-6
    assert set(measured["workloads"]) == {"train", "prefill"}
    assert set(measured["causes"]) == {"first_token", "decode", "mixed"}
    for cause in measured["causes"].values():
        assert "context parallelism" in cause


def check_predictions(prediction, *variants):
    """Weights and KV cache are predicted exactly, times within what rough constants of a host can be."""
    assert "rough constants" in prediction["sources"][0]
    for entry in variants:
        measured, predicted = entry["measured"], entry["predicted"]
        assert set(predicted["workloads"]) == {"train", "first_token", "decode"}
        assert all(seconds > 0 for seconds in predicted["workloads"].values())
        held, expected = measured["memory_bytes_of_fullest_rank"], predicted["memory_bytes"]
        assert expected["parameters"] == held["parameters"]
        # the cache of this run has room for all iterations, the prediction is of their middle
        assert 0.8 < expected["kv_cache"] / held["kv_cache"] <= 1
        assert expected["saved_for_backward"] == pytest.approx(held["saved_for_backward"], rel=0.1)


def check_work(workloads):
    """Floating-point operations by hand: a forward pass of the tiny model, three times for training."""
    layers, hidden, mlp, vocabulary = LAYERS, 32, 128, 272
    per_token = 2 * (layers * (4 * hidden**2 + 2 * hidden * mlp) + vocabulary * hidden)
    attention = layers * 2 * 16 * hidden * 16 * 2  # two sequences of 16, causal: half of 4 s^2 h
    forward = 32 * per_token + attention
    assert workloads["prefill"]["flops_per_iteration"] == pytest.approx(forward)
    assert workloads["train"]["flops_per_iteration"] == pytest.approx(3 * forward)
    assert (workloads["train"]["tokens_per_iteration"], workloads["decode"]["tokens_per_iteration"]) == (
        32,
        2,
    )
    decode = 2 * (per_token + layers * 4 * (4 + 1 + 1.5) * hidden)  # the middle of three iterations
    assert workloads["decode"]["flops_per_iteration"] == pytest.approx(decode)
    assert workloads["mixed"]["tokens_per_iteration"] == 2 * 4 + 4 * 2


def check_bytes(vanilla, helix):
    """Helix moves what the design says, and the rest of the model what it moved before.

    Per layer, forward and backward of two micro-batches: K and V of the hk/m heads that a rank needs,
    2(m-1) s b hk/m d_s, and the queries'
    and outputs' all-to-all, each (m-1)/m s b hq d_s, fp32 elements; backward the same again.
    """
    s, heads, slice_dim, m, passes = 16, 4, 4, 2, 2 * 2
    per_layer = helix["measured"]["communication_per_layer"]
    exchanged = sum(
        cost["bytes"] for kind, cost in per_layer.items() if not kind.startswith(("all_reduce", "broadcast"))
    )
    gather = 2 * (m - 1) * s * heads / m * slice_dim
    all_to_all = 2 * (m - 1) / m * s * heads * slice_dim
    assert exchanged == passes * 4 * (gather + all_to_all)
    for kind in ("all_reduce x2", "broadcast x2"):
        assert per_layer[kind]["bytes"] == vanilla["measured"]["communication_per_layer"][kind]["bytes"]


def test_exit_codes_of_refusals(tmp_path):
    (tmp_path / "bad.yaml").write_text("name: x\niteration: 3\n")
    run = run_cli(tmp_path, "compare", "bad.yaml")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("helix: bad.yaml: unknown key 'iteration'; did you mean iterations?")
    assert run.stderr.count("\n") == 1
