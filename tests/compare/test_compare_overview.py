"""The five points that a comparison begins with: in the terminal, in Markdown and in the page."""

import copy
import io
import json

import pytest
from rich.console import Console

from helix_megatron.compare import config as configuration
from helix_megatron.compare import expectations, figures, overview, report
from helix_megatron.models import support
from tests.compare import compare_fakes as fakes

REFUSAL = "num_attention_heads (40) must be a multiple of tensor_model_parallel_size (16)."
HEADINGS = [
    "1. Same model, exactly",
    "2. What it makes possible",
    "3. What it costs and saves",
    "4. What to expect on 2 DGX H100",
    "5. Times on this machine",
]
VARIANTS = [
    fakes.variant("Megatron", 1, shape="Qwen2.5-3B"),
    fakes.variant("Helix", 2, shape="Qwen2.5-3B", attention_impl="helix"),
    fakes.variant("refused", 3, may_fail=True, ranks=2),
    fakes.variant("alone", 4, shape="Phi-3-medium", attention_impl="helix", ranks=2),
]
SPREAD = {True: [1, 1.5, 0.7, 1.6, 0.8], False: [1, 1.02, 0.99, 1.01, 1]}  # of the runs; True: too wide


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """wide → results.json of five runs that spread much, or hardly: Helix takes 1.25 times as long."""

    def run(wide):
        def answer(seed, run):
            if seed == "3":
                return "failed", f"rank 1: {REFUSAL}"
            slower = 1.25 * SPREAD[wide][run - 1] if seed == "2" else 1.0
            made = fakes.rich_samples(16, slower, grid=None if seed == "1" else (4, 4))
            for rank in made:
                sizes = rank["memory_bytes"]
                sizes["kv_cache"] = 800e3 if seed == "1" else 200e3
                tally = {kind: v | {"bytes": 3e6 if seed == "1" else 1.5e6} for kind, v in
                         rank["workloads"]["train"]["comm"].items()}  # fmt: skip
                rank["workloads"]["train"]["comm"] = dict([next(iter(tally.items()))])
            return made

        with pytest.MonkeyPatch.context() as patch:
            fakes.install(patch, answer)
            patch.setattr(configuration.CompareConfig, "model_key", lambda self, v: f"of {self.ranks(v)}")
            flags = copy.deepcopy(fakes.DOCUMENT["MODEL_ARGS"])
            flags |= {"num-attention-heads": 32, "group-query-attention": True, "num-query-groups": 4}
            _, results, *_ = fakes.compare(
                tmp_path_factory.mktemp("out") / "results", variants=VARIANTS, runs=5, world_size=16,
                overview=True, MODEL_ARGS=flags,
            )  # fmt: skip
        return results

    return {wide: run(wide) for wide in (True, False)}


@pytest.fixture
def shown(finished, tmp_path):
    """(wide, width) → the lines in a terminal of this width."""

    def show(wide, width):
        console = Console(file=io.StringIO(), width=width)
        report.show(finished[wide], tmp_path, console)
        return console.file.getvalue().splitlines()

    return show


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("wide", [True, False])
def test_no_cell_is_wrapped_or_cut(finished, shown, wide, width):
    lines = shown(wide, width)
    assert max(map(len, lines)) <= width
    body = lines[next(k for k, line in enumerate(lines) if line.startswith("1. ")) :]
    body = body[: next(k for k, line in enumerate(body) if line.startswith("All"))]
    assert all(line[:1] in " 12345" for line in body if line)  # a line that goes on is indented
    for point in overview.find_points(finished[wide]):
        for row in [point.table.headings, *point.table.rows] if point.table else []:
            cells = [cell for cell in row if cell.strip()]
            assert any(all(cell in line for cell in cells) for line in lines), (width, row)


def test_one_screen(shown):
    lines = shown(False, 100)
    assert len(lines) < 60
    places = [next(i for i, line in enumerate(lines) if line.startswith(heading)) for heading in HEADINGS]
    assert places == sorted(places)


def test_a_ratio_is_withheld_when_its_interval_is_wide(shown):
    def times(wide):
        lines = shown(wide, 100)
        start = lines.index("5. Times on this machine (measured)")
        return [line for line in lines[start:] if "training" in line]

    narrow, wide = times(False), times(True)
    assert "1.25 [" in narrow[0] and overview.UNMEASURED not in narrow[0]
    assert overview.UNMEASURED in wide[0] and "[" not in wide[0] and "1.2" not in wide[0]
    for line in narrow + wide:
        assert not any(word in line.lower() for word in ("faster", "slower", "unclear"))


@pytest.mark.parametrize(
    ("low", "high", "measured"), [(0.9, 1.1, True), (0.8, 1.1, False), (0.9, 1.16, False), (0.87, 1.15, True)]
)
def test_what_is_measured_well_enough(low, high, measured):
    for ratio in (1.0, 0.25, 3.0):
        entry = {"ratio": ratio, "ci95": [low * ratio, high * ratio * (1 - 1e-9)]}
        assert overview.is_measured(entry, 0.15) is measured
    assert not overview.is_measured({"ratio": 1.0, "ci95": None}, 0.15)


