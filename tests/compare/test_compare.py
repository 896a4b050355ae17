"""helix compare: what it counts, what it refuses, and what becomes a row.

Its statistics, its harness without ranks, its reports, and a comparison with ranks have files of their own.
"""

import io
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from helix_megatron.compare import accuracy, harness, launch, tasks
from helix_megatron.compare import config as configuration
from helix_megatron.compare import variants as layouts
from helix_megatron.host.launcher import run_ranks
from tests.compare.compare_fakes import DOCUMENT, document, samples, variant

# ---- what is counted


def collectives():
    """Run each collective once in a group of two, some through names taken before counting began."""
    import torch
    import torch.distributed as dist

    from helix_megatron.measure.comm import CommMeter

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


@pytest.mark.parametrize(
    ("flags", "groups"),
    [
        ({}, 8),
        ({"--num-query-groups": 2}, 8),  # Megatron looks at it only beside the switch
        ({"--group-query-attention": True}, 1),  # its default
        ({"--group-query-attention": True, "--num-query-groups": 2}, 2),
    ],
)
def test_kv_heads_are_those_that_megatron_builds(flags, groups):
    shape = layouts.attention_shape({"--num-attention-heads": 8, "--hidden-size": 64, **flags})
    assert shape.num_query_groups == groups


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

    from helix_megatron.measure import memory

    layer = torch.nn.Linear(8, 8, bias=False)
    x = torch.ones(4, 8, requires_grad=True)
    # exp saves its output y; y * y saves y twice more; the linear layer saves y again, and its weight
    kept = memory.activation_bytes([layer], lambda: (y := x.exp(), layer(y * 1.0 + 0 * y), y * y))
    assert kept == 2 * 4 * 8 * 4  # y, and the sum that enters the layer


def decoded_with_and_without_cache(argv):
    """Greedy tokens [b, 1 + new] of a decode session, and of running all tokens anew for each next one."""
    import torch
    from megatron.core.utils import unwrap_model

    from helix_megatron import pretrain_gpt
    from helix_megatron.compare import decode, rank, workloads
    from helix_megatron.measure import comm
    from helix_megatron.megatron import entry

    recorder = rank.Recorder(workloads.Samples(1, True))
    argv = entry.prepare_argv(argv)
    with rank.record_training(recorder, comm.CommMeter()):
        pretrain_gpt.train(argv)
    prompt = workloads.draw_tokens(2, 5)
    session = decode.Session(recorder.model, prompt, 7)
    cached = torch.cat([session.step() for _ in range(7)], dim=1).tolist()
    args = session.args
    positions = 5 + 7  # the context's size
    kv = 2 * 2 * positions * args.num_query_groups // 2 * args.kv_channels * args.num_layers * 4
    right_size = session.cache_bytes() == kv
    model, tokens = unwrap_model(recorder.model)[0].eval(), prompt
    for _ in range(7):
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            logits = model(tokens, positions, None, runtime_gather_output=True)  # [b, s, V]
        tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
    return cached, tokens[:, 5:].tolist(), right_size


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
    for cached, whole, right_size in run_ranks(decoded_with_and_without_cache, 2, argv, timeout_s=100):
        assert cached == whole
        assert right_size
        assert len({token for line in whole for token in line}) > 3  # the model says more than one thing


def test_how_many_positions_are_compared():
    def positions(length, tp=1, cp=1, sequence_parallel=False):
        flags = {"sequence_parallel": sequence_parallel, "seq_length": length}
        sizes = {"tensor_model_parallel_size": tp, "context_parallel_size": cp}
        return accuracy.count_positions(SimpleNamespace(**flags, **sizes))

    assert (positions(4096), positions(100), positions(4096, tp=12)) == (128, 100, 128)
    assert positions(4096, tp=12, sequence_parallel=True) == 120
    assert positions(4096, tp=3, cp=4, sequence_parallel=True) == 120  # two chunks for each of four ranks
    with pytest.raises(ValueError, match="128 positions cannot be split over 256 shares"):
        positions(4096, tp=16, cp=8, sequence_parallel=True)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"iteration": 3}, ["unknown key 'iteration'", "did you mean iterations?"]),
        ({"iterations": 0}, ["iterations is 0", "at least 1"]),
        ({"runs": 1.5}, ["runs is 1.5", "whole number"]),
        ({"workloads": {}}, ["workloads is {}", "train, prefill, decode, mixed"]),
        ({"workloads": {"decod": {}}}, ["unknown key 'decod'", "did you mean decode?"]),
        ({"workloads": {"decode": {"iterations": 0}}}, ["workloads: decode", "iterations is 0"]),
        ({"workloads": {"decode": 3}}, ["decode is 3"]),
        ({"preset": "llama-3-9b"}, ["'llama-3-9b'", "did you mean llama-3-8b?"]),
        ({"scale": 0.5}, ["no preset to scale"]),
        ({"loss_tolerance": "1e-4"}, ["loss_tolerance", "1.0e-4 in YAML"]),
        ({"variants": []}, ["variants is []"]),
        ({"variants": [{"attention_impl": "helix"}]}, ["variant 1", "with a name"]),
        ({"variants": [{"name": "a", "arg": {}}]}, ["variant 1 (a)", "did you mean args?"]),
        ({"variants": [{"name": "a", "attention_impl": "other"}]}, ["'other'", "megatron or helix"]),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, ["variant 2 (a)", "names must differ"]),
        ({"variants": [{"name": "a", "ranks": 0}]}, ["variant 1 (a)", "ranks is 0"]),
        ({"variants": [{"name": "a", "args": {"train-iters": 2}}]}, ["--train-iters", "iterations"]),
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
    unsaid = {**flags(config, 3), "--helix-dim-parallel-size": None}
    assert layouts.per_slice_grid(unsaid, "helix") == (2, 1)
    assert [layouts.per_slice_grid(flags(config, k), "helix") for k in (1, 3)] == [None, (1, 2)]
    found = tasks.reference_variants(config)
    assert len(found) == 4  # one of each model
    assert found[keys[3]].args["--num-attention-heads"] == 8  # four heads in two slices
    assert (found[keys[3]].args["--kv-channels"], found[keys[3]].args["--num-query-groups"]) == (4, 8)
    assert "--num-attention-heads" not in found[keys[0]].args


