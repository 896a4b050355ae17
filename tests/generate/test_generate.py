"""`helix generate` against transformers: the same tokens at any size, sampled alike, and KV bytes counted."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_megatron import cli
from helix_megatron.check import tiny_model
from helix_megatron.convert import check, mapping, torch_dist
from helix_megatron.generate import engine as engines
from helix_megatron.generate import generate, model, report, stops
from helix_megatron.generate.engine import inference_config, size_for
from helix_megatron.generate.kv_bytes import KvBytes, readable
from helix_megatron.generate.prompts import TextStream, read_prompts
from helix_megatron.host.launcher import run_ranks
from helix_megatron.partition.config import HelixConfig

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
    return folder, model.prepare_checkpoint(folder, "float32", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def expected(tiny):
    return tiny_model.greedy(tiny[0], PROMPTS, NEW)


def helix(*arguments, **environment):
    command = [sys.executable, "-m", "helix_megatron.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def two_ends(tiny, expected, tmp_path_factory):
    """(folder, checkpoint) of the same model, which may end at a token of the third answer too."""
    folder = shutil.copytree(tiny[0], tmp_path_factory.mktemp("two") / "ends")
    later = next(t for t in expected[2][2:] if t not in [*expected[0], *expected[2][:2]])
    tiny_model.end_at(folder, tiny_model.EOS, later)
    return folder, model.prepare_checkpoint(folder, "float32", tiny[1].parent)


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
        (["x", "--temperature", "1e-40"], "--temperature 1e-40: logits divided by it"),
        (["x", "--temperature", "0.009"], "give 0 (greedy), or 0.01 to 1e+38"),
        (["x", "--temperature", "1e300"], "logits divided by it"),
        (["x", "--temperature", "nan"], "logits divided by it"),
        (["x", "--temperature", "inf"], "logits divided by it"),
        (["x", "--temperature", "1", "--top-p", "1e-46"], "less than 1e-06"),
        (["x", "--temperature", "1", "--top-p", "nan"], "a probability up to 1"),
        (["x", "--temperature", "1", "--top-k", "259"], "this model has 259 tokens"),
        (["x", "--seed", "0"], "--seed 0: a number from 1"),
        (["x", "--seed", str(10**30)], "a number from 1"),
        (["caf\udce9"], "prompt 0 is not text"),
        (["x", "--temperature", "1", "--top-k", "3", "--top-p", "0.5"], "together"),
        (["x", "--top-p", "0.5"], "do nothing at --temperature 0"),
        (["x", "--temperature", "1", "--top-p", "1.5"], "a probability up to 1"),
        (["x", "--tokenizer", "nowhere"], "no tokenizer at nowhere"),
        (["x", "--kv-block-size", "0"], "at least one token"),
        (["x", "--megatron-args", "--lr 'high"], "--megatron-args \"--lr 'high\": No closing quotation"),
        (["x", "--megatron-args", "--lr high"], "argument --lr: invalid float value: 'high'"),
        (["x", "--megatron-args", "--helix-softmax soft"], "--helix-softmax: invalid choice: 'soft'"),
        (["x", "--megatron-args", "--num-layer 2"], "no flag --num-layer; did you mean --num-layers?"),
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
    assert model.prepare_checkpoint(folder, "float32", checkpoint.parent) == checkpoint
    assert model.prepare_checkpoint(checkpoint, "bfloat16", checkpoint.parent) == checkpoint
    assert model._fingerprint(folder, "float32") != model._fingerprint(folder, "bfloat16")
    before, path = model._fingerprint(folder, "float32"), folder / "model.safetensors"
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert model._fingerprint(folder, "float32") != before  # the other files: test_convert_sources.py


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"window_size": (8, 0)}, "window_size (8, 0)"),
        ({"num_experts": 4}, "num_experts 4"),
        ({"mup_output_mult": 0.5}, "mup_output_mult 0.5"),
        ({"hybrid_layer_pattern": "*-*-"}, "hybrid-to-gpt makes a GPT of it where every * is"),
        ({"softmax_scale": 0.5}, "softmax_scale 0.5"),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32.0}, "rope_scaling_factor 32.0"),
        ({"position_embedding_type": "mrope"}, "position_embedding_type 'mrope'"),
        ({"normalization": None}, "lack normalization"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tiny, monkeypatch, changed, message):
    args = Namespace(**vars(model.Checkpoint(tiny[1]).args) | changed)
    monkeypatch.setattr(model, "Checkpoint", lambda path: SimpleNamespace(args=args))
    with pytest.raises(ValueError, match=re.escape(message)):
        model.flags(tiny[1], model.Layout(2, "helix", "float32", True), 64)


@pytest.mark.training
def test_what_was_not_restored_is_refused_unless_it_was_asked_for(tiny, monkeypatch):
    import megatron.training

    saved = model.Checkpoint(tiny[1]).args
    ours = Namespace(**vars(saved) | {"layernorm_epsilon": 0.1, "no_rope_freq": 2})
    monkeypatch.setattr(megatron.training, "get_args", lambda: ours)
    with pytest.raises(ValueError, match=r"as it was trained: --norm-epsilon is .*; --no-rope-freq is "):
        model._refuse_other_function(tiny[1], ())
    with pytest.raises(ValueError, match=r"as it was trained: --no-rope-freq is [^;]*$"):
        model._refuse_other_function(tiny[1], ("--norm-epsilon=0.1",))
    model._refuse_other_function(tiny[1], ("--norm-epsilon", "0.1", "--no-rope-freq", "2"))


@pytest.mark.dynamic_engine
@pytest.mark.parametrize("version, m, refused", [
    (None, 1, "here is none"), ("2.7.2", 1, "here is 2.7.2"), ("2.7.3", 1, None), (None, 2, None)
])  # fmt: skip
def test_whole_heads_on_a_gpu_need_flash_attention_before_the_model_is_built(
    tiny, monkeypatch, version, m, refused
):
    from megatron.core import utils
    from megatron.core.transformer import attention
    from packaging.version import Version

    from helix_megatron import pretrain_gpt
    from helix_megatron.megatron import entry, integrate

    config = SimpleNamespace(
        num_attention_heads=6, num_query_groups=2, kv_channels=16, rotary_interleaved=False,
        tensor_model_parallel_size=2 * m,
    )  # fmt: skip
    container = SimpleNamespace(model=SimpleNamespace(transformer=config))
    monkeypatch.setattr(pretrain_gpt, "build_config", lambda: container)
    monkeypatch.setattr(entry, "use_built_helpers", lambda: None)
    monkeypatch.setattr(integrate, "install", lambda: None)
    monkeypatch.setattr(integrate, "_active", HelixConfig())
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(utils, "_fa_version", version and Version(version))
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # not installed
    for name, value in [("HAVE_FA3", False), ("HAVE_FA4", False), ("flash_attn_with_kvcache", version)]:
        monkeypatch.setattr(attention, name, value)

    def built(*args):
        raise FileExistsError

    monkeypatch.setattr("megatron.training.initialize.initialize_megatron", built)
    with pytest.raises(ValueError if refused else FileExistsError, match=refused) as error:
        model.load(tiny[1], model.Layout(2 * m, "helix", "bfloat16", on_host=False), None, 64)
    assert not refused or "pip install 'flash-attn>=2.7.3'" in str(error.value)


# ---- in ranks: many jobs with one model ----
class Stopping(generate.Sampling):
    """Greedy, to the text that $STOP names."""

    def params(self, new_tokens, ignore_eos):
        found = super().params(new_tokens, ignore_eos)
        found.stop_words = [os.environ["STOP"]]
        return found


def rank_jobs(job, variants):
    """The report of each variant of a job; in the first, `stopped`: the tokens up to a stop text."""
    from dataclasses import replace

    loaded = model.load(job.checkpoint, job.layout, None, job.sequence)
    found = [generate.answer(*loaded, replace(job, **variant)) for variant in variants]
    if "STOP" not in os.environ:
        return found
    with torch.inference_mode():
        engine = engines.build(*loaded, size_for([len(tokens) for tokens in job.tokens], NEW, 64, 64))
        stops.end_at_stop_texts(engine, loaded[1])
        answers, _, _ = generate.serve_all(engine, replace(job, sampling=Stopping()))
    found[0]["stopped"] = [answer.tokens for answer in answers]
    return found


def job_of(checkpoint, tp, attention):
    tokenizer = model.open_tokenizer(checkpoint, None)
    layout = model.Layout(tp, attention, "float32", True)
    tokens = [tokenizer.tokenize(prompt) for prompt in PROMPTS]
    return generate.Job("tiny", checkpoint, layout, PROMPTS, tokens, NEW)


@pytest.fixture(scope="module")
def stop(tiny, expected):
    """(a stop text that lies within the first answer, the tokens of all answers up to it)."""
    from transformers import AutoTokenizer

    decode = AutoTokenizer.from_pretrained(tiny[0]).decode
    text = decode(expected[0])
    pairs = [text[k : k + 2] for k in range(4, len(text))]
    word = next(pair for pair in pairs if "\N{REPLACEMENT CHARACTER}" not in pair)
    ends = [next((k for k in range(len(all_)) if word in decode(all_[:k])), None) for all_ in expected]
    return word, [tokens[:end] for tokens, end in zip(expected, ends, strict=True)]


@pytest.fixture(scope="module")
def reports(tiny, stop, two_ends):
    """Of Megatron at T = 1 and Helix at T = 4: greedy, sampled twice, by top-p, one prompt at a time, with no
    end, with two ends and with neither of them."""
    variants = [
        {},
        {"sampling": generate.Sampling(0.9, top_k=40)},
        {"sampling": generate.Sampling(0.9, top_k=40, seed=7)},
        {"sampling": generate.Sampling(3.0, top_p=0.8)},
        {"at_once": 1, "block_tokens": 16},
        {"ignore_eos": True},
        {"checkpoint": two_ends[1]},
        {"checkpoint": two_ends[1], "ignore_eos": True},
    ]
    more = {"timeout_s": 300, "env": {"STOP": stop[0]}}
    vanilla = run_ranks(rank_jobs, 1, job_of(tiny[1], 1, "megatron"), variants, **more)
    ours = run_ranks(rank_jobs, 4, job_of(tiny[1], 4, "helix"), variants, **more)
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


def test_the_engine_ends_a_request_with_the_token_that_ends_its_stop_text(reports, stop, expected):
    assert 4 < len(stop[1][0]) < len(expected[0])
    for ranks in reports.values():
        assert [rank[0]["stopped"] for rank in ranks] == [stop[1]] * len(ranks)


def test_an_answer_ends_at_any_of_the_models_ends(reports, expected, two_ends):
    """The list of generation_config.json, which transformers obeys; Megatron's requests have one end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(two_ends[0])
    theirs = tiny_model.greedy(two_ends[0], PROMPTS, NEW)
    length = len(theirs[2])
    assert [len(answer) for answer in theirs] == [NEW, 1, length] and 2 < length < NEW
    for ranks in reports.values():
        outputs = ranks[0][6]["outputs"]
        assert [output["tokens"] for output in outputs] == theirs
        assert [output["finish_reason"] for output in outputs] == ["length", "stop", "stop"]
        assert outputs[2]["text"] == tokenizer.decode(expected[2][: length - 1])  # without its end
        assert [len(output["tokens"]) for output in ranks[0][7]["outputs"]] == [NEW] * 3


