"""What the planner is given: clusters in files, sizes, models as flags; and the flags it gives back."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from helix_megatron import cli
from helix_megatron.plan import clusters, inputs


def run(capsys, *words):
    code = cli.main(["plan", *words])
    out = capsys.readouterr()
    return code, out.out, out.err


def cluster_of(tmp_path, document):
    path = tmp_path / "mine.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return inputs.cluster(str(path))


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
    assert clusters.resized(rack, 2).domain == 36
    assert clusters.resized(pairs, 4).domain == clusters.resized(pairs, 16).domain == 2
    assert clusters.resized(clusters.find("host"), 1).domain == clusters.find("host").domain


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


def test_the_package_runs_as_the_command():
    asked = subprocess.run(
        [sys.executable, "-m", "helix_megatron", "plan", "--help"], capture_output=True, text=True
    )
    assert asked.returncode == 0 and asked.stdout.startswith("usage: helix plan")