def flags(config, number):
    return {**config.model_args, **config.variants[number].args}


def test_the_default_variants():
    config = configuration.parse(
        {**document(world_size=8), "preset": "smollm2-135m", "scale": 0.25, "MODEL_ARGS": {"seq-length": 16}},
        "file.yaml",
    )
    del config.model_args["--seq-length"]
    assert config.model_args["--num-attention-heads"] == 9
    assert config.model_args["--kv-channels"] == 16  # 64 / 4
    assert config.model_args["--padded-vocab-size"] % 8 == 0
    assert [v.name for v in config.variants] == ["one"]
    config = configuration.parse({"world_size": 8, "preset": "smollm2-135m", "scale": 0.25}, "file.yaml")
    names = ["Megatron TP=4 PP=2", "Megatron TP=8", "Megatron TP=4 DP=2", "Helix 1x8"]
    assert [v.name for v in config.variants] == names
    assert all(v.may_fail for v in config.variants[:3])  # nine heads: Megatron refuses
    assert not config.variants[3].may_fail
    wide = configuration.parse({"world_size": 16, "preset": "llama-3-8b", "scale": 0.1}, "file.yaml")
    assert [v.name for v in wide.variants][3:] == ["Helix 8x2", "Helix 4x4", "Helix 2x8"]
    assert wide.variants[0].args == {
        "--tensor-model-parallel-size": 8,
        "--pipeline-model-parallel-size": 2,
    }


def test_the_shipped_configurations_are_valid():
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")):
        if "variants:" in path.read_text():
            config = configuration.load(path)
            for variant in config.variants:
                flags = config.flags(variant)
                ranks = flags["--tensor-model-parallel-size"] * flags.get("--pipeline-model-parallel-size", 1)
                assert config.world_size % ranks == 0


# ---- what becomes a row: the harness with ranks that do what their name says


def stand_in(task):
    """In place of rank.run: as the variant's --seed says, finish, fail, die or hang."""
    rank, seed = int(os.environ["RANK"]), task.argv[task.argv.index("--seed") + 1]
    if seed == "1" and rank == 1:
        error = {"time": time.time(), "rank": rank, "cause": "ValueError: no such grid", "traceback": ""}
        Path(task.folder, f"error-{rank}.json").write_text(json.dumps(error))
        raise ValueError("no such grid")
    if seed == "2":
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == "3":
        time.sleep(60)
    Path(task.folder, f"rank-{rank}.json").write_text(json.dumps(samples(rank)))


def test_a_variant_that_does_not_finish_is_a_row_and_the_rest_go_on(tmp_path, monkeypatch):
    """With real processes that raise, are killed, and hang."""
    monkeypatch.setattr(launch, "run", stand_in)
    monkeypatch.setattr(tasks, "megatron_flags", lambda: None)
    monkeypatch.setattr(
        tasks, "build_argv", lambda config, variant, out, known: ["--seed", variant.args["--seed"]]
    )
    run_ranks(os.getpid, 2, timeout_s=200)  # what is imported once shall not count against the time limit
    names = ["good", "refused", "dies", "hangs", "good too"]
    variants = [variant(name, seed) for name, seed in zip(names, "01230")]
    config = configuration.parse(document(run_timeout_s=12.0, variants=variants), "file.yaml")
    console = Console(file=io.StringIO(), width=250)
    code = harness.compare(config, tmp_path, console, harness.Options())
    results = json.loads((tmp_path / "results.json").read_text())
    text, shown = (tmp_path / "report.md").read_text(), console.file.getvalue()
    assert code == 3
    assert [v["status"] for v in results["variants"]] == ["ok", "failed", "failed", "timeout", "ok"]
    causes = [v.get("cause", "") for v in results["variants"]]
    assert causes[1] == "rank 1: ValueError: no such grid"
    assert "was killed by SIGKILL" in causes[2]
    assert causes[3] == "not done after 12 s and killed"
    for output in (text, shown):
        for name, cause in zip(names, causes):
            assert name in output
            assert cause in output


def test_only_names_a_variant(capsys):
    from helix_megatron import cli

    path = Path(__file__).parents[2] / "configs" / "paper_host.yaml"
    assert cli.main(["compare", str(path), "--only", "Helix 4x5"]) == 2
    assert "has no variant 'Helix 4x5'; did you mean Helix 4x4?" in capsys.readouterr().err
