"""CUDA graphs of `helix generate` and `helix serve`: chosen or refused, and what Megatron is told."""

import os
import sys
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from helix_megatron import cli
from helix_megatron.check import tiny_model
from helix_megatron.convert.torch_dist import Checkpoint
from helix_megatron.generate import generate, graphs, model, ranks
from helix_megatron.generate.graphs import Steps, asked_for, choose_steps, refuse_unread_flags
from helix_megatron.host.launcher import run_ranks
from helix_megatron.kernels import selection
from helix_megatron.partition.grid import HelixConfigError

TRAINED = Namespace(
    num_attention_heads=8, num_query_groups=2, group_query_attention=True, kv_channels=64, hidden_size=512,
    position_embedding_type="rope", rotary_percent=1.0, rotary_interleaved=False,
)  # fmt: skip


@pytest.fixture
def installed(monkeypatch):
    """What attends on a GPU, and what it was chosen by; call it with an error to have nothing."""
    asked = []

    def set_error(error=None):
        def choose(*given, **named):
            asked.append((given, named))
            if error is not None:
                raise HelixConfigError(error)

        monkeypatch.setattr(selection, "choose", choose)
        return asked

    set_error()
    return set_error


def on_gpu(tp, *more, attention="helix", dtype="bfloat16"):
    return model.Layout(tp, attention, dtype, on_host=False, more=more)


def test_graphs_are_the_default_of_gpus_where_they_are_served(installed):
    for layout in (
        on_gpu(8),  # 2 x 4, sequence
        on_gpu(8, "--helix-softmax", "per-slice"),
        on_gpu(2),  # m = 1
        on_gpu(2, attention="megatron"),
        on_gpu(8, "--helix-kv-cache=sequence", "--micro-batch-size", "1"),
    ):
        assert choose_steps(None, layout, TRAINED).impl == "local", layout
        assert choose_steps("local", layout, TRAINED) == Steps("local", "as asked")
        eager = choose_steps("none", layout, TRAINED)
        assert eager.impl == "none" and str(eager) == "steps eager: --cuda-graph-impl none"
    host = choose_steps(None, replace(on_gpu(8), on_host=True), TRAINED)
    assert str(host) == "steps eager: there is no GPU"


@pytest.mark.parametrize("more, reason", [
    (["--helix-kv-cache", "dim"], "--helix-kv-cache dim, which asks the device for lengths; sequence has"),
    (["--cuda-graph-warmup-steps", "0"], "--cuda-graph-warmup-steps 0"),
    (["--flash-attention-version", "2"], "attention that waits for the device: no Triton here"),
])  # fmt: skip
def test_what_no_graph_holds_is_eager_and_says_so_or_is_refused_where_it_was_asked_for(
    installed, more, reason
):
    if "version" in more[0]:
        installed("no Triton here")
    layout = on_gpu(8, *more)
    steps = choose_steps(None, layout, TRAINED)
    assert steps.impl == "none" and reason in str(steps) and steps.flags(None, False) == ()
    with pytest.raises(ValueError, match="--cuda-graph-impl local is not served with") as error:
        choose_steps("local", layout, TRAINED)
    assert reason in str(error.value)
    assert choose_steps(None, replace(layout, tensor_parallel=2), TRAINED).impl == "local"  # m = 1


def test_kernels_are_asked_as_a_layer_will_ask(installed, monkeypatch):
    asked = installed()
    monkeypatch.setenv(selection.OVERRIDE, "triton")
    choose_steps(None, on_gpu(8, "--flash-attention-version", "3", dtype="float16"), TRAINED)
    ((given, named),) = asked
    assert given == ("cuda", torch.float16, 256, False, "triton")
    assert named == dict(dim=64, flash_version=3, graph=True, compare=False)