def test_the_ends_of_a_text_are_not_streamed(tiny):
    tokenizer = model.open_tokenizer(tiny[1], None)
    ends = tokenizer.tokenize("x")
    shown = io.StringIO()
    shower = report.AnswerPrinter(shown, tokenizer, 1, tuple(ends))
    shower.step(0, tokenizer.tokenize("ab"), False)
    shower.step(0, ends, True)
    assert shown.getvalue() == "ab\n"


@pytest.mark.parametrize(
    "generation, config, stops",
    [
        ([7, 8], 9, (7, 8)),
        (7, [8, 9], (7,)),
        (None, [8, 9], (8, 9)),
        (None, None, (tiny_model.EOS,)),  # the tokenizer's
    ],
)
def test_where_the_ends_of_a_text_are_looked_for(tiny, tmp_path, generation, config, stops):
    checkpoint = shutil.copytree(tiny[1], tmp_path / "checkpoint")
    for name, told in (("generation_config.json", generation), ("config.json", config)):
        (checkpoint / "hf" / name).write_text(json.dumps({"eos_token_id": told}))
    args = model.Checkpoint(checkpoint).args
    args.eos_token_id = None
    tokenizer = model.open_tokenizer(checkpoint, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "Checkpoint", lambda path: SimpleNamespace(args=args))
        assert model.stop_tokens(checkpoint, tokenizer, None) == stops
        given = tmp_path / "given"
        given.mkdir()
        (given / "generation_config.json").write_text('{"eos_token_id": 5}')
        assert model.stop_tokens(checkpoint, tokenizer, str(given)) == (5,)


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


