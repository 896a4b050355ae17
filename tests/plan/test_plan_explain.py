"""The planner's explanation: its lines add up to the parts, and the numbers it prints give the seconds."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from helix_megatron import cli
from helix_megatron.models.presets import find
from helix_megatron.partition.grid import HelixGrid
from helix_megatron.plan import clusters
from helix_megatron.plan.layout import Layout, Problem, Workload
from helix_megatron.plan.timing import PARTS, predict

H100 = replace(clusters.find("dgx-h100"), nodes=2)
HOST = replace(
    clusters.find("host"),
    gpus_per_node=4,
    layer_overhead={"train megatron": 2e-3, "train a2a heads": 3e-3, "decode heads sequence": 3e-3},
    step_overhead={"train": 5e-3, "prefill": 1e-3, "decode": 2e-3},
)


def sliced(n, m, **more):
    return Layout(n * m, helix=True, grid=HelixGrid(n, m), comm_type="a2a", placement="heads",
                  kv_cache="sequence", **more)  # fmt: skip


def gpu(kind, **more):
    return Workload(kind, 32, 4096, distributed_optimizer=kind == "train", **more)


def host(kind):
    return Workload(kind, 8, 256, "fp32", fused=False)


GPT, LLAMA, SMALL = find("paper-gpt"), find("llama-3-8b"), find("smollm2-135m")
PLANS = {
    "train, two nodes": (GPT, sliced(8, 2, sequence_parallel=True), gpu("train"), H100),
    "train, stages": (LLAMA, Layout(4, 2, 2, micro_batch=2, sequence_parallel=True), gpu("train"), H100),
    "train, recompute": (LLAMA, Layout(2, 4, 2, recompute=True), gpu("train"), H100),
    "train, small": (SMALL, Layout(1, 1, 16), gpu("train"), H100),
    "prefill": (GPT, Layout(16, micro_batch=32), gpu("prefill"), H100),
    "prefill, stages": (LLAMA, Layout(8, 2, micro_batch=32), gpu("prefill"), H100),
    "decode": (LLAMA, sliced(8, 2, micro_batch=32), gpu("decode"), H100),
    "decode, stages": (LLAMA, Layout(4, 4, micro_batch=32), gpu("decode"), H100),
    "host, train": (LLAMA, Layout(2, 1, 2), host("train"), HOST),
    "host, train, Helix": (GPT, sliced(2, 2), host("train"), HOST),
    "host, train, stages": (LLAMA, Layout(1, 4), host("train"), replace(HOST, slots=4)),
    "host, train, stages share": (SMALL, Layout(1, 2, 2), host("train"), HOST),
    "host, prefill": (LLAMA, Layout(4, micro_batch=8), host("prefill"), HOST),
    "host, decode": (LLAMA, sliced(2, 2, micro_batch=8), host("decode"), HOST),
    "host, decode, stages": (LLAMA, Layout(1, 4, micro_batch=8), host("decode"), HOST),
}


def number(text):
    return float(text.replace(",", ""))


def product(term):
    """Of "2 x t 1,024 x inner 576": the last word of each factor is its number."""
    return prod(number(factor.split()[-1]) for factor in term.split(" x "))


def seconds(formula):
    """What the printed numbers come to, and nothing but them."""
    factors, inner = re.fullmatch(r"((?:[\d,.e+-]+ [a-z -]+ x )*)\((.*)\)(?:; .*)?", formula).groups()
    times = prod(number(factor.split()[0]) for factor in factors.split(" x ") if factor)
    many, busy = r"(?:(\S+) launches x )?", r"(?: x (\S+) busy)?"
    form = rf"{many}(\S+) us \+ max of (.*) = (\S+) FLOP at (\S+)/s{busy}, (.*)"
    if operation := re.fullmatch(form, inner):
        launches, launch, flops_of, flops, rate, share, moved = operation.groups(default="1")
        assert product(flops_of) == pytest.approx(number(flops), rel=2e-3)
        started = number(launches) * number(launch) / 1e6
        return times * (started + max(number(flops) / number(rate) / number(share), over_memory(moved)))
    if " B at " in inner:
        return times * over_memory(inner)
    way = re.sub(r"^[a-z, ]+: ", "", inner)  # the name of a collective's algorithm
    total = 0.0
    for term in way.split(" + "):
        if sent := re.fullmatch(r"(\S+) B / (\S+) B/s", term):
            received = re.search(r" of ([^;]*)$", formula).group(1)
            assert product(received) == pytest.approx(number(sent.group(1)), rel=2e-3)
            total += number(sent.group(1)) / number(sent.group(2))
        elif steps := re.fullmatch(r"(\S+) [a-z ]+ x (\S+) us", term):
            total += number(steps.group(1)) * number(steps.group(2)) / 1e6
        else:
            total += number(re.fullmatch(r"(\S+) us[a-z ]*", term).group(1)) / 1e6
    return times * total


def over_memory(text):
    term, moved, rate = re.fullmatch(r"(.*) = (\S+) B at (\S+) B/s", text).groups()
    assert product(term) == pytest.approx(number(moved), rel=2e-3)
    return number(moved) / number(rate)


@pytest.mark.parametrize("name", PLANS)
def test_lines_add_up_to_the_parts_and_parts_to_the_step(name):
    shape, layout, work, cluster = PLANS[name]
    found = predict(Problem(shape, layout, work), cluster)
    assert set(found.parts) == set(PARTS)
    for part, shown in found.parts.items():
        assert sum(line.seconds for line in found.lines if line.part == part) == pytest.approx(shown)
    assert sum(found.parts.values()) == found.seconds > 0
    for line in found.lines:
        assert seconds(line.formula) == pytest.approx(line.seconds, rel=1e-4), line
    texts = " ".join(line.formula for line in found.lines)
    assert ("ranks sharing a device" in texts) is (cluster.slots == 2)
    fills = [line for line in found.lines if line.name == "filling and draining"]
    assert len(fills) == (layout.pp > 1 and "share" not in name)


def test_on_a_host_sums_are_twice_what_a_core_alone_would_take():
    problem = Problem(LLAMA, Layout(2, 1, 2), host("train"))
    alone, shared = (predict(problem, replace(HOST, slots=slots)).parts for slots in (4, 2))
    assert shared["compute"] == pytest.approx(2 * alone["compute"])
    assert shared["gradients"] == alone["gradients"]  # measured with that many ranks at work


@pytest.mark.parametrize("layout", [Layout(8, 2), Layout(1, 2)])
def test_the_command_prints_and_exports_the_same_lines(capsys, layout):
    where = ["--cluster", "host", "--gpus", "4"] if layout.tp == 1 else ["--nodes", "2", "--dtype", "fp16"]
    words = ["plan", "--model", "smollm2-135m" if layout.tp == 1 else "paper-gpt", *where, "--batch", "16",
             "--tp", str(layout.tp), "--pp", str(layout.pp), "--top", "1", "--memory", "200",
             "--seq-length", "512"]  # fmt: skip
    assert cli.main([*words, "--explain"]) == 0
    text = capsys.readouterr().out
    assert cli.main([*words, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["candidates"][0]
    assert first["predicted_lines"]
    sums = dict.fromkeys(PARTS, 0.0)
    for line in first["predicted_lines"]:
        sums[line["part"]] += line["seconds"]
        assert f"{line['name']}: {line['formula']}" in text
        assert seconds(line["formula"]) == pytest.approx(line["seconds"], rel=1e-4)
    assert sums == pytest.approx(first["predicted_parts"])
    for part, shown in first["predicted_parts"].items():
        assert not shown or f"{part} {shown * 1e3:.4g} ms" in text


# ---- a grid of the user's ----
def planned(capsys, *words):
    code = cli.main(["plan", "--nodes", "2", *words, "--json", "--top", "1000"])
    out, err = capsys.readouterr()
    return code, json.loads(out)["candidates"] if out else err


@pytest.mark.parametrize(("grid", "n", "m"), [("8x2", 8, 2), ("4x4", 4, 4), ("1x16", 1, 16), ("16x1", 16, 1)])
@pytest.mark.parametrize("kind", ["train", "prefill", "decode"])
def test_a_given_grid_is_planned_beside_megatron_on_as_many_ranks(capsys, grid, n, m, kind):
    code, found = planned(capsys, "--model", "paper-gpt", "--workload", kind, "--grid", grid, "--batch", "64")
    assert code == 0
    helix = [c for c in found if c["layout"]["helix"]]
    plain = [c for c in found if not c["layout"]["helix"]]
    assert helix and plain and {c["layout"]["tp"] for c in found} == {16}
    assert {(c["n"], c["m"]) for c in helix} == {(n, m)}
    flags = helix[0]["flags"]
    assert (flags["--helix-head-parallel-size"], flags["--helix-dim-parallel-size"]) == (n, m)
    fastest = [min(c["predicted_seconds"] for c in side) for side in (helix, plain)]
    assert fastest[0] == fastest[1] if m == 1 else fastest[0] > fastest[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--grid", "8by2"), "--grid is '8by2'; it is head groups and slices, as in 8x2"),
        (("--grid", "0x2"), "--grid is '0x2'; it is head groups and slices"),
        (("--grid", "8x2", "--tp", "8"), "--grid 8x2 has 16 ranks and --tp is 8; leave --tp out"),
        (("--grid", "3x2"), "n = 3 does not divide the 32 KV heads; legal grids: n=2 m=3"),
        (("--grid", "1x3"), "--grid 1x3 has slices of unequal size, which are not planned"),
        (("--grid", "8x4"), "--grid 8x4 has 32 ranks, which must divide the 16 of the cluster"),
    ],
)
def test_a_grid_that_cannot_be_planned_is_refused(capsys, words, message):
    code, err = planned(capsys, "--model", "paper-gpt", *words)
    assert code == 2 and message in err and err.count("\n") == 1


# ---- the paper's configurations ----
@pytest.fixture(scope="module")
def benchmark():
    folder = Path(__file__).parents[2] / "benchmarks"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("planner_benchmark", folder / "planner.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(folder))
    return module


def test_the_page_has_the_table_of_the_papers_configurations(benchmark):
    page = Path(__file__).parents[2] / "docs/paper.md"
    assert "\n".join(benchmark.paper()) in page.read_text(), "python benchmarks/planner.py --paper"


def test_per_slice_on_every_grid_is_the_papers_row(benchmark):
    """Megatron with H m heads of d/m: one time whatever m, but for the last tiles, and no exchange."""
    for kind in ("train", "prefill", "decode"):
        seconds = []
        for m in (1, 2, 4, 16):
            heads = dict(num_attention_heads=32 * m, num_query_groups=32 * m, kv_channels=128 // m)
            problem, _ = benchmark._of_paper(replace(GPT, **heads), Layout(16), kind)
            found = predict(problem, benchmark.PAPER_CLUSTER)
            assert found.parts["exchange"] == 0 and problem.workload.dtype == "fp16"
            seconds.append(found.seconds)
        assert max(seconds) == pytest.approx(min(seconds), rel=1e-9 if kind == "decode" else 0.02)
