"""What a plan says besides its table: what to change where there is none, and what is not modelled."""

import re
from dataclasses import replace

import pytest

from helix_megatron import cli
from helix_megatron.models.presets import find
from helix_megatron.partition.grid import HelixGrid
from helix_megatron.plan import clusters, memory, report, search, suggestions
from helix_megatron.plan.layout import Layout, Problem, Workload

H100 = clusters.find("dgx-h100")
RACK = clusters.find("gb200-nvl72")
TRAIN, DECODE = Workload("train", 64, 4096, distributed_optimizer=True), Workload("decode", 8, 4096)


def devices(count):
    return replace(H100, nodes=1, gpus_per_node=count) if count % 8 else replace(H100, nodes=count // 8)


def planned(name, cluster, work, **only):
    return search.search(find(name), cluster, work, **only)


def ways(text):
    """What is said to work, one entry each."""
    _, _, listed = text.split(". Not modelled")[0].partition("what works: ")
    return listed.split("; ")


def values(text, flag):
    """The values of a flag that are said to work, nothing else changed."""
    found = [re.fullmatch(rf"{flag} (\d+)(?: or (\d+))?", way) for way in ways(text)]
    return [int(number) for match in found if match for number in match.groups() if number]


def with_value(plan, flag, value):
    """The plan with one flag changed."""
    work, cluster, tp, pp = plan.workload, plan.cluster, plan.tp, plan.pp
    if flag == "--batch":
        work = replace(work, batch=value)
    if flag == "--seq-length":
        work = replace(work, length=value)
    if flag == "--gpus":
        cluster = replace(cluster, nodes=1, gpus_per_node=value)
    return search.search(plan.shape, cluster, work, value if flag == "--tp" else tp,
                         value if flag == "--pp" else pp, plan.grid)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "cluster", "work", "only", "given", "works"),
    [
        ("llama-3-8b", devices(16), DECODE, {"tp": 3}, "with --tp 3, --batch 8: 3 does not divide 16 ranks",
         {"--tp": [2, 4]}),
        ("llama-3-8b", devices(16), DECODE, {"tp": 64}, "with --tp 64, --batch 8: 64 does not divide 16",
         {"--tp": [16], "--gpus": [64]}),
        ("llama-3-8b", devices(16), DECODE, {"pp": 3}, "3 pipeline stages do not divide 32 layers",
         {"--pp": [2, 4]}),
        ("llama-3-8b", devices(16), DECODE, {"tp": 8, "pp": 4}, "8 x 4 does not divide 16 ranks",
         {"--tp": [4], "--pp": [2], "--gpus": [32]}),
        ("qwen2-7b", devices(24), DECODE, {"tp": 3}, "3 does not divide the MLP's 18944",
         {"--tp": [], "--pp": [], "--batch": [], "--gpus": []}),
        ("llama-3-8b", RACK, TRAIN, {}, "exactly 72 ranks with --batch 64: the batch is no multiple of the "
         "replicas that are possible (9, 18, 36, 72)", {"--batch": [63, 72], "--gpus": [64]}),
        ("llama-3-8b", devices(16), replace(TRAIN, batch=6, micro_batch=4), {}, "micro-batches of 4 (4, 8,",
         {"--batch": [4, 8]}),
        ("paper-gpt", devices(16), TRAIN, {"tp": 16, "pp": 2, "grid": HelixGrid(8, 2)},
         "with --grid 8x2, --pp 2, --batch 64: 16 x 2 does not divide 16", {"--pp": [1], "--gpus": [32]}),
        ("gpt-1t", devices(11), TRAIN, {}, "no multiple of the replicas that are possible (11)",
         {"--gpus": [256]}),
    ],
)  # fmt: skip
def test_no_layout_names_what_was_given_and_the_nearest_that_works(name, cluster, work, only, given, works):
    plan = planned(name, cluster, work, **only)
    text = suggestions.explain_no_plan(plan)
    assert not plan.tried and given in text and ("grid" not in only or "--tp" not in text)
    for flag, expected in works.items():
        assert values(text, flag) == expected
        assert all(with_value(plan, flag, value).candidates for value in expected)


