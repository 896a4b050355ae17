"""`helix show`: every row is drawn once, the words are the layout's, the counts those of the design."""

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
import pytest

from helix_megatron import cli, show
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import AttentionShape, HelixGrid
from helix_megatron.partition.layout import HelixLayout


def test_ranges():
    assert show.ranges(np.array([6, 4, 5, 0, 1])) == [(0, 2), (4, 7)]


@pytest.mark.parametrize("placement", ["dims", "heads"])
def test_bars_fill_the_width_once(placement):
    layout = HelixLayout(AttentionShape(8, 2, 16, 16), HelixGrid(2, 2), placement)
    root = ElementTree.fromstring(show.svg([("title", "note", layout)]))
    bars = [rect for rect in root.iter() if rect.tag.endswith("rect") and rect.get("y") == "66"]
    spans = sorted((float(bar.get("x")), float(bar.get("width")), bar.get("fill")) for bar in bars)
    assert sum(width for _, width, _ in spans) == pytest.approx(960, abs=3)
    assert all(abs(a[0] + a[1] - b[0]) < 0.3 for a, b in pairwise(spans))
    assert {fill for _, _, fill in spans} == set(show.COLOURS[:4])


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    picture = tmp_path / "qwen2.svg"
    flags = "--heads 28 --kv-heads 4 --tensor-model-parallel-size 8"
    assert cli.main(["show", *flags.split(), "--svg", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "grid 4x2" in said
    row = re.search(r"│ 3 +│ 1 +│ 1 +│ (.*)", said)[1]
    assert [cell.strip() for cell in row.split("│")][:5] == [
        "7-13", "32-63, 96-127", "1", "32-63, 96-127", "64-127",
    ]  # fmt: skip
    assert "K and V: 128 elements" in said and "queries: 224 elements" in said
    assert ElementTree.fromstring(picture.read_text()) is not None
    assert cli.main(["show", *flags.split(), "--helix-head-parallel-size", "3"]) == 2
    assert "legal" in capsys.readouterr().err


def test_elements_of_the_design():
    """H=64, G=8, d=128, T=16 as 8x2: 640 with `dims`, 128 with `heads`."""
    for placement, expected in (("dims", 640), ("heads", 128)):
        layout = HelixConfig(8, 2, query_placement=placement).resolve(64, 8, 128, 16).layout
        assert sum(layout.exchanged_elements().values()) == expected
    plan = HelixConfig(8, 2).resolve(64, 8, 128, 16)
    assert "Megatron would gather the mixed QKV: 9600" in show.exchange_lines(plan)[-1]
