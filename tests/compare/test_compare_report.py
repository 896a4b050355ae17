"""The reports: what stands in them, the paper's arithmetic, scaling, and the page in a real browser."""

import importlib.util
import json
import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helix_megatron.compare import command, comparisons, drawing, figures, paper, predictions, tables
from helix_megatron.compare import config as configuration
from helix_megatron.compare.table import Column
from helix_megatron.compare.variants import TP
from helix_megatron.partition.grid import HelixGrid
from helix_megatron.plan.layout import Layout, Problem, Workload
from helix_megatron.plan.timing import predict
from tests.compare.compare_fakes import compare, document, install, rich_samples, variant

# name, seed, attention_impl, how slow, layout
VARIANTS = [
    ("Megatron TP=8 PP=2", "0", "megatron", 1.0, {"tp": 8, "pp": 2}),
    ("Megatron TP=16", "1", "megatron", 2.1, {}),
    ("Megatron TP=8 DP=2", "2", "megatron", 0.9, {"tp": 8, "dp": 2}),
    ("Helix 16x1", "3", "helix", 2.1, {"grid": (16, 1)}),
    ("Helix 8x2", "4", "helix", 2.4, {"grid": (8, 2)}),
    ("Helix 4x4, four KV heads of 8", "5", "helix", 1.9, {"grid": (4, 4)}),
    ("Megatron <b>refuses</b> this", "6", "megatron", 1.0, {}),
]
CAUSE = "rank 0: num_query_groups (4) must be a multiple of <tp> & so on"