def test_nearest_means_that_nothing_nearer_works():
    plan = planned("llama-3-8b", RACK, TRAIN)
    low, high = values(suggestions.explain_no_plan(plan), "--batch")
    assert not any(with_value(plan, "--batch", batch).tried for batch in range(low + 1, high))
    (count,) = values(suggestions.explain_no_plan(plan), "--gpus")
    assert not any(with_value(plan, "--gpus", k).candidates for k in range(count + 1, 72))


def test_a_size_that_nothing_alone_saves_is_to_be_left_out():
    text = suggestions.explain_no_plan(planned("llama-3-8b", devices(16), DECODE, tp=3, pp=3))
    assert ways(text) == ["without --tp and --pp"]
    text = suggestions.explain_no_plan(planned("llama-3-8b", devices(7), DECODE, tp=7))
    assert ways(text) == ["--batch 7 or 14 without --tp", "--gpus 4 or 8 without --tp"]
    assert planned("llama-3-8b", devices(7), replace(DECODE, batch=14)).candidates


@pytest.mark.parametrize(
    ("name", "cluster", "work", "works"),
    [
        ("llama-3-8b", clusters.find("host"), Workload("train", 64, 4096, "fp32", fused=False), {}),
        ("llama-3.1-70b", replace(devices(16), memory=60e9), Workload("decode", 1024, 4096),
         {"--batch": [512], "--seq-length": [2048], "--gpus": [32]}),
        ("llama-3.1-70b", devices(16), TRAIN, {"--gpus": [32]}),
        ("gpt-1t", replace(RACK, nodes=142), replace(TRAIN, batch=10224), {"--gpus": [9216, 11520]}),
    ],
)  # fmt: skip
def test_too_big_tells_the_whole_memory_of_the_smallest_and_what_helps(name, cluster, work, works):
    plan = planned(name, cluster, work)
    text = suggestions.explain_no_plan(plan)
    totals = [
        memory.fullest_stage(Problem(plan.shape, replace(layout, recompute=recompute), work))[1].total
        for layout in search.legal_layouts(plan)
        for recompute in {False, work.kind == "train"}
    ]
    assert plan.smallest == min(totals) > cluster.capacity
    held = plan.least[1].bytes()
    assert f"needs {plan.smallest / 1e9:.3g} GB on a rank (weights {held['weights'] / 1e9:.3g}, " in text
    assert ("optimizer" in text) == (work.kind == "train") and ("kv cache" in text) == (work.kind == "decode")
    for flag in ("--batch", "--seq-length", "--gpus"):
        assert values(text, flag) == works.get(flag, [])
        assert all(with_value(plan, flag, value).candidates for value in works.get(flag, []))
    smaller = {"--batch", "--seq-length"} & set(works)
    assert ("neither a smaller batch nor a shorter sequence fits" in text) == (not smaller)
    if not smaller:
        assert not planned(name, cluster, replace(work, batch=1, length=1)).candidates
    needed = int(re.search(r"devices of (\d+) GB", text).group(1))
    assert planned(name, replace(cluster, memory=needed * 1e9), work).candidates
    assert not planned(name, replace(cluster, memory=(needed - 1) * 1e9), work).candidates


def test_a_size_that_does_not_fit_is_named_with_one_that_does():
    work = replace(DECODE, batch=16)
    text = suggestions.explain_no_plan(planned("llama-3.1-70b", devices(16), work, tp=1, pp=1))
    assert "none of" in text and ways(text)[:2] == ["--tp 2", "--pp 2"]


# ---- what is not modelled ----
def test_slices_of_unequal_size_are_called_not_modelled():
    plan = planned("llama-3-8b", devices(7), replace(DECODE, batch=7))
    said = report.verdict(plan)
    assert not any("Leave Helix off" in line for line in said)
    assert said[0] == "Of what is modelled, every tensor-parallel size here keeps heads whole."
    assert said[1].startswith("Not modelled: tp = 7, legal with Helix by slices of unequal size")
    none = planned("llama-3-8b", devices(7), DECODE, tp=7)
    assert "Not modelled: tp = 7," in suggestions.explain_no_plan(none)


