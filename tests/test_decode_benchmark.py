"""benchmarks/decode.py on 8 ranks: both sides compute the same; bytes and collectives are exact."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

PATH = Path(__file__).parents[1] / "benchmarks" / "decode.py"


def test_the_benchmark_counts_what_it_should(tmp_path):
    out = tmp_path / "decode.json"
    options = "--case g2 --contexts 300 512 --batches 3 --turns 1 --layers 1 --out".split()
    printed = subprocess.check_output([sys.executable, PATH, *options, out], text=True).splitlines()
    document = json.loads(printed[-1])
    assert (
        document == json.loads(out.read_text())
        and out.with_suffix(".md").read_text().splitlines() == printed[:-1]
    )
    assert document["graph"].startswith("skipped") and document["attends with"]["Helix"]
    rows = {(r["side"], r["context"]): r for r in document["rows"]}
    total = 2 * 2 * 128 * 4  # K and V of both KV heads, bytes per token
    for context in (300, 512):
        theirs, ours = rows["Megatron", context], rows["Helix sequence", context]
        assert theirs["kv_bytes_per_rank"] == 3 * context * total // 2  # a KV head on 4 ranks each
        assert ours["kv_bytes_per_rank"] == 3 * context * total // 8
        assert theirs["collectives_inside_attention"] == 1 and ours["collectives_inside_attention"] == 2
        assert ours["message_bytes"] == rows["Helix sequence", 300]["message_bytes"]
        tokens, heads, slice_dim, m = 64, 8, 32, 4  # 3 requests are padded as Megatron pads them
        assert theirs["tokens"] == ours["tokens"] == tokens and theirs["mode"] == ours["mode"] == "eager"
        gathered, returned = (heads + 2) * slice_dim, heads // m * (128 + 1)
        assert ours["message_bytes"] == (m - 1) * tokens * (gathered + returned) * 4
        sliced, auto = rows["Helix dim", context], rows["Helix auto", context]
        assert auto["is"] == "Helix dim" and auto["samples"] == sliced["samples"]
        assert sliced["kv_bytes_per_rank"] == ours["kv_bytes_per_rank"]
        assert sliced["collectives_inside_attention"] == 1
        assert sliced["message_bytes"] == 2 * (m - 1) / m * 3 * context * heads * 4  # fp32 scores


def test_where_helix_starts_to_win(monkeypatch):
    monkeypatch.syspath_prepend(PATH.parent)  # as when it is run
    spec = importlib.util.spec_from_file_location("decode", PATH)
    decode = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(decode)

    def rows(*ratios):
        return [
            {"case": "mqa", "mode": "eager", "batch": 1, "side": side, "context": 10**k, "time_ratio": ratio}
            for k, ratio in enumerate(ratios)
            for side in ("Megatron", "Helix")
        ]

    assert [decode.chosen(2, context, True) for context in (6144, 6145)] == ["Helix dim", "Helix sequence"]
    assert decode.chosen(2, 128, False) == "Helix sequence"  # on GPUs
    sharded = {"kv_cache": "sequence"}  # on 8 ranks, of which 4 or 8 share a head
    sides = (2, None, False), (2, sharded, True), (2, sharded, False)
    blocks = [decode.block_tokens(*side) for side in sides]
    assert blocks == [256, 256, 1024] and decode.block_tokens(1, sharded, False) == 2048
    assert [decode.flash_version(*given) for given in ((True, None), (False, 2))] == [None, 2]
    for ratios, start in [((0.9, 1.1, 0.5), 100), ((0.9, 0.8), 1), ((0.9, 1.0), None)]:
        assert [win["from"] for win in decode.crossovers(rows(*ratios))] == [start]