def answer(seed, run):
    name, _, _, factor, layout = VARIANTS[int(seed)]
    if "refuses" in name:
        return "failed", CAUSE
    drift = 1 + 0.1 * run + 0.01 * ((run * 7 + int(seed)) % 3)
    return rich_samples(16, factor * drift, **layout)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(folder, results, markdown) of a comparison with every kind of row."""
    out = tmp_path_factory.mktemp("report")
    items = [variant(name, seed, attention_impl=impl, may_fail=True) for name, seed, impl, *_ in VARIANTS]
    with pytest.MonkeyPatch.context() as patch:
        install(patch, answer, page=True)
        sizes = {"num-attention-heads": 32, "hidden-size": 128}
        changes = {"MODEL_ARGS": document()["MODEL_ARGS"] | sizes, "batch_size": 2, "cluster": "dgx-h100"}
        code, results, text, _ = compare(out, variants=items, runs=3, world_size=16, paper=True, **changes)
    assert code == 0
    return out, results, text


class Page(HTMLParser):
    """Tags that were opened and not closed, and every attribute that loads something."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.loaded, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "img", "link", "input"):
            self.stack.append(tag)
        for key, value in attributes:
            if key in ("src", "srcset") or (key in ("href", "xlink:href") and not value.startswith("#")):
                self.loaded.append(value)
            if key == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_the_page_is_one_whole_file(report):
    out, results, _ = report
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.stack == []
    assert page.loaded == []  # self-contained: it loads nothing
    assert not re.search(r"url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))  # many <svg> in one page
    assert len(text) < 2_000_000
    for entry in results["variants"]:
        assert entry["name"].replace("<", "&lt;").replace(">", "&gt;") in text
    assert "<b>refuses</b>" not in text
    assert "must be a multiple of &lt;tp&gt; &amp; so on" in text
    ids, sections = zip(*re.findall(r'<h2(?: id="([^"]*)")?>(.*?)</h2>', text))
    jumps = re.findall(r'<a href="#([^"]*)">', text)
    assert [jump for jump in jumps if f'<figure id="{jump}">' not in text] == [key for key in ids if key]
    assert len(jumps) == len(sections)
    numbers = [s for s in sections if not s.startswith(("What the numbers", "How it was"))]
    assert len(numbers) > 12
    for section in numbers:  # every figure and table says what its numbers are
        assert re.search(r'class="tag">(measured|published|arithmetic|measured and predicted)<', section), (
            section
        )


def test_a_variant_that_was_refused_is_a_row_that_says_why(report):
    text = (report[0] / "report.html").read_text()
    results = text[text.index(">Results <") : text.index("</table>")]
    row = results[results.index("<td>Megatron &lt;b&gt;refuses") :]
    assert 'class="cause" colspan="' in row
    assert "failed: rank 0: num_query_groups (4) must be a multiple of &lt;tp&gt;" in row


def test_columns_that_few_comparisons_need(report):
    """Context parallelism and virtual stages have a column where some variant has them."""
    results = report[1]
    headings = tables.tabulate_variants(results, tables.SPEED, "").headings
    assert "cache" in headings
    assert {"CP", "VP"}.isdisjoint(headings)
    changed = json.loads(json.dumps(results))
    changed["variants"][1]["measured"]["layout"]["context_parallel_size"] = 2
    changed["variants"][0]["measured"]["layout"]["virtual_pipeline_model_parallel_size"] = 3
    table = tables.tabulate_variants(changed, tables.SPEED, "")
    cells = [dict(zip(table.headings, row)) for row in table.rows]
    assert [(row["CP"], row["VP"]) for row in cells[:3]] == [("-", "3"), ("2", "-"), ("-", "-")]


def test_a_zero_is_a_number_and_what_there_is_not_is_a_dash():
    """One model of a table for all forms: what its columns make of a record, as text and as Markdown."""
    summary = {"mean": 2.0, "ci95": [1.5, 2.5]}
    record = {"name": "a|b", "status": "ok", "measured": {"zero": 0.0, "none": None, "time": summary}}
    columns = [
        Column("zero", "measured.zero", "{:.1f}"),
        Column("none", "measured.none.deeper"),
        Column("absent", "absent.deeper", "{:.1f}"),
        Column("ms", "measured.time", "{:.0f}", 1e3),
        Column("once", lambda record: {"mean": 2.0, "ci95": None}, "{:.1f}"),
    ]
    cells = ["0.0", "-", "-", "2000 ± 500", "2.0"]
    assert [column.format_cell(record) for column in columns] == cells
    table = tables.tabulate_variants({"variants": [record]}, columns, "title")
    assert table.headings == ["variant", "zero", "ms", "once"]  # the others have no value in any row
    assert table.to_markdown()[2] == "| a\\|b | 0.0 | 2000 ± 500 | 2.0 |"
    exact = {"name": "a", "status": "ok", "measured": {"error": {"relative": 0.0}}}
    exact["loss_check"] = {"max_abs_difference": 0.0}
    shown = [c.format_cell(exact) for c in tables.SPEED if c.heading in ("max |Δloss|", "error vs fp32")]
    assert shown == ["0", "0"]


def test_every_figure_is_there_and_as_png(report):
    out, _, _ = report
    text = (out / "report.html").read_text()
    keys = [plot.key for plot in figures.PLOTS if plot.key != "scaling"]  # this is no scaling study
    for key in keys:
        assert f'<figure id="{key}">' in text
        assert (out / "figures" / f"{key}.png").read_bytes().startswith(b"\x89PNG")
    assert "scaling" not in [path.stem for path in (out / "figures").iterdir()]


def test_figures_are_drawn_from_the_numbers(report):
    """The error bars are two standard deviations of the runs, the bars their means."""
    _, results, _ = report
    figure = figures.PLOTS[1].draw(results, False)
    train = results["variants"][0]["measured"]["workloads"]["train"]["tokens_per_s"]
    bars = figure.axes[0].patches
    assert bars[0].get_width() == pytest.approx(train["mean"])
    segments = figure.axes[0].collections[0].get_segments()[0]
    assert segments[1][0] - segments[0][0] == pytest.approx(4 * train["sd"])
    split = figures.PLOTS[2].draw(results, True).axes[0]
    whole = results["variants"][0]["measured"]["workloads"]["train"]["iteration_seconds"]["mean"]
    assert sum(bar.get_width() for bar in split.patches[:3]) == pytest.approx(1e3 * whole)


def test_bytes_and_predictions_are_drawn_from_the_numbers(report):
    _, results, _ = report
    draw = {plot.key: plot.draw(results, False) for plot in figures.PLOTS}
    helix = next(v for v in results["variants"] if v["name"] == "Helix 8x2")
    received = sum(cost["bytes"] for cost in helix["measured"]["communication_per_layer"].values())
    bars = [bar for bar in draw["communication"].axes[0].patches if round(bar.get_y() + 0.31) == 4]
    assert sum(bar.get_width() for bar in bars) == pytest.approx(received / 1e6)
    axes = draw["prediction"].axes
    assert [ax.get_title("left") for ax in axes] == ["Training", "Time to first token", "Decode"]
    row = [label.get_text() for label in axes[0].get_yticklabels()].index("Helix 8x2")
    lines = [line for line in axes[2].lines if list(line.get_ydata()) == [row]]
    marks = {line.get_marker(): line.get_xdata()[0] for line in lines}
    assert marks["o"] == pytest.approx(
        1e3 * helix["measured"]["workloads"]["decode"]["iteration_seconds"]["mean"]
    )
    assert marks["D"] == pytest.approx(1e3 * helix["predicted"]["workloads"]["decode"])
    assert figures.PLOTS[-1].draw({"variants": [helix | {"predicted": {"cause": "x"}}]}, False) is None


def test_a_picture_alone_says_what_its_numbers_are():
    figure = drawing.new_figure(False, 1.0)[0]
    bare = drawing.png(figure, "")
    assert drawing.png(figure, "measured; CPU cores") != bare
    assert figure.get_supxlabel() == "measured; CPU cores"


def test_a_comparison_that_measured_nothing_still_has_a_report(tmp_path, monkeypatch):
    install(monkeypatch, lambda seed, run: ("timeout", "not done after 8 s and killed"), page=True)
    code, _, text, shown = compare(tmp_path, variants=[variant("hangs", "0")])
    assert code == 3
    for output in (text, shown, (tmp_path / "report.html").read_text()):
        assert "not done after 8 s and killed" in output


def test_markdown_has_the_same_numbers(report):
    _, results, text = report
    assert "## Speed ratios (measured)" in text
    row = next(line for line in text.splitlines() if line.startswith("| Helix 8x2 | Megatron TP=8 PP=2"))
    ratio = next(
        e
        for e in results["comparisons"]
        if (e["variant"], e["baseline"], e["workload"]) == ("Helix 8x2", "Megatron TP=8 PP=2", "train")
    )
    assert f"{ratio['ratio']:.2f}x" in row
    assert "SLOWER" in row
    assert 0.4 < ratio["ratio"] < 0.43  # 1 / 2.4
    assert results["schema"] == 2


def test_predictions_stand_beside_the_measured(report):
    out, results, text = report
    assert results["prediction"]["cluster"] == "dgx-h100"
    rows = {(row[0], row[1]): row[2:] for row in tables.tabulate_predictions(results).rows}
    measured, planned, ratio = rows["Helix 8x2", "train"]
    entry = next(v for v in results["variants"] if v["name"] == "Helix 8x2")
    mean = entry["measured"]["workloads"]["train"]["iteration_seconds"]["mean"]
    seconds = entry["predicted"]["workloads"]["train"]
    assert measured == f"{1e3 * mean:,.4g}"
    assert planned == f"{1e3 * seconds:,.4g}"
    assert ratio == f"{seconds / mean:.2f}"
    shape = predictions.inputs.shape_from_flags(
        {"--num-layers": 2, "--hidden-size": 128, "--num-attention-heads": 32, "--seq-length": 16,
         "--max-position-embeddings": 16, "--padded-vocab-size": 272, "--position-embedding-type": "rope"},
        "", "",
    )  # fmt: skip
    layout = Layout(16, helix=True, grid=HelixGrid(8, 2), comm_type="a2a", placement="heads",
                    kv_cache="sequence")  # fmt: skip
    problem = Problem(shape, layout, Workload("train", 2, 16, "fp32", fused=False))
    machine = predictions.inputs.load_cluster("dgx-h100")
    assert seconds == predict(problem, machine).seconds
    together = replace(layout, micro_batch=2)  # the whole batch of prompts of 4 tokens, then 3 steps
    for name, kind, length in (("first_token", "prefill", 4), ("decode", "decode", 4 + 1 + 1)):
        problem = Problem(shape, together, Workload(kind, 2, length, "fp32", fused=False))
        assert entry["predicted"]["workloads"][name] == predict(problem, machine).seconds
    page = (out / "report.html").read_text()
    for output in (text, page):
        assert "NVIDIA H100 SXM data sheet" in output
        assert "Beside the planner" in output
    assert '<span class="tag">measured and predicted</span>' in page


def test_what_the_planner_cannot_predict_is_said(tmp_path, monkeypatch):
    install(monkeypatch)
    items = [variant("two context ranks", "0")]
    items[0]["args"]["context-parallel-size"] = 2
    _, results, text, _ = compare(tmp_path / "one", variants=items)
    assert results["variants"][0]["predicted"] == {"cause": "the planner does not model context parallelism."}
    assert "the planner does not model context parallelism." in text
    with pytest.raises(ValueError, match=r"dgx-h1000.*did you mean"):
        compare(tmp_path / "two", variants=items, cluster="dgx-h1000")
    gpu_cluster = predictions.machine.gpu_cluster
    monkeypatch.setattr(predictions.machine, "host_cluster", lambda: gpu_cluster([("unknown", 1, 0)]))
    _, results, text, _ = compare(tmp_path / "three", variants=items)
    assert "no preset fits this machine's GPUs" in results["prediction"]["cause"]
    assert "The planner predicts nothing: no preset fits this machine's GPUs" in text
    two = configuration.parse(document(world_size=16, nnodes=2, host=False, cluster="dgx-h100"), "file.yaml")
    assert predictions.find_cluster(two).nodes == 2
    assert "predicted" not in results["variants"][0]


# ---- the paper's numbers


def test_the_papers_arithmetic_by_hand():
    # 16 layers of 4 h^2 + 2 h 4h, and 2 s h per token for causal attention
    per_layer = 4 * 4096**2 + 2 * 4096 * 16384
    assert paper.flops_per_token() == 16 * (2 * per_layer + 2 * 10000 * 4096)
    assert paper.parameters_per_gpu() * 16 == pytest.approx(
        16 * per_layer, rel=0.01
    )  # and biases, vocabulary
    assert paper.kv_cache_bytes() == 2 * 16 * 4096 * 2 * 128 * 10000
    assert paper.received_per_token(8, 2) == 16 * 2 * 7 / 8 * 8192
    assert paper.received_per_token(16, 1) == 32 * 2 * 15 / 16 * 8192


def test_what_of_the_paper_is_consistent():
    checks = {check["claim"]: check for check in paper.checks()}
    verdicts = {claim: check["verdict"] for claim, check in checks.items()}
    assert verdicts["31.7 % more throughput, 37.1 % less TPOT"] == paper.CONSISTENT
    assert verdicts["Baseline (TP=8, PP=2): 72 GB per GPU"] == paper.CONSISTENT
    assert verdicts["Baseline (TP=8, PP=2): 45 GB of parameters per GPU"] == paper.INCONSISTENT
    assert "0.40 GB" in checks["Proposed (m x n = 16): 11 GB of parameters per GPU"]["arithmetic"]
    assert verdicts["Baseline (TP=8, PP=2): 1.20e6 tokens/s"] == paper.CONSISTENT
    assert "59 %" in checks["Baseline (TP=8, PP=2): 1.20e6 tokens/s"]["arithmetic"]
    assert verdicts["Proposed (m x n = 16): 1.58e6 tokens/s"] == paper.POSSIBLE
    assert verdicts["less communication than TP=8 PP=2"] == paper.INCONSISTENT
    assert verdicts["Cohen's d = 2.85"] == paper.INCONSISTENT
    assert verdicts["coefficient of variation below 1 %"] == paper.CONSISTENT
    assert verdicts["p < 0.001"] == paper.CONSISTENT


def test_the_papers_table_stands_beside_the_same_layouts(report):
    _, results, _ = report
    rows = {row[3]: row for row in paper.tabulate_beside(results)}
    assert set(rows) == {"Megatron TP=8 PP=2", "Helix 8x2", "Helix 4x4, four KV heads of 8"}
    assert rows["Megatron TP=8 PP=2"][:3] == ["Baseline (TP=8, PP=2)", "1,200,000", "0.35"]
    speed = results["variants"][0]["measured"]["workloads"]["prefill"]["tokens_per_s"]["mean"]
    assert rows["Megatron TP=8 PP=2"][4] == f"{speed:,.1f}"


# ---- scaling


def scaling_config(**changes):
    heads = {"num-attention-heads": 6, "num-query-groups": 2, "group-query-attention": True}
    items = [
        {"name": "Megatron", "args": {"tensor-model-parallel-size": 4, "pipeline-model-parallel-size": 2}},
        {"name": "Helix 2x4", "attention_impl": "helix", "args": {"tensor-model-parallel-size": 8}},
        {
            "name": "Helix 1x8",
            "attention_impl": "helix",
            "args": {
                "tensor-model-parallel-size": 8,
                "helix-head-parallel-size": 1,
                "helix-dim-parallel-size": 8,
            },
        },
    ]
    doc = document(variants=items, world_size=8, **changes)
    doc["MODEL_ARGS"] |= heads | {"global-batch-size": 8}
    return configuration.parse(doc, "file.yaml")


def test_what_grows_in_a_scaling_study():
    strong = command.scale_ranks(scaling_config(), "strong", [2, 8])
    names = ["Megatron on 2", "Helix 2x4 on 2", "Megatron on 8", "Helix 2x4 on 8"]
    assert [v.name for v in strong.variants] == names  # both Helix variants choose the same grid: one is kept
    assert [v.args[TP] for v in strong.variants] == [1, 2, 4, 8]
    assert [v.ranks for v in strong.variants] == [2, 2, 8, 8]
    assert all("--global-batch-size" not in v.args for v in strong.variants)
    weak = command.scale_ranks(scaling_config(), "weak", [2, 8])
    assert [v.args["--global-batch-size"] for v in weak.variants] == [2, 2, 8, 8]
    assert command.scale_ranks(scaling_config(), "strong").world_size == 8
    assert len(command.scale_ranks(scaling_config(), "strong").variants) == 8
    gpus = command.scale_ranks(scaling_config(host=False, nnodes=1), "strong")
    assert (gpus.world_size, gpus.nnodes) == (32, 4)


def test_a_scaling_study_from_end_to_end(tmp_path, monkeypatch):
    """Twice as fast on 4 ranks as on 2 is 100 %, as fast is 50 %, refused is a row and no point."""

    def scaled(seed, run):
        ranks, factor = {"2": (2, 4.0), "4": (4, 2.0), "8": (8, 2.0)}[seed]
        return ("failed", "refused") if (seed, run) == ("8", 2) else rich_samples(ranks, factor, tp=ranks)

    items = [variant(f"V on {n}", str(n), family="V", ranks=n, may_fail=True) for n in (2, 4, 8)]
    install(monkeypatch, scaled, page=True)
    code, results, text, _ = compare(tmp_path, variants=items, runs=2, world_size=8)
    assert code == 0
    points = comparisons.scaling_points(results, "train")["V"]
    assert [(p["ranks"], round(p["efficiency"], 6)) for p in points] == [(2, 1.0), (4, 1.0)]
    assert "| V | train | 4 | - |" in text
    assert '<figure id="scaling">' in (tmp_path / "report.html").read_text()
    results["variants"][2]["status"] = "ok"
    assert comparisons.scaling_points(results, "train")["V"][2]["efficiency"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scaling", "weak", "--sizes", "1,x"], "--sizes is '1,x'"),
        (["--sizes", "1,2"], "--sizes goes with --scaling"),
        (["--scaling", "weak", "--sizes", "0"], "a size is at least 1"),
    ],
)
def test_scaling_refusals(arguments, words, tmp_path, capsys):
    import yaml

    from helix_megatron import cli

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(document()))
    assert cli.main(["compare", str(path), *arguments]) == 2
    assert words in capsys.readouterr().err