@pytest.mark.parametrize(
    ("name", "count", "batch", "sizes"),
    [
        ("llama-3-8b", 14, 14, [7, 14]),
        ("llama-3-8b", 14, 1, [7, 14]),
        ("llama-3-8b", 21, 1, []),  # 7 leaves three ranks that neither layers nor the batch divide
        ("llama-3-8b", 16, 16, []),
        ("qwen2-7b", 7, 7, []),  # its MLP does not divide by 7
    ],
)
def test_sizes_with_uneven_slices_are_those_that_megatron_and_helix_accept(name, count, batch, sizes):
    plan = planned(name, devices(count), replace(DECODE, batch=batch))
    assert search.sizes_with_uneven_slices(plan) == sizes
    assert (suggestions.describe_uneven_sizes(plan) == "") == (not sizes)


def test_leave_helix_off_says_why():
    whole = planned("paper-gpt", devices(8), TRAIN)
    assert report.verdict(whole)[0] == (
        "Leave Helix off: every tensor-parallel size here keeps heads whole."
    )
    one = planned("smollm2-135m", devices(8), DECODE, tp=1)
    assert report.verdict(one)[0] == "Leave Helix off: with tp = 1 heads stay whole."
    plan = planned("qwen2-7b", devices(8), DECODE)
    assert plan.sliced and any(c.layout.sliced for c in plan.candidates)
    plan.candidates = [c for c in plan.candidates if not c.layout.sliced]
    assert report.verdict(plan)[0] == (
        f"Leave Helix off: none of its {plan.sliced} layouts with sliced heads fits."
    )


# ---- a batch that suits ----
@pytest.mark.parametrize(
    ("name", "cluster", "odd", "even"),
    [("llama-3.1-70b", devices(512), 255, 256), ("llama-3-8b", devices(16), 15, 16)],
)
def test_a_batch_that_few_replicas_divide_is_pointed_out(name, cluster, odd, even):
    plan = planned(name, cluster, replace(TRAIN, batch=odd, length=2048))
    text = suggestions.suggest_batch(plan)
    assert f"Few numbers of replicas divide a batch of {odd}: --batch {even} is predicted to bring " in text
    better = planned(name, cluster, replace(TRAIN, batch=even, length=2048))
    times = even / odd * plan.candidates[0].seconds / better.candidates[0].seconds
    assert times > 1.1 * even / odd and f" bring {times:.3g} times as many tokens" in text
    assert text in report.verdict(plan)
    assert suggestions.suggest_batch(better) == ""


# ---- one row for a layout ----
@pytest.mark.parametrize("work", [TRAIN, replace(DECODE, batch=16)], ids=["train", "decode"])
def test_a_layout_has_one_row_its_fastest_variant_and_a_name_of_its_own(work, capsys):
    plan = planned("phi-3-medium", devices(16), work)
    assert len(plan.candidates) > len(plan.best) > 5
    key = lambda c: (c.layout.tp, c.layout.pp, c.layout.dp, c.layout.grid)  # noqa: E731
    assert len({key(c) for c in plan.best}) == len({key(c) for c in plan.candidates}) == len(plan.best)
    for candidate in plan.best:
        assert candidate.seconds == min(c.seconds for c in plan.candidates if key(c) == key(candidate))
    names = [candidate.layout.describe(work) for candidate in plan.candidates]
    assert len(set(names)) == len(names)
    assert report.layout_table(plan, 99).row_count == len(plan.best)
    document = report.as_json(plan, 99)
    assert len(document["candidates"]) == len(plan.best)
    assert any(f"1 before 2 ({plan.best[1].layout.describe(work)})" in line for line in document["verdict"])


def test_the_command_prints_the_advice(capsys):
    words = ["--model", "llama-3-8b", "--nodes", "2", "--workload", "decode", "--batch", "8", "--tp", "3"]
    assert cli.main(["plan", *words]) == 1
    out = capsys.readouterr().out
    assert "with --tp 3, --batch 8: 3 does not divide 16 ranks; what works: --tp 2 or 4." in out
    assert Layout(3).describe() == "tp=3 pp=1 dp=1"
