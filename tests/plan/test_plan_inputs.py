"""What the planner is given: clusters in files, sizes, models as flags; and the flags it gives back."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from helix_megatron import cli, compat
from helix_megatron.host.launcher import run_ranks
from helix_megatron.models import presets
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.plan import clusters, inputs


def run(capsys, *words):
    code = cli.main(["plan", *words])
    out = capsys.readouterr()
    return code, out.out, out.err


def cluster_of(tmp_path, document):
    path = tmp_path / "mine.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return inputs.load_cluster(str(path))


# ---- clusters in files ----
@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{base: dgx-h100, slow: abc}", "slow is 'abc'; a number of bytes/s"),
        ("{base: dgx-h100, slow: 50}", r"slow is 50 bytes/s.*; 50 GB is 5\.0e\+10"),
        ("{base: dgx-h100, slow: 0, nodes: 2}", r"slow is 0 bytes/s for 16 devices, 8 in a domain"),
        ("{base: dgx-h100, fast: 0}", "fast is 0 bytes/s for 8 devices"),
        ("{base: dgx-h100, memory: -5}", "memory is -5 bytes"),
        ("{base: dgx-h100, memory: 80}", r"memory is 80 bytes.*80 GB is 8\.0e\+10"),
        ("{base: dgx-h100, memory: 3.0e+9}", "has 3 GB of memory, and 4 GB of them are kept"),
        ("{base: dgx-h100, memory: true}", "memory is True; a number of bytes"),
        ("{base: dgx-h100, reserve: .nan}", "reserve is nan; a number of bytes"),
        ("{base: dgx-h100, fast: .inf}", "fast is inf; a number of bytes/s"),
        ("{base: dgx-h100, domain: 0}", "domain is 0; a whole number of at least 1"),
        ("{base: dgx-h100, nodes: 1.5}", "nodes is 1.5; a whole number of at least 1"),
        ("{base: dgx-h100, gpus_per_node: '8'}", "gpus_per_node is '8'; a whole number"),
        ("{base: host, slots: -1}", "slots is -1; a whole number of at least 0"),
        ("{base: dgx-h100, fused: 1}", "fused is 1; it is true"),
        ("{base: dgx-h100, name: 7}", "name is 7; a text"),
        ("{base: dgx-h100, sources: data sheet}", "sources is 'data sheet'; a list of texts"),
        ("{base: dgx-h100, rates: 3}", "rates is 3; it is a mapping"),
        ("{base: dgx-h100, rates: {gemm: 3}}", "rates: gemm is 3; it is a mapping of flops, bandw"),
        ("{base: dgx-h100, rates: {gem: {}}}", "rates: unknown key 'gem'; did you mean gemm"),
        ("{base: dgx-h100, rates: {gemm: {flops: 5.0e+14}}}", "gemm has no bandwidth, a number of bytes/s"),
        (
            "{base: dgx-h100, rates: {gemm: {flops: 700, bandwidth: 2.0e+12}}}",
            r"gemm: flops is 700 FLOP/s.*; 700 GF is 7\.0e\+11",
        ),
        (
            "{base: dgx-h100, rates: {gemm: {flops: 7.0e+14, bandwidth: 2.0e+12, launch: 8}}}",
            "launch is 8 seconds; it is between 0 and 1 seconds",
        ),
        ("{base: host, lines: {foo: {latency: 1}}}", 'foo: a line is called "KIND xSIZE @BUSY"'),
        ("{base: host, lines: {broadcast x2 @2: {}}}", "kinds: all_reduce, all_gather"),
        ("{base: host, lines: {all_reduce x1 @2: {latency: 1, bandwidth: 1}}}", "a group has 2 ranks or"),
        ("{base: host, lines: {all_reduce x2 @2: {latency: 0, bandwidth: 1.0e+9}}}", "latency is 0 seconds"),
        ("{base: host, lines: {recv x2 @2: {latency: 1, bandwidth: 1.0e+9}}}", "lines has no all_reduce"),
        ("{base: host, layer_overhead: {train: 1}}", "layer_overhead: unknown key 'train'"),
        ("{base: host, layer_overhead: {train megatron: -1}}", "train megatron is -1 seconds"),
        ("{base: host, step_overhead: {train: x}}", "step_overhead: train is 'x'; a number of seconds"),
        ("{name: mine, memory: 8.0e+10}", "has no rates; give it, or start from a preset"),
        ("[1, 2]", "holds list, not a mapping"),
    ],
)  # fmt: skip
def test_a_wrong_field_of_a_cluster_is_refused_by_file_name_value_and_unit(document, message, tmp_path):
    with pytest.raises(ValueError, match=message) as refused:
        cluster_of(tmp_path, document)
    assert "mine.yaml" in str(refused.value)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    assert isinstance(yaml.safe_load("5e10"), str)
    assert cluster_of(tmp_path, "{base: dgx-h100, slow: 5e10}").slow == 5e10


@pytest.mark.parametrize(
    ("document", "domain"),
    [
        ({"base": "dgx-h100", "gpus_per_node": 4, "nodes": 2}, 4),
        ({"base": "dgx-h100", "gpus_per_node": 16}, 16),
        (
            {"base": "dgx-h100", "gpus_per_node": 4, "nodes": 2, "domain": 8},
            8,
        ),  # one NVLink over two machines
        ({"base": "gb200-nvl72", "gpus_per_node": 36}, 36),
        ({"base": "dgx-h100", "nodes": 4}, 8),
        ({**clusters.to_dict(clusters.find("dgx-h100")), "gpus_per_node": 4, "domain": 4}, 4),
    ],
)
def test_the_fast_link_ends_at_the_node_unless_the_file_says_otherwise(document, domain, tmp_path):
    assert cluster_of(tmp_path, document).domain == domain


def test_a_file_without_base_and_domain_has_a_domain_of_its_node(tmp_path):
    document = clusters.to_dict(clusters.find("dgx-h100")) | {"gpus_per_node": 4, "nodes": 2}
    del document["domain"]
    assert cluster_of(tmp_path, document).domain == 4


def test_nodes_with_fewer_gpus_keep_the_reach_of_the_fast_link():
    h100 = clusters.find("dgx-h100")
    rack = replace(h100, gpus_per_node=4, nodes=18, domain=72)  # one NVLink over 18 machines
    pairs = replace(h100, domain=2)
    assert clusters.resize(rack, 2).domain == 36
    assert clusters.resize(pairs, 4).domain == clusters.resize(pairs, 16).domain == 2
    assert clusters.resize(clusters.find("host"), 1).domain == clusters.find("host").domain


# ---- sizes on the command line ----
LLAMA = ("--model", "llama-3-8b", "--workload", "decode", "--batch", "8")


def test_machines_that_are_used_in_part_are_not_one_domain(capsys):
    documents = {}
    for nodes in ("1", "2"):
        code, out, _ = run(capsys, *LLAMA, "--gpus", "8", "--nodes", nodes, "--tp", "8", "--json")
        assert code == 0
        documents[nodes] = json.loads(out)
    one, two = (document["candidates"][0]["predicted_seconds"] for document in documents.values())
    assert (documents["2"]["cluster"]["gpus_per_node"], documents["2"]["cluster"]["domain"]) == (4, 4)
    assert two > 1.1 * one


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpus", "12"), "is 12 in each, and a node of dgx-h100 has 8; give --nodes 2 (6 in each)"),
        (("--gpus", "32", "--nodes", "2"), "is 16 in each, and a node of dgx-h100 has 8; give --nodes 4"),
        (("--memory", "3"), "--memory 3: a device has 3 GB of memory, and 4 GB of them are kept"),
        (("--memory", "nan"), "--memory is nan; it must be positive"),
        (("--memory", "80e9"), "--memory is 8e+10 GB; it is in GB, not in bytes"),
        (("--inter-node", "inf"), "--inter-node is inf; it must be positive and finite"),
        (("--seq-length", "0"), "--seq-length is 0"),
        (("--ranks", "-2"), "--ranks is -2"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused_in_one_line(capsys, words, message):
    code, _, err = run(capsys, *LLAMA, *words)
    assert code == 2 and message in err and err.count("\n") == 1


# ---- models as flags ----
GPT = {"--num-layers": 24, "--hidden-size": 2048, "--num-attention-heads": 16}


def words(flags):
    return [
        word for flag, value in flags.items() for word in ([flag] if value is True else [flag, str(value)])
    ]


def plan_of(capsys, flags, *options):
    return run(capsys, "--workload", "train", "--batch", "64", *options, "--", *words({**GPT, **flags}))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--num-layers": -24}, "after --: --num-layers is '-24'; the planner needs a whole number"),
        ({"--num-layers": "2.5"}, "--num-layers is '2.5'"),
        ({"--num-layers": True}, "--num-layers is without a value"),
        ({"--num-attention-heads": 0}, "--num-attention-heads is '0'"),
        ({"--num-attention-heads": 15}, "does not divide --hidden-size 2048; give --kv-channels"),
        ({"--kv-channels": 0}, "--kv-channels is '0'"),
        ({"--ffn-hidden-size": "wide"}, "--ffn-hidden-size is 'wide'"),
        ({"--vocab-size": "abc"}, "--vocab-size is 'abc'"),
        ({"--padded-vocab-size": 0}, "--padded-vocab-size is '0'"),
        ({"--make-vocab-size-divisible-by": 0}, "--make-vocab-size-divisible-by is '0'"),
        ({"--group-query-attention": True, "--num-query-groups": 3}, "--num-query-groups 3 does not divide"),
        ({"--rotary-percent": "abc"}, "--rotary-percent is 'abc'; the planner needs a number above 0"),
        ({"--rotary-percent": 1.5}, "--rotary-percent is '1.5'"),
        ({"--norm-epsilon": "nan"}, "--norm-epsilon is 'nan'"),
        ({"--normalization": "BatchNorm"}, "is 'BatchNorm'; the planner knows LayerNorm, RMSNorm"),
        ({"--position-embedding-type": "relative"}, "is 'relative'; the planner knows learned_absolute"),
        ({"--swiglu": "yes"}, "--swiglu is 'yes'; it takes no value"),
        ({"--seq-length": "long"}, "--seq-length is 'long'"),
        ({"--bf16": True, "--fp16": True}, "--bf16 and --fp16 are both given"),
    ],
)  # fmt: skip
def test_values_of_flags_that_no_model_has_are_refused_by_name(flags, message, capsys):
    code, out, err = plan_of(capsys, flags)
    assert code == 2 and message in err and err.count("\n") == 1 and not out


def test_a_yaml_number_with_a_fraction_is_no_whole_number(tmp_path):
    for value in (2.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--num-layers is"):
            inputs.shape_from_flags({**GPT, "--num-layers": value}, "m", "m.yaml")
    assert inputs.shape_from_flags({**GPT, "--num-layers": 24.0}, "m", "m.yaml").num_layers == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3; it is a whole number of at least 1"),
        ({"hidden_size": "512"}, "hidden_size is '512'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 8"),
        ({"hidden_size": 500}, "num_attention_heads 8 does not divide hidden_size 500, .* no head_dim"),
        ({"hidden_size": 500, "head_dim": None}, "num_attention_heads 8 does not divide hidden_size 500"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it is a number above 0"),
        ({"rope_parameters": {"partial_rotary_factor": 2}}, "partial_rotary_factor is 2; .*up to 1"),
    ],
)
def test_values_of_a_config_json_that_no_model_has_are_refused_by_name(change, message, tmp_path):
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8,
              "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 256,
              "max_position_embeddings": 512}  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert inputs.load_model(str(path)).num_query_groups == 2
    path.write_text(json.dumps(config | {"hidden_size": 500, "head_dim": 64}))
    assert inputs.load_model(str(path)).kv_channels == 64
    path.write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        inputs.load_model(str(path))


@pytest.mark.parametrize("padded", [1000, 1024])
def test_a_padded_vocabulary_is_dealt_evenly_or_not_at_all(padded, capsys):
    """Megatron takes --padded-vocab-size as it is, and refuses ranks that do not divide it."""
    code, out, _ = plan_of(capsys, {"--padded-vocab-size": padded}, "--json", "--gpus", "16", "--nodes", "2",
                           "--top", "1000")  # fmt: skip
    assert code == 0
    sizes = {candidate["layout"]["tp"] for candidate in json.loads(out)["candidates"]}
    assert sizes == {tp for tp in (1, 2, 4, 8, 16) if padded % tp == 0}
    code, out, _ = plan_of(capsys, {"--padded-vocab-size": 1000}, "--nodes", "2", "--tp", "16")
    assert code == 1 and "tensor-parallel size 16 does not divide the padded vocabulary of 1000" in out


MODELS = (
    {},
    {"--group-query-attention": True},
    {"--group-query-attention": True, "--num-query-groups": 4},
    {"--num-query-groups": 4},
    {"--swiglu": True, "--hidden-size": 2000, "--kv-channels": 64},
    {"--use-rotary-position-embeddings": True, "--disable-bias-linear": True},
    {"--position-embedding-type": "rope", "--rotary-percent": 0.5, "--normalization": "RMSNorm"},
)
SAME = """num_layers hidden_size num_attention_heads kv_channels ffn_hidden_size rotary_percent normalization
    add_bias_linear position_embedding_type""".split()


@pytest.mark.training
def test_a_model_of_flags_is_that_of_megatrons_parser():
    work = {"--micro-batch-size": 1, "--seq-length": 1024, "--max-position-embeddings": 1024, **DATA}
    lines = [(1, words({**GPT, **flags, **work})) for flags in MODELS]
    for flags, args in zip(MODELS, run_ranks(parsed, 1, lines, False)[0], strict=True):
        assert isinstance(args, dict), args
        shape = inputs.shape_from_flags({**GPT, **flags}, "m", "flags", 1024)
        assert {name: getattr(shape, name) for name in SAME} == {name: args[name] for name in SAME}
        groups = args["num_query_groups"] if args["group_query_attention"] else args["num_attention_heads"]
        assert shape.num_query_groups == groups


DATA = {"--mock-data": True, "--tokenizer-type": "NullTokenizer", "--vocab-size": 1000, "--lr": 1e-4,
        "--train-iters": 2}  # fmt: skip


def parsed(lines, build):
    """Megatron's arguments of each (ranks, words), validated, or its refusal.

    With `build` the model's configuration is made of them too, which refuses what this machine has not.
    """
    import contextlib
    import io
    import os

    from helix_megatron.megatron import entry, integrate

    found = []
    os.environ.pop("MASTER_ADDR", None)  # no rank is there to agree with
    for ranks, line in lines:
        os.environ["WORLD_SIZE"] = str(ranks)  # read by the parser; nothing is started
        sys.argv = ["pretrain_gpt", *entry.prepare_argv([*line, "--helix-host-mode"])]
        from megatron.training import argument_utils, arguments

        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                args = arguments.parse_args()
                arguments.validate_args(args, {})
                if build:
                    argument_utils.gpt_config_from_args(args)
                found.append({k: v for k, v in vars(args).items() if isinstance(v, int | float | str | None)})
            except (SystemExit, AssertionError, ValueError) as error:
                found.append(f"{type(error).__name__}: {error} {said.getvalue()[-300:]}")
        integrate.disable()
    return found


# ---- flags that are not planned ----
@pytest.mark.training
def test_flags_that_change_the_model_or_the_work_are_named_if_they_are_not_planned(capsys):
    flags = {"--rotary-interleaved": True, "--overlap-grad-reduce": True, "--hidden-dropout": 0.1,
             "--helix-softmax": "per-slice", "--tensor-model-parallel-size": 2,
             "--attention-dropout": "0.0", "--lr": 3e-4, "--log-timers-to-tensorboard": True,
             "--moe-router-topk": 2, "--no-rope-fusion": True, "--sequence-parallel": True}  # fmt: skip
    code, out, err = plan_of(capsys, flags)
    assert code == 0 and not err
    named = [
        line.removeprefix("Not planned: ").rstrip(".") for line in out.splitlines() if "Not planned" in line
    ]
    assert named[1:] == [
        "--tensor-model-parallel-size 2, as the plan chooses (--tp 2 keeps it)",
        "--rotary-interleaved",
        "--overlap-grad-reduce",
        "--hidden-dropout 0.1",
        "--helix-softmax per-slice",
    ]


@pytest.mark.training
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--num-expert": 8}, "has a flag --num-expert; did you mean --num-experts?"),
        ({"--helix-soft-max": "exact"}, "has a flag --helix-soft-max; did you mean --helix-softmax?"),
        ({"--zzz": 1}, "the flags after --: neither Megatron nor Helix has a flag --zzz."),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest(flags, message, capsys):
    code, _, err = plan_of(capsys, flags)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.training
def test_an_unknown_flag_in_a_file_is_refused_even_if_it_stands_for_a_needed_one(capsys, tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text("MODEL_ARGS: {num-layers: 24, hidden-sise: 2048, num-attention-heads: 16, foo: false}")
    code, _, err = run(capsys, "--model", str(path))
    assert code == 2 and "m.yaml" in err and "a flag --hidden-sise; did you mean --hidden-size?" in err
    path.write_text("MODEL_ARG: {num-layers: 24}")
    code, _, err = run(capsys, "--model", str(path))
    assert code == 2 and "has no MODEL_ARGS" in err


def test_without_megatron_what_the_planner_does_not_know_is_named_as_unchecked(capsys, monkeypatch):
    def missing():
        raise HelixConfigError("megatron-core is not installed")

    monkeypatch.setattr(compat, "version", missing)
    code, out, _ = plan_of(capsys, {"--num-expert": 8, "--hidden-dropout": 0.1, "--lr": 1})
    assert code == 0 and "Not planned: --hidden-dropout 0.1." in out
    unchecked = "(unchecked without megatron.training; did you mean --num-experts)"
    assert f"Not planned: --num-expert 8 {unchecked}." in out


def test_flags_that_the_planner_knows_start_no_megatron():
    known = {**GPT, "--seq-length": 2048, "--lr": 1, "--bf16": True, "--tensor-model-parallel-size": 2}
    code = (
        "import sys; from helix_megatron.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "plan", "--json", "--", *words(known)]
    assert subprocess.run(command, capture_output=True).returncode == 0


# ---- work in flags ----
def planned(capsys, flags, *options, workload="train"):
    code, out, err = run(capsys, "--json", "--workload", workload, *options, "--", *words({**GPT, **flags}))
    assert code == 0, err
    return json.loads(out)


def test_the_work_is_that_of_the_flags_where_no_option_says_otherwise(capsys):
    flags = {"--seq-length": 16384, "--global-batch-size": 48, "--micro-batch-size": 3, "--fp16": True,
             "--max-position-embeddings": 32768}  # fmt: skip
    document = planned(capsys, flags, "--batch", "48")  # said twice, and the same
    work, first = document["workload"], document["candidates"][0]
    assert (work["length"], work["batch"], work["dtype"]) == (16384, 48, "fp16")
    assert {c["layout"]["micro_batch"] for c in document["candidates"]} == {3}
    assert first["flags"]["--seq-length"] == 16384 and first["flags"]["--fp16"] is True
    inference = planned(capsys, flags, "--context", "300", workload="decode")["workload"]
    assert (inference["length"], inference["batch"]) == (300, 128)  # the batch of training is another one
    assert planned(capsys, flags, workload="prefill")["workload"]["length"] == 16384
    host = planned(capsys, {"--use-distributed-optimizer": True, "--num-layers": 2}, "--cluster", "host")
    assert host["workload"]["distributed_optimizer"] is True


@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        (("--seq-length", "8192"), {"--seq-length": 16384},
         "--seq-length 8192 contradicts --seq-length of the flags after --, which is 16384; leave one out"),
        (("--batch", "64"), {"--global-batch-size": 48}, "--batch 64 contradicts --global-batch-size"),
        (("--dtype", "bf16"), {"--fp16": True}, "--dtype bf16 contradicts --bf16 or --fp16"),
        (("--no-distributed-optimizer",), {"--use-distributed-optimizer": True}, "zer contradicts"),
        (("--seq-length", "8192"), {"--max-position-embeddings": 4096}, "4096 learned positions; give"),
    ],
)  # fmt: skip
def test_options_and_flags_that_contradict_one_another_are_refused(options, flags, message, capsys):
    code, _, err = run(capsys, *options, "--", *words({**GPT, **flags}))
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_model_with_few_learned_positions_is_planned_as_long_as_it_is(capsys):
    flags = {"--max-position-embeddings": 1024}
    assert planned(capsys, flags)["workload"]["length"] == 1024
    assert planned(capsys, flags | {"--position-embedding-type": "rope"})["workload"]["length"] == 4096


# ---- flags that are printed ----
PRINTED = {
    "recompute, many ranks": ("--model", "llama-3.1-70b", "--nodes", "8", "--seq-length", "16384"),
    "paper": ("--model", "paper-gpt", "--nodes", "2", "--tp", "16"),
    "sliced heads": ("--model", "qwen2-7b", "--gpus", "8", "--tp", "8", "--batch", "16"),
    "no distributed optimizer": ("--model", "llama-3-8b", "--no-distributed-optimizer", "--dtype", "fp16"),
    "learned positions": ("--model", "gpt-1t", "--nodes", "160", "--batch", "1280"),
    "decode": ("--model", "qwen2-7b", "--gpus", "8", "--tp", "8", "--workload", "decode", "--batch", "1"),
}  # fmt: skip


@pytest.mark.training
def test_megatron_takes_the_printed_flags_of_every_layout(capsys):
    lines, wanted = [], []
    for options in PRINTED.values():
        code, out, _ = run(capsys, *options, "--json", "--top", "12")
        assert code == 0
        document = json.loads(out)
        shape = presets.find(options[1])
        for candidate in document["candidates"]:
            layout, flags = candidate["layout"], candidate["flags"]
            graphs = flags.pop("--cuda-graph-impl", None)  # refused on a host
            assert graphs == ("local" if "decode" in options and layout["kv_cache"] != "dim" else None)
            data = {"--seq-length": 1024, "--micro-batch-size": 1} if "decode" in options else {}
            longest = max(shape.max_position_embeddings, flags.get("--seq-length", 0))
            model = shape.model_args() | {"--max-position-embeddings": longest} | DATA | data
            lines.append((layout["tp"] * layout["pp"] * layout["dp"], words(model | flags)))
            wanted.append((layout, document["workload"], flags))
    assert any(layout["recompute"] for layout, _, _ in wanted)
    assert any(layout["sequence_parallel"] for layout, _, _ in wanted)
    assert {layout["placement"] for layout, _, _ in wanted} == {"none", "heads", "dims"}
    found = run_ranks(parsed, 1, lines, False, timeout_s=120)[0]
    for args, (layout, work, flags) in zip(found, wanted, strict=True):
        assert isinstance(args, dict), (args, flags)
        assert args["tensor_model_parallel_size"] == layout["tp"]
        assert args["pipeline_model_parallel_size"] == layout["pp"]
        assert args["data_parallel_size"] == layout["dp"]
        assert args["sequence_parallel"] is layout["sequence_parallel"]
        assert args["bf16"] is (work["dtype"] == "bf16") and args["fp16"] is (work["dtype"] == "fp16")
        assert args["use_distributed_optimizer"] is (
            work["kind"] == "train" and work["distributed_optimizer"]
        )
        assert (args["recompute_granularity"] == "full") is layout["recompute"]
        assert args["helix_host_mode"] is True  # of the test: no GPU is here
        assert "--helix-host-mode" not in flags
        if layout["grid"]:
            assert args["helix_dim_parallel_size"] == layout["grid"]["dim_parallel_size"]
            assert args["helix_query_placement"] == layout["placement"]
        if work["kind"] == "train":
            assert args["seq_length"] == work["length"] and args["global_batch_size"] == work["batch"]
            assert args["micro_batch_size"] == layout["micro_batch"]


SMALL = """--num-layers 2 --hidden-size 36 --num-attention-heads 9 --group-query-attention
    --num-query-groups 3 --kv-channels 8 --position-embedding-type rope --swiglu
    --disable-bias-linear --vocab-size 255
    --seq-length 16 --normalization RMSNorm --train-iters 2 --sequence-parallel --bf16
    --transformer-impl transformer_engine --tensor-model-parallel-size 4""".split()
HOST = ("--cluster", "host", "--workload", "train", "--batch", "4")
ON_A_HOST = {
    "a preset with Helix": (*HOST, "--model", "smollm2-135m", "--seq-length", "64", "--tp", "2"),
    "a preset of long positions": (*HOST, "--model", "qwen2.5-0.5b", "--seq-length", "65536", "--batch", "2",
                                   "--memory", "900"),
    "flags of another layout": (*HOST, "--tp", "2", "--", *SMALL),
    "several ranks for a core": (*HOST, "--gpus", "4", "--", *SMALL),
    "learned positions": (*HOST, "--", *words({**GPT, "--max-position-embeddings": 512, "--num-layers": 2})),
}  # fmt: skip


def command_of(capsys, options):
    code, out, err = run(capsys, *options)
    assert code == 0, out + err
    return shlex.split(
        next(text for text in out.splitlines() if text.startswith("Run 1, as")).split(": ", 1)[1]
    )


@pytest.mark.training
def test_megatron_takes_the_printed_command_of_a_host(capsys):
    lines = []
    for options in ON_A_HOST.values():
        command = command_of(capsys, options)
        assert command[:4] == ["python", "-m", "helix_megatron.launch", "--nproc-per-node"]
        assert command[5:7] == ["-m", "helix_megatron.pretrain_gpt"]
        assert "--helix-host-mode" in command
        lines.append((int(command[4]), command[7:]))
    assert [ranks for ranks, _ in lines] == [2, 2, 2, 4, 2]
    found = run_ranks(parsed, 1, lines, True, timeout_s=120)[0]
    for name, args in zip(ON_A_HOST, found, strict=True):
        assert isinstance(args, dict), (name, args)
        assert args["transformer_impl"] == "local" and args["apply_rope_fusion"] is False
        assert args["sequence_parallel"] is False
    helix, _, other, *_ = found
    assert (helix["attention_impl"], helix["helix_dim_parallel_size"]) == ("helix", 2)
    assert other["bf16"] and other["tensor_model_parallel_size"] == 2


@pytest.mark.training
def test_the_printed_command_of_a_host_trains(capsys, tmp_path):
    command = command_of(capsys, (*HOST, "--tp", "2", "--dtype", "bf16", "--", *SMALL))
    _, out, _ = run(capsys, *HOST, "--json", "--tp", "2", "--", *SMALL)
    assert shlex.split(json.loads(out)["run"]) == command
    trained = subprocess.run(
        [sys.executable, *command[1:]], capture_output=True, text=True, cwd=tmp_path, timeout=200
    )
    assert trained.returncode == 0, trained.stderr[-1500:]
    assert "[after training is done]" in trained.stdout


def test_only_training_on_one_host_has_a_command(capsys):
    assert planned(capsys, {})["run"] is None
    assert planned(capsys, {}, "--cluster", "host", "--batch", "2", workload="decode")["run"] is None
    assert planned(capsys, {"--num-layers": 2}, "--cluster", "host", "--nodes", "2")["run"] is None


def test_the_package_runs_as_the_command():
    asked = subprocess.run(
        [sys.executable, "-m", "helix_megatron", "plan", "--help"], capture_output=True, text=True
    )
    assert asked.returncode == 0 and asked.stdout.startswith("usage: helix plan")