# ---- in a browser

_PATH = Path(__file__).parents[2] / "docs" / "make_screenshot.py"
_SPEC = importlib.util.spec_from_file_location("make_screenshot", _PATH)
browser = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(browser)
PROBE = """
<script>
addEventListener("load", () => {
  const found = {width: innerWidth, page: document.documentElement.scrollWidth, figures: {}};
  for (const svg of document.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;  // the other of wide and narrow
    const texts = [...svg.querySelectorAll("text")].filter(t => t.textContent.trim());
    const boxes = texts.map(t => t.getBoundingClientRect());
    const overlaps = [], outside = [];
    boxes.forEach((a, i) => {
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 ||
          a.bottom > frame.bottom + 1) outside.push(texts[i].textContent);
      boxes.slice(i + 1).forEach((b, j) => {
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (across > 1.5 && down > 2.5) overlaps.push([texts[i].textContent, texts[i + 1 + j].textContent]);
      });
    });
    const axes = [...svg.querySelectorAll("g[id*='axes_']")].map(group =>
      [...group.querySelectorAll("path, use")].filter(mark => {
        const paint = getComputedStyle(mark), box = mark.getBoundingClientRect();
        const colour = /^rgb\\((\\d+), (\\d+), (\\d+)\\)$/;
        const grey = c => {
          const m = colour.exec(c);
          return !m || (m[1] == m[2] && m[2] == m[3] && m[1] > 235);
        };
        return box.width > 1 && box.height > 1 && !(grey(paint.fill) && grey(paint.stroke)) &&
               !mark.closest("g[id*='matplotlib.axis']");
      }).length);
    const key = svg.closest("figure") ? svg.closest("figure").id : "alone";
    const smallest = Math.min(...boxes.map(b => b.height));
    found.figures[key] = {overlaps, outside, axes, texts: texts.length, smallest};
  }
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""


FRAME = """
<pre id="found"></pre><iframe src="{}" style="border: 0; width: {}px; height: 900px"></iframe>
<script>addEventListener("message", e => document.getElementById("found").textContent = e.data)</script>
"""  # a window of its own cannot be as narrow as a phone


def looked_at(path, width, tmp_path):
    """What PROBE finds on a page in a window of `width` pixels."""
    if browser.CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium lets this test look at the page")
    probed, frame = tmp_path / f"probed-{width}.html", tmp_path / f"frame-{width}.html"
    probed.write_text(path.read_text().replace("</body>", PROBE + "</body>"))
    frame.write_text(FRAME.format(probed.name, width))
    command = [
        browser.CHROMIUM,
        *browser.FLAGS,
        f"--user-data-dir={tmp_path}/profile-{width}",
        "--window-size=1600,1000",
    ]
    command += ["--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180)
    match = re.search(r'<pre id="found">(.+?)</pre>', run.stdout, re.DOTALL)
    assert match, run.stdout[-2000:] + run.stderr[-2000:]
    return json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_in_a_browser(report, width, tmp_path):
    """On a screen and on a phone: no empty axes, no label over another or outside, none too small to read."""
    found = looked_at(report[0] / "report.html", width, tmp_path)
    assert found["width"] == width
    assert found["page"] <= width  # tables scroll by themselves, the page does not
    assert set(found["figures"]) == {plot.key for plot in figures.PLOTS} - {"scaling"}
    for key, figure in found["figures"].items():
        assert figure["overlaps"] == [], key
        assert figure["outside"] == [], key
        assert figure["axes"] and all(marks > 0 for marks in figure["axes"]), (key, figure["axes"])
        assert figure["texts"] > 5, key
        assert figure["smallest"] > 8, key


def test_the_picture_of_the_page(report, tmp_path, monkeypatch):
    """What makes the README's picture: the page in the size that was asked for, and not an empty one."""
    if browser.CHROMIUM is None:
        pytest.skip("no chromium here")
    from PIL import Image

    out = tmp_path / "phone.png"
    command = ["make_screenshot.py", str(report[0]), "--png", str(out), "--width", "390", "--height", "700"]
    monkeypatch.setattr("sys.argv", command)
    browser.main()
    with Image.open(out) as picture:
        assert picture.size == (390, 700)
        shades = picture.convert("L").crop((0, 0, 390, 100)).histogram()
        assert sum(shades[:100]) > 200  # the title's letters
    with pytest.raises(RuntimeError, match=r"no-such-report.html is not there"):
        browser.screenshot(tmp_path / "no-such-report.html", out, 390, 700)


def test_the_probe_sees_what_is_wrong(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 2))
    axes = figure.subplots(1, 2)
    axes[0].plot([1, 2], [1, 2])  # the other stays empty
    axes[0].set_xticks([1, 1.01], ["one long label", "another one"])
    figure.text(0.95, 0.5, "runs out of the figure")
    path = tmp_path / "bad.html"
    wide = '<div style="width: 3000px">x</div>'
    path.write_text(f"<body>{drawing.svg(figure, 'bad')}{wide}</body>")
    found = looked_at(path, 500, tmp_path)
    assert found["page"] > 500
    bad = found["figures"]["alone"]
    assert ["one long label", "another one"] in bad["overlaps"]
    assert "runs out of the figure" in bad["outside"]
    assert [marks > 0 for marks in bad["axes"]] == [True, False]
