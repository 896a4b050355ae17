"""`helix generate` against transformers: the same tokens at any size, sampled alike, and KV bytes counted."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_megatron import cli
from helix_megatron.generate import generate, model
from helix_megatron.generate.engine import inference_config, size_for
from helix_megatron.generate.kv_bytes import KvBytes, readable
from helix_megatron.generate.prompts import TextStream, read_prompts
from helix_megatron.host.launcher import run_ranks
from tests.generate import tiny_model

PROMPTS = [
    "hello there",
    "a",
    "é, and a third prompt, which is longer than one block of sixty-four tokens; yes",
]
NEW = 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, checkpoint) of a model of 6 heads and 2 KV heads; T = 4 is a grid of 2x2."""
    folder = tiny_model.make(tmp_path_factory.mktemp("tiny"))
    return folder, model.prepared(folder, "float32", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def expected(tiny):
    return tiny_model.greedy(tiny[0], PROMPTS, NEW)


def helix(*arguments, **environment):
    command = [sys.executable, "-m", "helix_megatron.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


# ---- the command ----
def test_the_command_streams_what_transformers_chooses(tiny, expected, tmp_path):
    from transformers import AutoTokenizer

    folder, checkpoint = tiny
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(text) + "\n" for text in PROMPTS[1:]))
    found = helix(
        "generate", "--model", folder, "--cache-dir", checkpoint.parent, "--tensor-model-parallel-size", 4,
        "--max-new-tokens", NEW, "--prompts-file", tmp_path / "more.jsonl", PROMPTS[0],
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    texts = AutoTokenizer.from_pretrained(folder).batch_decode(expected, skip_special_tokens=True)
    answers = "".join(f"--- {number}\n{text}\n" for number, text in enumerate(texts))
    assert found.stdout.startswith(answers + "\nhelix grid 2x2, exact softmax"), found.stdout
    assert f"3 prompts, {2 * NEW + 1} tokens in " in found.stdout and " ms, TPOT " in found.stdout
    # 12, 2 and 1 + 3 blocks of 64 tokens, 2 layers of 2 KV heads of 16 in float32
    assert "4 blocks of 64 tokens: 32.00 KiB on each rank, 1/4 of 128.00 KiB; Megatron's replication: " in (
        found.stdout
    )
    assert found.stdout.endswith("64.00 KiB on each rank\n")


def test_a_grid_that_cannot_work_is_one_line(tiny):
    folder, checkpoint = tiny
    found = helix(
        "generate", "--model", folder, "--tensor-model-parallel-size", 11, "x", HELIX_CACHE=checkpoint.parent
    )
    assert found.returncode == 2 and found.stdout == ""
    line = found.stderr.strip().splitlines()[-1]
    assert line.startswith("helix: no Helix grid") and "tensor-parallel size 11" in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "there is no prompt"),
        ([""], "prompt 0 is empty"),
        (["x", "--prompts-file", "nowhere.txt"], "cannot read --prompts-file nowhere.txt"),
        (["x", "--max-new-tokens", "0"], "at least 1"),
        (
            ["x", "--max-new-tokens", "512"],
            "prompt 0 has 1 tokens, with --max-new-tokens 512 more than the 512",
        ),
        (["x", "--tensor-model-parallel-size", "0"], "at least one rank"),
        (["x", "--temperature", "-1"], "negative"),
        (["x", "--temperature", "1", "--top-k", "3", "--top-p", "0.5"], "together"),
        (["x", "--top-p", "0.5"], "do nothing at --temperature 0"),
        (["x", "--temperature", "1", "--top-p", "1.5"], "a probability up to 1"),
        (["x", "--tokenizer", "nowhere"], "no tokenizer at nowhere"),
        (["x", "--kv-block-size", "0"], "at least one token"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_a_rank_starts(tiny, arguments, message, capsys):
    folder, checkpoint = tiny
    given = ["generate", "--model", str(folder), "--cache-dir", str(checkpoint.parent)]
    assert cli.main([*given, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there_is_refused(capsys, tmp_path):
    assert cli.main(["generate", "--model", str(tmp_path / "none"), "x"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["generate", "--model", str(tmp_path), "--cache-dir", str(tmp_path / "c"), "x"]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_a_model_is_converted_once_and_again_when_it_changes(tiny):
    folder, checkpoint = tiny
    assert model.prepared(folder, "float32", checkpoint.parent) == checkpoint
    assert model.prepared(checkpoint, "bfloat16", checkpoint.parent) == checkpoint
    assert model._fingerprint(folder, "float32") != model._fingerprint(folder, "bfloat16")
    before, path = model._fingerprint(folder, "float32"), folder / "config.json"
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert model._fingerprint(folder, "float32") != before


def test_a_checkpoint_of_another_model_is_refused(tiny, monkeypatch):
    args = model.Checkpoint(tiny[1]).args
    args.window_size = (8, 0)
    monkeypatch.setattr(model, "Checkpoint", lambda path: SimpleNamespace(args=args))
    with pytest.raises(ValueError, match=r"window_size \(8, 0\)"):
        model.flags(tiny[1], model.Layout(2, "helix", "float32", True), 64)


# ---- in ranks: many jobs with one model ----
def rank_jobs(job, variants):
    """The report of each variant of a job."""
    from dataclasses import replace

    loaded = model.load(job.checkpoint, job.layout, None, job.sequence)
    return [generate.answer(*loaded, replace(job, **variant)) for variant in variants]


def job_of(checkpoint, tp, attention):
    tokenizer = model.open_tokenizer(checkpoint, None)
    layout = model.Layout(tp, attention, "float32", True)
    tokens = [tokenizer.tokenize(prompt) for prompt in PROMPTS]
    return generate.Job("tiny", checkpoint, layout, PROMPTS, tokens, NEW)


@pytest.fixture(scope="module")
def reports(tiny):
    """Of Megatron at T = 1 and Helix at T = 4: greedy, sampled twice, by top-p, one prompt at a time."""
    variants = [
        {},
        {"sampling": generate.Sampling(0.9, top_k=40)},
        {"sampling": generate.Sampling(0.9, top_k=40, seed=7)},
        {"sampling": generate.Sampling(3.0, top_p=0.8)},
        {"at_once": 1, "block_tokens": 16},
        {"ignore_eos": True},
    ]
    vanilla = run_ranks(rank_jobs, 1, job_of(tiny[1], 1, "megatron"), variants, timeout_s=300)
    ours = run_ranks(rank_jobs, 4, job_of(tiny[1], 4, "helix"), variants, timeout_s=300)
    return {1: vanilla, 4: ours}


def test_tokens_are_those_of_transformers_and_of_every_size(reports, expected):
    assert [len(answer) for answer in expected] == [NEW, 1, NEW] and len(set(expected[0])) > 5
    for ranks in reports.values():
        for rank in ranks:
            for number in (0, 4):
                assert [output["tokens"] for output in rank[number]["outputs"]] == expected
            for mine, alone in zip(rank, reports[1][0], strict=True):
                assert [o["tokens"] for o in mine["outputs"]] == [o["tokens"] for o in alone["outputs"]]
    sampled = [[tuple(o["tokens"]) for o in report["outputs"]] for report in reports[1][0]]
    assert len({tuple(answers) for answers in sampled[:4]}) == 4  # the seed and the settings matter


def test_reports_say_what_happened(reports):
    found = reports[4][0][0]
    assert found["attention"].startswith("helix grid 2x2") and reports[1][0][0]["attention"] == "megatron"
    assert [output["prompt_tokens"] for output in found["outputs"]] == [11, 1, len(PROMPTS[2].encode())]
    assert [output["finish_reason"] for output in found["outputs"]] == ["length", "stop", "length"]
    assert found["outputs"][1]["text"] == "" and found["outputs"][1]["tpot_s"] is None
    assert all(0 < output["ttft_s"] <= found["seconds"] for output in found["outputs"])
    assert 0 < found["tpot_s"] < found["seconds"]
    assert found["tokens_per_s"] == pytest.approx((2 * NEW + 1) / found["seconds"])
    on = reports[4][0][5]["outputs"]
    assert [len(output["tokens"]) for output in on] == [NEW] * 3 and on[1]["tokens"][0] == tiny_model.EOS
    one_by_one = [output["ttft_s"] for output in reports[4][0][4]["outputs"]]
    assert one_by_one == sorted(one_by_one) and one_by_one[1] > one_by_one[0]


def test_kv_bytes_are_one_part_in_t_and_megatrons_are_not(reports):
    whole = 2 * 2 * 2 * 16 * 4  # K and V, layers, KV heads, dimension, float32
    for tp, ranks in reports.items():
        for rank in ranks:
            for number in (0, 4):
                kv = rank[number]["kv_cache"]
                assert kv["bytes_per_token_whole_model"] == whole
                assert kv["bytes_per_token_per_rank"] == whole / tp
                assert kv["peak_bytes_per_rank"] * tp == kv["peak_bytes_whole_model"]
                assert kv["bytes_per_token_per_rank_megatron"] == whole / min(tp, 2)
    assert reports[4][0][0]["kv_cache"]["peak_blocks"] == 4
    longest = len(PROMPTS[2].encode()) + NEW  # one prompt at a time, blocks of 16; the last token is not kept
    assert reports[4][0][4]["kv_cache"]["peak_blocks"] == -(-(longest - 1) // 16)


# ---- pieces ----
def test_kv_bytes_of_a_real_model():
    kv = KvBytes(30, 3, 64, 4)  # SmolLM2-135M
    assert kv.whole(100) == 2 * 30 * 3 * 64 * 4 * 100
    assert [kv.replicated(tp) * 3 // kv.whole() for tp in (1, 2, 3, 4, 8)] == [3, 2, 1, 1, 1]
    assert readable(512) == "512 B" and readable(1536) == "1.50 KiB" and readable(3 * 2**40) == "3072.00 GiB"


def test_the_cache_fits_those_that_run_at_once():
    size = size_for([1, 64, 10], 8, 2, 16)
    assert (size.blocks, size.requests, size.sequence) == (5 + 2, 2, 72)


def test_a_step_has_room_for_the_padding_of_its_tokens():
    config = SimpleNamespace(
        tensor_model_parallel_size=3,
        num_query_groups=3,
        num_layers=1,
        kv_channels=8,
        params_dtype=torch.float32,
    )
    found = inference_config(config, size_for([2150, 5], 7, 8, 16))
    assert (found.max_tokens, found.max_requests, found.max_sequence_length) == (2178, 12, 2157)


def test_prompts_come_from_the_command_line_and_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert read_prompts(["zero"], tmp_path / "a.txt") == ["zero", "one", " two "]
    (tmp_path / "a.jsonl").write_text('"one\\n"\n{"prompt": "two", "id": 3}\n')
    assert read_prompts([], tmp_path / "a.jsonl") == ["one\n", "two"]
    for line, message in [
        ("{", ":1 is not JSON"),
        ("[1]", ":1 is neither"),
        ('{"text": 1}', ":1 is neither"),
    ]:
        (tmp_path / "a.jsonl").write_text(line)
        with pytest.raises(ValueError, match=message):
            read_prompts([], tmp_path / "a.jsonl")


@settings(max_examples=60, deadline=None)
@given(st.text(), st.lists(st.integers(0, 255), max_size=6))
def test_streamed_text_is_the_whole_text(text, noise):
    tokens = [*text.encode(), *noise, *text.encode()]
    stream = TextStream(lambda tokens: bytes(tokens).decode(errors="replace"))
    pieces = [stream.push(token) for token in tokens]
    if not noise:  # every piece is whole characters
        assert all("\N{REPLACEMENT CHARACTER}" not in piece or piece in text for piece in pieces)
    assert "".join(pieces) + stream.close() == bytes(tokens).decode(errors="replace")