def test_what_is_asked():
    assert asked_for(None, (), False) is None
    assert asked_for("none", (), True) == asked_for(None, ("--cuda-graph-impl", "none"), True) == "none"
    assert asked_for("local", ("--bf16", "--cuda-graph-impl=local"), False) == "local"
    for option, more, host, message in (
        ("local", ("--cuda-graph-impl", "none"), False, "give one of them"),
        (None, ("--cuda-graph-impl", "full_iteration"), False, "captures training steps"),
        (None, ("--cuda-graph-impl", "x"), False, "none or local"),
        ("local", (), True, "there is no GPU here"),
        (None, ("--cuda-graph-impl", "local"), True, "there is no GPU here"),
    ):
        with pytest.raises(ValueError, match=message):
            asked_for(option, more, host)


def test_what_megatron_is_told():
    local, eager = Steps("local", ""), Steps("none", "there is no GPU")
    assert local.flags(None, False) == ("--cuda-graph-impl", "local", "--inference-rng-tracker")
    counted = local.flags(4, True)
    assert counted[3:] == ("--inference-dynamic-batching-num-cuda-graphs", "4", "--decode-only-cuda-graphs")
    assert "-1" in local.flags(-1, False)
    for steps, count in ((local, 0), (local, -2), (eager, 4)):
        with pytest.raises(ValueError, match=f"num-cuda-graphs {count}: at least 1"):
            steps.flags(count, False)


@pytest.mark.parametrize("flags, message", [
    ("--num-speculative-tokens 2", "one token a step"),
    ("--enable-chunked-prefill", "prompts are computed whole"),
    ("--inference-dynamic-batching-block-size=64", "give --kv-block-size"),
    ("--inference-dynamic-batching-prefix-caching", "a script of Megatron's own"),
    ("--enable-cuda-graph", "give --cuda-graph-impl local"),
])  # fmt: skip
def test_an_inference_flag_that_would_not_be_obeyed_is_refused(flags, message, capsys, tmp_path):
    words = flags.split()
    with pytest.raises(ValueError, match=message) as error:
        refuse_unread_flags(["--bf16", *words])
    assert words[0].partition("=")[0] in str(error.value)
    (tmp_path / "nothing").mkdir()
    given = ["generate", "--model", str(tmp_path / "nothing"), f"--megatron-args={flags}", "x"]
    assert cli.main(given) == 2 and message in capsys.readouterr().err  # before the model is looked at


def test_flags_that_are_obeyed_are_taken():
    refuse_unread_flags(["--inference-cuda-graph-scope", "block", "--inference-cuda-graph-max-tokens=64"])


@pytest.mark.dynamic_engine
def test_the_engine_captures_the_sizes_that_megatrons_flags_say(monkeypatch):
    args = Namespace(
        inference_dynamic_batching_num_cuda_graphs=3,
        inference_dynamic_batching_cuda_graph_mixed_prefill_count=2,
        inference_dynamic_batching_cuda_graph_sizing_distribution="linear",
        decode_only_cuda_graphs=True,
        inference_cuda_graph_all_prefills=True,
        inference_cuda_graph_max_tokens=64,
    )
    monkeypatch.setattr("megatron.training.get_args", lambda: args)
    found = graphs.engine_settings(SimpleNamespace(cuda_graph_impl="local"))
    assert found.pop("cuda_graph_sizing_distribution").value == "linear"
    assert found == dict(
        num_cuda_graphs=3, cuda_graph_mixed_prefill_count=2, use_cuda_graphs_for_non_decode_steps=False,
        cuda_graph_all_prefills=True, cuda_graph_max_tokens=64,
    )  # fmt: skip
    assert graphs.engine_settings(SimpleNamespace(cuda_graph_impl="none")) == {}