# ---- a model that --use-checkpoint-args does not restore ----
POSITIONS = dict(
    position_embedding_type="yarn",
    rotary_scaling_factor=4.0,
    yarn_original_max_position_embeddings=16,
    no_rope_freq=[0, 1],
)
TRAINED_WITH = """--num-layers 2 --hidden-size 96 --ffn-hidden-size 96 --num-attention-heads 6
    --group-query-attention --num-query-groups 2 --kv-channels 16 --max-position-embeddings 512
    --seq-length 512 --position-embedding-type yarn --rotary-scaling-factor 4
    --yarn-original-max-position-embeddings 16 --no-rope-freq 2 --normalization RMSNorm --norm-epsilon 1e-6
    --swiglu --disable-bias-linear --untie-embeddings-and-output-weights --micro-batch-size 1
    --tokenizer-type NullTokenizer --vocab-size 259""".split()


@pytest.fixture(scope="module")
def stretched(tiny, tmp_path_factory):
    """The same weights, as a training with YaRN and a layer without RoPE saves them."""
    source = model.Checkpoint(tiny[1])
    args = Namespace(**vars(source.args) | POSITIONS)
    folder = tmp_path_factory.mktemp("stretched")
    torch_dist.write(folder, mapping.entries(args, args.vocab_size), args, source.read)
    return folder