def test_costs_are_counted_and_divided(shown):
    lines = shown(False, 100)
    start = next(i for i, line in enumerate(lines) if line.startswith("3."))
    theirs, own, ratio = (line.split() for line in lines[start + 3 : start + 6])
    assert (theirs[-1], own[-1], ratio[-1]) == ("800.0", "200.0", "0.25")
    received = [float(line[-5].replace(",", "")) for line in (theirs, own)]
    assert received == [3e6 / 2 / 3 / 1e3, 1.5e6 / 2 / 3 / 1e3]  # two layers, three iterations
    assert ratio[-5] == "0.50"


def test_refusals_are_quoted_and_copies_said(shown):
    lines = shown(False, 100)
    start = next(i for i, line in enumerate(lines) if line.startswith("2."))
    possible = lines[start : lines.index("", start)]
    assert any("32/4" in line and "4 copies of K, V" in line and "4x4" in line for line in possible)
    assert any("Phi-3-medium" in line and "refuses (1)" in line for line in possible)
    assert f' (1) "{REFUSAL}"' in possible
    for name, tp in overview.NOT_RUN:
        row = next(line for line in possible if name in line)
        assert str(tp) in row and "not run" in row


def test_models_that_are_not_run_say_what_megatron_says():
    """Against Megatron's own configuration, as tests of support.py do for all models."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from helix_megatron.models import presets

    for name, tp in overview.NOT_RUN:
        shape = presets.find(name)
        found = support.find_support(shape, tp)
        settings = {"num_layers": 2, "hidden_size": shape.hidden_size, "tensor_model_parallel_size": tp,
                    "num_attention_heads": shape.num_attention_heads,
                    "num_query_groups": shape.num_query_groups}  # fmt: skip
        if found.refusal:
            with pytest.raises(ValueError, match="must be a multiple"):
                TransformerConfig(**settings)
        else:
            TransformerConfig(**settings)


def test_reports_open_with_the_five_points(finished, monkeypatch):
    monkeypatch.setattr(figures, "PLOTS", [])  # they take seconds
    results = finished[False]
    markdown, (page, _) = report.render_markdown(results), report.render_page(results)
    for text, tables in ((markdown, "## Results"), (page, '<h2 id="results">')):
        places = [text.index(heading) for heading in HEADINGS]
        assert places == sorted(places)
        assert places[-1] < text.index(tables)
        assert text.count(REFUSAL.split(" must")[0]) >= 1
    assert "4 copies of K, V" in page and "4 copies of K, V" in markdown
    without = copy.deepcopy(results)
    without["config"]["overview"] = False
    assert not any(heading in report.render_markdown(without) for heading in HEADINGS)


def test_losses_that_disagree_are_said_first(finished):
    results = copy.deepcopy(finished[False])
    own = next(v for v in results["variants"] if v["name"] == "Helix")
    own["loss_check"] |= {"agrees": False, "max_abs_difference": 0.5}
    assert overview.say_equality(results)[0].startswith("LOSSES DISAGREE: Helix is up to 0.5 away")


def test_predictions_are_the_planners_own(capsys):
    """Against `helix plan --json` for the first piece of work."""
    from helix_megatron import cli

    name, workload, _ = expectations.WORK[0]
    given = {"model": name, "cluster": expectations.CLUSTER, "nodes": expectations.NODES, "top": 99}
    given |= {"workload": workload.kind, "context": workload.length, "batch": workload.batch}
    assert cli.main(["plan", *(f"--{key}={value}" for key, value in given.items()), "--json"]) == 0
    ranked = json.loads(capsys.readouterr().out)
    text = json.dumps(ranked)
    row = expectations.predict_layouts()[0]
    for value in (row["helix"], row["fastest"]):
        assert f"{value / 1e3:.6g}"[:6] in text or f"{value:.6g}"[:6] in text


def test_measured_figures_are_read_from_the_results(tmp_path):
    theirs, own = {"gemm": 50, "other": 50}, {"gemm": 70}
    layers = [{"name": "Megatron TP16", "us": theirs}, {"name": "Helix 8x2 heads", "us": own}]
    rows = [{"splits": None, "fa3_us": 1, "graph_us": 4}, {"splits": None, "fa3_us": 3, "graph_us": 4},
            {"splits": 8, "fa3_us": 9, "graph_us": 1}]  # fmt: skip
    (tmp_path / "attention_layer_fused_h200.json").write_text(json.dumps(layers))
    (tmp_path / "kernel_h200.json").write_text(json.dumps({"rows": rows}))
    kernels, decode, missing = expectations.read_measured(tmp_path)
    assert "Helix / Megatron 0.70" in kernels and "0.25 to 0.75" in decode and "Not measured" in missing
    assert "docs/results.md" in expectations.read_measured(tmp_path / "absent")[0]
