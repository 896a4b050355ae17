"""Rates from a check.json: kernel times of layouts that were not used for calibrating, and refusals."""

import json
from pathlib import Path

import pytest

from helix_megatron import cli
from helix_megatron.plan import calibration, clusters

STORED = Path(__file__).parents[2] / "benchmarks/results/h200/attention_layer_fused_h200.json"
LAYOUTS = {
    "Megatron TP8": (8, None, None),
    "Megatron TP16": (16, None, None),
    "Helix 8x2 heads": (16, [8, 2], "heads"),
    "Helix 8x2 dims": (16, [8, 2], "dims"),
    "Helix 4x4 heads": (16, [4, 4], "heads"),
}


def stored_rows():
    """The stored H200 profiles as rows of a check: Llama-70B's attention layer, RoPE not fused."""
    found = {}
    for profile in json.loads(STORED.read_text()):
        tp, grid, placement = LAYOUTS[profile["name"]]
        us = {"packing" if name == "memcpy/other" else name: value for name, value in profile["us"].items()}
        found[profile["name"]] = dict(
            case=profile["name"], status="measured", detail="", heads=64, kv_heads=8, dim=128, hidden=8192,
            sequence=8192, batch=1, dtype="bf16", tp=tp, grid=grid, placement=placement, rope_fusion=False,
            us=us, core=profile["core"],
        )  # fmt: skip
    return found


@pytest.mark.parametrize("known", LAYOUTS)
def test_one_profiled_layout_predicts_the_others(known):
    """The sum within 15 %, and so every class; a preset alone does not reach that for attention."""
    rows = stored_rows()
    cluster = calibration.calibrate(clusters.find("dgx-h200"), [rows[known]])
    assert calibration.predict_kernels(rows[known], cluster) == pytest.approx(rows[known]["us"])
    for name, row in rows.items():
        predicted = calibration.predict_kernels(row, cluster)
        assert sum(predicted.values()) == pytest.approx(sum(row["us"].values()), rel=0.15), name
        assert predicted == pytest.approx(row["us"], rel=0.15), name


def test_a_preset_alone_is_further_off():
    row = stored_rows()["Helix 8x2 heads"]
    predicted = calibration.predict_kernels(row, clusters.find("dgx-h200"))
    assert predicted["attention"] != pytest.approx(row["us"]["attention"], rel=0.15)


def document(rows, gpu="NVIDIA H200", **more):
    hardware = {"gpus": [gpu] if gpu else [], "cpu": "", "cores": 2, "memory_bytes": 1}
    sections = {"layers": {"status": "passed", "rows": rows}, **more}
    return {"format": calibration.FORMAT, "where": f"1 x {gpu}" if gpu else "host mode, 2 cores",
            "revision": "0123456789abcdef", "hardware": hardware, "sections": sections}  # fmt: skip


@pytest.fixture
def written(tmp_path):
    def write(found):
        path = tmp_path / "check.json"
        path.write_text(found if isinstance(found, str) else json.dumps(found))
        return str(path)

    return write


def test_the_command_plans_with_what_was_measured(written, capsys):
    rows = list(stored_rows().values())
    link = dict(case="all_gather 1x8", status="measured", latency=1e-5, bandwidth=3e11, entry="links")
    rate = dict(case="rate of update", status="measured", rate="update", flops=1e12, moved=3e12, launch=1e-6)
    path = written(document(rows, collectives={"status": "passed", "rows": [link, rate]}))
    cluster = calibration.apply_check(clusters.find("dgx-h200"), path)
    assert cluster.links["all_gather 1x8"].bandwidth == 3e11 and cluster.rates["update"].bandwidth == 3e12
    plan = [
        "plan",
        "--model",
        "llama-3.1-70b",
        "--cluster",
        "dgx-h200",
        "--nodes",
        "2",
        "--json",
        "--top",
        "1",
    ]
    seconds = []
    for more in ([], ["--check", path]):
        assert cli.main([*plan, *more]) == 0
        seconds.append(json.loads(capsys.readouterr().out))
    sources = seconds[1]["cluster"]["sources"]
    assert any("kernels measured by helix check on 1 x NVIDIA H200" in source for source in sources)
    assert seconds[0]["cluster"]["rates"]["gemm"] != seconds[1]["cluster"]["rates"]["gemm"]


def test_an_unfused_fall_back_does_not_count_as_fused_attention(written):
    rows = [{**row, "core": "Transformer Engine's unfused"} for row in stored_rows().values()]
    with pytest.raises(ValueError, match="has no kernel times: its section layers is missing or failed"):
        calibration.apply_check(clusters.find("dgx-h200"), written(document(rows)))


@pytest.mark.parametrize(
    ("found", "cluster", "words"),
    [
        (document([], gpu=""), "dgx-h200", "was made on a host"),
        (
            document(list(stored_rows().values())),
            "dgx-a100",
            "made on NVIDIA H200, and the cluster is dgx-a100",
        ),
        (document([]), "dgx-h200", "has no kernel times"),
        ("{}", "dgx-h200", "is no check.json of this version"),
        ("not JSON", "dgx-h200", "is no JSON"),
    ],
)
def test_a_check_that_says_nothing_of_these_gpus_is_refused(written, found, cluster, words):
    with pytest.raises(ValueError, match=words):
        calibration.apply_check(clusters.find(cluster), written(found))