def rank_greedy(argv, prompts):
    """The most likely tokens by whole forward passes of vanilla Megatron, one prompt at a time."""
    (network,) = check.build_and_load(argv)
    answers = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(NEW):
            tokens.append(int(check.forward(network, tokens)[-1, : tiny_model.VOCABULARY].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


def test_yarn_and_layers_without_rope_are_generated_with_as_they_were_trained(stretched, expected):
    job = job_of(stretched, 2, "helix")
    flags = [*check.HOST_FLAGS, *TRAINED_WITH, "--load", str(stretched)]
    (trained,) = run_ranks(rank_greedy, 1, flags, job.tokens, timeout_s=300)
    assert all(ours[:8] != plain[:8] for ours, plain in zip(trained, expected, strict=True))
    for (found,) in run_ranks(rank_jobs, 2, job, [{"ignore_eos": True}], timeout_s=300):
        assert [output["tokens"] for output in found["outputs"]] == trained


# ---- pieces ----
def test_kv_bytes_of_a_real_model():
    kv = KvBytes(30, 3, 64, 4)  # SmolLM2-135M
    assert kv.total_bytes(100) == 2 * 30 * 3 * 64 * 4 * 100
    assert [kv.replicated_bytes(tp) * 3 // kv.total_bytes() for tp in (1, 2, 3, 4, 8)] == [3, 2, 1, 1, 1]
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


@pytest.mark.parametrize("on_host, ranks", [(True, 4), (False, 1)])
def test_a_cache_that_no_memory_holds_is_refused(monkeypatch, on_host, ranks):
    """A KV head of 8 in fp32 on each of 2 ranks: 64 bytes a token; 10 blocks of 16 tokens, and 1.5."""
    config = SimpleNamespace(
        tensor_model_parallel_size=2, num_query_groups=2, num_layers=1, kv_channels=8,
        params_dtype=torch.float32,
    )  # fmt: skip
    size, needed = engines.CacheSize(16, 10, 5, 32, 2048), int(11.5 * 16 * 64)
    memory = SimpleNamespace(total_memory=needed * ranks)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("helix_megatron.host.mode.host_mode_enabled", lambda: on_host)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert inference_config(config, size).buffer_size_gb * 2**30 == needed
    memory.total_memory -= 1
    with pytest.raises(ValueError, match=r"5 sequences of 32 tokens, .* 11.50 KiB on each rank, which"):
        inference_config(config, size)


def test_prompts_come_from_the_command_line_and_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert read_prompts(["zero"], tmp_path / "a.txt") == ["zero", "one", " two "]
    (tmp_path / "a.jsonl").write_text('"one\\n"\n{"prompt": "two", "id": 3}\n')
    assert read_prompts([], tmp_path / "a.jsonl") == ["one\n", "two"]
    (tmp_path / "B.JSONL").write_text('"three"')
    assert read_prompts([], tmp_path / "B.JSONL") == ["three"]
    # a line ends at \\n or \\r\\n, nowhere else, and a byte-order mark is not text
    inside = "a\u2028b\u2029c\x85d\x0ce\x0bf\x1cg\x1dh\x1ei\rj"
    for name, write in [("b.txt", str), ("b.jsonl", lambda text: json.dumps(text, ensure_ascii=False))]:
        lines = [write(inside), write("second"), write(inside)]
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\n")
        assert read_prompts([], tmp_path / name) == [inside, "second", inside]
    (tmp_path / "a.jsonl").write_text('"\\ud800"')
    with pytest.raises(ValueError, match="prompt 0 is not text"):
        read_prompts([], tmp_path / "a.jsonl")
    for line, message in [
        ("{", ":1 is not JSON"),
        ("[1]", ":1 is neither"),
        ('{"text": 1}', ":1 is neither"),
        ('{"prompt": "a", "prompt": "b"}', ":1 has two of `prompt`"),
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