# ---- with a model ----
PROMPTS, NEW = ["hello there", "a", "one more prompt, a longer one"], 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, checkpoint) of a model of 6 heads and 2 KV heads."""
    folder = tiny_model.make(tmp_path_factory.mktemp("tiny"))
    return folder, model.prepare_checkpoint(folder, "float32", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("command, more, expected", [
    (["generate", "hello"], [], ["--decode-only-cuda-graphs"]),
    (["generate", "hello"], ["--inference-dynamic-batching-num-cuda-graphs", "3"],
     ["--inference-dynamic-batching-num-cuda-graphs", "3", "--decode-only-cuda-graphs"]),
    (["serve", "--max-sequence-length", "64"], [], []),
    (["serve", "--max-sequence-length", "64"], ["--decode-only-cuda-graphs"], ["--decode-only-cuda-graphs"]),
    (["generate", "hello"], ["--cuda-graph-impl", "none"], None),
    (["serve", "--max-sequence-length", "64"], ["--megatron-args=--helix-kv-cache dim"], None),
])  # fmt: skip
def test_commands_on_a_gpu_tell_their_ranks(tiny, installed, monkeypatch, command, more, expected):
    for package in ("zmq", "msgpack", "quart", "hypercorn") if command[0] == "serve" else ():
        pytest.importorskip(package)
    started = []
    monkeypatch.setattr(ranks, "on_host", lambda: False)
    monkeypatch.setattr(ranks, "under_torchrun", lambda: True)
    monkeypatch.setattr(ranks, "run", lambda function, size, host, asked: started.append(asked) or 0)
    folder, checkpoint = tiny
    given = [command[0], "--model", str(folder), "--cache-dir", str(checkpoint.parent), "--dtype", "float32"]
    assert cli.main([*given, "--tensor-model-parallel-size", "4", *more, *command[1:]]) == 0
    (asked,) = started
    flags = asked.layout.more[-len(expected) - 3 :] if expected is not None else ()
    if expected is None:
        assert "local" not in asked.layout.more and asked.steps.impl == "none"
    else:
        assert list(flags) == ["--cuda-graph-impl", "local", "--inference-rng-tracker", *expected]
        assert asked.steps.impl == "local"


# ---- in ranks: graphs of the host's stand-in ----

def rank_answers(job):
    """A job's report, and how many graphs were captured, and how often replayed."""
    from helix_megatron.host import mode
    from helix_megatron.megatron import run_settings
    from tests.inference.graph_worker import graphs_on_the_host

    def a_gpu_is_there():  # says what refuses graphs on a host
        return sys._getframe(1).f_globals["__name__"] != run_settings.__name__

    with (
        mock.patch.object(mode, "host_mode_enabled", a_gpu_is_there),
        graphs_on_the_host() as (captured, replayed),
    ):
        loaded = model.load(job.checkpoint, job.layout, None, job.sequence)
        return generate.answer(*loaded, job), len(captured), len(replayed)


@pytest.mark.dynamic_engine
@pytest.mark.parametrize("size, attention, more", [
    (2, "helix", ("--helix-head-parallel-size", "1", "--helix-dim-parallel-size", "2")),
    (1, "megatron", ()),
])  # fmt: skip
def test_the_command_with_graphs_chooses_the_tokens_of_transformers(tiny, installed, size, attention, more):
    """By the flags that a GPU's default gives."""
    folder, checkpoint = tiny
    expected = tiny_model.greedy(folder, PROMPTS, NEW)
    tokenizer = model.open_tokenizer(checkpoint, None)
    layout = model.Layout(size, attention, "float32", False, more)
    steps = choose_steps(None, layout, Checkpoint(checkpoint).args)
    layout = replace(layout, on_host=True, more=(*more, *steps.flags(2, decode_only=True)))
    tokens = [tokenizer.tokenize(prompt) for prompt in PROMPTS]
    job = generate.Job("tiny", checkpoint, layout, PROMPTS, tokens, NEW, steps=steps)
    for report, captured, replays in run_ranks(rank_answers, size, job, timeout_s=200):
        assert [output["tokens"] for output in report["outputs"]] == expected
        assert captured > 1 and replays > 2 * captured and report["steps"]["impl"] == "local"


def test_the_host_is_eager_and_refuses_graphs(capsys, tmp_path):
    (tmp_path / "nothing").mkdir()
    given = ["serve", "--model", str(tmp_path / "nothing"), "--cuda-graph-impl", "local"]
    with mock.patch.dict(os.environ), mock.patch.object(torch.cuda, "is_available", lambda: False):
        assert cli.main(given) == 2
    assert "there is no GPU here" in capsys.readouterr().err
